"""What a paper's table needs: items, intervals, averages, LaTeX, a picture that can be printed."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from score_rows import row

from tsdkd.cli import main
from tsdkd.data.intervals import wilson_interval
from tsdkd.evaluation.layout import as_csv, latex, markdown
from tsdkd.evaluation.tables import tables_of

ROWS = [
    row("teacher", "GSM8K", 0.9, n=100),
    row("student", "GSM8K", 0.0, n=100),
    row("tsd_kd", "GSM8K", 0.4, n=100),
    row("tsd_kd", "ARC-C", 0.5, n=200),
    row("student", "ARC-C", 0.3, n=200),
]


def table():
    (several,) = tables_of(ROWS, ["1", "2"]).values()
    return next(one for one in several if "GSM8K" in one.columns)


def test_a_cell_has_its_items_and_wilsons_interval_also_at_the_edge():
    text = markdown(table())
    low, high = wilson_interval(0, 100)
    assert f"{100 * low:.1f}-{100 * high:.1f}, n = 100" in text and "0.0-3.7, n = 100" in text
    rows = list(csv.DictReader(io.StringIO(as_csv(tables_of(ROWS, ["1", "2"])))))
    student = next(r for r in rows if r["label"] == "Student" and r["benchmark"] == "GSM8K")
    assert (float(student["low"]), float(student["high"])) == pytest.approx((100 * low, 100 * high), abs=1e-3)


def test_the_average_is_of_whole_rows_alone():
    rows = [row("a", name, score) for name, score in (("x", 0.2), ("y", 0.6))] + [row("b", "x", 0.5)]
    (several,) = tables_of(rows).values()
    (one,) = [t for t in several if t.columns == ["x", "y"]]
    assert one.average("a") == pytest.approx(0.4) and one.average("b") is None
    lines = markdown(one).splitlines()
    assert next(line for line in lines if line.startswith("|  |")).endswith("| average |")
    assert next(line for line in lines if line.startswith("| a |")).endswith("| 40.0 |")


def test_latex_is_a_tabular_with_the_best_bold_and_nothing_unescaped():
    rows = [row("a_b", "x_1", 0.2), row("c&d", "x_1", 0.6), row("a_b", "y%", 0.7), row("c&d", "y%", 0.3)]
    (several,) = tables_of(rows).values()
    text = latex(several[0])
    assert text.count(r"\begin{tabular}{lrrr}") == text.count(r"\end{tabular}") == 1
    assert r" & x\_1 & y\% & Average \\" in text and r"c\&d & \textbf{60.0} & \underline{30.0} & 45.0 \\" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {3} and "items & 1000 & 1000 &" in text


def test_the_command_writes_into_folders_that_it_makes_and_refuses_what_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(each.to_json()) + "\n" for each in ROWS))
    out, picture = tmp_path / "a" / "t.tex", tmp_path / "b" / "t.pdf"
    assert main(["table", str(file), "--format", "latex", "--out", str(out), "--png", str(picture)]) == 0
    assert r"\toprule" in out.read_text() and picture.read_bytes().startswith(b"%PDF")
    capsys.readouterr()
    assert main(["table", str(file), "--out", str(tmp_path)]) == 2
    assert "cannot be written: there is a folder of that name" in capsys.readouterr().err


@pytest.mark.parametrize("template", [True, False])
def test_items_are_put_as_the_model_is_talked_to_and_that_is_said(tmp_path, capsys, template):
    from tiny import tiny_model

    from tsdkd.data.rows import read_scores
    from tsdkd.demo.recreate import make_tokenizer

    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    run = tmp_path / "run" / "checkpoint-3"
    tiny_model("llama").save_pretrained(run)
    tokenizer.save_pretrained(run)
    command = ["evaluate", "--model", str(run), "--tasks", "tsdkd_word_problems", "--limit", "1", "--max_gen_toks", "4"]
    assert main([*command, "--out", str(tmp_path / "r.jsonl"), "--batch_size", "1"]) == 0
    out = capsys.readouterr().out
    assert ("as chats: the model has a chat template" in out) == template and "--chat_template says otherwise" in out
    rows = read_scores(tmp_path / "r.jsonl")
    assert {each.chat_template for each in rows} == {template}
    assert {each.label for each in rows} == {"run/checkpoint-3"}  # every run has one of that name


def test_both_chat_settings_stand_in_one_panel(tmp_path, monkeypatch):
    """With a template filled, without it white, each once a benchmark."""
    import matplotlib.axes
    import matplotlib.colors

    from tsdkd.evaluation.layout import draw

    faces: dict[str, list] = {}
    titles = matplotlib.axes.Axes.set_title

    def titled(axis, text, **more):
        marks = [line for line in axis.lines if line.get_marker() == "o"]
        faces.setdefault(text, []).append([matplotlib.colors.to_hex(line.get_markerfacecolor()) for line in marks])
        return titles(axis, text, **more)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", titled)
    both = [row(label, name, 0.4, chat=chat) for label in ("gkd", "teacher") for name in ("x", "y") for chat in (True, False)]
    draw(tables_of(both), tmp_path / "both.png")
    assert sorted(faces) == ["x", "y"] and [len(found) for found in faces.values()] == [1, 1]
    assert all(found[0].count("#ffffff") == 2 and len(found[0]) == 4 for found in faces.values())
    draw(tables_of([one for one in both if one.chat_template]), tmp_path / "one.png")
    assert "#ffffff" not in faces["x"][-1][0]
