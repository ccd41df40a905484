"""Whose completions are trained on, the completions themselves, and how much of them is read."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PER_TOKEN = "token_type_ids"  # how names of what is there for each token end


@dataclass(frozen=True)
class Replay:
    """DistiLLM's adaptive off-policy schedule and its replay buffer.

    φ, the probability of training on the student's completions, starts at `start` and grows by `increase` (to 1 at most)
    whenever an evaluation's loss is `tolerance` or more above the one before.

    Args:
        capacity: rows that the buffer holds.
        start, increase, tolerance: of φ.
        schedule: s(t), the share of fresh among the student's completions: `"decreasing"` 1 − t/T, `"constant"` 0.5,
            `"increasing"` t/T.
    """

    capacity: int = 1000
    start: float = 0.0
    increase: float = 0.1
    tolerance: float = 0.1
    schedule: str = "decreasing"


@dataclass(frozen=True)
class RolloutSpec:
    """Whose completions a method trains on.

    Args:
        writer: who writes fresh completions: `"student"`, `"mixed"` (each token from α p_T + (1 − α) p_S), `"speculative"`
            (the student's tokens, each replaced by one of the teacher's where it is not among the teacher's top K), or a
            rule of your own, a function of both models' logits `[rows, vocab]` that gives the next ids `[rows]` and a
            dict of what is recorded of them.
        share: the probability, drawn for each optimizer step, of fresh completions; else the data set's `completion`.
        options: of the writer: `alpha`, `top_k`, and `temperature`, that of the recorded log-probabilities.
        teacher_may_write: where the data set has no `completion`, the teacher writes it, once.
        replay: an adaptive share with a replay buffer, in place of `share`.
        evaluate_on: whose completions an evaluation reads, `"student"` or `"dataset"`.
    """

    writer: str | Callable = "student"
    share: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher_may_write: bool = False
    replay: Replay | None = None
    evaluate_on: str = "student"

    @property
    def need_dataset(self) -> bool:
        """Whether completions of the data set are trained on."""
        return self.replay is not None or self.share < 1.0


@dataclass(frozen=True)
class ReadPlan:
    """How many of each completion's first trained tokens each model reads: what no term reads is not run through it.

    Args:
        lengths: the trained tokens of each completion.
        student, teacher: the first of them that each model reads; the teacher's are never more than the student's.
        rule: a selection on the student's statistics that keeps first tokens, outside of which no term reads the teacher:
            then the student reads first, and the teacher the prefix alone.
        temperature: τ of the statistics that the rule reads.
        pairs: of each completion the trained tokens, counted from 0, at which the teacher was read; None: the first ones. A
            teacher of another tokenizer is read where both begin a token at the same place of the text.
    """

    lengths: tuple[int, ...]
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    rule: Callable | None = None
    temperature: float = 1.0
    pairs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.pairs is not None and tuple(map(len, self.pairs)) != self.teacher:
            raise ValueError(f"the plan has the teacher read {self.teacher} tokens, and names {list(map(len, self.pairs))}.")
        for length, student, teacher in zip(self.lengths, self.student, self.teacher, strict=True):
            if not 0 <= teacher <= student <= length:
                raise ValueError(
                    f"of a completion of {length} tokens the student reads {student} and the teacher {teacher}: the teacher "
                    "reads no more than the student, and the student no more than there is."
                )

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> ReadPlan:
        """Both models read everything."""
        return cls(tuple(lengths), tuple(lengths), tuple(lengths))

    @property
    def is_cut(self) -> bool:
        """Whether the student does not read every completion to its end."""
        return self.student != self.lengths

    @property
    def paired(self) -> tuple[int, ...] | None:
        """How many tokens of each completion have a state of a teacher of another tokenizer; None of the same."""
        return None if self.pairs is None else self.teacher

    def rows(self, index: Sequence[int]) -> ReadPlan:
        """The plan of some of the completions."""
        some = lambda column: tuple(column[row] for row in index)  # noqa: E731
        pairs = None if self.pairs is None else some(self.pairs)
        return dataclasses.replace(
            self, lengths=some(self.lengths), student=some(self.student), teacher=some(self.teacher), pairs=pairs
        )

    def with_teacher(self, teacher: Sequence[int]) -> ReadPlan:
        """The same plan once the rule has been asked."""
        return ReadPlan(self.lengths, self.student, tuple(teacher))


@dataclass(frozen=True)
class Rollouts:
    """Prompts and completions as lists of ids: what was asked, what was written, which of it is trained on.

    Args:
        prompt_ids, completion_ids: one list a row.
        completion_mask: 1 for each completion token that is trained on (0: a tool's output, a placeholder).
        recorded: what the writer wrote down of each completion token, by name, one list a row.
        teacher_prompt_ids: what the teacher reads in place of the prompts; None: the prompts.
        teachers: the name of each row's teacher, where there are several.
        vision: what both models read of each row beside its ids (`pixel_values`, `image_grid_thw`, `token_type_ids`, …), as a
            processor gives it for the row alone; None: texts alone.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completion_mask: list[list[int]]
    recorded: dict[str, list[list[float]]] = field(default_factory=dict)
    teacher_prompt_ids: list[list[int]] | None = None
    teachers: list[str] | None = None
    vision: list[dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Trained tokens of each row, L in the equations."""
        return [sum(mask) for mask in self.completion_mask]

    def rows(self, index: Sequence[int]) -> Rollouts:
        """Some of the rows, in the given order."""
        return self._each(lambda column: [column[i] for i in index])

    def _each(self, change: Callable[[list], list], change_completion: Callable[[list], list] | None = None) -> Rollouts:
        """Every column changed alike; those of completion tokens otherwise, where said."""
        of_tokens = change_completion or change
        recorded = {name: of_tokens(column) for name, column in self.recorded.items()}
        theirs = None if self.teacher_prompt_ids is None else change(self.teacher_prompt_ids)
        columns = of_tokens(self.completion_ids), of_tokens(self.completion_mask)
        more = self.teachers and change(self.teachers), self.vision and change(self.vision)
        return Rollouts(change(self.prompt_ids), *columns, recorded, theirs, *more)

    @property
    def for_teacher(self) -> Rollouts:
        """The same completions behind what the teacher reads."""
        if self.teacher_prompt_ids is None:
            return self
        written = self.completion_ids, self.completion_mask, self.recorded
        return Rollouts(self.teacher_prompt_ids, *written, teachers=self.teachers, vision=self.vision)

    def first(self, trained: Sequence[int]) -> Rollouts:
        """Each completion up to its first `trained` trained tokens."""
        ends = []
        for mask, wanted in zip(self.completion_mask, trained, strict=True):
            reached = list(itertools.accumulate(mask))
            ends.append(bisect.bisect_left(reached, wanted) + 1 if wanted else 0)
        cut = lambda column: [values[:end] for values, end in zip(column, ends, strict=True)]  # noqa: E731
        return self._each(lambda column: column, cut)

    def trained(self, column: list[list]) -> list:
        """What stands at the trained tokens of a column of completion tokens, row by row in one list."""
        pairs = zip(column, self.completion_mask, strict=True)
        return [value for values, mask in pairs for value, kept in zip(values, mask, strict=True) if kept]

    def padded(self, pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Right-padded `input_ids` and `attention_mask`, `[rows, longest]`, and where to read the hidden states.

        Padding stands on the right, so positions count from the first prompt token for every family of models, and a
        causal model's hidden states do not depend on it.

        Returns:
            ids, mask, and a flat index into `[rows · longest]` of the positions that predict the trained tokens, row by
            row, `[sum(lengths)]`.
        """
        sequences = [prompt + completion for prompt, completion in zip(self.prompt_ids, self.completion_ids, strict=True)]
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
        mask = torch.zeros((len(sequences), longest), dtype=torch.long)
        index: list[int] = []
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
            first = row * longest + len(self.prompt_ids[row]) - 1
            index += [first + t for t, trained in enumerate(self.completion_mask[row]) if trained]
        where = torch.tensor(index, dtype=torch.long)
        return ids.to(device), mask.to(device), where.to(device)

    def in_one_row(self, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows one behind the other, without padding: what transformers keeps apart by positions that begin anew.

        Returns:
            `input_ids` and `position_ids`, `[1, all tokens]`, and a flat index as `padded` gives it.
        """
        ids: list[int] = []
        positions: list[int] = []
        index: list[int] = []
        for prompt, completion, mask in zip(self.prompt_ids, self.completion_ids, self.completion_mask, strict=True):
            first = len(ids) + len(prompt) - 1
            index += [first + t for t, trained in enumerate(mask) if trained]
            positions += range(len(prompt) + len(completion))
            ids += [*prompt, *completion]
        one = lambda column: torch.tensor([column], dtype=torch.long, device=device)  # noqa: E731
        return one(ids), one(positions), torch.tensor(index, dtype=torch.long, device=device)

    def beside(self, device: Any) -> dict[str, torch.Tensor]:
        """What a forward pass of these rows takes beside `padded`: every row's, one behind the other along the first dimension.

        What is there for each token is laid out as the ids are, 0 on the completion; rows of unlike shapes, of families that
        pad their images, are filled with zeros.
        """
        names = dict.fromkeys(name for row in self.vision or () for name in row)
        longest = max((len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)), default=0)
        made = {}
        for name in names:
            parts = [row.get(name) for row in self.vision or ()]
            if name.endswith(PER_TOKEN):
                kinds = torch.zeros(len(parts), longest, dtype=torch.long)
                for row, part in enumerate(parts):
                    if part is not None:
                        kinds[row, : part.shape[-1]] = part.reshape(-1)
                made[name] = kinds.to(device)
            else:
                made[name] = _stacked([part for part in parts if part is not None]).to(device)
        return made


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors along their first dimension, the others filled with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == shape for part in parts):
        return torch.cat(parts)
    filled = [part.new_zeros(part.shape[0], *shape) for part in parts]
    for whole, part in zip(filled, parts, strict=True):
        whole[tuple(slice(size) for size in part.shape)] = part
    return torch.cat(filled)
