"""The FLOPs that a run logs, from the lengths of its texts by hand, and their share of a GPU's peak."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from datasets import Dataset
from running import answered, by_prompt, general, make, rows
from score_rows import row as score_row
from tiny import QUESTIONS, config, prompts, tiny_model

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer
from tsdkd.cli import main
from tsdkd.costs import PARTS
from tsdkd.data.runs import read_run
from tsdkd.data.spent import read_spent
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, MiniLLM, SpeculativeKD
from tsdkd.pipelines.compare.table import final_scores, table
from tsdkd.reporting.run_page import run_page
from tsdkd.trainers.sizes import size_of


def lengths():
    """Tokens of the first questions, and of what is written behind each."""
    asked = [make_tokenizer()(question)["input_ids"] for question in QUESTIONS[:8]]
    return [(len(ids), len(by_prompt(ids))) for ids in asked]


def read(size, tokens):
    """A forward pass below the head: two FLOPs a parameter and token, and causal attention."""
    attention = 2 * size.layers * size.heads * size.head_dim
    return sum(2 * (size.parameters - size.embedding - size.head) * n + attention * n * n for n in tokens)


def test_a_steps_products_by_part(tmp_path):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    ours, theirs = size_of(student.config), size_of(teacher.config)
    trainer = make(tmp_path, student=student, teacher=teacher, rollouts=by_prompt, max_steps=1, per_device_train_batch_size=4,
                   gradient_accumulation_steps=2)  # fmt: skip
    trainer.loop.scorer.spending = dataclasses.replace(trainer.loop.scorer.spending, peak=1e9)
    trainer.train()
    row, whole, written = rows(trainer)[0], [p + c for p, c in lengths()], sum(c for _, c in lengths())
    assert row["tflop/teacher"] == pytest.approx(read(theirs, whole) / 1e12)
    assert row["tflop/student"] == pytest.approx(3 * read(ours, whole) / 1e12)
    assert row["tflop/rollout"] == pytest.approx((read(ours, whole) + 2 * ours.head * written) / 1e12)
    assert row["tflop/loss"] == pytest.approx((6 * ours.head + 2 * theirs.head) * written / 1e12)
    spent = sum(value for name, value in row.items() if name.startswith("tflop/")) * 1e12
    seconds = written / row["tokens_per_second"]
    assert row["mfu"] == pytest.approx(spent / (seconds * 1e9), rel=1e-3)


def test_what_is_not_read_or_written_is_not_counted(tmp_path):
    """A prefix alone, and completions that are given; on a CPU there is no share of a peak."""
    size = size_of(tiny_model().config)
    trainer = general(tmp_path / "a", GKD(selection="prefix", selection_share=0.25), rollouts=by_prompt, max_steps=1,
                      per_device_train_batch_size=8, data=prompts(8))  # fmt: skip
    trainer.train()
    kept = [(p, -(-c // 4)) for p, c in lengths()]
    row = rows(trainer)[0]
    assert row["tflop/student"] == pytest.approx(3 * read(size, [p + c for p, c in kept]) / 1e12)
    assert row["tflop/loss"] == pytest.approx((6 * 64 * 32 + 2 * 64 * 48) * sum(c for _, c in kept) / 1e12) and "mfu" not in row
    given = general(tmp_path / "b", GKD(lmbda=0.0), data=answered(), max_steps=1)
    given.train()
    assert "tflop/rollout" not in rows(given)[0] and rows(given)[0]["tflop/teacher"] > 0


def test_what_a_student_took_is_of_all_its_steps_wherever_it_was_cut_off(tmp_path):
    """Sums of the logged steps; a run that goes on counts from its checkpoint; beside the saved student it stands, too."""
    whole = make(tmp_path / "a", rollouts=by_prompt, max_steps=4, save_steps=2, save_strategy="steps")
    whole.train()
    whole.save_model()
    logged = rows(whole)
    for part in PARTS:
        assert whole.spent["flops"][part] == pytest.approx(1e12 * sum(row[f"tflop/{part}"] for row in logged), rel=1e-5)
        assert logged[-1][f"spent/tflop/{part}"] == pytest.approx(whole.spent["flops"][part] / 1e12, rel=1e-6)
    assert whole.spent["trained_tokens"] == whole.trained_tokens == logged[-1]["spent/trained_tokens"] > 0
    assert whole.spent["seconds"] > 0 and read_spent(tmp_path / "a") == whole.spent
    half = read_spent(tmp_path / "a" / "checkpoint-2")
    assert half["trained_tokens"] == logged[1]["spent/trained_tokens"] and 0 < half["seconds"] < whole.spent["seconds"]
    again = make(tmp_path / "a", rollouts=by_prompt, max_steps=4, save_steps=2, save_strategy="steps")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.spent["trained_tokens"] == whole.spent["trained_tokens"]
    assert again.spent["flops"] == pytest.approx(whole.spent["flops"], rel=1e-5) and again.spent["seconds"] > half["seconds"]
    logged = read_run(tmp_path / "a").spent_at(2)
    assert logged["flops"] == pytest.approx(half["flops"]) and logged["trained_tokens"] == half["trained_tokens"]
    assert logged["seconds"] == pytest.approx(half["seconds"], abs=1e-3)
    (tmp_path / "a" / "checkpoint-2" / "spent.json").unlink()  # of an earlier version
    make(tmp_path / "b", rollouts=by_prompt).loop.spent.load(tmp_path / "a" / "checkpoint-2")


def test_both_models_that_write_are_counted(tmp_path):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    ours, theirs = size_of(student.config), size_of(teacher.config)
    trainer = general(tmp_path, SpeculativeKD(), student=student, teacher=teacher, max_steps=1, per_device_train_batch_size=8)
    made = []
    prepare = trainer.loop.scorer.prepare
    trainer.loop.scorer.prepare = lambda rollouts: made.append(rollouts) or prepare(rollouts)
    trainer.train()
    (one,) = made
    whole = [len(p) + len(c) for p, c in zip(one.prompt_ids, one.completion_ids, strict=True)]
    drawn = sum(map(len, one.completion_ids))
    by_hand = sum(read(size, whole) + 2 * size.head * drawn for size in (ours, theirs))
    assert rows(trainer)[0]["tflop/rollout"] == pytest.approx(by_hand / 1e12)


def test_a_corpus_beside_the_completions_is_counted(tmp_path):
    size, options = size_of(tiny_model().config), {"max_steps": 1, "per_device_train_batch_size": 8}
    made = []
    for weight in (0.0, 0.5):
        trainer = TokenDistillTrainer(
            tiny_model(seed=1), tiny_model(seed=2, hidden=48), config(tmp_path / str(weight), TokenDistillConfig, **options),
            prompts(8), method=MiniLLM(pretraining_weight=weight), processing_class=make_tokenizer(),
            pretraining_dataset=Dataset.from_dict({"text": QUESTIONS[:5]}) if weight else None,
        )  # fmt: skip
        trainer.write = lambda prompt_ids, *args, **kwargs: [by_prompt(ids) for ids in prompt_ids]
        made.append((trainer, trainer.train() and rows(trainer)[0]))
    (_, without), (trainer, beside) = made
    texts = trainer.loop.scorer.corpus.ids(trainer.loop.scorer.corpus.draw(8, 0, 0), trainer.rendering.texts)
    tokens = [len(ids) for ids in texts]
    assert beside["tflop/student"] - without["tflop/student"] == pytest.approx(3 * read(size, tokens) / 1e12)
    assert beside["tflop/loss"] - without["tflop/loss"] == pytest.approx(6 * size.head * sum(n - 1 for n in tokens) / 1e12)


def test_costs_stand_in_rows_tables_and_pages(tmp_path, capsys):
    """Every row of evaluate, table and report that is of a trained student says what it took."""
    flops = dict(zip(PARTS, (1e12, 2e12, 3e12, 4.5e12), strict=True))
    took = {"trained_tokens": 1234567, "flops": flops, "seconds": 70.2}
    results = tmp_path / "r.jsonl"
    made = [score_row("student", "GSM8K", 0.5), score_row("tsd_kd", "GSM8K", 0.6, spent=took)]
    made.append(score_row("gkd", "GSM8K", 0.6, spent={"flops": 1}))
    results.write_text("".join(json.dumps(one.to_json()) + "\n" for one in made))
    assert main(["table", str(results), "--table", "1"]) == 0
    assert "| TSD-KD | 1,234,567 | 10.5 | 1, 2, 3, 4.5 | 70 |" in capsys.readouterr().out
    assert main(["table", str(results), "--table", "1", "--format", "csv"]) == 0
    cells = {line["label"]: line for line in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    ours = cells["TSD-KD"]
    assert (ours["trained_tokens"], ours["tflop_loss"], ours["seconds"]) == ("1234567", "4.5", "70.2")
    assert cells["Student"]["trained_tokens"] == cells["GKD"]["tflop_student"] == ""
    assert main(["table", str(results), "--table", "1", "--format", "latex"]) == 0
    assert "% TSD-KD took: trained tokens 1,234,567; TFLOP 10.5" in capsys.readouterr().out
    run = make(tmp_path / "run", rollouts=by_prompt, max_steps=2)
    run.train()
    run.log({"accuracy": 0.5, "n": 10})
    page = run_page([read_run(tmp_path / "run")])
    assert f"<tr><th>trained tokens</th><td>{run.trained_tokens:,}</td></tr>" in page  # of a run without a score, too
    assert '<th class="number">trained tokens</th>' in page and f'<td class="number">{run.trained_tokens:,}</td>' in page


def test_rows_of_an_earlier_version_are_shown(tmp_path):
    """They say no FLOPs."""
    old = {
        "label": "gkd",
        "method": "gkd",
        "seed": 0,
        "steps": 3,
        "accuracy": 0.5,
        "n": 10,
        "trained_tokens": 5,
        "seconds": 1.0,
    }
    run = make(tmp_path / "run", rollouts=by_prompt, max_steps=1)
    run.train()
    assert '<td class="number">5</td>' in run_page([read_run(tmp_path / "run")], scores=final_scores([old]))
    assert "| gkd | 0.500 | 0.500-0.500 | 1 | 5 |  |  | 1 |" in table([old])


def test_what_a_server_makes_is_no_share_of_this_gpu(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, max_steps=1)
    spending = trainer.loop.scorer.spending
    trainer.loop.scorer.spending = dataclasses.replace(spending, peak=1e9, elsewhere=frozenset({"rollout", "teacher"}))
    trainer.train()
    row = rows(trainer)[0]
    seconds = trainer.trained_tokens / row["tokens_per_second"]
    own = row["tflop/student"] + row["tflop/loss"]
    assert row["mfu"] == pytest.approx(own * 1e12 / (seconds * 1e9), rel=1e-3) and row["tflop/teacher"] > 0


def test_a_student_that_reads_before_its_teacher_is_counted(tmp_path):
    """The ranking's opener is chosen by the student's entropies, and the teacher reads that far alone."""
    made = {}
    for name, method in (("opener", TSDKD(direct_weight=0.0, entropy_weight=0.0)), ("all", GKD())):
        trainer = general(tmp_path / name, method, rollouts=by_prompt, max_steps=1, per_device_train_batch_size=8)
        trainer.train()
        made[name] = rows(trainer)[0]
    size, whole = size_of(tiny_model().config), [p + c for p, c in lengths()]
    more = made["opener"]["tflop/student"] - made["all"]["tflop/student"]
    assert more == pytest.approx(read(size, whole) / 1e12, rel=1e-4)
    assert made["opener"]["tflop/teacher"] < made["all"]["tflop/teacher"]
