"""Run by torchrun in `test_distributed.py`: a step and an evaluation on this process's share of the same rollouts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from test_trainer import Gradients, by_prompt, make
from tiny import config, prompts

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.methods import GKD
from tsdkd.selection import AdaptiveOpener

torch.set_num_threads(1)


def main(folder: Path, scenario: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    gradients = Gradients()
    rollouts = by_prompt
    if scenario == "one rank is empty":  # whichever rows a process gets, half of all answers are empty
        rollouts = lambda ids: [] if os.environ.get("RANK", "0") == "1" else by_prompt(ids)  # noqa: E731
    method = {
        "random selection": GKD(selection="random", selection_share=0.4, gate="entropy_gap"),
        "adaptive opener": TSDKD(adaptive_opener=AdaptiveOpener(warmup=4)),
    }.get(scenario)
    options = dict(
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        term_grad_norm_steps=1,
        ddp_find_unused_parameters=False,
    )
    trainer = make(
        folder,
        rollouts=rollouts,
        method=method,
        cls=TSDKDTrainer if method is None else TokenDistillTrainer,
        args=config(folder, None if method is None else TokenDistillConfig, **options),
        eval_dataset=prompts(7),
        callbacks=[gradients],
    )
    if scenario == "one rank is poisoned" and os.environ.get("RANK") == "1":

        def poison(module, inputs, output):
            output.last_hidden_state.fill_(float("nan"))

        trainer.teacher_model.model.register_forward_hook(poison)
    result: dict = {"world": trainer.accelerator.num_processes}
    try:
        trainer.train()
        result["train"] = next(row for row in trainer.state.log_history if "loss" in row)
        result["gradient"] = gradients.flat.tolist()
        result["evaluation"] = trainer.evaluate()
        result["tokens"] = trainer.trained_tokens
        result["state"] = trainer.checkpoint_state()
    except FloatingPointError as error:
        result["stopped"] = str(error)
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # The results are written. Leaving normally would tear down DDP and gloo in any order, which can wait for ever.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
