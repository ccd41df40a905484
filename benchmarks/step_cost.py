"""What a trainer's step costs, generation excluded: `TSDKDTrainer` (all three terms) beside TRL's `DistillationTrainer`.

The same injected rollouts, lengths log-normal and cut at the maximum as real ones are; both trainers in one process,
interleaved, step by step. Rows with provenance go to `benchmarks/results/step_cost.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "step_cost.jsonl"


def model(layers: int, hidden: int, vocab: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            max_position_embeddings=1024,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def rollouts(o: argparse.Namespace) -> dict[int, list[int]]:
    """A completion for each row, by the row's place in the unshuffled step."""
    generator = torch.Generator().manual_seed(o.seed)
    lengths = torch.empty(o.rows).log_normal_(o.log_mean, o.log_std, generator=generator).round().clamp(1, o.completion)
    return {row: torch.randint(5, 60, (int(n),), generator=generator).tolist() for row, n in enumerate(lengths)}


class Clock(TrainerCallback):
    """Seconds of every optimizer step; the injected rollouts cost none."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)


def build(name: str, o: argparse.Namespace, folder: str) -> tuple[Callable[[], list[float]], object]:
    written = rollouts(o)
    common = dict(
        output_dir=folder,
        per_device_train_batch_size=o.batch,
        gradient_accumulation_steps=o.accumulation,
        max_steps=1,
        max_completion_length=o.completion,
        bf16=False,
        use_cpu=o.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        learning_rate=0.0,
        shuffle_dataset=False,
    )
    clock = Clock()
    data = Dataset.from_dict({"prompt": [f"Tom has {100 + row} apples." * 2 for row in range(o.rows)]})
    shared = dict(train_dataset=data, processing_class=make_tokenizer(), callbacks=[clock])
    student, teacher = model(4, o.student_hidden, o.vocab, 1), model(8, o.teacher_hidden, o.vocab, 2)
    if name == "tsdkd":
        config = TSDKDConfig(max_length=o.completion + 64, **common)
        trainer = TSDKDTrainer(model=student, teacher_model=teacher, args=config, **shared)
    else:
        config = DistillationConfig(beta=0.9, **common)
        trainer = DistillationTrainer(model=student, teacher_model=teacher, args=config, **shared)

    def write(prompt_ids, *args, **kwargs):
        return [written[row] for row in range(len(prompt_ids))]

    setattr(trainer, "write" if name == "tsdkd" else "_generate_single_turn", write)

    def step() -> list[float]:
        clock.seconds.clear()
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.train()
        return list(clock.seconds)

    return step, trainer


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--student_hidden", type=int, default=256)
    p.add_argument("--teacher_hidden", type=int, default=512)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--accumulation", type=int, default=4)
    p.add_argument("--completion", type=int, default=256)
    p.add_argument("--log_mean", type=float, default=4.4, help="of the completion lengths (e^4.4 is 81 tokens)")
    p.add_argument("--log_std", type=float, default=0.8)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path, default=RESULTS)
    return p.parse_args()


def main() -> None:
    o = parse()
    o.rows = o.batch * o.accumulation
    lengths = [len(v) for v in rollouts(o).values()]
    print(f"{o.rows} rollouts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    with tempfile.TemporaryDirectory() as folder:
        made = {name: build(name, o, f"{folder}/{name}") for name in ("tsdkd", "trl")}
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(o.rounds + 1):  # the first warms up
            for name, (step, _) in made.items():
                (elapsed,) = step()
                if turn:
                    seconds[name].append(elapsed)
                    print(f"round {turn} {name}: {elapsed:.2f} s", flush=True)
        last = [row for row in made["tsdkd"][1].state.log_history if "time/loss" in row][-1]
    ratios = [a / b for a, b in zip(seconds["tsdkd"], seconds["trl"], strict=True)]
    parts = {key: round(value, 3) for key, value in last.items() if key.startswith("time/")}
    sizes = {key: value for key, value in vars(o).items() if key not in ("results", "seed")}
    o.results.parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with o.results.open("a") as file:
        row = {"benchmark": "step_cost", "run": stamp, **sizes, "tokens": sum(lengths), "seconds": seconds, "ratio": ratios}
        file.write(json.dumps({**row, "parts": parts, **provenance(o.seed)}) + "\n")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})")
    print(f"tsdkd / TRL: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}); tsdkd's parts: {parts}")


if __name__ == "__main__":
    main()
