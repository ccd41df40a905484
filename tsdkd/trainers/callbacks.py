"""What watches a run from outside of its steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class TokenBudget(TrainerCallback):
    """Ends a run that has spent its `token_budget`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.trained_tokens >= args.token_budget:
            control.should_training_stop = True
