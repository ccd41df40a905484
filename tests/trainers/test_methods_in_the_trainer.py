"""Every method in the trainer: where its completions come from, and what it asks of the models."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from running import Gradients, alone, answered, by_prompt, general, rows, student, tiny_head, watch, watch_lengths
from tiny import QUESTIONS, config, prompts, tiny_model
from trl import DistillationConfig, DistillationTrainer

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, METHODS, DistiLLM, MiniLLM, SeqKD, SupervisedKD
from tsdkd.types import ReadPlan


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_by_its_name(tmp_path, name):
    trainer = general(tmp_path, None, student=student(), data=answered(chat=True), method=name, max_completion_length=20)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    row = rows(trainer)[-1]
    assert row.get("answers/dataset") == (1.0 if trainer.loop.supply.spec.need_dataset else None)
    for term, weight in trainer.method.terms().items():
        assert not weight or f"loss/{term}" in row
    assert ("speculative/acceptance" in row) == (name == "speculative_kd")
    assert trainer.trained_tokens > 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_gkds_loss_and_gradient_are_trls(tmp_path, beta):
    """TRL's own trainer on the same models and rollouts."""
    theirs_gradient, ours_gradient = Gradients(), Gradients()
    shared = dict(max_steps=1, gradient_accumulation_steps=2, max_grad_norm=1e9, lr_scheduler_type="constant")

    def trls_config(max_length, **options):
        return DistillationConfig(beta=beta, bf16=False, **options)

    theirs = DistillationTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(seed=2, hidden=48),
        args=config(tmp_path / "trl", trls_config, **shared),
        train_dataset=prompts(8),
        processing_class=make_tokenizer(),
        callbacks=[theirs_gradient],
    )
    theirs._generate_single_turn = lambda ids, *args, **kwargs: [by_prompt(one) for one in ids]
    ours = general(tmp_path / "ours", GKD(beta=beta), rollouts=by_prompt, callbacks=[ours_gradient], **shared)
    theirs.train(), ours.train()
    torch.testing.assert_close(ours_gradient.flat, theirs_gradient.flat, rtol=1e-4, atol=1e-6)
    assert rows(ours)[0]["loss/direct"] == pytest.approx(rows(theirs)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_given_answers_are_trained_on_as_they_would_have_been_written(tmp_path, chat):
    trainer = general(tmp_path, SupervisedKD(), data=answered(4, chat), max_completion_length=30, max_steps=1)
    tokenizer = make_tokenizer()
    batches = []
    watch(trainer.loop, "prepare", batches.append)
    trainer.train()
    given = {row["prompt"][0]["content"] if chat else row["prompt"]: row["completion"] for row in trainer.train_dataset}
    assert len(batches[0]) == 4
    for ids, completion, mask in zip(batches[0].prompt_ids, batches[0].completion_ids, batches[0].completion_mask, strict=True):
        question = next(q for q in given if q in tokenizer.decode(ids))
        answer = given[question][0]["content"] if chat else given[question]
        assert tokenizer.decode(completion[:-1]).strip() == answer and completion[-1] == tokenizer.eos_token_id
        assert mask == [1] * len(completion)


def test_long_answers_are_cut_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        trainer = general(tmp_path, SeqKD(), data=answered(4), max_completion_length=5)
    assert "4 of 4 completions of train_dataset are longer than max_completion_length=5" in caplog.text
    trainer.train()
    assert rows(trainer)[-1]["completions/max_length"] == 5


def test_lambda_mixes_sources_step_by_step(tmp_path):
    trainer = general(tmp_path, GKD(lmbda=0.5), student=student(), data=answered(8), max_steps=12, max_completion_length=20)
    trainer.train()
    drawn = [row["answers/dataset"] for row in rows(trainer)]
    assert drawn == [float(trainer.loop.supply.source.draw(step, 12) == "dataset") for step in range(12)]
    assert 0 < sum(drawn) < 12


def test_the_teacher_writes_once_where_the_data_set_has_no_answers(tmp_path, monkeypatch):
    file = tmp_path / "answers" / "a.jsonl"
    options = {"teacher_answers": str(file), "max_steps": 1}
    trainer = general(tmp_path / "one", SeqKD(), **options)
    trainer.train()
    lines = [json.loads(line) for line in file.with_name("a-0.jsonl").read_text().splitlines()]
    assert lines[0]["temperature"] == 0.0 and len(lines) == 1 + 8
    teacher, tokenizer = tiny_model(seed=2, hidden=48), make_tokenizer()
    ids = torch.tensor([tokenizer(QUESTIONS[3])["input_ids"]])
    greedy = teacher.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :].tolist()
    row = trainer.train_dataset[3]
    assert row["prompt"] == QUESTIONS[3] and row["completion_ids"] == (greedy[: greedy.index(1) + 1] if 1 in greedy else greedy)
    again = general(tmp_path / "two", SupervisedKD(), **options)
    monkeypatch.setattr(again.loop.supply.ahead, "by_teacher", lambda ids: pytest.fail("written a second time"))
    again.train()


