"""The tables of `benchmarks/README.md`, generated from the newest rows of `benchmarks/results/`."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import gpu
import gpu_pairs
from loss_cost import LABELS

from tsdkd.costs import known_gpus
from tsdkd.pipelines.compare import table

HERE = Path(__file__).parent
SIZES = ("tokens", "vocab", "student_hidden", "teacher_hidden", "dtype", "device")


def rows_of(name: str) -> list[dict]:
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def stamp(row: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    return f"{row['run']}, commit {row['commit']}, {row['hardware']}, {versions}, seed {row['seed']}, `{row['command']}`"


def loss_cost() -> str:
    newest: dict[tuple, str] = {}
    for row in rows_of("loss_cost"):
        newest[tuple(row[key] for key in SIZES)] = row["run"]
    parts = []
    for sizes, run in newest.items():
        rows = [row for row in rows_of("loss_cost") if row["run"] == run and tuple(row[key] for key in SIZES) == sizes]
        described = ", ".join(f"{key} {value}" for key, value in zip(SIZES, sizes, strict=True))
        lines = [
            f"**{described}**",
            "",
            "| loss, with its backward | seconds | tsdkd / this | peak extra MiB |",
            "|---|---|---|---|",
        ]
        for row in rows:
            ratio = spread(row["tsdkd_ratio"]) if "tsdkd_ratio" in row else ""
            lines.append(f"| {LABELS[row['variant']]} | {spread(row['seconds'])} | {ratio} | {row.get('peak_extra_mib', '')} |")
        parts.append("\n".join([*lines, "", f"Median (min-max). {stamp(rows[0])}"]))
    return "\n\n".join(parts)


def step_cost() -> str:
    rows = rows_of("step_cost")
    if not rows:
        return ""
    row = rows[-1]
    lines = ["| trainer step, generation excluded | seconds |", "|---|---|"]
    lines.append(f"| `TSDKDTrainer`, all three terms | {spread(row['seconds']['tsdkd'])} |")
    lines.append(f"| TRL's `DistillationTrainer`, JSD(0.9) | {spread(row['seconds']['trl'])} |")
    lines.append(f"| ratio | {spread(row['ratio'], 3)} |")
    parts = ", ".join(f"{key.removeprefix('time/')} {value} s" for key, value in row["parts"].items())
    setting = ", ".join(
        f"{k} {row[k]}" for k in ("vocab", "student_hidden", "teacher_hidden", "batch", "accumulation", "tokens")
    )
    return "\n".join([*lines, "", f"Median (min-max); {setting}; ours by part: {parts}. {stamp(row)}"])


def gradient_filter() -> str:
    rows = rows_of("gradient_filter")
    newest = [row for row in rows if row["run"] == rows[-1]["run"]]
    lines = ["| rows | eps | time / exact | columns skipped | error, hidden | error, head |", "|---|---|---|---|---|---|"]
    for row in newest:
        where = f"{row['rows']}: {row['tokens']} tokens, {row['vocab']} ids, mean entropy {row['entropy']:.2f} nats"
        errors = f"{row['error_hidden']:.1e} | {row['error_weight']:.1e}"
        lines.append(f"| {where} | {row['gradient_filter']:g} | {spread(row['ratio'])} | {row['skipped']:.2f} | {errors} |")
    return "\n".join([*lines, "", f"Median (min-max); errors relative, against float64. {stamp(newest[0])}"]) if newest else ""


def long_completions() -> str:
    newest = [row for row in rows_of("long_completions") if row["run"] == rows_of("long_completions")[-1]["run"]]
    parts = {"loss": "loss", "teacher": "teacher", "student": "student"}
    lines = [
        "| tokens of a completion | seconds: loss | teacher | student | peak MiB: loss | teacher | student and loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in newest if row["what"] == "one completion"):
        seconds = " | ".join(spread(row["seconds"][part]) for part in parts)
        peaks = " | ".join(f"{row['peak_bytes'][part] / 2**20:.0f}" for part in ("loss", "teacher", "student and loss"))
        lines.append(f"| {row['tokens']:,} | {seconds} | {peaks} |")
    (unlike,) = (row for row in newest if row["what"] == "unlike completions")
    told = (
        f"Rows one behind the other (`padding_free`, attention by `sdpa` with a mask) against padded ones, completions of "
        f"{', '.join(map(str, unlike['lengths']))} tokens: teacher and student take {spread(unlike['ratio'])} of the time."
    )
    sizes = ", ".join(f"{key} {newest[0][key]}" for key in ("vocab", "student_hidden", "teacher_hidden"))
    return "\n".join([*lines, "", told, "", f"Median (min-max); two layers, {sizes}. {stamp(newest[0])}"])


def on_a_gpu() -> str:
    """What was measured on GPUs, and beside it, or alone, what the products take at the cards' stated peaks."""
    rows = [row for row in rows_of("gpu") if row["part"] == "loss" and "ms" in row]
    newest = {row["card"]: row["run"] for row in rows}
    lines = ["| tokens, vocabulary, hidden | loss | H100 at best | H200 at best | measured |", "|---|---|---|---|---|"]
    for h100, h200 in zip(*(gpu.predicted(known_gpus()[name]) for name in ("H100", "H200")), strict=True):
        sizes = tuple(h100[key] for key in ("tokens", "vocab", "student_hidden", "teacher_hidden"))
        found = [
            f"{row['card']}: {spread(row['ms'])} ms, {row['peak_gib']} GiB, {row['of_matmul_ceiling']:.0%} of its ceiling"
            for row in rows
            if row["run"] == newest[row["card"]] and row["variant"] == h100["variant"]
            and tuple(row[key] for key in ("tokens", "vocab", "student_hidden", "teacher_hidden")) == sizes
        ]  # fmt: skip
        best = " | ".join(f"{row['roofline_ms']:.1f} ms" for row in (h100, h200))
        what = {"tsdkd": "tsdkd, all three terms (Liger's JSD has as many products)", "trl_jsd": "TRL, JSD alone"}[
            h100["variant"]
        ]
        where = f"{sizes[0]:,}, {sizes[1]:,}, {sizes[2]} ← {sizes[3]}"
        lines.append(f"| {where} | {what} | {best} | {'; '.join(found) or 'not measured yet'} |")
    lines += ["", "| a step of 32 rows of 256 tokens, in ms at best | rollouts | teacher | student | loss | measured |"]
    lines.append("|---|---|---|---|---|---|")
    measured = {row["pair"] for row in rows_of("gpu") if row["part"] == "pair" and not row["dry"]}
    for student, teacher in gpu_pairs.PAIRS:
        for card in ("H100", "H200"):
            parts = gpu_pairs.predicted_pair(student, teacher, known_gpus()[card])
            told = "below" if f"{student} <- {teacher}" in measured else "not measured yet"
            lines.append(f"| {student} ← {teacher}, {card} | {' | '.join(f'{ms:.0f}' for ms in parts.values())} | {told} |")
    lines.append("")
    whole = [row for row in rows_of("gpu") if not row["dry"] and row["run"] == newest.get(row["card"])]
    names = ("card", "part", "variant", "impl", "chunk", "pair", "trainer", "engine", "tokens")
    figures = ("ms", "seconds", "peak_gib", "tokens_per_second", "mfu", "tsdkd_ratio", "failed")
    for row in whole:  # everything that was measured, as it stands
        told = {
            key: spread(value, 3) if isinstance(value, list) else value
            for key in figures
            if (value := row.get(key)) is not None
        }
        named = ", ".join(str(row[name]) for name in names if name in row)
        lines.append(f"- {named}: {', '.join(f'{key} {value}' for key, value in told.items())}")
    return "\n".join(lines).rstrip()


