"""What an outside reader of resuming broke: pushes, rotation, moved folders, changed optimizers, adapters, edited manifests."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from running import make
from tiny import QUESTIONS, prompts, save_tiny, tiny_model
from transformers import TrainerCallback

from tsdkd import TSDKDConfig
from tsdkd.cli import main
from tsdkd.data import commits
from tsdkd.trainers.identity import digest_of_rows

SAVES = {"save_strategy": "steps", "save_steps": 1}
TOKEN = "hf_PLANTEDplantedPLANTED12345"


def student(**options):
    return tiny_model("llama", seed=1, closes_soon=True, **options)


def of(folder, **options):
    return make(folder, **{"student": student(), "data": prompts(17), "logging_steps": 1, **SAVES, **options})


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("four")
    of(folder, max_steps=4).train()
    return folder


@pytest.fixture
def run(four, tmp_path):
    shutil.copytree(four, tmp_path / "o")
    return tmp_path / "o"


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# ---------------------------------------------------------------------- pushes


def test_options_are_pickled_without_secrets_and_copied_with_them(tmp_path):
    config = TSDKDConfig(str(tmp_path), hub_token=TOKEN, model_init_kwargs={"token": TOKEN}, use_cpu=True, report_to="none")
    assert TOKEN.encode() not in pickle.dumps(config)
    assert copy.copy(config).hub_token == copy.deepcopy(config).hub_token == config.hub_token == TOKEN
    assert copy.deepcopy(config).model_init_kwargs is not config.model_init_kwargs


def test_pushes_come_after_the_commit_with_the_token(tmp_path, monkeypatch):
    pushed = []

    def checkpoint(self, folder):
        commits.check(Path(folder))
        pushed.append((Path(folder).name, self.args.hub_token))

    def student_of(self, *args, **kwargs):
        commits.check(Path(self.args.output_dir))
        pushed.append(("student", self.args.hub_token, (Path(self.args.output_dir) / commits.SAVING).exists()))

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", checkpoint)
    trainer = of(tmp_path, max_steps=1, hub_token=TOKEN)
    monkeypatch.setattr(type(trainer), "push_to_hub", student_of)
    trainer.args.push_to_hub = True
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert pushed == [("checkpoint-1", TOKEN), ("student", TOKEN, False)]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# ---------------------------------------------------------------------- which stay


def test_torn_checkpoints_are_set_aside_and_never_outlive_a_whole_one(run):
    halve(run / "checkpoint-3" / "optimizer.pt"), halve(run / "checkpoint-4" / "optimizer.pt")
    kept = []

    class Kept(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            newest, skipped = commits.newest(run)
            kept.append((newest.name, skipped))

    of(run, max_steps=4, save_total_limit=1, callbacks=[Kept()]).train(resume_from_checkpoint=True)
    assert kept == [("checkpoint-3", []), ("checkpoint-4", [])] and steps(run) == [4]
    assert {path.name for path in run.glob(".torn-*")} == {".torn-checkpoint-3", ".torn-checkpoint-4"}


def test_going_on_from_an_earlier_one_keeps_what_is_written_now(run):
    of(run, max_steps=3, save_total_limit=1).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert steps(run) == [3]
    commits.check(run / "checkpoint-3")


def test_where_none_is_whole_nothing_starts_over_them(run):
    for number in steps(run):
        halve(run / f"checkpoint-{number}" / "model.safetensors")
    with pytest.raises(ValueError, match=r"of 4 none is whole.*--overwrite_output_dir"):
        of(run, max_steps=4).train(resume_from_checkpoint="latest")
    assert steps(run) == [1, 2, 3, 4]


def best_options(folder):
    return {"eval_dataset": prompts(4), "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 2}  # fmt: skip


def test_the_best_is_found_after_a_move_and_is_the_student_of_a_finished_run(tmp_path):
    first = of(tmp_path / "a", max_steps=3, **best_options(tmp_path))
    first.train()
    best = first.state.best_global_step
    weights = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    assert best < 3
    (tmp_path / "a").rename(tmp_path / "b")
    again = of(tmp_path / "b", max_steps=3, **best_options(tmp_path))
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(weights[name], p) for name, p in again.model.named_parameters())
    longer = of(tmp_path / "b", max_steps=6, **best_options(tmp_path))
    longer.train(resume_from_checkpoint=True)
    assert longer.state.best_global_step != best or (tmp_path / "b" / f"checkpoint-{best}").is_dir()


def test_a_run_that_trains_is_not_overwritten(run, tmp_path, capsys):
    s, t = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    words = ["train", "--student", s, "--teacher", t, "--dataset_name", str(tmp_path / "p.jsonl"), "--use_cpu"]
    words += ["--output_dir", str(run), "--overwrite_output_dir", "--max_steps", "1", "--per_device_train_batch_size", "4"]
    with commits.locked(run, "a run trains into it"):
        assert main([*words, "--max_completion_length", "4"]) == 2
    assert "is in use by process" in capsys.readouterr().err and steps(run) == [1, 2, 3, 4]


def test_a_signal_saves_whatever_the_strategy(tmp_path):
    import os
    import signal

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {**best_options(tmp_path), "save_strategy": "best", "load_best_model_at_end": False, "greater_is_better": False}
    trainer = of(tmp_path, max_steps=4, stop_on_signals=True, callbacks=[Ask()], **options)
    trainer.train()
    assert trainer.stopped_by == signal.SIGTERM
    commits.check(tmp_path / "checkpoint-2")


# ---------------------------------------------------------------------- from what


def test_a_checkpoint_without_its_optimizer_is_none_to_go_on_with(tmp_path):
    of(tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"its optimizer.pt was not saved \(save_only_model\?\)"):
        of(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="of 2 none is whole"):
        of(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_names_are_looked_for_in_the_runs_folder_and_students_are_none(run, tmp_path):
    trainer = of(run, max_steps=4)
    found = trainer.saving.resuming.found
    assert found("checkpoint-2") == run / "checkpoint-2"
    with pytest.raises(ValueError, match=r"there is no such folder. Whole ones are there: checkpoint-4, checkpoint-3"):
        found("checkpoint-9")
    (run / "checkpoint-3").rename(run / f"{commits.REPLACED}checkpoint-3")
    assert found(str(run / "checkpoint-3")) == run / "checkpoint-3"
    trainer.save_model(str(tmp_path / "student"))
    with pytest.raises(ValueError, match="it is no checkpoint of a run"):
        found(str(tmp_path / "student"))


@pytest.mark.parametrize(
    "edit", [{"step": None}, {"step": "x"}, {"run": []}, {"schema": 99}, {"schema": "x"}, {"files": []}, {"run": None}]
)
def test_an_edited_manifest_is_damaged(run, edit, caplog):
    file = run / "checkpoint-4" / commits.MANIFEST
    made = json.loads(file.read_text())
    edited = {k: v for k, v in {**made, **edit}.items() if v is not None}
    file.write_text(json.dumps({**edited, "digest": commits.manifest_digest(edited)}))  # by somebody who knows how
    trainer = of(run, max_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be gone on with: it"):
        trainer.saving.resuming.found(str(run / "checkpoint-4"))
    assert trainer.saving.resuming.found(True) == run / "checkpoint-3"


# ---------------------------------------------------------------------- with what


def lora(**options):
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


OTHERS = {
    "alpha": {"peft_config": lora(lora_alpha=800)},
    "modules": {"peft_config": lora(target_modules=["q_proj"])},
    "weights under it": {"student": tiny_model("llama", seed=5)},
    "min_p": {"min_p": 0.2},
    "generation": {"generation_kwargs": {"typical_p": 0.5}},
    "order": {"shuffle_dataset": False},
    "optimizer": {"optim": "sgd"},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_dataset": prompts(4),
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


@pytest.mark.parametrize("what", OTHERS)
def test_adapters_sampling_order_and_optimizers_are_told_apart(tmp_path, what):
    options = {"max_steps": 2, "peft_config": lora(), "student": tiny_model("llama", seed=1)}
    of(tmp_path, **options).train()
    of(tmp_path, **{**options, "student": tiny_model("llama", seed=1), "max_steps": 3}).train(resume_from_checkpoint=True)
    trainer = of(tmp_path, **{**options, "student": tiny_model("llama", seed=1), "max_steps": 4, **OTHERS[what]})
    with pytest.raises(ValueError, match=r"is of another run|no other schedule has"):
        trainer.train(resume_from_checkpoint=True)


def test_what_may_change_is_taken(run):
    rates, groups = {}, []

    class Seen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "learning_rate" in (logs or {}):
                rates[state.global_step] = logs["learning_rate"]

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            groups.append([(group["weight_decay"], group["betas"]) for group in optimizer.param_groups])

    more = {"weight_decay": 0.5, "adam_beta1": 0.7, "lr_scheduler_type": "linear", "warmup_steps": 0}
    of(run, max_steps=8, callbacks=[Seen()], **more).train(resume_from_checkpoint=True)
    assert rates == {step: pytest.approx(1e-3 * (8 - step + 1) / 8) for step in (5, 6, 7, 8)}
    assert groups[0] == [(0.5, (0.7, 0.999)), (0.0, (0.7, 0.999))]


def test_images_are_told_apart_by_what_is_in_them(caplog):
    image = pytest.importorskip("PIL.Image")
    rows = [
        Dataset.from_dict({"prompt": ["a"], "image": [image.new("RGB", (4, 4), colour)]}) for colour in ("red", "red", "blue")
    ]
    assert digest_of_rows(rows[0]) == digest_of_rows(rows[0]) == digest_of_rows(rows[1]) != digest_of_rows(rows[2])


def test_a_trainer_that_is_given_more_steps_goes_on(tmp_path, caplog):
    trainer = of(tmp_path, max_steps=2)
    trainer.train()
    trainer.args.max_steps = 3
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and "nothing is left" not in caplog.text
