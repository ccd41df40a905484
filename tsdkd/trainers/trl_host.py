"""The base of the one subclass of TRL's trainer: what the collaborators ask of it (`Host`), in TRL's own names."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from trl import DistillationTrainer

from tsdkd.data.rendering import Rendering
from tsdkd.teachers import gathered
from tsdkd.trainers.engines import Generation
from tsdkd.trainers.vision import messages, places_of_images, vision_of


class TRLHost(DistillationTrainer):
    """Meets `Host`."""

    generation: Generation
    vocab_size: int

    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def training(self) -> bool:
        return self.is_in_train

    @property
    def step(self) -> int:
        return self.state.global_step

    @property
    def micro_step(self) -> int:
        return self._step % self.args.gradient_accumulation_steps

    @property
    def max_steps(self) -> int:
        return self.state.max_steps

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def eos_ids(self) -> list[int]:
        own = self._tokenizer.eos_token_id  # a list may begin with an end that the model never writes
        return sorted((end for end in self.eos_token_ids if end < self.vocab_size), key=lambda end: end != own)

    @property
    def unknown_ids(self) -> list[int]:
        known = set(self._tokenizer.get_vocab().values()) - places_of_images(self.model.config)
        return [i for i in range(self.vocab_size) if i not in known]

    @functools.cached_property
    def rendering(self) -> Rendering:
        alone = super()._tokenize_prompts  # a processor wants content in parts, and gives more than ids
        return Rendering(
            self.processing_class,
            self._tokenizer,
            lambda: self.eos_ids,
            tools=self.tools,
            chat_template=self.chat_template,
            options=self.chat_template_kwargs,
            multimodal=(lambda rows: alone([messages(row) for row in rows])[0]) if self._is_vlm else None,
        )

    def tokenize(self, prompts: list) -> list[list[int]]:
        return self.rendering.prompts(prompts)

    def vision(self, rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]] | None:
        options = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        return vision_of(rows, self.processing_class, **options) if self._is_vlm else None

    def drawn(self, rows: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        if not self._is_vlm or isinstance(rows[0]["prompt"], str):
            return None, {}
        return super()._tokenize_prompts([messages(row) for row in rows])[1:]

    def student(self) -> AbstractContextManager[Any]:
        return self.generation.student()

    def rollout_engine(self) -> AbstractContextManager[Any]:
        return self.generation.engine()

    def gathered_heads(self, *models: Any) -> AbstractContextManager[None]:
        heads = [model.get_output_embeddings() for model in models]
        return gathered(*(p for head in heads for p in (head.weight, getattr(head, "bias", None))))

    def any_process(self, flag: bool) -> bool:
        up = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(up, reduction="sum").item())

    def load_weights(self, checkpoint: str) -> None:
        self._load_from_checkpoint(checkpoint)

    def save_now(self) -> None:
        self._save_checkpoint(self.model, trial=None)
