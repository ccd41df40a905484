"""What stands in for a large model's ways of writing in QR-Distill's example, for the demo's questions.

A model of the demo's size follows no instructions. It solves the question; these rules put its steps, and its mistakes, into
the form that the prompt asks for, so that the six styles differ as texts do: sentences beside steps, a rejected branch before
each, a program without intermediate results, what is known first, a proof afterwards. In some paths a rule makes a step false
and leaves the answer right, for the judge to find; the judge's rule adds up every equation.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

from tsdkd.data.answers import final_answer
from tsdkd.demo.problems import FACTORS, GAINS, LOSSES, make_problem

FALSE = 0.15  # of the paths get a false step, where they have one besides the last
_QUESTION = re.compile(r"(?s)[A-Z][a-z]+ has \d+ \w+\..*?How many \w+ now\?")
_STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")
_EQUATION = re.compile(r"\d+(?:[+*-]\d+)+=\d+")
_ASKED = {
    "Reason to solve the problem": "vanilla", "reason step by step": "chain_of_thought", "tree of thoughts": "tree_of_thought",
    "Use code": "program", "relevant facts": "fact_retrieval", "backward reasoning": "backward",
}  # fmt: skip


def in_style(style: str, question: str, solution: str) -> str:
    """A worked solution as a path of a style; one without steps stays.

    Example:
        >>> in_style("backward", "Tom has 5 pens. Tom buys 2 more. How many pens now?", "5+2=7\\n#### 7")
        '5+2=7\\n7-2=5\\n#### 7'
    """
    steps, answer = _STEP.findall(solution), final_answer(solution)
    if not steps or answer is None:
        return solution
    told = [f"{a}{kind}{b}={c}" for a, kind, b, c in steps]
    sentences = [sentence.strip() for sentence in question.split(".")]
    if style == "chain_of_thought":
        told = [sentences[0] + ".", *(f"{s}. {t}" for s, t in zip(sentences[1:], told, strict=False))]
    elif style == "tree_of_thought":
        told = [f"{a}{'+' if kind != '+' else '-'}{b}? {t}" for (a, kind, b, _), t in zip(steps, told, strict=True)]
    elif style == "program":
        told = [steps[0][0], *(kind + b for _, kind, b, _ in steps)]
    elif style == "fact_retrieval":
        told = [" ".join([steps[0][0], *(kind + b for _, kind, b, _ in steps)]) + ".", *told]
    elif style == "backward":
        told += [_proof(*step) for step in reversed(steps)]
    return "\n".join([*told, f"#### {answer}"])


def _proof(a: str, kind: str, b: str, c: str) -> str:
    """A step from its end."""
    return f"{c}-{b}={a}" if kind == "+" else f"{c}+{b}={a}" if kind == "-" else "+".join([a] * int(b)) + f"={c}"


def with_false_step(path: str) -> str:
    """A path whose first equation is false, where there is a second; the answer stays."""
    found = list(_EQUATION.finditer(path))
    if len(found) < 2:
        return path
    left, _, right = found[0].group().partition("=")
    return path[: found[0].start()] + f"{left}={int(right) + 1}" + path[found[0].end() :]


def is_sound(path: str) -> bool:
    """Whether every equation of a path is true.

    Example:
        >>> is_sound("5+2=7\\n7*3=21"), is_sound("5+2=8\\n7*3=21")
        (True, False)
    """
    for equation in _EQUATION.findall(path):
        left, _, right = equation.partition("=")
        total, *rest = re.split(r"([+*-])", left)
        value = int(total)
        for kind, number in zip(rest[::2], rest[1::2], strict=True):
            value = value + int(number) if kind == "+" else value - int(number) if kind == "-" else value * int(number)
        if value != int(right):
            return False
    return True


def rephrased(question: str) -> str:
    """The same question with other verbs."""
    after = {**dict(zip(GAINS, GAINS[1:] + GAINS[:1], strict=True)), **dict(zip(LOSSES, LOSSES[1:] + LOSSES[:1], strict=True))}
    return re.sub(r"\w+", lambda match: after.get(match[0], match[0]), question)


def another(question: str) -> str:
    """A new question of as many operations."""
    return make_problem(_draws(question), max(1, question.count(".") - 1)).question


def inverse(question: str, answer: str) -> str:
    """From the answer back to the beginning; empty where that takes a division, which these problems have not."""
    name, _, _, item = question.split()[:4]
    told = []
    for sentence in reversed(question.split(".")[1:-1]):
        words = sentence.split()
        if words[1] in FACTORS:
            return ""
        told.append(f"{name} {LOSSES[0]} {words[2]}." if words[1] in GAINS else f"{name} {GAINS[0]} {words[2]} more.")
    return " ".join([f"{name} has {answer} {item}", *told, f"How many {item[:-1]} now?"])


def reply_to(text: str, solve: Callable[[str], str]) -> str | None:
    """The answer to one of QR-Distill's prompts; None of another text.

    Args:
        text: the prompt.
        solve: writes a worked solution of a question.
    """
    question = _QUESTION.search(text)
    if question is None:
        return None
    first = question[0]
    if "reasoning path that reaches the right answer" in text:
        return f"Verdict: {'valid' if is_sound(text[question.end() :]) else 'invalid'}"
    if "Inverse question:" in text:
        agrees = final_answer(text.rpartition("Reasoning path:")[2]) == first.split()[2]
        return f"Verdict: {'valid' if agrees else 'invalid'}"
    if "Rephrase the following" in text:
        return rephrased(first)
    if "new question of the same kind" in text:
        return another(first)
    if "inverse of the following" in text:
        return inverse(first, text.rpartition("Answer: ")[2].strip())
    style = next((name for words, name in _ASKED.items() if words in text), None)
    if style is None:
        return None
    path = in_style(style, first, solve(first))
    return with_false_step(path) if _draws(f"{style}/{first}").random() < FALSE else path


def _draws(text: str) -> random.Random:
    return random.Random(hashlib.sha256(text.encode()).hexdigest())
