"""The few nouns that every layer speaks: heads, token batches, statistics, counts, objectives and their results."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Head:
    """A language-model head: from a hidden state to logits.

    `logits = cap · tanh(z / cap)` with `z = scale · (hidden · weightᵀ + bias)`, cut to the first `vocab_size` ids.

    Args:
        weight: `[vocab, hidden]`.
        bias: `[vocab]` or None.
        logit_scale: the factor some families apply to their logits (Cohere, Granite, Falcon-H1, …).
        softcap: Gemma-2's soft cap on the scaled logits; None for none.
        vocab_size: keep the first ids only, normalising there (the vocabulary that two models share); None keeps all.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise ValueError(
                f"a head's weight is [vocab, hidden]; got the shape {tuple(self.weight.shape)}: with no ids in it two heads "
                "share none."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"a head's bias is [vocab]={self.weight.shape[0]}; got {tuple(self.bias.shape)}.")
        if self.vocab_size is not None and not 0 < self.vocab_size <= self.weight.shape[0]:
            raise ValueError(
                f"vocab_size={self.vocab_size} of a head with {self.weight.shape[0]} ids: cut it to 1..{self.weight.shape[0]}."
            )

    @classmethod
    def of(cls, head: Head | nn.Linear | torch.Tensor) -> Head:
        """A head from a weight `[vocab, hidden]`, an `nn.Linear` or a `Head`."""
        if isinstance(head, Head):
            return head
        if isinstance(head, torch.Tensor):
            return cls(head)
        if isinstance(head, nn.Linear):
            return cls(head.weight, head.bias)
        raise ValueError(f"a head is a weight tensor [vocab, hidden], an nn.Linear or a tsdkd.Head; got {type(head).__name__}.")

    @property
    def size(self) -> int:
        """How many ids the head scores, after the cut."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def cut(self, vocab_size: int) -> Head:
        """The same head on its first `vocab_size` ids."""
        return dataclasses.replace(self, vocab_size=vocab_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` → `[..., size]`."""
        weight = self.weight[: self.size]
        bias = None if self.bias is None else self.bias[: self.size]
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        logits = nn.functional.linear(hidden, weight, bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True)
class TokenBatch:
    """The trained tokens of some responses, without padding, in order.

    Args:
        student_hidden: `[tokens, hidden_s]`, the student's last hidden state that predicts each token.
        teacher_hidden: `[tokens, hidden_t]`, the teacher's, without gradient; None where no term reads the teacher.
        lengths: the trained tokens of each response, host integers whose sum is `tokens`; 0 is allowed.
        token_ids: `[tokens]`, the tokens themselves, for a method that reads them.
        rows: a number of each response that no batching changes, for rules that draw; None is 0, 1, 2, …
        recorded: `[tokens]` each, what was written down when the answers were (`Rollouts.recorded`).
        teacher_lengths: the first tokens of each response that `teacher_hidden` was read on; what stands behind them counts
            as not there for every term that reads the teacher. None is all.
        cut: the responses were cut to what the method `reads` of them: its selection has been applied, and no engine applies
            it again.
    """

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor | None
    lengths: tuple[int, ...]
    token_ids: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None
    recorded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher_lengths: tuple[int, ...] | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        for role, hidden in (("student", self.student_hidden), ("teacher", self.teacher_hidden)):
            if hidden is not None and (hidden.ndim != 2 or hidden.shape[0] != tokens):
                raise ValueError(
                    f"{role}_hidden has shape {tuple(hidden.shape)} but the responses hold {tokens} tokens: "
                    "expected [tokens, hidden]."
                )

    def mask(self) -> torch.Tensor:
        """`[responses, longest]`, True where a token stands."""
        return length_mask(self.lengths, self.student_hidden.device)

    def readable(self) -> torch.Tensor:
        """`[responses, longest]`, True where the teacher's hidden state was read."""
        mask = self.mask()
        if self.teacher_lengths is None:
            return mask
        ends = torch.tensor(self.teacher_lengths, device=mask.device).unsqueeze(-1)
        return mask & (torch.arange(mask.shape[1], device=mask.device) < ends)

    def keep(self, index: torch.Tensor, lengths: Sequence[int]) -> TokenBatch:
        """Some of the tokens, `index` `[kept]` in order, as responses of the given lengths."""
        pick = lambda values: None if values is None else values[index]  # noqa: E731
        return TokenBatch(
            self.student_hidden[index],
            pick(self.teacher_hidden),
            tuple(lengths),
            pick(self.token_ids),
            self.rows,
            {name: values[index] for name, values in self.recorded.items()},
        )


