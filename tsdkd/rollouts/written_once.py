"""Completions that are written once into a JSONL file and never again: an interrupted writing goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.rows import mend_rows, read_rows

logger = logging.getLogger(__name__)


def key_of(ids: Sequence[int]) -> str:
    """A prompt's name in the file."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:24]


def _read(path: Path, settings: dict[str, Any], mend: bool = False) -> dict[str, list[int]]:
    """The completions of a file by prompt; a torn last line is left out, and taken out where its owner reads (`mend`).

    Raises:
        ValueError: a file that was written with other settings.
    """
    completions: dict[str, list[int]] = {}
    rows = read_rows(path, "remove the line to have it written again")
    for number, row in enumerate(rows):
        if number == 0:
            other = {name for name in {*settings, *row} if settings.get(name) != row.get(name)}
            if other:
                name = sorted(other)[0]
                raise ValueError(
                    f"{path} was written with {name}={row.get(name)!r}, but now it is {settings.get(name)!r}: completions are "
                    "never written twice. Keep the setting, or name another file (teacher_answers=...)."
                )
            continue
        completions[row["prompt"]] = row["completion_ids"]
    if mend:
        mend_rows(path, rows)
    return completions


def write_once(
    path: Path,
    prompts: Sequence[list[int]],
    write: Callable[[list[list[int]]], list[list[int]]],
    *,
    settings: dict[str, Any],
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """A completion to each prompt: those in the file as they are, the others written now.

    Every process writes a file of its own (`path` with its number), and all read all of them.

    Args:
        path: the file; its folder is made.
        prompts: ids; equal prompts get one completion.
        write: from a batch of prompts to their completions.
        settings: what the completions depend on (model, temperature, …); the file's first line.
        batch_size: prompts a batch.
        process, processes, barrier: where several processes share the work.

    Returns:
        the completions' ids, one list a prompt.

    Raises:
        ValueError: a file written with other settings, or damaged before its last line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.stem}-{process}{path.suffix}")
    written: dict[str, list[int]] = {}
    for shard in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
        written.update(_read(shard, settings, mend=shard == own))
    barrier()  # nobody writes before all have read
    by_key = {key_of(ids): ids for ids in prompts}
    missing = [key for key in sorted(by_key) if key not in written][process::processes]
    missing.sort(key=lambda key: len(by_key[key]))
    if not own.exists() or not own.stat().st_size:
        own.write_text(json.dumps(settings) + "\n")
    began, told = time.monotonic(), time.monotonic()
    with own.open("a") as file:
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            for key, ids in zip(keys, write([by_key[key] for key in keys]), strict=True):
                written[key] = ids
                file.write(json.dumps({"prompt": key, "completion_ids": ids}) + "\n")
            file.flush()
            if time.monotonic() - told > 30:
                told, done = time.monotonic(), start + len(keys)
                left = (told - began) / done * (len(missing) - done)
                logger.warning("the teacher has written %d of %d completions, %.0f s left.", done, len(missing), left)
    barrier()
    if processes > 1:
        for shard in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
            written.update(_read(shard, settings))
    return [written[key_of(ids)] for ids in prompts]
