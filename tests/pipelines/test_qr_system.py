"""QR-Distill from a YAML file to scores: a stub teacher in six styles, a stub judge, a tiny encoder, two students."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from api import Stub, reply
from qr import mapping_of, run
from tiny import save_tiny
from twt import rows, small_embedder, solved

from tsdkd.cli import main
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.pipelines.qr_distill import QRConfig
from tsdkd.pipelines.qr_distill.prompts import ANSWER, ENDING, JUDGE, STYLES, verdict


def save_roberta(folder, positions=130):
    """A random RoBERTa, which cannot be downloaded here; its positions begin behind the padding's id."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer))
    config = RobertaConfig(**sizes, max_position_embeddings=positions, pad_token_id=tokenizer.pad_token_id)
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def answer(body, times):
    """A path whose form depends on the style; wrong by `program`, unsound by `backward`, doubtful by `fact_retrieval`."""
    text = body["messages"][-1]["content"]
    if body["model"] == "judge":
        said = "invalid" if "checked" in text else "maybe" if "facts:" in text else "valid"
        return reply(f"I looked at it.\nVerdict: {said}")
    a, b, total = solved(text)
    steps = {
        "Reason to": f"{a}+{b}={total}",
        "step by step": f"Start with {a}. Add {b}.",
        "tree of": f"One way: {a}+{b}. Another: {b}+{a}.",
        "Use code": f"print({a}+{b})",
        "relevant facts": f"facts: {a}, {b}",
        "forward": f"{total}, checked: {total}-{b}={a}",
    }
    style = next(word for word in steps if word in text)
    return reply(f"{steps[style]}\nThe answer is: {total + (style == 'Use code')}")


@pytest.fixture
def made(httpserver, tmp_path):
    stub = Stub(httpserver, answer)
    students = [save_tiny(tmp_path / "a", seed=1, positions=256), save_tiny(tmp_path / "b", seed=2, hidden=48, positions=256)]
    return stub, mapping_of(stub, tmp_path, students, save_roberta(tmp_path / "encoder"))


def test_from_questions_to_scores(made, tmp_path, capsys):
    stub, mapping = made
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(mapping()))
    assert main(["pipeline", "qr-distill", "--config", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "| start-1 |" in said and "| student-2 |" in said and "routed, vanilla" in said
    line, said = run(mapping())
    assert all("as it was made" in text for text in said)
    assert len(rows(line, "paths")) == 36 and len(rows(line, "correct")) == 30  # not those by program
    judged = rows(line, "judged")
    assert {row["style"] for row in judged} == {"vanilla", "chain_of_thought", "tree_of_thought"} and len(judged) == 18
    counts = json.loads((tmp_path / "out" / "03-judged.stage.json").read_text())["summary"]
    assert counts["invalid, backward"] == 6 and counts["doubtful, fact_retrieval"] == 6 and counts["valid, vanilla"] == 6
    assert json.loads((tmp_path / "out" / "02-correct.stage.json").read_text())["summary"]["wrong, program"] == 6
    assert stub.calls == 36 + 30
    folder = line.stages[4].output
    routed = [json.loads(text) for text in (folder / "routing.jsonl").read_text().splitlines()]
    assert len(routed) == 2 * 18 and {row["style"] for row in routed} == {row["style"] for row in judged}
    from transformers import AutoModelForCausalLM

    for name, start in (("student-1", "a"), ("student-2", "b")):
        now, then = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / name, tmp_path / start))
        assert any(not torch.equal(p, q) for p, q in zip(now.parameters(), then.parameters(), strict=True))
    labels = {row["label"] for row in rows(line, "scores")}
    assert labels == {"start-1", "start-2", "student-1", "student-2"}


def test_the_next_stage_reads_exactly_the_filtered_file(made):
    _, mapping = made
    line, _ = run(mapping(), until="judged")
    file = line.stages[2].output
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:7]))
    line, _ = run(mapping(), until="students", accepted=["judged"])
    about = line.stages[4].about["summary"]
    assert about["paths"] == 7 and about["steps"] == 4
    routed = [json.loads(text) for text in (line.stages[4].output / "routing.jsonl").read_text().splitlines()]
    assert {row["problem"] for row in routed} == {row["problem"] for row in rows(line, "judged")}


def test_doubtful_paths_are_kept_by_option_and_without_a_judge_all_right_ones_are(made):
    stub, mapping = made
    line, _ = run(mapping(keep_doubtful=True), until="judged")
    assert len(rows(line, "judged")) == 24
    line, _ = run(mapping(judge=None), until="judged")
    assert len(rows(line, "judged")) == 30 and stub.calls == 66


def test_the_encoder_cuts_what_is_longer_than_its_context_and_counts_it(made, tmp_path):
    _, mapping = made
    line, said = run(mapping(encoder=save_roberta(tmp_path / "short", positions=20)), until="encoded")
    assert "cut to the encoder's context" in said[-1] and "width 16" in said[-1]
    cut = line.stages[3].about["summary"]["cut to the encoder's context"]
    assert 0 < cut <= 18


def test_a_real_encoder(made):
    _, mapping = made
    line, said = run(mapping(encoder=small_embedder()), until="encoded")
    from safetensors.torch import load_file

    encodings = load_file(line.stages[3].output / "encodings.safetensors")["encodings"]
    assert encodings.shape == (18, 384) and torch.isfinite(encodings).all() and "width 384" in said[-1]


