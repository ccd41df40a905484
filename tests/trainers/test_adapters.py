"""LoRA students and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from running import Gradients, by_prompt, make, rows
from tiny import prompts, save_tiny

from tsdkd.teachers.heads import check_head, head_of


def test_a_lora_student_trains_its_adapter_alone(tmp_path):
    from peft import LoraConfig

    trainer = make(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora" in name for name in moved)


@pytest.mark.parametrize("on_the_head", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": "all-linear"}])
def test_an_adapter_on_the_head_is_refused_and_all_linear_has_none(tmp_path, on_the_head):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", **on_the_head)
    if on_the_head["target_modules"] == "all-linear":
        assert make(tmp_path, peft_config=adapter).teacher is not None
        return
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(tmp_path, peft_config=adapter)


def test_prompt_learning_is_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="Prompt-learning PEFT methods"):
        make(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_a_head_that_is_trained_whole_beside_adapters_moves(tmp_path):
    from peft import LoraConfig

    trainer = make(
        tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    before = head_of(trainer.model).weight.detach().clone()
    trainer.train()
    assert not torch.equal(head_of(trainer.model).weight, before)
    check_head(trainer.model, "student", trainer.vocab_size)


def test_adapters_are_saved_merged_and_resumed(tmp_path):
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    student = save_tiny(tmp_path / "student", seed=1)
    ids = torch.arange(5, 25)[None]

    def run(name, **options):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = make(
            tmp_path / name,
            student=student,
            data=prompts(16),
            rollouts=by_prompt,
            peft_config=adapter,
            learning_rate=1e-2,
            max_steps=4,
            **options,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if name == "resumed" else None)
        return trainer

    whole = run("whole", save_strategy="steps", save_steps=2)
    whole.save_model(str(tmp_path / "saved"))
    resumed = run("resumed")
    with torch.no_grad():
        expected, untrained = whole.model.eval()(ids).logits, AutoModelForCausalLM.from_pretrained(student)(ids).logits
        assert (expected - untrained).abs().max() > 0.01
        torch.testing.assert_close(resumed.model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not (tmp_path / "saved" / "model.safetensors").exists()  # the adapter alone
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), tmp_path / "saved").merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        gradients = Gradients()
        trainer = make(
            tmp_path, rollouts=by_prompt, gradient_checkpointing=checkpointing, callbacks=[gradients], max_grad_norm=0.0
        )
        trainer.train()
        losses.append((rows(trainer)[0]["loss"], gradients.flat))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)
