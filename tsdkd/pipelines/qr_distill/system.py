"""QR-Distill's stages in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tsdkd.pipelines.pipeline import Pipeline
from tsdkd.pipelines.qr_distill.baselines import baseline
from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.learning import Encoded, Students, tested
from tsdkd.pipelines.qr_distill.paths import Correct, Judged, Paths
from tsdkd.pipelines.stage import Stage
from tsdkd.pipelines.tested import Scores


def stages(config: QRConfig) -> list[Stage]:
    """Paths, the right ones, the sound ones, their encodings where a router reads them, students, what those answer."""
    if config.recipe == "qr_distill":
        paths = Paths(config)
        correct = Correct(config, [paths])
        made: list[Stage] = [paths, correct, Judged(config, correct)]
    else:
        made = baseline(config)
    taught = made[-1]
    encoded = Encoded(config, taught) if config.taught.routing == "learned" else None
    students = Students(config, taught, encoded)
    made += [students] if encoded is None else [encoded, students]
    if config.test is not None:
        answered = tested(config, students)
        settings = {"recipe": config.recipe, **config.taught.settings}
        made += [answered, Scores(answered, "qr-distill", config.seed, **settings)]
    return made


def pipeline(config: QRConfig, say: Callable[[str], None] = print) -> Pipeline:
    """The pipeline of a configuration."""
    return Pipeline("qr-distill", stages(config), Path(config.output_dir), say)
