"""Messages for options and tensors that do not fit: what was received, why it cannot work, what to do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r}: a share lies in [0, 1]; pass 0.1 for 10 %.")


def check_weight(name: str, value: float) -> None:
    """Refuse a negative or non-finite weight."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r}: a weight is a finite number, 0 or more; 0 switches the term off.")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r}: it must be a finite number above 0.")


def check_count(name: str, value: int, smallest: int = 1) -> None:
    """Refuse anything but a whole number from `smallest` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}={value!r}: it must be a whole number, {smallest} or more.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse an unknown name and list the known ones."""
    known = sorted(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of: {', '.join(known)}.")


def check_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Refuse student and teacher logits of different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student.shape)} but teacher_logits have {tuple(teacher.shape)}: a divergence "
            "compares the same positions over the same vocabulary. Cut both to the shared ids first "
            "(tsdkd.losses.shared_vocabulary)."
        )


def check_positions(student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
    """Refuse two `[batch, completion, size]` tensors that do not speak of the same positions on the same device."""
    for role, tensor in (("student", student), ("teacher", teacher)):
        if tensor.ndim != 3:
            raise ValueError(
                f"{role}_{what} has shape {tuple(tensor.shape)}: expected [batch, completion, size]. "
                "Add the missing dimension with unsqueeze(0)."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{role}_{what} has dtype {tensor.dtype}: expected a floating-point tensor.")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student_{what} covers [batch, completion] = {tuple(student.shape[:2])} but teacher_{what} covers "
            f"{tuple(teacher.shape[:2])}: both models must score the same tokens."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_{what} is on {student.device} but teacher_{what} is on {teacher.device}: move one of them "
            "with .to(device)."
        )


def check_mask(mask: torch.Tensor, positions: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The mask as bool; refuse one of another shape or device, or with values other than 0 and 1."""
    import torch

    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"completion_mask is a {type(mask).__name__}: pass a tensor, torch.tensor(mask).")
    if tuple(mask.shape) != tuple(positions):
        raise ValueError(
            f"completion_mask has shape {tuple(mask.shape)} but the scored tokens have {tuple(positions)}: pass one value "
            "per completion token, without the prompt."
        )
    if mask.device != device:
        raise ValueError(f"completion_mask is on {mask.device} but the scored tokens are on {device}: move it there.")
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        strange = mask[(mask != 0) & (mask != 1)].flatten()[0].item()
        raise ValueError(f"completion_mask holds the value {strange}: a mask is bool, or 1 (a trained token) and 0.")
    return mask.bool()


def check_candidates(num_candidates: int, vocab_size: int) -> None:
    """Refuse more candidates than the vocabulary has."""
    check_count("num_candidates", num_candidates, smallest=2)
    if num_candidates > vocab_size:
        raise ValueError(
            f"num_candidates={num_candidates} but the shared vocabulary has {vocab_size} tokens: the student cannot propose "
            f"more candidates than there are; pass {vocab_size} or fewer (the paper: 10)."
        )


def check_finite(name: str, hidden: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse a NaN or Inf at a trained token of `[batch, completion, hidden]`, and name the first such token."""
    import torch

    broken = ~torch.isfinite(hidden.detach()).all(-1) & mask
    if bool(broken.any()):
        row, position = (int(i) for i in broken.nonzero()[0])
        raise ValueError(
            f"{name} holds a NaN or Inf at a trained token (completion {row}, token {position}; {int(broken.sum())} tokens "
            "in all): the model's weights are damaged or its dtype overflows. Check the checkpoint, or run it in bfloat16 or "
            "float32."
        )


def unwritable(path: Path, is_folder: bool = False) -> str | None:
    """Why a file (or a folder) cannot be written, or None; nothing is made."""
    if path.exists() and path.is_dir() != is_folder:
        return f"there is a {'file' if is_folder else 'folder'} of that name"
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there != path and not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK) else f"{there} is not writable"


def check_writable(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written; None is none."""
    why = None if path is None else unwritable(path)
    if why is not None:
        raise ValueError(f"--{flag} {path} cannot be written: {why}. Name another file.")


@dataclass(frozen=True)
class Problem:
    """Something that cannot be run, before anything is loaded.

    Args:
        what: what was received.
        why: why it cannot work, where that is not plain.
        do: what to do.
    """

    what: str
    why: str = ""
    do: str = ""

    def __str__(self) -> str:
        if not self.why:
            return f"{self.what}: {self.do}." if self.do else f"{self.what}."
        return f"{self.what}: {self.why}." + (f" {self.do[0].upper()}{self.do[1:]}." if self.do else "")


def refuse(problems: Iterable[Problem]) -> None:
    """Raise the first of some problems.

    Raises:
        ValueError: its text.
    """
    for problem in problems:
        raise ValueError(str(problem))
