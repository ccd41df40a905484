"""Models behind an API, by a stub server: what is tried again, paid for once, refused; and that a key reaches no file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from api import Stub, reply
from werkzeug import Response

from tsdkd.rollouts.api_models import APIModel, Asked
from tsdkd.rollouts.by_api import APIError, APIWriter


def model(stub, **more):
    return APIModel(**{"name": "t", "base_url": stub.url, "model": "m", "concurrency": 2, "tries": 3, "timeout": 5.0, **more})


def ask(stub, folder, texts, say=None, **more):
    said = []
    with APIWriter(model(stub, **more), folder, say or said.append, pause=0.01) as writer:
        return writer([Asked([{"role": "user", "content": text}]) for text in texts]), said


def test_replies_come_in_the_requests_order_and_none_is_asked_for_twice(httpserver, tmp_path):
    stub = Stub(httpserver, lambda body, times: reply(body["messages"][-1]["content"].upper()))
    found, _ = ask(stub, tmp_path, ["a", "b", "c"])
    assert [row["text"] for row in found] == ["A", "B", "C"] and stub.calls == 3
    assert [row["prompt_tokens"] for row in found] == [10] * 3
    again, _ = ask(stub, tmp_path, ["c", "d", "a"])
    assert [row["text"] for row in again] == ["C", "D", "A"] and stub.calls == 4
    ask(stub, tmp_path, ["a"], options={"temperature": 0.5})  # another request
    assert stub.calls == 5
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len({row["hash"] for row in rows}) == 5


@pytest.mark.parametrize(
    "fault",
    [
        429,
        500,
        503,
        Response("{half", content_type="application/json"),
        {"choices": []},
        {"error": "odd"},
        (429, {"error": {"message": "slow"}}, ("Retry-After", "0.01")),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(httpserver, tmp_path, fault):
    stub = Stub(httpserver, lambda body, times: fault if times < 3 else reply("x"))
    found, _ = ask(stub, tmp_path, ["a"])
    assert found[0]["text"] == "x" and stub.calls == 3


def test_a_server_says_when_it_may_be_asked_again(httpserver, tmp_path):
    limit = (429, {"error": {"message": "slow"}}, ("Retry-After", "0.4"))
    stub = Stub(httpserver, lambda body, times: limit if times == 1 else reply("x"))
    began = time.monotonic()
    ask(stub, tmp_path, ["a"])
    assert time.monotonic() - began > 0.39


def test_a_request_that_hangs_ends_by_its_timeout(httpserver, tmp_path):
    def slow(body, times):
        if times < 2:
            time.sleep(1.2)
        return reply("x")

    stub = Stub(httpserver, slow)
    found, _ = ask(stub, tmp_path, ["a"], timeout=0.3)
    assert found[0]["text"] == "x" and stub.calls == 2


def test_what_failed_is_kept_apart_and_asked_again_by_the_next_run(httpserver, tmp_path):
    broken = [True]
    stub = Stub(httpserver, lambda body, times: 400 if broken[0] and "b" in body["messages"][-1]["content"] else reply("x"))
    found, said = ask(stub, tmp_path, ["a", "b", "c"])
    assert [("error" in row) for row in found] == [False, True, False] and stub.asked["b"] == 1  # 400 is not tried again
    assert "1 requests failed" in said[0] and "status 400" in said[0]
    assert len((tmp_path / "failed" / "t.jsonl").read_text().splitlines()) == 1
    broken[0] = False
    found, _ = ask(stub, tmp_path, ["a", "b", "c"])
    assert all(row["text"] == "x" for row in found) and stub.asked == {"a": 1, "b": 2, "c": 1}
    assert not (tmp_path / "failed" / "t.jsonl").read_text()


def test_a_teacher_that_is_down_is_named_and_what_came_is_kept(httpserver, tmp_path):
    alive = [2]

    def dying(body, times):
        alive[0] -= 1
        return reply("x") if alive[0] >= 0 else 503

    stub = Stub(httpserver, dying)
    with pytest.raises(APIError) as caught:
        ask(stub, tmp_path, [str(i) for i in range(40)], concurrency=1)
    text = str(caught.value)
    assert (
        "'t'" in text
        and stub.url in text
        and "after 3 failed requests in a row, the last one tried 3 times" in text
        and "2 replies are kept" in text
    )
    assert stub.calls == 2 + 3 * 3  # the rest was never asked
    alive[0] = 100
    found, _ = ask(stub, tmp_path, [str(i) for i in range(40)])
    assert len(found) == 40 and stub.asked["0"] == stub.asked["1"] == 1


def test_a_request_that_stands_twice_is_asked_once_and_a_failure_says_what_was_asked(httpserver, tmp_path):
    stub = Stub(httpserver, lambda body, times: 400 if "bad" in body["messages"][-1]["content"] else reply("x"))
    found, _ = ask(stub, tmp_path, ["a", "bad", "a", "a", "bad"])
    assert stub.asked == {"a": 1, "bad": 1} and [row.get("text") for row in found] == ["x", None, "x", "x", None]
    (row,) = [json.loads(line) for line in (tmp_path / "failed" / "t.jsonl").read_text().splitlines()]
    assert row["tries"] == 1 and row["messages"] == [{"role": "user", "content": "bad"}] and len(row["hash"]) == 64


def test_a_teacher_that_refuses_everything_is_given_up(httpserver, tmp_path):
    for status, most in ((400, 20), (429, 3 * 3)):
        stub = Stub(httpserver, lambda body, times, status=status: status)
        with pytest.raises(APIError, match="gives no more replies"):
            ask(stub, tmp_path / str(status), [str(i) for i in range(100)], concurrency=1)
        assert stub.calls == most
        httpserver.clear()


def test_a_server_that_asks_for_a_day_is_not_waited_for(httpserver, tmp_path):
    day = (429, {"error": {"message": "slow"}}, ("Retry-After", "86400"))
    stub = Stub(httpserver, lambda body, times: day)
    with pytest.raises(APIError, match="slow"):
        ask(stub, tmp_path, ["a"], concurrency=1)
    assert stub.calls == 1


def test_retry_after_as_a_date():
    from email.utils import formatdate
    from types import SimpleNamespace

    from tsdkd.rollouts.by_api import _wait_asked_for

    def stated(text):
        return _wait_asked_for(SimpleNamespace(response=SimpleNamespace(headers={"retry-after": text})))

    assert 20 < stated(formatdate(time.time() + 30, usegmt=True)) <= 30 and stated(formatdate(0, usegmt=True)) == 0
    assert stated("2.5") == 2.5 and stated("-3") == 0 and stated("soon") == 0 and stated("") == 0


def test_nobody_there_at_all(tmp_path):
    spec = APIModel("t", "http://127.0.0.1:9/v1", "m", tries=2, timeout=1.0)
    with (
        APIWriter(spec, tmp_path, print, pause=0.01) as writer,
        pytest.raises(APIError, match=r"127\.0\.0\.1:9.*tried 2 times"),
    ):
        writer([Asked([{"role": "user", "content": str(i)}]) for i in range(5)])


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_not_tried_again(httpserver, tmp_path, monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", "sk-planted-1234567890")
    told = (status, {"error": {"message": "Incorrect API key provided: sk-planted-1234567890."}})
    stub = Stub(httpserver, lambda body, times: told)
    with pytest.raises(APIError) as caught:
        ask(stub, tmp_path, ["a", "b", "c"], api_key_env="SOME_KEY", concurrency=1)
    assert "$SOME_KEY" in str(caught.value) and "planted" not in str(caught.value) and stub.calls == 1
    assert stub.keys == ["Bearer sk-planted-1234567890"]


def test_a_spent_account_is_not_waited_for_and_a_missing_model_is_named(httpserver, tmp_path):
    spent = (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    stub = Stub(httpserver, lambda body, times: spent)
    with pytest.raises(APIError, match="quota"):
        ask(stub, tmp_path, ["a"], concurrency=1)
    assert stub.calls == 1
    stub.answer = lambda body, times: 404
    with pytest.raises(APIError, match="has no model 'm'"):
        ask(stub, tmp_path, ["b"], concurrency=1)
    assert stub.calls == 2


def test_a_planted_key_is_in_no_file(httpserver, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-planted-1234567890")
    faults = iter([500, 400, 429])
    stub = Stub(httpserver, lambda body, times: next(faults, None) or reply("x"))
    ask(stub, tmp_path, ["a", "b", "c"], api_key_env="SOME_KEY", concurrency=1)
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert b"planted" not in file.read_bytes(), file


def test_a_torn_reply_is_asked_for_again(httpserver, tmp_path):
    stub = Stub(httpserver, lambda body, times: reply("x"))
    ask(stub, tmp_path, ["a", "b"], concurrency=1)
    file = tmp_path / "t.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    found, _ = ask(stub, tmp_path, ["a", "b"], concurrency=1)
    assert [row["text"] for row in found] == ["x", "x"] and stub.asked == {"a": 1, "b": 2}
    assert len(file.read_text().splitlines()) == 2


def test_samples_of_one_prompt_are_requests_of_their_own_and_their_seeds_differ(httpserver, tmp_path):
    seeds = []
    stub = Stub(httpserver, lambda body, times: seeds.append(body.get("seed")) or reply(f"x{times}"))
    with APIWriter(model(stub, options={"seed": 7}, concurrency=1), tmp_path, print, pause=0.01) as writer:
        asked = [Asked([{"role": "user", "content": "a"}], sample) for sample in range(3)]
        assert [row["text"] for row in writer(asked)] == ["x1", "x2", "x3"]
    assert seeds == [7, 8, 9]


def test_log_probabilities_are_kept_as_their_mean(httpserver, tmp_path):
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": []}, {"token": "b", "logprob": -1.5, "top_logprobs": []}]
    stub = Stub(httpserver, lambda body, times: reply("ab", logprobs={"content": content}) if body["logprobs"] else 400)
    found, _ = ask(stub, tmp_path, ["a"], log_probs=True)
    assert found[0]["mean_log_prob"] == -1.0


def test_odd_but_good_replies(httpserver, tmp_path):
    bodies = {
        "half": reply("a\ud83db"),
        "parts": reply([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "good"}]),
        "null": reply(None),
        "sizes": {**reply("x"), "usage": {"prompt_tokens": "10", "completion_tokens": None, "total_tokens": 1}},
        "none": {**reply("x"), "usage": None},
        "values": reply("x", logprobs={"content": [{"token": "a", "logprob": None, "top_logprobs": []}]}),
    }
    stub = Stub(httpserver, lambda body, times: bodies[body["messages"][-1]["content"]])
    found, _ = ask(stub, tmp_path, list(bodies), log_probs=True)
    assert [row["text"] for row in found] == ["a\ufffdb", "good", "", "x", "x", "x"]
    assert [row["prompt_tokens"] for row in found] == [10, 10, 10, None, None, 10]
    assert "mean_log_prob" not in found[-1]
    again, _ = ask(stub, tmp_path, list(bodies), log_probs=True)
    assert again == found and stub.calls == len(bodies)


def test_replies_of_another_address_are_said(httpserver, tmp_path):
    stub = Stub(httpserver, lambda body, times: reply("x"))
    ask(stub, tmp_path, ["a"])
    stub.url = stub.url.replace("127.0.0.1", "localhost")
    _, said = ask(stub, tmp_path, ["a", "b"])
    assert "1 replies are taken that came from http://127.0.0.1" in said[0] and stub.calls == 2


@pytest.mark.parametrize(
    "given,told",
    [
        ({"base_url": "127.0.0.1:8000"}, "is no address"),
        ({"base_url": "http://me:pass@h/v1"}, "password"),
        ({"base_url": "http://far.example/v1", "api_key_env": "K"}, "unencrypted"),
        ({"model": ""}, "lacks model"),
        ({"nme": "x"}, "unknown fields nme"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"tries": True}, "tries=True"),
        ({"options": {"temprature": 1}}, "temprature"),
        ({"n": 4}, "samples"),
        ({"price": 3}, "price=3"),
        ({"name": "../x"}, "a name is that of a file"),
        ({"name": 3}, "name=3 must be a text"),
        ({"name": "a\nb"}, "a name is that of a file"),
        ({"name": "failed"}, "a name is that of a file"),
        ({"options": ["x"]}, "must be a mapping"),
        ({"max_tokens": "many"}, "max_tokens='many'"),
        ({"log_probs": "no"}, "log_probs='no'"),
        ({"seed": "5"}, "seed='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"price": {"input": "x", "output": 1}}, "price="),
    ],
)
def test_bad_teachers_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        APIModel.of({"name": "t", "base_url": "http://127.0.0.1:8000/v1", "model": "m", **given})


def test_a_key_in_the_place_of_its_variable_is_not_repeated():
    with pytest.raises(ValueError) as caught:
        APIModel("t", "https://far.example/v1", "m", api_key_env="sk-planted-123")
    assert "planted" not in str(caught.value) and "environment variable" in str(caught.value)


def test_a_price_list_that_is_not_installed_is_told_before_any_call():
    pytest.importorskip("openai")
    try:
        import genai_prices  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="genai-prices"):
            APIModel("t", "http://127.0.0.1:8000/v1", "m", price="auto").check()


def test_a_key_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    spec = APIModel("t", "https://far.example/v1", "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match=r"\$NO_SUCH_KEY, which is not set"):
        APIWriter(spec, Path(tmp_path))


def test_costs():
    spec = APIModel("t", "http://127.0.0.1:8000/v1", "m", price={"input": 2.5, "output": 10})
    assert spec.cost(1_000_000, 500_000) == 7.5
    assert APIModel("t", "http://127.0.0.1:8000/v1", "m").cost(1, 1) is None
