"""Contamination: training prompts that stand, up to normalisation, in a benchmark's items, and items that stand in prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# A shorter text is found only where it is the whole of the other: "What is 2 + 2?" stands in many texts by chance.
SHORTEST = 8

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """A prompt and an item that share a text."""

    prompt_row: int
    task: str
    item: int
    how: str
    text: str


def normalise(text: str) -> tuple[str, ...]:
    """The words of a text, without case, punctuation and white space.

    Example:
        >>> normalise("How  many\\napples, Tom?") == normalise("how many apples tom")
        True
    """
    return tuple(_WORD.findall(text.casefold()))


def _stands(inner: tuple[str, ...], outer: tuple[str, ...], at: int) -> bool:
    return outer[at : at + len(inner)] == inner


class _Index:
    """Texts by their first words, so that each text that stands in another is found in one pass over the other."""

    def __init__(self, texts: Iterable[tuple[Any, tuple[str, ...]]]) -> None:
        self.whole: dict[tuple[str, ...], list[Any]] = {}
        self.by_start: dict[tuple[str, ...], list[tuple[Any, tuple[str, ...]]]] = {}
        for key, words in texts:
            self.whole.setdefault(words, []).append(key)
            if len(words) >= SHORTEST:
                self.by_start.setdefault(words[:SHORTEST], []).append((key, words))

    def inside(self, words: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """The texts that stand in this one, the whole of it included."""
        for key in self.whole.get(words, []) if words else []:
            yield key, words
        for at in range(len(words) - SHORTEST + 1):
            for key, text in self.by_start.get(words[at : at + SHORTEST], []):
                if len(text) < len(words) and _stands(text, words, at):
                    yield key, text


def texts_of(doc: dict[str, Any]) -> list[str]:
    """An item's own texts: its strings, and those of its lists."""
    found: list[str] = []
    for value in doc.values():
        values = value if isinstance(value, list) else [value]
        found += [text for text in values if isinstance(text, str)]
    return found


def find_overlap(prompts: list[str], items: Iterable[tuple[str, int, dict[str, Any]]]) -> list[Overlap]:
    """Prompts that stand in an item, and items whose text stands in a prompt.

    Args:
        prompts: the training prompts.
        items: task, number and fields of each item.

    Returns:
        one entry a pair of prompt and item, in the order of the items.
    """
    words_of_prompts = [normalise(prompt) for prompt in prompts]
    by_prompt = _Index((row, words) for row, words in enumerate(words_of_prompts) if words)
    found: dict[tuple[int, str, int], Overlap] = {}
    fields: list[tuple[tuple[str, int], tuple[str, ...]]] = []
    for task, number, doc in items:
        for text in texts_of(doc):
            words = normalise(text)
            fields.append(((task, number), words))
            for row, prompt in by_prompt.inside(words):
                how = "is a text of the item" if len(prompt) == len(words) else "stands in the item"
                found.setdefault((row, task, number), Overlap(row, task, number, how, " ".join(prompt)))
    by_item = _Index((key, words) for key, words in fields if len(words) >= SHORTEST)
    for row, words in enumerate(words_of_prompts):
        for (task, number), held in by_item.inside(words):
            found.setdefault((row, task, number), Overlap(row, task, number, "holds a text of the item", " ".join(held)))
    return sorted(found.values(), key=lambda overlap: (overlap.task, overlap.item, overlap.prompt_row))
