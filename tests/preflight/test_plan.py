"""`tsdkd plan`: sizes against models that are there, bytes against those of runs, FLOPs against torch's own counter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from live import LiveBytes
from measured import planned_and_measured
from peft import LoraConfig, get_peft_model
from running import make
from tiny import FAMILIES, QUESTIONS, config, prompts, save_tiny, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DeepseekV3Config, MambaConfig, MixtralConfig, OPTConfig, Phi3Config, Qwen2Config

from tsdkd.cli import main
from tsdkd.cli.fake_world import tried
from tsdkd.costs import GIB, StepShape, flops_of, gpu_named, known_gpus, rollout_bytes
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.preflight.fake_world import save_small
from tsdkd.preflight.growth import flops_by_part, moved_by, shape_of
from tsdkd.preflight.memory import Placement, Run, memory_of
from tsdkd.preflight.plan import GPUs, plan
from tsdkd.trainers.sizes import size_of, tell_if_too_large

LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def paper():
    """The paper's pair: Qwen2.5 1.5B and 14B."""
    student = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    teacher = Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8,
    )  # fmt: skip
    teacher.tie_word_embeddings = False
    return student, teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(family, tied):
    model = tiny_model(family, hidden=48, tie_word_embeddings=tied)
    size = size_of(model.config)
    assert size.parameters == size.active == sum(p.numel() for p in model.parameters())
    assert (size.vocab, size.hidden, size.layers, size.tied) == (64, 48, 2, tied)
    assert size.largest_layer == sum(p.numel() for p in model.model.layers[0].parameters())


def test_of_a_mixture_a_token_passes_its_experts_alone():
    mixture = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    size, experts = size_of(mixture), 2 * 8 * 3 * 32 * 64
    assert size.parameters - size.active == experts * 6 // 8


def test_the_papers_pair_is_counted_to_the_parameter():
    student, teacher = map(size_of, paper())
    assert (student.parameters, teacher.parameters) == (1_543_714_304, 14_770_033_664)


