"""A teacher behind servers: a small server here speaks as vLLM's pooling endpoint does; the real one is in tests/engines."""

from __future__ import annotations

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from running import by_prompt, rows
from tiny import config, prompts, save_tiny, tiny_model

from tsdkd import TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.teachers.heads import head_of, last_hidden_state
from tsdkd.teachers.server import ServerTeacher, TeacherUnavailable, head_of_checkpoint
from tsdkd.types import Head, Rollouts

TEXT = "Tom has 15 pens."


BROKEN = {
    "cut": lambda items, content: (items, content[: len(content) // 2]),
    "empty": lambda items, content: (items, b""),
    "zeros": lambda items, content: (items, bytes(len(content))),
    "twice": lambda items, content: ([{**item, "index": 0} for item in items], content),
    "fewer": lambda items, content: (items[:-1], content),
    "no json": lambda items, content: ("{", content),
    "no key": lambda items, content: ([{"index": 0}], content),
    "beyond": lambda items, content: ([{**item, "end": item["end"] + 10**9} for item in items], content),
    "below": lambda items, content: ([{**item, "start": -4} for item in items], content),
    "huge": lambda items, content: (items, content + bytes(64 << 20)),
}


class Server:
    """Serves a model's hidden states; `faults` says what to do wrong, call by call."""

    def __init__(self, model, shift=0):
        self.asked, self.faults, tokenizer = [], [], make_tokenizer()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, content, headers=(), status=200):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                self.answer(json.dumps({"data": [{"id": "served"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                    return self.answer(json.dumps({"tokens": [i + shift for i in ids]}).encode())
                outer.asked.append((len(body["input"]), self.headers.get("Authorization")))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "fail":
                    return self.answer(b"out of memory", status=500)
                if fault in (408, 429):
                    return self.answer(b"slow down", status=fault)
                assert body["model"] == "served" and body["task"] == "token_embed" and body["encoding_format"] == "bytes"
                parts, items, start = [], [], 0
                for index, ids in enumerate(body["input"]):
                    with torch.no_grad():
                        hidden = last_hidden_state(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]
                    hidden = hidden[1:] if fault == "cached" else hidden
                    kind = torch.float32 if body["embed_dtype"] == "float32" else torch.bfloat16
                    parts.append(hidden.to(kind).view(torch.uint8).numpy().tobytes())
                    items.append({"index": index, "start": start, "end": start + len(parts[-1]), "shape": list(hidden.shape)})
                    start += len(parts[-1])
                content = b"".join(parts)
                if fault in BROKEN:
                    items, content = BROKEN[fault](items, content)
                metadata = items if isinstance(items, str) else json.dumps({"data": items[::-1]})
                if fault == "slow":
                    return self.trickle(content, metadata)
                self.answer(content, [("metadata", metadata)])

            def trickle(self, content, metadata):
                self.send_response(200)
                self.send_header("metadata", metadata)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for byte in content:
                    try:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(0.02)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(tmp_path):
    """A checkpoint, its model, and two servers of it."""
    path = save_tiny(tmp_path / "teacher", seed=2, hidden=48)
    model = tiny_model("llama", seed=2, hidden=48)
    servers = [Server(model), Server(model)]
    yield path, model, servers
    for server in servers:
        server.stop()


def teacher_of(path, servers, **options):
    head, norm = head_of_checkpoint(path, torch.float32, torch.device("cpu"))
    options = {"dtype": "float32", "pause": 0.01, "retries": 2, **options}
    return ServerTeacher([server.url for server in servers], head, **options), norm


def ids_of(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


ROLLOUTS = Rollouts([[5, 6, 7], [8], [9, 10], [4]], [[11, 12], [13, 14, 15], [16], [3]], [[1, 1], [1, 0, 1], [0], [1]])


@pytest.mark.parametrize("dtype,close", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_hidden_states_are_the_models_own_from_servers_in_turn(served, dtype, close):
    path, model, servers = served
    teacher, norm = teacher_of(path, servers, dtype=dtype, rows=1)
    teacher.check(TEXT, ids_of(TEXT), norm)
    counts = [len(server.asked) for server in servers]
    scored = teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)
    assert [len(server.asked) - n for server, n in zip(servers, counts, strict=True)] == [2, 1]  # a row is untrained
    for states, prompt, completion, mask in zip(
        scored, ROLLOUTS.prompt_ids, ROLLOUTS.completion_ids, ROLLOUTS.completion_mask, strict=True
    ):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            whole = last_hidden_state(model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        expected = whole[torch.tensor(mask, dtype=torch.bool)]
        torch.testing.assert_close(states, expected, rtol=close, atol=close)


def test_the_head_comes_from_its_shard_alone(tmp_path):
    model = tiny_model("gemma2", seed=3)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    head, norm = head_of_checkpoint(str(tmp_path / "one"), torch.float32, torch.device("cpu"))
    own = head_of(model)
    assert torch.equal(head.weight, own.weight) and head.softcap == own.softcap == 3.0
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = last_hidden_state(model, ids, torch.ones_like(ids))
    torch.testing.assert_close((hidden / norm).square().mean(-1), torch.ones(1, 3), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_with_code_of_its_own_is_read_only_where_that_is_allowed(served, tmp_path):
    path, _, servers = served
    file = tmp_path / "teacher" / "config.json"
    stated = json.loads(file.read_text())
    stated.update(model_type="odd_llama", auto_map={"AutoConfig": "odd_llama.OddConfig"})
    file.write_text(json.dumps(stated))
    code = "from transformers import LlamaConfig\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd_llama'\n"
    (tmp_path / "teacher" / "odd_llama.py").write_text(code)
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(tmp_path / "r", path, servers)
    trainer = run(tmp_path / "s", path, servers, trust_remote_code=True, max_steps=1)
    trainer.train()
    assert trainer.teacher.head.weight.shape == (64, 48)


def run(folder, teacher, servers=None, sampled=False, data=None, **options):
    extra = dict(teacher_placement="server", teacher_urls=[s.url for s in servers]) if servers else {}
    settings = config(folder, **{**extra, **options})
    student, data = tiny_model("llama", seed=1), prompts(16) if data is None else data  # four steps are one epoch
    trainer = TSDKDTrainer(student, teacher, settings, data, processing_class=make_tokenizer())
    if not sampled:
        trainer.write = lambda prompt_ids, *args, **kwargs: [by_prompt(ids) for ids in prompt_ids]
    return trainer


@pytest.mark.parametrize("own", [False, True])
def test_a_run_with_a_served_teacher_is_the_run_with_a_local_one(served, tmp_path, own):
    """Also where the teacher reads prompts of its own."""
    path, _, servers = served
    data = prompts(8)
    if own:
        data = data.add_column("teacher_prompt", [text + " 1+1=2" * (row % 5) for row, text in enumerate(data["prompt"])])
    local = run(tmp_path / "l", path, max_steps=3, data=data)
    remote = run(tmp_path / "r", path, servers, max_steps=3, data=data)
    local.train(), remote.train()
    assert remote.teacher_model is None
    for ours, theirs in zip(rows(remote), rows(local), strict=True):
        for name in ("loss", "loss/indirect", "loss/direct", "loss/entropy", "teacher/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_one_of_several_teachers_may_be_served(served, tmp_path):
    path, _model, servers = served
    data = prompts(8).add_column("teacher", ["here", "there"] * 4)
    there = {"model": path, "placement": "server", "urls": [server.url for server in servers]}
    both = [
        run(tmp_path / str(n), {"here": tiny_model("llama", seed=5), "there": one}, data=data, max_steps=2)
        for n, one in enumerate((path, there))
    ]
    for trainer in both:
        trainer.train()
    assert sum(len(server.asked) for server in servers) > 2 and both[1].teacher.is_remote
    for ours, theirs in zip(rows(both[1]), rows(both[0]), strict=True):
        for name in ("loss", "loss/indirect", "teacher/here/entropy", "teacher/there/entropy", "teacher/there/loss/direct"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_failing_server_is_asked_again_and_another_takes_over(served, caplog):
    path, _, servers = served
    teacher, _ = teacher_of(path, servers, rows=8)
    servers[0].faults = ["fail", "fail"]
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        scored = teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)
    assert len(scored) == 4 and "failed (500: out of memory). (attempt 1 of 3)" in caplog.text
    assert len(servers[1].asked) == 1
    servers[0].stop()
    assert torch.equal(teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)[0], scored[0])


@pytest.mark.parametrize("fault", [*BROKEN, "slow", 408, 429])
def test_a_reply_that_is_wrong_is_asked_for_again_and_then_ends_in_one_message(served, fault, caplog):
    path, _, servers = served
    good = teacher_of(path, servers[:1])[0].hidden(ROLLOUTS, ROLLOUTS.lengths)
    teacher, _ = teacher_of(path, servers[:1], read_timeout=0.3 if fault == "slow" else 30.0)
    servers[0].faults = [fault]
    again = teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)
    assert all(torch.equal(a, b) for a, b in zip(good, again, strict=True)) and "attempt 1 of 3" in caplog.text
    servers[0].faults = [fault] * 9
    with pytest.raises(TeacherUnavailable, match=rf"did not answer 3 times; the last: the server {servers[0].url} "):
        teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/models"])
def test_other_replies_of_another_shape_are_told(served, path, monkeypatch):
    folder, _, servers = served
    handler = servers[0].server.RequestHandlerClass
    for body in (b"<html>", b"[]", b'{"tokens": 3, "data": []}'):
        for name in ("do_GET", "do_POST"):
            kept = getattr(handler, name)
            wrong = lambda self, kept=kept, body=body: self.answer(body) if self.path == path else kept(self)  # noqa: E731
            monkeypatch.setattr(handler, name, wrong)
        teacher, norm = teacher_of(folder, servers[:1])
        with pytest.raises(TeacherUnavailable, match=rf"the server {servers[0].url} "):
            teacher.check(TEXT, ids_of(TEXT), norm)
        monkeypatch.undo()


def test_a_dead_teacher_ends_the_run_with_a_checkpoint_and_it_goes_on_from_there(served, tmp_path):
    path, _, servers = served
    whole = run(tmp_path / "whole", path, servers, sampled=True, max_steps=4)
    whole.train()
    trainer = run(tmp_path / "run", path, servers, sampled=True, max_steps=4)
    trainer.teacher.pause = 0.01
    steps = []
    prepare = trainer.loop.prepare

    def dying(rollouts):
        steps.append(1)
        if len(steps) == 3:
            for server in servers:
                server.faults = ["fail"] * 20
        return prepare(rollouts)

    trainer.loop.prepare = dying
    with pytest.raises(TeacherUnavailable, match=r"step 3: .*did not answer 5 times.*no step was lost"):
        trainer.train()
    for server in servers:
        server.faults = []
    resumed = run(tmp_path / "run", path, servers, sampled=True, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)  # sampled completions, too: the checkpoint is of the step's start


@pytest.mark.parametrize("fault", ["tokenizer", "weights", "size", "cached", "dead", "head"])
def test_a_server_of_something_else_is_refused_with_what_is_wrong(served, tmp_path, fault):
    path, model, _ = served
    made = {
        "tokenizer": lambda: Server(model, shift=1),
        "weights": lambda: Server(scaled(tiny_model("llama", seed=9, hidden=48))),
        "size": lambda: Server(tiny_model("llama", seed=2, hidden=32)),
    }.get(fault, lambda: Server(model))()
    message = {
        "tokenizer": "serves a model with another tokenizer",
        "weights": "does not give the final hidden states of teacher_model",
        "size": "gives hidden states of 32 features but the head of teacher_model takes 48",
        "cached": "--no-enable-prefix-caching",
        "dead": "cannot be reached",
        "head": "worse than chance",
    }[fault]
    made.faults = ["cached"] if fault == "cached" else []
    teacher, norm = teacher_of(path, [made])
    if fault == "head":  # another norm: the head itself is the test
        teacher._head, norm = Head(-20 * teacher.head.weight), None
    if fault == "dead":
        made.stop()
    with pytest.raises(TeacherUnavailable if fault == "dead" else ValueError, match=message):
        teacher.check(TEXT, ids_of(TEXT), norm)
    if fault != "dead":
        made.stop()


def scaled(model):
    """Other weights: its last norm multiplies by something else."""
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def test_a_password_in_an_address_is_in_no_message(served, caplog):
    path, _, servers = served
    servers[0].stop()
    head, _ = head_of_checkpoint(path, torch.float32, torch.device("cpu"))
    address = servers[0].url.replace("http://", "http://me:PASSWORD@")
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        teacher = ServerTeacher([address], head, dtype="float32", pause=0.01, retries=1)
        with pytest.raises(TeacherUnavailable) as told:
            teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)
    assert "PASSWORD" not in str(told.value) and "PASSWORD" not in caplog.text and "<secret>@127.0.0.1" in str(told.value)


def test_addresses_and_keys(served, caplog, monkeypatch):
    path, _, servers = served
    with pytest.raises(ValueError, match="needs teacher_urls"):
        teacher_of(path, [])
    head, _ = head_of_checkpoint(path, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'localhost:8000': an address is http://HOST:PORT"):
        ServerTeacher(["localhost:8000"], head)
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        ServerTeacher(["http://10.0.0.7:8000"], head)
    assert "is not on this machine" in caplog.text and "TSDKD_TEACHER_API_KEY is not set" in caplog.text
    monkeypatch.setenv("TSDKD_TEACHER_API_KEY", "secret")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        ServerTeacher(["http://10.0.0.7:8000"], head)
    assert "private network" in caplog.text and "is not set" not in caplog.text
    teacher, _ = teacher_of(path, servers)
    teacher.hidden(ROLLOUTS, ROLLOUTS.lengths)
    assert servers[0].asked[-1][1] == "Bearer secret"


def test_placements_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_urls were given but teacher_placement is 'local'"):
        config(tmp_path, teacher_urls=["http://127.0.0.1:1"])
    with pytest.raises(ValueError, match="as the name or folder of the served checkpoint, not a LlamaForCausalLM"):
        run(tmp_path, tiny_model("llama"), teacher_placement="server", teacher_urls=["http://127.0.0.1:1"])
    with pytest.raises(ValueError, match="choose one of: local, server"):
        config(tmp_path, teacher_placement="cloud")
