"""TSD-KD, section 3 of the paper: rank the opener, match where the teacher is surer, sharpen where the student wavers.

loss = α · indirect + direct + entropy (Eq. 13), every term on tokens of its own choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.checks import (
    check_candidates,
    check_count,
    check_finite,
    check_mask,
    check_positions,
    check_positive,
    check_share,
    check_weight,
)
from tsdkd.fused import check_divergence_once, check_objective
from tsdkd.fused.reference import evaluate_logits
from tsdkd.losses import resolve_divergence, shared_vocabulary
from tsdkd.methods.base import Method, State, Summary, by_share
from tsdkd.selection import (
    AdaptiveOpener,
    Gate,
    Opener,
    OpenerHistory,
    Selection,
    TopEntropy,
    resolve_gate,
    resolve_selection,
)
from tsdkd.types import (
    Counts,
    DivergenceTerm,
    EntropyTerm,
    Head,
    LossTerms,
    Objective,
    RankingTerm,
    RolloutSpec,
    TokenBatch,
    TokenStatistics,
)


@dataclass(frozen=True)
class TSDKD(Method):
    """Token-selective dual knowledge distillation, with the paper's values.

    Attributes:
        indirect_weight: α of Eq. 13; 0 switches the ranking term off.
        direct_weight: weight of the gated divergence.
        entropy_weight: weight of the entropy term.
        divergence: of the direct term, `"generalized_jsd"` (Eq. 1), another name in `losses.DIVERGENCES`, or a function of
            the student's and the teacher's logits, `[tokens, vocab]` each and divided by τ, to `[tokens]`.
        beta: β of the generalized JSD: 0 forward KL, 1 reverse KL (Eq. 1); not read by a divergence without one.
        gate: `"entropy_gap"` (Eq. 11), `"none"` (weight 1; all else off, this is GKD), `"divergence_aware"` or a
            function of `TokenStatistics`.
        gate_sharpness: γ.
        num_candidates: k, how many tokens the student proposes (section 3.1).
        opener_entropy_share: c, the share of a completion's entropy that its opener holds.
        top_entropy_fraction: ρ, the share of a completion's tokens whose entropy is minimised (Eq. 12).
        kd_temperature: τ of the divergence and the entropies; ranking scores are untempered.
        ranking_stage_weights: `"uniform"` (the paper) or `"teacher_mass"`, an option of ours: a stage of the ranking
            weighs what the teacher's probability of the candidates not yet placed is.
        entropy_target: `"zero"` (the paper) or `"teacher"`, an option of ours: minimise max(0, H_S − H_T).
        selection: which tokens the direct term takes: a name in `selection.SELECTIONS` or a function of
            `TokenStatistics`; `"none"` is all, the paper's.
        selection_share: the share that a named selection keeps.
        adaptive_opener: choose c by each completion's difficulty (A.7, Algorithm 2): True, or an `AdaptiveOpener`.
        lmbda: the probability, drawn for each step, of the student's own completions; else the data set's (A.6: 0).

    References:
        TSD-KD section 3, A.9.
    """

    indirect_weight: float = 0.1
    direct_weight: float = 1.0
    entropy_weight: float = 1.0
    divergence: str | Callable = "generalized_jsd"
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
        if not isinstance(self.adaptive_opener, (bool, AdaptiveOpener)):
            raise ValueError(f"adaptive_opener={self.adaptive_opener!r}: pass True, False or a tsdkd.AdaptiveOpener.")
        check_objective(self.objective())

    @property
    def rollouts(self) -> RolloutSpec:
        """The student's own completions, or the data set's where `lmbda` says so."""
        return by_share(self.lmbda)

    def start(self, max_steps: int | None) -> State:
        """The adaptive opener's history, where there is one."""
        if not self.adaptive_opener:
            return State()
        chosen = self.adaptive_opener
        return OpenerState(AdaptiveOpener(fixed_share=self.opener_entropy_share) if chosen is True else chosen)

    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        """The three terms of Eq. 13."""
        state = self.start(None) if state is None else state
        opener = state.history if isinstance(state, OpenerState) else Opener(self.opener_entropy_share)
        indirect = RankingTerm(
            name="indirect",
            weight=self.indirect_weight if self.opener_entropy_share else 0.0,
            selection=opener,
            num_candidates=self.num_candidates,
            stage_weights=self.ranking_stage_weights,
        )
        direct = DivergenceTerm(
            name="direct",
            weight=self.direct_weight,
            divergence=resolve_divergence(self.divergence, beta=self.beta),
            gate=resolve_gate(self.gate, self.gate_sharpness),
            selection=resolve_selection(self.selection, self.selection_share),
        )
        entropy = EntropyTerm(
            name="entropy",
            weight=self.entropy_weight if self.top_entropy_fraction else 0.0,
            selection=TopEntropy(self.top_entropy_fraction),
            target=self.entropy_target,
        )
        return Objective((indirect, direct, entropy), self.kd_temperature)


class OpenerState(State):
    """The adaptive opener's history (A.7, Algorithm 2)."""

    def __init__(self, options: AdaptiveOpener) -> None:
        self.history = OpenerHistory(options)

    def observe(self, statistics: TokenStatistics) -> torch.Tensor:
        return self.history.difficulty(statistics).unsqueeze(-1)

    def after_step(self, summary: Summary) -> None:
        self.history.append([difficulty for (difficulty,) in summary.observed])

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)


def tsd_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    indirect_weight: float = 0.1,
    direct_weight: float = 1.0,
    entropy_weight: float = 1.0,
    divergence: str | Callable = "generalized_jsd",
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
    best tokens, on each completion's opener; the generalized JSD weighted by sigmoid(γ (H_S − H_T)); the entropy of the
    top ρ of each completion's tokens. Each term is divided by its count.

    Args:
        student_logits: `[batch, completion, vocab_s]`, the logits that predict each completion token; float32 or
            float64 are computed as they are, bf16 and fp16 in float32.
        teacher_logits: `[batch, completion, vocab_t]`; the first min(vocab_s, vocab_t) ids are the shared vocabulary.
        completion_mask: `[batch, completion]`, bool or 0/1, True on trained tokens. What stands elsewhere, NaN
            included, changes nothing.
        indirect_weight, direct_weight, entropy_weight: the terms' weights, 0 or more.
        divergence: of the direct term: a name in `losses.DIVERGENCES`, or a function of student and teacher logits, `[tokens,
            vocab]` each, shared vocabulary, divided by τ, to nats `[tokens]`.
        beta: of the generalized JSD, 0 is the forward KL, 1 the reverse KL.
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
        divergence=divergence,
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
    objective = method.objective()
    assert objective.divergence is not None
    check_divergence_once(objective.divergence, student.shape[-1], student.device)
    lengths = mask.sum(-1).tolist()
    return evaluate_logits(objective, student[mask], teacher[mask], lengths, Counts.from_any(counts)).spread(mask)


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
    return method.loss(batch, *heads, counts=Counts.from_any(counts), **engine).spread(mask)
