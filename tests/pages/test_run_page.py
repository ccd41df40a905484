"""The run page and figures: what is read from a run's folder, whole, broken or unfinished, and what the browser shows of it."""

from __future__ import annotations

import json
import math

import pytest
from running import by_prompt, general, make

from tsdkd.cli import main
from tsdkd.data.intervals import wilson_interval
from tsdkd.data.runs import SCHEMA, read_run, runs_in
from tsdkd.methods import GKD
from tsdkd.reporting.figures import PALETTE, look, plot, pyplot
from tsdkd.reporting.panels import differences, labels, panels, rest
from tsdkd.reporting.run_page import run_page


def write(folder, rows, record=None, samples=(), benchmarks=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if record is not None:
        (folder / "run.json").write_text(json.dumps({"schema": SCHEMA, **record}))
    for name, more in (("samples.jsonl", samples), ("benchmarks.jsonl", benchmarks)):
        if more:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in more))
    return folder


def made_up(folder, rate=1e-3, terms=None):
    rows = [
        {
            "step": step,
            "loss": 2.0 / step,
            "loss/direct": 0.5 / step,
            "loss/indirect": 10.0 / step,
            "student/entropy": 1.0 / step,
            "odd": 1,
        }
        for step in (10, 20, 30)
    ]
    rows += [{"step": step, "accuracy": a, "low": a - 0.1, "high": a + 0.1, "n": 50} for step, a in ((0, 0.2), (30, 0.6))]
    rows.append({"step": 30, "train_runtime": 5.0, "train_loss": 1.0})
    record = {"method": "tsd_kd", "terms": terms or {"direct": 1.0, "indirect": 0.1}, "command": "tsdkd train --x <y>"}
    record |= {"config": {"learning_rate": rate, "output_dir": str(folder), "seed": 1}, "method_options": {"beta": 0.9}}
    sample = {"step": 1, "prompt": "Q <b>", "tokens": [" a", "\n", "<script>x</script>"], "columns": {
        "student_entropy": [0.1, 0.9, 0.5], "opener": [1, 0, 0], "top_entropy": [0, 1, 0]}}  # fmt: skip
    return write(folder, rows, record, [sample, {**sample, "step": 30}])


