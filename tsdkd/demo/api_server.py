"""The demo's models behind an OpenAI-compatible API on this machine, standing in for teachers that follow instructions.

Models of this size follow none, so the server does what is asked of a large one: it puts a worked solution into the frame of
thinking, answer and score; the score is the geometric mean of the tokens' probabilities; and asked to compare a thinking
process with a student's and to align it (TwT, Figure 8), it leaves the results of its steps. Everything else is the model's:
solutions, mistakes, confidence. QR-Distill's prompts are answered by the rules of `tsdkd.demo.styles`.
`python -m tsdkd.demo.api_server --model FOLDER --port 8001` serves until it is stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tsdkd.data.answers import final_answer
from tsdkd.data.rendering import Rendering
from tsdkd.demo.styles import reply_to

_MOST = 1 << 20  # bytes of a request
_GATHER = 0.01  # seconds in which requests come together to a batch
_REWRITES = "compare your previous thinking process"
_PREVIOUS = re.compile(r"(?s)Your previous thinking process:\n(.*?)\n\nThe student's thinking process:")
_RESULT = re.compile(r"[^\s=]*=(?=\S)")


def shortened(rationale: str) -> str:
    """The results of a worked solution's steps.

    Example:
        >>> shortened("12+5=17\\n17*2=34")
        '17\\n34'
    """
    return _RESULT.sub("", rationale)


def framed(solution: str, confidence: float) -> str:
    """A worked solution as thinking, answer and score; without an answer where it states none."""
    answer = final_answer(solution)
    steps = solution.partition("####")[0].strip()
    told = f"\n\nThe answer is: {answer}" if answer is not None else ""
    return f"Thinking: {steps}{told}\n\nscore: {confidence:.4f}"


class Writer:
    """Writes solutions to the questions that come within a moment of each other together.

    Args:
        model, tokenizer: the demo's.
        max_tokens: of a solution.
        seed: of what is sampled.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = 48, seed: int = 0) -> None:
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens
        self._rendering = Rendering(tokenizer, tokenizer)
        self._draws = torch.Generator().manual_seed(seed)
        self._asked: queue.Queue = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, question: str, temperature: float) -> tuple[str, list[float], int, bool]:
        """A solution, the log-probabilities of its tokens, the prompt's tokens, and whether it ended."""
        answer: queue.Queue = queue.Queue()
        self._asked.put((question, temperature, answer))
        found = answer.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _work(self) -> None:
        while True:
            batch = [self._asked.get()]
            until = time.monotonic() + _GATHER
            while len(batch) < 64 and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(self._asked.get(timeout=left))
                except queue.Empty:
                    break
            try:
                made: Sequence[Any] = self._written([(question, temperature) for question, temperature, _ in batch])
            except Exception as error:
                made = [error] * len(batch)
            for (_, _, answer), found in zip(batch, made, strict=True):
                answer.put(found)

    @torch.no_grad()
    def _written(self, asked: Sequence[tuple[str, float]]) -> list[tuple[str, list[float], int, bool]]:
        prompts = self._rendering.prompts([[{"role": "user", "content": question}] for question, _ in asked])
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
        heat = torch.tensor([[max(temperature, 1e-4)] for _, temperature in asked])
        greedy = torch.tensor([temperature < 1e-4 for _, temperature in asked])
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
        written: list[list[int]] = [[] for _ in asked]
        values: list[list[float]] = [[] for _ in asked]
        ended = [False] * len(asked)
        step = ids
        for _ in range(self.max_tokens):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            output = self.model(step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            cache, log_probs = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)
            drawn = torch.multinomial((log_probs / heat).softmax(-1), 1, generator=self._draws)[:, 0]
            tokens = torch.where(greedy, log_probs.argmax(-1), drawn)
            for row, token in enumerate(tokens.tolist()):
                if not ended[row]:
                    written[row].append(token)
                    values[row].append(log_probs[row, token].item())
                    ended[row] = token == self.tokenizer.eos_token_id
            if all(ended):
                break
            step, mask = tokens[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return list(zip(texts, values, map(len, prompts), ended, strict=True))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            return self._reply(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})
        self._reply(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path.rstrip("/") != "/v1/chat/completions" or not 0 < length <= _MOST:
            return self._reply(404, {"error": {"message": f"there is no {self.path}, or its body is empty or too long"}})
        try:
            asked = json.loads(self.rfile.read(length))
            text, temperature = str(asked["messages"][-1]["content"]), float(asked.get("temperature") or 0.0)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return self._reply(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
        if asked.get("model") != self.server.name:
            return self._reply(404, {"error": {"message": f"the model {asked.get('model')!r} does not exist"}})
        self._reply(200, self._made(text, temperature, bool(asked.get("logprobs"))))

    def _made(self, text: str, temperature: float, with_values: bool) -> dict[str, Any]:
        previous = _PREVIOUS.search(text) if _REWRITES in text else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if previous is not None:
            content, read = f"Thinking: {shortened(previous[1])}", len(text.split())
            written = len(content.split())
        elif (styled := reply_to(text, lambda question: self.server.writer(question, temperature)[0])) is not None:
            content, read, written = styled, len(text.split()), len(styled.split())
        else:
            solution, values, read, ended = self.server.writer(text, temperature)
            content, written = framed(solution, math.exp(sum(values) / len(values))), len(values)
            choice["finish_reason"] = "stop" if ended else "length"
            if with_values:
                choice["logprobs"] = {"content": [{"token": "", "logprob": v, "top_logprobs": []} for v in values]}
        choice["message"] = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        made = {"id": "0", "object": "chat.completion", "created": 0, "model": self.server.name, "choices": [choice]}
        return {**made, "usage": usage}

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    writer: Writer
    name: str


def make_server(model: Any, tokenizer: Any, name: str, port: int = 0, seed: int = 0) -> ThreadingHTTPServer:
    """A server of a model on the loopback interface, not started; port 0 takes a free one."""
    server = _Server(("127.0.0.1", port), _Handler)
    server.writer, server.name = Writer(model, tokenizer, seed=seed), name
    return server


@contextmanager
def served(models: dict[str, Any], tokenizer: Any) -> Iterator[dict[str, str]]:
    """Servers of some models by name, as long as the context lasts; gives their `base_url`s."""
    servers = {name: make_server(model, tokenizer, name, seed=number) for number, (name, model) in enumerate(models.items())}
    try:
        for server in servers.values():
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {name: f"http://127.0.0.1:{server.server_address[1]}/v1" for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one of the demo's models, or another of its kind, on 127.0.0.1.")
    parser.add_argument("--model", help="a folder; default: the demo's teacher")
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--port", type=int, default=8001)
    own = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdkd.demo.run import shipped

    folder = own.model or shipped("teacher")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    server = make_server(model, AutoTokenizer.from_pretrained(folder), own.name, own.port)
    print(f"http://127.0.0.1:{server.server_address[1]}/v1 serves {own.name}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
