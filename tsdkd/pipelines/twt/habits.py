"""The stages of habitual reasoning distillation (TwT, 3.2): students, what they answer, shorter rationales, scores."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import ScoreRow
from tsdkd.pipelines.stage import Planned, Stage, Work, contents_of, digest_of
from tsdkd.pipelines.twt.asking import ask, planned
from tsdkd.pipelines.twt.config import TwTConfig, problems_of
from tsdkd.pipelines.twt.labelling import TRIPLET, OfTwT
from tsdkd.pipelines.twt.parsing import Unreadable, rewritten
from tsdkd.pipelines.twt.training import lora_of, tokenizer_of, train, weighted
from tsdkd.pipelines.twt.writing import marks, rationale_of, student_answers
from tsdkd.provenance import provenance
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
            self.settings["from"] = config.student
            self.settings["from's files"] = contents_of(config.student)
        if form == "tasks":
            self.settings["rationale_weight"] = config.rationale_weight
        self.form, self.before = form, before

    def check(self) -> None:
        lora_of(self.config.training)
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
        if how.by == "compressor":
            settings["compressor_model"] = how.compressor_model
            settings["compressor_model's files"] = contents_of(how.compressor_model)
        super().__init__(name, config, [rows] if answers is None else [rows, answers], **settings)

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


class Tested(OfTwT):
    """What the student as it starts and every trained one answer to the test problems, and whether it is right."""

    def __init__(self, config: TwTConfig, students: Sequence[Stage]) -> None:
        task, how = config.task, config.inference
        super().__init__(
            "tested", config, students, max_tokens=how.max_tokens, engine=how.engine, student=task.student, answer=task.answer
        )
        self.settings.update({"start": config.student, "start's files": contents_of(config.student)})
        if config.recipe in ("step_by_step", "tinyllm"):
            self.settings["mark"] = "[label] "
        path = Path(config.test or "").expanduser()
        self.files = [path] if path.is_file() else []
        if not self.files:
            self.settings.update({"test": config.test, "test's files": contents_of(config.test or "")})

    def _problems(self) -> list[dict[str, Any]]:
        assert self.config.test is not None
        return problems_of(self.config.test, labelled=True)

    def check(self) -> None:
        self._problems()

    def make(self, work: Work) -> None:
        config, problems = self.config, self._problems()
        students = [("start", config.student), *((stage.name, str(stage.output)) for stage in self.after)]
        for label, student in students:
            left = [row for row in problems if f"{label}/{row['problem']}" not in work.done]
            mark = self.settings.get("mark", "") if label != "start" else ""
            prompts = [mark + config.task.filled("student", question=row["question"]) for row in left]
            for row, answer in zip(left, student_answers(student, prompts, config.inference), strict=True):
                (right,) = [None] if config.task.is_code else marks([answer], [row["label"]], config.task)
                work.add({"id": f"{label}/{row['problem']}", "student": label, **row, **answer, "right": right})
                work.progress(len(work.done), len(students) * len(problems))
        work.count("answers", len(work.done))


class Scores(OfTwT):
    """Accuracy and mean output tokens of each student, as rows; code is right once it has run, which is `tsdkd evaluate`'s."""

    def __init__(self, config: TwTConfig, tested: Stage) -> None:
        super().__init__("scores", config, [tested], recipe=config.recipe, training=config.training.settings)

    def make(self, work: Work) -> None:
        by_student: dict[str, list[dict[str, Any]]] = {}
        for row in self.after[0].rows:
            by_student.setdefault(row["student"], []).append(row)
        students = {stage.name: stage.output for stage in self.after[0].after}
        for label, answers in by_student.items():
            made = {row.metric: row for row in self._rows(label, students.get(label), answers)}
            for metric, score in made.items():
                work.add({"id": f"{label}/{metric}", **score.to_json()})
            right = f"{made['accuracy'].score:.1%} at " if "accuracy" in made else ""
            work.counts[label] = f"{right}{made['tokens'].score:.1f} tokens"

    def _rows(self, label: str, folder: Path | None, answers: list[dict[str, Any]]) -> list[ScoreRow]:
        config, n = self.config, len(answers)
        test = self.after[0].files
        shared: dict[str, Any] = {
            "task": config.task.name,
            "requested": Path(config.test or "").name,
            "task_digest": digest_of(test[0])[:16] if test else "",
            "n": n,
            "label": label,
            "model": config.student if folder is None else folder.name,
            "model_digest": contents_of(config.student) if folder is None else digest_of(folder)[:16],
            "max_gen_toks": config.inference.max_tokens,
            "settings": {"recipe": config.recipe, "engine": config.inference.engine, **config.training.settings},
            "origin": provenance(config.seed),
        }
        tokens = sum(row["tokens"] for row in answers) / n
        cut = {"cut": sum(not row["ended"] for row in answers)}
        made = [ScoreRow(metric="tokens", score=tokens, main=False, higher_is_better=False, more=cut, **shared)]
        if not config.task.is_code:
            right = [row["right"] for row in answers]
            low, high = wilson_interval(sum(right), n)
            items = {"right": "".join("1" if mark else "0" for mark in right)}
            more = {"low": low, "high": high}
            made.append(ScoreRow(metric="accuracy", score=sum(right) / n, items=items, more=more, **shared))
        return made
