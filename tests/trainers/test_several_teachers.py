"""Several teachers, each of its own rows: a step's loss is that of each row by its teacher, whatever their shapes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from oracles import generalized_jsd
from running import Gradients, by_prompt, general, gradients_by_batching, make, rows
from tiny import QUESTIONS, config, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.teachers.several import SeveralTeachers
from tsdkd.types import Rollouts

NAMES = ["math", "code", "math", "math", "code", "math", "code", "math"]
MIXED = Dataset.from_dict({"prompt": QUESTIONS[:8], "teacher": NAMES})
GKD = {"method_options": {"beta": 0.5, "lmbda": 1.0}}


def teachers():
    """Of another width, another family's head and more ids each."""
    return {"math": tiny_model(seed=2, hidden=48), "code": tiny_model("granite", seed=3, hidden=64, vocab_size=80)}


def by_hand(student, models, data, template=None):
    """The mean JSD over all completion tokens, each row's by its teacher, over the ids that both have."""
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for question, name in zip(data["prompt"], data["teacher"], strict=True):
        ids = tokenizer(question)["input_ids"]
        completion = by_prompt(ids)
        with torch.no_grad():
            whole = torch.tensor([ids + completion])
            ours, theirs = (model(whole).logits[0, len(ids) - 1 : -1, :64].double() for model in (student, models[name]))
        for a, b in zip(ours, theirs, strict=True):
            total, count = total + float(generalized_jsd(a.tolist(), b.tolist(), 0.5)), count + 1
    return total / count


