"""Tokens of completions that no term is trained on: templates' marks, where student and teacher mean other things by them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def ignored_ids(asked: Sequence[str | int] | None, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """The ids of tokens that are named, or numbered.

    Args:
        asked: `ignore_tokens`; a text is one token of the tokenizer's, `special` all its special ones but those that end.
        vocab_size: the ids that both models have.

    Raises:
        ValueError: a text that is no token, with the closest, or an id that is none.

    References:
        Revisiting On-Policy Distillation (arXiv 2603.25562), special-token masking.
    """
    vocabulary, made = tokenizer.get_vocab(), set[int]()
    for one in asked or ():
        if one == "special":
            made |= {i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id}
        elif isinstance(one, str) and one in vocabulary:
            made.add(vocabulary[one])
        elif isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocab_size:
            made.add(one)
        else:
            near = difflib.get_close_matches(str(one), vocabulary, n=3)
            meant = f" (close ones: {', '.join(map(repr, near))})" if near else ""
            raise ValueError(
                f"ignore_tokens: {one!r} is no token of the student's tokenizer{meant}: pass tokens by their name as the "
                f"vocabulary has it, ids below {vocab_size}, or 'special'."
            )
    return frozenset(made)


def without(ignored: frozenset[int], completions: list[list[int]], masks: list[list[int]]) -> list[list[int]]:
    """The masks of what is trained on, without some ids."""
    if not ignored:
        return masks
    return [
        [int(kept and i not in ignored) for i, kept in zip(ids, mask, strict=True)]
        for ids, mask in zip(completions, masks, strict=True)
    ]
