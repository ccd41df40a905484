"""The demo's models behind an API: solutions, mistakes and confidence are the model's; the frame is the server's."""

from __future__ import annotations

import math

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.data.answers import final_answer
from tsdkd.demo.api_server import framed, served
from tsdkd.demo.problems import make_problems
from tsdkd.demo.run import shipped
from tsdkd.demo.scoring import answers
from tsdkd.pipelines.twt.parsing import parsed, rewritten
from tsdkd.pipelines.twt.prompts import TASKS
from tsdkd.rollouts.api_models import APIModel, Asked
from tsdkd.rollouts.by_api import APIError, APIWriter

QUESTIONS = [p.question for p in make_problems(12, 3, (1, 2))]


@pytest.fixture(scope="module")
def student():
    """The demo's student, which makes mistakes."""
    return AutoModelForCausalLM.from_pretrained(shipped("student"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def url(student):
    with served({"s": student}, AutoTokenizer.from_pretrained(shipped("student"))) as urls:
        yield urls["s"]


def ask(url, folder, texts, **options):
    model = APIModel("s", url, "s", options=options, concurrency=8, log_probs=True)
    with APIWriter(model, folder) as writer:
        return writer([Asked([{"role": "system", "content": "x"}, {"role": "user", "content": text}]) for text in texts])


def test_replies_are_the_models_own_solutions_with_its_own_confidence(student, url, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    expected = answers(student, tokenizer, make_problems(12, 3, (1, 2)))
    replies = ask(url, tmp_path, QUESTIONS, temperature=0.0)
    for question, reply, solution in zip(QUESTIONS, replies, expected, strict=True):
        found = parsed(reply["text"], TASKS["maths"], reply["finish"])
        assert (found.rationale, found.answer) == (solution.partition("####")[0].strip(), final_answer(solution))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        ids = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = student(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        mean = logits.gather(1, torch.tensor(ids)[:, None]).mean().item()
        assert reply["mean_log_prob"] == pytest.approx(mean, abs=1e-4)
        assert found.confidence == pytest.approx(math.exp(mean), abs=1e-4)
        assert (reply["prompt_tokens"], reply["completion_tokens"]) == (len(prompt), len(ids))


def test_a_temperature_changes_what_is_written_and_not_the_scores_rule(url, tmp_path):
    cold, hot = (ask(url, tmp_path / str(t), QUESTIONS, temperature=t) for t in (0.0, 3.0))
    assert sum(a["text"] != b["text"] for a, b in zip(cold, hot, strict=True)) > 6
    assert sum(b["mean_log_prob"] < a["mean_log_prob"] for a, b in zip(cold, hot, strict=True)) > 6


def test_a_rewriting_leaves_the_results_of_the_steps(url, tmp_path):
    text = TASKS["maths"].filled("rewrite", question="Q", rationale="12+5=17\n17*2=34", student="1=2")
    (reply,) = ask(url, tmp_path, [text])
    assert rewritten(reply["text"], reply["finish"]) == "17\n34"


def test_a_solution_without_an_answer_has_none():
    assert framed("1+1=2", 0.5) == "Thinking: 1+1=2\n\nscore: 0.5000"


def test_what_it_does_not_serve(url, tmp_path):
    with pytest.raises(APIError, match="has no model 'other'"), APIWriter(APIModel("o", url, "other"), tmp_path) as writer:
        writer([Asked([{"role": "user", "content": "a"}])])
    for body in ("{", "[]", '{"messages": []}', '{"messages": [{"content": "a"}], "temperature": "hot"}'):
        assert httpx.post(f"{url}/chat/completions", content=body, trust_env=False).status_code == 400
    assert httpx.post(f"{url}/completions", content="{}", trust_env=False).status_code == 404
    assert httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"] == "s"
    assert url.startswith("http://127.0.0.1:")
