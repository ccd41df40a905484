"""A comparison's runs and scores: training options of one label, and what sampled answers say."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from tiny import QUESTIONS, save_tiny, tiny_model

from tsdkd.cli import main
from tsdkd.demo.problems import Problem
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.pipelines.compare import OnProblems, Samples, labelled, runs_of
from tsdkd.pipelines.compare import scoring as module
from tsdkd.pipelines.compare.runs import digest
from tsdkd.pipelines.compare.scoring import calibration_error
from tsdkd.rollouts.greedily import written_by_sampling, written_greedily


def test_sampled_answers_by_hand(monkeypatch):
    """Three problems of four samples each; the texts are the ids themselves."""
    greedy = [["#### 1", "x"], ["#### 5"], ["nothing at all"]]
    drawn = [[["#### 1"], ["#### 1"], ["#### 2"], ["?"]], [["#### 5"]] * 4, [["#### 3"], ["?"], ["?"], ["?"]]]
    asked = []
    monkeypatch.setattr(module, "written_greedily", lambda model, tokenizer, prompts, longest: greedy)

    def sampled(model, tokenizer, prompts, longest, *, seed, temperature):
        asked.append((prompts, longest, seed, temperature))
        return [text for own in drawn for text in own]

    monkeypatch.setattr(module, "written_by_sampling", sampled)
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1).train(),
        max_completion_length=7,
        has_chats=False,
        rendering=SimpleNamespace(prompts=lambda asked: [[ord(text[0])] for text in asked]),
        processing_class=SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["".join(own) for own in ids]),
    )
    greedy[0] = ["#### 1"]
    problems = [Problem("a", "", "1", 0), Problem("b", "", "6", 0), Problem("c", "", "3", 0)]
    scorer = OnProblems(problems, say=lambda text: None, max_new_tokens=9, samples=Samples(4, None, 0.7, 3))
    figures = scorer.figures(scorer(trainer, "it"))
    assert asked == [([[97]] * 4 + [[98]] * 4 + [[99]] * 4, 9, 3, 0.7)]
    assert figures["right"] == "100" and figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["sampled_right"] == "201" and figures["agreeing"] == "240"
    assert figures["sampled_accuracy"] == pytest.approx(3 / 12) and figures["pass_at_k"] == pytest.approx(2 / 3)
    # One problem a bin: |1 - 0.5|, |0 - 1| and |0 - 0|.
    assert figures["calibration_error"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert figures["answer_tokens"] == pytest.approx(1.0) and figures["ungraded"] == 1
    assert trainer.model.training
    assert scorer.settings["samples"] == {"count": 4, "problems": None, "temperature": 0.7, "seed": 3}


def test_a_calibrated_student_has_no_error():
    """Bins whose accuracy is their confidence; then the same with every mark turned."""
    agreeing = [0] * 5 + [1] * 4 + [2] * 6 + [4] * 3
    right = [False] * 5 + [True, False, False, False] + [True, False] * 3 + [True] * 3
    assert calibration_error(agreeing, right, 4) == 0.0
    turned = [not mark for mark in right]
    assert calibration_error(agreeing, turned, 4) == pytest.approx((5 * 1 + 4 * 0.5 + 0 + 3 * 1) / 18)


def test_samples_have_the_models_frequencies_and_leave_the_generator_alone():
    model, tokenizer = tiny_model(seed=3, closes_soon=True), make_tokenizer()
    prompt = [[5, 9, 11]]
    state = torch.get_rng_state()
    ids = written_by_sampling(model, tokenizer, prompt * 4000, 1, 500, seed=1, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = (model(torch.tensor(prompt)).logits[0, -1].double() / 2).softmax(-1)
    counts = torch.zeros(64, dtype=torch.double)
    for (token,) in ids:
        counts[token] += 1
    large = expected > 5 / 4000
    statistic = ((counts - 4000 * expected)[large] ** 2 / (4000 * expected[large])).sum().item()
    assert statistic < 2 * int(large.sum()) + 30  # far above a chi-square's 0.999 quantile for so many cells
    assert large.sum() > 20
    many = prompt * 6
    assert written_by_sampling(model, tokenizer, many, 8, seed=1) == written_by_sampling(model, tokenizer, many, 8, seed=1)
    assert written_by_sampling(model, tokenizer, many, 8, seed=1) != written_by_sampling(model, tokenizer, many, 8, seed=2)
    cold = written_by_sampling(model, tokenizer, many, 8, seed=1, temperature=1e-4)
    assert cold == written_greedily(model, tokenizer, many, 8)


def test_a_label_trains_by_options_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:8]))
    (tmp_path / "q.jsonl").write_text('{"question": "How many?", "answer": 3}\n{"question": "And now?", "answer": 4}\n')
    recipe, out = tmp_path / "c.json", tmp_path / "c.jsonl"
    slow = {"method": "gkd", "training": {"learning_rate": 1e-12, "max_steps": 1}}
    shared = {
        "model_name_or_path": save_tiny(tmp_path / "s", seed=1),
        "teacher_model_name_or_path": save_tiny(tmp_path / "t", seed=2, hidden=48),
        "dataset_name": str(tmp_path / "p.jsonl"),
        **{"per_device_train_batch_size": 4, "max_completion_length": 6, "max_length": 64, "max_steps": 2},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2},
    }
    recipe.write_text(json.dumps({**shared, "methods": {"gkd": {}, "gkd, slowly": slow}}))
    words = ["compare", "--config", str(recipe), "--out", str(out), "--problems", str(tmp_path / "q.jsonl")]
    words += ["--samples", "2", "--max_new_tokens", "9", "--keep_students"]
    assert main(words) == 0
    rows = {row["label"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert "training" not in rows["gkd"] and rows["gkd"]["steps"] == 2
    assert rows["gkd, slowly"]["training"] == slow["training"] and rows["gkd, slowly"]["steps"] == 1
    assert len(rows["gkd"]["sampled_right"]) == 2 and 0 <= rows["student"]["pass_at_k"] <= 1
    from safetensors.torch import load_file

    moved = {}
    start = load_file(tmp_path / "s" / "model.safetensors")
    for label, folder in (("gkd", "gkd-seed0"), ("slow", "gkd--slowly-seed0")):
        end = load_file(tmp_path / "c" / folder / "student" / "model.safetensors")
        moved[label] = max((end[name].float() - value.float()).abs().max().item() for name, value in start.items())
    assert moved["slow"] < 1e-6 < 1e-3 < moved["gkd"]
    before = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == before  # every run is known by its row
    capsys.readouterr()
    for named, flags, message in [
        ({"gkd": {"training": {"seed": 3}}}, [], "names seed, which all runs of a comparison share"),
        ({"gkd": {"training": {"dataset_name": "x"}}}, [], "names dataset_name, which all runs"),
        ({"gkd": {"training": {"teacher": "x"}}}, [], "names teacher_model_name_or_path, which all runs"),
        ({"gkd": {}}, ["--sampled_problems", "3"], "pass --samples, too"),
        ({"gkd": {"training": 3}}, [], "training of 'gkd' is 3"),
        ({"gkd": {"training": {"learning_rte": 1}}}, [], "learning_rte"),
        ({"gkd": slow}, ["--learning_rate", "1"], "--learning_rate is stated for all runs"),
        ({"gkd": {}}, ["--samples", "10"], "samples=10: a row keeps a digit"),
        ({"gkd": {}}, ["--sample_temperature", "0"], "sample_temperature"),
        ({"gkd": {}}, ["--max_new_tokens", "0"], "max_new_tokens"),
        ({"gkd": {}}, ["--eval_tasks", "x"], "--samples and --max_new_tokens are of --problems"),
    ]:
        recipe.write_text(json.dumps({**shared, "methods": named}))
        plain = [word for word in words if word not in ("--samples", "2")] if "too" in message else words
        assert main([*plain, *flags]) == 2, message
        assert message in capsys.readouterr().err


def test_seeds_repeat_each_label_with_its_options():
    given = {"a": {"method": "gkd", "beta": 0.5, "training": {"max_steps": 3}}, "taid": None}
    runs = runs_of(labelled(given, None), 2)
    assert [(run.label, run.method, run.seed) for run in runs] == [
        ("a", "gkd", 0),
        ("taid", "taid", 0),
        ("a", "gkd", 1),
        ("taid", "taid", 1),
    ]
    assert runs[2].options == {"beta": 0.5} and runs[2].training == {"max_steps": 3} and not runs[1].training


def test_a_folder_is_known_by_its_contents_not_by_its_times(tmp_path):
    file = tmp_path / "model" / "weights"
    file.parent.mkdir()
    file.write_bytes(b"one")
    first = digest([], [str(file.parent)])
    os.utime(file, (1, 1))
    assert digest([], [str(file.parent)]) == first
    file.write_bytes(b"two")
    assert digest([], [str(file.parent)]) != first
