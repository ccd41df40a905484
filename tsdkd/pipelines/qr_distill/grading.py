"""Whether a text ends in its label's answer: as the library's grader reads it, as a choice's letter, or as mathematics."""

from __future__ import annotations

import logging
import re

from tsdkd.data.answers import final_answer, same_answer

_BOXED = "\\boxed{"
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\text{", "}"), ("**", "**"), ("`", "`"))


def stated(text: str, pattern: str) -> str | None:
    """The final answer of a text without marks around it: what `pattern` finds last, or a box, or what stands behind ####."""
    found = final_answer(text, pattern)
    if found is None:
        start = text.rfind(_BOXED)
        found = text[start:] if start >= 0 else final_answer(text)
    return None if found is None else bare(found)


def bare(answer: str) -> str:
    """An answer without boxes, dollars, brackets and stars around it, and without its full stop.

    Example:
        >>> bare(r"$\\boxed{\\frac{1}{2}}$."), bare("**17**."), bare("$2$ or $3$")
        ('\\\\frac{1}{2}', '17', '$2$ or $3$')
    """
    text = answer.strip()
    for _ in range(4):
        text = text.removesuffix(".").strip()
        if text.startswith(_BOXED) and (inner := _braced(text, len(_BOXED))) is not None:
            text = inner
        for left, right in _WRAPS:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and left[-1] not in inner:
                text = inner.strip()
    return text.strip("*_` ").strip()


def _braced(text: str, start: int) -> str | None:
    """What stands between braces that open before `start`, where they close."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place].strip()
    return None


def right(text: str, label: str, pattern: str) -> bool:
    """Whether a text's final answer is the label's.

    Example:
        >>> found = r"answer is:?(.*)"
        >>> right("So.\\nThe answer is: (B) Paris.", "B", found), right("The answer is 17", "17.0", found)
        (True, True)
    """
    found, wanted = stated(text, pattern), bare(final_answer(label) or label)
    if found is None:
        return False
    if same_answer(found, wanted):
        return True
    letter = re.match(r"(?:option[ \t]+)?\(?([A-Za-z])\)?(?:[.):,]|$|[ \t]*$)", found, re.IGNORECASE)
    if len(wanted) == 1 and wanted.isalpha():
        return letter is not None and letter[1].casefold() == wanted.casefold()
    return _same_mathematics(found, wanted)


def _same_mathematics(found: str, wanted: str) -> bool:
    """By math-verify, where it is installed and both are mathematics rather than words."""
    if not re.search(r"\d|\\", wanted) or not re.search(r"\d|\\", found) or re.search(r"(?i)\bor\b|,|\$", found):
        return False
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    for part in ("parser", "grader"):  # each warns at its first use of what is asked for here
        logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)
    gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in (wanted, found))
    return bool(gold and answer and verify(gold, answer, timeout_seconds=None))
