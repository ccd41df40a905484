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

from tsdkd.data.rows import ScoreRow, append_rows, mend_rows, read_scores, replace_rows
from tsdkd.data.spent import read_spent
from tsdkd.evaluation import harness
from tsdkd.evaluation import tasks as harness_tasks
from tsdkd.evaluation.suite import BY_TASK
from tsdkd.provenance import provenance
from tsdkd.teachers.sources import lacks_tokenizer


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
    def at(cls, name: str, label: str | None = None, revision: str | None = None) -> Model:
        """A name on the hub (in a revision), or a folder with weights (or an adapter) and a tokenizer.

        Raises:
            ValueError: a folder without a model or without a tokenizer.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if name[:1] in "./~" or name.count("/") > 1:
                raise ValueError(f"--model {name}: there is no such folder. Pass a folder with a model, or a model's name.")
            return cls(name, revision or "", label or (f"{name}@{revision}" if revision else name))
        if revision is not None:
            raise ValueError(f"--revision {revision} was given for the folder {name}, which has none: leave it out.")
        name = str(folder) if name[:1] == "~" else name
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"--model {name} holds no config.json and no adapter_config.json: pass the folder that a run saved its "
                "model in."
            )
        if lacks_tokenizer(name):
            raise ValueError(
                f"--model {name} holds no tokenizer (tokenizer.json): save the one it was trained with beside it, "
                "AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(FOLDER)."
            )
        whole = folder.resolve()  # of several runs each has a "best" and a "checkpoint-100"
        own = (
            f"{whole.parent.name}/{whole.name}" if whole.name == "best" or whole.name.startswith("checkpoint-") else whole.name
        )
        return cls(name, _digest(folder), label or own)


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


def _identity(task: str, digest: str, model: Model, settings: Settings) -> str:
    """What a scoring that is still to be made will be known by."""
    asked = dataclasses.asdict(settings)
    fields: dict[str, Any] = {**model.fields(), "requested": task, "task_digest": digest, "settings": asked}
    return ScoreRow(task=task, metric="", score=0.0, n=0, **fields).identity


def _whole_scorings(path: Path, mend: bool) -> list[ScoreRow]:
    """The rows of a results file without those of a scoring that was cut off while it was written; `mend` takes them out."""
    found = read_scores(path)
    count = collections.Counter(row.identity for row in found)
    whole = [row for row in found if count[row.identity] >= row.rows]
    if mend:
        mend_rows(path, [row.to_json() for row in whole])
    return whole


def _built(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the model does not fit into memory ({str(error).splitlines()[0]}): load it in --dtype bfloat16, free the GPU, "
            "lower vLLM's --gpu_memory_utilization, or use a larger GPU."
        ) from error


def rows_of(
    scores: list[harness.Score], requested: str, model: Model, settings: Settings, task_digest: str, **more: Any
) -> list[ScoreRow]:
    """What a results file keeps of a task's scores; `more` is `step`, `seconds` or `spent`, and what each row holds beside."""
    origin = provenance(settings.seed)
    known: dict[str, Any] = {name: more.pop(name) for name in ("step", "seconds", "spent") if name in more}
    rows = []
    for s in scores:
        benchmark = BY_TASK.get(s.task)
        rows.append(
            ScoreRow(
                task=s.task,
                benchmark=benchmark.name if benchmark else None,
                group=s.group,
                requested=requested,
                task_digest=task_digest,
                metric=s.metric,
                filter=s.filter,
                main=s.main,
                score=s.value,
                stderr=s.stderr,
                higher_is_better=s.higher_is_better,
                n=s.n,
                shots=s.shots,
                max_gen_toks=s.max_gen_toks,
                version=s.version,
                chat_template=settings.chat_template,
                partial=settings.limit is not None,
                rows=len(scores),
                settings=dataclasses.asdict(settings),
                items=s.items,
                origin=origin,
                more=more,
                **{**model.fields(), **known},
            )
        )
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
) -> list[ScoreRow]:
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
    manager = harness_tasks.find_tasks(tasks, include_path or [])
    if not allow_code:
        harness_tasks.refuse_code(manager, tasks)
    standing = _whole_scorings(out, mend=writes)
    done = {row.identity for row in standing}
    pairs = [(task, setting) for task in tasks for setting in settings]
    digests = {task: harness_tasks.task_digest(manager, task) for task in tasks}
    wanted = [(task, setting, _identity(task, digests[task], model, setting)) for task, setting in pairs]
    left = [(task, setting) for task, setting, key in wanted if key not in done]
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} of {len(wanted)} scorings stand in {out} already.")
    asked = {key for *_, key in wanted}
    kept = [row for row in standing if row.identity in asked]
    lm, began, took = None, time.perf_counter(), read_spent(model.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    if writes and any(row.label != model.label for row in kept):
        say(f"They stand under another label; they are now called {model.label!r}.")
        renamed = [dataclasses.replace(row, label=model.label) if row.identity in asked else row for row in standing]
        replace_rows(out, [row.to_json() for row in renamed])
        kept = [row for row in renamed if row.identity in asked]
    # What is missing is said now, not hours later; each scoring has tasks of its own, since they keep their requests.
    ready = [harness_tasks.load_task(manager, task, harness.shots_of(task, setting.shots)) for task, setting in left]
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
        rows = rows_of(scores, task, model, setting, digests[task], seconds=seconds, spent=took, **more)
        if samples is not None:
            _write_samples(samples, answers, model, setting)
        append_rows(out, [row.to_json() for row in rows])
        kept += rows
        first = rows[0]
        say(f"    {first.metric} ({first.filter}) {first.score:.4f}, n = {first.n}, {seconds:.0f} s")
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
