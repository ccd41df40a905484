"""Secrets that were given as options reach no file; what strangers write cannot run, escape or be taken for something else."""

from __future__ import annotations

import json

import pytest
import torch
from running import by_prompt, make
from score_rows import row
from tiny import QUESTIONS, save_tiny

from tsdkd.cli import main
from tsdkd.evaluation.layout import as_csv, markdown, side_by_side
from tsdkd.evaluation.tables import tables_of
from tsdkd.provenance import redacted, redacted_words
from tsdkd.trainers.random_state import from_json, random_state, set_random_state, to_json

PLANTED = "hf_PLANTEDplantedPLANTED12345"


def holding(folder):
    """The files below a folder that hold the planted secret, also inside of archives' bytes."""
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()
    ]


def test_a_token_reaches_no_file_of_a_run_and_still_works(tmp_path):
    options = {"hub_token": PLANTED, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "rollouts": by_prompt}
    trainer = make(tmp_path, **options, model_init_kwargs={"token": PLANTED})
    trainer.train()
    assert trainer.args.hub_token == PLANTED and trainer.args.model_init_kwargs == {"token": PLANTED}
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.args.hub_token == PLANTED
    assert (tmp_path / "saved" / "training_args.bin").is_file() and holding(tmp_path) == []
    assert torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False).hub_token is None
    config = (tmp_path / "config.yaml").read_text()
    assert "hub_token" not in config and "max_steps: 2" in config


@pytest.mark.parametrize("what", ["train", "record", "compare"])
def test_a_token_on_the_command_line_reaches_no_file(tmp_path, what, monkeypatch):
    student, teacher = save_tiny(tmp_path / "m" / "s", seed=1, closes_soon=True), save_tiny(tmp_path / "m" / "t", seed=2)
    data, problems = tmp_path / "m" / "p.jsonl", tmp_path / "m" / "q.jsonl"
    data.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    problems.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in QUESTIONS[:2]))
    out = tmp_path / "out"
    shared = ["--student", student, "--teacher", teacher, "--dataset_name", str(data), "--use_cpu", "--max_steps", "1"]
    shared += ["--per_device_train_batch_size", "4", "--max_completion_length", "8", "--hub_token", PLANTED]
    shared += ["--report_to", "none"]
    if what == "compare":
        (tmp_path / "m" / "c.yaml").write_text(f"output_dir: {out}\nmodel_init_kwargs:\n  token: {PLANTED}\n")
        words = [
            "compare",
            "--config",
            str(tmp_path / "m" / "c.yaml"),
            "--methods",
            "gkd",
            "--out",
            str(out / "c.jsonl"),
            *shared,
        ]
        words += ["--problems", str(problems)]
    else:
        words = ["train", *shared, "--output_dir", str(out), *(["--record", str(out / "rec")] if what == "record" else [])]
    monkeypatch.setattr("sys.argv", ["tsdkd", *words])
    assert main(words) == 0
    assert any(out.rglob("*.json*")) and holding(out) == []


def test_what_is_taken_for_a_secret():
    assert redacted({"a": {"api_key": "x", "eos_token": "</s>", "token": None}}) == {
        "a": {"api_key": "<secret>", "eos_token": "</s>", "token": None}
    }
    assert redacted('{"token": "x", "b": 1}') == '{"token": "<secret>", "b": 1}' and redacted('{"b":1}') == '{"b":1}'
    assert redacted(["http://u:pw@h:1/x", PLANTED]) == ["http://<secret>@h:1/x", "<secret>"]
    assert redacted("redis://:pw@h") == "redis://<secret>@h"
    assert redacted("https://h/x?api_key=pw&b=1#c") == "https://h/x?api_key=<secret>&b=1#c"
    words = ["train", "--hub_token=x", "--model_init_kwargs", '{"token": "y"}', "--max_steps", "3"]
    assert redacted_words(words) == [
        "train", "--hub_token=<secret>", "--model_init_kwargs", '{"token": "<secret>"}', "--max_steps", "3",
    ]  # fmt: skip


def test_random_states_are_json_and_exact():
    torch.manual_seed(3)
    state = json.loads(json.dumps(to_json(random_state())))
    first = torch.rand(4)
    set_random_state(from_json(state))
    assert torch.equal(torch.rand(4), first)


def test_cells_of_tables_are_no_formulas_and_no_markup():
    rows = [row("=HYPERLINK(1)", "GSM8K", 0.5, n=10), row("<script>|x", "GSM8K", 0.4, n=10)]
    made = tables_of(rows)
    text = as_csv(made)
    assert "'=HYPERLINK(1)" in text and "\n,=H" not in text and ",=" not in text
    table = markdown(next(t for several in made.values() for t in several))
    assert "<script>" not in table and "&lt;script&gt;\\|x" in table
    kept = [
        {
            "task": "t",
            "item": 0,
            "prompt": "q",
            "target": "x",
            "model": "m",
            "chat_template": False,
            "answer": "a\n```\n# owned",
        }
    ]
    lines = side_by_side(kept, "t", 0).splitlines()
    assert lines.count("````") == 2 and "# owned" in lines[lines.index("````") + 1 : -1]
