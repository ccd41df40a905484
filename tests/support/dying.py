"""Run by `test_crashes.py` with `dying.c` preloaded: a trained process forks for every call of its next save, and each child
dies at one (`kill`) or finds the disk full from there on (`full`). Prints what its children left."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from running import make
from tiny import prompts, tiny_model

from tsdkd.data import commits
from tsdkd.methods import TSDKD

torch.set_num_threads(1)


def main(folder: Path, how: str) -> dict:
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.seen.restype = ctypes.c_char_p
    shim.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    run = folder / "run"
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "data": prompts(16), "max_steps": 3}
    student = tiny_model("llama", seed=1, closes_soon=True)
    trainer = make(run, student=student, method=TSDKD(adaptive_opener=True, num_candidates=4), **options)
    trainer.train()
    shutil.rmtree(run / "checkpoint-3")
    trainer.args.save_total_limit = 1  # the older one goes with the next save
    first = folder / "first"
    shutil.copytree(run, first)
    trainer.state.global_step = 3

    def fresh() -> None:
        shutil.rmtree(run)
        shutil.copytree(first, run)

    def save(at: int, inside: int) -> int:
        """A child's save, which dies at that call; its status."""
        child = os.fork()
        if child == 0:
            try:
                devnull = os.open("/dev/null", os.O_WRONLY)
                os.dup2(devnull, 1)
                os.dup2(devnull, 2)
                shim.arm(str(run).encode(), at, inside, how == "full")
                trainer.save_now()
                (folder / "counted").write_text(json.dumps([shim.counted(), shim.seen().decode()]))
                os._exit(0)
            except BaseException:
                os._exit(1)
        return os.waitpid(child, 0)[1]

    assert save(0, -1) == 0, "a save that nothing ends fails"
    calls, kinds = json.loads((folder / "counted").read_text())
    largest = max((path.stat().st_size for path in (run / "checkpoint-3").rglob("*") if path.is_file()), default=0)
    moments = [(at, -1) for at in range(1, calls + 1)] + [(0, largest * part // 4) for part in (1, 2, 3)]
    before = after = survived = 0
    torn = []
    for at, inside in moments:
        fresh()
        survived += save(at, inside) == 0
        commits.recover(run)
        newest, _ = commits.newest(run)
        if newest is None:
            torn.append([at, inside])
        elif newest.name == "checkpoint-3":
            after += 1
        else:
            before += 1
    return {
        "calls": calls,
        "kinds": sorted(set(kinds.split())),
        "inside": 3,
        "tried": len(moments),
        "before": before,
        "after": after,
        "survived": survived,
        "torn": torn,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
