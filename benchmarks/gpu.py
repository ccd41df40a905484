"""The library on a GPU, beside its peers, in one command of under ten minutes: `make bench-gpu`.

    loss   the fused objective at Liger's published shape and at 1.5B ← 14B heads: ours (torch, Triton), Liger, TRL, CCE
    chunks the same at several chunk sizes
    pair   teacher's forward, student's step, rollouts and the trainer's whole step of pairs made from configurations

Rows go to `benchmarks/results/gpu.jsonl` as each is measured, with card, driver, clocks, and beside every figure the roofline
of what it computes and the card's own matmul ceiling, measured first. `--dry` runs every part at tiny shapes on the CPU: that
the command works, no figure. `--predict` prints rooflines of cards that are not here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loss_cost
import torch

from tsdkd import TSDKD, Head, TokenBatch
from tsdkd.costs import GPU, gpu_named, known_gpus
from tsdkd.preflight.growth import flops_by_part, moved_by, shape_of
from tsdkd.preflight.memory import Run as Plan
from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
LIGER = {"vocab": 128_256, "student_hidden": 2048, "teacher_hidden": 4096}
QWEN = {"vocab": 151_936, "student_hidden": 1536, "teacher_hidden": 5120}
SHAPES = [*({**LIGER, "tokens": n} for n in (1024, 4096, 8192)), {**QWEN, "tokens": 16_384}]
TINY = [{"vocab": 512, "student_hidden": 32, "teacher_hidden": 64, "tokens": 64}]
# Products of tokens, vocabulary and hidden size: of the student's head, of the teacher's.
UNITS = {
    "tsdkd": (3, 1),
    "tsdkd_torch": (3, 1),
    "tsdkd_triton": (3, 1),
    "tsdkd_jsd": (3, 1),
    "liger_jsd": (3, 1),
    "cce": (1, 0),
}
UNITS |= {"trl_jsd": (5, 3)}
PUBLISHED = {1024: 8.3, 4096: 30.9, 8192: 60.7}  # Liger 0.8.5's JSD at its shape on an H100, ms
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


class Run:
    """What the parts share: the device, the card, and the file of rows."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.device = o, torch.device("cpu" if o.dry else "cuda")
        self.began, self.stamp = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.name = "CPU (dry run: no figure)" if o.dry else torch.cuda.get_device_name()
        self.gpu = gpu_named(self.name) or GPU(self.name, 0.0, 0.0, 0.0)
        self.ceiling = self.matmul()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronise()
        began = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - began

    def matmul(self) -> float:
        """FLOPs a second of a large bf16 product here, the best of some."""
        n = 64 if self.o.dry else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in "ab")
        return 2 * n**3 / min(self.seconds(lambda: a @ b) for _ in range(10))

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], float | None]]:
        """GiB that were allocated beyond the start; None on a CPU."""
        gc.collect()
        if self.device.type != "cuda":
            yield lambda: None
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)

    def clocks(self) -> dict[str, str]:
        """Driver and clocks, as nvidia-smi says them now."""
        fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
        if self.device.type != "cuda":
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
        return dict(zip(fields, found, strict=False))

    def row(self, part: str, **measured: Any) -> None:
        """Append what was measured."""
        origin = {**provenance(self.o.seed), "clocks": self.clocks(), "card": self.name, "matmul_tflops": self.ceiling / 1e12}
        row = {"benchmark": "gpu", "run": self.stamp, "part": part, "dry": self.o.dry, **measured, **origin}
        self.o.results.parent.mkdir(parents=True, exist_ok=True)
        with self.o.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: round(value, 5) if isinstance(value, float) else value for name, value in measured.items()}
        print(f"[{time.perf_counter() - self.began:5.0f} s] {part}: {shown}", flush=True)

    def against(self, seconds: float, flops: float) -> dict[str, Any]:
        """A time beside its roofline and the ceiling."""
        best = flops / (self.gpu.tflops * 1e12) if self.gpu.tflops else None
        shares = {"tflops": flops / seconds / 1e12, "of_matmul_ceiling": flops / seconds / self.ceiling}
        return {**shares, "roofline_ms": None if best is None else 1e3 * best, "mfu": None if best is None else best / seconds}


