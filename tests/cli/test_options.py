"""Flags, recipes and errors: names by their methods, the closest of a misspelt one, values that cannot train."""

from __future__ import annotations

import json

import pytest
from tiny import QUESTIONS, save_tiny

from tsdkd.cli import main, told
from tsdkd.cli.methods import meanings
from tsdkd.cli.parsing import parse
from tsdkd.methods import GKD, METHODS, TSDKD


def method_of(tmp_path, *words, recipe=""):
    (tmp_path / "r.yaml").write_text(recipe or "use_cpu: true\n")
    _, config, _ = parse(["--config", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "o"), "--use_cpu", *words])
    return config.build_method()


@pytest.mark.parametrize(
    "words,expected",
    [
        (["--method", "gkd", "--lmbda", "0.5"], GKD(lmbda=0.5)),
        (["--method=gkd", "--selection=prefix", "--gkd.beta", "0.3"], GKD(selection="prefix", beta=0.3)),
        (["--method", "gkd", "--method_options", '{"beta": 0.4}', "--lmbda", "0.1"], GKD(beta=0.4, lmbda=0.1)),
        (["--beta", "0.3", "--tsd_kd.lmbda", "0.5"], TSDKD(beta=0.3, lmbda=0.5)),
        (["--method_options", '{"beta": 0.4}', "--num_candidates", "4"], TSDKD(beta=0.4, num_candidates=4)),
        (["--method", "minillm", "--length_normalisation", "no"], METHODS["minillm"](length_normalisation=False)),
        (
            ["--method", "speculative_kd", "--top_k", "3", "--speculative_kd.top_k", "5"],
            METHODS["speculative_kd"](top_k=5),
        ),
    ],
)
def test_every_methods_options_are_flags(tmp_path, words, expected):
    assert method_of(tmp_path, *words) == expected


def test_a_recipe_takes_short_names_and_method_options(tmp_path):
    recipe = "student: a\nteacher: b\nmethod: gkd\nmethod_options: {lmbda: 0.3}\n"
    assert method_of(tmp_path, "--gkd.beta", "0.2", recipe=recipe) == GKD(lmbda=0.3, beta=0.2)
    (tmp_path / "r.yaml").write_text(recipe + "output_dir: 2024-05-01\nmax_steps: 2.0\nlearning_rate:\neval_tasks: [a, b]\n")
    data, config, model = parse(["--config", str(tmp_path / "r.yaml"), "--use_cpu"])
    assert (model.model_name_or_path, config.teacher_model_name_or_path) == ("a", "b")
    assert (config.output_dir, config.max_steps, config.learning_rate) == ("2024-05-01", 2, 5e-6)
    assert data.eval_tasks == "a,b"


