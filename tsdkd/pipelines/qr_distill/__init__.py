"""QR-Distill's mathematics (quality-filtered routing with cooperative distillation): which path teaches which student, and what
students learn from each other. The stages and the trainer around it are not here yet."""

from tsdkd.pipelines.qr_distill.mutual import Mutual, MutualResult, aligned
from tsdkd.pipelines.qr_distill.objective import Objective, qr_objective
from tsdkd.pipelines.qr_distill.routing import Router, Routing, gumbel_on_off, routing_entropy, temperature_at

__all__ = [
    "Mutual",
    "MutualResult",
    "Objective",
    "Router",
    "Routing",
    "aligned",
    "gumbel_on_off",
    "qr_objective",
    "routing_entropy",
    "temperature_at",
]
