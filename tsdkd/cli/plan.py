"""`tsdkd plan`: does it fit, what does it cost, and how is it started?"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
from typing import Any


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd plan",
        allow_abbrev=False,
        description="From the two models' configurations alone, without a weight: the memory of every placement on these "
        "GPUs, at the first step and at the second (when the optimizer has its states), the FLOPs of a step, how long each "
        "part takes at best, which placements fit, how the simplest is started, and what would make the next one fit. Flags "
        "are tsdkd train's, recipes included; no data is read. The exit status is 1 where nothing fits.",
        epilog="Example: tsdkd plan --config examples/recipes/qwen2.5-14b-to-1.5b.yaml --gpus 8xA100",
    )
    parser.add_argument("--gpus", required=True, help="how many and which: 8xH100, or by memory in GiB, 8x80")
    parser.add_argument(
        "--fake_world",
        type=int,
        metavar="N",
        help="construct the run of N processes in the first placement here, on torch's fake process group and small models of "
        "the same kinds, and make its first step: what fails there fails here",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes, FLOPs and seconds")
    own, rest = parser.parse_known_args(arguments)

    from tsdkd.preflight.plan import GPUs, as_json, placements, plan, table

    gpus = GPUs.of(own.gpus)
    from tsdkd.cli.parsing import parse

    _, config, model = parse(rest if "--use_cpu" in rest else [*rest, "--use_cpu"])  # nothing is trained here
    run = run_of(config, model)
    possible = {where.teacher for where in placements(gpus.count)}
    if run.teachers and config.teacher_placement not in possible:
        raise ValueError(
            f"teacher_placement={config.teacher_placement} on {gpus.count} GPU: it is shared by the processes of several; here "
            f"there are: {', '.join(sorted(possible))}."
        )
    if own.fake_world is not None and own.fake_world < 2:
        raise ValueError(f"--fake_world {own.fake_world}: pass a number of processes, 2 or more.")
    made = plan(run, gpus, lambda where, count: _command(where, count, rest, config), grows=True)
    told, problem = as_json(made), None
    if own.fake_world is not None:
        from tsdkd.cli.fake_world import tried

        where = made.options[0].placement
        problem = tried(own.fake_world, where.student, where.teacher, rest)
        told["fake_world"] = {"processes": own.fake_world, "placement": str(where), "problem": problem}
    print(json.dumps(told, indent=1) if own.json else table(made))
    if own.fake_world is not None and not own.json:
        what = f"{own.fake_world} processes, {where}"
        if problem is None:
            fits = "" if made.best is not None else "; it does not fit, see above"
            print(
                f"\n{what}: constructed here, and the first step made (small models of the same kinds, made-up rollouts){fits}."
            )
        else:
            print(f"\n{what}: it fails here.\n  {problem}")
    return 0 if made.best is not None and problem is None else 1


def run_of(config: Any, model: Any) -> Any:
    """What of the options a run's memory depends on.

    Raises:
        ValueError: no student, a model without a configuration, several teachers.
    """
    import torch
    from trl import get_peft_config

    from tsdkd.preflight.memory import Run
    from tsdkd.teachers.itself import SELF
    from tsdkd.trainers.sources import config_of

    if model.model_name_or_path is None:
        raise ValueError("no student was given: pass --student NAME_OR_PATH (model_name_or_path in YAML).")
    if config.recording is not None:
        raise ValueError("a recording is trained on without a teacher: leave it out to plan the run that makes it.")
    named = config.teacher_model_name_or_path
    method = config.build_method()
    reads, several = method.reads_teacher, dict(config.teachers or {})
    if reads and named is None and not several:
        raise ValueError("no teacher was given: pass --teacher NAME_OR_PATH (teacher_model_name_or_path in YAML).")

    def read(name: str, role: str) -> Any:
        try:
            return config_of(name, role, config)
        except ValueError as error:
            raise ValueError(
                f"the {role} {name}: {str(error).splitlines()[0]} Pass the folder or the name of a model."
            ) from error

    if config.teacher_weights and set(config.teacher_weights) != set(several):
        raise ValueError(
            f"teacher_weights names {', '.join(config.teacher_weights)}, and the teachers are "
            f"{', '.join(several) or 'none'}: give each of them a weight."
        )
    student = read(model.model_name_or_path, "student")
    names = [_model_of(one) for one in several.values()] or ([] if named in (None, SELF) else [named])
    teachers = tuple(read(name, "teacher") for name in names) if reads else ()
    teacher = teachers[0] if teachers else None
    given = (config.model_init_kwargs or {}).get("dtype", model.dtype)
    ours = _dtype(given) or torch.float32
    their = (config.teacher_model_init_kwargs or {}).get("dtype", "auto")
    theirs = _dtype(their) or _dtype(getattr(teacher, "dtype", None)) or torch.float32
    peft = get_peft_config(model)

    def adapt(base: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(base, copy.deepcopy(peft))

    texts = [each.get_text_config() for each in (student, *teachers)]
    contexts = [context for text in texts if (context := getattr(text, "max_position_embeddings", None))]
    if not contexts and not config.max_length:
        raise ValueError("neither model states its context: pass --max_length.")
    length = min([config.max_length or min(contexts), *contexts])
    completion = min(config.max_completion_length or 512, length // 2 if config.max_completion_length is None else length - 1)
    spec, reading = method.rollouts, method.reads([completion])
    colocated = config.use_vllm and config.vllm_mode == "colocate"
    return Run(
        student,
        teachers or None,
        student_dtype=ours,
        teacher_dtype=theirs,
        autocast=torch.bfloat16,  # what GPUs of today train in
        rows=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        teacher_rows=config.teacher_batch_size or config.per_device_train_batch_size,
        teacher_tokens=config.teacher_batch_tokens,
        student_bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        teacher_bits=_bits(config.teacher_model_init_kwargs or {}),
        written=1.0 if spec.replay else spec.share,
        both_write=spec.writer != "student",
        written_here=not (config.use_vllm and config.vllm_mode == "server"),
        read=None if not reading.is_cut and reading.teacher == reading.lengths else (reading.student[0], reading.teacher[0]),
        length=length,
        completion=completion,
        checkpointing=bool(config.gradient_checkpointing),
        optimizer=str(getattr(config.optim, "value", config.optim)),
        adapt=None if peft is None else adapt,
        vllm=config.vllm_gpu_memory_utilization if colocated else None,
        vllm_sleeps=bool(config.vllm_enable_sleep_mode),
        attention=model.attn_implementation,
        averaged=bool(config.teacher_weights),
        itself=config.self_teacher if named == SELF and reads else None,
        by_autograd=bool(method.alignment),
        teacher_offloaded=bool(config.teacher_cpu_offload),
    )


def _model_of(one: Any) -> str:
    """The name of one of several teachers."""
    name = one.get("model") if isinstance(one, dict) else one
    if not isinstance(name, str):
        raise ValueError(f"teachers: {one!r} names no model: pass a name or folder, or {{model: …}}.")
    return name


def _bits(loading: dict[str, Any]) -> int | None:
    """Of a model's loading options the bits that its weights are quantized to, if they are."""
    asked = loading.get("quantization_config") or {}
    asked = asked if isinstance(asked, dict) else vars(asked)
    named = {**asked, **loading}
    return 4 if named.get("load_in_4bit") or named.get("_load_in_4bit") else 8 if named.get("load_in_8bit") else None


