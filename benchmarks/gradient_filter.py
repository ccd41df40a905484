"""What `gradient_filter` saves and costs, on rows with a language model's shape and on the demo's models.

The prior over ids is Zipf's (low ids are frequent, as in a BPE vocabulary), and each row has a sharpness of its own, so that
entropies run from about 0.1 to 4 nats. Errors are of the two gradients, relative, against the reference in float64.
`python benchmarks/gradient_filter.py` writes `benchmarks/results/gradient_filter.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tsdkd import TSDKD, Head, TokenBatch
from tsdkd.demo.problems import make_problems
from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "gradient_filter.jsonl"
METHOD = TSDKD()


def synthetic(tokens: int, vocab: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """Student and teacher hidden states and heads; the first feature carries the prior."""
    torch.manual_seed(0)
    prior = -torch.log(torch.arange(1, vocab + 1).float())
    weight = torch.randn(vocab, hidden) / hidden**0.5
    weight[:, 0] = prior
    sharpness = torch.logspace(0.0, 0.9, tokens).unsqueeze(1)[torch.randperm(tokens)]
    states = sharpness * torch.randn(tokens, hidden)
    states[:, 0] = 1.0
    other = states + 0.3 * sharpness * torch.randn(tokens, hidden)
    other[:, 0] = 1.0
    return states, weight, other, weight + 0.02 * torch.randn(vocab, hidden)


def demo() -> tuple[torch.Tensor, ...]:
    """The demo's student and teacher on worked solutions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdkd.demo.run import shipped

    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    ids = [tokenizer(p.question + p.solution)["input_ids"] for p in make_problems(32, 9, (2, 3))]
    found = []
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32).eval()
        with torch.no_grad():
            states = [model.model(torch.tensor([row])).last_hidden_state[0] for row in ids]
        found += [torch.cat(states), model.lm_head.weight.detach()]
    return tuple(found)


def run(
    states: tuple[torch.Tensor, ...], smallest: float, impl: str, dtype: torch.dtype
) -> tuple[float, list[torch.Tensor], dict]:
    h, w, ht, wt = (t.to(dtype) for t in states)
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    began = time.perf_counter()
    batch = TokenBatch(h, ht, (h.shape[0],))
    terms = METHOD.loss(batch, Head(w), Head(wt), impl=impl, gradient_filter=smallest)
    gradients = list(torch.autograd.grad(terms.loss, (h, w)))
    return time.perf_counter() - began, [g.double() for g in gradients], terms.sums


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=5)
    o = p.parse_args()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    RESULTS.parent.mkdir(exist_ok=True)
    for name, states in (("zipf", synthetic(512, 32768, 512)), ("demo", demo())):
        _, exact, sums = run(states, 0.0, "reference", torch.float64)
        entropy = float(sums["student/entropy"][0] / sums["student/entropy"][1])
        thresholds = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
        seconds: dict[float, list[float]] = {eps: [] for eps in thresholds}
        last = {}
        for turn in range(o.rounds + 1):
            for eps in thresholds:
                elapsed, *last[eps] = run(states, eps, "torch", torch.float32)
                if turn:
                    seconds[eps].append(elapsed)
        with RESULTS.open("a") as file:
            for eps in thresholds:
                gradients, logged = last[eps]
                skipped, columns = logged.get("gradient_filter/skipped", (torch.tensor(0.0), torch.tensor(1.0)))
                errors = [((g - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)]
                row = {
                    "benchmark": "gradient_filter",
                    "run": stamp,
                    "rows": name,
                    "tokens": states[0].shape[0],
                    "vocab": states[1].shape[0],
                    "entropy": round(entropy, 3),
                    "gradient_filter": eps,
                    "seconds": seconds[eps],
                    "ratio": [a / b for a, b in zip(seconds[eps], seconds[0.0], strict=True)],
                    "skipped": float(skipped / columns),
                    "error_hidden": errors[0],
                    "error_weight": errors[1],
                }
                file.write(json.dumps({**row, **provenance(0)}) + "\n")
                print(
                    f"{name}, eps {eps:g}: ratio {statistics.median(row['ratio']):.2f}, "
                    f"skipped {row['skipped']:.2f}, errors {errors[0]:.1e} (hidden) {errors[1]:.1e} (weight)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
