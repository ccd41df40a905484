"""Run in `test_deepspeed.py`: a few steps in one plain process, or under torchrun with the student in DeepSpeed ZeRO-3."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import state
from accelerate.utils import DistributedType

SHARDED = "WORLD_SIZE" in os.environ
if SHARDED:  # accelerate picks a backend for GPUs under DeepSpeed; on a CPU it must be gloo
    state.PartialState._prepare_backend = lambda self, cpu, sagemaker_dp=False, backend=None: (
        "gloo",
        DistributedType.MULTI_CPU,
    )

from test_trainer import by_prompt, make
from tiny import prompts, tiny_model

torch.set_num_threads(1)


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


def main(folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    student = tiny_model(seed=1)
    trainer = make(
        folder,
        student=student,
        data=prompts(8),
        rollouts=by_prompt,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        max_steps=3,
        **({"use_cpu": False, "deepspeed": ZERO3} if SHARDED else {}),
    )
    inside: list[int] = []
    method_loss = type(trainer.method).loss

    def loss(method, batch, head, *args, **kwargs):
        inside.append(head.weight.shape[0])
        return method_loss(method, batch, head, *args, **kwargs)

    type(trainer.method).loss = loss
    trainer.train()
    outside = student.get_output_embeddings().weight.shape[0]  # DeepSpeed leaves an empty shape of a sharded parameter
    rows = [row for row in trainer.state.log_history if "loss" in row]
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps({"world": trainer.accelerator.num_processes, "rows": rows, "inside": inside, "outside": outside})
    )
    if SHARDED:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
