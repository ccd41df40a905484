"""Scores while training and of a comparison."""

from __future__ import annotations

import json

import pytest
from running import make, rows
from scoring import ON, items, local_task
from tiny import config, prompts

from tsdkd import TSDKDConfig
from tsdkd.cli import main
from tsdkd.cli.evaluate import bundled_tasks
from tsdkd.data.rows import read_scores
from tsdkd.demo.run import shipped
from tsdkd.evaluation import harness
from tsdkd.evaluation.run import Model, evaluate
from tsdkd.evaluation.while_training import EvaluateWhileTraining


def test_training_is_scored_kept_by_the_best_and_not_disturbed(tmp_path):
    folder = local_task(tmp_path / "t", items(6))

    def run(name, scored):
        options = dict(max_length=128, max_completion_length=24, max_steps=4, learning_rate=1e-3, seed=3)
        trainer = make(
            tmp_path / name,
            student=shipped("student"),
            teacher=shipped("teacher"),
            data=prompts(16, chat=True),
            processing_class=None,
            args=config(tmp_path / name, TSDKDConfig, **options),
        )
        if scored:
            trainer.add_callback(
                EvaluateWhileTraining(
                    trainer, ["local"], 2, best="local/accuracy", include_path=[folder], chat_template=True, batch_size=6
                )
            )
        trainer.train()
        return trainer

    scored, plain = run("scored", True), run("plain", False)
    assert [row["loss"] for row in rows(scored)] == [row["loss"] for row in rows(plain)]  # the same answers were sampled
    kept = read_scores(tmp_path / "scored" / "benchmarks.jsonl")
    assert [row.step for row in kept] == [0, 2, 4] and all(row.n == 6 for row in kept)
    logged = [row["eval_local/accuracy"] for row in scored.state.log_history if "eval_local/accuracy" in row]
    assert logged == [row.score for row in kept] and scored.model.training
    best = json.loads((tmp_path / "scored" / "best" / "best.json").read_text())
    assert best["score"] == max(logged) and best["step"] == kept[logged.index(max(logged))].step
    # The student of the last step, scored by the command, has the last row's score.
    scored.save_model(str(tmp_path / "last"))
    model = Model.at(str(tmp_path / "last"))
    (again,) = evaluate(
        ["local"],
        model,
        lambda: harness.hf_model(str(tmp_path / "last"), dtype="float32", batch_size=6),
        [ON],
        tmp_path / "r.jsonl",
        include_path=[folder],
    )
    assert again.items == kept[-1].items


def test_what_cannot_be_scored_is_refused_before_the_first_step(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match="is no score of these tasks; there are: tsdkd_word_problems/accuracy"):
        EvaluateWhileTraining(
            trainer, ["tsdkd_word_problems"], 5, best="tsdkd_word_problems/acc", include_path=[bundled_tasks()]
        )
    with pytest.raises(ValueError, match="eval_every=0"):
        EvaluateWhileTraining(trainer, ["tsdkd_word_problems"], 0, include_path=[bundled_tasks()])


def test_train_takes_eval_tasks_from_the_command_line(tmp_path):
    from tsdkd.cli.train import build, parse

    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p["question"]}) + "\n" for p in items(8)))
    command = ["--student", shipped("student"), "--teacher", shipped("teacher"), "--dataset_name", str(tmp_path / "p.jsonl")]
    command += ["--output_dir", str(tmp_path / "o"), "--use_cpu", "--eval_tasks", "tsdkd_word_problems", "--eval_limit", "4"]
    command += ["--eval_chat_template", "--eval_every", "1", "--max_steps", "1", "--per_device_train_batch_size", "8"]
    trainer = build(*parse([*command, "--max_length", "128", "--report_to", "none", "--prompt_as_chat"]))
    trainer.train()
    start, row = read_scores(tmp_path / "o" / "benchmarks.jsonl")
    assert start.step == 0
    assert row.partial and row.n == 4 and row.step == 1


def test_a_comparison_is_scored_on_tasks(tmp_path, capsys):
    folder = local_task(tmp_path / "t", items(4))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p["question"]}) + "\n" for p in items(8, 7)))
    recipe = tmp_path / "recipe.yaml"
    lines = [f"model_name_or_path: {shipped('student')}", f"teacher_model_name_or_path: {shipped('teacher')}"]
    lines += [
        f"dataset_name: {tmp_path / 'p.jsonl'}",
        "prompt_as_chat: true",
        "use_cpu: true",
        "max_length: 128",
        "max_steps: 1",
    ]
    lines += ["per_device_train_batch_size: 8", "report_to: none", "save_strategy: 'no'"]
    recipe.write_text("\n".join(lines) + "\n")
    command = ["compare", "--methods", "gkd,tsd_kd", "--config", str(recipe), "--out", str(tmp_path / "c.jsonl")]
    command += ["--eval_tasks", "local", "--eval_include_path", str(folder), "--eval_chat_template"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "| method | local/accuracy | lowest-highest | seeds |" in table
    made = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["label"] for row in made] == ["student", "teacher", "gkd", "tsd_kd"]
    assert all(row["n"] == {"local": 4} for row in made)


def test_a_run_does_not_compete_with_what_another_left_in_its_folder(tmp_path):
    folder = local_task(tmp_path / "t", items(3))
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    (best / "best.json").write_text('{"name": "local/accuracy", "score": 0.99, "step": 7}')
    (tmp_path / "run" / "benchmarks.jsonl").write_text('{"step": 7}\n')
    options = dict(max_length=128, max_completion_length=24, max_steps=2)
    trainer = make(
        tmp_path / "run",
        student=shipped("student"),
        teacher=shipped("teacher"),
        processing_class=None,
        args=config(tmp_path / "run", TSDKDConfig, **options),
        data=prompts(8, chat=True),
    )
    trainer.add_callback(
        EvaluateWhileTraining(trainer, ["local"], 2, best="local/accuracy", include_path=[folder], chat_template=True)
    )
    trainer.train()
    assert json.loads((best / "best.json").read_text())["step"] in (0, 2)
    assert [row.step for row in read_scores(tmp_path / "run" / "benchmarks.jsonl")] == [0, 2]
    assert (tmp_path / "run" / "benchmarks.before.jsonl").exists() and (best / "best.before.json").exists()
