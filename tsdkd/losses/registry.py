"""Divergences by name: a new one is a function in `divergence.py` or elsewhere, and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from tsdkd.checks import check_choice, check_share
from tsdkd.losses.divergence import forward_kl, generalized_jsd, reverse_kl, skew_forward_kl, skew_reverse_kl
from tsdkd.types.rules import Divergence, name_of

DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "generalized_jsd": generalized_jsd,
    "reverse_kl": reverse_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def resolve_divergence(divergence: Any, **options: float) -> Divergence:
    """A divergence from its name or from a function of student and teacher logits.

    Args:
        divergence: a name in `DIVERGENCES`, or a function of two logit tensors `[tokens, vocab]`, the student's first, over
            the shared vocabulary and already divided by τ, that gives nats `[tokens]`.
        options: of the named ones, `beta` or `alpha` in [0, 1]; one that the function does not take is not read, and a
            function of your own takes none.

    Raises:
        ValueError: an unknown name (the message lists the known ones), something that is no function, or one that does not
            take two tensors.
    """
    if isinstance(divergence, Divergence):
        return divergence
    known = {function: name for name, function in DIVERGENCES.items()}
    if isinstance(divergence, FunctionType) and divergence in known:
        return _named(known[divergence], {})
    if isinstance(divergence, str):
        check_choice("divergence", divergence, DIVERGENCES)
        return _named(divergence, options)
    if not callable(divergence):
        raise ValueError(
            f"divergence={divergence!r}: a divergence is a name ({', '.join(sorted(DIVERGENCES))}) or a function of the "
            "student's and the teacher's logits, [tokens, vocab] each, that gives [tokens]."
        )
    try:
        inspect.signature(divergence).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"divergence={name_of(divergence)} cannot be called with two tensors ({error}): it takes the student's and the "
            "teacher's logits, and everything else has a default."
        ) from error
    except ValueError:
        pass  # a builtin without a signature: the two rows of check_divergence tell
    return Divergence(divergence, name_of(divergence))


def _named(name: str, options: dict[str, float]) -> Divergence:
    """A registered divergence with its option, given or its default."""
    function = DIVERGENCES[name]
    for keyword, parameter in inspect.signature(function).parameters.items():
        if keyword in ("beta", "alpha"):
            if keyword in options:
                check_share(keyword, options[keyword])
            elif parameter.default is parameter.empty:
                raise ValueError(f"divergence={name!r} has no default for {keyword}: give its function one.")
            return Divergence(function, name, keyword, float(options.get(keyword, parameter.default)))
    return Divergence(function, name)


def check_divergence(
    divergence: Divergence, vocab_size: int, device: torch.device | str = "cpu", teacher_size: int | None = None
) -> None:
    """Refuse a divergence that two rows of the shared vocabulary show to be none; `teacher_size` is the teacher's own, of one
    that reads each model's own ids.

    Raises:
        ValueError: it fails, gives another shape than `[tokens]`, or a NaN or Inf, or no gradient for the student.
    """
    what = f"divergence={divergence.name} on two rows of {vocab_size} logits"
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.arange(vocab_size, device=device, dtype=torch.float32)
        # Fixed numbers: a check draws nothing from the run's random state.
        student = torch.stack([(ids * 0.7).sin() * 2, (ids * 1.3).cos() * 3]).requires_grad_()
        if divergence.own_vocabularies and teacher_size is not None:
            ids = torch.arange(teacher_size, device=device, dtype=torch.float32)
        teacher = torch.stack([(ids * 0.9).cos() * 2, (ids * 0.4).sin() * 3])
        untouched = teacher.clone()
        try:
            value = divergence(student, teacher)
        except Exception as error:
            raise ValueError(
                f"{what} failed ({type(error).__name__}: {error}). It takes the student's and the teacher's logits, both of "
                f"shape [2, {vocab_size}] here, and gives one number a row."
            ) from error
        if not torch.equal(teacher, untouched):
            raise ValueError(f"{what} changed the teacher's logits in place, which others read after it: work on a copy.")
        if not isinstance(value, torch.Tensor) or value.shape != (2,):
            got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{what} gave {got}: a divergence gives one number a row, [2]; sum over the vocabulary (-1) alone."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what} gave {value.tolist()}: it must be finite there.")
        if not value.requires_grad:
            raise ValueError(f"{what} has no gradient: it detaches the student's logits, and nothing would be trained.")
        (gradient,) = torch.autograd.grad(value.sum(), student, allow_unused=True)
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        got = "none" if gradient is None else "a NaN or Inf"
        raise ValueError(
            f"{what} has {got} as the gradient of the student's logits: nothing sound would be trained. (where(mask, log(x), "
            "0) has one: select first, then compute.)"
        )
