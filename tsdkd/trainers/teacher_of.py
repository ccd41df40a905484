"""The teacher of a run, in its place: loaded, recorded, served, or the student itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from tsdkd.checks import refuse
from tsdkd.teachers import RecordedTeacher, Teacher, vocabulary_size
from tsdkd.teachers.average import AverageTeacher
from tsdkd.teachers.itself import SelfTeacher
from tsdkd.teachers.placing import Placed, Request, place
from tsdkd.teachers.several import SeveralTeachers
from tsdkd.trainers.crossing import Crossing, crossing_problems, end_of
from tsdkd.trainers.host import most_of, once_a_run, teacher_batches
from tsdkd.trainers.models import check_same_tokens
from tsdkd.trainers.room import Room
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.sources import load_sharded_teacher, load_teacher, tokenizer_of_teacher

logger = once_a_run(__name__)


@dataclass(frozen=True)
class Here:
    """A run's teacher, or its teachers by name; one alone has the name None.

    Attributes:
        teacher: what gives hidden states; None without one.
        vocab_size: the ids that all models have.
        models: those in this process.
        tokenizers: those that teachers come with; None of one without.
        sizes: the ids that each teacher has; none of a recording.
        crossing: of one teacher of another tokenizer.
    """

    teacher: Teacher | None
    vocab_size: int
    models: Mapping[str | None, Any] = field(default_factory=dict)
    tokenizers: Mapping[str | None, Any] = field(default_factory=dict)
    sizes: Mapping[str | None, int] = field(default_factory=dict)
    crossing: Crossing | None = None

    @property
    def model(self) -> Any:
        """The only teacher's, if it is in this process."""
        return self.models.get(None)


def teacher_of(trainer: Any, setup: Setup, room: Room | None = None) -> Here:
    """The teacher that a trainer's setup asks for.

    Raises:
        ValueError: one that cannot be placed, tokenizers that disagree, or another student's recording.
    """
    room = room or Room(trainer, setup.args.swap_optimizer)
    if setup.several:
        alone = {str(name): teacher_of(trainer, part, room) for name, part in setup.apart.items()}
        return _several(trainer, alone, room if setup.swaps else nullcontext)
    args, recording, device = setup.args, setup.recording, trainer.accelerator.device
    own = vocabulary_size(trainer.model)
    in_shares = args.teacher_placement == "zero3" or setup.teaches_itself
    batches = teacher_batches(args, trainer.accelerator if in_shares else None)
    reading: dict[str, Any] = {"batch_size": batches, "device": device, "autocast": trainer.accelerator.autocast}
    if recording is not None:
        size = _shared(trainer, own, recording.head.size, recording.vocabulary)
        recording.check_rows(trainer.tokenize)
        return Here(RecordedTeacher(recording, device), size)
    if setup.teacher is None:
        return Here(None, own)  # without any teacher the student's own vocabulary
    if setup.teaches_itself:
        how: dict[str, Any] = {"how": args.self_teacher, "decay": args.ema_decay, "step": lambda: trainer.step}
        return Here(SelfTeacher(trainer.model, trainer.student, **how, **reading), own, sizes={None: own})
    request = Request(
        model=setup.teacher,
        load=lambda name: load_teacher(name, args),
        load_shares=lambda model: load_sharded_teacher(model, args),
        student_dtype=trainer.model.get_output_embeddings().weight.dtype,
        low_precision=bool(args.bf16),
        urls=tuple(args.teacher_urls or ()),
        revision=args.teacher_model_revision,
        trust_remote_code=args.trust_remote_code,
        room=room,
        **reading,
    )
    placed = place(args.teacher_placement, request)
    tokenizer = tokenizer_of_teacher(placed.source, args)
    models: dict[str | None, Any] = {} if placed.model is None else {None: placed.model}
    found: dict[str, Any] = {"models": models, "tokenizers": {None: tokenizer}, "sizes": {None: placed.vocab_size}}
    if setup.method.alignment and tokenizer is not None and not _agree(trainer, tokenizer, min(own, placed.vocab_size)):
        placed.check(tokenizer, placed.vocab_size)
        context = getattr(setup.teacher_config.get_text_config(), "max_position_embeddings", None)
        refuse(crossing_problems(args, setup.has_tools))
        ends = sorted(trainer.eos_token_ids, key=lambda end: end != trainer.tokenizer.eos_token_id)
        end = end_of(tokenizer, generation_of(placed), setup.has_chats)
        more = ends, context, setup.method.alignment, end, (own, placed.vocab_size)
        return Here(placed.teacher, own, **found, crossing=Crossing(trainer.tokenizer, tokenizer, *more))
    size = _shared(trainer, own, placed.vocab_size, None if tokenizer is None else tokenizer.get_vocab())
    placed.check(trainer.tokenizer, size)
    return Here(placed.teacher, size, **found)


def generation_of(placed: Placed) -> Any:
    """The generation configuration of a teacher, wherever it is; None of one without."""
    if placed.model is not None:
        return getattr(placed.model, "generation_config", None)
    try:
        return GenerationConfig.from_pretrained(placed.source)
    except OSError:
        return None


def _agree(trainer: Any, tokenizer: Any, size: int) -> bool:
    """Whether two tokenizers give the same tokens the same ids, among those that both models have."""
    try:
        check_same_tokens(trainer.tokenizer.get_vocab(), tokenizer.get_vocab(), size, trainer.args.token_aliases)
    except ValueError:
        return False
    return True


def _several(trainer: Any, alone: Mapping[str, Here], room: Callable[[], AbstractContextManager]) -> Here:
    """Several teachers as one, over the ids that all have.

    Raises:
        ValueError: one of them is of another tokenizer.
    """
    strangers = [name for name, here in alone.items() if here.crossing is not None]
    if strangers:
        raise ValueError(
            f"the teacher {strangers[0]} is of another tokenizer, and there are several: distil from it alone, or take "
            "teachers of the student's family."
        )

    def time(name: str) -> Any:
        return trainer.loop.metrics.time(trainer.mode, f"teacher/{name}")

    teachers, size = {name: here.teacher for name, here in alone.items()}, min(here.vocab_size for here in alone.values())
    models: dict[str | None, Any] = {name: here.model for name, here in alone.items() if here.model is not None}
    tokenizers: dict[str | None, Any] = {name: here.tokenizers.get(None) for name, here in alone.items()}
    sizes: dict[str | None, int] = {name: size for name, here in alone.items() for size in here.sizes.values()}
    weights = trainer.args.teacher_weights
    if weights:
        templates = {tokenizer.chat_template for tokenizer in tokenizers.values() if tokenizer is not None}
        if len(templates) > 1:
            raise ValueError(
                "teachers whose chat templates differ were to be averaged: they would read different prompts. Give them one "
                "template, or let rows name their teacher."
            )
        first = next((tokenizer for tokenizer in tokenizers.values() if tokenizer is not None), None)
        return Here(AverageTeacher(teachers, weights, time, room), size, models, {None: first}, {None: min(sizes.values())})
    return Here(SeveralTeachers(teachers, most_of(trainer.accelerator), time, room), size, models, tokenizers, sizes)


def _shared(trainer: Any, own: int, theirs: int, vocabulary: dict[str, int] | None) -> int:
    """The ids that both models have; tokenizers that disagree on them are refused."""
    size = min(own, theirs)
    if vocabulary is None:
        logger.warning("the teacher comes without a tokenizer: whether it agrees with the student's is not checked.")
    else:
        check_same_tokens(trainer.tokenizer.get_vocab(), vocabulary, size, trainer.args.token_aliases)
    return size
