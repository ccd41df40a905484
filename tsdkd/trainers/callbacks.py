"""What watches a run from outside of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tsdkd.trainers.console import ConsoleLog
from tsdkd.trainers.health import watch
from tsdkd.trainers.samples import Trace, trace_steps
from tsdkd.trainers.stopping import Stop


class TokenBudget(TrainerCallback):
    """Ends a run that has spent its `token_budget`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.trained_tokens >= args.token_budget:
            control.should_training_stop = True


def callbacks_of(trainer: Any) -> list[TrainerCallback]:
    """Those that a trainer's options ask for."""
    args = trainer.args
    made: list[TrainerCallback] = [*ConsoleLog.of(trainer), watch(trainer)]
    if args.token_budget is not None:
        made.append(TokenBudget(trainer))
    if args.stop_on_signals:
        made.append(Stop(trainer))
    if args.trace_steps:
        made.append(Trace(trace_steps(args.trace_steps), lambda: Path(args.output_dir)))
    return made
