"""Heads, packed tokens and what is known of each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tsdkd.types.rollouts import ReadPlan


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
    """The trained tokens of some completions, without padding, in order.

    Args:
        student_hidden: `[tokens, hidden_s]`, the student's last hidden state that predicts each token.
        teacher_hidden: `[tokens, hidden_t]`, the teacher's, without gradient; None where no term reads the teacher.
        lengths: the trained tokens of each completion, host integers whose sum is `tokens`; 0 is allowed.
        token_ids: `[tokens]`, the tokens themselves, for a term that reads them.
        rows: a number of each completion that no batching changes, for rules that draw; None is 0, 1, 2, …
        recorded: `[tokens]` each, what was written down when the completions were (`Rollouts.recorded`).
        plan: how much of each completion the models read, where that is not all of it: what stands behind the teacher's
            part counts as not there for every term that reads the teacher, and a completion whose end the student did not
            read has its selection applied already.
    """

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor | None
    lengths: tuple[int, ...]
    token_ids: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None
    recorded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    plan: ReadPlan | None = None

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        for role, hidden in (("student", self.student_hidden), ("teacher", self.teacher_hidden)):
            if hidden is not None and (hidden.ndim != 2 or hidden.shape[0] != tokens):
                raise ValueError(
                    f"{role}_hidden has shape {tuple(hidden.shape)} but the completions hold {tokens} tokens: "
                    "expected [tokens, hidden]."
                )
        if self.plan is not None and self.plan.student != self.lengths:
            raise ValueError(
                f"the plan has the student read {self.plan.student} tokens of the completions, but the batch holds "
                f"{self.lengths}: pass the hidden states of what the plan reads."
            )

    def mask(self) -> torch.Tensor:
        """`[completions, longest]`, True where a token stands."""
        return length_mask(self.lengths, self.student_hidden.device)

    def readable(self) -> torch.Tensor | None:
        """`[completions, longest]`, True where the teacher's hidden state was read; None is everywhere."""
        if self.plan is None or self.plan.teacher == self.plan.student:
            return None
        if self.plan.pairs is not None:
            read = self.mask() & False
            for row, kept in enumerate(self.plan.pairs):
                read[row, torch.tensor(kept, dtype=torch.long, device=read.device)] = True
            return read
        return self.mask() & length_mask(self.plan.teacher, self.student_hidden.device, max(self.lengths, default=0))

    @property
    def paired(self) -> tuple[int, ...] | None:
        """`ReadPlan.paired`."""
        return None if self.plan is None else self.plan.paired

    def keep(self, index: torch.Tensor, lengths: Sequence[int]) -> TokenBatch:
        """Some of the tokens, `index` `[kept]` in order, as completions of the given lengths."""
        pick = lambda values: None if values is None else values[index]  # noqa: E731
        return TokenBatch(
            self.student_hidden[index],
            pick(self.teacher_hidden),
            tuple(lengths),
            pick(self.token_ids),
            self.rows,
            {name: values[index] for name, values in self.recorded.items()},
        )


def length_mask(lengths: Sequence[int], device: torch.device, longest: int | None = None) -> torch.Tensor:
    """`[completions, longest]`, True on each row's first `length` positions; built from host integers."""
    longest = max(lengths, default=0) if longest is None else longest
    return torch.arange(longest, device=device) < torch.tensor(list(lengths), device=device).reshape(-1, 1)


@dataclass(frozen=True)
class TokenStatistics:
    """What a gate or a selection may read of each token; all `[completions, longest]`, no gradient, 0 off the mask.

    Attributes:
        mask: True where a trained token stands.
        student_entropy, teacher_entropy: nats, at the objective's temperature (Eq. 10).
        divergence: the unweighted divergence, that of the objective's first divergence term; None for a rule that asks for
            the student's statistics only, and where no term reads the teacher's distribution (then its entropy is None too).
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
