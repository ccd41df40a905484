"""Rows in forward passes: padded or one behind the other, so many or so many tokens, the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from running import Gradients, by_prompt, general, make, rows
from tiny import FAMILIES, config, save_tiny, tiny_model
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tsdkd import TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD
from tsdkd.teachers import hidden_of
from tsdkd.teachers.batches import Batches
from tsdkd.types import Rollouts

ROLLOUTS = Rollouts(
    [[5, 6, 7], [9], [8, 3, 2, 5, 6]], [[10, 11], [4, 5, 6, 7, 12, 13], [20]], [[1, 1], [1, 0, 0, 1, 1, 1], [1]]
)


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 60), st.booleans())
def test_every_row_is_read_once_and_no_pass_holds_more_than_it_may(sizes, tokens, free):
    groups = Batches(tokens=tokens, padding_free=free).groups(sizes)
    assert sorted(row for group in groups for row in group) == list(range(len(sizes)))
    for group in groups:
        held = [sizes[row] for row in group]
        assert len(group) == 1 or (sum(held) if free else len(held) * max(held)) <= tokens
    assert len(Batches(3).groups(sizes)) == -(-len(sizes) // 3)
    assert len(Batches(tokens=tokens, agreed=lambda n: n + 2).groups(sizes)) == len(Batches(tokens=tokens).groups(sizes)) + 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_sees_itself_alone(family, attention):
    """Each text by the model's own forward, alone; an idle pass changes nothing."""
    model = tiny_model(family, attn_implementation=attention)
    for batches in (
        Batches(3, padding_free=True),
        Batches(tokens=9, padding_free=True, agreed=lambda n: n + 1),
        Batches(tokens=16),
    ):
        found = hidden_of(model, ROLLOUTS, 0, batches, torch.device("cpu"))
        for row, states in enumerate(found):
            prompt, completion = ROLLOUTS.prompt_ids[row], ROLLOUTS.completion_ids[row]
            with torch.no_grad():
                whole = model.model(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 : -1]
            trained = torch.tensor(ROLLOUTS.completion_mask[row]).bool()
            torch.testing.assert_close(states, whole[trained], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [{}, {"gradient_checkpointing": True}, {"teacher_placement": "swap"}, {"peft_config": True}, {"teacher_batch_tokens": 70}],
    ids=["plain", "recomputed", "swapped", "adapter", "by tokens"],
)
def test_a_steps_loss_and_gradient_are_those_of_padded_rows(tmp_path, more):
    """Also of one row alone, and over micro-batches; an evaluation, too."""
    made = {}
    for free in (False, True):
        given = dict(more)
        if given.pop("peft_config", None):
            torch.manual_seed(0)
            given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        for size in (4, 1):
            seen = Gradients()
            trainer = make(
                tmp_path / f"{free}{size}", rollouts=by_prompt, callbacks=[seen], max_steps=1, padding_free=free,
                per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, eval_dataset=None, **given,
            )  # fmt: skip
            trainer.train()
            made[free, size] = rows(trainer)[0]["loss"], seen.flat, trainer.evaluate(trainer.train_dataset)["eval_loss"]
    first = made.pop((False, 4))
    for loss, flat, evaluated in made.values():
        assert loss == pytest.approx(first[0], rel=1e-5) and evaluated == pytest.approx(first[2], rel=1e-5)
        torch.testing.assert_close(flat, first[1], rtol=1e-4, atol=1e-6)


def test_a_passes_tokens_are_what_the_teacher_reads_at_a_time(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, teacher_batch_tokens=100, per_device_train_batch_size=8, max_steps=1)
    shapes = []
    hook = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
    trainer.teacher_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    trainer.train()
    assert sum(size for size, _ in shapes) == 8 and all(size * longest <= 100 for size, longest in shapes) and len(shapes) > 2


def test_a_mixtures_routers_see_no_padding(tmp_path):
    """The balancing loss of unlike rows is that of their tokens alone, with padding masked and without it."""
    torch.manual_seed(0)
    options = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1, num_local_experts=4, max_position_embeddings=128, initializer_range=0.3,
                   eos_token_id=1, pad_token_id=0, bos_token_id=None)  # fmt: skip
    weights = MixtralForCausalLM(MixtralConfig(**options)).state_dict()
    made = []
    for free in (False, True):
        student = MixtralForCausalLM(MixtralConfig(**options))
        student.load_state_dict(weights)
        trainer = make(tmp_path / str(free), student=student, rollouts=by_prompt, max_steps=1, padding_free=free,
                       router_loss_weight=0.1)  # fmt: skip
        trainer.train()
        made.append(rows(trainer)[0])
    for name in ("loss", "loss/router"):
        assert made[1][name] == pytest.approx(made[0][name], rel=1e-5)


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3)
    )


