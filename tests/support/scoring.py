"""Tasks and models for the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tsdkd.demo.problems import held_out
from tsdkd.demo.run import LEVELS, shipped
from tsdkd.evaluation import harness
from tsdkd.evaluation.run import Settings

ROOT = Path(__file__).parents[2]


ON = Settings(chat_template=True, dtype="float32")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_hf(name):
    return lambda: harness.hf_model(shipped(name), dtype="float32", batch_size=250)


def local_task(folder: Path, items: list[dict], name: str = "local", **more) -> Path:
    """A graded task over `items`, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    text = (ROOT / "examples" / "eval_tasks" / "graded.yaml").read_text().replace("graded_questions", name)
    text = text.replace("examples/eval_tasks/questions.jsonl", str(folder / f"{name}.jsonl"))
    (folder / f"{name}.yaml").write_text(text.replace("max_gen_toks: 128", "max_gen_toks: 48"))
    (folder / "grading.py").write_text((ROOT / "examples" / "eval_tasks" / "grading.py").read_text())
    return folder


def items(count: int, seed: int = 5) -> list[dict]:
    return [{"question": p.question, "answer": p.answer} for p in held_out(count, seed, set(), LEVELS)]
