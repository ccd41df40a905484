"""Two tokenizers' views of one text: where their tokens begin, which of them are the same, and which go together."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any

_SPACE = "\u2581"  # SentencePiece's


class Pieces:
    """The text of a tokenizer's tokens, one behind the other, as bytes: a token may hold a part of a character.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes = {i: text.encode() if isinstance(text, str) else text for i, text in texts_of(tokenizer).items()}

    def starts(self, ids: Sequence[int]) -> tuple[str, list[int | None]]:
        """The text of ids, and how many characters of it stand before each; None of a token that begins within a character.
        Bytes that are no character are U+FFFD; an unfinished one at the end is left out.

        Example:
            >>> Pieces(tokenizer).starts(tokenizer("1+2")["input_ids"])  # doctest: +SKIP
            ('1+2', [0, 1, 2])
        """
        decoder, parts, length = codecs.getincrementaldecoder("utf-8")("replace"), list[str](), 0
        starts = list[int | None]()
        for one in ids:
            begun = bool(decoder.getstate()[0])
            starts.append(None if begun else length)
            parts.append(decoder.decode(self._bytes.get(one, b"")))
            length += len(parts[-1])
        return "".join(parts), starts

    def behind(self, text: str, before: Sequence[str]) -> list[int]:
        """The ids of a text behind the first of some others from which no token reaches across; alone it would begin with a
        space in some families."""
        asked = {"add_special_tokens": False, "split_special_tokens": True}  # what is spelled is text
        for other in before:
            ids = list(self.tokenizer(other + text, **asked)["input_ids"])
            whole, starts = self.starts(ids)
            for lead in (0, 1):  # a space that the family puts before every text
                if other and whole[lead:].startswith(other) and lead + len(other) in starts:
                    return ids[starts.index(lead + len(other)) :]
        return list(self.tokenizer(text, **asked)["input_ids"])


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
        mine[ends[0]] = their[ends[1]] = ("end",)  # like nothing else
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


def texts_of(tokenizer: Any) -> dict[int, str | bytes]:
    """What each id of a tokenizer adds to a text: bytes, or a special token's name."""
    added = tokenizer.added_tokens_decoder  # their names are texts, whatever the others are written as
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    read = _reader(tokenizer)
    to_bytes = lambda token, i: token.encode() if i in added else read(token)  # noqa: E731
    return {i: token if i in special else to_bytes(token, i) for token, i in tokenizer.get_vocab().items()}


def surfaces(tokenizer: Any) -> dict[int, Any]:
    """What each id of a tokenizer stands for, as `texts_of`.

    A byte that SentencePiece falls back to is left out where an ordinary token is the same.
    """
    found, vocabulary = texts_of(tokenizer), tokenizer.get_vocab().items()
    ordinary = {found[i] for token, i in vocabulary if not _is_fallback(token)}
    return {i: found[i] for token, i in vocabulary if not _is_fallback(token) or found[i] not in ordinary}


def _is_fallback(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def is_plain(tokenizer: Any) -> bool:
    """Whether the text of tokens is their texts one behind the other: not of WordPiece and word-level tokenizers, which put
    spaces between them."""
    special = set(tokenizer.all_special_ids)
    vocabulary = sorted(tokenizer.get_vocab().items())
    words = [i for token, i in vocabulary if i not in special and token.isalnum() and token.isascii()]
    if len(words) < 2:
        return True
    first, last = words[0], words[-1]
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() for ids in ([first], [last], [first, last])]
    return texts[2] == texts[0] + texts[1]


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
