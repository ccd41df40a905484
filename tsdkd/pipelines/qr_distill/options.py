"""How QR-Distill's students, router and projections are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tsdkd.checks import check_choice, check_count, check_positive, check_share, check_weight
from tsdkd.pipelines.qr_distill.mutual import ALIGNMENTS
from tsdkd.pipelines.qr_distill.objective import ENTROPY_WEIGHT, MUTUAL_WEIGHT

ROUTING = ("learned", "random", "all")


@dataclass(frozen=True)
class QRTraining:
    """How students, router and projections are trained. The paper's where it says; else the authors' code's.

    Args:
        learning_rates: of each student (3.2: 5e-6 Mistral, 2e-4 Gemma).
        auxiliary_learning_rate: of router and projections.
        decay, warmup_steps: of all rates: `linear`, down to 0 at the last step, as transformers' trainer has it, or `constant`;
            after so many steps of rising.
        max_grad_norm: of each student's gradient, and of router's and projections' together, to which it is cut; 0 cuts none.
        epochs, batch_size: over the paths; paths a step, of all processes together.
        max_steps: as many steps in place of the epochs'; None: `epochs`.
        micro_batch: paths at a time on a process; a step's values depend on it by dropout alone.
        max_length: prompt and path, tokens; longer paths are left out and counted.
        lora_r: rank of the adapters, merged at the end; 0 trains all weights.
        four_bit: the students' own weights in 4 bits under the adapters (QLoRA, 3.2: NF4, quantised twice), by bitsandbytes.
        entropy_weight, mutual_weight: λ1 and λ2 of Eq. 9.
        temperature, last_temperature, schedule: of the gates, see `temperature_at`.
        shared, alignment, normalise: see `Mutual`.
        per_student: see `routing_entropy`.
        routing: `learned`; `all`, every path to every student (without routing); `random`, a control: each gate on with `rate`.
        rate: of `random`, one for all students or one each.
    """

    learning_rates: tuple[float, ...] = (5e-6, 2e-4)
    auxiliary_learning_rate: float = 1e-4
    decay: str = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    epochs: int = 3
    batch_size: int = 8
    max_steps: int | None = None
    micro_batch: int = 8
    max_length: int = 768
    lora_r: int = 32
    four_bit: bool = False
    entropy_weight: float = ENTROPY_WEIGHT
    mutual_weight: float = MUTUAL_WEIGHT
    temperature: float = 1.0
    last_temperature: float = 0.1
    schedule: str = "exponential"
    shared: int = 256
    alignment: str = "characters"
    normalise: bool = False
    per_student: bool = False
    routing: str = "learned"
    rate: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        rates = self.learning_rates if isinstance(self.learning_rates, (list, tuple)) else (self.learning_rates,)
        object.__setattr__(self, "learning_rates", tuple(rates))
        for number, value in enumerate(self.learning_rates):
            check_positive(f"learning_rates[{number}]", value)
        for name in ("auxiliary_learning_rate", "temperature", "last_temperature"):
            check_positive(name, getattr(self, name))
        for name in (
            "epochs",
            "batch_size",
            "micro_batch",
            "max_length",
            "shared",
            *(("max_steps",) if self.max_steps else ()),
        ):
            check_count(name, getattr(self, name))
        check_count("lora_r", self.lora_r, smallest=0)
        check_count("warmup_steps", self.warmup_steps, smallest=0)
        check_choice("decay", self.decay, ("linear", "constant"))
        check_weight("max_grad_norm", self.max_grad_norm)
        check_weight("entropy_weight", self.entropy_weight)
        check_weight("mutual_weight", self.mutual_weight)
        check_choice("schedule", self.schedule, ("exponential", "linear", "constant"))
        check_choice("alignment", self.alignment, ALIGNMENTS)
        check_choice("routing", self.routing, ROUTING)
        object.__setattr__(self, "rate", tuple(self.rate) if isinstance(self.rate, (list, tuple)) else self.rate)
        for value in self.rate if isinstance(self.rate, tuple) else (self.rate,):
            check_share("rate", value)
        for name in ("normalise", "per_student", "four_bit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.four_bit and not self.lora_r:
            raise ValueError("four_bit: true trains adapters on weights that stay as they are: give a lora_r above 0 (32).")

    def rate_at(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied with at a step, from 0, of so many.

        Example:
            >>> [QRTraining(warmup_steps=2).rate_at(step, 6) for step in range(6)]
            [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 if self.decay == "constant" else (steps - step) / max(1, steps - self.warmup_steps)

    @property
    def settings(self) -> dict[str, Any]:
        """What trained students depend on."""
        return {name: value for name, value in asdict(self).items() if name != "micro_batch"}
