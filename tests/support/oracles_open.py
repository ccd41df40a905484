"""The equations of AKL and TAID in plain Python, beside `oracles.py` and in its style.

Written from the equations and from reading the authors' public code, without reading the package and without copying
theirs. Double precision, lists of numbers, the text of the definition before speed.

Sources. AKL: Wu et al., arXiv 2404.02657; "released code" is AKL.py of github.com/wutaiqiang/LLM_KD_AKL at ff278be.
TAID: Shing et al., arXiv 2501.16937, its Algorithm 1; "released code" is src/distil_losses/taid.py of
github.com/SakanaAI/TAID at a062892. The papers' own text was not at hand: their equations are the brief's, checked against
other people's accounts of the papers and against the code. Where paper and code differ, the paper is followed and the
docstring says so.

Notation as in `oracles.py`: p_T and p_S are the softmax of one token's logits at temperature tau. Both logits have the
same length (`oracles.shared_vocabulary` cuts them). Student logits may be complex, the imaginary part carrying a
derivative; weights, heads and targets are computed from real parts only. No factor tau^2.
"""

import math
from collections.abc import Sequence

from oracles import (
    Number,
    _kl,
    _log_distributions,
    _real,
    _reals,
    _sigmoid,
    _sum,
    candidates,
    log_softmax,
    softmax,
)

# AKL -------------------------------------------------------------------------------------------------------------


def _teacher_masses(teacher_logits: Sequence[Number], temperature: float) -> tuple[list[int], list[float]]:
    """The ids, the most probable first (of equal ones the lower id), and the mass of each prefix of 1, 2, ..., V of them.

    The masses are exp(z_T / tau - max) summed from left to right: p_T before its division, so that equal logits give
    exact multiples and the last mass is the total.
    """
    teacher = _reals(teacher_logits)
    order = candidates(teacher, len(teacher))
    masses: list[float] = []
    for token in order:
        mass = math.exp((teacher[token] - teacher[order[0]]) / temperature)
        masses.append(mass + (masses[-1] if masses else 0.0))
    return order, masses


def akl_head(teacher_logits: Sequence[Number], temperature: float = 1.0, mu: float = 0.5) -> list[int]:
    """The shortest prefix of the ids, p_T falling, whose mass is at least mu: the token that crosses mu is in the head.

    That is the paper's head, the smallest set M with sum_{v in M} p_T(v) >= mu. In the released code the token that
    crosses mu is in the tail: its head is the longest prefix of mass at most mu, and always the first token. The two
    agree where a prefix has exactly mu, and where p_T(first) >= mu.
    """
    if not 0.0 < mu <= 1.0:
        raise ValueError("mu must be in (0, 1]")
    order, masses = _teacher_masses(teacher_logits, temperature)
    below = [mass for mass in masses if mass < mu * masses[-1]]
    return order[: len(below) + 1]


def akl_head_margin(teacher_logits: Sequence[Number], temperature: float = 1.0, mu: float = 0.5) -> float:
    """How far the nearest prefix mass is from mu: below the rounding of another implementation, its head may differ."""
    _, masses = _teacher_masses(teacher_logits, temperature)
    return min(abs(mass / masses[-1] - mu) for mass in masses)


def akl_weights(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    temperature: float = 1.0,
    mu: float = 0.5,
) -> tuple[float, float]:
    """(g_head, g_tail) / (g_head + g_tail), where g_A = sum_{v in A} |p_T(v) - p_S(v)|; no gradient, so real parts only.

    Both gaps 0: one half each (the released code divides 0 by 0). The released code detaches p_S here as well.
    """
    p_s = _reals(softmax(_reals(student_logits), temperature))
    p_t = _reals(softmax(_reals(teacher_logits), temperature))
    gaps = [abs(t - s) for t, s in zip(p_t, p_s, strict=True)]
    head = set(akl_head(teacher_logits, temperature, mu))
    g_head = _real(_sum([gap for token, gap in enumerate(gaps) if token in head]))
    g_tail = _real(_sum([gap for token, gap in enumerate(gaps) if token not in head]))
    total = g_head + g_tail
    return (g_head / total, g_tail / total) if total > 0.0 else (0.5, 0.5)


