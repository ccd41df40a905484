"""A student that teaches itself with more to read: as it was, as it is, or as a moving average."""

from __future__ import annotations

import pytest
import torch
from asked import ASKED, HINTED, SOLVED, hidden_by_hand, seen, with_column
from running import Gradients, by_prompt, make, rows
from tiny import QUESTIONS, config, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer


def decay(how):
    return {"ema_decay": 0.5} if how == "ema" else {}


def themselves(folder, student=None, data=ASKED, **options):
    trainer = make(folder, student=student or tiny_model(seed=1), teacher="self", data=data, rollouts=by_prompt, **options)
    return trainer


@pytest.mark.parametrize("how", ["start", "live", "ema"])
def test_a_student_teaches_itself(tmp_path, how):
    """At the first step all three are the student behind the longer prompt; then each is what its name says."""
    student = tiny_model(seed=1)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = themselves(tmp_path, student, max_steps=3, self_teacher=how, learning_rate=1e-2, **decay(how))
    found, weights = seen(trainer), [start]

    class Keep(Gradients):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    assert all(not torch.equal(weights[-1][name], p) for name, p in start.items() if "embed" in name)
    average = {name: p.clone() for name, p in start.items()}
    reader = tiny_model(seed=1)
    for step in range(3):
        if step:
            average = {name: 0.5 * p + 0.5 * weights[step][name] for name, p in average.items()}
        stands = {"start": start, "live": weights[step], "ema": average}[how]
        reader.load_state_dict(stands, strict=False)
        for prompt, completion, states in found[4 * step : 4 * step + 4]:
            torch.testing.assert_close(states, hidden_by_hand(reader, prompt, completion), rtol=1e-3, atol=1e-4)
    head = trainer.teacher.head
    assert not head.weight.requires_grad
    expected = {"start": start, "ema": None, "live": weights[-1]}[how]
    if expected is not None:
        assert torch.equal(
            head.weight, expected["model.embed_tokens.weight" if "lm_head.weight" not in expected else "lm_head.weight"]
        )


def test_an_adapters_student_holds_no_second_model(tmp_path):
    from peft import LoraConfig

    trainer = themselves(
        tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), max_steps=2, learning_rate=1e-2
    )
    base = tiny_model(seed=1)
    found = seen(trainer)
    trainer.train()
    assert all("lora" in name for name in trainer.teacher._kept) and len(found) == 8
    for prompt, completion, states in found:  # the start is the base, since a fresh adapter adds nothing
        torch.testing.assert_close(states, hidden_by_hand(base, prompt, completion), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["start", "live", "ema"])
def test_a_run_goes_on_bit_for_bit(tmp_path, how):
    shared = dict(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    options = {**shared, "self_teacher": how, **decay(how)}
    whole = themselves(tmp_path / "whole", **options)
    whole.train()
    again = themselves(tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [row["loss"] for row in rows(again)][-2:] == [row["loss"] for row in rows(whole)][-2:]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="is of another run: teacher"):
        other = {"start": "ema", "live": "start", "ema": "live"}[how]
        themselves(tmp_path / "whole", **shared, self_teacher=other, **decay(other)).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_an_average_of_half_precision_moves(tmp_path):
    """What a step of it adds is less than half a unit of bfloat16."""
    student = tiny_model(seed=1).to(torch.bfloat16)
    trainer = themselves(tmp_path, student, max_steps=6, self_teacher="ema", ema_decay=0.99, learning_rate=1e-2)
    start = {name: p.clone() for name, p in trainer.teacher._kept.items()}
    trainer.train()
    trainer.teacher._take_in()
    name = next(name for name in start if "embed_tokens" in name)
    weights = dict(trainer.model.named_parameters())[name]
    followed = (trainer.teacher._kept[name] != start[name]).float().mean()
    assert followed > 0.5 and followed >= 0.9 * (weights.float() != start[name]).float().mean()
    assert trainer.teacher.head.weight.dtype == torch.bfloat16


def test_itself_reading_the_same_is_refused_and_some_rows_of_it_are_told_of(tmp_path, caplog):
    with pytest.raises(ValueError, match="in every row of train_dataset it would read what the student reads"):
        themselves(tmp_path, data=HINTED, teacher_prompt_template="{prompt}")
    some = with_column(ASKED, [*SOLVED["teacher_prompt"][:6], *QUESTIONS[6:8]])
    themselves(tmp_path, data=some)
    assert "in 2 of 8 rows of train_dataset the student teaches itself what it reads" in caplog.text


def test_itself_without_another_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no teacher_prompt: .*the loss would be 0"):
        themselves(tmp_path, data=HINTED)
    with pytest.raises(ValueError, match="self_teacher='once'"):
        themselves(tmp_path, self_teacher="once")
    with pytest.raises(ValueError, match="teacher_placement=server"):
        themselves(tmp_path, teacher_placement="server", teacher_urls=["http://127.0.0.1:1"])


def test_a_saved_student_that_taught_itself_is_a_student(tmp_path):
    from transformers import AutoModelForCausalLM

    args = config(tmp_path / "out", TokenDistillConfig, method="gkd", max_steps=1, teacher_model_name_or_path="self")
    trainer = TokenDistillTrainer(save_tiny(tmp_path / "s", seed=1), args=args, train_dataset=ASKED)
    trainer.train()
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(saved.get_input_embeddings().weight, trainer.model.get_input_embeddings().weight)
    assert "the student itself (start)" in (tmp_path / "out" / "README.md").read_text()
