"""The two models of a run: how a teacher is loaded, what a model is called, whether two vocabularies agree."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import AutoModelForCausalLM

from tsdkd.trainers.config import TokenDistillConfig


def load_teacher(name: str, args: TokenDistillConfig) -> Any:
    """A teacher in the dtype of its checkpoint, unless `teacher_model_init_kwargs` says otherwise."""
    kwargs = dict(args.teacher_model_init_kwargs or {})
    kwargs.setdefault("dtype", "auto")
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def fingerprint_of(model: Any) -> str:
    """A short digest of a model's shape and of some of its weights."""
    weight = model.get_input_embeddings().weight.detach()
    config = model.config.get_text_config()
    shape = [config.model_type, list(weight.shape), getattr(config, "num_hidden_layers", None)]
    some = weight[:: max(1, len(weight) // 16), :8].float().cpu().numpy().tobytes()
    return hashlib.sha256(json.dumps(shape).encode() + some).hexdigest()[:16]


def name_of(model: Any) -> str:
    """A model's name for messages."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def check_same_tokens(ours: dict[str, int], theirs: dict[str, int], vocab_size: int) -> None:
    """Refuse two vocabularies that give one id to different tokens, or one token different ids, among the shared ids.

    Raises:
        ValueError: showing such a token.
    """
    our_ids = {i: token for token, i in ours.items() if i < vocab_size}
    for token, i in sorted(theirs.items(), key=lambda item: item[1]):
        if i < vocab_size and our_ids.get(i, token) != token:
            raise ValueError(
                f"the tokenizers disagree: id {i} is {our_ids[i]!r} for the student but {token!r} for the teacher. "
                "Distillation compares next-token distributions id by id, so both models must share one tokenizer: pick a "
                "teacher of the student's family."
            )
        if token in ours and ours[token] != i and min(i, ours[token]) < vocab_size:
            raise ValueError(
                f"the tokenizers disagree: {token!r} is id {ours[token]} for the student but {i} for the teacher. Pick a "
                "teacher of the student's family."
            )
