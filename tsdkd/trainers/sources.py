"""From names to models and tokenizers: the student's and the teacher's, in every placement."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationMixin
from trl.trainer.utils import create_model_from_path

from tsdkd.teachers.sources import (
    adapter_config,
    base_of,
    damaged_file,
    dtype_of,
    expanded,
    lacks_tokenizer,
    loading_options,
    unreadable,
)
from tsdkd.teachers.zero3 import zero3_config
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.loading import loading_under, restore_buffers

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------- options


def _options(role: str, args: TokenDistillConfig) -> dict[str, Any]:
    """What `from_pretrained` is told: of a student float32 as TRL does, of a teacher its checkpoint's dtype, unless named."""
    if role == "student":
        kwargs = loading_options(args.model_init_kwargs, "model_init_kwargs", torch.float32)
    else:
        kwargs = loading_options(args.teacher_model_init_kwargs, "teacher_model_init_kwargs", "auto")
        if args.teacher_model_revision is not None:
            kwargs.setdefault("revision", args.teacher_model_revision)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of a model's arguments says which checkpoint is read, for its configuration and its tokenizer."""
    return {key: kwargs[key] for key in ("revision", "trust_remote_code", "subfolder") if key in kwargs}


def _placed(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Where the weights are, what says which of them, and the configuration of an adapter on them."""
    path = expanded(name)
    adapter = adapter_config(path, kwargs.get("revision"))
    if adapter is None:
        return path, _where(kwargs), None
    revision = {"revision": adapter["revision"]} if adapter.get("revision") else {}
    return expanded(base_of(path, adapter)), {"trust_remote_code": kwargs["trust_remote_code"], **revision}, adapter


def config_of(name: str, role: str, args: TokenDistillConfig) -> Any:
    """The configuration of a model that is not loaded yet; of an adapter its base's.

    Raises:
        ValueError: nothing can be read by that name, or an adapter's base cannot be found.
    """
    base, where, adapter = _placed(name, _options(role, args))
    try:
        return AutoConfig.from_pretrained(base, **where)
    except OSError as error:
        raise unreadable(f"the {role}" if adapter is None else f"the base of the adapter {name}", base, error) from error


# ---------------------------------------------------------------------- models


def _loaded(name: str, role: str, args: TokenDistillConfig, load: Callable[[str, dict[str, Any]], Any]) -> Any:
    """`load(base, arguments)`, its weights whole, with the adapter on it where the name is one's.

    Raises:
        ValueError: weights that the checkpoint lacks.
    """
    kwargs = _options(role, args)
    base, where, adapter = _placed(name, kwargs)
    kwargs = {**kwargs, **where} if adapter is None else {**{k: v for k, v in kwargs.items() if k != "revision"}, **where}
    try:
        model, told = load(base, {**kwargs, "output_loading_info": True})
    except (SafetensorError, OSError) as error:
        found = damaged_file(base)
        if not found:
            raise
        raise ValueError(f"the {role}'s file {found}: copy or save it again.") from error
    missing = sorted(told.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"the {role}'s checkpoint {base} lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}), which would be random: pass the checkpoint of a "
            "causal language model."
        )
    if adapter is None:
        return model
    from peft import PeftModel

    logger.info("the %s is the adapter %s on %s", role, name, base)
    revision = {"revision": r} if (r := _options(role, args).get("revision")) else {}
    adapted = PeftModel.from_pretrained(model, expanded(name), is_trainable=role == "student", **revision)
    return adapted if role == "student" else adapted.merge_and_unload()


def load_student(name: str, args: TokenDistillConfig, quantization_config: Any = None) -> Any:
    """A student, in float32 unless a dtype is named; of an adapter its base with it, trainable.

    Raises:
        ValueError: an encoder-decoder, weights that the checkpoint lacks, an adapter whose base cannot be found.
    """

    def load(base: str, kwargs: dict[str, Any]) -> Any:
        if quantization_config is not None:
            if "quantization_config" in kwargs:
                raise ValueError("quantization_config was given to the trainer and in model_init_kwargs: leave one out.")
            kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None  # "auto" fails with several processes
        return create_model_from_path(base, architecture=_class_of(base, kwargs), **kwargs)

    return _loaded(name, "student", args, load)


def class_of(config: Any) -> Any:
    """The class of a configuration's model: of a multimodal model its own."""
    named = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, named[0], None)
    writes = isinstance(found, type) and issubclass(found, GenerationMixin)
    return found if writes else AutoModelForCausalLM


