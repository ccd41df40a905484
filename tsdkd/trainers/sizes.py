"""A model's sizes from its configuration: built on no device, without a weight."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tsdkd.costs import GIB, ModelSize
from tsdkd.teachers.heads import experts_of, text_config
from tsdkd.teachers.sources import dtype_of
from tsdkd.trainers.host import once_a_run
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.sources import class_of

logger = once_a_run(__name__)


def empty_model(config: Any, **options: Any) -> Any:
    """A model of this configuration as it is built; its weights are whatever the device in hand gives."""
    found = class_of(config)
    return (found.from_config if found is AutoModelForCausalLM else found._from_config)(config, **options)


def size_of(config: Any) -> ModelSize:
    """The sizes of a configuration's model, exact.

    Raises:
        ValueError: a configuration of no language model that writes, or without a size.
    """
    try:
        with torch.device("meta"):
            model = empty_model(config)
        text, heads = text_config(model), text_config(model).num_attention_heads
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"a {getattr(config, 'model_type', type(config).__name__)} configuration gives no causal language model with "
            f"attention ({str(error).splitlines()[0]}): its sizes are not known here."
        ) from error
    parameters = sum(p.numel() for p in model.parameters())  # each once
    return ModelSize(
        parameters=parameters,
        active=parameters - _idle(model, text),
        embedding=embedding.numel(),
        head=head.numel(),
        largest_layer=max(_layers(model), default=0),
        vocab=head.shape[0],
        hidden=head.shape[1],
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tied=embedding is head,
    )


def _layers(model: Any) -> list[int]:
    """Parameters of each module that is not split: what ZeRO-3 and FSDP gather at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    return [sum(p.numel() for p in module.parameters()) for module in found]


def _idle(model: Any, text: Any) -> int:
    """Of a mixture of experts the parameters that a token does not pass."""
    total = experts_of(text)
    used = getattr(text, "num_experts_per_tok", None)
    if not total or not used:
        return 0
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return of_experts * (total - used) // total


def tell_if_too_large(setup: Setup, memory: int | None = None, adapter: bool = False) -> str:
    """Warn, before anything is loaded, of models that cannot fit a GPU whatever the batch and the optimizer are; what is said,
    or nothing.

    Args:
        memory: of a GPU, bytes; None: this machine's, nothing without one.
        adapter: an adapter alone is trained.
    """
    args = setup.args
    if memory is None:
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    sharded = args.deepspeed or args.fsdp or setup.quantization is not None or (args.model_init_kwargs or {}).get("device_map")
    if memory is None or sharded:
        return ""
    try:
        given = dtype_of((args.model_init_kwargs or {}).get("dtype"))
        least = _bytes_of(setup.student, setup.student_config, given, torch.float32, not adapter)
        for part in setup.apart.values():
            options = part.args.teacher_model_init_kwargs or {}
            held = part.teacher is not None and not part.teaches_itself and part.args.teacher_placement == "local"
            if held and not {"quantization_config", "device_map"} & options.keys():
                own = dtype_of(getattr(part.teacher_config, "dtype", None))
                least += _bytes_of(part.teacher, part.teacher_config, dtype_of(options.get("dtype")), own, False)
    except ValueError:
        return ""  # which is told of by itself
    if least <= memory:
        return ""
    told = (
        f"the models and the student's gradients take {least / GIB:.1f} GiB at the least, and the GPU has {memory / GIB:.1f}: "
        "`tsdkd plan` with the same flags says which placement fits."
    )
    logger.warning(told)
    return told


def _bytes_of(model: Any, config: Any, given: Any, default: Any, trained: bool) -> int:
    """What a model and, of one that is trained, its gradients take; of a loaded one as it is."""
    if not isinstance(model, str):
        each = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        return sum(size * (2 if trained and has_gradient else 1) for size, has_gradient in each)
    kind = next((kind for kind in (given, default) if isinstance(kind, torch.dtype)), torch.float32)
    return size_of(config).parameters * kind.itemsize * (2 if trained else 1)
