"""TRL trainers with a pluggable token-level loss."""

from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.guard import NonFiniteError
from tsdkd.trainers.token_level import TokenDistillTrainer, TSDKDTrainer
from tsdkd.trainers.tsd_kd_config import TSDKDConfig

__all__ = ["NonFiniteError", "TSDKDConfig", "TSDKDTrainer", "TokenDistillConfig", "TokenDistillTrainer"]
