"""Who writes the answers: the draw of a step's source, writing with two models, writing once, and given answers."""

from __future__ import annotations

import json
import math

import oracles_rivals as rivals
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from tsdkd.data.completions import completion_text, ids_after
from tsdkd.rollouts import InterleavedWriter, RolloutSource, mixed, speculative, write_once
from tsdkd.rollouts.sources import fresh_share
from tsdkd.types import Replay, Rollouts, RolloutSpec

# ---------------------------------------------------------------------- sources


@given(
    st.floats(0, 1),
    st.sampled_from(["decreasing", "constant", "increasing"]),
    st.integers(0, 99),
    st.booleans(),
    st.integers(0, 1000),
)
def test_distillms_draw_equals_the_oracle(phi, schedule, step, full, seed):
    import random

    source = RolloutSource(RolloutSpec(replay=Replay(capacity=8, start=phi, schedule=schedule)), seed, rows=4)
    source.keep([{"prompt": str(i)} for i in range(8 if full else 4)])
    lot = random.Random(f"{seed}/{step}").random()
    s = rivals.s_of(schedule, step, 100)
    assert fresh_share(schedule, step, 100) == pytest.approx(s)
    assert source.draw(step, 100) == rivals.source_of_batch(lot, phi, s, full)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30))
def test_the_share_grows_when_an_evaluation_is_worse(losses):
    source = RolloutSource(RolloutSpec(replay=Replay()), 0, rows=1)
    share, previous = 0.0, None
    for loss in losses:
        source.evaluated(loss)
        if previous is not None:
            share = rivals.next_phi(share, previous, loss)
        previous = loss
        assert source.share == pytest.approx(share)


def test_lambda_is_the_share_of_steps_and_every_process_draws_alike():
    draws = [RolloutSource(RolloutSpec(share=0.3), seed=5, rows=1).draw(step, 10_000) for step in range(10_000)]
    again = RolloutSource(RolloutSpec(share=0.3), seed=5, rows=99, processes=8)
    assert [again.draw(step, 10_000) for step in range(100)] == draws[:100]
    assert set(draws) == {"fresh", "dataset"}
    assert abs(draws.count("fresh") / 10_000 - 0.3) < 5 * math.sqrt(0.21 / 10_000)
    for share, only in ((1.0, "fresh"), (0.0, "dataset")):
        assert {RolloutSource(RolloutSpec(share=share), 0, 1).draw(step, 9) for step in range(200)} == {only}


def test_the_buffer_forgets_the_oldest_and_continues_from_its_state():
    source = RolloutSource(RolloutSpec(replay=Replay(capacity=4, start=1.0)), 0, rows=2)
    source.keep([{"prompt": "a", "completion_ids": [1]}, {"prompt": "b", "completion_ids": [2]}])
    source.keep([{"prompt": str(i), "completion_ids": [i]} for i in range(3)])
    assert [row["prompt"] for row in source.buffer] == ["b", "0", "1", "2"]
    source.evaluated(2.0)
    other = RolloutSource(RolloutSpec(replay=Replay(capacity=4)), 0, rows=2)
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert other.replayed(7, 2) == source.replayed(7, 2) and len(other.replayed(7, 4)) == 4
    assert (other.share, other.previous_loss) == (1.0, 2.0)


def test_a_buffer_that_no_step_fits_into_is_refused():
    with pytest.raises(ValueError, match=r"replay_capacity=10 over 2 processes is 5 rows each, but a step takes 8.*Pass 16"):
        RolloutSource(RolloutSpec(replay=Replay(capacity=10)), 0, rows=8, processes=2)


# ---------------------------------------------------------------------- two models


def chi_square(counts, probabilities):
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True) if p > 0)


