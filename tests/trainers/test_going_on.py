"""A run that is stopped and gone on with is the run that was not: bit for bit, in and past an epoch, with everything that has a
state; and what a checkpoint refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from running import make
from tiny import prompts, tiny_model
from transformers import TrainerCallback

from tsdkd.data import commits
from tsdkd.methods import METHODS, TSDKD
from tsdkd.trainers.identity import digest_of_rows, qualified
from tsdkd.trainers.saving import Saving


class Seen(TrainerCallback):
    """The losses of every step."""

    def __init__(self):
        self.losses = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses[state.global_step] = {k: v for k, v in logs.items() if k == "loss" or k.startswith("loss/")}


def run(folder, *, steps=10, resume=None, stop=None, **options):
    """A run of ten steps over epochs of four, saved at each; its losses, completions and weights."""
    seen = Seen()
    student = tiny_model("llama", seed=1, attention_dropout=0.1 if options.pop("dropout", False) else 0.0, closes_soon=True)
    shared = {"save_strategy": "steps", "save_steps": 1, "data": prompts(17), "callbacks": [seen], "logging_steps": 1}
    trainer = make(folder, student=student, max_steps=steps, **{**shared, **options})
    written = {}
    kept = trainer.loop.prepare

    def prepare(rollouts):
        if trainer.mode == "train":
            written[trainer.step + 1] = rollouts.completion_ids
        return kept(rollouts)

    trainer.loop.prepare = prepare
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return seen.losses, written, weights


KINDS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "dropout": {"dropout": True},
    "lora": {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)},
    "evaluated": {"eval_dataset": prompts(5), "eval_strategy": "steps", "eval_steps": 2},
    "adaptive opener": {"method": TSDKD(adaptive_opener=True, num_candidates=4)},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each kind's whole run, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            made[kind] = folder, run(folder, **KINDS[kind])
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 4, 6])  # inside the first epoch, at its end, past it
def test_a_run_goes_on_bit_for_bit(whole, tmp_path, kind, step):
    folder, (losses, written, weights) = whole(kind)
    shutil.copytree(folder, tmp_path / "o", ignore=shutil.ignore_patterns(".lock"))
    again, rewritten, ours = run(tmp_path / "o", resume=str(tmp_path / "o" / f"checkpoint-{step}"), **KINDS[kind])
    assert again == {number: row for number, row in losses.items() if number > step}
    assert rewritten == {number: row for number, row in written.items() if number > step}
    assert all(torch.equal(weights[name], ours[name]) for name in weights)


def test_an_epoch_has_an_order_of_its_own_and_the_first_is_trls(tmp_path):
    from trl import DistillationTrainer
    from trl.trainer.utils import RepeatSampler

    trainer = make(tmp_path, data=prompts(17))
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 2, 1):
        trainer.epoch_in_hand = epoch
        orders.append(list(sampler))
    theirs = DistillationTrainer._get_train_sampler(trainer)
    assert type(theirs) is RepeatSampler and orders[0] == list(theirs)
    assert orders[1] == orders[3] and len({tuple(order) for order in orders}) == 3
    assert all(len(order) == 16 for order in orders)


def test_an_evaluation_leaves_the_trainings_draws_as_they_were(whole):
    (_, (_, plain, _)), (_, (_, evaluated, _)) = whole("plain"), whole("evaluated")
    assert plain == evaluated


# ---------------------------------------------------------------------- which checkpoint


def damage(folder: Path, how: str, name: str) -> None:
    file = folder / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "short":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "short", "empty", "flipped"])
def test_a_damaged_piece_is_an_error_that_names_it_and_an_automatic_start_passes_it_over(whole, tmp_path, how, caplog):
    folder, _ = whole("adaptive opener")
    names = sorted(path.relative_to(folder / "checkpoint-10").as_posix() for path in (folder / "checkpoint-10").rglob("*"))
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "tsdkd_state_0.json",
        commits.MANIFEST,
    } <= set(names)
    trainer = make(tmp_path / "o", student=tiny_model("llama", seed=1, closes_soon=True), data=prompts(17), max_steps=10,
                   **KINDS["adaptive opener"])  # fmt: skip
    for name in names:
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        (tmp_path / "o").mkdir()
        for step in (9, 10):
            shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "o" / f"checkpoint-{step}")
        damage(tmp_path / "o" / "checkpoint-10", how, name)
        with (
            pytest.raises(ValueError, match=rf"checkpoint-10 cannot be gone on with: its {name} .*checkpoint-9")
            if (name != commits.MANIFEST)
            else pytest.raises(ValueError, match=rf"checkpoint-10 cannot be gone on with: it.*{commits.MANIFEST}")
        ):
            trainer.saving.resuming.found(str(tmp_path / "o" / "checkpoint-10"))
        caplog.clear()
        assert trainer.saving.resuming.found(True) == tmp_path / "o" / "checkpoint-9"
        assert "checkpoint-10 is passed over" in caplog.text and (name in caplog.text or commits.MANIFEST in caplog.text)


def test_true_raises_and_latest_starts_where_nothing_is_there(tmp_path, caplog):
    trainer = make(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.saving.resuming.found("latest") is None and "holds no checkpoint yet: the run starts" in caplog.text
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="of 1 none is whole"):
        trainer.saving.resuming.found(True)
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_finished_run_is_finished(whole, tmp_path, caplog):
    folder, (_, _, weights) = whole("plain")
    shutil.copytree(folder, tmp_path / "o")
    student = tiny_model("llama", seed=1, closes_soon=True)
    trainer = make(tmp_path / "o", student=student, data=prompts(17), max_steps=10, save_strategy="steps", save_steps=1)
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == 10 and "nothing is left to train" in caplog.text
    assert not (tmp_path / "o" / "checkpoint-11").exists()
    assert all(torch.equal(weights[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "changed,told",
    [
        ({"seed": 7}, "seed 42, here 7"),
        ({"data": prompts(16)}, "prompts 17 rows"),
        ({"per_device_train_batch_size": 2}, "prompts a step 4, here 2"),
        ({"method": TSDKD(beta=0.5)}, "method's options"),
        ({"method": METHODS["gkd"]()}, "method tsd_kd, here gkd"),
        ({"method": TSDKD(gate=lambda s: s.student_entropy)}, "method's options .*<lambda>"),
        ({"teacher": tiny_model("qwen2", hidden=48, seed=9)}, "teacher qwen2"),
        ({"temperature": 0.5}, "sampling temperature=1.0"),
        ({"student": tiny_model("llama", seed=1, closes_soon=True, num_hidden_layers=1)}, "student llama"),
    ],
)
def test_another_run_is_refused(whole, tmp_path, changed, told):
    folder, _ = whole("plain")
    options = {"student": tiny_model("llama", seed=1, closes_soon=True), "data": prompts(17), "max_steps": 10, **changed}
    if "method" in options:
        from running import general

        trainer = general(tmp_path, options.pop("method"), **options)
    else:
        trainer = make(tmp_path, **options)
    with pytest.raises(ValueError, match=f"is of another run: .*{told}"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_steps_schedule_and_learning_rate_may_change_and_are_taken(whole, tmp_path, caplog):
    folder, _ = whole("plain")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "o" / "checkpoint-6")
    seen = Seen()
    student = tiny_model("llama", seed=1, closes_soon=True)
    rates = {}

    class Rates(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "learning_rate" in (logs or {}):
                rates[state.global_step] = logs["learning_rate"]

    more = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 3e-4, "logging_steps": 1}
    trainer = make(tmp_path / "o", student=student, data=prompts(17), max_steps=8, callbacks=[seen, Rates()], **more)
    trainer.train(resume_from_checkpoint=True)
    assert set(seen.losses) == {7, 8} and rates[8] == 3e-4 and rates[7] == 3e-4
    for part in ("learning_rate 0.001 → 0.0003", "max_steps 10 → 8", "lr_scheduler_type"):
        assert part in caplog.text, part


def test_what_tells_data_and_options_apart():
    rows = prompts(8)
    assert digest_of_rows(rows) == digest_of_rows(prompts(8)) != digest_of_rows(prompts(9))
    assert digest_of_rows(rows) != digest_of_rows(rows.select([1, 0, 2, 3, 4, 5, 6, 7]))
    assert qualified(TSDKD(gate=torch.sigmoid))["gate"].endswith("sigmoid") and qualified(TSDKD())["beta"] == 0.9
    assert json.dumps(qualified(TSDKD(adaptive_opener=True)))


# ---------------------------------------------------------------------- one run a folder, old checkpoints


def test_a_second_run_into_a_folder_is_refused_while_the_first_trains(tmp_path):
    other = make(tmp_path, max_steps=1)
    told = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match=r"is in use by process .*: a run trains into it") as caught:
                other.train()
            told.append(str(caught.value))

    make(tmp_path, max_steps=1, callbacks=[Second()]).train()
    assert told and not (tmp_path / ".lock").exists()
    other.train()


def test_older_checkpoints_go_after_the_new_one_is_whole_and_the_best_never(tmp_path, monkeypatch):
    order = []
    put, rotate = commits.put, Saving._rotate
    monkeypatch.setattr(commits, "put", lambda *args: order.append("put") or put(*args))
    monkeypatch.setattr(Saving, "_rotate", lambda *args: order.append("rotate") or rotate(*args))
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, max_steps=4, eval_dataset=prompts(4), load_best_model_at_end=False, metric_for_best_model="loss",
                   greater_is_better=True, **options)  # fmt: skip
    trainer.train()
    assert order == ["put", "rotate"] * 4
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir() and (tmp_path / "checkpoint-4").is_dir()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    commits.check(best)


def test_the_final_student_has_a_manifest_that_holds(tmp_path):
    trainer = make(tmp_path / "o", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "s"))
    files = commits.check(tmp_path / "s")["files"]
    assert {"model.safetensors", "config.json", "README.md"} <= files.keys() and not (tmp_path / "s" / commits.SAVING).exists()
    trainer.save_model(str(tmp_path / "s"))  # over itself
    commits.check(tmp_path / "s")


# ---------------------------------------------------------------------- signs that act


class Trouble(TrainerCallback):
    """Logs that look like a run whose completions lose their end, from the seventh step on."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            logs["completions/clipped_ratio"] = 0.0 if state.global_step < 7 else 1.0
            logs["student/entropy"] = logs["candidates/top1_agreement"] = 1.0


