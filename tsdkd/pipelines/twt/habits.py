"""The stages of habitual reasoning distillation (TwT, 3.2): students, what they answer, shorter rationales, scores."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tsdkd.data.answers import is_correct
from tsdkd.pipelines.asking import ask, planned
from tsdkd.pipelines.problems import problems_of
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.pipelines.students import lora_config, student_answers, tokenizer_of
from tsdkd.pipelines.tested import Tested
from tsdkd.pipelines.twt.config import TwTConfig
from tsdkd.pipelines.twt.labelling import TRIPLET, OfTwT
from tsdkd.pipelines.twt.parsing import Unreadable, rewritten
from tsdkd.pipelines.twt.prompts import Task
from tsdkd.pipelines.twt.training import train, weighted
from tsdkd.rollouts.api_models import Asked
from tsdkd.teachers.sources import refuse_unreadable


class Student(OfTwT):
    """A student, trained on what the stage before it left, from the last one's weights."""

    is_folder = True

    def __init__(self, name: str, config: TwTConfig, rows: Stage, form: str, before: Stage | None) -> None:
        after = [rows] if before is None else [rows, before]
        task, settings = config.task, config.training.settings
        templates = {"student": task.student, "completion": task.completion, "answer_only": task.answer_only}
        super().__init__(name, config, after, form=form, templates=templates, seed=config.seed, **settings)
        if before is None:
            self.depends_on("from", config.student)
        if form == "tasks":
            self.settings["rationale_weight"] = config.rationale_weight
        self.form, self.before = form, before

    def check(self) -> None:
        lora_config(self.config.training.lora_r)
        if self.before is None:
            refuse_unreadable(self.config.student)
            tokenizer_of(self.config.student)

    def training_rows(self) -> list[dict[str, str]]:
        """Prompts and completions: `whole` [x; r; y], `answer` [x; y], `tasks` both label and rationale, each a task."""
        task, config = self.config.task, self.config
        rows = self.after[0].rows
        answers = [self._row(task.filled("answer_only", answer=row["answer"]), row) for row in rows]
        if self.form == "answer":
            return _unique(answers)
        if self.form == "whole":
            return [self._row(task.filled("completion", rationale=row["rationale"], answer=row["answer"]), row) for row in rows]
        rationales = [self._row(row["rationale"], row, "[rationale] ") for row in rows]
        labels = [{**row, "prompt": f"[label] {row['prompt']}"} for row in answers]
        return [*_unique(labels), *weighted(rationales, config.rationale_weight, config.seed)]

    def _row(self, completion: str, row: dict[str, Any], mark: str = "") -> dict[str, str]:
        return {"prompt": mark + self.config.task.filled("student", question=row["question"]), "completion": completion}

    def make(self, work: Work) -> None:
        assert work.folder is not None
        rows = self.training_rows()
        random.Random(f"{self.config.seed}/{self.name}").shuffle(rows)
        start = self.config.student if self.before is None else str(self.before.output)
        work.counts.update(train(start, rows, work.folder, self.config.training, self.config.seed, work.progress))


