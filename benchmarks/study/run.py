"""The study, resumable: `python benchmarks/study/run.py [--minutes 90]` makes the models and data that are missing, tunes the
learning rates on validation problems, and runs `tsdkd compare` on every job below that is not done, half of its labels beside
the other half. Rows are in `rows/`, appended run by run; stopped at any point it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from models import FULL, Size, made, written
from problems import NUMBERS, TEMPLATES

from tsdkd.pipelines.compare import table

HERE = Path(__file__).parent
CONFIGS = HERE / "configs"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = (3e-4, 1e-3)  # then the next, as long as the best is the outermost tried
LIKE = "gkd"  # whose FLOPs at its steps every method has
MOST = 3  # times those steps at most
PARTS = 2  # of a job, each with every other label; they run beside each other
SAMPLED = 400


@dataclass(frozen=True)
class Start:
    """A student, its teacher and the problems that it is taught on."""

    student: str
    teacher: str
    data: str


STARTS = {
    "words": Start("words/medium", "words/teacher", "words"),
    "words-small": Start("words/small", "words/teacher", "words"),
    "words-habit": Start("words/habit", "words/teacher", "words"),
    "plans": Start("plans/medium", "plans/teacher", "plans"),
    "plans-small": Start("plans/small", "plans/teacher", "plans"),
    "sure": Start("words/sure", "words/teacher", "measures"),
    "words-8000": Start("words-8000/small", "words-8000/teacher", "words-8000"),
}


@dataclass(frozen=True)
class Job:
    """A configuration at a start, with so many seeds."""

    start: str
    config: str
    seeds: int = 5

    @property
    def name(self) -> str:
        return f"{self.start}-{self.config}"


# In the order of what they are worth; any of them can be run by itself (`--jobs`).
JOBS = (
    Job("words", "methods"),
    Job("words", "terms"),
    Job("words", "controls"),
    Job("plans", "methods"),
    Job("sure", "methods"),
    Job("words", "budgets", 3),
    Job("words", "candidates", 3),
    Job("sure", "candidates", 3),
    Job("words-habit", "methods", 3),
    Job("plans", "terms", 3),
    Job("words", "sweeps", 3),
    Job("words", "more_methods", 3),
    Job("words-small", "methods", 3),
    Job("words-8000", "methods", 3),
)


def methods_of(job: Job) -> dict[str, dict]:
    """The labels of a configuration with their options."""
    named = yaml.safe_load((CONFIGS / f"{job.config}.yaml").read_text())["methods"]
    return {label: {"method": label, **(options or {})} for label, options in named.items()}


def recipe(job: Job, size: Size, tuning: bool, shared: dict) -> dict:
    """What `tsdkd compare` is given: the shared settings, the start's models and data, and the methods, each at the learning
    rate that suits it and for as many steps as the FLOPs of GKD's allow it."""
    start, base = STARTS[job.start], yaml.safe_load((CONFIGS / "base.yaml").read_text())
    named: dict = {}
    for label, options in methods_of(job).items():
        own = options.pop("training", {})
        like = options.pop("tuned_as", label)  # an ablation learns at the rate of what it ablates
        budget = options.pop("budget", 1.0)  # times the FLOPs of GKD at its steps
        if not tuning:
            found = tuned(size)[job.start][like]
            found["max_steps"] = max(1, round(budget * found["max_steps"]))
            named[label] = {**options, "training": {**found, **own}}
        elif like == label:
            for rate in wanted(label, rows_in(f"tuning-{job.name}", size)):
                named[f"{label} @ {rate:g}"] = {**options, "training": {**own, "learning_rate": rate}}
    return {
        **base,
        **shared,
        "model_name_or_path": start.student,
        "teacher_model_name_or_path": start.teacher,
        "dataset_name": f"data/{start.data}/train.jsonl",
        "methods": named,
    }


