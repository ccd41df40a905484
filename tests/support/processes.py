"""Run by torchrun in `test_distributed.py`: a step and an evaluation on this process's share of the same rollouts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from running import Gradients, by_prompt, make
from tiny import config, prompts

from tsdkd import TSDKD, TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.methods import GKD
from tsdkd.selection import AdaptiveOpener

torch.set_num_threads(1)


def poisoned_step(student, optimizer, forward, method, rank):
    """A step whose teacher is broken on the second process: what stops it, and how far the weights have moved."""
    from types import SimpleNamespace

    from tsdkd.trainers.guard import Guard, NonFiniteError

    def reduce(values, reduction):
        torch.distributed.all_reduce(values)
        return values

    guard = Guard(SimpleNamespace(device=torch.device("cpu"), reduce=reduce), {"student": "s", "teacher": "t"})
    before = [p.full_tensor().clone() for p in student.parameters()]
    optimizer.zero_grad()
    student.forward = lambda: forward(student, guard, spoilt=rank == 1)
    student().backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1e9).full_tensor()
    stopped = ""
    try:
        guard.check(6, norm)
        optimizer.step()
    except NonFiniteError as error:
        stopped = str(error)
    return stopped, max((p.full_tensor() - old).abs().max().item() for p, old in zip(student.parameters(), before, strict=True))


def fully_sharded(folder: Path) -> None:
    """Five steps of the loss code with the student in FSDP2's shards; whole where there is one process."""
    from tiny import tiny_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from tsdkd.methods import TSDKD
    from tsdkd.teachers.heads import head_of, last_hidden_state
    from tsdkd.types import Rollouts, TokenBatch

    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden=48).requires_grad_(False)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    method, result = TSDKD(), {"world": world, "steps": [], "sharded": []}
    prompts_of_all = [[5 + i, 9, 11 + i] for i in range(8)]
    whole = Rollouts(
        prompts_of_all, [by_prompt(ids) for ids in prompts_of_all], [[1] * len(by_prompt(p)) for p in prompts_of_all]
    )
    counts = method.counts(whole.lengths)
    mine = whole.rows(list(range(rank, 8, world)))
    ids, mask, where = mine.padded(0, torch.device("cpu"))

    def forward(inner, guard=None, spoilt=False):
        """Inside the root's forward, as the trainers do it, so that shards are gathered and reduced."""
        hidden = last_hidden_state(inner, ids, mask).flatten(0, 1)[where]
        other = last_hidden_state(teacher, ids, mask).flatten(0, 1)[where]
        if guard is not None:
            other = other.fill_(float("nan")) if spoilt else other
            guard.watch_tokens("the teacher's hidden states", other, mine)
        batch = TokenBatch(hidden, other, tuple(mine.lengths), rows=tuple(range(rank, 8, world)))
        return method.loss(batch, head_of(inner), head_of(teacher), counts=counts).loss * world

    student.forward = lambda: forward(student)
    for _ in range(5):
        optimizer.zero_grad()
        loss = student()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1e9)
        total = loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(total)
            norm = norm.full_tensor()
        result["steps"].append([total.item(), norm.item()])
        result["sharded"].append(sum(isinstance(p, DTensor) for p in student.parameters()) / len(list(student.parameters())))
        optimizer.step()
    if world > 1:
        result["stopped"], result["moved"] = poisoned_step(student, optimizer, forward, method, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if world > 1:
        torch.distributed.barrier()
    os._exit(0)


def one_ahead(folder: Path, scenario: str) -> None:
    """Three steps whose completions an engine beside the training writes; the first process asks it for all."""
    from beside import Stub

    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))

    def before(step: int) -> None:
        if step == 1 and "fails" in scenario:
            raise ConnectionError("refused")

    options = {"per_device_train_batch_size": 8 // world, "max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0}
    trainer = make(folder, data=prompts(24), args=config(folder, ddp_find_unused_parameters=False, **options))
    trainer.loop.write_ahead(Stub(trainer, before=before))
    result: dict = {"world": world}
    try:
        trainer.train()
    except RuntimeError as error:
        result["stopped"] = str(error)
    result["steps"] = [row for row in trainer.state.log_history if "rollout/staleness" in row]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if world > 1:
        torch.distributed.barrier()
    os._exit(0)


def main(folder: Path, scenario: str) -> None:
    if scenario.startswith("one step ahead"):
        one_ahead(folder, scenario)
    if scenario == "fully sharded":
        fully_sharded(folder)
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
    data, evaluated = prompts(8), prompts(7)
    if scenario == "own prompts":  # of the teacher's, of very different lengths
        data, evaluated = (
            rows.add_column("teacher_prompt", [text + " 1+1=2" * (row % 4) for row, text in enumerate(rows["prompt"])])
            for rows in (data, evaluated)
        )
    teacher = None
    if scenario == "several teachers":  # one is swapped, and one process has no row of the second's
        from tiny import tiny_model

        swapped = {"placement": "swap" if world > 1 else "local"}  # the hooks of DDP hold while the student is away
        teacher = {"a": {"model": tiny_model(seed=2, hidden=48), **swapped}, "b": tiny_model(seed=3, hidden=64)}
        data, evaluated = (
            rows.add_column("teacher", ["b" if row == 1 else "a" for row in range(len(rows))]) for rows in (data, evaluated)
        )
    trainer = make(
        folder,
        data=data,
        teacher=teacher,
        rollouts=rollouts,
        method=method,
        cls=TSDKDTrainer if method is None else TokenDistillTrainer,
        args=config(folder, None if method is None else TokenDistillConfig, **options),
        eval_dataset=evaluated,
        callbacks=[gradients],
    )
    if scenario == "one rank is poisoned" and os.environ.get("RANK") == "1":

        def poison(module, inputs, output):
            output.last_hidden_state.fill_(float("nan"))

        trainer.teacher_model.model.register_forward_hook(poison)
    if scenario == "one rank dies" and os.environ.get("RANK") == "1":

        def die(rollouts):
            (folder / "dies").touch()
            raise RuntimeError("this rank is out of memory")

        trainer.loop.prepare = die
    result: dict = {"world": trainer.accelerator.num_processes}
    try:
        trainer.train()
        result["train"] = next(row for row in trainer.state.log_history if "loss" in row)
        result["gradient"] = gradients.flat.tolist()
        result["evaluation"] = trainer.evaluate()
        result["tokens"], result["spent"] = trainer.trained_tokens, trainer.spent
        result["state"] = trainer.loop.checkpoints.state()
    except FloatingPointError as error:
        result["stopped"] = str(error)
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # The results are written. Leaving normally would tear down DDP and gloo in any order, which can wait for ever.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
