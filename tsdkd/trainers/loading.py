"""Part of the seam: how transformers loads a model beside a student under DeepSpeed, and the buffers that it spoils there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
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
