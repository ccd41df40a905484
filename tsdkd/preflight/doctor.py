"""Checks of a set-up with its models loaded: what a run would raise, and what it would not raise and suffer from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tsdkd.inspection import Reader
from tsdkd.inspection.reader import step_of
from tsdkd.preflight.engine import engine
from tsdkd.preflight.findings import GREEN, RED, YELLOW, Finding
from tsdkd.teachers.heads import head_of, vocabulary_size
from tsdkd.trainers.run_record import planned_steps
from tsdkd.types import DivergenceTerm, Rollouts, TokenBatch

FLAT = 1e-4  # relative change of a term's value that is none
MASS = 1e-3  # of the student's probability on ids that the teacher lacks, above which more than rounding is lost

# ---------------------------------------------------------------------- the texts' ends


def _ends_of(model: Any) -> set[int]:
    """The ids that end a completion by a model's own generation configuration."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    return set(found if isinstance(found, (list, tuple)) else [] if found is None else [found])


def ends(trainer: Any) -> Iterator[Finding]:
    """Student and teacher stop on the same ids, a chat's turn ends in one of them, and each is trained on."""
    tokenizer, name = (
        trainer.tokenizer,
        lambda ids: ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ids)),
    )
    ours = set(trainer.eos_ids)
    if not ours:
        yield Finding(RED, "ends", "no id ends a completion: every one would be cut", "set the tokenizer's eos_token")
        return
    yield Finding(GREEN, "ends", f"the student's completions end with {name(ours)}, trained on as any other id")
    if tokenizer.eos_token_id not in ours:
        said = f"the tokenizer's own end {tokenizer.eos_token_id} is none of them"
        yield Finding(YELLOW, "ends", said, "let both name the same")
    if trainer.teacher_model is not None:
        theirs = {i for i in _ends_of(trainer.teacher_model) if i < trainer.vocab_size}
        if theirs != ours:
            yield Finding(
                YELLOW,
                "ends",
                f"the teacher stops on {name(theirs) or 'nothing'}, the student on {name(ours)}: where they stop on different "
                "ids, completions grow (arXiv 2609.20511)",
                "set the student's generation_config.eos_token_id to the ids that the teacher was trained to end with",
            )
        else:
            yield Finding(GREEN, "ends", "the teacher stops on the same ids")
    if trainer.has_chats:
        row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
        ((turn, _),) = trainer.rendering.completions([row], [row["completion"]], 64)
        last = turn[-1] if turn else None
        level = GREEN if last in ours else YELLOW
        said = f"a turn of the chat template ends with {name({last}) if last is not None else 'nothing'}"
        yield Finding(level, "ends", said, "" if level == GREEN else "name the template's end as an eos_token_id")
    if tokenizer.pad_token_id in ours:
        yield Finding(GREEN, "padding", "the padding token is an end: told apart by position, the end is trained on")


# ---------------------------------------------------------------------- vocabulary, context, disk


def vocabulary(trainer: Any, batches: Sequence[TokenBatch]) -> Iterator[Finding]:
    """How much of the student's probability lies on ids that the teacher lacks."""
    rows, shared = vocabulary_size(trainer.model), trainer.vocab_size
    if rows <= shared:
        yield Finding(GREEN, "vocabulary", f"all of the student's {rows} ids are the teacher's, too")
        return
    head, worst = head_of(trainer.model), 0.0
    for batch in batches:
        for start in range(0, batch.student_hidden.shape[0], 64):
            logits = head.logits(batch.student_hidden[start : start + 64]).float()
            worst = max(worst, logits.softmax(-1)[:, shared:].sum(-1).max().item())
    level = GREEN if worst < MASS else YELLOW
    do = "" if level == GREEN else "the teacher's vocabulary lacks tokens that the student uses: take a teacher that has them"
    yield Finding(
        level, "vocabulary", f"{rows - shared} ids are the student's alone; they hold at most {worst:.1e} of a token", do
    )


def context(trainer: Any) -> Iterator[Finding]:
    """Whether prompts fit, and how many were dropped."""
    limits = trainer.loop.prompts.limits
    dropped = trainer.loop.prompts.dropped
    said = f"prompts up to {limits.prompt} tokens and completions up to {limits.completion} fit"
    if dropped:
        yield Finding(YELLOW, "context", f"{said}; {dropped} prompts are dropped", "raise max_length, or shorten the prompts")
    else:
        yield Finding(GREEN, "context", said)


def precision(trainer: Any) -> Iterator[Finding]:
    """Master weights of a precision that the learning rate can move."""
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    told = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if dtypes & {torch.float16, torch.bfloat16}:
        yield Finding(
            YELLOW,
            "precision",
            f"the trained weights are {told}: small updates round to nothing",
            "load the student in float32",
        )
    else:
        yield Finding(
            GREEN, "precision", f"the trained weights are {told}; computed in {'bf16' if trainer.args.bf16 else told}"
        )


