"""Accuracy of a model on the demo's problems: greedy decoding in float32, graded by `tsdkd.data.answers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.data.answers import is_correct
from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rendering import Rendering
from tsdkd.demo.problems import Problem
from tsdkd.rollouts import as_asked

MAX_NEW_TOKENS = 48


@torch.no_grad()
def answers(
    model,
    tokenizer,
    problems: Sequence[Problem],
    batch_size: int = 250,
    max_new_tokens: int = MAX_NEW_TOKENS,
    as_chat: bool = True,
    rendering: Rendering | None = None,
) -> list[str]:
    """The model's greedy answers, in the problems' order; questions are put as chats, or as plain text, as `rendering` does."""
    texts: list[str] = []
    rendering = rendering or Rendering(tokenizer, tokenizer)
    for start in range(0, len(problems), batch_size):
        questions = [p.question for p in problems[start : start + batch_size]]
        asked = [[{"role": "user", "content": question}] for question in questions] if as_chat else questions
        ids = {"input_ids": rendering.prompts(asked)}
        inputs = tokenizer.pad(ids, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with as_asked(model):
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(
    model,
    tokenizer,
    problems: Sequence[Problem],
    max_new_tokens: int = MAX_NEW_TOKENS,
    as_chat: bool = True,
    rendering: Rendering | None = None,
    graded: list[tuple[str, bool]] | None = None,
    pattern: str | None = None,
) -> dict[str, float]:
    """Share of problems answered right, with its 95 % Wilson interval; questions are put as chats, or as plain text.

    Args:
        graded: is given every answer and whether it is right.
        pattern: of the final answer, as `tsdkd.data.answers.final_answer` takes it.

    Returns:
        `accuracy`, `low`, `high` in [0, 1] and `n`, the number of problems.
    """
    was_training = model.training
    model.eval()
    texts = answers(model, tokenizer, problems, max_new_tokens=max_new_tokens, as_chat=as_chat, rendering=rendering)
    marks = [is_correct(text, problem.answer, pattern) for text, problem in zip(texts, problems, strict=True)]
    right = sum(marks)
    if graded is not None:
        graded.extend(zip(texts, marks, strict=True))
    model.train(was_training)
    low, high = wilson_interval(right, len(problems))
    return {"accuracy": right / len(problems), "low": low, "high": high, "n": len(problems)}
