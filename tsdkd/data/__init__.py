"""Prompts, records and answers: what goes into training and how an answer is graded."""
