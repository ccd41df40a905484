"""A tokenizer's ids as people read them: the text of each, white space and half characters included."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")  # SentencePiece's byte fallback


@functools.cache
def _byte_of() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decoder(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(getattr(backend, "decoder", "")) if backend is not None else ""


def _raw(tokenizer: Any, token: Any, id: int) -> bytes:
    """The bytes that a token stands for."""
    if token is None:
        return b""
    text, special = str(token), id in set(getattr(tokenizer, "all_special_ids", ()))
    found = _BYTE.match(text)
    if found:
        return bytes([int(found[1], 16)])
    if not special and "ByteLevel" in _decoder(tokenizer) and all(character in _byte_of() for character in text):
        return bytes(_byte_of()[character] for character in text)
    if "▁" in text and not special:  # SentencePiece's space
        return text.replace("▁", " ").encode()
    decoded = tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return (decoded or text).encode()


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id, with its spaces; bytes that are no characters by themselves as `⟨E2 82⟩`; an id without a token as
    `⟨#5⟩`.

    Args:
        tokenizer: a transformers tokenizer, byte-level, SentencePiece or another.
        ids: below 0 is refused by the tokenizer itself.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    made = []
    for id, token in zip(ids, tokens, strict=True):
        raw = _raw(tokenizer, token, id)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = f"⟨{raw.hex(' ').upper()}⟩"
        made.append(text or f"⟨#{id}⟩")
    return made


def joined_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids together, special tokens included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
