"""Dual-criteria rejection sampling (TwT, 3.1): which triplets are good enough, and which of a question's differ the most."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tsdkd.data.answers import final_answer, is_correct, same_answer
from tsdkd.pipelines.twt.prompts import Task

QUALITY = ("confidence", "log_probability", "agreement", "none", "random")
DIVERSITY = ("embedding", "random", "all")
VOICES = ("teachers", "replies")


def quality(
    rows: Sequence[Mapping[str, Any]], how: str, threshold: float, seed: int = 0, task: Task | None = None
) -> list[bool]:
    """Which triplets are kept.

    Args:
        rows: with `problem`, `answer`, `confidence` and, for `log_probability`, `mean_log_prob`.
        how: `confidence`, the paper's: c ≥ threshold. `log_probability`: the geometric mean of the tokens' probabilities in its
            place. `agreement`: more than half of the question's triplets have this answer (the paper's "hard rejection
            sampling", which it does not define, is not by labels, since it keeps wrong ones: this is a rule that takes none).
            `random`: as many as `confidence` keeps, drawn. `none`: all.
        threshold: in [0, 1].
        seed: of the draw.
        task: whose answers `agreement` compares.

    Raises:
        ValueError: no log-probabilities are there, or nothing is kept, with the best that was seen.
    """
    if how == "none":
        return [True] * len(rows)
    if how == "agreement":
        answers: dict[Any, list[str]] = {}
        for row in rows:
            answers.setdefault(row["problem"], []).append(_final(row["answer"], task))
        kept = [_most_agree(answers[row["problem"]], _final(row["answer"], task)) for row in rows]
        if rows and not any(kept):
            raise ValueError(f"quality: agreement keeps none of {len(rows):,} triplets: no two answers to a question agree.")
        return kept
    if how == "log_probability":
        if any(row.get("mean_log_prob") is None for row in rows):
            raise ValueError(
                "quality: log_probability needs the replies' log-probabilities: give each teacher log_probs: true."
            )
        values = [math.exp(row["mean_log_prob"]) for row in rows]
    else:
        values = [float(row["confidence"]) for row in rows]
    kept = [value >= threshold for value in values]
    if rows and not any(kept):
        what = "probability" if how == "log_probability" else "confidence"
        raise ValueError(
            f"the threshold {threshold:g} keeps none of {len(rows):,} triplets; the highest {what} is "
            f"{max(values):.4g}, the median {sorted(values)[len(values) // 2]:.4g}: lower the threshold."
        )
    if how == "random":
        drawn = set(random.Random(f"{seed}/quality").sample(range(len(rows)), sum(kept)))
        kept = [number in drawn for number in range(len(rows))]
    return kept


def _final(answer: str, task: Task | None) -> str:
    """What the grader reads of an answer."""
    found = None if task is None else final_answer(task.filled("answer_only", answer=answer), task.answer)
    return answer if found is None else found


def _most_agree(answers: Sequence[str], answer: str) -> bool:
    return 2 * sum(same_answer(other, answer) for other in answers) > len(answers)


def cosines(embeddings: np.ndarray) -> np.ndarray:
    """Eq. 2 of all pairs, `[n, n]`; of a vector of zeros 0.

    Example:
        >>> cosines(np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])).round(6).tolist()
        [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    vectors = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit @ unit.T


def diverse(
    rows: Sequence[Mapping[str, Any]],
    how: str,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    *,
    voices: str = "teachers",
    seed: int = 0,
) -> list[tuple[int, float | None]]:
    """Which triplets of one question are kept, as indices, and the similarity of the pair that they are.

    Args:
        rows: of one question, with `teacher`, `confidence` and `rationale`.
        how: `embedding`: the pair whose rationales are least alike (Eq. 3). `random`: a pair at random. `all`.
        embed: from texts to `[n, width]`, of `embedding`.
        voices: `teachers`, the paper's: a pair is of two teachers, each with its most confident triplet; `replies`: of any two.
        seed: of the draw.

    Where fewer than three voices are left, all of them are kept, as in the paper.
    """
    chosen = list(range(len(rows)))
    if how == "all":
        return [(number, None) for number in chosen]
    if voices == "teachers":
        best: dict[str, int] = {}
        for number in chosen:
            name = rows[number]["teacher"]
            if name not in best or rows[number]["confidence"] > rows[best[name]]["confidence"]:
                best[name] = number
        if len(best) < 3:
            return [(number, None) for number in chosen]  # all of them, however many each teacher wrote
        chosen = sorted(best.values())
    if len(chosen) < 3:
        return [(number, None) for number in chosen]
    pairs = list(itertools.combinations(range(len(chosen)), 2))
    if how == "random":
        pair = pairs[random.Random(f"{seed}/{rows[0]['problem']}").randrange(len(pairs))]
        return [(chosen[i], None) for i in pair]
    assert embed is not None
    alike = cosines(embed([rows[number]["rationale"] for number in chosen]))
    pair = min(pairs, key=lambda ij: alike[ij])
    return [(chosen[i], float(alike[pair])) for i in pair]


class Embedder:
    """Sentence embeddings by a model of sentence-transformers.

    Args:
        name: of the model, or a folder.

    Raises:
        ValueError: the package is not installed, or there is no such model.
    """

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                "diversity: embedding needs the package sentence-transformers: pip install 'tsdkd[pipelines]', or take "
                "diversity: random."
            ) from error
        try:
            self._model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the embedding model {name!r} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}. Name a folder or a "
                "model that is there (embedding_model), or take diversity: random."
            ) from error

    def __call__(self, texts: list[str]) -> np.ndarray:
        """`[texts, width]`."""
        return np.asarray(self._model.encode(texts, show_progress_bar=False, convert_to_numpy=True))


def label_accuracy(rows: Sequence[Mapping[str, Any]], kept: Sequence[bool], task: Task) -> dict[str, float]:
    """How many of the kept and of the dropped have the label's answer (the paper's Table 5), by the grader that scores
    students; nothing of rows without labels."""
    found = {}
    for name, wanted in (("kept", True), ("dropped", False)):
        marks = [
            is_correct(task.filled("answer_only", answer=row["answer"]), str(row["label"]), task.answer)
            for row, keep in zip(rows, kept, strict=True)
            if keep is wanted and row.get("label") is not None
        ]
        if marks:
            found[f"right of {name}"] = round(sum(marks) / len(marks), 4)
    return found


def shares(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    """How many rows there are by a column."""
    return dict(sorted(Counter(row[name] for row in rows).items()))
