"""Run in `test_plan.py`: two steps of tiny models as the first of so many processes, and the bytes of all live tensors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
LENGTH, ROWS, BUCKET = 100, 4, 100_000


def serve():
    """In place of servers: a teacher of whom the head alone is here, and whose states come from elsewhere."""
    import torch

    from tsdkd.teachers import placing
    from tsdkd.teachers.server import head_of_checkpoint

    class Served:
        writes, is_remote = "not", True

        def __init__(self, request):
            self.head, _ = head_of_checkpoint(request.model, request.student_dtype, request.device)

        def hidden(self, rollouts, lengths):
            return [torch.randn(length, self.head.weight.shape[1]) for length in lengths]

        def close(self):
            pass

    def placed(request):
        teacher = Served(request)
        return placing.Placed(teacher, None, teacher.head.size, request.model, lambda tokenizer, size: None)

    placing.PLACEMENTS["server"] = placed


def main(folder: Path, asked: dict) -> dict:
    from tsdkd.preflight.fake_world import deepspeed_config, enter

    if asked["processes"] > 1:
        enter(asked["processes"])
    import torch
    from live import LiveBytes
    from running import make
    from tiny import prompts

    torch.set_num_threads(1)
    shards = deepspeed_config(asked["student"])
    if shards is not None:
        shards["zero_optimization"]["reduce_bucket_size"] = BUCKET
    options = {"use_cpu": True} if shards is None else {"use_cpu": False, "deepspeed": shards}
    persistent = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if asked["teacher"] == "zero3":
        options["teacher_deepspeed"] = persistent
    if shards is not None and asked["student"] == "zero3":
        shards["zero_optimization"] |= persistent["zero_optimization"]
    if asked["teacher"] == "server":
        serve()
        options["teacher_urls"] = ["http://127.0.0.1:1"]
    with LiveBytes() as live:
        trainer = make(
            folder, student=str(folder / "s"), teacher=str(folder / "t"), data=prompts(ROWS * 2 * asked["processes"]),
            max_length=None, max_completion_length=LENGTH, rollouts=lambda ids: [5 + t % 50 for t in range(LENGTH)],
            max_steps=2, teacher_placement=asked["teacher"], teacher_batch_size=2, logging_steps=10, bf16=asked["bf16"],
            ddp_find_unused_parameters=False, **options,
        )  # fmt: skip
        guard = trainer.loop.guard
        guard.watch = guard.watch_tokens = lambda *given: None
        guard.check = lambda step, norm, numbers=(): [0.0] * len(numbers)
        live.peak = 0
        trainer.train()
    return {"peak": live.peak, "world": trainer.accelerator.num_processes}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "found.json").write_text(json.dumps(main(place, json.loads(sys.argv[2]))))