def test_what_cannot_be_read_so_is_refused(tmp_path):
    """A recurrent student, a recurrent teacher; two ways to say how much; what no teacher reads here."""
    with pytest.raises(ValueError, match=r"the student, .*does not keep them apart"):
        make(tmp_path, student=mamba(), padding_free=True)
    with pytest.raises(ValueError, match=r"the teacher, .*does not keep them apart"):
        make(tmp_path, teacher=mamba(), padding_free=True)
    with pytest.raises(ValueError, match="teacher_batch_tokens=64 and teacher_batch_size=2 both say"):
        config(tmp_path, teacher_batch_tokens=64, teacher_batch_size=2)
    with pytest.raises(ValueError, match="teacher_batch_tokens"):
        config(tmp_path, teacher_batch_tokens=0)
    teacher = save_tiny(tmp_path / "t")
    options = config(tmp_path, teacher_placement="server", teacher_urls=["http://localhost:1"], teacher_batch_tokens=64)
    with pytest.raises(ValueError, match="teacher_batch_tokens=64 has no effect"):
        TSDKDTrainer(tiny_model("llama"), teacher, options, rows_of(), processing_class=make_tokenizer())


def rows_of():
    return [{"prompt": "Tom has 3 pens."}] * 4


def test_a_student_that_teaches_itself_reads_so_too(tmp_path):
    made = []
    for options in ({}, {"padding_free": True}, {"teacher_batch_tokens": 90}):
        data = [{"prompt": f"Tom has {n} pens.", "teacher_prompt": f"Ann says {n}. Tom has {n} pens."} for n in range(3, 11)]
        trainer = general(
            tmp_path / str(len(made)), GKD(), teacher="self", data=data, rollouts=by_prompt, max_steps=1, **options
        )
        trainer.train()
        made.append(rows(trainer)[0]["loss"])
    assert made == pytest.approx([made[0]] * 3, rel=1e-5) and made[0] > 0


def lfm2(scale=1.0, dtype=torch.float32):
    """Convolutions beside attention: a text's first states hold the last of the text before."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    model = Lfm2ForCausalLM(
        Lfm2Config(**sizes, **ends, num_key_value_heads=1, layer_types=["conv", "full_attention"], initializer_range=0.3)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(scale)
    return model.to(dtype).eval()


@pytest.mark.parametrize("scale,dtype", [(1.0, torch.float32), (0.05, torch.float32), (0.05, torch.bfloat16)])
def test_texts_that_mix_a_little_are_refused_too(tmp_path, scale, dtype):
    """Whatever rounding hides: what stands behind other texts must be equal to the bit."""
    with pytest.raises(ValueError, match=r"the teacher, .*does not keep them apart"):
        make(tmp_path, teacher=lfm2(scale, dtype), padding_free=True)


def test_mixed_precision_is_no_mixing(tmp_path):
    """Of weights in float32 under autocast, and of a teacher's in bfloat16."""
    for family in ("llama", "qwen3", "gemma2"):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2, hidden=48).bfloat16()
        made = []
        for free in (False, True):
            options = {"rollouts": by_prompt, "max_steps": 1, "bf16": True, "padding_free": free, "learning_rate": 0.0}
            trainer = make(tmp_path / family / str(free), student=student, teacher=teacher, **options)
            trainer.train()
            made.append(rows(trainer)[0]["loss"])
        assert made[1] == pytest.approx(made[0], rel=0.02)


def test_a_row_beyond_the_context_is_refused_where_it_cannot_be_read(tmp_path):
    """GPT-Neo's masks are as large as its context, and texts one behind the other are longer."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=2,
                          max_position_embeddings=128, **ends)  # fmt: skip
    with pytest.raises(ValueError, match=r"the teacher, .*no more than its context of 128 tokens in a row"):
        make(tmp_path, teacher=GPTNeoForCausalLM(config), padding_free=True)
