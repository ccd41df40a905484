"""A teacher that reads its own prompts: the same completion tokens behind other ids, whoever holds it and however batched."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from running import Gradients, by_prompt, general, make, rows
from tiny import QUESTIONS, config, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.data.prompts import map_prompts
from tsdkd.data.teacher_prompts import with_teacher_prompts
from tsdkd.demo.recreate import make_tokenizer

# Hints of very different lengths; the last leaves little of a context of 128.
HINTS = ["1", "12+34=46", "2+3=5\n" * 3, "7", "10+20=30\n" * 2, "9", "8*2=16", "5+5=10\n" * 8]
SOLVED = Dataset.from_dict(
    {
        "prompt": QUESTIONS[:8],
        "hint": HINTS,
        "teacher_prompt": [q + h for q, h in zip(QUESTIONS, HINTS, strict=False)],
    }
)
HINTED = SOLVED.remove_columns("teacher_prompt")
ASKED = SOLVED.remove_columns("hint")


def hidden_by_hand(model, prompt, completion):
    """Row by row, without padding: what a model holds where it predicts each token of a completion."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    return states[len(prompt) - 1 : -1]


def seen(trainer):
    """What the trainer's teacher is asked for and gives."""
    found, hidden = [], trainer.teacher.hidden

    def watched(rollouts, lengths):
        states = hidden(rollouts, lengths)
        found.extend(zip(rollouts.prompt_ids, rollouts.completion_ids, states, strict=True))
        return states

    trainer.teacher.hidden = watched
    return found


@pytest.mark.parametrize("teacher_batch_size", [1, 3, 4])
def test_hidden_states_are_those_of_the_completion_behind_the_teachers_own_prompt(tmp_path, teacher_batch_size):
    teacher = tiny_model(seed=2, hidden=48)
    trainer = make(
        tmp_path, teacher=teacher, data=ASKED, rollouts=by_prompt, max_steps=2, teacher_batch_size=teacher_batch_size
    )
    found = seen(trainer)
    trainer.train()
    tokenizer = make_tokenizer()
    pairs = zip(SOLVED["teacher_prompt"], QUESTIONS, strict=False)
    own = {tuple(tokenizer(theirs)["input_ids"]): tokenizer(question)["input_ids"] for theirs, question in pairs}
    assert len(found) == 8 and len({tuple(prompt) for prompt, _, _ in found}) == 8
    for prompt, completion, states in found:
        assert completion == by_prompt(own[tuple(prompt)])  # the student wrote it behind its own prompt
        torch.testing.assert_close(states, hidden_by_hand(teacher, prompt, completion), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_both_models_behind_their_own_prompts(tmp_path):
    """Against the naive objective on full logits, row by row."""
    from oracles import generalized_jsd

    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    trainer = general(
        tmp_path, "gkd", student=student, teacher=teacher, data=ASKED.select(range(4)), rollouts=by_prompt, max_steps=1,
        method_options={"beta": 0.5, "lmbda": 1.0},
    )  # fmt: skip
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for question, theirs in zip(QUESTIONS[:4], SOLVED["teacher_prompt"], strict=False):
        ids, other = tokenizer(question)["input_ids"], tokenizer(theirs)["input_ids"]
        completion = by_prompt(ids)
        with torch.no_grad():
            ours = student(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
            others = teacher(torch.tensor([other + completion])).logits[0, len(other) - 1 : -1]
        for a, b in zip(ours, others, strict=True):
            total += float(generalized_jsd(a.double().tolist(), b.double().tolist(), 0.5))
        count += len(completion)
    trainer.train()
    assert rows(trainer)[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_template_makes_what_the_column_holds(tmp_path):
    losses = []
    for name, data, options in (
        ("column", ASKED, {}),
        ("template", HINTED, {"teacher_prompt_template": "{prompt}{hint}"}),
    ):
        trainer = make(tmp_path / name, data=data, rollouts=by_prompt, max_steps=2, **options)
        trainer.train()
        losses.append([row["loss"] for row in rows(trainer)])
    assert losses[0] == losses[1]
    trainer = make(tmp_path / "none", data=HINTED, rollouts=by_prompt, max_steps=2)
    trainer.train()
    assert [row["loss"] for row in rows(trainer)] != losses[0]


def test_micro_batches_do_not_change_a_step(tmp_path):
    flat = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        gradients = Gradients()
        trainer = make(
            tmp_path / str(size), data=ASKED, rollouts=by_prompt, max_steps=1, callbacks=[gradients],
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, teacher_batch_size=3,
        )  # fmt: skip
        trainer.train()
        flat.append(gradients.flat)
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-6)


def test_the_teachers_chat_template_and_its_options_are_its_own(tmp_path):
    """A base student that reads texts, and a teacher with a template that has an option."""
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}{% if steps %}{{ steps }}{% endif %}<|assistant|>"
    )
    tokenizer.save_pretrained(tmp_path / "t")
    data = Dataset.from_dict(
        {"prompt": QUESTIONS[:4], "teacher_prompt": [[{"role": "user", "content": q}] for q in QUESTIONS[:4]]}
    )
    for options, expected in (({}, ""), ({"steps": "12"}, "12")):
        trainer = TSDKDTrainer(
            student, teacher, config(tmp_path / "o", max_steps=1, teacher_chat_template_kwargs=options or None), data
        )
        trainer.write = lambda prompt_ids, *args, **kwargs: [by_prompt(ids) for ids in prompt_ids]
        found = seen(trainer)
        trainer.train()
        texts = {tokenizer.decode(prompt) for prompt, _, _ in found}
        assert texts == {f"<|user|>{q}<|end|>{expected}<|assistant|>" for q in QUESTIONS[:4]}


