"""Prompts, completions, rows of JSONL, and how an answer is graded."""