def akl(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    temperature: float = 1.0,
    mu: float = 0.5,
) -> Number:
    """w_head KL(p_T || p_S) + w_tail KL(p_S || p_T), the weights of `akl_weights` (2404.02657).

    Each divergence is over the whole vocabulary: head and tail make the weights only. The released code has no
    temperature (tau = 1), and averages over the trained tokens of the batch.
    """
    w_head, w_tail = akl_weights(student_logits, teacher_logits, temperature, mu)
    log_s, log_t = _log_distributions(student_logits, teacher_logits, temperature)
    return w_head * _kl(log_t, log_s) + w_tail * _kl(log_s, log_t)


# TAID ------------------------------------------------------------------------------------------------------------


def taid_target_logits(student_logits: Sequence[Number], teacher_logits: Sequence[Number], share: float) -> list[float]:
    """(1 - t) sg(z_S) + t z_T: logits are mixed, not probabilities (2501.16937). No gradient, so real parts only."""
    student, teacher = _reals(student_logits), _reals(teacher_logits)
    if len(student) != len(teacher):
        raise ValueError("student and teacher have different vocabularies")
    if share == 0.0 or share == 1.0:  # exactly one of them, also where the other's logit is -inf
        return teacher if share else student
    return [(1.0 - share) * z_s + share * z_t for z_s, z_t in zip(student, teacher, strict=True)]


def taid(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    share: float,
    temperature: float = 1.0,
) -> Number:
    """KL(p_t || p_S), p_t = softmax(((1 - t) sg(z_S) + t z_T) / tau) (2501.16937).

    The released code has no temperature (tau = 1) and returns the cross-entropy -sum_v p_t(v) log p_S(v), averaged over
    the trained tokens: the same gradient, but larger by the entropy of p_t.
    """
    log_target = log_softmax(taid_target_logits(student_logits, teacher_logits, share), temperature)
    return _kl(log_target, log_softmax(student_logits, temperature))


def taid_shares(
    losses: Sequence[float],
    total_steps: int,
    start: float = 0.4,
    end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
    *,
    rule: str = "paper",
) -> list[float]:
    """The share t of the optimizer steps 0, 1, ..., len(losses); losses[i] is the mean loss of step i, before its update.

    Rule "paper" (Algorithm 1, its n = 1..N being step n - 1 here): t_1 = start, m_0 = 0, J_0 = infinity, and after the
    loss J_n, taken with t_n,

        delta_n = (J_{n-1} - J_n) / (J_{n-1} + 1e-15),      m_n = beta m_{n-1} + (1 - beta) delta_n,
        t_{n+1} = min(end, max(start + (end - start) n / N, t_n + alpha sigmoid(m_n) (1 - t_n))).

    1 - t_n, not end - t_n. delta_1 is undefined, J_0 being infinite: the momentum stays 0 and there is no adaptive move,
    as in the released code; but t_2 still gets the linear floor of n = 1 (the text does not settle this).

    Rule "code" is the released code: the floor uses the number of optimizer steps completed when the loss is taken, so
    n - 1 in place of n, and after the first loss t does not change at all. So step i has the floor i / N by the paper and
    max(0, i - 1) / N by the code, and by neither is `end` reached by the floor while N steps last. (The released code
    does this per forward pass and process: also for every micro-batch and validation batch, and with the local loss,
    which is the cross-entropy. Here there is one loss a step.)
    """
    if rule not in ("paper", "code"):
        raise ValueError(f"unknown rule: {rule!r}")
    shares, momentum = [start], 0.0
    for n, loss in enumerate(losses, start=1):
        share, move = shares[-1], 0.0
        floor = start + (end - start) * (n if rule == "paper" else n - 1) / total_steps
        if n > 1:
            before = losses[n - 2]
            momentum = beta * momentum + (1.0 - beta) * (before - loss) / (before + 1e-15)
            move = alpha * _sigmoid(momentum) * (1.0 - share)
        shares.append(min(end, max(floor, share + move)))
    return shares