@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 5])
def test_speculative_sampling_has_the_distribution_of_its_definition(top_k):
    torch.manual_seed(0)
    student, teacher = torch.tensor([0.5, 1.5, -0.3, 0.8, 0.0]), torch.tensor([1.0, 0.2, 1.4, 1.4, -2.0])
    rule, draws = speculative(top_k, 0.9), 40_000
    ids, recorded = rule(student.expand(draws, 5), teacher.expand(draws, 5))
    expected = rivals.speculative_step_distribution(student.tolist(), teacher.tolist(), top_k, 0.9)
    counts = torch.bincount(ids, minlength=5).tolist()
    assert chi_square(counts, expected) < 18.47  # 0.1 % of four degrees of freedom
    best = sorted(range(5), key=lambda v: (-teacher[v].item(), v))[:top_k]
    share = (student / 0.9).softmax(-1)[best].sum().item()
    assert recorded["accepted"].mean().item() == pytest.approx(share, abs=5 * math.sqrt(0.25 / draws))


def test_mixed_sampling_has_the_mixtures_distribution_and_records_it():
    torch.manual_seed(0)
    student, teacher = torch.tensor([0.5, 1.5, -0.3]), torch.tensor([1.0, 0.2, 2.4])
    ids, recorded = mixed(0.2, 1.3, 0.7)(student.expand(40_000, 3), teacher.expand(40_000, 3))
    expected = torch.tensor(rivals.mixed_step_distribution(student.tolist(), teacher.tolist(), 0.2, 1.3))
    assert chi_square(torch.bincount(ids, minlength=3).tolist(), expected.tolist()) < 13.82  # 0.1 %, two degrees
    torch.testing.assert_close(recorded["mixture"], expected.log().float()[ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded["student"], (student / 0.7).log_softmax(-1)[ids])
    torch.testing.assert_close(recorded["teacher"], (teacher / 0.7).log_softmax(-1)[ids])


def writer(teacher, rule, **options):
    return InterleavedWriter(teacher, rule, **{"vocab_size": 64, "max_new_tokens": 9, "ends": [1], "pad_id": 0, **options})


def greedy_of(logits_of):
    return lambda student, teacher: (logits_of(student, teacher).argmax(-1), {"score": teacher.amax(-1)})


PROMPTS = [[5, 6, 7, 8, 9], [11], [4, 3], [30, 31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_caches_give_what_whole_sequences_give(family):
    """Each token is the rule's choice on both models' logits of the whole sequence so far, and what is recorded is theirs."""
    student, teacher = tiny_model(family, seed=1, closes_soon=True), tiny_model(family, seed=2, hidden=48)
    rule = greedy_of(lambda s, t: s + 0.3 * t)
    completions, recorded = writer(teacher, rule, vocab_size=50).write(student, PROMPTS)
    for prompt, completion, scores in zip(PROMPTS, completions, recorded["score"], strict=True):
        assert 1 <= len(completion) <= 9 and len(scores) == len(completion)
        assert 1 not in completion[:-1] and (len(completion) == 9 or completion[-1] == 1)
        for t, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:t]])
            with torch.no_grad():
                s, z = (model(input_ids=ids).logits[0, -1, :50] for model in (student, teacher))
            assert token == (s + 0.3 * z).argmax().item()
            assert scores[t] == pytest.approx(z.max().item(), abs=1e-4)


def test_the_ends_of_speculation_are_the_student_and_the_teacher():
    """K = 0 writes as the teacher alone does, K = vocabulary as the student: compared by frequencies of the first token."""
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    prompts = [[5, 6, 7]] * 4000
    for top_k, model in ((0, teacher), (64, student)):
        torch.manual_seed(1)
        completions, recorded = writer(teacher, speculative(top_k, 1.0), max_new_tokens=1).write(student, prompts)
        with torch.no_grad():
            p = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor([c[0] for c in completions]), minlength=64)
        common = p > 0.002
        pooled = [*counts[common].tolist(), counts[~common].sum().item()]
        assert chi_square(pooled, [*p[common].tolist(), p[~common].sum().item()]) < len(pooled) + 5 * math.sqrt(2 * len(pooled))
        assert {v for row in recorded["accepted"] for v in row} == {float(top_k > 0)}


def test_one_model_writes_alone():
    model = tiny_model(seed=3, closes_soon=True)
    completions, _ = writer(None, greedy_of(lambda s, t: t)).write(model, PROMPTS)
    ids = model.generate(torch.tensor([PROMPTS[3]]), do_sample=False, max_new_tokens=9, pad_token_id=0)[0, 7:].tolist()
    assert completions[3] == (ids[: ids.index(1) + 1] if 1 in ids else ids)


