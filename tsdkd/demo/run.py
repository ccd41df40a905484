"""The demo's run: distil the shipped student from the shipped teacher on this machine, and show what changed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tsdkd.data.rows import append_rows, read_rows
from tsdkd.data.runs import CURVE, METRICS, REPORT
from tsdkd.demo.problems import Problem, held_out, make_problems
from tsdkd.demo.scoring import MAX_NEW_TOKENS, accuracy
from tsdkd.methods import TSDKD
from tsdkd.provenance import provenance
from tsdkd.reporting.figures import DPI, PALETTE, pyplot
from tsdkd.reporting.run_page import write_report
from tsdkd.trainers import TSDKDConfig, TSDKDTrainer
from tsdkd.trainers.console import ConsoleLog
from tsdkd.trainers.health import Health

LEVELS = (2, 3)
HELD_OUT_SEED = 990_000  # far from any --seed, and the same for all, so that runs answer the same problems
BATCH = 64
CURVE_PROBLEMS = 200


@dataclass(frozen=True)
class Weights:
    """One choice of the objective's weights, and why."""

    why: str
    learning_rate: float
    options: dict[str, Any]


WEIGHTS = {
    "demo": Weights(
        why="TSD-KD with its auxiliary terms scaled to a vocabulary of 60 tokens: at the paper's weights their gradients are "
        "tens of times the direct term's here, and ten candidates of sixty tokens are mostly junk.",
        learning_rate=5e-4,
        options={"indirect_weight": 0.01, "num_candidates": 3, "entropy_weight": 0.01},
    ),
    "paper": Weights(
        why="the paper's weights as they are, tuned there for a vocabulary of 152 000 and pretrained models.",
        learning_rate=2e-4,
        options={},
    ),
    "gkd": Weights(
        why="plain GKD: gate off, no ranking, no entropy term.",
        learning_rate=5e-4,
        options={"indirect_weight": 0.0, "entropy_weight": 0.0, "gate": "none"},
    ),
}


def shipped(name: str) -> str:
    """The folder of a shipped model, `teacher` or `student`."""
    return str(files("tsdkd.demo").joinpath("models", name))


class _Follow(TrainerCallback):
    """Progress bar with the time left, and the accuracy curve, as rows beside the logs."""

    def __init__(
        self, path: Path, progress: Progress, start: dict[str, Any], curve: list[Problem], tokenizer: Any, every: int
    ) -> None:
        self.path, self.progress, self.start = path, progress, start
        self.curve, self.tokenizer, self.every = curve, tokenizer, every

    def scored(self, step: int, found: dict[str, Any]) -> None:
        """A score of the student after so many steps."""
        append_rows(self.path, [{"step": step, **{name: found[name] for name in ("accuracy", "low", "high", "n")}}])

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task("distilling", total=state.max_steps)
        self.scored(0, self.start)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.scored(state.global_step, accuracy(model, self.tokenizer, self.curve))


