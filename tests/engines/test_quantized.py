"""A teacher in four bits, and a student in four bits below its adapters, by bitsandbytes on a CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import config, prompts, save_tiny
from transformers import BitsAndBytesConfig

from tsdkd import TSDKDTrainer

pytestmark = pytest.mark.engines


def test_a_lora_student_on_four_bits_learns_from_a_teacher_in_four_bits(tmp_path, monkeypatch):
    import bitsandbytes
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig

    # Where the CPU has AVX512-BF16, evaluation repacks the weights for good and training has no gradient through them.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    blocks = {"num_key_value_heads": 2, "head_dim": 32}  # layers that fill bitsandbytes' blocks
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    trainer = TSDKDTrainer(
        save_tiny(tmp_path / "s", seed=1, hidden=64, **blocks),
        save_tiny(tmp_path / "t", seed=2, hidden=128, **blocks),
        config(tmp_path / "out", max_steps=3, teacher_model_init_kwargs={"quantization_config": nf4}),  # as in a recipe
        prompts(8),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0),
        quantization_config=BitsAndBytesConfig(**nf4),
    )
    for model in (trainer.teacher_model, trainer.model):
        quantized = [m for m in model.modules() if isinstance(m, Linear4bit)]
        assert len(quantized) == 14 and not isinstance(model.get_output_embeddings(), Linear4bit)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    trainer.train()
    assert all(row["grad_norm"] > 0 for row in trainer.state.log_history if "loss" in row)
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_qr_distills_students_on_four_bits_are_saved_as_they_were_trained(tmp_path):
    from transformers import AutoModelForCausalLM

    from tsdkd.pipelines.qr_distill import QRDistillTrainer, QRTraining

    blocks = {"num_key_value_heads": 2, "head_dim": 32, "positions": 256}
    students = [save_tiny(tmp_path / "a", seed=1, hidden=64, **blocks), save_tiny(tmp_path / "b", seed=2, hidden=128, **blocks)]
    rows = [
        {"problem": i // 2, "question": f"{i} pens?", "path": f"{i}+{i}={2 * i}\n#### {2 * i}", "style": "xy"[i % 2]}
        for i in range(8)
    ]
    options = QRTraining(
        learning_rates=(1e-2, 1e-2), epochs=2, batch_size=4, lora_r=4, four_bit=True, shared=8, alignment="mean"
    )
    trainer = QRDistillTrainer(students, rows, torch.randn(8, 4), options, tmp_path / "run")
    assert all("lora" in name for name in trainer._named() if name.startswith("student"))
    before = {name: p.detach().clone() for name, p in trainer._named().items()}
    trainer.train()
    moved = {name.split("/")[0] for name, p in trainer._named().items() if not torch.equal(p, before[name])}
    assert {"student-1", "student-2", "mutual"} <= moved
    trainer.save(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    for number, learner in enumerate(trainer.learners, 1):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"student-{number}", dtype=torch.float32)
        start = AutoModelForCausalLM.from_pretrained(students[number - 1], dtype=torch.float32)
        learner.train()  # without dropout; in `eval` some CPUs repack the weights
        with torch.no_grad():
            own, kept, first = (model(ids).logits for model in (learner.model, saved, start))
        assert (own - first).abs().max() > 1e-2
        torch.testing.assert_close(kept, own, rtol=1e-3, atol=1e-4)