def test_the_teachers_completions_are_rows_that_anything_reads(tmp_path):
    from tsdkd.data.prompts import load_prompts

    file = tmp_path / "a.jsonl"
    general(tmp_path / "one", SeqKD(), data=prompts(8, chat=True), teacher_answers=str(file), max_steps=1).train()
    kept = load_prompts(str(file))
    assert len(kept) == 8 and kept[0]["prompt"][0]["role"] == "user" and kept[0]["completion"][0]["role"] == "assistant"
    made = json.loads(file.read_text().splitlines()[0])
    assert make_tokenizer().decode(made["completion_ids"], skip_special_tokens=True) == made["completion"][0]["content"]


@pytest.mark.parametrize("method", [SupervisedKD(), DistiLLM()])
def test_by_option_the_teacher_writes_what_is_missing(tmp_path, method):
    whole = answered(8)
    data = whole.remove_columns("completion").add_column("completion", [*whole["completion"][:5], None, "  ", None])
    options = {"data": data, "max_steps": 1, "max_completion_length": 20}
    with pytest.raises(ValueError, match=r"3 completions without text, the first in row 5: .*teacher_writes_missing"):
        general(tmp_path / "a", method, **options)
    trainer = general(tmp_path / "b", method, teacher_writes_missing=True, **options)
    trainer.train()
    ids = trainer.train_dataset["completion_ids"]
    assert [row is None for row in ids] == [True] * 5 + [False] * 3
    by_teacher = trainer.loop.supply.ahead.by_teacher(trainer.tokenize(list(whole["prompt"])[5:]))
    assert ids[5:] == by_teacher
    given = trainer.loop.supply.given(list(trainer.train_dataset))
    assert given[:5] == trainer.loop.supply.given(list(whole.select(range(5)))) and given[5:] == by_teacher
    with pytest.raises(ValueError, match="no 'completion' column"):
        general(tmp_path / "c", DistiLLM(), data=prompts(8))
    general(tmp_path / "d", DistiLLM(), data=prompts(8), teacher_writes_missing=True, max_steps=1).train()


def test_seq_kd_on_given_answers_needs_no_teacher(tmp_path):
    trainer = alone(tmp_path, answered(8))
    trainer.train()
    assert "teacher/entropy" not in rows(trainer)[-1]
    with pytest.raises(ValueError, match="no 'completion' column and there is no teacher in this process to write one"):
        alone(tmp_path, prompts(8)).train()


def test_a_prefix_is_all_that_the_models_read(tmp_path):
    read = []
    gradients = {}
    for name, method in {"cut": GKD(selection="prefix", selection_share=0.3), "whole": GKD(selection=_WholePrefix())}.items():
        seen = Gradients()
        trainer = general(tmp_path / name, method, rollouts=by_prompt, callbacks=[seen], max_steps=1, max_grad_norm=1e9)
        watch_lengths(trainer.teacher, read)
        trainer.train()
        gradients[name] = seen.flat
        assert ("teacher/tokens_spared" in rows(trainer)[-1]) == (name == "cut")
        assert rows(trainer)[-1].get("teacher/tokens_spared", 0.5) > 0.1
    torch.testing.assert_close(gradients["cut"], gradients["whole"], rtol=1e-5, atol=1e-7)
    assert read[0] < 0.5 * read[1]


@pytest.mark.parametrize(
    "method",
    [
        GKD(selection="opener", selection_share=0.2),
        TSDKD(direct_weight=0.0, opener_entropy_share=0.2),
        TSDKD(selection="opener", selection_share=0.1, opener_entropy_share=0.2),
    ],
)
def test_behind_an_opener_the_teacher_reads_nothing(tmp_path, method, monkeypatch):
    flats, read = [], []
    for name in ("spared", "whole"):
        if name == "whole":
            monkeypatch.setattr(type(method), "reads", lambda self, lengths, state=None: ReadPlan.whole(lengths))
        seen = Gradients()
        trainer = general(tmp_path / name, method, rollouts=by_prompt, callbacks=[seen], max_steps=1, max_grad_norm=1e9)
        watch_lengths(trainer.teacher, read)
        trainer.train()
        flats.append(seen.flat)
        assert ("teacher/tokens_spared" in rows(trainer)[-1]) == (name == "spared")
    # The teacher's batches are padded otherwise: some roundings of float32 of the largest gradient.
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-5, atol=4e-7 * flats[1].abs().max().item())
    assert read[0] < 0.6 * read[1]


