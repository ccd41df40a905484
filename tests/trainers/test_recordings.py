"""Recordings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import answered, general, rows, student
from tiny import config, prompts

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer
from tsdkd.data.commits import manifest_digest
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, DistiLLM, MiniLLM, SeqKD, SupervisedKD
from tsdkd.rollouts import RolloutSource
from tsdkd.teachers.recorded import Recording
from tsdkd.types import Rollouts, RolloutSpec


def recorded(tmp_path, method=None, data=None, **options):
    options = {"max_steps": 2, **options}
    trainer = general(tmp_path / "r", method or TSDKD(), student=student(), data=data or prompts(8), **options)
    trainer.record(tmp_path / "recording")
    return tmp_path / "recording"


def test_a_recording_draws_its_sources_as_training_would(tmp_path):
    data = answered(32)
    folder = recorded(tmp_path, GKD(lmbda=0.5), data, max_steps=8, max_completion_length=20)
    tokenizer, given = make_tokenizer(), {row["prompt"]: row["completion"] for row in data}
    drawn = []
    for shard in sorted(folder.glob("step-*.jsonl")):
        lines = [json.loads(line) for line in shard.read_text().splitlines()]
        from_data = [tokenizer.decode(row["completion_ids"][:-1]).strip() == given[row["prompt"]] for row in lines]
        drawn.append("dataset" if all(from_data) else "fresh")
    source = RolloutSource(RolloutSpec(share=0.5), seed=42, rows=4)
    assert drawn == [source.draw(step, 8) for step in range(8)] and set(drawn) == {"fresh", "dataset"}


def from_recording(tmp_path, folder, method, seed=1, **options):
    return TokenDistillTrainer(
        model=student(seed),
        args=config(tmp_path, TokenDistillConfig, recording=str(folder), **options),
        method=method,
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("method", [TSDKD(), GKD(selection="prefix"), SupervisedKD(), DistiLLM(), SeqKD()])
def test_any_method_trains_on_a_recording_as_with_the_teacher_itself(tmp_path, method):
    given = isinstance(method, (SupervisedKD, SeqKD))  # a student's completions they refuse
    folder = recorded(tmp_path, GKD(lmbda=0.0), answered(8)) if given else recorded(tmp_path)
    offline = from_recording(tmp_path / "off", folder, method)
    assert offline.teacher_model is None and len(offline.train_dataset) == 8
    offline.train()
    live = general(
        tmp_path / "live",
        method,
        student=student(),
        data=Dataset.from_list(Recording.open(folder).rows),
    )
    answers = {
        tuple(ids): row["completion_ids"]
        for ids, row in zip(live.tokenize(list(live.train_dataset["prompt"])), live.train_dataset, strict=True)
    }
    live.write = lambda prompt_ids, *a, **k: [list(answers[tuple(ids)]) for ids in prompt_ids]
    live.train()
    for ours, theirs in zip(rows(offline), rows(live), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for a, b in zip(offline.model.parameters(), live.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_recording_of_something_else_or_damaged_is_refused_before_training(tmp_path):
    folder = recorded(tmp_path, max_steps=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is missing or damaged"):
        from_recording(tmp_path, damaged, GKD())
    other = make_tokenizer()
    other.add_tokens(["<x>"])
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    words = sorted(manifest["vocabulary"].items(), key=lambda item: item[1])
    manifest["vocabulary"].update({words[20][0]: words[21][1], words[21][0]: words[20][1]})
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="it was changed since it was written"):
        from_recording(tmp_path, changed, GKD())
    manifest["digest"] = manifest_digest(manifest)  # another recording's, whole
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the tokenizers disagree"):
        from_recording(tmp_path, changed, GKD())
    with pytest.raises(ValueError, match="holds no finished recording"):
        from_recording(tmp_path, tmp_path, GKD())
    with pytest.raises(ValueError, match="written by student and teacher together"):
        from_recording(tmp_path, folder, MiniLLM())
    with pytest.raises(ValueError, match="holds a recording already"):
        general(tmp_path / "again", GKD()).record(folder)
    with pytest.raises(ValueError, match="leave train_dataset and the teacher out"):
        general(tmp_path / "both", GKD(), recording=str(folder))
    with pytest.raises(ValueError, match="completions of up to 12 tokens, but max_completion_length=2 would cut them: pass 12"):
        from_recording(tmp_path / "short", folder, GKD(), max_completion_length=2)
    with pytest.raises(ValueError, match=r"was made with another student.*any_recording=True"):
        from_recording(tmp_path / "other", folder, GKD(), seed=7)
    from_recording(tmp_path / "meant", folder, GKD(), seed=7, any_recording=True).train()
    (changed / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        from_recording(tmp_path, changed, GKD())
    stranger = from_recording(tmp_path / "stranger", folder, GKD())
    with pytest.raises(ValueError, match="are not in the recording"):
        stranger.teacher.hidden(Rollouts([[5, 6]], [[7]], [[1]]), [1])


@pytest.mark.parametrize("method", [SupervisedKD(), SeqKD()])
def test_a_recording_of_the_students_completions_is_no_teachers(tmp_path, method):
    with pytest.raises(ValueError, match="the recording's are the student's: the student would imitate itself"):
        from_recording(tmp_path / "off", recorded(tmp_path), method)


@pytest.mark.parametrize("options,steps", [({"max_steps": 5}, 5), ({"max_steps": -1, "num_train_epochs": 3}, 6)])
def test_a_recording_holds_the_steps_of_the_run(tmp_path, options, steps):
    trainer = general(tmp_path / "r", TSDKD(), student=student(), data=prompts(8), **options)
    told = trainer.record(tmp_path / "recording")
    kept = Recording.open(tmp_path / "recording").rows
    assert told["steps"] == steps and told["rollouts"] == len(kept) == 4 * steps
    assert told["tokens"] == sum(len(row["completion_ids"]) for row in kept) and told["bytes"] > 10_000
    assert not list((tmp_path / "recording").glob("state-*")) and trainer.state.global_step == 0


def test_an_interrupted_recording_goes_on_as_if_it_had_not_been(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"

    def made():
        return general(tmp_path / "r", TSDKD(), student=student(), data=prompts(8), max_steps=5)

    made().record(whole)
    trainer = made()
    prepare = trainer.loop.prepare
    seen = []

    def cut_off(rollouts):
        seen.append(rollouts)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return prepare(rollouts)

    trainer.loop.prepare = cut_off
    with pytest.raises(KeyboardInterrupt):
        trainer.record(part)
    assert len(list(part.glob("step-*.jsonl"))) == 3
    again = made()
    again.loop.prepare = lambda rollouts, kept=again.loop.prepare: seen.append(rollouts) or kept(rollouts)
    again.record(part)
    assert len(seen) == 4 + 2
    assert Recording.open(part).rows == Recording.open(whole).rows


def test_what_another_recording_left_is_taken_away(tmp_path):
    (tmp_path / "recording").mkdir()
    for number in range(9):
        (tmp_path / "recording" / f"step-{number:05d}-0.jsonl").write_text("{}\n")
    folder = recorded(tmp_path)
    assert len(list(folder.glob("step-*.jsonl"))) == 2


def leaves(value, path=()):
    """The places of a manifest's values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, part in parts:
        yield from leaves(part, (*path, key))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("recording"), max_steps=1)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_manifest_is_told_and_never_a_traceback_of_ours(recording, data):
    """Also one whose digest was made anew, as a stranger can: it opens as a recording, or is a ValueError."""
    manifest = json.loads((recording / "manifest.json").read_text())
    manifest["vocabulary"] = dict(list(manifest["vocabulary"].items())[:3])
    place = data.draw(st.sampled_from(list(leaves(manifest))[1:]))
    other = data.draw(
        st.sampled_from([None, 0, -1, 1e300, "x", "../../etc/passwd", [], {}, True, [1], {"a": 1}, "step-99999-0"])
    )
    holder = manifest
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = other
    anew = data.draw(st.booleans())
    if anew:
        manifest["digest"] = manifest_digest(manifest)
    folder = recording.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recording, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        opened = Recording.open(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert len(opened.rows) >= 0 and anew


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80))
def test_a_manifest_of_anything_is_told(recording, content):
    folder = recording.parent / "anything"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recording, folder)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged|format"):
        Recording.open(folder)
