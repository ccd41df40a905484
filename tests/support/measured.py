"""A plan's bytes beside those of two steps as the first of several processes (`worlds.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import QUESTIONS, save_tiny
from transformers import AutoConfig

from tsdkd.demo.recreate import make_tokenizer
from tsdkd.preflight.memory import Placement, Run, memory_of


def planned_and_measured(folder, processes, student, teacher, bf16=False):
    """The most bytes that a plan says and that a run holds on a process."""
    save_tiny(folder / "s", seed=1, hidden=96, positions=256)
    save_tiny(folder / "t", seed=2, hidden=128, positions=256, num_hidden_layers=3)
    asked = json.dumps({"processes": processes, "student": student, "teacher": teacher, "bf16": bf16})
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("worlds.py")), str(folder), asked]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    assert found["world"] == processes
    prompt = max(len(make_tokenizer()(question)["input_ids"]) for question in QUESTIONS[:16])
    configs = (AutoConfig.from_pretrained(folder / name) for name in "st")
    run = Run(
        *configs, torch.float32, torch.float32, torch.bfloat16 if bf16 else None, rows=4, teacher_rows=2, length=prompt + 100,
        completion=100, checkpointing=False, optimizer="adamw_torch", chunk=512, block=(1 << 18) // 64, bucket=100_000,
    )  # fmt: skip
    return memory_of(run, Placement(student, teacher), processes).peak, found["peak"]
