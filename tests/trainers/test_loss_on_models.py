"""The loss alone on real models, and the names that a config shares with it."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from fused_cases import ENGINES
from tiny import tiny_model

from tsdkd import TSDKD, TSDKDConfig, fused_tsd_kd_loss, tsd_kd_loss


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tied_embeddings_checkpointing_and_compile(impl, compiled, checkpointing):
    ids, mask = torch.randint(64, (2, 9)), torch.ones(2, 9)
    teacher = tiny_model(seed=2, hidden=48)
    found = []
    for engine in ("reference", impl):
        torch.manual_seed(0)
        model = tiny_model(seed=1)
        model.lm_head.weight = model.model.embed_tokens.weight
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        backbone = torch.compile(model.model, backend="aot_eager") if compiled else model.model
        hidden = backbone(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            other = teacher.model(ids).last_hidden_state
        fused_tsd_kd_loss(hidden, model.lm_head, other, teacher.lm_head, mask, impl=engine).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)


def test_config_method_and_function_share_names_and_defaults():
    keywords = {k: p.default for k, p in inspect.signature(tsd_kd_loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    keywords["kd_temperature"] = keywords.pop("temperature")
    del keywords["counts"]
    of_training = {"adaptive_opener", "lmbda"}  # what one call of a loss cannot have
    assert keywords == {f.name: f.default for f in dataclasses.fields(TSDKD) if f.name not in of_training}
    assert of_training < {f.name for f in dataclasses.fields(TSDKDConfig)}
    assert keywords == {f.name: f.default for f in dataclasses.fields(TSDKDConfig) if f.name in keywords}
