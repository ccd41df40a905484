"""The fused loss with the student's parameters sharded by DeepSpeed ZeRO-3, against one plain process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engines


def launch(folder: Path, world: int, *options: str) -> list[dict]:
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).parent / "zero3.py"), str(folder), *options]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def test_zero3_gives_the_losses_of_one_process_and_gathers_the_head_for_each_loss(tmp_path):
    (plain,) = launch(tmp_path / "plain", 1)
    for result in launch(tmp_path / "zero3", 2):
        assert result["world"] == 2
        assert result["inside"] == [64] * 6 and result["outside"] == 0  # whole for each micro-batch's loss, else sharded
        for ours, one in zip(result["rows"], plain["rows"], strict=True):
            for name in ("loss", "loss/direct", "loss/indirect", "loss/entropy"):
                assert ours[name] == pytest.approx(one[name], rel=2e-5), name  # three steps of Adam in float32


def test_a_nan_stops_every_process_before_deepspeed_changes_the_weights(tmp_path):
    for result in launch(tmp_path / "run", 2, "poisoned"):
        assert "step 3: NaN or Inf in the teacher's hidden states" in result["stopped"]
        assert result["moved"] > 0 and result["spoilt"] == 0  # the second step was made (the first warms up), the third was not
