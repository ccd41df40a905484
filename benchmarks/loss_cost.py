"""What the loss costs: ours, TRL's kernel, Liger's and the naive objective, side by side.

`python benchmarks/loss_cost.py [--tokens 1024 --dtype float32 …]` times the variants interleaved in one process (median,
min and max of the rounds, ratios round by round) and measures each one's peak extra memory in a fresh process. Rows with
provenance go to `benchmarks/results/loss_cost.jsonl`, and by `benchmarks/tables.py` into `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tsdkd import TSDKD, Head, TokenBatch
from tsdkd.methods import GKD, SeqKD
from tsdkd.provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "loss_cost.jsonl"
LABELS = {
    "tsdkd": "tsdkd, all three terms",
    "tsdkd_jsd": "tsdkd, JSD(0.9) alone",
    "tsdkd_frozen": "tsdkd, all three terms, frozen head",
    "tsdkd_ranking": "tsdkd, ranking alone (k = 10, every token)",
    "tsdkd_prefix": "tsdkd, JSD(0.9) on the first 30 %",
    "tsdkd_top_entropy": "tsdkd, JSD(0.9) on the 50 % of highest entropy",
    "tsdkd_seq_kd": "tsdkd, cross-entropy alone",
    "trl_jsd": "TRL, JSD(0.9) alone",
    "trl_reverse_kl": "TRL, reverse KL alone",
    "naive": "naive, all three terms on full logits",
    "liger_jsd": "Liger, JSD(0.9) alone",
}


class Inputs:
    """Hidden states and heads whose logits have a language model's shape: a Zipf-like prior and a few sure tokens."""

    def __init__(self, o: argparse.Namespace) -> None:
        torch.manual_seed(o.seed)
        self.device, dtype = torch.device(o.device), getattr(torch, o.dtype)
        n, v = o.tokens, o.vocab
        scale = 4.0  # standard deviation of the logits: entropies of a few nats over 152 000 tokens

        def side(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.randn(v, size, device=self.device, dtype=dtype) * (scale / size**0.5)
            return torch.randn(n, size, device=self.device, dtype=dtype), weight

        self.h_s, self.w_s = side(o.student_hidden)
        self.h_t, self.w_t = side(o.teacher_hidden)
        self.lengths = tuple(min(256, n - start) for start in range(0, n, 256))
        self.h_s.requires_grad_()
        self.w_s.requires_grad_()

    def clear(self) -> None:
        self.h_s.grad = self.w_s.grad = None


def tsdkd(x: Inputs, method: Any = None, frozen: bool = False) -> None:
    weight = x.w_s.detach() if frozen else x.w_s
    batch = TokenBatch(x.h_s, x.h_t, x.lengths, token_ids=torch.zeros(len(x.h_s), dtype=torch.long, device=x.device))
    (method or TSDKD()).loss(batch, Head(weight), Head(x.w_t), impl="auto").loss.backward()


def tsdkd_jsd(x: Inputs) -> None:
    tsdkd(x, TSDKD(indirect_weight=0.0, entropy_weight=0.0, gate="none"))


def tsdkd_frozen(x: Inputs) -> None:
    tsdkd(x, frozen=True)


def tsdkd_ranking(x: Inputs) -> None:
    tsdkd(x, TSDKD(direct_weight=0.0, entropy_weight=0.0, opener_entropy_share=1.0, ranking_stage_weights="teacher_mass"))


def tsdkd_prefix(x: Inputs) -> None:
    tsdkd(x, GKD(selection="prefix", selection_share=0.3))


def tsdkd_top_entropy(x: Inputs) -> None:
    tsdkd(x, GKD(selection="top_entropy", selection_share=0.5))


def tsdkd_seq_kd(x: Inputs) -> None:
    tsdkd(x, SeqKD())


def _trl(x: Inputs, beta: float) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(x.h_s, x.w_s, None, x.h_t, x.w_t, None, beta, 1.0, 1.0, None, 1.0, None)
    (divergence.sum() / divergence.numel()).backward()


def trl_jsd(x: Inputs) -> None:
    _trl(x, 0.9)


def trl_reverse_kl(x: Inputs) -> None:
    _trl(x, 1.0)


def naive(x: Inputs) -> None:
    """What one writes first: full logits, log_softmax, topk, autograd; the same terms and weights."""
    z_s, z_t = (x.h_s @ x.w_s.t()).float(), (x.h_t @ x.w_t.t()).float()
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    entropy_s, entropy_t = -(p_s * log_s).sum(-1), -(p_t * log_t).sum(-1)
    log_m = (0.9 * p_t + 0.1 * p_s).log()
    jsd = 0.9 * (p_t * (log_t - log_m)).sum(-1) + 0.1 * (p_s * (log_s - log_m)).sum(-1)
    gate = torch.sigmoid(entropy_s - entropy_t).detach()
    candidates = z_s.topk(10).indices
    order = z_t.gather(-1, candidates).argsort(-1, descending=True)
    scores = z_s.gather(-1, candidates.gather(-1, order))
    nll = (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1)
    loss, start = (gate * jsd).mean(), 0
    for length in x.lengths:
        h = entropy_s[start : start + length]
        opener = 1 + int((h.cumsum(0) < 0.1 * h.sum()).sum())
        loss = loss + 0.1 * nll[start : start + opener].mean() / len(x.lengths)
        loss = loss + h.topk(max(1, length // 10)).values.mean() / len(x.lengths)
        start += length
    loss.backward()


def liger_jsd(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(x.h_s.shape[0], dtype=torch.long, device=x.device)
    compiled = x.device.type == "cuda"  # its default, which needs a compiler for CPUs
    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.9, compiled=compiled)
    out = jsd(x.h_s, x.w_s, x.h_t, x.w_t, labels)
    (out[0] if isinstance(out, tuple) else out).backward()


VARIANTS: dict[str, Callable[[Inputs], None]] = {name: globals()[name] for name in LABELS}


def _timed(run: Callable[[Inputs], None], x: Inputs) -> float:
    x.clear()
    gc.collect()
    _synchronise(x)
    began = time.perf_counter()
    run(x)
    _synchronise(x)
    return time.perf_counter() - began


def _synchronise(x: Inputs) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


def measure_memory(o: argparse.Namespace) -> float:
    """Peak memory beyond the inputs of one run after a small one, MiB; call it in a fresh process."""
    small = argparse.Namespace(**{**vars(o), "tokens": 16, "vocab": 4096})
    VARIANTS[o.variant](Inputs(small))  # libraries allocate their own workspaces on first use
    x = Inputs(o)
    gc.collect()
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[o.variant](x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    VARIANTS[o.variant](x)
    return _status("VmHWM") - before


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--vocab", type=int, default=151936)
    p.add_argument("--student_hidden", type=int, default=896)
    p.add_argument("--teacher_hidden", type=int, default=1536)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--variants", default=",".join(LABELS))
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--variant", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> None:
    o = parse()
    if o.variant:
        print(json.dumps(measure_memory(o)))
        return
    names = o.variants.split(",")
    x = Inputs(o)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(o.rounds + 1):  # the first turn warms up
        for name in names:
            elapsed = _timed(VARIANTS[name], x)
            if turn:
                seconds[name].append(elapsed)
                print(f"round {turn} {name}: {elapsed:.2f} s", flush=True)
    del x
    gc.collect()
    o.results.parent.mkdir(parents=True, exist_ok=True)
    sizes = {key: getattr(o, key) for key in ("tokens", "vocab", "student_hidden", "teacher_hidden", "dtype", "device")}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with o.results.open("a") as file:
        for name in names:
            row = {
                "benchmark": "loss_cost",
                "run": stamp,
                "variant": name,
                **sizes,
                "seconds": seconds[name],
            }
            row["median_s"] = statistics.median(seconds[name])
            if not o.no_memory:
                command = [sys.executable, __file__, "--variant", name]
                for key, value in sizes.items():
                    command += [f"--{key}", str(value)]
                row["peak_extra_mib"] = round(float(subprocess.check_output(command, text=True)), 1)
            if "tsdkd" in seconds and name != "tsdkd":
                row["tsdkd_ratio"] = [a / b for a, b in zip(seconds["tsdkd"], seconds[name], strict=True)]
            file.write(json.dumps({**row, **provenance(o.seed)}) + "\n")
            spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
            ratio = row.get("tsdkd_ratio")
            shown = f", tsdkd/this {statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})" if ratio else ""
            print(
                f"{LABELS[name]}: {row['median_s']:.2f} s ({spread}), {row.get('peak_extra_mib', '-')} MiB{shown}", flush=True
            )


if __name__ == "__main__":
    main()
