"""The numbers of a completion's table: the paper's equations on the models' own logits, and the trainer's loss."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from tiny import QUESTIONS, save_tiny, tiny_model

from tsdkd.data.pieces import token_texts
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.inspection import inspect_completion, reader_of
from tsdkd.methods import METHODS, TSDKD

WORDS = "12+7=19\n#### 19"


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", seed=1).eval(), tiny_model("qwen2", hidden=48, seed=2).eval()


def table_of(models, completion=WORDS, **options):
    student, teacher = models
    return inspect_completion(student, teacher, QUESTIONS[0], completion, tokenizer=make_tokenizer(), **options)


def oracle(models, table):
    """Both models' log-probabilities at every token of the completion, by their own forward passes, in float64."""
    tokenizer = make_tokenizer()
    prompt = tokenizer(QUESTIONS[0])["input_ids"]
    ids = torch.tensor([[*prompt, *table.token_ids]])
    with torch.no_grad():
        return [model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() for model in models]


def test_every_column_is_the_papers(models):
    method = TSDKD(num_candidates=4, opener_entropy_share=0.4, top_entropy_fraction=0.3)
    table = table_of(models, method=method)
    logits = oracle(models, table)
    student, teacher = (values.log_softmax(-1) for values in logits)
    n, written = len(table), torch.tensor(table.token_ids).unsqueeze(-1)
    assert n > 8 and table.tokens == token_texts(make_tokenizer(), table.token_ids)
    entropies = [-(logs.exp() * logs).sum(-1).numpy() for logs in (student, teacher)]
    gate = 1 / (1 + np.exp(-(entropies[0] - entropies[1])))
    mixture = (0.9 * teacher.exp() + 0.1 * student.exp()).log()
    jsd = 0.9 * (teacher.exp() * (teacher - mixture)).sum(-1) + 0.1 * (student.exp() * (student - mixture)).sum(-1)
    reached = np.cumsum(entropies[0])
    opener = 1 + int((reached < 0.4 * reached[-1]).sum())
    top = set(np.argsort(-entropies[0], kind="stable")[: math.ceil(0.3 * n)].tolist())
    ranking = np.zeros(n)
    for t in range(opener):
        best = sorted(range(64), key=lambda i: (-logits[0][t, i].item(), i))[:4]
        assert table.candidates.ids[t].tolist() == best
        order = sorted(range(4), key=lambda i: (-logits[1][t, best[i]].item(), i))
        assert table.candidates.teacher_ranks[t].tolist() == [order.index(i) for i in range(4)]
        scores = [logits[0][t, best[i]].item() for i in order]
        ranking[t] = sum(math.log(sum(math.exp(s) for s in scores[i:])) - scores[i] for i in range(4))
    expected = {
        "student_entropy": entropies[0],
        "teacher_entropy": entropies[1],
        "divergence": jsd.numpy(),
        "gate/direct": gate,
        "student_log_prob": student.gather(-1, written)[:, 0].numpy(),
        "teacher_log_prob": teacher.gather(-1, written)[:, 0].numpy(),
        "log_ratio": (teacher - student).gather(-1, written)[:, 0].numpy(),
        "contribution/direct": gate * jsd.numpy() / n,
        "contribution/indirect": 0.1 * ranking / opener,
        "contribution/entropy": np.array([entropies[0][t] / math.ceil(0.3 * n) if t in top else 0.0 for t in range(n)]),
        "takes/indirect": np.arange(n) < opener,
        "takes/entropy": [t in top for t in range(n)],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table.columns[name], np.asarray(values, dtype=float), atol=2e-5, rtol=1e-5, err_msg=name)
    probabilities = student.exp().gather(-1, torch.tensor(table.candidates.ids))
    np.testing.assert_allclose(table.candidates.student, probabilities, atol=1e-5)
    np.testing.assert_allclose(
        table.candidates.teacher, teacher.exp().gather(-1, torch.tensor(table.candidates.ids)), atol=1e-5
    )
    assert table.candidates.teacher_best.tolist() == teacher.argmax(-1).tolist()


@pytest.mark.parametrize("name", METHODS)
def test_contributions_sum_to_the_loss_and_to_each_terms_value(models, name):
    teacher = models[1] if METHODS[name]().reads_teacher else None
    table = table_of((models[0], teacher), method=name)
    total = sum(values.sum() for column, values in table.columns.items() if column.startswith("contribution/"))
    assert total == pytest.approx(table.loss, abs=1e-6, rel=1e-6)
    for term, told in table.terms.items():
        assert table.columns[f"contribution/{term}"].sum() == pytest.approx(told["weight"] * told["value"], abs=1e-6, rel=1e-6)
    assert bool(table.note) == (name == "minillm")


def test_the_loss_is_what_the_trainer_evaluates(models, tmp_path):
    """`eval_loss` of the same completion, by the trainer's own evaluation."""
    from tsdkd import TokenDistillConfig, TokenDistillTrainer

    table = table_of(models, method="supervised_kd")
    one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "report_to": "none", "use_cpu": True}
    config = TokenDistillConfig(str(tmp_path), method="supervised_kd", **one)
    rows = [{"prompt": QUESTIONS[0], "completion": WORDS}]
    student, teacher = models
    trainer = TokenDistillTrainer(student, teacher, config, rows, rows, processing_class=make_tokenizer())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(table.loss, rel=1e-5)


