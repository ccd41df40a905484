"""Given completions: from a data set's `completion` to the ids that a model would have written after the prompt."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

_KEPT = "tsdkd_json"  # a value that Arrow would make like other rows' is kept as JSON under this key


def kept(value: Any) -> dict[str, str]:
    """A value whose shape Arrow is not to touch: it would give it the keys and the types of every other row's."""
    return {_KEPT: json.dumps(value)}


def clean(value: Any) -> Any:
    """Without the keys that Arrow filled with None because another row has them; what was `kept` is as it was."""
    if isinstance(value, dict):
        if value.keys() == {_KEPT}:
            return json.loads(value[_KEPT])
        return {key: clean(part) for key, part in value.items() if part is not None}
    return [clean(part) for part in value] if isinstance(value, (list, tuple)) else value


def clean_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without what Arrow filled in, its own content kept also where it is None, and text in parts joined."""
    made = clean(turn)
    if "content" in turn:
        made["content"] = joined_parts(made.get("content"))
    return made


def joined_parts(content: Any) -> Any:
    """A turn's content, its parts joined where all are texts."""
    if not isinstance(content, (list, tuple)) or not content:
        return content
    are_texts = all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return "".join(part["text"] for part in content) if are_texts else content


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
            turn = clean_turn(completion[0])
            content = turn.get("content")
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
