"""`tsdkd inspect` as a user types it, the terminal of a run, and trackers."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from running import by_prompt, make
from tiny import QUESTIONS, save_tiny

from tsdkd.cli import main
from tsdkd.trainers.console import ConsoleLog, coloured, line, shares


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "s", seed=1), save_tiny(folder / "t", seed=2, hidden=48), save_tiny(folder / "s2", seed=3)


def command(models, *words):
    return ["inspect", "--student", models[0], "--teacher", models[1], "--use_cpu", "--max_completion_length", "12", *words]


def test_a_page_and_its_tables_are_written(models, tmp_path, capsys):
    words = ["--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], "--num_candidates", "4", "--seed", "3"]
    out, tables = tmp_path / "a" / "p.html", tmp_path / "b" / "t.json"
    assert main(command(models, *words, "--out", str(out), "--json", str(tables))) == 0
    said = capsys.readouterr().out
    assert "put as chats" in said and "2 completions, " in said and str(out) in said
    made = json.loads(tables.read_text())
    assert [len(views) for views in made] == [1, 1] and made[0][0]["method"] == "TSD-KD" and made[0][0]["student"] == "s"
    assert len(made[0][0]["candidates"]["ids"][0]) == 4 and made[0][0]["columns"]["log_ratio"][0] is not None
    page = out.read_text()
    assert "seed 3" in page and "http" not in page.split("<style>")[0].replace("http-equiv", "")
    assert main(command(models, *words, "--out", str(out), "--json", str(tmp_path / "again.json"))) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == made


def test_rows_of_a_file_given_completions_and_views_side_by_side(models, tmp_path, capsys):
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "completion": " 7"}) + "\n" for q in QUESTIONS[:5]))
    words = [
        "--dataset_name",
        str(data),
        "--limit",
        "2",
        "--given",
        "--json",
        str(tmp_path / "t.json"),
        "--out",
        str(tmp_path / "p.html"),
    ]
    assert main(command(models, *words, "--beside_method", "gkd")) == 0
    made = json.loads((tmp_path / "t.json").read_text())
    assert len(made) == 2 and [view["method"] for view in made[0]] == ["TSD-KD", "GKD"]
    assert made[0][0]["tokens"] == made[0][1]["tokens"] and "".join(made[0][0]["tokens"]).startswith(" 7")
    assert made[0][0]["columns"]["student_entropy"] == pytest.approx(made[0][1]["columns"]["student_entropy"], abs=1e-6)
    assert main(command(models, *words, "--beside", models[2])) == 0
    made = json.loads((tmp_path / "t.json").read_text())
    assert [view["student"] for view in made[0]] == ["s", "s2"]
    assert made[0][0]["columns"]["teacher_entropy"] == pytest.approx(made[0][1]["columns"]["teacher_entropy"], abs=1e-6)
    assert made[0][0]["columns"]["student_entropy"] != made[0][1]["columns"]["student_entropy"]


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "no prompts were given: pass --prompt TEXT, or --dataset_name"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "a", "--dataset_name", "x"], "both given"),
        (["--prompt", "a", "--completion", "b", "--completion", "c"], "2 --completion for 1 --prompt"),
        (["--prompt", "a", "--limit", "0"], "--limit 0"),
        (["--prompt", "a", "--beside_method", "gdk"], "Did you mean gkd"),
        (["--prompt", "a", "--methd", "gkd"], "there is no option --methd. Did you mean"),
        (["--prompt", "a", "--out", "."], "cannot be written"),
        (["--prompt", "a", "--beside", "/nowhere/s"], "there is no folder /nowhere/s"),
        (["--prompt", QUESTIONS[0] * 40], "at most"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(models, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(command(models, *words)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert len(said) == 1 and message in said[0] and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the terminal


def test_a_terminal_has_one_bar_and_other_places_a_line_a_log(tmp_path, capsys):
    trainer = make(tmp_path / "plain", max_steps=2, rollouts=by_prompt, disable_tqdm=False)
    trainer.train()
    out = capsys.readouterr().out
    assert "step 1/2  loss" in out and "(direct" in out and "2 steps in" in out and "{'loss'" not in out
    (log,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ConsoleLog)]
    shown = make(tmp_path / "bar", max_steps=2, rollouts=by_prompt, disable_tqdm=False, log_completions=True)
    (log,) = [c for c in shown.callback_handler.callbacks if isinstance(c, ConsoleLog)]
    screen = io.StringIO()
    log.console = Console(file=screen, force_terminal=True, width=160)
    shown.train()
    text = screen.getvalue()
    assert "2/2" in text and "time left" in text and "time: rollout" in text and "tokens/s" in text
    assert "step 2, a completion:" in text and "{'loss'" not in text and log._live is None


def test_a_bar_is_taken_away_when_a_run_fails(tmp_path):
    trainer = make(tmp_path, max_steps=3, rollouts=by_prompt, disable_tqdm=False)
    (log,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ConsoleLog)]
    log.console = Console(file=io.StringIO(), force_terminal=True)
    trainer.loop.compute = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert log._live is None and (tmp_path / "report.html").is_file()


def test_what_a_line_and_a_sample_say():
    logs = {
        "loss": 1.5,
        "loss/direct": 0.5,
        "time/rollout": 3.0,
        "time/teacher": 1.0,
        "time/student": 0.0,
        "tokens_per_second": 1234.5,
    }
    assert line(3, 9, logs) == "step 3/9  loss 1.5  (direct 0.5)  tokens/s 1,234"
    assert shares(logs) == "rollout 75%, teacher 25%, student 0%" and shares({}) == ""
    assert line(3, 9, {"eval_loss": 2.0, "eval_runtime": 3.0}) == "step 3/9  evaluation: loss 2"
    text = coloured({"tokens": ["a", "\x1b[2J", "\n"], "columns": {"student_entropy": [0.0, 1.0, 0.5], "opener": [1, 0, 0]}})
    assert text.plain == "a\ufffd[2J\n" and "underline" in str(text.spans[0].style)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_trackers_get_the_logged_names(tmp_path, tracker, monkeypatch):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    trainer = make(tmp_path / "o", max_steps=2, rollouts=by_prompt, report_to=[tracker])
    trainer.train()
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = (tmp_path / "o").rglob("events*")
        read = EventAccumulator(str(events.parent))
        read.Reload()
        logged = [row["loss/direct"] for row in trainer.state.log_history if "loss/direct" in row]
        assert [event.value for event in read.Scalars("train/loss/direct")] == pytest.approx(logged)
    assert any(tmp_path.rglob("*"))
