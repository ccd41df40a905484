"""Data sets as people have them: files of several kinds, folders of them, saved data sets, names on the Hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tsdkd.data.completions import joined_parts, kept
from tsdkd.data.pictures import has_picture, taken_out, with_columns
from tsdkd.data.rows import parsed_lines, text_of

_JSON = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
ENDINGS = (*_JSON, *_TABLES, *_BUILDERS)


def _ending(path: Path) -> str:
    """A file's kind by its name, whatever its case and whether it is packed."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def load_rows(name: str, *, config: str | None = None, split: str = "train") -> Any:
    """A data set.

    Args:
        name: the path of a JSONL, JSON, CSV, TSV, Parquet or Arrow file (also packed, `.gz`), of a folder of such files, of a
            folder that `save_to_disk` wrote, or a data set's name on the Hub.
        config: of a data set on the Hub, its configuration.
        split: which split; it may be a slice, `train[:100]`. A file is one split, whatever it is called.

    Raises:
        ValueError: the file is not there or cannot be read (the line is named).
    """
    import datasets

    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        parts = [_sliced(_of_folder(path, part) if path.is_dir() else _of_file(path), part) for part in split.split("+")]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if _ending(path) or name[:1] in "./~":
        raise ValueError(f"there is no file {name}: pass the path of one ({', '.join(ENDINGS)}), or a data set's name.")
    return datasets.load_dataset(name, config, split=split)


def _of_folder(folder: Path, split: str) -> Any:
    import datasets

    wanted = split.partition("[")[0].strip()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if wanted not in saved:
            raise ValueError(f"{folder} holds the splits {', '.join(saved)}, not {wanted!r}: pass one of them as the split.")
        return saved[wanted]
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file() and _ending(file)]
    files = [file for file in files if not any(part.startswith((".", "_")) for part in file.parts)]  # copies of editors
    if not files:
        raise ValueError(f"the folder {folder} holds no file of rows ({', '.join(ENDINGS)}) and no saved data set.")
    of_split = {file: set(re.split(r"[^a-z0-9]+", file.as_posix().lower())) & _SPLITS for file in files}
    named = [file for file, words in of_split.items() if wanted.lower() in words or (wanted == "train" and not words)]
    if not named and any(of_split.values()):
        raise ValueError(
            f"the folder {folder} holds no file of the split {wanted!r}; it has {', '.join(map(str, files[:5]))}"
            f"{', …' if len(files) > 5 else ''}: pass one of those, or another split."
        )
    chosen = [folder / file for file in named or files]
    if all(_ending(file) in _JSON for file in chosen):  # their columns need not be alike
        return data_set([row for file in chosen for row in _json_rows(file)], str(folder))
    return datasets.concatenate_datasets([_of_file(file) for file in chosen])


def _of_file(path: Path) -> Any:
    import datasets

    ending = _ending(path)
    if not ending:
        raise ValueError(f"{path} is no file of rows: its name ends in none of {', '.join(ENDINGS)}.")
    if ending in _JSON:
        return data_set(_json_rows(path), str(path))
    if ending in _TABLES:
        return _of_table(path, _TABLES[ending])
    return datasets.load_dataset(_BUILDERS[ending], data_files=str(path), split="train")


