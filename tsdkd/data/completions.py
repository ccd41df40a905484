"""Given completions: from a data set's `completion` to the ids that a model would have written after the prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def clean(value: Any) -> Any:
    """Without the keys that Arrow filled with None because another row has them; a turn's own content stays."""
    if isinstance(value, dict):
        return {key: clean(part) for key, part in value.items() if part is not None or key == "content"}
    return [clean(part) for part in value] if isinstance(value, (list, tuple)) else value


def joined_parts(content: Any) -> Any:
    """A turn's content, its parts joined where all are texts."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(part["text"] for part in content)
    return content


def completion_turn(completion: Any) -> dict[str, Any]:
    """A completion as the one assistant turn that it is, with every field that has a value.

    Raises:
        ValueError: something else.
    """
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    found = "no text and no list of turns"
    if isinstance(completion, (list, tuple)) and all(isinstance(turn, dict) for turn in completion):
        found = f"the turns of {', '.join(str(turn.get('role')) for turn in completion) or 'nobody'}"
        if len(completion) == 1 and completion[0].get("role", "assistant") == "assistant":
            turn = clean(completion[0])
            content = joined_parts(turn.get("content"))
            if isinstance(content, str) or (content is None and turn.get("tool_calls")):
                return {**turn, "role": "assistant", "content": content}
            found = f"a turn whose content is {type(content).__name__}"
    raise ValueError(
        "a completion is a text or a list of one assistant message {'role': …, 'content': text}; got "
        f"{found}: {str(completion)[:80]!r}. Turns of others (tools, the user) belong into the prompt."
    )


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of a chat's one assistant message."""
    return completion_turn(completion).get("content") or ""


def has_text(completion: Any) -> bool:
    """Whether a completion is one, with something in it."""
    try:
        turn = completion_turn(completion)
    except ValueError:
        return False
    return bool((turn.get("content") or "").strip() or turn.get("tool_calls"))


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
