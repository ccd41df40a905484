"""Tools and several turns: what a tool says is read and neither trained on nor counted."""

from __future__ import annotations

import json
import re

import pytest
import torch
from datasets import Dataset
from running import rows
from tiny import config, tiny_model
from trl.chat_template_utils import add_response_schema, qwen3_chat_template

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.second_student import make_second_tokenizer


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def tokenizer_with_tools():
    """Bytes, with the template and the turns of a model that calls tools."""
    tokenizer = make_second_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.model_max_length = 8192
    return add_response_schema(tokenizer)


def asked_in(text):
    """The number of a row's first user turn."""
    return int(re.search(r"<\|im_start\|>user\n(\d)", text)[1])


def call(a, b):
    return f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': {'a': a, 'b': b}})}\n</tool_call><|im_end|>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer whose student calls the tool in two rows of four, after one step; what it wrote."""
    tokenizer = tokenizer_with_tools()
    sizes = {"vocab_size": len(tokenizer), "positions": 8192}
    student, teacher = tiny_model(seed=1, **sizes), tiny_model(seed=2, hidden=48, **sizes)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{n}+{n}?"}] for n in range(1, 5)]})
    args = config(
        tmp_path_factory.mktemp("run"), TokenDistillConfig, method="gkd", method_options={"beta": 0.5, "lmbda": 1.0},
        max_steps=1, max_length=8192, max_completion_length=512, max_grad_norm=0.0,
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = TokenDistillTrainer(student, teacher, args, data, processing_class=tokenizer, tools=[add])

    def write(prompt_ids, *args, **kwargs):
        made = []
        for ids in prompt_ids:
            text = tokenizer.decode(ids)
            number = asked_in(text)
            if "<tool_response>" in text.partition("<|im_start|>user\n")[2]:
                said = f"It is {2 * number}.<|im_end|>"
            else:
                said = call(number, number) if number % 2 else f"{2 * number}<|im_end|>"
            made.append(tokenizer(said, add_special_tokens=False)["input_ids"])
        return made

    trainer.write = write
    steps, prepare = [], trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: steps.append(prepare(rollouts)) or steps[-1]
    trainer.train()
    student.load_state_dict(start, strict=False)
    return trainer, steps[0], tokenizer, student, teacher


def test_what_a_tool_says_is_read_and_not_trained_on(trained):
    _, step, tokenizer, _, _ = trained
    rollouts, called = step.rollouts, 0
    for prompt, completion, mask in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, strict=True):
        number = asked_in(tokenizer.decode(prompt))
        own = tokenizer.decode([i for i, kept in zip(completion, mask, strict=True) if kept])
        others = tokenizer.decode([i for i, kept in zip(completion, mask, strict=True) if not kept])
        if number % 2:
            called += 1
            assert own == call(number, number) + f"It is {2 * number}.<|im_end|>"
            assert f"<tool_response>\n{2 * number}\n</tool_response>" in others
        else:
            assert own == f"{2 * number}<|im_end|>" and not others
    assert called == 2


def test_the_loss_is_of_the_students_own_tokens_behind_all_that_was_said(trained):
    """Against the naive objective on full logits."""
    from oracles import generalized_jsd

    trainer, step, _, student, teacher = trained
    total, count = 0.0, 0
    rollouts = step.rollouts
    for prompt, completion, mask in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0, len(prompt) - 1 : -1].double() for model in (student, teacher))
        for a, b, kept in zip(ours, theirs, mask, strict=True):
            if kept:
                total, count = total + float(generalized_jsd(a.tolist(), b.tolist(), 0.5)), count + 1
    row = rows(trainer)[0]
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert trainer.trained_tokens == count == sum(map(sum, step.rollouts.completion_mask))


def test_no_statistic_counts_what_a_tool_says(trained):
    from tsdkd.trainers.health import repetition

    trainer, step, _, _, _ = trained
    own = [step.rollouts.rows([row]) for row in range(4)]
    expected = sum(repetition(one.trained(one.completion_ids)) for one in own) / 4
    row = rows(trainer)[0]
    assert row["completions/repetition"] == pytest.approx(expected)
    assert expected != pytest.approx(sum(repetition(one.completion_ids[0]) for one in own) / 4)
    assert row["tools/call_frequency"] == 0.5 and row["tools/failure_frequency"] == 0
