"""Rows of results files, made up."""

from __future__ import annotations

from tsdkd.data.rows import ScoreRow
from tsdkd.evaluation.suite import PAPER

BY_NAME = {benchmark.name: benchmark for benchmark in PAPER}


def row(label, benchmark, score, *, right=None, n=1000, chat=False, partial=False, which="same", **more):
    b = BY_NAME.get(benchmark)
    made = {
        "task": b.task if b else benchmark,
        "benchmark": benchmark if b else None,
        "group": None,
        "requested": "x",
        "task_digest": "x",
        "metric": b.metric if b else "accuracy",
        "filter": "none",
        "main": True,
        "score": score,
        "stderr": (score * (1 - score) / n) ** 0.5,
        "higher_is_better": True,
        "n": n,
        "chat_template": chat,
        "partial": partial,
        "rows": 1,
        "model": label,
        "model_digest": "",
        "label": label,
        "settings": {},
        **more,
    }
    if right is not None:
        made["items"] = {"set": which, "right": right}
    return ScoreRow.from_json(made, "a test's row")
