"""TSD-KD, section 3 of the paper: rank the opener, match where the teacher is surer, sharpen where the student wavers.

loss = α · indirect + direct + entropy (Eq. 13), every term on tokens of its own choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd import fused
from tsdkd.checks import (
    check_candidates,
    check_choice,
    check_count,
    check_finite,
    check_mask,
    check_positions,
    check_positive,
    check_share,
    check_weight,
)
from tsdkd.fused.reference import evaluate_logits
from tsdkd.losses import ENTROPY_TARGETS, STAGE_WEIGHTS, shared_vocabulary
from tsdkd.methods.base import prefix_of, reads_of, reads_own_token, step_counts
from tsdkd.selection import (
    AdaptiveOpener,
    Gate,
    Opener,
    Selection,
    TopEntropy,
    resolve_gate,
    resolve_selection,
    top_count,
)
from tsdkd.types import Answers, Counts, Head, LossTerms, Objective, TokenBatch

TERMS = ("indirect", "direct", "entropy")


@dataclass(frozen=True)
class TSDKD:
    """Token-selective dual knowledge distillation, with the paper's values.

    Attributes:
        indirect_weight: α of Eq. 13; 0 switches the ranking term off.
        direct_weight: weight of the gated divergence.
        entropy_weight: weight of the entropy term.
        beta: the divergence's β: 0 forward KL, 1 reverse KL (Eq. 1).
        gate: `"entropy_gap"` (Eq. 11), `"none"` (weight 1; all else off, this is GKD), `"divergence_aware"` or a
            function of `TokenStatistics`.
        gate_sharpness: γ.
        num_candidates: k, how many tokens the student proposes (section 3.1).
        opener_entropy_share: c, the share of a response's entropy that its opener holds.
        top_entropy_fraction: ρ, the share of a response's tokens whose entropy is minimised (Eq. 12).
        kd_temperature: τ of the divergence and the entropies; ranking scores are untempered.
        ranking_stage_weights: `"uniform"` (the paper) or `"teacher_mass"`, an option of ours: a stage of the ranking
            weighs what the teacher's probability of the candidates not yet placed is.
        entropy_target: `"zero"` (the paper) or `"teacher"`, an option of ours: minimise max(0, H_S − H_T).
        selection: which tokens the direct term takes: a name in `selection.SELECTIONS` or a function of
            `TokenStatistics`; `"none"` is all, the paper's.
        selection_share: the share that a named selection keeps.
        adaptive_opener: choose c by each response's difficulty (A.7, Algorithm 2): True, or an `AdaptiveOpener`.
        lmbda: the probability, drawn for each step, of the student's own answers; else the data set's (A.6: 0).

    References:
        TSD-KD section 3, A.9.
    """

    indirect_weight: float = 0.1
    direct_weight: float = 1.0
    entropy_weight: float = 1.0
    beta: float = 0.9
    gate: str | Gate | None = "entropy_gap"
    gate_sharpness: float = 1.0
    num_candidates: int = 10
    opener_entropy_share: float = 0.1
    top_entropy_fraction: float = 0.1
    kd_temperature: float = 1.0
    ranking_stage_weights: str = "uniform"
    entropy_target: str = "zero"
    selection: str | Selection | None = "none"
    selection_share: float = 0.5
    adaptive_opener: bool | AdaptiveOpener = False
    lmbda: float = 1.0

    name = "tsd_kd"
    title = "TSD-KD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge Distillation",
        "id": "2603.13260",
        "citation": (
            "@inproceedings{tsdkd2026,\n"
            "    title     = {{Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge "
            "Distillation}},\n"
            "    booktitle = {The Fourteenth International Conference on Learning Representations, {ICLR} 2026},\n"
            "    year      = 2026,\n"
            "    note      = {arXiv:2603.13260},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        for name in ("indirect_weight", "direct_weight", "entropy_weight"):
            check_weight(name, getattr(self, name))
        for name in ("beta", "opener_entropy_share", "top_entropy_fraction", "lmbda"):
            check_share(name, getattr(self, name))
        check_positive("gate_sharpness", self.gate_sharpness)
        check_positive("kd_temperature", self.kd_temperature)
        check_count("num_candidates", self.num_candidates, smallest=2)
        resolve_gate(self.gate, self.gate_sharpness)
        resolve_selection(self.selection, self.selection_share)
        check_choice("ranking_stage_weights", self.ranking_stage_weights, STAGE_WEIGHTS)
        check_choice("entropy_target", self.entropy_target, ENTROPY_TARGETS)
        if self.adaptive_opener is True:  # its history is the one thing here that changes
            object.__setattr__(self, "adaptive_opener", AdaptiveOpener(fixed_share=self.opener_entropy_share))

    @property
    def answers(self) -> Answers:
        """The student's own answers, or the data set's where `lmbda` says so."""
        return Answers(share=self.lmbda, evaluate_on="student" if self.lmbda else "dataset")

    def reads(self, length: int) -> int:
        """How many of a response's first tokens any term reads: a prefix, where the direct term is alone."""
        objective = self.objective()
        alone = objective.direct_weight and objective.opener is None and objective.top_entropy is None
        return reads_of(self.selection, self.selection_share, self.gate, length) if alone else length

    @property
    def teacher_prefix(self) -> Selection | None:
        """The longest of the openers outside of which no term reads the teacher."""
        objective = self.objective()
        if fused.reference.teacher_scope(objective) == "all" or not reads_own_token(self.gate):
            return None
        rules = [objective.selection] if objective.direct_weight else []
        rules += [objective.opener] if objective.opener is not None else []
        prefixes = [rule for rule in map(prefix_of, rules) if rule is not None]
        if not rules or len(prefixes) < len(rules):
            return None
        return lambda statistics: functools.reduce(torch.logical_or, (rule(statistics) for rule in prefixes))

    @property
    def state(self) -> AdaptiveOpener | None:
        """What changes from step to step and belongs to a checkpoint."""
        return self.adaptive_opener if isinstance(self.adaptive_opener, AdaptiveOpener) else None

    def objective(self) -> Objective:
        """The three terms, as an engine reads them."""
        ranks = self.indirect_weight != 0 and self.opener_entropy_share != 0
        sharpens = self.entropy_weight != 0 and self.top_entropy_fraction != 0
        return Objective(
            divergence="generalized_jsd",
            divergence_parameter=self.beta,
            direct_weight=self.direct_weight,
            gate=resolve_gate(self.gate, self.gate_sharpness),
            selection=resolve_selection(self.selection, self.selection_share),
            indirect_weight=self.indirect_weight,
            num_candidates=self.num_candidates,
            opener=(self.state or Opener(self.opener_entropy_share)) if ranks else None,
            ranking_stage_weights=self.ranking_stage_weights,
            entropy_weight=self.entropy_weight,
            top_entropy=TopEntropy(self.top_entropy_fraction) if sharpens else None,
            entropy_target=self.entropy_target,
            temperature=self.kd_temperature,
        )

    def counts(self, lengths: Sequence[int]) -> Counts:
        selected = sum(top_count(length, self.top_entropy_fraction) for length in lengths)
        return step_counts(lengths, resolve_selection(self.selection, self.selection_share), selected)

    def terms(self) -> dict[str, float]:
        return {term: getattr(self, f"{term}_weight") for term in TERMS}

    def only(self, term: str) -> TSDKD:
        off: dict[str, Any] = {f"{other}_weight": 0.0 for other in TERMS if other != term}
        return dataclasses.replace(self, **off)

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        objective = self.objective()
        if teacher_head is not None and objective.opener is not None:
            check_candidates(self.num_candidates, min(student_head.size, teacher_head.size))
        return fused.evaluate(objective, batch, student_head, teacher_head, counts=counts, **engine)


