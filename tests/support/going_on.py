"""Run by torchrun in `test_crashes.py`: some steps of a run with sampled completions, from a checkpoint or from the start; each
process leaves its losses, completions and weights."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from running import make
from tiny import prompts, tiny_model
from transformers import TrainerCallback

torch.set_num_threads(1)


class Seen(TrainerCallback):
    def __init__(self, ask: int) -> None:
        self.losses: dict[int, float] = {}
        self.ask = ask

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.ask and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses[state.global_step] = logs["loss"]


def main(folder: Path, out: Path, checkpoint: str, ask: int) -> None:
    seen, written = Seen(ask), {}
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    options |= {"data": prompts(17), "max_steps": 6, "callbacks": [seen], "stop_on_signals": True}
    trainer = make(folder, student=tiny_model("llama", seed=1, closes_soon=True, attention_dropout=0.1), **options)
    kept = trainer.loop.prepare

    def prepare(rollouts):
        written[trainer.step + 1] = rollouts.completion_ids
        return kept(rollouts)

    trainer.loop.prepare = prepare
    trainer.train(resume_from_checkpoint=checkpoint or None)
    weights = [p.detach().sum(dtype=torch.float64).item() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    made = {"losses": seen.losses, "written": written, "weights": weights}
    made |= {"stopped_by": trainer.stopped_by, "step": trainer.state.global_step}
    Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
