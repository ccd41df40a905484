"""Rollouts cut to a prefix for a part of the training: first a completion's first tokens, whole ones later or now and then."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from tsdkd.checks import check_count, check_share


@dataclass(frozen=True)
class PrefixRollouts:
    """How long the completions of a step may be.

    Most of what a student learns of a teacher it learns from a completion's first tokens (prefix distillation, arXiv
    2602.15260), and what is not written costs nothing. A cut completion is trained on as it is: it has no end.

    Args:
        tokens: of a completion that is cut.
        until: the share of the training's steps in which they are.
        whole: of those, the share that writes whole ones all the same, by a draw that depends on seed and step alone.

    Raises:
        ValueError: a number outside its range.
    """

    tokens: int
    until: float = 1.0
    whole: float = 0.0

    def __post_init__(self) -> None:
        check_count("tokens of prefix_rollouts", self.tokens)
        check_share("until of prefix_rollouts", self.until)
        check_share("whole of prefix_rollouts", self.whole)

    @classmethod
    def of(cls, options: Any) -> PrefixRollouts | None:
        """From a mapping of its options, or None for none.

        Raises:
            ValueError: something else, or an option that there is not.
        """
        if options is None or isinstance(options, cls):
            return options
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(options, dict) or "tokens" not in options or set(options) - set(names):
            raise ValueError(
                f"prefix_rollouts={options!r} must be a mapping of {', '.join(names)}, e.g. {{'tokens': 64, 'until': 0.5}}."
            )
        return cls(**options)

    def longest(self, step: int, steps: int, seed: int) -> int | None:
        """Of the step after so many of so many steps, what its completions are cut to; None: not at all."""
        if step >= self.until * steps:
            return None
        return None if random.Random(f"{seed} {step}").random() < self.whole else self.tokens
