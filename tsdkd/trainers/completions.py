"""Who writes the completions of a step: the student, the data set, the teacher ahead of the run, both models together, a
writer of a user's own, or a replay buffer. Owns φ, the buffer, and the draws of the sources."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from tsdkd.data.completions import has_text
from tsdkd.data.prompts import columns_of, pieces
from tsdkd.rollouts import RolloutSource, mixed, speculative
from tsdkd.teachers import Teacher
from tsdkd.trainers.ahead import CompletionsAhead, interleaved, refuse_interleaving
from tsdkd.trainers.host import Host, batch_rows, has_completions
from tsdkd.trainers.metrics import Metrics
from tsdkd.trainers.rendered import row_by_row
from tsdkd.trainers.teacher_prompts import TeacherPrompts
from tsdkd.types import RolloutSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A generation batch: its rows, and completions that stand ready for them, in place of written ones."""

    rows: list[dict[str, Any]]
    given: list[list[int]] | None = None
    is_fresh: bool = False  # written now, for the buffer


@dataclass(frozen=True)
class Written:
    """Completions, one list of ids a row, and what was recorded of each of their tokens, by name."""

    ids: list[list[int]]
    token_values: dict[str, list[list[float]]] = field(default_factory=dict)


class CompletionSupply:
    """The completions of every step.

    Args:
        host: the trainer.
        spec: whose completions the method trains on.
        teacher_model, teacher: the teacher's model in this process, if any, and what it is; they may write.
        teacher_name: for files and messages.
        metrics: what is logged.
        prompts: what the teacher reads in place of the prompts.

    Raises:
        ValueError: a writer that cannot write here, or a buffer that no step fits into.
    """

    def __init__(
        self, host: Host, spec: RolloutSpec, teacher_model: Any, teacher: Teacher | None, teacher_name: str, metrics: Metrics,
        prompts: TeacherPrompts,
    ) -> None:  # fmt: skip
        self.host, self.spec, self.metrics = host, spec, metrics
        self.teacher_model = teacher_model
        self.ahead = CompletionsAhead(host, spec, teacher_model, teacher_name, prompts)
        self.source = RolloutSource(spec, host.args.seed, batch_rows(host.args), host.accelerator.num_processes)
        self._writer = None if spec.writer == "student" else self._build_writer(teacher)

    # ------------------------------------------------------------------ in a step

    def rows(self, rows: list[dict[str, Any]]) -> Batch:
        """The rows of a generation batch, or others in their place, and the completions that stand ready for them."""
        host = self.host
        if host.mode == "eval":
            reads_given = has_completions(rows[0]) and self.spec.evaluate_on == "dataset"
            return Batch(rows, self.given(rows) if reads_given else None)
        drawn = self.source.draw(host.step, host.max_steps)
        self._log(drawn)
        if drawn == "fresh":
            return Batch(rows, is_fresh=True)
        if drawn == "dataset":
            return Batch(rows, self.given(rows))
        rows = self.source.replayed(host.step, len(rows), host.accelerator.process_index)
        return Batch(rows, [row["completion_ids"] for row in rows])

    def write(self, batch: Batch, prompt_ids: list[list[int]], by_student: Any) -> Written:
        """The completions of a batch.

        Args:
            by_student: from the prompts' ids to the student's own completions, as ids or as `Written`.
        """
        if batch.given is not None:
            return Written(batch.given)
        if self._writer is None or self.host.mode == "eval":
            found = by_student(prompt_ids)
            written = found if isinstance(found, Written) else Written(found)
        else:
            with self.host.student() as student:
                written = Written(*self._writer.write(student, prompt_ids))
            self._check_written(written, len(prompt_ids))
        if batch.is_fresh:
            pairs = zip(batch.rows, written.ids, strict=True)
            self.source.keep([{**row, "completion_ids": ids} for row, ids in pairs])
        return written

    def writers(self, batch: Batch) -> tuple[str, ...]:
        """Whose forward passes write a batch: none of completions that are given, `student`, and `teacher` where both do."""
        if batch.given is not None:
            return ()
        both = self._writer is not None and self.host.mode == "train" and not hasattr(self.spec.writer, "write")
        return ("student", "teacher") if both else ("student",)

    def _check_written(self, written: Written, rows: int) -> None:
        """Refuse what a writer of a user's own may not write."""
        host, who = self.host, type(self._writer).__name__
        columns: dict[str, list] = {"completions": written.ids, **written.token_values}
        for name, column in columns.items():
            if len(column) != rows:
                raise ValueError(f"the writer {who} gave {len(column)} {name} for {rows} prompts: give a list of ids each.")
        for row, ids in enumerate(written.ids):
            if len(ids) > host.max_completion_length:
                raise ValueError(
                    f"the writer {who} wrote {len(ids)} ids in row {row}, and max_completion_length is "
                    f"{host.max_completion_length}: let it stop there."
                )
            if ids and not 0 <= min(ids) <= max(ids) < host.vocab_size:
                raise ValueError(
                    f"the writer {who} wrote id {max(ids)} in row {row}, and both models have the ids below "
                    f"{host.vocab_size} alone."
                )
            if any(len(column[row]) != len(ids) for column in written.token_values.values()):
                raise ValueError(
                    f"the writer {who} recorded other than one number for each of the {len(ids)} ids of row {row}."
                )

    def _log(self, drawn: str) -> None:
        if not self.spec.need_dataset:
            return
        for source in ("fresh", "dataset", "buffer"):
            self.metrics.add_host("train", f"answers/{source}", float(drawn == source))
        if self.spec.replay is not None:
            self.metrics.add_host("train", "answers/share", self.source.share)

    def given(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The ids of the data set's completions, cut to `max_completion_length`; a stream's are looked at here.

        Raises:
            ValueError: a row of a stream without a completion, or with ids that one model lacks.
        """
        if not all(row.get("completion_ids") is not None or has_text(row.get("completion")) for row in rows):
            raise ValueError("a row without a completion arrived, and the method trains on those: filter the stream.")
        given = [ids for ids, _ in self.given_and_cut(rows)]
        beyond = max((max(ids, default=0) for ids in given), default=0)
        if beyond >= self.host.vocab_size:
            raise ValueError(
                f"a completion with id {beyond}, {self.host.tokenizer.decode([beyond])!r}, arrived, beyond the "
                f"{self.host.vocab_size} ids that both models have: filter the stream."
            )
        return given

    def given_and_cut(self, rows: list[dict[str, Any]]) -> list[tuple[list[int], bool]]:
        """The ids of the data set's completions, and whether each was cut to `max_completion_length`."""
        longest = self.host.max_completion_length
        made: list[tuple[list[int], bool]] = [([], False)] * len(rows)
        texts = []
        for number, row in enumerate(rows):
            ids = row.get("completion_ids")
            if ids is None:
                texts.append(number)
            else:
                made[number] = list(ids)[:longest], len(ids) > longest
        if texts:
            given = self.host.rendering.completions(
                [rows[number] for number in texts], [rows[number]["completion"] for number in texts], longest
            )
            for number, completion in zip(texts, given, strict=True):
                made[number] = completion
        return made

    def state_dict(self) -> dict[str, Any] | None:
        """φ, the buffer and the last evaluation's loss, where there is a replay; else nothing."""
        return self.source.state_dict() if self.spec.replay is not None else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.source.load_state_dict(state)

    # ------------------------------------------------------------------ before a run

    def check(self, dataset: Any, role: str) -> None:
        """Refuse the data set's completions where they cannot be trained on; say how many are cut.

        Raises:
            ValueError: rows without text, or with ids that one model lacks.
        """
        columns = columns_of(dataset)
        if not self.spec.need_dataset or not has_completions(columns):
            return
        if "completion_ids" not in columns:
            empty = [row for row, completion in enumerate(dataset["completion"]) if not has_text(completion)]
            if self.host.args.teacher_writes_missing:
                if len(empty) == len(dataset):
                    return
                dataset = dataset.select([row for row in range(len(dataset)) if row not in set(empty)])
                empty = []
            if empty:
                raise ValueError(
                    f"{role} has {len(empty)} completions without text, the first in row {empty[0]}: a completion is a "
                    "text or a list of one assistant message with a text. Remove or mend those rows, or let the teacher write "
                    "them (teacher_writes_missing)."
                )
        host, cut = self.host, 0
        for start, rows in pieces(dataset):
            given = row_by_row(self.given_and_cut, rows, start, f"the completion of row {{}} of {role} cannot be rendered")
            for row, (ids, was_cut) in enumerate(given, start):
                cut += was_cut
                if min(ids, default=0) < 0:
                    raise ValueError(f"the completion of row {row} of {role} holds {min(ids)}, which is no id: leave it out.")
                if max(ids, default=0) >= host.vocab_size:
                    raise ValueError(
                        f"the completion of row {row} of {role} holds id {max(ids)}, {host.tokenizer.decode([max(ids)])!r}, "
                        f"beyond the {host.vocab_size} ids that both models have. Remove that token."
                    )
        if cut:
            logger.warning(
                "%d of %d completions of %s are longer than max_completion_length=%d and lose their end.",
                cut,
                len(dataset),
                role,
                host.max_completion_length,
            )

    def _build_writer(self, teacher: Teacher | None) -> Any:
        """What writes in place of the student: a named rule or one of a user's own on both models, or a user's writer."""
        spec, args = self.spec, self.host.args
        if hasattr(spec.writer, "write"):
            return spec.writer
        refuse_interleaving(self.host, self.teacher_model, teacher, self.ahead.prompts)
        if spec.writer == "mixed":
            rule = mixed(spec.options["alpha"], args.temperature, spec.options["temperature"])
        elif spec.writer == "speculative":
            rule = speculative(spec.options["top_k"], args.temperature)
        elif callable(spec.writer):
            rule = spec.writer
        else:
            raise ValueError(
                f"writer={spec.writer!r}: pass 'student', 'mixed', 'speculative', a rule of both models' logits, or an object "
                "with write(student, prompt_ids)."
            )
        return interleaved(self.host, self.teacher_model, rule)