class _WholePrefix:
    """The first 30 %, by a rule that does not say that the rest need not be read."""

    needs = "student"

    def __call__(self, statistics):
        return statistics.mask & (statistics.mask.cumsum(-1) <= (0.3 * statistics.mask.sum(-1, keepdim=True) - 1e-9).ceil())

    def count(self, length):
        return -int(-(0.3 * length - 1e-9) // 1)


@pytest.mark.parametrize("selection", ["random", "opener", "entropy_or_divergence", "prefix"])
def test_selected_rollouts_give_the_same_gradient_however_they_are_split(tmp_path, selection):
    flats = []
    for batch, accumulation in ((8, 1), (2, 4)):
        seen = Gradients()
        trainer = general(
            tmp_path / str(batch),
            GKD(selection=selection, selection_share=0.4, gate="entropy_gap"),
            rollouts=by_prompt,
            callbacks=[seen],
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
        )
        trainer.train()
        flats.append(seen.flat)
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-4, atol=1e-7)


def test_minillm_reads_what_its_writer_recorded(tmp_path):
    trainer = general(tmp_path, MiniLLM(alpha=0.5), student=student(), max_steps=1)
    batches = []
    watch(trainer.method, "loss", batches.append)
    trainer.train()
    (batch,) = batches
    log_s = torch.log_softmax(batch.student_hidden.detach() @ tiny_head(student()), -1).gather(1, batch.token_ids[:, None])[
        :, 0
    ]
    log_t = torch.log_softmax(batch.teacher_hidden @ tiny_head(tiny_model(seed=2, hidden=48)), -1)
    log_t = log_t.gather(1, batch.token_ids[:, None])[:, 0]
    torch.testing.assert_close(batch.recorded["student"], log_s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.recorded["teacher"], log_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.recorded["mixture"], (0.5 * log_s.exp() + 0.5 * log_t.exp()).log(), rtol=1e-4, atol=1e-4)


def test_minillms_pretraining_loss_is_the_corpus_cross_entropy(tmp_path):
    """Beside answers without weight its gradient alone remains, and no batching changes it."""
    corpus = Dataset.from_dict({"text": QUESTIONS[:5]})
    method = MiniLLM(direct_weight=0.0, sampled_weight=0.0, pretraining_weight=0.7)
    flats = []
    for batch, accumulation in ((8, 1), (2, 4)):
        seen = Gradients()
        folder = tmp_path / str(batch)
        options = dict(max_steps=1, gradient_accumulation_steps=accumulation, max_grad_norm=1e9)
        trainer = TokenDistillTrainer(
            student(),
            tiny_model(seed=2, hidden=48),
            config(folder, TokenDistillConfig, per_device_train_batch_size=batch, **options),
            prompts(8),
            method=method,
            pretraining_dataset=corpus,
            processing_class=make_tokenizer(),
            callbacks=[seen],
        )
        drawn = trainer.loop.scorer.corpus.draw(8, 0, 0)
        trainer.train()
        flats.append(seen.flat)
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-4, atol=1e-7)
    model, losses = student(), []
    for ids in trainer.loop.scorer.corpus.ids(drawn, trainer.rendering.texts):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    mean = torch.cat(losses).mean()
    (0.7 * mean).backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(flats[1], flat, rtol=1e-4, atol=1e-6)
    assert rows(trainer)[-1]["loss/pretraining"] == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize(
    "method,corpus,message",
    [
        (
            MiniLLM(pretraining_weight=1.0),
            None,
            "takes a pretraining_dataset with a 'text' column; none was",
        ),
        (MiniLLM(pretraining_weight=1.0), Dataset.from_dict({"body": ["a"]}), "it has: body"),
        (GKD(), Dataset.from_dict({"text": ["a"]}), "pretraining_dataset was given to gkd"),
    ],
)
def test_a_corpus_and_its_weight_belong_together(tmp_path, method, corpus, message):
    with pytest.raises(ValueError, match=message):
        TokenDistillTrainer(
            student(),
            tiny_model(seed=2),
            config(tmp_path, TokenDistillConfig),
            prompts(8),
            method=method,
            pretraining_dataset=corpus,
            processing_class=make_tokenizer(),
        )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_lora_student(tmp_path, name):
    from peft import LoraConfig

    model = student()
    frozen = model.model.embed_tokens.weight.detach().clone()
    trainer = TokenDistillTrainer(
        model,
        tiny_model(seed=2, hidden=48),
        config(tmp_path, TokenDistillConfig, method=name, max_completion_length=20),
        answered(8),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all("lora" in n for n in before)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    assert torch.equal(frozen, trainer.model.get_input_embeddings().weight)
