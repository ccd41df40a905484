"""Distances between distributions over two vocabularies, and tokens of two tokenizers in one text, against sums by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_vocabularies import by_matching, by_sorting, softmax
from tongues import byte_level, sentence_piece

from tsdkd import fused
from tsdkd.data.alignment import Pieces, paired_by_text, same_tokens, surfaces
from tsdkd.losses import generalized_jsd
from tsdkd.losses.vocabularies import matched_divergence, sorted_distance
from tsdkd.methods import GOLD, ULD
from tsdkd.types import Counts, Divergence, DivergenceTerm, Head, Objective, RankingTerm, ReadPlan, TokenBatch, VocabularyMap

LOGITS = st.lists(st.floats(-4, 4), min_size=2, max_size=7)


@settings(max_examples=60, deadline=None)
@given(student=LOGITS, teacher=LOGITS, beta=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), seed=st.integers(0, 999))
def test_distances_are_the_sums_by_hand(student, teacher, beta, seed):
    draw = random.Random(seed)
    count = draw.randint(0, min(len(student), len(teacher)))
    pairs = list(
        zip(draw.sample(range(len(student)), count), draw.sample(range(len(teacher)), count), strict=True)
    )  # fmt: skip
    ours, theirs = (torch.tensor(logits, dtype=torch.float64) for logits in (student, teacher))
    assert sorted_distance(ours, theirs).item() == pytest.approx(by_sorting(student, teacher), abs=1e-12)
    ids = [torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1)]
    value = matched_divergence(ours, theirs, *ids, beta=beta, matched_weight=0.7, unmatched_weight=1.3).item()
    assert value == pytest.approx(by_matching(student, teacher, pairs, beta, 0.7, 1.3), abs=1e-12)
    assert value > -1e-12


def test_with_every_token_shared_it_is_the_generalized_jsd():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 9, dtype=torch.float64)
    order = torch.randperm(9)
    for beta in (0.0, 0.1, 0.5, 1.0):
        value = matched_divergence(student, teacher[:, order], order, torch.arange(9), beta=beta, matched_weight=1.0)
        torch.testing.assert_close(value, generalized_jsd(student, teacher, beta))
    torch.testing.assert_close(sorted_distance(student, student[:, order]), torch.zeros(5, dtype=torch.float64))


def crossing_batch(dtype=torch.float64):
    """Two completions of 5 and 3 tokens, paired at some of them; heads of 11 and 17 ids."""
    torch.manual_seed(1)
    hidden, theirs = torch.randn(8, 6, dtype=dtype), torch.zeros(8, 4, dtype=dtype)
    pairs = ((0, 2, 3), (1,))
    at = [0, 2, 3, 6]
    theirs[at] = torch.randn(4, 4, dtype=dtype)
    plan = ReadPlan((5, 3), (5, 3), (3, 1), pairs=pairs)
    batch = TokenBatch(hidden, theirs, (5, 3), token_ids=torch.arange(8), plan=plan)
    return batch, Head(torch.randn(11, 6, dtype=dtype)), Head(torch.randn(17, 4, dtype=dtype)), at


@pytest.mark.parametrize("method", [ULD(cross_entropy_weight=0.5), GOLD(), GOLD(gate="entropy_gap", kd_temperature=2.0)])
def test_engines_agree_and_read_the_pairs_alone(method):
    """By hand from the pairs' logits; what stands for the teacher elsewhere changes nothing."""
    batch, ours, theirs, at = crossing_batch()
    ids = torch.tensor([0, 3, 5]), torch.tensor([16, 2, 7])
    bound = method.across(VocabularyMap(*ids, tokens=17))
    found = []
    for impl in ("reference", "torch"):
        for noise in (0.0, 5.0):
            hidden = batch.student_hidden.clone().requires_grad_()
            weight = ours.weight.clone().requires_grad_()
            teacher = batch.teacher_hidden.clone()
            teacher[[i for i in range(8) if i not in at]] += noise
            given = replace(batch, student_hidden=hidden, teacher_hidden=teacher)
            counts = bound.counts(batch.lengths, None, (3, 1))
            terms = bound.loss(given, replace(ours, weight=weight), theirs, counts=counts, impl=impl, chunk_tokens=2)
            terms.loss.backward()
            found.append((terms.loss.detach(), hidden.grad, weight.grad, terms))
    for loss, hidden, weight, _ in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(hidden, found[0][1])
        torch.testing.assert_close(weight, found[0][2])
    terms = found[-1][3]
    tau = method.kd_temperature
    s, t = (batch.student_hidden @ ours.weight.T / tau).tolist(), (batch.teacher_hidden @ theirs.weight.T / tau).tolist()
    expected = 0.0
    for row in at:
        if isinstance(method, ULD):
            expected += by_sorting(s[row], t[row])
            continue
        pairs = list(zip(ids[0].tolist(), ids[1].tolist(), strict=True))
        value = by_matching(s[row], t[row], pairs, method.beta, 3 / 17, 14 / 17)
        entropies = [-sum(p * math.log(p) for p in softmax(logits)) for logits in (s[row], t[row])]
        expected += value / (1 + math.exp(entropies[1] - entropies[0])) if method.gate != "none" else value
    expected /= len(at)
    if isinstance(method, ULD):
        expected += 0.5 * sum(-math.log(softmax(s[row])[row]) for row in range(8)) / 8
    assert terms.loss.item() == pytest.approx(expected, rel=1e-9)
    count = terms.sums["loss/direct"][1]
    assert count == 4 and terms.sums["teacher/entropy"][1] == 4 and "candidates/top1_agreement" not in terms.sums
    entropy = sum(-sum(p * math.log(p) for p in softmax(logits)) for logits in s) / 8
    assert terms.sums["student/entropy"][0].item() / 8 == pytest.approx(entropy, rel=1e-9)
    assert terms.statistics.teacher_entropy[terms.statistics.mask].count_nonzero() == 4