def length_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`[responses, longest]`, True on each row's first `length` positions; built from host integers."""
    longest = max(lengths, default=0)
    return torch.arange(longest, device=device) < torch.tensor(list(lengths), device=device).reshape(-1, 1)


@dataclass(frozen=True)
class TokenStatistics:
    """What a gate or a selection may read of each token; all `[responses, longest]`, no gradient, 0 off the mask.

    Attributes:
        mask: True where a trained token stands.
        student_entropy, teacher_entropy: nats, at the objective's temperature (Eq. 10).
        divergence: the unweighted divergence, nats; None for a rule that asks for the student's statistics only, and where
            no term reads the teacher's distribution (then its entropy is None too).
        top1_agreement: 1 where both models favour the same token; None likewise.
        scored: True where the teacher's distribution was read; its statistics are 0 elsewhere. None: on the whole mask.
        rows: `TokenBatch.rows`.
    """

    mask: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    top1_agreement: torch.Tensor | None = None
    scored: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None

    def of_student(self) -> TokenStatistics:
        """The student's statistics alone."""
        return TokenStatistics(self.mask, self.student_entropy, rows=self.rows)


@dataclass(frozen=True)
class TokenWeights:
    """What the rules decided; all `[responses, longest]`, no gradient.

    Attributes:
        gate: the direct term's weight of each token, 0 where it is not `selected`.
        opener, top_entropy: True on the tokens of the ranking and of the entropy term.
        selected: True on the tokens of the direct term.
    """

    gate: torch.Tensor
    opener: torch.Tensor
    top_entropy: torch.Tensor
    selected: torch.Tensor


@dataclass(frozen=True)
class Counts:
    """What the terms are divided by; give the whole optimizer step's (all processes), so that batching is exact.

    Attributes:
        tokens: trained tokens.
        selected: tokens that entropy minimisation selects, the sum over responses of ceil(ρ·L).
        responses: responses with at least one trained token.
        direct: what the direct term is divided by where it selects (`selection.direct_count`); None is `tokens`.
    """

    tokens: torch.Tensor | float
    selected: torch.Tensor | float
    responses: torch.Tensor | float
    direct: torch.Tensor | float | None = None

    @property
    def of_direct(self) -> torch.Tensor | float:
        """The direct term's divisor."""
        return self.tokens if self.direct is None else self.direct

    @classmethod
    def of(cls, counts: Any) -> Counts | None:
        """Counts from `Counts`, (tokens, selected, responses), the same with the direct term's, or None for none."""
        if counts is None or isinstance(counts, Counts):
            return counts
        if isinstance(counts, (tuple, list)) and len(counts) in (3, 4):
            return cls(*counts)
        raise ValueError(f"counts={counts!r}: pass tsdkd.Counts(tokens, selected, responses) or a triple of them.")


@dataclass(frozen=True)
class Objective:
    """What an engine computes: a gated divergence, a ranking on one selection, an entropy on another, a term on the
    tokens that were sampled.

    A term whose weight or selection is nothing costs nothing, and what no term reads of the teacher is not projected.

    Attributes:
        gate: maps `TokenStatistics` to weights of the direct term; None is weight 1.
        selection: maps them to the bool mask of the direct term's tokens; None is all.
        opener, top_entropy: the masks of the ranking and of the entropy term; None: the term is off.
        ranking_stage_weights: `"uniform"` or `"teacher_mass"`, see `losses.plackett_luce_nll`.
        entropy_target: `"zero"` or `"teacher"`, see `losses.entropy_penalty`.
        sampled: maps log p_S(y_t) of some tokens and the slice of them to the loss of each, `[tokens]`; it needs
            `TokenBatch.token_ids`. None: the term is off.
    """

    divergence: str = "generalized_jsd"
    divergence_parameter: float = 0.9
    direct_weight: float = 1.0
    gate: Callable[[TokenStatistics], torch.Tensor] | None = None
    selection: Callable[[TokenStatistics], torch.Tensor] | None = None
    indirect_weight: float = 0.0
    num_candidates: int = 10
    opener: Callable[[TokenStatistics], torch.Tensor] | None = None
    ranking_stage_weights: str = "uniform"
    entropy_weight: float = 0.0
    top_entropy: Callable[[TokenStatistics], torch.Tensor] | None = None
    entropy_target: str = "zero"
    sampled_weight: float = 0.0
    sampled: Callable[[torch.Tensor, slice], torch.Tensor] | None = None
    temperature: float = 1.0


