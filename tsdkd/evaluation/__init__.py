"""Benchmarks by lm-evaluation-harness: the paper's ten and anybody's own, as rows that say where they come from."""
