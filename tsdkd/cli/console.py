"""A training run on the terminal: a line a log, with what matters and the time left."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

# A log's number by its name, its short name and how it is written.
_SHOWN = (
    ("loss", "loss", "{:.4g}"),
    ("learning_rate", "lr", "{:.3g}"),
    ("student/entropy", "entropy", "{:.3g}"),
    ("candidates/top1_agreement", "agreement", "{:.2f}"),
    ("completions/mean_length", "length", "{:.4g}"),
    ("completions/clipped_ratio", "cut", "{:.0%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


def line(step: int, steps: int, logs: dict[str, Any], left: str = "") -> str:
    """A log as one line."""
    evaluated = {name: value for name, value in logs.items() if name.startswith("eval_") and isinstance(value, (int, float))}
    if evaluated:
        costs = ("runtime", "_per_second")
        shown = [f"{name[5:]} {value:.4g}" for name, value in evaluated.items() if not name.endswith(costs)]
        return f"step {step}/{steps}  evaluation: {', '.join(shown)}"
    parts = [f"step {step}/{steps}"]
    for name, short, how in _SHOWN:
        if name in logs:
            parts.append(f"{short} {how.format(float(logs[name]))}")
        if name == "loss":
            terms = [f"{key[5:]} {float(value):.3g}" for key, value in logs.items() if key.startswith("loss/")]
            parts += [f"({', '.join(terms)})"] if terms else []
    return "  ".join([*parts, *([left] if left else [])])


class ConsoleLog(TrainerCallback):
    """Prints logs as lines; every number is in `metrics.jsonl`."""

    def __init__(self) -> None:
        self._began, self._first = 0.0, 0

    @classmethod
    def of(cls, trainer: Any) -> ConsoleLog:
        """In place of transformers' own printing."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        made = cls()
        trainer.add_callback(made)
        return made

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        made = state.global_step - self._first
        if "train_runtime" in logs:
            print(f"{state.global_step} steps in {_spoken(float(logs['train_runtime']))}", flush=True)
            return
        rest = (time.monotonic() - self._began) / made * (state.max_steps - state.global_step) if made else 0.0
        print(line(state.global_step, state.max_steps, logs, f"{_spoken(rest)} left" if rest >= 1 else ""), flush=True)


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
