"""A teacher's reply as a triplet: rationale, answer, confidence (TwT, 3.1.1). Nothing is guessed: a reply of another form is
left out, with the reason."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from tsdkd.pipelines.twt.prompts import Task

_MARK = r"(?im)^[ \t>*_#(\-]*(?:\d[.)][ \t]*)?[*_]*"  # what may stand before a heading: quotes, bullets, numbers
_COLON = r"[*_]*[ \t]*[:：][*_]*"
_THINKING = re.compile(
    rf"{_MARK}(?:(?:revised|new|updated|my)[ \t]+)?(?:thinking(?:[ \t]+process)?|rationale|reasoning)"
    rf"(?:{_COLON}|(?<=\w)[*_]*[ \t]*$)"
)
_ANSWER = re.compile(
    rf"{_MARK}(?:the[ \t]+(?:final[ \t]+)?answer[ \t]+is(?:{_COLON})?|(?:final[ \t]+)?answer{_COLON})[ \t]*"
    r"(?:\n+(?![ \t>*_#(\-]*(?:\w+[ \t]+)?(?:score|confidence)\b)[ \t]*(?=\S))?(.*)$"
)
_SCORE = re.compile(
    rf"{_MARK}(?:(?:(?:final|confidence|total|overall)[ \t]+)*score|confidence)[*_]*[ \t]*[:：=][*_ \t]*\n*[ \t]*(.*)$"
)
_VALUE = re.compile(
    r"[*_`\[(]*[ \t]*([-+]?(?:\d+\.?\d*|\.\d+))[ \t]*(%)?(?:[ \t]*(?:/|out of)[ \t]*(\d+(?:\.\d+)?))?"
    r"[*_`\])]*[ \t]*\.?[*_ \t]*(?:\(.*)?"
)
_CODE = re.compile(r"(?:```|~~~)[ \t]*\n?[ \t]*(?i:python3?|py)\b[ \t]*\n(.*?)(?:```|~~~|\Z)", re.DOTALL)
_BLOCK = re.compile(r"(?:```|~~~)[ \t]*\n(.*?)(?:```|~~~)", re.DOTALL)
_FENCE = re.compile(r"(?m)^[ \t]*(?:```|~~~)[a-zA-Z0-9]*[ \t]*$\n?|```[ \t]*$")
_SCORE_IN_BLOCK = re.compile(r"(?i)\n[ \t]*\n[ \t]*score[ \t]*:[^\n]*\s*\Z")
_WRAPPED = tuple(
    re.compile(pattern) for pattern in (r"^\$*\\boxed\{(.*)\}\$*$", r"^\\\((.*)\\\)$", r"^\\\[(.*)\\\]$", r"^\$([^$]+)\$$")
)


@dataclass(frozen=True)
class Triplet:
    """What a reply says.

    Attributes:
        rationale, answer: its texts.
        confidence: in [0, 1].
        by: `factors`, the weighted sum of Eq. 1; `stated`, the reply's own score.
    """

    rationale: str
    answer: str
    confidence: float
    by: str


@dataclass(frozen=True)
class Unreadable:
    """Why a reply is none."""

    reason: str


def parsed(text: str, task: Task, finish: str | None = None) -> Triplet | Unreadable:
    """A reply as a triplet, or why it is none. Scores count behind the answer alone: a rationale may be about scores, and
    code may have a variable of that name.

    Args:
        text: the reply.
        task: whose form it has.
        finish: why the model ended; `length` of a reply that was cut, `content_filter` of one that was withheld.

    Example:
        >>> from tsdkd.pipelines.twt.prompts import TASKS
        >>> parsed("Thinking: 2+2=4\\n\\nThe answer is: 4\\n\\nscore: 0.97", TASKS["maths"])
        Triplet(rationale='2+2=4', answer='4', confidence=0.97, by='stated')
        >>> parsed("4", TASKS["maths"])
        Unreadable(reason='no thinking')
    """
    read = _readable(text, finish)
    if isinstance(read, Unreadable):
        return read
    text = read if task.is_code else _FENCE.sub("", read)  # the paper's example shows its parts between fences
    begins = _THINKING.search(text)
    if begins is None:
        return Unreadable("no thinking")
    found = _code(text, begins.end()) if task.is_code else _stated(text, begins.end())
    if isinstance(found, Unreadable):
        return found
    answer, starts, behind = found
    rationale = _behind_headings(_FENCE.sub("", text[begins.end() : starts])).strip()
    if not rationale:
        return Unreadable("no thinking")
    confidence = _confidence(behind, task)
    return confidence if isinstance(confidence, Unreadable) else Triplet(rationale, answer, *confidence)


def rewritten(text: str, finish: str | None = None) -> str | Unreadable:
    """The rationale of a teacher's rewriting, behind the heading that was asked for, without an answer or score behind it."""
    read = _readable(text, finish)
    if isinstance(read, Unreadable):
        return read
    text = _FENCE.sub("", _CODE.split(read)[0])
    begins = _THINKING.search(text)
    if begins is None:
        return Unreadable("no thinking")
    text = _behind_headings(text[begins.end() :])
    answer = _ANSWER.search(text)
    text = text[: answer.start()].rstrip() if answer else text.rstrip()
    last = text.rpartition("\n")[2]
    if (score := _SCORE.match(last)) and _share(score[1]) is not None:
        text = text[: len(text) - len(last)]
    return text.strip() or Unreadable("empty")