@dataclass
class LossTerms:
    """The result of an objective.

    Attributes:
        loss: the weighted sum, 0-d.
        indirect, direct, entropy, sampled: the unweighted terms, 0-d, each normalised by its count; 0 where switched off.
        statistics, weights: per token, `[batch, completion]`, without gradient.
        ranking_nll: the Plackett-Luce loss of every token in `[batch, completion]`, nats; 0 off the opener.
        candidate_tau: Kendall's tau of the student's against the teacher's order of the candidates, in [-1, 1]; 0 off
            the opener.
        sums: for each logged quantity its sum and its count over these tokens (0-d, detached), so that a window of
            steps and processes is averaged exactly.
    """

    loss: torch.Tensor
    indirect: torch.Tensor
    direct: torch.Tensor
    entropy: torch.Tensor
    statistics: TokenStatistics
    weights: TokenWeights
    ranking_nll: torch.Tensor
    candidate_tau: torch.Tensor
    sampled: torch.Tensor | float = 0.0
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def spread(self, mask: torch.Tensor) -> LossTerms:
        """The per-token members laid out on another mask with as many True in the same order; 0 elsewhere."""

        def lay(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.new_zeros(mask.shape).masked_scatter_(mask, value[self.mask])
            if isinstance(value, (TokenStatistics, TokenWeights)):
                members = {member.name: lay(getattr(value, member.name)) for member in dataclasses.fields(value)}
                return dataclasses.replace(value, **members)
            return value

        per_token = ("statistics", "weights", "ranking_nll", "candidate_tau")
        return dataclasses.replace(self, **{name: lay(getattr(self, name)) for name in per_token})

    @property
    def mask(self) -> torch.Tensor:
        """True where a trained token stands."""
        return self.statistics.mask

    @property
    def opener_mask(self) -> torch.Tensor:
        """True on the tokens of the ranking term."""
        return self.weights.opener

    @property
    def top_entropy_mask(self) -> torch.Tensor:
        """True on the tokens of the entropy term."""
        return self.weights.top_entropy

    @property
    def student_entropy(self) -> torch.Tensor:
        return self.statistics.student_entropy

    @property
    def teacher_entropy(self) -> torch.Tensor | None:
        return self.statistics.teacher_entropy

    @property
    def divergence(self) -> torch.Tensor | None:
        return self.statistics.divergence

    @property
    def gate(self) -> torch.Tensor:
        return self.weights.gate


@dataclass(frozen=True)
class Replay:
    """DistiLLM's adaptive off-policy schedule and its replay buffer.

    φ, the probability of training on the student's answers, starts at `start` and grows by `increase` (to 1 at most)
    whenever an evaluation's loss is `tolerance` or more above the one before.

    Args:
        capacity: rows that the buffer holds.
        start, increase, tolerance: of φ.
        schedule: s(t), the share of fresh among the student's answers: `"decreasing"` 1 − t/T, `"constant"` 0.5,
            `"increasing"` t/T.
    """

    capacity: int = 1000
    start: float = 0.0
    increase: float = 0.1
    tolerance: float = 0.1
    schedule: str = "decreasing"


@dataclass(frozen=True)
class Answers:
    """Whose answers a method trains on.

    Args:
        writer: who writes fresh answers: `"student"`, `"mixed"` (each token from α p_T + (1 − α) p_S) or `"speculative"`
            (the student's tokens, each replaced by one of the teacher's where it is not among the teacher's top K).
        share: the probability, drawn for each optimizer step, of fresh answers; else the data set's `completion`.
        options: of the writer: `alpha`, `top_k`, and `temperature`, that of the recorded log-probabilities.
        teacher_may_write: where the data set has no `completion`, the teacher writes it, once.
        replay: an adaptive share with a replay buffer, in place of `share`.
        evaluate_on: whose answers an evaluation scores, `"student"` or `"dataset"`.
    """

    writer: str = "student"
    share: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher_may_write: bool = False
    replay: Replay | None = None
    evaluate_on: str = "student"

    @property
    def need_dataset(self) -> bool:
        """Whether answers of the data set are trained on."""
        return self.replay is not None or self.share < 1.0


@dataclass(frozen=True)
class Rollouts:
    """Answers as lists of ids: what was asked, what was written, which of it is trained on.

    Args:
        prompt_ids, completion_ids: one list a row.
        completion_mask: 1 for each completion token that is trained on (0: a tool's output, a placeholder).
        recorded: what the writer wrote down of each completion token, by name, one list a row.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completion_mask: list[list[int]]
    recorded: dict[str, list[list[float]]] = field(default_factory=dict)

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
        return Rollouts(change(self.prompt_ids), of_tokens(self.completion_ids), of_tokens(self.completion_mask), recorded)

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
