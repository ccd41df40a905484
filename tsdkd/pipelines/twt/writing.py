"""What a student answers, and what of it is right and how long it is."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tsdkd.data.answers import is_correct
from tsdkd.data.rendering import Rendering
from tsdkd.pipelines.twt.config import Inference
from tsdkd.pipelines.twt.prompts import Task
from tsdkd.pipelines.twt.training import tokenizer_of

_AT_ONCE = 1024  # prompts that vLLM is given at a time


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


def marks(answers: Sequence[dict[str, Any]], references: Sequence[str], task: Task) -> list[bool]:
    """Which answers are right, by the library's grader."""
    return [is_correct(row["text"], gold, task.answer) for row, gold in zip(answers, references, strict=True)]


def rationale_of(text: str, task: Task) -> str:
    """What a student wrote before its answer."""
    pattern = task.answer or r"####|\\boxed"
    found = list(re.finditer(pattern, text))
    return text[: found[-1].start()].strip() if found else text.strip()
