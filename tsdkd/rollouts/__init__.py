"""Who writes the completions that a step trains on: which source is drawn, and the writers beside the student itself."""

from __future__ import annotations

import warnings
from typing import Any

from tsdkd.rollouts.as_asked import as_asked, leftovers
from tsdkd.rollouts.by_vllm import VLLMWriter
from tsdkd.rollouts.interleaved import InterleavedWriter, mixed, speculative
from tsdkd.rollouts.sources import RolloutSource
from tsdkd.rollouts.written_once import write_once

__all__ = ["InterleavedWriter", "RolloutSource", "VLLMWriter", "as_asked", "leftovers", "mixed", "speculative", "write_once"]


def __getattr__(name: str) -> Any:
    if name != "AnswerSource":
        raise AttributeError(f"module 'tsdkd.rollouts' has no attribute {name!r}")
    warnings.warn(
        "tsdkd.rollouts.AnswerSource is now tsdkd.rollouts.RolloutSource; the old name goes in 0.2.",
        DeprecationWarning,
        stacklevel=2,
    )
    return RolloutSource
