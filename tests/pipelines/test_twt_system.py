"""TwT from a YAML file to scores, by stub teachers and tiny students; kills, bad input, and what is trained on what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from api import Stub, reply
from tiny import save_tiny

from tsdkd.cli import main
from tsdkd.pipelines.stage import Work
from tsdkd.pipelines.twt import TwTConfig, habits, pipeline, stages
from tsdkd.pipelines.twt.training import Training, train

QUESTIONS = [f"Tom has {n} apples. Tom buys {n % 5 + 2} more. How many apples now?" for n in range(10, 22)]


def solved(question):
    numbers = [int(word) for word in question.replace(".", " ").split() if word.isdigit()]
    return numbers[0], numbers[1], sum(numbers[:2])


def teacher(body, times):
    """Solves, with a score by its name; rewrites to the sum alone."""
    text, name = body["messages"][-1]["content"], body["model"]
    a, b, total = solved(text)
    if "previous thinking process" in text:
        return reply(f"Thinking: {total}")
    score = {"one": 0.99, "two": 0.97, "three": 0.96, "unsure": 0.5}[name]
    wrong = total + 1 if name == "unsure" else total
    return reply(f"Thinking: {a}+{b}={wrong}\n\nThe answer is: {wrong}\n\nscore: {score}")


@pytest.fixture
def made(httpserver, tmp_path):
    """A stub server, and what makes a configuration's mapping."""
    stub = Stub(httpserver, teacher)
    student = save_tiny(tmp_path / "student", seed=1, positions=256)
    for name in ("problems", "test"):
        rows = [{"question": q, "answer": str(solved(q)[2])} for q in QUESTIONS[: 8 if name == "problems" else 4]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mapping(*names, **more):
        teachers = [{"name": n, "base_url": stub.url, "model": n, "tries": 2} for n in names or ("one", "two", "unsure")]
        recipe = {
            "student": student, "problems": str(tmp_path / "problems.jsonl"), "test": str(tmp_path / "test.jsonl"),
            "teachers": teachers, "output_dir": str(tmp_path / "out"), "sampling": {"diversity": "random"},
            "training": {"epochs": 1, "lora_r": 0, "max_length": 200}, "inference": {"max_tokens": 8},
        }  # fmt: skip
        return {**recipe, **more}

    return stub, mapping


def run(recipe, **how):
    said = []
    line = pipeline(TwTConfig.of(recipe), said.append)
    line.run(**how)
    return line, said


def rows(line, name):
    return next(stage for stage in line.stages if stage.name == name).rows


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
        "07-shorter-1.jsonl", "08-student-2", "09-student-3", "10-scores.jsonl",
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
    assert found == ["labels", "triplets", "quality", "diversity", *names.split(), "scores"]


def test_the_methods_that_the_paper_compares_with(made, tmp_path):
    stub, mapping = made
    kd = mapping(recipe="standard_kd", output_dir=str(tmp_path / "kd"))
    line, _ = run(kd, until="triplets")
    assert stub.calls == 8 and [stage.name for stage in line.stages][2:] == ["student-1", "scores"]
    assert line.stages[2].training_rows()[0] == {"prompt": QUESTIONS[0], "completion": "#### 12"}
    tiny = mapping(recipe="tinyllm", output_dir=str(tmp_path / "tiny"), rationale_weight=0.5)
    line, _ = run(tiny, until="triplets")
    found = line.stages[2].training_rows()
    labels = [row for row in found if row["prompt"].startswith("[label] ")]
    rationales = [row for row in found if row["prompt"].startswith("[rationale] ")]
    sums = {solved(q)[2] for q in QUESTIONS[:8]}
    assert len(rationales) == 12  # half of 24
    assert {row["completion"] for row in labels} == {f"#### {n}" for n in sums | {n + 1 for n in sums}}
    step = stages(TwTConfig.of(mapping(recipe="step_by_step")))
    assert len(step[0].settings["teachers"]) == 1 and step[-1].settings["mark"] == "[label] "


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
        ("10-scores", 3, None, 40),
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


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "more,told",
    [
        ({"studnt": "x"}, "unknown fields: studnt"),
        ({"teachers": []}, "lacks teachers"),
        ({"teachers": {"name": "x"}}, "teachers is a list"),
        ({"task": "chess"}, "task 'chess' is unknown"),
        ({"recipe": "kd"}, "recipe='kd'"),
        ({"sampling": {"threshold": 2}}, "threshold"),
        ({"sampling": {"treshold": 0.5}}, "sampling has no treshold"),
        ({"sampling": {"quality": "log_probability"}}, "log_probs: true of every teacher"),
        ({"compression": {"by": "magic"}}, "by='magic'"),
        ({"training": {"loss_on": "all"}}, "loss_on='all'"),
        ({"inference": {"engine": "tgi"}}, "engine='tgi'"),
        ({"limit": 0}, "limit"),
    ],
)
def test_bad_recipes_are_told(made, more, told):
    _, mapping = made
    with pytest.raises(ValueError, match=told):
        TwTConfig.of(mapping(**more))