def disk(trainer: Any, free: Callable[[Path], int] | None = None) -> Iterator[Finding]:
    """Whether the disk holds the checkpoints: weights, and of what is trained two moments in its own precision."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    one = weights + 2 * trained
    args, steps = trainer.args, planned_steps(trainer)
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    by_steps = max(1, int(steps // args.save_steps)) if args.save_steps >= 1 else round(1 / args.save_steps)
    count = {"no": 0, "steps": by_steps}.get(str(strategy), max(1, int(args.num_train_epochs)))
    kept = (
        min(count, args.save_total_limit + 1) if args.save_total_limit else count
    )  # the new one is there before an old one goes
    place = Path(args.output_dir).absolute()
    while not place.exists():
        place = place.parent
    there = free(place) if free is not None else shutil.disk_usage(place).free
    many = "1 checkpoint" if kept == 1 else f"{kept} checkpoints"
    said = f"{many} of about {one / 2**30:.2f} GiB and the student; {there / 2**30:.1f} GiB are free"
    if there < one + weights:
        yield Finding(RED, "disk", said, "free some, or name another output_dir")
    elif there < kept * one + weights:
        yield Finding(YELLOW, "disk", said, "set save_total_limit, or save less often")
    else:
        yield Finding(GREEN, "disk", said)


# ---------------------------------------------------------------------- the loss


def losses(trainer: Any, batches: Sequence[TokenBatch]) -> Iterator[Finding]:
    """A teacher equal to the student has no divergence from it, and each term's gradient lowers it."""
    batch, method = batches[0], trainer.method
    with torch.no_grad():
        student = head_of(trainer.model).cut(trainer.vocab_size)
    bias = None if student.bias is None else student.bias.detach().float()
    head = dataclasses.replace(student, weight=student.weight.detach().float(), bias=bias)
    hidden = batch.student_hidden.detach().float()
    teacher, theirs = batch.teacher_hidden, None
    if teacher is not None and trainer.teacher is not None:
        theirs = trainer.teacher.head.cut(trainer.vocab_size)
        own_bias = None if theirs.bias is None else theirs.bias.detach().float()
        theirs = dataclasses.replace(theirs, weight=theirs.weight.detach().float(), bias=own_bias)
        teacher = teacher.float()
    objective = method.objective(batch)
    for term in objective.active:
        alone = method.only(term.name)

        def value(states: torch.Tensor, of: Any = alone, teach: Any = teacher, teach_head: Any = theirs) -> torch.Tensor:
            made = dataclasses.replace(batch, student_hidden=states, teacher_hidden=teach)
            return of.loss(made, head, teach_head, impl="reference").loss

        if isinstance(term, DivergenceTerm):
            same = value(hidden, teach=hidden, teach_head=head).item()
            scale = value(hidden).item()
            level = GREEN if abs(same) <= 1e-5 * max(1.0, abs(scale)) else RED
            do = "" if level == GREEN else "the divergence is not zero where the models agree: look at it (docs/your-own.md)"
            said = f"{same:.1e} for a teacher equal to the student, {scale:.3g} for this one"
            yield Finding(level, f"term {term.name}", said, do)
        states = hidden.clone().requires_grad_()
        before = value(states)
        (gradient,) = torch.autograd.grad(before, states, allow_unused=True)
        if gradient is None or not torch.isfinite(gradient).all() or gradient.norm() == 0:
            yield Finding(YELLOW, f"term {term.name}", "it has no gradient on this text", "look at its selection and weight")
            continue
        step = 1e-3 * hidden.norm() / gradient.norm()
        values = [value(hidden - step * factor * gradient).item() for factor in (1.0, 0.1, 0.01)]
        lowered, scale = min(values), max(abs(before.item()), 1e-12)
        drop, rise = (before.item() - lowered) / scale, (max(values) - before.item()) / scale
        # A target that is made of the student (TAID's) moves with it: there the value hardly changes.
        level = GREEN if drop > FLAT else YELLOW if rise < FLAT else RED
        do = {GREEN: "", YELLOW: "its value hardly changes: does its target move with the student?"}.get(
            level, "its gradient does not lower it: do not train with it"
        )
        yield Finding(level, f"term {term.name}", f"{before.item():.5g}, after a step along its gradient {lowered:.5g}", do)


# ---------------------------------------------------------------------- the probe


