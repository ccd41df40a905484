"""The one grader: what counts as a final answer, and when two agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.data.answers import final_answer, is_correct, same_answer

CASES = [
    ("12+5=17\n#### 17", "17", True),
    ("12+5=17\n#### 18", "17", False),
    ("The answer is 17.", "17", False),  # no final answer is stated; none is guessed
    ("#### 5\n#### 17", "17", True),  # the last one counts
    ("#### 17\n#### 5", "17", False),
    ("so \\boxed{17}", "#### 17", True),
    ("#### $1,200.00", "1200", True),
    ("#### 1.5", "1.50", True),
    ("#### 17.", "17", True),
    ("#### Yes", "yes", True),
    ("####", "17", False),
    ("", "17", False),
    ("#### NaN", "NaN", True),  # a text like any other
]


@pytest.mark.parametrize("response,reference,right", CASES)
def test_a_known_right_and_a_known_wrong(response, reference, right):
    assert is_correct(response, reference) is right


def test_the_final_answer_stops_at_its_line():
    assert final_answer("#### 17\nand more") == "17"
    assert final_answer("no answer") is None
    assert same_answer(None, "") is False


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numbers_agree_as_numbers(a, b):
    assert is_correct(f"#### {a:,}", str(b)) is (a == b)