def test_a_training_run_leaves_a_page_that_its_own_numbers_stand_in(tmp_path):
    trainer = general(tmp_path / "o", GKD(beta=0.5), max_steps=4, rollouts=by_prompt, logging_steps=1)
    trainer.train()
    run = read_run(tmp_path / "o")
    assert run.record["schema"] == SCHEMA and run.record["terms"] == {"direct": 1.0} and run.missing == []
    page = (tmp_path / "o" / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (terms,) = [panel for panel in data["panels"] if panel["title"] == "Terms of the loss"]
    logged = [row for row in run.rows if "loss/direct" in row]
    assert terms["lines"][0]["points"] == [[row["step"], float(f"{row['loss/direct']:.6g}")] for row in logged]
    steps = [sample["step"] for sample in run.samples]
    assert steps == [1, 1, 2, 2, 4, 4] and [s["step"] for s in data["samples"][0]] == steps
    assert run.record["command"] and "GKD" in page


def test_kept_completions_have_the_losses_own_numbers(tmp_path):
    trainer = make(tmp_path, max_steps=2, rollouts=by_prompt, num_candidates=4, sample_completions=1)
    seen = []
    terms_of = trainer.loop.loss._terms
    trainer.loop.loss._terms = lambda *args: seen.append(terms_of(*args)) or seen[-1]
    trainer.train()
    rows = read_run(tmp_path).samples
    assert [row["step"] for row in rows] == [1, 2]
    first = seen[0]
    length = int(first.mask[0].sum())
    assert len(rows[0]["tokens"]) == length
    for name, expected in (
        ("student_entropy", first.student_entropy),
        ("teacher_entropy", first.teacher_entropy),
        ("gate", first.gate),
        ("opener", first.opener_mask.double()),
        ("top_entropy", first.top_entropy_mask.double()),
    ):
        assert rows[0]["columns"][name] == pytest.approx(expected[0, :length].tolist(), abs=1e-5), name
    everything = sum(result.contribution.sum() for result in first.terms.values())
    assert everything.item() == pytest.approx(first.loss.item(), rel=1e-5)
    make(tmp_path / "none", max_steps=1, rollouts=by_prompt, sample_completions=0).train()
    assert read_run(tmp_path / "none").samples == []


def test_several_runs_are_told_apart_by_what_differs(tmp_path):
    runs = [read_run(made_up(tmp_path / name, rate)) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    assert differences(runs) == {"learning_rate": [1e-3, 2e-3]} and labels(runs) == [
        "learning_rate=0.001",
        "learning_rate=0.002",
    ]
    same = [read_run(made_up(tmp_path / name)) for name in ("c", "d")]
    assert labels(same) == ["c", "d"]
    found = {panel.title: panel for panel in panels(runs)}
    assert {"Score: accuracy", "Terms of the loss: loss/direct", "Terms of the loss: loss/indirect"} <= found.keys()
    assert [line.points[0] for line in found["Terms of the loss: loss/indirect"].lines] == [(10, 0.1), (10, 0.1)]  # weighted
    assert found["Score: accuracy"].lines[0].points == [(0, 0.2, 0.1, pytest.approx(0.3)), (30, 0.6, 0.5, 0.7)]
    assert [panel.title for panel in rest(runs)] == ["odd"]


def test_the_speed_of_each_part_is_the_tokens_by_its_seconds(tmp_path):
    rows = [{"step": 1, "tokens_per_second": 100.0, "time/rollout": 3.0, "time/loss": 1.0, "time/teacher": 0.0}]
    (panel,) = [p for p in panels([read_run(write(tmp_path, rows, {}))]) if p.title == "Speed by part"]
    lines = {line.label: line.points for line in panel.lines}
    assert lines == {"speed/rollout": [(1, pytest.approx(400 / 3))], "speed/loss": [(1, pytest.approx(400.0))]}


def test_benchmarks_have_wilsons_intervals(tmp_path):
    rows = [
        {"step": s, "task": "t", "metric": "acc", "score": v, "n": 40, "main": True, "stderr": 0.07}
        for s, v in ((0, 0.25), (9, 0.5))
    ]
    run = read_run(write(tmp_path / "r", [{"step": 1, "loss": 1.0}], {}, benchmarks=rows))
    assert [(s["step"], s["low"], s["high"]) for s in run.scores] == [
        (0, *wilson_interval(10, 40)),
        (9, *wilson_interval(20, 40)),
    ]


@pytest.mark.parametrize(
    "files,told",
    [
        ({}, ["run.json is not there", "metrics.jsonl is not there"]),
        ({"run.json": "{", "metrics.jsonl": ""}, ["run.json cannot be read", "metrics.jsonl is empty"]),
        (
            {"run.json": "[]", "metrics.jsonl": '{"step": 1, "loss": 1}\n{"step": 2, "lo'},
            ["holds no mapping", "line 2 cannot be read"],
        ),
        ({"run.json": '{"schema": 99}', "metrics.jsonl": '{"step": 1, "loss": NaN}\n'}, ["later version", "has not ended"]),
        (
            {"run.json": "{}", "metrics.jsonl": '3\n{"loss": 1}\n', "samples.jsonl": "{}\nx"},
            ["line 1 cannot", "samples.jsonl: line 2"],
        ),
        ({"metrics.jsonl": "\xff\xfe\x00"}, ["metrics.jsonl"]),
    ],
)
def test_a_broken_or_unfinished_run_gives_a_page_that_says_so(tmp_path, files, told, capsys):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for part in told:
        assert part in out and part in page, part


def test_the_command_takes_folders_of_runs_and_draws_figures(tmp_path, capsys):
    for name in ("a", "b"):
        made_up(tmp_path / "all" / name, 1e-3 if name == "a" else 2e-3)
    assert [run.folder.name for run in runs_in([tmp_path / "all"])] == ["a", "b"]
    command = ["report", str(tmp_path / "all"), "--out", str(tmp_path / "x" / "r.html")]
    assert main([*command, "--png", str(tmp_path / "png"), "--pdf", str(tmp_path / "pdf")]) == 0
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert "score-accuracy.png" in pictures and len(pictures) == len(list((tmp_path / "pdf").glob("*.pdf")))
    assert (tmp_path / "png" / "score-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "2 runs: the page is" in capsys.readouterr().out
    for wrong, message in ((["report", str(tmp_path / "none")], "there is no folder"), (["report"], "required")):
        try:
            assert main(wrong) == 2
        except SystemExit as ended:
            assert ended.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--png", str(tmp_path / "none")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_the_page_in_a_browser(opened, tmp_path):
    runs = [read_run(made_up(tmp_path / name, rate)) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    page = opened(run_page(runs))
    assert page.locator("#panels figure").count() == 5
    first = page.locator("#panels figure", has_text="Terms of the loss: loss/direct")
    box = first.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 60)
    assert first.locator(".value").inner_text() == "step 30: learning_rate=0.001 0.01667, learning_rate=0.002 0.01667"
    assert first.locator("path").count() == 2
    first.locator(".legend button").first.click()
    assert first.locator("path").count() == 1
    assert first.locator(".legend button").first.get_attribute("aria-pressed") == "false"
    assert page.locator("#strips .strip").count() == 4  # steps 1 and 30 of both runs
    strip = page.locator("#strips .strip").first
    assert strip.locator("span").all_text_contents() == ["·a", "↵\n", "<script>x</script>"]
    assert strip.locator("span.opener").count() == 1 and strip.locator("span.top").count() == 1
    page.locator("#pick button", has_text="30").first.click()
    assert page.locator("#strips .strip").count() == 3
    page.locator("#others summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#rest figure")
    assert "tsdkd train --x <y>" in page.locator("pre", has_text="tsdkd train").first.inner_text()


def test_a_run_has_one_colour_in_every_panel_also_where_another_has_no_curve(opened, tmp_path):
    one, two = made_up(tmp_path / "a", 1e-3), made_up(tmp_path / "b", 2e-3)
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    write(one, [{name: value for name, value in row.items() if name != "loss/indirect"} for row in rows])
    runs = [read_run(one), read_run(two)]
    page = opened(run_page(runs))
    alone = page.locator("#panels figure", has_text="Terms of the loss: loss/indirect").locator("path")
    both = page.locator("#panels figure", has_text="Terms of the loss: loss/direct").locator("path")
    assert alone.count() == 1 and both.count() == 2
    assert alone.first.get_attribute("stroke") == both.nth(1).get_attribute("stroke") != both.nth(0).get_attribute("stroke")
    axis = pyplot().figure().subplots()
    plot(axis, next(panel for panel in panels(runs) if panel.title.endswith("loss/indirect")))
    assert axis.get_lines()[0].get_color() == look(1)["color"]


def test_a_score_stands_once_in_the_table(tmp_path):
    runs = [read_run(made_up(tmp_path / name, rate)) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    given = [{"label": name, "name": "accuracy", "step": 30, "score": 0.6, "low": 0.5, "high": 0.7, "n": 50} for name in "ab"]
    table = run_page(runs, scores=given).split("<h2>Scores</h2>")[1].split("</table>")[0]
    assert table.count("<tr>") == 1 + 2 + 2  # the head, what was given, and of each run its first score
    assert table.count("0.6</td>") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone_and_without_numbers(opened, tmp_path, scheme):
    page = opened(run_page([read_run(made_up(tmp_path / "a"))]), width=390, height=800, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    (tmp_path / "empty").mkdir()
    page = opened(run_page([read_run(tmp_path / "empty")]), width=390, height=800, scheme=scheme)
    assert "No numbers were logged." in page.locator("main").inner_text()


def test_a_trace_of_a_step_is_written_for_perfetto(tmp_path):
    make(tmp_path, max_steps=3, rollouts=by_prompt, trace_steps="2").train()
    events = json.loads((tmp_path / "trace-2.json").read_text())["traceEvents"]
    assert len(events) > 100 and any("aten::" in str(event.get("name")) for event in events)
    assert [path.name for path in tmp_path.glob("trace-*")] == ["trace-2.json"]
    with pytest.raises(ValueError, match="trace_steps='0,x': pass optimizer steps from 1"):
        make(tmp_path / "b", trace_steps="0,x")


def test_curves_are_of_a_palette_that_colour_blind_readers_tell_apart():
    """By Machado's (2009) matrices of the three kinds of colour blindness at full strength, in CIELAB."""
    kinds = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }

    def lab(colour, matrix):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        seen = [min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear, strict=True)))) for row in matrix]
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = [
            sum(m * c for m, c in zip(row, seen, strict=True)) / w for row, w in zip(to_xyz, (0.9505, 1, 1.089), strict=True)
        ]
        f = [c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in xyz]
        return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])

    for name, matrix in kinds.items():
        for i, one in enumerate(PALETTE[:4]):
            for other in PALETTE[:i]:
                assert math.dist(lab(one, matrix), lab(other, matrix)) > 11, (name, one, other)


