"""A teacher's reply as a triplet: rationale, answer, confidence (TwT, 3.1.1). Nothing is guessed: a reply of another form is
left out, with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tsdkd.pipelines.twt.prompts import Task

_MARK = r"(?im)^[ \t>*_#(\-]*(?:\d[.)][ \t]*)?[*_]*"  # what may stand before a heading: quotes, bullets, numbers
_THINKING = re.compile(_MARK + r"(?:thinking|rationale|reasoning)[*_]*[ \t]*:[*_]*")
_ANSWER = re.compile(
    _MARK + r"(?:the[ \t]+(?:final[ \t]+)?answer[ \t]+is[ \t]*:?|(?:final[ \t]+)?answer[*_]*[ \t]*:)[*_]*[ \t]*"
    r"(?:\n(?![ \t>*_#(\-]*(?:\w+[ \t]+)?(?:score|confidence)\b)[ \t]*(?=\S))?(.*)$"
)
_NUMBER = r"[*_`\[(]*[ \t]*([-+]?\d*\.?\d+)(?![\d,])[ \t]*(%)?(?:[ \t]*/[ \t]*(\d+(?:\.\d+)?))?"
_SCORE = re.compile(
    _MARK + r"(?:(?:(?:final|confidence|total|overall)[ \t]+)*score|confidence)[*_]*[ \t]*[:=][*_ \t]*\n?[ \t]*" + _NUMBER
)
_CODE = re.compile(r"```[ \t]*\n?[ \t]*(?i:python|py)\b[0-9.]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*\n(.*?)```", re.DOTALL)
_FENCE = re.compile(r"(?m)^[ \t]*```[a-zA-Z]*[ \t]*$\n?|```[ \t]*$")
_THOUGHT = re.compile(r"(?s)^\s*<think>(.*?)</think>\s*")
_BOXED = re.compile(r"^\$*\\boxed\{(.*)\}\$*$")
CLOSE = 0.015  # between a stated score and the sum of points that are weighted already


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
    """A reply as a triplet, or why it is none.

    Args:
        text: the reply.
        task: whose form it has.
        finish: why the model ended; `length` of a reply that was cut.

    Example:
        >>> from tsdkd.pipelines.twt.prompts import TASKS
        >>> parsed("Thinking: 2+2=4\\n\\nThe answer is: 4\\n\\nscore: 0.97", TASKS["maths"])
        Triplet(rationale='2+2=4', answer='4', confidence=0.97, by='stated')
        >>> parsed("4", TASKS["maths"])
        Unreadable(reason='no thinking')
    """
    text = _THOUGHT.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if not text:
        return Unreadable("empty")
    if finish == "length":
        return Unreadable("cut")
    if not task.is_code:
        text = _FENCE.sub("", text)  # the paper's example shows its parts between fences
    begins = _THINKING.search(text)
    if begins is None:
        return Unreadable("no thinking")
    scores = list(_SCORE.finditer(text, begins.end()))
    if task.is_code:
        block = _function(text[begins.end() :])
        if block is None:
            return Unreadable("no code")
        answer, ends = _without_scores(block.group(1), task).strip("\n").rstrip(), begins.end() + block.start()
    else:
        found = [match for match in _ANSWER.finditer(text, begins.end()) if _bare(match.group(1))]
        if not found:
            return Unreadable("no answer")
        answer, ends = _bare(found[-1].group(1)), found[-1].start()
        if len({_bare(match.group(1)) for match in found}) > 1 and not scores:
            return Unreadable("several answers")
    rationale = _behind_headings(_FENCE.sub("", _without_scores(text[begins.end() : ends], task))).strip()
    if not answer.strip():
        return Unreadable("no answer")
    if not rationale:
        return Unreadable("no thinking")
    stated = _share(scores[-1].groups()) if scores else None
    weighed = _weighed(text[ends:] + "\n" + text[begins.end() : ends], task, stated)
    if weighed is None and not scores:
        return Unreadable("no score")
    confidence, by = (stated, "stated") if weighed is None else (weighed, "factors")
    if confidence is None or not 0 <= confidence <= 1:
        return Unreadable("a score outside of [0, 1]")
    return Triplet(rationale, answer, round(confidence, 6), by)


def rewritten(text: str, finish: str | None = None) -> str | Unreadable:
    """The rationale of a teacher's rewriting, with its heading or without, and without whatever answer or score follows it."""
    text = _THOUGHT.sub("", text.replace("\r\n", "\n")).strip()
    if not text:
        return Unreadable("empty")
    if finish == "length":
        return Unreadable("cut")
    text = _FENCE.sub("", _CODE.split(text)[0])
    begins = _THINKING.search(text)
    text = text if begins is None else _behind_headings(text[begins.end() :])
    stops = [match.start() for pattern in (_ANSWER, _SCORE) for match in [pattern.search(text)] if match]
    text = text[: min(stops)] if stops else text
    return text.strip() or Unreadable("empty")


def _behind_headings(text: str) -> str:
    """A text without headings at its start: the paper's own Figure 9 has it twice."""
    text = text.lstrip()
    while (again := _THINKING.match(text)) is not None:
        text = text[again.end() :].lstrip()
    return text


def _function(text: str) -> re.Match | None:
    """The block of code that is the answer: the last that defines something, else the last; one that only scores is none."""
    labelled = list(_CODE.finditer(text))
    blocks = labelled or [match for match in _BLOCK.finditer(text) if not _SCORE.match(match.group(1).strip())]
    defines = [match for match in blocks if re.search(r"(?m)^[ \t]*(?:def|class|async def) ", match.group(1))]
    chosen = defines or blocks
    return chosen[-1] if chosen else None


def _bare(text: str) -> str:
    """An answer without marks around it."""
    text = text.strip().strip("*_`").strip()
    boxed = _BOXED.match(text)
    text = boxed[1].strip() if boxed else text
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    if len(text) > 1 and text[0] == "[" and text[-1] == "]":
        text = text[1:-1].strip()
    return text.removesuffix(".").strip() if not re.fullmatch(r"\d+\.\d*", text) else text


def _share(groups: tuple[str | None, ...]) -> float | None:
    """A score of 1: 0.85, 85 %, 8.5/10."""
    number, percent, of = groups
    value = float(number or "nan")
    if percent:
        return value / 100
    return value / float(of) if of and float(of) else value


def _factor(name: str) -> re.Pattern:
    words = r"[ \t]+".join(map(re.escape, name.split()))
    return re.compile(
        rf"(?im)^[ \t>*_#\-]*(?:\(?\d[.)]?\)?[ \t]*)?[*_]*{words}[*_]*[ \t]*(?:\([^)\n]*\))?[*_]*[ \t]*[:=][*_ \t]*{_NUMBER}"
    )


def _weighed(text: str, task: Task, stated: float | None) -> float | None:
    """Eq. 1, where every factor has a number; points that are weighted already (0.48 of 0.5) are summed."""
    values = {}
    for name in task.factors:
        found = list(_factor(name).finditer(text))
        value = _share(found[-1].groups()) if found else None
        if value is None or not 0 <= value <= 1:
            return None
        values[name] = value
    if not values:
        return None
    points = all(value <= task.factors[name] + 1e-9 for name, value in values.items())
    if points and stated is not None and abs(sum(values.values()) - stated) <= CLOSE:
        return sum(values.values())
    return sum(task.factors[name] * value for name, value in values.items())


def _without_scores(text: str, task: Task) -> str:
    """A rationale without lines that score it."""
    lines = [
        line for line in text.split("\n") if not _SCORE.match(line) and not any(_factor(n).match(line) for n in task.factors)
    ]
    return "\n".join(lines)
