"""Columns as people name them, to `prompt` and `completion`: chats with their answers in, ShareGPT's, instructions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

CHATS = ("messages", "conversations", "conversation")
ASSISTANTS = ("assistant", "model", "gpt", "chatgpt")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Names of prompts and of completions that say what to pass, where a data set has no 'prompt'.
_PROMPTS = ("instruction", "question", "problem", "query", "input", "text")
_COMPLETIONS = ("output", "answer", "solution", "response")


def turns_of(chat: Any, row: int, column: str) -> list[dict[str, Any]]:
    """A chat's turns by `role` and `content`, whether they stand there or as ShareGPT's `from` and `value`.

    Raises:
        ValueError: a turn that is neither, by row.
    """
    made = []
    for number, turn in enumerate(chat or []):
        turn = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
        if {"from", "value"} <= turn.keys():
            role = _ROLES.get(str(turn["from"]).lower())
            if role is None:
                raise ValueError(
                    f"turn {number} of row {row} in {column!r} is from {turn['from']!r}: known are {', '.join(_ROLES)}."
                )
            rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
            turn = {"role": role, "content": turn["value"], **rest}
        elif "role" in turn:  # one that no mapping knows stays: the template may
            turn["role"] = _ROLES.get(str(turn["role"]).lower(), turn["role"])
        if "role" not in turn:
            raise ValueError(
                f"turn {number} of row {row} in {column!r} has neither role and content nor from and value: {str(turn)[:80]}."
            )
        made.append(turn)
    return made


def split_last(
    chats: Sequence[Any], column: str, reads_completions: bool = True, systems: Sequence[Any] | None = None
) -> dict[str, list[Any]]:
    """Chats as prompts, and the assistant's last turn of each, where it ends the chat, as its completion (else None).

    Args:
        chats, column: and the column that they stand in, for messages.
        reads_completions: whether last turns become completions.
        systems: what begins each chat that has no system turn of its own.
    """
    prompts, completions = [], []
    for row, chat in enumerate(chats):
        turns = turns_of(chat, row, column)
        system = None if systems is None else systems[row]
        if system and not any(turn["role"] == "system" for turn in turns):
            turns = [{"role": "system", "content": system}, *turns]
        ends = bool(turns) and turns[-1]["role"] == "assistant"
        prompts.append(turns[:-1] if ends else turns)
        completions.append([turns[-1]] if ends else None)
    found = sum(completion is not None for completion in completions)
    if found and reads_completions:
        logger.warning(
            "the last turn of %d of %d chats in %r is the assistant's: it is their completion, what is before it their prompt.",
            found,
            len(prompts),
            column,
        )
    return {"prompt": prompts, **({"completion": completions} if found and reads_completions else {})}


def alpaca(rows: Any, answers: str) -> dict[str, list[Any]]:
    """`instruction` (with `input` or `context` behind it) as prompts, `answers` as completions; chats where a row has a
    `system` or a `history` of pairs."""
    names = rows.column_names
    column = lambda *known: next((rows[name] for name in known if name in names), [None] * len(rows))  # noqa: E731
    texts = []
    for row, pair in enumerate(zip(rows["instruction"], column("input", "context"), strict=True)):
        wrong = next((part for part in pair if part is not None and not isinstance(part, str)), None)
        if wrong is not None:
            raise ValueError(f"the instruction or input of row {row} is {type(wrong).__name__}, not a text: {str(wrong)[:60]}.")
        texts.append("\n\n".join(part for part in pair if part))
    systems, histories = list(column("system")), list(column("history"))
    if not any(systems) and not any(histories):
        return {"prompt": texts, "completion": list(rows[answers])}
    prompts = []
    for text, system, history in zip(texts, systems, histories, strict=True):
        turns = [{"role": "system", "content": system}] if system else []
        if history is not None and not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
            raise ValueError(f"a history is a list of pairs, what was asked and answered; got {str(history)[:60]}.")
        for asked, answered in history or []:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        prompts.append([*turns, {"role": "user", "content": text}])
    return {"prompt": prompts, "completion": [[{"role": "assistant", "content": text}] for text in rows[answers]]}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict)


def recognised(rows: Any, column: str | None, completion_column: str | None) -> dict[str, list[Any]] | None:
    """The columns of a layout that is known, where no `prompt` is there; None of another.

    Args:
        rows: a `datasets.Dataset`.
        column, completion_column: what was asked for by name; None was not.
    """
    names = rows.column_names
    wanted = column or next((name for name in CHATS if name in names), None)
    if wanted is not None and wanted in names and len(rows) and is_chat(rows[0][wanted]):
        apart = completion_column or ("completion" if "completion" in names else None)
        systems = rows["system"] if "system" in names else None
        return split_last(rows[wanted], wanted, reads_completions=apart is None, systems=systems)
    answers = next((name for name in ("output", "response") if name in names), None)
    if column is None and completion_column is None and "instruction" in names and answers:
        return alpaca(rows, answers)
    return None


def advice(names: Sequence[str]) -> str:
    """What to pass for a data set of these columns."""
    prompt = next((name for name in _PROMPTS if name in names), None)
    completion = next((name for name in _COMPLETIONS if name in names), None)
    said = f"Pass --prompt_column {prompt}" if prompt else "Pass --prompt_column"
    return f"{said} --completion_column {completion}." if prompt and completion else f"{said}."
