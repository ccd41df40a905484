"""Models to rows: one row a task, metric, filter and chat-template setting, each saying where it comes from."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsdkd.data.rows import mend_rows, replace_rows
from tsdkd.data.rows import read_rows as read_jsonl
from tsdkd.evaluation import harness
from tsdkd.evaluation.suite import BY_TASK
from tsdkd.provenance import provenance

_NEEDED = set("task requested task_digest metric score model model_digest label settings rows".split())


@dataclass(frozen=True)
class Settings:
    """What a score depends on beside the model and the task.

    Args:
        chat_template: whether items are put as chats.
        limit: the first items only; the row says so.
        max_gen_toks: the longest response, in place of each task's own.
        shots: worked examples, in place of the suite's or the task's own.
        seed: of sampling; the worked examples are drawn with the harness's own seed, so that all models see the same.
        engine: `hf` or `vllm`.
        dtype: of the weights.
    """

    chat_template: bool = False
    limit: int | None = None
    max_gen_toks: int | None = None
    shots: int | None = None
    seed: int = 0
    engine: str = "hf"
    dtype: str = "auto"

    def of_scoring(self) -> dict[str, Any]:
        """What `harness.score` is told."""
        return {"chat_template": self.chat_template, "limit": self.limit, "max_gen_toks": self.max_gen_toks, "seed": self.seed}


@dataclass(frozen=True)
class Model:
    """A model under evaluation: its name, a digest of its files, and the label that tables show."""

    name: str
    digest: str
    label: str

    def fields(self) -> dict[str, str]:
        """What a row says of it."""
        return {"model": self.name, "model_digest": self.digest, "label": self.label}

    @classmethod
    def at(cls, name: str, label: str | None = None) -> Model:
        """A name on the hub, or a folder with weights (or an adapter) and a tokenizer.

        Raises:
            ValueError: a folder without a model or without a tokenizer.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if name[:1] in "./~" or name.count("/") > 1:
                raise ValueError(f"--model {name}: there is no such folder. Pass a folder with a model, or a model's name.")
            return cls(name, "", label or name)
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"--model {name} holds no config.json and no adapter_config.json: pass the folder that a run saved its "
                "model in."
            )
        if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ValueError(
                f"--model {name} holds no tokenizer (tokenizer.json): save the one it was trained with beside it, "
                "AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(FOLDER)."
            )
        return cls(name, _digest(folder), label or folder.resolve().name)


def _digest(folder: Path) -> str:
    """A short digest of what a folder's answers depend on: weights, configurations, tokenizer and chat template, whole; of an
    adapter its base's name, too, which its configuration holds."""
    hashed = hashlib.sha256()
    kinds = ("*.safetensors", "*.bin", "*config*.json", "token*", "vocab*", "merges*", "*.jinja", "added_tokens.json")
    for file in sorted({file for kind in kinds for file in folder.glob(kind) if file.is_file()}):
        hashed.update(file.name.encode())
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                hashed.update(part)
    return hashed.hexdigest()[:16]


def _key(requested: str, task_digest: str, model: dict[str, str], settings: dict[str, Any]) -> str:
    """What a scoring is known by: the task as it was asked for and as it was then, the model's files, the settings."""
    return json.dumps([requested, task_digest, model["model_digest"] or model["model"], settings], sort_keys=True)