@pytest.mark.parametrize(
    "words,recipe,message",
    [
        (["--lerning_rate", "1"], "", r"there is no option --lerning_rate. Did you mean learning_rate"),
        ([], "lerning_rate: 1\n", r"r\.yaml: there is no option 'lerning_rate'. Did you mean learning_rate"),
        ([], "method: gkd\nlmbda: 1\n", r"lmbda is an option of .*: write it under method_options"),
        (["--method", "gdk"], "", r"method 'gdk' is unknown. Did you mean gkd"),
        (["--method", "gkd", "--alpha", "0.5"], "", r"--alpha is an option of distillm, minillm, and the method is gkd"),
        (["--minillm.alpha", "0.5"], "", r"--minillm.alpha is an option of minillm, and the method is tsd_kd"),
        (["--gkd.bta", "0.5", "--method", "gkd"], "", r"--gkd.bta: gkd has no .*option.*; it has: .* Did you mean beta"),
        (["--method", "gkd", "--beta", "0.3"], "", r"--beta is TRL's field, .*: pass --gkd.beta"),
        (["--method", "gkd", "--lmbda"], "", r"--lmbda was given without a value"),
        (["--method", "gkd", "--lmbda", "x"], "", r"--lmbda x: lmbda of gkd is float"),
        (["--method", "gkd", "--method_options", "{beta:0.4}"], "", r"--method_options: .* is no JSON"),
        (
            ["--method", "tsd_kd"],
            "method: gkd\nmethod_options: {beta: 1}\n",
            r"the recipe's method_options \(beta\) belong to gkd",
        ),
        (["--max_steps", "0"], "", r"--max_steps 0: pass 1 or more"),
        (["--max_steps", "-5"], "", r"--max_steps -5"),
        (["--learning_rate", "-1e-4"], "", r"--learning_rate -0.0001: a learning rate is 0 or more"),
        (["--num_train_epochs", "0"], "", r"--num_train_epochs 0: pass more than 0"),
        (["--per_device_train_batch_size", "0"], "", r"--per_device_train_batch_size 0: pass more than 0"),
        (["--eval_best", "a/b"], "", r"--eval_best has no effect without --eval_tasks"),
        (["--lora_r", "8"], "", r"--lora_r has no effect without --use_peft"),
        (["--eval_dataset_split", "dev"], "", r"--eval_dataset_split has no effect without --eval_dataset_name"),
        (["--max_steps", "many"], "", r"argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--dry_run=perhaps"], "", r"--dry_run perhaps: pass nothing behind it, or step"),
        ([], "seed: 1.5\n", r"seed is 1.5: it takes a whole number"),
        ([], "max_steps: [3]\n", r"max_steps is \[3\]: it takes a number"),
        ([], "dataset_name: [a, b]\n", r"dataset_name is a list: it takes one text"),
    ],
)
def test_what_is_misspelt_or_cannot_train_is_refused_with_what_to_do(tmp_path, words, recipe, message):
    with pytest.raises(ValueError, match=message):
        method_of(tmp_path, *words, recipe=recipe)


