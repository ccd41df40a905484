"""Seeds of vLLM's requests, by a stand-in that keeps what it was asked; the real engine is in tests/engines."""

from __future__ import annotations

import dataclasses

import pytest

from tsdkd.trainers.request_seeds import RequestSeeds


@dataclasses.dataclass
class Sampling:
    seed: int | None = None

    def clone(self):
        return dataclasses.replace(self)


class Engine:
    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.asked.append(sampling_params)
        return prompts


@dataclasses.dataclass
class Generation:
    mode: str = "colocate"
    generation_kwargs: dict = dataclasses.field(default_factory=dict)
    tensor_parallel_size: int = 1
    llm: Engine = dataclasses.field(default_factory=Engine)


def seeds_of(seeds, vllm, moments, rows=3):
    made = []
    for mode, step in moments:
        with seeds.during(mode, step):
            assert vllm.llm.generate([0] * rows, sampling_params=Sampling(), use_tqdm=False) == [0] * rows
        made.append([params.seed for params in vllm.llm.asked[-1]])
    return made


def test_each_request_has_its_own_seed_and_a_run_that_goes_on_finds_it_again():
    moments = [("train", 0), ("train", 0), ("train", 1), ("eval", 1), ("train", 2)]
    vllm = Generation()
    whole = seeds_of(RequestSeeds(vllm, 7, 0, True), vllm, moments)
    assert len({seed for call in whole for seed in call}) == 15  # rows, calls of one step, steps and modes
    assert all(0 <= seed < 2**31 for call in whole for seed in call)
    again = Generation()
    assert seeds_of(RequestSeeds(again, 7, 0, True), again, moments[2:]) == whole[2:]
    assert vllm.llm.generate.__func__ is Engine.generate  # between the calls it is as it was
    other = Generation()
    assert seeds_of(RequestSeeds(other, 8, 0, True), other, moments)[0] != whole[0]
    asked = Generation(generation_kwargs={"seed": 8})
    assert seeds_of(RequestSeeds(asked, 7, 0, True), asked, moments) == seeds_of(
        RequestSeeds(other, 8, 0, True), other, moments
    )


def test_processes_of_one_engine_share_its_seeds_and_others_have_theirs():
    made = []
    for process in range(4):
        vllm = Generation(tensor_parallel_size=2)
        made.append(seeds_of(RequestSeeds(vllm, 7, process, True), vllm, [("train", 0)]))
    assert made[0] == made[1] != made[2] == made[3]


def test_without_seeds_the_engine_is_asked_as_trl_asks_it():
    vllm, given = Generation(), Sampling()
    with RequestSeeds(vllm, 7, 0, False).during("train", 0):
        vllm.llm.generate([0], sampling_params=given)
    assert vllm.llm.asked == [given] and vllm.llm.asked[0] is given


def test_an_engine_that_fails_is_left_as_it_was():
    vllm = Generation()
    with pytest.raises(RuntimeError), RequestSeeds(vllm, 7, 0, True).during("train", 0):
        raise RuntimeError
    assert vllm.llm.generate.__func__ is Engine.generate


def test_a_server_takes_a_seed_a_call_where_one_was_asked_for():
    silent = Generation("server", {"stop_token_ids": [1]})
    with RequestSeeds(silent, 7, 0, True).during("train", 0):
        assert silent.generation_kwargs == {"stop_token_ids": [1]}
    vllm, found = Generation("server", {"seed": 3}), []
    seeds = RequestSeeds(vllm, 7, 5, True)
    vllm.generation_kwargs = {**vllm.generation_kwargs, "allowed_token_ids": [2]}  # as the trainer adds them later
    for step in range(3):
        with seeds.during("train", step):
            found.append(vllm.generation_kwargs["seed"])
            assert seeds.last == found[-1] and vllm.generation_kwargs["allowed_token_ids"] == [2]
    assert len(set(found)) == 3  # TRL's own would be 3 at every step
    other = Generation("server", {"seed": 3})
    with RequestSeeds(other, 7, 0, True).during("train", 1):
        assert other.generation_kwargs["seed"] == found[1]  # of every process, though the first alone asks
