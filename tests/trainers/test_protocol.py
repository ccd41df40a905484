"""What any method gets from the trainer: its loss where it is reported, a guard, a state, and no tensor lost on the way."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from running import answered, by_prompt, general, make, rows, student
from tiny import config, prompts, tiny_model

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer, tsd_kd_loss
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.losses import resolve_divergence
from tsdkd.methods import GKD, TAID, Method, MiniLLM, State
from tsdkd.selection import AdaptiveOpener
from tsdkd.teachers import head_of, hidden_of
from tsdkd.trainers import NonFiniteError
from tsdkd.trainers.loss import StepLoss
from tsdkd.trainers.step import Step
from tsdkd.types import Counts, DivergenceTerm, Objective, ReadPlan, Rollouts, RolloutSpec, SampledTerm


@dataclasses.dataclass(frozen=True)
class ReverseKL(Method):
    """One term, under a name that TSD-KD does not have."""

    break_at: int | None = None
    name = "mine"

    def objective(self, batch=None, state=None):
        reverse = resolve_divergence("reverse_kl")
        return Objective((DivergenceTerm(name="reverse_kl", weight=0.5, divergence=reverse),))


def logits_of(model, asked, written):
    return torch.cat([model(torch.tensor([a + w])).logits[0, len(a) - 1 : -1] for a, w in zip(asked, written, strict=True)])


def test_eval_loss_is_the_weighted_sum_of_the_terms_of_a_method_of_ones_own(tmp_path):
    trainer = general(tmp_path, ReverseKL(), rollouts=by_prompt, eval_dataset=prompts(5), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    tokenizer = make_tokenizer()
    asked = [tokenizer(q)["input_ids"] for q in prompts(5)["prompt"]]
    written = [by_prompt(ids) for ids in asked]
    with torch.no_grad():
        both = (logits_of(model, asked, written) for model in (tiny_model(seed=1), tiny_model(seed=2, hidden=48)))
        expected = resolve_divergence("reverse_kl")(*both).mean().item()
    assert expected > 0.1 and metrics["eval_loss/reverse_kl"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_guard_watches_a_term_of_any_name(tmp_path):
    def breaking(log_probs, where):
        return -log_probs * float("inf")

    class Broken(ReverseKL):
        def objective(self, batch=None, state=None):
            return Objective((*super().objective().terms, SampledTerm(name="odd", function=breaking)))

    with pytest.raises(NonFiniteError, match="step 1: NaN or Inf in the odd term"):
        general(tmp_path, Broken(), rollouts=by_prompt).train()


def test_a_term_that_an_evaluation_cannot_compute_is_left_out_and_named(tmp_path, caplog):
    trainer = general(tmp_path, MiniLLM(), student=student(), eval_dataset=prompts(4))
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        first, _ = trainer.evaluate(), trainer.evaluate()
    assert caplog.text.count("eval_loss leaves out sampled") == 1
    assert first["eval_loss"] == pytest.approx(first["eval_loss/direct"])


def test_a_loss_that_loses_a_term_is_refused(tmp_path):
    class Lossy(ReverseKL):
        def terms(self, state=None):
            return {"reverse_kl": 0.5, "forgotten": 1.0}

    with pytest.raises(ValueError, match="terms forgotten, reverse_kl, but its loss gave reverse_kl: forgotten would"):
        general(tmp_path, Lossy(), rollouts=by_prompt).train()


@pytest.mark.parametrize(
    "divergence,message",
    [(lambda s, t: (s - t).sum(), "gave shape"), (lambda s, t: (s.detach() - t).sum(-1), "has no gradient")],
)
def test_a_divergence_that_is_none_is_refused_at_the_shared_vocabulary_before_training(tmp_path, divergence, message):
    with pytest.raises(ValueError, match=f"on two rows of 64 logits {message}"):
        general(tmp_path, GKD(divergence=divergence), rollouts=by_prompt)


def test_the_config_of_tsd_kd_takes_divergences_by_name(tmp_path):
    trainer = make(tmp_path, divergence="skew_forward_kl", rollouts=by_prompt)
    assert trainer.method == TSDKD(divergence="skew_forward_kl")
    trainer.train()
    with pytest.raises(ValueError, match="divergence='kl' is unknown; choose one of: forward_kl"):
        config(tmp_path, divergence="kl")


# ---------------------------------------------------------------------- a step on its way


def a_step(n=6):
    lengths = [3, 1, 4, 1, 5, 2][:n]
    rollouts = Rollouts(
        [[10 * r + 1, 10 * r + 2] for r in range(n)],
        [list(range(length)) for length in lengths],
        [[1] * length for length in lengths],
        {"student": [[float(r)] * length for r, length in enumerate(lengths)]},
    )
    counts = Counts(16, 4, 6, divisors={"direct": 16, "a/b": 3})
    plan = ReadPlan(tuple(lengths), tuple(lengths), tuple(min(2, length) for length in lengths))
    hidden = [torch.full((min(2, length), 5), float(r)) for r, length in enumerate(lengths)]
    return Step(rollouts, counts, range(100, 100 + n), plan, hidden, {"corpus": [[r] for r in range(n)]})


def micro_batches(n=6, parts=3, **more):
    """As TRL splits a generation batch: lists and tensors by rows, 0-d tensors whole."""
    whole = {**a_step(n).to_trl(), **more}
    size = n // parts
    cut = lambda value, i: value if isinstance(value, torch.Tensor) and not value.ndim else value[i * size : (i + 1) * size]  # noqa: E731
    return [{key: None if value is None else cut(value, i) for key, value in whole.items()} for i in range(parts)]


def test_a_step_survives_trls_batch():
    step = a_step()
    back = Step.of(step.to_trl())
    assert back.rollouts == step.rollouts and list(back.rows) == list(step.rows) and back.plan == step.plan
    assert back.extra == step.extra and back.counts.divisors["a/b"] == 3 and back.counts.tokens == 16
    assert all(torch.equal(a, b) for a, b in zip(back.teacher_hidden, step.teacher_hidden, strict=True))


def test_every_tensor_of_a_batch_survives_and_stays_with_its_row():
    """Whatever TRL puts into its batch, of any dimensions, goes with its row when rows are sorted by length."""
    ids = torch.arange(6)
    more = {
        "prompt_ids": ids.unsqueeze(1).expand(6, 7),
        "pixel_values": ids.float().reshape(6, 1, 1, 1).expand(6, 3, 4, 4),
        "tool_mask": None,
        "num_items_in_batch": torch.tensor(16),
        "names": [f"row {i}" for i in range(6)],
    }
    made = Step.by_length(micro_batches(**more))
    assert all(batch.keys() == micro_batches(**more)[0].keys() for batch in made)
    lengths = []
    for batch in made:
        step = Step.of(batch)
        lengths.append([len(ids) for ids in step.rollouts.completion_ids])
        for place, row in enumerate(step.rows):
            original = row - 100
            assert (batch["prompt_ids"][place] == original).all() and (batch["pixel_values"][place] == original).all()
            assert batch["names"][place] == f"row {original}" and (step.teacher_hidden[place] == original).all()
            assert step.extra["corpus"][place] == [original]
        assert batch["tool_mask"] is None and batch["num_items_in_batch"] == 16
    assert lengths == [[5, 4], [3, 2], [1, 1]]


def test_where_an_entry_is_no_row_a_completion_trls_split_stays():
    """Patches of several images: eleven rows of pixels for six completions."""
    batches = micro_batches()
    for batch, patches in zip(batches, (4, 4, 3), strict=True):
        batch["pixel_values"] = torch.zeros(patches, 3)
    assert Step.by_length(batches) is batches


def test_the_loss_of_a_step_needs_no_trainer():
    """Models and completions alone, against the public loss on full logits."""
    learner, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48)
    asked = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    written = [by_prompt(ids) for ids in asked]
    rollouts = Rollouts(asked, written, [[1] * len(ids) for ids in written])
    method = TSDKD()
    hidden = hidden_of(teacher, rollouts, 0, 2, torch.device("cpu"))
    step = StepLoss.step_of(method, rollouts, hidden)
    loss = StepLoss(method, teacher_head=lambda: head_of(teacher))(learner, step)
    width = max(map(len, written))
    full = []
    for model in (learner, teacher):
        parts = logits_of(model, asked, written).split([len(ids) for ids in written])
        full.append(torch.stack([torch.nn.functional.pad(p, (0, 0, 0, width - len(p))) for p in parts]))
    mask = torch.arange(width) < torch.tensor([len(ids) for ids in written]).unsqueeze(1)
    assert loss.item() == pytest.approx(tsd_kd_loss(*full, mask).loss.item(), rel=1e-5)
    loss.backward()
    assert learner.get_input_embeddings().weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------- the state


def test_two_trainers_given_one_opener_share_nothing_and_the_method_stays_itself(tmp_path):
    method = TSDKD(adaptive_opener=AdaptiveOpener(warmup=2))
    one, other = (general(tmp_path / name, method, rollouts=by_prompt) for name in ("one", "other"))
    one.train()
    assert len(one.loop.state.history.smoothed) == 8 and other.loop.state.history.smoothed == []
    assert method == TSDKD(adaptive_opener=AdaptiveOpener(warmup=2)) and hash(method) is not None


class Watching(State):
    """Notes what it is told."""

    reads_loss = True

    def __init__(self):
        self.seen, self.evaluations = [], []

    def observe(self, statistics):
        return torch.stack([statistics.mask.sum(-1), statistics.student_entropy.sum(-1)], -1).double()

    def after_step(self, summary):
        self.seen.append(summary)

    def after_evaluation(self, loss, name):
        self.evaluations.append((loss, name))


@pytest.mark.parametrize("batch,accumulation", [(8, 1), (2, 4)])
def test_a_state_is_told_of_every_step_in_the_order_of_the_rollouts(tmp_path, batch, accumulation):
    @dataclasses.dataclass(frozen=True)
    class Noting(ReverseKL):
        def start(self, max_steps):
            return Watching()

    trainer = general(
        tmp_path,
        Noting(),
        rollouts=lambda ids: by_prompt(ids) if sum(ids) % 3 else [],
        data=prompts(16),
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )
    written, prepare = [], trainer.loop.prepare

    def noted(rollouts):
        if trainer.mode == "train":
            written.append([length for length in rollouts.lengths if length])
        return prepare(rollouts)

    trainer.loop.prepare = noted
    trainer.train()
    state = trainer.loop.state
    assert [summary.step for summary in state.seen] == [1, 2]
    for summary, row, lengths in zip(state.seen, rows(trainer), written, strict=True):
        assert summary.loss == pytest.approx(row["loss"], rel=1e-5)
        assert summary.terms == {"reverse_kl": pytest.approx(row["loss/reverse_kl"], rel=1e-5)}
        assert [int(length) for length, _ in summary.observed] == lengths  # without the empty ones
    ((loss, name),) = state.evaluations
    assert name == "eval" and loss > 0


def test_taids_share_rises_with_the_run_and_goes_on_after_a_checkpoint(tmp_path):
    options = dict(data=answered(24), max_completion_length=20, max_steps=6, save_strategy="steps", save_steps=3)
    whole = general(tmp_path, TAID(step_size=0.5), student=student(), **options)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "tsdkd_state_0.json").read_text())["state"]
    assert 0.4 + 0.6 * 3 / 6 <= saved["share"] < whole.loop.state.share == 1.0
    resumed = general(tmp_path, TAID(step_size=0.5), student=student(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.loop.state.share == 1.0
    assert resumed.loop.state.momentum == pytest.approx(whole.loop.state.momentum, rel=0.05)


# ---------------------------------------------------------------------- a writer of one's own


class Fixed:
    """Writes the same to every prompt."""

    def write(self, model, prompt_ids):
        assert not model.training
        return [[5, 6, 1] for _ in prompt_ids], {"weight": [[0.5, 0.25, 1.0] for _ in prompt_ids]}


def test_a_writer_of_ones_own_writes_and_what_it_records_reaches_the_loss(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Written(GKD):
        rollouts = RolloutSpec(writer=Fixed())

    seen = []
    trainer = TokenDistillTrainer(
        tiny_model(seed=1),
        tiny_model(seed=2, hidden=48),
        config(tmp_path, TokenDistillConfig, max_steps=1),
        prompts(8),
        method=Written(),
        processing_class=make_tokenizer(),
    )
    loss = type(trainer.method).loss

    def noted(method, batch, *args, **kwargs):
        seen.append(batch)
        return loss(method, batch, *args, **kwargs)

    Written.loss = noted
    trainer.train()
    (batch,) = seen
    assert batch.token_ids.tolist() == [5, 6, 1] * 4 and batch.recorded["weight"].tolist() == [0.5, 0.25, 1.0] * 4
    with pytest.raises(ValueError, match="writer='nobody': pass 'student', 'mixed', 'speculative', a rule"):
        Written.rollouts = RolloutSpec(writer="nobody")
        general(tmp_path / "nobody", Written())
