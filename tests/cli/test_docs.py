"""Documents that run: README's commands and code, and the examples."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import QUESTIONS, config, prompts, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.losses import DIVERGENCES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


BLOCKS = blocks_of(README)


def test_readme_trains_with_the_names_redirected(tmp_path, monkeypatch):
    import datasets

    (code,) = [block for block in BLOCKS if "TSDKDTrainer(" in block]
    names = {
        "Qwen/Qwen2.5-1.5B-Instruct": save_tiny(tmp_path / "s", seed=1, positions=1024, closes_soon=True),
        "Qwen/Qwen2.5-14B-Instruct": save_tiny(tmp_path / "t", seed=2, hidden=48, positions=1024),
    }
    for name, local in names.items():
        assert name in code
        code = code.replace(name, local)
    rows = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in QUESTIONS[:8]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 3  # one batch of eight, three epochs


def test_the_blocks_of_the_page_about_losses_run():
    blocks = blocks_of((ROOT / "docs" / "losses.md").read_text())
    for code, differentiated in zip(blocks, ("student_logits", "hidden", "hidden"), strict=True):
        scope: dict = {}
        exec(compile(code, "losses.md", "exec"), scope)
        assert scope[differentiated].grad is not None


def test_the_readme_is_of_about_800_words():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert 600 <= len(prose.split()) <= 900


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)tsdkd ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert {"train", "compare", "evaluate", "table", "demo"} <= named
    for command in named:
        subprocess.run([sys.executable, "-m", "tsdkd.cli", command, "--help"], check=True, capture_output=True, timeout=120)


def test_readmes_train_command_runs_with_the_names_redirected(tmp_path):
    import shlex

    line = next(line for line in README.splitlines() if line.startswith("tsdkd train --student"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:8]))
    names = {
        "Qwen/Qwen2.5-1.5B-Instruct": save_tiny(tmp_path / "s", seed=1),
        "Qwen/Qwen2.5-14B-Instruct": save_tiny(tmp_path / "t", seed=2, hidden=48),
    }
    command = [names.get(word, word) for word in shlex.split(line)][1:]
    assert set(names.values()) <= set(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tsdkd.cli", *command, "--max_steps", "1", "--report_to", "none"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_readme_maps_every_folder():
    folders = {p.name for p in (ROOT / "tsdkd").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    tree = README[README.index("## The tree") :]
    assert not [folder for folder in folders if f"{folder}/" not in tree]


@pytest.mark.parametrize(
    "name",
    [
        *(str(page.relative_to(ROOT)) for page in PAGES),
        "CONTRIBUTING.md",
        "tsdkd/methods/README.md",
        "tsdkd/demo/README.md",
        "tsdkd/evaluation/README.md",
        "benchmarks/README.md",
        "examples/README.md",
    ],
)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{name} links to {target}"


def test_example_01(capsys):
    runpy.run_path(str(ROOT / "examples" / "01_losses_on_logits.py"), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+) =", capsys.readouterr().out)]
    assert len(losses) == 5 and losses[-1] < losses[0]


def run_example(name, folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "examples" / name), str(folder / "out"), *arguments]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_example_02(tmp_path):
    run_example("02_tiny_distillation.py", tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_example_04_compares_and_goes_on_where_it_was(tmp_path):
    few = ["--steps", "1", "--methods", "gkd,minillm,seq_kd", "--max_completion_length", "8"]
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "Tom has 5 pens. Tom buys 2 more. How many pens now?", "answer": 7}\n')
    few += ["--problems", str(problems)]
    first = run_example("04_compare_methods.py", tmp_path, *few)
    file = tmp_path / "out" / "comparison.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["method"] for row in rows] == ["untrained", "untrained", "gkd", "minillm", "seq_kd"]
    assert all(row["n"] == 1 and "commit" in row["provenance"] for row in rows)
    assert all((row["trained_tokens"] > 0) == (row["method"] != "untrained") for row in rows)
    assert all((sum(row["flops"].values()) > 0) == (row["method"] != "untrained") for row in rows)
    assert "| gkd |" in first and [f"run {number} of 3" in first for number in (1, 2, 3)] == [True] * 3
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:40])  # interrupted while it wrote
    second = run_example("04_compare_methods.py", tmp_path, *few)
    assert second.count("run 3 of 3") == 1 and "run 1 of" not in second
    made = [json.loads(line)["method"] for line in file.read_text().splitlines()]
    assert made == ["untrained", "untrained", "gkd", "minillm", "seq_kd"]


def test_example_06_is_twt_from_questions_to_a_table(tmp_path):
    said = run_example("06_twt.py", tmp_path, "24")
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    labels = [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]]
    assert labels == ["start", "student-1", "student-2", "student-3", "Standard KD", "student-1, then TSD-KD"]
    assert (tmp_path / "out" / "table.md").is_file() and "labels: calls of this run 72," in said


def test_the_recipe_of_twt_is_one(tmp_path):
    from tsdkd.cli.recipes import read_recipes
    from tsdkd.pipelines.twt import TwTConfig, stages

    recipe = ROOT / "examples" / "pipelines" / "twt.yaml"
    made = TwTConfig.of(read_recipes([recipe]))
    assert made.sampling.threshold == 0.95 and made.training.lora_r == 8 and made.inference.max_tokens == 2048
    assert [stage.name for stage in stages(made)][-3:] == ["student-3", "tested", "scores"]


def test_example_07_is_qr_distill_from_questions_to_a_table(tmp_path):
    said = run_example("07_qr_distill.py", tmp_path, "16")
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    labels = {row.split(" | ")[0].removeprefix("| ") for row in rows[1:]}
    assert {"start-1", "student-2", "student-1, at random", "student-2, every path to both", "program", "level 2"} <= labels
    assert (tmp_path / "out" / "table.md").is_file() and "paths: calls of this run 9" in said


def test_example_08_teaches_a_student_by_itself(tmp_path):
    said = run_example("08_self_distillation.py", tmp_path, "1")
    told = [line for line in said.splitlines() if "%" in line]
    before = ["before, alone", "before, with the worked solution", "before, told to be brief"]
    after = [f"solutions, self_teacher={how}" for how in ("start", "live", "ema")] + ["brief, self_teacher=start"]
    assert [line.partition(": ")[0] for line in told[3:]] == [name for name in after for _ in range(2)]  # alone, with more
    assert [line.partition(":")[0] for line in told[:3]] == before
    assert "after, with the worked solution" in told[4] and "after, told to be brief" in told[-1]


def test_the_recipe_of_qr_distill_is_one():
    from tsdkd.cli.recipes import read_recipes
    from tsdkd.pipelines.qr_distill import QRConfig, stages

    made = QRConfig.of(read_recipes([ROOT / "examples" / "pipelines" / "qr_distill.yaml"]))
    assert made.training.learning_rates == (5e-6, 2e-4) and made.training.lora_r == 32 and made.training.four_bit
    names = ["paths", "correct", "judged", "encoded", "students", "tested", "scores"]
    assert [stage.name for stage in stages(made)] == names


YOUR_OWN = sorted((ROOT / "examples" / "your_own").glob("*.py"))


@pytest.mark.parametrize("path", YOUR_OWN, ids=[path.stem for path in YOUR_OWN])
def test_what_is_a_users_own_takes_twenty_lines(path, tmp_path, capsys):
    assert len(path.read_text().splitlines()) <= 20
    scope = runpy.run_path(str(path), run_name="__main__")
    DIVERGENCES.pop("total_variation", None)
    for name in {"Mine", "Guided"} & scope.keys():
        options = config(tmp_path, TokenDistillConfig)
        models = {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2, hidden=48)}
        trainer = TokenDistillTrainer(
            **models, args=options, method=scope[name](), train_dataset=prompts(8), processing_class=make_tokenizer()
        )
        trainer.train()
        (row, *_) = [row for row in trainer.state.log_history if "loss" in row]
        assert row["loss"] == pytest.approx(sum(w * row[f"loss/{t}"] for t, w in trainer.method.terms().items()), rel=1e-5)
    assert {"Mine", "Guided"} & scope.keys() or capsys.readouterr().out
