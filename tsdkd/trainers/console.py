"""A training run on the terminal: a bar with what matters and the time left, or a line a log."""

from __future__ import annotations

import time
import weakref
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
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


PARTS = ("rollout", "teacher", "student", "loss")


def shares(logs: dict[str, Any]) -> str:
    """Which share of a step's time each part takes."""
    seconds = {name: float(logs[f"time/{name}"]) for name in PARTS if f"time/{name}" in logs}
    whole = sum(seconds.values())
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items()) if whole > 0 else ""


def coloured(sample: dict[str, Any]) -> Text:
    """A kept completion: the deeper a token's colour the higher the student's entropy; what the teacher ranks is underlined."""
    columns, made = sample["columns"], Text()
    entropies = columns.get("student_entropy") or [0.0] * len(sample["tokens"])
    high = max([*entropies, 1e-9])
    opener = columns.get("opener") or [0] * len(sample["tokens"])
    for token, entropy, ranked in zip(sample["tokens"], entropies, opener, strict=True):
        strength = min(1.0, entropy / high)
        blue = f"white on rgb(0,{int(40 + 60 * strength)},{int(60 + 150 * strength)})" if strength > 0.05 else ""
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in token)
        made.append(text, style=" ".join(["underline"] * bool(ranked) + [blue] * bool(blue)) or None)
    return made


class ConsoleLog(TrainerCallback):
    """A run on the terminal: one bar with the time left, the terms, the speed and what the time goes to; where there is no
    terminal, a line a log. Every number is in `metrics.jsonl`.

    Args:
        trainer: whose run it is.
        console: where it is shown; default: standard output.
    """

    def __init__(self, trainer: Any, console: Console | None = None) -> None:
        self.trainer, self.console = trainer, console or Console(highlight=False)
        self._began, self._first = 0.0, 0
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._status = Text()
        self._task: Any = None

        self.completions = 0

    @classmethod
    def of(cls, trainer: Any) -> list[ConsoleLog]:
        """One in place of transformers' own printing on a terminal, and of TRL's of completions; none where a notebook has a
        table of its own."""
        replaced = [trainer.pop_callback(other) for other in (PrinterCallback, ProgressCallback)]
        if not any(replaced):
            return []
        made = cls(trainer)
        made.completions = trainer.num_completions_to_print or trainer.args.sample_completions
        trainer.num_completions_to_print = 0
        return [made]

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal or args.disable_tqdm:
            return
        bar = (MofNCompleteColumn(), BarColumn(), TextColumn("time left"), TimeRemainingColumn())
        self._progress, self._status = Progress(*bar, console=self.console), Text(style="dim")
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
        self._live = Live(Group(self._progress, self._status), console=self.console, refresh_per_second=8)
        self._live.start()
        _LIVE.add(self)

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = self._progress = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        made = state.global_step - self._first
        if "train_runtime" in logs:
            self.stop()
            self._say(f"{state.global_step} steps in {_spoken(float(logs['train_runtime']))}")
            return
        evaluated = any(name.startswith("eval_") for name in logs)
        if self._progress is not None and not evaluated:
            told = line(state.global_step, state.max_steps, logs).split("  ", 1)
            self._status.plain = "\n".join([*told[1:], f"time: {shares(logs)}"])
        else:
            rest = (time.monotonic() - self._began) / made * (state.max_steps - state.global_step) if made else 0.0
            self._say(line(state.global_step, state.max_steps, logs, f"{_spoken(rest)} left" if rest >= 1 else ""))
        if args.log_completions and not evaluated:
            self._show(state.global_step)

    def _say(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _show(self, step: int) -> None:
        samples = self.trainer.run_record.samples
        for sample in [] if samples is None else samples.last[: self.completions]:
            if sample["step"] == step:
                self.console.print(Text(f"step {step}, a completion:"), coloured(sample), sep="\n", soft_wrap=True)


_LIVE: weakref.WeakSet = weakref.WeakSet()


def stop_all() -> None:
    """Leave the terminal as it was, whatever ended the run."""
    for log in list(_LIVE):
        log.stop()


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