@pytest.mark.parametrize("action", ["warn", "stop", "back"])
def test_signs_warn_stop_or_go_back(tmp_path, action, caplog, monkeypatch):
    monkeypatch.setattr("tsdkd.trainers.health.WINDOW", 3)
    student = tiny_model("llama", seed=1, closes_soon=True)
    options = {"save_strategy": "steps", "save_steps": 2, "on_trouble": action, "max_steps": 14, "data": prompts(17)}
    trainer = make(tmp_path, student=student, logging_steps=1, **options)
    trainer.callback_handler.callbacks.insert(0, Trouble())
    trainer.train()
    (sign,) = {record.args[0] for record in caplog.records if "completions/clipped_ratio" in str(record.args)}
    assert 7 <= sign < 14
    if action == "warn":
        assert trainer.state.global_step == 14
        return
    assert trainer.state.global_step == sign and f"on_trouble={action} ends the run here" in caplog.text
    if action == "stop":
        commits.check(tmp_path / f"checkpoint-{sign}")
        return
    before = max(step for step in range(2, sign, 2))
    assert f"the student is that of {tmp_path / f'checkpoint-{before}'} again" in caplog.text
    from safetensors.torch import load_file

    saved = load_file(tmp_path / f"checkpoint-{before}" / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in trainer.model.named_parameters() if name in saved)


def test_a_teacher_that_has_become_uniform_is_told(tmp_path, caplog):
    teacher = tiny_model("qwen2", hidden=48, seed=2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.zero_()
    make(tmp_path, teacher=teacher, max_steps=1).train()
    assert "of one that knows nothing: it teaches nothing" in caplog.text
    caplog.clear()
    make(tmp_path / "b", max_steps=1).train()
    assert "teaches nothing" not in caplog.text
