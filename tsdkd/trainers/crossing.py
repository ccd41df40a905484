"""A teacher of another tokenizer: it reads the student's completions as text, in tokens of its own, paired with theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tsdkd.checks import Problem
from tsdkd.data.alignment import Pieces, is_plain, paired_by_position, paired_by_text, same_tokens
from tsdkd.data.rendering import Rendering
from tsdkd.types import ReadPlan, Rollouts, VocabularyMap

_END = 16  # tokens of a prompt that a completion is put behind


class Crossing:
    """From rollouts in the student's ids to what the teacher reads, and to the tokens that go together.

    Args:
        student, teacher: their tokenizers.
        ends: the ids that end a completion of the student's, the tokenizer's own first.
        context: the teacher's, tokens; None: it states none.
        alignment: `"text"` or `"position"`.
        end: the id that ends a completion of the teacher's.
        beyond: the ids from which on the student and the teacher have none.

    Raises:
        ValueError: one of the two that puts spaces between its tokens.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        ends: Sequence[int],
        context: int | None,
        alignment: str,
        end: int,
        beyond: tuple[int, int],
    ) -> None:
        self.student, self.teacher = Pieces(student), Pieces(teacher)
        self.ends, self.context, self.alignment = frozenset(ends), context, alignment
        self.end = end
        for role, tokenizer in (("student", student), ("teacher", teacher)):
            if not is_plain(tokenizer):
                raise ValueError(
                    f"the {role}'s tokenizer puts spaces between tokens by itself ({type(tokenizer).__name__}): where a token "
                    "begins in the text cannot be told. Take a model with byte-level or SentencePiece tokens."
                )
        pairs = same_tokens(student, teacher, (ends[0], self.end))
        same = [(ours, theirs) for ours, theirs in pairs if ours < beyond[0] and theirs < beyond[1]]
        ours, theirs = (torch.tensor(column, dtype=torch.long) for column in zip(*same, strict=True)) if same else _nothing()
        self.vocabularies = VocabularyMap(ours, theirs, len(teacher.get_vocab()))

    @property
    def told(self) -> str:
        """What the run's table says of it."""
        shared = f"{len(self.vocabularies.teacher)} of the teacher's {self.vocabularies.tokens} tokens are the student's, too"
        return f"{shared}; tokens are paired by {self.alignment}"

    def pair(self, rollouts: Rollouts) -> tuple[Rollouts, ReadPlan]:
        """What the teacher reads, trained tokens being those that are paired, and the plan of the student's rollouts."""
        assert rollouts.teacher_prompt_ids is not None
        completions, masks, pairs = [], [], []
        for row, prompt in enumerate(rollouts.teacher_prompt_ids):
            ids, found = self._paired(prompt, rollouts.completion_ids[row], rollouts.completion_mask[row])
            completions.append(ids)
            masks.append([0] * len(ids))
            for _, theirs in found:
                masks[-1][theirs] = 1
            pairs.append(tuple(ours for ours, _ in found))
        lengths = tuple(rollouts.lengths)
        plan = ReadPlan(lengths, lengths, tuple(map(len, pairs)), pairs=tuple(pairs))
        whole = Rollouts(rollouts.teacher_prompt_ids, completions, masks, teachers=rollouts.teachers)
        return whole, plan

    def _paired(self, prompt: list[int], completion: list[int], mask: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The teacher's ids of a completion, and pairs of (the student's trained token, the teacher's token), from 0."""
        if not any(mask):
            return [self.end], []
        ended = completion[-1] in self.ends
        text, starts = self.student.starts(completion[:-1] if ended else completion)
        own = self._ids(prompt, text)
        their_text, their_starts = self.teacher.starts(own)
        if ended:
            own, starts, their_starts = [*own, self.end], [*starts, len(text)], [*their_starts, len(their_text)]
        room = len(own) if self.context is None else max(1, self.context - len(prompt))
        own, their_starts = own[:room] or [self.end], their_starts[:room]
        if self.alignment == "position":
            found = paired_by_position(completion, own)
        else:
            found = paired_by_text((text, starts), (their_text, their_starts))
        number = dict(zip((t for t, trained in enumerate(mask) if trained), range(len(mask)), strict=False))
        return own, [(number[ours], theirs) for ours, theirs in found if ours in number]

    def _ids(self, prompt: list[int], text: str) -> list[int]:
        """A text behind a prompt in the teacher's tokens: as behind the prompt's end, or, where a token would reach across,
        behind a line's."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        end = self.teacher.tokenizer.decode(prompt[-_END:], **options)
        return self.teacher.behind(text, (end, "\n"))


def _nothing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)


def end_of(tokenizer: Any, generation_config: Any, chats: bool) -> int:
    """The id that a teacher ends a completion with: of several that its generation_config names the one that its chat template
    ends a turn with, for chats, or its tokenizer's own.

    Raises:
        ValueError: neither names one.
    """
    named = getattr(generation_config, "eos_token_id", None)
    ends = list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]
    ends = ends or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if not ends:
        raise ValueError(
            "the teacher's tokenizer has no eos_token, with which the end of a completion is compared: set it and save it."
        )
    if chats and tokenizer.chat_template and len(ends) > 1:
        row = {"prompt": [{"role": "user", "content": "a"}]}
        turn = [{"role": "assistant", "content": "b"}]
        ((ids, _),) = Rendering(tokenizer, tokenizer, lambda: ends).completions([row], [turn], 64)
        return ids[-1]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]


def crossing_problems(args: Any, has_tools: bool) -> Iterator[Problem]:
    """What a teacher of another tokenizer cannot be asked for."""
    if args.teacher_writes_missing:
        yield Problem(
            "teacher_writes_missing was set, and the teacher is of another tokenizer",
            "what it writes are ids of its own",
            "have it write texts first, and pass them as completions",
        )
    if has_tools:
        yield Problem(
            "tools were given, and the teacher is of another tokenizer",
            "it would read calls and results as the student's template writes them",
            "leave tools out, or take a teacher of the student's family",
        )
