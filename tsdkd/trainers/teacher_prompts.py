"""What the teacher reads in place of the prompts: the ids, whether they fit its context, how many rows were dropped for it."""

from __future__ import annotations

from typing import Any

from tsdkd.data.prompts import fitting_rows, pieces
from tsdkd.data.rendering import Rendering, options_of
from tsdkd.data.teacher_prompts import COLUMN, IDS
from tsdkd.trainers.host import Host, once_a_run
from tsdkd.trainers.rendered import row_by_row
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.teacher_entries import named_teachers
from tsdkd.trainers.teacher_of import Here

logger = once_a_run(__name__)


class TeacherPrompts:
    """The teacher's own prompts, and which of several teachers a row is of.

    Args:
        host: the trainer.
        setup: what was asked for.
        here: the teacher, or several.
        longest: tokens of a completion.

    Raises:
        ValueError: a completion leaves no room for a prompt in a teacher's context.
    """

    def __init__(self, host: Host, setup: Setup, here: Here, longest: int) -> None:
        self.host, self.tokenizers = host, dict(here.tokenizers)
        self.names = [] if setup.args.teacher_weights else list(setup.several)
        self.default = setup.args.default_teacher
        self.options: dict[str, Any] = dict(setup.args.teacher_chat_template_kwargs or {})  # type: ignore[arg-type]
        self.by_prompt = here.crossing is not None and not setup.has_teacher_prompts  # read in tokens of its own
        self.expected, self.dropped = setup.has_teacher_prompts or self.by_prompt, 0
        self._seen: set[tuple[str | None, frozenset[str]]] = set()
        self.sizes, self.itself = dict(here.sizes), setup.teaches_itself
        configs = [part.teacher_config for part in setup.apart.values() if part.teacher is not None] if here.sizes else []
        contexts = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
        context = min((each for each in contexts if each is not None), default=None)
        self.limit = None if context is None else context - longest
        self.why = f"the teacher's context of {context} tokens less max_completion_length={longest}"
        if self.expected and self.limit is not None and self.limit < 1:
            raise ValueError(f"no room is left for a teacher_prompt: {self.why}. Lower max_completion_length.")

    def teachers(self, rows: list[dict[str, Any]]) -> list[str] | None:
        """The names of each row's teacher; None where there is one.

        Raises:
            ValueError: a row of a stream that names none of them.
        """
        return named_teachers(rows, self.names, self.default) if self.names else None

    def rendering(self, teacher: str | None) -> Rendering:
        """How a teacher's prompts become ids: by its tokenizer, or by the student's where it comes without one."""
        tokenizer = self.tokenizers.get(teacher)
        if tokenizer is not None:
            return Rendering(tokenizer, tokenizer, tools=self.host.tools)
        own = self.host.rendering
        return Rendering(own.tokenizer, own.tokenizer, tools=own.tools, chat_template=own.chat_template, options=own.options)

    def ids(self, rows: list[dict[str, Any]]) -> list[list[int]] | None:
        """The ids of each row's `teacher_prompt`, or its `teacher_prompt_ids`; None where no row has either.

        Raises:
            ValueError: rows that lack what others have, or chats for a tokenizer without a chat template.
        """
        if rows and all(row.get(IDS) for row in rows):
            return [list(row[IDS]) for row in rows]
        rows = self._asked(rows)
        have = [bool(row.get(COLUMN)) for row in rows]
        if not any(have):
            if self.expected:
                raise ValueError("a row without a teacher_prompt arrived, where others have one: give it one, or leave it out.")
            return None
        if not all(have) or len({isinstance(row[COLUMN], str) for row in rows}) > 1:
            raise ValueError("rows with and without a teacher_prompt, or texts and chats, arrived together: make them alike.")
        names = self.teachers(rows)
        found: list[list[int]] = [[]] * len(rows)
        each: list[str | None] = [None] if names is None else list(dict.fromkeys(names))
        for name in each:
            own = [number for number in range(len(rows)) if names is None or names[number] == name]
            for number, ids in zip(own, self._rendered([rows[number] for number in own], name), strict=True):
                found[number] = ids
        return found

    def _asked(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with what the teacher is asked: the prompts themselves, where it reads those in tokens of its own."""
        return [{**row, COLUMN: row["prompt"]} for row in rows] if self.by_prompt else rows

    def _rendered(self, rows: list[dict[str, Any]], teacher: str | None) -> list[list[int]]:
        rendering = self.rendering(teacher)
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
        self._check_ids(rows, found, 0, "the rows that arrived")
        longest = max(map(len, found))
        if self.limit is not None and longest > self.limit:
            raise ValueError(
                f"a teacher_prompt of {longest} tokens arrived but {self.limit} fit: {self.why}. Filter the stream."
            )
        return found

    def both(self, rows: list[dict[str, Any]]) -> tuple[list[list[int]] | None, list[str] | None]:
        """What the teacher reads of a batch, and the names of the rows' teachers; see `of` and `teachers`."""
        return self.of(rows), self.teachers(rows)

    def fit(self, dataset: Any, role: str) -> list[int] | None:
        """The rows of a data set whose prompts for the teacher fit; None where it has none.

        Raises:
            ValueError: one without tokens, or one that is too long unless those are to be dropped; which row.
        """
        lengths: list[int] = []
        same = 0  # rows of which a student that teaches itself reads the same twice
        for start, rows in pieces(dataset):
            rows = self._asked(rows)
            if not {COLUMN, IDS} & rows[0].keys():
                return None
            what = f"the {'prompt' if self.by_prompt else COLUMN} of row {{}} of {role} cannot be rendered for the teacher"
            found = row_by_row(lambda some: self.ids(some) or [], rows, start, what)
            empty = [row for row, ids in enumerate(found, start) if not ids]
            if empty:
                raise ValueError(f"the teacher_prompt of row {empty[0]} of {role} has no tokens: fill it, or drop the row.")
            self._check_ids(rows, found, start, role)
            if not isinstance(rows[0].get(COLUMN), (str, type(None))):
                self._check_fields(rows, start, role)
            same += sum(list(a) == list(b) for a, b in zip(found, self.host.tokenize(rows), strict=True)) if self.itself else 0
            lengths += map(len, found)
        if same and same == len(lengths):
            raise ValueError(
                f"the teacher is the student itself, and in every row of {role} it would read what the student reads: the loss "
                "would be 0. Put more into teacher_prompt, and see that its chat template renders it."
            )
        if same:
            logger.warning(
                "in %d of %d rows of %s the student teaches itself what it reads: they teach nothing.", same, len(lengths), role
            )
        if self.limit is None:
            return list(range(len(lengths)))
        drop = self.host.args.drop_long_prompts
        fitting = fitting_rows(lengths, self.limit, self.why, f"{role} (column {COLUMN})", drop, raising="")
        self.dropped += len(lengths) - len(fitting)
        return fitting

    def _check_ids(self, rows: list[dict[str, Any]], found: list[list[int]], start: int, role: str) -> None:
        """Refuse ids that a row's teacher lacks.

        Raises:
            ValueError: naming the row.
        """
        names = self.teachers(rows)
        for number, ids in enumerate(found):
            size = self.sizes.get(None if names is None else names[number])
            if size is not None and ids and not 0 <= min(ids) <= max(ids) < size:
                raise ValueError(
                    f"the teacher_prompt of row {start + number} of {role} has the id {max(ids)}, and the teacher has {size}: "
                    "it is of another tokenizer than the teacher's."
                )

    def _check_fields(self, rows: list[dict[str, Any]], start: int, role: str) -> None:
        """Refuse turns of which the teacher's chat template renders nothing; asked once a set of roles.

        Raises:
            ValueError: naming the row.
        """
        names = self.teachers(rows)
        for number, row in enumerate(rows):
            name = None if names is None else names[number]
            seen = name, frozenset(str(turn.get("role")) for turn in row[COLUMN])
            if seen in self._seen:
                continue
            self._seen.add(seen)
            asked = {"prompt": row[COLUMN], "chat_template_kwargs": {**options_of(row), **self.options}}
            lost = [part for part in self.rendering(name).unused(asked) if part.startswith("the turns of")]
            if lost:
                raise ValueError(
                    f"the teacher_prompt of row {start + number} of {role}: the teacher's chat template renders nothing of "
                    f"{', '.join(lost)}. Put their text into turns that it renders."
                )

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a stream's row fits; one that does not is counted."""
        found = self.ids([row])
        fits = found is None or self.limit is None or len(found[0]) <= self.limit
        self.dropped += not fits
        return fits
