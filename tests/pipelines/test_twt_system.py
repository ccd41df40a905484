"""TwT from a YAML file to scores, by stub teachers and tiny students: what is trained on what, kills, changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from twt import QUESTIONS, rows, run, solved

from tsdkd.cli import main
from tsdkd.pipelines.stage import Work
from tsdkd.pipelines.twt import TwTConfig, habits, stages
from tsdkd.pipelines.twt.training import Training, train


def test_from_questions_to_scores(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "sk-planted-0987654321")
    begun = []
    told = lambda start, rows, folder, *more: begun.append((start, folder)) or train(start, rows, folder, *more)  # noqa: E731
    monkeypatch.setattr(habits, "train", told)
    stub, mapping = made
    recipe = mapping()
    recipe["teachers"][0]["api_key_env"] = "PLANTED_KEY"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["pipeline", "twt", "--config", str(tmp_path / "c.yaml")]) == 0
    names = [path.name for path in sorted((tmp_path / "out").iterdir()) if path.name[0] in "01"]
    assert [name for name in names if not name.endswith("stage.json")] == [
        "01-labels.jsonl", "02-triplets.jsonl", "03-quality.jsonl", "04-diversity.jsonl", "05-student-1", "06-answers-1.jsonl",
        "07-shorter-1.jsonl", "08-student-2", "09-student-3", "10-tested.jsonl",
        "11-scores.jsonl",
    ]  # fmt: skip
    line, said = run(recipe)
    assert all("as it was made" in text for text in said)
    assert len(rows(line, "labels")) == 24 and len(rows(line, "quality")) == 16  # the unsure one is below 0.95
    quality = json.loads((tmp_path / "out" / "03-quality.stage.json").read_text())["summary"]
    assert quality["right of kept"] == 1 and quality["right of dropped"] == 0 and quality["kept of one"] == 8
    shorter = rows(line, "shorter-1")
    assert all(row["rationale"] == row["answer"] and "+" in row["longer_rationale"] for row in shorter)
    assert stub.calls == 24 + 16  # each triplet is rewritten by whoever wrote it
    scores = rows(line, "scores")
    assert [row["label"] for row in scores][::2] == ["start", "student-1", "student-2", "student-3"]
    assert {row["metric"] for row in scores} == {"accuracy", "tokens"} and all(row["n"] == 4 for row in scores)
    report = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| student-3 |" in report and "The paper's Table 1" in report and (tmp_path / "out" / "accuracy-tokens.png").is_file()
    )
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"planted" not in file.read_bytes(), file
    starts = [(Path(start).name, Path(folder).name) for start, folder in begun]
    assert starts == [
        ("student", "05-student-1.part"),
        ("05-student-1", "08-student-2.part"),
        ("08-student-2", "09-student-3.part"),
    ]


def test_what_students_are_trained_on(made, tmp_path):
    _, mapping = made
    recipe = mapping("one", "two", "three", sampling={"diversity": "all"})
    line, _ = run(recipe, until="shorter-1")
    by_name = {stage.name: stage for stage in line.stages}
    first = by_name["student-1"].training_rows()
    assert first[0] == {"prompt": QUESTIONS[0], "completion": "10+2=12\n#### 12"} and len(first) == 24
    assert by_name["student-2"].training_rows()[0]["completion"] == "12\n#### 12"
    assert (
        by_name["student-3"].training_rows()
        == [  # teachers that agree give [x; y] once
            {"prompt": q, "completion": f"#### {solved(q)[2]}"} for q in QUESTIONS[:8]
        ]
    )


@pytest.mark.parametrize(
    "more,names",
    [
        ({"compression": {"rounds": 2}}, "student-1 answers-1 shorter-1 student-2 answers-2 shorter-2 student-3 student-4"),
        ({"compression": {"by": "none"}}, "student-1 student-2"),
        ({"compression": {"by": "fixed_length"}}, "student-1 shorter-1 student-2 student-3"),
    ],
)
def test_the_orders_of_stages(made, more, names):
    _, mapping = made
    found = [stage.name for stage in stages(TwTConfig.of(mapping(**more)))]
    assert found == ["labels", "triplets", "quality", "diversity", *names.split(), "tested", "scores"]


def test_the_methods_that_the_paper_compares_with(made, tmp_path):
    stub, mapping = made
    kd = mapping(recipe="standard_kd", output_dir=str(tmp_path / "kd"), sampling={})
    line, _ = run(kd, until="triplets")
    assert stub.calls == 8 and [stage.name for stage in line.stages][2:] == ["student-1", "tested", "scores"]
    assert line.stages[2].training_rows()[0] == {"prompt": QUESTIONS[0], "completion": "#### 12"}
    tiny = mapping(recipe="tinyllm", output_dir=str(tmp_path / "tiny"), rationale_weight=0.5, sampling={})
    line, _ = run(tiny, until="triplets")
    found = line.stages[2].training_rows()
    labels = [row for row in found if row["prompt"].startswith("[label] ")]
    rationales = [row for row in found if row["prompt"].startswith("[rationale] ")]
    sums = {solved(q)[2] for q in QUESTIONS[:8]}
    assert len(rationales) == 12  # half of 24
    assert {row["completion"] for row in labels} == {f"#### {n}" for n in sums | {n + 1 for n in sums}}
    step = stages(TwTConfig.of(mapping(recipe="step_by_step", sampling={})))
    assert len(step[0].settings["teachers"]) == 1 and step[-2].settings["mark"] == "[label] "
    with pytest.raises(ValueError, match="neither selects nor compresses: leave out diversity"):
        TwTConfig.of(mapping(recipe="tinyllm"))


def test_fixed_length_compression_keeps_the_first_words(made, tmp_path):
    from tsdkd.pipelines.twt.habits import _first_words

    assert (
        _first_words("a b\nc d", 0.5) == "a b"
        and _first_words("a b\nc d", 0.75) == "a b\nc"
        and _first_words("abc", 0.1) == "abc"
    )
    assert _first_words("", 0.5) == ""


def test_the_joint_loss_reads_the_prompt_too_and_long_rows_are_counted(made, tmp_path):
    _, mapping = made
    student = mapping()["student"]
    texts = [{"prompt": q, "completion": f"#### {solved(q)[2]}"} for q in QUESTIONS]
    losses = {}
    for kind in ("completion", "joint"):
        (tmp_path / kind).mkdir()
        options = Training(epochs=1, lora_r=0, batch_size=4, loss_on=kind, max_length=120, learning_rate=1e-4)
        said = train(student, texts, tmp_path / kind, options, seed=0)
        losses[kind] = said["loss"]
        assert said["rows"] == 12 and said["steps"] == 3
    assert losses["completion"] != losses["joint"]
    (tmp_path / "short").mkdir()
    with pytest.raises(ValueError, match="no row fits into max_length=5"):
        train(student, texts, tmp_path / "short", Training(max_length=5), seed=0)


def test_a_lora_student_is_whole_again(made, tmp_path):
    pytest.importorskip("peft")
    _, mapping = made
    texts = [{"prompt": q, "completion": "#### 1"} for q in QUESTIONS]
    folder = tmp_path / "lora"
    folder.mkdir()
    train(mapping()["student"], texts, folder, Training(epochs=1, lora_r=2, learning_rate=1e-2), seed=0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not (folder / "adapter_config.json").exists() and not (folder / "run").exists()
    start = AutoModelForCausalLM.from_pretrained(mapping()["student"])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


CHILD = """
import os, sys, yaml
from tsdkd.pipelines.stage import Work
from tsdkd.pipelines.twt import TwTConfig, pipeline
import tsdkd.data.rows as rows
add, count = rows.RowFile.add, [0]
def counted(self, row):
    add(self, row)
    if {where!r} in str(self.path):
        count[0] += 1
        if count[0] == {after}:
            os.kill(os.getpid(), 9)
