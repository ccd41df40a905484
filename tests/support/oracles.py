"""The equations of TSD-KD and of its closest rivals in plain Python, written from the equations alone.

This file shares no code with the package and was written without reading it: it imports nothing but the standard
library, works in double precision on lists of numbers, and prefers the text of the definition to speed. The tests
compare the package with it.

Notation: z_S, z_T are the student's and the teacher's logits of one token (lists of length V), tau the temperature,
p_S = softmax(z_S / tau), p_T = softmax(z_T / tau), H entropy in nats, L the number of trained tokens of a response.

Gradients come from complex steps (`gradient`): the student's numbers may be complex, the imaginary part carrying the
derivative. Therefore every decision (sorting, comparing, maxima taken for stability) looks at real parts only, and
whatever must not receive a gradient (the teacher, the gate, every selection) is computed from real parts only.
"""

import cmath
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Number = float | complex
Token = tuple[Sequence[Number], Sequence[Number]]  # (student_logits, teacher_logits)


# Arithmetic on floats and complex numbers ------------------------------------------------------------------------


def _exp(x: Number) -> Number:
    """exp(x), staying a float where x is one."""
    return cmath.exp(x) if isinstance(x, complex) else math.exp(x)


def _log(x: Number) -> Number:
    """log(x), staying a float where x is one."""
    return cmath.log(x) if isinstance(x, complex) else math.log(x)


def _real(x: Number) -> float:
    """The value without its derivative."""
    return float(x.real)


def _reals(values: Sequence[Number]) -> list[float]:
    """The values without their derivatives."""
    return [_real(value) for value in values]


def _sum(values: Sequence[Number]) -> Number:
    """The sum from left to right; 0.0 of nothing."""
    return sum(values, 0.0)


def _log_sum_exp(values: Sequence[Number]) -> Number:
    """log sum_i exp(x_i), shifted by the largest real part so that nothing overflows."""
    largest = max(_reals(values))
    return largest + _log(_sum([_exp(value - largest) for value in values]))


def gradient(f: Callable[[list[Number]], Number], x: Sequence[float], step: float = 1e-30) -> list[float]:
    """df/dx_i = Im f(x + i h e_i) / h: exact to rounding, for there is no difference that could cancel."""
    result = []
    for position in range(len(x)):
        shifted: list[Number] = list(x)
        shifted[position] = complex(x[position], step)
        result.append(f(shifted).imag / step)
    return result


# Distributions of one token --------------------------------------------------------------------------------------


def log_softmax(logits: Sequence[Number], temperature: float = 1.0) -> list[Number]:
    """log p(v) = z_v / tau - log sum_u exp(z_u / tau)."""
    scaled = [logit / temperature for logit in logits]
    normaliser = _log_sum_exp(scaled)
    return [value - normaliser for value in scaled]


def softmax(logits: Sequence[Number], temperature: float = 1.0) -> list[Number]:
    """p(v) = exp(z_v / tau) / sum_u exp(z_u / tau)."""
    return [_exp(value) for value in log_softmax(logits, temperature)]


def entropy(logits: Sequence[Number], temperature: float = 1.0) -> Number:
    """H = - sum_v p(v) log p(v), in nats (Eq. 10); 0 log 0 = 0."""
    return -_expectation(log_softmax(logits, temperature), log_softmax(logits, temperature))


def _expectation(log_p: Sequence[Number], values: Sequence[Number]) -> Number:
    """sum_v p(v) values(v), where an impossible token (p = 0) counts nothing."""
    pairs = [(_exp(lp), value) for lp, value in zip(log_p, values, strict=True)]
    return _sum([p * value for p, value in pairs if _real(p) > 0.0])


# Divergences of one token ----------------------------------------------------------------------------------------


