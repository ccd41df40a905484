"""Tiny models of real architectures, peaked enough to show bugs, and what a run needs beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config

from tsdkd.demo.recreate import make_tokenizer

# The default range of 0.02 gives near-uniform models, which hide mistakes.
_COMMON = dict(
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, dict(final_logit_softcapping=3.0, query_pre_attn_scalar=16)),
    "granite": (GraniteConfig, dict(logits_scaling=3.0)),
}


def tiny_model(
    family: str = "qwen2",
    vocab_size: int = 64,
    hidden: int = 32,
    seed: int = 0,
    positions: int = 128,
    closes_soon: bool = False,
    **overrides,
):
    """A model with random weights in float32; one that `closes_soon` ends its answers after a few tokens."""
    torch.manual_seed(seed)
    config_class, extra = FAMILIES[family]
    options = dict(_COMMON, vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, **extra)
    options["max_position_embeddings"] = positions
    if family in ("qwen2", "granite"):
        options.pop("head_dim")
    options.update(overrides)
    model = AutoModelForCausalLM.from_config(config_class(**options)).eval()
    if closes_soon:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(0.3)  # nearly uniform, and so is the chance of an end
    return model


def save_tiny(folder: Path, **kwargs) -> str:
    """The path of a tiny model with the demo's tokenizer beside it (of type llama: AutoTokenizer gives a qwen2 its own)."""
    tiny_model(**{"family": "llama", **kwargs}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


QUESTIONS = [f"Tom has {n} apples. Tom buys {n % 7 + 2} more. How many apples now?" for n in range(10, 42)]


def prompts(count: int = 8, chat: bool = False) -> Dataset:
    """Rows with a `prompt` column."""
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts] if chat else texts})


def config(folder: Path, cls=None, **kwargs):
    """A config for a short run on this CPU."""
    from tsdkd import TSDKDConfig

    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_completion_length=12,
        max_length=64,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    return (cls or TSDKDConfig)(**{**options, **kwargs})
