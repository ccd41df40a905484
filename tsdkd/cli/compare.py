"""`tsdkd compare`: several methods from the same start, with the same prompts and budget."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsdkd.cli.recipes import one_file, read_recipes

# What a recipe names whose contents a row depends on.
FILES = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
    "pretraining_dataset_name",
    "recording",
)


def _labelled(named: dict[str, Any] | list[str], wanted: str | None) -> dict[str, dict[str, Any]]:
    """Each run's label with its method and options, from the recipe's `methods` and `--methods`."""
    from tsdkd.methods import METHODS

    if isinstance(named, list):
        named = {name: {} for name in named}
    labels = [label.strip() for label in wanted.split(",")] if wanted else list(named)
    if not labels:
        raise ValueError("no methods were given: pass --methods tsd_kd,gkd or a 'methods' mapping in the recipe.")
    made = {}
    for label in labels:
        options = dict(named.get(label) or {})
        method = options.pop("method", label)
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; choose from: {', '.join(METHODS)}.")
        made[label] = {"method": method, "options": options}
    return made


def _problems(path: Path | None) -> list:
    """The problems to score on: a file's, or the demo's held-out ones."""
    from tsdkd.demo.problems import Problem, held_out
    from tsdkd.demo.run import HELD_OUT_SEED, LEVELS

    if path is None:
        return held_out(1000, HELD_OUT_SEED, set(), LEVELS)
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if "question" not in row or "answer" not in row:
            raise ValueError(f"{path}, line {number} has the keys {', '.join(row)}: a problem has 'question' and 'answer'.")
        problems.append(Problem(row["question"], "", str(row["answer"]), 0))
    if not problems:
        raise ValueError(f"{path} holds no problems.")
    return problems


def _scorer(own: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """What scores a trained student on tasks of the harness; what cannot be scored is refused here."""
    from tsdkd.cli.evaluate import bundled_tasks, names_in
    from tsdkd.evaluation import harness

    tasks = names_in(own.eval_tasks)
    manager = harness.ready_tasks(tasks, [bundled_tasks(), *own.eval_include_path])

    def score(trainer: Any) -> dict[str, Any]:
        main, sizes = {}, {}
        with trainer.student() as student:
            lm = harness.hf_model(student, tokenizer=trainer.processing_class, batch_size=64)
            for task in tasks:
                (first, *_), _ = harness.score_task(
                    lm, manager, task, chat_template=own.eval_chat_template, limit=own.eval_limit
                )
                main[f"{task}/{first.metric}"], sizes[task] = first.value, first.n
        return {"scores": main, "n": sizes}

    return score


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd compare",
        allow_abbrev=False,
        description="Train several methods from the same start with the same prompts and budget, score each by the accuracy of "
        "its greedy answers, and write a row a run. Interrupted, it goes on where it stopped. Flags that are not listed "
        "here are tsdkd train's.",
    )
    parser.add_argument("--methods", help="names, comma-separated; default: the recipe's 'methods' mapping")
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        action="append",
        help="a recipe of tsdkd train, or several, of which a later one's options stand; 'methods' maps labels to options",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, with seeds 0, 1, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("comparison.jsonl"), help="rows go here (default: %(default)s)")
    parser.add_argument("--problems", type=Path, help="JSONL of 'question' and 'answer' to score on; default: the demo's")
    parser.add_argument("--eval_tasks", help="score on these tasks of tsdkd evaluate, comma-separated, in place of --problems")
    parser.add_argument("--eval_include_path", action="append", default=[], help="a folder of task YAMLs of your own")
    parser.add_argument("--eval_chat_template", action="store_true", help="put the items of --eval_tasks as chats")
    parser.add_argument("--eval_limit", type=int, help="the first items of each of --eval_tasks only")
    parser.add_argument("--output_dir", type=Path, help="each run gets a folder in it; default: the recipe's, or beside --out")
    own, rest = parser.parse_known_args(arguments)
    if any(flag.partition("=")[0] == "--seed" for flag in rest):
        raise ValueError("--seed: a comparison runs seeds 0, 1, …; pass --seeds, how many.")
    if own.seeds < 1:
        raise ValueError(f"--seeds {own.seeds}: it must be 1 or more.")

    recipe = read_recipes(own.config)
    named = recipe.pop("methods", {})
    labelled = _labelled(named, own.methods)

    from tsdkd.cli.train import build, parse
    from tsdkd.demo.scoring import accuracy
    from tsdkd.pipelines.compare import Run, compare, digest, table
    from tsdkd.trainers import TokenDistillConfig

    on_tasks = _scorer(own) if own.eval_tasks else None
    problems = [] if on_tasks else _problems(own.problems)
    folder = own.output_dir or Path(recipe.get("output_dir", own.out.with_suffix("")))
    if "teacher_answers" not in recipe and not recipe.get("teacher_answers_temperature"):
        recipe["teacher_answers"] = str(folder / "teacher_answers.jsonl")  # greedy: the same for all runs

    def options_of(run: Run) -> tuple:
        with one_file({**recipe, "output_dir": str(folder / run.name)}) as file:
            words = ["--config", file, "--method", run.method, "--seed", str(run.seed), *rest]
            return parse([*words, "--method_options", json.dumps(run.options)], TokenDistillConfig)

    def train(run: Run) -> tuple[Any, dict[str, Any]]:
        trainer = build(*options_of(run))
        trainer.train()
        return trainer, {"steps": trainer.state.global_step, "trained_tokens": trainer.trained_tokens}

    def score(trainer: Any) -> dict[str, Any]:
        if on_tasks:
            found = on_tasks(trainer)
        else:
            found = accuracy(trainer.model, trainer.processing_class, problems, trainer.max_completion_length)
        if trainer.teacher is not None:
            trainer.teacher.close()  # dropping a sharded one would not free it
        return found

    runs = [Run(label, seed=seed, **method) for seed in range(own.seeds) for label, method in labelled.items()]
    for run in runs[: len(labelled)]:
        options_of(run)  # refuses what does not fit before the first run starts
    shared = {key: value for key, value in recipe.items() if key not in ("output_dir", "teacher_answers")}
    contents = digest([repr(problems)], [recipe.get(key) for key in FILES])
    settings = {**shared, "flags": rest, "problems": len(problems), "contents": contents}
    if on_tasks:
        settings["eval"] = [own.eval_tasks, own.eval_chat_template, own.eval_limit]
    first = os.environ.get("RANK", "0") == "0"
    rows = compare(runs, train, score, own.out, settings, writes=first, say=print if first else lambda text: None)
    if first:
        print(table(rows))
        print(f"The rows are in {own.out}")
    return 0