def test_a_recording_remembers_what_the_teacher_read(tmp_path):
    """Two rows of one prompt whose teacher's prompts differ are two rows; trained on without a teacher the losses are equal."""
    data = Dataset.from_dict(
        {"prompt": [QUESTIONS[0]] * 4, "teacher_prompt": [QUESTIONS[0] + h for h in ("1", "2+3=5", "7", "8")]}
    )
    live = make(tmp_path / "live", data=data, rollouts=by_prompt, max_steps=1)
    live.train()
    maker = make(tmp_path / "maker", data=data, rollouts=by_prompt, max_steps=1)
    maker.record(tmp_path / "recording")
    args = config(tmp_path / "out", max_steps=1, recording=str(tmp_path / "recording"))
    again = TSDKDTrainer(tiny_model(seed=1), args=args, processing_class=make_tokenizer())
    again.train()
    assert rows(again)[0]["loss"] == pytest.approx(rows(live)[0]["loss"], rel=1e-6)


def test_the_teachers_context_limits_its_own_prompts_and_drops_are_counted_apart(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 8 prompts of train_dataset \(column teacher_prompt\) are longer than .*row 7"):
        make(tmp_path, teacher=tiny_model(seed=2, positions=64), data=ASKED)
    trainer = make(tmp_path, teacher=tiny_model(seed=2, positions=64), data=ASKED, drop_long_prompts=True, rollouts=by_prompt)
    trainer.train()
    assert len(trainer.train_dataset) == 7
    assert rows(trainer)[0]["prompts/dropped_for_teacher"] == 1 and rows(trainer)[0]["prompts/dropped"] == 1


def test_a_longer_prompt_of_the_teachers_does_not_shorten_the_students(tmp_path):
    """Its context is no limit of the student's prompts."""
    data = Dataset.from_dict({"prompt": [q + " 1" * 15 for q in QUESTIONS[:4]], "teacher_prompt": ["1+1="] * 4})
    small = tiny_model(seed=2, positions=32)
    make(tmp_path / "a", teacher=small, data=data).train()
    with pytest.raises(ValueError, match="the teacher's context of 32"):
        make(tmp_path / "b", teacher=small, data=data.remove_columns("teacher_prompt"))


@pytest.mark.parametrize(
    "change,told",
    [
        (lambda d: with_column(d, ["1", None, "2", ""] * 2), r"no teacher_prompt in rows 1, 5 .*no teacher_prompt|rows 1, 5"),
        (lambda d: with_column(d, [[{"role": "user", "content": "1"}]] * 8), "has no chat template"),
        (lambda d: with_column(d, ["1"] * 7 + ["\n\n"]), "row 7"),
    ],
)
def test_bad_prompts_of_the_teachers_are_refused_by_row(tmp_path, change, told):
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=told):
        make(tmp_path, data=change(ASKED), processing_class=plain)


def with_column(data, values):
    return data.remove_columns("teacher_prompt").add_column("teacher_prompt", values)


