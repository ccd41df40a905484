"""Arithmetic word problems with worked steps, from a seeded generator with levels of difficulty.

A problem of level n takes n operations. The worked solution writes one operation a line and ends, like GSM8K's, with
``#### <answer>``. All numbers stay between 0 and 199.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lea", "Sam", "Kim")
ITEMS = ("apples", "pens", "books", "coins", "cards", "eggs")
GAINS = ("buys", "finds", "gets")
LOSSES = ("sells", "loses", "drops")
FACTORS = {"doubles": 2, "triples": 3}
LEVELS = (1, 2, 3)
LARGEST = 199


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution and the answer alone; `level` counts the operations."""

    question: str
    solution: str
    answer: str
    level: int


def make_problem(rng: random.Random, level: int, faulty: float = 0.0) -> Problem:
    """One problem of `level` operations.

    Args:
        rng: the source of randomness.
        level: how many operations it takes, 1 or more.
        faulty: the chance of each written result to be one too many, for solutions that teach a bad habit; `answer` is
            then the wrong one that the solution ends with.
    """
    if level < 1:
        raise ValueError(f"level={level}: a problem takes at least one operation; pass 1, 2 or 3.")
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    true = written = rng.randint(5, 99)
    sentences, steps = [f"{name} has {true} {item}."], []
    for _ in range(level):
        kinds = ["gain"] * (true <= LARGEST - 50) + ["loss"] * (true >= 4) + ["factor"] * (2 <= true <= LARGEST // 3)
        kind = rng.choice(kinds)
        if kind == "gain":
            number = rng.randint(2, 50)
            sentences.append(f"{name} {rng.choice(GAINS)} {number} more.")
            true, step, result = true + number, f"{written}+{number}", written + number
        elif kind == "loss":
            number = rng.randint(2, min(50, true))
            sentences.append(f"{name} {rng.choice(LOSSES)} {number}.")
            true, step, result = true - number, f"{written}-{number}", written - number
        else:
            verb = rng.choice(tuple(FACTORS))
            sentences.append(f"{name} {verb} them.")
            true, step, result = true * FACTORS[verb], f"{written}*{FACTORS[verb]}", written * FACTORS[verb]
        if rng.random() < faulty:
            result += 1
        written = min(max(result, 0), 3 * LARGEST)
        steps.append(f"{step}={written}")
    sentences.append(f"How many {item} now?")
    return Problem(" ".join(sentences), "\n".join([*steps, f"#### {written}"]), str(written), level)


def make_problems(count: int, seed: int, levels: tuple[int, ...] = LEVELS, faulty: float = 0.0) -> list[Problem]:
    """`count` problems, levels in turn; equal arguments give equal problems on every machine."""
    rng = random.Random(seed)
    return [make_problem(rng, levels[i % len(levels)], faulty) for i in range(count)]


def held_out(count: int, seed: int, seen: set[str], levels: tuple[int, ...] = LEVELS) -> list[Problem]:
    """`count` distinct problems none of whose questions is in `seen`."""
    rng = random.Random(seed)
    chosen: dict[str, Problem] = {}
    while len(chosen) < count:
        problem = make_problem(rng, levels[len(chosen) % len(levels)])
        if problem.question not in seen:
            chosen.setdefault(problem.question, problem)
    return list(chosen.values())
