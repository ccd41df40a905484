"""One of several students: its model, and paths as it reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tsdkd.pipelines.students import load_student, lora_config, prompt_ids, tokenizer_of
from tsdkd.teachers.heads import check_head, head_of, last_hidden_state


@dataclass(frozen=True)
class Tokens:
    """A path as one student reads it: prompt and path with its end, and the characters of the path's own tokens."""

    prompt: list[int]
    path: list[int]
    spans: list[tuple[int, int]]


class Learner(nn.Module):
    """One of the students.

    Args:
        name: of a model, or its folder.
        lora_r, four_bit: see `QRTraining`.
        device: where it is.
    """

    def __init__(self, name: str, lora_r: int, device: torch.device, four_bit: bool = False) -> None:
        super().__init__()
        self.name, self.device, self.four_bit = name, device, four_bit
        self.tokenizer = tokenizer_of(name)
        model = load_student(name, device, four_bit)
        if (adapter := lora_config(lora_r)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
        self.in_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        if device.type == "cuda":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model
        config = model.config.get_text_config()
        self.width, self.context = config.hidden_size, int(getattr(config, "max_position_embeddings", None) or 10**9)
        check_head(model, "student", config.vocab_size)

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokens]:
        """Questions and paths as ids."""
        tokenizer = self.tokenizer
        made = []
        for row, prompt in zip(rows, prompt_ids(tokenizer, [row["question"] for row in rows]), strict=True):
            found = tokenizer(row["path"], add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
            spans = [tuple(span) for span in found["offset_mapping"]] if tokenizer.is_fast else []
            made.append(Tokens(prompt, [*found["input_ids"], tokenizer.eos_token_id], spans))
        return made

    def read(self, rows: Sequence[Tokens]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Each path's mean loss, `[rows]`, and the last hidden states of its own tokens, `[its tokens, width]`."""
        texts = [row.prompt + row.path for row in rows]
        longest = max(map(len, texts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=self.device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            hidden = last_hidden_state(self.model, ids, mask)
        head, losses, states = head_of(self.model), [], []
        for number, row in enumerate(rows):
            start = len(row.prompt)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
                logits = head.logits(hidden[number, start - 1 : start - 1 + len(row.path)]).float()
            losses.append(nn.functional.cross_entropy(logits, ids[number, start : start + len(row.path)]))
            states.append(hidden[number, start : start + len(row.path) - 1])
        return torch.stack(losses), states

    def whole(self) -> Any:
        """The trained model; of one in 4 bits the same in whole numbers, so that what is saved is what was trained."""
        if not self.four_bit:
            return self.model
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            base = load_student(self.name, self.device, four_bit=True).dequantize()
            return PeftModel.from_pretrained(base, folder)


def check_alignment(how: str, tokenizers: Sequence[Any]) -> None:
    """Refuse an alignment (see `mutual.aligned`) that students' tokenizers do not allow.

    Raises:
        ValueError: what to take instead.
    """
    if how == "characters" and not all(tokenizer.is_fast for tokenizer in tokenizers):
        raise ValueError("alignment: characters needs fast tokenizers, which know their tokens' characters: take mean.")
    if how == "tokens" and any(tokenizer.get_vocab() != tokenizers[0].get_vocab() for tokenizer in tokenizers):
        raise ValueError("alignment: tokens is for students of one tokenizer, and theirs differ: take characters or mean.")
