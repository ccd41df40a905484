"""Rollouts one step ahead: whose weights wrote what, what is trained on, and what a run that goes on takes up."""

from __future__ import annotations

import copy
import shutil
import threading

import pytest
import torch
from beside import Stub, drawn
from running import make, rows
from tiny import config, prompts, tiny_model

from tsdkd import TSDKD, TokenDistillConfig
from tsdkd.methods import SeqKD
from tsdkd.trainers.beside import Drawn, ServerEngine
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.setup_placing import rollouts_go_ahead


def ahead(folder, stub=Stub, **options):
    """A run of four steps in two epochs, and its engine."""
    options = {"data": prompts(8), "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0, **options}
    trainer = make(folder, **options)
    engine = stub(trainer)
    trainer.loop.write_ahead(engine)
    return trainer, engine


def trained_on(trainer):
    """What each step trains on, and the student's weights then."""
    seen = []
    prepare = trainer.loop.scorer.prepare

    def spy(rollouts):
        if trainer.mode == "train":
            seen.append((trainer.step, copy.deepcopy(trainer.model), rollouts))
        return prepare(rollouts)

    trainer.loop.scorer.prepare = spy
    return seen


def test_each_steps_completions_are_the_last_steps_weights(tmp_path):
    """The first of an epoch has nothing ahead; every row is trained on in the order of a run without an engine."""
    trainer, engine = ahead(tmp_path / "a")
    seen = trained_on(trainer)
    trainer.train()
    plain = make(tmp_path / "b", data=prompts(8), max_steps=4, rollouts=lambda ids: [5, 6])
    theirs = trained_on(plain)
    plain.train()
    assert [(step, by) for step, by, _ in engine.asked] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    weights = {step: model for step, model, _ in seen}
    for (step, _, rollouts), (_, _, other) in zip(seen, theirs, strict=True):
        assert rollouts.prompt_ids == other.prompt_ids
        by = weights[step - step % 2].eval()  # odd steps were begun in the step before
        for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
            assert completion == drawn(by, prompt, 10, step)[0]
    assert [row["rollout/staleness"] for row in rows(trainer)] == [0, 1, 0, 1]


def test_a_step_is_written_while_another_trains(tmp_path):
    """The engine waits in its thread until the step before is in its loss."""
    trained = threading.Event()
    overlapped = []

    def before(step):
        if step % 2:
            overlapped.append(trained.wait(20))

    trainer, _ = ahead(tmp_path, lambda trainer: Stub(trainer, before=before))
    compute = trainer.loop.compute
    trainer.loop.compute = lambda *given: trained.set() or compute(*given)
    trainer.train()
    assert overlapped == [True, True]


def test_every_term_is_exact_whatever_drew_the_completions(tmp_path):
    """Losses and weights of a run that is given the same completions."""
    trainer, _ = ahead(tmp_path / "a")
    seen = trained_on(trainer)
    trainer.train()
    written = {tuple(p): c for _, _, r in seen[:2] for p, c in zip(r.prompt_ids, r.completion_ids, strict=True)}
    same = {"data": prompts(8), "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}
    plain = make(tmp_path / "b", rollouts=lambda ids: written.get(tuple(ids), [5]), **same)
    plain.train()
    names = ("loss", "loss/direct", "loss/indirect", "loss/entropy", "grad_norm", "spent/tflop/student")
    for ours, theirs in zip(rows(trainer)[:2], rows(plain)[:2], strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_the_divergence_from_what_was_drawn_from(tmp_path):
    """Of every sixteenth token of a micro-batch by hand; nothing where nothing was ahead, or log-probabilities are of another
    distribution."""
    trainer, engine = ahead(tmp_path / "a", max_steps=2)
    seen, parts = trained_on(trainer), []
    compute = trainer.loop.compute
    trainer.loop.compute = lambda student, step: parts.append(step.rollouts) or compute(student, step)
    trainer.train()
    (_, then, _), (_, now, _) = seen
    rollouts, changes = parts[1], []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        old, new = (
            model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (then.eval(), now.eval())
        )
        ids = torch.tensor(completion).unsqueeze(-1)
        changes += (new.gather(1, ids) - old.gather(1, ids)).flatten().tolist()
    first, second = (row["rollout/kl"] for row in rows(trainer))
    change = torch.tensor(changes)
    assert abs(first) < 1e-6 and second > 1e-4
    assert second == pytest.approx((change.exp() - 1 - change)[::16].mean().item(), rel=1e-3)
    engine.temperature = None
    trainer.train()
    assert "rollout/kl" not in rows(trainer)[-1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_goes_on_with_what_was_written_ahead(tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "data": prompts(12), "max_steps": 5}
    whole, _ = ahead(tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".lock"))
    again, _ = ahead(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
    named = lambda trainer: {  # noqa: E731
        row["step"]: (row["loss"], row["rollout/staleness"], row["rollout/kl"]) for row in rows(trainer)
    }
    assert named(again) == {number: row for number, row in named(whole).items()}
    ours = again.model.state_dict()
    assert all(torch.equal(p, ours[name]) for name, p in whole.model.state_dict().items())


def test_an_evaluation_waits_for_what_is_being_written(tmp_path):
    """It gives the engine other weights; what was begun is taken afterwards as it was."""
    losses = []
    for every in (None, 1):
        more = {} if every is None else {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(4)}
        trainer, _ = ahead(tmp_path / str(every), **more)
        busy = []
        settle = trainer.loop.ahead.settle

        def settled(settle=settle, trainer=trainer, busy=busy):
            settle()
            asked = trainer.loop.ahead._asked
            busy.append(asked is not None and not asked.future.done())

        trainer.loop.ahead.settle = settled
        trainer.train()
        losses.append([row["loss"] for row in rows(trainer)])
        assert not any(busy)
    assert losses[0] == losses[1]


def test_an_engine_that_fails_ends_the_run_at_the_step_that_it_wrote_for(tmp_path):
    def before(step):
        if step == 1:
            raise ConnectionError("refused")

    trainer, _ = ahead(tmp_path, lambda trainer: Stub(trainer, before=before), save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match=r"step 2: the engine .* failed \(ConnectionError: refused\)"):
        trainer.train()
    assert trainer.step == 1 and (tmp_path / "checkpoint-1").is_dir()  # the step before is whole, and is saved


@pytest.mark.parametrize(
    "spoil,told",
    [
        (lambda drawn: Drawn(drawn.ids[1:]), "3 completions for 4 prompts"),
        (lambda drawn: Drawn([[999], *drawn.ids[1:]]), "1 ids up to 999"),
        (lambda drawn: Drawn([[5] * 13, *drawn.ids[1:]]), "13 ids"),
        (lambda drawn: Drawn(drawn.ids, drawn.log_probs[1:]), "other than one log-probability"),
    ],
    ids=["too few", "no such id", "too long", "log-probabilities"],
)
def test_what_an_engine_gives_is_looked_at(tmp_path, spoil, told):
    class Wrong(Stub):
        def request(self, prompt_ids, step):
            write = super().request(prompt_ids, step)
            return lambda: spoil(write())

    trainer, _ = ahead(tmp_path, Wrong)
    with pytest.raises(RuntimeError, match=told):
        trainer.train()


def test_accumulated_and_without_a_row_that_can_be_read(tmp_path):
    """Micro-batches of one step share its completions; where the next step's rows cannot be read, nothing is ahead."""
    trainer, engine = ahead(tmp_path / "a", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    assert [(step, by) for step, by, _ in engine.asked] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert [row["rollout/staleness"] for row in rows(trainer)] == [0, 1, 0, 1] and "mfu" not in rows(trainer)[0]
    trainer, engine = ahead(tmp_path / "b")
    ask = trainer.loop.ahead._ask
    tokenize = trainer.tokenize
    trainer.tokenize = lambda given: (
        (_ for _ in ()).throw(ValueError("no")) if isinstance(given[0], dict) and broken else tokenize(given)
    )
    broken = False
    take = trainer.loop.ahead.take

    def taken(prompt_ids):
        nonlocal broken
        broken = True
        try:
            return take(prompt_ids)
        finally:
            broken = False

    trainer.loop.ahead.take = taken
    trainer.train()
    assert ask is not None and [row["rollout/staleness"] for row in rows(trainer)] == [0] * 4


def test_where_nothing_can_be_written_ahead_it_is_refused(tmp_path):
    for options, told in (
        ({"rollouts_ahead": 1}, "Start a vLLM server for the student"),
        ({"rollouts_ahead": 2}, "rollouts_ahead"),
    ):
        with pytest.raises(ValueError, match=told):
            make(tmp_path, **options)
    setup = Setup.of(config(tmp_path, TokenDistillConfig, rollouts_ahead=1), SeqKD(), tiny_model(), None, prompts(4))
    told = [str(problem) for problem in rollouts_go_ahead(setup)]
    assert len(told) == 2 and "other completions than the student's own" in told[1]
    setup = Setup.of(config(tmp_path, rollouts_ahead=1), TSDKD(), tiny_model(), tiny_model(), prompts(4), has_tools=True)
    assert "tools' turns" in [str(problem) for problem in rollouts_go_ahead(setup)][1]


class Client:
    """What TRL's connection to a vLLM server answers."""

    mode = "processed_logprobs"

    def __init__(self):
        self.asked = []

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.mode}}

    def generate(self, prompts, **asked):
        self.asked.append((prompts, asked))
        ids = [[7, 8], [9]]
        return {"completion_ids": ids, "logprobs": [[[-0.5], [-0.25]], [[None if len(self.asked) > 1 else -1.0]]]}


class Accelerator:
    is_main_process = True


class VLLM:
    accelerator, generation_kwargs, structured_outputs_regex = Accelerator(), {"allowed_token_ids": [7, 8, 9]}, None
    repetition_penalty, temperature, top_p, top_k, min_p, max_completion_length = 1.0, 0.7, 1.0, 0, None, 12

    def __init__(self):
        self.vllm_client, self.synced = Client(), 0

    def sync_weights(self):
        self.synced += 1


def test_a_server_is_asked_as_trl_asks_it_and_for_log_probabilities():
    from contextlib import nullcontext

    vllm = VLLM()
    engine = ServerEngine(vllm, lambda mode, step: nullcontext())
    engine.sync()
    assert vllm.synced == 1 and engine.temperature == 0.7 and engine.allowed == [7, 8, 9]
    first = engine.request([[1, 2], [3]], 4)()
    assert first.ids == [[7, 8], [9]] and first.log_probs == [[-0.5, -0.25], [-1.0]]
    prompt_ids, asked = vllm.vllm_client.asked[0]
    assert prompt_ids == [[1, 2], [3]] and asked["generation_kwargs"] == {"allowed_token_ids": [7, 8, 9]}
    assert (asked["n"], asked["temperature"], asked["max_tokens"], asked["logprobs"], asked["min_p"]) == (1, 0.7, 12, 0, 0.0)
    assert engine.request([[1]], 5)().log_probs is None  # one of them is no number
    vllm.generation_kwargs = {"presence_penalty": 1.0}
    assert ServerEngine(vllm, lambda mode, step: nullcontext()).temperature is None
    del vllm.generation_kwargs
    vllm.vllm_client.get_server_info = lambda: {}[0]  # a server that says nothing of itself
    assert ServerEngine(vllm, lambda mode, step: nullcontext()).temperature is None
    del vllm.vllm_client.get_server_info
    VLLM.top_p = 0.9
    try:
        assert ServerEngine(vllm, lambda mode, step: nullcontext()).temperature is None
    finally:
        VLLM.top_p = 1.0
    Client.mode = "raw_logprobs"
    try:
        assert ServerEngine(VLLM(), lambda mode, step: nullcontext()).temperature is None
    finally:
        Client.mode = "processed_logprobs"
