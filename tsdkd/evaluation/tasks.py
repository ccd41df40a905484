"""The harness's tasks: found by name, checked and loaded before anything is scored."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

NEEDS = "tsdkd evaluate needs lm-evaluation-harness: pip install 'tsdkd[eval]'"


def lm_eval_package() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(f"{NEEDS} ({error}).") from error
    return lm_eval


# ---------------------------------------------------------------------- tasks


def find_tasks(names: Iterable[str], include_path: Iterable[str | Path] = ()) -> Any:
    """The harness's task manager that knows all these names.

    Args:
        names: tasks, groups or tags.
        include_path: folders of task YAMLs, looked at before the harness's own thousands.

    Raises:
        ValueError: a name that nobody knows, with the closest ones; a folder that is not there; no harness.
    """
    lm_eval_package()
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in include_path]
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"--include_path {folder} is no folder: pass one that holds task YAMLs.")
    names = list(names)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if _knows(manager, names):
        return manager
    manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            raise ValueError(
                f"the task {name!r} is unknown to lm-evaluation-harness"
                + (f"; close to it: {', '.join(close)}." if close else ".")
                + " Tasks of your own: --include_path FOLDER with their YAML."
            )
    return manager


def _knows(manager: Any, names: list[str]) -> bool:
    """Whether all these and what they are made of are in a manager's folders."""
    try:
        return all(list(leaf_configs(manager, name)) for name in names)
    except KeyError:
        return False


def leaf_configs(manager: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks that a task, group or tag stands for, with their configurations; nothing is loaded."""
    entry = manager.task_index[name]
    children = (entry.cfg or {}).get("task") if entry.cfg else None
    if name in manager.all_groups and isinstance(children, list):
        for child in children:
            yield from leaf_configs(manager, child if isinstance(child, str) else child["task"])
    elif name in manager.all_tags:
        for child in sorted(entry.tags):
            yield from leaf_configs(manager, child)
    else:
        yield name, entry.cfg or {}


def metrics_of(manager: Any, name: str) -> list[str]:
    """The metrics that a task or group is scored by."""
    entry = manager.task_index[name].cfg or {}
    listed = entry.get("aggregate_metric_list") or [m for _, leaf in leaf_configs(manager, name) for m in leaf["metric_list"]]
    return list(dict.fromkeys(str(metric["metric"]).rpartition(".")[2] for metric in listed))


def runs_code(manager: Any, name: str) -> bool:
    """Whether scoring a task runs what the model wrote."""
    return any(config.get("unsafe_code") for _, config in leaf_configs(manager, name))


def refuse_code(manager: Any, tasks: list[str]) -> None:
    """Refuse tasks that are scored by running code, where nobody gave leave.

    Raises:
        ValueError: naming the task and the way out.
    """
    for task in tasks:
        if runs_code(manager, task):
            raise ValueError(
                f"{task} is scored by running the code that the model writes, on this machine and with your rights. Score it "
                "by tsdkd evaluate in a container, with --allow-code-execution, or leave it out (of the suite: --skip mbpp)."
            )


@contextmanager
def code_may_be_named() -> Iterator[None]:
    """The metric that runs code refuses to be imported without this word; whether it may run is asked by `refuse_code`."""
    with mock.patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}):
        yield


def _check_sentence_splitter(manager: Any, name: str) -> None:
    """IFEval counts sentences by a file of NLTK's that the harness fetches without saying whether it could."""
    if not any(leaf == "ifeval" for leaf, _ in leaf_configs(manager, name)):
        return
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("1", "ON", "YES", "TRUE") and not isinstance(error, ImportError):
            return  # the harness fetches it
        raise ValueError(
            f"{name} needs NLTK's punkt_tab, which is not here. Where there is a network, once: pip install 'tsdkd[eval]'; "
            "python -c \"import nltk; nltk.download('punkt_tab')\"."
        ) from error


def task_digest(manager: Any, name: str) -> str:
    """A short digest of a task's configuration and of the local files that it reads."""
    hashed = hashlib.sha256()
    for leaf, config in leaf_configs(manager, name):
        text = json.dumps(config, sort_keys=True, default=str)
        hashed.update(f"{leaf} {re.sub('/[^ ]*/', '', text)}".encode())  # not where the package lies
        files = (config.get("dataset_kwargs") or {}).get("data_files") or []
        named = files.values() if isinstance(files, dict) else [files]
        for file in (Path(f) for part in named for f in ([part] if isinstance(part, str) else part)):
            if file.is_file():
                hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


def load_task(manager: Any, name: str, shots: int | None = None) -> dict[str, Any]:
    """A task or group with its data.

    Raises:
        ValueError: the data are neither cached nor to be had; which they are, and how to fetch them.
    """
    try:
        with code_may_be_named():
            loaded = manager.load([name])
    except (OSError, ImportError, KeyError, ValueError) as error:
        sources = {(config.get("dataset_path"), config.get("dataset_name")) for _, config in leaf_configs(manager, name)}
        named = sorted((path, part) for path, part in sources if path and path != "json")
        if isinstance(error, (ConnectionError, FileNotFoundError)) and named:
            calls = [f"load_dataset({path!r}{f', {part!r}' if part else ''})" for path, part in named]
            if runs_code(manager, name):
                calls.append("__import__('evaluate').load('code_eval')")
            raise ValueError(
                f"the data of {name} ({', '.join(sorted({path for path, _ in named}))}) are neither in the cache nor to be had "
                f"({str(error).splitlines()[0]}). Where there is a network, once: python -c "
                f'"from datasets import load_dataset; {"; ".join(calls)}"; then again, with HF_HUB_OFFLINE=1 if you like.'
            ) from error
        raise ValueError(f"the task {name} cannot be loaded: {type(error).__name__}: {error}") from error
    _check_sentence_splitter(manager, name)
    for task in loaded["tasks"].values():
        if shots is not None and task.get_config("num_fewshot") != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


# It is said of every task whose data a function makes, and asks for nothing.
_SAID = "Custom kwargs can be passed to"
logging.getLogger("lm_eval.api.task").addFilter(lambda record: _SAID not in record.getMessage())


def ready_tasks(names: list[str], include_path: Iterable[str | Path]) -> Any:
    """The task manager of tasks that a run will score later: each is known, runs no code, and has its data here.

    Raises:
        ValueError: as `find_tasks`, `refuse_code` and `load_task`.
    """
    manager = find_tasks(names, include_path)
    refuse_code(manager, names)
    for name in names:
        load_task(manager, name)
    return manager
