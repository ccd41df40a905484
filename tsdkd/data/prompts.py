"""Prompts: what a data set must look like before a run starts, and how one is read and mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tsdkd.checks import Problem

_SHOWN = 5
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _rows(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:_SHOWN]))
    return f"{'row' if len(indices) == 1 else 'rows'} {shown}{', …' if len(indices) > _SHOWN else ''}"


def _kind(prompt: Any) -> str:
    """`text`, `chat`, `empty` or what else a prompt is."""
    if prompt is None:
        return "None"
    if isinstance(prompt, str):
        return "text" if prompt.strip() else "empty"
    if isinstance(prompt, (list, tuple)):
        if not prompt:
            return "empty"
        if any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in prompt):
            return "chats with parts (images?), where this trainer takes texts"
        if all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
            return "chat" if any(m["content"] for m in prompt) else "empty"
        return "a list that is not chat messages"
    return type(prompt).__name__


def prompt_problems(dataset: Any, role: str, rows_needed: int = 1, batch: str = "") -> Iterator[Problem]:
    """What keeps a data set from being trained on: splits instead of rows, no `prompt` column, images, too few rows, or prompts
    that are empty, None, or partly text and partly chats (with their row numbers).

    Args:
        dataset: a `datasets.Dataset`; of an `IterableDataset` only the columns are checked.
        role: `train_dataset` or `eval_dataset`, for messages.
        rows_needed: the rows of one generation batch.
        batch: how that number comes about, for messages.
    """
    if isinstance(dataset, dict):
        first = next(iter(dataset), "train")
        yield Problem(f"{role} holds the splits {', '.join(dataset)}", do=f"pass one of them, e.g. dataset[{first!r}]")
        return
    columns = getattr(dataset, "column_names", None)
    if isinstance(dataset, (list, tuple)) and columns is None:
        yield Problem(f"{role} is a {type(dataset).__name__}", do="make it a data set with datasets.Dataset.from_list(rows)")
        return
    if columns is not None and "prompt" not in columns:
        yield Problem(
            f"{role} has no 'prompt' column; it has: {', '.join(columns) or 'none'}",
            do=f"rename the one that holds the prompts, e.g. dataset.rename_column({(columns or ['instruction'])[0]!r}, "
            "'prompt'), or pass --prompt_column",
        )
        return
    if columns is not None and {"image", "images"} & set(columns):
        yield Problem(f"{role} has images", "this trainer distils text only", "remove the column with dataset.remove_columns")
    if not hasattr(dataset, "__len__"):
        return
    if len(dataset) < rows_needed:
        yield Problem(
            f"{role} has {len(dataset)} rows but one generation batch takes {rows_needed}{batch}",
            "nothing would be trained",
            "add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps",
        )
    kinds = _kinds(dataset)
    for kind, rows in kinds.items():
        if kind not in ("text", "chat"):
            yield Problem(
                f"{role} has {len(rows)} prompts that are {kind} ({_rows(rows)})",
                "a prompt is a text or a list of chat messages {'role': …, 'content': …}, with something in it",
                "remove or mend those rows",
            )
    if len(kinds) > 1 and set(kinds) == {"text", "chat"}:
        yield Problem(
            f"{role} mixes prompts of two types",
            f"{len(kinds['text'])} are text ({_rows(kinds['text'])}) and {len(kinds['chat'])} are chats "
            f"({_rows(kinds['chat'])})",
            "make them one type: [{'role': 'user', 'content': text}]",
        )


def _kinds(dataset: Any) -> dict[str, list[int]]:
    """The rows of each kind of prompt."""
    kinds: dict[str, list[int]] = {}
    for row, prompt in enumerate(dataset["prompt"]):
        kinds.setdefault(_kind(prompt), []).append(row)
    return kinds


def are_chats(dataset: Any) -> bool:
    """Whether a data set's prompts are chats; False of a stream, whose rows are not read ahead."""
    return hasattr(dataset, "__len__") and len(dataset) > 0 and _kind(dataset[0]["prompt"]) == "chat"


