"""Completions that a run keeps of itself, early and late, with what was decided of each token; and traces of steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tsdkd.data.pieces import joined_text, token_texts
from tsdkd.data.rows import append_rows
from tsdkd.trainers.step import Step
from tsdkd.types import LossTerms

_PROMPT = 4000  # characters of a prompt that are kept


class Samples:
    """Appends the first completions of some steps to a file: of steps 1, 2, 4, 8, … and the last.

    Args:
        path: JSONL.
        count: completions a step; 0 keeps none.
        tokenizer: gives the tokens' texts.
        now: gives the step in hand, from 1, and the last one.
        every: have the completions of every so many steps in `last`, too.
    """

    def __init__(
        self, path: Path, count: int, tokenizer: Any, now: Callable[[], tuple[int, int]], every: int | None = None
    ) -> None:
        self.path, self.count, self.tokenizer, self.now, self.every = path, count, tokenizer, now, every
        self.last: list[dict[str, Any]] = []
        self._kept = 0

    def due(self, step: int, last: int) -> bool:
        """Whether a step's completions are kept."""
        return bool(self.count) and self._kept != step and (step & (step - 1) == 0 or step == last)

    def __call__(self, step: Step, terms: LossTerms) -> None:
        """A micro-batch that the loss was computed of."""
        number, last = self.now()
        due = self.due(number, last)
        if self._kept == number or not (due or (self.every and number % self.every == 0)):
            return
        self._kept = number
        self.last = self.rows(step, terms, number)
        if due:
            append_rows(self.path, self.last)

    def rows(self, step: Step, terms: LossTerms, number: int) -> list[dict[str, Any]]:
        """The first completions as rows: `step`, `prompt`, `tokens` and `columns` of numbers a token."""
        columns = {
            "student_entropy": terms.student_entropy,
            "teacher_entropy": terms.teacher_entropy,
            "gate": terms.gate,
            "opener": terms.opener_mask,
            "top_entropy": terms.top_entropy_mask,
            "loss": _contribution(terms),
        }
        rollouts, made = step.rollouts, []
        for row, length in enumerate(terms.mask[: self.count].sum(-1).tolist()):
            if not length:
                continue
            one = rollouts.rows([row])
            ids = one.trained(one.completion_ids)[:length]  # as far as the student read
            texts = token_texts(self.tokenizer, ids)
            prompt = joined_text(self.tokenizer, one.prompt_ids[0])[-_PROMPT:]
            numbers = {name: _numbers(value, row, length) for name, value in columns.items() if value is not None}
            made.append({"step": number, "prompt": prompt, "tokens": texts, "columns": numbers})
        return made


def _contribution(terms: LossTerms) -> torch.Tensor | None:
    parts = [result.contribution for result in terms.terms.values()]
    return torch.stack(parts).sum(0) if parts else None


def _numbers(values: torch.Tensor, row: int, length: int) -> list[float]:
    return [round(value, 5) for value in values[row, :length].double().tolist()]


class Trace(TrainerCallback):
    """Writes a Chrome trace (Perfetto reads it) of each of some steps, `trace-STEP.json`, on the first process.

    Args:
        steps: optimizer steps, from 1.
        folder: gives where.
    """

    def __init__(self, steps: list[int], folder: Callable[[], Path]) -> None:
        self.steps, self.folder = set(steps), folder
        self._profile: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step + 1 in self.steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self._stop(f"trace-{state.global_step}.json")

    def on_train_end(self, args, state, control, **kwargs):
        self._stop(f"trace-{state.global_step}.json")

    def _stop(self, name: str) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        self.folder().mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder() / name))


def trace_steps(value: str | list[int] | None) -> list[int]:
    """The steps that are traced, of a list or `10,20`.

    Raises:
        ValueError: something else.

    Example:
        >>> trace_steps("10,20"), trace_steps(None)
        ([10, 20], [])
    """
    if value in (None, "", []):
        return []
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        steps = [int(part) for part in parts]
    except (TypeError, ValueError):
        steps = [0]
    if min(steps) < 1:
        raise ValueError(f"trace_steps={value!r}: pass optimizer steps from 1, comma-separated, e.g. 10,20.")
    return steps