rows.RowFile.add = counted
pipeline(TwTConfig.of(yaml.safe_load(open({config!r}))), print).run()
"""


@pytest.mark.parametrize(
    "where,after,until,calls",
    [
        ("replies/one", 3, "labels", 24),
        ("01-labels", 10, "labels", 24),
        ("02-triplets", 5, "triplets", 24),
        ("03-quality", 4, "quality", 24),
        ("04-diversity", 6, "diversity", 24),
        ("06-answers", 4, "answers-1", 24),
        ("replies/two", 12, "shorter-1", 40),
        ("07-shorter", 3, "shorter-1", 40),
        ("10-tested", 6, None, 40),
    ],
)
def test_a_kill_in_any_stage_repeats_no_call(made, tmp_path, where, after, until, calls):
    stub, mapping = made
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(mapping()))
    code = CHILD.format(where=where, after=after, config=str(tmp_path / "c.yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    line, _ = run(mapping(), until=until)
    # What was in flight as the process died was answered to nobody: of two other teachers four at a time, and of this one.
    assert calls <= stub.calls <= calls + 12 if where.startswith("replies") else stub.calls == calls
    assert len(line.stages[0].rows) == 24 and all(stage.about for stage in line.stages[: 1 + (until is None)])


def test_a_kill_in_training_goes_on_at_an_epoch(made, tmp_path):
    _, mapping = made
    recipe = mapping(training={"epochs": 3, "lora_r": 0, "max_length": 200, "batch_size": 4})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    code = f"""
import os, yaml
from tsdkd.data import commits
from tsdkd.pipelines.twt import TwTConfig, pipeline
write = commits.write_manifest
def then_die(folder, about=None):
    write(folder, about)
    if folder.name == "checkpoint-8":
        os.kill(os.getpid(), 9)
commits.write_manifest = then_die
pipeline(TwTConfig.of(yaml.safe_load(open({str(tmp_path / "c.yaml")!r}))), print).run(until="student-1")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (tmp_path / "out" / "05-student-1.part" / "run" / "checkpoint-8").is_dir()
    line, _ = run(recipe, until="student-1")
    ours = (line.stages[4].output / "model.safetensors").read_bytes()
    whole, _ = run({**recipe, "output_dir": str(tmp_path / "whole")}, until="student-1")
    assert ours == (whole.stages[4].output / "model.safetensors").read_bytes()


def test_work_keeps_the_first_row_of_an_id(tmp_path):
    from tsdkd.data.rows import RowFile

    with RowFile(tmp_path / "x") as file:
        work = Work("x", file, None, print)
        work.add({"id": "1", "n": 1})
        work.add({"id": "1", "n": 2})
    assert (tmp_path / "x").read_text() == '{"id": "1", "n": 1}\n'
    assert Path(tmp_path / "x").is_file()
