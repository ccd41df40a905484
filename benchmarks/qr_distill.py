"""QR-Distill on the demo's problems beside Table 1's baselines, Table 2's ablations and random routing at the same rates.

Two students that differ in width and tokenizer, at equal optimizer steps; teacher, styles and judge are those of
`examples/07_qr_distill.py`, which says what stands in for a large model. `python benchmarks/qr_distill.py [--seeds 0 1]` adds
to `benchmarks/results/qr_distill.jsonl`; what is there is not made again. `--sizes 150 300 600` is the curve of Figure 6.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.demo.api_server import served
from tsdkd.demo.run import shipped
from tsdkd.pipelines.qr_distill import QRConfig, pipeline
from tsdkd.pipelines.qr_distill.report import last_epoch, routing_rates
from tsdkd.pipelines.tested import scored
from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "qr_distill.jsonl"
EXAMPLE = Path(__file__).parents[1] / "examples" / "07_qr_distill.py"
# What differs from the recipe; `training` is merged.
# These models' words are few: marks and labels are of those.
VARIANTS: dict[str, dict[str, Any]] = {
    "QR-Distill": {},
    "all paths, each alone (SFT)": {"recipe": "sft", "judge": None},
    "SKD": {"recipe": "skd"},
    "Distilling Step-by-Step": {
        "recipe": "step_by_step",
        "answer_alone": "#### {answer}",
        "marks": {"label": "= ", "rationale": "? "},
    },
    "question rephrasing": {"recipe": "rephrase"},
    "question augmentation": {"recipe": "question_aug"},
    "answer augmentation": {"recipe": "answer_aug"},
    "backward reasoning": {"recipe": "backward", "marks": {"inverse": "? "}},
    "without the filter": {"judge": None, "keep_wrong": True},
    "without routing": {"training": {"routing": "all"}},
    "without collaboration": {"training": {"mutual_weight": 0.0}},
    "random routing, same rates": {"training": {"routing": "random"}},
    "entropy for each student": {"training": {"per_student": True}},
    "directions (normalise)": {"training": {"normalise": True}},
    "QR-Distill, λ1 = 1": {"training": {"entropy_weight": 1.0}},
}
CURVE = ("QR-Distill", "all paths, each alone (SFT)")


def rates_of(folder: Path) -> list[float]:
    """How often each student was given a path when it was read last."""
    routed = [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]
    return routing_rates([{**row, "all": "all"} for row in last_epoch(routed)], "all")["all"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows: accuracy with its interval and mean output tokens of both students."""
    lines = ["| taught | questions | steps | paths | student-1 | student-2 |", "|---|---|---|---|---|---|"]
    runs: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = row["variant"], row["seed"], row["questions"], row["steps"], row["paths"]
        runs.setdefault(key, {})[row["label"]] = row
    said = lambda row: f"{row['accuracy']:.1%} ({row['low']:.1%}-{row['high']:.1%}), {row['tokens']:.0f}"  # noqa: E731
    first = next(iter(runs.values()))
    lines.append(f"| nothing: the start |  |  |  | {said(first['start-1'])} | {said(first['start-2'])} |")
    for (variant, _, questions, steps, paths), found in runs.items():
        both = " | ".join(said(found[f"student-{number}"]) for number in (1, 2))
        lines.append(f"| {variant} | {questions:,} | {steps:,} | {paths:,} | {both} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="fewer questions, for the curve of sample efficiency")
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("qr-benchmark"), help="where the runs stand")
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    own = parser.parse_args()
    if own.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return
    prepared = runpy.run_path(str(EXAMPLE))["prepared"]
    recipe = prepared(own.work, own.questions)
    recipe["training"].pop("epochs")
    recipe["training"]["max_grad_norm"] = 0.0  # the rows in results/ were made before gradients were cut
    made = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    there = {(row["variant"], row["seed"], row["questions"], row["steps"]) for row in made}
    wanted = [(name, seed, own.questions) for seed in own.seeds for name in own.variants]
    wanted += [(name, seed, size) for seed in own.seeds for size in own.sizes for name in CURVE]
    teacher = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
    with served({"teacher": teacher}, AutoTokenizer.from_pretrained(shipped("teacher"))) as urls:
        api = {"base_url": urls["teacher"], "model": "teacher", "concurrency": 64}
        recipe |= {"teacher": {"name": "teacher", "temperature": 2.0, **api}, "judge": {"name": "judge", **api}}
        for name, seed, size in wanted:
            if (name, seed, size, own.steps) in there:
                continue
            training = {**recipe["training"], "max_steps": own.steps, **VARIANTS[name].get("training", {})}
            folder = own.work / f"{seed}-{size}-{own.steps}"
            if training.get("routing") == "random":
                training["rate"] = rates_of(folder / "QR-Distill" / "05-students")
            more = {"training": training, "seed": seed, "limit": size, "output_dir": str(folder / name.replace(" ", "-"))}
            line = pipeline(QRConfig.of({**recipe, **VARIANTS[name], **more}))
            line.run()
            students = next(stage for stage in line.stages if stage.name == "students")
            about = {
                "variant": name,
                "seed": seed,
                "questions": size,
                "steps": own.steps,
                "paths": students.about["summary"]["paths"],
            }
            about["rates"] = rates_of(students.output)
            with RESULTS.open("a") as file:
                for row in scored(line.stages[-1].output):
                    file.write(json.dumps({**about, **row, "provenance": provenance(seed)}, ensure_ascii=False) + "\n")
                    print(name, seed, size, {k: row[k] for k in ("label", "accuracy", "tokens")}, flush=True)


if __name__ == "__main__":
    main()
