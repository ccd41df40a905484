"""Every method from the same start on the demo's models and problems.

`python examples/04_compare_methods.py [folder] [flags of tsdkd compare]`: an hour or so on two CPU cores (`--steps 20` for a
glance); interrupted, it goes on where it stopped. Models this small are faster with OMP_NUM_THREADS=1.
"""

import json
import sys
from pathlib import Path

import yaml

from tsdkd.cli.compare import main
from tsdkd.demo.problems import held_out, make_problems
from tsdkd.demo.run import HELD_OUT_SEED, LEVELS, shipped

STEPS, BATCH = 100, 64


def rows(problems):
    """A prompt and its worked solution, for the methods that train on given answers."""
    for problem in problems:
        yield {
            "prompt": [{"role": "user", "content": problem.question}],
            "completion": [{"role": "assistant", "content": problem.solution}],
        }


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def recipe(folder, steps):
    """A recipe of `tsdkd train`, with a mapping of methods."""
    test = held_out(1000, HELD_OUT_SEED, set(), LEVELS)
    excluded = {problem.question for problem in test}
    train = [p for p in make_problems(2 * steps * BATCH, 1, LEVELS) if p.question not in excluded]
    return {
        "model_name_or_path": shipped("student"),
        "teacher_model_name_or_path": shipped("teacher"),
        "dataset_name": write(folder / "train.jsonl", rows(train[: steps * BATCH])),
        "eval_dataset_name": write(folder / "eval.jsonl", rows(train[-BATCH:])),
        "eval_dataset_split": "train",
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 5.0e-4,
        "max_length": 128,
        "max_completion_length": 48,
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 10),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "methods": {
            # TSD-KD with its auxiliary terms scaled to a vocabulary of 60 tokens, as in the demo; then the paper's weights.
            "tsd_kd": {"indirect_weight": 0.01, "num_candidates": 3, "entropy_weight": 0.01},
            "tsd_kd, paper's weights": {"method": "tsd_kd"},
            "gkd": {},
            "gkd on a random half": {"method": "gkd", "selection": "random"},
            "distillm": {},
            "minillm": {},
            "speculative_kd": {"top_k": 3},  # 25 of 60 tokens would accept all
            "supervised_kd": {},
            "seq_kd": {},
            "akl": {},
            "taid": {},
        },
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    folder = Path(arguments.pop(0) if arguments and not arguments[0].startswith("--") else "comparison")
    steps = int(arguments.pop(arguments.index("--steps") + 1)) if "--steps" in arguments else STEPS
    arguments = [argument for argument in arguments if argument != "--steps"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, steps), sort_keys=False))
    sys.exit(main(["--config", str(folder / "recipe.yaml"), "--out", str(folder / "comparison.jsonl"), *arguments]))
