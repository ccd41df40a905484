"""The command line as a user calls it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import QUESTIONS, save_tiny

from tsdkd.cli import main
from tsdkd.cli.train import parse

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


def test_help_loads_nothing_heavy():
    out = fresh("import sys, tsdkd, tsdkd.cli; tsdkd.cli.main(['--help']); print({'torch', 'numpy'} & set(sys.modules))")
    assert "train" in out and "demo" in out and out.strip().endswith("set()")


@pytest.mark.parametrize("module", ["tsdkd.losses", "tsdkd.selection", "tsdkd.fused", "tsdkd.methods"])
def test_the_losses_load_torch_and_nothing_heavier(module):
    heavy = {"transformers", "trl", "accelerate", "datasets", "vllm", "deepspeed", "peft"}
    assert fresh(f"import sys, {module}; print({heavy} & set(sys.modules), 'torch' in sys.modules)").strip() == "set() True"


def test_public_names_resolve_and_unknown_ones_are_listed():
    import tsdkd

    for name in tsdkd.__all__:
        assert getattr(tsdkd, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'TSDKDTrain'; it has: .*TSDKDTrainer"):
        _ = tsdkd.TSDKDTrain
    assert "TSDKDTrainer" in dir(tsdkd)
    assert tsdkd.losses.forward_kl is not None


def test_provenance_names_no_strangers_commit(tmp_path, monkeypatch):
    from tsdkd import provenance

    assert provenance.provenance(3)["seed"] == 3 and provenance.provenance()["versions"]["trl"].startswith("1.16")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance._commit() is None


def test_unknown_commands_and_bad_values_say_what_to_do(capsys):
    assert main(["trian"]) == 2
    commands = "train, compare, evaluate, plan, doctor, inspect, report, methods, table, pipeline, completion, demo"
    assert f"unknown command 'trian'; the commands are: {commands}" in capsys.readouterr().err
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps 0: it must be 1 or more" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("tsdkd 0.")
    assert main(["train", "--teacher", "t", "--use_cpu", "--output_dir", "o"]) == 2
    assert "no student was given: pass --student" in capsys.readouterr().err
    assert main(["train", "--student", "s", "--use_cpu", "--output_dir", "o"]) == 2
    assert "no teacher was given: pass --teacher" in capsys.readouterr().err
    assert main(["train", "--student", "s", "--teacher", "t", "--use_cpu", "--output_dir", "o"]) == 2
    assert "no prompts were given: pass --dataset_name" in capsys.readouterr().err


def test_what_is_not_there_is_named_without_a_traceback(tmp_path, capsys):
    common = ["train", "--use_cpu", "--output_dir", str(tmp_path / "o"), "--dataset_name", "nowhere.jsonl"]
    assert main([*common, "--student", "./no-such-folder", "--teacher", "t"]) == 2
    assert "there is no folder ./no-such-folder for the student" in capsys.readouterr().err
    assert main([*common, "--student", "s", "--teacher", "t"]) == 2
    assert "there is no file nowhere.jsonl" in capsys.readouterr().err
    assert main(["train", "--config=missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_train_from_yaml_flags_and_a_jsonl_file(tmp_path):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    rows = [{"instruction": text} for text in [*QUESTIONS[:8], QUESTIONS[0]]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {student}\ndataset_name: {tmp_path / 'p.jsonl'}\nprompt_column: instruction\n"
        "drop_duplicate_prompts: true\nprompt_as_chat: true\nuse_cpu: true\nmax_length: 64\nmax_completion_length: 8\n"
        "max_steps: 3\nper_device_train_batch_size: 4\nreport_to: none\nbeta: 0.5\n"
    )
    command = ["train", "--config", str(recipe), "--teacher", teacher, "--output_dir", str(tmp_path / "out"), "--max_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "tsdkd.cli"]
    run = subprocess.run(launch + command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"8 prompts from {tmp_path / 'p.jsonl'} after dropping duplicates" in run.stdout  # one of nine is a repetition
    assert (tmp_path / "out" / "model.safetensors").exists() and "TSD-KD" in (tmp_path / "out" / "README.md").read_text()
    data, config, model = parse(command[1:])
    assert (config.beta, config.max_steps, data.prompt_column, model.model_name_or_path) == (0.5, 1, "instruction", student)


def test_a_comparison_is_made_again_when_its_data_change(tmp_path):
    from tsdkd.data.rows import ScoreRow
    from tsdkd.pipelines.compare import OnProblems, Run, compare
    from tsdkd.pipelines.compare.runs import digest

    made = []

    class Trained:
        stopped_by = None
        teacher, spent = None, {"trained_tokens": 1, "flops": {}, "seconds": 0.5}
        state = argparse.Namespace(global_step=1)
        args = argparse.Namespace(output_dir=str(tmp_path / "runs"))
        accelerator = argparse.Namespace(is_main_process=True, wait_for_everyone=lambda: None)

        def __init__(self, run):
            made.append(run)

        def train(self, resume_from_checkpoint=None):
            assert resume_from_checkpoint is None

    class Fixed(OnProblems):
        def __call__(self, trainer, label, model=None):
            return [ScoreRow(task="problems", metric="accuracy", score=0.5, n=1, label=label)]

    scorer = Fixed([])

    file, out = tmp_path / "p.jsonl", tmp_path / "rows.jsonl"
    for content, runs in (("a", 2), ("a", 2), ("b", 4)):
        file.write_text(content)
        settings = {"contents": digest(["x"], [str(file), None])}
        rows = compare([Run("one", "gkd"), Run("two", "gkd")], Trained, scorer, out, settings, say=lambda t: None)
        assert len(made) == runs and [row["label"] for row in rows] == ["one", "two"]
    compare([Run("three", "gkd")], Trained, scorer, out, settings, writes=False, say=lambda t: None)
    assert len(out.read_text().splitlines()) == 4


def test_mapping_refuses_what_is_not_there():
    from datasets import Dataset

    from tsdkd.data.prompts import load_prompts, map_prompts

    rows = Dataset.from_dict({"instruction": ["a"]})
    with pytest.raises(ValueError, match=r"no column 'prompt' in the data set; it has: instruction. Pass --prompt_column"):
        map_prompts(rows)
    with pytest.raises(ValueError, match=r"there is no file nowhere\.jsonl"):
        load_prompts("nowhere.jsonl")
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]})
    with pytest.raises(ValueError, match="chats already"):
        map_prompts(chats, as_chat=True)


def test_another_method_and_a_recording_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Record once, then train and compare methods on the recording without the teacher."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:8]))
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    short = ["--use_cpu", "--per_device_train_batch_size", "4", "--max_completion_length", "8", "--report_to", "none"]
    short += ["--max_length", "64", "--save_strategy", "no"]
    folder = str(tmp_path / "recording")
    given = ["--student", student, *short]
    data = ["--teacher", teacher, "--dataset_name", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "r")]
    assert main(["train", *given, *data, "--record", folder]) == 0
    assert "The recording is in" in capsys.readouterr().out
    away = (tmp_path / "t").rename(tmp_path / "away")
    options = ["--method", "gkd", "--method_options", '{"beta": 0.5}', "--output_dir", str(tmp_path / "g")]
    assert main(["train", *given, "--recording", folder, *options]) == 0
    assert (tmp_path / "g" / "model.safetensors").exists() and "GKD" in (tmp_path / "g" / "README.md").read_text()
    recipe, out = tmp_path / "c.yaml", tmp_path / "c.jsonl"
    recipe.write_text(f"model_name_or_path: {student}\nrecording: {folder}\noutput_dir: {tmp_path / 'c'}\n")
    (tmp_path / "q.jsonl").write_text('{"question": "How many?", "answer": 3}\n')
    compared = ["compare", "--config", str(recipe), "--methods", "gkd,tsd_kd", "--out", str(out)]
    assert main([*compared, "--problems", str(tmp_path / "q.jsonl"), *short]) == 0
    made = [json.loads(line)["method"] for line in out.read_text().splitlines()]
    assert made == ["untrained", "gkd", "tsd_kd"]
    away.rename(tmp_path / "t")
    capsys.readouterr()
    mixed = [*compared[:-1], str(tmp_path / "d.jsonl"), "--problems", str(tmp_path / "q.jsonl")]
    for wrong, message in [
        (["train", *given, *data, "--record", folder], "holds a recording already"),
        (["train", *given, "--recording", folder, "--method", "seq_kd"], "the student would imitate itself"),
        (["train", *given, "--recording", str(tmp_path)], "holds no finished recording"),
        (["train", *given, *data, "--method", "dpo"], "method 'dpo' is unknown. There are: tsd_kd, gkd"),
        (["train", *given, *data, "--method", "gkd", "--method_options", '{"k": 1}'], "method 'gkd' has no option 'k'"),
        (["compare", "--config", str(recipe), "--methods", "gkd,dpo"], "method 'dpo' is unknown"),
        (["compare", "--config", str(recipe)], "no methods were given"),
        (["compare", "--config", str(recipe), "--methods", "gkd", "--seed", "7"], "--seed: a comparison runs seeds 0, 1"),
        (["train", *given, *data, "--method", "gkd", "--method_options", "[1]"], "--method_options is list: it is a mapping"),
        (["train", *given, *data, "--method", "gkd", "--beta", "1.0"], "no method here reads: pass --gkd.beta"),
        (["compare", "--config", str(recipe), "--methods", "gkd", "--seeds", "0"], "--seeds 0: it must be 1 or more"),
        (["compare", "--config", str(recipe), "--methods", "gkd", "--problems", str(tmp_path / "p.jsonl")], "'question' and"),
        ([*mixed, "--methods", "minillm"], "written by student and teacher together"),
    ]:
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