def test_a_split_of_a_file_is_refused_and_a_slice_is_not(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    name = ["--dataset_name", str(tmp_path / "p.jsonl"), "--dataset_train_split"]
    with pytest.raises(ValueError, match="which is one split: leave it out, or take a slice"):
        method_of(tmp_path, *name, "test")
    method_of(tmp_path, *name, "train[:1]")


def test_a_runs_folder_is_named_after_student_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, name in ((["--student", "org/small"], "small-tsd_kd"), (["--student=./s", "--method", "gkd"], "s-gkd")):
        assert parse(["--use_cpu", *words])[1].output_dir == name
    assert parse(["--use_cpu", "--student", "s", "--output_dir", "o"])[1].output_dir == "o"


def test_help_begins_with_what_people_need_and_lists_the_methods_options(tmp_path, capsys):
    for words, wanted in ((["--help"], "--opener_entropy_share"), (["--help", "--method", "gkd"], "--gkd.beta")):
        with pytest.raises(SystemExit) as ended:
            main(["train", *words])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and wanted in out and out.index("--student") < out.index("--learning_rate") < 2000
        assert "sampling and loss computation" not in out and len(out.splitlines()) < 200
    with pytest.raises(SystemExit):
        main(["train", "--help_all"])
    assert "--adam_beta1" in capsys.readouterr().out


def test_the_methods_are_listed_with_options_defaults_and_sources(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name, cls in METHODS.items():
        assert name in out and cls.paper["id"] in out
    assert main(["methods", "tsd_kd"]) == 0 and "c, the share of a completion's entropy" in capsys.readouterr().out
    assert main(["methods", "gdk"]) == 2 and "Did you mean gkd" in capsys.readouterr().err
    assert all(meanings(cls).keys() >= {f for f in cls.__dataclass_fields__} for cls in METHODS.values())


def test_errors_are_one_line_and_name_the_extra(capsys, monkeypatch):
    assert told(ValueError("a\nb")) == ("a\nb", 2)
    text, status = told(ImportError("No module named 'peft'", name="peft"))
    assert status == 2 and "pip install 'tsdkd[peft]'" in text
    text, status = told(RuntimeError("broken\nmore"))
    assert text == "RuntimeError: broken (TSDKD_TRACEBACK=1 shows where)" and status == 2
    assert told(FloatingPointError("NaN"))[1] == 1 and told(AssertionError("x"))[1] == 1

    def fails(arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr("tsdkd.cli.table.main", fails)
    assert main(["table"]) == 2 and capsys.readouterr().err.startswith("tsdkd table: RuntimeError: broken")
    monkeypatch.setenv("TSDKD_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="broken"):
        main(["table"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = save_tiny(folder / "s", seed=1), save_tiny(folder / "t", seed=2, hidden=48)
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:8]))
    (folder / "q.jsonl").write_text('{"question": "Tom has 5 pens.", "answer": 7}\n{"question": "Ann.", "answer": 3}\n')
    return folder, ["--student", student, "--teacher", teacher, "--dataset_name", str(folder / "p.jsonl"), "--use_cpu",
                    "--max_length", "64", "--max_completion_length", "8", "--per_device_train_batch_size", "4",
                    "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]  # fmt: skip


def test_a_dry_run_says_what_it_would_do_and_leaves_nothing(models, tmp_path, capsys):
    _, run = models
    for more, wanted in (([], "4 prompts a step"), (["step"], "One step was made: loss")):
        assert main(["train", *run, "--output_dir", str(tmp_path / "o"), "--dry_run", *more]) == 0
        out = capsys.readouterr().out
        assert wanted in out and "This was a dry run" in out and "TSD-KD, its defaults" in out
        assert not (tmp_path / "o").exists()


def test_a_folder_of_another_run_is_refused_unless_it_is_to_go(models, tmp_path, capsys):
    _, run = models
    command = ["train", *run, "--output_dir", str(tmp_path / "o")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "step 2/2  loss" in out and "method         TSD-KD, its defaults" in out
    first = (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [1, 2, 2]
    assert main(command) == 2
    assert "holds another run (run.json): name another --output_dir" in capsys.readouterr().err
    assert main([*command, "--overwrite_output_dir", "--max_steps", "1"]) == 0
    assert len((tmp_path / "o" / "metrics.jsonl").read_text().splitlines()) == 2
    again = ["train", "--config", str(tmp_path / "o" / "config.yaml"), "--output_dir", str(tmp_path / "p")]
    assert main(again) == 0
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in "op"]
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["loss/direct"] == rows[1]["loss/direct"]


def test_a_refusal_leaves_no_empty_folder(models, tmp_path, capsys):
    _, run = models
    assert main(["train", *run, "--output_dir", str(tmp_path / "o"), "--num_candidates", "900"]) == 2
    assert "num_candidates=900" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_comparison_has_its_baselines_and_says_what_it_cannot_grade(models, tmp_path, capsys):
    folder, run = models
    (tmp_path / "c.yaml").write_text(f"output_dir: {tmp_path / 'c'}\nindirect_weight: 0.01\nseed: 3\n")
    command = ["compare", "--config", str(tmp_path / "c.yaml"), "--methods", "tsd_kd,gkd", *run, "--gkd.beta", "0.5"]
    assert main(command) == 2
    assert "nothing to score" in capsys.readouterr().err
    out = ["--problems", str(folder / "q.jsonl"), "--out", str(tmp_path / "c.jsonl"), "--keep_students"]
    assert main([*command, *out, "--png", str(tmp_path / "pictures" / "c.png")]) == 0
    said = capsys.readouterr().out
    assert "The recipe's seed (3) is not read" in said and "state no final answer" in said and "against the start (p =" in said
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["student", "teacher", "tsd_kd", "gkd"]
    assert rows[2]["options"] == {"indirect_weight": 0.01} and rows[3]["options"] == {"beta": 0.5}
    assert (tmp_path / "pictures" / "c.png").stat().st_size > 5000
    assert (tmp_path / "c" / "gkd-seed0" / "student" / "model.safetensors").is_file()
    assert main([*command, *out]) == 0 and "run 1 of" not in capsys.readouterr().out
    for wrong, message in (
        (["--lmbda", "0.3"], "in a comparison say whose it is"),
        (["--method", "gkd"], "--method: a comparison takes --methods"),
        (["--answer_pattern", "("], "is no regular expression"),
        (["--out", str(tmp_path)], "cannot be written: there is a folder of that name"),
    ):
        assert main([*command, *out, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_answer_is_found_by_a_pattern_of_ones_own():
    from tsdkd.data.answers import final_answer, is_correct

    assert final_answer("The answer is 12. The answer is 17.", r"answer is (\d+)") == "17"
    assert final_answer("17!", r"\d+") == "17" and final_answer("none", r"\d+") is None
    assert is_correct("so: 17", "#### 17", r": (.*)") and not is_correct("#### 17", "17", r"is (\d+)")


def test_a_comparison_goes_on_inside_a_run_that_was_cut_off(models, tmp_path, capsys, monkeypatch):
    """The run is killed after its second of three steps; what it had learnt is not learnt again."""
    from transformers import TrainerCallback

    from tsdkd.trainers import TokenDistillTrainer

    folder, run = models
    (tmp_path / "c.yaml").write_text(f"output_dir: {tmp_path / 'c'}\nsave_steps: 1\n")
    more = ["--max_steps", "3", "--save_strategy", "steps", "--problems", str(folder / "q.jsonl")]
    command = ["compare", "--config", str(tmp_path / "c.yaml"), "--methods", "gkd", *run, *more]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl"), "--output_dir", str(tmp_path / "whole")]) == 0

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    made, train = [], TokenDistillTrainer.train

    def watched(self, *args, **kwargs):
        made.append(kwargs.get("resume_from_checkpoint"))
        if len(made) == 1:
            self.add_callback(Killed())
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TokenDistillTrainer, "train", watched)
    assert main([*command, "--out", str(tmp_path / "c.jsonl")]) == 130
    assert "interrupted. The same command goes on where it stopped." in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "c.jsonl")]) == 0
    assert made == [None, "latest"]
    rows = [json.loads((tmp_path / name).read_text().splitlines()[-1]) for name in ("whole.jsonl", "c.jsonl")]
    assert [row["steps"] for row in rows] == [3, 3] and rows[0]["accuracy"] == rows[1]["accuracy"]


def test_what_is_missing_or_damaged_is_named_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    import importlib.util

    from tsdkd.trainers import setup_checks, sources

    student, data = save_tiny(tmp_path / "student"), tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    command = ["train", "--student", student, "--teacher", student, "--dataset_name", str(data), "--use_cpu"]
    command += ["--output_dir", str(tmp_path / "out")]
    found = importlib.util.find_spec
    absent = lambda name, *more: None if name in ("bitsandbytes", "peft", "lm_eval") else found(name, *more)  # noqa: E731
    monkeypatch.setattr(setup_checks, "find_spec", absent)
    monkeypatch.setattr("tsdkd.cli.train.find_spec", absent)
    loaded = []
    monkeypatch.setattr(sources, "create_model_from_path", lambda *args, **kwargs: loaded.append(args))
    for words, message in (
        (["--report_to", "comet_ml"], "report_to=comet_ml was asked for, and its package is not installed"),
        (["--report_to", "wanbd"], "report_to=wanbd is unknown (did you mean wandb?)"),
        (["--load_in_4bit"], "bitsandbytes is not installed"),
        (["--use_peft"], "--use_peft needs peft, which is not installed: pip install 'tsdkd[peft]'"),
        (["--eval_tasks", "gsm8k"], "is not installed: pip install 'tsdkd[eval]'"),
    ):
        assert main([*command, *words]) == 2
        said = capsys.readouterr().err
        assert message in said, said
    assert not loaded and not (tmp_path / "out").exists()
    monkeypatch.undo()
    whole = (tmp_path / "student" / "model.safetensors").read_bytes()
    (tmp_path / "student" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the student's file" in said and "model.safetensors is damaged" in said and "copy or save it again" in said


def test_a_picture_without_matplotlib_is_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipe = tmp_path / "c.yaml"
    recipe.write_text("student: nowhere\n")
    assert main(["compare", "--config", str(recipe), "--png", str(tmp_path / "c.png")]) == 2
    assert "--png needs matplotlib, which is not installed: pip install 'tsdkd[report]'" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "tsdkd", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("tsdkd ")