def _plot(rows: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> str | None:
    """Draw loss and accuracy; what to do where matplotlib is missing."""
    try:
        plt = pyplot()
    except ValueError as error:
        return f"No plot: {error}"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    losses = [row for row in rows if "loss/direct" in row]
    weights = {term: summary["settings"][f"{term}_weight"] for term in ("direct", "indirect", "entropy")}
    for color, (term, weight) in zip(PALETTE, weights.items(), strict=False):
        if weight:
            values = [weight * r[f"loss/{term}"] for r in losses]
            left.plot([r["step"] for r in losses], values, label=f"{weight:g} × {term}", color=color)
    left.set(xlabel="optimizer step", ylabel="term of the loss", title="Loss, by term", yscale="log")
    left.legend()
    scored = sorted((row for row in rows if "accuracy" in row), key=lambda row: row["step"])
    bars = [[max(0.0, r["accuracy"] - r["low"]) for r in scored], [max(0.0, r["high"] - r["accuracy"]) for r in scored]]
    steps, values = [row["step"] for row in scored], [row["accuracy"] for row in scored]
    right.errorbar(steps, values, yerr=bars, marker="o", color=PALETTE[0], capsize=3, label="student")
    right.axhline(summary["teacher"]["accuracy"], color=PALETTE[1], linestyle="--", label="teacher")
    ends, between = f"{summary['student_after']['n']} problems at the ends", f"{CURVE_PROBLEMS} between"
    right.set(xlabel=f"optimizer step ({ends}, {between})", ylabel="accuracy, held-out problems")
    right.set(title="Greedy accuracy (bars: 95 %)", ylim=(0, 1.04))
    right.legend(loc="lower right")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return None


def _table(summary: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'accuracy':>9}   {'95 % interval':<15}{'problems':>9}"]
    for label, key in (("teacher", "teacher"), ("student before", "student_before"), ("student after", "student_after")):
        row = summary[key]
        lines.append(f"{label:<16}{row['accuracy']:>9.3f}   {row['low']:.3f} - {row['high']:.3f}  {row['n']:>9}")
    return "\n".join(lines)


def run(output_dir: Path, seed: int = 0, weights: str = "demo", steps: int = 200, problems: int = 1000) -> dict[str, Any]:
    """Distil, score, and write `summary.json`, `metrics.jsonl`, `curve.png` and the student under `output_dir`.

    Args:
        output_dir: where the results go; made if it is not there.
        seed: of training problems and sampling; the held-out problems are the same for all seeds.
        weights: a name in `WEIGHTS`.
        steps: optimizer steps of 64 prompts.
        problems: held-out problems to score on.

    Returns:
        the summary.
    """
    began = time.perf_counter()
    console = Console()
    output_dir.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("tsdkd").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # models this small generate faster on one thread than on two
    choice = WEIGHTS[weights]

    test = held_out(problems, HELD_OUT_SEED, set(), LEVELS)
    excluded = {p.question for p in test}
    train = [p for p in make_problems(2 * steps * BATCH, 1 + seed, LEVELS) if p.question not in excluded][: steps * BATCH]
    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    load = {name: AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32) for name in ("teacher", "student")}
    teacher, student = load["teacher"].eval(), load["student"]
    console.print(f"Arithmetic word problems, e.g.: {test[0].question}", markup=False)
    console.print(
        f"A teacher of {teacher.num_parameters() / 1e6:.1f} M parameters, a student of {student.num_parameters() / 1e6:.1f} M "
        f"that has the skill and a bad habit; weights: {weights}, {choice.why}",
        markup=False,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        scoring = progress.add_task("scoring teacher and student", total=2)
        before = {}
        for name, model in (("teacher", teacher), ("student", student)):
            before[name] = accuracy(model, tokenizer, test)
            progress.advance(scoring)
        settings = TSDKDConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=choice.learning_rate,
            max_length=128,
            max_completion_length=MAX_NEW_TOKENS,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            term_grad_norm_steps=20,
            seed=seed,
            **choice.options,
        )
        curve, every = test[:CURVE_PROBLEMS], max(1, steps // 8)
        follow = _Follow(output_dir / METRICS, progress, before["student"], curve, tokenizer, every)
        trainer = TSDKDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p.question}] for p in train]}),
            processing_class=tokenizer,
        )
        trainer.add_callback(follow)  # after the run's record, which begins the file of metrics
        trainer.run_record.say = lambda text: None  # the demo says itself what it is
        for other in (ConsoleLog, Health):
            trainer.remove_callback(other)
        trainer.train()
        scoring = progress.add_task("scoring the new student", total=1)
        after = accuracy(trainer.model, tokenizer, test)
        progress.advance(scoring)
    follow.scored(steps, after)
    trainer.save_model(str(output_dir / "student"))
    options = {option.name: getattr(settings, option.name) for option in fields(TSDKD)}
    summary = {
        "teacher": before["teacher"],
        "student_before": before["student"],
        "student_after": after,
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {"weights": weights, "steps": steps, "batch": BATCH, "learning_rate": choice.learning_rate, **options},
        "provenance": provenance(seed),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(output_dir)
    missing = _plot(read_rows(output_dir / METRICS, "remove it"), summary, output_dir / CURVE)
    chosen = {"learning_rate": choice.learning_rate, "max_steps": steps, "per_device_train_batch_size": BATCH, **choice.options}
    flags = " ".join(f"--{name} {value}" for name, value in chosen.items())
    command = f"tsdkd train --student YOUR/STUDENT --teacher YOUR/TEACHER --dataset_name prompts.jsonl --output_dir out {flags}"
    written = ["the student", METRICS, "summary.json", *([] if missing else [CURVE]), REPORT]
    for text in (
        f"\n{_table(summary)}\n",
        f"{summary['seconds']:.0f} s; in {output_dir}/: {', '.join(written)}.",
        missing,
        f"The same with your own models:\n  {command}",
    ):
        if text:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    return summary
