"""The help of `tsdkd train`: the options that people need first, then this library's own in groups; the rest on request."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from tsdkd.cli.options import ALIASES, fields_of

FIRST = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "output_dir",
    "method",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "max_completion_length",
    "use_vllm",
)
# What inherited texts say that is not so here, and what texts of other libraries leave out.
_SAYS = {
    "model_name_or_path": "The student: a folder, an adapter's folder, or a name on the Hub.",
    "teacher_model_name_or_path": "The teacher: likewise.",
    "output_dir": "Where the student, its checkpoints and the record of the run go; default: STUDENT-METHOD.",
    "max_steps": "Optimizer steps; -1: num_train_epochs epochs.",
    "per_device_train_batch_size": "Prompts of a forward pass on each device.",
    "use_vllm": "Rollouts by vLLM.",
    "temperature": "Temperature of sampling; the loss has kd_temperature.",
    "bf16": "Mixed precision in bfloat16; default: on an accelerator that has it.",
    "lmbda": "Probability of the student's completions in a step, else the data set's.",
}
_GROUPS = {
    "Data": ("dataset_", "eval_dataset", "prompt_", "completion_column", "drop_", "pretraining_dataset", "max_length"),
    "Sampling": ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs"),
    "Teacher": ("teacher_", "recording", "any_recording", "record", "token_aliases"),
    "Scores while training": ("eval_tasks", "eval_every", "eval_best", "eval_include_path", "eval_chat", "eval_limit"),
    "The run": (
        *("resume_from_checkpoint", "overwrite_output_dir", "dry_run", "token_budget", "seed", "save_steps", "logging_steps"),
        *("bf16", "use_peft", "lora_r", "dtype", "gradient_accumulation_steps", "num_train_epochs"),
    ),
    "The loss": ("fused_impl", "gradient_filter", "router_loss_weight", "term_grad_norm_steps"),
}


def _line(field: dataclasses.Field, default: Any = None) -> str:
    flag = next((short for short, long in ALIASES.items() if long == field.name), field.name)
    text = str(_SAYS.get(field.name) or field.metadata.get("help") or "")
    shown = field.default if default is None else default
    if shown not in (None, dataclasses.MISSING, "") and "default" not in text:
        text = f"{text.rstrip('.')} (default: {shown})."
    body = textwrap.wrap(" ".join(text.split()), 92)
    return f"  --{flag:<30}" + f"\n{'':<34}".join(body)


def short_help(classes: tuple[type, ...], method: str) -> str:
    """The first ten options, this library's own, and the method's."""
    from tsdkd.methods import METHODS

    fields = {name: field for cls in classes for name, field in fields_of(cls).items()}
    parts = [
        "usage: tsdkd train --student S --teacher T --dataset_name D [--config RECIPE.yaml …] [options]\n\nA YAML recipe and "
        "flags to a trained student: of several recipes a later one's options stand, and flags over all.\n\nFirst:",
        *(_line(fields[name]) for name in FIRST),
    ]
    shown = set(FIRST)
    options = fields_of(METHODS[method])
    from tsdkd.cli.methods import meanings

    said = meanings(METHODS[method])
    parts.append(f"\nOptions of {method} (tsdkd methods lists every method's; --METHOD.NAME where a name is taken):")
    for name, option in options.items():
        text = " ".join(textwrap.wrap(f"{said.get(name, '')} (default: {option.default}).".replace(".. ", ". "), 10_000))
        flag = name if name not in fields or method == "tsd_kd" else f"{method}.{name}"
        parts.append(f"  --{flag:<30}" + f"\n{'':<34}".join(textwrap.wrap(text, 92)))
    shown |= set(options)
    for title, starts in _GROUPS.items():
        names = [name for name in fields if name not in shown and any(name == s or name.startswith(s) for s in starts)]
        parts += [f"\n{title}:", *(_line(fields[name]) for name in names)]
        shown |= set(names)
    parts.append("\ntsdkd train --help_all lists the other options, transformers' and TRL's.")
    return "\n".join(parts) + "\n"
