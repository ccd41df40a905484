"""Tables from rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_rows import BY_NAME, row

from tsdkd.cli import main
from tsdkd.evaluation.layout import as_csv, draw, markdown, side_by_side
from tsdkd.evaluation.tables import (
    STUDENT,
    TEACHER,
    mcnemar,
    name_in_paper,
    paper,
    tables_of,
    unpaired,
)


def test_the_transcription_is_whole_and_its_notes_are_true():
    tables = paper()
    assert list(tables) == [str(number) for number in range(1, 10)]
    for number, table in tables.items():
        assert set(table["columns"]) <= set(BY_NAME), number
        for name, values in table["rows"].items():
            assert len(values) == len(table["columns"]) and all(0 < value < 100 for value in values), (number, name)
        for label, column in table["starred"]:
            at = table["columns"].index(column)
            assert table["rows"][label][at] > table["rows"]["Teacher"][at]

    def of(number, label):
        return dict(zip(tables[number]["columns"], tables[number]["rows"][label], strict=True))

    def mean(number, label):
        return round(sum(of(number, label).values()) / len(tables[number]["columns"]), 2)

    assert of("1", "MiniLLM")["MBPP"] > of("1", "TSD-KD")["MBPP"] and of("6", "TSD-KD")["MBPP"] == 40.1
    assert (mean("1", "TSD-KD"), mean("6", "TSD-KD"), mean("6", "TSD-KD (off-policy)")) == (45.67, 45.33, 43.72)
    above = {label for label in tables["2"]["rows"] if of("2", label)["SciQ"] > of("2", "Teacher")["SciQ"]}
    assert above == {"TSD-KD", "Sequence-Level KD", "Supervised-KD", "Speculative KD", "GKD"}
    leads = []
    for column in tables["2"]["columns"]:
        others = [of("2", label)[column] for label in tables["2"]["rows"] if label not in ("Teacher", "TSD-KD")]
        leads.append(of("2", "TSD-KD")[column] / max(others) - 1)
    assert max(leads) == pytest.approx(0.081, abs=5e-4)
    assert of("4", "MiniLLM")["IFEval"] > of("4", "Teacher")["IFEval"]
    assert min(of("5", label)["MATH"] for label in ("MiniLLM", "GKD")) > of("5", "Teacher")["MATH"]
    stars = [(number, column) for number in "1245" for label, column in tables[number]["starred"] if label == "TSD-KD"]
    assert stars == [("1", "MATH"), ("2", "SciQ"), ("4", "MBPP"), ("4", "IFEval"), ("5", "MATH")]
    assert of("5", "TSD-KD")["MATH"] / of("5", "Teacher")["MATH"] == pytest.approx(1.25)
    assert of("9", "GKD")["MATH"] > of("9", "TSD-KD")["MATH"]
    assert of("3", "gate + indirect + entropy") == {k: v for k, v in of("1", "TSD-KD").items() if k != "MBPP"}


def test_best_runner_up_star_and_difference():
    rows = [row("teacher", "GSM8K", 0.60), row("student", "GSM8K", 0.50), row("gkd", "GSM8K", 0.62)]
    rows += [row("tsd_kd", "GSM8K", 0.64), row("my own", "GSM8K", 0.40), row("tsd_kd", "SciQ", 0.93)]
    made = tables_of(rows)
    (first, second) = made["without chat template"]
    assert (first.number, first.columns, second.number, second.columns) == ("1", ["GSM8K"], "2", ["SciQ"])
    assert first.labels == [TEACHER, STUDENT, "GKD", "TSD-KD", "my own"]
    text = markdown(first)
    assert "| TSD-KD | **64.0**\\*† |" in text and "| GKD | <u>62.0</u>\\*† |" in text and "| Teacher | 60.0 |" in text
    assert "| my own | 40.0† |" in text and "| Student | 50.0 |" in text
    # The paper's block has every row of its own; ours less the paper's stands where both are.
    assert "| TSD-KD | 60.1 (+3.9) |" in text and "| Teacher | 80.3 (-20.3‡) |" in text and "| DistiLLM | 57.2 |" in text
    (ahead,) = tables_of([row("teacher", "SciQ", 0.9), row("gkd", "SciQ", 0.8), row("a", "SciQ", 0.7)])["without chat template"]
    assert ahead.ranked("SciQ") == ({"GKD"}, {"a"})  # the teacher is not ranked
    assert "on MBPP MiniLLM is" in text and "93.0\\*" in markdown(second)


def test_a_whole_row_stands_before_a_partial_one_and_a_later_before_an_earlier():
    rows = [row("gkd", "GSM8K", 0.5), row("gkd", "GSM8K", 0.9, partial=True), row("gkd", "SciQ", 0.3), row("gkd", "SciQ", 0.4)]
    rows += [row("gkd", "BBH", 0.2, partial=True)]
    first, second = tables_of(rows)["without chat template"]
    assert first.cells["GKD", "GSM8K"].score == 0.5 and second.cells["GKD", "SciQ"].score == 0.4
    assert "20.0~" in markdown(second)


def test_what_was_scored_otherwise_or_in_part_is_neither_ranked_nor_compared():
    rows = [row("teacher", "GSM8K", 0.6, shots=5), row("student", "GSM8K", 0.5, shots=5), row("gkd", "GSM8K", 0.55, shots=5)]
    rows += [
        row("a", "GSM8K", 0.9, shots=5, settings={"max_gen_toks": 2048}),
        row("b", "GSM8K", 0.99, n=2, partial=True, shots=5),
    ]
    (table,) = tables_of(rows)["without chat template"]
    text = markdown(table)
    assert "| a | 90.0§ |" in text and "| b | 99.0~ |" in text and "| GKD | **55.0**† |" in text
    assert table.against_student("a", "GSM8K") is None and not table.above_teacher("b", "GSM8K")
    cells = {c["label"]: c for c in csv.DictReader(io.StringIO(as_csv({"without chat template": [table]})))}
    assert cells["Student"]["runner_up"] == "True" and cells["a"]["best"] == "False"


def test_where_less_is_better_the_least_is_best_and_is_no_percentage(tmp_path):
    less = {"higher_is_better": False, "stderr": 0.1}
    rows = [row("teacher", "perplexity", 9.5, **less), row("student", "perplexity", 12.5, **less)]
    rows += [row("gkd", "perplexity", 9.25, **less), row("gkd", "mine", 0.5)]
    (table,) = tables_of(rows)["without chat template"]
    text = markdown(table)
    assert "| GKD | **9.25**\\*† | 50.0 |" in text and "| Student | <u>12.5</u> |" in text
    draw({"without chat template": [table]}, tmp_path / "t.png")  # of what are shares alone


def test_the_tables_are_those_of_the_models_and_labels_that_the_rows_name():
    def numbers(*rows):
        return [table.number for table in tables_of(rows)["without chat template"]]

    assert numbers(row("tsd_kd", "GSM8K", 0.5, model="Qwen/Qwen2.5-1.5B"), row("gkd", "SciQ", 0.5)) == ["1", "2"]
    assert numbers(row("tsd_kd", "GSM8K", 0.5, model="google/gemma-2-2b-it")) == ["4"]
    assert numbers(row("tsd_kd", "GSM8K", 0.5, model="Qwen/Qwen3-1.7B")) == ["5"]
    assert numbers(row("tsd_kd_adaptive", "GSM8K", 0.5)) == ["1", "7"]
    (third,) = tables_of([row("tsd_kd", "GSM8K", 0.5), row("gate + indirect", "GSM8K", 0.4)], ["3"])["without chat template"]
    assert third.labels == ["gate + indirect", "gate + indirect + entropy"]
    assert third.against_paper("gate + indirect + entropy", "GSM8K")[0] == pytest.approx(-10.1)


def test_settings_and_other_tasks_have_tables_of_their_own():
    rows = [row("a", "GSM8K", 0.5), row("a", "GSM8K", 0.7, chat=True), row("a", "my_task", 0.1)]
    made = tables_of(rows)
    assert [table.number for table in made["without chat template"]] == ["1", None]
    assert (
        made["without chat template"][1].columns == ["my_task"]
        and "paper" not in markdown(made["without chat template"][1])[60:]
    )
    assert made["with chat template"][0].cells["a", "GSM8K"].score == 0.7
    assert [t.number for t in tables_of(rows, ["5"])["without chat template"]] == ["5", None]


def test_roles_by_label_and_what_is_refused():
    rows = [row("Qwen2.5-14B", "GSM8K", 0.9), row("tsd-kd", "GSM8K", 0.5)]
    (table,) = tables_of(rows, teacher="Qwen2.5-14B")["without chat template"]
    assert table.labels == [TEACHER, "TSD-KD"]
    with pytest.raises(ValueError, match=r"no row has the label 'x'; there are: Qwen2\.5-14B, tsd-kd"):
        tables_of(rows, student="x")
    with pytest.raises(ValueError, match="the paper has no table '10'"):
        tables_of(rows, ["10"])
    for name, label in (("seq_kd", "Sequence-Level KD"), ("Speculative-KD", "Speculative KD"), ("other", "other")):
        assert name_in_paper(name) == label


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_mcnemar_is_the_sign_test_of_the_items_that_differ(pairs):
    """Against all ways in which the differing items could have fallen, each as likely."""
    ours, theirs = ("".join(str(int(pair[i])) for pair in pairs) for i in (0, 1))
    signs = [a - b for a, b in pairs if a != b]
    seen = abs(sum(signs))
    ways = [abs(sum(way)) >= seen for way in itertools.product((-1, 1), repeat=len(signs))]
    assert mcnemar(ours, theirs) == pytest.approx(sum(ways) / len(ways))
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours)


def test_the_same_items_are_compared_in_pairs_and_others_by_their_errors():
    generator = random.Random(0)
    base = [generator.random() < 0.5 for _ in range(400)]
    better = [was or generator.random() < 0.08 for was in base]  # nothing lost, a few gained
    strings = ["".join(str(int(x)) for x in xs) for xs in (base, better)]
    scores = [sum(xs) / 400 for xs in (base, better)]

    def marked(which):
        rows = [row("student", "GSM8K", scores[0], right=strings[0], n=400)]
        rows += [row("gkd", "GSM8K", scores[1], right=strings[1], n=400, which=which)]
        (table,) = tables_of(rows)["without chat template"]
        return table.against_student("GKD", "GSM8K")

    paired, apart = marked("same"), marked("another set")
    assert paired == (mcnemar(strings[1], strings[0]), True) and paired[0] < 0.001
    z = (scores[1] - scores[0]) / math.sqrt(sum(s * (1 - s) / 400 for s in scores))
    assert apart[1] is False and apart[0] == pytest.approx(math.erfc(z / math.sqrt(2))) and apart[0] > 0.05
    assert unpaired(0.0, 0.0) == 1.0 and unpaired(0.1, 0.0) == 0.0
    with pytest.raises(ValueError, match="3 items are compared with 2"):
        mcnemar("111", "11")


def test_the_command_writes_markdown_csv_and_a_picture(tmp_path, capsys):
    rows = [row("teacher", "GSM8K", 0.8), row("student", "GSM8K", 0.5), row("tsd_kd", "GSM8K", 0.6), row("gkd", "mine", 0.1)]
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(r.to_json()) + "\n" for r in rows))
    assert main(["table", str(results), "--png", str(tmp_path / "t.png"), "--out", str(tmp_path / "t.md")]) == 0
    assert "### Table 1:" in (tmp_path / "t.md").read_text() and (tmp_path / "t.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(["table", str(results), "--format", "csv", "--table", "1"]) == 0
    cells = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(c["label"], c["benchmark"], c["score"]) for c in cells][2:] == [
        ("TSD-KD", "GSM8K", "60.0000"),
        ("GKD", "mine", "10.0000"),
    ]
    assert (cells[2]["best"], cells[2]["above_teacher"], cells[2]["paper"], cells[2]["difference"]) == (
        "True",
        "False",
        "60.1",
        "-0.1000",
    )
    assert main(["table", str(tmp_path / "none.jsonl")]) == 2 and "there is no file" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["table", str(tmp_path / "empty.jsonl")]) == 2 and "no rows are in" in capsys.readouterr().err
    assert as_csv({}).startswith("table,chat_template")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({}, tmp_path / "x.png")


def test_answers_to_one_item_stand_side_by_side(tmp_path, capsys):
    common = {"task": "t", "filter": "none", "chat_template": False, "prompt": "How many?", "target": "4", "taken": []}
    samples = [{**common, "model": m, "item": i, "answer": f"{m} says {i}", "accuracy": float(i)} for m in "ab" for i in (0, 1)]
    samples.append({**samples[0], "filter": "another filter of the same answer"})
    text = side_by_side(samples, "t", 0)
    assert text.index("a says 0") < text.index("b says 0") and text.count("a says 0") == 1 and "says 1" not in text
    assert "**a** (accuracy 0)" in text and "> How many?" in text
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    assert main(["table", str(tmp_path / "s.jsonl"), "--item", "t", "1"]) == 0 and "b says 1" in capsys.readouterr().out
    (tmp_path / "r.jsonl").write_text(json.dumps(row("a", "GSM8K", 0.5).to_json()) + "\n")
    assert main(["table", str(tmp_path / "r.jsonl"), "--item", "t", "0"]) == 2 and "a file of scores" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "s.jsonl"), "--item", "t", "7"]) == 2 and "item 7 of t" in capsys.readouterr().err
