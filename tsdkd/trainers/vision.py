"""Prompts with images: how a multimodal model's processor is asked, and what both models read beside the ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from tsdkd.checks import Problem
from tsdkd.data.prompts import IMAGES, are_chats
from tsdkd.data.rendering import chat_of
from tsdkd.data.teacher_prompts import has_teacher_prompts
from tsdkd.teachers.heads import reads_images
from tsdkd.trainers.setup import Setup

_OF_TEXT = ("input_ids", "attention_mask")


def places_of_images(config: Any) -> set[int]:
    """The ids that stand for images and videos in a prompt, which no completion may hold: there is nothing for them."""
    named = (getattr(config, f"{kind}_token_{what}", None) for kind in ("image", "video") for what in ("id", "index"))
    return {int(token) for token in named if token is not None} if reads_images(config) else set()


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's chat with its images in it, as a processor takes it.

    Raises:
        ValueError: other than one image for each place of one.
    """
    images = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    return prepare_multimodal_messages(chat_of(row["prompt"]), images=list(images))


def prepared(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose images are in its chat."""
    if isinstance(row["prompt"], str):
        return row
    return {**{name: value for name, value in row.items() if name not in IMAGES}, "prompt": messages(row)}


def refuse_images_of_tools(images: Sequence[Any] | None) -> None:
    """Refuse images that tools answered with: they would stand among the completion's tokens.

    Raises:
        ValueError: saying so.
    """
    if images and any(images):
        raise ValueError("a tool answered with an image, and a completion's tokens are texts here: let it answer with a text.")


def vision_of(rows: Sequence[dict[str, Any]], processor: Any, **options: Any) -> list[dict[str, torch.Tensor]] | None:
    """What both models read of each row beside its ids; None where no row has an image.

    A row by itself, so that each keeps its own however a step is split.
    """
    if not rows or isinstance(rows[0]["prompt"], str):
        return None
    chats = [messages(row) for row in rows]
    with_image = [any(part["type"] == "image" for turn in chat for part in turn.get("content") or ()) for chat in chats]
    if not any(with_image):
        return None
    asked: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    made = []
    for chat, has_one in zip(chats, with_image, strict=True):
        found = processor.apply_chat_template(conversation=[chat], **asked, **options) if has_one else {}
        made.append({name: value for name, value in found.items() if name not in _OF_TEXT})
    return made


def images_can_be_read(setup: Setup) -> Iterator[Problem]:
    """Images reach both models."""
    if not setup.sees:
        return  # of a student that reads text alone it is told with the prompts
    given = setup.with_images
    where = given[0]
    for role in given:
        if not are_chats(setup.sets[role]):
            yield Problem(
                f"{role} has images, and its prompts are texts",
                "a chat says where an image stands",
                "make them chats: prompt_as_chat, or [{'role': 'user', 'content': text}]",
            )
    parts = setup.apart.values() if setup.teacher is not None else ()
    for part in parts:
        if not reads_images(part.teacher_config):
            yield Problem(
                f"{where} has images, and the teacher reads text alone",
                "both models read one prompt",
                "take a multimodal teacher of the student's family",
            )
        elif places_of_images(part.teacher_config) != places_of_images(setup.student_config):
            yield Problem(
                f"{where} has images, and student and teacher have other ids for the place of one",
                "both read one prompt's ids",
                "take a teacher of the student's family",
            )
        if part.args.teacher_placement == "server":
            yield Problem(
                f"{where} has images, and teacher_placement=server",
                "a server is asked with ids alone",
                "use teacher_placement=local, swap or zero3",
            )
    if setup.args.padding_free:
        yield Problem(f"{where} has images, and padding_free", "it is for texts alone", "leave one of them out")
    if any(map(has_teacher_prompts, setup.sets.values())):
        yield Problem(
            f"{where} has images, and a teacher_prompt", "the teacher's own prompts are texts", "leave one of them out"
        )
    if setup.rollouts.need_dataset or setup.rollouts.writer != "student" or setup.method.alignment:
        yield Problem(
            f"{where} has images, and {setup.method.name} trains on given completions, on some that both models write, or "
            "across tokenizers",
            "those are texts here",
            "use a method on the student's own completions",
        )
