"""The demo's problems, models and run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.data.answers import final_answer, is_correct
from tsdkd.demo.problems import held_out, make_problem, make_problems
from tsdkd.demo.run import HELD_OUT_SEED, LEVELS, run, shipped
from tsdkd.demo.scoring import accuracy, wilson_interval


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_every_worked_step_is_right_and_leads_to_the_answer(seed, level):
    import random

    problem = make_problem(random.Random(seed), level)
    *steps, last = problem.solution.split("\n")
    assert len(steps) == level and is_correct(problem.solution, problem.answer)
    start = next(int(word) for word in problem.question.split() if word.isdigit())
    for step in steps:
        expression, result = step.split("=")
        assert expression.startswith(str(start)) and eval(expression) == int(result)
        start = int(result)
    assert last == f"#### {start}" and final_answer(last) == problem.answer and 0 <= start < 200


def test_problems_depend_on_the_seed_alone_and_held_out_ones_are_unseen():
    assert make_problems(50, 3) == make_problems(50, 3) != make_problems(50, 4)
    seen = {p.question for p in make_problems(500, 1, (1,))}
    fresh = held_out(200, 1, seen, (1,))
    assert len({p.question for p in fresh}) == 200 and not seen & {p.question for p in fresh}
    with pytest.raises(ValueError, match="level=0"):
        make_problem(None, 0)


def test_faulty_solutions_err_in_results_only():
    faulty = make_problems(300, 5, (2,), faulty=1.0)
    wrong = [eval(step.split("=")[0]) != int(step.split("=")[1]) for p in faulty for step in p.solution.split("\n")[:-1]]
    assert sum(wrong) > 0.9 * len(wrong)


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, 95 %
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        wilson_interval(5, 4)


def test_the_shipped_models_are_real_small_and_speak_the_same_tokens():
    tokenizers = []
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32)
        tokenizers.append(AutoTokenizer.from_pretrained(shipped(name)))
        assert model.config.hidden_size // model.config.num_attention_heads in (32, 64)
        assert len(tokenizers[-1]) <= model.config.vocab_size
        for problem in make_problems(50, 7):
            ids = tokenizers[-1](problem.question + "\n" + problem.solution)["input_ids"]
            assert tokenizers[-1].unk_token_id not in ids
            assert tokenizers[-1].decode(ids) == problem.question + "\n" + problem.solution
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() and tokenizers[0].chat_template


def test_accuracy_counts_right_answers():
    model = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shipped("teacher"))
    problems = held_out(40, HELD_OUT_SEED, set(), LEVELS)
    score = accuracy(model, tokenizer, problems)
    assert score["n"] == 40 and score["accuracy"] >= 0.9 and score["low"] < score["accuracy"] <= score["high"] + 1e-12
    wrong = [type(p)(p.question, p.solution, str(int(p.answer) + 1), p.level) for p in problems]
    assert accuracy(model, tokenizer, wrong)["accuracy"] <= 0.1


def test_a_short_run_writes_everything(tmp_path, capsys):
    summary = run(tmp_path / "demo", seed=0, steps=6, problems=40)
    out = capsys.readouterr().out
    assert "student after" in out and "tsdkd train --student" in out
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    for key in ("teacher", "student_before", "student_after"):
        assert set(summary[key]) == {"accuracy", "low", "high", "n"} and summary[key]["n"] == 40
    assert summary["seconds"] > 0 and summary["settings"]["num_candidates"] == 3
    rows = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert any("accuracy" in row for row in rows)
    assert (tmp_path / "demo" / "curve.png").stat().st_size > 10_000
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "student")
    shipped_student = AutoModelForCausalLM.from_pretrained(shipped("student"), dtype=torch.float32)
    assert not torch.equal(student.get_input_embeddings().weight, shipped_student.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "demo" / "student").chat_template


def test_without_matplotlib_it_finishes_and_says_how_to_get_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path / "demo", steps=1, problems=10)
    assert "pip install 'tsdkd[report]'" in capsys.readouterr().out
    assert not (tmp_path / "demo" / "curve.png").exists() and (tmp_path / "demo" / "summary.json").exists()


def test_the_command_that_recreates_the_models_runs(tmp_path):
    command = [sys.executable, "-m", "tsdkd.demo.recreate", "--output_dir", str(tmp_path), "--problems", "8"]
    steps = ["--teacher_steps", "2", "--student_steps", "2", "--habit_steps", "2"]
    subprocess.run([*command, *steps], check=True, timeout=300, capture_output=True)
    for name in ("teacher", "student"):
        new, old = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / name, shipped(name)))
        assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
