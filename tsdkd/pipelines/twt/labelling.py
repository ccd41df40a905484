"""The stages that make the set G (TwT, 3.1): replies, triplets, the good ones, the diverse ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tsdkd.pipelines.asking import OfRun, ask, planned
from tsdkd.pipelines.problems import problems_of
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.pipelines.twt.config import TwTConfig
from tsdkd.pipelines.twt.parsing import Unreadable, parsed
from tsdkd.pipelines.twt.sampling import Embedder, diverse, label_accuracy, quality, shares
from tsdkd.rollouts.api_models import Asked

TRIPLET = ("id", "problem", "question", "teacher", "rationale", "answer", "confidence")


OfTwT = OfRun[TwTConfig]


class Labels(OfTwT):
    """Every teacher's replies to every question."""

    def __init__(self, config: TwTConfig) -> None:
        super().__init__(
            "labels",
            config,
            teachers=[teacher.settings for teacher in config.asked],
            ask=config.task.ask,
            samples=config.sampling.samples,
            limit=config.limit,
        )
        self.depends_on("problems", config.problems)

    def _asked(self) -> tuple[list[dict[str, Any]], dict[str, list[Asked]]]:
        problems = problems_of(self.config.problems, self.config.limit)
        asked = [
            Asked(self.config.task.messages(row["question"]), sample)
            for row in problems
            for sample in range(self.config.sampling.samples)
        ]
        return problems, {teacher.name: asked for teacher in self.config.asked}

    def check(self) -> None:
        for teacher in self.config.asked:
            teacher.check()
        self._asked()

    def plan(self) -> Planned:
        return planned(self.config.asked, self._asked()[1], self.replies)

    def make(self, work: Work) -> None:
        problems, asked = self._asked()
        for teacher in self.config.asked:
            if self.config.sampling.samples > 1 and teacher.options.get("temperature") == 0:
                work.say(
                    f"{teacher.name} at temperature 0 writes {self.config.sampling.samples} samples that may be all the same"
                )
        found = ask(self.config.asked, asked, self.replies, work, self.config.sampling.allow_failed)
        samples = self.config.sampling.samples
        for number, problem in enumerate(problems):
            for teacher in self.config.asked:
                for sample in range(samples):
                    reply = found[teacher.name][number * samples + sample]
                    if "error" in reply:
                        continue
                    kept = {name: reply.get(name) for name in ("text", "finish", "completion_tokens")}
                    if "mean_log_prob" in reply:
                        kept["mean_log_prob"] = reply["mean_log_prob"]
                    work.add({"id": f"{problem['problem']}/{teacher.name}/{sample}", **problem, "teacher": teacher.name,
                              "sample": sample, **kept})  # fmt: skip
        work.count("replies", len(work.done))


class Triplets(OfTwT):
    """What of the replies is a rationale, an answer and a confidence."""

    columns = TRIPLET

    def __init__(self, config: TwTConfig, labels: Stage) -> None:
        super().__init__("triplets", config, [labels], factors=dict(config.task.factors), is_code=config.task.is_code)

    def make(self, work: Work) -> None:
        rows = self.after[0].rows
        for row in rows:
            found = parsed(row["text"], self.config.task, row["finish"])
            if isinstance(found, Unreadable):
                work.count(f"left out, {found.reason}")
                continue
            work.count(f"confidence {found.by}")
            work.add({**{name: row[name] for name in row if name not in ("text", "finish")}, **dataclasses.asdict(found)})
        if not rows:
            raise ValueError("there are no replies.")
        if not work.done:
            counts = ", ".join(f"{name.removeprefix('left out, ')} {count:,}" for name, count in work.counts.items())
            raise ValueError(
                f"none of {len(rows):,} replies has the form that was asked for ({counts}). The first is: "
                f"{rows[0]['text'][:300]!r}. Ask another model, or give a template of your own (task)."
            )


class Quality(OfTwT):
    """The triplets that are good enough (3.1.1)."""

    columns = TRIPLET

    def __init__(self, config: TwTConfig, triplets: Stage) -> None:
        how = config.sampling
        super().__init__("quality", config, [triplets], quality=how.quality, threshold=how.threshold)
        if how.quality == "random":
            self.settings["seed"] = config.seed

    def make(self, work: Work) -> None:
        rows, how = self.after[0].rows, self.config.sampling
        kept = quality(rows, how.quality, how.threshold, self.config.seed, self.config.task)
        for row, keep in zip(rows, kept, strict=True):
            if keep:
                work.add(row)
        work.count("kept", sum(kept))
        work.count("dropped", len(kept) - sum(kept))
        if not self.config.task.is_code:
            work.counts.update(label_accuracy(rows, kept, self.config.task))
        good = [row for row, keep in zip(rows, kept, strict=True) if keep]
        work.counts.update({f"kept of {name}": count for name, count in shares(good, "teacher").items()})


class Diversity(OfTwT):
    """Of each question the two that differ the most (3.1.2): the set G that students are trained on."""

    columns = TRIPLET

    def __init__(self, config: TwTConfig, kept: Stage) -> None:
        how = config.sampling
        super().__init__("diversity", config, [kept], diversity=how.diversity, voices=how.voices)
        if how.diversity == "embedding":
            self.depends_on("embedding_model", how.embedding_model)
        if how.diversity == "random":
            self.settings["seed"] = config.seed

    @functools.cached_property
    def embed(self) -> Embedder | None:
        """The embedding model, loaded once: `check` wants it before anything is paid for, `make` behind that."""
        how = self.config.sampling
        return Embedder(how.embedding_model) if how.diversity == "embedding" else None

    def check(self) -> None:
        _ = self.embed

    def make(self, work: Work) -> None:
        how = self.config.sampling
        by_problem: dict[int, list[dict[str, Any]]] = {}
        for row in self.after[0].rows:
            by_problem.setdefault(row["problem"], []).append(row)
        for number, rows in enumerate(by_problem.values(), 1):
            chosen = diverse(rows, how.diversity, self.embed, voices=how.voices, seed=self.config.seed)
            for place, similarity in chosen:
                work.add({**rows[place], "similarity": similarity})
            work.count("pairs" if len(chosen) == 2 and len(rows) > 2 else "whole")
            work.progress(number, len(by_problem))
        kept = list(work.done.values())
        work.count("rows", len(kept))
        work.count("questions", len(by_problem))
        if not self.config.task.is_code:
            work.counts.update(label_accuracy(kept, [True] * len(kept), self.config.task))
