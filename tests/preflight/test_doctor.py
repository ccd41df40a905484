"""The doctor: green on a sound set-up, and each fault that it names planted and found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from running import general, make
from tiny import QUESTIONS, prompts, save_tiny, tiny_model

from tsdkd.cli import main
from tsdkd.demo.run import shipped
from tsdkd.methods import GKD, METHODS
from tsdkd.preflight.doctor import (
    GREEN,
    RED,
    YELLOW,
    batches_of,
    disk,
    ends,
    examine,
    losses,
    pass_rates,
    precision,
    probe,
    vocabulary,
)


def rows(count=3):
    return [dict(row) for row in prompts(count)]


def levels(findings, name):
    return [finding.level for finding in findings if finding.name.startswith(name)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_examined_and_its_terms_point_the_way_they_should(tmp_path, name):
    student = tiny_model("llama", seed=1, closes_soon=True)
    data = prompts(8) if not METHODS[name]().rollouts.need_dataset else prompts(8).add_column("completion", [" 7"] * 8)
    trainer = general(tmp_path, METHODS[name](), student=student, data=data, eval_dataset=data.select(range(4)))
    found = examine(trainer, [dict(row) for row in data.select(range(3))])
    terms = [finding for finding in found if finding.name.startswith("term")]
    assert {finding.name for finding in terms} <= {f"term {term}" for term in trainer.method.terms()} and terms
    moving = name == "taid"  # its target is made of the student, too
    assert all(finding.level == GREEN or (moving and finding.level == YELLOW) for finding in terms), terms
    assert not levels(found, "ends").count(RED) and levels(found, "cut completions")


def test_a_divergence_that_is_none_and_a_gradient_that_points_up_are_red(tmp_path):
    def shifted(student_logits, teacher_logits):
        p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1) + 0.5 * (1 - torch.exp(-((p - q) ** 2).sum(-1))) + 0.1

    trainer = general(tmp_path, GKD(), student=tiny_model("llama", seed=1, closes_soon=True))
    reader_rows = rows()
    from tsdkd.inspection import Reader

    batches = batches_of(trainer, Reader(trainer).rollouts(reader_rows))
    from tsdkd.types import Divergence, DivergenceTerm, Objective

    class Odd(GKD):
        def objective(self, batch=None, state=None):
            return Objective((DivergenceTerm(name="direct", divergence=Divergence(shifted, "shifted")),))

    trainer.method = Odd()
    found = list(losses(trainer, batches))
    assert levels(found, "term direct")[0] == RED and "for a teacher equal to the student" in found[0].said

    class Up(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, other):
            ctx.save_for_backward(logits)
            return ((logits - other) ** 2).mean(-1)

        @staticmethod
        def backward(ctx, gradient):
            (logits,) = ctx.saved_tensors
            return -gradient.unsqueeze(-1) * torch.ones_like(logits) * logits, None

    class Wrong(GKD):
        def objective(self, batch=None, state=None):
            return Objective((DivergenceTerm(name="direct", divergence=Divergence(Up.apply, "up")),))

    trainer.method = Wrong()
    assert RED in levels(losses(trainer, batches), "term direct")


def test_ends_that_differ_are_yellow_and_none_is_red(tmp_path):
    teacher = tiny_model("qwen2", hidden=48, seed=2)
    teacher.generation_config.eos_token_id = [1, 5]
    trainer = make(tmp_path, teacher=teacher)
    (finding,) = [f for f in ends(trainer) if f.level == YELLOW]
    assert "the teacher stops on 1" in finding.said and "5 " in finding.said and "completions grow" in finding.said
    same = tiny_model("qwen2", hidden=48, seed=2)
    same.generation_config.eos_token_id = 1
    assert set(levels(ends(make(tmp_path / "b", teacher=same)), "ends")) == {GREEN}


def test_mass_on_ids_that_the_teacher_lacks_is_measured(tmp_path):
    from tsdkd.inspection import Reader

    student = tiny_model("llama", seed=1, vocab_size=80, closes_soon=True)
    trainer = make(tmp_path, student=student, teacher=tiny_model("qwen2", hidden=48, seed=2))
    batches = batches_of(trainer, Reader(trainer).rollouts(rows()))
    (finding,) = vocabulary(trainer, batches)
    logits = torch.cat([student.get_output_embeddings()(batch.student_hidden) for batch in batches])
    mass = logits.softmax(-1)[:, 64:].sum(-1).max().item()
    assert finding.level == YELLOW and f"at most {mass:.1e}" in finding.said and "16 ids" in finding.said


def test_the_disk_is_counted(tmp_path):
    trainer = make(tmp_path, max_steps=100, save_strategy="steps", save_steps=10)
    size = sum(p.numel() * 4 for p in trainer.model.parameters())
    for free, level in ((50 * size, GREEN), (10 * size, YELLOW), (3 * size, RED)):
        assert levels(disk(trainer, lambda place, free=free: free), "disk") == [level]
    few = make(tmp_path / "b", max_steps=100, save_strategy="steps", save_steps=10, save_total_limit=1)
    assert levels(disk(few, lambda place: 10 * size), "disk") == [GREEN]


def test_half_precision_weights_are_yellow(tmp_path):
    assert levels(precision(make(tmp_path)), "precision") == [GREEN]
    assert levels(precision(make(tmp_path / "b", student=tiny_model(seed=1).bfloat16())), "precision") == [YELLOW]


def test_the_probe_says_what_is_cut_and_where_nothing_is_to_be_taught(tmp_path):
    from tsdkd.inspection import Reader

    trainer = make(tmp_path, max_completion_length=2)
    reader = Reader(trainer)
    rollouts = reader.rollouts(rows())
    found = list(probe(reader.tables(rollouts), rollouts, 2, set(trainer.eos_ids)))
    cut = sum(len(ids) == 2 and ids[-1] != 1 for ids in rollouts.completion_ids) / 3
    assert f"{cut:.0%} do not end within 2 tokens" in next(f for f in found if f.name == "cut completions").said
    assert levels(pass_rates(([True, False], [True, True])), "pass") == [GREEN]
    assert levels(pass_rates(([True, False], [False, True])), "pass") == levels(pass_rates(None), "pass") == [YELLOW]


# ---------------------------------------------------------------------- the command


def command(tmp_path, *words, student=None):
    data = tmp_path / "p.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"prompt": q, "answer": "5"}) + "\n" for q in QUESTIONS[:8]))
    made = ["doctor", "--student", student or shipped("student"), "--teacher", shipped("teacher"), "--dataset_name", str(data)]
    made += ["--use_cpu", "--prompt_as_chat", "--max_completion_length", "60", "--rows", "3", "--max_steps", "8"]
    return [*made, "--output_dir", str(tmp_path / "o"), *words]


def test_the_command_is_green_on_the_demo_and_writes_nothing(tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "0 that stop a run" in out and "term direct" in out and "the student solves" in out and not (tmp_path / "o").exists()
    assert main(command(tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["level"] for entry in found} <= {GREEN, YELLOW} and all(entry["said"] for entry in found)
    gap = next(entry for entry in found if entry["name"] == "entropy gap")["said"]
    assert all(math.isfinite(float(number)) for number in gap.replace(",", " ").split() if number[0].isdigit())


def test_every_problem_is_listed_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    from tsdkd.trainers import sources

    monkeypatch.setattr(sources, "create_model_from_path", lambda *args, **kwargs: 1 / 0)
    assert main(command(tmp_path, "--temperature", "0", "--label_smoothing_factor", "0.1", "--auto_find_batch_size")) == 2
    out = capsys.readouterr().out
    for part in ("STOP", "temperature=0", "label_smoothing_factor", "auto_find_batch_size", "3 that stop a run"):
        assert part in out, part


def test_what_the_trainer_refuses_later_is_red_too(tmp_path, capsys):
    student = Path(save_tiny(tmp_path / "s", vocab_size=80))
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(command(tmp_path, student=str(student))) == 2
    assert "STOP" in capsys.readouterr().out


def test_answers_stand_beside_their_own_prompts(tmp_path):
    from tsdkd.cli.doctor import _answers
    from tsdkd.cli.parsing import DataArguments

    file = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{i}", "answer": str(i)} for i in range(6)] + [{"prompt": "q1", "answer": "9"}, {"prompt": "q7"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": "q4"}, {"prompt": [{"role": "user", "content": "q3"}]}, {"prompt": "q1"}, {"prompt": "q7"}]
    assert _answers(DataArguments(dataset_name=str(file)), asked) == ["4", "3", None, None]
    assert _answers(DataArguments(dataset_name=str(file), dataset_train_split="train[4:]"), asked)[:2] == ["4", None]


@pytest.mark.parametrize("words", [["--student", "nowhere/s"], ["--method", "gdk"], ["--dataset_name", "nope.jsonl"]])
def test_json_is_json_also_of_what_cannot_begin(tmp_path, capsys, words):
    command_ = command(tmp_path, "--json")
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name in command_:
            command_[command_.index(name) + 1] = value
        else:
            command_ += [name, value]
    assert main(command_) == 2
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["level"] == RED and finding["said"]
