"""The two models of a run: how a teacher is loaded, what a model is called, whether two vocabularies agree."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsdkd.fused import check_divergence_once
from tsdkd.methods import Method
from tsdkd.teachers import gathered
from tsdkd.teachers.zero3 import zero3_config
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.loading import loading_under, restore_buffers
from tsdkd.types import DivergenceTerm, RankingTerm

logger = logging.getLogger(__name__)


def _teacher_kwargs(args: TokenDistillConfig) -> dict[str, Any]:
    """What `from_pretrained` is told: the dtype of the checkpoint, unless `teacher_model_init_kwargs` names one."""
    kwargs = dict(args.teacher_model_init_kwargs or {})
    kwargs.setdefault("dtype", "auto")
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return kwargs


def _source(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of a teacher's arguments says which checkpoint is read, for its configuration and its tokenizer."""
    return {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}


def model_config(name: str, args: TokenDistillConfig) -> Any:
    """The configuration of a student that is not loaded yet."""
    given = args.model_init_kwargs or {}
    options = {key: given[key] for key in ("revision",) if key in given}
    return AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)


def load_teacher(name: str, args: TokenDistillConfig) -> Any:
    """A teacher, whole in this process whatever the student runs under."""
    with loading_under(None):
        return AutoModelForCausalLM.from_pretrained(name, **_teacher_kwargs(args))


def load_sharded_teacher(model: Any, args: TokenDistillConfig) -> tuple[Any, dict[str, Any]]:
    """A teacher of which each process holds a share, if it comes by name, and the DeepSpeed configuration it runs under.

    Raises:
        ValueError: quantized weights, which ZeRO-3 cannot shard.
    """
    kwargs, named = _teacher_kwargs(args), isinstance(model, str)
    if named:
        config = AutoConfig.from_pretrained(model, **_source(kwargs))
    else:
        config = model.config
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        raise ValueError(
            "teacher_placement=zero3 was asked for a quantized teacher, whose weights DeepSpeed cannot shard: load it "
            "unquantized, or use teacher_placement=local."
        )
    dtype = kwargs["dtype"] if named else model.dtype
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    deepspeed_config = zero3_config(args.teacher_deepspeed, dtype, args.teacher_cpu_offload)
    if named:
        with loading_under(deepspeed_config):
            model = AutoModelForCausalLM.from_pretrained(model, **{**kwargs, "dtype": dtype})
        restore_buffers(model, dtype)
    return model, deepspeed_config


def fingerprint_of(model: Any) -> str:
    """A short digest of a model's shape and of some of its weights."""
    parameter = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    with gathered(parameter):
        weight = parameter.detach()
        shape = [config.model_type, list(weight.shape), getattr(config, "num_hidden_layers", None)]
        some = weight[:: max(1, len(weight) // 16), :8].float().cpu().numpy().tobytes()
    return hashlib.sha256(json.dumps(shape).encode() + some).hexdigest()[:16]


def name_of(model: Any) -> str:
    """A model's name for messages."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def vocabulary_of(source: str, args: TokenDistillConfig) -> dict[str, int] | None:
    """The tokens of the tokenizer that comes with the teacher's checkpoint, in the revision of its weights, if one does."""
    if not source:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_source(_teacher_kwargs(args)))
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer could be read from %r: %s", source, str(error).splitlines()[0])
        return None
    return tokenizer.get_vocab()


def tell_lost_updates(model: Any, learning_rate: float) -> None:
    """Warn where a step of AdamW, about the learning rate, is mostly less than half a unit of the weights' own dtype."""
    low = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) and p.numel()]
    if not low:
        return
    weight = max(low, key=torch.numel).detach()
    typical = weight.flatten()[:: max(1, weight.numel() // 10_000)].abs().float().median().item()
    if learning_rate < typical * torch.finfo(weight.dtype).eps / 2:
        logger.warning(
            "the student's weights are %s, whose unit at a typical weight (%.2g) is %.1g: most updates of about the "
            "learning rate, %g, round to nothing. Load the student in float32 (dtype=torch.float32; mixed precision is "
            "bf16=True, and a name in place of a model is loaded so), or train an adapter.",
            weight.dtype,
            typical,
            typical * torch.finfo(weight.dtype).eps,
            learning_rate,
        )


def check_special_ids(tokenizer: Any, ends: list[int], rows: int, vocab_size: int) -> None:
    """Refuse a padding token without a row in the student, and a student none of whose ends both models have.

    Args:
        ends: the ids that end a completion.
        rows: of the student's embedding.
        vocab_size: the ids that both models have.

    Raises:
        ValueError: naming the token.
    """
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        raise ValueError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} is id {pad}, but the student has {rows} rows: generation "
            "would read one that is not there. Set tokenizer.pad_token to a token that it has, or resize the embedding "
            "(model.resize_token_embeddings(len(tokenizer)))."
        )
    if all(end >= vocab_size for end in ends):
        named = ", ".join(f"{tokenizer.decode([end])!r} (id {end})" for end in ends)
        raise ValueError(
            f"no completion could end: of the {vocab_size} ids that both models have none is an end of the student's, which "
            f"are {named}, and ids beyond are never sampled. Take a teacher of its family, or an end that both have "
            "(generation_config.eos_token_id)."
        )


def names_of(setup: Any) -> dict[str, str]:
    """What student and teacher of a `Setup` are called in messages."""

    def named(model: Any) -> str:
        return model if isinstance(model, str) else name_of(model)

    teacher = "none" if setup.teacher is None else named(setup.teacher)
    return {"student": named(setup.student), "teacher": teacher if setup.recording is None else "a recording"}


def check_terms(method: Method, vocab_size: int, device: torch.device) -> None:
    """Refuse a method's terms that the shared vocabulary does not allow.

    Raises:
        ValueError: more candidates than there are ids, or a divergence that two rows show to be none.
    """
    for term in method.objective().active:
        if isinstance(term, RankingTerm) and term.num_candidates > vocab_size:
            raise ValueError(
                f"num_candidates={term.num_candidates} but the two models share {vocab_size} tokens: pass {vocab_size} or "
                "fewer."
            )
        if isinstance(term, DivergenceTerm):
            check_divergence_once(term.divergence, vocab_size, device)


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