def test_two_teachers_of_one_name(made):
    _, mapping = made
    with pytest.raises(ValueError, match="two teachers are called one"):
        TwTConfig.of(mapping("one", "one"))


def test_a_threshold_that_keeps_nothing_says_the_best(made):
    _, mapping = made
    with pytest.raises(ValueError, match=r"0\.999 keeps none of 24 triplets; the highest confidence is 0\.99"):
        run(mapping(sampling={"threshold": 0.999}))


def test_a_teacher_that_writes_nothing_parseable_is_shown(made):
    stub, mapping = made
    stub.answer = lambda body, times: reply("As a large language model, 7.")
    with pytest.raises(ValueError, match=r"none of 24 replies .*\(no thinking 24\).*'As a large language model, 7\.'"):
        run(mapping())


def test_a_key_that_is_missing_is_told_before_any_call(made, monkeypatch):
    stub, mapping = made
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    recipe = mapping()
    recipe["teachers"][2]["api_key_env"] = "NO_SUCH_KEY"
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        run(recipe)
    assert stub.calls == 0


def test_requests_that_fail_end_the_stage_unless_they_may(made):
    stub, mapping = made
    stub.answer = lambda body, times: 400 if body["model"] == "two" and "11 apples" in str(body) else teacher(body, times)
    with pytest.raises(ValueError, match=r"1 of 24 requests failed after every try .*allow_failed"):
        run(mapping())
    line, said = run(mapping(sampling={"allow_failed": 0.05, "diversity": "random"}), until="labels")
    assert len(rows(line, "labels")) == 23 and "failed 1" in said[-1]


def test_a_teacher_that_is_down_stops_the_others_soon(made, tmp_path):
    stub, mapping = made

    def answer(body, times):
        if body["model"] == "two":
            return 503
        time.sleep(0.05)
        return teacher(body, times)

    stub.answer = answer
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"question": f"{n} and 3"}) + "\n" for n in range(300)))
    recipe = mapping(problems=str(tmp_path / "many.jsonl"))
    for spec in recipe["teachers"]:
        spec.update(tries=1)
    with pytest.raises(ConnectionError, match=r"'two'.*gives no more replies"):
        run(recipe)
    assert stub.calls < 150  # of 900
    kept = sum(
        len(path.read_text().splitlines())
        for path in (tmp_path / "out" / "replies").glob("*.jsonl")
        if "failed" not in path.name
    )
    assert kept >= stub.calls - 12


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_a_line_and_what_was_asked_is_kept(made, tmp_path, number, status):
    stub, mapping = made
    stub.answer = lambda body, times: time.sleep(0.1) or teacher(body, times)
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"question": f"{n} and 3"}) + "\n" for n in range(400)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(mapping(problems=str(tmp_path / "many.jsonl"))))
    command = [sys.executable, "-m", "tsdkd", "pipeline", "twt", "--config", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while stub.calls < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in err and "The same command goes on" in err, (out, err)
    assert stub.calls < 400
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out" / "replies").glob("*.jsonl"))
    assert kept == stub.calls  # nothing that was on its way is lost


def test_files_of_problems(made, tmp_path):
    _, mapping = made
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"q": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, row 1 has no question"):
        run(mapping(problems=str(tmp_path / "bad.jsonl")))
    (tmp_path / "none.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"none\.jsonl, row 0 has no answer"):
        run(mapping(test=str(tmp_path / "none.jsonl"), compression={"by": "none"}))


def test_a_dry_run_counts_calls_and_money(made, tmp_path):
    stub, mapping = made
    recipe = mapping()
    for spec in recipe["teachers"]:
        spec.update(price={"input": 1000, "output": 2000}, max_tokens=10)
    said = run(recipe, dry_run=True)[1]
    assert "labels: would be made: 24 calls, about" in said[0] and stub.calls == 0 and not (tmp_path / "out").exists()
    assert "as many calls as the stages before it leave" in next(text for text in said if text.startswith("shorter-1"))
    assert said[-1].startswith("24 calls, about") and said[-1].endswith("nothing was done")


def test_problems_that_changed_are_asked_for_and_the_others_are_not_again(made, tmp_path):
    stub, mapping = made
    run(mapping(), until="labels")
    file = tmp_path / "problems.jsonl"
    file.write_text(file.read_text() + json.dumps({"question": QUESTIONS[9], "answer": "1"}) + "\n")
    line, said = run(mapping(), until="labels")
    assert "made again (what it reads has changed)" in said[0] and stub.calls == 24 + 3 and len(rows(line, "labels")) == 27


def test_work_keeps_the_first_row_of_an_id(tmp_path):
    from tsdkd.data.rows import RowFile

    with RowFile(tmp_path / "x") as file:
        work = Work("x", file, None, print)
        work.add({"id": "1", "n": 1})
        work.add({"id": "1", "n": 2})
    assert (tmp_path / "x").read_text() == '{"id": "1", "n": 1}\n'
    assert Path(tmp_path / "x").is_file()