def _kl(log_p: Sequence[Number], log_q: Sequence[Number]) -> Number:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v))."""
    return _expectation(log_p, [lp - lq for lp, lq in zip(log_p, log_q, strict=True)])


def _log_mixture(weight: float, log_p: Sequence[Number], log_q: Sequence[Number]) -> list[Number]:
    """log(weight p + (1 - weight) q), token by token."""
    if weight == 0.0:
        return list(log_q)
    if weight == 1.0:
        return list(log_p)
    return [_log_sum_exp([math.log(weight) + lp, math.log(1.0 - weight) + lq]) for lp, lq in zip(log_p, log_q, strict=True)]


def _log_distributions(
    student: Sequence[Number], teacher: Sequence[Number], temperature: float
) -> tuple[list[Number], list[Number]]:
    """log p_S (with its derivative) and log p_T (without: the teacher never receives a gradient)."""
    return log_softmax(student, temperature), log_softmax(_reals(teacher), temperature)


def forward_kl(student: Sequence[Number], teacher: Sequence[Number], temperature: float = 1.0) -> Number:
    """KL(p_T || p_S)."""
    log_s, log_t = _log_distributions(student, teacher, temperature)
    return _kl(log_t, log_s)


def reverse_kl(student: Sequence[Number], teacher: Sequence[Number], temperature: float = 1.0) -> Number:
    """KL(p_S || p_T)."""
    log_s, log_t = _log_distributions(student, teacher, temperature)
    return _kl(log_s, log_t)


def generalized_jsd(
    student: Sequence[Number],
    teacher: Sequence[Number],
    beta: float,
    temperature: float = 1.0,
) -> Number:
    """JSD_beta(p_T || p_S) = beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.

    At beta = 0 exactly it is KL(p_T || p_S), at beta = 1 exactly KL(p_S || p_T); no factor tau^2 (Eq. 1, 2).
    """
    if beta == 0.0:
        return forward_kl(student, teacher, temperature)
    if beta == 1.0:
        return reverse_kl(student, teacher, temperature)
    log_s, log_t = _log_distributions(student, teacher, temperature)
    log_m = _log_mixture(beta, log_t, log_s)
    return beta * _kl(log_t, log_m) + (1.0 - beta) * _kl(log_s, log_m)


def skew_forward_kl(
    student: Sequence[Number],
    teacher: Sequence[Number],
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Number:
    """KL(p_T || alpha p_T + (1 - alpha) p_S), DistiLLM."""
    log_s, log_t = _log_distributions(student, teacher, temperature)
    return _kl(log_t, _log_mixture(alpha, log_t, log_s))


def skew_reverse_kl(
    student: Sequence[Number],
    teacher: Sequence[Number],
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Number:
    """KL(p_S || (1 - alpha) p_T + alpha p_S), DistiLLM."""
    log_s, log_t = _log_distributions(student, teacher, temperature)
    return _kl(log_s, _log_mixture(alpha, log_s, log_t))


# Indirect distillation: the teacher ranks the student's candidates -----------------------------------------------


def candidates(student_logits: Sequence[Number], k: int) -> list[int]:
    """The ids of the student's k highest logits, best first; of equal logits the lower id is earlier."""
    ids = sorted(
        range(len(student_logits)),
        key=lambda token: (-_real(student_logits[token]), token),
    )
    return ids[:k]


def teacher_order(student_logits: Sequence[Number], teacher_logits: Sequence[Number], k: int) -> list[int]:
    """pi: the student's candidates, the teacher's favourite first; equal teacher logits keep the student's order."""
    proposed = candidates(student_logits, k)
    ranks = sorted(
        range(len(proposed)),
        key=lambda rank: (-_real(teacher_logits[proposed[rank]]), rank),
    )
    return [proposed[rank] for rank in ranks]


def plackett_luce_nll(scores_in_order: Sequence[Number], stage_weights: Sequence[float] | None = None) -> Number:
    """NLL = sum_{i=1..k} w_i (log sum_{j=i..k} exp(s_j) - s_i), Eq. 3-5; w_i = 1 without stage weights."""
    weights = [1.0] * len(scores_in_order) if stage_weights is None else stage_weights
    stages = [
        weight * (_log_sum_exp(scores_in_order[i:]) - scores_in_order[i])
        for i, weight in zip(range(len(scores_in_order)), weights, strict=True)
    ]
    return _sum(stages)


def _choice_process(scores: Sequence[Number], remaining: list[int]) -> Iterator[tuple[list[int], Number]]:
    """Every order in which `remaining` can be chosen one by one, with its probability.

    P(a first among R) = exp(s_a) / sum_{b in R} exp(s_b); then the same among R without a.
    """
    if not remaining:
        yield [], 1.0
        return
    chances = softmax([scores[item] for item in remaining])
    for item, chance in zip(remaining, chances, strict=True):
        others = [other for other in remaining if other != item]
        for order, probability in _choice_process(scores, others):
            yield [item, *order], chance * probability


