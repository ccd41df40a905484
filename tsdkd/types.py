"""The few nouns that every layer speaks: heads, token batches, statistics, counts, objectives and their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
        teacher_hidden: `[tokens, hidden_t]`, the teacher's, without gradient.
        lengths: the trained tokens of each response, host integers whose sum is `tokens`; 0 is allowed.
    """

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        for role, hidden in (("student", self.student_hidden), ("teacher", self.teacher_hidden)):
            if hidden.ndim != 2 or hidden.shape[0] != tokens:
                raise ValueError(
                    f"{role}_hidden has shape {tuple(hidden.shape)} but the responses hold {tokens} tokens: "
                    "expected [tokens, hidden]."
                )

    def mask(self) -> torch.Tensor:
        """`[responses, longest]`, True where a token stands."""
        return length_mask(self.lengths, self.student_hidden.device)


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
        divergence: the unweighted divergence, nats; None for a rule that asks for the student's statistics only.
        top1_agreement: 1 where both models favour the same token; None likewise.
    """

    mask: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    top1_agreement: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenWeights:
    """What the rules decided; all `[responses, longest]`, no gradient."""

    gate: torch.Tensor
    opener: torch.Tensor
    top_entropy: torch.Tensor


@dataclass(frozen=True)
class Counts:
    """What the terms are divided by; give the whole optimizer step's (all processes), so that batching is exact.

    Attributes:
        tokens: trained tokens.
        selected: tokens that entropy minimisation selects, the sum over responses of ceil(ρ·L).
        responses: responses with at least one trained token.
    """

    tokens: torch.Tensor | float
    selected: torch.Tensor | float
    responses: torch.Tensor | float

    @classmethod
    def of(cls, counts: Any) -> Counts | None:
        """Counts from `Counts`, a triple (tokens, selected, responses), or None for none."""
        if counts is None or isinstance(counts, Counts):
            return counts
        if isinstance(counts, (tuple, list)) and len(counts) == 3:
            return cls(*counts)
        raise ValueError(f"counts={counts!r}: pass tsdkd.Counts(tokens, selected, responses) or a triple of them.")


@dataclass(frozen=True)
class Objective:
    """What an engine computes: a gated divergence, a ranking on one selection, an entropy on another.

    A term whose weight or selection is nothing costs nothing. `gate` maps `TokenStatistics` to weights of the direct
    term (None: weight 1); `opener` and `top_entropy` map them to bool masks (None: the term is off).
    """

    divergence: str = "generalized_jsd"
    divergence_parameter: float = 0.9
    direct_weight: float = 1.0
    gate: Callable[[TokenStatistics], torch.Tensor] | None = None
    indirect_weight: float = 0.0
    num_candidates: int = 10
    opener: Callable[[TokenStatistics], torch.Tensor] | None = None
    entropy_weight: float = 0.0
    top_entropy: Callable[[TokenStatistics], torch.Tensor] | None = None
    temperature: float = 1.0


@dataclass
class LossTerms:
    """The result of an objective.

    Attributes:
        loss: the weighted sum, 0-d.
        indirect, direct, entropy: the unweighted terms, 0-d, each normalised by its count; 0 where switched off.
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
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

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
class Rollouts:
    """Answers as lists of ids: what was asked, what was written, which of it is trained on.

    Args:
        prompt_ids, completion_ids: one list a row.
        completion_mask: 1 for each completion token that is trained on (0: a tool's output, a placeholder).
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completion_mask: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Trained tokens of each row, L in the equations."""
        return [sum(mask) for mask in self.completion_mask]

    def rows(self, index: Sequence[int]) -> Rollouts:
        """Some of the rows, in the given order."""
        return Rollouts(
            *([column[i] for i in index] for column in (self.prompt_ids, self.completion_ids, self.completion_mask))
        )

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
