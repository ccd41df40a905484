"""Seeds for what vLLM writes: of the run's seed, the step and the row, so that a run draws the same twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def seed_of(seed: int, *place: int | str) -> int:
    """A seed below 2³¹ for one place of a run.

    Example:
        >>> seed_of(0, "train", 3, 0) == seed_of(0, "train", 3, 0), seed_of(0, "train", 3, 0) == seed_of(0, "train", 3, 1)
        (True, False)
    """
    return random.Random("/".join(map(str, (seed, *place)))).getrandbits(31)


class RequestSeeds:
    """Gives vLLM's requests seeds while `during` lasts. Colocated, each request has its own. A server takes one a call, and the
    rows of a call then share their noise, so it gets one only where `generation_kwargs` names a `seed`: another at each call.

    Args:
        vllm: TRL's `vllm_generation`.
        seed: of the run; a `seed` in its `generation_kwargs` goes before it.
        process: the number of this process; those that write with one engine share its seeds.
        on: False leaves vLLM's own random state to a colocated engine.
    """

    def __init__(self, vllm: Any, seed: int, process: int, on: bool) -> None:
        self.vllm, self.on = vllm, on
        given = (vllm.generation_kwargs or {}).get("seed")
        self.served, self.asked = vllm.mode == "server", given is not None
        self.seed = seed if given is None else int(given)
        self.group = 0 if self.served else process // vllm.tensor_parallel_size
        self.last = -1  # of the last call to a server
        self._moment: tuple[str, int] | None = None
        self._calls = 0

    @contextmanager
    def during(self, mode: str, step: int) -> Iterator[None]:
        """One call of a step, the first or a later one."""
        self._calls = self._calls + 1 if self._moment == (mode, step) else 0
        self._moment = (mode, step)
        place = (mode, step, self._calls, self.group)
        if self.served:
            if self.asked:
                self.last = seed_of(self.seed, *place)
                self.vllm.generation_kwargs = {**self.vllm.generation_kwargs, "seed": self.last}
            yield
            return
        if not self.on:
            yield
            return
        engine, generate = self.vllm.llm, self.vllm.llm.generate

        def seeded(prompts: list, sampling_params: Any, **kwargs: Any) -> Any:
            each = [sampling_params.clone() for _ in prompts]
            for row, params in enumerate(each):
                params.seed = seed_of(self.seed, *place, row)
            return generate(prompts, sampling_params=each, **kwargs)

        engine.generate = seeded
        try:
            yield
        finally:
            del engine.generate  # the class's own again
