"""QR-Distill's stages in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tsdkd.pipelines.pipeline import Pipeline
from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.learning import Encoded, Students, tested
from tsdkd.pipelines.qr_distill.paths import Correct, Judged, Paths
from tsdkd.pipelines.stage import Stage
from tsdkd.pipelines.tested import Scores


def stages(config: QRConfig) -> list[Stage]:
    """Paths, the right ones, the sound ones, their encodings, students, what those answer."""
    paths = Paths(config)
    correct = Correct(config, paths)
    judged = Judged(config, correct)
    encoded = Encoded(config, judged)
    students = Students(config, judged, encoded)
    made: list[Stage] = [paths, correct, judged, encoded, students]
    if config.test is not None:
        answered = tested(config, students)
        made += [answered, Scores(answered, "qr-distill", config.seed, **config.training.settings)]
    return made


def pipeline(config: QRConfig, say: Callable[[str], None] = print) -> Pipeline:
    """The pipeline of a configuration."""
    return Pipeline("qr-distill", stages(config), Path(config.output_dir), say)
