"""How a step grows with the completion: the teacher's pass, the student's forward and backward pass, the loss; and what padding
costs beside rows one behind the other.

`python benchmarks/long_completions.py` writes `long_completions.jsonl` in `benchmarks/results/`. Peaks are bytes of all live
tensors, beyond the weights, counted as operations run (in a pass of its own, which is not timed).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from turns import interleaved, ratios

from tsdkd import TSDKD
from tsdkd.preflight.live import LiveBytes
from tsdkd.provenance import provenance
from tsdkd.teachers import head_of, hidden_of
from tsdkd.teachers.batches import Batches
from tsdkd.trainers.loss import StepLoss
from tsdkd.trainers.metrics import Metrics
from tsdkd.types import Rollouts

RESULTS = Path(__file__).parent / "results" / "long_completions.jsonl"
PROMPT = 64


class Alone:
    """One process on the CPU, as far as metrics ask."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")


def model(vocab: int, hidden: int, layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": 1, "max_position_embeddings": 1 << 16}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, initializer_range=0.1))


class Step:
    """A step of completions of such lengths, read with these batches."""

    def __init__(self, o: argparse.Namespace, lengths: list[int], padding_free: bool = False) -> None:
        self.student = model(o.vocab, o.student_hidden, 2, 1).train()
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.teacher = model(o.vocab, o.teacher_hidden, 2, 2).requires_grad_(False).eval()
        torch.manual_seed(o.seed)
        draw = lambda n: torch.randint(5, o.vocab, (n,)).tolist()  # noqa: E731
        self.rollouts = Rollouts([draw(PROMPT) for _ in lengths], [draw(n) for n in lengths], [[1] * n for n in lengths])
        self.batches = Batches(tokens=o.teacher_batch_tokens, padding_free=padding_free)
        self.metrics, method = Metrics(Alone(), dict), TSDKD()
        head = head_of(self.teacher)
        more = {"metrics": self.metrics, "padding_free": padding_free}
        self.loss = StepLoss(method, teacher_head=lambda: head, **more)
        self.method = method

    def read(self) -> list[torch.Tensor]:
        return hidden_of(self.teacher, self.rollouts, 0, self.batches, torch.device("cpu"))

    def learn(self, hidden: list[torch.Tensor]) -> float:
        self.student.zero_grad()
        value = self.loss(self.student, StepLoss.step_of(self.method, self.rollouts, hidden))
        value.backward()
        return value.item()

    def seconds(self) -> dict[str, float]:
        began = time.perf_counter()
        hidden = self.read()
        read = time.perf_counter() - began
        self.metrics.watches["train"].read()
        self.learn(hidden)
        whole = time.perf_counter() - began
        loss = self.metrics.watches["train"].read()["loss"]
        return {"teacher": read, "loss": loss, "student": whole - read - loss}

    def peaks(self) -> dict[str, int]:
        weights = [*self.student.parameters(), *self.teacher.parameters()]
        made = {}
        with LiveBytes(weights) as live:
            start = live.restart()
            hidden = self.read()
            made["teacher"] = live.peak - start
        with LiveBytes([*weights, *hidden]) as live:
            start = live.restart()
            self.learn(hidden)
            made["student and loss"] = live.peak - start
        step = StepLoss.step_of(self.method, self.rollouts, hidden)
        with torch.no_grad():
            batch = self.loss.batch_of(self.student, step)
        batch = dataclasses.replace(batch, student_hidden=batch.student_hidden.requires_grad_())
        held = [t for t in (batch.student_hidden, batch.teacher_hidden, batch.token_ids) if t is not None]
        with LiveBytes([*weights, *held]) as live:
            start = live.restart()
            self.method.loss(batch, head_of(self.student), head_of(self.teacher), counts=step.counts).loss.backward()
            made["loss"] = live.peak - start
        return made


def measured(make: Callable[[], dict[str, float]], rounds: int) -> dict[str, list[float]]:
    made = [make() for _ in range(rounds + 1)][1:]  # the first warms up
    return {part: [one[part] for one in made] for part in made[0]}


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--lengths", default="2000,8000,32000")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--student_hidden", type=int, default=64)
    p.add_argument("--teacher_hidden", type=int, default=128)
    p.add_argument("--teacher_batch_tokens", type=int, default=4096)
    p.add_argument("--rows", type=int, default=8, help="of the step whose lengths differ")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path, default=RESULTS)
    o = p.parse_args(arguments)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sizes = {name: getattr(o, name) for name in ("vocab", "student_hidden", "teacher_hidden", "teacher_batch_tokens")}
    rows = []
    for length in map(int, o.lengths.split(",")):
        step = Step(o, [length])
        seconds, peaks = measured(step.seconds, o.rounds), step.peaks()
        rows.append({"what": "one completion", "tokens": length, "seconds": seconds, "peak_bytes": peaks})
        print(rows[-1], flush=True)
    torch.manual_seed(o.seed)
    longest = int(o.lengths.split(",")[0])
    lengths = [max(8, int(longest * share)) for share in torch.rand(o.rows).square().tolist()]
    both = {"padded": Step(o, lengths), "padding_free": Step(o, lengths, padding_free=True)}

    def reading(step: Step) -> float:
        seconds = step.seconds()
        return seconds["teacher"] + seconds["student"]

    turns = interleaved({name: functools.partial(reading, step) for name, step in both.items()}, o.rounds)
    ratio = ratios(turns["padding_free"], turns["padded"])
    rows.append({"what": "unlike completions", "lengths": lengths, "seconds": turns, "ratio": ratio})
    print(rows[-1], flush=True)
    o.results.parent.mkdir(parents=True, exist_ok=True)
    with o.results.open("a") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": "long_completions", "run": stamp, **sizes, **row, **provenance(o.seed)}) + "\n")


if __name__ == "__main__":
    main()
