"""Part of `gpu.py`: the parts of a step and the whole of pairs of models made from configurations, beside TRL's trainer."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from turns import failure, ratios

from tsdkd.costs import GPU
from tsdkd.preflight.growth import flops_by_part, moved_by, shape_of
from tsdkd.preflight.memory import Run as Plan

VOCABULARY = 151_936  # one for both, as TRL needs
# Layers, hidden, intermediate, heads, key-value heads of Qwen2.5's sizes; one vocabulary, as TRL needs.
MODELS = {
    "0.5B": (24, 896, 4864, 14, 2),
    "1.5B": (28, 1536, 8960, 12, 2),
    "7B": (28, 3584, 18944, 28, 4),
    "14B": (48, 5120, 13824, 40, 8),
    "tiny": (2, 64, 128, 4, 2),
    "small": (2, 128, 256, 4, 2),
}
PAIRS = [("0.5B", "7B"), ("1.5B", "14B")]


def configuration(size: str, vocab: int) -> Any:
    from transformers import Qwen2Config

    layers, hidden, wide, heads, kv = MODELS[size]
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return Qwen2Config(
        vocab_size=vocab,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        tie_word_embeddings=hidden < 2000,
        **sizes,
        **ends,
    )


def random_model(run: Any, size: str, vocab: int, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(run.o.seed)
    with run.device:
        return AutoModelForCausalLM.from_config(configuration(size, vocab), dtype=dtype)


def pair(run: Any, student_size: str, teacher_size: str) -> None:
    """The parts of a step and the whole, by our trainer and by TRL's, on the same injected rollouts.

    TRL's forward passes run in the weights' own dtype, whatever `bf16` says: so it is timed with a student in float32, as ours
    is (under autocast), and with one whose weights are bfloat16.
    """
    import step_cost
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.demo.recreate import make_tokenizer

    dry = run.o.dry
    vocab, batch, accumulation, completion = (512, 2, 2, 16) if dry else (151_936, 8, 4, 512)
    rows, named = batch * accumulation, f"{student_size} <- {teacher_size}"
    teacher = random_model(run, teacher_size, vocab, torch.bfloat16)
    weights = {name: value.cpu() for name, value in random_model(run, student_size, vocab, torch.float32).state_dict().items()}
    generator = torch.Generator().manual_seed(run.o.seed)
    lengths = torch.empty(rows).log_normal_(5.5, 0.5, generator=generator).round().clamp(4, completion).int().tolist()
    written = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]
    data = Dataset.from_dict({"prompt": [f"Tom has {100 + row} apples." * 2 for row in range(rows)]})
    steps: dict[str, dict[str, Any]] = {}
    for name in ("tsdkd", "trl", "trl_bf16"):
        student = random_model(run, student_size, vocab, torch.bfloat16 if name == "trl_bf16" else torch.float32)
        student.load_state_dict(weights)
        clock = step_cost.Clock()
        common: dict[str, Any] = dict(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3,
            num_train_epochs=3, max_completion_length=completion, report_to="none", save_strategy="no", logging_steps=1,
            disable_tqdm=True, gradient_checkpointing=True, learning_rate=1e-6, shuffle_dataset=False, bf16=not dry,
            use_cpu=dry,
        )  # fmt: skip
        shared = {"train_dataset": data, "processing_class": make_tokenizer(), "callbacks": [clock]}
        with tempfile.TemporaryDirectory() as folder, run.peak() as peak, contextlib.redirect_stdout(io.StringIO()):
            if name == "tsdkd":
                config = TSDKDConfig(output_dir=folder, max_length=completion + 64, **common)
                trainer: Any = TSDKDTrainer(model=student, teacher_model=teacher, args=config, **shared)
            else:
                config = DistillationConfig(output_dir=folder, beta=0.9, **common)
                trainer = DistillationTrainer(model=student, teacher_model=teacher, args=config, **shared)
            write = lambda ids, *a, **k: [written[row] for row in range(len(ids))]  # noqa: E731
            setattr(trainer, "write" if name == "tsdkd" else "_generate_single_turn", write)
            try:
                trainer.train()
            except Exception as error:
                run.row("pair", pair=named, trainer=name, failed=failure(error))
                continue
            gib = peak()
            log = [row for row in trainer.state.log_history if "loss" in row][-1]
        seconds = clock.seconds[1:]  # the first warms up
        parts = {key: log[key] for key in log if key.startswith(("time/", "tflop/")) or key == "mfu"}
        tokens = sum(lengths) / statistics.median(seconds)
        steps[name] = {"seconds": seconds, "peak_gib": gib, "tokens_per_second": tokens, "parts": parts}
        if name == "tsdkd":
            flops = 1e12 * sum(value for key, value in parts.items() if key in ("tflop/teacher", "tflop/student", "tflop/loss"))
            steps[name] |= run.against(statistics.median(seconds), flops)
        del trainer, student
    for name, measured in steps.items():
        if "tsdkd" in steps and name != "tsdkd":
            measured["tsdkd_ratio"] = ratios(steps["tsdkd"]["seconds"], measured["seconds"])
        run.row("pair", pair=named, trainer=name, rows=rows, trained_tokens=sum(lengths), **measured)
    del teacher
    written_by(run, student_size, vocab, 4 if dry else 64, 16 if dry else 256, named)


def written_by(run: Any, size: str, vocab: int, rows: int, tokens: int, named: str) -> None:
    """Tokens a second of rollouts: by transformers, and by vLLM where it is installed."""
    student = random_model(run, size, vocab, torch.float32 if run.o.dry else torch.bfloat16).eval()
    ids = torch.randint(5, 60, (rows, 16), device=run.device)
    more = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "pad_token_id": 0}
    with torch.no_grad():
        draw = functools.partial(student.generate, ids, attention_mask=torch.ones_like(ids), **more)
        took = [run.seconds(draw) for _ in range(2)]
    run.row("rollouts", pair=named, engine="transformers", rows=rows, tokens=tokens, tokens_per_second=rows * tokens / took[-1])
    del student, draw
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        run.row("rollouts", pair=named, engine="vllm", failed=f"not installed: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        configuration(size, vocab).save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        Path(folder, "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
        share = {} if run.o.dry else {"gpu_memory_utilization": 0.5}
        kind = "float32" if run.o.dry else "bfloat16"
        try:
            engine = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, dtype=kind, **share)
        except Exception as error:
            run.row("rollouts", pair=named, engine="vllm", failed=failure(error))
            return
        asked = SamplingParams(temperature=1.0, max_tokens=tokens, min_tokens=0, ignore_eos=True, detokenize=False)
        given: Any = [{"prompt_token_ids": row} for row in ids.tolist()]
        write = functools.partial(engine.generate, given, asked, use_tqdm=False)
        took = [run.seconds(write) for _ in range(2)]
        rate = rows * tokens / took[-1]
        run.row("rollouts", pair=named, engine="vllm", rows=rows, tokens=tokens, tokens_per_second=rate)
        core = getattr(engine.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()  # or its share of the GPU stays with its process
        del engine, write


def predicted_pair(student: str, teacher: str, gpu: GPU, rows: int = 32, completion: int = 256) -> dict[str, float]:
    """Rooflines of a step's parts in ms, as `tsdkd plan` counts them, of as many rows as `pair` has and their mean length."""
    run = Plan(configuration(student, VOCABULARY), configuration(teacher, VOCABULARY), rows=8, accumulation=rows // 8,
               teacher_rows=8, length=completion + 32, completion=completion)  # fmt: skip
    shape = shape_of(run, 1)
    flops, moved = flops_by_part(run, shape), moved_by(run, 1, shape)
    return {part: 1e3 * gpu.seconds(flops[part], moved[part]) for part in flops}
