"""QR-Distill: a teacher's paths in six styles, the right and sound ones, a router that says which teaches which of several
students, and students that teach each other."""

from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.mutual import Mutual, MutualResult, aligned
from tsdkd.pipelines.qr_distill.objective import Objective, qr_objective
from tsdkd.pipelines.qr_distill.options import QRTraining
from tsdkd.pipelines.qr_distill.routing import Router, Routing, gumbel_on_off, routing_entropy, temperature_at
from tsdkd.pipelines.qr_distill.system import pipeline, stages
from tsdkd.pipelines.qr_distill.trainer import QRDistillTrainer

__all__ = [
    "Mutual",
    "MutualResult",
    "Objective",
    "QRConfig",
    "QRDistillTrainer",
    "QRTraining",
    "Router",
    "Routing",
    "aligned",
    "gumbel_on_off",
    "pipeline",
    "qr_objective",
    "routing_entropy",
    "stages",
    "temperature_at",
]
