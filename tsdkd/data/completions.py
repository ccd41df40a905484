"""Given completions: from a data set's `completion` to the ids that a model would have written after the prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of a chat's one assistant message.

    Raises:
        ValueError: something else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, (list, tuple)) and len(completion) == 1 and isinstance(completion[0], dict):
        content = completion[0].get("content")
        if isinstance(content, str):
            return content
    raise ValueError(
        "a completion is a text or a list of one assistant message {'role': …, 'content': text}; got "
        f"{str(completion)[:80]!r}."
    )


def has_text(completion: Any) -> bool:
    """Whether a completion is one, with something in it."""
    try:
        return bool(completion_text(completion).strip())
    except ValueError:
        return False


def ids_after(
    prompt: Sequence[int], whole: Sequence[int], alone: Sequence[int], ends: Collection[int], limit: int
) -> tuple[list[int], bool]:
    """The ids of a completion after its prompt, and whether it was cut.

    Args:
        prompt: the ids of the prompt as it is generated from.
        whole: those of prompt and completion together.
        alone: those of the completion's text alone, taken where `whole` does not start with `prompt` (a merge across the
            boundary, or a chat template that renders a past turn differently).
        ends: the ids that end a completion; the first of them is appended to one without any, and what follows one is left
            out (a template's line break).
        limit: ids at most; a longer completion loses its end.

    Example:
        >>> ids_after([5, 6], [5, 6, 7, 8], [7, 8], [1], 10)
        ([7, 8, 1], False)
        >>> ids_after([5, 6], [5, 9, 8], [7, 8], [1], 2)
        ([7, 8], True)
    """
    starts = list(whole[: len(prompt)]) == list(prompt) and len(whole) > len(prompt)
    ids = list(whole[len(prompt) :]) if starts else list(alone)
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = [*ids, next(iter(ends))] if end is None else ids[: end + 1]
    return ids[:limit], len(ids) > limit
