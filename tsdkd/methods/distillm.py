"""DistiLLM (Ko et al. 2024): skew divergences, an adaptive share of the student's completions, and a replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tsdkd.checks import check_choice, check_count, check_share, check_weight
from tsdkd.losses import resolve_divergence
from tsdkd.methods.base import DivergenceMethod, State
from tsdkd.types import Divergence, Replay, RolloutSpec

DIVERGENCES = ("skew_forward_kl", "skew_reverse_kl")
SCHEDULES = ("decreasing", "constant", "increasing")


@dataclass(frozen=True, kw_only=True)
class DistiLLM(DivergenceMethod):
    """Skew KL on completions of the data set and, as the student gets worse on them, more and more on its own.

    loss = KL(p_T ‖ α p_T + (1 − α) p_S), or the reverse, KL(p_S ‖ (1 − α) p_T + α p_S), the mean over tokens.

    Attributes:
        divergence: `"skew_reverse_kl"`, `"skew_forward_kl"`, or a function of two logit tensors.
        alpha: α, 0.1 in the paper.
        replay_capacity: rows of the replay buffer, 1000 in the released code.
        initial_share: φ at the start, the probability of the student's completions.
        share_increase: what φ grows by when an evaluation's loss is worse, to 1 at most.
        loss_tolerance: how much worse, nats.
        schedule: s(t), the share of fresh completions among the student's: `"decreasing"` (1 − t/T, the released default),
            `"constant"` (0.5) or `"increasing"` (t/T).

    References:
        Ko et al. 2024, sections 3.1 and 3.2, Algorithm 1; arXiv 2402.03898.
    """

    divergence: str | Callable = "skew_reverse_kl"
    alpha: float = 0.1
    replay_capacity: int = 1000
    initial_share: float = 0.0
    share_increase: float = 0.1
    loss_tolerance: float = 0.1
    schedule: str = "decreasing"

    name = "distillm"
    title = "DistiLLM"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "DistiLLM: Towards Streamlined Distillation for Large Language Models",
        "id": "2402.03898",
        "citation": (
            "@inproceedings{ko2024distillm,\n"
            "    title     = {{DistiLLM: Towards Streamlined Distillation for Large Language Models}},\n"
            "    author    = {Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young},\n"
            "    booktitle = {Forty-first International Conference on Machine Learning, {ICML} 2024},\n"
            "    year      = 2024,\n"
            "    note      = {arXiv:2402.03898},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        if isinstance(self.divergence, str):
            check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("alpha", "initial_share", "share_increase"):
            check_share(name, getattr(self, name))
        check_weight("loss_tolerance", self.loss_tolerance)
        check_count("replay_capacity", self.replay_capacity)
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        replay = Replay(self.replay_capacity, self.initial_share, self.share_increase, self.loss_tolerance, self.schedule)
        return RolloutSpec(replay=replay, evaluate_on="dataset")

    def divergence_of(self, state: State | None = None) -> Divergence:
        return resolve_divergence(self.divergence, alpha=self.alpha)
