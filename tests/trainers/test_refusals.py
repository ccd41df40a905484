"""What a method cannot do is refused at construction."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from datasets import Dataset
from running import answered, by_prompt, general, make, rows
from tiny import config, prompts, save_tiny

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer
from tsdkd.methods import GKD, DistiLLM, MiniLLM, SeqKD, SpeculativeKD
from tsdkd.types import ReadPlan


@pytest.mark.parametrize(
    "method,data,options,message",
    [
        (GKD(lmbda=0.5), prompts(8), {}, "train_dataset has no 'completion' column; it has: prompt"),
        (DistiLLM(), prompts(8), {}, "train_dataset has no 'completion' column"),
        (DistiLLM(replay_capacity=3), answered(8), {}, "replay_capacity=3 over 1 processes is 3 rows each, but a step takes 4"),
        (SpeculativeKD(), prompts(8), {"top_p": 0.9}, "top_p, top_k and min_p would change the distributions"),
        (MiniLLM(), prompts(8), {"top_k": 5}, "written by both models, token by token, but"),
        (MiniLLM(), prompts(8), {"temperature": 0.0}, r"temperature=0\.0 leaves no distribution to draw from"),
        (
            SpeculativeKD(),
            prompts(8),
            {"repetition_penalty": 1.3},
            "repetition_penalty and generation_kwargs are options of one",
        ),
        (
            SeqKD(),
            Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b", None, "", "c"]}),
            {},
            "2 completions .* in row 1",
        ),
        (SeqKD(), Dataset.from_dict({"prompt": ["a"] * 4, "completion_ids": [[70]] * 4}), {}, "the completion of row 0"),
    ],
)
def test_what_a_method_cannot_do_is_refused_at_construction(tmp_path, method, data, options, message):
    with pytest.raises(ValueError, match=message):
        general(tmp_path, method, data=data, **options)


def test_an_evaluation_set_without_answers_is_refused_where_answers_are_scored(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset has no 'completion' column"):
        general(tmp_path, DistiLLM(replay_capacity=8), data=answered(8), eval_dataset=prompts(4))


def test_options_that_would_be_lost_are_refused_or_applied(tmp_path):
    trainer = general(tmp_path, "gkd", data=answered(8), method_options={"lmbda": 0.0})
    assert trainer.method == GKD(lmbda=0.0)
    with pytest.raises(ValueError, match="method_options were given beside a method object"):
        general(tmp_path, GKD(), method_options={"lmbda": 0.0}, data=answered(8))
    with pytest.raises(ValueError, match=r"method='gkd' was given with a TSDKDConfig"):
        make(tmp_path, method="gkd")
    with pytest.raises(ValueError, match="given twice"):
        make(tmp_path, method=TSDKD(), beta=0.5)
    with pytest.raises(ValueError, match=r"beta=1\.0 is an option of the method"):
        config(tmp_path, TokenDistillConfig, method="gkd", beta=1.0)
    with pytest.raises(ValueError, match=r"method_options=\[1\]: pass the method's options by name"):
        config(tmp_path, TokenDistillConfig, method_options=[1])


def test_a_gate_that_reads_other_tokens_makes_the_models_read_them(tmp_path):
    class Relative:
        needs = "both"

        def __call__(self, statistics):
            return torch.sigmoid(statistics.divergence - statistics.divergence.mean(-1, keepdim=True))

    for selection in ("opener", "prefix", "random"):
        method = GKD(selection=selection, selection_share=0.4, gate=Relative())
        assert method.reads([10, 3]) == ReadPlan.whole([10, 3])
        trainer = general(tmp_path / selection, method, rollouts=by_prompt, max_steps=1)
        trainer.train()
        assert "teacher/tokens_spared" not in rows(trainer)[-1]


@pytest.mark.parametrize("wrong", [{"use_vllm": True}, {"teacher_answers_engine": "vllm", "method": "seq_kd"}])
def test_a_missing_or_refused_vllm_is_said_before_anything_is_loaded(tmp_path, monkeypatch, wrong):
    from tsdkd.trainers import engines

    monkeypatch.setattr(engines, "is_vllm_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"vLLM is not installed\. Install one that TRL 1\.16 takes: pip install 'tsdkd\[vllm\]'"
    ):
        general(tmp_path, None, **wrong)

    def old():
        warnings.warn(
            "TRL currently supports vLLM versions from 0.22.0 to 0.31.0. You have version 0.9 installed. We …", stacklevel=2
        )
        return True

    monkeypatch.setattr(engines, "is_vllm_available", old)
    with pytest.raises(ValueError, match=r"You have version 0\.9 installed\. Install one"):
        general(tmp_path, None, **wrong)


def test_rows_that_fill_no_batch_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        trainer = general(tmp_path, GKD(), rollouts=by_prompt, data=prompts(11))
    assert "3 of 11 rows of train_dataset are left out of each epoch" in caplog.text
    trainer.train()
    assert rows(trainer)[-1]["prompts/left_out_of_epoch"] == 3


def test_tools_and_given_answers_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="tools were given to a method that trains on the data set's completions"):
        TokenDistillTrainer(
            model=save_tiny(tmp_path / "s"),
            teacher_model=save_tiny(tmp_path / "t"),
            args=config(tmp_path, TokenDistillConfig, method="supervised_kd"),
            train_dataset=answered(8, chat=True),
            tools=[len],
        )
