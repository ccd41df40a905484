"""A plan of models in shares: bytes against those of two steps, on torch's fake process group; a run of 64 processes tried."""

from __future__ import annotations

import json

import pytest
from measured import planned_and_measured
from tiny import save_tiny

from tsdkd.cli.fake_world import tried

pytestmark = pytest.mark.engines


@pytest.mark.parametrize(
    "student,teacher", [("whole", "zero3"), ("zero2", "local"), ("zero2", "zero3"), ("zero3", "local"), ("zero3", "zero3")]
)
def test_bytes_in_shares_are_those_of_a_run(tmp_path, student, teacher):
    planned, measured = planned_and_measured(tmp_path, 4, student, teacher)
    assert planned == pytest.approx(measured, rel=0.15)


def test_64_processes_that_share_both_models_are_tried_on_one(tmp_path):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tom has {n} pens."}) + "\n" for n in range(300)))
    flags = ["--student", student, "--teacher", teacher, "--dataset_name", str(data), "--max_length", "64"]
    assert tried(64, "zero3", "zero3", [*flags, "--per_device_train_batch_size", "4"]) is None
    assert "300" in str(tried(64, "zero2", "zero3", [*flags, "--per_device_train_batch_size", "8"]))
