"""vLLM against the trainer: the number and what is said of it, by a stand-in whose model is known."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import make
from tiny import tiny_model

from tsdkd.preflight.doctor import batches_of
from tsdkd.preflight.engine import coarse_kl, depths, engine, told
from tsdkd.preflight.findings import GREEN, RED, YELLOW
from tsdkd.trainers.engine_scores import BEST


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_coarse_divergence_is_below_the_whole_and_equal_to_it_where_all_is_known(size, known, seed):
    draw = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(size, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    whole = (p.exp() * (p - q)).sum().item()
    best = p.topk(min(known, size)).indices.tolist()
    found = coarse_kl({i: p[i].item() for i in best}, q)
    assert -1e-9 <= found <= whole + 1e-6
    assert coarse_kl({i: p[i].item() for i in range(size)}, q) == pytest.approx(whole, abs=1e-6)
    assert coarse_kl({i: q[i].item() for i in best}, q) == pytest.approx(0, abs=1e-6)


def test_a_token_that_the_trainer_holds_impossible_is_an_infinite_divergence():
    assert coarse_kl({0: math.log(0.5), 1: math.log(0.5)}, torch.tensor([0.0, -math.inf])) == math.inf
    assert told([1], [math.inf]).level == RED


def test_depths_cover_every_place_once():
    places, values = list(range(1000)), [float(place) for place in range(1000)]
    found = depths(places, values)
    assert [(start, stop) for start, stop, _ in found] == [(0, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert found[-1][2] == pytest.approx((512 + 999) / 2) and depths([], []) == []


@pytest.mark.parametrize(
    "values,level,word",
    [
        ([2e-4] * 200, GREEN, "2.0e-04 nats over 200 tokens"),
        ([2e-2] * 200, YELLOW, "dtype"),
        ([0.5] * 200, RED, "two models"),
        ([1e-5] * 32 + [3e-3] * 168, YELLOW, "grows with depth"),
    ],
)
def test_what_is_said(values, level, word):
    finding = told(list(range(len(values))), values)
    assert finding.level == level and word in finding.said + finding.do


@dataclasses.dataclass
class Writer:
    """A vLLM of another model, greedy; gives the likeliest tokens' log-probabilities as TRL does."""

    model: torch.nn.Module
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 5
    min_p: float | None = None
    repetition_penalty: float = 1.1
    logprobs: int = 0
    max_completion_length: int = 99
    synced: int = 0

    def sync_weights(self):
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        assert (self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1.0, 1.0, 0, 0.0, 1.0)
        assert images is None and num_generations == 1 and self.logprobs == BEST
        rows, values, ids = [], [], []
        for prompt in prompts:
            written, own, best = [], [], []
            for _ in range(self.max_completion_length):
                log_probs = self.model(torch.tensor([prompt + written])).logits[0, -1].log_softmax(-1)
                top = log_probs.topk(BEST)
                written.append(top.indices[0].item())
                own.append(top.values.tolist())
                best.append(top.indices.tolist())
            rows.append(written), values.append(own), ids.append(best)
        return prompts, rows, values, ids


def findings(trainer, model):
    trainer.generation.vllm = writer = Writer(model)
    found = list(engine(trainer, [[5, 6, 7], [8, 9, 10, 11]], batches_of))
    assert writer.synced == 1 and (writer.temperature, writer.top_k, writer.max_completion_length) == (0.7, 5, 99)
    return found


def test_the_same_model_agrees_and_another_is_told(tmp_path, monkeypatch):
    student = tiny_model("llama", seed=1)
    trainer = make(tmp_path, student=student)
    monkeypatch.setattr(type(trainer), "unknown_ids", [])  # the stand-in samples them too
    (finding,) = findings(trainer, copy.deepcopy(student))
    assert finding.level == GREEN and "over 24 tokens" in finding.said
    (finding,) = findings(trainer, tiny_model("llama", seed=7))
    assert finding.level == RED and "do the weights reach vLLM" in finding.do


def test_an_engine_that_breaks_is_said(tmp_path):
    trainer = make(tmp_path, student=tiny_model("llama", seed=1))
    writer = Writer(None)
    writer.generate = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("CUDA out of memory\nmore"))
    trainer.generation.vllm = writer
    (finding,) = engine(trainer, [[5]], batches_of)
    assert finding.level == RED and "RuntimeError: CUDA out of memory" in finding.said and "more" not in finding.said