LONG = "9" * 400
HOSTILE = {
    "NaN in columns": {"samples.jsonl": '{"step": 1, "tokens": ["a", "b"], "columns": {"student_entropy": [NaN, 1e999]}}'},
    "texts in columns": {"samples.jsonl": '{"step": 1, "tokens": ["a"], "columns": {"student_entropy": ["x"], "opener": 3}}'},
    "a score's end is a text": {"metrics.jsonl": '{"step": 1, "accuracy": 0.5, "low": "a", "high": [], "n": "b"}'},
    "half a character": {
        "run.json": '{"command": "\\ud83d", "config": {"a": "\\ud83d"}}',
        "samples.jsonl": '{"step": 1, "tokens": ["\\ud83d"]}',
    },
    "numbers beyond all": {"metrics.jsonl": f'{{"step": 1, "loss": 1e308}}\n{{"step": {LONG}}}\n{{"step": 2, "loss": {LONG}}}'},
    "a number of 5000 digits": {"metrics.jsonl": f'{{"step": 1, "loss": {"9" * 5000}}}'},
    "deep": {"run.json": "[" * 200_000, "metrics.jsonl": "[" * 200_000},
    "a byte-order mark": {"run.json": "\ufeff{}", "metrics.jsonl": '\ufeff{"step": 1, "loss": 1}'},
    "only NaN": {"metrics.jsonl": '{"step": 1, "loss": NaN}\n{"step": 2, "loss": NaN}'},
    "formulas": {"metrics.jsonl": "".join(json.dumps({"step": s, "$x^{ $": 1, "_y": 2, "n" * 300: 3}) + "\n" for s in (1, 2))},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_stands_in_a_folder_there_is_a_page(opened, tmp_path, name):
    for file, text in HOSTILE[name].items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    page = opened((tmp_path / "report.html").read_text())
    paths = page.locator("path").evaluate_all("paths => paths.map(path => path.getAttribute('d'))")
    assert page.locator("h1").count() == 1 and "NaN" not in "".join(paths)
    if name in ("a byte-order mark", "formulas"):
        assert main(["report", str(tmp_path), "--png", str(tmp_path / "png")]) == 0 and list((tmp_path / "png").iterdir())
    if name == "a byte-order mark":
        assert "cannot be read" not in page.locator("main").inner_text()
    if name == "only NaN":
        assert "loss is no finite number in 2 rows" in page.locator("main").inner_text()


def test_many_kept_tokens_are_drawn(opened, tmp_path):
    sample = {"step": 1, "prompt": "", "tokens": ["a"] * 4096, "columns": {"student_entropy": [0.5] * 4096}}
    write(tmp_path, [{"step": 1, "loss": 1.0}], {}, [{**sample, "step": step} for step in range(1, 35)])
    page = opened(run_page([read_run(tmp_path)]))
    assert page.locator("#strips .strip").count() == 2


def test_a_resumed_run_that_was_cut_off_is_told(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 1, "train_runtime": 1.0}, {"step": 2, "loss": 0.5}]
    assert any("has not ended" in told for told in read_run(write(tmp_path, rows, {"method": "gkd"})).missing)
    rows.append({"step": 2, "train_runtime": 1.0})
    assert read_run(write(tmp_path, rows, {"method": "gkd"})).missing == []


def test_runs_of_one_name_and_options_are_told_apart(tmp_path, monkeypatch):
    runs = [read_run(made_up(tmp_path / name / "out")) for name in ("a", "b")]
    assert labels(runs) == ["a/out", "b/out"]
    monkeypatch.chdir(tmp_path / "a" / "out")
    assert labels([read_run(".")]) == ["out"]


def test_curves_have_gaps_and_values_are_read_by_keys_and_taps(opened, tmp_path):
    rows = [{"step": step, "loss": None if step == 2 else float(step)} for step in (1, 2, 3, 4)]
    page = opened(run_page([read_run(write(tmp_path, rows, {}))]), width=390)
    (loss,) = page.locator("#panels figure").all()
    assert loss.locator("path").get_attribute("d").count("M") == 2
    loss.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    assert loss.locator(".value").inner_text().startswith("step 1:")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert loss.locator(".value").inner_text().startswith("step 4:")
