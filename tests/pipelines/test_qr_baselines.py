"""The paper's baselines from a YAML file to scores: what each asks, keeps and teaches; what runs share; what a run reports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from api import Stub, reply
from qr import mapping_of, run
from tiny import save_tiny
from twt import QUESTIONS, rows, solved

from tsdkd.pipelines.published import published, published_table
from tsdkd.pipelines.qr_distill import QRConfig, stages
from tsdkd.pipelines.qr_distill.report import PAPER, draw_routing, last_epoch, report, routing_rates, routing_table


def answer(body, times):
    """Solves, and does what the baselines ask for besides; an inverse question is answered wrongly for even numbers."""
    text = body["messages"][-1]["content"]
    if text.startswith("Rephrase"):
        return reply(text.rpartition("\n")[2].replace("buys", "gets"))
    if text.startswith("Write a new question"):
        return reply("Ann has 3 pens. Ann buys 4 more. How many pens now?")
    if text.startswith("Write the inverse"):
        a, b, total = solved(text.partition("Question: ")[2])
        return reply(f"Tom has {total} apples and bought {b}. How many before?")
    if text.startswith("Below are a question with its answer"):
        agrees = text.partition("Tom has ")[2].split()[0] == text.rpartition("The answer is: ")[2].split()[0]
        return reply(f"Verdict: {'valid' if agrees else 'invalid'}")
    if "How many before?" in text:
        numbers = [int(word) for word in text.replace(".", " ").split() if word.isdigit()]
        start = numbers[0] - numbers[1]
        return reply(f"Back.\nThe answer is: {start + (start % 2 == 0)}")
    a, b, total = solved(text)
    return reply(f"{a}+{b}={total}\nThe answer is: {total}")


@pytest.fixture
def made(httpserver, tmp_path):
    stub = Stub(httpserver, answer)
    students = [save_tiny(tmp_path / "a", seed=1, positions=256), save_tiny(tmp_path / "b", seed=2, hidden=48, positions=256)]
    return stub, mapping_of(stub, tmp_path, students, encoder="nobody's: no router reads paths here")


def taught(recipe):
    """The rows that students are taught, and the pipeline."""
    line, _ = run(recipe)
    return rows(line, next(stage.name for stage in reversed(line.stages) if stage.name in ("lessons", "correct"))), line


def test_skd_is_one_path_a_question_and_every_student_alone(made):
    stub, mapping = made
    lessons, line = taught(mapping(recipe="skd"))
    assert [row["style"] for row in lessons] == ["chain_of_thought"] * 6 and stub.calls == 6
    assert all("step by step" in text for text in stub.order)
    log = [json.loads(text) for text in (line.stages[2].output / "log.jsonl").read_text().splitlines()]
    assert all(row["rates"] == [1.0, 1.0] and row["mutual"] == 0 for row in log)
    assert [row["label"] for row in rows(line, "scores")][::2] == ["start-1", "start-2", "student-1", "student-2"]


def test_step_by_step_teaches_label_and_rationale_as_two_tasks_and_asks_for_the_label(made):
    _stub, mapping = made
    lessons, line = taught(mapping(recipe="step_by_step", marks={"label": "L: "}))
    question = QUESTIONS[0]
    assert [(row["question"], row["path"]) for row in lessons[:2]] == [
        (f"[rationale] {question}", "10+2=12\nThe answer is: 12"),
        (f"L: {question}", "The answer is: 12"),
    ]
    asked = line.stages[-2]
    assert asked.prompt("q", "student-1") == "L: q" and asked.prompt("q", "start-1").startswith("q")


def test_answer_augmentation_asks_twice(made):
    stub, mapping = made
    lessons, _ = taught(mapping(recipe="answer_aug"))
    assert len(lessons) == 12 and stub.calls == 12 and len(set(stub.order)) == 6


def test_rephrased_questions_keep_their_label_and_new_ones_have_none(made):
    _stub, mapping = made
    lessons, _ = taught(mapping(recipe="rephrase", replies_dir=None))
    assert len(lessons) == 12 and sum("gets" in row["question"] for row in lessons) == 6
    assert all(row["label"] == str(solved(row["question"])[2]) for row in lessons)
    lessons, _ = taught(mapping(recipe="question_aug", output_dir=mapping()["output_dir"] + "-new"))
    new = [row for row in lessons if row["style"] == "question_aug"]
    assert len(new) == 6 and all(row["question"].startswith("Ann") and row["label"] is None for row in new)


def test_backward_teaches_three_tasks_of_what_agrees(made):
    _stub, mapping = made
    lessons, line = taught(mapping(recipe="backward"))
    assert len(rows(line, "consistent")) == 3 and len(lessons) == 9  # of six, three begin with an odd number
    forward, inverse, back = lessons[:3]
    assert forward["question"] == QUESTIONS[1] and inverse["question"] == f"[inverse] {QUESTIONS[1]}"
    assert inverse["path"] == back["question"] == "Tom has 14 apples and bought 3. How many before?"
    assert back["path"].endswith("The answer is: 11")


def test_without_the_filter_wrong_paths_are_kept_and_counted(made):
    stub, mapping = made
    stub.answer = lambda body, times: reply("The answer is: 1000")
    with pytest.raises(ValueError, match="no path reaches"):
        run(mapping(judge=None, recipe="sft"))
    line, said = run(mapping(judge=None, recipe="sft", keep_wrong=True))
    assert len(rows(line, "correct")) == 36 and any("wrong and kept, vanilla 6" in text for text in said)


def test_runs_share_what_was_paid_for(made, tmp_path):
    stub, mapping = made
    shared = str(tmp_path / "shared")
    run(mapping(recipe="skd", replies_dir=shared))
    run(mapping(recipe="step_by_step", replies_dir=shared, output_dir=str(tmp_path / "other")))
    assert stub.calls == 6 and (tmp_path / "shared" / "t.jsonl").is_file()
    from tsdkd.data import commits

    with (
        commits.locked(tmp_path / "shared", "a test holds it"),
        pytest.raises(ValueError, match=r"is in use by process \d+.*keeps its replies there"),
    ):
        run(mapping(recipe="sft", replies_dir=shared, output_dir=str(tmp_path / "third")))


@pytest.mark.parametrize(
    "more,told",
    [
        ({"recipe": "sdk"}, "recipe='sdk'"),
        ({"requests": {"rephrse": "{question}"}}, "requests is a mapping with rephrase"),
        ({"requests": {"rephrase": "no field"}}, "requests.rephrase has the fields"),
        ({"marks": ["x"]}, "marks is a mapping with label"),
        ({"answer_alone": "x"}, "answer_alone has the fields"),
        ({"keep_wrong": 1}, "keep_wrong=1 must be true or false"),
        ({"recipe": "skd", "styles": {"mine": "{question}"}}, "asks for the style chain_of_thought"),
        ({"training": {"learning_rates": [1, 1], "lora_r": 0, "four_bit": True}}, "four_bit: true trains adapters"),
        ({"training": {"learning_rates": [1, 1], "decay": "cosine"}}, "decay='cosine'"),
        ({"training": {"learning_rates": [1, 1], "rate": [0.5, 2]}}, "rate=2"),
    ],
)
def test_bad_recipes_are_told(made, more, told):
    with pytest.raises(ValueError, match=told):
        QRConfig.of(made[1](**more))


def test_no_encoder_is_made_where_no_router_reads(made):
    _, mapping = made
    names = lambda **more: [stage.name for stage in stages(QRConfig.of(mapping(**more)))]  # noqa: E731
    assert "encoded" in names() and "encoded" not in names(recipe="sft")
    assert "encoded" not in names(training={"learning_rates": [1, 1], "routing": "random"})


# ------------------------------------------------------------------ what a run reports

ROUTED = [
    {"step": step, "id": f"{n}/{style}", "problem": n, "style": style, "level": str(1 + n % 2), "to": to}
    for step, to in ((0, [0, 0]), (1, [1, 0]))
    for n in range(4)
    for style in ("vanilla", "program")
]


def test_routing_is_told_by_style_and_level_of_the_last_epoch():
    rows = last_epoch(ROUTED)
    assert len(rows) == 8 and routing_rates(rows) == {"program": [1.0, 0.0], "vanilla": [1.0, 0.0]}
    assert routing_rates(ROUTED, "level") == {"1": [0.5, 0.0], "2": [0.5, 0.0]}
    told = routing_table(ROUTED)
    assert "| program | 4 | 100.0% | 0.0% |" in told and "| level 2 | 4 | 100.0% | 0.0% |" in told
    assert routing_table([{**row, "to": [1, 1]} for row in ROUTED]) == ""  # everything to all is no routing


def test_pictures_of_the_routing(tmp_path):
    from PIL import Image

    sizes = []
    for name, some in (
        ("both.png", ROUTED),
        ("styles.png", [{k: v for k, v in row.items() if k != "level"} for row in ROUTED]),
    ):
        with Image.open(draw_routing(some, tmp_path / name)) as image:
            sizes.append(image.size)
    assert sizes[0][0] > 2 * sizes[1][0]  # three panels beside one
    with pytest.raises(ValueError, match="nothing was routed"):
        draw_routing([], tmp_path / "none.png")


def test_the_report_has_the_papers_tables(made):
    _, mapping = made
    line, _ = run(mapping(recipe="skd"))
    told = report(line.stages[-1].output, line.stages[2].output, line.folder)
    assert "| student-2 |" in told and "RevTHINK, Mistral-7B-Instruct | 70.97" in (line.folder / "report.md").read_text()


def test_the_papers_tables_are_whole():
    tables = published(PAPER)
    assert {number: len(table["rows"]) for number, table in tables.items()} == {"1": 17, "2": 8}
    off = []
    for number, table in tables.items():
        for row in table["rows"]:
            *values, mean = row["values"]
            if abs(sum(values) / len(values) - mean) > 0.006:
                off.append((number, row["label"], row["student"]))
    assert off == [("1", "Zero-shot", "Gemini-1.5-Pro-001"), ("2", "w/o QF", "Mistral-7B-Instruct")]  # as their notes say
    assert "74.98" in published_table(PAPER, "1") and "65.96" in published_table(PAPER, "2")


# ------------------------------------------------------------------ several processes


def test_several_processes_are_told_to_make_alone_what_one_makes(made, monkeypatch):
    _, mapping = made
    from tsdkd.pipelines import pipeline as module

    class One:
        is_first = True

        def wait(self):
            """Alone."""

    monkeypatch.setattr(module, "is_one_of_several", lambda: True)
    monkeypatch.setattr(module, "Processes", One)
    with pytest.raises(
        ValueError, match=r"make students together, and one process makes paths, correct before.*until_stage correct"
    ):
        run(mapping(recipe="skd"))


def test_two_processes_train_what_one_trains(made, tmp_path):
    """The stage of the students under torchrun: weights, log and routing as one process's, but for the order of sums."""
    import torch
    import yaml
    from safetensors.torch import load_file

    _, mapping = made
    encoder = save_tiny(tmp_path / "encoder", seed=3, positions=256)
    made_by: dict[int, tuple] = {}
    for world in (1, 2):
        recipe = mapping(encoder=encoder, judge=None, test=None, output_dir=str(tmp_path / f"of-{world}"))
        run(recipe, until="encoded")
        if world == 1:
            run(recipe)
        else:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "tsdkd"]
            command += ["pipeline", "qr-distill", "--config", str(tmp_path / "c.yaml")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("students: paths 36") == 1
        folder = tmp_path / f"of-{world}" / "05-students"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        names = ("student-1/model", "student-2/model", "router", "mutual")
        weights = {name: load_file(folder / f"{name}.safetensors") for name in names}
        made_by[world] = log, (folder / "routing.jsonl").read_text(), weights
    (log, routed, weights), (their, their_routed, their_weights) = made_by[1], made_by[2]
    assert routed == their_routed and len(log) == len(their) == 12
    assert [row["loss"] for row in their] == pytest.approx([row["loss"] for row in log], rel=1e-4)
    assert any(row["mutual"] > 0 for row in log)
    start = load_file(tmp_path / "a" / "model.safetensors")
    for name, own in weights.items():
        for key, value in own.items():
            torch.testing.assert_close(their_weights[name][key], value, rtol=1e-3, atol=2e-4)
    moved = max((weights["student-1/model"][key] - value).abs().max() for key, value in start.items())
    assert moved > 5e-3