def fitting_rows(lengths: Sequence[int], limit: int, why: str, role: str, drop: bool) -> list[int]:
    """The rows whose prompts leave room for a completion.

    Args:
        lengths: tokens of each prompt.
        limit: the longest prompt allowed, tokens.
        why: what set the limit, for messages.
        drop: leave the others out instead of refusing them.

    Raises:
        ValueError: how many prompts are too long and the first of them, unless `drop`; or no prompt fits.
    """
    long = [row for row, length in enumerate(lengths) if length > limit]
    if len(long) == len(lengths) and drop:
        raise ValueError(
            f"all {len(lengths)} prompts of {role} are longer than {limit} tokens, none is left: {why}. Raise max_length "
            "or lower max_completion_length."
        )
    if long and not drop:
        raise ValueError(
            f"{len(long)} of {len(lengths)} prompts of {role} are longer than {limit} tokens, the first is row {long[0]} with "
            f"{lengths[long[0]]}: {why}. Shorten them, raise max_length, lower max_completion_length, or drop them with "
            f"drop_long_prompts=True."
        )
    excluded = set(long)
    return [row for row in range(len(lengths)) if row not in excluded]


def load_rows(name: str, *, config: str | None = None, split: str = "train") -> Any:
    """A data set from the Hub or from a local JSONL, JSON, CSV or Parquet file; `split` may be a slice, `train[:100]`.

    Raises:
        ValueError: the file is not there.
    """
    import datasets

    path = Path(name)
    if path.suffix not in _BUILDERS:
        return datasets.load_dataset(name, config, split=split)
    if not path.is_file():
        raise ValueError(f"there is no file {name}: pass the path of one ({', '.join(_BUILDERS)}), or a data set's name.")
    part = split[split.index("[") :] if "[" in split else ""  # a file is one split, whatever it is called; a slice is a slice
    return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=f"train{part}")


def load_prompts(name: str, *, config: str | None = None, split: str = "train", **mapping: Any) -> Any:
    """A data set of prompts, as `load_rows` takes it.

    Args:
        name: the data set's name or a file's path.
        config: the data set's configuration.
        split: which split.
        mapping: as `map_prompts` takes it.

    Raises:
        ValueError: the file or the column is not there (the message lists what is).
    """
    return map_prompts(load_rows(name, config=config, split=split), **mapping)


def map_prompts(
    rows: Any,
    *,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    drop_duplicates: bool = False,
    as_chat: bool = False,
) -> Any:
    """The prompts' column as `prompt`, the completions' as `completion` where there is one, and nothing else of the rows.

    Args:
        rows: a `datasets.Dataset`.
        prompt_column: the column that holds the prompts.
        completion_column: the column that holds given completions; its default may be missing.
        drop_duplicates: keep the first of equal prompts.
        as_chat: make each text a chat of one user message.

    Raises:
        ValueError: a named column is not there, or `as_chat` for prompts that are chats already.
    """
    if prompt_column not in rows.column_names:
        raise ValueError(
            f"no column {prompt_column!r} in the data set; it has: {', '.join(rows.column_names)}. Pass --prompt_column."
        )
    kept = {prompt_column: "prompt"}
    if completion_column in rows.column_names:
        kept[completion_column] = "completion"
    elif completion_column != "completion":
        raise ValueError(
            f"no column {completion_column!r} in the data set; it has: {', '.join(rows.column_names)}. Pass "
            "--completion_column."
        )
    rows = rows.select_columns(list(kept)).rename_columns({old: new for old, new in kept.items() if old != new})
    if drop_duplicates:
        first: dict[str, int] = {}
        for row, prompt in enumerate(rows["prompt"]):
            first.setdefault(repr(prompt), row)
        rows = rows.select(sorted(first.values()))
    if as_chat:
        if len(rows) and not isinstance(rows[0]["prompt"], str):
            raise ValueError("prompt_as_chat makes chats of texts, but these prompts are chats already: leave it out.")
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        if "completion" in rows.column_names and isinstance(rows[0]["completion"], str):
            rows = rows.map(lambda row: {"completion": [{"role": "assistant", "content": row["completion"]}]})
    return rows
