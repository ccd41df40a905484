"""The study's models and data, made from nothing: `python benchmarks/study/models.py [name …]`, each once.

A teacher learns a family of problems from worked solutions; students learn the same until they solve a third to a half of it,
or learn something wrong on top. No weights are shipped: of equal seeds they are the same on one machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from problems import NUMBERS, TEMPLATES, Family
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tsdkd.demo.problems import Problem
from tsdkd.demo.recreate import fit
from tsdkd.demo.scoring import accuracy
from tsdkd.demo.second_student import byte_level_bpe, make_blank

HERE = Path(__file__).parent
MAX_POSITIONS = 288
LONGEST = 160
VALIDATION_SEED, PROMPT_SEED = 101, 404
TEST_SEEDS = {NUMBERS: 202, TEMPLATES: 303}


@dataclass(frozen=True)
class Size:
    """How large the study is, and where it lies.

    Args:
        made: models, data and runs, none of which is committed.
        kept: rows and what was tuned.
        model_steps: of a model's training at most; None: as `MODELS` says.
        validation, prompts: how many problems.
        tested: held-out problems by how they are held out.
        longest: tokens of an answer.
        batch: problems of a step of a model's training.
    """

    made: Path = HERE / "made"
    kept: Path = HERE
    model_steps: int | None = None
    validation: int = 500
    prompts: int = 16000
    tested: tuple[tuple[str, int], ...] = ((NUMBERS, 1500), (TEMPLATES, 500))
    longest: int = LONGEST
    batch: int = 32


FULL = Size()

WORDS, MANY_WORDS, PLANS, MEASURES = Family("words"), Family("words", 3500), Family("plans"), Family("measures")
FAMILIES = {"words": WORDS, "words-8000": MANY_WORDS, "plans": PLANS, "measures": MEASURES}


@dataclass(frozen=True)
class Model:
    """How a model is made.

    Args:
        family: whose worked solutions it learns.
        vocabulary: of its tokenizer.
        layers, hidden: its size.
        seed: of its weights and of the problems.
        goal: the accuracy on validation problems of the family at which training ends; None: after `steps`.
        steps: at most, of 32 problems.
        start: another model, from which it goes on.
        lr: the peak learning rate.
    """

    family: Family
    vocabulary: int
    layers: int
    hidden: int
    seed: int
    goal: float | None
    steps: int = 4000
    start: str | None = None
    lr: float = 3e-3
    report: int = 200


MODELS = {
    "words/teacher": Model(WORDS, 2000, 4, 128, 1, 0.96),
    "words/small": Model(WORDS, 2000, 2, 64, 2, 0.33, report=100),
    "words/medium": Model(WORDS, 2000, 2, 96, 3, 0.33, report=100),
    # The demo's start: the skill is there and a bad habit on top.
    "words/habit": Model(replace(WORDS, faulty=0.5), 2000, 2, 96, 5, None, 60, "words/medium", 5e-4, report=20),
    # Sure of what is not so.
    "words/sure": Model(replace(MEASURES, wrong=True), 2000, 2, 96, 6, None, 300, "words/medium", 1e-3, report=100),
    # They know how to reckon, and learn what is asked for.
    "plans/teacher": Model(PLANS, 2000, 4, 128, 11, 0.96, 3000, "words/teacher", 1e-3),
    "plans/small": Model(PLANS, 2000, 2, 64, 12, 0.33, 3000, "words/small", 1e-3, report=100),
    "plans/medium": Model(PLANS, 2000, 2, 96, 13, 0.33, 3000, "words/medium", 1e-3, report=100),
    "words-8000/teacher": Model(MANY_WORDS, 8000, 4, 128, 1, 0.96),
    "words-8000/small": Model(MANY_WORDS, 8000, 2, 64, 2, 0.33, report=100),
}


def tokenizer_of(family: Family, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the family's texts, digits apart."""
    problems = itertools.islice(family.stream(12), 6 * vocabulary)
    return byte_level_bpe((f"{p.question}\n{p.solution}" for p in problems), vocabulary, MAX_POSITIONS)


