"""A run that is killed, starved of disk or signalled: what is lost is what came after the last whole checkpoint, never more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import QUESTIONS, save_tiny

from tsdkd.data import commits

SUPPORT = Path(__file__).parents[1] / "support"


def environment(**more):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT), **more}


# ---------------------------------------------------------------------- kill -9 and a full disk, at every call of a save


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The preloaded library that ends a process, or fills its disk, at a call of a save."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is here for the library that kills a save")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(SUPPORT / "dying.c"), "-ldl"], check=True)
    return made


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_save_that_dies_at_any_call_loses_nothing_whole(shim, tmp_path, how):
    """A trained process forks for each call: the child saves its next checkpoint and dies at it (or finds the disk full)."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "dying.py"), str(tmp_path), how],
        env=environment(LD_PRELOAD=str(shim)), capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    calls = told["calls"]
    assert {"open", "fsync", "rename"} <= set(told["kinds"]) and calls > 30 and told["inside"] == 3
    assert told["before"] + told["after"] == told["tried"] >= calls  # each child left the old checkpoint or the new one, whole
    assert told["before"] > 10 and told["torn"] == []
    if how == "kill":
        assert told["survived"] == 0


# ---------------------------------------------------------------------- signals


def command(tmp_path, *words):
    student, teacher = tmp_path / "s", tmp_path / "t"
    if not student.exists():
        save_tiny(student, seed=1, closes_soon=True), save_tiny(teacher, seed=2, hidden=48)
        rows = "".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS)
        (tmp_path / "p.jsonl").write_text(rows)
    made = [sys.executable, "-m", "tsdkd", "train", "--student", str(student), "--teacher", str(teacher), "--use_cpu"]
    made += ["--dataset_name", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "o"), "--max_completion_length", "8"]
    return [*made, "--per_device_train_batch_size", "4", "--logging_steps", "1", *words]


def until(process, wanted, lines):
    for line in process.stdout:
        lines.append(line)
        if re.search(wanted, line):
            return
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(tmp_path, number, status):
    run = command(tmp_path, "--max_steps", "100000", "--resume_from_checkpoint", "true")
    process = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(process, r"step 3/100000", [])
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status, said[-2000:]
    (last,) = [line for line in said.splitlines() if line.startswith("tsdkd train:")]
    step = int(re.search(rf"{signal.Signals(number).name} after step (\d+) of 100000; it is saved in", last)[1])
    assert step >= 3 and "--resume_from_checkpoint true goes on" in last and "Traceback" not in said
    newest, skipped = commits.newest(tmp_path / "o")
    assert newest == tmp_path / "o" / f"checkpoint-{step}" and skipped == []
    again = command(tmp_path, "--max_steps", str(step + 1), "--resume_from_checkpoint", "true")
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and f"{step} of them made" in done.stdout and f"step {step + 1}/{step + 1}" in done.stdout
    assert (tmp_path / "o" / "model.safetensors").is_file()
    finished = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0 and "nothing is left to train" in finished.stderr
    assert not (tmp_path / "o" / f"checkpoint-{step + 2}").exists()


def test_a_second_signal_ends_it_at_once_and_one_before_the_run_is_a_line(tmp_path):
    run = command(tmp_path, "--max_steps", "100000")
    process = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(process, r"step 2/100000", [])
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before it goes on
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, -signal.SIGTERM)
    process = subprocess.Popen(command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(3)  # it imports
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said and "tsdkd train: interrupted." in said


def test_in_python_signals_are_left_alone_unless_asked(tmp_path):
    from running import by_prompt, make
    from transformers import TrainerCallback

    seen = []

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))
            if state.global_step == 1 and args.stop_on_signals:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = make(tmp_path / "plain", max_steps=2, rollouts=by_prompt, callbacks=[Ask()])
    trainer.train()
    assert set(seen) == {before} and trainer.stopped_by is None
    trainer = make(tmp_path / "asked", max_steps=4, rollouts=by_prompt, callbacks=[Ask()], stop_on_signals=True)
    trainer.train()
    assert trainer.stopped_by == signal.SIGTERM and trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    commits.check(tmp_path / "asked" / "checkpoint-2")


# ---------------------------------------------------------------------- two processes


def both(tmp_path, name, checkpoint="", ask=0):
    """What each of two processes left of a run."""
    words = [str(SUPPORT / "going_on.py"), str(tmp_path / "run"), str(tmp_path / name), checkpoint, str(ask)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{tmp_path / name}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_go_on_bit_for_bit_and_stop_together(tmp_path):
    """Past the epoch of four steps; then a signal to one of them alone."""
    whole = both(tmp_path, "whole")
    again = both(tmp_path, "again", str(tmp_path / "run" / "checkpoint-5"))
    for first, second in zip(whole, again, strict=True):
        assert second["losses"] == {"6": first["losses"]["6"]} and second["written"] == {"6": first["written"]["6"]}
        assert second["weights"] == first["weights"]
    assert whole[0]["written"] != whole[1]["written"]
    shutil.rmtree(tmp_path / "run")
    stopped = both(tmp_path, "stopped", ask=3)
    assert [(each["stopped_by"], each["step"]) for each in stopped] == [(signal.SIGTERM, 3)] * 2
    assert commits.newest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-3", [])
