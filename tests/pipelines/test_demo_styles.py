"""What stands in for a large model in QR-Distill's example: six forms of one solution, and rules that judge and ask anew."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdkd.data.answers import final_answer, is_correct
from tsdkd.demo.problems import make_problems
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.demo.second_student import make_second_tokenizer
from tsdkd.demo.styles import another, in_style, inverse, is_sound, rephrased, reply_to, with_false_step
from tsdkd.pipelines.qr_distill.prompts import JUDGE, REQUESTS, STYLES, verdict
from tsdkd.pipelines.twt.prompts import TASKS

PROBLEMS = make_problems(60, seed=3, levels=(1, 2, 3))


@pytest.mark.parametrize("style", STYLES)
def test_every_style_states_the_answer_in_words_that_both_students_know(style):
    tokenizer, second = make_tokenizer(), make_second_tokenizer()
    for problem in PROBLEMS:
        path = in_style(style, problem.question, problem.solution)
        assert is_correct(path, problem.answer) and is_sound(path)
        ids = tokenizer(path)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == path
        assert second.decode(second(path)["input_ids"]) == path


def test_styles_differ_and_what_is_no_solution_stays():
    problem = next(p for p in PROBLEMS if p.level == 3)
    paths = {in_style(style, problem.question, problem.solution) for style in STYLES}
    assert len(paths) == 6
    program = in_style("program", problem.question, problem.solution)
    assert "=" not in program  # no intermediate results
    assert in_style("backward", problem.question, "no steps") == "no steps"


@given(st.integers(0, 59), st.sampled_from(sorted(STYLES)))
@settings(deadline=None, max_examples=60)
def test_a_false_step_is_found_and_leaves_the_answer(number, style):
    problem = PROBLEMS[number]
    path = in_style(style, problem.question, problem.solution)
    spoilt = with_false_step(path)
    assert final_answer(spoilt) == final_answer(path)
    assert is_sound(spoilt) == (spoilt == path)


def worked(question):
    """A question's answer by reading it, apart from the library's generator."""
    words, value = question.replace(".", " ").split(), None
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "doubles" or word == "triples":
            value *= {"doubles": 2, "triples": 3}[word]
        elif word.isdigit():
            value = int(word) if value is None else value + int(word) if after == "more" else value - int(word)
    return value


def test_questions_that_are_asked_anew():
    for problem in PROBLEMS:
        question = problem.question
        assert worked(question) == int(problem.answer)
        again = rephrased(question)
        assert worked(again) == int(problem.answer) and re.findall(r"\d+", again) == re.findall(r"\d+", question)
        other = another(question)
        assert other != question and other == another(question) and other.count(".") == question.count(".")
        back = inverse(question, problem.answer)
        assert back == "" if re.search("doubles|triples", question) else worked(back) == int(question.split()[2])


def test_prompts_are_answered_by_what_they_ask_for():
    problem = next(p for p in PROBLEMS if p.level == 2 and not re.search("doubles|triples", p.question))
    solve = lambda question: next(p.solution for p in PROBLEMS if p.question == question)  # noqa: E731
    for style, template in STYLES.items():
        path = in_style(style, problem.question, problem.solution)
        found = reply_to(template.replace("{question}", problem.question), solve)
        assert found in (path, with_false_step(path))
    judge = lambda path: reply_to(JUDGE.replace("{question}", problem.question).replace("{path}", path), solve)  # noqa: E731
    assert verdict(judge(problem.solution)) is True and verdict(judge(with_false_step(problem.solution))) is False
    asked = lambda name, **more: reply_to(  # noqa: E731
        re.sub(r"\{(\w+)\}", lambda m: {"question": problem.question, "answer": problem.answer, **more}[m[1]], REQUESTS[name]),
        solve,
    )
    back = inverse(problem.question, problem.answer)
    assert asked("rephrase") == rephrased(problem.question) and asked("new_question") == another(problem.question)
    assert asked("inverse") == back
    start = problem.question.split()[2]
    for answer, said in ((start, True), (str(int(start) + 1), False)):
        assert verdict(asked("consistent", inverse=back, path=f"1+1=2\n#### {answer}")) is said
    twt = TASKS["maths"].messages(problem.question)[-1]["content"]
    assert reply_to(twt, solve) is None and reply_to("Hello.", solve) is None
