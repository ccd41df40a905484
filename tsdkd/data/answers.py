"""One grader for everything: read the final answer of a response and compare it with the reference.

The convention is GSM8K's (Cobbe et al. 2021): a worked solution ends with ``#### <answer>``. A ``\\boxed{...}`` answer
is read too. A response that states no final answer is wrong; the grader never guesses a number out of running text.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NOISE = str.maketrans("", "", ",$ \t")


# What is looked for, as messages say it.
LOOKED_FOR = r"#### ANSWER or \boxed{ANSWER}"


def final_answer(response: str, pattern: str | re.Pattern | None = None) -> str | None:
    """The answer that a response states last, or None where it states none.

    Args:
        response: the text of a response, without special tokens.
        pattern: a regular expression in place of these two; its first group, or what it matches, is the answer.

    Returns:
        The text behind the last ``####`` (to the end of its line) or inside the last ``\\boxed{}``, whichever stands
        later, stripped; None if there is neither or if it is empty.

    Example:
        >>> final_answer("12+5=17\\n#### 17")
        '17'
        >>> final_answer("I am not sure.") is None
        True
    """
    if pattern is not None:
        matches = list(re.finditer(pattern, response))
        return ((matches[-1].group(1 if matches[-1].re.groups else 0) or "").strip() or None) if matches else None
    found = [*_HASHES.finditer(response), *_BOXED.finditer(response)]
    if not found:
        return None
    answer = max(found, key=lambda match: match.start()).group(1).strip()
    return answer or None


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.translate(_NOISE).removesuffix("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def same_answer(answer: str | None, reference: str) -> bool:
    """Whether two final answers agree: as numbers where both are numbers, else as texts without case and spaces.

    Example:
        >>> same_answer("1,200.0", "1200"), same_answer("007", "7"), same_answer(None, "7")
        (True, True, False)
    """
    if answer is None:
        return False
    left, right = _as_number(answer), _as_number(reference)
    if left is not None and right is not None:
        return left == right
    return answer.translate(_NOISE).casefold() == reference.translate(_NOISE).casefold()


def is_correct(response: str, reference: str, pattern: str | re.Pattern | None = None) -> bool:
    """Whether `response` ends in the answer that `reference` states.

    Args:
        response: the text of a response.
        reference: the gold answer, bare (``"17"``) or a worked solution that ends with ``#### 17``.
        pattern: as `final_answer` takes it, of the response.

    Example:
        >>> is_correct("12+5=17\\n#### 17", "17")
        True
        >>> is_correct("It is 17.", "17")
        False
    """
    gold = final_answer(reference)
    return same_answer(final_answer(response, pattern), reference.strip() if gold is None else gold)
