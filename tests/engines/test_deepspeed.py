"""Student and teacher under DeepSpeed, each alone and both, against one plain process: the same losses and gradient norms."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "student", seed=1)
    save_tiny(folder / "teacher", seed=2, hidden=48)
    save_tiny(folder / "other", seed=3, hidden=64)
    return folder


def launch(models: Path, scenario: str) -> list[dict]:
    world = 1 if scenario.startswith("plain") else 2
    folder = models / scenario.replace(", ", "-").replace(" ", "-")
    folder.mkdir(exist_ok=scenario.endswith("again"))
    command = [sys.executable, str(Path(__file__).parent / "sharded.py"), str(folder), scenario]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    assert all(result["world"] == world for result in results)
    return results


@pytest.fixture(scope="module")
def plain(models):
    return launch(models, "plain")[0]


@pytest.mark.parametrize(
    "scenario,student,teacher",
    [
        ("ddp", 1, 1),
        ("zero2", 1, 1),
        ("zero3", 0.5, 1),
        ("ddp, teacher zero3", 1, 0.5),
        ("zero1, teacher zero3", 1, 0.5),
        ("zero2, teacher zero3", 1, 0.5),
        ("zero3, teacher zero3", 0.5, 0.5),
        ("ddp, teacher zero3 on the cpu", 1, 0.5),
        ("ddp, teacher zero3 by tokens", 1, 0.5),  # as many passes on both, whatever is to be read
    ],
)
def test_five_steps_and_an_evaluation_are_those_of_one_process(models, plain, scenario, student, teacher):
    """What each process holds is its share, and the two heads are whole while a loss is computed."""
    assert len(plain["rows"]) == 5
    for result in launch(models, scenario):
        assert result["student"] == pytest.approx(student, abs=0.01) and result["teacher"] == pytest.approx(teacher, abs=0.01)
        assert result["inside"] == [[64, 64]] * 10
        assert result["student buffers"] == result["teacher buffers"] == ["torch.float32"]
        if teacher < 1:
            assert result["place"] == ("cpu" if "cpu" in scenario else None) and result["closed"] == 0
            if "zero3," not in scenario.split(", teacher")[0] + ",":
                assert result["linear"] == "linear"  # DeepSpeed would put its own in the place of torch's, for all models
        assert (result["student head"] == 0) == (student < 1) and (result["teacher head"] == 0) == (teacher < 1)
        for ours, one in zip(result["rows"], plain["rows"], strict=True):
            for name in ("loss", "loss/direct", "loss/indirect", "loss/entropy", "grad_norm"):
                assert ours[name] == pytest.approx(one[name], rel=5e-5), name  # five steps of Adam in float32
        for name in ("eval_loss", "eval_loss/direct"):  # of 7 rows, so that the last batches are uneven
            assert result["evaluation"][name] == pytest.approx(plain["evaluation"][name], rel=5e-5), name


@pytest.mark.parametrize(
    "whole,kind,tolerance", [("ddp", "bf16", 1e-6), ("plain", "lora", 5e-5), ("plain", "two teachers, own prompts", 5e-5)]
)
def test_a_sharded_teacher_in_bfloat16_of_a_lora_student_or_one_of_two_with_their_own_prompts_is_the_whole_one(
    models, whole, kind, tolerance
):
    """In bfloat16 of as many processes, since rounding depends on how rows are batched."""
    one = launch(models, f"{whole}, {kind}")[0]
    for result in launch(models, f"ddp, teacher zero3, {kind}"):
        assert result["teacher"] == pytest.approx(0.5, abs=0.01)
        assert result["teacher buffers"] == one["teacher buffers"] == ["torch.float32"]
        for ours, theirs in zip(result["rows"], one["rows"], strict=True):
            for name in ("loss", "loss/direct", "loss/indirect", "loss/entropy", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name


def test_buffers_that_no_checkpoint_holds_are_those_of_a_model_loaded_whole(models):
    """ZeRO-3 computes the rotary embedding's angles in the dtype of the weights."""
    for result in launch(models, "loaded in bf16 shares"):
        assert result["parameters"] == 0 and result["names"] and result["after"]
        assert not result["before"]  # else restoring them is no longer needed


def test_a_sharded_teacher_records(models):
    from tsdkd.teachers import Recording

    first, second = launch(models, "ddp, teacher zero3, recorded")
    assert first["files"] == second["files"]
    recording = Recording.open(models / "ddp-teacher-zero3-recorded" / "recording")
    assert recording.head.size == 64 and recording.head.weight.abs().sum() > 0


@pytest.mark.gpu
def test_accelerates_fsdp2_gives_the_losses_of_one_process(models, plain):
    """On two GPUs: on a CPU accelerate falls back to DDP without a word."""
    for result in launch(models, "fsdp2"):
        for ours, one in zip(result["rows"], plain["rows"], strict=True):
            assert ours["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_rank_without_answers_does_not_hold_a_sharded_teacher_up(models):
    first, second = launch(models, "ddp, teacher zero3, one rank is empty")
    assert len(first["rows"]) == len(second["rows"]) == 5
    assert all(row["completions/empty"] == 4 and row["loss"] > 0 for row in first["rows"])


@pytest.mark.parametrize(
    "student",
    ["ddp, checkpointing", "ddp teacher zero3, lora", "zero2", "zero3", "zero3 teacher zero3, checkpointing"],
)
def test_a_nan_stops_every_process_before_the_weights_change(models, student):
    """It is in the third step of one process; the second is made and saved (the first warms up)."""
    for result in launch(models, f"{student}, poisoned"):
        assert "step 3: NaN or Inf in the teacher's hidden states" in result["stopped"]
        assert result["moved"] > 0 and result["spoilt"] == 0
        assert result["saved"] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("student", ["zero2", "zero3", "zero3, lora", "ddp teacher zero3"])
def test_a_sharded_run_goes_on_bit_for_bit(models, student):
    """Inside an epoch and past it, with dropout and accumulation, its completions drawn by the sharded student."""
    whole = launch(models, f"{student}, whole")
    name = student.replace(", ", "-").replace(" ", "-")
    folder = models / f"{name}-again"
    shutil.copytree(models / f"{name}-whole", folder, ignore=shutil.ignore_patterns("rank*.json", ".lock"))
    again = launch(models, f"{student}, again")
    for first, second in zip(whole, again, strict=True):
        assert len(first["losses"]) == 5 and len({tuple(map(tuple, step)) for step in first["written"]}) == 5
        assert second["losses"][-3:] == first["losses"][-3:]
        assert second["written"] == first["written"][2:]
        assert second["weights"] == first["weights"]
