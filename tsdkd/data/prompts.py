"""Prompts: what a data set must look like before a run starts, and how one is read and mapped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tsdkd.checks import Problem
from tsdkd.data.completions import clean_turn
from tsdkd.data.files import load_rows
from tsdkd.data.layouts import ASSISTANTS, CHATS, advice, is_chat, recognised

_SHOWN = 5
PIECE = 1000  # rows that are read at a time
# What of a row goes into its prompt or its completion.
IMAGES = ("image", "images")
ASKED = ("prompt", "tools", "chat_template_kwargs", *IMAGES, "teacher_prompt", "teacher_prompt_ids", "teacher")  # which ask
COLUMNS = (*ASKED, "completion", "completion_ids")


WITH_IMAGES = "chats with images"
ENDS_IN_ANSWER = "chats that end in an assistant's turn, behind which the student would write another"


def pieces(dataset: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A data set's rows a thousand at a time, with the number of the first: what goes into prompts and completions."""
    columns = [name for name in COLUMNS if name in dataset.column_names]
    for start in range(0, len(dataset), PIECE):
        piece = dataset[start : start + PIECE]
        yield (
            start,
            [dict(zip(columns, values, strict=True)) for values in zip(*(piece[name] for name in columns), strict=True)],
        )


def rows_named(indices: Sequence[int]) -> str:
    """Rows by their numbers, the first of many.

    Example:
        >>> rows_named([3]), rows_named([1, 2, 3, 4, 5, 6])
        ('row 3', 'rows 1, 2, 3, 4, 5, …')
    """
    shown = ", ".join(map(str, indices[:_SHOWN]))
    return f"{'row' if len(indices) == 1 else 'rows'} {shown}{', …' if len(indices) > _SHOWN else ''}"


def kind_of(prompt: Any) -> str:
    """`text`, `chat`, `chats with images`, `empty` or what else a prompt is."""
    if prompt is None:
        return "None"
    if isinstance(prompt, str):
        return "text" if prompt.strip() else "empty"
    if isinstance(prompt, (list, tuple)):
        if not prompt:
            return "empty"
        turns = [clean_turn(turn) if isinstance(turn, dict) else turn for turn in prompt]
        parts = [part for turn in turns if isinstance(turn, dict) for part in _parts(turn)]
        if any(not isinstance(part, dict) or part.get("type") not in ("text", "image") for part in parts):
            return "chats with parts that are neither texts nor images"
        if not all(isinstance(turn, dict) and "role" in turn and {"content", "tool_calls"} & turn.keys() for turn in turns):
            return "a list that is not chat messages"
        if turns[-1]["role"] in ASSISTANTS:
            return ENDS_IN_ANSWER
        if parts:
            return WITH_IMAGES
        return "chat" if any(turn.get("content") for turn in turns) else "empty"
    return type(prompt).__name__


def _parts(turn: dict[str, Any]) -> Sequence[Any]:
    """The parts of a turn's content, where they are not all texts; those are joined."""
    content = turn.get("content")
    return content if isinstance(content, (list, tuple)) else ()


def has_images(dataset: Any) -> bool:
    """Whether a data set has images: a column of them, or parts of a chat; of a stream by its first row."""
    if dataset is None or isinstance(dataset, dict) or "prompt" not in columns_of(dataset):
        return False
    return bool(set(IMAGES) & set(columns_of(dataset))) or WITH_IMAGES in _kinds(dataset)


