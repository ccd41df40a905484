"""`tsdkd evaluate`: benchmarks by lm-evaluation-harness, and training prompts that stand in them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from tsdkd.checks import check_writable


def bundled_tasks() -> str:
    """The folder of the tasks that come with the package."""
    return str(files("tsdkd.demo").joinpath("eval_tasks"))


def names_in(text: str | None) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _shots(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _batch_size(text: str) -> int | str:
    return "auto" if text == "auto" else _count(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tsdkd evaluate",
        allow_abbrev=False,
        description="Score a model on the paper's ten benchmarks or on tasks of your own, by lm-evaluation-harness, and append "
        "rows to a JSONL file. Interrupted, it goes on with the first task that has no rows.",
    )
    parser.add_argument("--model", help="a folder that a run saved (of a model or an adapter), or a model's name")
    parser.add_argument("--revision", help="of a model on the Hub: a branch, a tag or a commit")
    parser.add_argument("--label", help="what tables call it; default: the folder's or the model's name")
    parser.add_argument("--suite", choices=["paper"], help="the paper's ten benchmarks")
    parser.add_argument("--tasks", help="names of the harness, or of --include_path, comma-separated")
    parser.add_argument("--skip", default="", help="tasks of the suite to leave out, comma-separated")
    parser.add_argument("--include_path", action="append", default=[], metavar="DIR", help="a folder of task YAMLs")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf", help="transformers or vLLM (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="rows go here (default: results.jsonl; of --check-overlap overlap.jsonl, written anew)"
    )
    parser.add_argument(
        "--chat_template",
        choices=["off", "on", "both"],
        help="put items as they are, as chats, or score both; default: as chats where the model has a chat template",
    )
    parser.add_argument("--shots", type=_shots, help="worked examples before each item; default: the suite's or the task's own")
    parser.add_argument("--limit", type=_count, help="the first items only; the rows are marked as partial")
    parser.add_argument("--max_gen_toks", type=_count, help="the longest completion, in place of each task's own")
    parser.add_argument("--batch_size", type=_batch_size, default="auto", help="found automatically by default")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto is the checkpoint's",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--log_samples", action="store_true", help="keep every item's prompt and answer, OUT.samples.jsonl")
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run model-written code, which MBPP is scored by: use a container"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model's own code run")
    parser.add_argument("--max_model_len", type=_count, help="vLLM's context; default: the model's")
    parser.add_argument(
        "--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--check-overlap",
        metavar="DATASET",
        help="score nothing: report prompts of this training set (a name or a file) that stand in the tasks' items",
    )
    parser.add_argument("--prompt_column", help="of that training set (default: prompt, or messages and the like)")
    parser.add_argument("--dataset_split", default="train", help="of that training set (default: %(default)s)")
    return parser


def _tasks(own: argparse.Namespace) -> list[str]:
    from tsdkd.evaluation.suite import BY_TASK, PAPER

    named = names_in(own.tasks)
    if not named and not own.suite:
        raise ValueError("nothing to score was named: pass --suite paper, or --tasks gsm8k,my_task.")
    if own.suite:
        named = [*(b.task for b in PAPER), *(task for task in named if task not in BY_TASK)]
    skipped = set(names_in(own.skip))
    if skipped - set(named):
        raise ValueError(f"--skip {', '.join(sorted(skipped - set(named)))}: not among the tasks: {', '.join(named)}.")
    return [task for task in dict.fromkeys(named) if task not in skipped]


def main(arguments: list[str]) -> int:
    own = _parser().parse_args(arguments)
    tasks = _tasks(own)
    folders = [bundled_tasks(), *own.include_path]
    if own.out is None:
        own.out = Path("overlap.jsonl" if own.check_overlap else "results.jsonl")
    if own.check_overlap:
        return _report_overlap(own, tasks, folders)
    if own.model is None:
        raise ValueError("no model was given: pass --model FOLDER_OR_NAME.")

    from tsdkd.evaluation import harness
    from tsdkd.evaluation.run import Model, Settings, evaluate
    from tsdkd.teachers.sources import has_chat_template, refuse_unreadable

    model = Model.at(own.model, own.label, own.revision)
    refuse_unreadable(model.name, own.revision, own.trust_remote_code)
    if own.chat_template is None:
        own.chat_template = "on" if has_chat_template(model.name, own.revision, own.trust_remote_code) else "off"
        chosen = {"on": "as chats: the model has a chat template", "off": "as they are: the model has no chat template"}
        print(f"Items are put {chosen[own.chat_template]} (--chat_template says otherwise).")
    chats = {"off": [False], "on": [True], "both": [False, True]}[own.chat_template]
    settings = [Settings(chat, own.limit, own.max_gen_toks, own.shots, own.seed, own.engine, own.dtype) for chat in chats]

    def build() -> Any:
        options: dict[str, Any] = {"dtype": own.dtype, "batch_size": own.batch_size, "trust_remote_code": own.trust_remote_code}
        if own.revision is not None:
            options["revision"] = own.revision
        if own.engine == "hf":
            return harness.hf_model(model.name, **options)
        if own.max_model_len is not None:
            options["max_model_len"] = own.max_model_len
        options["seed"] = own.seed
        return harness.vllm_model(model.name, gpu_memory_utilization=own.gpu_memory_utilization, **options)

    check_writable("out", own.out)
    check_writable("out", own.out.with_suffix(".samples.jsonl") if own.log_samples else None)
    first = os.environ.get("RANK", "0") == "0"
    samples = own.out.with_suffix(".samples.jsonl") if own.log_samples else None
    evaluate(
        tasks,
        model,
        build,
        settings,
        own.out,
        include_path=folders,
        allow_code=own.allow_code_execution,
        samples=samples,
        writes=first,
        say=print if first else lambda text: None,
    )
    if first:
        kept = f", the answers in {samples}" if samples and samples.is_file() else ""
        print(f"The rows are in {own.out}{kept}; tsdkd table {own.out}")
        if samples and not samples.is_file():
            print("No answers were kept: nothing was scored. Score into another --out with --log_samples.")
    return 0


def _report_overlap(own: argparse.Namespace, tasks: list[str], folders: list[str]) -> int:
    from tsdkd.data.prompts import load_prompts
    from tsdkd.evaluation import harness
    from tsdkd.evaluation import tasks as harness_tasks
    from tsdkd.evaluation.overlap import find_overlap

    if own.out.is_file() and '"metric"' in own.out.read_text()[:2000]:
        raise ValueError(f"--out {own.out} holds scores, which an overlap report would replace: name another file.")
    own.out.parent.mkdir(parents=True, exist_ok=True)
    rows = load_prompts(own.check_overlap, split=own.dataset_split, prompt_column=own.prompt_column)
    prompts = [
        row if isinstance(row, str) else "\n".join(turn["content"] or "" for turn in row if turn["role"] == "user")
        for row in rows["prompt"]
    ]
    manager = harness_tasks.find_tasks(tasks, folders)
    items = [item for task in tasks for item in harness.items_of(harness_tasks.load_task(manager, task))]
    found = find_overlap(prompts, items)
    with own.out.open("w") as file:
        for overlap in found:
            file.write(json.dumps(dataclasses.asdict(overlap)) + "\n")
    for task in dict.fromkeys(task for task, *_ in items):
        touched = [overlap for overlap in found if overlap.task == task]
        total = sum(1 for name, *_ in items if name == task)
        print(
            f"{task}: {len({o.item for o in touched})} of {total} items share a text with "
            f"{len({o.prompt_row for o in touched})} of {len(prompts)} prompts"
        )
    for overlap in found[:5]:
        print(f"  prompt {overlap.prompt_row} {overlap.how}: {overlap.task}, item {overlap.item}: {overlap.text[:100]}")
    print(f"All {len(found)} pairs are in {own.out}")
    return 0
