"""The options of a TSD-KD run, by their own names."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from tsdkd.checks import check_positive
from tsdkd.losses import DIVERGENCES
from tsdkd.methods import Method
from tsdkd.methods.tsd_kd import TSDKD
from tsdkd.selection import SELECTIONS
from tsdkd.trainers.config import TokenDistillConfig


@dataclass
class TSDKDConfig(TokenDistillConfig):
    """Options of `TSDKDTrainer`, with the paper's values: a field for every keyword of `tsd_kd_loss`.

    `temperature` of the loss is `kd_temperature` here; the inherited `temperature` is that of sampling.
    """

    indirect_weight: float = field(default=0.1, metadata={"help": "alpha of Eq. 13 (paper, A.9: 0.1); 0 is off."})
    direct_weight: float = field(default=1.0, metadata={"help": "Weight of the gated JSD (paper, Eq. 13: 1); 0 is off."})
    entropy_weight: float = field(default=1.0, metadata={"help": "Weight of the entropy term (paper, Eq. 13: 1); 0 is off."})
    divergence: str = field(
        default="generalized_jsd",
        metadata={"help": f"Of the direct term (paper, Eq. 1: generalized_jsd): one of {', '.join(DIVERGENCES)}."},
    )
    beta: float = field(
        default=0.9,
        metadata={
            "help": "Of generalized_jsd: 0 forward, 1 reverse KL (paper, 4.1: 'we set 0.9 for JSD as suggested by GKD'; A.5)."
        },
    )
    gate: str = field(
        default="entropy_gap",
        metadata={"help": "'entropy_gap' (paper, Eq. 11), 'none' (weight 1) or 'divergence_aware' (ours)."},
    )
    gate_sharpness: float = field(default=1.0, metadata={"help": "gamma of Eq. 11 (the paper gives none)."})
    num_candidates: int = field(default=10, metadata={"help": "k, tokens the student proposes (paper, A.3 and A.9: 10)."})
    opener_entropy_share: float = field(
        default=0.1, metadata={"help": "c, share of the completion's entropy that the opener holds (paper, A.9: 0.1)."}
    )
    top_entropy_fraction: float = field(
        default=0.1, metadata={"help": "rho, share of tokens whose entropy is minimised (paper, A.4 and A.9: 0.1)."}
    )
    kd_temperature: float = field(default=1.0, metadata={"help": "tau of the loss (paper, A.9: 'Temperature of KD 1.0')."})
    ranking_stage_weights: str = field(
        default="uniform", metadata={"help": "'uniform' (paper) or 'teacher_mass' (ours): what a stage of the ranking weighs."}
    )
    entropy_target: str = field(
        default="zero", metadata={"help": "'zero' (paper, Eq. 12) or 'teacher' (ours): minimise max(0, H_S - H_T)."}
    )
    selection: str = field(
        default="none", metadata={"help": f"Tokens of the direct term (paper: none): one of {', '.join(SELECTIONS)}."}
    )
    selection_share: float = field(default=0.5, metadata={"help": "The share that a selection keeps."})
    adaptive_opener: bool = field(
        default=False, metadata={"help": "Choose c by each completion's difficulty (paper, A.7, Algorithm 2)."}
    )
    lmbda: float = field(
        default=1.0,
        metadata={"help": "Probability of the student's completions in a step, else the data set's (paper: 1; A.6: 0)."},
    )

    def __post_init__(self) -> None:
        check_positive("kd_temperature", self.kd_temperature)
        super().__post_init__()

    def build_method(self) -> Method:
        if self.method != "tsd_kd" or self.method_options:
            raise ValueError(
                f"TSDKDConfig is TSD-KD, its options are fields; got method={self.method!r}, "
                f"method_options={self.method_options!r}. For another method use TokenDistillConfig."
            )
        return TSDKD(**{option.name: getattr(self, option.name) for option in fields(TSDKD)})
