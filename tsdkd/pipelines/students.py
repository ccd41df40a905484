"""Students as pipelines ask them: greedily, by transformers or vLLM."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdkd.checks import check_choice, check_count
from tsdkd.data.rendering import Rendering

_AT_ONCE = 1024  # prompts that vLLM is given at a time


@dataclass(frozen=True)
class Inference:
    """How students answer: greedily, as the paper's temperature 0 (its top-p 0.95 has no effect then).

    Args:
        max_tokens: of an answer.
        batch_size: prompts at a time by transformers.
        engine: `transformers`, or `vllm`.
    """

    max_tokens: int = 2048
    batch_size: int = 64
    engine: str = "transformers"

    def __post_init__(self) -> None:
        check_count("max_tokens", self.max_tokens)
        check_count("batch_size", self.batch_size)
        check_choice("engine", self.engine, ("transformers", "vllm"))


def tokenizer_of(student: str) -> Any:
    """A student's tokenizer, padding with its end where it has nothing else for it.

    Raises:
        ValueError: it has no end, so no answer would.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of the student {student} has no eos_token, so no answer would end: set one and save it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """What a student is asked, as ids: as chats where it has a template, else as texts that end with a line."""
    as_chat = tokenizer.chat_template is not None
    asked = [[{"role": "user", "content": text}] if as_chat else f"{text}\n" for text in texts]
    return Rendering(tokenizer, tokenizer).prompts(asked)


def lora_config(r: int, alpha: int | None = None) -> Any:
    """PEFT's configuration of adapters on all linear layers, scaled by twice the rank where no `alpha` is given.

    None of rank 0: a student that is trained whole.

    Raises:
        ValueError: peft is not installed.
    """
    if not r:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_r needs the package peft: pip install 'tsdkd[peft]', or take lora_r: 0.") from error
    return LoraConfig(r=r, lora_alpha=alpha or 2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


def load_student(name: str, device: Any, four_bit: bool = False) -> Any:
    """A student's model on a device, in float32; with `four_bit` its linear layers in NF4, quantised twice (QLoRA).

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not four_bit:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    check_four_bit()
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if half else torch.float32
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantised, dtype=dtype, device_map={"": device})


def check_four_bit() -> None:
    """Refuse weights in 4 bits where nothing is installed that holds them.

    Raises:
        ValueError: saying what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("four_bit: true needs the package bitsandbytes: pip install bitsandbytes, or take four_bit: false.")


def save_student(model: Any, tokenizer: Any, folder: Path) -> None:
    """A trained student's folder; adapters are merged into its weights."""
    whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    whole.config.use_cache = True
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def student_answers(student: str, prompts: Sequence[str], how: Inference) -> Iterator[dict[str, Any]]:
    """A student's greedy answers, in the prompts' order, as batches of them are written.

    Yields:
        rows with `text`, `tokens` (its ids, an end among them) and `ended`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not prompts:
        return
    tokenizer = tokenizer_of(student)
    asked = prompt_ids(tokenizer, prompts)
    if how.engine == "vllm":
        yield from _by_vllm(student, asked, how, tokenizer)
        return
    from tsdkd.rollouts.greedily import ends_of, written_greedily

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype).to(device).eval()
    ends = ends_of(model, tokenizer)
    for start in range(0, len(asked), how.batch_size):
        ids = written_greedily(model, tokenizer, asked[start : start + how.batch_size], how.max_tokens, how.batch_size)
        yield from _as_rows(ids, tokenizer, ends)
    del model
    gc.collect()


def _as_rows(ids: list[list[int]], tokenizer: Any, ends: set[int]) -> Iterator[dict[str, Any]]:
    for text, row in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ids, strict=True):
        yield {"text": text, "tokens": len(row), "ended": bool(row) and row[-1] in ends}


def _by_vllm(student: str, asked: list[list[int]], how: Inference, tokenizer: Any) -> Iterator[dict[str, Any]]:
    from tsdkd.rollouts import VLLMWriter

    ends = {tokenizer.eos_token_id}
    writer = VLLMWriter(
        student,
        temperature=0.0,
        max_new_tokens=how.max_tokens,
        ends=ends,
        vocab_size=len(tokenizer),
        max_model_len=max(map(len, asked)) + how.max_tokens,
    )
    try:
        for start in range(0, len(asked), _AT_ONCE):
            yield from _as_rows(writer(asked[start : start + _AT_ONCE]), tokenizer, ends)
    finally:
        writer.close()
