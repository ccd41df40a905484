"""What a run says before its first step, the record it leaves, the card, and the signs of a run that goes wrong."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml
from peft import LoraConfig
from running import by_prompt, general, make, rows
from tiny import save_tiny, tiny_model
from transformers import TrainerControl, TrainerState

from tsdkd.methods import GKD
from tsdkd.trainers.health import SIGNS, WINDOW, Health, gradients, repetition
from tsdkd.trainers.run_record import is_of_another_run, planned_steps, summary


def test_the_table_says_what_the_run_is(tmp_path):
    trainer = make(tmp_path, method=None, num_candidates=4, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    table = summary(trainer)
    assert table["method"] == "TSD-KD with num_candidates=4"
    assert "22.8 k parameters, float32" in table["student"] and "parameters, float32, local" in table["teacher"]
    assert table["vocabulary"] == "64 ids shared, 4 without a token are never written"
    assert table["batch"] == "4 prompts a step: 2 × 2 accumulated × 1 process" and table["steps"] == "2, 1 epochs"
    assert table["lengths"] == "prompts up to 52 tokens, completions up to 12"
    assert "0: the weights will not change" in summary(make(tmp_path / "b", learning_rate=0.0))["learning rate"]
    epochs = make(tmp_path / "c", max_steps=-1, num_train_epochs=3)
    assert planned_steps(epochs) == 6
    epochs.train()
    assert epochs.state.global_step == 6


def test_a_run_leaves_its_record(tmp_path, capsys):
    trainer = general(tmp_path / "o", GKD(beta=0.5), max_steps=4, rollouts=by_prompt)
    trainer.train()
    folder = tmp_path / "o"
    assert "GKD with beta=0.5" in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "gkd" and record["method_options"]["beta"] == 0.5 and record["config"]["max_steps"] == 4
    assert record["versions"]["trl"].startswith("1.16") and record["processes"] == 1 and "hardware" in record
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = rows(trainer)
    assert [row["step"] for row in made[:4]] == [1, 2, 3, 4] and made[0]["loss"] == logged[0]["loss"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 1e-3
    assert (folder / "curve.png").stat().st_size > 5000 and is_of_another_run(folder) == "run.json"
    assert is_of_another_run(tmp_path) is None


def test_a_second_run_into_a_folder_is_warned_about(tmp_path, caplog):
    make(tmp_path, rollouts=by_prompt).train()
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        make(tmp_path, rollouts=by_prompt).train()
    assert "holds an earlier run (run.json), which this one writes over" in caplog.text


def test_a_resumed_run_goes_on_with_its_metrics(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rollouts": by_prompt}
    make(tmp_path, **options).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99}\n')
    make(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    made = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in made if "learning_rate" in row] == [1, 2, 3, 4] and all(
        row.get("loss") != 99 for row in made
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_names_what_it_is_of_and_its_code_loads_it(tmp_path, adapter):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    more = {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")} if adapter else {}
    trainer = make(tmp_path / "o", student=student, teacher=teacher, processing_class=None, num_candidates=4, **more)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    for part in (student, teacher, "TSD-KD with num_candidates=4", "2603.13260", "8 rollouts", "in 2 steps", "torch 2.13"):
        assert part in card, part
    assert "None" not in card and ("library_name: peft" in card) == adapter
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path / "saved"))
    scope: dict = {}
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=2"), "card", "exec"), scope)
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


# ---------------------------------------------------------------------- health


def told(caplog, series, quiet=()):
    """What a series of logs makes `Health` say."""
    health, state = Health(lambda: {}, say=lambda text: None), TrainerState()
    health.on_train_begin(None, state, TrainerControl())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        for step, values in enumerate(zip(*series.values(), strict=True), 1):
            state.global_step = step
            health.on_log(None, state, TrainerControl(), logs={"loss": 1.0, **dict(zip(series, values, strict=True))})
    return caplog.text


@pytest.mark.parametrize(
    "name,healthy,ill,word",
    [
        ("completions/clipped_ratio", (0.1, 0.2), (0.1, 0.7), "reach max_completion_length without an end"),
        ("completions/mean_length", (17, 30), (17, 45), "more than twice as long"),
        ("completions/mean_length", (17, 12), (17, 7), "less than half as long"),
        ("completions/repetition", (0.1, 0.3), (0.1, 0.5), "repeat themselves"),
        ("completions/end_probability", (0.9, 0.4), (0.9, 0.3), "they will grow"),
        ("student/entropy", (0.5, 0.1), (0.5, 0.01), "entropy has collapsed"),
        ("candidates/top1_agreement", (0.86, 0.8), (0.86, 0.51), "agree less and less"),
    ],
)
def test_each_sign_of_a_run_that_goes_wrong_is_said_once_with_what_to_try(caplog, name, healthy, ill, word):
    def series(ends):
        return {name: [ends[0]] * WINDOW + [ends[1]] * 6}

    assert told(caplog, series(healthy)) == ""
    text = told(caplog, series(ill))
    assert text.count(word) == 1 and "Try:" in text and name in text
    assert told(caplog, {name: [ill[0]] + [ill[1]] * WINDOW}) == ""  # too little to compare
    assert {sign.name for sign in SIGNS} >= {name}


def test_the_terms_gradients_of_the_first_step_are_said_and_a_tenfold_ratio_warned_about(tmp_path, caplog, capsys):
    make(tmp_path, rollouts=by_prompt).train()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("gradients"))
    assert all(name in line for name in ("indirect", "direct", "entropy"))
    assert "far above the direct term's: entropy 50 times" in gradients({"direct": 0.1, "entropy": 5.0})
    assert "far above" not in gradients({"direct": 0.1, "entropy": 0.5})
    norms = {"direct": 1.0, "entropy": 2.0}
    health, state = Health(lambda: norms, say=lambda text: None), TrainerState(global_step=1)
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        health.on_step_end(None, state, TrainerControl())
        state.global_step, norms["entropy"] = 2, 15.0
        health.on_step_end(None, state, TrainerControl())
        assert "entropy term" not in caplog.text
        state.global_step, norms["entropy"] = 3, 25.0
        health.on_step_end(None, state, TrainerControl())
    assert caplog.text.count("the gradient of the entropy term is 25 times the direct term's") == 1


def test_repetition_is_the_share_of_ngrams_that_stood_before():
    assert repetition([1, 2, 3, 1, 2, 3, 1, 2, 3]) == pytest.approx(4 / 7) and repetition([1, 2]) == 0.0


def test_a_second_name_of_a_terms_gradient_is_logged_for_a_release(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, term_grad_norm_steps=1)
    trainer.train()
    for row in rows(trainer):
        assert row["hidden_grad_norm/direct"] == row["grad_norm/direct"] > 0
    quiet = make(tmp_path / "q", rollouts=by_prompt)
    quiet.train()
    assert not [name for name in rows(quiet)[0] if "grad_norm/" in name] and tiny_model is not None
