"""What a student answers, and what of it is right and how long it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from tsdkd.data.answers import is_correct
from tsdkd.data.rendering import Rendering
from tsdkd.pipelines.twt.config import Inference
from tsdkd.pipelines.twt.prompts import Task


def student_answers(
    student: str,
    prompts: Sequence[str],
    how: Inference,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """A student's greedy answers, in the prompts' order.

    Returns:
        rows with `text`, `tokens` (its ids, an end among them) and `ended`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student, revision=revision, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rendering = Rendering(tokenizer, tokenizer)
    as_chat = tokenizer.chat_template is not None
    asked = [[{"role": "user", "content": prompt}] if as_chat else f"{prompt}\n" for prompt in prompts]
    prompt_ids = rendering.prompts(asked)
    if how.engine == "vllm":
        ids, ends = _by_vllm(student, prompt_ids, how, tokenizer)
    else:
        from tsdkd.rollouts.greedily import ends_of, written_greedily

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype, revision=revision).to(device).eval()
        ends = ends_of(model, tokenizer)
        ids = written_greedily(model, tokenizer, prompt_ids, how.max_tokens, how.batch_size, progress)
        del model
        gc.collect()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        {"text": text, "tokens": len(row), "ended": bool(row) and row[-1] in ends} for text, row in zip(texts, ids, strict=True)
    ]


def _by_vllm(student: str, prompt_ids: list[list[int]], how: Inference, tokenizer: Any) -> tuple[list[list[int]], set[int]]:
    from tsdkd.rollouts import VLLMWriter

    longest = max(map(len, prompt_ids)) + how.max_tokens
    ends = {tokenizer.eos_token_id}
    writer = VLLMWriter(
        student,
        temperature=0.0,
        max_new_tokens=how.max_tokens,
        ends=ends,
        vocab_size=len(tokenizer),
        max_model_len=longest,
    )
    try:
        return writer(prompt_ids), ends
    finally:
        writer.close()


def marks(answers: Sequence[dict[str, Any]], references: Sequence[str], task: Task) -> list[bool]:
    """Which answers are right, by the library's grader."""
    return [is_correct(row["text"], gold, task.answer) for row, gold in zip(answers, references, strict=True)]


def rationale_of(text: str, task: Task) -> str:
    """What a student wrote before its answer."""
    import re

    pattern = task.answer or r"####|\\boxed"
    found = list(re.finditer(pattern, text))
    return text[: found[-1].start()].strip() if found else text.strip()
