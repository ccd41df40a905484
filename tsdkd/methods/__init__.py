"""The methods, one paper per file; `README.md` beside them is the paper index and the list of deviations."""

from __future__ import annotations

import dataclasses
from typing import Any

from tsdkd.checks import check_choice
from tsdkd.methods.akl import AKL
from tsdkd.methods.base import DivergenceMethod, Method, State, Summary
from tsdkd.methods.distillm import DistiLLM
from tsdkd.methods.gkd import GKD
from tsdkd.methods.gold import GOLD
from tsdkd.methods.minillm import MiniLLM
from tsdkd.methods.seq_kd import SeqKD
from tsdkd.methods.speculative_kd import SpeculativeKD
from tsdkd.methods.supervised_kd import SupervisedKD
from tsdkd.methods.taid import TAID
from tsdkd.methods.tsd_kd import TSDKD, fused_tsd_kd_loss, tsd_kd_loss
from tsdkd.methods.uld import ULD

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (TSDKD, GKD, DistiLLM, MiniLLM, SpeculativeKD, SupervisedKD, SeqKD, AKL, TAID, ULD, GOLD)
}


def resolve_method(method: str | Method, options: dict[str, Any] | None = None) -> Method:
    """A method from its name and options, or the user's own object as it is.

    Raises:
        ValueError: an unknown name or option, options beside an object, or an object that is no `Method`.
    """
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        known = [field.name for field in dataclasses.fields(METHODS[method])]  # type: ignore[arg-type]
        for option in options or {}:
            if option not in known:
                raise ValueError(f"method {method!r} has no option {option!r}; it has: {', '.join(known)}.")
        return METHODS[method](**(options or {}))
    if options:
        raise ValueError("method_options were given beside a method object: set them on the object.")
    if isinstance(method, type):
        raise ValueError(f"method={method.__name__} is a class: pass an object of it, {method.__name__}(…).")
    if isinstance(method, Method) and not method.name:
        raise ValueError(
            f"the method {type(method).__name__} has no name: set one on its class (name = 'mine'); checkpoints and the "
            "model card are known by it."
        )
    if not isinstance(method, Method):
        raise ValueError(
            f"method={type(method).__name__} is no tsdkd.methods.Method: make its class a subclass of it (or of "
            "DivergenceMethod) with an objective() of its own; everything else has a default."
        )
    return method


__all__ = [
    "AKL",
    "GKD",
    "GOLD",
    "METHODS",
    "TAID",
    "TSDKD",
    "ULD",
    "DistiLLM",
    "DivergenceMethod",
    "Method",
    "MiniLLM",
    "SeqKD",
    "SpeculativeKD",
    "State",
    "Summary",
    "SupervisedKD",
    "fused_tsd_kd_loss",
    "resolve_method",
    "tsd_kd_loss",
]