def test_a_method_of_ones_own_and_a_selection_are_shown(models):
    def uncertain(statistics):
        return statistics.student_entropy > statistics.student_entropy.median()

    table = table_of(models, method=METHODS["gkd"](selection=uncertain, gate=lambda s: 1 / (1 + s.student_entropy)))
    taken = table.columns["takes/direct"].astype(bool)
    assert 0 < taken.sum() < len(table)
    np.testing.assert_allclose(
        table.columns["gate/direct"][taken], 1 / (1 + table.columns["student_entropy"][taken]), rtol=1e-5
    )
    assert (table.columns["contribution/direct"][~taken] == 0).all()


def test_what_the_student_writes_depends_on_the_seed_alone_and_moves_nothing(models):
    reader = reader_of(*models, "tsd_kd", tokenizer=make_tokenizer(), max_completion_length=12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = [{"prompt": question} for question in QUESTIONS[:2]]
    first, again, other = (reader.rollouts(rows, seed=seed).completion_ids for seed in (0, 0, 1))
    assert first == again != other and torch.equal(torch.get_rng_state(), before)
    assert not models[0].training
    frame = reader.table(reader.rollouts(rows[:1])).frame()
    assert list(frame.columns[:3]) == ["position", "token_id", "token"] and frame["student_entropy"].notna().all()


def test_a_notebook_shows_the_page_and_models_are_also_names(models, tmp_path):
    student, teacher = save_tiny(tmp_path / "s"), save_tiny(tmp_path / "t", seed=3)
    table = inspect_completion(student, teacher, [{"role": "user", "content": QUESTIONS[0]}], WORDS)
    assert (table.student, table.teacher) == ("s", "t") and table._repr_html_().startswith("<iframe srcdoc=")
    assert "assistant" in table.prompt or "<|" in table.prompt
    ids = inspect_completion(student, teacher, QUESTIONS[0], [5, 6, 1])
    assert ids.token_ids == [5, 6, 1]


def test_a_methods_options_are_given_by_name(models):
    table = table_of(models, num_candidates=3, entropy_weight=0.25, max_completion_length=40)
    same = table_of(models, method=TSDKD(num_candidates=3, entropy_weight=0.25), max_completion_length=40)
    own = table_of(models, max_completion_length=40)
    for name, column in table.arrays.items():
        np.testing.assert_array_equal(column, same.arrays[name])
    assert not np.array_equal(table.arrays["contribution/entropy"], own.arrays["contribution/entropy"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_candidtes": 3}, "method 'tsd_kd' has no option 'num_candidtes'"),
        ({"completion": ""}, "prompt 0 has no completion to be read"),
        ({"method": "gdk"}, "gdk"),
        ({"teacher": None}, "no teacher was given"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(models, options, message):
    given = {"student": models[0], "teacher": models[1], "prompt": QUESTIONS[0], "completion": WORDS, **options}
    with pytest.raises(ValueError, match=message):
        inspect_completion(**given, tokenizer=make_tokenizer())


def test_pieces_of_byte_level_and_sentencepiece_tokenizers_are_visible():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = Tokenizer(models.BPE({**characters, "<|end|>": 256, "Ġa": 257}, [("Ġ", "a")]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>")
    text = " a\n😀é<script>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert texts[:2] == [" a", "\n"] and texts[2:6] == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩"] and texts[6:8] == ["⟨C3⟩", "⟨A9⟩"]
    assert "".join(texts[8:]) == "<script>" and token_texts(tokenizer, [256]) == ["<|end|>"]
    pieces = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "▁": 3, "a": 4}
    llama = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    sentence = PreTrainedTokenizerFast(tokenizer_object=llama, unk_token="<unk>")
    assert token_texts(sentence, [1, 2, 3, 4, 0]) == [" the", "⟨E2⟩", " ", "a", "<unk>"]


def test_the_callers_draws_and_models_are_left_as_they_were(models):
    student, teacher = models
    student.train()
    student.config.use_cache, before = True, [p.requires_grad for p in teacher.parameters()]
    torch.manual_seed(100)
    state, python = torch.get_rng_state(), random.getstate()
    table_of(models)
    table_of(models, completion=None, max_completion_length=4)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert student.training and student.config.use_cache and [p.requires_grad for p in teacher.parameters()] == before
    student.eval()


def test_a_student_in_the_midst_of_mixed_precision_training_can_be_looked_at(tmp_path):
    from running import by_prompt, make

    trainer = make(tmp_path, max_steps=1, rollouts=by_prompt, bf16=True)
    trainer.train()
    tokenizer = make_tokenizer()
    table = inspect_completion(trainer.model, trainer.teacher_model, QUESTIONS[0], WORDS, tokenizer=tokenizer, method="gkd")
    assert math.isfinite(table.loss) and len(table) > 8


def test_texts_are_whole_where_a_character_is_several_tokens(models):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    characters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = Tokenizer(kinds.BPE({**characters, "<|end|>": 256, "<|pad|>": 257}, []))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>", pad_token="<|pad|>")
    pair = tiny_model("llama", vocab_size=258, seed=1), tiny_model("qwen2", vocab_size=258, seed=2)
    table = inspect_completion(*pair, "😀 שלום", "é!", tokenizer=tokenizer)
    assert table.prompt == "😀 שלום" and table.text == "é!<|end|>" and table.tokens[:2] == ["⟨C3⟩", "⟨A9⟩"]


def test_a_completion_that_is_cut_is_told_and_ids_that_are_none_refused(models, caplog):
    assert len(table_of(models, completion=WORDS * 5, max_completion_length=7)) == 7
    assert "is cut to its first 7 tokens" in caplog.text
    assert table_of(models, completion=torch.tensor([5, 6])).token_ids == [5, 6]
    with pytest.raises(ValueError, match="holds -1, which is no id"):
        table_of(models, completion=[-1])