def prompt_problems(dataset: Any, role: str, rows_needed: int = 1, batch: str = "", sees: bool = False) -> Iterator[Problem]:
    """What keeps a data set from being trained on: splits instead of rows, no `prompt` column, images, too few rows, or prompts
    that are empty, None, or partly text and partly chats (with their row numbers).

    Args:
        dataset: a `datasets.Dataset`; of an `IterableDataset` the first row is looked at.
        role: `train_dataset` or `eval_dataset`, for messages.
        rows_needed: the rows of one generation batch.
        batch: how that number comes about, for messages.
        sees: whether the student reads images.
    """
    if isinstance(dataset, dict):
        first = next(iter(dataset), "train")
        yield Problem(f"{role} holds the splits {', '.join(dataset)}", do=f"pass one of them, e.g. dataset[{first!r}]")
        return
    columns = columns_of(dataset)
    if "prompt" not in columns and (columns or hasattr(dataset, "__len__")):
        yield Problem(
            f"{role} has no 'prompt' column; it has: {', '.join(columns) or 'none'}",
            do="let tsdkd.data.prompts.map_prompts(dataset) make it"
            if {*CHATS, "instruction"} & set(columns) and hasattr(dataset, "__len__")
            else f"rename the one that holds the prompts, e.g. dataset.rename_column({(columns or ['instruction'])[0]!r}, "
            "'prompt'), or pass --prompt_column",
        )
        return
    if set(IMAGES) & set(columns) and not sees:
        yield Problem(
            f"{role} has images",
            "the student reads text alone",
            "remove them (dataset.remove_columns), or take a multimodal student",
        )
    if hasattr(dataset, "__len__") and len(dataset) < rows_needed:
        yield Problem(
            f"{role} has {len(dataset)} rows but one generation batch takes {rows_needed}{batch}",
            "nothing would be trained",
            "add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps",
        )
    kinds = _kinds(dataset)
    if sees and WITH_IMAGES in kinds:
        kinds["chat"] = sorted([*kinds.get("chat", []), *kinds.pop(WITH_IMAGES)])
    for kind, rows in kinds.items():
        if kind == WITH_IMAGES:
            told = f"{role} has {len(rows)} prompts that are {kind} ({rows_named(rows)})"
            yield Problem(told, "the student reads text alone", "remove the images, or take a multimodal student")
        elif kind not in ("text", "chat"):
            yield Problem(
                f"{role} has {len(rows)} prompts that are {kind} ({rows_named(rows)})",
                "a prompt is a text or a list of chat messages {'role': …, 'content': …}, with something in it",
                "remove or mend those rows",
            )
    if len(kinds) > 1 and set(kinds) == {"text", "chat"}:
        yield Problem(
            f"{role} mixes prompts of two types",
            f"{len(kinds['text'])} are text ({rows_named(kinds['text'])}) and {len(kinds['chat'])} are chats "
            f"({rows_named(kinds['chat'])})",
            "make them one type: [{'role': 'user', 'content': text}]",
        )


def _kinds(dataset: Any) -> dict[str, list[int]]:
    """The rows of each kind of prompt."""
    kinds: dict[str, list[int]] = {}
    first = [row["prompt"] for row in _first_rows(dataset)]
    for row, prompt in enumerate(dataset["prompt"] if hasattr(dataset, "__len__") else first):
        kinds.setdefault(kind_of(prompt), []).append(row)
    return kinds


def are_chats(dataset: Any) -> bool:
    """Whether a data set's prompts are chats, by its first row."""
    return any(kind_of(row.get("prompt")) in ("chat", WITH_IMAGES) for row in _first_rows(dataset))


def _first_rows(dataset: Any) -> list[dict[str, Any]]:
    """The first row, where there is one."""
    if hasattr(dataset, "__len__"):
        return [dataset[0]] if len(dataset) else []
    return list(itertools.islice(dataset, 1))


def columns_of(dataset: Any) -> list[str]:
    """Names of a data set's columns; of a stream that does not state them, those of its first row."""
    names = getattr(dataset, "column_names", None)
    if names is None and dataset is not None and not isinstance(dataset, dict):
        names = [name for row in _first_rows(dataset) for name in row]
    return list(names or [])


