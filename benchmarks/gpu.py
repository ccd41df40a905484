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
from gpu_pairs import PAIRS, VOCABULARY, pair
from turns import failure

from tsdkd import TSDKD, Head, TokenBatch
from tsdkd.costs import GPU, gpu_named, known_gpus
from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
LIGER = {"vocab": 128_256, "student_hidden": 2048, "teacher_hidden": 4096}
QWEN = {"vocab": VOCABULARY, "student_hidden": 1536, "teacher_hidden": 5120}
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
                    run.row("loss", variant=name, **shape, failed=failure(error))
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
                run.row("pair", pair=" <- ".join(sizes), failed=failure(error))
    print(f"rows in {o.results}; {time.perf_counter() - run.began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
