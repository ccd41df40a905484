"""Empty completions, long prompts, and what is refused before training."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from datasets import Dataset, DatasetDict
from running import by_prompt, make, rows
from tiny import config, prompts, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer


def test_empty_completions_are_counted_and_never_a_crash(tmp_path):
    trainer = make(tmp_path, rollouts=lambda ids: by_prompt(ids) if sum(ids) % 2 else [], data=prompts(8))
    trainer.train()
    assert sum(row["completions/empty"] for row in rows(trainer)) > 0
    assert all(math.isfinite(row["loss"]) for row in rows(trainer))


def test_a_step_in_which_nothing_is_left_changes_nothing(tmp_path):
    trainer = make(tmp_path, rollouts=lambda ids: [], weight_decay=0.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert [row["loss"] for row in rows(trainer)] == [0.0, 0.0]
    assert [row["completions/empty"] for row in rows(trainer)] == [4.0, 4.0]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_long_prompts_are_refused_with_the_reason_or_dropped(tmp_path):
    data = Dataset.from_dict({"prompt": [*prompts(8)["prompt"], "Tom has 1 apples." * 9]})
    with pytest.raises(
        ValueError, match=r"1 of 9 prompts of train_dataset are longer than 52 tokens, the first is row 8 with"
    ) as error:
        make(tmp_path, data=data)
    assert "max_length=64 less max_completion_length=12" in str(error.value)
    trainer = make(tmp_path, data=data, drop_long_prompts=True)
    assert len(trainer.train_dataset) == 8
    trainer.train()
    assert rows(trainer)[0]["prompts/dropped"] == 1
    with pytest.raises(ValueError, match="the student's context of 128 tokens less max_completion_length=120"):
        make(tmp_path, max_length=1024, max_completion_length=120)
    with pytest.raises(ValueError, match="max_completion_length=64 leaves no room for a prompt: max_length=64"):
        make(tmp_path, max_completion_length=64)


def test_an_unset_completion_limit_fits_a_small_context(tmp_path):
    trainer = make(tmp_path, max_completion_length=None)
    assert trainer.generation_config.max_new_tokens == 32  # half of max_length=64
    trainer.train()
    wide = [tiny_model(seed=seed, positions=2048) for seed in (1, 2)]
    roomy = make(tmp_path, student=wide[0], teacher=wide[1], max_completion_length=None, max_length=None)
    assert roomy.generation_config.max_new_tokens == 512


def test_when_every_prompt_is_too_long_dropping_is_no_way_out(tmp_path):
    with pytest.raises(
        ValueError, match=r"all 8 prompts of train_dataset are longer than 4 tokens, none is left: max_length=16"
    ):
        make(tmp_path, max_length=16, drop_long_prompts=True)


def test_a_prompt_id_that_one_model_lacks_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<|extra{i}|>" for i in range(6)])
    data = Dataset.from_dict({"prompt": [*prompts(7)["prompt"], "Tom has <|extra5|>"]})
    with pytest.raises(ValueError, match=r"row 7 of train_dataset holds id 65, '<\|extra5\|>', beyond the 64 ids"):
        make(tmp_path, student=tiny_model(vocab_size=70), data=data, processing_class=tokenizer)


def test_the_model_card_goes_where_the_model_goes(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.save_model(str(tmp_path / "student"))
    assert "TSD-KD" in (tmp_path / "student" / "README.md").read_text()
    assert not (tmp_path / "run" / "README.md").exists()


def test_evaluating_between_two_logs_keeps_the_trainings_times(tmp_path):
    trainer = make(tmp_path, eval_dataset=prompts(4), logging_steps=4, max_steps=4, eval_strategy="steps", eval_steps=3)
    steps = []
    original = trainer.training_step

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = original(*args, **kwargs)
        steps.append(time.perf_counter() - began)
        return out

    trainer.training_step = timed
    trainer.train()
    row = rows(trainer)[0]
    logged = sum(row[f"time/{part}"] for part in ("rollout", "teacher", "student", "loss"))
    assert logged == pytest.approx(sum(steps) / 4, rel=0.05)  # all four steps, not the last alone


REFUSED = [
    ({"data": Dataset.from_dict({"instruction": ["a"] * 8})}, r"no 'prompt' column; it has: instruction"),
    ({"data": Dataset.from_dict({"prompt": []})}, r"has 0 rows but one generation batch takes 4"),
    ({"data": prompts(3)}, r"3 rows but one generation batch takes 4 \(4 per device × 1 processes × 1 accumulation"),
    ({"data": DatasetDict({"train": prompts(8)})}, r"holds the splits train: pass one of them, e.g. dataset\['train'\]"),
    ({"data": Dataset.from_dict({"prompt": ["a", "", "b", " "]})}, r"2 prompts that are empty \(rows 1, 3\)"),
    ({"data": Dataset.from_dict({"prompt": ["a", None, "b", "c"]})}, r"1 prompts that are None \(row 1\)"),
    ({"data": Dataset.from_dict({"prompt": [1, 2, 3, 4]})}, r"4 prompts that are int \(rows 0, 1, 2, 3\)"),
    ({"data": Dataset.from_dict({"prompt": [[{"text": "a"}]] * 4})}, r"a list that is not chat messages"),
    ({"data": ["a"] * 4}, r"row 0 of train_dataset is str: a row is a mapping"),
    ({"data": iter([{"prompt": "a"}])}, r"train_dataset is list_iterator: pass rows"),
    (
        {"data": Dataset.from_dict({"prompt": [[{"role": "user", "content": [{"type": "image"}]}]] * 4})},
        r"4 prompts that are chats with images \(rows 0, 1, 2, 3\): the student reads text alone",
    ),
    ({"data": Dataset.from_dict({"prompt": ["a"] * 4, "image": ["b"] * 4})}, r"has images"),
    ({"eval_dataset": Dataset.from_dict({"prompt": ["a", ""]})}, r"eval_dataset has 1 prompts that are empty \(row 1\)"),
    ({"num_candidates": 100}, r"num_candidates=100 but the two models share 64 tokens"),
    ({"opener_entropy_share": 2.0}, r"opener_entropy_share=2.0"),
    ({"max_length": 0}, r"max_length=0"),
    ({"kd_temperature": 0.0}, r"kd_temperature=0.0"),
    ({"fused_impl": "cuda"}, r"fused_impl='cuda' is unknown"),
]


@pytest.mark.parametrize("wrong,message", REFUSED, ids=[m for _, m in REFUSED])
def test_bad_input_is_refused_before_training(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **wrong)


def test_mixed_prompts_are_refused_with_their_rows(tmp_path):
    class Mixed(list):
        column_names = ["prompt"]  # noqa: RUF012

        def __getitem__(self, key):
            return list(self) if key == "prompt" else {"prompt": super().__getitem__(key)}

    with pytest.raises(ValueError, match=r"mixes prompts of two types: 3 are text \(rows 0, 1, 3\) and 1 are chats \(row 2\)"):
        make(tmp_path, data=Mixed(["a", "b", [{"role": "user", "content": "c"}], "d"]))


def test_a_missing_or_identical_teacher_is_refused(tmp_path):
    model = tiny_model()
    options = dict(model=model, args=config(tmp_path), train_dataset=prompts(8), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="no teacher was given"):
        TSDKDTrainer(**options)
    with pytest.raises(ValueError, match="the same object was passed as model and as teacher_model"):
        TSDKDTrainer(teacher_model=model, **options)


def test_a_chat_without_a_template_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        make(tmp_path, data=prompts(8, chat=True), processing_class=tokenizer)


def test_tokenizers_that_disagree_are_refused_with_a_token(tmp_path):
    folder = save_tiny(tmp_path / "t", seed=2)
    saved = tmp_path / "t" / "tokenizer.json"
    content = json.loads(saved.read_text())
    vocab = content["model"]["vocab"]
    vocab["+"], vocab["-"] = vocab["-"], vocab["+"]
    saved.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"the tokenizers disagree: id \d+ is '[+-]' for the student but '[+-]' for the teacher"
    ):
        make(tmp_path / "o", teacher=folder)


def test_training_without_prompts_is_refused(tmp_path):
    trainer = TSDKDTrainer(
        model=tiny_model(), teacher_model=tiny_model(seed=2), args=config(tmp_path), processing_class=make_tokenizer()
    )
    with pytest.raises(ValueError, match="no train_dataset was given"):
        trainer.train()


def test_trls_beta_is_refused_where_nothing_reads_it(tmp_path):
    with pytest.raises(ValueError, match=r"beta=0.5 is an option of the method: pass method_options=\{'beta': 0.5\}"):
        config(tmp_path, cls=TokenDistillConfig, beta=0.5)


def test_a_cpu_run_is_in_float32_also_beside_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdkd.trainers.config.bf16_works_here", lambda: True)
    assert config(tmp_path).bf16 is False and config(tmp_path, bf16=True).bf16 is True


def test_a_config_of_trl_is_refused_with_the_class_to_use(tmp_path):
    from trl import DistillationConfig

    with pytest.raises(ValueError, match="args is a DistillationConfig; pass a TSDKDConfig"):
        make(tmp_path, args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
