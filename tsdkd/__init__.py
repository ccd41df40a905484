"""On-policy, token-level distillation of language models: TSD-KD as losses and as TRL trainers.

Every public name is resolved on first use, so `import tsdkd` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AdaptiveOpener": "tsdkd.selection",
    "Counts": "tsdkd.types",
    "Head": "tsdkd.types",
    "LossTerms": "tsdkd.types",
    "TSDKD": "tsdkd.methods",
    "TSDKDConfig": "tsdkd.trainers",
    "TSDKDTrainer": "tsdkd.trainers",
    "TokenBatch": "tsdkd.types",
    "TokenDistillConfig": "tsdkd.trainers",
    "TokenDistillTrainer": "tsdkd.trainers",
    "TokenStatistics": "tsdkd.types",
    "fused_tsd_kd_loss": "tsdkd.methods",
    "inspect_completion": "tsdkd.inspection",
    "tsd_kd_loss": "tsdkd.methods",
}

_MODULES = ("losses", "selection", "fused", "methods")

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from tsdkd.inspection import inspect_completion as inspect_completion
    from tsdkd.methods import TSDKD as TSDKD
    from tsdkd.methods import fused_tsd_kd_loss as fused_tsd_kd_loss
    from tsdkd.methods import tsd_kd_loss as tsd_kd_loss
    from tsdkd.selection import AdaptiveOpener as AdaptiveOpener
    from tsdkd.trainers import TokenDistillConfig as TokenDistillConfig
    from tsdkd.trainers import TokenDistillTrainer as TokenDistillTrainer
    from tsdkd.trainers import TSDKDConfig as TSDKDConfig
    from tsdkd.trainers import TSDKDTrainer as TSDKDTrainer
    from tsdkd.types import Counts as Counts
    from tsdkd.types import Head as Head
    from tsdkd.types import LossTerms as LossTerms
    from tsdkd.types import TokenBatch as TokenBatch
    from tsdkd.types import TokenStatistics as TokenStatistics


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tsdkd.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'tsdkd' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
