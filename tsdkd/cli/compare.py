"""`tsdkd compare`: several methods from the same start, with the same prompts and budget."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsdkd.checks import check_count, check_writable
from tsdkd.cli.options import ALIASES, fields_of, methods_with, named_flags, option_from, split
from tsdkd.cli.parsing import as_mapping
from tsdkd.cli.recipes import one_file, read_recipes
from tsdkd.data.runs import REPORT, runs_in


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd compare",
        allow_abbrev=False,
        description="Train several methods from the same start with the same prompts and budget, score each by the accuracy of "
        "its greedy answers, and write a row a run. Interrupted, it goes on where it stopped. Flags that are not listed "
        "here are tsdkd train's; --METHOD.NAME is an option of one method.",
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
    parser.add_argument(
        "--problems", type=Path, help="JSONL of 'question' and 'answer' to score on; of the demo's own models its problems"
    )
    parser.add_argument(
        "--answer_pattern",
        help="a regular expression that finds a final answer, its first group; default: #### ANSWER or \\boxed{ANSWER}",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens of an answer to a problem; default: the run's max_completion_length"
    )
    parser.add_argument("--samples", type=int, help="sample so many answers of a problem, too (1 to 9): pass@k, calibration")
    parser.add_argument("--sampled_problems", type=int, help="of the first so many problems; default: of all")
    parser.add_argument("--sample_temperature", type=float, default=1.0, help="at which they are drawn (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw the scores into this file, too (PNG or PDF)")
    parser.add_argument("--keep_students", action="store_true", help="save every run's student, in its folder")
    parser.add_argument("--eval_tasks", help="score on these tasks of tsdkd evaluate, comma-separated, in place of --problems")
    parser.add_argument("--eval_include_path", action="append", default=[], help="a folder of task YAMLs of your own")
    parser.add_argument("--eval_chat_template", action="store_true", help="put the items of --eval_tasks as chats")
    parser.add_argument("--eval_limit", type=int, help="the first items of each of --eval_tasks only")
    parser.add_argument("--output_dir", type=Path, help="each run gets a folder in it; default: the recipe's, or beside --out")
    own, rest = parser.parse_known_args(arguments)
    for word in rest:
        name, _ = split(word)
        if name in ("seed", "method", "method_options"):
            by_seeds, by_methods = "runs seeds 0, 1, …; pass --seeds, how many", "takes --methods, or the recipe's mapping"
            instead = by_seeds if name == "seed" else by_methods
            raise ValueError(f"--{name}: a comparison {instead}.")
    if own.seeds < 1:
        raise ValueError(f"--seeds {own.seeds}: it must be 1 or more.")
    check_writable("out", own.out)
    check_writable("png", own.png)
    if own.png is not None:
        from tsdkd.reporting.figures import pyplot

        pyplot("--png")  # refuses before anything is trained
    if own.answer_pattern is not None:
        try:
            re.compile(own.answer_pattern)
        except re.error as error:
            raise ValueError(f"--answer_pattern {own.answer_pattern!r} is no regular expression ({error}).") from None

    recipe = {ALIASES.get(name, name): value for name, value in read_recipes(own.config).items()}
    first = os.environ.get("RANK", "0") == "0"
    say = print if first else lambda text: None
    if "seed" in recipe:
        say(f"The recipe's seed ({recipe.pop('seed')}) is not read: a comparison runs seeds 0, 1, … (--seeds).")

    from tsdkd.cli.evaluate import bundled_tasks, names_in
    from tsdkd.cli.parsing import parse
    from tsdkd.cli.train import build
    from tsdkd.pipelines.compare import OnProblems, OnTasks, Run, Samples, Scorer, compare, labelled, runs_of, table
    from tsdkd.pipelines.compare.runs import settings_of
    from tsdkd.pipelines.compare.scoring import problems_at
    from tsdkd.pipelines.compare.table import draw, final_scores
    from tsdkd.reporting.pages import as_bytes
    from tsdkd.reporting.run_page import run_page
    from tsdkd.trainers import TokenDistillConfig

    named = recipe.pop("methods", {}) or ([recipe["method"]] if "method" in recipe and not own.methods else {})
    defaults = _options_by_method(recipe, rest)
    methods = labelled(_spelt_out(named), own.methods)
    strangers = sorted(set(defaults) - {run.method for run in methods})
    if strangers:
        labels = ", ".join(run.label for run in methods)
        say(f"Options of {', '.join(strangers)} are not read: it is not among the methods ({labels}).")
    methods = [replace(run, options={**defaults.get(run.method, {}), **run.options}) for run in methods]
    scorer: Scorer
    if own.eval_tasks:
        if own.samples is not None or own.max_new_tokens is not None:
            raise ValueError(
                "--samples and --max_new_tokens are of --problems; a task of --eval_tasks says itself how it asks."
            )
        folders = [bundled_tasks(), *own.eval_include_path]
        how = {"chat_template": own.eval_chat_template, "limit": own.eval_limit}
        scorer = OnTasks(names_in(own.eval_tasks), folders, **how)
    else:
        _refuse_strangers_without_problems(own, recipe, rest)
        if own.max_new_tokens is not None:
            check_count("max_new_tokens", own.max_new_tokens, smallest=1)
        samples = None
        if own.samples is None and (own.sampled_problems is not None or own.sample_temperature != 1.0):
            raise ValueError("--sampled_problems and --sample_temperature say how --samples are drawn: pass --samples, too.")
        if own.samples is not None:
            samples = Samples(own.samples, own.sampled_problems, own.sample_temperature)
        scorer = OnProblems(problems_at(own.problems), own.answer_pattern, say, own.max_new_tokens, samples)
    folder = own.output_dir or Path(str(recipe.get("output_dir", own.out.with_suffix(""))))
    if "teacher_answers" not in recipe and not recipe.get("teacher_answers_temperature"):
        recipe["teacher_answers"] = str(folder / "teacher_answers.jsonl")  # greedy: the same for all runs

    def options_of(run: Run) -> tuple:
        with one_file({**recipe, **run.training, "output_dir": str(folder / run.name)}) as file:
            words = ["--config", file, "--method", run.method, "--seed", str(run.seed), *rest]
            return parse([*words, "--method_options", json.dumps(run.options)], TokenDistillConfig)

    for run in methods:
        both = sorted(set(run.training) & set(named_flags(rest)))
        if both:
            raise ValueError(
                f"--{both[0]} is stated for all runs, and the recipe's training of {run.label!r} states another: leave one out."
            )
    runs = runs_of(methods, own.seeds)
    for run in runs[: len(methods)]:
        options_of(run)  # refuses what does not fit before the first run starts
    settings = settings_of(recipe, rest, scorer)

    def built(run: Run) -> Any:
        return build(*options_of(run))

    more = {"with_baselines": True, "keep": own.keep_students}
    rows = compare(runs, built, scorer, own.out, settings, writes=first, say=say, **more)
    if first:
        print(table(rows))
        if own.png is not None:
            draw(rows, own.png)
        found = [run for run in runs_in([folder]) if run.record] if folder.is_dir() else []
        if found:
            page = run_page(found, f"Comparison {own.out.stem}", final_scores(rows))
            (folder / REPORT).write_bytes(as_bytes(page))
            print(f"What the runs did is shown by {folder / REPORT}")
        print(f"The rows are in {own.out}" + (f", the picture in {own.png}" if own.png else ""))
    return 0


def _spelt_out(named: Any) -> Any:
    """A recipe's methods with the short names of their labels' `training` (student, teacher) as the long ones."""
    if not isinstance(named, dict):
        return named
    made = {}
    for label, options in named.items():
        training = options.get("training") if isinstance(options, dict) else None
        if isinstance(training, dict):
            options = {**options, "training": {ALIASES.get(name, name): value for name, value in training.items()}}
        made[label] = options
    return made


def _options_by_method(recipe: dict[str, Any], rest: list[str]) -> dict[str, dict[str, Any]]:
    """The methods' options that a recipe of tsdkd train and flags state, by method; they are taken out of both."""
    from trl import ModelConfig

    from tsdkd.cli.parsing import DataArguments
    from tsdkd.methods import METHODS
    from tsdkd.trainers import TokenDistillConfig

    known = {name for cls in (TokenDistillConfig, ModelConfig, DataArguments) for name in fields_of(cls)}
    method = recipe.pop("method", "tsd_kd")
    stated = as_mapping(recipe.pop("method_options", None), "method_options of the recipe")
    if method == "tsd_kd":  # its options are a recipe's own
        names = [name for name in recipe if name in fields_of(METHODS["tsd_kd"]) and (name not in known or name == "beta")]
        stated = {**{name: recipe.pop(name) for name in names}, **stated}
    made = {method: stated} if stated else {}
    words = iter(list(rest))
    rest.clear()
    for word in words:
        name, value = split(word)
        owner, dot, option = (name or "").partition(".")
        if name is not None and not dot and name not in known and methods_with(name):
            raise ValueError(f"--{name}: in a comparison say whose it is, --{methods_with(name)[0]}.{name}.")
        if not dot or owner not in METHODS:
            rest.append(word)
            continue
        made.setdefault(owner, {})[option] = option_from(owner, option, str(name), value, words)
    return made


def _refuse_strangers_without_problems(own: argparse.Namespace, recipe: dict[str, Any], rest: list[str]) -> None:
    """The demo's problems are for the demo's models.

    Raises:
        ValueError: another student, and nothing to score it on.
    """
    from tsdkd.demo.run import shipped

    student = str(named_flags(rest).get("model_name_or_path") or recipe.get("model_name_or_path") or "")
    if own.problems is None and student and Path(student).resolve() != Path(shipped("student")).resolve():
        raise ValueError(
            f"nothing to score {student} on was named: pass --problems FILE (JSONL of 'question' and 'answer') or "
            "--eval_tasks. The demo's problems are for the demo's models."
        )
