"""The FLOPs that a run logs, from the lengths of its texts by hand, and their share of a GPU's peak."""

from __future__ import annotations

import dataclasses

import pytest
from running import answered, by_prompt, general, make, rows
from tiny import QUESTIONS, prompts, tiny_model

from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD
from tsdkd.trainers.sizes import size_of


def lengths():
    """Tokens of the first questions, and of what is written behind each."""
    asked = [make_tokenizer()(question)["input_ids"] for question in QUESTIONS[:8]]
    return [(len(ids), len(by_prompt(ids))) for ids in asked]


def read(size, tokens):
    """A forward pass below the head: two FLOPs a parameter and token, and causal attention."""
    attention = 2 * size.layers * size.heads * size.head_dim
    return sum(2 * (size.parameters - size.embedding - size.head) * n + attention * n * n for n in tokens)


def test_a_steps_products_by_part(tmp_path):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    ours, theirs = size_of(student.config), size_of(teacher.config)
    trainer = make(tmp_path, student=student, teacher=teacher, rollouts=by_prompt, max_steps=1, per_device_train_batch_size=4,
                   gradient_accumulation_steps=2)  # fmt: skip
    trainer.loop.scorer.spending = dataclasses.replace(trainer.loop.scorer.spending, peak=1e9)
    trainer.train()
    row, whole, written = rows(trainer)[0], [p + c for p, c in lengths()], sum(c for _, c in lengths())
    assert row["tflop/teacher"] == pytest.approx(read(theirs, whole) / 1e12)
    assert row["tflop/student"] == pytest.approx(3 * read(ours, whole) / 1e12)
    assert row["tflop/rollout"] == pytest.approx((read(ours, whole) + 2 * ours.head * written) / 1e12)
    assert row["tflop/loss"] == pytest.approx((6 * ours.head + 2 * theirs.head) * written / 1e12)
    spent = sum(value for name, value in row.items() if name.startswith("tflop/")) * 1e12
    seconds = written / row["tokens_per_second"]
    assert row["mfu"] == pytest.approx(spent / (seconds * 1e9), rel=1e-3)


def test_what_is_not_read_or_written_is_not_counted(tmp_path):
    """A prefix alone, and completions that are given; on a CPU there is no share of a peak."""
    size = size_of(tiny_model().config)
    trainer = general(tmp_path / "a", GKD(selection="prefix", selection_share=0.25), rollouts=by_prompt, max_steps=1,
                      per_device_train_batch_size=8, data=prompts(8))  # fmt: skip
    trainer.train()
    kept = [(p, -(-c // 4)) for p, c in lengths()]
    row = rows(trainer)[0]
    assert row["tflop/student"] == pytest.approx(3 * read(size, [p + c for p, c in kept]) / 1e12)
    assert row["tflop/loss"] == pytest.approx((6 * 64 * 32 + 2 * 64 * 48) * sum(c for _, c in kept) / 1e12) and "mfu" not in row
    given = general(tmp_path / "b", GKD(lmbda=0.0), data=answered(), max_steps=1)
    given.train()
    assert "tflop/rollout" not in rows(given)[0] and rows(given)[0]["tflop/teacher"] > 0
