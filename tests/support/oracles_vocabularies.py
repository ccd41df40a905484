"""Distances between two vocabularies, as sums over lists."""

from __future__ import annotations

import math


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def by_sorting(student, teacher):
    """Σ |the i-th largest of each|, by hand."""
    ours, theirs = (sorted(softmax(logits), reverse=True) for logits in (student, teacher))
    longest = max(len(ours), len(theirs))
    ours, theirs = (row + [0.0] * (longest - len(row)) for row in (ours, theirs))
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def by_matching(student, teacher, pairs, beta, matched, unmatched):
    """The JSD over shared tokens, and the sorted distance of the others, by hand."""
    s, t = softmax(student), softmax(teacher)
    total = 0.0
    for i, j in pairs:
        if beta == 0.0:
            total += t[j] * math.log(t[j] / s[i]) - t[j] + s[i]
        elif beta == 1.0:
            total += s[i] * math.log(s[i] / t[j]) - s[i] + t[j]
        else:
            m = beta * t[j] + (1 - beta) * s[i]
            total += beta * t[j] * math.log(t[j] / m) + (1 - beta) * s[i] * math.log(s[i] / m)
    ours = sorted((p for i, p in enumerate(s) if i not in {i for i, _ in pairs}), reverse=True)
    theirs = sorted((p for j, p in enumerate(t) if j not in {j for _, j in pairs}), reverse=True)
    lone = 0.0
    if ours or theirs:
        longest = max(len(ours), len(theirs))
        ours, theirs = (row + [0.0] * (longest - len(row)) for row in (ours, theirs))
        lone = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return matched * total + unmatched * lone
