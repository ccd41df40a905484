"""Long runs (`make test-long`): nothing grows with the steps."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.demo.problems import make_problems
from tsdkd.demo.run import shipped

pytestmark = pytest.mark.long
STEPS, EVERY, WARM = 2000, 50, 400


class Holds(TrainerCallback):
    """What the process holds, every so many steps."""

    def __init__(self):
        self.rows = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps of freed memory is held by nobody
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            self.rows.append((state.global_step, memory, files, threads, tensors))


def test_two_thousand_steps_of_the_demos_models_hold_no_more_at_the_end(tmp_path, capsys):
    torch.set_num_threads(1)
    problems = make_problems(4000, 1, (2, 3))
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": problem.question}] for problem in problems]})
    config = TSDKDConfig(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, max_completion_length=60, max_length=160, use_cpu=True,
        report_to="none", learning_rate=1e-5, logging_steps=10, save_steps=500, save_total_limit=2, indirect_weight=0.01,
        num_candidates=3, entropy_weight=0.01,
        # In bfloat16 oneDNN compiles the teacher's products anew for every new shape and keeps up to 1024 of them: 16 MiB per
        # 1000 steps here, all of it in oneDNN's kernels by memray. In float32 torch takes another library.
        teacher_model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    holds = Holds()
    trainer = TSDKDTrainer(shipped("student"), shipped("teacher"), config, rows, callbacks=[holds])
    trainer.train()
    steps, memory, files, threads, tensors = map(np.array, zip(*[row for row in holds.rows if row[0] > WARM], strict=True))
    slope, cut = np.polyfit(steps, memory, 1)
    noise = np.std(memory - (slope * steps + cut))
    grown = slope * (steps[-1] - steps[0])
    with capsys.disabled():
        print(f"\n{STEPS} steps: memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, {1000 * slope:.2f} MiB per 1000 steps "
              f"(scatter {noise:.2f}), files {files.min()}-{files.max()}, threads {threads.min()}-{threads.max()}, "
              f"tensors {tensors.min()}-{tensors.max()}")  # fmt: skip
    # A leak of one batch's ids a step would be 0.3 MiB per 1000 steps; of its hidden states 400.
    assert grown < max(4 * noise, 8.0), (slope, noise)
    assert files[-1] <= files[0] and threads[-1] <= threads[0] and tensors[-1] <= tensors[0] + 5
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
