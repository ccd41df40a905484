"""Accuracy of a model on the demo's problems: greedy decoding in float32, graded by `tsdkd.data.answers`."""

from __future__ import annotations

from collections.abc import Sequence

from tsdkd.data.answers import is_correct
from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rendering import Rendering
from tsdkd.demo.problems import Problem
from tsdkd.rollouts.greedily import written_greedily

MAX_NEW_TOKENS = 48


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
    rendering = rendering or Rendering(tokenizer, tokenizer)
    questions = [p.question for p in problems]
    asked = [[{"role": "user", "content": question}] for question in questions] if as_chat else questions
    ids = written_greedily(model, tokenizer, rendering.prompts(asked), max_new_tokens, batch_size)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def graded(
    model,
    tokenizer,
    problems: Sequence[Problem],
    max_new_tokens: int = MAX_NEW_TOKENS,
    as_chat: bool = True,
    rendering: Rendering | None = None,
    pattern: str | None = None,
) -> list[tuple[str, bool]]:
    """Every problem's answer and whether it is right; `pattern` finds it, as `tsdkd.data.answers.final_answer` takes it."""
    was_training = model.training
    model.eval()
    texts = answers(model, tokenizer, problems, max_new_tokens=max_new_tokens, as_chat=as_chat, rendering=rendering)
    model.train(was_training)
    return [(text, is_correct(text, problem.answer, pattern)) for text, problem in zip(texts, problems, strict=True)]


def share(marks: Sequence[bool]) -> dict[str, float]:
    """The share of right answers as `accuracy`, its 95 % Wilson interval as `low` and `high`, in [0, 1], and `n`."""
    right = sum(marks)
    low, high = wilson_interval(right, len(marks))
    return {"accuracy": right / len(marks), "low": low, "high": high, "n": len(marks)}


def accuracy(
    model, tokenizer, problems: Sequence[Problem], max_new_tokens: int = MAX_NEW_TOKENS, as_chat: bool = True
) -> dict[str, float]:
    """The `share` of problems answered right; questions are put as chats, or as plain text."""
    return share([mark for _, mark in graded(model, tokenizer, problems, max_new_tokens, as_chat)])
