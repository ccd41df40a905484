"""The runs of a comparison: which there are, what they share, and the file that they go on with."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tsdkd.data.rows import append_rows, mend_rows, read_rows
from tsdkd.data.runs import METRICS
from tsdkd.evaluation.tables import mcnemar
from tsdkd.methods import METHODS
from tsdkd.pipelines.compare.scoring import Scorer
from tsdkd.provenance import provenance, redacted, redacted_words
from tsdkd.reporting.run_page import write_report
from tsdkd.trainers.stopping import refuse_stopped

# The rows of what is not trained here.
UNTRAINED = "untrained"
BASELINES = ("student", "teacher")
# What no run of a comparison has to itself, beside `FILES`.
OF_ALL = ("output_dir", "seed", "method", "method_options", "methods")
# A file of a folder beyond so many bytes is told by its time, not read.
LARGE = 1 << 26
# What a recipe names whose contents a row depends on.
FILES = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
    "pretraining_dataset_name",
    "recording",
)


@dataclass(frozen=True)
class Run:
    """One method with its options and one seed; `label` is its name in the table, `training` what it trains by otherwise than
    the others."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{''.join(c if c.isalnum() or c in '._-' else '-' for c in self.label)}-seed{self.seed}"

    def row(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What its row is known by, under the settings that all runs share."""
        return {
            "label": self.label,
            "method": self.method,
            "options": self.options,
            "seed": self.seed,
            **({"training": self.training} if self.training else {}),
            "settings": settings,
        }


def labelled(named: dict[str, Any] | list[str], wanted: str | None) -> list[Run]:
    """Each label with its method, the method's options and the run's (`training`), from a recipe's `methods` and the labels
    that are wanted, comma-separated.

    Raises:
        ValueError: no method, or one that there is not; a `training` that is no mapping or names what all runs share.
    """
    if isinstance(named, list):
        named = {name: {} for name in named}
    labels = [label.strip() for label in wanted.split(",")] if wanted else list(named)
    if not labels:
        raise ValueError("no methods were given: pass --methods tsd_kd,gkd or a 'methods' mapping in the recipe.")
    made = []
    for label in labels:
        options = dict(named.get(label) or {})
        method, training = options.pop("method", label), options.pop("training", None) or {}
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; choose from: {', '.join(METHODS)}.")
        if not isinstance(training, dict):
            raise ValueError(f"training of {label!r} is {training!r}: it maps options of tsdkd train to values.")
        shared = [name for name in training if name in OF_ALL or name in FILES]
        if shared:
            raise ValueError(
                f"training of {label!r} names {', '.join(shared)}, which all runs of a comparison share: state it in the "
                "recipe."
            )
        made.append(Run(label, method, options, training=training))
    return made


def runs_of(methods: Sequence[Run], seeds: int) -> list[Run]:
    """Every method once a seed, seed by seed."""
    return [replace(run, seed=seed) for seed in range(seeds) for run in methods]


def settings_of(recipe: dict[str, Any], flags: Sequence[str], scorer: Scorer) -> dict[str, Any]:
    """What all runs of a recipe share: a row of other settings is another run's."""
    shared = {key: value for key, value in recipe.items() if key not in ("output_dir", "teacher_answers", "methods")}
    contents = digest(scorer.contents, [recipe.get(key) for key in FILES])
    return {**redacted(shared), "flags": redacted_words(flags), **scorer.settings, "contents": contents}


def digest(texts: Sequence[str], paths: Sequence[str | None]) -> str:
    """What a row depends on beside its settings: texts and files' contents; of a folder's large files name, size and time."""
    made = hashlib.sha256("\0".join(texts).encode())
    for path in (Path(name) for name in paths if name):
        if path.is_file():
            made.update(path.read_bytes())
        elif path.is_dir():
            for file in sorted(file for file in path.iterdir() if file.is_file()):
                size = file.stat().st_size
                made.update(f"{file.name} {size} ".encode())
                made.update(file.read_bytes() if size <= LARGE else str(file.stat().st_mtime_ns).encode())
    return made.hexdigest()[:16]


def compare(
    runs: Sequence[Run],
    build: Callable[[Run], Any],
    scorer: Scorer,
    out: Path,
    settings: dict[str, Any],
    *,
    writes: bool = True,
    say: Callable[[str], None] = print,
    with_baselines: bool = False,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """Train and score every run that `out` has no row of.

    Args:
        runs: in order.
        build: from a run to its trainer.
        scorer: of a trained student.
        out: JSONL, a row a run, appended as soon as the run is done.
        settings: what all runs share.
        writes: whether this process writes the rows, one of several.
        say: what tells the progress.
        with_baselines: score the student as it starts and the teacher, too, before the first run.
        keep: save every run's student, in its folder.

    Returns:
        the rows of the baselines and of these runs, in order.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    found = read_rows(out, "remove it, that run is then made again")
    done = {_identity(row): row for row in found}
    if writes:
        mend_rows(out, found)
    rows = []

    def made(wanted: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        row = {**wanted, **figures, "provenance": provenance(wanted["seed"])}
        if writes:
            append_rows(out, [row])
        return row

    baselines = [Run(name, UNTRAINED) for name in BASELINES] if with_baselines else []
    missing = [run for run in baselines if _identity(run.row(settings)) not in done]
    if missing and runs:
        for name, figures in _untrained(build(replace(runs[0], training={})), scorer).items():
            wanted = Run(name, UNTRAINED).row(settings)
            if _identity(wanted) not in done:
                done[_identity(wanted)] = made(wanted, figures)
                say(spoken(name, figures))
    rows += [done[key] for run in baselines if (key := _identity(run.row(settings))) in done]
    start = next((row for row in rows if row["label"] == BASELINES[0]), None)
    for number, run in enumerate(runs, 1):
        wanted = run.row(settings)
        row = done.get(_identity(wanted))
        if row is None:
            say(f"run {number} of {len(runs)}: {run.label}, seed {run.seed}")
            row = made(wanted, _made(run, build, scorer, wanted, keep))
            say(spoken(f"{run.label}, seed {run.seed}", row, start))
        rows.append(row)
    return rows


def spoken(name: str, row: dict[str, Any], start: dict[str, Any] | None = None) -> str:
    """A row's scores as a line, with their interval, and against the start on the same items."""
    if "scores" in row:
        return f"{name}: " + ", ".join(f"{score} {value:.3f}" for score, value in row["scores"].items())
    interval = f"{row['low']:.3f} to {row['high']:.3f}, " if "low" in row else ""
    text = f"{name}: {row['accuracy']:.3f} ({interval}n = {row['n']})"
    if start is not None and start.get("right") and row.get("right"):
        p = mcnemar(row["right"], start["right"])
        change = row["accuracy"] - start["accuracy"]
        text += f", {change:+.3f} against the start {'(p < 0.001)' if p < 0.001 else f'(p = {p:.3f})'}"
    return text


def _untrained(trainer: Any, scorer: Scorer) -> dict[str, dict[str, Any]]:
    """The scores of the student as it starts, and of the teacher where its model is here."""
    scorer.check(trainer)
    facts = {"steps": 0, "trained_tokens": 0, "flops": {}, "seconds": 0.0}
    made = {BASELINES[0]: {**scorer.figures(scorer(trainer, BASELINES[0])), **facts}}
    if trainer.teacher_model is not None and trainer.args.teacher_placement == "local":
        made[BASELINES[1]] = {**scorer.figures(scorer(trainer, BASELINES[1], trainer.teacher_model)), **facts}
    _free(trainer)
    return made


def _made(run: Run, build: Callable[[Run], Any], scorer: Scorer, wanted: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A run's scores and the facts of its training, which goes on from its last checkpoint if it was cut off."""
    trainer = build(run)
    scorer.check(trainer)
    goes_on = _begun(Path(trainer.args.output_dir), _identity(wanted), trainer.accelerator.is_main_process)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=goes_on)
    refuse_stopped(trainer)
    facts = {"steps": trainer.state.global_step, **trainer.spent}  # of all its parts, where it was cut off
    scores = scorer(trainer, run.label)
    if keep:
        trainer.save_model(str(Path(trainer.args.output_dir) / "student"))
    figures, folder = scorer.figures(scores), Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process and (folder / METRICS).is_file():
        own: dict[str, Any] = {name: figures[name] for name in ("accuracy", "low", "high", "n") if name in figures}
        append_rows(folder / METRICS, [{"step": facts["steps"], **own, **figures.get("scores", {})}])
        write_report(folder)
    _free(trainer)
    return {**figures, **facts}


def _begun(folder: Path, identity: str, writes: bool) -> str | None:
    """Whether this very run left a checkpoint there; what another left is taken away."""
    mark, checkpoints = folder / "compared.json", sorted(folder.glob("checkpoint-*"))
    if mark.is_file() and mark.read_text() == identity:
        return "latest" if checkpoints else None
    if writes:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)
    return None


def _free(trainer: Any) -> None:
    if trainer.teacher is not None:
        trainer.teacher.close()  # dropping a sharded one would not free it
    del trainer  # two runs' models need not fit beside each other
    gc.collect()


def _identity(row: dict[str, Any]) -> str:
    own = [row["label"], row["method"], row["options"], row["seed"], row["settings"]]
    return json.dumps([*own, row["training"]] if row.get("training") else own, sort_keys=True)
