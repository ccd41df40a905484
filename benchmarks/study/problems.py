"""Three seeded families of problems whose answers are worked out step by step.

`words`: stories with units, distractors and carries, rich in words. `plans`: two stories told in turns; the first tokens of an
answer choose what to do, and the rest follows from that choice. `measures`: stories that turn on what a dozen or a score is, of
which a student can be taught something wrong (`wrong=True`) and be sure of it. Of each the skeletons (which steps in which
order; how much is told beside) are split: held-out ones are in no training set, neither of models nor of prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from tsdkd.demo.problems import Problem

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
UNITS = {"pair": 2, "dozen": 12, "score": 20}
WRONG = {"pair": 2, "dozen": 10, "score": 12}
LARGEST = 399
STEPS = ("buys", "loses", "packs", "units", "doubles")
NUMBERS, TEMPLATES = "numbers", "templates"


@cache
def lexicon(count: int, seed: int, ending: str = "") -> tuple[str, ...]:
    """`count` made-up words of two or three syllables."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.choice((2, 2, 3))
        words["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)) + ending] = None
    return tuple(words)


def _often(rng: random.Random, words: tuple[str, ...]) -> str:
    """A word, the earlier ones more often, as words are."""
    return words[int(len(words) * rng.random() ** 3)]


@cache
def skeletons(family: str, split: str) -> tuple[tuple, ...]:
    """The skeletons of a family that training has (`numbers`), or those that it has not (`templates`)."""
    if family == "plans":
        every = [(steps, others) for n in (1, 2, 3) for steps in product(STEPS, repeat=n) for others in (1, 2, 3)]
    elif family == "measures":  # those of `words`, which its models have learned
        return tuple(steps for steps in skeletons("words", split) if len(steps) == 3 and steps.count("units") == 1)
    else:
        every = [steps for n in (2, 3) for steps in product(STEPS, repeat=n) if steps.count("doubles") <= 1]
    random.Random(7).shuffle(every)
    kept_out = len(every) // 4
    return tuple(every[:kept_out] if split == TEMPLATES else every[kept_out:])


def _sum(a: int, b: int) -> str:
    """a + b by digits, with carries."""
    parts, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        parts.append(f"{x}+{y}" + ("+1" if carry else "") + f"={x + y + carry}")
        carry = (x + y + carry) // 10
    return f"{a}+{b}: {', '.join(parts)}, so {a + b}."


def _difference(a: int, b: int) -> str:
    """a - b by digits, with borrowing; b is not above a."""
    parts, borrowed = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        left = x - y - borrowed
        parts.append(f"{x + 10 * (left < 0)}-{y}" + ("-1" if borrowed else "") + f"={left % 10}")
        borrowed = int(left < 0)
    return f"{a}-{b}: {', '.join(parts)}, so {a - b}."


def _possible(step: str, count: int) -> str:
    """The step, or another where the count is too large or too small for it."""
    if step == "doubles" and count > LARGEST // 2:
        step = "loses"
    return "buys" if step == "loses" and count < 2 else step


def story(rng: random.Random, steps: tuple[str, ...], words: int, units: dict[str, int], faulty: float = 0.0) -> Problem:
    """A story of those steps, its names and things out of `words` of each, with a distractor in two of five; `faulty` is the
    chance of each result to be one too many, for solutions that teach a bad habit."""
    name, other = _often(rng, lexicon(words, 1)).title(), _often(rng, lexicon(words, 1)).title()
    thing, another = _often(rng, lexicon(words, 2, "s")), _often(rng, lexicon(words, 2, "s"))
    count = rng.randint(11, 99)
    told, lines = [f"{name} has {count} {thing}."], [f"{count} {thing}."]
    for step in steps:
        step = _possible(step, count)
        if step == "buys":
            more = rng.randint(2, 99)
            told.append(rng.choice((f"{name} buys {more} more.", f"Then {name} finds {more} {thing}.")))
        elif step == "packs":
            packs, size = rng.randint(2, 9), rng.randint(2, 9)
            told.append(f"{name} gets {packs} bags of {size} {thing}.")
            more = packs * size
            lines.append(f"{packs}*{size}={more}.")
        elif step == "units":
            unit, many = rng.choice(tuple(units)), rng.randint(2, 5)
            told.append(f"{other} gives {many} {unit} of {thing} to {name}.")
            more = many * units[unit]
            lines.append(f"{many} {unit}: {many}*{units[unit]}={more}.")
        elif step == "doubles":
            told.append(f"Now {name} doubles the {thing}.")
            more = count
        if step == "loses":
            less = rng.randint(2, min(count, 99))
            told.append(rng.choice((f"{name} loses {less}.", f"Then {name} sells {less} {thing}.")))
            lines.append(_difference(count, less))
            count -= less
        else:
            lines.append(_sum(count, more))
            count += more
        if faulty and rng.random() < faulty:
            lines[-1] = f"{lines[-1].removesuffix(f'{count}.')}{count + 1}."
            count += 1
    if rng.random() < 0.4:
        extra = rng.choice(
            (f"{other} has {rng.randint(2, 99)} {another}.", f"{name} also sees {rng.randint(2, 99)} {another}.")
        )
        told.insert(rng.randint(1, len(told)), extra)
    told.append(f"How many {thing} has {name}?")
    return Problem(" ".join(told), "\n".join([*lines, f"#### {count}"]), str(count), len(steps))


def plan(rng: random.Random, steps: tuple[str, ...], others: int, words: int) -> Problem:
    """Two stories told in turns, of which one is asked for. The answer first says what to do, then does it."""
    people = rng.sample([_often(rng, lexicon(words, 1)).title() for _ in range(40)], 2)
    while people[0] == people[1]:
        people = [_often(rng, lexicon(words, 1)).title() for _ in range(2)]
    thing = _often(rng, lexicon(words, 2, "s"))
    told: list[list[str]] = []
    for name, own in zip(people, (steps, tuple(rng.choice(STEPS) for _ in range(others))), strict=True):
        first = rng.randint(11, 99)
        sentences, planned, lines, count = [f"{name} has {first} {thing}."], [f"{first}"], [], first
        for step in own:
            step = _possible(step, count)
            if step == "loses":
                less = rng.randint(2, min(count, 99))
                sentences.append(f"{name} loses {less}.")
                planned.append(f"-{less}")
                lines.append(_difference(count, less))
                count -= less
                continue
            if step == "buys":
                more = rng.randint(2, 99)
                sentence, part = f"{name} buys {more} more.", f"+{more}"
            elif step == "doubles":
                more = count
                sentence, part = f"{name} doubles the {thing}.", "*2"
            else:
                many, size = rng.randint(2, 9), rng.randint(2, 9)
                unit = rng.choice(tuple(UNITS)) if step == "units" else ""
                many, more = (min(many, 5), UNITS[unit] * min(many, 5)) if unit else (many, many * size)
                sentence = f"{name} gets {many} {unit} of {thing}." if unit else f"{name} gets {many} bags of {size} {thing}."
                part = f"+{many} {unit}" if unit else f"+{many}*{size}"
                lines.append(f"{many} {unit}: {many}*{UNITS[unit]}={more}." if unit else f"{many}*{size}={more}.")
            sentences.append(sentence)
            planned.append(part)
            lines.append(_sum(count, more))
            count += more
        told.append(sentences)
        if name is people[0]:
            solution, answer = [", ".join(planned) + ".", *lines, f"#### {count}"], count
    turns = [0] * len(told[0]) + [1] * len(told[1])
    rng.shuffle(turns)
    queues = [iter(sentences) for sentences in told]
    question = " ".join([*(next(queues[turn]) for turn in turns), f"How many {thing} has {people[0]}?"])
    return Problem(question, "\n".join(solution), str(answer), len(steps))


@dataclass(frozen=True)
class Family:
    """A family with its lexicon.

    Args:
        name: `words`, `plans` or `measures`.
        words: how many names and things there are.
        wrong: of `measures`, with the units that are not so.
        faulty: of stories, the chance of each result to be one too many.
    """

    name: str
    words: int = 250
    wrong: bool = False
    faulty: float = 0.0

    def draw(self, rng: random.Random, split: str = NUMBERS) -> Problem:
        """A problem of a split."""
        skeleton = rng.choice(skeletons(self.name, split))
        if self.name == "plans":
            return plan(rng, *skeleton, words=self.words)
        return story(rng, skeleton, self.words, WRONG if self.wrong else UNITS, self.faulty)

    def stream(self, seed: int, split: str = NUMBERS, without: frozenset[str] = frozenset()) -> Iterator[Problem]:
        """Distinct problems of which no question is in `without`, one after the other."""
        rng, seen = random.Random(seed), set(without)
        while True:
            problem = self.draw(rng, split)
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem
