"""Dual-criteria rejection sampling against brute force, with a real embedding model."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twt import small_embedder

from tsdkd.pipelines.twt.prompts import TASKS
from tsdkd.pipelines.twt.sampling import Embedder, cosines, diverse, label_accuracy, quality


def rows_of(seed, questions=6, teachers=4, samples=1):
    draw = random.Random(seed)
    return [
        {
            "problem": q, "teacher": f"t{t}", "sample": s, "answer": str(draw.randrange(3)), "label": str(draw.randrange(3)),
            "confidence": draw.randrange(101) / 100, "mean_log_prob": -draw.random(),
            "rationale": f"{q} {t} {s} {draw.random()}",
        }
        for q in range(questions) for t in range(teachers) for s in range(samples)
    ]  # fmt: skip


@given(st.integers(0, 1000), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_quality_is_its_rule(seed, percent):
    rows, threshold = rows_of(seed), percent / 100
    wanted = [row["confidence"] >= threshold for row in rows]
    if not any(wanted):
        with pytest.raises(ValueError, match=f"highest confidence is {max(row['confidence'] for row in rows):.4g}"):
            quality(rows, "confidence", threshold)
        return
    assert quality(rows, "confidence", threshold) == wanted
    drawn = quality(rows, "random", threshold, seed)
    assert sum(drawn) == sum(wanted) and drawn == quality(rows, "random", threshold, seed)
    assert quality(rows, "none", threshold) == [True] * len(rows)
    agree = []
    for row in rows:
        same = [other["answer"] == row["answer"] for other in rows if other["problem"] == row["problem"]]
        agree.append(sum(same) / len(same) > 0.5)
    if any(agree):
        assert quality(rows, "agreement", threshold) == agree
    else:
        with pytest.raises(ValueError, match="no two answers to a question agree"):
            quality(rows, "agreement", threshold)
    likely = [math.exp(row["mean_log_prob"]) >= 0.4 for row in rows]
    assert quality(rows, "log_probability", 0.4) == likely


def test_answers_that_are_the_same_number_agree():
    rows = [{"problem": 0, "answer": answer, "confidence": 1} for answer in ("1,200", "1200.0", "7")]
    assert quality(rows, "agreement", 0.5) == [True, True, False]


def test_log_probabilities_that_nobody_gave_are_told():
    with pytest.raises(ValueError, match="log_probs: true"):
        quality([{"confidence": 1.0}], "log_probability", 0.5)


def hashed(texts):
    """Texts as vectors without any model."""
    return np.array([np.random.default_rng(abs(hash(text)) % 2**32).normal(size=5) for text in texts])


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_diversity_is_the_least_similar_pair_of_two_teachers(seed, teachers, samples):
    rows = rows_of(seed, 1, teachers, samples)
    best = {}
    for row in rows:  # each teacher's most confident, the first of equals
        if row["teacher"] not in best or row["confidence"] > best[row["teacher"]]["confidence"]:
            best[row["teacher"]] = row
    for voices, left in (("teachers", list(best.values())), ("replies", rows)):
        found = diverse(rows, "embedding", hashed, voices=voices)
        chosen = [rows[place] for place, _ in found]
        if len(left) < 3:
            assert chosen == rows and all(similarity is None for _, similarity in found)
            continue
        vectors = {row["rationale"]: vector for row, vector in zip(left, hashed([r["rationale"] for r in left]), strict=True)}

        def alike(one, other, vectors=vectors):
            a, b = vectors[one["rationale"]], vectors[other["rationale"]]
            return sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b))

        lowest = min(alike(one, other) for one, other in itertools.combinations(left, 2))
        assert len(chosen) == 2 and alike(*chosen) == pytest.approx(lowest) and found[0][1] == pytest.approx(lowest)
        assert voices == "replies" or chosen[0]["teacher"] != chosen[1]["teacher"]


def test_controls():
    rows = rows_of(1, 1, 4)
    assert diverse(rows, "all") == [(i, None) for i in range(4)]
    pairs = {tuple(i for i, _ in diverse([{**row, "problem": n} for row in rows], "random", seed=3)) for n in range(200)}
    assert pairs == set(itertools.combinations(range(4), 2))
    assert diverse(rows, "random", seed=3) == diverse(rows, "random", seed=3)


def test_cosines_of_zero_vectors_are_zero():
    assert cosines(np.zeros((2, 3))).tolist() == [[0, 0], [0, 0]]


def test_a_real_embedding_model_knows_what_differs():
    rows = [
        {"problem": 0, "teacher": name, "confidence": 1.0, "rationale": text}
        for name, text in (
            ("a", "Add the twelve apples to the five apples: seventeen apples."),
            ("b", "Twelve apples plus five apples makes seventeen apples."),
            ("c", "The capital of France lies on the river Seine."),
        )
    ]
    embed = Embedder(small_embedder())
    vectors = embed([row["rationale"] for row in rows])
    assert vectors.shape == (3, 384) and np.isfinite(vectors).all()
    chosen = {rows[place]["teacher"] for place, _ in diverse(rows, "embedding", embed)}
    assert "c" in chosen and cosines(vectors)[0, 1] > 0.8


def test_an_embedding_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"embedding model '.*nothing' cannot be loaded"):
        Embedder(str(tmp_path / "nothing"))


def test_the_accuracy_of_what_is_kept_and_dropped():
    solved = [{"answer": "17", "label": "12+5=17\n#### 17"}, {"answer": "17.0", "label": "17"}]
    assert label_accuracy(solved, [True, True], TASKS["maths"]) == {"right of kept": 1.0}
    choices = [{"problem": 0, "answer": a, "label": "B", "confidence": 1} for a in ("B", "(B)", "B. cat", "B) cat", "C")]
    assert label_accuracy(choices, [True] * 5, TASKS["choice"]) == {"right of kept": 0.8}
    assert quality(choices, "agreement", 0, task=TASKS["choice"]) == [True] * 4 + [False]
    rows = [{"answer": a, "label": b} for a, b in (("1", "1"), ("2", "2.0"), ("3", "4"), ("5", None))]
    assert label_accuracy(rows, [True, False, True, True], TASKS["maths"]) == {"right of kept": 0.5, "right of dropped": 1.0}
    assert label_accuracy([{"answer": "1", "label": None}], [True], TASKS["maths"]) == {}
