"""How the fused loss grows with tokens and with the vocabulary: times, and a plot with lines of exact proportion.

`python benchmarks/loss_scaling.py` writes `loss_scaling.jsonl` and `loss_scaling.png` in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from loss_cost import Inputs, _timed, tsdkd

from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TOKENS, VOCABS = (128, 256, 512, 1024, 2048), (9496, 18992, 37984, 75968, 151936)


def plot(measured: dict[tuple[int, int], list[float]], title: str) -> None:
    """Both panels, from seconds by (tokens, vocabulary)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    panels = (("tokens", [(n, measured[n, 37984]) for n in TOKENS]), ("vocabulary", [(v, measured[512, v]) for v in VOCABS]))
    for axis, (label, points) in zip(axes, panels, strict=True):
        xs, medians = [x for x, _ in points], [statistics.median(s) for _, s in points]
        errors = [
            [m - min(s) for m, (_, s) in zip(medians, points, strict=True)],
            [max(s) - m for m, (_, s) in zip(medians, points, strict=True)],
        ]
        axis.errorbar(xs, medians, yerr=errors, marker="o", capsize=3, label="measured (median, min-max)")
        axis.plot(xs, [medians[-1] * x / xs[-1] for x in xs], linestyle="--", color="0.5", label="in proportion")
        axis.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        axis.set_xticks(xs, [str(x) for x in xs])
        ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if 0.5 * min(medians) < t < 2 * max(medians)]
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_title(f"{'37 984 ids' if label == 'tokens' else '512 tokens'}, {title}")
        axis.legend(loc="upper left")
    figure.savefig(RESULTS / "loss_scaling.png", dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    o = p.parse_args()
    sizes = [(n, 37984) for n in TOKENS] + [(512, v) for v in VOCABS]
    measured: dict[tuple[int, int], list[float]] = {}
    for n, v in sizes:
        x = Inputs(
            argparse.Namespace(
                tokens=n, vocab=v, student_hidden=896, teacher_hidden=1536, dtype=o.dtype, device=o.device, seed=0
            )
        )
        measured[n, v] = [_timed(tsdkd, x) for _ in range(o.rounds + 1)][1:]
        print(f"tokens {n}, vocabulary {v}: {statistics.median(measured[n, v]):.3f} s", flush=True)
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with (RESULTS / "loss_scaling.jsonl").open("a") as file:
        for (n, v), seconds in measured.items():
            row = {"benchmark": "loss_scaling", "run": stamp, "tokens": n, "vocab": v, "dtype": o.dtype, "device": o.device}
            file.write(json.dumps({**row, "seconds": seconds, **provenance(0)}) + "\n")

    plot(measured, f"{torch.get_num_threads()} threads, {o.dtype}")


if __name__ == "__main__":
    main()