def _dtype(named: Any) -> Any:
    """A dtype by its name; None of `auto`, and of nothing."""
    from tsdkd.teachers.sources import dtype_of

    found = None if named in (None, "auto") else dtype_of(named)
    return found if found != "auto" else None


_PER_MACHINE = 8  # GPUs


def _command(where: Any, count: int, flags: list[str], config: Any) -> str:
    """What starts a run in a placement: everything that a recipe may say otherwise is said."""
    own = [flag for flag in flags if flag != "--use_cpu"]
    more = ["--teacher_placement", where.teacher]
    if where.swap_optimizer != config.swap_optimizer:
        more += ["--swap_optimizer", "yes" if where.swap_optimizer else "no"]
    if where.teacher == "server" and not config.teacher_urls:
        more += ["--teacher_urls", "http://HOST:8000"]
    stage = {"whole": "--multi_gpu", "zero2": "--use_deepspeed --zero_stage 2", "zero3": "--use_deepspeed --zero_stage 3"}
    machines = ""
    if count > _PER_MACHINE and count % _PER_MACHINE == 0:  # the same on each, but for its rank
        machines = (
            f"--num_machines {count // _PER_MACHINE} --machine_rank RANK --main_process_ip HOST --main_process_port 29500 "
        )
    launch = f"accelerate launch {stage[where.student]} {machines}--mixed_precision bf16 --num_processes {count} "
    return f"  {'tsdkd train' if count == 1 else f'{launch}-m tsdkd.cli train'} {shlex.join([*own, *more])}"
