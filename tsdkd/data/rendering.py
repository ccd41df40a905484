"""Rows to ids: how a prompt is put, and what begins and ends a text. Every path asks here: rollouts by transformers and vLLM,
the teacher's writing, given completions, corpora and problems that are scored."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tsdkd.data.completions import clean, clean_turn, completion_text, completion_turn, has_text, ids_after

# An opening tag of reasoning at the end of a prompt, and what closes it.
_OPENED = re.compile(r"[<\[]([A-Za-z_]\w*)[>\]]\s*$")
_REASONING = re.compile(r"think|thought|reason|reflect|scratch", re.IGNORECASE)
_TURNS = "the turns of"
_PLAIN = {"role", "content"}


def chat_of(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat as a template takes it: without keys that hold None, and text given in parts joined."""
    return [clean_turn(turn) for turn in turns]


def _unpacked(row: dict[str, Any], name: str) -> Any:
    """A row's value, or the one that its text is the JSON of."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"its {name} are a text that is no JSON ({error})") from error


def options_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row's `chat_template_kwargs`, a mapping or one as JSON.

    Raises:
        ValueError: neither.
    """
    options = _unpacked(row, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"its chat_template_kwargs are {type(options).__name__}, and a template takes a mapping")
    return clean(options)


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """A row's tools: a list of JSON schemas, or one as JSON; None where it has none.

    Raises:
        ValueError: neither.
    """
    tools = _unpacked(row, "tools")
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"its tools are {type(tools).__name__}, and a template takes a list of JSON schemas")
    return list(tools) if isinstance(row["tools"], str) else clean(tools)


