"""TRL trainers with a pluggable token-level loss."""

from tsdkd.trainers.config import TokenDistillConfig, TSDKDConfig
from tsdkd.trainers.guard import NonFiniteError
from tsdkd.trainers.token_level import TokenDistillTrainer, TSDKDTrainer

__all__ = ["NonFiniteError", "TSDKDConfig", "TSDKDTrainer", "TokenDistillConfig", "TokenDistillTrainer"]
