"""Teachers that read prompts of their own: rows, what a model holds behind a prompt, and what a teacher was asked."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny import QUESTIONS

# Hints of very different lengths; the last leaves little of a context of 128.
HINTS = ["1", "12+34=46", "2+3=5\n" * 3, "7", "10+20=30\n" * 2, "9", "8*2=16", "5+5=10\n" * 8]
SOLVED = Dataset.from_dict(
    {
        "prompt": QUESTIONS[:8],
        "hint": HINTS,
        "teacher_prompt": [q + h for q, h in zip(QUESTIONS, HINTS, strict=False)],
    }
)
HINTED = SOLVED.remove_columns("teacher_prompt")
ASKED = SOLVED.remove_columns("hint")


def hidden_by_hand(model, prompt, completion):
    """Row by row, without padding: what a model holds where it predicts each token of a completion."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    return states[len(prompt) - 1 : -1]


def seen(trainer):
    """What the trainer's teacher is asked for and gives."""
    found, hidden = [], trainer.teacher.hidden

    def watched(rollouts, lengths):
        states = hidden(rollouts, lengths)
        found.extend(zip(rollouts.prompt_ids, rollouts.completion_ids, states, strict=True))
        return states

    trainer.teacher.hidden = watched
    return found


def with_column(data, values):
    return data.remove_columns("teacher_prompt").add_column("teacher_prompt", values)
