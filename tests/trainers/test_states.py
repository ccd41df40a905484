"""What changes from step to step, and how a run goes on."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from running import answered, by_prompt, general, rows, student, watch
from tiny import prompts, tiny_model

from tsdkd import TSDKD
from tsdkd.data.commits import read_manifest, write_manifest
from tsdkd.methods import GKD, DistiLLM, SeqKD
from tsdkd.selection import AdaptiveOpener
from tsdkd.types import RolloutSpec


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


def rewritten(checkpoint):
    """A checkpoint whose files were changed by hand, whole again."""
    write_manifest(checkpoint, {k: v for k, v in read_manifest(checkpoint).items() if k in ("step", "run")})


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
    with pytest.raises(
        ValueError, match=r"checkpoint-2 .*its tsdkd_state_0.json is missing. Whole ones are there: checkpoint-3"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rewritten(tmp_path / "checkpoint-2")
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
    rewritten(tmp_path / "checkpoint-3")
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


def test_a_new_run_begins_with_a_new_state_and_without_what_an_interrupted_step_left(tmp_path):
    trainer = general(tmp_path, TSDKD(adaptive_opener=AdaptiveOpener(warmup=2)), rollouts=by_prompt, max_steps=2)
    compute, calls = trainer.loop.compute, []

    def interrupted(student_model, step):
        calls.append(1)
        loss = compute(student_model, step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    trainer.loop.compute = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(trainer.loop.state.history.smoothed) == 4
    trainer.train()
    assert len(trainer.loop.state.history.smoothed) == 8  # two steps of four, and none of the interrupted one


@pytest.mark.parametrize(
    "ids,recorded,message",
    [
        ([[5] * 13] * 4, {}, "wrote 13 ids in row 0, and max_completion_length is 12"),
        ([[70]] * 4, {}, "wrote id 70 in row 0, and both models have the ids below 64 alone"),
        ([[5]] * 3, {}, "gave 3 completions for 4 prompts"),
        ([[5, 6]] * 4, {"weight": [[1.0]] * 4}, "recorded other than one number for each of the 2 ids of row 0"),
    ],
)
def test_what_a_writer_of_ones_own_may_not_write_is_refused(tmp_path, ids, recorded, message):
    class Wrong:
        def write(self, model, prompt_ids):
            return ids, recorded

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Written(GKD):
        rollouts = RolloutSpec(writer=Wrong())

    with pytest.raises(ValueError, match=f"the writer Wrong {message}"):
        general(tmp_path, Written()).train()