# ---------------------------------------------------------------------- the loss


def _ours(x: Any, impl: str, chunk: int | str = "auto") -> None:
    ids = torch.zeros(len(x.h_s), dtype=torch.long, device=x.device)
    batch = TokenBatch(x.h_s, x.h_t, x.lengths, token_ids=ids)
    TSDKD().loss(batch, Head(x.w_s), Head(x.w_t), impl=impl, chunk_tokens=chunk).loss.backward()


def cce(x: Any) -> None:
    """Cut cross-entropy's forward pass: one product with the student's head."""
    from cut_cross_entropy import linear_cross_entropy

    labels = torch.zeros(len(x.h_s), dtype=torch.long, device=x.device)
    with torch.no_grad():
        linear_cross_entropy(x.h_s, x.w_s, labels)


def variants(o: argparse.Namespace) -> dict[str, Callable[[Any], None]]:
    """Those that can run here."""
    made: dict[str, Callable[[Any], None]] = {
        "tsdkd": lambda x: _ours(x, "auto"),
        "tsdkd_torch": lambda x: _ours(x, "torch"),
        "tsdkd_jsd": loss_cost.tsdkd_jsd,
    }
    if not o.dry:
        made["tsdkd_triton"] = lambda x: _ours(x, "triton")
    for name, package in (("liger_jsd", "liger_kernel"), ("trl_jsd", "trl"), ("cce", "cut_cross_entropy")):
        try:
            __import__(package)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        if not (o.dry and name == "cce"):  # a Triton kernel
            made[name] = cce if name == "cce" else loss_cost.VARIANTS[name]
    return made


def inputs(run: Run, shape: dict[str, int]) -> Any:
    kind = {"dtype": "bfloat16", "device": str(run.device), "seed": run.o.seed}
    return loss_cost.Inputs(argparse.Namespace(**shape, **kind))


