"""`tsdkd doctor`: is this set-up sound, and is it worth its GPU hours?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

_MARKS = {"green": "ok   ", "yellow": "look ", "red": "STOP "}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd doctor",
        allow_abbrev=False,
        description="Look at a set-up before it costs GPU hours: everything that a run would refuse; then, with the models "
        "loaded, ends of texts, vocabulary, precision, disk, each term's gradient; and a probe on a few completions. Flags are "
        "tsdkd train's, recipes included. The exit status is 2 where something says STOP, else 0.",
        epilog="Example: tsdkd doctor --config recipe.yaml",
    )
    parser.add_argument("--rows", type=int, default=8, help="prompts of the probe (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    own, rest = parser.parse_known_args(arguments)
    if own.rows < 1:
        raise ValueError(f"--rows {own.rows}: it must be 1 or more.")

    from tsdkd.cli.parsing import parse
    from tsdkd.cli.train import build, inputs, no_empty_folder
    from tsdkd.preflight.doctor import RED, YELLOW, Finding, examine
    from tsdkd.trainers.setup_checks import problems
    from tsdkd.trainers.sizes import tell_if_too_large

    try:
        data, config, model = parse(rest)
        loaded = inputs(data, config, model, say=lambda text: None)
    except ValueError as error:
        return _told([Finding(RED, "set-up", str(error))], own.json)
    found = [Finding(RED, "set-up", problem.what + (f": {problem.why}" if problem.why else ""), problem.do or "")
             for problem in problems(setup_of(config, loaded))]  # fmt: skip
    if not found:
        told = tell_if_too_large(setup_of(config, loaded), adapter=loaded["peft_config"] is not None)
        large = [Finding(YELLOW, "memory", told)] if told else []
        try:
            with no_empty_folder(Path(config.output_dir)):
                trainer = build(data, config, model, loaded)
                rows = _rows(trainer, own.rows)
                found = large + examine(trainer, rows, _rights(trainer, rows, _answers(data, rows)), seed=config.seed)
        except ValueError as error:
            found = [Finding(RED, "set-up", str(error))]
    return _told(found, own.json)


def _told(found: list[Any], as_json: bool) -> int:
    """Print the findings; the exit status."""
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], ensure_ascii=False, indent=1))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            more = f". {finding.do[0].upper()}{finding.do[1:]}." if finding.do else ""
            print(f"{_MARKS[finding.level]} {finding.name:<{width}}  {finding.said}{more}")
        counts = {level: sum(finding.level == level for finding in found) for level in _MARKS}
        print(f"{counts['green']} ok, {counts['yellow']} to look at, {counts['red']} that stop a run")
    return 2 if any(finding.level == "red" for finding in found) else 0


def setup_of(config: Any, loaded: dict[str, Any]) -> Any:
    """The set-up as the trainer would see it."""
    from tsdkd.trainers.setup import Setup, chosen_method

    sets = {name: loaded[name] for name in ("train_dataset", "eval_dataset", "pretraining_dataset")}
    quantization = loaded["quantization_config"]
    return Setup.of(config, chosen_method(config, None), loaded["model"], **sets, quantization=quantization)


def _rows(trainer: Any, count: int) -> list[dict[str, Any]]:
    data = trainer.train_dataset
    if hasattr(data, "__len__"):
        return [dict(data[i]) for i in range(min(count, len(data)))]
    return [dict(row) for _, row in zip(range(count), data, strict=False)]


def _answers(data: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """The answers that stand beside these prompts in a local file; None where there is none, or two that differ."""
    from tsdkd.data.files import load_rows

    path = Path(data.dataset_name or "").expanduser()
    if data.dataset_name is None or not path.exists():
        return [None] * len(rows)
    known: dict[str, set[str]] = {}
    for row in load_rows(data.dataset_name, split=data.dataset_train_split):
        if isinstance(row.get("answer"), str):
            known.setdefault(_text(row.get(data.prompt_column or "prompt")), set()).add(row["answer"])
    found = [known.get(_text(row["prompt"]), set()) for row in rows]
    return [next(iter(answers)) if len(answers) == 1 else None for answers in found]


def _text(prompt: Any) -> str:
    """A prompt's text, of a chat its last turn's."""
    if isinstance(prompt, list) and prompt:
        return str(prompt[-1].get("content"))
    return str(prompt)


def _rights(trainer: Any, rows: list[dict[str, Any]], answers: list[Any]) -> Any:
    """Which rows student and teacher solve greedily, where every row has an answer; None elsewhere."""
    from tsdkd.data.answers import final_answer
    from tsdkd.demo.problems import Problem
    from tsdkd.demo.scoring import graded

    given = [row.get("completion") for row in rows]
    answers = [answer or completion for answer, completion in zip(answers, given, strict=True)]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers) or trainer.teacher_model is None:
        return None
    problems = []
    for row, answer in zip(rows, answers, strict=True):
        prompt = row["prompt"]
        if not isinstance(prompt, str) and (len(prompt) != 1 or not isinstance(prompt[0].get("content"), str)):
            return None
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        problems.append(Problem(question, str(answer), final_answer(str(answer)) or str(answer), 0))
    student = trainer.accelerator.unwrap_model(trainer.model)
    more = {"max_new_tokens": trainer.max_completion_length, "as_chat": trainer.has_chats, "rendering": trainer.rendering}
    both = (student, trainer.teacher_model)
    marks = [[right for _, right in graded(model, trainer.tokenizer, problems, **more)] for model in both]
    return marks[0], marks[1]
