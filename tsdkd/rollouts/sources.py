"""Whose completions a step trains on: fresh ones, the data set's, or earlier ones from a replay buffer."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from tsdkd.types import RolloutSpec


def fresh_share(schedule: str, step: int, steps: int) -> float:
    """s(t) of DistiLLM: the share of fresh completions among the student's.

    Example:
        >>> fresh_share("decreasing", 30, 100), fresh_share("constant", 30, 100), fresh_share("increasing", 30, 100)
        (0.7, 0.5, 0.3)
    """
    done = step / max(1, steps)
    return {"decreasing": 1.0 - done, "constant": 0.5, "increasing": done}[schedule]


class RolloutSource:
    """Draws the source of each step's completions, the same on every process, and keeps what the draw depends on.

    Args:
        spec: what the method states.
        seed: of the draws; a step's draw depends on it and on the step's number alone.
        rows: rows of a step on this process.
        processes: how many processes share the buffer's capacity.

    Raises:
        ValueError: a replay buffer that holds less than a step's rows.

    References:
        GKD Algorithm 1 (λ); DistiLLM Algorithm 1 (φ and the buffer).
    """

    def __init__(self, spec: RolloutSpec, seed: int, rows: int, processes: int = 1) -> None:
        self.spec, self.seed = spec, seed
        self.share = spec.share
        self.previous_loss: float | None = None
        self.deciding: str | None = None  # of several evaluation sets the first
        self.buffer: deque[dict[str, Any]] = deque()
        if spec.replay is not None:
            self.share = spec.replay.start
            capacity = spec.replay.capacity // processes
            if capacity < rows:
                raise ValueError(
                    f"replay_capacity={spec.replay.capacity} over {processes} processes is {capacity} rows each, but a step "
                    f"takes {rows}: no step could be drawn from the buffer. Pass {rows * processes} or more."
                )
            self.buffer = deque(maxlen=capacity)

    def draw(self, step: int, steps: int) -> str:
        """`"fresh"`, `"dataset"` or `"buffer"`, for optimizer step `step` (from 0) of `steps`."""
        lot = random.Random(f"{self.seed}/{step}").random()
        replay = self.spec.replay
        if replay is None:
            return "fresh" if lot < self.share else "dataset"
        full = len(self.buffer) == self.buffer.maxlen
        if lot < self.share * fresh_share(replay.schedule, step, steps) or (lot < self.share and not full):
            return "fresh"
        return "buffer" if lot < self.share else "dataset"

    def keep(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put a step's fresh rows (`prompt`, `completion_ids`) into the buffer, where there is one."""
        if self.spec.replay is not None:
            self.buffer.extend(rows)

    def replayed(self, step: int, rows: int, process: int = 0) -> list[dict[str, Any]]:
        """Rows of the buffer, drawn without replacement."""
        return random.Random(f"{self.seed}/{step}/{process}").sample(list(self.buffer), rows)

    def evaluated(self, loss: float, name: str = "eval") -> None:
        """Raise φ where an evaluation's loss is worse than the one before; of several evaluation sets the first decides."""
        replay = self.spec.replay
        self.deciding = self.deciding or name
        if replay is None or name != self.deciding:
            return
        if self.previous_loss is not None and loss >= self.previous_loss + replay.tolerance:
            self.share = min(1.0, self.share + replay.increase)
        self.previous_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {"share": self.share, "previous_loss": self.previous_loss, "deciding": self.deciding}
        return {**kept, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.share, self.previous_loss, self.deciding = state["share"], state["previous_loss"], state["deciding"]
        self.buffer.clear()
        self.buffer.extend(state["buffer"])
