"""What the teacher reads in place of the prompts: the ids, whether they fit its context, how many rows were dropped for it."""

from __future__ import annotations

from typing import Any

from tsdkd.data.prompts import fitting_rows, pieces
from tsdkd.data.rendering import Rendering, options_of
from tsdkd.data.teacher_prompts import COLUMN, IDS
from tsdkd.teachers.heads import text_config
from tsdkd.trainers.host import Host
from tsdkd.trainers.setup import Setup


class TeacherPrompts:
    """The teacher's own prompts.

    Args:
        host: the trainer.
        setup: what was asked for.
        tokenizer: the teacher's; None where it comes without one, and the student's is taken.
        model: whose context is the limit; None: not known here.
        longest: tokens of a completion.

    Raises:
        ValueError: a completion leaves no room for a prompt in the teacher's context.
    """

    def __init__(self, host: Host, setup: Setup, tokenizer: Any, model: Any, longest: int) -> None:
        self.host, self.tokenizer = host, tokenizer
        self.options: dict[str, Any] = dict(setup.args.teacher_chat_template_kwargs or {})  # type: ignore[arg-type]
        self.expected, self.dropped = setup.has_teacher_prompts, 0
        context = None if model is None else getattr(text_config(model), "max_position_embeddings", None)
        self.limit = None if context is None else context - longest
        self.why = f"the teacher's context of {context} tokens less max_completion_length={longest}"
        if self.expected and self.limit is not None and self.limit < 1:
            raise ValueError(f"no room is left for a teacher_prompt: {self.why}. Lower max_completion_length.")

    @property
    def rendering(self) -> Rendering:
        """How they become ids."""
        if self.tokenizer is not None:
            return Rendering(self.tokenizer, self.tokenizer)
        own = self.host.rendering
        return Rendering(own.tokenizer, own.tokenizer, chat_template=own.chat_template, options=own.options)

    def ids(self, rows: list[dict[str, Any]]) -> list[list[int]] | None:
        """The ids of each row's `teacher_prompt`, or its `teacher_prompt_ids`; None where no row has either.

        Raises:
            ValueError: rows that lack what others have, or chats for a tokenizer without a chat template.
        """
        if rows and all(row.get(IDS) for row in rows):
            return [list(row[IDS]) for row in rows]
        have = [bool(row.get(COLUMN)) for row in rows]
        if not any(have):
            if self.expected:
                raise ValueError("a row without a teacher_prompt arrived, where others have one: filter the stream.")
            return None
        if not all(have) or len({isinstance(row[COLUMN], str) for row in rows}) > 1:
            raise ValueError(
                "rows with and without a teacher_prompt, or texts and chats, arrived in one batch: make them alike."
            )
        rendering = self.rendering
        if not isinstance(rows[0][COLUMN], str) and not (rendering.chat_template or rendering.tokenizer.chat_template):
            raise ValueError(
                "teacher_prompt is a chat, and the teacher's tokenizer has no chat template: make it a text, or save a "
                "tokenizer with a template beside the teacher."
            )
        more = [{"tools": row.get("tools"), "chat_template_kwargs": {**options_of(row), **self.options}} for row in rows]
        return rendering.prompts([{"prompt": row[COLUMN], **own} for row, own in zip(rows, more, strict=True)])

    def of(self, rows: list[dict[str, Any]]) -> list[list[int]] | None:
        """Those of a batch; None where the teacher reads the prompts.

        Raises:
            ValueError: a stream's row without one, or with one that does not fit; others were measured before.
        """
        found = self.ids(rows)
        if found is None:
            return None
        if not all(found):
            raise ValueError("a teacher_prompt without tokens arrived: filter the stream.")
        longest = max(map(len, found))
        if self.limit is not None and longest > self.limit:
            raise ValueError(
                f"a teacher_prompt of {longest} tokens arrived but {self.limit} fit: {self.why}. Filter the stream."
            )
        return found

    def fit(self, dataset: Any, role: str) -> list[int] | None:
        """The rows of a data set whose prompts for the teacher fit; None where it has none.

        Raises:
            ValueError: one without tokens, or one that is too long unless those are to be dropped; which row.
        """
        from tsdkd.trainers.prompts import row_by_row

        lengths: list[int] = []
        for start, rows in pieces(dataset):
            if not {COLUMN, IDS} & rows[0].keys():
                return None
            what = f"the teacher_prompt of row {{}} of {role} cannot be rendered for the teacher"
            found = row_by_row(lambda some: self.ids(some) or [], rows, start, what)
            empty = [row for row, ids in enumerate(found, start) if not ids]
            if empty:
                raise ValueError(f"the teacher_prompt of row {empty[0]} of {role} has no tokens: fill it, or drop the row.")
            lengths += map(len, found)
        if self.limit is None:
            return list(range(len(lengths)))
        drop = self.host.args.drop_long_prompts
        fitting = fitting_rows(lengths, self.limit, self.why, f"{role} (column {COLUMN})", drop)
        self.dropped += len(lengths) - len(fitting)
        return fitting

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a stream's row fits; one that does not is counted."""
        found = self.ids([row])
        fits = found is None or self.limit is None or len(found[0]) <= self.limit
        self.dropped += not fits
        return fits
