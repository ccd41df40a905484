"""Run in `test_deepspeed.py`: five steps and an evaluation, in one plain process or by torchrun under one of `SCENARIOS`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import state
from accelerate.utils import DistributedType


def zero(stage: int) -> dict:
    return {
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


# Nothing of a tiny model is so small that it stays whole.
TEACHER = {"teacher_placement": "zero3", "teacher_deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
BF16 = {"bf16": True, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
SCENARIOS: dict[str, dict] = {
    "plain": {},
    "ddp": {},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "ddp, teacher zero3": TEACHER,
    "zero1, teacher zero3": {**TEACHER, "deepspeed": zero(1)},
    "zero2, teacher zero3": {**TEACHER, "deepspeed": zero(2)},
    "zero3, teacher zero3": {**TEACHER, "deepspeed": zero(3)},
    "ddp, teacher zero3 on the cpu": {**TEACHER, "teacher_cpu_offload": True},
    "ddp, teacher zero3, one rank is empty": TEACHER,
    "ddp, teacher zero3 by tokens": {**TEACHER, "teacher_batch_tokens": 60, "padding_free": True},
    "ddp, bf16": BF16,
    "ddp, teacher zero3, bf16": {**TEACHER, **BF16},
    "loaded in bf16 shares": {},
    "plain, lora": {},
    "ddp, teacher zero3, lora": TEACHER,
    "plain, two teachers, own prompts": {},
    "ddp, teacher zero3, two teachers, own prompts": TEACHER,
    "ddp, teacher zero3, recorded": TEACHER,
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
}
STUDENTS = {"ddp": {}, "zero1": {"deepspeed": zero(1)}, "zero2": {"deepspeed": zero(2)}, "zero3": {"deepspeed": zero(3)}}
STUDENTS |= {"ddp teacher zero3": TEACHER, "zero3 teacher zero3": {**TEACHER, "deepspeed": zero(3)}}
for student, options in STUDENTS.items():
    for more in ("", ", lora", ", checkpointing"):
        point = {"gradient_checkpointing": True} if "checkpointing" in more else {}
        for what in ("poisoned", "whole", "again"):
            SCENARIOS[f"{student}{more}, {what}"] = {**options, **point}
SCENARIO = SCENARIOS.get(sys.argv[-1], {})  # collected for its doctests, too
if "deepspeed" in SCENARIO:  # accelerate picks a backend for GPUs under DeepSpeed; on a CPU it must be gloo
    state.PartialState._prepare_backend = lambda self, cpu, sagemaker_dp=False, backend=None: (
        "gloo",
        DistributedType.MULTI_CPU,
    )

from running import by_prompt, make
from tiny import prompts

torch.set_num_threads(1)
RANK = os.environ.get("RANK", "0")


def weights_of(student):
    """All weights, whole."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        return torch.cat([p.detach().float().flatten().clone() for p in student.parameters()])


def poisoned_run(trainer) -> dict:
    """One rank's teacher breaks in the third step."""

    def poison(module, inputs, output):
        if trainer.state.global_step == 2 and RANK == "1":
            output.last_hidden_state.fill_(float("nan"))

    trainer.teacher_model.model.register_forward_hook(poison)
    seen: list[torch.Tensor] = []
    result: dict = {}
    prepare = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: seen.append(weights_of(trainer.model)) or prepare(rollouts)
    try:
        trainer.train()
    except FloatingPointError as error:
        result["stopped"] = str(error)
    result["moved"] = (seen[2] - seen[1]).abs().max().item()
    result["spoilt"] = (weights_of(trainer.model) - seen[2]).abs().max().item()
    result["saved"] = sorted(path.name for path in Path(trainer.args.output_dir).glob("*checkpoint*"))
    return result


def saved_run(trainer, resume: str | None) -> dict:
    """Losses, the completions that the student wrote, and a digest of all weights at the end."""
    written: list = []
    prepare = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: written.append(rollouts.completion_ids) or prepare(rollouts)
    trainer.train(resume_from_checkpoint=resume)
    weights = weights_of(trainer.model).numpy().tobytes()
    losses = [row["loss"].hex() for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "written": written, "weights": hashlib.sha256(weights).hexdigest()}


