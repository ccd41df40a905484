"""The benchmark commands run here, at tiny shapes; their figures mean nothing and are not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder, name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_gpu_command_runs_dry(tmp_path):
    made = run(tmp_path, "gpu.py", "--dry", "--rounds", "2", "--results", "rows.jsonl")
    assert made.returncode == 0, made.stderr[-3000:]
    rows = rows_of(tmp_path / "rows.jsonl")
    assert all(
        row["dry"] and row["card"].startswith("CPU") and row["roofline_ms"] is None for row in rows if "roofline_ms" in row
    )
    assert {row["variant"] for row in rows if row["part"] == "loss"} >= {"tsdkd", "tsdkd_torch", "tsdkd_jsd", "trl_jsd"}
    assert {row["trainer"] for row in rows if row["part"] == "pair"} == {"tsdkd", "trl", "trl_bf16"}
    assert not any("failed" in row for row in rows if row.get("engine") != "vllm"), rows
    assert all(math.isfinite(value) for row in rows for value in [*row.get("ms", []), *row.get("seconds", [])])
    ours = next(row for row in rows if row.get("trainer") == "tsdkd")
    assert {"time/teacher", "time/student", "time/loss", "tflop/teacher"} <= set(ours["parts"])
    without = run(tmp_path, "gpu.py")
    assert without.returncode == 2 and "There is no GPU here" in without.stderr and not (tmp_path / "results").exists()


def test_what_is_expected_of_a_card_is_its_products_at_its_peak(tmp_path):
    rows = [json.loads(line) for line in run(tmp_path, "gpu.py", "--predict").stdout.splitlines()]
    ours = next(row for row in rows if (row["card"], row["variant"], row["tokens"]) == ("H100", "tsdkd", 16_384))
    assert ours["roofline_ms"] == 1e3 * 2 * 16_384 * 151_936 * (3 * 1536 + 5120) / 989e12


def test_a_check_says_which_ratio_moved(tmp_path):
    """Nothing without a baseline; slower against one that was doctored; another machine's is shown and not judged."""
    tiny = ["--tokens", "16", "--vocab", "512", "--rounds", "2", "--results", "rows.jsonl"]
    first = run(tmp_path, "check.py", *tiny, "--baseline")
    assert first.returncode == 0 and first.stdout.count("no baseline") == 5, first.stdout + first.stderr[-2000:]
    rows = rows_of(tmp_path / "rows.jsonl")
    doctored = [{**row, "ratio": [1e-6, 1e-6]} if "JSD" in row["name"] else {**row, "ratio": [0.0, 1e6]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in doctored))
    second = run(tmp_path, "check.py", *tiny, "--rounds", "4")
    assert second.returncode == 1 and second.stdout.count("as before") == 4
    slower = [line for line in second.stdout.splitlines() if line.endswith("slower")]
    assert len(slower) == 1 and slower[0].startswith("loss / TRL's JSD")
    other = [{**row, "hardware": "a big one"} for row in doctored]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    third = run(tmp_path, "check.py", *tiny)
    assert third.returncode == 0 and third.stdout.count("on a big one: not judged here") == 5
