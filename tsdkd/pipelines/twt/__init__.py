"""TwT: thinking without tokens (arXiv 2503.24198). Teachers behind an API write rationales, answers and confidences; the best
and most different are kept; a student learns them whole, then shortened with its own answers in view, then without."""

from tsdkd.pipelines.students import Inference
from tsdkd.pipelines.twt.config import Compression, Sampling, TwTConfig
from tsdkd.pipelines.twt.prompts import TASKS, Task
from tsdkd.pipelines.twt.system import pipeline, stages
from tsdkd.pipelines.twt.training import Training

__all__ = ["TASKS", "Compression", "Inference", "Sampling", "Task", "Training", "TwTConfig", "pipeline", "stages"]