def tuned(size: Size) -> dict:
    """What was tuned, by start and label: `learning_rate` and `max_steps`."""
    path = size.kept / "tuned.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def rows_in(name: str, size: Size = FULL) -> list[dict]:
    """The rows of a job's parts."""
    paths = [size.kept / "rows" / f"{name}.{part}.jsonl" for part in range(PARTS)]
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def wanted(label: str, rows: list[dict]) -> list[float]:
    """The rates of a label to try: the first ones, and then outwards, until the best has one on either side."""
    found = {row["training"]["learning_rate"]: row["accuracy"] for row in rows if row["label"].rpartition(" @ ")[0] == label}
    if not set(FIRST) <= set(found):
        return [rate for rate in FIRST if rate not in found]
    tried, best = sorted(found), max(found, key=lambda rate: (found[rate], -rate))
    place = RATES.index(best)
    outwards = [RATES[place - 1]] if best == tried[0] and place else []
    outwards += [RATES[place + 1]] if best == tried[-1] and place + 1 < len(RATES) else []
    return outwards


def choose(job: Job, size: Size) -> None:
    """Write the rate of each label that was best on the validation problems, and its steps, into `tuned.yaml`."""
    rows = rows_in(f"tuning-{job.name}", size)
    best: dict[str, dict] = {}
    for row in rows:
        label, at, _ = row["label"].rpartition(" @ ")
        if at and (label not in best or row["accuracy"] > best[label]["accuracy"]):
            best[label] = row
    chosen = tuned(size)
    flops = {label: sum(row["flops"].values()) / row["steps"] for label, row in best.items()}
    like = [row for row in rows_in(f"tuning-{job.start}-methods", size) if row["label"].startswith(f"{LIKE} @ ")]
    allowed = sum(like[0]["flops"].values()) / like[0]["steps"] if like else flops[LIKE]
    for label, row in best.items():
        ratio = min(allowed / flops[label], MOST)
        found = {"learning_rate": row["training"]["learning_rate"], "max_steps": round(row["steps"] * ratio)}
        chosen.setdefault(job.start, {})[label] = found
    told = "# Written by run.py: the best rates on the validation problems (seed 0), and the steps that GKD's FLOPs allow.\n"
    (size.kept / "tuned.yaml").write_text(told + yaml.safe_dump(chosen, sort_keys=True))


def command(job: Job, part: int, size: Size, tuning: bool, shared: dict) -> list[str]:
    """`tsdkd compare` for a part of a job; paths are relative to `made/`, so that rows name none of a machine."""
    name = f"tuning-{job.name}" if tuning else job.name
    folder, made_of = size.made / "runs" / name, recipe(job, size, tuning, shared)
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(made_of["methods"])[part::PARTS]
    made_of["methods"] = {label: made_of["methods"][label] for label in labels}
    (folder / f"{part}.yaml").write_text(yaml.safe_dump(made_of, sort_keys=False))
    near = lambda path: os.path.relpath(path, size.made)  # noqa: E731
    data = f"data/{STARTS[job.start].data}"
    problems = f"{data}/validation.jsonl" if tuning else f"{data}/test.jsonl"
    words = ["--config", f"runs/{name}/{part}.yaml", "--output_dir", f"runs/{name}/{part}", "--problems", problems]
    words += ["--out", near(size.kept / "rows" / f"{name}.{part}.jsonl"), "--max_new_tokens", str(size.longest)]
    sampled = ["--samples", "4", "--sampled_problems", str(min(SAMPLED, sum(count for _, count in size.tested)))]
    words += ["--seeds", "1"] if tuning else ["--seeds", str(job.seeds), *sampled]
    if not labels:
        return []
    return [sys.executable, near(HERE / "controls.py"), "compare", *words]


