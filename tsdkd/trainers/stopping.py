"""A run that is asked to stop: it makes its step, saves, and ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from transformers import TrainerCallback

from tsdkd.trainers.console import stop_all

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(TrainerCallback):
    """Ends a run after the step in hand, with a checkpoint, once SIGINT or SIGTERM has come to any of its processes; a second
    signal ends the process at once.

    Args:
        trainer: whose run it is; `trainer.stopped_by` is the signal's number afterwards.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked, self.trainer.stopped_by = None, None
        self.trainer.loop.asked = lambda: self.asked or 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._come) for number in SIGNALS}

    def _come(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            stop_all()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = number
        if self.trainer.is_world_process_zero():
            name = signal.Signals(number).name
            print(f"\n{name}: the run stops after this step, with a checkpoint; once more ends it at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.loop.stop_asked and state.global_step < state.max_steps:
            self.trainer.stopped_by = self.asked or signal.SIGTERM  # another process's
            self.trainer.save_now()  # an evaluation of this step may take should_save back
            control.should_save, control.should_training_stop = False, True

    def release(self) -> None:
        """Let signals do what they did before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal after a step, and its checkpoint is written.

    Args:
        number: the signal's.
        text: what to say.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def refuse_stopped(trainer: Any) -> None:
    """Say of a run that a signal has stopped where it is gone on with.

    Raises:
        Stopped: it was.
    """
    if trainer.stopped_by is None:
        return
    state, folder = trainer.state, trainer.args.output_dir
    name = signal.Signals(trainer.stopped_by).name
    raise Stopped(
        trainer.stopped_by,
        f"{name} after step {state.global_step} of {state.max_steps}; it is saved in {folder}/checkpoint-{state.global_step}. "
        "The same command with --resume_from_checkpoint true goes on.",
    )