def test_the_gradient_is_that_of_small_steps():
    batch, ours, theirs, _ = crossing_batch()
    bound = GOLD().across(VocabularyMap(torch.tensor([0, 3]), torch.tensor([16, 2]), tokens=17))
    for method in (bound, ULD().across(VocabularyMap(torch.tensor([0]), torch.tensor([0]), tokens=17))):

        def loss(hidden, method=method):
            return method.loss(replace(batch, student_hidden=hidden), ours, theirs, impl="reference").loss

        assert torch.autograd.gradcheck(loss, batch.student_hidden.clone().requires_grad_(), rtol=1e-4)


def test_counts_of_a_step_are_those_of_the_pairs():
    bound = ULD(cross_entropy_weight=1.0).across(VocabularyMap(torch.tensor([0]), torch.tensor([0]), tokens=17))
    counts = bound.counts([5, 3], None, (3, 1))
    assert counts.divisors == {"direct": 4, "cross_entropy": 8} and counts.tokens == 8
    assert Counts.from_dict(counts.to_dict()).divisors == counts.divisors


def test_what_cannot_be_is_refused():
    batch, ours, theirs, _ = crossing_batch()
    own = Divergence(sorted_distance, "sorted_distance", own_vocabularies=True)
    for term, told in (
        (RankingTerm(name="indirect", num_candidates=3), "ranks the student's candidates"),
        (DivergenceTerm(name="direct", divergence=generalized_jsd), "id by id"),
        (DivergenceTerm(name="direct", divergence=own, selection=lambda s: s.mask), "has a selection"),
    ):
        with pytest.raises(ValueError, match=told):
            fused.evaluate(Objective((term,)), batch, ours, theirs)
    with pytest.raises(ValueError, match="each token has one id on either side"):
        VocabularyMap(torch.tensor([1, 1]), torch.tensor([2, 3]), tokens=9)


TOKENIZERS = {"bytes": byte_level(), "few bytes": byte_level(300), "sentences": sentence_piece()}
NAMES = st.sampled_from(sorted(TOKENIZERS))
PIECES = [*"ab 0 .\n\t<", "é", "東", "🙂", "Tom", " apples", "  "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(max_examples=80, deadline=None)
@given(
    text=TEXTS,
    name=st.sampled_from(sorted(TOKENIZERS)),
    before=st.sampled_from(["Q?", "Q? ", "ap", "\n"]),
    seed=st.integers(0, 99),
)
def test_tokens_begin_where_the_text_before_them_ends(text, name, before, seed):
    """As the tokenizer itself decodes what is before each, behind a prompt; also of ids that no tokenizer would write."""
    tokenizer = TOKENIZERS[name]
    pieces = Pieces(tokenizer)
    prompt = tokenizer("\n" + before, add_special_tokens=False)["input_ids"]
    ids = pieces.behind(text, (before, "\n"))
    whole, starts = pieces.starts(ids)
    assert whole == text
    already = len(tokenizer.decode(prompt))
    for number, start in enumerate(starts):
        read = tokenizer.decode(prompt + ids[:number])[already:]
        if start is not None:
            assert read == whole[:start]
        else:
            assert read[-1] == "\ufffd"
    drawn = random.Random(seed).choices(range(3, len(tokenizer)), k=9)
    text, starts = pieces.starts(drawn)
    known = [start for start in starts if start is not None]
    assert len(starts) == 9 and known == sorted(known) and (not known or known[-1] <= len(text))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, first=st.sampled_from(sorted(TOKENIZERS)), second=st.sampled_from(sorted(TOKENIZERS)))
def test_pairs_have_the_same_text_before_them(text, first, second):
    """And every two tokens that do are a pair; of one tokenizer each is its own."""
    mine, their = TOKENIZERS[first], TOKENIZERS[second]
    ours, theirs = (Pieces(t).behind(text, ("\n",)) for t in (mine, their))
    found = paired_by_text(Pieces(mine).starts(ours), Pieces(their).starts(theirs))
    first_at = []
    for tokenizer, ids in ((mine, ours), (their, theirs)):
        prompt = tokenizer("\n", add_special_tokens=False)["input_ids"]
        already = len(tokenizer.decode(prompt))
        read = [tokenizer.decode(prompt + ids[:number])[already:] for number in range(len(ids))]
        first_at.append({text: number for number, text in reversed(list(enumerate(read)))})
    shared = [text for text in first_at[0] if text in first_at[1] and "\ufffd" not in text]
    assert found == sorted((first_at[0][text], first_at[1][text]) for text in shared)
    if first == second and text.isascii():
        assert found == [(n, n) for n in range(len(ours))]


def test_the_same_tokens_are_those_of_the_same_text():
    bytes_, sentences = TOKENIZERS["bytes"], TOKENIZERS["sentences"]
    pairs = same_tokens(sentences, bytes_, (sentences.eos_token_id, bytes_.eos_token_id))
    named = {sentences.convert_ids_to_tokens(i): bytes_.convert_ids_to_tokens(j) for i, j in pairs}
    assert named["▁has"] == "Ġhas" and named["<0x0A>"] == "Ċ" and named["</s>"] == "<end>" and "<unk>" not in named
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    for i, j in pairs:
        if i != sentences.eos_token_id:
            assert surfaces(sentences)[i] == surfaces(bytes_)[j]
    assert same_tokens(bytes_, bytes_, (1, 1)) == [(i, i) for i in range(len(bytes_))]
    added = byte_level()
    added.add_tokens(["<thé> x"])
    assert surfaces(added)[len(added) - 1] == "<thé> x".encode()
