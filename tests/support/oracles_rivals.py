"""The equations of the rival methods in plain Python, beside `oracles.py` and in its style.

Written from the equations alone, without reading the package. Double precision, lists of numbers, the text of the
definition before speed. Where a docstring says "released code", it means the authors' repository, not this one.

Notation as in `oracles.py`: a token is a pair (student_logits, teacher_logits), a response a list of tokens, possibly
empty (L = 0), p_T and p_S the next-token distributions at temperature tau, D a divergence of one token. V is the shared
vocabulary: both logits are cut to their first min(V_S, V_T) ids.

Student logits may be complex, the imaginary part carrying a derivative (`oracles.gradient`). Decisions look at real
parts only; the teacher, gates, selections, sampling distributions and everything recorded when the rollouts were made
are real.

A tiny autoregressive model is a table: it maps each prefix (a tuple of ids, `()` the empty one) to V logits. Its
numbers are flattened prefix by prefix, shorter prefixes first and those of one length in lexicographic order, and
within a prefix by token id (`table_prefixes`, `flatten_table`, `unflatten_table`).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from oracles import (
    Number,
    Token,
    _exp,
    _expectation,
    _log_mixture,
    _ratio,
    _real,
    _reals,
    _sum,
    candidates,
    forward_kl,
    generalized_jsd,
    gradient,
    log_softmax,
    opener_length,
    reverse_kl,
    shared_vocabulary,
    skew_forward_kl,
    skew_reverse_kl,
    softmax,
    top_entropy_count,
    top_entropy_indices,
)

Prefix = tuple[int, ...]
Table = Mapping[Prefix, Sequence[Number]]
Recorded = Mapping[str, float] | tuple[float, float, float]  # student, teacher and mixture log-probability of the token


# Divergences by name ---------------------------------------------------------------------------------------------


def divergence(
    name: str,
    parameter: float | None,
    student: Sequence[Number],
    teacher: Sequence[Number],
    temperature: float = 1.0,
) -> Number:
    """D of one token by its name; the two plain KLs ignore the parameter.

    forward_kl KL(p_T || p_S) (Hinton et al. 2015), reverse_kl KL(p_S || p_T) (MiniLLM, Gu et al. 2024), generalized_jsd
    with beta, whose ends 0 and 1 are those two KLs (GKD, Agarwal et al. 2024; TSD-KD Eq. 1, 2), and with alpha
    skew_forward_kl KL(p_T || alpha p_T + (1 - alpha) p_S) and skew_reverse_kl KL(p_S || (1 - alpha) p_T + alpha p_S)
    (DistiLLM, Ko et al. 2024).
    """
    if name == "forward_kl":
        return forward_kl(student, teacher, temperature)
    if name == "reverse_kl":
        return reverse_kl(student, teacher, temperature)
    if parameter is None:
        raise ValueError(f"{name!r} is unknown or needs a parameter")
    if name == "generalized_jsd":
        return generalized_jsd(student, teacher, parameter, temperature)
    if name == "skew_forward_kl":
        return skew_forward_kl(student, teacher, parameter, temperature)
    if name == "skew_reverse_kl":
        return skew_reverse_kl(student, teacher, parameter, temperature)
    raise ValueError(f"unknown divergence: {name!r}")


# Selections and gates --------------------------------------------------------------------------------------------


def _flags(length: int, chosen: Sequence[int]) -> list[bool]:
    """Membership of each position of 0..length-1 in `chosen`."""
    members = set(chosen)
    return [position in members for position in range(length)]


def select_prefix(length: int, share: float) -> list[bool]:
    """The first ceil(s L) tokens (IW-OPD 2606.22600, prefix OPD), in floats ceil(s L - 1e-9)."""
    return _flags(length, range(top_entropy_count(length, share)))


def select_opener(entropies: Sequence[Number], share: float) -> list[bool]:
    """The first n tokens, n the smallest with sum_{t<=n} H_S(t) >= c sum_{t<=L} H_S(t) (TSD-KD Section 3.1, Algorithm 1)."""
    return _flags(len(entropies), range(opener_length(entropies, share)))


def select_top_entropy(entropies: Sequence[Number], share: float) -> list[bool]:
    """The ceil(rho L) tokens of highest H_S, of equal ones the earlier (TSD-KD Eq. 12)."""
    return _flags(len(entropies), top_entropy_indices(entropies, share))


def select_entropy_or_divergence(
    entropies: Sequence[Number],
    divergences: Sequence[Number],
    entropy_share: float,
    divergence_share: float,
) -> list[bool]:
    """The union of the top rho_H by H_S and, among the rest, the top rho_D by D_t (`rivals.md`, TIP, hard rule).

    ceil(rho_H L) tokens by H_S; then min(ceil(rho_D L), what is left) tokens by D_t of those not yet taken; of equal
    ones the earlier. Both shares refer to L, so the union has min(L, ceil(rho_H L) + ceil(rho_D L)) tokens. TIP
    (2604.14084) names the two regions; its own rule is another one, the top floor(rho L) by one score (its Eq. 7, 8).
    """
    length = len(entropies)
    if len(divergences) != length:
        raise ValueError("one divergence for each entropy")
    uncertain = top_entropy_indices(entropies, entropy_share)
    rest = [position for position in range(length) if position not in uncertain]
    rest.sort(key=lambda position: (-_real(divergences[position]), position))
    return _flags(length, [*uncertain, *rest[: top_entropy_count(length, divergence_share)]])


def divergence_aware_gate(entropy_gap_weight: Number, divergence: Number) -> float:
    """1 - (1 - w_t) exp(-D_t), w_t the entropy-gap gate, D_t the unweighted divergence, no gradient (`rivals.md`, TIP).

    At D = 0 it is w_t; it grows with D towards 1; it is 1 - (1 - w)(1 - d) with d = 1 - exp(-D), a soft "or".
    """
    return 1.0 - (1.0 - _real(entropy_gap_weight)) * math.exp(-_real(divergence))


# The direct term and SeqKD ---------------------------------------------------------------------------------------


def direct_term(
    responses: Sequence[Sequence[Token]],
    name: str,
    parameter: float | None,
    temperature: float = 1.0,
    masks: Sequence[Sequence[bool]] | None = None,
    gates: Sequence[Sequence[float]] | None = None,
    per_response: bool = False,
    count: float | None = None,
) -> Number:
    """sum of gate D over the selected tokens / their number, or the mean over responses of each one's mean.

    GKD and supervised KD without masks and gates: sum over tokens of D / tokens (TRL's token mean). With masks: the two
    divisors of the last paragraph of `rivals.md`. Pooled: sum_{selected} gate_t D_t / number of selected tokens of all
    responses. `per_response`: for each response (1/n) sum_{selected} gate_t D_t, n its selected tokens, and their sum /
    number of responses with L > 0; one with L > 0 and nothing selected adds 0 and is counted. `count` replaces the
    divisor (tokens, selected tokens or responses of the whole step). No masks means all tokens selected, no gates 1.
    The divisors count tokens, never gates.
    """
    if masks is None:
        masks = [[True] * len(response) for response in responses]
    if gates is None:
        gates = [[1.0] * len(response) for response in responses]
    sums: list[Number] = []
    sizes: list[int] = []
    for response, mask, row_of_gates in zip(responses, masks, gates, strict=True):
        products = [
            _real(weight) * divergence(name, parameter, *shared_vocabulary(student, teacher), temperature)
            for (student, teacher), selected, weight in zip(response, mask, row_of_gates, strict=True)
            if selected
        ]
        sums.append(_sum(products))
        sizes.append(len(products))
    if per_response:
        divisor = sum(len(response) > 0 for response in responses) if count is None else count
        return _ratio(_sum([_ratio(total, size) for total, size in zip(sums, sizes, strict=True)]), divisor)
    return _ratio(_sum(sums), sum(sizes) if count is None else count)


def _token_log_prob(token: Token, token_id: int, temperature: float) -> Number:
    """log p_S(y) on the shared vocabulary; an id beyond it is refused."""
    student, _ = shared_vocabulary(*token)
    if not 0 <= token_id < len(student):
        raise ValueError(f"token id {token_id} is outside the shared vocabulary of {len(student)}")
    return log_softmax(student, temperature)[token_id]


def cross_entropy_term(
    responses: Sequence[Sequence[Token]],
    token_ids: Sequence[Sequence[int]],
    temperature: float = 1.0,
    count: float | None = None,
) -> Number:
    """-log p_S(y_t), summed over the tokens of answers that the teacher wrote / number of tokens (SeqKD, Kim & Rush 2016).

    It is KL(point mass at y_t || p_S). The teacher's logits serve for the size of the shared vocabulary only.
    """
    losses = [
        -_token_log_prob(token, token_id, temperature)
        for response, ids in zip(responses, token_ids, strict=True)
        for token, token_id in zip(response, ids, strict=True)
    ]
    return _ratio(_sum(losses), len(losses) if count is None else count)


# MiniLLM ---------------------------------------------------------------------------------------------------------


def rewards(student_log_probs: Sequence[Number], teacher_log_probs: Sequence[Number]) -> list[float]:
    """r_t = log p_T(y_t) - log p_S(y_t), from recorded numbers (MiniLLM 2306.08543)."""
    return [teacher - student for student, teacher in zip(_reals(student_log_probs), _reals(teacher_log_probs), strict=True)]


def mean_of_rest(rewards: Sequence[Number]) -> list[float]:
    """For each t the mean of r over the tokens after t, 0 at the last token (MiniLLM Eq. 6, length normalisation).

    The sum over t' = t+1..T has T - t terms and is divided by T - t; the paper's 1/(T - t - 1) would be infinite at
    t = T - 1.
    """
    values = _reals(rewards)
    return [_real(_ratio(_sum(values[t + 1 :]), len(values) - t - 1)) for t in range(len(values))]


def sum_of_rest(rewards: Sequence[Number]) -> list[float]:
    """R_{t+1}: for each t the sum of r over the tokens after t, 0 at the last token (MiniLLM without normalisation)."""
    values = _reals(rewards)
    return [_real(_sum(values[t + 1 :])) for t in range(len(values))]


def importance(student_log_prob: Number, mixture_log_prob: Number) -> float:
    """w_t = p_S(y_t) / (alpha p_T + (1 - alpha) p_S)(y_t), of this one step, from recorded numbers (MiniLLM Eq. 5)."""
    return math.exp(_real(student_log_prob) - _real(mixture_log_prob))


def clipped_surrogate(log_prob: Number, old_log_prob: Number, advantage: Number, clip: float) -> Number:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(log_prob - old_log_prob), A and the old number constant (PPO).

    At rho = 1 its gradient is -A grad log_prob; on the flat side (A > 0 and rho > 1 + eps, A < 0 and rho < 1 - eps) zero;
    exactly at an edge it is the inner one.
    """
    factor = _real(advantage)
    ratio = _exp(log_prob - _real(old_log_prob))
    limited: Number = ratio
    if _real(ratio) < 1.0 - clip:
        limited = 1.0 - clip
    elif _real(ratio) > 1.0 + clip:
        limited = 1.0 + clip
    plain, bounded = ratio * factor, limited * factor
    return -(plain if _real(plain) <= _real(bounded) else bounded)


def _recorded_numbers(entry: Recorded) -> tuple[float, float, float]:
    """(student, teacher, mixture) log-probability of the token when it was sampled."""
    if isinstance(entry, Mapping):
        entry = (entry["student_log_prob"], entry["teacher_log_prob"], entry["mixture_log_prob"])
    student, teacher, mixture = entry
    return _real(student), _real(teacher), _real(mixture)


def minillm(
    responses: Sequence[Sequence[Token]],
    token_ids: Sequence[Sequence[int]],
    recorded: Sequence[Sequence[Recorded]],
    clip: float = 0.2,
    temperature: float = 1.0,
    length_normalisation: bool = True,
    count: float | None = None,
) -> Number:
    """sum over tokens of [KL(p_S || p_T) + clipped surrogate] / number of tokens (MiniLLM Eq. 7 as in `rivals.md`).

    Its gradient, where nothing is clipped and the student is still the one that sampled, is that of the paper: single
    step, - grad sum_v p_S(v) log(p_T(v) / p_S(v)), exact over the vocabulary, plus long part,
    - w_t Rbar_{t+1} grad log p_S(y_t). Advantage of the surrogate: A_t = w_t Rbar_{t+1}, Rbar the mean of r over the
    remaining tokens, or with `length_normalisation` off their sum; old_log_prob: the recorded student's. All of r, w
    and old_log_prob come from `recorded[response][t]` = (student, teacher, mixture) log-probability of y_t, or a mapping
    with student_log_prob, teacher_log_prob, mixture_log_prob.

    Eq. 7 of the paper has w_t before both parts; here, as in `rivals.md` and the released code, before the long part
    alone. The expectation is the same: given the prefix, the single-step part is a constant and E[w_t] = 1.
    """
    single: list[Number] = []
    long: list[Number] = []
    for response, ids, row in zip(responses, token_ids, recorded, strict=True):
        numbers = [_recorded_numbers(entry) for entry in row]
        r = rewards([student for student, _, _ in numbers], [teacher for _, teacher, _ in numbers])
        rest = mean_of_rest(r) if length_normalisation else sum_of_rest(r)
        for token, token_id, (old, _, mixture), later in zip(response, ids, numbers, rest, strict=True):
            single.append(reverse_kl(*shared_vocabulary(*token), temperature))
            log_prob = _token_log_prob(token, token_id, temperature)
            long.append(clipped_surrogate(log_prob, old, importance(old, mixture) * later, clip))
    return _ratio(_sum([*single, *long]), len(single) if count is None else count)


# Tiny autoregressive models --------------------------------------------------------------------------------------


def table_prefixes(table: Table) -> list[Prefix]:
    """The prefixes in the order of flattening: shorter ones first, those of one length in lexicographic order."""
    return sorted(table, key=lambda prefix: (len(prefix), prefix))


def flatten_table(table: Table) -> list[Number]:
    """All logits in one list: prefix after prefix in the order of `table_prefixes`, in each by token id."""
    return [logit for prefix in table_prefixes(table) for logit in table[prefix]]


def unflatten_table(flat: Sequence[Number], table: Table) -> dict[Prefix, list[Number]]:
    """The table of the same prefixes and sizes as `table` that holds the logits of `flat`."""
    values = iter(flat)
    result = {prefix: [next(values) for _ in table[prefix]] for prefix in table_prefixes(table)}
    if next(values, None) is not None:
        raise ValueError("more numbers than the table has logits")
    return result


def _table_length(table: Table) -> int:
    """T of the longest sequences for which the table has every step: its longest prefix and one token."""
    return 1 + max(len(prefix) for prefix in table)


def _sequences(table: Table, length: int) -> Iterator[Prefix]:
    """All V^T sequences, in lexicographic order."""
    return itertools.product(range(len(table[()])), repeat=length)


def _sequence_log_prob(table: Table, sequence: Prefix) -> Number:
    """log p(y) = sum_t log p(y_t | y_{<t})."""
    return _sum([log_softmax(table[sequence[:t]])[token] for t, token in enumerate(sequence)])


def _real_table(table: Table) -> dict[Prefix, list[float]]:
    """The table without its derivative."""
    return {prefix: _reals(logits) for prefix, logits in table.items()}


def exact_sequence_reverse_kl(student_table: Table, teacher_table: Table, length: int | None = None) -> Number:
    """KL(P_S || P_T) = sum_y P_S(y) log(P_S(y) / P_T(y)) over all V^T sequences y: MiniLLM's objective (2306.08543).

    T is `length`, or one more than the longest prefix of the student's table. No end-of-text: every response has T tokens.
    """
    teacher = _real_table(teacher_table)
    sequences = list(_sequences(student_table, _table_length(student_table) if length is None else length))
    log_s = [_sequence_log_prob(student_table, sequence) for sequence in sequences]
    log_t = [_sequence_log_prob(teacher, sequence) for sequence in sequences]
    return _expectation(log_s, [s - t for s, t in zip(log_s, log_t, strict=True)])


def exact_sequence_reverse_kl_gradient(student_table: Table, teacher_table: Table, length: int | None = None) -> list[float]:
    """Its gradient with respect to the student's logits, by complex steps, in the order of `flatten_table`."""
    return gradient(
        lambda flat: exact_sequence_reverse_kl(unflatten_table(flat, student_table), teacher_table, length),
        _reals(flatten_table(student_table)),
    )


def expected_minillm_gradient(
    student_table: Table,
    teacher_table: Table,
    alpha: float,
    length: int,
    length_normalisation: bool = True,
) -> list[float]:
    """E_y of the SUM over tokens of MiniLLM's estimated gradient (its Eq. 4-7), y_t ~ alpha p_T + (1 - alpha) p_S at each t.

    sum_y Q(y) grad minillm(y, count=1): all V^T sequences of this length, Q the product of the step mixtures, r, w and
    old log-probabilities those of the tables, so that every ratio is 1 and nothing is clipped. The order of the
    derivatives is that of `flatten_table(student_table)`.

    It equals `exact_sequence_reverse_kl_gradient` for every pair of tables exactly in these cases (checked numerically):
    - length 1, any alpha (there is no long part, and the single-step part does not depend on the token);
    - alpha = 0 and length 2 (the rest is one token: its mean is its sum);
    - alpha = 0 and any length, with `length_normalisation` off.
    Otherwise the estimate is biased. Length >= 3: the mean in place of the sum gives early tokens too little of the
    future. alpha > 0 and length >= 2: w_t corrects for y_t alone, not for the prefix before it (in both parts) nor for
    the tokens after it, whose r enter R. At alpha = 1 the prefixes are the teacher's.
    """
    teacher = _real_table(teacher_table)
    old = _real_table(student_table)
    rollouts: list[tuple[Prefix, list[Recorded], float]] = []
    for sequence in _sequences(old, length):
        row: list[Recorded] = []
        log_chance = 0.0
        for t, token in enumerate(sequence):
            log_s, log_t = log_softmax(old[sequence[:t]]), log_softmax(teacher[sequence[:t]])
            log_mixture = _real(_log_mixture(alpha, log_t, log_s)[token])
            row.append((_real(log_s[token]), _real(log_t[token]), log_mixture))
            log_chance += log_mixture
        rollouts.append((sequence, row, math.exp(log_chance)))

    def expected_loss(flat: list[Number]) -> Number:
        student = unflatten_table(flat, old)
        losses = []
        for sequence, row, chance in rollouts:
            response = [(student[sequence[:t]], teacher[sequence[:t]]) for t in range(length)]
            loss = minillm([response], [sequence], [row], length_normalisation=length_normalisation, count=1)
            losses.append(chance * loss)
        return _sum(losses)

    return gradient(expected_loss, _reals(flatten_table(old)))


# Speculative KD and teacher-mixed sampling -----------------------------------------------------------------------


def speculative_step_distribution(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    top_k: int,
    temperature: float = 1.0,
) -> list[float]:
    """P(v) = [v in K] p_S(v) + (sum_{u not in K} p_S(u)) p_T(v), K the teacher's top K ids (Speculative KD 2410.11325).

    The student samples; a token outside the teacher's K highest logits (of equal ones the lower id is in first) is
    replaced by a sample of the teacher: of its FULL distribution, not of the top K renormalised. Algorithm 1 of the paper
    (its LaTeX text) has `y_i \\sim M_t(.|y_{<i},x_j)`, "We replace student token to teacher's resampled token"; so does
    the released code (a multinomial draw from the teacher's softmax after its sampling temperature and top-p, which are
    a setting of the sampler). So a replacement may itself lie outside K, and may be the very token that was rejected.
    K does not depend on tau; both models sample at tau. top_k = 0 is the teacher, top_k >= V the student.
    """
    student, teacher = shared_vocabulary(_reals(student_logits), _reals(teacher_logits))
    p_s, p_t = _reals(softmax(student, temperature)), _reals(softmax(teacher, temperature))
    accepted = set(candidates(teacher, top_k))
    rejected = _real(_sum([p for token, p in enumerate(p_s) if token not in accepted]))
    return [(p_s[token] if token in accepted else 0.0) + rejected * p_t[token] for token in range(len(p_s))]


def speculative_sequence_distribution(
    student_table: Table,
    teacher_table: Table,
    top_k: int,
    length: int,
    temperature: float = 1.0,
) -> dict[Prefix, float]:
    """P(y) = prod_t P(y_t | y_{<t}) of every sequence of this length, the step distribution at the sequence so far.

    "The sequence goes on from there": both models read the emitted prefix, replacements included (Speculative KD, 2410.11325).
    """
    result = {}
    for sequence in _sequences(student_table, length):
        steps = [
            speculative_step_distribution(student_table[sequence[:t]], teacher_table[sequence[:t]], top_k, temperature)[token]
            for t, token in enumerate(sequence)
        ]
        result[sequence] = math.prod(steps)
    return result


def mixed_step_distribution(
    student_logits: Sequence[Number],
    teacher_logits: Sequence[Number],
    alpha: float,
    temperature: float = 1.0,
) -> list[float]:
    """alpha p_T + (1 - alpha) p_S, MiniLLM's teacher-mixed sampling (Eq. 4); a mixture of probabilities, not of logits."""
    student, teacher = shared_vocabulary(_reals(student_logits), _reals(teacher_logits))
    pairs = zip(softmax(student, temperature), softmax(teacher, temperature), strict=True)
    return [_real(alpha * p_t + (1.0 - alpha) * p_s) for p_s, p_t in pairs]


# DistiLLM's adaptive off-policy schedule -------------------------------------------------------------------------


def source_of_batch(r: float, phi: float, s: float, buffer_full: bool) -> str:
    """Where a batch comes from, r ~ U(0, 1) drawn once for it (DistiLLM 2402.03898, adaptive off-policy, released code).

    "fresh" student answers if r < phi s, or if r < phi and the buffer is not yet full; else "buffer" if r < phi; else
    "dataset". All comparisons are strict, so phi = 0 is always the dataset.
    """
    if r < phi * s or (r < phi and not buffer_full):
        return "fresh"
    if r < phi:
        return "buffer"
    return "dataset"


def next_phi(phi: float, previous_loss: float, loss: float, epsilon: float = 0.1, step: float = 0.1) -> float:
    """min(1, phi + 0.1) if the validation loss is at least its previous value + epsilon, else phi (DistiLLM 2402.03898).

    Which loss is the previous one is the caller's: `rivals.md` has that of the last evaluation.
    """
    return min(1.0, phi + step) if loss >= previous_loss + epsilon else phi


def s_of(schedule: str, t: float, T: float) -> float:
    """The factor s(t) of fresh answers: "decreasing" 1 - t/T, "constant" 0.5, "increasing" t/T (DistiLLM 2402.03898)."""
    if schedule == "decreasing":
        return 1.0 - t / T
    if schedule == "constant":
        return 0.5
    if schedule == "increasing":
        return t / T
    raise ValueError(f"unknown schedule: {schedule!r}")
