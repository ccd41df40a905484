"""Two tokenizers' views of one text: where their tokens begin, which of them are the same, and which go together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

_BROKEN = "\ufffd"  # what bytes of an unfinished character are decoded to
_CONTEXT = 4  # tokens: a character's bytes
_SPACE = "\u2581"  # SentencePiece's


class Pieces:
    """The text that each token of a completion adds, by one tokenizer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens too, without anyone's tidying up of spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def starts(self, ids: Sequence[int], behind: Sequence[int] = ()) -> tuple[str, list[int | None]]:
        """The text of ids behind others, and how many characters of it stand before each; None of a token that begins within a
        character, or behind one that added no text.

        Example:
            >>> Pieces(tokenizer).starts(tokenizer("1+2")["input_ids"])  # doctest: +SKIP
            ('1+2', [0, 1, 2])
        """
        text, starts = "", list[int | None]()
        before = tuple(behind[-_CONTEXT:])  # the tokens whose text came last
        own = tuple[int, ...]()  # those whose text is still to come
        for one in ids:
            starts.append(None if own else len(text))
            own = (*own, one)
            piece = self._piece(before, own)
            if piece and _BROKEN not in piece:
                text, before, own = text + piece, own, ()
        return text, starts

    def _piece(self, before: tuple[int, ...], own: tuple[int, ...]) -> str:
        """What ids add behind those before them: SentencePiece drops a space at the beginning of a text."""
        if (before, own) not in self._known:
            prefix, whole = self.decode(before), self.decode(before + own)
            self._known[before, own] = whole[len(prefix) :] if whole.startswith(prefix) else self.decode(own)
        return self._known[before, own]


def paired_by_text(ours: tuple[str, Sequence[int | None]], theirs: tuple[str, Sequence[int | None]]) -> list[tuple[int, int]]:
    """The tokens of two completions that begin at one place of one text, each with each, in order.

    As far as the two texts agree: behind that, places are not the same. Of several tokens at one place the first.

    Args:
        ours, theirs: as `Pieces.starts` gives them.

    Example:
        >>> paired_by_text(("abc", [0, 1, 2]), ("abc", [0, 2]))
        [(0, 0), (2, 1)]
    """
    agree = next((i for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=False)) if a != b), None)
    agree = min(len(ours[0]), len(theirs[0])) if agree is None else agree
    at: dict[int, int] = {}
    for number, start in enumerate(theirs[1]):
        if start is not None and start <= agree:
            at.setdefault(start, number)
    found, seen = [], set()
    for number, start in enumerate(ours[1]):
        if start is not None and start in at and start not in seen:
            seen.add(start)
            found.append((number, at[start]))
    return found


def paired_by_position(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """The first with the first, as many as the shorter has."""
    return [(number, number) for number in range(min(len(ours), len(theirs)))]


def same_tokens(student: Any, teacher: Any, ends: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """The ids of tokens that two tokenizers share, the student's first: those of the same text, and special ones of one name.

    Args:
        student, teacher: tokenizers of transformers.
        ends: the two tokens that end a completion, whatever their names are.
    """
    mine, their = surfaces(student), surfaces(teacher)
    if ends is not None:
        mine[ends[0]] = their[ends[1]] = ("end", "")
    at: dict[Any, int] = {}
    for i in sorted(their):
        at.setdefault(their[i], i)
    found, seen = [], set()
    for i in sorted(mine):
        other = at.get(mine[i])
        if other is not None and other not in seen:
            seen.add(other)
            found.append((i, other))
    return found


def surfaces(tokenizer: Any) -> dict[int, Any]:
    """What each id of a tokenizer stands for: the bytes of its text, or a special token's name.

    A byte that SentencePiece falls back to is left out where an ordinary token is the same.
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    to_bytes = _reader(tokenizer)
    vocabulary = tokenizer.get_vocab().items()
    found = {i: ("special", token) if i in special else to_bytes(token) for token, i in vocabulary}
    ordinary = {found[i] for token, i in vocabulary if not _is_fallback(token)}
    return {i: found[i] for token, i in vocabulary if not _is_fallback(token) or found[i] not in ordinary}


def _is_fallback(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _reader(tokenizer: Any) -> Callable[[str], bytes]:
    """From a token as its vocabulary has it to the bytes of its text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in json.dumps(json.loads(backend.to_str()).get("decoder")):
        table = _byte_level()
        return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    return lambda token: bytes([int(token[3:-1], 16)]) if _is_fallback(token) else token.replace(_SPACE, " ").encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be seen stand for themselves, the others for 256 and on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in seen}
    others = [byte for byte in range(256) if byte not in set(seen)]
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}
