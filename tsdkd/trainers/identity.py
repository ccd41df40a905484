"""What a run must have in common with the checkpoint that it goes on with, and what it may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tsdkd.provenance import redacted
from tsdkd.teachers.swap import SwapTeacher
from tsdkd.trainers.host import batch_rows

# What a run that goes on may change, and is told of.
CHANGES = (
    "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "disable_dropout",
    "model_init_kwargs", "vllm_request_seeds", "rollouts_ahead", "padding_free",
    "processes",
)  # fmt: skip
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "max_completion_length", "max_length",
    "chat_template_kwargs", "shuffle_dataset",
)  # fmt: skip
_TEACHER_READS = ("teacher_prompt_template", "teacher_chat_template_kwargs")
_LOOKED_AT = 2000  # rows of a data set, at least, that tell it from another


def identity(trainer: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its run: `same`, which a run that goes on shares, and `listed`, which it may change."""
    args, method = trainer.args, trainer.method
    options = qualified(method)
    sampling = {name: getattr(args, name, None) for name in _SAMPLING}
    if args.prefix_rollouts is not None:  # checkpoints from before there was such an option do not name it
        sampling["prefix_rollouts"] = args.prefix_rollouts
    data = None if trainer.train_dataset is None else digest_of_rows(trainer.train_dataset)
    corpus = trainer.setup.pretraining_dataset if method.pretraining_weight else None
    student = trainer.accelerator.unwrap_model(trainer.model)
    same = {
        "method": method.name,
        "method's options": options,
        "student": shape_of(student),
        "adapter": _adapter_of(student),
        "teacher": _teacher_of(trainer),
        "prompts": data,
        "corpus": None if corpus is None else digest_of_rows(corpus),
        "seed": args.seed,
        "prompts a step": batch_rows(args) * trainer.accelerator.num_processes,
        "sampling": sampling,
        "ignored tokens": args.ignore_tokens,
        "teacher's prompts": {name: getattr(args, name, None) for name in _TEACHER_READS},
        "optimizer": str(getattr(args.optim, "value", args.optim)),
    }
    listed = {name: getattr(args, name, None) for name in CHANGES if name != "processes"}
    listed["processes"] = trainer.accelerator.num_processes
    return json.loads(json.dumps(redacted({"same": same, "listed": listed}), default=_stable))


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


def _adapter_of(student: Any) -> Any:
    """A student's adapters and a digest of the weights under them, which no checkpoint holds; None of a whole model."""
    found = getattr(student, "peft_config", None)
    if not isinstance(found, dict):
        return None
    left = ("inference_mode", "base_model_name_or_path", "revision", "peft_version")
    plain = {
        name: {key: qualified(value) for key, value in sorted(vars(config).items()) if key not in left and value is not None}
        for name, config in found.items()
    }
    return {"under": digest_of_weights(student, trained=False), **json.loads(json.dumps(plain, default=_stable))}


def digest_of_weights(model: Any, trained: bool | None = None) -> str:
    """A digest of some weights of every parameter, of those that are trained or not, or of all."""
    made = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if trained is not None and parameter.requires_grad != trained:
            continue
        share = getattr(parameter, "ds_tensor", parameter).detach().flatten()
        some = share[:: max(1, share.numel() // 32)][:32].float().cpu().clone()  # numpy would hold the weights' own memory
        made.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return made.hexdigest()[:16]


def _stable(value: Any) -> str:
    """What JSON cannot hold, as a text that two processes agree on."""
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(str, value)))
    if hasattr(value, "tobytes"):  # an image, an array
        return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def _teacher_of(trainer: Any) -> str:
    if trainer.setup.several:
        teachers = trainer.teacher.teachers
        named = {name: _shown(one.model, teachers[name]) for name, one in trainer.setup.several.items()}
        weights = {"weights": trainer.args.teacher_weights} if trainer.args.teacher_weights else {}
        return json.dumps({**named, **weights})
    if trainer.teacher_model is not None and trainer.args.teacher_placement in ("local", "swap"):
        return _shown(trainer.teacher_model, trainer.teacher)
    decay = f", {trainer.args.ema_decay}" if trainer.setup.teaches_itself and trainer.args.self_teacher == "ema" else ""
    return f"{trainer.loop.names['teacher']}{decay}" if trainer.teacher is not None else "none"


def _shown(model: Any, teacher: Any) -> str:
    """A teacher's name, or what its model is; one that is swapped is asked while it is there."""
    if isinstance(model, str):
        return model
    with teacher.up() if isinstance(teacher, SwapTeacher) else nullcontext():
        return f"{shape_of(model)}, {digest_of_weights(model)}"


def digest_of_rows(rows: Any) -> str:
    """A data set's number of rows and a digest of some thousand of them, from all over it; of a stream its kind alone."""
    if not hasattr(rows, "__len__"):
        return "a stream"
    made = hashlib.sha256()
    for number in range(0, len(rows), max(1, len(rows) // _LOOKED_AT)):
        made.update(json.dumps(rows[number], sort_keys=True, default=_stable).encode())
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
    plateau, names = "reduce_lr_on_plateau", [str(each.get("lr_scheduler_type")) for each in (before, after)]
    if before and names[0] != names[1] and any(plateau in name for name in names):
        raise ValueError(
            f"the checkpoint {checkpoint} was made with lr_scheduler_type={names[0]}, here {names[1]}: {plateau} keeps a state "
            "that no other schedule has. Go on with the one that it was made with."
        )
    return [f"{name} {before[name]} → {after[name]}" for name in after if before.get(name) != after[name] and name in before]


def _short(value: Any) -> str:
    text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) < 200 else f"{text[:200]}…"
