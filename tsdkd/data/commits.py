"""Folders that are whole or not there: written elsewhere, forced to the disk, named by a manifest, and renamed.

A save goes to a temporary folder beside its place. Every file is fsynced, then the manifest (sizes and SHA-256 of all, written
last), then the folder, which is then renamed. So whatever ends a save, a folder with a manifest that holds is a whole one, and
none is taken away before the next is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "tsdkd_manifest.json"
SCHEMA = 1
SAVING = ".saving"  # where a save is written
REPLACED = ".replaced-"  # what the name of a folder begins with that a newer one of its name takes the place of
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk; where a file system cannot, leave it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (22, 95, 9):  # a file system without it
            raise
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_text(path: Path, text: str) -> None:
    """A small file in one step: whole, or as it was before."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    sync(scratch)
    os.replace(scratch, path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def manifest_digest(made: Mapping[str, Any]) -> str:
    """Of a manifest without its digest."""
    stated = {name: value for name, value in made.items() if name != "digest"}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Force a folder's files to the disk, then the manifest that names them.

    Args:
        about: what it says beside the files.
    """
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest_of(path)}
    made: dict[str, Any] = {"schema": SCHEMA, **(about or {}), "files": files}
    made["digest"] = manifest_digest(made)
    put_text(folder / MANIFEST, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"it has no {MANIFEST}: its save was cut off, or something else wrote it")
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in made["files"].items()}
        if made["digest"] != manifest_digest(made):
            raise ValueError("it was changed since it was written")
        if not isinstance(made["step"], int) or not isinstance(made.get("run", {}), dict) or made["schema"] > SCHEMA:
            raise ValueError("a part of it is of another type, or of a later version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    return {**made, "files": files}


def check(folder: Path) -> dict[str, Any]:
    """A whole folder's manifest.

    Raises:
        ValueError: what is missing, cut off or changed: the file, and how.
    """
    made = read_manifest(folder)
    for name, (size, digest) in made["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"its {name} is missing")
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"its {name} has {found:,} of {size:,} bytes")
        if digest_of(path) != digest:
            raise ValueError(f"its {name} was changed since it was written (its SHA-256 is another)")
    return made


def put(written: Path, place: Path) -> None:
    """A written folder with a manifest to its place; one that is there is taken away once the new one is."""
    old = place.with_name(f"{REPLACED}{place.name}")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(place, old)
    os.rename(written, place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_files(written: Path, place: Path, about: Mapping[str, Any] | None = None) -> None:
    """A written folder's files, one by one, into a folder that holds others, their manifest last; till then there is none."""
    place.mkdir(parents=True, exist_ok=True)
    write_manifest(written, about)
    (place / MANIFEST).unlink(missing_ok=True)
    for path in _files(written):
        to = place / path.relative_to(written)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)
    os.replace(written / MANIFEST, place / MANIFEST)
    sync(place)
    shutil.rmtree(written, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put a checkpoint back that a save which was cut off had moved out of its place, and take away what such a save left."""
    for old in folder.glob(f"{REPLACED}*"):
        place = folder / old.name.removeprefix(REPLACED)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, place)


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, whether they are whole or not."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.search(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def newest(folder: Path, is_whole: Callable[[Path], Any] | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a run, and those above it that are none, with why; `is_whole` raises a ValueError of what
    is not, `check` by default."""
    skipped: list[tuple[Path, str]] = []
    for path in checkpoints(folder):
        try:
            (is_whole or check)(path)
            return path, skipped
        except ValueError as error:
            skipped.append((path, str(error)))
    return None, skipped


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against a second process that asks for it, as long as this one lives.

    Raises:
        ValueError: another holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is in use by {holder}: {what}. Wait for it, or name another folder.") from None
    except OSError:  # a file system without locks
        pass
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