def _key_of(row: dict[str, Any]) -> str:
    return _key(row["requested"], row["task_digest"], row, row["settings"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a last line that was cut off is left out.

    Raises:
        ValueError: a line that is no row.
    """
    found = read_jsonl(path, "remove it, that task is then scored again")
    for number, row in enumerate(found, 1):
        missing = _NEEDED - set(row if isinstance(row, dict) else {})
        if missing:
            raise ValueError(f"{path}, line {number} is no row of tsdkd evaluate: it has no {', '.join(sorted(missing))}.")
    return found


def _whole_scorings(path: Path, mend: bool) -> list[dict[str, Any]]:
    """The rows of a results file without those of a scoring that was cut off while it was written; `mend` takes them out."""
    found = read_rows(path)
    count = collections.Counter(map(_key_of, found))
    whole = [row for row in found if count[_key_of(row)] >= row["rows"]]
    if mend:
        mend_rows(path, whole)
    return whole


def _built(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the model does not fit into memory ({str(error).splitlines()[0]}): load it in --dtype bfloat16, free the GPU, "
            "lower vLLM's --gpu_memory_utilization, or use a larger GPU."
        ) from error


def rows_of(scores: list[harness.Score], requested: str, model: Model, settings: Settings, **more: Any) -> list[dict[str, Any]]:
    """What a results file keeps of a task's scores."""
    origin = provenance(settings.seed)
    rows = []
    for s in scores:
        benchmark = BY_TASK.get(s.task)
        row = {
            "task": s.task,
            "benchmark": benchmark.name if benchmark else None,
            "group": s.group,
            "requested": requested,
            "metric": s.metric,
            "filter": s.filter,
            "main": s.main,
            "score": s.value,
            "stderr": s.stderr,
            "higher_is_better": s.higher_is_better,
            "n": s.n,
            "shots": s.shots,
            "max_gen_toks": s.max_gen_toks,
            "version": s.version,
            "chat_template": settings.chat_template,
            "partial": settings.limit is not None,
            "rows": len(scores),  # of this scoring, so that one that was cut off is known
            **model.fields(),
            "settings": dataclasses.asdict(settings),
            **more,
            **origin,
        }
        if s.items is not None:
            row["items"] = s.items
        rows.append(row)
    return rows


def evaluate(
    tasks: list[str],
    model: Model,
    build: Callable[[], Any],
    settings: list[Settings],
    out: Path,
    *,
    include_path: list[str | Path] | None = None,
    allow_code: bool = False,
    samples: Path | None = None,
    writes: bool = True,
    say: Callable[[str], None] = print,
    **more: Any,
) -> list[dict[str, Any]]:
    """Score a model on tasks and append a row for each metric; tasks whose rows stand in `out` are not run again.

    Args:
        tasks: names of the harness.
        model: whose rows these are.
        build: makes the harness's model; called once, and not at all where nothing is left to do.
        settings: each task is scored under each of them.
        out: the JSONL file.
        include_path: folders of task YAMLs.
        allow_code: run what the model wrote, for tasks that are scored so.
        samples: where every item's prompt, answer and score go, as JSONL; None keeps none.
        writes: whether this process writes, one of several that the harness deals the items out to.
        say: what tells the progress.
        more: what each row holds beside.

    Returns:
        the rows of these tasks, those that stood and the new ones.

    Raises:
        ValueError: an unknown task, one that runs code without leave, data that are not to be had.
    """
    manager = harness.find_tasks(tasks, include_path or [])
    if not allow_code:
        harness.refuse_code(manager, tasks)
    standing = _whole_scorings(out, mend=writes)
    done = {_key_of(row) for row in standing}
    pairs = [(task, setting) for task in tasks for setting in settings]
    digests = {task: harness.task_digest(manager, task) for task in tasks}
    wanted = [
        (task, setting, _key(task, digests[task], model.fields(), dataclasses.asdict(setting))) for task, setting in pairs
    ]
    left = [(task, setting) for task, setting, key in wanted if key not in done]
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} of {len(wanted)} scorings stand in {out} already.")
    asked = {key for *_, key in wanted}
    kept = [row for row in standing if _key_of(row) in asked]
    lm, began = None, time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    if writes and any(row["label"] != model.label for row in kept):
        say(f"They stand under another label; they are now called {model.label!r}.")
        renamed = [{**row, "label": model.label} if _key_of(row) in asked else row for row in standing]
        replace_rows(out, renamed)
        kept = [row for row in renamed if _key_of(row) in asked]
    # What is missing is said now, not hours later; each scoring has tasks of its own, since they keep their requests.
    ready = [harness.load_task(manager, task, harness.shots_of(task, setting.shots)) for task, setting in left]
    for number, (task, setting) in enumerate(left):
        if lm is None:
            lm = _built(build)
        how = "chat template" if setting.chat_template else "no chat template"
        spent = time.perf_counter() - began
        remaining = f", about {spent / number * (len(left) - number) / 60:.0f} min left" if number else ""
        say(f"[{number + 1}/{len(left)}] {task} ({how}){remaining}")
        started = time.perf_counter()
        scores, answers = harness.score(lm, ready[number], task, allow_code=allow_code, say=say, **setting.of_scoring())
        if not scores or not writes:  # the first process has them
            continue
        seconds = round(time.perf_counter() - started, 1)
        rows = rows_of(scores, task, model, setting, task_digest=digests[task], seconds=seconds, **more)
        if samples is not None:
            _write_samples(samples, answers, model, setting)
        with out.open("a") as file:  # in one write, so that a task's rows stand together or not at all
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        kept += rows
        first = rows[0]
        say(f"    {first['metric']} ({first['filter']}) {first['score']:.4f}, n = {first['n']}, {seconds:.0f} s")
    return kept


def _answer(sample: dict[str, Any]) -> Any:
    """The text that was written; where choices were scored, the likeliest."""
    found = [response[0] for response in sample["resps"] if response]
    if not found or isinstance(found[0], str):
        return found[0] if found else None
    likeliest = max(range(len(found)), key=lambda number: float(found[number][0]))
    return sample["arguments"][likeliest][1]


def _write_samples(path: Path, answers: dict[str, list[dict[str, Any]]], model: Model, settings: Settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for task, samples in answers.items():
            for sample in samples:
                arguments = sample["arguments"]
                row = {
                    "model": model.label,
                    "task": task,
                    "item": sample["doc_id"],
                    "filter": sample["filter"],
                    "chat_template": settings.chat_template,
                    "prompt": arguments[0][0] if arguments else None,
                    "target": sample["target"],
                    "answer": _answer(sample),
                    "taken": sample["filtered_resps"],
                    **{metric: sample.get(metric) for metric in sample.get("metrics", [])},
                }
                file.write(json.dumps(row, default=str) + "\n")