@pytest.mark.parametrize(
    "more,told",
    [
        ({"students": ["one"]}, "at least two together"),
        ({"students": "one"}, "at least two together"),
        ({"training": {"learning_rates": [1e-3]}}, "2 students have 1 learning rates"),
        ({"training": {"learning_rate": 1}}, "training has no learning_rate"),
        ({"styles": {"x": "no field"}}, "styles.x has the fields"),
        ({"judge_prompt": "{question}"}, "judge_prompt has the fields"),
        ({"answer": "("}, "no regular expression"),
        ({"teachr": 1}, "unknown fields: teachr"),
        ({"judge": {"name": "t", "base_url": "http://127.0.0.1:1/v1", "model": "m"}}, "both called t"),
        ({"keep_doubtful": "yes"}, "keep_doubtful='yes'"),
        ({"seed": "x"}, "seed='x'"),
        ({"training": {"per_student": "false", "learning_rates": [1, 1]}}, "per_student='false'"),
        ({"styles": {1: "{question}"}}, "a style is called 1"),
    ],
)
def test_bad_recipes_are_told(made, more, told):
    _, mapping = made
    with pytest.raises(ValueError, match=told):
        QRConfig.of(mapping(**more))


def test_bad_data_are_told(made, tmp_path):
    stub, mapping = made
    (tmp_path / "none.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="row 0 has no answer"):
        run(mapping(problems=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="nobody"):
        run(mapping(encoder=str(tmp_path / "nobody")))
    assert stub.calls == 0
    with pytest.raises(ValueError, match="no path reaches its label"):
        run(mapping(answer="never: (.*)"))
    stub.answer = lambda body, times: reply("Verdict: invalid") if body["model"] == "judge" else answer(body, times)
    with pytest.raises(ValueError, match="the judge keeps none of 30 paths"):
        run(mapping())


@pytest.mark.parametrize(
    "text,label,said",
    [
        ("The answer is: 17", "17", True),
        ("The answer is 17.", "17.0", True),
        ("**The answer is:** **17**", "17", True),
        ("x\nThe answer is: $17$.", "17", True),
        (r"The answer is: \(17\)", "17", True),
        (r"The answer is: $\boxed{\frac{1}{2}}$", r"\frac{1}{2}", True),
        (r"So \boxed{\frac{1}{2}}.", "0.5", True),
        (r"The answer is: $\frac{1}{2}$", "1/2", True),
        (r"The answer is: $x^{2}+1$", "1+x^2", True),
        ("#### 17", "12+5=17\n#### 17", True),
        ("The answer is: (B) Paris", "B", True),
        ("The answer is: B.", "B", True),
        ("The answer is: option b", "B", True),
        ("The answer is: yes.", "Yes", True),
        ("The answer is: 17\nSo the answer is correct.", "17", True),
        ("The answer is: $2$ or $3$", "2", False),
        (r"The answer is: 3$\sqrt{2}$", "3", False),
        ("The answer is: 2*3", "2", False),
        ("The answer is: Because", "B", False),
        ("It is 17.", "17", False),
        ("", "17", False),
    ],
)
def test_answers_as_teachers_write_them(text, label, said):
    from tsdkd.pipelines.qr_distill.grading import right

    assert right(text, label, ANSWER) is said


def test_an_encoder_without_a_padding_token(made, tmp_path):
    _, mapping = made
    from transformers import AutoTokenizer

    folder = save_tiny(tmp_path / "decoder", seed=3, positions=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, said = run(mapping(encoder=folder), until="encoded")
    assert "width 32" in said[-1]


def test_a_request_to_the_judge_that_failed_is_no_doubtful_verdict(made):
    stub, mapping = made

    def failing(body, times):
        return 400 if body["model"] == "judge" and "Start with" in str(body) else answer(body, times)

    stub.answer = failing
    line, _ = run(mapping(keep_doubtful=True, allow_failed=0.5), until="judged")
    assert len(rows(line, "judged")) == 18 and "chain_of_thought" not in {row["style"] for row in rows(line, "judged")}


def test_verdicts_and_the_papers_styles():
    for text, said in (
        ("Verdict: valid", True), ("**Verdict:** invalid.", False), ("verdict: VALID\nmore", True), ("valid", None), ("", None),
        ("Verdict: valid\nVerdict: invalid", None), ("Verdict: not valid", None), ("Verdict: valid or invalid", None),
    ):  # fmt: skip
        assert verdict(text) is said, text
    wanted = {
        "vanilla": "Reason to solve the problem:\n{question}",
        "chain_of_thought": "{question}\n\nLet's reason step by step, writing each reasoning step clearly before giving the"
        " final answer.",
        "program": "Use code to solve the following problem and print the final answer.\n{question}",
    }
    assert len(STYLES) == 6 and all(STYLES[name] == text for name, text in wanted.items())
    assert "multiple solution paths and choose the most promising one" in STYLES["tree_of_thought"]
    assert "relevant facts from your knowledge" in STYLES["fact_retrieval"] and "verified answer" in STYLES["backward"]
    import re

    assert re.search(ANSWER, "x\nThe answer is: 17")[1] == "17" and "The answer is:" in ENDING and "{path}" in JUDGE
