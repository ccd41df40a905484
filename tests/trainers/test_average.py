"""Teachers whose logits are averaged, by hand; and how much of the student's probability they cover."""

from __future__ import annotations

import pytest
import torch
from oracles import generalized_jsd
from running import by_prompt, general, gradients_by_batching, make, rows
from tiny import QUESTIONS, prompts, save_tiny, tiny_model

from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import TSDKD

WEIGHTS = {"a": 3.0, "b": 1.0}


def both(**options):
    return {
        "a": tiny_model("granite", seed=2, hidden=48),
        "b": tiny_model("llama", seed=3, hidden=64, vocab_size=70, **options),
    }


def logits_by_hand(model, ids, completion):
    with torch.no_grad():
        return model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1, :64].double()


def test_the_loss_is_that_of_the_mean_of_their_logits(tmp_path):
    """A family that scales its logits, another width and vocabulary; half of the mean's weight more would be another loss."""
    teachers, student, wanted = both(), tiny_model(seed=1), {}
    for weights in ({"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.5}):
        total, count = 0.0, 0
        for question in QUESTIONS[:8]:
            ids = make_tokenizer()(question)["input_ids"]
            completion = by_prompt(ids)
            ours = logits_by_hand(student, ids, completion)
            mean = sum(weight * logits_by_hand(teachers[name], ids, completion) for name, weight in weights.items())
            for s, t in zip(ours, mean, strict=True):
                total, count = total + float(generalized_jsd(s.tolist(), t.tolist(), 0.5)), count + 1
        wanted[weights["a"]] = total / count
    trainer = general(
        tmp_path, "gkd", student=student, teacher=teachers, rollouts=by_prompt, teacher_weights=WEIGHTS, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, method_options={"beta": 0.5}, eval_dataset=prompts(8),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted[0.75], rel=1e-4)
    trainer.train()
    row = rows(trainer)[0]
    assert row["loss"] == pytest.approx(wanted[0.75], rel=1e-4) and abs(wanted[0.5] - wanted[0.75]) > 1e-3
    assert row["time/teacher/a"] > 0


def test_a_teacher_averaged_with_itself_is_itself(tmp_path):
    """All three terms; also where one is swapped."""
    found = []
    one = lambda: tiny_model(seed=2, hidden=48)  # noqa: E731
    twice = {"a": {"model": one()}, "b": {"model": one(), "placement": "swap"}}
    for number, teacher in enumerate((one(), twice)):
        more = {"teacher_weights": WEIGHTS} if number else {}
        trainer = make(tmp_path / str(number), teacher=teacher, rollouts=by_prompt, max_steps=2, **more)
        trainer.train()
        found.append(rows(trainer))
    names = ("loss", "loss/direct", "loss/indirect", "loss/entropy", "teacher/entropy", "teacher/coverage", "grad_norm")
    for alone, averaged in zip(*found, strict=True):
        for name in names:
            assert averaged[name] == pytest.approx(alone[name], rel=1e-4), name


def test_micro_batches_do_not_change_a_step(tmp_path):
    flat = gradients_by_batching(tmp_path, ((8, 1), (2, 4)), teacher=both(), teacher_weights=WEIGHTS)
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_averaged_is_refused(tmp_path):
    named = prompts(8).add_column("teacher", ["a", "b"] * 4)
    for options, told in (
        ({"teacher_weights": {"a": 1.0}}, "the teachers are: a, b: give a weight to each"),
        ({"teacher_weights": {"a": 1.0, "b": 0}}, "the teacher b has the weight 0"),
        ({"teacher_weights": WEIGHTS, "data": named}, "has a column 'teacher'"),
        ({"teacher_weights": WEIGHTS, "teacher": tiny_model(seed=2)}, "there is one teacher"),
        ({"teacher_weights": WEIGHTS, "default_teacher": "a"}, "default_teacher has no effect"),
    ):
        with pytest.raises(ValueError, match=told):
            make(tmp_path, **{"teacher": both(), **options})
    capped = {"a": tiny_model("gemma2", seed=2), "b": tiny_model(seed=3)}
    with pytest.raises(ValueError, match="caps its logits"):
        make(tmp_path, teacher=capped, teacher_weights=WEIGHTS, rollouts=by_prompt).train()
    folders = {name: save_tiny(tmp_path / name, seed=2) for name in ("a", "b")}
    other = make_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(folders["b"])
    with pytest.raises(ValueError, match="chat templates differ"):
        make(tmp_path, teacher=folders, teacher_weights=WEIGHTS)


def test_another_mean_is_another_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "rollouts": by_prompt}
    make(tmp_path, teacher=both(), teacher_weights=WEIGHTS, **options).train()
    with pytest.raises(ValueError, match="teacher"):
        other = make(tmp_path, teacher=both(), teacher_weights={"a": 1.0, "b": 3.0}, **options)
        other.train(str(tmp_path / "checkpoint-1"))


def test_coverage_is_the_students_probability_of_the_teachers_best(tmp_path):
    """By hand, of each completion's first token, which is every sixteenth of completions that are shorter."""
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48, vocab_size=70)
    trainer = general(
        tmp_path, TSDKD(), student=student, teacher=teacher, rollouts=lambda ids: by_prompt(ids)[:1], eval_dataset=prompts(6),
        per_device_eval_batch_size=1,
    )  # fmt: skip
    total = 0.0
    for question in QUESTIONS[:6]:
        ids = make_tokenizer()(question)["input_ids"]
        s, t = (logits_by_hand(model, ids, by_prompt(ids)[:1])[0] for model in (student, teacher))
        best = sorted(range(64), key=lambda i: -t[i])[:10]
        total += sum(s.softmax(-1)[i].item() for i in best)
    assert trainer.evaluate()["eval_teacher/coverage"] == pytest.approx(total / 6, rel=1e-4)