def tsd_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    indirect_weight: float = 0.1,
    direct_weight: float = 1.0,
    entropy_weight: float = 1.0,
    beta: float = 0.9,
    gate: str | Gate | None = "entropy_gap",
    gate_sharpness: float = 1.0,
    num_candidates: int = 10,
    opener_entropy_share: float = 0.1,
    top_entropy_fraction: float = 0.1,
    temperature: float = 1.0,
    ranking_stage_weights: str = "uniform",
    entropy_target: str = "zero",
    selection: str | Selection | None = "none",
    selection_share: float = 0.5,
    counts: Counts | None = None,
) -> LossTerms:
    """TSD-KD's objective on logits, for any training loop.

    Formula: `α · indirect + direct + entropy` (Eq. 13): the Plackett-Luce loss of the teacher's order of the student's k
    best tokens, on each response's opener; the generalized JSD weighted by sigmoid(γ (H_S − H_T)); the entropy of the
    top ρ of each response's tokens. Each term is divided by its count.

    Args:
        student_logits: `[batch, completion, vocab_s]`, the logits that predict each completion token; float32 or
            float64 are computed as they are, bf16 and fp16 in float32.
        teacher_logits: `[batch, completion, vocab_t]`; the first min(vocab_s, vocab_t) ids are the shared vocabulary.
        completion_mask: `[batch, completion]`, bool or 0/1, True on trained tokens. What stands elsewhere, NaN
            included, changes nothing.
        indirect_weight, direct_weight, entropy_weight: the terms' weights, 0 or more.
        beta: 0 is the forward KL, 1 the reverse KL.
        gate: `"entropy_gap"`, `"none"` (weight 1), `"divergence_aware"` or a function of `TokenStatistics`.
        gate_sharpness: γ, above 0.
        num_candidates: k, from 2 to the shared vocabulary.
        opener_entropy_share, top_entropy_fraction: c and ρ in [0, 1]; 0 switches the term off.
        temperature: τ of divergence and entropies; ranking scores are untempered.
        ranking_stage_weights, entropy_target, selection, selection_share: options beyond the paper, see `TSDKD`.
        counts: what the terms are divided by (tokens, selected, responses), to normalise over a larger step; default:
            this mask's own. With a selection also its count (`Counts.direct`).

    Returns:
        `LossTerms`: `.loss`, `.indirect`, `.direct`, `.entropy` (unweighted, with gradient; a term that is switched off
        is 0), the masks and the per-token diagnostics, `[batch, completion]`.

    Raises:
        ValueError: shapes, devices, mask values or options that do not fit; the message says what to do.

    Example:
        >>> import torch
        >>> student = torch.randn(2, 5, 32, requires_grad=True)
        >>> terms = tsd_kd_loss(student, torch.randn(2, 5, 32), torch.ones(2, 5))
        >>> terms.loss.backward()
        >>> student.grad.shape
        torch.Size([2, 5, 32])

    References:
        TSD-KD Eq. 3-5, 11-13; arXiv 2603.13260.
    """
    method = TSDKD(
        indirect_weight=indirect_weight,
        direct_weight=direct_weight,
        entropy_weight=entropy_weight,
        beta=beta,
        gate=gate,
        gate_sharpness=gate_sharpness,
        num_candidates=num_candidates,
        opener_entropy_share=opener_entropy_share,
        top_entropy_fraction=top_entropy_fraction,
        kd_temperature=temperature,
        ranking_stage_weights=ranking_stage_weights,
        entropy_target=entropy_target,
        selection=selection,
        selection_share=selection_share,
    )
    check_positions(student_logits, teacher_logits, "logits")
    mask = check_mask(completion_mask, student_logits.shape[:2], student_logits.device)
    student, teacher = shared_vocabulary(student_logits, teacher_logits)
    check_candidates(num_candidates, student.shape[-1])
    lengths = mask.sum(-1).tolist()
    return evaluate_logits(method.objective(), student[mask], teacher[mask], lengths, Counts.of(counts)).spread(mask)


