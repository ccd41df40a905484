"""A writer of your own: both models' logits to the next token of each row (or an object with `write(student, prompt_ids)`)."""

from dataclasses import dataclass

from tsdkd.methods import GKD
from tsdkd.types import RolloutSpec


def surer_model(student_logits, teacher_logits):
    """`[rows, vocab]` each to the next ids `[rows]`, and what is recorded of them."""
    teacher_leads = teacher_logits.softmax(-1).amax(-1) > student_logits.softmax(-1).amax(-1)
    ids = teacher_logits.argmax(-1).where(teacher_leads, student_logits.argmax(-1))
    return ids, {"by_teacher": teacher_leads.float()}


@dataclass(frozen=True, kw_only=True)
class Guided(GKD):
    rollouts = RolloutSpec(writer=surer_model)