CASES = {
    "local": ("local", {}),
    "accumulated": ("local", {"gradient_accumulation_steps": 2}),
    "recomputed": ("local", {"gradient_checkpointing": True}),
    "swapped": ("swap", {}),
    "swapped with the optimizer": ("swap", {"swap_optimizer": True}),
    "adapter": ("local", {"peft_config": LORA}),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_a_run(tmp_path, case):
    """Weights, gradients and optimizer exact; the peak of two steps, by the bytes of all live tensors, within 15 %."""
    where, options = CASES[case]
    given, length = copy.deepcopy(options), 100
    student = tiny_model(seed=1, hidden=96, positions=256)
    own, teacher = copy.deepcopy(student.config), tiny_model(seed=2, hidden=128, positions=256, num_hidden_layers=3)
    trainer = make(
        tmp_path, student=student, teacher=teacher, data=prompts(16), max_length=None, max_completion_length=length,
        rollouts=lambda ids: [5 + t % 50 for t in range(length)],
        max_steps=2, teacher_placement=where, teacher_batch_size=2, logging_steps=10, **given,
    )  # fmt: skip
    room = getattr(trainer.teacher, "room", None)

    def apart():
        parked = () if room is None else (trainer.teacher._weights, room._weights, room._states)
        return [storage for each in parked for storage in each._copies]

    with LiveBytes([*trainer.model.parameters(), *teacher.parameters()], apart) as live:
        trainer.train()
    prompt = max(len(make_tokenizer()(question)["input_ids"]) for question in QUESTIONS[:16])
    run = Run(
        own, teacher.config, torch.float32, torch.float32, None, rows=4, optimizer="adamw_torch",
        accumulation=options.get("gradient_accumulation_steps", 1), teacher_rows=2, length=prompt + length, completion=length,
        checkpointing=options.get("gradient_checkpointing", False), chunk=512, block=(1 << 18) // 64,
        adapt=(lambda model: get_peft_model(model, copy.deepcopy(LORA))) if "peft_config" in options else None,
    )  # fmt: skip
    memory = memory_of(run, Placement("whole", where, options.get("swap_optimizer", False)), 1)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
    assert memory.parts["student's weights"] == size(trainer.model.parameters())
    assert memory.parts["gradients"] == size(trained) and memory.parts["optimizer"] == size(states) > 0
    assert memory.peak == pytest.approx(live.peak, rel=0.15)
    assert memory.peaks[1] >= memory.peaks[0]


@pytest.mark.parametrize(
    "processes,bf16,teacher", [(1, True, "local"), (4, False, "local"), (4, True, "local"), (1, False, "server")]
)
def test_bytes_of_processes_of_mixed_precision_and_of_a_served_teacher_are_those_of_a_run(tmp_path, processes, bf16, teacher):
    planned, measured = planned_and_measured(tmp_path, processes, "whole", teacher, bf16)
    assert planned == pytest.approx(measured, rel=0.15)


def test_several_teachers_and_a_student_that_teaches_itself():
    """What is held and read of each, and who reads what."""
    student, teacher = paper()
    ours, theirs = size_of(student), size_of(teacher)
    where, shape = Placement("whole", "local"), StepShape(16, 512, 512)
    one = Run(student, teacher, rows=8, accumulation=2)
    alone, two = (memory_of(run, where, 1).parts for run in (one, one.but(teacher=(teacher, student))))
    assert (
        two["teacher"] - alone["teacher"] == 2 * ours.parameters
        and two["activations and loss"] == alone["activations and loss"]
    )
    averaged = one.but(teacher=(teacher, student), averaged=True)
    held = memory_of(averaged, where, 1).parts
    assert held["teacher"] == 2 * (theirs.parameters + ours.parameters + theirs.head + ours.head)
    assert held["teacher's hidden states"] * 5120 == two["teacher's hidden states"] * (5120 + 1536)
    reads = lambda run: flops_by_part(run, shape)["teacher"]  # noqa: E731
    both = theirs.forward_flops(1024, 16) + ours.forward_flops(1024, 16)
    assert reads(averaged) == pytest.approx(both) and reads(one.but(teacher=(teacher, student))) == pytest.approx(both / 2)
    parts = {how: memory_of(Run(student, None, itself=how), where, 1).parts["teacher"] for how in ("live", "start", "ema")}
    assert parts == {"live": 0, "start": 4 * ours.parameters, "ema": 4 * ours.parameters}
    half = Run(student, None, itself="ema", student_dtype=torch.bfloat16)
    assert memory_of(half, where, 1).parts["teacher"] == 4 * ours.parameters and reads(half) == ours.forward_flops(1024, 16)
    sorted_out = one.but(by_autograd=True, chunk=512)
    assert memory_of(sorted_out, where, 1).peak > memory_of(one.but(chunk=512), where, 1).peak


def test_what_is_not_written_or_held_here_is_not_counted():
    """Given completions, a server's, prefixes, passes by tokens, quantized weights, a mixture's experts."""
    student, teacher = paper()
    ours, theirs = size_of(student), size_of(teacher)
    run, where = Run(student, teacher, rows=8, accumulation=2), Placement("zero3", "local")
    shape, moved = shape_of(run, 1), lambda one: moved_by(one, 1, shape_of(one, 1))
    assert flops_by_part(run.but(written=0.0), shape)["rollout"] == moved(run.but(written=0.0))["rollout"] == 0
    served = run.but(written_here=False)
    assert flops_by_part(served, shape)["rollout"] == 0 and memory_of(served, where, 8).parts["rollout"] == 0
    both = flops_by_part(run.but(both_write=True), shape)["rollout"] - flops_by_part(run, shape)["rollout"]
    assert both == pytest.approx(theirs.forward_flops(1024, 16) + 2 * theirs.head * shape.tokens)
    short = flops_by_part(run.but(read=(100, 50)), shape)
    assert short["teacher"] == pytest.approx(theirs.forward_flops(562, 16))
    assert short["loss"] == pytest.approx(16 * (6 * ours.head * 100 + 2 * theirs.head * 50))
    assert moved(run.but(teacher_rows=512))["teacher"] == 2 * theirs.parameters  # one pass, however many rows it could take
    by_tokens = run.but(teacher_tokens=4096)
    assert by_tokens.read_together == 4 and by_tokens.but(length=4096).read_together == 1
    four = run.but(student_bits=4)
    layers = ours.parameters - ours.embedding
    assert memory_of(run, Placement("whole", "local"), 1).parts["student's weights"] - layers * (4 - 0.5625) == pytest.approx(
        memory_of(four, Placement("whole", "local"), 1).parts["student's weights"]
    )
    mixture = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    size = size_of(mixture)
    step = StepShape(64, 8, 10)
    cache = 64 * 10 * 13 * size.kv_cache(1, 2)
    held = memory_of(Run(mixture, mixture, teacher_dtype=torch.float32), Placement("whole", "local"), 1)
    assert held.parts["gradients"] == 4 * size.parameters and held.parts["activations and loss"] > 0
    assert rollout_bytes(size, step, 2) == pytest.approx(10 * size.parameters * 2 + cache)


def test_more_tokens_a_step():
    """Rows amortise the reading of weights while completions are written, and no more; lengths give attention its square."""
    made = plan(Run(*paper(), rows=8, accumulation=2, teacher_rows=8), GPUs.of("8xH100"), grows=True)
    grown = {(one.how, one.factor): one for one in made.growth}
    speed = {key: one.tokens / sum(one.seconds.values()) for key, one in grown.items()}
    assert speed["rows", 1] < speed["rows", 10] < 1.01 * speed["rows", 100] and speed["rows", 1000] < 1.01 * speed["rows", 100]
    assert (
        grown["rows", 10].shares["rollout"] < grown["rows", 1].shares["rollout"] and speed["length", 100] < speed["length", 10]
    )
    hidden = [grown["rows", factor].memory.parts["teacher's hidden states"] for factor in (1, 10)]
    assert [one.beyond for one in made.growth] == [False] * 6 + [True] * 2  # a context of 32 768
    assert hidden[1] == 10 * hidden[0] and made.otherwise[0].peak > made.options[0].memory.peak
    assert set(made.rooflines) == set(known_gpus()) and made.rooflines["H100"] == made.seconds


def test_flops_are_those_that_torch_counts():
    """A forward and a backward pass below the head; attention is counted causal here, by torch whole."""
    model, rows, length = tiny_model("llama", hidden=128, positions=256, attn_implementation="eager"), 2, 96
    size = size_of(model.config)
    with FlopCounterMode(display=False) as counter:
        model.model(torch.zeros(rows, length, dtype=torch.long)).last_hidden_state.sum().backward()
    attention = rows * 2 * size.layers * size.heads * size.head_dim * length**2
    counted = flops_of(size, None, StepShape(rows, length, 0))["student"]
    assert counter.get_total_flops() == pytest.approx(counted + 3 * attention, rel=0.02)
    both = flops_of(size, size, StepShape(rows, length, 10, checkpointing=True))
    assert both["student"] == pytest.approx(4 * both["teacher"])
    heads = 2 * size.head * rows * 10
    assert both["loss"] == 4 * heads and flops_of(size, None, StepShape(rows, length, 10, trained=0.01))["loss"] == 2 * heads
    step = StepShape(4, 8, 10)
    cache = 4 * 10 * 13 * 2 * size.layers * size.kv_heads * size.head_dim * 2  # rows, tokens, the mean text before each, keys …
    for gpus in (1, 4):
        assert rollout_bytes(size, step, 2, gpus) == pytest.approx(10 * size.parameters * 2 + cache / gpus)


def test_a_plan_of_the_papers_machine():
    """The teacher whole beside the student's Adam, which comes at step 2; what is sharded is smaller; what is asked fits."""
    made = plan(Run(*paper(), rows=8, accumulation=2, teacher_rows=8), GPUs.of("8xA100"))
    by_name = {str(option.placement): option.memory for option in made.options}
    local, zero = by_name["whole student, teacher local"], by_name["whole student, teacher zero3"]
    assert local.parts["student's weights"] == 1_543_714_304 * 4 and local.parts["optimizer"] == 1_543_714_304 * 8
    assert local.parts["teacher"] == 14_770_033_664 * 2 and zero.parts["teacher"] < local.parts["teacher"] / 5
    assert local.peaks[1] - local.peaks[0] > 0.8 * local.parts["optimizer"]
    assert (
        by_name["student ZeRO-3, teacher zero3"].peak < by_name["student ZeRO-2, teacher zero3"].peak < zero.peak < local.peak
    )
    assert made.best is not None and made.best.memory.peak < 75 * GIB and set(made.seconds) == set(made.flops)
    assert made.seconds["teacher"] == pytest.approx(made.flops["teacher"] / 8 / 312e12)


def test_what_would_make_it_fit():
    run = Run(*paper(), rows=8, accumulation=16, teacher_rows=8, checkpointing=False)
    made = plan(run, GPUs.of("1x40"))
    assert made.knob is not None and not all(option.fits for option in made.options)
    changes = {
        "gradient_checkpointing: true": {"checkpointing": True},
        "teacher_batch_size: 1": {"teacher_rows": 1},
        "per_device_train_batch_size: 4 and gradient_accumulation_steps: 32": {"rows": 4, "accumulation": 32},
    }
    where, told = made.knob
    assert (
        memory_of(run, where, 1, 40 * GIB).peak
        > 0.94 * 40 * GIB
        >= memory_of(run.but(**changes[told]), where, 1, 40 * GIB).peak
    )
    hopeless = plan(Run(*paper(), rows=1), GPUs.of("1x2"))
    assert hopeless.knob is None and hopeless.best is None


def test_a_run_that_cannot_fit_is_told_of_before_it_is_loaded(tmp_path):
    from tsdkd.methods import TSDKD
    from tsdkd.trainers.setup import Setup

    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    sizes = [sum(p.numel() for p in tiny_model("llama", hidden=hidden).parameters()) for hidden in (32, 48)]
    least = 4 * (2 * sizes[0] + sizes[1])  # weights and gradients, and the teacher's
    setup = lambda teacher=teacher, student=student, **options: Setup.of(  # noqa: E731
        config(tmp_path / "out", **options), TSDKD(), student, teacher
    )
    assert "`tsdkd plan`" in tell_if_too_large(setup(), least - 1) and tell_if_too_large(setup(), least) == ""
    assert tell_if_too_large(setup(), 4 * (sizes[0] + sizes[1]), adapter=True) == ""
    assert tell_if_too_large(setup(teacher_placement="swap"), 8 * sizes[0]) == "" and tell_if_too_large(setup()) == ""
    two = setup({"a": teacher, "b": teacher})
    assert tell_if_too_large(two, least) and tell_if_too_large(two, least + 4 * sizes[1]) == ""
    half = tiny_model("llama", seed=1).to(torch.bfloat16)
    assert tell_if_too_large(setup(student=half), 4 * sizes[0] + 4 * sizes[1]) == ""


def test_gpus_by_name_and_by_memory():
    assert GPUs.of("8x80").count == 8 and GPUs.of("8x80").each.memory == 80
    assert GPUs.of("2 x RTX 4090").each.name == "RTX-4090" and GPUs.of("a100-40gb").each.memory == 40
    assert GPUs.of("2x4090").each.name == "RTX-4090"
    assert GPUs.of("NVIDIA H100").each.tflops == 989 and GPUs.of("40GiB").each.memory == 40
    wrong = {
        "8xT5000": "is not known; known: .*H100.*give its memory",
        "0x80": "pass a number and a GPU",
        "x": "x is not known",
    }
    for text, told in wrong.items():
        with pytest.raises(ValueError, match=told):
            GPUs.of(text)
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA L40S")
    found = [gpu_named(name) for name in names]
    assert [gpu and gpu.name for gpu in found] == ["A100-80GB", "H100", "H200", "RTX-4090", "L40S"] and gpu_named("T4") is None
    others = ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GH200 480GB", "NVIDIA GB200")
    assert [gpu_named(name) for name in others] == [None] * 4
    assert all(gpu.source for gpu in known_gpus().values())


def test_the_command(tmp_path, capsys):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    models, mamba = ["--student", student, "--teacher", teacher], str(tmp_path / "mamba")
    MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2).save_pretrained(mamba)
    opt = str(tmp_path / "opt")
    OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, num_attention_heads=2, ffn_dim=64, num_hidden_layers=2,
              max_position_embeddings=128).save_pretrained(opt)  # fmt: skip
    assert main(["plan", *models, "--gpus", "1xH100"]) == 0
    out = capsys.readouterr().out
    assert "whole student, teacher swap" in out and f"tsdkd train --student {student}" in out and "seconds at best" in out
    assert main(["plan", *models, "--gpus", "2x24", "--json", "--use_peft", "--lora_target_modules", "all-linear"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [(one["student"], one["teacher"]) for one in found["placements"]]
    assert ("zero3", "zero3") in names and found["seconds"] == {} and found["gpus"]["count"] == 2
    first = found["placements"][0]
    assert first["fits"] and first["parts"]["gradients"] < 0.5 * first["parts"]["student's weights"]
    asked = [*models, "--teacher_placement", "swap", "--swap_optimizer", "yes"]
    assert main(["plan", *asked, "--gpus", "1xH100"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "tsdkd train" in line)
    assert command.endswith("--teacher_placement local --swap_optimizer no")
    assert main(["plan", *models, "--gpus", "1x0.001"]) == 1 and "No placement fits" in capsys.readouterr().out
    for arguments, told in (
        ([*models, "--gpus", "8xT5000"], "T5000 is not known"),
        (["--teacher", teacher, "--gpus", "8x80"], "no student was given"),
        (["--student", student, "--gpus", "8x80"], "no teacher was given"),
        (["--student", str(tmp_path), "--teacher", teacher, "--gpus", "8x80"], f"the student {tmp_path}: "),
        ([*models, "--gpus", "1x80", "--teacher_placement", "zero3"], "it is shared by the processes of several"),
        (["--student", student, "--recording", str(tmp_path), "--gpus", "1x80"], "a recording is trained on without a teacher"),
        ([*models, "--gpus", "8x80", "--fake_world", "1"], "pass a number of processes, 2 or more"),
        (["--student", student, "--teachers", '{"a": 3}', "--gpus", "8x80"], "names no model"),
        (["--student", opt, "--teacher", teacher, "--gpus", "1x80"], "what a opt holds while it reads is not known here"),
        ([*models, "--gpus", "8x80", "--teachers", "{}", "--teacher_weights", '{"c": 1.0}'], "teacher_weights names c"),
        (["--student", mamba, "--teacher", teacher, "--gpus", "1x80"], "its sizes are not known here"),
        ([*models, "--gpus", "8x80", "--optim", "lomo"], "optim=lomo keeps of each parameter is not known"),
    ):
        assert main(["plan", *arguments]) == 2 and told in capsys.readouterr().err


def test_a_run_of_64_processes_is_tried_on_one(tmp_path, capsys):
    """What fails there fails here: too few prompts for a step, parts of vLLM that do not divide; what does not is said."""
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tom has {n} pens."}) + "\n" for n in range(300)))
    asked = [
        "plan",
        "--student",
        student,
        "--teacher",
        teacher,
        "--dataset_name",
        str(data),
        "--gpus",
        "64x24",
        "--max_length",
        "64",
    ]
    assert main([*asked, "--fake_world", "64", "--per_device_train_batch_size", "4"]) == 0
    assert "64 processes, whole student, teacher local: constructed here, and the first step made" in capsys.readouterr().out
    assert main([*asked, "--fake_world", "64", "--per_device_train_batch_size", "8", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["fake_world"]
    assert told["processes"] == 64 and "300" in told["problem"] and "512" in told["problem"]
    parts = ["--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_tensor_parallel_size", "3"]
    assert main([*asked, "--fake_world", "64", "--per_device_train_batch_size", "4", *parts]) == 1
    assert "does not divide the 64 processes" in capsys.readouterr().out
    assert not list(tmp_path.glob("s-*")) and sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "s", "t"]


def test_a_command_that_a_shell_takes_as_it_was_given(tmp_path, capsys):
    import shlex

    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    several = json.dumps({"math": teacher, "code": {"model": teacher}})
    assert main(["plan", "--student", student, "--teachers", several, "--gpus", "64xH100"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "accelerate launch" in line)
    words = shlex.split(line)
    assert several in words and words[words.index("--num_machines") + 1] == "8" and "--machine_rank" in words


@pytest.mark.parametrize("kind", ["phi3", "deepseek"])
def test_a_small_model_of_a_kind_that_ties_its_sizes(tmp_path, kind):
    """Factors of a rope as long as half a head; attention with latents: what cannot be narrower stays."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind == "phi3":
        factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
        config = Phi3Config(**sizes, num_key_value_heads=2, max_position_embeddings=8192, original_max_position_embeddings=4096,
                            rope_scaling={"type": "longrope", **factors}, pad_token_id=0)  # fmt: skip
    else:
        config = DeepseekV3Config(**sizes, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
                                  first_k_dense_replace=1, moe_intermediate_size=128)  # fmt: skip
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = save_small(config, str(tmp_path / "tokenizer"), tmp_path / "small")
    assert size_of(AutoConfig.from_pretrained(folder)).parameters < size_of(config).parameters / 2


def test_a_student_that_teaches_itself_and_several_are_tried(tmp_path):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    data = tmp_path / "p.jsonl"
    rows = [{"prompt": f"Tom has {n} pens.", "teacher_prompt": f"{n}. Tom has {n}.", "teacher": "a"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--student", student, "--dataset_name", str(data), "--max_length", "64", "--per_device_train_batch_size", "2"]
    assert tried(8, "whole", "local", [*flags, "--teacher", "self"]) is None
    assert tried(8, "whole", "local", [*flags, "--teachers", json.dumps({"a": teacher, "b": {"model": teacher}})]) is None
