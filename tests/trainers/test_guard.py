"""When a run stops."""

from __future__ import annotations

import re

import pytest
import torch
from running import make
from transformers import TrainerCallback

from tsdkd.trainers import NonFiniteError


def poison_teacher(trainer):
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        if len(calls) == 2:
            output.last_hidden_state[0, -2:] = float("nan")

    trainer.teacher_model.model.register_forward_hook(hook)


def poison_student(trainer):
    def hook(module, inputs, output):
        if trainer.state.global_step == 1 and torch.is_grad_enabled():
            output.last_hidden_state[:, -2:] = float("inf")

    trainer.model.model.register_forward_hook(hook)


def poison_gradient(trainer):
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(lambda g: g * float("inf") if trainer.state.global_step == 1 else g)


@pytest.mark.parametrize(
    "poison,names",
    [
        (poison_teacher, ["the teacher's hidden states", "the direct term"]),
        (poison_student, ["the student's hidden states", "the entropy term", "the loss"]),
        (poison_gradient, ["the gradient norm"]),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_nan_stops_before_the_optimizer_step_and_nothing_is_saved(tmp_path, poison, names, max_grad_norm):
    trainer = make(
        tmp_path, max_steps=4, rollouts=lambda ids: [7] * 12, save_strategy="steps", save_steps=2, max_grad_norm=max_grad_norm
    )
    poison(trainer)
    after = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            after[state.global_step] = [p.detach().clone() for p in model.parameters()]

    trainer.add_callback(Note())
    with pytest.raises(NonFiniteError, match=r"step 2: NaN or Inf in .*student: Qwen2ForCausalLM") as error:
        trainer.train()
    for name in names:
        assert name in str(error.value)
    if "hidden states" in names[0]:
        assert re.search(
            r"first at token \d+ of a completion after a prompt of \d+ tokens that ends with ids \[", str(error.value)
        )
    assert list(after) == [1] and all(torch.equal(a, b) for a, b in zip(after[1], trainer.model.parameters(), strict=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_student_that_diverged_is_named_when_it_cannot_write(tmp_path):
    trainer = make(
        tmp_path,
        learning_rate=1e30,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    with pytest.raises(
        NonFiniteError, match=r"step \d: NaN or Inf in .*student.*lower the learning\s+rate|step \d: NaN or Inf"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["checkpoint", "student"])
def test_weights_that_an_update_made_overflow_are_not_saved(tmp_path, how):
    class Overflows(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("inf")

    saves = {"save_strategy": "steps", "save_steps": 1} if how == "checkpoint" else {"save_strategy": "no"}
    trainer = make(tmp_path, max_steps=1, callbacks=[Overflows()], **saves)
    with pytest.raises(NonFiniteError, match=r"step 1: the student's weights are not finite after it .*Nothing of it is saved"):
        trainer.train()
        trainer.save_model(str(tmp_path / "s"))
    assert not list(tmp_path.rglob("*.safetensors"))
