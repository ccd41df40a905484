"""`tsdkd compare`: several methods from the same start, with the same prompts and budget."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def _labelled(named: dict[str, Any], wanted: str | None) -> dict[str, dict[str, Any]]:
    """Each run's label with its method and options, from the recipe's `methods` and `--methods`."""
    from tsdkd.methods import METHODS

    labels = wanted.split(",") if wanted else list(named)
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd compare",
        description="Train several methods from the same start with the same prompts and budget, score each by the accuracy of "
        "its greedy answers, and write a row a run. Interrupted, it goes on where it stopped. Flags that are not listed "
        "here are tsdkd train's.",
    )
    parser.add_argument("--methods", help="names, comma-separated; default: the recipe's 'methods' mapping")
    parser.add_argument(
        "--config", type=Path, required=True, help="a recipe of tsdkd train; its 'methods' maps labels to options"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, with seeds 0, 1, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("comparison.jsonl"), help="rows go here (default: %(default)s)")
    parser.add_argument("--problems", type=Path, help="JSONL of 'question' and 'answer' to score on; default: the demo's")
    own, rest = parser.parse_known_args(arguments)
    if own.seeds < 1:
        raise ValueError(f"--seeds {own.seeds}: it must be 1 or more.")

    import yaml

    recipe = yaml.safe_load(own.config.read_text()) or {}
    named = recipe.pop("methods", {})
    labelled = _labelled(named, own.methods)

    from tsdkd.cli.train import build, parse
    from tsdkd.demo.scoring import accuracy
    from tsdkd.pipelines.compare import Run, compare, table
    from tsdkd.trainers import TokenDistillConfig

    problems = _problems(own.problems)
    folder = Path(recipe.get("output_dir", own.out.with_suffix("")))

    def options_of(run: Run) -> tuple:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({**recipe, "output_dir": str(folder / run.name)}, file)
            file.flush()
            words = ["--config", file.name, "--method", run.method, "--seed", str(run.seed), *rest]
            return parse([*words, "--method_options", json.dumps(run.options)], TokenDistillConfig)

    def train(run: Run) -> tuple[Any, dict[str, Any]]:
        trainer = build(*options_of(run))
        trainer.train()
        return trainer, {"steps": trainer.state.global_step, "trained_tokens": trainer.trained_tokens}

    def score(trainer: Any) -> dict[str, Any]:
        return accuracy(trainer.model, trainer.processing_class, problems, trainer.max_completion_length)

    runs = [Run(label, seed=seed, **method) for seed in range(own.seeds) for label, method in labelled.items()]
    for run in runs[: len(labelled)]:
        options_of(run)  # refuses what does not fit before the first run starts
    settings = {
        **{key: value for key, value in recipe.items() if key != "output_dir"},
        "flags": rest,
        "problems": len(problems),
    }
    rows = compare(runs, train, score, own.out, settings)
    print(table(rows))
    print(f"The rows are in {own.out}")
    return 0
