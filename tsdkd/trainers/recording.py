"""Writing a recording: a run's rollouts and its teacher's hidden states, step by step, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from tsdkd.data.prompts import ASKED
from tsdkd.data.rows import lines_of
from tsdkd.provenance import redacted
from tsdkd.teachers.recorded import MANIFEST, shard_entry, write_manifest, write_shard
from tsdkd.trainers.engines import generation_batches
from tsdkd.trainers.random_state import from_json, random_state, set_random_state, to_json
from tsdkd.trainers.run_record import plain, planned_steps


def check_recordable(trainer: Any, folder: Path) -> None:
    """Refuse what a `TokenDistillTrainer` cannot record, or not here.

    Raises:
        ValueError: saying what to do.
    """
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds a recording already: name another folder, or remove it.")
    lacks = trainer.train_dataset is None or trainer.teacher is None or trainer.args.recording
    if lacks or not trainer.method.reads_teacher or trainer.loop.supply.spec.replay is not None:
        raise ValueError(
            "a recording takes a train_dataset, a live teacher and completions that do not depend on the run's evaluations: "
            "record with tsd_kd or gkd."
        )
    if trainer.setup.several:
        raise ValueError("a recording holds one teacher's head: record each teacher's rows apart.")
    if trainer.loop.scorer.crossing is not None:
        raise ValueError("a recording holds a state of the teacher for each token, and this one is of another tokenizer.")
    if trainer.setup.sees:
        raise ValueError("a recording holds texts, and these prompts have images: train on them with the teacher itself.")
    if trainer.tools:
        raise ValueError("completions that call tools cannot be recorded: leave tools out.")


def write_recording(trainer: Any, folder: Path, about: dict[str, Any]) -> dict[str, int]:
    """A shard a step and process, then head and manifest by the first process. What an interruption left of this very recording
    is gone on with, what it left of another is taken away.

    Returns:
        `steps`, `rollouts`, `tokens` and `bytes` of the whole.
    """
    trainer.model.train()
    steps = trainer.state.max_steps = planned_steps(trainer)
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    identity = json.dumps([about, redacted(plain(trainer.args.to_dict())), steps, processes], sort_keys=True, default=str)
    first = _begun(folder, identity, process, processes) if processes == 1 or _shared(folder, identity) else 0
    trainer.accelerator.wait_for_everyone()
    if process == 0 and not first:
        _clear(folder, identity)
    trainer.accelerator.wait_for_everyone()
    state = folder / f"state-{process}.json"

    def begin() -> None:
        if first:
            set_random_state(from_json(json.loads(state.read_text())["random"]))

    shards = [shard_entry(folder, f"step-{number:05d}-{process}") for number in range(first)]
    bar = tqdm(total=steps, initial=first, desc="recording", disable=trainer.args.disable_tqdm or process != 0)
    try:
        if first < steps:
            for number, (rows, step) in enumerate(generation_batches(trainer, first, begin), first):
                assert step.teacher_hidden is not None
                prompts = [{key: row[key] for key in ASKED[:3] if row.get(key)} for row in rows]
                name = f"step-{number:05d}-{process}"
                shards.append(write_shard(folder, name, prompts, step.rollouts, list(step.teacher_hidden)))
                scratch = state.with_suffix(".part")
                scratch.write_text(json.dumps({"steps": number + 1, "random": to_json(random_state())}))
                scratch.replace(state)
                bar.update()
                if number + 1 == steps:
                    break
    finally:
        bar.close()
        trainer.state.global_step = 0  # the draws went by it
    every = gather_object(shards)
    models = () if trainer.teacher_model is None else (trainer.teacher_model,)
    with trainer.gathered_heads(*models):  # by all processes, where each holds a share
        if trainer.accelerator.is_main_process:
            assert trainer.teacher is not None
            head = trainer.teacher.head.cut(trainer.vocab_size)
            write_manifest(folder, every, head, trainer.tokenizer.get_vocab(), about)
    state.unlink(missing_ok=True)
    if process == 0:
        (folder / _BEGUN).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    whole = [line for file in folder.glob("step-*.jsonl") for _, line in lines_of(file)]
    tokens = sum(len(json.loads(line)["completion_ids"]) for line in whole)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"steps": steps, "rollouts": len(whole), "tokens": tokens, "bytes": size}


_BEGUN = "begun.json"


def _shared(folder: Path, identity: str) -> bool:
    return (folder / _BEGUN).is_file() and (folder / _BEGUN).read_text() == identity


def _begun(folder: Path, identity: str, process: int, processes: int) -> int:
    """The steps of this very recording that every process has written."""
    if not _shared(folder, identity):
        return 0
    states = [folder / f"state-{number}.json" for number in range(processes)]
    if not all(state.is_file() for state in states):
        return 0
    steps = {json.loads(state.read_text())["steps"] for state in states}
    return steps.pop() if len(steps) == 1 else 0  # cut off between two processes' shards: from the start


def _clear(folder: Path, identity: str) -> None:
    """An empty recording that is this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*folder.glob("step-*"), *folder.glob("state-*.json")):
        file.unlink()
    (folder / _BEGUN).write_text(identity)