def fitting_rows(
    lengths: Sequence[int], limit: int, why: str, role: str, drop: bool, raising: str = "raise max_length, "
) -> list[int]:
    """The rows whose prompts leave room for a completion.

    Args:
        lengths: tokens of each prompt.
        limit: the longest prompt allowed, tokens.
        why: what set the limit, for messages.
        drop: leave the others out instead of refusing them.
        raising: what would allow longer ones, for messages.

    Raises:
        ValueError: how many prompts are too long and the first of them, unless `drop`; or no prompt fits.
    """
    long = [row for row, length in enumerate(lengths) if length > limit]
    if len(long) == len(lengths) and drop:
        raise ValueError(
            f"all {len(lengths)} prompts of {role} are longer than {limit} tokens, none is left: {why}. Shorten them, {raising}"
            "or lower max_completion_length."
        )
    if long and not drop:
        raise ValueError(
            f"{len(long)} of {len(lengths)} prompts of {role} are longer than {limit} tokens, the first is row {long[0]} with "
            f"{lengths[long[0]]}: {why}. Shorten them, {raising}lower max_completion_length, or drop them with "
            f"drop_long_prompts=True."
        )
    excluded = set(long)
    return [row for row in range(len(lengths)) if row not in excluded]


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
    prompt_column: str | None = None,
    completion_column: str | None = None,
    drop_duplicates: bool = False,
    as_chat: bool = False,
    keep: Sequence[str] = (),
) -> Any:
    """The prompts' column as `prompt`, the completions' as `completion` where there is one, `tools` and `chat_template_kwargs`
    and `teacher_prompt` where they are there, and nothing else of the rows but what is to be kept.

    Args:
        rows: a `datasets.Dataset`.
        prompt_column: the column that holds the prompts; None: `prompt`, or else `messages` or `conversations`, whose last
            turn becomes the completion where it is the assistant's, or `instruction`, `input` and `output`.
        completion_column: the column that holds given completions; None: `completion`, which may be missing.
        drop_duplicates: keep the first of equal prompts.
        as_chat: make each text a chat of one user message, the teacher's own too.
        keep: further columns, for a template of the teacher's prompts.

    Raises:
        ValueError: a named column is not there, or `as_chat` for prompts that are chats already.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "a stream's columns are mapped by its owner: rows.map(lambda row: {'prompt': …, 'completion': …}), or load it."
        )
    if completion_column not in (None, *rows.column_names):
        raise ValueError(
            f"no column {completion_column!r} in the data set; it has: {', '.join(rows.column_names)}. Pass "
            "--completion_column."
        )
    lacking = [name for name in keep if name not in rows.column_names]
    if lacking:
        raise ValueError(
            f"teacher_prompt_template names {', '.join(lacking)}, and the data set has: {', '.join(rows.column_names)} (the "
            "prompts' column is called prompt here)."
        )
    rows = _named(rows, prompt_column, completion_column, keep)
    if drop_duplicates:
        first: dict[str, int] = {}
        for number, values in enumerate(
            zip(*(rows[name] for name in (*ASKED, *keep) if name in rows.column_names), strict=True)
        ):
            first.setdefault(repr(values), number)
        rows = rows.select(sorted(first.values()))
    if as_chat:
        if len(rows) and not isinstance(rows[0]["prompt"], str):
            raise ValueError("prompt_as_chat makes chats of texts, but these prompts are chats already: leave it out.")
        made = {"prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]]}
        if "teacher_prompt" in rows.column_names:
            theirs = rows["teacher_prompt"]
            made["teacher_prompt"] = [[{"role": "user", "content": t}] if isinstance(t, str) else t for t in theirs]
        if "completion" in rows.column_names:
            answers = rows["completion"]
            made["completion"] = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
        rows = _replaced(rows, made)
    return rows


def _named(rows: Any, prompt_column: str | None, completion_column: str | None, keep: Sequence[str]) -> Any:
    """The rows with `prompt` and what goes with it."""
    names, completions = rows.column_names, completion_column or "completion"
    if prompt_column in (None, "prompt") and "prompt" in names:
        known = None
        if completions not in names and len(rows) and is_chat(rows[0]["prompt"]):
            known = recognised(rows, "prompt", None)
    else:
        known = recognised(rows, prompt_column, completion_column)
        if known is None and (prompt_column or "prompt") not in names:
            raise ValueError(
                f"no column {prompt_column or 'prompt'!r} in the data set; it has: {', '.join(names)}. {advice(names)}"
            )
    renamed = {} if known else {prompt_column or "prompt": "prompt"}
    if completions in names and "completion" not in (known or {}):
        renamed[completions] = "completion"
    others = dict.fromkeys((*ASKED[1:], *(name for name in keep if name not in renamed.values())))
    kept = rows.select_columns([*renamed, *(name for name in others if name in names and name not in renamed)])
    kept = kept.rename_columns({old: new for old, new in renamed.items() if old != new})
    return _replaced(kept, known) if known else kept


def _replaced(rows: Any, columns: dict[str, list[Any]]) -> Any:
    """The rows with these columns in place of theirs."""
    from datasets import Dataset

    rest = {name: rows[name] for name in rows.column_names if name not in columns}
    return Dataset.from_dict({**columns, **{name: list(values) for name, values in rest.items()}})
