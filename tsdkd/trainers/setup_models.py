"""What of a run's models, of their places and of its options keeps it from being trained."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tsdkd.checks import Problem, unwritable
from tsdkd.teachers.sources import adapter_config
from tsdkd.trainers.setup import Setup


def teacher_is_there(setup: Setup) -> Iterator[Problem]:
    """A teacher where one is read, and not the student itself."""
    if setup.teacher is None and setup.recording is None and setup.method.reads_teacher:
        yield Problem(
            "no teacher was given",
            do="pass teacher_model=... (a name, a path or a model), or set teacher_model_name_or_path",
        )
    if setup.teacher is setup.student and setup.student is not None and not isinstance(setup.student, str):
        yield Problem(
            "the same object was passed as model and as teacher_model",
            "its loss is always zero and training it would move the teacher too",
            "load the teacher separately",
        )


def _learns_a_prompt(kind: Any) -> bool:
    """Whether an adapter of this kind puts tokens or states in front, which a model read without its wrapper does not have."""
    name = str(getattr(kind, "value", kind) or "").upper()
    return any(part in name for part in ("PROMPT", "PREFIX", "P_TUNING", "CPT"))


def _of_model(setup: Setup, role: str, model: Any) -> Iterator[Problem]:
    do = f"pass a causal language model as the {role} (AutoModelForCausalLM)"
    try:
        config = setup.student_config if role == "student" else setup.teacher_config
    except ValueError as error:
        yield Problem(str(error), do="pass a folder with a model, or a model's name")
        return
    kind = config.model_type if isinstance(model, str) else type(model).__name__
    if config is None:
        yield Problem(f"the {role} is a {kind}, which has no config", do=do)
    elif getattr(config, "is_encoder_decoder", False):
        yield Problem(f"the {role} is an encoder-decoder ({kind})", "two halves of it read prompt and completion", do)
    elif isinstance(model, str) and _learns_a_prompt((adapter_config(model) or {}).get("peft_type")):
        yield Problem(f"the {role} {model} is a learnt prompt or prefix", "its virtual tokens would not be read", do)
    elif not isinstance(model, str) and any(
        _learns_a_prompt(getattr(part, "peft_type", None)) for part in (getattr(model, "peft_config", None) or {}).values()
    ):
        yield Problem(f"the {role} has a learnt prompt or prefix ({kind})", "its virtual tokens would not be read", do)
    elif not isinstance(model, str):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            yield Problem(f"the {role} is a {kind} without a language-model head", "it gives no logits", do)
        elif hasattr(head, "base_layer"):
            yield Problem(
                f"the {role} has an adapter on its head ({kind})",
                "the losses read the head's own weight, so the adapter would be left out",
                "leave lm_head out of its target_modules, or merge it first",
            )


def models_write_text(setup: Setup) -> Iterator[Problem]:
    """Causal language models, whole or as adapters where those can be placed."""
    for role, model in (("student", setup.student), ("teacher", setup.teacher)):
        if model is not None and not (role == "teacher" and setup.teaches_itself):
            yield from _of_model(setup, role, model)
    if isinstance(setup.teacher, str) and not setup.teaches_itself:
        args = setup.args
        elsewhere = args.teacher_placement in ("server", "zero3") or args.teacher_answers_engine == "vllm"
        if elsewhere and adapter_config(setup.teacher, args.teacher_model_revision) is not None:
            yield Problem(
                f"the teacher {setup.teacher} is an adapter, which is read whole in this process only",
                do="merge it into its base (PeftModel.merge_and_unload) and pass the folder of the result, or use "
                "teacher_placement=local",
            )


# Options that transformers or TRL take and that nothing here reads: their name, what they hold when they are left alone, why.
_UNREAD = {
    "label_smoothing_factor": (0.0, "a distillation loss has no labels to smooth"),
    "auto_find_batch_size": (False, "a batch that is cut after a lack of memory would draw prompts twice, and others never"),
    "data_seed": (None, "the order of the prompts follows seed"),
    "train_sampling_strategy": ("random", "TRL draws generation batches, and a step's rows are sorted by length already"),
}
# Options that are read with vLLM only.
_VLLM = (
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_tensor_parallel_size",
    "vllm_max_model_length",
)


def options_have_effect(setup: Setup) -> Iterator[Problem]:
    """Nothing that was asked for is left out without a word."""
    args = setup.args
    for name, (unset, why) in _UNREAD.items():
        value = getattr(args, name, unset)
        if value != unset:
            yield Problem(f"{name}={value!r} has no effect here", why, "leave it out")
    if not args.use_vllm:
        defaults = {field.name: field.default for field in dataclasses.fields(args)}
        for name in (name for name in _VLLM if name in defaults):
            if getattr(args, name) != defaults[name]:
                yield Problem(f"{name}={getattr(args, name)!r} has no effect without vLLM", do="set use_vllm, or leave it out")
    if args.fp16 and not torch.cuda.is_available():
        yield Problem("fp16 was asked for on a CPU, which trains in bf16 or float32", do="leave it out, or set bf16")
    named = isinstance(setup.teacher, str) and not setup.teaches_itself
    if args.teacher_model_init_kwargs and not named:
        given = "no teacher was given" if setup.teacher is None else "the teacher is loaded already"
        yield Problem(f"teacher_model_init_kwargs were given, and {given}", do="leave them out, or pass the teacher's name")
    if args.teacher_model_revision is not None:
        is_folder = named and Path(setup.teacher).expanduser().is_dir()
        if setup.teacher is None or is_folder:
            why = "the teacher is a folder, which has none" if is_folder else "no teacher was given"
            yield Problem(f"teacher_model_revision={args.teacher_model_revision!r} was given, and {why}", do="leave it out")
    if args.teacher_batch_tokens and (setup.recording is not None or args.teacher_placement == "server"):
        what = "a recorded teacher reads nothing" if setup.recording is not None else "servers fill their passes by themselves"
        yield Problem(f"teacher_batch_tokens={args.teacher_batch_tokens} has no effect", what, "leave it out")
    if args.any_recording and setup.recording is None:
        yield Problem("any_recording was set, and no recording was given", do="leave it out, or pass recording=FOLDER")


# What generation_kwargs may not say, since it is said elsewhere or would change what a completion is.
_SAID_ELSEWHERE = {
    "max_new_tokens": "set max_completion_length",
    "max_tokens": "set max_completion_length",
    "max_length": "set max_completion_length",
    "eos_token_id": "set the student's generation_config.eos_token_id, which every path reads",
    "pad_token_id": "set the tokenizer's pad_token",
    "num_return_sequences": "a prompt gets one completion a step: repeat the row",
    "n": "a prompt gets one completion a step: repeat the row",
    "stop_strings": "name an end token (generation_config.eos_token_id)",
    "temperature": "set temperature",
    "top_p": "set top_p",
    "top_k": "set top_k",
}


def sampling_is_possible(setup: Setup) -> Iterator[Problem]:
    """Options of generation that there are, and that say what nothing else does."""
    args = setup.args
    given = dict(args.generation_kwargs or {})
    for name in given:
        if name in _SAID_ELSEWHERE:
            yield Problem(f"generation_kwargs has {name}", "it would be overruled or misread", _SAID_ELSEWHERE[name])
    if not args.use_vllm:
        known = vars(GenerationConfig())
        for name in given:
            if name not in known and name not in _SAID_ELSEWHERE:
                near = difflib.get_close_matches(name, known, n=1)
                yield Problem(
                    f"generation_kwargs has {name}, and transformers' GenerationConfig has not",
                    do=f"leave it out{f', or did you mean {near[0]}?' if near else ''}",
                )
        if args.temperature == 0 and setup.recording is None and setup.rollouts.writer == "student":
            yield Problem("temperature=0", "transformers samples, which takes one above 0", "pass e.g. 0.01, or use_vllm")


def outputs_can_be_written(setup: Setup) -> Iterator[Problem]:
    """Folders and files of the run, before its first step."""
    args = setup.args
    outputs = {"output_dir": (args.output_dir, True)}
    if args.teacher_answers is not None and setup.rollouts.need_dataset:
        outputs["teacher_answers"] = (args.teacher_answers, False)
    for name, (path, is_folder) in outputs.items():
        why = unwritable(Path(path), is_folder)
        if why is not None:
            yield Problem(f"{name}={path} cannot be written", why, "name another")