def plackett_luce_nll_by_enumeration(scores_in_order: Sequence[Number]) -> Number:
    """-log P(item 1 is chosen first, then item 2, ...), from a list of all k! orders and their probabilities.

    It shows the direction without the formula: among all orders, the one by descending score is the most probable.
    """
    items = list(range(len(scores_in_order)))
    if len(items) > 8:
        raise ValueError("too many orders to enumerate")
    orders = list(_choice_process(scores_in_order, items))
    if len(orders) != math.factorial(len(items)):
        raise AssertionError("an order is missing or occurs twice")
    if abs(_sum([probability for _, probability in orders]) - 1.0) > 1e-12:
        raise AssertionError("the probabilities of all orders do not sum to one")
    best = sorted(items, key=lambda item: -_real(scores_in_order[item]))
    probability_of_best = max(_real(probability) for order, probability in orders if order == best)
    if any(_real(probability) > probability_of_best * (1.0 + 1e-12) for _, probability in orders):
        raise AssertionError("the order by descending score is not the most probable one")
    [given] = [probability for order, probability in orders if order == items]
    return -_log(given)


def teacher_mass_weights(teacher_logits_in_order: Sequence[Number]) -> list[float]:
    """w_i = sum_{j=i..k} q_j, q = softmax of the candidates' untempered teacher logits; no gradient."""
    chances = softmax(_reals(teacher_logits_in_order))
    return [_real(_sum(chances[i:])) for i in range(len(chances))]


def ranking_nll(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    k: int,
    stage_weights: str = "uniform",
) -> Number:
    """NLL_t of one token: Plackett-Luce on the student's untempered logits s_i of pi_i (Eq. 5).

    Stage weights: "uniform" (1) or "teacher_mass" (the teacher's probability of the candidates not yet placed).
    """
    order = teacher_order(student_logits, teacher_logits, k)
    scores = [student_logits[token] for token in order]
    if stage_weights == "uniform":
        return plackett_luce_nll(scores)
    if stage_weights == "teacher_mass":
        return plackett_luce_nll(scores, teacher_mass_weights([teacher_logits[token] for token in order]))
    raise ValueError(f"unknown stage weights: {stage_weights!r}")


def sub_response_reward(logits: Sequence[Sequence[Number]], tokens: Sequence[int]) -> Number:
    """r(y_{<=t}) = log p(y_{<=t} | x) = sum_{i<=t} log p(y_i | x, y_{<i}), Eq. 7; logits[i] are those that chose y_i."""
    return _sum([log_softmax(row)[token] for row, token in zip(logits, tokens, strict=True)])


def bradley_terry_nll(reward_preferred: Number, reward_other: Number) -> Number:
    """-log sigmoid(r_preferred - r_other), Eq. 9."""
    difference = reward_preferred - reward_other
    if _real(difference) >= 0.0:
        return _log(1.0 + _exp(-difference))
    return _log(1.0 + _exp(difference)) - difference


def kendall_tau(order_of_positions: Sequence[int]) -> float:
    """(concordant - discordant) / pairs: a pair i < j is concordant where its positions ascend, discordant where not.

    `order_of_positions` holds, in the one order, each item's position in the other. Fewer than two items have no pair.
    """
    length = len(order_of_positions)
    pairs = [(order_of_positions[i], order_of_positions[j]) for i in range(length) for j in range(i + 1, length)]
    if not pairs:
        raise ValueError("Kendall's tau needs at least two items")
    concordant = sum(first < second for first, second in pairs)
    discordant = sum(first > second for first, second in pairs)
    return (concordant - discordant) / len(pairs)


# Gate and selections ---------------------------------------------------------------------------------------------


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def gate(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    sharpness: float = 1.0,
    temperature: float = 1.0,
) -> float:
    """w_t = sg(sigmoid(gamma (H_S - H_T))), Eq. 11: no gradient, so real parts only."""
    gap = _real(entropy(_reals(student_logits), temperature)) - _real(entropy(_reals(teacher_logits), temperature))
    return _sigmoid(sharpness * gap)


def opener_length(entropies: Sequence[Number], share: float) -> int:
    """The smallest n with sum_{t<=n} H_S(t) >= c sum_{t<=L} H_S(t), at least 1; 0 where c = 0 or L = 0."""
    values = _reals(entropies)
    if share == 0.0 or not values:
        return 0
    cumulative = [values[0]]
    for value in values[1:]:
        cumulative.append(cumulative[-1] + value)
    below = [total for total in cumulative if total < share * cumulative[-1]]
    return min(len(values), 1 + len(below))


def top_entropy_count(length: int, fraction: float) -> int:
    """ceil(rho L), with a slack of 1e-9 for the rounding of the product; never more than L or less than 0."""
    return max(0, min(length, math.ceil(fraction * length - 1e-9)))