def _of_table(path: Path, separator: str) -> Any:
    """A table whose cells are texts as they stand (007 is no 7, and NA may be an answer); an empty one is None."""
    from datasets import Dataset

    reader = csv.reader(io.StringIO(text_of(path)), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    try:
        head = next(reader, [])
        for cells in reader:
            if not any(cells):
                continue
            surplus = [cell for cell in cells[len(head) :] if cell.strip()]
            if surplus or len(cells) < len(head):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells where the header has {len(head)}: put a cell that "
                    f"holds {separator!r} in quotes."
                )
            rows.append(cells[: len(head)])
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} is no row of a table ({error}): double the quotes in a cell."
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return Dataset.from_dict({name: [cells[i] or None for cells in rows] for i, name in enumerate(head) if name})


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or of one that holds a list of rows, or a mapping with one."""
    whole_text = text_of(path)
    text = whole_text.lstrip()
    if text[:1] == "[" or (_ending(path) == ".json" and text):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if text[:1] == "[":
                raise ValueError(f"{path} is no JSON ({error}).") from error
        else:
            lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else [whole]
            if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
                return lists[0]
            if not isinstance(whole, dict) or lists:
                raise ValueError(f"{path} holds no list of rows, {{'prompt': …}} each: write a row a line (JSONL).")
    rows = []
    for number, row in parsed_lines(path, whole_text):
        rows.append(row)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {type(row).__name__}: a row is an object, {{'prompt': …}}.")
    return rows


def data_set(rows: Sequence[dict[str, Any]], source: str) -> Any:
    """Rows as a data set with every key that any of them has; a column of mixed types is kept as JSON.

    Raises:
        ValueError: no row, or a column of which some rows are texts and some are chats, or chats that do not fit together.
    """
    import pyarrow
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{source} holds no rows.")
    columns: dict[str, pyarrow.Array] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [_kept_as_given(name, row.get(name)) for row in rows]
        if any(map(has_picture, values)):
            texts, pictures = taken_out(rows, source)
            return with_columns(data_set(texts, source), pictures)
        try:
            columns[name] = pyarrow.array(values)
        except UnicodeEncodeError as error:
            row = next(number for number, value in enumerate(values) if not _is_utf8(value))
            raise ValueError(
                f"row {row} of {source} holds half a character in {name!r} ({error.reason}): mend its text."
            ) from error
        except (pyarrow.ArrowException, OverflowError) as error:
            if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values):
                kinds = {type(value).__name__: i for i, value in reversed(list(enumerate(values))) if value is not None}
                shown = ", ".join(f"{kind} (row {number})" for kind, number in sorted(kinds.items(), key=lambda kind: kind[1]))
                raise ValueError(
                    f"the column {name!r} of {source} does not fit together ({str(error).splitlines()[0]}); it holds {shown}: "
                    "make its rows alike."
                ) from error
            as_json = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            columns[name] = pyarrow.array(as_json)
    return Dataset(pyarrow.table(columns))


def _sliced(rows: Any, split: str) -> Any:
    """The part of a split's rows that stands behind its name in brackets."""
    import datasets

    _, bracket, slice_ = split.partition("[")
    if not bracket:
        return rows
    try:
        instructions = datasets.ReadInstruction.from_spec(f"train[{slice_.strip()}").to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{split!r} is no slice of {len(rows)} rows ({error}): e.g. train[:100], train[10%:].") from error
    (each,) = instructions
    return rows.select(range(each.from_ or 0, len(rows) if each.to is None else each.to))


def _is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kept_as_given(name: str, value: Any) -> Any:
    """A column's value so that Arrow changes none of it: tools and options as JSON, and the arguments of tool calls."""
    if name in ("tools", "chat_template_kwargs") and isinstance(value, (list, tuple, dict)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        return [_kept_turn(turn) for turn in value]
    return value


def _kept_turn(turn: dict[str, Any]) -> dict[str, Any]:
    made = {**turn, "content": joined_parts(turn["content"])} if "content" in turn else dict(turn)
    if isinstance(made.get("tool_calls"), (list, tuple)):
        made["tool_calls"] = [kept(call) for call in made["tool_calls"]]
    return made


def as_data_set(rows: Any, role: str) -> Any:
    """A data set of what was given as one: rows in a list, a torch data set or a subset of one, a torch stream.

    Raises:
        ValueError: something that can be read only once, or whose rows are no rows.
    """
    import datasets

    if isinstance(rows, dict):
        return {name: as_data_set(part, f"{role}[{name!r}]") for name, part in rows.items()} if type(rows) is dict else rows
    if rows is None or hasattr(rows, "column_names"):
        return rows
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):  # a pandas.DataFrame
        return data_set(rows.to_dict("records"), role)
    is_stream = isinstance(rows, torch.utils.data.IterableDataset)  # some have a length
    if not is_stream and hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, str):
        found = [rows[number] for number in range(len(rows))]
        wrong = next((number for number, row in enumerate(found) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise ValueError(
                f"row {wrong} of {role} is {type(found[wrong]).__name__}: a row is a mapping, {{'prompt': …}}. Make it a data "
                "set with datasets.Dataset.from_dict({'prompt': prompts})."
            )
        return data_set(found, role)
    if hasattr(rows, "__iter__") and not hasattr(rows, "__next__") and not isinstance(rows, str):
        return datasets.IterableDataset.from_generator(lambda: iter(rows))
    raise ValueError(
        f"{role} is {type(rows).__name__}: pass rows, datasets.Dataset.from_list(rows), or what can be read more than once."
    )
