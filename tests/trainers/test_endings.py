"""The probability of an end where completions stop, against the whole distribution of the model."""

from __future__ import annotations

import pytest
import torch
from running import by_prompt, make
from tiny import tiny_model

from tsdkd.teachers.heads import head_of
from tsdkd.trainers.endings import end_probability


def test_it_is_the_models_own_at_the_last_token_of_each_whole_completion():
    model = tiny_model("llama", seed=3).eval()
    texts = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21, 22, 23]]  # a prompt of two tokens each
    hidden, wanted = [], []
    with torch.no_grad():
        for ids in texts:
            output = model(torch.tensor([ids]), output_hidden_states=True)
            hidden.append(output.hidden_states[-1][0, 1:-1])
            wanted.append(output.logits[0, -2].softmax(-1)[[1, 4]].sum().item())  # what predicts the last token
    lengths = [3, 1, 2]
    ((name, (total, count)),) = end_probability(torch.cat(hidden), lengths, lengths, head_of(model), [1, 4]).items()
    assert name == "completions/end_probability" and count == 3
    assert total.item() == pytest.approx(sum(wanted), rel=1e-5)
    cut = end_probability(torch.cat(hidden), lengths, [3, 5, 2], head_of(model), [1, 4])[name]  # the second was not read whole
    assert cut[1] == 2 and cut[0].item() == pytest.approx(wanted[0] + wanted[2], rel=1e-5)
    empty = end_probability(torch.cat(hidden), [3, 0, 1, 2], [3, 0, 1, 2], head_of(model), [1, 4])[name]
    assert empty[0] == total and empty[1] == 3
    assert end_probability(torch.cat(hidden), lengths, lengths, head_of(model), []) == {}
    nothing = end_probability(hidden[0][:0], [0, 0], [0, 3], head_of(model), [1])[name]
    assert nothing[0] == nothing[1] == 0  # every process logs the same names


def test_a_run_logs_it_and_micro_batches_do_not_change_it(tmp_path):
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        student = tiny_model("llama", seed=1, closes_soon=True)
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1)
        trainer = make(tmp_path / str(size), student=student, rollouts=by_prompt, **options)
        trainer.train()
        found.append(next(row["completions/end_probability"] for row in trainer.state.log_history if "loss" in row))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and 0 < found[0] < 1
