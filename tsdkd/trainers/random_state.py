"""The random states of a process: Python's, numpy's, torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Every state of now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": np.random.get_state()}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def to_json(state: dict[str, Any]) -> dict[str, Any]:
    """What `random_state` gave, as JSON holds it: no pickle is written."""
    numbers = lambda tensor: tensor.tolist()  # noqa: E731
    name, keys, *rest = state["numpy"]
    return {
        "torch": numbers(state["torch"]),
        "cuda": None if state["cuda"] is None else [numbers(part) for part in state["cuda"]],
        "python": state["python"],
        "numpy": [name, keys.tolist(), *rest],
    }


def from_json(state: dict[str, Any]) -> dict[str, Any]:
    """What `to_json` was given."""
    name, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    return {
        "torch": torch.tensor(state["torch"], dtype=torch.uint8),
        "cuda": None if state["cuda"] is None else [torch.tensor(part, dtype=torch.uint8) for part in state["cuda"]],
        "python": (version, tuple(internal), gauss),
        "numpy": (name, np.array(keys, dtype=np.uint32), *rest),
    }


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, numpy's and torch's random states are afterwards what they were before."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
