"""Students as pipelines ask them: greedily, by transformers or vLLM."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
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
    rendering = Rendering(tokenizer, tokenizer)
    as_chat = tokenizer.chat_template is not None
    prompt_ids = rendering.prompts([[{"role": "user", "content": text}] if as_chat else f"{text}\n" for text in prompts])
    if how.engine == "vllm":
        yield from _by_vllm(student, prompt_ids, how, tokenizer)
        return
    from tsdkd.rollouts.greedily import ends_of, written_greedily

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype).to(device).eval()
    ends = ends_of(model, tokenizer)
    for start in range(0, len(prompt_ids), how.batch_size):
        ids = written_greedily(model, tokenizer, prompt_ids[start : start + how.batch_size], how.max_tokens, how.batch_size)
        yield from _as_rows(ids, tokenizer, ends)
    del model
    gc.collect()


def _as_rows(ids: list[list[int]], tokenizer: Any, ends: set[int]) -> Iterator[dict[str, Any]]:
    for text, row in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ids, strict=True):
        yield {"text": text, "tokens": len(row), "ended": bool(row) and row[-1] in ends}


def _by_vllm(student: str, prompt_ids: list[list[int]], how: Inference, tokenizer: Any) -> Iterator[dict[str, Any]]:
    from tsdkd.rollouts import VLLMWriter

    ends = {tokenizer.eos_token_id}
    writer = VLLMWriter(
        student,
        temperature=0.0,
        max_new_tokens=how.max_tokens,
        ends=ends,
        vocab_size=len(tokenizer),
        max_model_len=max(map(len, prompt_ids)) + how.max_tokens,
    )
    try:
        for start in range(0, len(prompt_ids), _AT_ONCE):
            yield from _as_rows(writer(prompt_ids[start : start + _AT_ONCE]), tokenizer, ends)
    finally:
        writer.close()


def part_of(name: str, part: Any, given: Any) -> Any:
    """A part of a configuration from the mapping of a YAML file.

    Raises:
        ValueError: it is none, or has unknown fields.
    """
    known = [member.name for member in fields(part)]
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is a mapping with {', '.join(known)}, not {given!r}.")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}; there are: {', '.join(known)}.")
    return part(**given)
