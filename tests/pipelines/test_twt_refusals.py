"""What TwT refuses, and when: before anything is paid for, where that can be known."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from api import reply
from tiny import save_tiny
from twt import QUESTIONS, rows, run, small_embedder, teacher

from tsdkd.pipelines.twt import TwTConfig


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
        ({"student": 5}, "student=5"),
        ({"problems": ["a"]}, "problems="),
        ({"seed": "x"}, "seed='x'"),
        ({"rationale_weight": "2"}, "rationale_weight='2'"),
        ({"rationale_weight": float("nan")}, "rationale_weight=nan"),
        ({"output_dir": None}, "output_dir is empty"),
        ({"task": {"factors": ["x"]}}, "factors of the task"),
        ({"task": {"answer": 5}}, "answer=5"),
        ({"task": {"ask": None}}, "a task's ask must be a text"),
        ({"task": ["maths"]}, r"task \['maths'\] is unknown"),
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
        run(mapping(sampling={"threshold": 0.999, "diversity": "random"}))


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
    stub, mapping = made
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"q": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, row 1 has no question"):
        run(mapping(problems=str(tmp_path / "bad.jsonl")))
    (tmp_path / "none.jsonl").write_text('{"question": "a"}\n')
    stub.asked.clear()
    with pytest.raises(ValueError, match=r"none\.jsonl, row 0 has no answer"):
        run(mapping(test=str(tmp_path / "none.jsonl")))
    assert stub.calls == 0  # told before anything is asked


def test_a_student_without_an_end_is_told_before_any_call(made, tmp_path):
    stub, mapping = made
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "student" / name
        if file.is_file():
            stated = {
                key: value for key, value in json.loads(file.read_text()).items() if key not in ("eos_token", "pad_token")
            }
            file.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="has no eos_token"):
        run(mapping())
    assert stub.calls == 0


def test_a_refusal_or_a_part_is_no_rationale(made):
    stub, mapping = made

    def answer(body, times):
        if "previous thinking process" not in body["messages"][-1]["content"]:
            return teacher(body, times)
        if body["model"] == "one":
            return reply("I'm sorry, but I can't assist with that.")
        return reply("Thinking: the first half of", finish="content_filter")

    stub.answer = answer
    line, said = run(mapping(), until="shorter-1")
    assert all(row["rationale"] == row["longer_rationale"] for row in rows(line, "shorter-1"))
    assert "as they were, no thinking 8" in said[-1] and "as they were, filtered 8" in said[-1]


def test_costs_are_of_all_replies_also_after_an_interruption(made, tmp_path):
    stub, mapping = made
    recipe = mapping("one", "two")
    for spec in recipe["teachers"]:
        spec["price"] = {"input": 1000, "output": 2000}
    whole = run(recipe, until="labels")[0].stages[0].about["summary"]
    assert whole["tokens read"] == 160 and whole["cost"] == pytest.approx(16 * (10 * 1000 + 5 * 2000) / 1e6)
    (tmp_path / "out" / "01-labels.jsonl").unlink()
    file = tmp_path / "out" / "replies" / "one.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    again = run(recipe, until="labels")[0].stages[0].about["summary"]
    assert again["cost"] == whole["cost"] and again["calls of this run"] == 5 and stub.calls == 16 + 5


def test_blank_labels_are_none_and_folders_of_problems_are_read_again(made, tmp_path):
    stub, mapping = made
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"question": QUESTIONS[0], "answer": " "}) + "\n")
    recipe = mapping(problems=str(folder))
    line, said = run(recipe, until="quality")
    assert "right of kept" not in said[-1] and len(rows(line, "labels")) == 3
    (folder / "train.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS[:2]))
    line, said = run(recipe, until="labels")
    assert len(rows(line, "labels")) == 6 and stub.calls == 6
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "a", "answer": ""}) + "\n")
    with pytest.raises(ValueError, match="no answer to score by"):
        run(mapping(problems=str(folder)))


def test_scores_of_before_are_not_shown_for_students_of_now(made, tmp_path, capsys):
    from tsdkd.cli import main

    _, mapping = made
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(mapping()))
    assert main(["pipeline", "twt", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "| student-3 |" in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(mapping(seed=5)))
    assert main(["pipeline", "twt", "--config", str(tmp_path / "c.yaml"), "--until_stage", "student-1"]) == 0
    said = capsys.readouterr().out
    assert "student-1: made again (seed 0 → 5)" in said and "| student-3 |" not in said


def test_what_is_missing_is_told_before_any_call(made, tmp_path, monkeypatch):
    stub, mapping = made
    for more, told in (
        ({"sampling": {"embedding_model": str(tmp_path / "nothing")}}, "embedding model"),
        ({"compression": {"by": "compressor"}}, "pip install llmlingua"),
        ({"student": str(tmp_path / "nobody")}, "nobody"),
    ):
        with pytest.raises(ValueError, match=told):
            run(mapping(**more))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="peft"):
        run(mapping(training={"lora_r": 4}))
    assert stub.calls == 0


def test_another_student_at_the_same_place_is_another_input(made, tmp_path):
    _, mapping = made
    run(mapping(), until="student-1")
    for file in (tmp_path / "student").iterdir():
        file.touch()  # copied, or unpacked again
    _, said = run(mapping(), until="student-1")
    assert all("as it was made" in text for text in said)
    save_tiny(tmp_path / "student", seed=2, positions=256)
    _, said = run(mapping(), until="student-1")
    assert "made again (from's files" in next(text for text in said if text.startswith("student-1"))


def test_a_file_of_ones_own_in_a_stages_place(made, tmp_path):
    _, mapping = made
    line, _ = run(mapping(), until="diversity")
    file = line.stages[3].output
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    line, said = run(mapping(), until="student-1", accepted=["diversity"])
    assert len(rows(line, "diversity")) == 1 and "rows 1," in said[-1]
    line, said = run(mapping(), until="student-1")
    assert "as it was made (accepted as it stands 1)" in said[3] and "as it was made" in said[4]
    file.write_text('{"id": "0", "question": "a"}\n')
    with pytest.raises(
        ValueError, match="cannot be accepted: rows of it have no answer, confidence, problem, rationale, teacher"
    ):
        run(mapping(), accepted=["diversity"])
    with pytest.raises(ValueError, match="no stage 'divrsity'"):
        run(mapping(), accepted=["divrsity"])


def test_stages_of_another_order_are_put_aside(made, tmp_path):
    _, mapping = made
    run(mapping())
    line, said = run(mapping(compression={"by": "none"}))
    assert any(text.startswith("06-answers-1.jsonl is no stage of this order") for text in said)
    left = sorted(path.name for path in (tmp_path / "out").glob("[0-9][0-9]-*") if "stage" not in path.name)
    assert left == sorted(stage.output.name for stage in line.stages)


def test_with_real_embeddings(made):
    _, mapping = made
    line, said = run(mapping("one", "two", "three", sampling={"embedding_model": small_embedder()}), until="diversity")
    assert len(rows(line, "diversity")) == 16 and "pairs 8" in said[-1]
    assert all(row["similarity"] == pytest.approx(1.0, abs=1e-5) for row in rows(line, "diversity"))  # they say the same


def test_a_dry_run_counts_calls_and_money(made, tmp_path):
    stub, mapping = made
    recipe = mapping()
    for spec in recipe["teachers"]:
        spec.update(price={"input": 1000, "output": 2000}, max_tokens=10)
    said = run(recipe, dry_run=True)[1]
    assert "labels: would be made: 24 calls, about" in said[0] and stub.calls == 0 and not (tmp_path / "out").exists()
    assert "shorter-1: would be made: at most 16 calls" in said
    assert said[-1].startswith("24 calls, about") and said[-1].endswith("nothing was done")


def test_problems_that_changed_are_asked_for_and_the_others_are_not_again(made, tmp_path):
    stub, mapping = made
    run(mapping(), until="labels")
    file = tmp_path / "problems.jsonl"
    file.write_text(file.read_text() + json.dumps({"question": QUESTIONS[9], "answer": "1"}) + "\n")
    line, said = run(mapping(), until="labels")
    assert "made again (what it reads has changed)" in said[0] and stub.calls == 24 + 3 and len(rows(line, "labels")) == 27
