"""The fused loss with the student's parameters sharded by DeepSpeed ZeRO-3, against one plain process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import by_prompt, make, rows
from tiny import prompts

pytestmark = pytest.mark.engines


def test_zero3_gives_the_losses_of_one_process_and_gathers_the_head_once_a_micro_batch(tmp_path):
    plain = make(tmp_path / "plain", data=prompts(8), rollouts=by_prompt, gradient_accumulation_steps=2, max_steps=3)
    plain.train()
    folder = tmp_path / "zero3"
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(Path(__file__).parent / "zero3.py"), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    for rank in range(2):
        result = json.loads((folder / f"rank{rank}.json").read_text())
        assert result["world"] == 2
        # two micro-batches a step, each finding the head sharded and gathering it once
        assert len(result["gathered"]) == 6
        for ours, one in zip(result["rows"], rows(plain), strict=True):
            for name in ("loss", "loss/direct", "loss/indirect", "loss/entropy"):
                assert ours[name] == pytest.approx(one[name], rel=2e-5), name  # three steps of Adam in float32