def losses(run: Run) -> None:
    """Every variant at every shape, interleaved."""
    for shape in TINY if run.o.dry else SHAPES:
        x, runs = inputs(run, shape), variants(run.o)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(run.o.rounds + 2):  # two warm up: Triton compiles, memory is taken
            for name in list(runs):
                x.clear()
                try:
                    took = run.seconds(functools.partial(runs[name], x))
                except Exception as error:  # a peer that does not run here, or not at this size
                    run.row("loss", variant=name, **shape, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    del runs[name]
                    continue
                seconds[name] += [took] if turn > 1 else []
        for name in runs:
            x.clear()
            with run.peak() as peak:
                runs[name](x)  # it has run at this size
                run.synchronise()
                gib = peak()
            student, teacher = UNITS[name]
            flops = 2.0 * shape["tokens"] * shape["vocab"]
            flops *= student * shape["student_hidden"] + teacher * shape["teacher_hidden"]
            told = run.against(statistics.median(seconds[name]), flops)
            ratio = [a / b for a, b in zip(seconds["tsdkd"], seconds[name], strict=False)]
            if name == "liger_jsd" and "H100" in run.name:
                told["published_ms"] = PUBLISHED.get(shape["tokens"])
            run.row("loss", variant=name, **shape, ms=[1e3 * s for s in seconds[name]], tsdkd_ratio=ratio, peak_gib=gib, **told)
        del x


def chunks(run: Run) -> None:
    """Ours by engine and chunk, at the largest of Liger's shapes and at the pair's."""
    for shape in TINY if run.o.dry else (SHAPES[2], SHAPES[3]):
        x = inputs(run, shape)
        for impl in ("torch",) if run.o.dry else ("torch", "triton"):
            for chunk in (16, 32) if run.o.dry else (512, 1024, 2048, 4096):
                took, ours = [], functools.partial(_ours, x, impl, chunk)
                for _ in range(4):
                    x.clear()
                    took.append(run.seconds(ours))
                with run.peak() as peak:
                    ours()
                    run.synchronise()
                    gib = peak()
                run.row("chunks", impl=impl, chunk=chunk, **shape, ms=[1e3 * s for s in took[1:]], peak_gib=gib)
        del x, ours


# ---------------------------------------------------------------------- pairs


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


def random_model(run: Run, size: str, vocab: int, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(run.o.seed)
    with run.device:
        return AutoModelForCausalLM.from_config(configuration(size, vocab), dtype=dtype)


def pair(run: Run, student_size: str, teacher_size: str) -> None:
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
                run.row("pair", pair=named, trainer=name, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
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
            measured["tsdkd_ratio"] = [a / b for a, b in zip(steps["tsdkd"]["seconds"], measured["seconds"], strict=True)]
        run.row("pair", pair=named, trainer=name, rows=rows, trained_tokens=sum(lengths), **measured)
    del teacher
    written_by(run, student_size, vocab, 4 if dry else 64, 16 if dry else 256, named)


def written_by(run: Run, size: str, vocab: int, rows: int, tokens: int, named: str) -> None:
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
            run.row("rollouts", pair=named, engine="vllm", failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
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


# ---------------------------------------------------------------------- what is expected


def predicted(gpu: GPU) -> list[dict[str, Any]]:
    """Rooflines of the loss at every shape: the products alone, at the card's stated peak."""
    made = []
    for shape in SHAPES:
        for name in ("tsdkd", "trl_jsd"):
            student, teacher = UNITS[name]
            flops = 2.0 * shape["tokens"] * shape["vocab"]
            flops *= student * shape["student_hidden"] + teacher * shape["teacher_hidden"]
            made.append({"card": gpu.name, "variant": name, **shape, "roofline_ms": 1e3 * flops / (gpu.tflops * 1e12)})
    return made


def predicted_pair(student: str, teacher: str, gpu: GPU, rows: int = 32, completion: int = 256) -> dict[str, float]:
    """Rooflines of a step's parts in ms, as `tsdkd plan` counts them, of as many rows as `pair` has and their mean length."""
    run = Plan(configuration(student, QWEN["vocab"]), configuration(teacher, QWEN["vocab"]), rows=8, accumulation=rows // 8,
               teacher_rows=8, length=completion + 32, completion=completion)  # fmt: skip
    shape = shape_of(run, 1)
    flops, moved = flops_by_part(run, shape), moved_by(run, 1, shape)
    return {part: 1e3 * gpu.seconds(flops[part], moved[part]) for part in flops}


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dry", action="store_true", help="every part at tiny shapes on the CPU")
    p.add_argument("--predict", action="store_true", help="print the rooflines of known cards, and measure nothing")
    p.add_argument("--parts", default="loss,chunks,pair", help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path)
    o = p.parse_args(arguments)
    if o.predict:
        for row in (row for name in ("H100", "H200") for row in predicted(known_gpus()[name])):
            print(json.dumps(row))
        return 0
    if not o.dry and not torch.cuda.is_available():
        print("There is no GPU here. --dry tries the command on the CPU, --predict says what is expected.", file=sys.stderr)
        return 2
    if o.results is None:
        o.results = RESULTS if not o.dry else Path(tempfile.gettempdir()) / "gpu-dry.jsonl"
    run = Run(o)
    todo: dict[str, Callable[[Run], None]] = {"loss": losses, "chunks": chunks}
    for part in o.parts.split(","):
        if part in todo:
            todo[part](run)
            continue
        for sizes in [("tiny", "small")] if o.dry else PAIRS:
            try:
                pair(run, *sizes)
            except Exception as error:  # a card too small: the rows before it stand
                run.row("pair", pair=" <- ".join(sizes), failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    print(f"rows in {o.results}; {time.perf_counter() - run.began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
