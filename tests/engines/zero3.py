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


def weights_of(student):
    """All weights, whole."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        return torch.cat([p.detach().flatten().clone() for p in student.parameters()])


def main(folder: Path, poisoned: bool) -> None:
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
    result: dict = {"world": trainer.accelerator.num_processes}
    if poisoned:  # one rank's teacher breaks in the third step

        def poison(module, inputs, output):
            if trainer.state.global_step == 2 and os.environ.get("RANK", "0") == "1":
                output.last_hidden_state.fill_(float("nan"))

        trainer.teacher_model.model.register_forward_hook(poison)
        seen = []
        prepare = trainer.prepare_step
        trainer.prepare_step = lambda rollouts: seen.append(weights_of(student)) or prepare(rollouts)
        try:
            trainer.train()
        except FloatingPointError as error:
            result["stopped"] = str(error)
        result["moved"] = (seen[2] - seen[1]).abs().max().item()
        result["spoilt"] = (weights_of(student) - seen[2]).abs().max().item()
        (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
        os._exit(0)
    trainer.train()
    outside = student.get_output_embeddings().weight.shape[0]  # DeepSpeed leaves an empty shape of a sharded parameter
    rows = [row for row in trainer.state.log_history if "loss" in row]
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps({**result, "rows": rows, "inside": inside, "outside": outside})
    )
    if SHARDED:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), poisoned="poisoned" in sys.argv)