def _class_of(base: str, kwargs: dict[str, Any]) -> Any:
    """The class of a checkpoint."""
    return class_of(AutoConfig.from_pretrained(base, **_where(kwargs)))


def student_of(model: Any, args: TokenDistillConfig, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The student, loaded where it comes by name with its tokenizer into `kwargs`, and the config's `model_init_kwargs`, which
    are taken out of it for TRL: it would say that they are ignored."""
    given = args.model_init_kwargs
    if isinstance(model, str):
        kwargs["processing_class"] = kwargs.get("processing_class") or processor_of(model, args)
        model = load_student(model, args, kwargs.pop("quantization_config", None))
        args.model_init_kwargs = None
    return model, given


def load_teacher(name: str, args: TokenDistillConfig) -> Any:
    """A teacher, whole in this process whatever the student runs under; an adapter is merged into its base."""
    with loading_under(None):
        return _loaded(name, "teacher", args, lambda base, kwargs: _class_of(base, kwargs).from_pretrained(base, **kwargs))


def load_sharded_teacher(model: Any, args: TokenDistillConfig) -> tuple[Any, dict[str, Any]]:
    """A teacher of which each process holds a share, if it comes by name, and the DeepSpeed configuration it runs under.

    Raises:
        ValueError: quantized weights, which ZeRO-3 cannot shard.
    """
    kwargs, named = _options("teacher", args), isinstance(model, str)
    config = AutoConfig.from_pretrained(expanded(model), **_where(kwargs)) if named else model.config
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        raise ValueError(
            "teacher_placement=zero3 was asked for a quantized teacher, whose weights DeepSpeed cannot shard: load it "
            "unquantized, or use teacher_placement=local."
        )
    dtype = kwargs["dtype"] if named else model.dtype
    if dtype == "auto":
        dtype = dtype_of(config.dtype) or torch.float32
    deepspeed_config = zero3_config(args.teacher_deepspeed, dtype, args.teacher_cpu_offload)
    if named:
        with loading_under(deepspeed_config):
            model = _class_of(expanded(model), kwargs).from_pretrained(expanded(model), **{**kwargs, "dtype": dtype})
        restore_buffers(model, dtype)
    return model, deepspeed_config


# ---------------------------------------------------------------------- tokenizers


def processor_of(name: str, args: TokenDistillConfig) -> Any:
    """The student's tokenizer or processor, in the revision of its weights; of an adapter the one beside it, or its base's.

    Raises:
        ValueError: a folder without one.
    """
    kwargs = _options("student", args)
    path, where = expanded(name), _where(kwargs)
    base, base_where, adapter = _placed(name, kwargs)
    if adapter is not None and lacks_tokenizer(path):
        path, where = base, base_where
    if lacks_tokenizer(path):
        raise ValueError(
            f"the student's folder {path} holds no tokenizer: save the one it was trained with beside it "
            "(tokenizer.save_pretrained), or pass processing_class=..."
        )
    return AutoProcessor.from_pretrained(path, truncation_side="left", padding_side="left", **where)


def tokenizer_of_teacher(source: str, args: TokenDistillConfig) -> Any:
    """The tokenizer that comes with the teacher's checkpoint, in the revision of its weights, if one does; else None."""
    if not source or lacks_tokenizer(source):
        return None
    try:
        return AutoTokenizer.from_pretrained(expanded(source), **_where(_options("teacher", args)))
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer could be read from %r: %s", source, str(error).splitlines()[0])
        return None
