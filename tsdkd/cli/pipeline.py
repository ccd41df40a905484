"""`tsdkd pipeline`: systems of several stages; a rerun does only what has changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PIPELINES = {
    "twt": "TwT: several teachers behind an API, rationales that become shorter until none is left (arXiv 2503.24198)",
    "qr-distill": "QR-Distill: paths in six styles, filtered, routed to students that teach each other",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd pipeline",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a system of several stages, each of which reads files and writes one. Started again it does what is "
        "missing or has changed.\n\n" + "\n".join(f"{name:<12}{what}" for name, what in PIPELINES.items()),
        epilog="Example: tsdkd pipeline twt --config twt.yaml --dry_run",
    )
    parser.add_argument("name", choices=list(PIPELINES), help="the pipeline")
    parser.add_argument(
        "--config", type=Path, action="append", required=True, help="a YAML file; of several the last word stands"
    )
    parser.add_argument("--output_dir", help="in place of the file's")
    parser.add_argument("--from_stage", help="begin here, and make this stage and those behind it again")
    parser.add_argument("--until_stage", help="end after this one")
    parser.add_argument("--accept_stage", action="append", default=[], help="take this stage's output as it stands there")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, how many calls and at what price")
    own = parser.parse_args(arguments)

    from tsdkd.cli.recipes import read_recipes
    from tsdkd.pipelines.processes import Processes

    recipe: dict[str, Any] = read_recipes(own.config)
    if own.output_dir:
        recipe["output_dir"] = own.output_dir
    made = _pipeline(own.name, recipe)
    _quiet()
    made.run(own.from_stage, own.until_stage, own.dry_run, own.accept_stage)
    scores = made.stages[-1]
    if not own.dry_run and scores.name == "scores" and Processes().is_first and scores.is_current:
        print(f"\n{_report(own.name, made)}")
    return 0


def _report(name: str, made: Any) -> str:
    if name == "twt":
        from tsdkd.pipelines.twt.report import report

        return report(made.stages[-1].output, made.folder)
    from tsdkd.pipelines.qr_distill.report import report as told

    students = next(stage for stage in made.stages if stage.name == "students")
    return told(made.stages[-1].output, students.output, made.folder)


def _pipeline(name: str, recipe: dict[str, Any]) -> Any:
    if name == "twt":
        from tsdkd.pipelines import twt

        return twt.pipeline(twt.TwTConfig.of(recipe))
    from tsdkd.pipelines import qr_distill

    return qr_distill.pipeline(qr_distill.QRConfig.of(recipe))


def _quiet() -> None:
    """Without the bars of other libraries: a stage says how far it is."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bar()
