"""The study: its problems against a reader of their own, its controls by hand, its intervals, and a smoke run."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))

import controls  # noqa: E402
import models  # noqa: E402
import problems  # noqa: E402
import read  # noqa: E402
import run  # noqa: E402
from problems import NUMBERS, TEMPLATES, Family, skeletons  # noqa: E402

from tsdkd.losses import plackett_luce_nll  # noqa: E402
from tsdkd.methods import METHODS  # noqa: E402
from tsdkd.types import Head, TokenBatch, TokenStatistics  # noqa: E402

UNITS = {"pair": 2, "dozen": 12, "score": 20}


def counted(question: str, units: dict[str, int]) -> int:
    """What the text of a story says, read sentence by sentence, without the generator."""
    *told, asked = question.split(". ")
    thing, name = re.fullmatch(r"How many (\w+) has (\w+)\?", asked).groups()
    count = None
    for sentence in (part.removesuffix(".") for part in told):
        words = sentence.split()
        if count is None and (found := re.fullmatch(rf"{name} has (\d+) {thing}", sentence)):
            count = int(found[1])
        elif count is None or re.fullmatch(r"\w+ has \d+ \w+|\w+ also sees \d+ \w+", sentence):
            continue  # somebody else's, or something else
        elif found := re.fullmatch(rf"{name} buys (\d+) more|Then {name} finds (\d+) {thing}", sentence):
            count += int(found[1] or found[2])
        elif found := re.fullmatch(rf"{name} loses (\d+)|Then {name} sells (\d+) {thing}", sentence):
            count -= int(found[1] or found[2])
        elif found := re.fullmatch(rf"{name} gets (\d+) bags of (\d+) {thing}", sentence):
            count += int(found[1]) * int(found[2])
        elif found := re.fullmatch(rf"\w+ gives (\d+) (\w+) of {thing} to {name}|{name} gets (\d+) (\w+) of {thing}", sentence):
            count += int(found[1] or found[3]) * units[found[2] or found[4]]
        elif sentence in (f"Now {name} doubles the {thing}", f"{name} doubles the {thing}"):
            count *= 2
        else:
            assert words[0] != name and not (words[0] in ("Then", "Now") and words[1] == name), sentence
    return count


@pytest.mark.parametrize("name", ["words", "plans", "measures"])
@pytest.mark.parametrize("split", [NUMBERS, TEMPLATES])
def test_answers_are_what_the_text_says(name, split):
    for problem in islice(Family(name).stream(5, split), 300):
        assert counted(problem.question, UNITS) == int(problem.answer), problem
        assert problem.solution.endswith(f"\n#### {problem.answer}")


@pytest.mark.parametrize("name", ["words", "plans", "measures"])
def test_every_step_of_a_solution_is_right(name):
    for problem in islice(Family(name).stream(6), 300):
        for left, right in re.findall(r"(\d+(?:[+*-]\d+)+)=(\d+)", problem.solution):
            value = eval(left)  # digits and signs alone
            assert value == int(right), problem.solution
        for whole, total in re.findall(r"^(\d+[+-]\d+):.* so (\d+)\.$", problem.solution, flags=re.M):
            assert eval(whole) == int(total), problem.solution


def test_what_is_wrong_is_wrong_in_the_units_alone():
    right, wrong = Family("measures"), Family("measures", wrong=True)
    differing = 0
    for one, other in islice(zip(right.stream(3), wrong.stream(3), strict=False), 200):
        assert counted(other.question, {"pair": 2, "dozen": 10, "score": 12}) == int(other.answer)
        differing += one.answer != other.answer
    assert differing > 50


def test_faulty_solutions_end_in_their_own_answer():
    marks = [counted(p.question, UNITS) == int(p.answer) for p in islice(Family("words", faulty=0.5).stream(4), 200)]
    assert 0.1 < sum(marks) / 200 < 0.5
    assert all(counted(p.question, UNITS) == int(p.answer) for p in islice(Family("words", faulty=0.0).stream(4), 50))


@pytest.mark.parametrize("name", ["words", "plans", "measures"])
def test_held_out_templates_are_in_no_training(name):
    ours, held = set(skeletons(name, NUMBERS)), set(skeletons(name, TEMPLATES))
    assert ours and held and not ours & held
    assert name == "measures" or len(held) == (len(ours) + len(held)) // 4
    if name == "measures":  # its models have learned `words`
        assert ours <= set(skeletons("words", NUMBERS)) and held <= set(skeletons("words", TEMPLATES))
    first, again = (list(islice(Family(name).stream(9), 20)) for _ in range(2))
    assert first == again and first != list(islice(Family(name).stream(10), 20))
    without = frozenset(p.question for p in first)
    assert not without & {p.question for p in islice(Family(name).stream(9, without=without), 20)}


def test_a_reversed_ranking_is_the_likelihood_of_the_reversed_order():
    student, teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -9.0]]), torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 9.0]])
    found = controls.ReversedRanking(5)(student, teacher)
    assert round(found.item(), 2) == 11.61 and round(controls.ReversedRanking(5)(student, -teacher).item(), 2) == 1.61
    # As the release writes it: log-sum-exp over the items placed so far.
    scores = student[0, :5]
    released = sum(scores[: i + 1].logsumexp(0) - scores[i] for i in range(5))
    assert found.item() == pytest.approx(released.item(), rel=1e-6)
    assert plackett_luce_nll(scores).item() == pytest.approx(1.61, abs=0.01)


def test_the_flattened_opener_and_the_random_one():
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    of = lambda share: controls.FlattenedOpener(share)(TokenStatistics(mask, entropy)).tolist()  # noqa: E731
    assert of(0.2) == [[True, True, False, False], [True, True, False, False]]  # 21 in all: 1, 3 are below 4.2
    assert of(0.9) == mask.tolist()  # the index lies beyond the longest
    torch.manual_seed(0)
    entropy = torch.rand(40, 30)
    mask = torch.arange(30) < torch.randint(1, 31, (40, 1))
    statistics = TokenStatistics(mask, entropy, rows=tuple(range(40)))
    drawn, own = controls.RandomOpener(0.3)(statistics), controls.Opener(0.3)(statistics)
    assert torch.equal(drawn.sum(-1), own.sum(-1)) and not (drawn & ~mask).any() and not torch.equal(drawn, own)


def test_controls_differ_from_the_method_in_what_they_name_alone():
    torch.manual_seed(0)
    lengths = (7, 12, 3)
    batch = TokenBatch(torch.randn(22, 8), torch.randn(22, 12), lengths, token_ids=torch.randint(0, 50, (22,)))
    heads = Head(torch.randn(50, 8)), Head(torch.randn(50, 12))
    own = {name: term.value.item() for name, term in controls.TSDKD().loss(batch, *heads).terms.items()}
    for options, same in (
        ({}, own),
        ({"ranking": "reversed"}, ("direct", "entropy")),
        ({"opener": "random"}, ("direct", "entropy")),
    ):
        made = controls.Controlled(**options).loss(batch, *heads)
        found = {name: term.value.item() for name, term in made.terms.items()}
        assert found.keys() == own.keys()
        assert all(found[name] == pytest.approx(own[name], rel=1e-6) for name in same)
        assert options == {} or abs(found["indirect"] - own["indirect"]) > 1e-3
    pushed = controls.Suppression(advantage=-0.5).loss(batch, *heads).terms["sampled"]
    logits = batch.student_hidden @ heads[0].weight.T
    expected = 0.5 * logits.log_softmax(-1).gather(-1, batch.token_ids[:, None]).mean()
    assert pushed.value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teachable_weighs_by_what_lies_within_reach():
    student = torch.tensor([[5.0, 4.0, 0.0, 0.0], [5.0, 4.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]])  # a candidate; one out of reach
    near, far = (controls.Teachable(2)(student, teacher) / controls.Teachable(4)(student, teacher)).tolist()
    assert near == pytest.approx(1.0, abs=0.02) and far < 0.01


def test_until_drift_stops_at_the_first_run_of_disagreement():
    agreement = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 1.0], [1, 1, 1, 1, 0, 0, 0, 0]])
    mask = torch.ones(2, 8).bool()
    statistics = TokenStatistics(mask, torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 8), agreement)
    kept = controls.UntilDrift(window=2, least=0.5)(statistics)
    assert kept.sum(-1).tolist() == [4, 5]  # a mean of 0 over two tokens: positions 3-4 and 4-5


def scored(label, right, seeds=None):
    rows = [
        {"seed": seed, "right": "".join(map(str, own))} for seed, own in zip(seeds or range(len(right)), right, strict=True)
    ]
    return read.Scored.of(label, rows)


def test_intervals_cover_as_they_say_and_differences_are_paired():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        values = (rng.random((5, 200)) < 0.4).astype(float)
        low, high = read.interval(values)
        covered += low <= 0.4 <= high
    assert covered >= 50  # of 60; 57 expected
    assert read.interval(np.ones((3, 50))) == (1.0, 1.0)
    hard = [int(x) for x in rng.random(300) < 0.5]
    better = [x or int(y) for x, y in zip(hard, rng.random(300) < 0.1, strict=True)]
    one, other = scored("a", [better, better]), scored("b", [hard, hard])
    value, low, high = read.difference(one, other)
    assert value == pytest.approx(np.mean(better) - np.mean(hard)) and 0 < low < value < high < 0.1
    assert read.difference(one, one) is None
    assert read.difference(scored("c", [hard, better], [0, 1]), scored("d", [better], [1]))[0] == 0.0  # seed 1 alone


def test_a_verdict_wants_three_seeds():
    always, never = [1] * 200, [0, 1] * 100
    of = lambda label, right, seeds: scored(label, [right] * seeds)  # noqa: E731
    assert read.verdict(of("a", always, 2), of("b", never, 5)).startswith("too few seeds: +0.500")
    assert read.verdict(of("a", always, 3), of("b", never, 5)).startswith("holds: +0.500")
    assert read.verdict(of("a", never, 3), of("b", always, 3)).startswith("does not hold: -0.500")
    assert read.verdict(of("a", always, 3), of("b", [*always[:-1], 0], 3)).startswith("cannot be told")
    assert read.verdict(None, of("b", always, 3)) == "not run yet"


def test_rates_are_tried_outwards_until_the_best_has_neighbours():
    def after(**accuracies):
        found = {float(rate.replace("_", "-")[1:]): value for rate, value in accuracies.items()}
        rows = [{"label": f"x @ {rate:g}", "training": {"learning_rate": rate}, "accuracy": a} for rate, a in found.items()]
        return run.wanted("x", [*rows, {"label": "y @ 1", "training": {"learning_rate": 1.0}, "accuracy": 1.0}])

    assert after() == [3e-4, 1e-3] and after(r3e_4=0.5) == [1e-3]
    assert after(r3e_4=0.5, r1e_3=0.4) == [1e-4] and after(r3e_4=0.5, r1e_3=0.6) == [3e-3]
    assert after(r3e_4=0.5, r1e_3=0.4, r1e_4=0.6) == [3e-5] and after(r3e_4=0.5, r1e_3=0.4, r1e_4=0.3) == []
    assert after(r1e_5=0.9, r3e_5=0.8, r1e_4=0.7, r3e_4=0.5, r1e_3=0.4) == []  # the last there is


def test_every_job_names_what_there_is():
    for job in run.JOBS:
        methods, start = run.methods_of(job), run.STARTS[job.start]
        tuned = {label for label, options in methods.items() if options.get("tuned_as", label) == label}
        tuned |= {label for other in run.JOBS if other.start == job.start for label in run.methods_of(other)}
        assert {options.get("tuned_as", label) for label, options in methods.items()} <= tuned
        assert {start.student, start.teacher} <= set(models.MODELS) and start.data in models.FAMILIES
        known = set(METHODS) | set(controls.CONTROLS)
        assert all(options["method"] in known and "," not in label for label, options in methods.items())


def test_the_smoke_run(tmp_path):
    """Models made, rates tuned, two labels compared, in a folder of one's own; a second run has nothing to do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(STUDY / "run.py"), "--smoke", str(tmp_path)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stderr[-3000:]
    texts = [path.read_text() for path in sorted((tmp_path / "rows").glob("words-habit-*.jsonl"))]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    trained = {row["label"]: row for row in rows if row["method"] != "untrained"}
    assert trained.keys() == {"gkd", "ranking reversed"}
    assert all(len(row["right"]) == 6 and len(row["agreeing"]) == 6 and row["steps"] == 2 for row in trained.values())
    assert "gkd" in (tmp_path / "tuned.yaml").read_text() and str(tmp_path) not in json.dumps(rows)
    assert not any(math.isnan(sum(row["flops"].values())) for row in trained.values())


def test_lexicons_are_distinct_words():
    words = problems.lexicon(3500, 1)
    assert len(set(words)) == 3500 == len(words) and words == problems.lexicon(3500, 1)
    assert random.Random(1).choice(words)