def comparison() -> str:
    rows = rows_of("comparison")
    first = rows[0]
    shared = ", ".join(
        f"{key} {first['settings'][key]}" for key in ("max_steps", "per_device_train_batch_size", "learning_rate", "problems")
    )
    by_commit: dict[str, list[dict]] = {}
    for row in rows:
        by_commit.setdefault(row["provenance"]["commit"].rstrip("+"), []).append(row)
    if len({row["provenance"]["command"] for row in rows}) == 1:
        by_commit = {"": rows}
    stamps = []
    for several in by_commit.values():
        labels, seeds = dict.fromkeys(row["label"] for row in several), {row["seed"] for row in several}
        named = "" if len(by_commit) == 1 else f"{', '.join(labels)}: "
        stamps.append(stamp({**several[0]["provenance"], "run": f"{named}{len(seeds)} seed{'s' * (len(seeds) > 1)}"}))
    return f"{table(rows)}\n\nMean over seeds, greedy; {shared}. {'; '.join(stamps)}"


def main() -> None:
    path = HERE / "README.md"
    text = path.read_text()
    made_of = {
        "loss_cost": loss_cost,
        "step_cost": step_cost,
        "gradient_filter": gradient_filter,
        "long_completions": long_completions,
        "gpu": on_a_gpu,
        "comparison": comparison,
    }
    for name, make in made_of.items():
        made = make() if rows_of(name) or name == "gpu" else ""
        marks = f"<!-- {name}: generated by benchmarks/tables.py -->", f"<!-- {name}: end -->"
        if not made or marks[0] not in text:
            continue
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        text = re.sub(pattern, lambda _, made=made, marks=marks: f"{marks[0]}\n{made}\n{marks[1]}", text, flags=re.DOTALL)
    path.write_text(text)


if __name__ == "__main__":
    main()