def loaded_in_shares(folder: Path) -> dict:
    """A model that ZeRO-3 shards while it is loaded in bfloat16, before and after its buffers are restored."""
    from transformers import AutoModelForCausalLM

    from tsdkd.teachers.zero3 import zero3_config
    from tsdkd.trainers.loading import loading_under, restore_buffers

    torch.distributed.init_process_group("gloo")
    path = str(folder.parent / "student")
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with loading_under(zero3_config(TEACHER["teacher_deepspeed"], torch.bfloat16, False)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    restore_buffers(model, torch.bfloat16)
    wanted, after = dict(whole.named_buffers()), dict(model.named_buffers())
    return {
        "world": 2,
        "parameters": model.get_output_embeddings().weight.numel(),
        "names": sorted(wanted) == sorted(after) and len(wanted) > 0,
        "before": all(torch.equal(before[name].float(), buffer) for name, buffer in wanted.items()),
        "after": all(torch.equal(after[name], buffer) for name, buffer in wanted.items()),
    }


def main(folder: Path, name: str) -> dict:
    if name == "loaded in bf16 shares":
        return loaded_in_shares(folder)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    empty = "empty" in name and RANK == "1"
    adapters = {}
    if "lora" in name:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    saved = name.endswith((", whole", ", again"))
    if saved:
        adapters.update(save_strategy="steps", save_steps=1, disable_dropout=False)
        adapters.update(model_init_kwargs={"attention_dropout": 0.1})
    if name.endswith("poisoned"):
        adapters.update(save_strategy="steps", save_steps=1)

    def asked(count: int):
        """Rows, with prompts of the teacher's own of very different lengths, and names of two, where the scenario says so."""
        rows = prompts(count)
        rows = rows.add_column("teacher", ["b" if row % 3 == 1 else "a" for row in range(count)]) if "two" in name else rows
        theirs = [prompt + " 1+1=2" * (row % 5) for row, prompt in enumerate(rows["prompt"])]
        return rows.add_column("teacher_prompt", theirs) if "own prompts" in name else rows

    both = {"a": str(folder.parent / "teacher"), "b": str(folder.parent / "other")}
    trainer = make(
        folder,
        student=str(folder.parent / "student"),
        teacher=both if "two" in name else both["a"],
        data=asked(24 if saved else 8),  # three steps an epoch, or one
        rollouts=None if saved else (lambda ids: []) if empty else by_prompt,
        processing_class=None,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        eval_dataset=asked(7),
        ddp_find_unused_parameters=False,
        **adapters,
        **{"use_cpu": not SCENARIO.keys() & {"deepspeed", "fsdp"}, **SCENARIO},
    )
    result: dict = {"world": trainer.accelerator.num_processes}
    teacher = trainer.teacher.teachers["b"] if "two" in name else trainer.teacher
    for role, model in (("student", trainer.model), ("teacher", teacher.model)):
        result[f"{role} buffers"] = sorted({str(buffer.dtype) for buffer in model.buffers()})
    if "recorded" in name:
        trainer.record(folder / "recording")
        return {**result, "files": sorted(file.name for file in (folder / "recording").iterdir())}
    if "poisoned" in name:
        return {**result, **poisoned_run(trainer)}
    if saved:
        return {**result, **saved_run(trainer, str(folder / "checkpoint-2") if name.endswith("again") else None)}
    inside: list[tuple[int, int]] = []
    method_loss = type(trainer.method).loss

    def loss(method, batch, head, teacher_head, **kwargs):
        inside.append((head.weight.shape[0], teacher_head.weight.shape[0]))
        return method_loss(method, batch, head, teacher_head, **kwargs)

    type(trainer.method).loss = loss
    trainer.train()
    result["inside"] = inside[:]
    result["rows"] = [row for row in trainer.state.log_history if "loss" in row]
    for role, model in (("student", trainer.model), ("teacher", teacher.model)):
        parameters = list(model.parameters())
        here = sum(p.ds_tensor.numel() if hasattr(p, "ds_status") else p.numel() for p in parameters)
        result[role] = here / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        result[f"{role} head"] = model.get_output_embeddings().weight.numel()
    result["evaluation"] = trainer.evaluate()
    result["linear"] = torch.nn.functional.linear.__name__
    if TEACHER.items() <= SCENARIO.items():
        shares = [p.ds_tensor for p in teacher.model.parameters()]
        offload = teacher._engine.zero_offload_param()
        result["place"] = None if offload is None else str(offload.device).rpartition(".")[2]
        trainer.teacher.close()
        result["closed"] = sum(share.numel() for share in shares)
    return result


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = main(folder, sys.argv[2])
    (folder / f"rank{RANK}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # the results are written; leaving normally would tear down processes in any order
