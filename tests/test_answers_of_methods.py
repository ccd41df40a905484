"""Every method in the trainer: where its answers come from, what it asks of the teacher, what it keeps, what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from test_trainer import Gradients, by_prompt, make, rows
from tiny import QUESTIONS, config, prompts, save_tiny, tiny_model
from trl import DistillationConfig, DistillationTrainer

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, METHODS, DistiLLM, MiniLLM, SeqKD, SpeculativeKD, SupervisedKD
from tsdkd.rollouts import RolloutSource
from tsdkd.selection import AdaptiveOpener
from tsdkd.teachers import Recording
from tsdkd.types import ReadPlan, Rollouts, RolloutSpec


def general(folder, method, /, **kwargs):
    """A run of any method; what `make` does not know is an option of the config."""
    known = ("student", "teacher", "data", "rollouts", "callbacks", "eval_dataset")
    models = {key: kwargs.pop(key) for key in known if key in kwargs}
    return make(folder, cls=TokenDistillTrainer, args=config(folder, TokenDistillConfig, **kwargs), method=method, **models)


def alone(folder, data):
    """SeqKD without any teacher."""
    options = config(folder, TokenDistillConfig, method="seq_kd")
    return TokenDistillTrainer(tiny_model(seed=1), args=options, train_dataset=data, processing_class=make_tokenizer())


def watch(obj, name, before):
    """Call `before` with the first argument of each call of a method."""
    method = getattr(obj, name)

    def watched(first, *args, **kwargs):
        before(first)
        return method(first, *args, **kwargs)

    object.__setattr__(obj, name, watched)


def watch_lengths(teacher, read):
    """Note how many trained tokens a teacher is asked for at each call."""
    hidden = teacher.hidden

    def watched(rollouts, lengths):
        read.append(sum(lengths))
        return hidden(rollouts, lengths)

    teacher.hidden = watched


def answered(count=8, chat=False):
    texts = [f"{QUESTIONS[i]}" for i in range(count)]
    answers = [f"{i}+{i}={2 * i}\n#### {2 * i}" for i in range(10, 10 + count)]
    if chat:
        texts = [[{"role": "user", "content": t}] for t in texts]
        answers = [[{"role": "assistant", "content": a}] for a in answers]
    return Dataset.from_dict({"prompt": texts, "completion": answers})


def student(seed=1):
    return tiny_model(seed=seed, closes_soon=True)


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


def test_seq_kd_on_given_answers_needs_no_teacher(tmp_path):
    trainer = alone(tmp_path, answered(8))
    trainer.train()
    assert "teacher/entropy" not in rows(trainer)[-1]
    with pytest.raises(ValueError, match="no 'completion' column and there is no teacher in this process to write one"):
        alone(tmp_path, prompts(8)).train()


# ---------------------------------------------------------------------- what is asked of the models


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
            monkeypatch.setattr(type(method), "reads", lambda self, lengths: ReadPlan.whole(lengths))
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
    for ids in trainer.loop.scorer.corpus.ids(drawn, trainer.tokenize_texts):
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


def tiny_head(model):
    return model.get_output_embeddings().weight.detach().T


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


# ---------------------------------------------------------------------- what changes from step to step


@pytest.mark.parametrize("batch,accumulation", [(8, 1), (2, 4)])
def test_the_adaptive_openers_history_is_the_rollouts_in_their_order(tmp_path, batch, accumulation):
    trainer = general(
        tmp_path,
        TSDKD(adaptive_opener=AdaptiveOpener(warmup=8)),
        rollouts=by_prompt,
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-12,
        seed=3,
        data=prompts(16),
    )
    asked = []
    watch(trainer.loop, "prepare", asked.append)
    trainer.train()
    expected = []
    student_model, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    for rollouts in asked:
        for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logs = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student_model, teacher)]
            h_s, h_t = (-(log.exp() * log).sum(-1).mean().item() for log in logs)
            expected.append(h_s - h_t)
    history = trainer.loop.state.history
    assert len(history.smoothed) == 16 and history.raw == pytest.approx(expected[-4:], abs=1e-4)
    smooth, raw = [], []
    for step in (expected[:8], expected[8:]):
        smooth += [(sum(raw) + d) / (len(raw) + 1) for d in step]
        raw = [*raw, *step][-4:]
    assert history.smoothed == pytest.approx(smooth, abs=1e-4)


def test_the_methods_state_is_part_of_the_checkpoint(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = general(tmp_path, TSDKD(adaptive_opener=True), rollouts=by_prompt, **options, data=prompts(16))
    trainer.train()
    whole = trainer.loop.state.state_dict()
    saved = json.loads((tmp_path / "checkpoint-2" / "tsdkd_state_0.json").read_text())["state"]
    assert len(saved["smoothed"]) == 8 and len(whole["smoothed"]) == 12
    resumed = general(tmp_path, TSDKD(adaptive_opener=True), rollouts=by_prompt, **options, data=prompts(16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.loop.state.history.smoothed == pytest.approx(whole["smoothed"], abs=1e-5)
    (tmp_path / "checkpoint-2" / "tsdkd_state_0.json").unlink()
    with pytest.raises(ValueError, match=r"has no tsdkd_state_0\.json, which holds the method's state"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_distillm_raises_its_share_and_replays(tmp_path):
    trainer = general(
        tmp_path,
        DistiLLM(initial_share=0.5, loss_tolerance=0.0, replay_capacity=4, schedule="constant"),
        student=student(),
        data=answered(8),
        eval_dataset=answered(4),
        max_steps=14,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.0,
        max_completion_length=20,
    )
    sources = []
    watch(trainer.loop.supply, "_log", sources.append)
    kept = []
    watch(trainer.loop.supply.source, "keep", kept.append)
    trainer.train()
    assert trainer.loop.supply.source.share == pytest.approx(
        1.0
    )  # the loss never changes, which is 0 worse: 5 of 6 comparisons reach 1
    assert {"fresh", "buffer"} <= set(sources) and len(kept) == sources.count("fresh")
    assert len(trainer.loop.supply.source.buffer) == 4
    state = json.loads(json.dumps(trainer.loop.checkpoints.state()))
    assert state["answers"]["share"] == pytest.approx(1.0) and len(state["answers"]["buffer"]) == 4


def test_distillm_resumes_where_it_was(tmp_path):
    """Share, buffer and previous loss: an interrupted run draws and trains as the whole one does."""
    method = DistiLLM(initial_share=0.6, loss_tolerance=0.0, replay_capacity=8, schedule="constant")
    shared = dict(
        max_steps=6, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=1, max_completion_length=20
    )
    runs = {}
    for name in ("whole", "resumed"):
        trainer = general(tmp_path, method, student=student(), data=answered(24), eval_dataset=answered(4), **shared)
        sources = []
        watch(trainer.loop.supply, "_log", sources.append)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if name == "resumed" else None)
        runs[name] = (sources, trainer.loop.supply.source.state_dict(), rows(trainer)[-1]["loss"])
    assert runs["resumed"][0] == runs["whole"][0][3:] and len(set(runs["whole"][0])) > 1
    ours, whole = (runs[name][1] for name in ("resumed", "whole"))
    assert ours["buffer"] == whole["buffer"] and len(ours["buffer"]) == 8 and ours["share"] == whole["share"]
    assert ours["previous_loss"] == pytest.approx(whole["previous_loss"], rel=1e-4)
    assert runs["resumed"][2] == pytest.approx(runs["whole"][2], rel=1e-3)
    state = tmp_path / "checkpoint-3" / "tsdkd_state_0.json"
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({**kept, "processes": 2}))
    with pytest.raises(ValueError, match="a state of processes 2, and this run has 1"):
        general(tmp_path, method, student=student(), data=answered(24), eval_dataset=answered(4), **shared).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_of_several_evaluation_sets_the_first_decides(tmp_path):
    sets = {"a": answered(4), "b": answered(8).select(range(4, 8))}
    trainer = general(
        tmp_path,
        DistiLLM(loss_tolerance=0.05, replay_capacity=4),
        student=student(),
        data=answered(8),
        eval_dataset=sets,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
        max_completion_length=20,
    )
    trainer.train()
    assert trainer.loop.supply.source.share == 0.0 and trainer.loop.supply.source.deciding == "eval_a"
    trainer.loop.supply.source.previous_loss = -1.0
    trainer.evaluate()
    assert trainer.loop.supply.source.share == 0.0  # outside of training nothing moves


def test_the_teacher_answers_every_evaluation_set(tmp_path):
    trainer = general(tmp_path, SeqKD(), eval_dataset={"one": prompts(4), "two": prompts(8)}, max_steps=1)
    before = trainer.evaluate()
    assert all("completion_ids" in rows.column_names for rows in trainer.eval_dataset.values())
    alone = general(tmp_path / "alone", SeqKD(), eval_dataset=trainer.eval_dataset["one"])
    assert alone.evaluate()["eval_loss"] == pytest.approx(before["eval_one_loss"], rel=1e-5)


def test_a_budget_goes_on_after_a_resumption(tmp_path):
    options = dict(max_steps=9, token_budget=200, save_strategy="steps", save_steps=2)
    general(tmp_path, GKD(), rollouts=lambda ids: [5] * 10, **options).train()
    trainer = general(tmp_path, GKD(), rollouts=lambda ids: [5] * 10, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 5 and trainer.trained_tokens == 200


def test_distillm_without_an_evaluation_says_that_its_share_stays(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        general(tmp_path, DistiLLM(replay_capacity=8, initial_share=0.25), data=answered(8))
    assert caplog.text.count("the share of the student's completions stays at 0.25") == 1


def test_a_token_budget_ends_the_run(tmp_path):
    trainer = general(tmp_path, GKD(), rollouts=lambda ids: [5] * 10, max_steps=9, token_budget=100)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.trained_tokens == 120


# ---------------------------------------------------------------------- recordings


def recorded(tmp_path, method=None, data=None, **options):
    options = {"max_steps": 2, **options}
    trainer = general(tmp_path / "r", method or TSDKD(), student=student(), data=data or prompts(8), **options)
    trainer.record(tmp_path / "recording")
    return tmp_path / "recording"


def test_a_recording_draws_its_sources_as_training_would(tmp_path):
    data = answered(32)
    folder = recorded(tmp_path, GKD(lmbda=0.5), data, max_steps=8, max_completion_length=20)
    tokenizer, given = make_tokenizer(), {row["prompt"]: row["completion"] for row in data}
    drawn = []
    for shard in sorted(folder.glob("step-*.jsonl")):
        lines = [json.loads(line) for line in shard.read_text().splitlines()]
        from_data = [tokenizer.decode(row["completion_ids"][:-1]).strip() == given[row["prompt"]] for row in lines]
        drawn.append("dataset" if all(from_data) else "fresh")
    source = RolloutSource(RolloutSpec(share=0.5), seed=42, rows=4)
    assert drawn == [source.draw(step, 8) for step in range(8)] and set(drawn) == {"fresh", "dataset"}


def from_recording(tmp_path, folder, method, seed=1, **options):
    return TokenDistillTrainer(
        model=student(seed),
        args=config(tmp_path, TokenDistillConfig, recording=str(folder), **options),
        method=method,
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("method", [TSDKD(), GKD(selection="prefix"), SupervisedKD(), DistiLLM(), SeqKD()])
def test_any_method_trains_on_a_recording_as_with_the_teacher_itself(tmp_path, method):
    folder = recorded(tmp_path)
    offline = from_recording(tmp_path / "off", folder, method)
    assert offline.teacher_model is None and len(offline.train_dataset) == 8
    offline.train()
    live = general(
        tmp_path / "live",
        method,
        student=student(),
        data=Dataset.from_list(Recording.open(folder).rows),
    )
    answers = {
        tuple(ids): row["completion_ids"]
        for ids, row in zip(live.tokenize(list(live.train_dataset["prompt"])), live.train_dataset, strict=True)
    }
    live.write = lambda prompt_ids, *a, **k: [list(answers[tuple(ids)]) for ids in prompt_ids]
    live.train()
    for ours, theirs in zip(rows(offline), rows(live), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for a, b in zip(offline.model.parameters(), live.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_recording_of_something_else_or_damaged_is_refused_before_training(tmp_path):
    folder = recorded(tmp_path, max_steps=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is missing or damaged"):
        from_recording(tmp_path, damaged, GKD())
    other = make_tokenizer()
    other.add_tokens(["<x>"])
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    words = sorted(manifest["vocabulary"].items(), key=lambda item: item[1])
    manifest["vocabulary"].update({words[20][0]: words[21][1], words[21][0]: words[20][1]})
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the tokenizers disagree"):
        from_recording(tmp_path, changed, GKD())
    with pytest.raises(ValueError, match="holds no finished recording"):
        from_recording(tmp_path, tmp_path, GKD())
    with pytest.raises(ValueError, match="written by student and teacher together"):
        from_recording(tmp_path, folder, MiniLLM())
    with pytest.raises(ValueError, match="holds a recording already"):
        general(tmp_path / "again", GKD()).record(folder)
    with pytest.raises(ValueError, match="leave train_dataset and the teacher out"):
        general(tmp_path / "both", GKD(), recording=str(folder))
    with pytest.raises(ValueError, match="completions of up to 12 tokens, but max_completion_length=2 would cut them: pass 12"):
        from_recording(tmp_path / "short", folder, GKD(), max_completion_length=2)
    with pytest.raises(ValueError, match=r"was made with another student.*any_recording=True"):
        from_recording(tmp_path / "other", folder, GKD(), seed=7)
    from_recording(tmp_path / "meant", folder, GKD(), seed=7, any_recording=True).train()
    (changed / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        from_recording(tmp_path, changed, GKD())
    stranger = from_recording(tmp_path / "stranger", folder, GKD())
    with pytest.raises(ValueError, match="are not in the recording"):
        stranger.teacher.hidden(Rollouts([[5, 6]], [[7]], [[1]]), [1])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "method,data,options,message",
    [
        (GKD(lmbda=0.5), prompts(8), {}, "train_dataset has no 'completion' column; it has: prompt"),
        (DistiLLM(), prompts(8), {}, "train_dataset has no 'completion' column"),
        (DistiLLM(replay_capacity=3), answered(8), {}, "replay_capacity=3 over 1 processes is 3 rows each, but a step takes 4"),
        (SpeculativeKD(), prompts(8), {"top_p": 0.9}, "top_p, top_k and min_p would change the distributions"),
        (MiniLLM(), prompts(8), {"top_k": 5}, "written by both models, token by token, but"),
        (MiniLLM(), prompts(8), {"temperature": 0.0}, r"temperature=0\.0 leaves no distribution to draw from"),
        (
            SpeculativeKD(),
            prompts(8),
            {"repetition_penalty": 1.3},
            "repetition_penalty and generation_kwargs are options of one",
        ),
        (
            SeqKD(),
            Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b", None, "", "c"]}),
            {},
            "2 completions .* in row 1",
        ),
        (SeqKD(), Dataset.from_dict({"prompt": ["a"] * 4, "completion_ids": [[70]] * 4}), {}, "the completion of row 0"),
    ],
)
def test_what_a_method_cannot_do_is_refused_at_construction(tmp_path, method, data, options, message):
    with pytest.raises(ValueError, match=message):
        general(tmp_path, method, data=data, **options)


def test_an_evaluation_set_without_answers_is_refused_where_answers_are_scored(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset has no 'completion' column"):
        general(tmp_path, DistiLLM(replay_capacity=8), data=answered(8), eval_dataset=prompts(4))


def test_options_that_would_be_lost_are_refused_or_applied(tmp_path):
    trainer = general(tmp_path, "gkd", data=answered(8), method_options={"lmbda": 0.0})
    assert trainer.method == GKD(lmbda=0.0)
    with pytest.raises(ValueError, match="method_options were given beside a method object"):
        general(tmp_path, GKD(), method_options={"lmbda": 0.0}, data=answered(8))
    with pytest.raises(ValueError, match=r"method='gkd' was given with a TSDKDConfig"):
        make(tmp_path, method="gkd")
    with pytest.raises(ValueError, match="given twice"):
        make(tmp_path, method=TSDKD(), beta=0.5)
    with pytest.raises(ValueError, match=r"beta=1\.0 is an option of the method"):
        config(tmp_path, TokenDistillConfig, method="gkd", beta=1.0)
    with pytest.raises(ValueError, match=r"method_options=\[1\]: pass the method's options by name"):
        config(tmp_path, TokenDistillConfig, method_options=[1])


def test_a_gate_that_reads_other_tokens_makes_the_models_read_them(tmp_path):
    class Relative:
        needs = "both"

        def __call__(self, statistics):
            return torch.sigmoid(statistics.divergence - statistics.divergence.mean(-1, keepdim=True))

    for selection in ("opener", "prefix", "random"):
        method = GKD(selection=selection, selection_share=0.4, gate=Relative())
        assert method.reads([10, 3]) == ReadPlan.whole([10, 3])
        trainer = general(tmp_path / selection, method, rollouts=by_prompt, max_steps=1)
        trainer.train()
        assert "teacher/tokens_spared" not in rows(trainer)[-1]


@pytest.mark.parametrize("wrong", [{"use_vllm": True}, {"teacher_answers_engine": "vllm", "method": "seq_kd"}])
def test_a_missing_or_refused_vllm_is_said_before_anything_is_loaded(tmp_path, monkeypatch, wrong):
    from tsdkd.trainers import engines

    monkeypatch.setattr(engines, "is_vllm_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"vLLM is not installed\. Install one that TRL 1\.16 takes: pip install 'tsdkd\[vllm\]'"
    ):
        general(tmp_path, None, **wrong)

    def old():
        warnings.warn(
            "TRL currently supports vLLM versions from 0.22.0 to 0.31.0. You have version 0.9 installed. We …", stacklevel=2
        )
        return True

    monkeypatch.setattr(engines, "is_vllm_available", old)
    with pytest.raises(ValueError, match=r"You have version 0\.9 installed\. Install one"):
        general(tmp_path, None, **wrong)


def test_rows_that_fill_no_batch_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        trainer = general(tmp_path, GKD(), rollouts=by_prompt, data=prompts(11))
    assert "3 of 11 rows of train_dataset are left out of each epoch" in caplog.text
    trainer.train()
    assert rows(trainer)[-1]["prompts/left_out_of_epoch"] == 3


def test_tools_and_given_answers_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="tools were given to a method that trains on the data set's completions"):
        TokenDistillTrainer(
            model=save_tiny(tmp_path / "s"),
            teacher_model=save_tiny(tmp_path / "t"),
            args=config(tmp_path, TokenDistillConfig, method="supervised_kd"),
            train_dataset=answered(8, chat=True),
            tools=[len],
        )
