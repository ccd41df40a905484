"""The stages of habitual reasoning distillation (TwT, 3.2): students, what they answer, shorter rationales, scores."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import ScoreRow
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.pipelines.twt.asking import ask, planned
from tsdkd.pipelines.twt.config import TwTConfig, problems_of
from tsdkd.pipelines.twt.labelling import OfTwT
from tsdkd.pipelines.twt.parsing import Unreadable, rewritten
from tsdkd.pipelines.twt.training import train, weighted
from tsdkd.pipelines.twt.writing import marks, rationale_of, student_answers
from tsdkd.provenance import provenance
from tsdkd.rollouts.api_models import Asked


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
        if form == "tasks":
            self.settings["rationale_weight"] = config.rationale_weight
        self.form, self.before = form, before

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
        work.counts.update(train(start, rows, work.folder, self.config.training, self.config.seed))


def _unique(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A question's answer once: two teachers that agree give [x; y] twice."""
    return [dict(pair) for pair in dict.fromkeys(tuple(row.items()) for row in rows)]


class Answers(OfTwT):
    """What a student answers to the questions that it was trained on."""

    def __init__(self, name: str, config: TwTConfig, rows: Stage, student: Stage) -> None:
        super().__init__(name, config, [rows, student], max_tokens=config.inference.max_tokens, student=config.task.student)

    def make(self, work: Work) -> None:
        questions = {row["problem"]: row["question"] for row in self.after[0].rows}
        left = [problem for problem in questions if str(problem) not in work.done]
        prompts = [self.config.task.filled("student", question=questions[problem]) for problem in left]
        how, size = self.config.inference, max(1, self.config.inference.batch_size)
        if how.engine == "vllm":
            size = len(prompts)
        answers = student_answers(str(self.after[1].output), prompts, how, progress=work.progress) if size and prompts else []
        for problem, answer in zip(left, answers, strict=True):
            work.add({"id": str(problem), "problem": problem, **answer})
        tokens = [row["tokens"] for row in work.done.values()]
        work.count("answers", len(tokens))
        work.counts["mean tokens"] = round(sum(tokens) / len(tokens), 1)


class Compressed(OfTwT):
    """Shorter rationales: by the teacher that wrote them, who sees the student's (3.2, stage 2), or by a rule."""

    def __init__(self, name: str, config: TwTConfig, rows: Stage, answers: Stage | None) -> None:
        how = config.compression
        settings: dict[str, Any] = {"by": how.by}
        if how.by == "teacher":
            settings.update(rewrite=config.task.rewrite, teachers=[teacher.settings for teacher in config.asked])
        else:
            settings["share"] = how.share
        if how.by == "compressor":
            settings["compressor_model"] = how.compressor_model
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
            return Planned(None)
        return planned(self.config.asked, self._asked(), self.replies)

    def make(self, work: Work) -> None:
        rows, how = self.after[0].rows, self.config.compression
        if how.by == "teacher":
            texts = self._rewritten(rows, work)
        elif how.by == "fixed_length":
            texts = [_first_words(row["rationale"], how.share) for row in rows]
        else:
            texts = _by_llmlingua([row["rationale"] for row in rows], how.share, how.compressor_model)
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, Unreadable):
                work.count(f"as they were, {text.reason}")
                text = row["rationale"]
            work.add({**row, "rationale": text, "longer_rationale": row["rationale"]})
        sizes = [sum(len(row[name]) for row in work.done.values()) for name in ("longer_rationale", "rationale")]
        work.count("rows", len(work.done))
        work.counts["characters of a rationale"] = " → ".join(f"{size / len(rows):.1f}" for size in sizes)

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


def _by_llmlingua(texts: list[str], share: float, model: str) -> list[str | Unreadable]:
    try:
        from llmlingua import PromptCompressor
    except ImportError as error:
        raise ValueError("compression: by: compressor needs the package llmlingua: pip install llmlingua.") from error
    compressor = PromptCompressor(model, use_llmlingua2=True)
    return [compressor.compress_prompt([text], rate=share)["compressed_prompt"] or Unreadable("empty") for text in texts]


class Scores(OfTwT):
    """Accuracy and mean output tokens of the student as it starts and of every trained one, on the test problems."""

    def __init__(self, config: TwTConfig, students: Sequence[Stage]) -> None:
        task, how = config.task, config.inference
        super().__init__("scores", config, students, max_tokens=how.max_tokens, student=task.student, answer=task.answer,
                         start=config.student)  # fmt: skip
        if config.recipe in ("step_by_step", "tinyllm"):
            self.settings["mark"] = "[label] "
        path = Path(config.test or "").expanduser()
        self.files = [path] if path.is_file() else []

    def make(self, work: Work) -> None:
        config = self.config
        assert config.test is not None
        problems = problems_of(config.test, labelled=True)
        students = [("start", config.student), *((stage.name, str(stage.output)) for stage in self.after)]
        for label, student in students:
            wanted = {f"{label}/{metric}" for metric in (("tokens",) if config.task.is_code else ("tokens", "accuracy"))}
            if wanted <= work.done.keys():
                continue
            mark = self.settings.get("mark", "") if label != "start" else ""
            prompts = [mark + config.task.filled("student", question=row["question"]) for row in problems]
            answers = student_answers(student, prompts, config.inference)
            for row in self._rows(label, student, answers, [row["label"] for row in problems]):
                work.add({"id": f"{label}/{row.metric}", **row.to_json()})
            shown = {row["metric"]: row["score"] for row in work.done.values() if row["label"] == label}
            right = f"{shown['accuracy']:.1%} at " if "accuracy" in shown else ""
            work.counts[label] = f"{right}{shown['tokens']:.1f} tokens"
            work.say(f"{self.name}: {label} {work.counts[label]}")

    def _rows(self, label: str, student: str, answers: list[dict[str, Any]], gold: list[str]) -> list[ScoreRow]:
        config, n = self.config, len(answers)
        shared: dict[str, Any] = {
            "task": config.task.name,
            "n": n,
            "label": label,
            "model": Path(student).name,
            "max_gen_toks": config.inference.max_tokens,
            "settings": {"recipe": config.recipe, "test": Path(config.test or "").name, **config.training.settings},
            "origin": provenance(config.seed),
        }
        tokens = sum(row["tokens"] for row in answers) / n
        cut = {"cut": sum(not row["ended"] for row in answers)}
        made = [ScoreRow(metric="tokens", score=tokens, main=False, higher_is_better=False, more=cut, **shared)]
        if not config.task.is_code:  # whose answers are right once they have run: tsdkd evaluate does that, where it may
            right = marks(answers, gold, config.task)
            low, high = wilson_interval(sum(right), n)
            items = {"right": "".join("1" if mark else "0" for mark in right)}
            more = {"low": low, "high": high}
            made.append(ScoreRow(metric="accuracy", score=sum(right) / n, items=items, more=more, **shared))
        return made
