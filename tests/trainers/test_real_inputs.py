"""Inputs that people really have: what is right, or a refusal that names the row, the token or the option."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from datasets import Dataset, IterableDataset
from running import alone, answered, by_prompt, general, make, rows, student
from tiny import prompts, tiny_model

from tsdkd.data.prompts import load_prompts
from tsdkd.data.rows import lines_of, read_rows
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import SupervisedKD
from tsdkd.pipelines.compare.scoring import problems_at


def full_tokenizer(**special):
    """The demo's tokenizer with as many tokens as a tiny model has rows, and then some."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(64 - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_of_several_ends_a_given_completion_has_the_tokenizers_own(tmp_path):
    learner = student()
    learner.generation_config.eos_token_id = [2, 1]  # a list may begin with one that the model never writes
    trainer = general(tmp_path, SupervisedKD(), student=learner, data=answered(4), max_completion_length=30)
    assert trainer.eos_ids == [1, 2]
    (ids, cut), *_ = trainer.rendering.completions(["Tom has 12 apples."], ["#### 17"], 30)
    assert ids[-1] == make_tokenizer().eos_token_id == 1 and not cut


def test_an_end_that_the_teacher_lacks_is_refused_and_one_that_it_has_is_enough(tmp_path):
    tokenizer = full_tokenizer(eos_token="<|stop|>")  # id 64
    learner = tiny_model(seed=1, vocab_size=66)
    learner.generation_config.eos_token_id = tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"no completion could end: of the 64 ids .* '<\|stop\|>' \(id 64\)"):
        make(tmp_path, student=learner, processing_class=tokenizer)
    learner.generation_config.eos_token_id = [64, 1]
    assert make(tmp_path, student=learner, processing_class=tokenizer).eos_ids == [1]


def test_a_padding_token_without_a_row_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"padding token '\[PAD\]' is id 64, but the student has 64 rows"):
        make(tmp_path, processing_class=full_tokenizer(pad_token="[PAD]"))


def test_a_turn_that_the_template_does_not_take_is_refused_with_its_row(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}" + tokenizer.chat_template
    )
    user = {"role": "user", "content": "Tom has 12 apples."}
    data = Dataset.from_list([{"prompt": [user]}] * 3 + [{"prompt": [{"role": "system", "content": "Tom"}, user]}])
    with pytest.raises(ValueError, match=r"the prompt of row 3 of train_dataset cannot be rendered .*no such role"):
        make(tmp_path, data=data, processing_class=tokenizer)


def test_a_prompt_without_tokens_is_refused_in_a_stream_too(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "Tom has 12 apples."}, {"prompt": ""}] * 8))
    trainer = make(tmp_path, data=stream, rollouts=by_prompt, max_steps=1)
    with pytest.raises(ValueError, match="a prompt without tokens arrived"):
        trainer.train()


@pytest.mark.parametrize(
    "split,expected", [("train", 16), ("train[:8]", 8), ("test", 16), ("test[25%:]", 12), ("train[-3:]", 3)]
)
def test_a_slice_of_a_local_file_is_a_slice(tmp_path, split, expected):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Tom has {n} apples."}) + "\n" for n in range(16)))
    assert len(load_prompts(str(file), split=split)) == expected


def test_every_jsonl_is_read_alike(tmp_path):
    """A byte-order mark, carriage returns, blank lines, and separators that stand inside a text."""
    problems = [{"question": f"Tom has {n} app\u2028les\u0085.", "answer": "5"} for n in range(4)]
    plain = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in problems)
    for text in (plain, plain + "\n", "\ufeff" + plain, plain.replace("\n", "\r\n"), "\n" + plain + "  \n"):
        file = tmp_path / "p.jsonl"
        file.write_bytes(text.encode())
        assert [p.question for p in problems_at(file)] == [row["question"] for row in problems]
        assert read_rows(file, "mend it") == problems and len(lines_of(file)) == 4
    file.write_text(plain + "\n{broken\n" + plain)
    with pytest.raises(ValueError, match=r"p\.jsonl, line 6 is no JSON"):
        problems_at(file)
    with pytest.raises(ValueError, match=r"line 6 is damaged .*: mend it"):
        read_rows(file, "mend it")


def test_the_teachers_tokenizer_is_of_its_weights_revision(tmp_path, monkeypatch):
    asked = []

    def from_pretrained(source, **where):
        asked.append((source, where.get("revision")))
        return make_tokenizer()

    monkeypatch.setattr("tsdkd.trainers.sources.AutoTokenizer.from_pretrained", from_pretrained)
    teacher = tiny_model(seed=2, hidden=48)
    teacher.config._name_or_path = "org/teacher"
    make(tmp_path, teacher=teacher, teacher_model_revision="v2")
    assert asked[-1] == ("org/teacher", "v2")


def test_tasks_as_chats_without_a_template_are_refused_before_the_first_step(tmp_path):
    from tsdkd.cli.evaluate import bundled_tasks
    from tsdkd.evaluation.while_training import EvaluateWhileTraining

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    trainer = make(tmp_path, processing_class=tokenizer)
    with pytest.raises(ValueError, match="eval_chat_template puts the items of eval_tasks as chats, but"):
        EvaluateWhileTraining(trainer, ["tsdkd_word_problems"], 5, include_path=[bundled_tasks()], chat_template=True, limit=2)


