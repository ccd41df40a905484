"""Tasks are found, checked and scored; rows say where they come from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import ON, ROOT, by_hf, items, local_task
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.cli import main
from tsdkd.data.rows import read_scores
from tsdkd.demo.problems import held_out
from tsdkd.demo.run import HELD_OUT_SEED, LEVELS, shipped
from tsdkd.demo.scoring import accuracy, answers
from tsdkd.evaluation import harness
from tsdkd.evaluation import tasks as harness_tasks
from tsdkd.evaluation.run import Model, Settings, evaluate
from tsdkd.evaluation.suite import PAPER, suite_table


def test_every_name_of_the_suite_is_the_harnesss_with_its_metric_filter_and_limit():
    manager = harness_tasks.find_tasks([benchmark.task for benchmark in PAPER])
    for benchmark in PAPER:
        leaves = list(harness_tasks.leaf_configs(manager, benchmark.task))
        assert leaves, benchmark.task
        group = manager.task_index[benchmark.task].cfg.get("aggregate_metric_list")
        if benchmark.task in manager.all_groups:
            assert benchmark.metric in {entry["metric"] for entry in group}, benchmark.task
        for name, leaf in leaves:
            metrics = {str(entry["metric"]).rpartition(".")[2] for entry in leaf["metric_list"]}
            filters = {entry["name"] for entry in leaf.get("filter_list", [{"name": "none"}])}
            assert benchmark.metric in metrics and benchmark.filter in filters, name
            assert bool(leaf.get("unsafe_code")) == benchmark.runs_code, name
            if leaf["output_type"] == "generate_until":
                assert leaf["generation_kwargs"].get("max_gen_toks", 256) == benchmark.max_new_tokens, name
            else:
                assert leaf["output_type"] == "multiple_choice" and benchmark.max_new_tokens is None, name
            if benchmark.shots:  # a task that says 0 cannot be given examples
                assert leaf.get("num_fewshot") != 0, name
    assert len(PAPER) == 10 and suite_table() in (ROOT / "tsdkd" / "evaluation" / "README.md").read_text()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_demos_models_score_exactly_the_demos_accuracy(tmp_path, name, capsys):
    out = tmp_path / "results.jsonl"
    command = ["evaluate", "--model", shipped(name), "--tasks", "tsdkd_word_problems", "--chat_template", "on"]
    assert main([*command, "--dtype", "float32", "--batch_size", "250", "--out", str(out)]) == 0
    (row,) = read_scores(out)
    model = AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shipped(name))
    expected = accuracy(model, tokenizer, held_out(1000, HELD_OUT_SEED, set(), LEVELS))
    assert row.score == expected["accuracy"] and row.n == expected["n"] == 1000
    assert row.items["right"].count("1") == round(1000 * row.score)
    fields = (
        """task metric filter version shots n score stderr seed model commit versions hardware command chat_template""".split()
    )
    assert not [field for field in fields if field not in row.to_json()]
    assert (row.task, row.metric, row.filter, row.shots) == ("tsdkd_word_problems", "accuracy", "none", 0)
    assert row.chat_template is True and row.partial is False and row.origin["seed"] == 0 and row.label == name
    assert row.stderr == pytest.approx((row.score * (1 - row.score) / 999) ** 0.5, abs=1e-9)
    assert {"torch", "transformers", "lm_eval"} <= set(row.origin["versions"])
    # A second time nothing is left to do.
    assert main([*command, "--dtype", "float32", "--out", str(out)]) == 0
    assert "1 of 1 scorings stand" in capsys.readouterr().out and len(read_scores(out)) == 1


def test_an_item_known_right_scores_right_and_one_known_wrong_wrong(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
    problems = held_out(2, 5, set(), LEVELS)
    written = answers(teacher, AutoTokenizer.from_pretrained(shipped("teacher")), problems)
    right = written[0].rpartition("#### ")[2]
    folder = local_task(
        tmp_path / "t",
        [{"question": problems[0].question, "answer": right}, {"question": problems[1].question, "answer": "12345"}],
    )
    model, samples = Model.at(shipped("teacher")), tmp_path / "s.jsonl"
    (row,) = evaluate(["local"], model, by_hf("teacher"), [ON], tmp_path / "r.jsonl", include_path=[folder], samples=samples)
    assert row.items["right"] == "10" and row.score == 0.5
    kept = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [sample["answer"] for sample in kept] == written and [sample["accuracy"] for sample in kept] == [1.0, 0.0]
    assert problems[0].question in kept[0]["prompt"]


def test_the_shipped_examples_run_with_and_without_a_chat_template(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "r.jsonl"
    command = ["evaluate", "--model", shipped("teacher"), "--tasks", "graded_questions,which_result,my_task", "--limit", "6"]
    command += [
        "--include_path",
        "examples/eval_tasks",
        "--chat_template",
        "both",
        "--dtype",
        "float32",
        "--max_gen_toks",
        "48",
    ]
    assert main([*command, "--batch_size", "6", "--out", str(out)]) == 0
    found = {(row.task, row.chat_template): row for row in read_scores(out)}
    assert len(found) == 6 and all(row.partial and row.n == 6 for row in found.values())
    assert found["graded_questions", True].score == 1.0 > found["graded_questions", False].score
    assert found["which_result", True].metric == "acc" and found["my_task", True].filter == "last-number"


def test_a_group_is_scored_as_a_whole_first_and_by_task(tmp_path):
    folder = tmp_path / "g"
    local_task(folder, items(4, 1), "part_a")
    local_task(folder, items(8, 2), "part_b")
    text = "group: both_parts\ntask: [part_a, part_b]\naggregate_metric_list:\n  - {metric: accuracy, weight_by_size: true}\n"
    (folder / "group.yaml").write_text(text + "metadata: {version: 1}\n")
    made = evaluate(
        ["both_parts"], Model.at(shipped("student")), by_hf("student"), [ON], tmp_path / "r.jsonl", include_path=[folder]
    )
    whole, a, b = made
    assert (whole.task, whole.group, whole.n, whole.main) == ("both_parts", None, 12, True)
    assert (a.group, b.group, a.n, b.n) == ("both_parts", "both_parts", 4, 8)
    assert whole.score == pytest.approx((4 * a.score + 8 * b.score) / 12)
    assert whole.items["right"] == a.items["right"] + b.items["right"]


def test_what_stands_is_not_run_again_and_what_changed_is(tmp_path):
    folder, out, model = local_task(tmp_path / "t", items(3)), tmp_path / "r.jsonl", Model.at(shipped("student"))
    built = []

    def build():
        built.append(1)
        return by_hf("student")()

    def go(settings, model=model):
        return evaluate(["local"], model, build, settings, out, include_path=[folder])

    first = go([ON])
    assert go([ON]) == first and len(built) == 1
    both = go([ON, Settings(chat_template=False, dtype="float32")])
    assert len(both) == 2 and len(built) == 2
    assert len(go([ON], Model(model.name, "other weights", model.label))) == 1 and len(built) == 3
    # Under another label the rows are called so; nothing is scored.
    renamed = go([ON], Model(model.name, model.digest, "another"))
    assert [row.label for row in renamed] == ["another"] and len(built) == 3
    assert [row.label for row in read_scores(out)] == ["another", model.label, model.label]
    # A task whose items changed is another one.
    local_task(folder, items(4))
    assert go([ON])[0].n == 4 and len(built) == 4
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))
    out.write_text(out.read_text()[:-20])  # killed while it wrote the last row
    assert len(read_scores(out)) == 2
    out.write_text("{}\n" + out.read_text())
    with pytest.raises(ValueError, match=r"line 1 is no row of tsdkd evaluate: it has no label, metric"):
        go([ON])


def test_a_scoring_that_was_cut_off_is_taken_out_and_run_again(tmp_path):
    folder, out = tmp_path / "g", tmp_path / "r.jsonl"
    local_task(folder, items(2, 1), "part_a")
    local_task(folder, items(2, 2), "part_b")
    text = "group: both_parts\ntask: [part_a, part_b]\naggregate_metric_list:\n  - {metric: accuracy, weight_by_size: true}\n"
    (folder / "group.yaml").write_text(text + "metadata: {version: 1}\n")
    settings = [ON, Settings(chat_template=False, dtype="float32")]

    def go():
        evaluate(["both_parts"], Model.at(shipped("student")), by_hf("student"), settings, out, include_path=[folder])
        return [(row.task, row.chat_template, row.score) for row in read_scores(out)]

    whole = go()
    assert len(whole) == 6
    lines = out.read_text().splitlines(keepends=True)
    for kept in ("".join(lines)[:-20], "".join(lines[:5]), "".join(lines[:4]) + lines[4][:30]):
        out.write_text(kept)
        assert go() == whole


def test_bad_input_is_named_with_what_to_do(tmp_path, capsys):
    def refused(*arguments):
        assert main(["evaluate", "--out", str(tmp_path / "r.jsonl"), *arguments]) == 2
        return capsys.readouterr().err

    student = ["--model", shipped("student")]
    assert "nothing to score was named" in refused(*student)
    assert "no model was given" in refused("--tasks", "tsdkd_word_problems")
    assert "there is no such folder" in refused("--model", "./nowhere", "--tasks", "tsdkd_word_problems")
    assert "holds no config.json" in refused("--model", str(tmp_path), "--tasks", "tsdkd_word_problems")
    bare = Path(save_tiny(tmp_path / "bare"))
    for file in bare.glob("token*"):
        file.unlink()
    message = refused("--model", str(bare), "--tasks", "tsdkd_word_problems")
    assert "holds no tokenizer" in message and "save_pretrained" in message
    assert "is no folder" in refused(*student, "--tasks", "local", "--include_path", str(tmp_path / "none"))
    assert "--skip gsm8k: not among" in refused(*student, "--tasks", "tsdkd_word_problems", "--skip", "gsm8k")
    plain = save_tiny(tmp_path / "plain")
    for file in [*Path(plain).glob("chat_template*")]:
        file.unlink()
    settings = json.loads((Path(plain) / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (Path(plain) / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refused("--model", plain, "--tasks", "tsdkd_word_problems", "--chat_template", "on", "--limit", "2")
    assert "has no chat template: pass --chat_template off" in message
    message = refused(*student, "--tasks", "tsdkd_word_problems", "--max_gen_toks", "256")
    assert "context of 256 leaves no room" in message


def test_an_unknown_task_data_that_are_not_there_and_code_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = "dataset_path: nobody/nothing\ndataset_name: main\ntest_split: test\noutput_type: generate_until\n"
    text += "doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: exact_match}]\n"
    (folder / "a.yaml").write_text("task: far_away\n" + text)
    (folder / "b.yaml").write_text("task: runs_code\nunsafe_code: true\n" + text)
    model = Model.at(shipped("student"))

    def refused(task, **options):
        with pytest.raises(ValueError) as error:
            evaluate([task], model, by_hf("student"), [ON], tmp_path / "r.jsonl", include_path=[folder], **options)
        return str(error.value)

    message = refused("far_away")
    assert "nobody/nothing" in message and "load_dataset('nobody/nothing', 'main')" in message and "cache" in message
    message = refused("runs_code")
    assert "running the code that the model writes" in message and "--allow-code-execution" in message
    assert "nobody/nothing" in refused("runs_code", allow_code=True)
    assert "unknown to lm-evaluation-harness; close to it: gsm8k" in refused("gsm8kk")
    assert not (tmp_path / "r.jsonl").exists()


def test_out_of_memory_halves_the_batches_and_says_so(tmp_path, monkeypatch):
    import lm_eval

    sizes, said, real = [], [], lm_eval.evaluate

    def small(lm, **options):
        sizes.append(lm.batch_size_per_gpu)
        if lm.batch_size_per_gpu > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(lm, **options)

    monkeypatch.setattr(lm_eval, "evaluate", small)
    folder = local_task(tmp_path / "t", items(3))
    (row,) = evaluate(
        ["local"],
        Model.at(shipped("student")),
        lambda: harness.hf_model(shipped("student"), dtype="float32", batch_size=16),
        [ON],
        tmp_path / "r.jsonl",
        include_path=[folder],
        say=said.append,
    )
    assert sizes == [16, 8, 4] and row.n == 3
    assert any("out of memory with batches of 16; again with 8" in text for text in said)
    monkeypatch.setattr(lm_eval, "evaluate", lambda lm, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(ValueError, match=r"one item at a time does not fit into memory \(no room\)"):
        evaluate(
            ["local"], Model.at(shipped("student")), by_hf("student"), [Settings()], tmp_path / "q.jsonl", include_path=[folder]
        )


def test_the_random_states_stay_as_they_were(tmp_path):
    folder = local_task(tmp_path / "t", items(2))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    lm, loaded = by_hf("student")(), harness_tasks.load_task(harness_tasks.find_tasks(["local"], [folder]), "local")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    harness.score(lm, loaded, "local", chat_template=True)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_code_is_run_where_leave_was_given_and_the_environment_stays(tmp_path, monkeypatch):
    """As mbpp's own file, this one's metric refuses to be imported without the word that `--allow-code-execution` gives."""
    import os

    folder = local_task(tmp_path / "t", items(2), "runs_code")
    file = folder / "runs_code.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    guard = "import os\n\nif os.environ.get('HF_ALLOW_CODE_EVAL') != '1':\n    raise ValueError('!!!WARNING!!!')\n\n"
    graded = (
        (folder / "grading.py")
        .read_text()
        .replace("    return", "    assert os.environ['HF_ALLOW_CODE_EVAL'] == '1'\n    return")
    )
    (folder / "grading.py").write_text(guard + graded)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    model, out = Model.at(shipped("student")), tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="--allow-code-execution"):
        evaluate(["runs_code"], model, by_hf("student"), [ON], out, include_path=[folder])
    (row,) = evaluate(["runs_code"], model, by_hf("student"), [ON], out, include_path=[folder], allow_code=True)
    assert row.n == 2 and "HF_ALLOW_CODE_EVAL" not in os.environ


def test_a_models_generation_config_changes_no_answer_and_its_digest(tmp_path):
    """vLLM does not read it here, so transformers must not either: the two would decode otherwise."""
    import shutil

    folder = local_task(tmp_path / "t", items(8))
    penal = tmp_path / "penal"
    shutil.copytree(shipped("student"), penal)
    settings = json.loads((penal / "generation_config.json").read_text())
    (penal / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 3.0}))
    rows, models = [], [Model.at(shipped("student")), Model.at(str(penal))]
    for model in models:
        lm = harness.hf_model(model.name, dtype="float32", batch_size=8)
        rows += evaluate(["local"], model, lambda lm=lm: lm, [ON], tmp_path / "r.jsonl", include_path=[folder])
    assert len(rows) == 2 and rows[0].items == rows[1].items and models[0].digest != models[1].digest
    assert lm.model.generation_config.repetition_penalty == 3.0  # put back


def test_the_digest_is_of_the_whole_file(tmp_path):
    folder = Path(save_tiny(tmp_path / "m"))
    weights = folder / "model.safetensors"
    padded = weights.read_bytes() + bytes(5 << 20)
    weights.write_bytes(padded)
    before = Model.at(str(folder)).digest
    changed = bytearray(padded)
    changed[3 << 20] = 1
    weights.write_bytes(bytes(changed))
    assert Model.at(str(folder)).digest != before


def test_a_second_try_draws_the_same_worked_examples(tmp_path, monkeypatch):
    import lm_eval

    folder = local_task(tmp_path / "t", items(12))
    file = folder / "local.yaml"
    file.write_text(file.read_text().replace("num_fewshot: 0", "num_fewshot: 2") + "fewshot_split: test\n")
    real, tries = lm_eval.evaluate, []

    def fails_once(lm, **options):
        found = real(lm, **options)
        tries.append([row["arguments"][0][0] for row in found["samples"]["local"]])
        if len(tries) == 1:
            raise torch.OutOfMemoryError("late")
        return found

    monkeypatch.setattr(lm_eval, "evaluate", fails_once)
    evaluate(["local"], Model.at(shipped("student")), by_hf("student"), [ON], tmp_path / "r.jsonl", include_path=[folder])
    assert len(tries) == 2 and tries[0] == tries[1] and "#### " not in tries[0][0][:20]


def test_a_group_of_ones_own_may_name_the_harnesss_tasks(tmp_path):
    folder = local_task(tmp_path / "t", items(2))
    (folder / "g.yaml").write_text("group: mine\ntask: [sciq, local]\n")
    manager = harness_tasks.find_tasks(["mine"], [folder])
    assert [name for name, _ in harness_tasks.leaf_configs(manager, "mine")] == ["sciq", "local"]


def test_an_adapter_is_scored_on_its_base_with_its_own_tokenizer(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(shipped("student")),
        LoraConfig(r=32, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    tokenizer.chat_template = "OWN " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "adapter")
    lm = harness.hf_model(str(tmp_path / "adapter"), dtype="float32", batch_size=2)
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]).startswith("OWN ")
    assert any("lora" in name for name, _ in lm.model.named_parameters())
    assert harness._base_and_adapter(str(tmp_path / "adapter"), "a", "b", None) == {
        "a": shipped("student"),
        "b": str(tmp_path / "adapter"),
    }


def test_of_choices_the_likeliest_is_kept_as_the_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    samples, folder = tmp_path / "s.jsonl", ROOT / "examples" / "eval_tasks"
    model = Model.at(shipped("teacher"))
    evaluate(["which_result"], model, by_hf("teacher"), [ON], tmp_path / "r.jsonl", include_path=[folder], samples=samples)
    given = [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]
    for sample, item in zip(map(json.loads, samples.read_text().splitlines()), given, strict=True):
        assert sample["answer"] in item["choices"]
        assert sample["acc"] == float(sample["answer"] == item["choices"][item["right"]])


def test_a_model_that_does_not_fit_is_said_so(tmp_path):
    def build():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28 GiB")

    with pytest.raises(ValueError, match="the model does not fit into memory"):
        evaluate(
            ["local"],
            Model.at(shipped("student")),
            build,
            [ON],
            tmp_path / "r.jsonl",
            include_path=[local_task(tmp_path / "t", items(2))],
        )