def test_the_loss_is_each_rows_by_its_teacher(tmp_path):
    student, models = tiny_model(seed=1), teachers()
    expected = by_hand(student, models, MIXED)
    trainer = general(
        tmp_path, "gkd", student=student, teacher=models, data=MIXED, rollouts=by_prompt, max_steps=1,
        per_device_train_batch_size=8, **GKD,
    )  # fmt: skip
    assert trainer.vocab_size == 64 and trainer.teacher_model is None
    trainer.train()
    assert rows(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    wrong = by_hand(tiny_model(seed=1), {"math": models["code"], "code": models["math"]}, MIXED)
    assert abs(wrong - expected) > 1e-2


def test_one_teacher_under_two_names_is_one_teacher(tmp_path):
    """All three terms, the selections and their statistics, and the gradient."""
    found = []
    for number, teacher in enumerate((tiny_model(seed=2, hidden=48), {"math": tiny_model(seed=2, hidden=48)} | two())):
        gradients = Gradients()
        data = MIXED if number else MIXED.remove_columns("teacher")
        trainer = make(
            tmp_path / str(number), teacher=teacher, data=data, rollouts=by_prompt, max_steps=2, callbacks=[gradients],
            per_device_train_batch_size=4, gradient_accumulation_steps=2, term_grad_norm_steps=1,
        )  # fmt: skip
        trainer.train()
        found.append((rows(trainer), gradients.flat))
    (one, flat), (two_names, other) = found
    torch.testing.assert_close(other, flat, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(two_names, one, strict=True):
        for name in ("loss", "loss/direct", "loss/indirect", "loss/entropy", "teacher/entropy", "gate/mean", "opener/tokens",
                     "candidates/tau", "grad_norm", "hidden_grad_norm/direct"):  # fmt: skip
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def two():
    return {"code": tiny_model(seed=2, hidden=48)}


def test_micro_batches_do_not_change_a_step(tmp_path):
    batchings = ((8, 1), (2, 4), (1, 8))
    flat = gradients_by_batching(tmp_path, batchings, teacher=teachers(), data=MIXED, teacher_batch_size=3)
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-6)


def test_each_teachers_part_is_logged(tmp_path):
    trainer = make(tmp_path, teacher=teachers(), data=MIXED, rollouts=by_prompt, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    row = rows(trainer)[0]
    assert row["teacher/math/entropy"] != row["teacher/code/entropy"]
    low, high = sorted((row["teacher/math/entropy"], row["teacher/code/entropy"]))
    assert low < row["teacher/entropy"] < high
    assert (
        row["teacher/math/loss/direct"] > 0 and row["time/teacher/code"] > 0 and row["time/teacher"] > row["time/teacher/code"]
    )


def test_an_evaluation_and_a_default(tmp_path):
    """Rows without a name are the default's; a set of one teacher's rows is that teacher's."""
    models, student = teachers(), tiny_model(seed=1)
    named = Dataset.from_dict({"prompt": QUESTIONS[:4], "teacher": ["code"] * 4})
    trainer = general(
        tmp_path, "gkd", student=student, teacher=models, data=MIXED, eval_dataset=named.remove_columns("teacher"),
        rollouts=by_prompt, default_teacher="code", **GKD,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand(student, models, named), rel=1e-4)


def test_prompts_of_the_teachers_own_by_each_ones_template(tmp_path):
    paths = {}
    for number, name in enumerate(("math", "code")):
        paths[name] = save_tiny(tmp_path / name, seed=2 + number, hidden=48)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = f"{{% for m in messages %}}{number}{{{{ m['content'] }}}}{{% endfor %}}"
        tokenizer.save_pretrained(tmp_path / name)
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS[:8]]
    data = MIXED.add_column("teacher_prompt", chats)
    trainer = make(tmp_path / "out", teacher=paths, data=data, rollouts=by_prompt, max_steps=1, per_device_train_batch_size=8)
    read = {}
    for name, teacher in trainer.teacher.teachers.items():
        hidden = teacher.hidden
        teacher.hidden = lambda r, n, name=name, hidden=hidden: read.setdefault(name, r.prompt_ids) and hidden(r, n)
    trainer.train()
    for number, name in enumerate(("math", "code")):
        texts = {tokenizer.decode(ids) for ids in read[name]}
        assert texts == {f"{number}{q}" for q, whose in zip(QUESTIONS, NAMES, strict=False) if whose == name}


def test_a_yaml_recipe_and_rows_of_a_file(tmp_path):
    from tsdkd.cli import main

    for number, name in enumerate(("student", "a", "b")):
        save_tiny(tmp_path / name, seed=number + 1, hidden=32 + 16 * number)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "teacher": name}) + "\n" for q, name in zip(QUESTIONS, NAMES, strict=False))
    )
    recipe = {
        "model_name_or_path": str(tmp_path / "student"), "dataset_name": str(tmp_path / "rows.jsonl"),
        "teachers": {"math": str(tmp_path / "a"), "code": {"model": str(tmp_path / "b")}}, "output_dir": str(tmp_path / "out"),
        "max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 8, "max_length": 64, "report_to": "none",
        "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "math" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_goes_on_and_another_teacher_is_another_run(tmp_path):
    options = dict(data=MIXED, rollouts=by_prompt, max_steps=4, save_strategy="steps", save_steps=2)
    whole = make(tmp_path, teacher=teachers(), **options)
    whole.train()
    again = make(tmp_path, teacher=teachers(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    changed = teachers() | {"code": tiny_model(seed=5)}
    with pytest.raises(ValueError, match="is of another run: teacher"):
        make(tmp_path, teacher=changed, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Counting:
    """A teacher in shares: it notes how many rows it is asked for."""

    is_remote = False

    def __init__(self):
        self.asked = []

    def hidden(self, rollouts, lengths):
        self.asked.append((len(rollouts), list(lengths)))
        return [torch.zeros(length, 2) for length in lengths]


def test_a_teacher_in_shares_is_asked_for_as_many_rows_by_every_process():
    a, b = Counting(), Counting()
    several = SeveralTeachers({"a": a, "b": b}, most=lambda rows: 3)
    found = several.hidden(Rollouts([[1], [2]], [[3], [4, 5]], [[1], [1, 1]], teachers=["b", "b"]), [1, 2])
    assert a.asked == [(3, [0, 0, 0])] and b.asked == [(3, [1, 2, 0])] and [len(states) for states in found] == [1, 2]
    with pytest.raises(ValueError, match=r"of several teachers \(a, b\) each has a head"):
        several.head  # noqa: B018


def called(names):
    return Dataset.from_dict({"prompt": QUESTIONS[:8], "teacher": names})


@pytest.mark.parametrize(
    "change,told",
    [
        ({"data": MIXED.remove_columns("teacher")}, "train_dataset has no column 'teacher'.*default_teacher"),
        ({"data": called([*NAMES[:6], "maths", "code"])}, "row 6 of train_dataset is 'maths'"),
        ({"data": called([None, *NAMES[1:]])}, "row 0 of train_dataset is None"),
        ({"teacher": {}}, "empty mapping"),
        ({"teacher": {"math": {"placement": "local"}}}, "the teacher math lacks its model"),
        ({"teacher": {"math": {"model": "x", "place": "local"}}}, "the teacher math has no place"),
        ({"teacher": {"math": {"model": "x", "placement": "moon"}}}, "placement of the teacher math='moon'"),
        ({"teacher": {"math": "self"}}, "is the only teacher"),
        ({"teacher": {3: "x"}}, "a teacher is called 3"),
        ({"teacher": {"math": "nowhere/at/all", "code": "there/neither"}}, "nowhere/at/all"),
        ({"teachers": {"math": "x"}, "teacher_model_name_or_path": "y"}, "teachers were both given"),
        ({"teachers": "math"}, "teachers='math' must be a mapping"),
        ({"default_teacher": "physics"}, "default_teacher='physics', and there are math, code"),
        ({"teacher": tiny_model(seed=2), "default_teacher": "math"}, "and there is one teacher"),
    ],
)  # fmt: skip
def test_bad_teachers_are_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        make(tmp_path, **{"teacher": teachers(), "data": MIXED, **change})


def test_what_is_of_one_teacher_is_refused_for_several(tmp_path):
    from tsdkd.inspection import Reader

    trainer = make(tmp_path, teacher=teachers(), data=MIXED)
    with pytest.raises(ValueError, match="a recording holds one teacher's head"):
        trainer.record(tmp_path / "r")
    with pytest.raises(ValueError, match="looked at with one teacher"):
        Reader(trainer)
    with pytest.raises(ValueError, match="no 'completion' column"):
        general(tmp_path / "b", "seq_kd", teacher=teachers(), data=MIXED)


def test_a_streams_row_of_no_teacher_is_refused(tmp_path):
    def stream():
        for question, name in zip(QUESTIONS, [*NAMES[:5], "physics"], strict=False):
            yield {"prompt": question, "teacher": name}

    trainer = make(tmp_path, teacher=teachers(), data=IterableDataset.from_generator(stream), rollouts=by_prompt)
    with pytest.raises(ValueError, match="whose teacher is 'physics'; there are: math, code"):
        trainer.train()


def test_loaded_from_folders_in_any_method(tmp_path):
    paths = {name: save_tiny(tmp_path / name, seed=2, hidden=48) for name in ("math", "code")}
    args = config(tmp_path / "o", TokenDistillConfig, method="akl", max_steps=1)
    data = MIXED.add_column("completion", ["1+1=2"] * 8)
    trainer = TokenDistillTrainer(tiny_model(seed=1), paths, args, data, processing_class=make_tokenizer())
    trainer.train()
    assert rows(trainer)[0]["loss"] > 0 and issubclass(TSDKDTrainer, TokenDistillTrainer)
