"""Rollouts cut to a prefix: which steps, how long, and that the loss is that of the cut completions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from running import general, make
from tiny import config, prompts, tiny_model

from tsdkd import TokenDistillConfig
from tsdkd.methods import GKD, SeqKD
from tsdkd.trainers.health import Health
from tsdkd.trainers.prefix import PrefixRollouts
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.setup_placing import prefixes_are_the_students


def lengths(folder, steps=6, **options):
    """The longest completion of each step, by transformers' own sampling of models that never end."""
    student = tiny_model(seed=1)
    trainer = make(folder, student=student, max_steps=steps, max_completion_length=12, **options)
    trainer.generation_kwargs["suppress_tokens"] = [*(trainer.generation_kwargs.get("suppress_tokens") or []), 1]
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"]
    seen = []
    prepare = trainer.loop.scorer.prepare

    def watched(rollouts):
        seen.append({len(ids) for ids in rollouts.completion_ids})
        return prepare(rollouts)

    trainer.loop.scorer.prepare = watched
    trainer.train()
    assert trainer.max_completion_length == 12  # as before
    return seen


def test_the_first_steps_are_cut_and_the_later_ones_whole(tmp_path):
    assert lengths(tmp_path, prefix_rollouts={"tokens": 5, "until": 0.5}) == [{5}] * 3 + [{12}] * 3
    assert lengths(tmp_path / "always", prefix_rollouts='{"tokens": 5}') == [{5}] * 6
    assert lengths(tmp_path / "never") == [{12}] * 6
    assert lengths(tmp_path / "longer", steps=1, prefix_rollouts={"tokens": 11}) == [{11}]


def test_a_share_of_steps_is_whole_by_a_draw_of_seed_and_step():
    some = PrefixRollouts(5, 1.0, 0.3)
    drawn = [some.longest(step, 2000, seed=1) for step in range(2000)]
    assert set(drawn) == {5, None} and 0.26 < drawn.count(None) / 2000 < 0.34
    assert drawn == [some.longest(step, 2000, seed=1) for step in range(2000)]
    assert drawn != [some.longest(step, 2000, seed=2) for step in range(2000)]
    assert [PrefixRollouts(5, 0.5, 1.0).longest(step, 4, 0) for step in range(4)] == [None] * 4
    assert [PrefixRollouts(5, 0.5).longest(step, 5, 0) for step in range(5)] == [5, 5, 5, None, None]


def test_an_evaluation_is_of_whole_completions(tmp_path):
    student = tiny_model(seed=1)
    trainer = general(
        tmp_path, GKD(), student=student, data=prompts(8), eval_dataset=prompts(4), max_steps=1, max_completion_length=12,
        prefix_rollouts={"tokens": 3}, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    seen = []
    prepare = trainer.loop.scorer.prepare
    trainer.loop.scorer.prepare = lambda rollouts: seen.append(max(map(len, rollouts.completion_ids))) or prepare(rollouts)
    trainer.train()
    assert seen[0] == 3 and max(seen[1:]) > 3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tokens": 0}, "tokens of prefix_rollouts"),
        ({"until": 0.5}, "must be a mapping of tokens, until, whole"),
        ({"tokens": 5, "untl": 0.5}, "must be a mapping of tokens, until, whole"),
        ({"tokens": 5, "until": 1.5}, "until of prefix_rollouts"),
        ({"tokens": 5, "whole": -0.1}, "whole of prefix_rollouts"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, prefix_rollouts=options)


def test_completions_that_are_given_cannot_be_cut_while_they_are_written(tmp_path):
    def told(method, **options):
        made = config(tmp_path, TokenDistillConfig, prefix_rollouts={"tokens": 8}, **options)
        setup = Setup.of(made, method, tiny_model(seed=1), tiny_model(seed=2), prompts(4))
        return [str(problem) for problem in prefixes_are_the_students(setup)]

    assert "trains on other completions than the student's own" in told(SeqKD(), max_completion_length=16)[0]
    assert "at most max_completion_length=8 tokens" in told(GKD(), max_completion_length=8)[0]
    assert "rollouts_ahead writes" in told(GKD(), max_completion_length=16, rollouts_ahead=1)[0]
    assert told(GKD(), max_completion_length=9) == []


def test_lengths_that_are_cut_by_option_are_no_sign(caplog):
    """Short completions first and whole ones later are what was asked for; without the option they are a sign."""
    state, control = SimpleNamespace(global_step=9, is_world_process_zero=True), SimpleNamespace()
    for options, warned in (({"tokens": 5}, False), (None, True)):
        caplog.clear()
        health = Health(dict)
        for length in (5.0,) * 4 + (40.0,) * 4:
            args = SimpleNamespace(prefix_rollouts=options)
            health.on_log(args, state, control, logs={"loss": 1.0, "completions/mean_length": length})
        assert ("more than twice as long" in caplog.text) == warned
