"""The paper's ten benchmarks (TSD-KD, A.10) as tasks of lm-evaluation-harness 0.4.13, and what the paper leaves open."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Args:
        name: as the paper's tables call it.
        task: its task or group in the harness.
        shots: worked examples before each item (A.10).
        metric: the main metric, by the harness's name.
        filter: what takes the answer out of a response, by the harness's name; `none` where choices are scored.
        max_new_tokens: the longest response; None where choices are scored.
        left_open: what A.10 does not say, and what is taken here.
        runs_code: whether scoring runs what the model wrote.
    """

    name: str
    task: str
    shots: int
    metric: str
    filter: str
    max_new_tokens: int | None
    left_open: str
    runs_code: bool = False


PAPER = (
    Benchmark("GSM8K", "gsm8k", 5, "exact_match", "strict-match", 256, "strict (after ####) or flexible match: strict is main"),
    Benchmark(
        "GSM-Plus",
        "gsm_plus",
        5,
        "exact_match",
        "strict-match",
        256,
        "where the examples come from: the harness takes them from the test split; strict is main",
    ),
    Benchmark("MATH", "minerva_math", 4, "exact_match", "none", 256, "exact match or math_verify: exact match is main"),
    Benchmark("MMLU-Pro-Math", "mmlu_pro_math", 5, "exact_match", "custom-extract", 2048, "nothing"),
    Benchmark("MMLU-STEM", "mmlu_stem", 5, "acc", "none", None, "scored choices or written answers: choices"),
    Benchmark("SciQ", "sciq", 0, "acc", "none", None, "acc or acc_norm, with or without the supporting text: acc, with"),
    Benchmark(
        "MBPP",
        "mbpp",
        0,
        "pass_at_1",
        "none",
        256,
        "the problems: test split; the prompt: fenced answers fail, not so in `mbpp_instruct`",
        True,
    ),
    Benchmark("BBH", "bbh_cot_fewshot", 3, "exact_match", "get-answer", 1024, "chain of thought or direct: chain of thought"),
    Benchmark("MuSR", "leaderboard_musr", 0, "acc_norm", "none", None, "scored choices or written answers: choices, acc_norm"),
    Benchmark(
        "IFEval", "ifeval", 0, "prompt_level_strict_acc", "none", 1280, "which of four accuracies: per prompt, strict, is main"
    ),
)
BY_TASK = {benchmark.task: benchmark for benchmark in PAPER}


def suite_table() -> str:
    """The suite as Markdown."""
    lines = [
        "| benchmark (paper) | task | shots | main metric | filter | longest response | A.10 leaves open |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in PAPER:
        longest = "choices are scored" if b.max_new_tokens is None else f"{b.max_new_tokens} tokens"
        lines.append(f"| {b.name} | `{b.task}` | {b.shots} | `{b.metric}` | `{b.filter}` | {longest} | {b.left_open} |")
    return "\n".join(lines)