def fused_tsd_kd_loss(
    student_hidden: torch.Tensor,
    student_head: Head | torch.nn.Linear | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: Head | torch.nn.Linear | torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    counts: Counts | None = None,
    impl: str = "auto",
    chunk_tokens: int | str = "auto",
    gradient_filter: float = 0.0,
    **options: Any,
) -> LossTerms:
    """`tsd_kd_loss` from hidden states and heads: each head is projected once, and no `[tokens, vocab]` tensor is kept.

    Args:
        student_hidden: `[batch, completion, hidden_s]`, the last hidden state that predicts each completion token.
        student_head: its weight `[vocab, hidden_s]`, an `nn.Linear` or a `Head` (bias, logit scale, soft cap).
        teacher_hidden, teacher_head: likewise; the first min(vocab_s, vocab_t) ids are the shared vocabulary.
        completion_mask: `[batch, completion]`, bool or 0/1, True on trained tokens; what stands elsewhere changes nothing
            and gets a zero gradient.
        counts: as in `tsd_kd_loss`.
        impl: `"auto"`, `"torch"`, `"triton"` (a GPU), or `"reference"` (full logits, autograd).
        chunk_tokens: tokens whose logits stand in memory at a time; `"auto"` chooses from the free memory and logs it.
        gradient_filter: as in `tsdkd.fused.evaluate`; 0 is exact.
        options: every other keyword of `tsd_kd_loss`, with its default.

    Returns:
        what `tsd_kd_loss` returns; only `.loss` carries gradient (to hidden states, head weight and bias where they
        require one), and it can be backpropagated once.

    Raises:
        ValueError: what does not fit, or a NaN or Inf in the hidden states of a trained token (which model, which token).
        RuntimeError: a second backward.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 32)
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)
        >>> terms = fused_tsd_kd_loss(hidden, head, torch.randn(2, 5, 16), torch.randn(32, 16), torch.ones(2, 5))
        >>> terms.loss.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([32, 8]))

    References:
        TSD-KD Eq. 3-5, 11-13; arXiv 2603.13260.
    """
    if "temperature" in options:
        options["kd_temperature"] = options.pop("temperature")
    known = [option.name for option in dataclasses.fields(TSDKD) if option.name not in ("adaptive_opener", "lmbda")]
    for option in options:
        if option not in known:
            named = ", ".join("temperature" if name == "kd_temperature" else name for name in known)
            raise ValueError(f"fused_tsd_kd_loss has no option {option!r}; it has: {named}.")
    method = TSDKD(**options)
    check_positions(student_hidden, teacher_hidden, "hidden")
    mask = check_mask(completion_mask, student_hidden.shape[:2], student_hidden.device)
    check_finite("student_hidden", student_hidden, mask)
    check_finite("teacher_hidden", teacher_hidden, mask)
    batch = TokenBatch(student_hidden[mask], teacher_hidden.detach()[mask], tuple(mask.sum(-1).tolist()))
    heads = Head.of(student_head), Head.of(teacher_head)
    engine: dict[str, Any] = {"impl": impl, "chunk_tokens": chunk_tokens, "gradient_filter": gradient_filter}
    return method.loss(batch, *heads, counts=Counts.of(counts), **engine).spread(mask)
