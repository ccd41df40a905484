"""Part of the seam: how transformers loads a model beside a student under DeepSpeed, and the buffers that it spoils there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.integrations import deepspeed as integration

from tsdkd.teachers.heads import without_adapter_wrapper


@contextmanager
def loading_under(config: dict[str, Any] | None) -> Iterator[None]:
    """transformers' loading under this DeepSpeed configuration, or under none: it would shard a teacher as the student's asks.

    The configuration that is read while a model is loaded is one global, and the student's is put back.
    """
    before = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    kept = None if config is None else integration.HfDeepSpeedConfig(config)  # it counts as long as it lives
    try:
        yield
    finally:
        del kept
        integration.unset_hf_deepspeed_config()
        if before is not None:
            integration.set_hf_deepspeed_config(before)


def load_renamed(trainer: Any, folder: str | None) -> bool:
    """Load a checkpoint whose names are not the model's own, which transformers writes for some families (multimodal models,
    experts that it holds in one piece) and its trainer passes over without a word; whether it was one.

    Raises:
        ValueError: it lacks weights of the model.
    """
    if folder is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    model = trainer.accelerator.unwrap_model(trainer.model)
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files or hasattr(model, "peft_config"):
        return False
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    if names <= set(model.state_dict()):
        return False
    fresh, told = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    missing = sorted(told.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of the student ({', '.join(missing[:3])}, …): it is of another."
        )
    model.load_state_dict(fresh.state_dict())
    return True


def restore_buffers(model: Any, dtype: Any) -> None:
    """Buffers that no checkpoint holds, as they are without ZeRO-3, in a model that it sharded while it was loaded: there they
    are computed in the dtype of the weights, and a rotary embedding in bfloat16 has wrong angles."""
    inner = without_adapter_wrapper(model)
    if not any(hasattr(parameter, "ds_status") for parameter in inner.parameters()):
        return
    with loading_under(None), init_empty_weights(include_buffers=False):
        fresh = type(inner)._from_config(inner.config, dtype=dtype)
    wanted = dict(fresh.named_buffers())
    for name, module in inner.named_modules():
        for short in module._non_persistent_buffers_set:
            buffer, whole = getattr(module, short), wanted.get(f"{name}.{short}" if name else short)
            if buffer is not None and whole is not None and whole.shape == buffer.shape:
                setattr(module, short, whole.to(buffer.device))
