"""`tsdkd compare`: several methods from the same start, with the same prompts and budget."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tsdkd.cli.recipes import one_file, read_recipes


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

    from tsdkd.cli.evaluate import bundled_tasks, names_in
    from tsdkd.cli.train import build, parse
    from tsdkd.pipelines.compare import OnProblems, OnTasks, Run, Scorer, compare, labelled, runs_of, table
    from tsdkd.pipelines.compare.runs import settings_of
    from tsdkd.pipelines.compare.scoring import problems_at
    from tsdkd.trainers import TokenDistillConfig

    methods = labelled(recipe.pop("methods", {}), own.methods)
    scorer: Scorer
    if own.eval_tasks:
        folders = [bundled_tasks(), *own.eval_include_path]
        how = {"chat_template": own.eval_chat_template, "limit": own.eval_limit}
        scorer = OnTasks(names_in(own.eval_tasks), folders, **how)
    else:
        scorer = OnProblems(problems_at(own.problems))
    folder = own.output_dir or Path(recipe.get("output_dir", own.out.with_suffix("")))
    if "teacher_answers" not in recipe and not recipe.get("teacher_answers_temperature"):
        recipe["teacher_answers"] = str(folder / "teacher_answers.jsonl")  # greedy: the same for all runs

    def options_of(run: Run) -> tuple:
        with one_file({**recipe, "output_dir": str(folder / run.name)}) as file:
            words = ["--config", file, "--method", run.method, "--seed", str(run.seed), *rest]
            return parse([*words, "--method_options", json.dumps(run.options)], TokenDistillConfig)

    runs = runs_of(methods, own.seeds)
    for run in runs[: len(methods)]:
        options_of(run)  # refuses what does not fit before the first run starts
    settings = settings_of(recipe, rest, scorer)
    first = os.environ.get("RANK", "0") == "0"
    say = print if first else lambda text: None
    rows = compare(runs, lambda run: build(*options_of(run)), scorer, own.out, settings, writes=first, say=say)
    if first:
        print(table(rows))
        print(f"The rows are in {own.out}")
    return 0