def test_bad_templates_are_refused(tmp_path):
    for template, told in (("{prompt} {sulution}", "names sulution.*it has: prompt, hint"), ("none", "must be a text with")):
        with pytest.raises(ValueError, match=told):
            make(tmp_path, data=HINTED, teacher_prompt_template=template)
    with pytest.raises(ValueError, match="leave one of them out"):
        make(tmp_path, data=SOLVED, teacher_prompt_template="{prompt}{hint}")
    empty = HINTED.remove_columns("hint").add_column("hint", ["1"] * 6 + ["", None])
    with pytest.raises(ValueError, match="filled in rows 6, 7 of train_dataset: its hint is empty"):
        make(tmp_path, data=empty, teacher_prompt_template="{prompt}{hint}")


def test_an_evaluation_set_without_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset has none"):
        make(tmp_path, data=ASKED, eval_dataset=ASKED.remove_columns("teacher_prompt"))
    trainer = make(tmp_path, data=ASKED, eval_dataset=ASKED.select(range(4)), rollouts=by_prompt)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="without a teacher_prompt"):
        trainer.evaluate(ASKED.remove_columns("teacher_prompt"))


def test_a_streams_rows_are_checked_as_they_come(tmp_path):
    def stream(values):
        def made():
            for question, theirs in zip(QUESTIONS, values, strict=False):
                yield {"prompt": question, "teacher_prompt": theirs}

        return IterableDataset.from_generator(made)

    make(tmp_path / "a", data=stream(["1+1="] * 8), rollouts=by_prompt).train()
    trainer = make(tmp_path / "b", data=stream(["1+1="] * 5 + [None] * 3), rollouts=by_prompt)
    with pytest.raises(ValueError, match="with and without a teacher_prompt"):
        trainer.train()


def test_both_models_do_not_write_together_then(tmp_path):
    with pytest.raises(ValueError, match="prompts of its own"):
        general(tmp_path, "minillm", data=ASKED)


def test_the_teacher_writes_behind_its_own_prompt(tmp_path):
    """SeqKD on a data set without completions: the teacher's are those of its own prompt."""
    teacher = tiny_model(seed=2, hidden=48, closes_soon=True)
    trainer = general(tmp_path, "seq_kd", teacher=teacher, data=ASKED)
    trainer.train()
    ids = make_tokenizer()(SOLVED["teacher_prompt"][1])["input_ids"]
    with torch.no_grad():
        first = int(teacher(torch.tensor([ids])).logits[0, -1].argmax())
    written = {row["prompt"]: row["completion_ids"] for row in trainer.train_dataset}
    assert written[QUESTIONS[1]][0] == first


def test_columns_of_a_template_survive_the_mapping_of_a_file():
    mapped = map_prompts(HINTED.rename_column("prompt", "question"), prompt_column="question", keep=["hint"])
    assert mapped.column_names == ["prompt", "hint"]
    made = with_teacher_prompts(mapped, "{prompt}{hint}", "train_dataset")
    assert made["teacher_prompt"][1] == QUESTIONS[1] + "12+34=46"
    chats = map_prompts(HINTED, as_chat=True, keep=["hint"])
    made = with_teacher_prompts(chats, "{prompt}{hint}", "train_dataset")
    assert made["teacher_prompt"][1] == [{"role": "user", "content": QUESTIONS[1] + "12+34=46"}]
    assert map_prompts(ASKED).column_names == ["prompt", "teacher_prompt"]


# ------------------------------------------------------------------ the student as its own teacher


def themselves(folder, student=None, data=ASKED, **options):
    trainer = make(folder, student=student or tiny_model(seed=1), teacher="self", data=data, rollouts=by_prompt, **options)
    return trainer


@pytest.mark.parametrize("how", ["start", "live", "ema"])
def test_a_student_teaches_itself(tmp_path, how):
    """At the first step all three are the student behind the longer prompt; then each is what its name says."""
    student = tiny_model(seed=1)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = themselves(tmp_path, student, max_steps=3, self_teacher=how, ema_decay=0.5, learning_rate=1e-2)
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
    options = dict(max_steps=4, self_teacher=how, ema_decay=0.5, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    whole = themselves(tmp_path / "whole", **options)
    whole.train()
    again = themselves(tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [row["loss"] for row in rows(again)][-2:] == [row["loss"] for row in rows(whole)][-2:]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="is of another run: teacher"):
        other = {"start": "ema", "live": "start", "ema": "live"}[how]
        themselves(tmp_path / "whole", **{**options, "self_teacher": other}).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


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
