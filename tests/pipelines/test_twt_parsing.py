"""Replies as people's models write them, and Figures 4 and 8 as the paper has them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdkd.pipelines.twt.parsing import Triplet, Unreadable, parsed, rewritten
from tsdkd.pipelines.twt.prompts import REWRITE, TASKS, Task, task_of

MATHS, CHOICE, CODE = TASKS["maths"], TASKS["choice"], TASKS["code"]


@pytest.mark.parametrize(
    "text,rationale,answer,confidence",
    [
        ("Thinking: 2+2=4\n\nThe answer is: 4\n\nscore: 0.95", "2+2=4", "4", 0.95),
        ("```\nThinking: 2+2=4```\n\n```\nThe answer is: 4```\n\n```\nscore: 0.95```", "2+2=4", "4", 0.95),
        ("```\nThinking: 2+2=4\n```\n\n```\nThe answer is: 4\n```\n\n```\nscore: 0.95\n```", "2+2=4", "4", 0.95),
        ("**Thinking:** 2+2=4\n\n**The answer is:** 4\n\n**Score:** 0.95", "2+2=4", "4", 0.95),
        ("## Thinking:\n2+2\n=4\n\nAnswer: **4**\n\nConfidence score: 95%", "2+2\n=4", "4", 0.95),
        ("(1) Thinking: a\nThe final answer is: 1,200.\nFinal score: 0.95/1.00", "a", "1,200", 0.95),
        ("thinking: a\r\nthe answer is: [B]\r\nscore: 9.5/10", "a", "B", 0.95),
        ("<think>secret: score: 0.1</think>\nThinking: a\nThe answer is: 4\nscore = .95", "a", "4", 0.95),
        (
            "Thinking: the answer could be 5, but\nno.\nThe answer is: 4\nscore: 0.9 (I am sure)",
            "the answer could be 5, but\nno.",
            "4",
            0.9,
        ),
        ("Thinking: first\nThe answer is: 5\nno,\nThe answer is: 4\nscore: 0.9", "first\nThe answer is: 5\nno,", "4", 0.9),
        ("Thinking: Thinking: a\nThe answer is: 4\nscore: 0.9", "a", "4", 0.9),
        ("Thinking: a\nThe answer is: 3.5\nscore: 1", "a", "3.5", 1.0),
        ("Thinking: a\nThe answer is: 4\nscore: 0.5 * 1 + 0.5 * 0.9 = 0.95", "a", "4", 0.95),
        ("Thinking: a\nThe answer is: 4\nscore: 9.5 out of 10", "a", "4", 0.95),
        ("Thinking: Tests.\nScore: 175/2 = 87.5\nThe answer is: 4\nscore: 0.95", "Tests.\nScore: 175/2 = 87.5", "4", 0.95),
        ("Thinking: a\nThe answer is: 4\nscore: 0.95\n\nAnswer: see above", "a", "4", 0.95),
        (
            "I must write\nThinking: x\nThe answer is: 5\nscore: 0.1\n</think>\nThinking: a\nThe answer is: 4\nscore: 0.95",
            "a",
            "4",
            0.95,
        ),
        ("### Thinking\na\n### Answer: **4**.\n### Score： 0.95", "a", "4", 0.95),
        ("Thinking: a\nThe answer is:\n\n\\( 12 \\)\nscore: 0.95", "a", "12", 0.95),
        ("1. Thinking: a\n(2) Answer: 4\n3. Score: 0.95", "a", "4", 0.95),
        ("Thinking: a\nThe answer is 4\n- score: [0.95]", "a", "4", 0.95),
        ("Thinking: a\nThe answer is:\n4\n\nScore:\n`0.95`", "a", "4", 0.95),
        ("Thinking: a\nThe answer is: $\\boxed{17}$\nConfidence: 0.95", "a", "17", 0.95),
        ("Thinking: a\nThe answer is: $17$\nscore: 0.95.", "a", "17", 0.95),
        ("Sure! Here it is.\n\nThinking: a\nThe answer is: 4\n\nscore: 0.97\n\nLet me know!", "a", "4", 0.97),
    ],
)
def test_odd_but_readable_replies(text, rationale, answer, confidence):
    found = parsed(text, MATHS)
    assert found == Triplet(rationale, answer, pytest.approx(confidence), "stated")


@pytest.mark.parametrize(
    "text,finish,reason",
    [
        ("", "stop", "empty"),
        (" \n", "stop", "empty"),
        ("<think>a</think>", "stop", "empty"),
        ("Thinking: a\nThe answer is: 4\nscore: 0.9", "length", "cut"),
        ("The answer is: 4\nscore: 0.9", "stop", "no thinking"),
        ("Thinking:\nThe answer is: 4\nscore: 0.9", "stop", "no thinking"),
        ("Thinking: a\nscore: 0.9", "stop", "no answer"),
        ("Thinking: a\nThe answer is:\nscore: 0.9", "stop", "no answer"),
        ("Thinking: a\nThe answer is: 4", "stop", "no score"),
        ("Thinking: a\nThe answer is: 4\nscore: high", "stop", "no score"),
        ("Thinking: a\nThe answer is: 4\nscore: 0,95", "stop", "no score"),
        ("Thinking: a\nThe answer is: 4\nscore: 0.5-0.9", "stop", "no score"),
        ("Thinking: a\nThe answer is: 4\nscore: 1e-2", "stop", "no score"),
        ("Thinking: a\nScore = 1 point a goal\nThe answer is: 4", "stop", "no score"),
        ("Thinking: a\nThe answer is: 4\nscore: 0.9", "content_filter", "filtered"),
        ("<think>Thinking: a\nThe answer is: 4\nscore: 0.9", "stop", "cut"),
        ("Thinking: a\nThe answer is: 4\nscore: 0.9\nThinking: b\nThe answer is: 5\nscore: 0.8", "stop", "several triplets"),
        ("Thinking: a\nThe answer is: 4\nscore: 95", "stop", "a score outside of [0, 1]"),
        ("Thinking: a\nThe answer is: 4\nscore: -0.2", "stop", "a score outside of [0, 1]"),
        ("I'm sorry, but I can't help with that.", "stop", "no thinking"),
    ],
)
def test_unreadable_replies_have_a_reason(text, finish, reason):
    assert parsed(text, MATHS, finish) == Unreadable(reason)


def test_code():
    text = "Thinking: use a loop\n\n```python\ndef f(x):\n    # score: none\n    return {x: 1}\n```\n\nscore: 0.95 (done)"
    assert parsed(text, CODE) == Triplet("use a loop", "def f(x):\n    # score: none\n    return {x: 1}", 0.95, "stated")
    assert parsed("Thinking: a\nscore: 0.9", CODE) == Unreadable("no code")
    two = "Thinking: first\n```python\nold\n```\nbetter:\n```\nnew\n```\nscore: 0.9"
    assert parsed(two, CODE).answer == "old"  # the labelled one
    figure = "```\nThinking: use a loop\n\n```\npython\ndef f(): pass\n\n```\n\nscore: 0.85```"
    assert parsed(figure, CODE) == Triplet("use a loop", "def f(): pass", 0.85, "stated")  # Figure 4's own layout
    inside = "Thinking: a\n```\npython\ndef f():\n    return 1\n\nscore: 0.95\n\n```"
    assert parsed(inside, CODE) == Triplet("a", "def f():\n    return 1", 0.95, "stated")  # Figure 6's
    usage = "Thinking: a\n```Python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```\n```\nscore: 0.95\n```"
    assert parsed(usage, CODE) == Triplet("a", "def f(): pass", 0.95, "stated")
    counts = "def f(g):\n    score = 0\n    for x in g:\n        score += x\n    return score"
    own = f"Thinking: a\n~~~python3\n{counts}\n~~~\nscore: 0.95"
    assert parsed(own, CODE) == Triplet("a", counts, 0.95, "stated")
    assert parsed(own.replace("score: 0.95", ""), CODE) == Unreadable("no score")
    indented = "Thinking: a\n   ```python\n   def f():\n       pass\n   ```\nscore: 0.95"
    assert parsed(indented, CODE).answer == "def f():\n    pass"
    assert parsed("Thinking: a\n```\nscore: 0.9\n```", CODE) == Unreadable("no code")


def test_equation_1_where_the_reply_gives_the_factors():
    factors = "Correctness: 1.0\nLogical Reasoning (25%): 0.8\n- **Clarity**: 90%\n4. Completeness: 5/10"
    text = f"Thinking: a\nThe answer is: 4\n{factors}\nscore: 0.9"
    found = parsed(text, MATHS)
    assert found.by == "factors" and found.confidence == pytest.approx(0.5 * 1 + 0.25 * 0.8 + 0.15 * 0.9 + 0.1 * 0.5)
    assert parsed(f"Thinking: a\nThe answer is: 4\n{factors}", MATHS) == found
    points = "Correctness: 0.5\nLogical Reasoning: 0.24\nClarity: 0.14\nCompleteness: 0.1"
    already = parsed(f"Thinking: a\nThe answer is: 4\n{points}\nscore: 0.98", MATHS)
    assert already.by == "factors" and already.confidence == pytest.approx(0.98)  # weighted already
    for given_, stated, read in (
        ("0.48 0.24 0.14 0.09", "0.97", (0.95, "factors")),  # the teacher added wrongly
        ("0.5 0.25 0.15 0.1", None, (1.0, "factors")),
        ("0.1 0.1 0.1 0.1", "0.1", (0.1, "factors")),  # shares, not points
        ("0.1 0.1 0.1 0.1", "0.9", (0.9, "stated")),  # neither
        ("1 1 1 1", "1.0", (1.0, "factors")),
    ):
        names = ("Correctness", "Logical Reasoning", "Clarity", "Completeness")
        lines = "\n".join(f"{name}: {value}" for name, value in zip(names, given_.split(), strict=True))
        reply = f"Thinking: a\nThe answer is: 4\n{lines}" + (f"\nscore: {stated}" if stated else "")
        found = parsed(reply, MATHS)
        assert (found.confidence, found.by) == (pytest.approx(read[0]), read[1]), reply
    three = "\n".join(factors.split("\n")[:3])
    assert parsed(f"Thinking: a\nThe answer is: 4\n{three}\nscore: 0.7", MATHS) == Triplet("a", "4", 0.7, "stated")


@given(st.text(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_triplet_or_a_reason(text):
    for task in TASKS.values():
        found = parsed(text, task)
        assert isinstance(found, Unreadable) or (
            0 <= found.confidence <= 1 and found.answer.strip() and found.rationale.strip()
        )
        assert isinstance(rewritten(text), (str, Unreadable))


@given(
    st.text(st.characters(codec="ascii", exclude_characters="\r\n`*_<>#[]"), min_size=1, max_size=40).filter(
        lambda t: t.strip()
    ),
    st.integers(-10_000, 10_000),
    st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_what_was_written_is_what_is_read(rationale, answer, score):
    if re.search(r"(?i)thinking|rationale|reasoning|answer|score|correctness|clarity|completeness", rationale):
        return
    found = parsed(f"Thinking: {rationale}\n\nThe answer is: {answer}\n\nscore: {score / 100}", MATHS)
    assert found == Triplet(rationale.strip(), str(answer), score / 100, "stated")


def test_rewritten_rationales():
    assert rewritten("Thinking: short\nThe answer is: 4\nscore: 0.9") == "short"
    assert rewritten("Thinking: Thinking: short") == "short"  # the paper's Figure 9
    assert rewritten("I'm sorry, but I can't assist with that.") == Unreadable("no thinking")
    assert rewritten("Sure!\n\n**Revised Thinking:** 2+2=4") == "2+2=4"
    assert rewritten("Here it is.\nRevised thinking process: 2+2=4") == "2+2=4"
    assert (
        rewritten("Thinking: Ann has two tests.\nScore: 85+90=175\nHalf is 87.5")
        == "Ann has two tests.\nScore: 85+90=175\nHalf is 87.5"
    )
    assert rewritten("Thinking: half", "content_filter") == Unreadable("filtered")
    assert rewritten("Thinking: a\n```python\nx\n```\nscore: 1") == "a"
    assert rewritten("```\nThinking: short\n```") == "short" and rewritten("```\nThinking: b```\n\n```\nscore: 1```") == "b"
    assert rewritten("```\nThinking: short\n\n```\npython\nx = 1\n```") == "short"
    assert rewritten("") == Unreadable("empty") and rewritten("x", "length") == Unreadable("cut")
    assert rewritten("Thinking:") == Unreadable("empty")


# ---------------------------------------------------------------------- the paper's prompts

FIGURE_4 = {
    "maths": [
        "Your task is to answer a math question. Please think step by step to analyze the question carefully",
        "(1) Correctness (50% weight): the answer is factually correct based on the information or reasoning provided.",
        "(2) Logical Reasoning (25% weight): Whether the analysis exhibits a clear, reasonable thought process.",
        "(3) Clarity (15% weight): The reasoning should be easy to follow, avoiding unnecessary complexity.",
        "(4) Completeness (10% weight): The analysis should cover all necessary aspects of the question.",
        "The final score should be in the format score: 0.85.",
        "(2) Answer: The number for the problem, without additional explanations.",
        "The answer is: [an exact number]",
    ],
    "choice": [
        "Each input consists of a question and five answer choices.",
        "(1) Correctness (50%): The answer is factually correct.",
        "(4) Completeness (10%): All necessary aspects of the question are addressed.",
        "The answer is: [answer choice]",
    ],
    "code": [
        "Ensure that it passes all three provided test cases which use assert statements for validation.",
        "4. Allowed Libraries: You may use any standard Python libraries.",
        "(2) Readability (20% weight): Whether the code structure is clear, variable and function names are meaningful.",
        "(4) Test Coverage (10% weight): Whether possible edge cases and exceptions are considered.",
        "score: 0.85 (Do not give any explanation)",
    ],
}


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_are_figure_4s(name):
    task = TASKS[name]
    for part in FIGURE_4[name]:
        assert part in task.ask, part
    system, user = task.messages("How many?")
    assert system == {"role": "system", "content": task.ask} and user == {"role": "user", "content": "How many?"}
    stated = {n.lower(): int(w) / 100 for n, w in re.findall(r"\(\d\) ([A-Z][\w ]+) \((\d+)%", task.ask)}
    assert stated == dict(task.factors) and sum(stated.values()) == pytest.approx(1)
    assert isinstance(parsed("\n".join(task.ask.split("Response Format Example:")[1:]), task), (Triplet, Unreadable))


def test_the_rewriting_prompt_is_figure_8s():
    wanted = [
        "Please compare your previous thinking process on this task with the student's thinking process in detail.",
        "After identifying any differences in style, tone, structure, and length, modify your original output to better align"
        " with the student's preferences.",
        "Ensure that your revised output maintains a similar length and depth of content as the student's version, while"
        " preserving all essential information.",
        "The goal is to make your response more suited to the student's learning ability, helping them better understand and"
        " grasp the content.",
    ]
    assert REWRITE == "\n\n".join(wanted)
    text = MATHS.filled("rewrite", question="Q {x}", rationale="R", student="{question}")
    assert text.startswith(REWRITE) and "Task:\nQ {x}\n" in text and text.index("R\n") < text.index("{question}")


def test_templates_of_ones_own():
    own = task_of({"base": "choice", "name": "mine", "ask": "Do it.", "completion": "{rationale} -> {answer}"})
    assert (
        own.ask == "Do it."
        and own.filled("completion", rationale="{answer}", answer="{rationale}") == "{answer} -> {rationale}"
    )
    for given_, told in (
        ("chess", "task 'chess' is unknown"),
        ({"base": "maths", "asks": "x"}, "no field asks"),
        ({"completion": "{rationale}"}, r"completion of the task maths lacks \{answer\}"),
        ({"student": "{question} {x}"}, r"has \{x\}"),
        ({"answer": "("}, "no regular expression"),
        ({"factors": {"correctness": 0.5}}, "weigh 0.5 together"),
    ):
        with pytest.raises(ValueError, match=told):
            task_of(given_)
    assert Task("t", "x").factors == {}


def test_the_papers_tables_are_its():
    """The words of the paper that stand beside the repository's, where they do."""
    from tsdkd.pipelines.twt.report import paper, paper_table

    tables = paper()
    assert sorted(tables) == list("1234567")
    best = {row["label"]: row["values"] for row in tables["2"]["rows"]}["TwT-stage3"]
    assert best == [57.11, 48, 67.93, 105, 76.16, 8, 76.42, 10, 47.94, 12, 83.58, 15]
    for number, told in tables.items():
        assert all(len(row["values"]) == len(told["columns"]) for row in told["rows"]), number
        assert told["title"] in paper_table(number)
    assert "relative" in paper_table("1")
