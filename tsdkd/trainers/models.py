"""The two models of a run: whether they can be trained, what they are called, whether their vocabularies agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tsdkd.fused import check_divergence_once
from tsdkd.methods import Method
from tsdkd.rollouts import leftovers
from tsdkd.teachers import gathered, vocabulary_size
from tsdkd.teachers.heads import last_hidden_state, text_config
from tsdkd.trainers.host import once_a_run
from tsdkd.types import DivergenceTerm, RankingTerm

logger = once_a_run(__name__)


def fingerprint_of(model: Any) -> str:
    """A short digest of a model's shape and of some of its weights."""
    parameter = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    with gathered(parameter):
        weight = parameter.detach()
        shape = [config.model_type, list(weight.shape), getattr(config, "num_hidden_layers", None)]
        some = weight[:: max(1, len(weight) // 16), :8].float().cpu().clone().numpy().tobytes()
    return hashlib.sha256(json.dumps(shape).encode() + some).hexdigest()[:16]


def name_of(model: Any) -> str:
    """A model's name for messages."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def check_trainable(student: Any, *teachers: Any) -> None:
    """Refuse a student of which nothing is trained, and one that shares weights with a teacher.

    Raises:
        ValueError: saying why and what to do.
    """
    shared = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in shared for teacher in teachers if teacher is not None for parameter in teacher.parameters()):
        raise ValueError(
            "student and teacher share weights (an adapter and the base object that it sits on?): the teacher is frozen, and "
            "the student with it. Load the teacher separately."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        kind = "an adapter that was loaded to be read" if hasattr(student, "peft_config") else "all its parameters are frozen"
        raise ValueError(
            f"nothing of the student would be trained: {kind}. Load an adapter with PeftModel.from_pretrained(base, folder, "
            "is_trainable=True) or by its folder's name, or set requires_grad."
        )


def give_end(processor: Any, model: Any) -> None:
    """Let a tokenizer without an end have the one that the student's generation_config names.

    Raises:
        ValueError: it names none either.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or tokenizer.eos_token_id is not None:
        return
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the student's generation_config names an end token, so that no completion could end: "
            "set tokenizer.eos_token."
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def check_template(tokenizer: Any, has_chats: bool, name: str) -> None:
    """Refuse chats without a template.

    Raises:
        ValueError: saying what to do.
    """
    if has_chats and tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are chats but the tokenizer of {name} has no chat template: set tokenizer.chat_template, use an "
            "instruct model's tokenizer (processing_class=...), or pass the prompts as text."
        )


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
    named = lambda model: model if isinstance(model, str) else name_of(model)  # noqa: E731
    itself = f"the student itself ({setup.args.self_teacher})" if setup.teaches_itself else None
    several = ", ".join(f"{name} {named(one.model)}" for name, one in setup.several.items())
    teacher = itself or several or ("none" if setup.teacher is None else named(setup.teacher))
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
        if isinstance(term, DivergenceTerm) and not term.divergence.own_vocabularies:
            check_divergence_once(term.divergence, vocab_size, device)


def check_same_tokens(
    ours: dict[str, int], theirs: dict[str, int], vocab_size: int, aliases: Mapping[str, str] | None = None
) -> None:
    """Refuse two vocabularies that give one id to different tokens, or one token different ids, among the shared ids.

    Args:
        ours, theirs: tokens to ids, the student's and the teacher's.
        vocab_size: the ids that both models have.
        aliases: of tokens that are the same, the student's name to the teacher's.

    Raises:
        ValueError: showing such a token.
    """
    named = dict(aliases or {})
    for name, other in named.items():
        if name not in ours or other not in theirs:
            who, token = ("student", name) if name not in ours else ("teacher", other)
            raise ValueError(f"token_aliases={{{name!r}: {other!r}}}: the {who} has no token {token!r}; remove that pair.")
    ours = {named.get(token, token): i for token, i in ours.items()}
    our_ids = {i: token for token, i in ours.items() if i < vocab_size}
    for token, i in sorted(theirs.items(), key=lambda item: item[1]):
        if i < vocab_size and our_ids.get(i, token) != token:
            raise ValueError(
                f"the tokenizers disagree: id {i} is {our_ids[i]!r} for the student but {token!r} for the teacher. "
                "Distillation compares next-token distributions id by id, so both models must share one tokenizer: pick a "
                f"teacher of the student's family, or a method across tokenizers (gold, uld). If the two are one token "
                f"renamed, say so: token_aliases={{{our_ids[i]!r}: {token!r}}}."
            )
        if token in ours and ours[token] != i and min(i, ours[token]) < vocab_size:
            raise ValueError(
                f"the tokenizers disagree: {token!r} is id {ours[token]} for the student but {i} for the teacher. Pick a "
                "teacher of the student's family."
            )


def with_whole_path(model: Any) -> Any:
    """A model whose folder, if it was loaded from one by a path from here, is named by its whole path, so that an adapter
    saved on it finds it again."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if name and not Path(name).is_absolute() and (Path(name) / "config.json").is_file():
        model.config._name_or_path = model.name_or_path = str(Path(name).resolve())
    return model


def disable_dropout(model: Any) -> None:
    """Switch off every dropout of a model, of modules and of the shares that layers keep as numbers; say if it still draws.

    TRL's own switches off `nn.Dropout` alone: attention, activations and whole layers are dropped otherwise in many families.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("drop" in name or name == "p_dropout") and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
    was_training = model.training
    model.train()
    ids = (torch.arange(8, device=model.get_input_embeddings().weight.device) * 7 % vocabulary_size(model)).unsqueeze(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = (last_hidden_state(model, ids, torch.ones_like(ids)) for _ in range(2))
    model.train(was_training)
    if not torch.equal(first, second):
        logger.warning(
            "disable_dropout was asked for, and %s still draws at random in training: two passes over one text differ. Set the "
            "share in its configuration to 0 before it is loaded.",
            type(model).__name__,
        )


def tell_student(model: Any, args: Any) -> None:
    """Say what of a student is not as its owner may think: updates that its dtype loses, what its generation_config would add
    to rollouts (they and all scoring do without), a load-balancing loss that is not in the objective."""
    tell_lost_updates(model, args.learning_rate)
    found = leftovers(model)
    if found:
        logger.warning(
            "the student's generation_config also has %s: rollouts and scores here do without. To sample so, pass "
            "repetition_penalty or generation_kwargs.",
            ", ".join(f"{name}={value!r}" for name, value in found.items()),
        )
    config = text_config(model)
    if not args.router_loss_weight and getattr(config, "output_router_logits", False):
        logger.warning(
            "the student's configuration has output_router_logits, and its load-balancing loss is not part of the objective: "
            "set router_loss_weight (its family's router_aux_loss_coef is %s).",
            getattr(config, "router_aux_loss_coef", None),
        )
