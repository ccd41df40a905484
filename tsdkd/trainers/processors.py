"""Part of the seam: how TRL's trainer asks its tokenizer or its multimodal processor."""

from __future__ import annotations

from typing import Any

import torch
from trl import DistillationTrainer

from tsdkd.data.rendering import Rendering
from tsdkd.trainers.vision import messages, places_of_images, vision_of


def _asked(trainer: Any, rows: list[dict[str, Any]]) -> Any:
    """Ids, images and what else a processor gives of rows with chats."""
    return DistillationTrainer._tokenize_prompts(trainer, [messages(row) for row in rows])


def eos_ids_of(trainer: Any) -> list[int]:
    """The ids that end a completion and that both models have, the tokenizer's own first."""
    own = trainer._tokenizer.eos_token_id  # a list may begin with an end that the model never writes
    return sorted((end for end in trainer.eos_token_ids if end < trainer.vocab_size), key=lambda end: end != own)


def unknown_ids_of(trainer: Any) -> list[int]:
    """Ids that no completion may hold."""
    known = set(trainer._tokenizer.get_vocab().values()) - places_of_images(trainer.model.config)
    return [i for i in range(trainer.vocab_size) if i not in known]


def rendering_of(trainer: Any) -> Rendering:
    """How rows become ids; a processor wants content in parts, and gives more than ids."""
    return Rendering(
        trainer.processing_class,
        trainer._tokenizer,
        lambda: trainer.eos_ids,
        tools=trainer.tools,
        chat_template=trainer.chat_template,
        options=trainer.chat_template_kwargs,
        multimodal=(lambda rows: _asked(trainer, rows)[0]) if trainer._is_vlm else None,
    )


def seen_by(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]] | None:
    """`Rollouts.vision` of rows."""
    options = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    return vision_of(rows, trainer.processing_class, **options) if trainer._is_vlm else None


def drawn_of(trainer: Any, rows: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The images of rows, and what TRL's generation takes beside their ids."""
    if not trainer._is_vlm or isinstance(rows[0]["prompt"], str):
        return None, {}
    return _asked(trainer, rows)[1:]
