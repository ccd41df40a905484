"""Prompts, records and completions: what goes into training and how an answer is graded."""
