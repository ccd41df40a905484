"""The few nouns that every layer speaks, a file each theme: tokens, rules, terms, results, rollouts."""

from __future__ import annotations

import warnings
from typing import Any

from tsdkd.types.results import LossTerms, TermResult, TokenWeights
from tsdkd.types.rollouts import ReadPlan, Replay, Rollouts, RolloutSpec
from tsdkd.types.rules import Divergence, Rule
from tsdkd.types.terms import (
    Counts,
    DivergenceTerm,
    EntropyTerm,
    Objective,
    RankingTerm,
    SampledTerm,
    Term,
)
from tsdkd.types.tokens import Head, TokenBatch, TokenStatistics, length_mask
from tsdkd.types.vocabularies import VocabularyMap

__all__ = [
    "Counts",
    "Divergence",
    "DivergenceTerm",
    "EntropyTerm",
    "Head",
    "LossTerms",
    "Objective",
    "RankingTerm",
    "ReadPlan",
    "Replay",
    "RolloutSpec",
    "Rollouts",
    "Rule",
    "SampledTerm",
    "Term",
    "TermResult",
    "TokenBatch",
    "TokenStatistics",
    "TokenWeights",
    "VocabularyMap",
    "length_mask",
]

_RENAMED = {"Answers": "RolloutSpec"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module 'tsdkd.types' has no attribute {name!r}")
    warnings.warn(
        f"tsdkd.types.{name} is now tsdkd.types.{_RENAMED[name]}; the old name goes in 0.2.", DeprecationWarning, stacklevel=2
    )
    return globals()[_RENAMED[name]]