# ---------------------------------------------------------------------- written once


def once(path, prompts, calls, **options):
    def write(batch):
        calls.append(batch)
        return [[len(ids), *ids] for ids in batch]

    return write_once(path, prompts, write, settings={"teacher": "t", "temperature": 0.0}, batch_size=2, **options)


def test_answers_are_written_once_and_an_interruption_loses_a_batch_at_most(tmp_path):
    path, calls = tmp_path / "a" / "answers.jsonl", []
    prompts = [[1], [2, 3], [1], [4, 5, 6]]
    expected = [[1, 1], [2, 2, 3], [1, 1], [3, 4, 5, 6]]
    assert once(path, prompts, calls) == expected
    assert sorted(ids for batch in calls for ids in batch) == [[1], [2, 3], [4, 5, 6]]
    calls.clear()
    assert once(path, prompts, calls) == expected and calls == []
    shard = path.with_name("answers-0.jsonl")
    text = shard.read_text()
    for torn in ("", text[:9]):  # interrupted in the header
        shard.write_text(torn)
        assert once(path, prompts, calls) == expected and sum(map(len, calls)) == 3
        assert once(path, prompts, []) == expected and shard.read_text() == text
        calls.clear()
    shard.write_text(text[:-5])  # torn in its last line
    assert once(path, [*prompts, [9]], calls) == [*expected, [1, 9]]
    assert sum(map(len, calls)) == 2 and once(path, prompts, []) == expected


def test_processes_share_the_writing(tmp_path):
    """Each writes its own part, and both read every answer."""
    from threading import Barrier, Thread

    path, prompts, barrier = tmp_path / "answers.jsonl", [[i, i + 1] for i in range(7)], Barrier(2)
    calls, results = ([], []), [None, None]

    def process(rank):
        results[rank] = once(path, prompts, calls[rank], process=rank, processes=2, barrier=barrier.wait)

    threads = [Thread(target=process, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert results == [[[2, *ids] for ids in prompts]] * 2
    assert sorted(sum(len(batch) for batch in made) for made in calls) == [3, 4]


def test_other_settings_or_a_damaged_line_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    once(path, [[1], [2]], [])
    with pytest.raises(ValueError, match=r"was written with temperature=0\.0, but now it is 1\.0"):
        write_once(path, [[1]], lambda b: b, settings={"teacher": "t", "temperature": 1.0}, batch_size=1)
    shard = path.with_name("answers-0.jsonl")
    lines = shard.read_text().splitlines()
    shard.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"answers-0.jsonl, line 2 is damaged"):
        once(path, [[1]], [])


# ---------------------------------------------------------------------- given answers


def test_a_rollout_is_cut_to_its_first_trained_tokens():
    rollouts = Rollouts(
        [[1], [2], [3]], [[5, 6, 7, 8], [9], [4, 4]], [[1, 0, 1, 1], [1], [0, 0]], {"x": [[1, 2, 3, 4], [5], [6, 7]]}
    )
    cut = rollouts.first([2, 1, 0])
    assert cut.completion_ids == [[5, 6, 7], [9], []] and cut.completion_mask == [[1, 0, 1], [1], []]
    assert cut.recorded == {"x": [[1, 2, 3], [5], []]} and cut.lengths == [2, 1, 0]
    assert rollouts.trained(rollouts.completion_ids) == [5, 7, 8, 9]


@given(st.lists(st.integers(2, 9), max_size=4), st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_an_answer_ends_and_fits(prompt, answer, limit):
    ids, cut = ids_after(prompt, prompt + answer, [99], {1}, limit)
    assert ids == [*answer, 1][:limit] and cut == (len(answer) + 1 > limit)
    closed, _ = ids_after(prompt, [*prompt, *answer, 1, 3], [99], {1}, 50)
    assert closed == [*answer, 1]


def test_what_is_no_answer_is_refused():
    assert completion_text([{"role": "assistant", "content": "yes"}]) == "yes"
    for wrong in (None, 3, [], [{"role": "assistant"}], [{"content": "a"}, {"content": "b"}]):
        with pytest.raises(ValueError, match="a completion is a text or a list of one assistant message"):
            completion_text(wrong)
