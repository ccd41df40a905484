"""A teacher behind stock vLLM servers: they give the final hidden state of every token, the trainer holds the head alone.

Start a server, on a machine of its own or beside the trainer, with

    vllm serve MODEL --runner pooling --convert embed \\
        --pooler-config '{"task": "token_embed", "use_activation": false}' --no-enable-prefix-caching

Gate, divergence and ranking then use the whole vocabulary, at 2 · H bytes a token instead of V logits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from safetensors import safe_open

from tsdkd.checks import LOOPBACK
from tsdkd.provenance import redacted
from tsdkd.teachers.heads import head_from
from tsdkd.types import Head, Rollouts

logger = logging.getLogger(__name__)
_START = (
    "start it with: vllm serve MODEL --runner pooling --convert embed --pooler-config "
    '\'{"task": "token_embed", "use_activation": false}\' --no-enable-prefix-caching'
)
_KEY = "TSDKD_TEACHER_API_KEY"
_MOST = 1 << 20  # bytes of a reply without hidden states
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TeacherUnavailable(ConnectionError):
    """No server gave the hidden states, after every retry; weights are those of the last step."""


def head_of_checkpoint(
    name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Head, torch.Tensor | None]:
    """A checkpoint's head, read from the one safetensors file that holds it, and its last norm's factors.

    Args:
        name: a folder, or a model's name on the Hub, of which that one file is fetched.
        dtype: of the head.
        device: where the loss is computed.
        revision: the model's revision on the Hub.
        trust_remote_code: let the configuration's own code run.

    Returns:
        the head, and what a final RMS norm multiplies by, `[hidden]`, in float32 (None of another norm).

    Raises:
        ValueError: a checkpoint without safetensors, or without a head in it.
    """
    from transformers import AutoConfig

    def file(part: str) -> Path | None:
        if Path(name).is_dir():
            return Path(name) / part if (Path(name) / part).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(name, part, revision=revision))
        except EntryNotFoundError:
            return None

    index = file("model.safetensors.index.json")
    where = json.loads(index.read_text())["weight_map"] if index else None
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code).get_text_config()

    def tensor(key: str) -> torch.Tensor | None:
        part = "model.safetensors" if where is None else where.get(key)
        path = file(part) if part else None
        if path is None:
            return None
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(key) if key in opened.keys() else None

    weight = tensor("lm_head.weight")
    for embedding in ("model.embed_tokens.weight", "transformer.wte.weight", "embed_tokens.weight"):
        weight = tensor(embedding) if weight is None else weight
    if weight is None:
        raise ValueError(
            f"{name} has no lm_head.weight and no known embedding in its safetensors: the server teacher reads the head "
            "from there. Use a checkpoint in the usual format, or teacher_placement=local."
        )
    bias = tensor("lm_head.bias")
    norm = tensor("model.norm.weight") if tensor("model.norm.bias") is None else None
    factors = None if norm is None else norm.to(device, torch.float32) + float(config.model_type.startswith("gemma"))
    return head_from(weight.to(device, dtype), None if bias is None else bias.to(device, dtype), config), factors


class ServerTeacher:
    """Reads rollouts by asking vLLM servers for hidden states, in turn, as many requests at a time as servers.

    Args:
        urls: the servers' addresses, e.g. `http://127.0.0.1:8000`.
        head: the teacher's head, on the device where the loss is computed.
        rows: rows a request.
        dtype: of the replies, `bfloat16` or `float32`.
        connect_timeout, read_timeout: seconds; the latter of a whole reply.
        retries: how often a request is made again, on the next server, with growing pauses.

    Raises:
        ValueError: no server, or an address that is none.
    """

    writes = "not"
    is_remote = True

    def __init__(
        self,
        urls: Sequence[str],
        head: Head,
        *,
        rows: int = 8,
        dtype: str = "bfloat16",
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
        retries: int = 4,
        pause: float = 1.0,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        if not self.urls:
            raise ValueError("teacher_placement=server needs teacher_urls, the servers' addresses: http://127.0.0.1:8000")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"teacher_urls holds {redacted(url)!r}: an address is http://HOST:PORT.")
        key = os.environ.get(_KEY)
        for url in self.urls:
            if urlsplit(url).hostname not in LOOPBACK:
                logger.warning(
                    "the teacher at %s is not on this machine: anybody who reaches it can use it%s. vLLM asks for no key at "
                    "/pooling, so keep the address inside a private network, or behind a proxy that asks for one or a tunnel.",
                    redacted(url),
                    "" if key else f", and {_KEY} is not set",
                )
        self._head, self.rows, self.dtype, self.retries, self.pause = head, rows, dtype, retries, pause
        self.read_timeout = read_timeout
        self._jitter = random.Random(os.getpid())  # processes that failed together ask again apart
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(read_timeout, connect=connect_timeout)
        self.shown = [redacted(url) for url in self.urls]  # in messages
        self._clients = [httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) for url in self.urls]
        self._names: list[str | None] = [None] * len(self.urls)

    @property
    def head(self) -> Head:
        return self._head

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()

    # ------------------------------------------------------------------ before training

    def check(self, text: str, ids: list[int], norm: torch.Tensor | None = None) -> None:
        """Refuse servers that do not serve this head's model, or not its tokens, on one short text.

        What a final RMS norm gives, divided by its factors, has a mean square of 1: other weights, a missing norm or an
        activation behind it show at once. Where the norm is another, the head must predict the text better than chance.

        Args:
            text: a short text of the kind that is trained on.
            ids: its ids by the student's tokenizer, without special tokens.
            norm: the checkpoint's factors, from `head_of_checkpoint`.

        Raises:
            ValueError: naming the server and what is wrong.
            TeacherUnavailable: a server that does not answer.
        """
        for number, url in enumerate(self.shown):
            found = self._json(number, "tokenize", {"prompt": text, "add_special_tokens": False})
            theirs = found.get("tokens") if isinstance(found, dict) else None
            if not isinstance(theirs, list):
                raise TeacherUnavailable(f"the server {url} gave no tokens at /tokenize: is it vLLM's?")
            if theirs != ids:
                raise ValueError(
                    f"the server {url} reads {text[:40]!r} as the ids {theirs[:8]}… but the student's tokenizer gives "
                    f"{ids[:8]}…: it serves a model with another tokenizer."
                )
            hidden = self._request(number, [ids])[0].to(self._head.weight)
            if hidden.shape[1] != self._head.hidden_size:
                raise ValueError(
                    f"the server {url} gives hidden states of {hidden.shape[1]} features but the head of teacher_model takes "
                    f"{self._head.hidden_size}: it serves another model."
                )
            square = None if norm is None else (hidden.float() / norm).square().mean(-1)
            if square is not None and bool(((square - 1).abs() > 0.05).any()):
                raise ValueError(
                    f"the server {url} does not give the final hidden states of teacher_model: behind its last norm their mean "
                    f"square is {square.mean().item():.2f}, not 1. It serves other weights, or pools: let teacher_model "
                    f"name the served checkpoint, and {_START}."
                )
            logits = self._head.logits(hidden[:-1]).float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:], device=logits.device)).item()
            chance = math.log(self._head.size)
            logger.info("the teacher at %s predicts a short text at %.2f nats a token (chance: %.2f).", url, loss, chance)
            if norm is None and not loss < chance:
                raise ValueError(
                    f"the server {url} serves another model than the head's: head(hidden state) predicts a short text at "
                    f"{loss:.2f} nats a token, worse than chance ({chance:.2f}). Let teacher_model name the served checkpoint, "
                    f"and {_START}."
                )

    # ------------------------------------------------------------------ reading

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        rollouts = rollouts.first(lengths)
        sizes = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
        order = sorted((row for row in range(len(rollouts)) if rollouts.lengths[row]), key=sizes.__getitem__)
        none = torch.zeros(0, self._head.hidden_size, dtype=self._head.weight.dtype, device=self._head.weight.device)
        hidden = [none] * len(rollouts)
        parts = [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        with ThreadPoolExecutor(len(self.urls)) as pool:  # as many requests at a time as servers
            done = list(pool.map(lambda job: self._with_retries(job[0], rollouts, job[1]), enumerate(parts)))
        for rows, states in zip(parts, done, strict=True):
            for row, states_of_row in zip(rows, states, strict=True):
                first = len(rollouts.prompt_ids[row]) - 1
                where = [first + t for t, trained in enumerate(rollouts.completion_mask[row]) if trained]
                hidden[row] = states_of_row[where].to(self._head.weight)
        return hidden

    def _with_retries(self, job: int, rollouts: Rollouts, rows: list[int]) -> list[torch.Tensor]:
        sequences = [rollouts.prompt_ids[row] + rollouts.completion_ids[row] for row in rows]
        failures = []
        for attempt in range(self.retries + 1):
            server = (job + attempt) % len(self.urls)
            try:
                return self._request(server, sequences)
            except TeacherUnavailable as error:
                failures.append(str(error))
                logger.warning("%s (attempt %d of %d)", error, attempt + 1, self.retries + 1)
                if attempt < self.retries:
                    time.sleep(self.pause * 2**attempt * self._jitter.uniform(0.5, 1.5))
        raise TeacherUnavailable(
            f"the teacher's servers ({', '.join(self.shown)}) did not answer {self.retries + 1} times; the last: "
            f"{failures[-1]} Start them again and resume from the last checkpoint: no step was lost."
        )

    def _request(self, server: int, sequences: list[list[int]]) -> list[torch.Tensor]:
        """The hidden states of whole sequences, `[tokens, hidden]` each."""
        body = {
            "model": self._name(server),
            "input": sequences,
            "task": "token_embed",
            "encoding_format": "bytes",
            "embed_dtype": self.dtype,
            "endianness": "little",
        }
        wanted = sum(map(len, sequences)) * self._head.hidden_size * _DTYPES[self.dtype].itemsize
        headers, content = self._ask(server, "pooling", body, most=4 * wanted + _MOST)
        if "metadata" not in headers:
            raise ValueError(f"the server {self.shown[server]} gave no pooling metadata: {_START}.")
        return self._states(self.shown[server], headers["metadata"], content, sequences)

    def _states(self, url: str, metadata: str, content: bytes, sequences: list[list[int]]) -> list[torch.Tensor]:
        """A reply's hidden states, looked at before anything is trained on them.

        Raises:
            TeacherUnavailable: a reply that is cut, of another layout, or all zeros.
            ValueError: states of other tokens than were asked.
        """
        kind = _DTYPES[self.dtype]
        try:
            items = sorted(json.loads(metadata)["data"], key=lambda item: int(item["index"]))
            places = [
                (int(item["index"]), int(item["start"]), int(item["end"]), tuple(map(int, item["shape"]))) for item in items
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise TeacherUnavailable(f"the server {url} gave metadata that cannot be read ({error!r}).") from error
        if [index for index, *_ in places] != list(range(len(sequences))):
            raise TeacherUnavailable(f"the server {url} gave {len(places)} parts for {len(sequences)} texts, or in no order.")
        states = []
        for (_, start, end, shape), ids in zip(places, sequences, strict=True):
            if len(shape) != 2 or shape[0] != len(ids):
                raise ValueError(f"the server {url} gave hidden states of shape {shape} for {len(ids)} tokens: {_START}.")
            if not 0 <= start <= end <= len(content) or end - start != shape[0] * shape[1] * kind.itemsize:
                raise TeacherUnavailable(
                    f"the server {url} gave {len(content)} bytes, of which those from {start} to {end} are no {shape} of "
                    f"{self.dtype}: its reply was cut, or is of another layout."
                )
            tokens = torch.frombuffer(bytearray(content[start:end]), dtype=kind).reshape(shape)
            if not bool(tokens.any(-1).all()):
                raise TeacherUnavailable(f"the server {url} gave zeros for a token's hidden state: it is broken, restart it.")
            states.append(tokens)
        return states

    def _name(self, server: int) -> str:
        """What the server calls its model."""
        known = self._names[server]
        if known is None:
            found = self._json(server, "v1/models", None)
            try:
                known = str(found["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise TeacherUnavailable(f"the server {self.shown[server]} names no model at /v1/models.") from error
            self._names[server] = known
        return known

    def _json(self, server: int, path: str, body: Any) -> Any:
        """A reply that is JSON."""
        _, content = self._ask(server, path, body, most=_MOST)
        try:
            return json.loads(content)
        except ValueError as error:
            raise TeacherUnavailable(
                f"the server {self.shown[server]} gave no JSON at /{path} ({content[:80]!r}): is it vLLM's?"
            ) from error

    def _ask(self, server: int, path: str, body: Any, most: int) -> tuple[httpx.Headers, bytes]:
        """A reply's headers and content, of `most` bytes at most, whole before `read_timeout` has passed."""
        client, url = self._clients[server], self.shown[server]
        ends, content = time.monotonic() + self.read_timeout, bytearray()
        try:
            with client.stream("GET" if body is None else "POST", path, json=body) as reply:
                for part in reply.iter_bytes():
                    content += part
                    if len(content) > most:
                        raise TeacherUnavailable(f"the server {url} gave more than {most:,} bytes at /{path}.")
                    if time.monotonic() > ends:
                        raise TeacherUnavailable(f"the server {url} did not end its reply in {self.read_timeout:g} s.")
        except httpx.TimeoutException as error:
            raise TeacherUnavailable(f"the server {url} did not answer in time ({type(error).__name__}).") from error
        except httpx.HTTPError as error:
            raise TeacherUnavailable(f"the server {url} cannot be reached ({error}).") from error
        text = bytes(content[:300]).decode(errors="replace")
        if reply.status_code >= 500 or reply.status_code in (408, 425, 429):
            raise TeacherUnavailable(f"the server {url} failed ({reply.status_code}: {text[:200]}).")
        if reply.status_code >= 400:
            raise ValueError(f"the server {url} refused /{path} ({reply.status_code}: {text}): {_START}.")
        return reply.headers, bytes(content)