def run(job: Job, deadline: float, size: Size = FULL, shared: dict | None = None) -> bool:
    """Tune where rates are missing, then compare; whether it came to its end.

    Args:
        job: which.
        deadline: of `time.monotonic`, at which it is cut off.
        size: of everything.
        shared: settings of the runs other than `base.yaml` has.
    """
    start = STARTS[job.start]
    for model in (start.teacher, start.student):
        if deadline - time.monotonic() < 60:
            return False
        made(model, size)  # to its end, once it has begun
    written(start.data, size)
    if not _tuned(job, deadline, size, shared or {}):
        return False
    return _compared(job, deadline, size, False, shared or {})


def _tuned(job: Job, deadline: float, size: Size, shared: dict) -> bool:
    """Whether what the job's labels learn at is known: tried, chosen and written down."""
    methods = methods_of(job)
    lent = {options["tuned_as"] for label, options in methods.items() if options.get("tuned_as", label) != label}
    headline = Job(job.start, "methods", job.seeds)
    first = LIKE not in tuned(size).get(job.start, {}) or not lent <= set(tuned(size).get(job.start, {}))
    if first and job.config != "methods" and job.config != "smoke" and not _tuned(headline, deadline, size, shared):
        return False
    own = {label for label, options in methods.items() if options.get("tuned_as", label) == label}
    while not own <= set(tuned(size).get(job.start, {})):
        if recipe(job, size, True, shared)["methods"]:
            if not _compared(job, deadline, size, True, shared):
                return False
        else:
            choose(job, size)
    return True


def _compared(job: Job, deadline: float, size: Size, tuning: bool, shared: dict) -> bool:
    """Whether all parts came to their end."""
    commands = [command(job, part, size, tuning, shared) for part in range(PARTS)]
    with ThreadPoolExecutor(PARTS) as parts:
        return all(list(parts.map(lambda words: _part(job, words, size, deadline), commands)))


def _part(job: Job, words: list[str], size: Size, deadline: float) -> bool:
    if not words:
        return True
    left = deadline - time.monotonic()
    if left < 60:
        return False
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = size.made / "runs" / f"{job.name}.log"
    with path.open("a") as log:
        process = subprocess.Popen(words, cwd=size.made, env={**os.environ, **quiet}, stdout=log, stderr=log)
        try:
            status = process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the run that is cut off is made again, or goes on
            process.wait()
            return False
    if status:
        raise RuntimeError(f"{job.name} failed with status {status}: see {path}")
    return True


def smoke(folder: Path) -> None:
    """Everything once, of models that have learned nothing, one seed, two steps: that it runs is all that it says."""
    kept = folder.resolve()
    (kept / "rows").mkdir(parents=True, exist_ok=True)
    few = {"model_steps": 2, "validation": 4, "prompts": 16, "tested": ((NUMBERS, 4), (TEMPLATES, 2)), "longest": 8, "batch": 2}
    size = Size(kept / "made", kept, **few)
    shared = {"max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 8, "max_length": 128}
    if not run(Job("words-habit", "smoke", 1), time.monotonic() + 600, size, shared):
        raise SystemExit("the smoke run did not come to its end within ten minutes")
    print(table(rows_in("words-habit-smoke", size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--jobs", help="names, comma-separated; default: all, in order")
    parser.add_argument("--smoke", type=Path, help="a folder: the first job there with untrained models, to see that it runs")
    args = parser.parse_args()
    by_name = {job.name: job for job in JOBS}
    unknown = sorted(set(args.jobs.split(",")) - set(by_name)) if args.jobs else []
    if unknown:
        raise SystemExit(f"no job {', '.join(unknown)}; there are: {', '.join(by_name)}")
    if args.smoke:
        return smoke(args.smoke)
    chosen = [by_name[name] for name in args.jobs.split(",")] if args.jobs else list(JOBS)
    deadline = time.monotonic() + 60 * args.minutes
    for job in chosen:
        print(f"{job.name}: {'done' if run(job, deadline) else 'to be continued'}", flush=True)


if __name__ == "__main__":
    main()