def blank(tokenizer: PreTrainedTokenizerFast, model: Model) -> LlamaForCausalLM:
    """An untrained model."""
    how = {"layers": model.layers, "key_value_heads": model.hidden // 32, "vocab_size": model.vocabulary}
    return make_blank(tokenizer, model.hidden, model.seed, **how)


def asked(problem: Problem) -> str:
    """A problem as a prompt: plain text, the answer on the next line."""
    return f"{problem.question}\n"


def held_out(family: Family, seed: int, count: int, split: str = NUMBERS) -> list[Problem]:
    """The problems of a held-out set; those of numbers are none of another set's, nor any model's."""
    return list(itertools.islice(family.stream(seed, split), count))


def never_seen(family: Family, size: Size) -> frozenset[str]:
    """The questions that no training has, of models or of students: validation and test."""
    plain = replace(family, wrong=False, faulty=0.0)
    problems = held_out(plain, VALIDATION_SEED, size.validation)
    problems += held_out(plain, TEST_SEEDS[NUMBERS], dict(size.tested)[NUMBERS])
    return frozenset(problem.question for problem in problems)


def made(name: str, size: Size = FULL) -> Path:
    """The folder of a model, which is trained if it is not there."""
    model, folder = MODELS[name], size.made / name
    note = folder.with_name(f"{folder.name}.json")
    if note.exists():
        return folder
    began, without = time.perf_counter(), never_seen(model.family, size)
    if model.start is None:
        tokenizer = tokenizer_of(model.family, model.vocabulary)
        weights = blank(tokenizer, model)
    else:
        start = made(model.start, size)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        weights = AutoModelForCausalLM.from_pretrained(start)
    found = [0.0]
    problems = held_out(model.family, VALIDATION_SEED, min(300, size.validation))
    validation = [Problem(asked(p), p.solution, p.answer, p.level) for p in problems]

    def draw(rng):
        while (problem := model.family.draw(rng)).question in without:
            pass
        return problem

    def done(weights) -> bool:
        found[0] = accuracy(weights, tokenizer, validation, size.longest, as_chat=False)["accuracy"]
        print(f"{name}: {found[0]:.3f} on validation", flush=True)
        return model.goal is not None and found[0] >= model.goal

    steps = model.steps if size.model_steps is None else size.model_steps
    how = {"steps": steps, "lr": model.lr, "warmup": min(100, 1 + steps // 6), "report": min(model.report, steps)}
    fit(weights, tokenizer, draw, batch=size.batch, seed=model.seed, done=done, **how)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = round(time.perf_counter() - began)
    note.write_text(json.dumps({"validation": round(found[0], 4), "seconds": seconds}) + "\n")  # last: now it is there
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(name: str, size: Size = FULL) -> Path:
    """The folder of a family's data: `train.jsonl` (prompts with worked solutions), `validation.jsonl` and `test.jsonl` (the
    first problems are held out by their numbers, the rest by their templates)."""
    family, folder = FAMILIES[name], size.made / "data" / name
    if (folder / "test.jsonl").exists():
        return folder
    train = itertools.islice(family.stream(PROMPT_SEED, without=never_seen(family, size)), size.prompts)
    _write(folder / "train.jsonl", [{"prompt": asked(p), "completion": p.solution} for p in train])
    sets = {"validation": held_out(family, VALIDATION_SEED, size.validation)}
    sets["test"] = [p for split, count in size.tested for p in held_out(family, TEST_SEEDS[split], count, split)]
    for label, problems in sets.items():
        _write(folder / f"{label}.jsonl", [{"question": asked(p), "answer": p.answer} for p in problems])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), help=f"default: all of {', '.join(MODELS)}")
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        print(made(name), flush=True)


if __name__ == "__main__":
    main()
