"""Which prompts fit: the contexts of both models, the ids that both have, and the rows that fill no batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tsdkd.checks import refuse
from tsdkd.data.prompts import WITH_IMAGES, fitting_rows, kind_of, pieces, prompt_problems
from tsdkd.teachers.heads import text_config
from tsdkd.trainers.host import Host, batch_rows, once_a_run
from tsdkd.trainers.rendered import row_by_row
from tsdkd.trainers.teacher_prompts import TeacherPrompts

logger = once_a_run(__name__)


@dataclass(frozen=True)
class Limits:
    """The longest prompt allowed, tokens, why, and the longest completion beside it."""

    prompt: int
    reason: str
    completion: int

    @classmethod
    def of(cls, max_length: int | None, max_completion_length: int | None, student: Any, *teachers: Any) -> Limits:
        """From the options and the contexts of the models (None: none in this process).

        Raises:
            ValueError: nothing states a context, or no room is left for a prompt.
        """
        limits = {} if max_length is None else {f"max_length={max_length}": max_length}
        for role, model in (("student", student), *(("teacher", teacher) for teacher in teachers)):
            context = None if model is None else getattr(text_config(model), "max_position_embeddings", None)
            if context is not None:
                limits[f"the {role}'s context of {context} tokens"] = context
        if not limits:
            raise ValueError("neither model states its context and max_length is None: set max_length.")
        reason, total = min(limits.items(), key=lambda item: item[1])
        room = min(512, total // 2) if max_completion_length is None else max_completion_length
        if room >= total:
            raise ValueError(
                f"max_completion_length={room} leaves no room for a prompt: {reason} holds prompt and completion together. "
                f"Lower max_completion_length below {total}."
            )
        return cls(total - room, f"{reason} less max_completion_length={room}", room)


class Prompts:
    """Measures prompts before a run starts.

    Args:
        host: the trainer.
        limits: of prompts and completions.
        check_completions: called with each data set and its role.
        for_teacher: what the teacher reads in their place.
    """

    def __init__(
        self, host: Host, limits: Limits, check_completions: Callable[[Any, str], None], for_teacher: TeacherPrompts
    ) -> None:
        self.host, self.limits, self.check_completions, self.for_teacher = host, limits, check_completions, for_teacher
        self.dropped = 0
        self._seen: set[frozenset[str]] = set()

    def fit(self, dataset: Any, role: str) -> Any:
        """The rows whose prompts fit; of a stream too, where those that do not are to be dropped.

        Raises:
            ValueError: prompts that are too long, unless they are to be dropped, or ids that one model lacks.
        """
        if not hasattr(dataset, "__len__"):
            return dataset.filter(self._fits) if self.host.args.drop_long_prompts else dataset
        host, lengths = self.host, []
        seen: set[frozenset[str]] = set()
        for start, rows in pieces(dataset):
            what = f"the prompt of row {{}} of {role} cannot be rendered by the tokenizer's chat template"
            for row, ids in enumerate(row_by_row(host.tokenize, rows, start, what), start):
                self._check_fields(rows[row - start], row, role, seen)
                if not ids:
                    raise ValueError(
                        f"the prompt of row {row} of {role} has no tokens: nothing predicts the first one of its completion. "
                        "Remove it, or use a tokenizer that begins a text with a token of its own."
                    )
                if max(ids) >= host.vocab_size:
                    raise ValueError(
                        f"the prompt of row {row} of {role} holds id {max(ids)}, {host.tokenizer.decode([max(ids)])!r}, "
                        f"beyond the {host.vocab_size} ids that both models have: one of them cannot read it. Remove that "
                        "token."
                    )
                lengths.append(len(ids))
        self.check_completions(dataset, role)
        fitting = fitting_rows(lengths, self.limits.prompt, self.limits.reason, role, host.args.drop_long_prompts)
        theirs = self.for_teacher.fit(dataset, role)
        fitting = fitting if theirs is None else sorted(set(fitting) & set(theirs))
        if not fitting:
            raise ValueError(f"no row of {role} has a prompt and a teacher_prompt that both fit.")
        dropped = len(lengths) - len(fitting)
        if dropped:
            self.dropped += dropped
            logger.warning(
                "%d of %d prompts of %s are longer than %d tokens%s and were dropped.",
                dropped,
                len(lengths),
                role,
                self.limits.prompt,
                "" if theirs is None else f", or for the teacher than {self.for_teacher.limit},",
            )
            dataset = dataset.select(fitting)
            if role == "train_dataset":
                needed = batch_rows(host.args) * host.accelerator.num_processes
                refuse(prompt_problems(dataset, role, needed, " after the others were dropped", len(self._kinds) > 1))
        return dataset

    def _fits(self, row: dict[str, Any]) -> bool:
        """Whether a stream's row fits; one that does not is counted."""
        if kind_of(row.get("prompt")) not in (*self._kinds, "text"):
            return True  # refused when it arrives
        (ids,) = self.host.tokenize([row])
        fits = len(ids) <= self.limits.prompt and self.for_teacher.fits(row)
        self.dropped += not fits
        return fits

    @property
    def _kinds(self) -> tuple[str, ...]:
        """The kinds of chats that are read."""
        return ("chat",) if self.host.rendering.multimodal is None else ("chat", WITH_IMAGES)

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Refuse rows that arrive and are no prompts, as a data set of them is refused at construction.

        Raises:
            ValueError: saying what came.
        """
        for row in rows:
            kind = kind_of(row.get("prompt"))
            if kind not in (*self._kinds, "text", "empty") or (kind == "empty" and not isinstance(row["prompt"], str)):
                raise ValueError(f"a prompt arrived that is {kind}: {str(row.get('prompt'))[:80]!r}. Filter the stream.")
            self._check_fields(row, 0, "the rows that arrived", self._seen)
        if len({isinstance(row["prompt"], str) for row in rows}) > 1:
            raise ValueError("texts and chats arrived in one batch: make the stream's prompts one type.")

    def _check_fields(self, row: dict[str, Any], number: int, role: str, seen: set[frozenset[str]]) -> None:
        """Refuse tools, and name fields of turns, of which the chat template renders nothing; asked once a set of fields.

        Raises:
            ValueError: naming the row.
        """
        if isinstance(row["prompt"], str):
            extra = [name for name in ("tools", "chat_template_kwargs") if row.get(name)]
            if extra:
                raise ValueError(
                    f"row {number} of {role} has {' and '.join(extra)}, which a chat template reads, and its prompt is a text: "
                    "make it a chat, or remove the column."
                )
            return
        given = row.get("completion")
        turns = [*row["prompt"], *(given if isinstance(given, (list, tuple)) else [])]
        fields = frozenset(key for turn in turns for key, value in turn.items() if value is not None)
        fields |= {f"role {turn.get('role')}" for turn in turns}
        fields |= {"tools"} if row.get("tools") else frozenset()
        if fields in seen:
            return
        seen.add(fields)
        unused = self.host.rendering.unused(row)
        lost = [name for name in unused if name.startswith("the turns of") or name == "tool_calls"]
        if lost:
            raise ValueError(
                f"row {number} of {role}: the chat template renders nothing of {', '.join(lost)}. Name them as it does "
                "(system, user, assistant, tool), or set a template that does (tokenizer.chat_template)."
            )
        if "tools" in unused:
            raise ValueError(
                f"row {number} of {role} has tools, and the chat template renders none of them: the student would be trained "
                "as if there were none. Set a template that does (tokenizer.chat_template), or remove the column."
            )
        if unused:
            logger.warning(
                "row %d of %s has %s, of which the chat template renders nothing: neither model reads it.",
                number,
                role,
                ", ".join(unused),
            )

    def left_out_of_epoch(self, dataset: Any) -> int:
        """Rows that fill no generation batch: TRL's sampler leaves them out, others in each epoch; said, too."""
        if not hasattr(dataset, "__len__"):
            return 0
        batch = batch_rows(self.host.args) * self.host.accelerator.num_processes
        rows = len(dataset) % batch
        if rows:
            logger.warning(
                "%d of %d rows of train_dataset are left out of each epoch, others each time: they fill no batch of %d.",
                rows,
                len(dataset),
                batch,
            )
        return rows

    def refuse_unfit(self, prompt_ids: list[list[int]]) -> None:
        """Refuse a prompt of a stream that does not fit; other data sets were measured at construction.

        Raises:
            ValueError: a prompt without tokens, or its length and what fits.
        """
        if not all(prompt_ids):
            raise ValueError(
                "a prompt without tokens arrived: nothing predicts the first token of its completion. Filter the stream."
            )
        beyond = max(map(max, prompt_ids))
        if beyond >= self.host.vocab_size:
            raise ValueError(
                f"a prompt with id {beyond}, {self.host.tokenizer.decode([beyond])!r}, arrived, beyond the "
                f"{self.host.vocab_size} ids that both models have. Filter the stream."
            )
        too_long = max(map(len, prompt_ids))
        if too_long > self.limits.prompt:
            raise ValueError(
                f"a prompt of {too_long} tokens arrived but at most {self.limits.prompt} fit: {self.limits.reason}. "
                "Filter the stream, or set drop_long_prompts."
            )