def _unique(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A question's answer once: two teachers that agree give [x; y] twice."""
    return [dict(pair) for pair in dict.fromkeys(tuple(row.items()) for row in rows)]


class Answers(OfTwT):
    """What a student answers to the questions that it was trained on."""

    def __init__(self, name: str, config: TwTConfig, rows: Stage, student: Stage) -> None:
        how = config.inference
        super().__init__(
            name, config, [rows, student], max_tokens=how.max_tokens, engine=how.engine, student=config.task.student
        )

    def make(self, work: Work) -> None:
        questions = {row["problem"]: row["question"] for row in self.after[0].rows}
        left = [problem for problem in questions if str(problem) not in work.done]
        prompts = [self.config.task.filled("student", question=questions[problem]) for problem in left]
        answers = student_answers(str(self.after[1].output), prompts, self.config.inference)
        for problem, answer in zip(left, answers, strict=True):
            work.add({"id": str(problem), "problem": problem, **answer})
            work.progress(len(work.done), len(questions))
        tokens = [row["tokens"] for row in work.done.values()]
        work.count("answers", len(tokens))
        work.counts["mean tokens"] = round(sum(tokens) / len(tokens), 1)


class Compressed(OfTwT):
    """Shorter rationales: by the teacher that wrote them, who sees the student's (3.2, stage 2), or by a rule."""

    columns = TRIPLET

    def __init__(self, name: str, config: TwTConfig, rows: Stage, answers: Stage | None) -> None:
        how = config.compression
        settings: dict[str, Any] = {"by": how.by}
        if how.by == "teacher":
            settings.update(rewrite=config.task.rewrite, answer=config.task.answer)
            settings["teachers"] = [teacher.settings for teacher in config.asked]
        else:
            settings["share"] = how.share
        super().__init__(name, config, [rows] if answers is None else [rows, answers], **settings)
        if how.by == "compressor":
            self.depends_on("compressor_model", how.compressor_model)

    def _asked(self) -> dict[str, list[Asked]]:
        task = self.config.task
        theirs = {row["problem"]: rationale_of(row["text"], task) for row in self.after[1].rows}
        asked: dict[str, list[Asked]] = {teacher.name: [] for teacher in self.config.asked}
        for row in self.after[0].rows:
            fields = {"question": row["question"], "rationale": row["rationale"], "student": theirs[row["problem"]]}
            text = task.filled("rewrite", **fields)
            asked[row["teacher"]].append(Asked([{"role": "user", "content": text}]))
        return asked

    def plan(self) -> Planned:
        if self.config.compression.by != "teacher":
            return Planned()
        if any(stage.about is None for stage in self.after):
            sampling, problems = self.config.sampling, len(problems_of(self.config.problems, self.config.limit))
            each = sampling.samples * len(self.config.asked)
            each = each if sampling.diversity == "all" or len(self.config.asked) < 3 else 2
            return Planned(None, said=f"at most {each * problems:,} calls")
        return planned(self.config.asked, self._asked(), self.replies)

    def check(self) -> None:
        if self.config.compression.by == "compressor":
            compressor_class()

    def make(self, work: Work) -> None:
        rows = self.after[0].rows
        for row, text in zip(rows, self._texts(rows, work), strict=True):
            if isinstance(text, Unreadable):
                work.count(f"as they were, {text.reason}")
                text = row["rationale"]
            elif len(text) > len(row["rationale"]):
                work.count("longer than before")
            work.add({**row, "rationale": text, "longer_rationale": row["rationale"]})
            work.progress(len(work.done), len(rows))
        sizes = [sum(len(row[name]) for row in work.done.values()) for name in ("longer_rationale", "rationale")]
        work.count("rows", len(work.done))
        work.counts["characters of a rationale"] = " → ".join(f"{size / len(rows):.1f}" for size in sizes)

    def _texts(self, rows: list[dict[str, Any]], work: Work) -> Iterable[str | Unreadable]:
        """The shorter rationales, one after another; those that are there already are not made again."""
        how = self.config.compression
        if how.by == "teacher":
            return self._rewritten(rows, work)
        if how.by == "fixed_length":
            return (_first_words(row["rationale"], how.share) for row in rows)
        made = _by_llmlingua(how.share, how.compressor_model)
        return (work.done[row["id"]]["rationale"] if row["id"] in work.done else made(row["rationale"]) for row in rows)

    def _rewritten(self, rows: list[dict[str, Any]], work: Work) -> list[str | Unreadable]:
        found = ask(self.config.asked, self._asked(), self.replies, work, self.config.sampling.allow_failed)
        replies = {name: iter(made) for name, made in found.items()}
        texts: list[str | Unreadable] = []
        for row in rows:
            reply = next(replies[row["teacher"]])
            texts.append(Unreadable("failed") if "error" in reply else rewritten(reply["text"], reply["finish"]))
        return texts


def rationale_of(text: str, task: Task) -> str:
    """What a student wrote before its answer."""
    found = list(re.finditer(task.answer or r"####|\\boxed", text))
    return text[: found[-1].start()].strip() if found else text.strip()


def _first_words(text: str, share: float) -> str:
    """The first share of a text's words, at least one; line breaks stay."""
    words = list(re.finditer(r"\S+", text))
    return text[: words[max(1, round(share * len(words))) - 1].end()] if words else text


def compressor_class() -> Any:
    """LLMLingua's.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from llmlingua import PromptCompressor
    except ImportError as error:
        raise ValueError("compression: by: compressor needs the package llmlingua: pip install llmlingua.") from error
    return PromptCompressor


def _by_llmlingua(share: float, model: str) -> Callable[[str], str | Unreadable]:
    compressor = compressor_class()(model, use_llmlingua2=True)
    return lambda text: compressor.compress_prompt([text], rate=share)["compressed_prompt"] or Unreadable("empty")


def tested(config: TwTConfig, students: Sequence[Stage]) -> Tested:
    """What the student as it starts and every trained one answer to the test problems."""
    task, marked = config.task, config.recipe in ("step_by_step", "tinyllm")
    assert config.test is not None

    def prompt(question: str, label: str) -> str:
        return ("[label] " if marked and label != "start" else "") + task.filled("student", question=question)

    settings: dict[str, Any] = {"student": task.student, "answer": task.answer}
    return Tested(
        students,
        config.test,
        {"start": config.student},
        lambda: {stage.name: stage.output for stage in students},
        config.inference,
        prompt,
        None if task.is_code else lambda text, label: is_correct(text, label, task.answer),
        **(settings | {"mark": "[label] "} if marked else settings),
    )
