"""A teacher that reads its own prompts: the same completion tokens behind other ids, whoever holds it and however batched."""

from __future__ import annotations

import pytest
import torch
from asked import ASKED, HINTED, HINTS, SOLVED, hidden_by_hand, seen, with_column
from datasets import Dataset, IterableDataset
from running import by_prompt, general, gradients_by_batching, make, rows
from tiny import QUESTIONS, config, save_tiny, tiny_model

from tsdkd import TSDKDTrainer
from tsdkd.data.prompts import map_prompts
from tsdkd.data.teacher_prompts import with_teacher_prompts
from tsdkd.demo.recreate import make_tokenizer


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
    flat = gradients_by_batching(tmp_path, ((8, 1), (4, 2), (2, 4)), data=ASKED, teacher_batch_size=3)
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
        (lambda d: with_column(d, ["1", None, "2", ""] * 2), r"has no teacher_prompt in rows 1, 5 \(2 of 8\)"),
        (lambda d: with_column(d, [[{"role": "user", "content": "1"}]] * 8), "has no chat template"),
        (lambda d: with_column(d, ["1"] * 7 + ["\n\n"]), "row 7"),
    ],
)
def test_bad_prompts_of_the_teachers_are_refused_by_row(tmp_path, change, told):
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=told):
        make(tmp_path, data=change(ASKED), processing_class=plain)


def test_bad_templates_are_refused(tmp_path):
    for template, told in (("{prompt} {sulution}", "names sulution.*it has: prompt, hint"), ("none", "names no column")):
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
    with pytest.raises(ValueError, match="eval_dataset and train_dataset differ in teacher_prompt"):
        trainer.evaluate(ASKED.remove_columns("teacher_prompt"))
    trainer = make(tmp_path / "plain", data=ASKED.remove_columns("teacher_prompt"), rollouts=by_prompt)
    with pytest.raises(ValueError, match="eval_dataset and train_dataset differ in teacher_prompt"):
        trainer.evaluate(ASKED)


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
    with pytest.raises(ValueError, match="names sulution, and the data set has: prompt, hint"):
        map_prompts(HINTED, keep=["sulution"])
    assert map_prompts(ASKED).column_names == ["prompt", "teacher_prompt"]


@pytest.mark.parametrize(
    "template,columns,made",
    [
        ("{prompt} {worked-solution}", {"worked-solution": "12"}, "Q 12"),
        ("{{prompt}} {prompt} \\boxed{{}}", {}, "{prompt} Q \\boxed{}"),
        ("{prompt} {n} {x}", {"n": 3, "x": 0.5}, "Q 3 0.5"),
        ("{prompt} {template}", {"template": "{hint}"}, "Q {hint}"),  # braces of a value stay
    ],
)
def test_fields_are_those_of_format_and_any_column(template, columns, made):
    data = Dataset.from_dict({"prompt": ["Q"], **{name: [value] for name, value in columns.items()}})
    assert with_teacher_prompts(data, template, "train_dataset")["teacher_prompt"] == [made]


@pytest.mark.parametrize(
    "template", ["{prompt} { hint }", "{prompt}{hint:>5}", "{prompt} \\boxed{}", "{prompt", "{prompt!r}", 3]
)
def test_braces_that_hold_no_columns_name_are_refused(tmp_path, template):
    with pytest.raises(ValueError, match=r"teacher_prompt_template(=.*cannot be read|=3 must be| names  hint )"):
        make(tmp_path, data=HINTED, teacher_prompt_template=template)


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, float("nan")])
def test_a_value_that_is_no_text_is_refused_by_row(value):
    data = Dataset.from_dict({"prompt": ["Q"], "hint": [value]})
    with pytest.raises(ValueError, match=r"in row 0 of rows: its hint is .*neither a text nor a number"):
        with_teacher_prompts(data, "{prompt} {hint}", "rows")


def test_text_in_parts_is_joined():
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}]
    made = with_teacher_prompts(Dataset.from_dict({"prompt": [parts]}), "{prompt}!", "rows")["teacher_prompt"]
    assert made[0][0]["content"] == "1+1?!"


def test_a_turn_that_the_teachers_template_leaves_out_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    chats = [[{"role": "system", "content": "12"}, {"role": "user", "content": q}] for q in QUESTIONS[:8]]
    data = Dataset.from_dict({"prompt": QUESTIONS[:8], "teacher_prompt": chats})
    with pytest.raises(
        ValueError, match="row 0 of train_dataset: the teacher's chat template renders nothing of the turns of 'system'"
    ):
        make(tmp_path, data=data, processing_class=tokenizer)


def test_ids_that_the_teacher_lacks_are_refused_by_row(tmp_path):
    data = Dataset.from_dict({"prompt": ["1+1="] * 8, "teacher_prompt": ["1+1="] * 5 + [QUESTIONS[0]] * 3})
    with pytest.raises(ValueError, match=r"row 5 of train_dataset has the id .* and the teacher has 22"):
        make(tmp_path, teacher=tiny_model(seed=2, vocab_size=22), data=data, num_candidates=3)


def test_a_page_shows_what_the_teacher_held_behind_its_own_prompt(tmp_path):
    from tsdkd.inspection import Reader, inspect_completion

    teacher = tiny_model(seed=2, hidden=48)
    reader = Reader(make(tmp_path, teacher=teacher, data=ASKED))
    asked = {"prompt": QUESTIONS[1], "completion": "12+3=15"}
    tokenizer = make_tokenizer()
    for theirs in (QUESTIONS[1], SOLVED["teacher_prompt"][1]):
        table = reader.table(reader.rollouts([{**asked, "teacher_prompt": theirs}], given=True))
        ids = tokenizer(theirs)["input_ids"]
        with torch.no_grad():
            logits = teacher(torch.tensor([ids + table.token_ids])).logits[0, len(ids) - 1 : -1]
        expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(torch.tensor(table.columns["teacher_entropy"]).float(), expected, rtol=1e-3, atol=1e-4)
    one = inspect_completion(
        tiny_model(seed=1), teacher, QUESTIONS[1], "12+3=15", tokenizer=make_tokenizer(), teacher_prompt=theirs
    )
    assert one.columns["teacher_entropy"] == pytest.approx(table.columns["teacher_entropy"], rel=1e-4)


def test_the_teachers_completions_of_one_prompt_are_kept_apart(tmp_path):
    data = Dataset.from_dict({"prompt": [QUESTIONS[0]] * 4, "teacher_prompt": [QUESTIONS[0] + hint for hint in HINTS[:4]]})
    trainer = general(tmp_path, "seq_kd", teacher=tiny_model(seed=2, hidden=48, closes_soon=True), data=data)
    trainer.train()
    assert len((tmp_path / "teacher_answers.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "options,told",
    [
        ({"teacher_chat_template_kwargs": {"a": 1}}, "teacher_chat_template_kwargs were given, and the data set has no"),
        ({"self_teacher": "live"}, "self_teacher has no effect"),
        ({"ema_decay": 0.5}, "ema_decay has no effect"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        make(tmp_path, data=HINTED, **options)