def test_a_base_model_is_compared_on_text_as_it_was_trained(tmp_path):
    from tsdkd.pipelines.compare import OnProblems

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "Tom has 5 pens.", "answer": 7}\n')
    trainer = make(tmp_path, processing_class=tokenizer, rollouts=by_prompt)
    trainer.train()
    (row,) = OnProblems(problems_at(file))(trainer, "one")
    assert not trainer.has_chats and row.n == 1 and 0 <= row.score <= 1
    assert make(tmp_path / "chats", data=prompts(8, chat=True)).has_chats


def test_a_student_whose_updates_would_round_to_nothing_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        make(tmp_path / "half", student=tiny_model(seed=1).to(torch.bfloat16), learning_rate=5e-6)
    assert "most updates of about the learning rate, 5e-06, round to nothing. Load the student in float32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        make(tmp_path / "whole", student=tiny_model(seed=1), learning_rate=5e-6)
        make(tmp_path / "fast", student=tiny_model(seed=1).to(torch.bfloat16), learning_rate=1e-2)
    assert "round to nothing" not in caplog.text


def test_long_prompts_of_a_stream_are_dropped_and_counted(tmp_path):
    texts = ["Tom has 12 apples.", "Tom has 1 apples." * 9] * 8
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": text} for text in texts]))
    trainer = make(tmp_path, data=stream, rollouts=by_prompt, drop_long_prompts=True, max_steps=1)
    trainer.train()
    assert rows(trainer)[0]["prompts/dropped"] >= 3
    again = make(tmp_path / "kept", data=stream, rollouts=by_prompt, max_steps=1)
    with pytest.raises(ValueError, match=r"at most 52 fit: .* Filter the stream, or set drop_long_prompts"):
        again.train()


# ---------------------------------------------------------------------- options and outputs


@pytest.mark.parametrize(
    "options,message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect here: a distillation loss has no labels"),
        ({"data_seed": 3}, "data_seed=3 has no effect here"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' has no effect"),
        ({"vllm_max_model_length": 99}, "vllm_max_model_length=99 has no effect without vLLM"),
        ({"teacher_model_init_kwargs": {"dtype": "bf16"}}, "the teacher is loaded already"),
        ({"any_recording": True}, "any_recording was set, and no recording"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU trains in fp16")
    with pytest.raises(ValueError, match="fp16"):
        make(tmp_path, fp16=True)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written: there is a file of that name"):
        make(file, student="no/such", teacher="no/such")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written: .*file is a file"):
        make(file / "below", student="no/such", teacher="no/such")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_rows_that_come_to_an_evaluation_are_checked_as_those_before(tmp_path):
    trainer = alone(tmp_path, answered(4))
    with pytest.raises(ValueError, match="eval_dataset has no 'completion' column"):
        trainer.evaluate([{"prompt": "Tom has 12 apples."}] * 4)
    with pytest.raises(ValueError, match="eval_dataset has no 'prompt' column"):
        trainer.evaluate(Dataset.from_dict({"text": ["a"]}))
    first = trainer.evaluate(answered(4))["eval_loss"]
    assert trainer.evaluate({"a": answered(4)})["eval_a_loss"] == pytest.approx(first)


# ---------------------------------------------------------------------- what an outside tester broke


def test_a_learnt_prompt_is_refused_since_it_would_not_be_read(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    teacher = get_peft_model(tiny_model(seed=2, hidden=48), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="the teacher has a learnt prompt or prefix"):
        make(tmp_path, teacher=teacher)


def test_a_student_of_which_nothing_is_trained_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_model(seed=1)
    with pytest.raises(ValueError, match="student and teacher share weights"):
        make(tmp_path / "a", student=get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])), teacher=base)
    with pytest.raises(ValueError, match="nothing of the student would be trained: all its parameters are frozen"):
        make(tmp_path / "b", student=tiny_model(seed=1).requires_grad_(False))


def test_a_tokenizer_without_an_end_takes_the_students(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert make(tmp_path / "a", processing_class=tokenizer, rollouts=by_prompt).eos_ids == [1]
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    learner = tiny_model(seed=1)
    learner.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the student's generation_config names an end token"):
        make(tmp_path / "b", processing_class=tokenizer, student=learner)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"generation_kwargs": {"eos_token_id": [3]}}, "generation_kwargs has eos_token_id: it would be overruled"),
        ({"generation_kwargs": {"max_new_tokens": 3}}, "Set max_completion_length"),
        ({"generation_kwargs": {"repitition_penalty": 1.1}}, r"or did you mean repetition_penalty\?"),
        ({"temperature": 0.0}, "temperature=0: transformers samples"),
        ({"vllm_server_port": 9}, "vllm_server_port=9 has no effect without vLLM"),
    ],
)
def test_sampling_that_is_not_possible_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_rows_of_a_stream_are_checked_as_they_arrive(tmp_path):
    user = {"role": "user", "content": "Tom has 12 apples."}
    answered_chat = [user, {"role": "assistant", "content": "5"}]
    for bad, message in (
        (answered_chat, "a prompt arrived that is chats that end in an assistant's turn"),
        (None, "a prompt arrived that is None"),
        ("Tom", "texts and chats arrived in one batch"),
    ):
        stream = IterableDataset.from_generator(lambda bad=bad: iter([{"prompt": [user]}, {"prompt": bad}] * 8))
        with pytest.raises(ValueError, match=message):
            make(tmp_path, data=stream, rollouts=by_prompt, max_steps=1, drop_long_prompts=True).train()


def test_a_checkpoint_without_a_head_is_not_scored(tmp_path):
    from tsdkd.evaluation import harness

    tiny_model("llama").model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights of its language-model head \(lm_head.weight\)"):
        harness.hf_model(str(tmp_path))
