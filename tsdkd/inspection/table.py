"""What a method decides of every token of a completion, as columns of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# What the columns are and their units; those of a term stand under `contribution/TERM`, `gate/TERM` and `takes/TERM`.
COLUMNS = {
    "student_entropy": ("entropy of the student", "nats"),
    "teacher_entropy": ("entropy of the teacher", "nats"),
    "divergence": ("divergence of the two distributions", "nats"),
    "student_log_prob": ("log-probability of the written token, student", "nats"),
    "teacher_log_prob": ("log-probability of the written token, teacher", "nats"),
    "log_ratio": ("log p_T − log p_S of the written token", "nats"),
    "overlap": ("share of the teacher's k best among the student's k best", ""),
    "tau": ("Kendall's tau of the candidates' two orders", ""),
}
_OF_TERMS = {
    "contribution": ("part of the loss, {} term", "loss"),
    "gate": ("gate of the {} term", ""),
    "takes": ("taken by the {} term", ""),
    "tau": ("Kendall's tau of the {} term's candidates", ""),
}


def meaning(column: str) -> tuple[str, str]:
    """What a column holds, and its unit."""
    if column in COLUMNS:
        return COLUMNS[column]
    kind, _, term = column.partition("/")
    told, unit = _OF_TERMS[kind]
    return told.format(term), unit


@dataclass(frozen=True)
class Candidates:
    """The student's best tokens at each position, in its order.

    Attributes:
        ids: `[tokens, k]`.
        texts: what each id reads as.
        student: `[tokens, k]`, the student's probability of each.
        teacher: `[tokens, k]`, the teacher's; None without one.
        teacher_ranks: `[tokens, k]`, the places that the teacher gives them among the candidates, from 0; None likewise.
        teacher_best: `[tokens]`, the token that the teacher holds likeliest of all; None likewise.
        teacher_best_prob: its probability for the teacher.
    """

    ids: np.ndarray
    texts: Mapping[int, str]
    student: np.ndarray
    teacher: np.ndarray | None = None
    teacher_ranks: np.ndarray | None = None
    teacher_best: np.ndarray | None = None
    teacher_best_prob: np.ndarray | None = None


@dataclass(frozen=True)
class TokenTable:
    """A completion as student, teacher and method see it, a number a trained token in each column.

    Attributes:
        token_ids: of the completion's trained tokens.
        tokens: what each reads as.
        columns: by name (`COLUMNS`, `contribution/TERM`, `gate/TERM`, `takes/TERM`), `[tokens]`; NaN where nothing is known.
        candidates: what the student proposes, and how the teacher sees it.
        terms: of each term its kind (`ranking`, `divergence`, `entropy`, `sampled`), weight and value.
        loss: of this completion taken as a step of its own; the sum of all contributions.
        text: the completion as one, of which the tokens are pieces.
        prompt, method, student, teacher, temperature, note: what was asked of whom; τ of the distributions.
    """

    token_ids: list[int]
    tokens: list[str]
    columns: dict[str, np.ndarray]
    candidates: Candidates
    terms: dict[str, dict[str, Any]]
    loss: float
    text: str = ""
    prompt: str = ""
    method: str = ""
    student: str = ""
    teacher: str = ""
    temperature: float = 1.0
    note: str = ""
    label: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The columns with the position, id and text of every token before them: a table that pandas and others take."""
        first = {
            "position": np.arange(len(self)),
            "token_id": np.array(self.token_ids, dtype=np.int64),
            "token": np.array(self.tokens, dtype=object),
        }
        return {**first, **self.columns}

    def frame(self) -> Any:
        """`arrays` as a pandas `DataFrame`.

        Raises:
            ImportError: without pandas.
        """
        import pandas

        return pandas.DataFrame(self.arrays)

    def to_json(self) -> dict[str, Any]:
        """The table as JSON holds it, from which the page is drawn; NaN is None."""
        made = dataclasses.asdict(self)
        made["columns"] = {name: _rounded(values) for name, values in self.columns.items()}
        made["meanings"] = {name: meaning(name) for name in self.columns}
        made["candidates"] = {
            name: _rounded(value) if isinstance(value, np.ndarray) else value for name, value in made["candidates"].items()
        }
        return made

    def _repr_html_(self) -> str:
        """The page, inline in a notebook."""
        from html import escape

        from tsdkd.reporting.token_page import token_page

        page = escape(token_page([[self.to_json()]]), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0" title="tsdkd: a completion"></iframe>'


def _rounded(values: np.ndarray) -> list[Any]:
    """Numbers of nine digits, whole ones as they are, NaN as None."""
    if values.dtype.kind in "biu":
        return values.astype(int).tolist()
    nested = [float(f"{value:.9g}") if np.isfinite(value) else None for value in values.ravel().tolist()]
    return nested if values.ndim == 1 else [nested[i : i + values.shape[1]] for i in range(0, len(nested), values.shape[1])]