class Rendering:
    """A tokenizer and how it is asked.

    Args:
        processor: what tokenizes, a tokenizer or a multimodal model's processor.
        tokenizer: the tokenizer in it.
        ends: gives the ids that end a completion, the one that a given completion gets first; None: the tokenizer's end.
        tools, chat_template, options: of every chat, where a row names none of its own.
        multimodal: from rows with chats to their ids, images in them, in place of `processor`'s chat template.
    """

    def __init__(
        self,
        processor: Any,
        tokenizer: Any,
        ends: Callable[[], Sequence[int]] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
        multimodal: Callable[[list], list[list[int]]] | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, tokenizer
        self.ends = ends or (lambda: [tokenizer.eos_token_id])
        self.tools, self.chat_template, self.options = tools or None, chat_template, dict(options or {})
        self.multimodal = multimodal

    # ------------------------------------------------------------------ what begins and ends a text

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after every text by itself."""
        bare, framed = (list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        return [], []

    def _text_ids(self, texts: list[str], is_prompt: bool) -> list[list[int]]:
        """Texts with the tokenizer's own beginning, once; a prompt without the end that it appends."""
        begin, end = self.frame
        made = []
        for ids in self.processor(text=texts)["input_ids"]:
            ids = list(ids)
            if begin and ids[: 2 * len(begin)] == 2 * begin:  # the text was rendered with it
                ids = ids[len(begin) :]
            if is_prompt and end and ids[-len(end) :] == end:
                ids = ids[: -len(end)]
            made.append(ids)
        return made

    def texts(self, texts: list[str]) -> list[list[int]]:
        """Plain texts, as a language model reads them."""
        return self._text_ids(texts, is_prompt=False)

    # ------------------------------------------------------------------ prompts

    def prompts(self, rows: Sequence[Any]) -> list[list[int]]:
        """Prompts as they are generated from; of rows with `prompt` (and `tools`, `chat_template_kwargs`), or bare."""
        rows = [_row(row) for row in rows]
        if not rows or isinstance(rows[0]["prompt"], str):
            return self._text_ids([row["prompt"] for row in rows], is_prompt=True)
        if self.multimodal is not None:
            if any(tools_of(row) or row.get("chat_template_kwargs") for row in rows):
                raise ValueError(
                    "tools and chat_template_kwargs of a row cannot be passed on to a multimodal model's processor"
                )
            return self.multimodal(list(rows))
        return self._chats([(chat_of(row["prompt"]), row) for row in rows], add_generation_prompt=True)

    def _chats(self, chats: Sequence[tuple[list, dict[str, Any]]], **how: Any) -> list[Any]:
        """Ids of chats (`tokenize=False`: texts), those alike in tools and options in one call."""
        how = {"tokenize": True, "return_dict": True, **how}
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for number, (_, row) in enumerate(chats):
            own = {"tools": tools_of(row), **options_of(row)}
            groups.setdefault(json.dumps(own, sort_keys=True, default=str), (own, []))[1].append(number)
        made: list[Any] = [None] * len(chats)
        for own, numbers in groups.values():
            asked = {"chat_template": self.chat_template, **self.options, **own, "tools": own["tools"] or self.tools}
            found = self.processor.apply_chat_template(conversation=[chats[i][0] for i in numbers], **asked, **how)
            for number, ids in zip(numbers, found["input_ids"] if how["tokenize"] else found, strict=True):
                made[number] = ids
        return made

    def unused(self, row: dict[str, Any]) -> list[str]:
        """What of a chat's row the template renders nothing of: `tools`, or fields of turns."""
        if isinstance(row["prompt"], str) or self.multimodal is not None:
            return []
        turns = chat_of(row["prompt"])
        if not isinstance(row.get("completion"), str) and has_text(row.get("completion")):
            turns = [*turns, completion_turn(row["completion"])]
        fields = sorted({key for turn in turns for key in turn} - _PLAIN)
        variants = {name: ([{k: v for k, v in turn.items() if k != name} for turn in turns], row) for name in fields}
        if tools_of(row):
            variants["tools"] = (turns, {**row, "tools": None})
        found = [name for name, (chat, with_) in variants.items() if self._same(turns, row, chat, with_)]
        for role in dict.fromkeys(turn["role"] for turn in turns):
            at = next((i for i, turn in enumerate(turns) if turn["role"] == role and turn.get("content")), None)
            if at is not None and len(turns) > 1 and self._same(turns, row, turns[:at] + turns[at + 1 :], row):
                found.append(f"{_TURNS} {role!r}")
        return found

    def _same(self, turns: list, row: dict[str, Any], others: list, other_row: dict[str, Any]) -> bool:
        """Whether a chat and another are rendered alike; not where the other is not taken."""
        (whole,) = self._chats([(turns, row)], tokenize=False)
        try:
            (other,) = self._chats([(others, other_row)], tokenize=False)
        except Exception:  # a template may raise anything for a chat that is cut
            return False
        return whole == other

    # ------------------------------------------------------------------ given completions

    def completions(self, rows: Sequence[Any], completions: Sequence[Any], limit: int) -> list[tuple[list[int], bool]]:
        """The ids of given completions after their prompts, and whether each was cut to `limit`.

        Raises:
            ValueError: a completion that cannot be put behind its prompt.
        """
        rows, ends = [_row(row) for row in rows], list(self.ends())
        prompts = self.prompts(rows)
        if isinstance(rows[0]["prompt"], str):
            texts = [self._text_behind(row["prompt"], c) for row, c in zip(rows, completions, strict=True)]
            alone = self.processor(text=texts, add_special_tokens=False)["input_ids"]
            joined = [row["prompt"] + text for row, text in zip(rows, texts, strict=True)]
            parts = zip(prompts, self.texts(joined), alone, strict=True)
            return [ids_after(prompt, whole, bare, ends, limit) for prompt, whole, bare in parts]
        turns = [completion_turn(completion) for completion in completions]
        chats = [chat_of(row["prompt"]) for row in rows]
        wholes = self._chats([([*chat, turn], row) for chat, turn, row in zip(chats, turns, rows, strict=True)])
        made = []
        for prompt, whole, chat, turn, row in zip(prompts, wholes, chats, turns, rows, strict=True):
            bare: Sequence[int] = []
            if list(whole[: len(prompt)]) != list(prompt) or len(whole) <= len(prompt):
                bare = self.processor(text=[self._behind(chat, turn, row)], add_special_tokens=False)["input_ids"][0]
            made.append(ids_after(prompt, whole, bare, ends, limit))
        return made

    def _text_behind(self, prompt: str, completion: Any) -> str:
        """A completion's text behind a text: without the tag of reasoning that the prompt opens."""
        turn = completion_turn(completion)
        if turn.get("tool_calls"):
            raise ValueError("it calls tools, which a chat template renders and a text prompt has none: make its prompt a chat")
        opened = _OPENED.search(prompt)
        text = completion_text(completion)
        return continued(prompt, text) if opened is not None and _REASONING.search(opened.group()) else text

    def _behind(self, chat: list, turn: dict[str, Any], row: dict[str, Any]) -> str:
        """What of a turn follows the prompt, where the ids of the whole do not begin with the prompt's: a merge across the
        boundary, or a template that renders a past turn differently from one that is being written."""
        (before,) = self._chats([(chat, row)], tokenize=False, add_generation_prompt=True)
        (whole,) = self._chats([([*chat, turn], row)], tokenize=False)
        if whole.startswith(before):
            return whole[len(before) :]
        more = sorted(set(turn) - _PLAIN)
        if more:
            raise ValueError(
                f"the chat template renders a past turn differently from one that is being written, so that its "
                f"{', '.join(more)} cannot be put behind the prompt: put all that is to be trained on into its content"
            )
        text, opened = completion_text([turn]), _OPENED.search(before)
        if opened is not None and continued(before, text) == text and _closing(opened) not in text:
            raise ValueError(
                f"the chat template opens {opened.group().strip()} for the model to go on with, and the completion has no "
                f"{_closing(opened)}: give its reasoning, too, or have the template open nothing (chat_template_kwargs, e.g. "
                "enable_thinking=False)"
            )
        return continued(before, text)


def continued(before: str, text: str) -> str:
    """A completion's text without the opening tag that its prompt ends in already.

    Example:
        >>> continued("Q<think>\\n", "<think>\\n1+1</think>2"), continued("Q", "<think>1</think>2")
        ('1+1</think>2', '<think>1</think>2')
    """
    opened = _OPENED.search(before)
    if opened is None:
        return text
    tag, space = opened.group().rstrip(), opened.group()[len(opened.group().rstrip()) :]
    stripped = text.lstrip()
    return stripped.removeprefix(tag).removeprefix(space) if stripped.startswith(tag) else text


def _closing(opened: re.Match) -> str:
    tag = opened.group().rstrip()
    return f"{tag[0]}/{tag[1:]}"


def _row(row: Any) -> dict[str, Any]:
    return row if isinstance(row, dict) else {"prompt": row}
