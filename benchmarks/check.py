"""Has anything become slower? The quick benchmarks side by side with the peer, against the rows of `results/check.jsonl`.

`python benchmarks/check.py` says of each ratio whether it moved by more than its spread (exit status 1 where one grew);
`--baseline` appends this run's rows, which later runs are held against. Ratios of another machine are shown and not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import loss_cost
import step_cost
from turns import interleaved, ratios

from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "check.jsonl"
# Name, ours, the peer, and the sizes of the loss; the trainer's step has its own.
LOSSES = {
    "loss / TRL's JSD": ("tsdkd", "trl_jsd"),
    "loss / naive on full logits": ("tsdkd", "naive"),
    "loss, frozen head / naive on full logits": ("tsdkd_frozen", "naive"),
    "ranking alone / all terms": ("tsdkd_ranking", "tsdkd"),
}
STEP = "trainer's step / TRL's"
RUNS = 3  # baselines that are taken together: from run to run ratios move by more than within one


def losses(o: argparse.Namespace) -> dict[str, list[float]]:
    """The ratios of the loss's variants."""
    sizes = {"student_hidden": 256, "teacher_hidden": 512, "dtype": "float32", "device": o.device, "seed": o.seed}
    x = loss_cost.Inputs(argparse.Namespace(tokens=o.tokens, vocab=o.vocab, **sizes))
    names = {name for pair in LOSSES.values() for name in pair}
    runs = {name: (lambda name=name: loss_cost._timed(loss_cost.VARIANTS[name], x)) for name in sorted(names)}
    seconds = interleaved(runs, o.rounds)
    return {label: ratios(seconds[ours], seconds[peer]) for label, (ours, peer) in LOSSES.items()}


def steps(o: argparse.Namespace) -> list[float]:
    """The ratio of the trainers' steps."""
    sizes = {"student_hidden": 128, "teacher_hidden": 256, "batch": 8, "accumulation": 2, "completion": 96, "rows": 16}
    asked = argparse.Namespace(
        vocab=o.vocab // 4, log_mean=3.5, log_std=0.5, device=o.device, seed=o.seed, rounds=o.rounds, **sizes
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # what trainers print
        made = {name: step_cost.build(name, asked, f"{folder}/{name}")[0] for name in ("tsdkd", "trl")}
        seconds = interleaved({name: (lambda step=step: step()[0]) for name, step in made.items()}, o.rounds)
    return ratios(seconds["tsdkd"], seconds["trl"])


def _middle(values: Sequence[float]) -> float:
    """How far the middle half of some values reaches; of few, all."""
    if len(values) < 4:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def verdict(ratios: Sequence[float], before: Sequence[float] | None) -> str:
    """`slower` or `faster` where the medians differ by more than the spread, the larger of both runs' middle halves, and by
    more than a twentieth; else `as before`.

    Example:
        >>> verdict([0.5, 0.6, 0.55], [0.3, 0.31, 0.32]), verdict([0.33, 0.3, 0.31], [0.3, 0.31, 0.32]), verdict([1.0], None)
        ('slower', 'as before', 'no baseline')
    """
    if not before:
        return "no baseline"
    moved = statistics.median(ratios) - statistics.median(before)
    if abs(moved) <= max(_middle(ratios), _middle(before), 0.05 * statistics.median(before)):
        return "as before"
    return "slower" if moved > 0 else "faster"


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--baseline", action="store_true", help="keep this run's rows")
    o = p.parse_args(arguments)
    origin = provenance(o.seed)
    # How threads wait for each other changes small operations by half: a baseline of another way is none.
    waits = os.environ.get("OMP_WAIT_POLICY")
    sizes = {"tokens": o.tokens, "vocab": o.vocab, "device": o.device, "omp_wait_policy": waits}
    found = [json.loads(line) for line in o.results.read_text().splitlines()] if o.results.is_file() else []
    alike = [row for row in found if all(row.get(name) == value for name, value in sizes.items())]
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows, slower = [], False
    for name, measured in [*losses(o).items(), (STEP, steps(o))]:
        rows.append({"benchmark": "check", "run": stamp, "name": name, **sizes, "ratio": measured, **origin})
        own = [row for row in reversed(alike) if row["name"] == name]
        ours = [row for row in own if row["hardware"] == origin["hardware"]][:RUNS]
        before = (ours or own or [None])[0]
        here = bool(ours)
        known = [ratio for row in ours or own[:1] for ratio in row["ratio"]]
        told = verdict(measured, known if here else None)
        slower |= told == "slower"
        shown = f"{statistics.median(measured):.3f} ({min(measured):.3f}-{max(measured):.3f})"
        then = "" if before is None else f"; {statistics.median(known):.3f} at {before['commit']}"
        other = "" if here or before is None else f", on {before['hardware']}: not judged here"
        print(f"{name:<42} {shown}{then}{other}: {told}", flush=True)
    if o.baseline:
        o.results.parent.mkdir(parents=True, exist_ok=True)
        with o.results.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        print(f"These are the baseline now: {o.results.name}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