def top_entropy_indices(entropies: Sequence[Number], fraction: float) -> list[int]:
    """The positions of the ceil(rho L) highest entropies, ascending; of equal entropies the earlier token is taken."""
    ranked = sorted(
        range(len(entropies)),
        key=lambda position: (-_real(entropies[position]), position),
    )
    return sorted(ranked[: top_entropy_count(len(entropies), fraction)])


def shared_vocabulary(student_logits: Sequence[Number], teacher_logits: Sequence[Number]) -> Token:
    """Both logits cut to the first V = min(V_S, V_T) ids."""
    size = min(len(student_logits), len(teacher_logits))
    return list(student_logits[:size]), list(teacher_logits[:size])


# The whole loss --------------------------------------------------------------------------------------------------


def _ratio(total: Number, count: float) -> Number:
    """total / count, and 0 where nothing was counted."""
    return total / count if count else 0.0


def step_counts(lengths: Sequence[int], fraction: float) -> tuple[int, int, int]:
    """(tokens, selected tokens, responses) of responses of these lengths; an empty response is in no count."""
    selected = sum(top_entropy_count(length, fraction) for length in lengths)
    return sum(lengths), selected, sum(length > 0 for length in lengths)


def entropy_penalty(student_entropy: Number, teacher_entropy: float, target: str = "zero") -> Number:
    """Target "zero": H_S (Eq. 12). Target "teacher": max(0, H_S - H_T), with no gradient through H_T."""
    if target == "zero":
        return student_entropy
    if target == "teacher":
        gap = student_entropy - teacher_entropy
        return gap if _real(gap) > 0.0 else 0.0
    raise ValueError(f"unknown entropy target: {target!r}")


def _indirect_term(
    responses: Sequence[Sequence[Token]],
    lengths: Sequence[int],
    count: float,
    k: int,
    stage_weights: str,
) -> Number:
    """sum over responses of (1/n) sum_{t<=n} NLL_t, / number of responses; n the length of the opener."""
    means = []
    for response, length in zip(responses, lengths, strict=True):
        nlls = [ranking_nll(student, teacher, k, stage_weights) for student, teacher in response[:length]]
        means.append(_ratio(_sum(nlls), length))
    return _ratio(_sum(means), count)


def _direct_term(
    gates: Sequence[Sequence[float]],
    divergences: Sequence[Sequence[Number]],
    count: float,
) -> Number:
    """sum over tokens of w_t JSD_t / number of tokens."""
    products = [
        weight * divergence
        for row_of_gates, row in zip(gates, divergences, strict=True)
        for weight, divergence in zip(row_of_gates, row, strict=True)
    ]
    return _ratio(_sum(products), count)


def _entropy_term(
    student: Sequence[Sequence[Number]],
    teacher: Sequence[Sequence[float]],
    selected: Sequence[Sequence[int]],
    count: float,
    target: str,
) -> Number:
    """sum over the selected tokens of H_S(t), or of its excess over H_T(t), / number of selected tokens."""
    penalties = [
        entropy_penalty(row_s[position], row_t[position], target)
        for row_s, row_t, positions in zip(student, teacher, selected, strict=True)
        for position in positions
    ]
    return _ratio(_sum(penalties), count)


