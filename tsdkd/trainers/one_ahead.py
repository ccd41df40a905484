"""Rollouts one step ahead: while a step trains, an engine beside it writes the next step's completions.

    step t:  take what was written with the weights of t - 1 → give the engine the weights of t → start on t + 1 → train

What the student is trained on is exact, since both models read the completions anew; the distribution that they were drawn from
alone is that of one step before (`rollout/staleness`; `rollout/kl`, how far it is from the student's of now). The first step of
a run and of an epoch has nothing written ahead, and waits.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from tsdkd.trainers.beside import Drawn, Engine
from tsdkd.trainers.completions import Written
from tsdkd.trainers.coverage import LOG_PROB
from tsdkd.trainers.host import Host
from tsdkd.trainers.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A step's completions that were asked for.

    Attributes:
        prompts: of this process.
        step: the optimizer steps that had been made when the engine took its weights.
        future: what the first process waits for.
        written: this process's completions, where they are there already.
        failure: why they will never be.
    """

    prompts: list[list[int]]
    step: int
    future: Future[Drawn] | None = None
    written: Written | None = None
    failure: str | None = None


def _begun(call: Callable[[], Drawn]) -> Future[Drawn]:
    """A call in a thread of its own, which a process that ends does not wait for: a server may hang."""
    future: Future[Drawn] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # told where it is waited for
            future.set_exception(error)

    Thread(target=run, name="rollouts-ahead", daemon=True).start()
    return future


class RolloutsAhead:
    """Takes each step's completions from an engine that has written them during the step before.

    Args:
        host: the trainer.
        engine: what writes.
        metrics: what is logged.
    """

    def __init__(self, host: Host, engine: Engine, metrics: Metrics) -> None:
        self.host, self.engine, self.metrics = host, engine, metrics
        self.upcoming: list[dict[str, Any]] | None = None  # the next step's rows
        self._asked: _Asked | None = None
        self._taken: _Asked | None = None  # of the step in hand
        self._batches: tuple[Any, tuple[list, Any]] | None = None

    # ------------------------------------------------------------------ the next step's rows

    def batches(self, draw: Callable[..., tuple[list, Any]], batches: Iterator, count: int, device: Any) -> tuple[list, Any]:
        """A step's batches, as transformers' `get_batch_samples` (`draw`) gives them; the next step's are drawn with them."""
        held = self._batches
        found = held[1] if held is not None and held[0] is batches else draw(batches, count, device)
        after = draw(batches, count, device)
        self._batches = (batches, after) if after[0] else None
        self.upcoming = after[0][0] if after[0] else None
        return found

    # ------------------------------------------------------------------ completions

    def take(self, prompt_ids: list[list[int]]) -> Written:
        """The completions of this step's prompts, and the next step's are begun. Every process must call this.

        Raises:
            RuntimeError: on every process, where the engine failed.
        """
        host, asked = self.host, self._asked
        if host.any_process(asked is None or asked.prompts != prompt_ids):
            self.settle()
            self.engine.sync()
            asked, fresh = self._ask(prompt_ids, host.step), True
        else:
            fresh = False
        assert asked is not None
        self._asked, self._taken = None, self._finished(asked)
        written = self._taken.written
        if written is None:
            raise RuntimeError(
                f"step {host.step + 1}: the engine that writes the completions one step ahead failed ({self._taken.failure}). "
                "The step was not made: go on from the last checkpoint once the engine is there."
            )
        self.metrics.add_host("train", "rollout/staleness", host.step - asked.step)
        if self.upcoming is not None and host.step + 1 < host.max_steps:
            if not fresh:
                self.engine.sync()
            prompts: list[list[int]] | None = None
            try:
                prompts = host.tokenize(self.upcoming)
            except Exception as error:  # the next step's own checks say it, with what to do
                logger.info("nothing is written ahead: the next step's rows cannot be read (%s).", error)
            if not host.any_process(prompts is None):
                self._asked = self._ask(prompts or [], host.step + 1)
        return written

    def _ask(self, prompt_ids: list[list[int]], step: int) -> _Asked:
        """Begin the completions of a step."""
        everyones, future = gather_object(prompt_ids), None
        if self.host.accelerator.is_main_process:
            try:
                future = _begun(self.engine.request(everyones, step))
            except Exception as error:  # told where the others wait
                future = Future()
                future.set_exception(error)
        return _Asked(prompt_ids, self.host.step, future)

    def _finished(self, asked: _Asked) -> _Asked:
        """The same with this process's part of what was asked for; the first process waits, and tells the others."""
        if asked.written is not None or asked.failure is not None:
            return asked
        told: list[Any] = [None]
        if asked.future is not None:
            try:
                told = [self._checked(asked.future.result(), len(asked.prompts))]
            except BaseException as error:  # whatever it is, the others must know
                told = [f"{type(error).__name__}: {error}"]
        broadcast_object_list(told)
        (drawn,) = told
        if isinstance(drawn, str):
            return dataclasses.replace(asked, future=None, failure=drawn)
        first = self.host.accelerator.process_index * len(asked.prompts)
        own = slice(first, first + len(asked.prompts))
        written = Written(drawn.ids[own], {} if drawn.log_probs is None else {LOG_PROB: drawn.log_probs[own]})
        return dataclasses.replace(asked, future=None, written=written)

    def _checked(self, drawn: Drawn, rows: int) -> Drawn:
        """What an engine gave, if it can be trained on.

        Raises:
            ValueError: saying why not.
        """
        host, wanted = self.host, rows * self.host.accelerator.num_processes
        if not isinstance(drawn, Drawn):
            raise ValueError(f"it gave a {type(drawn).__name__}, and is to give a Drawn")
        if len(drawn.ids) != wanted:
            raise ValueError(f"it gave {len(drawn.ids)} completions for {wanted} prompts")
        for row, ids in enumerate(drawn.ids):
            if len(ids) > host.max_completion_length or (ids and not 0 <= min(ids) <= max(ids) < host.vocab_size):
                raise ValueError(
                    f"completion {row} has {len(ids)} ids up to {max(ids)}, and there may be {host.max_completion_length} "
                    f"below {host.vocab_size}"
                )
        told = drawn.log_probs
        if told is not None and [len(row) for row in told] != [len(ids) for ids in drawn.ids]:
            raise ValueError("it gave other than one log-probability a token")
        sound = told is not None and all(math.isfinite(value) for row in told for value in row)
        return drawn if sound else dataclasses.replace(drawn, log_probs=None)

    def settle(self) -> None:
        """Wait until nothing is being written: before the engine gets other work or other weights."""
        if self._asked is not None and self._asked.future is not None:
            self._asked.future.exception()

    # ------------------------------------------------------------------ going on

    def forget(self) -> None:
        """A run starts: what an earlier one began is not its own."""
        self.settle()
        self._asked = self._taken = self._batches = self.upcoming = None

    def rewind(self) -> None:
        """The step in hand is not made: its completions are the next to be taken."""
        self.settle()
        self._asked = self._taken

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: this process's completions of the next step. Every process must ask."""
        if self._asked is None:
            return None
        asked = self._asked = self._finished(self._asked)
        if asked.written is None:  # the next step says why; this one is whole
            return None
        written = asked.written
        return {"prompts": asked.prompts, "step": asked.step, "ids": written.ids, "values": written.token_values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._asked = _Asked(state["prompts"], state["step"], written=Written(state["ids"], state["values"]))
