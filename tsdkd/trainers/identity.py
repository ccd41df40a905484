"""What a run must have in common with the checkpoint that it goes on with, and what it may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdkd.trainers.host import batch_rows
from tsdkd.trainers.models import fingerprint_of

# What a run that goes on may change, and is told of.
CHANGES = (
    "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim", "processes",
)  # fmt: skip
_LOOKED_AT = 2000  # rows of a data set that tell it from another


def identity(trainer: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its run: `same`, which a run that goes on shares, and `listed`, which it may change."""
    args, method = trainer.args, trainer.method
    options = qualified(method)
    rollouts = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "max_completion_length", "max_length")}
    data = None if trainer.train_dataset is None else digest_of_rows(trainer.train_dataset)
    same = {
        "method": method.name,
        "method's options": options,
        "student": shape_of(trainer.accelerator.unwrap_model(trainer.model)),
        "teacher": _teacher_of(trainer),
        "prompts": data,
        "seed": args.seed,
        "prompts a step": batch_rows(args) * trainer.accelerator.num_processes,
        "sampling": rollouts,
    }
    listed = {name: getattr(args, name, None) for name in CHANGES if name != "processes"}
    listed["processes"] = trainer.accelerator.num_processes
    plain = json.loads(json.dumps({"same": same, "listed": listed}, default=str))
    return plain


def qualified(value: Any) -> Any:
    """A method's options, or one of them, as text tells them apart: a callable by its qualified name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: qualified(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [qualified(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): qualified(part) for name, part in value.items()}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def shape_of(model: Any) -> str:
    """A model's kind, its vocabulary and how many parameters it has."""
    config = model.config.get_text_config()
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return f"{config.model_type}, {getattr(config, 'vocab_size', '?')} ids, {count:,} parameters"


def _teacher_of(trainer: Any) -> str:
    if trainer.teacher_model is not None and trainer.args.teacher_placement == "local":
        return f"{shape_of(trainer.teacher_model)}, {fingerprint_of(trainer.teacher_model)}"
    return trainer.loop.names["teacher"] if trainer.teacher is not None else "none"


def digest_of_rows(rows: Any) -> str:
    """A data set's number of rows and a digest of the first; of a stream its kind alone."""
    if not hasattr(rows, "__len__"):
        return "a stream"
    made = hashlib.sha256()
    for start in range(0, min(len(rows), _LOOKED_AT), 200):
        made.update(json.dumps(rows[start : start + 200], sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, {made.hexdigest()[:16]}"


def refuse_another_run(checkpoint: Path, written: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run changes of the one that it goes on with.

    Raises:
        ValueError: it is another run: what differs, both values.
    """
    same, ours = written.get("same") or {}, now["same"]
    differing = [name for name in ours if same.get(name, ours[name]) != ours[name]]
    if differing:
        told = "; ".join(f"{name} {_short(same[name])}, here {_short(ours[name])}" for name in differing)
        raise ValueError(
            f"the checkpoint {checkpoint} is of another run: {told}. Go on with what it was made with, or start a run in "
            "another output_dir."
        )
    before, after = written.get("listed") or {}, now["listed"]
    return [f"{name} {before[name]} → {after[name]}" for name in after if before.get(name) != after[name] and name in before]


def _short(value: Any) -> str:
    text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) < 200 else f"{text[:200]}…"