def probe(tables: Sequence[Any], rollouts: Rollouts, limit: int, ends: set[int]) -> Iterator[Finding]:
    """Whether there is something to teach on a few completions."""
    mean = lambda name: _mean(tables, name)  # noqa: E731
    overlap = mean("overlap")
    if overlap is not None:
        level = GREEN if overlap >= 0.4 else YELLOW
        said = f"student and teacher share {overlap:.0%} of their best tokens"
        do = "" if level == GREEN else "the teacher's mass lies where the student has none: warm the student up first (seq_kd)"
        yield Finding(level, "overlap", said, do)
    student, teacher = mean("student_entropy"), mean("teacher_entropy")
    if teacher is not None and student is not None:
        gap = student - teacher
        level = GREEN if gap > 0 else YELLOW
        do = (
            ""
            if level == GREEN
            else "the teacher is less sure than the student, so the gate damps tokens: is it the right one?"
        )
        yield Finding(level, "entropy gap", f"the student {student:.3g} nats a token, the teacher {teacher:.3g}", do)
    for table in tables[:1]:
        for name, told in table.terms.items():
            if told["kind"] == "ranking":
                sizes = [each.columns[f"takes/{name}"].sum() for each in tables]
                share = sum(sizes) / sum(map(len, tables))
                level = GREEN if share < 0.6 else YELLOW
                do = "" if level == GREEN else "most of a completion is ranked: lower opener_entropy_share"
                said = f"{sum(sizes) / len(sizes):.1f} tokens of a completion, {share:.0%} of all"
                yield Finding(level, "opener", said, do)
    for name in sorted({column for table in tables for column in table.columns if column.startswith("gate/")}):
        yield Finding(GREEN, "gate", f"it keeps {mean(name):.0%} of the divergence's weight")
    cut = sum(len(ids) >= limit and ids[-1] not in ends for ids in rollouts.completion_ids) / len(rollouts)
    level = GREEN if cut <= 0.2 else YELLOW
    do = "" if level == GREEN else "raise max_completion_length, or look at the ends above"
    yield Finding(level, "cut completions", f"{cut:.0%} do not end within {limit} tokens", do)


def _mean(tables: Sequence[Any], name: str) -> float | None:
    values = [value for table in tables if name in table.columns for value in table.columns[name].tolist() if value == value]
    return sum(values) / len(values) if values else None


def pass_rates(rights: tuple[Sequence[bool], Sequence[bool]] | None) -> Iterator[Finding]:
    """Whether the teacher solves more of the prompts than the student; None where their rows have no answers."""
    if rights is None:
        yield Finding(
            YELLOW, "pass rate", "no answers stand beside the prompts: nothing says who is better", "add an answer column"
        )
        return
    student, teacher = (sum(marks) / len(marks) for marks in rights)
    said = f"the student solves {student:.0%} of {len(rights[0])}, the teacher {teacher:.0%}"
    if teacher > student:
        yield Finding(GREEN, "pass rate", said)
    else:
        yield Finding(YELLOW, "pass rate", said, "there is nothing to teach here: another teacher, or other prompts")


# ---------------------------------------------------------------------- all of it


def batches_of(trainer: Any, rollouts: Rollouts) -> list[TokenBatch]:
    """The hidden states of some rollouts, by both models, as a step would read them."""
    with trainer.student() as student:
        steps = (step_of(trainer, rollouts.rows([row])) for row in range(len(rollouts)))
        return [trainer.loop.loss.batch_of(student, step) for step in steps]


def examine(
    trainer: Any, rows: Sequence[dict[str, Any]], rights: tuple[Sequence[bool], Sequence[bool]] | None = None, seed: int = 0
) -> list[Finding]:
    """Every check of a trainer that does not train, and the probe on the completions of some rows.

    Args:
        rights: which of the rows student and teacher solve, where their rows have answers.
    """
    if trainer.loop.scorer.crossing is not None:
        said = "the teacher is of another tokenizer: the student's tokens cannot be looked at one by one"
        return [*context(trainer), *precision(trainer), *disk(trainer), Finding(YELLOW, "probe", said, "watch teacher/paired")]
    reader = Reader(trainer)
    rollouts = reader.rollouts(rows, seed=seed)
    rollouts = rollouts.rows([row for row, length in enumerate(rollouts.lengths) if length])
    found = [*ends(trainer), *context(trainer), *precision(trainer), *disk(trainer)]
    if not len(rollouts):
        return [*found, Finding(RED, "completions", "every one is empty: there is nothing to train on", "look at the prompts")]
    batches = batches_of(trainer, rollouts)
    found += [*vocabulary(trainer, batches), *losses(trainer, batches)]
    tables = reader.tables(rollouts)
    limit = trainer.loop.prompts.limits.completion
    found += [*probe(tables, rollouts, limit, set(trainer.eos_ids)), *pass_rates(rights)]
    if trainer.args.use_vllm:
        found += engine(trainer, rollouts.prompt_ids, batches_of)
    return found
