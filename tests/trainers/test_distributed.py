"""Two processes (gloo) on the same rollouts give what one gives; a NaN on one stops both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "support"


def launch(folder: Path, world: int, scenario: str) -> list[dict]:
    folder.mkdir()
    command = [sys.executable, str(HERE / "processes.py"), str(folder), scenario]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    assert all(result["world"] == world for result in results)  # accelerate may silently start one process on a CPU
    return results


@pytest.mark.parametrize("scenario", ["plain", "own prompts", "several teachers"])
def test_two_processes_give_the_loss_gradient_and_evaluation_of_one(tmp_path, scenario):
    """Also where the teacher reads prompts of its own, and where there are several."""
    (one,) = launch(tmp_path / "one", 1, scenario)
    two = launch(tmp_path / "two", 2, scenario)
    for result in two:
        for name in ("loss", "loss/indirect", "loss/direct", "loss/entropy", "grad_norm", "gate/mean", "opener/tokens"):
            assert result["train"][name] == pytest.approx(one["train"][name], rel=5e-6), name
        largest = max(map(abs, one["gradient"]))
        assert result["gradient"] == pytest.approx(one["gradient"], rel=1e-4, abs=1e-5 * largest)
        # 7 rows in batches of 2 on 2 processes: accelerate repeats a row to fill the last batch, which must not count
        for name in ("eval_loss", "eval_loss/direct", "eval_loss/indirect", "eval_student/entropy"):
            assert result["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=5e-6), name
        assert result["spent"]["flops"] == pytest.approx(one["spent"]["flops"], rel=1e-5) and one["spent"]["flops"]
        assert result["tokens"] == one["tokens"] == result["spent"]["trained_tokens"] > 0


def test_what_an_engine_writes_one_step_ahead_is_dealt_out(tmp_path):
    """Each process trains on its own prompts' completions; where the engine fails, all stop."""
    (one,) = launch(tmp_path / "one", 1, "one step ahead")
    for result in launch(tmp_path / "two", 2, "one step ahead"):
        assert [row["rollout/staleness"] for row in result["steps"]] == [0, 1, 1]
        for ours, theirs in zip(result["steps"], one["steps"], strict=True):
            for name in ("loss", "grad_norm", "completions/mean_length"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for result in launch(tmp_path / "fails", 2, "one step ahead, it fails"):
        assert "ConnectionError: refused" in result["stopped"] and len(result["steps"]) == 1


def test_draws_and_histories_do_not_depend_on_the_processes(tmp_path):
    """A random selection takes the same tokens of the same rows, and the adaptive opener sees the rollouts in one order."""
    for scenario in ("random selection", "adaptive opener"):
        folder = tmp_path / scenario.split()[0]
        folder.mkdir()
        (one,) = launch(folder / "one", 1, scenario)
        for result in launch(folder / "two", 2, scenario):
            largest = max(map(abs, one["gradient"]))
            assert result["gradient"] == pytest.approx(one["gradient"], rel=1e-4, abs=1e-5 * largest)
            assert result["train"]["loss/direct"] == pytest.approx(one["train"]["loss/direct"], rel=5e-6)
            assert result["tokens"] == one["tokens"] > 0
            if scenario == "adaptive opener":
                ours, theirs = (r["state"]["state"]["smoothed"] for r in (result, one))
                assert len(ours) == 8 and ours == pytest.approx(theirs, abs=1e-5)


def test_a_process_whose_answers_are_all_empty_holds_nobody_up(tmp_path):
    first, second = launch(tmp_path / "run", 2, "one rank is empty")
    assert first["train"]["completions/empty"] == second["train"]["completions/empty"] == 4
    assert first["train"]["loss"] > 0 and first["gradient"] == pytest.approx(second["gradient"])


def test_five_steps_in_fsdp2s_shards_are_those_of_one_process(tmp_path):
    (one,) = launch(tmp_path / "one", 1, "fully sharded")
    for result in launch(tmp_path / "two", 2, "fully sharded"):
        assert result["sharded"] == [1.0] * 5  # every parameter is a DTensor: nothing fell back to DDP
        for ours, theirs in zip(result["steps"], one["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)  # loss and gradient norm
        assert "step 6: NaN or Inf in the teacher's hidden states" in result["stopped"] and result["moved"] == 0


def test_a_rank_that_fails_ends_the_other(tmp_path):
    """The other waits in a collective; the launcher ends the run, long before that collective's time limit of half an hour.

    Either rank may be seen to fail first: gloo tells the waiting one at once that its peer is gone.
    """
    with pytest.raises(AssertionError) as ended:  # and not subprocess.TimeoutExpired after 300 s
        launch(tmp_path / "run", 2, "one rank dies")
    assert "ChildFailedError" in str(ended.value) and "Root Cause" in str(ended.value)
    assert (tmp_path / "run" / "dies").exists() and not list((tmp_path / "run").glob("rank*.json"))


def test_a_nan_on_one_process_stops_both_alike(tmp_path):
    first, second = launch(tmp_path / "run", 2, "one rank is poisoned")
    for stopped in (first["stopped"], second["stopped"]):
        assert "step 1: NaN or Inf in the teacher's hidden states" in stopped
    assert "first at token 0" in second["stopped"] and "first at" not in first["stopped"]