# ---------------------------------------------------------------------- parts


def _readable(text: str, finish: str | None) -> str | Unreadable:
    """A reply without what a reasoning model thought before it, whose opening mark its template may have written."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").rpartition("</think>")[2].strip()
    if finish in ("length", "content_filter") or "<think>" in text:
        return Unreadable("filtered" if finish == "content_filter" else "cut")
    return text or Unreadable("empty")


def _stated(text: str, start: int) -> tuple[str, int, str] | Unreadable:
    """The answer that stands before the last score, where it stands, and what follows it."""
    scores = [match for match in _SCORE.finditer(text, start) if _share(match[1]) is not None]
    end = scores[-1].start() if scores else len(text)
    found = [match for match in _ANSWER.finditer(text, start) if _bare(match[1])]
    before = [match for match in found if match.start() < end]
    if not before:
        return Unreadable("no answer")
    first = [match for match in found if any(score.start() > match.start() for score in scores[:-1])]
    if first and _bare(first[-1][1]) != _bare(before[-1][1]):
        return Unreadable("several triplets")
    return _bare(before[-1][1]), before[-1].start(), text[before[-1].end() :]


def _code(text: str, start: int) -> tuple[str, int, str] | Unreadable:
    """The block that is the answer, where it stands, and what follows it: the last that defines something, else the last."""
    labelled = list(_CODE.finditer(text, start))
    blocks = labelled or [m for m in _BLOCK.finditer(text, start) if not _SCORE.match(m[1].strip()) or "\n" in m[1].strip()]
    defines = [match for match in blocks if re.search(r"(?m)^[ \t]*(?:def|class|async def) ", match[1])]
    chosen = (defines or blocks)[-1] if blocks else None
    if chosen is None:
        return Unreadable("no code")
    inside = _SCORE_IN_BLOCK.search(chosen[1])  # the paper's Figure 6
    code = chosen[1][: inside.start()] if inside else chosen[1]
    behind = (inside[0] if inside else "") + text[chosen.end() :]
    answer = textwrap.dedent(code.strip("\n")).rstrip()
    return (answer, chosen.start(), behind) if answer else Unreadable("no code")


def _confidence(behind: str, task: Task) -> tuple[float, str] | Unreadable:
    """Eq. 1 where every factor has a number, else the stated score. Points that are weighted already (0.48 of 0.5), which the
    paper's prompt asks for, are summed. Where the two readings and the statement disagree, the statement stands."""
    scores = [value for match in _SCORE.finditer(behind) if (value := _share(match[1])) is not None]
    stated = scores[-1] if scores else None
    values: dict[str, float] = {}
    for name in task.factors:
        pattern = _MARK + r"[ \t]+".join(map(re.escape, name.split())) + rf"[*_]*[ \t]*(?:\([^)\n]*\))?{_COLON}[ \t]*(.*)$"
        read = [value for match in re.finditer(pattern, behind) if (value := _share(match[1])) is not None]
        if read and 0 <= read[-1] <= 1:
            values[name] = read[-1]
    if values and len(values) == len(task.factors):
        weighted = sum(task.factors[name] * value for name, value in values.items())
        points = sum(values.values())
        are_points = all(value <= task.factors[name] + 1e-9 for name, value in values.items())
        readings = [points, weighted] if are_points else [weighted]
        found = readings[0] if stated is None else min(readings, key=lambda value: abs(value - stated))
        if stated is None or abs(found - stated) <= 0.1 or not 0 <= stated <= 1:
            return round(min(found, 1.0), 6), "factors"
    if stated is None:
        return Unreadable("no score")
    return (round(stated, 6), "stated") if 0 <= stated <= 1 else Unreadable("a score outside of [0, 1]")


def _share(text: str) -> float | None:
    """A score of 1: 0.85, 85 %, 8.5/10, 8.5 out of 10, or what stands behind the last =; None of anything else."""
    found = _VALUE.fullmatch(text.rpartition("=")[2].strip())
    if found is None:
        return None
    value = float(found[1])
    if found[2]:
        return value / 100
    return value / float(found[3]) if found[3] and float(found[3]) else value


def _behind_headings(text: str) -> str:
    """A text without headings at its start: the paper's own Figure 9 has it twice."""
    text = text.lstrip()
    while (again := _THINKING.match(text)) is not None:
        text = text[again.end() :].lstrip()
    return text


def _bare(text: str) -> str:
    """An answer without marks around it."""
    text = text.strip().strip("*_`").strip()
    text = text.removesuffix(".").rstrip("*_` ") if not re.fullmatch(r"\d+\.\d*", text) else text
    for _ in range(2):  # $\boxed{4}$
        for pattern in _WRAPPED:
            if wrapped := pattern.match(text):
                text = wrapped[1].strip()
    if len(text) > 1 and text[0] == "[" and text[-1] == "]":
        text = text[1:-1].strip()
    return text
