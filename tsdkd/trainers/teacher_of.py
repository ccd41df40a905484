"""The teacher of a run, in its place: loaded, recorded, served, or the student itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tsdkd.teachers import RecordedTeacher, Teacher, vocabulary_size
from tsdkd.teachers.itself import SelfTeacher
from tsdkd.teachers.placing import Request, place
from tsdkd.trainers.host import once_a_run, teacher_rows
from tsdkd.trainers.models import check_same_tokens
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.sources import load_sharded_teacher, load_teacher, tokenizer_of_teacher

logger = once_a_run(__name__)


@dataclass(frozen=True)
class Here:
    """A run's teacher.

    Attributes:
        teacher: what gives its hidden states; None without one.
        model: its model in this process, if any.
        tokenizer: the one that it comes with, if one does.
        vocab_size: the ids that both models have.
    """

    teacher: Teacher | None
    model: Any
    tokenizer: Any
    vocab_size: int


def teacher_of(trainer: Any, setup: Setup) -> Here:
    """The teacher that a trainer's setup asks for.

    Raises:
        ValueError: one that cannot be placed, tokenizers that disagree, or another student's recording.
    """
    args, recording, device = setup.args, setup.recording, trainer.accelerator.device
    own = vocabulary_size(trainer.model)
    reading: dict[str, Any] = {"batch_size": teacher_rows(args), "device": device, "autocast": trainer.accelerator.autocast}
    if recording is not None:
        size = _shared(trainer, own, recording.head.size, recording.vocabulary)
        recording.check_rows(trainer.tokenize)
        return Here(RecordedTeacher(recording, device), None, None, size)
    if setup.teacher is None:
        return Here(None, None, None, own)  # without any teacher the student's own vocabulary
    if setup.teaches_itself:
        how: dict[str, Any] = {"how": args.self_teacher, "decay": args.ema_decay, "step": lambda: trainer.step}
        return Here(SelfTeacher(trainer.model, trainer.student, **how, **reading), None, None, own)
    request = Request(
        model=setup.teacher,
        load=lambda name: load_teacher(name, args),
        load_shares=lambda model: load_sharded_teacher(model, args),
        student_dtype=trainer.model.get_output_embeddings().weight.dtype,
        low_precision=bool(args.bf16),
        urls=tuple(args.teacher_urls or ()),
        revision=args.teacher_model_revision,
        trust_remote_code=args.trust_remote_code,
        **reading,
    )
    placed = place(args.teacher_placement, request)
    tokenizer = tokenizer_of_teacher(placed.source, args)
    size = _shared(trainer, own, placed.vocab_size, None if tokenizer is None else tokenizer.get_vocab())
    placed.check(trainer.tokenizer, size)
    return Here(placed.teacher, placed.model, tokenizer, size)


def _shared(trainer: Any, own: int, theirs: int, vocabulary: dict[str, int] | None) -> int:
    """The ids that both models have; tokenizers that disagree on them are refused."""
    size = min(own, theirs)
    if vocabulary is None:
        logger.warning("the teacher comes without a tokenizer: whether it agrees with the student's is not checked.")
    else:
        check_same_tokens(trainer.tokenizer.get_vocab(), vocabulary, size, trainer.args.token_aliases)
    return size