def tsd_kd(
    responses: Sequence[Sequence[Token]],
    *,
    indirect_weight: float = 0.1,
    direct_weight: float = 1.0,
    entropy_weight: float = 1.0,
    beta: float = 0.9,
    gate_on: bool = True,
    gate_sharpness: float = 1.0,
    num_candidates: int = 10,
    opener_entropy_share: float | Sequence[float] = 0.1,
    top_entropy_fraction: float = 0.1,
    temperature: float = 1.0,
    counts: tuple[float, float, float] | None = None,
    stage_weights: str = "uniform",
    entropy_target: str = "zero",
) -> dict[str, Any]:
    """alpha indirect + direct + entropy (Eq. 13) over responses, each a list of (student_logits, teacher_logits).

    indirect = sum_responses mean_{t in opener} NLL_t  / responses with L > 0
    direct   = sum_tokens w_t JSD_beta(t)              / tokens
    entropy  = sum_{t in top entropy} H_S(t)           / sum_responses ceil(rho L)

    The three divisors are those of `responses`, or `counts` = (tokens, selected, responses) of the whole step of which
    these are a part. `opener_entropy_share` is one number, or one for each response (adaptive opener). The returned
    terms are unweighted; a term whose weight is 0 is 0, and so is one whose share is 0. The selections, gates,
    divergences and entropies are returned for every token whatever the weights are.
    """
    rows = [[shared_vocabulary(student, teacher) for student, teacher in response] for response in responses]
    shares = opener_entropy_share
    if isinstance(shares, (int, float)):
        shares = [shares] * len(rows)

    student_entropy = [[entropy(student, temperature) for student, _ in row] for row in rows]
    teacher_entropy = [[_real(entropy(_reals(teacher), temperature)) for _, teacher in row] for row in rows]
    divergence = [[generalized_jsd(student, teacher, beta, temperature) for student, teacher in row] for row in rows]
    gates = [
        [gate(student, teacher, gate_sharpness, temperature) if gate_on else 1.0 for student, teacher in row] for row in rows
    ]
    openers = [opener_length(values, share) for values, share in zip(student_entropy, shares, strict=True)]
    selected = [top_entropy_indices(values, top_entropy_fraction) for values in student_entropy]

    own_counts = step_counts([len(row) for row in rows], top_entropy_fraction)
    tokens, selected_tokens, nonempty = own_counts if counts is None else counts
    indirect: Number = 0.0
    direct: Number = 0.0
    sharpening: Number = 0.0
    if indirect_weight != 0.0:
        indirect = _indirect_term(rows, openers, nonempty, num_candidates, stage_weights)
    if direct_weight != 0.0:
        direct = _direct_term(gates, divergence, tokens)
    if entropy_weight != 0.0:
        sharpening = _entropy_term(student_entropy, teacher_entropy, selected, selected_tokens, entropy_target)

    return {
        "loss": indirect_weight * indirect + direct_weight * direct + entropy_weight * sharpening,
        "indirect": indirect,
        "direct": direct,
        "entropy": sharpening,
        "opener": [[int(t < n) for t in range(len(row))] for row, n in zip(rows, openers, strict=True)],
        "top_entropy": [[int(t in chosen) for t in range(len(row))] for row, chosen in zip(rows, selected, strict=True)],
        "divergence": divergence,
        "gate": gates,
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
    }


# Adaptive opener (appendix A.7, Algorithm 2) ---------------------------------------------------------------------


def difficulty(student_entropies: Sequence[Number], teacher_entropies: Sequence[Number]) -> float:
    """d = mean_t H_S(t) - mean_t H_T(t) of a response with L > 0."""
    student, teacher = _reals(student_entropies), _reals(teacher_entropies)
    return sum(student) / len(student) - sum(teacher) / len(teacher)


def quantile(values: Sequence[float], level: float) -> float:
    """The quantile by linear interpolation: level (n - 1) counts places in the sorted values, from 0."""
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    lower = math.floor(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (place - lower) * (ordered[upper] - ordered[lower])


def smoothed_difficulty(history_raw: Sequence[float], value: float, earlier: int = 4) -> float:
    """The mean of d and the last 4 raw difficulties of the history, or of those there are."""
    recent = [*list(history_raw)[max(0, len(history_raw) - earlier) :], value]
    return sum(recent) / len(recent)


def adaptive_opener_shares(
    history_raw: Sequence[float],
    history_smoothed: Sequence[float],
    difficulties: Sequence[float],
    *,
    edges: Sequence[float] = (0.25, 0.5, 0.75),
    shares: Sequence[float] = (0.05, 0.10, 0.15, 0.20),
    fixed_share: float = 0.1,
    window: int = 256,
    minimum: int = 20,
    earlier: int = 4,
) -> tuple[list[float], list[float], list[float]]:
    """The shares c of one step's responses, and the two histories (raw, smoothed) after the step.

    The histories stay frozen through the step, so every response is smoothed with the same earlier values and compared
    with the same quantiles: c = shares[number of quantiles of the last 256 smoothed values that lie below its smoothed
    difficulty] (one equal to an edge belongs to the lower interval). Below 20 values it is the fixed share.
    `difficulties` are those of the responses with L > 0, in the order of the rollouts, and are appended in that order.
    The returned histories are not cut: only their ends are ever read.
    """
    smoothed = [smoothed_difficulty(history_raw, value, earlier) for value in difficulties]
    recent = list(history_smoothed)[-window:]
    if len(recent) < minimum:
        chosen = [fixed_share] * len(smoothed)
    else:
        limits = [quantile(recent, edge) for edge in edges]
        chosen = [shares[sum(limit < value for limit in limits)] for value in smoothed]
    return chosen, [*history_raw, *difficulties], [*history_smoothed, *smoothed]
