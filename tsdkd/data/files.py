"""Data sets as people have them: files of several kinds, folders of them, saved data sets, names on the Hub."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.rows import lines_of, text_of

_JSON = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
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
    if path.is_dir():
        return _sliced(_of_folder(path, split), split)
    if path.is_file():
        return _sliced(_of_file(path), split)
    if _ending(path) or name[:1] in "./~":
        raise ValueError(f"there is no file {name}: pass the path of one ({', '.join(ENDINGS)}), or a data set's name.")
    return datasets.load_dataset(name, config, split=split)


def _of_folder(folder: Path, split: str) -> Any:
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        wanted = split.partition("[")[0]
        if wanted not in saved:
            raise ValueError(f"{folder} holds the splits {', '.join(saved)}, not {wanted!r}: pass one of them as the split.")
        return saved[wanted]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _ending(file))
    if not files:
        raise ValueError(f"the folder {folder} holds no file of rows ({', '.join(ENDINGS)}) and no saved data set.")
    wanted = split.partition("[")[0]
    named = [file for file in files if wanted in file.relative_to(folder).as_posix()]
    return datasets.concatenate_datasets([_of_file(file) for file in named or files])


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
    import pandas
    from datasets import Dataset

    try:
        read = pandas.read_csv(io.StringIO(text_of(path)), sep=separator, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser tells the line
        raise ValueError(f"{path} is no table of cells apart by {separator!r}: {error}.") from error
    if not len(read):
        raise ValueError(f"{path} holds no rows.")
    return Dataset.from_dict({str(name): [cell if cell != "" else None for cell in read[name]] for name in read.columns})


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or of one that holds a list of rows, or a mapping with one."""
    text = text_of(path).lstrip()
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
    for number, line in lines_of(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): mend or remove it.") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} is {type(rows[-1]).__name__}: a row is an object, {{'prompt': …}}.")
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
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
            kinds = {type(value).__name__: number for number, value in reversed(list(enumerate(values))) if value is not None}
            if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values) and name != "tools":
                shown = ", ".join(f"{kind} (row {number})" for kind, number in sorted(kinds.items(), key=lambda kind: kind[1]))
                raise ValueError(
                    f"the column {name!r} of {source} does not fit together ({str(error).splitlines()[0]}); it holds {shown}: "
                    "make its rows alike, e.g. the arguments of every tool call a JSON text."
                ) from error
            values = [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
        columns[name] = values
    return Dataset.from_dict(columns)


def _sliced(rows: Any, split: str) -> Any:
    """The part of a data set that `split` names behind the split's own name."""
    import datasets

    parts = []
    for part in split.split("+"):
        _, bracket, slice_ = part.partition("[")
        if not bracket:
            parts.append(rows)
            continue
        try:
            instructions = datasets.ReadInstruction.from_spec(f"train[{slice_}").to_absolute({"train": len(rows)})
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{part!r} is no slice of {len(rows)} rows ({error}): e.g. train[:100], train[10%:].") from error
        parts += [rows.select(range(each.from_ or 0, len(rows) if each.to is None else each.to)) for each in instructions]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


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
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, str):
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
