"""Tokens that no term is trained on: the loss is that of the others, wherever they stand."""

from __future__ import annotations

import pytest
import torch
from oracles import generalized_jsd
from running import by_prompt, general, make, rows
from tiny import prompts, tiny_model

from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD
from tsdkd.trainers.ignored import ignored_ids


def test_the_loss_is_of_the_other_tokens(tmp_path):
    """Against the naive objective on full logits; both models read all tokens, a row of ignored ones alone counts nothing."""
    tokenizer = make_tokenizer()
    names = {tokenizer.convert_ids_to_tokens(i): i for i in range(5, 40)}
    ignored = list(names)[::3]
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    only = next(iter(ignored))
    write = lambda ids: [names[only]] * 3 if sum(ids) % 3 == 0 else by_prompt(ids)  # noqa: E731
    trainer = general(
        tmp_path, GKD(beta=0.5), student=student, teacher=teacher, rollouts=write, max_steps=1, data=prompts(8),
        per_device_train_batch_size=4, gradient_accumulation_steps=2, ignore_tokens=ignored,
    )  # fmt: skip
    made = []
    prepare = trainer.loop.scorer.prepare
    trainer.loop.scorer.prepare = lambda rollouts: made.append(rollouts) or prepare(rollouts)
    trainer.train()
    model, total, count = tiny_model(seed=1), 0.0, 0
    model.load_state_dict(weights)
    (rollouts,) = made
    left_out = {names[name] for name in ignored}
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            ours, theirs = (one(ids).logits[0, len(prompt) - 1 : -1].double() for one in (model, teacher))
        for token, a, b in zip(completion, ours, theirs, strict=True):
            if token not in left_out:
                total, count = total + float(generalized_jsd(a.tolist(), b.tolist(), 0.5)), count + 1
    row = rows(trainer)[0]
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert trainer.trained_tokens == count < sum(map(len, rollouts.completion_ids)) and row["completions/empty"] >= 1


def test_which_tokens_are_meant(tmp_path):
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    name = tokenizer.convert_ids_to_tokens(7)
    assert ignored_ids([name, 9], tokenizer, 64) == {7, 9} and ignored_ids(None, tokenizer, 64) == frozenset()
    special = ignored_ids(["special"], tokenizer, 64)
    assert special == set(tokenizer.all_special_ids) - {tokenizer.eos_token_id} and special
    for wrong in ("<thinks>", 64, -1, True):
        with pytest.raises(ValueError, match="is no token of the student's tokenizer"):
            ignored_ids([wrong], tokenizer, 64)
    longest = max(vocabulary, key=len)
    with pytest.raises(ValueError, match=r"close ones: .*"):
        make(tmp_path, ignore_tokens=[longest + "x"])
