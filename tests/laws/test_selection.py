"""The rules that select and weigh tokens, against the oracle and their laws."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd import selection
from tsdkd.types import TokenStatistics

entropies = st.lists(st.floats(0, 5, allow_subnormal=False), min_size=0, max_size=30)
shares = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 1.0])


def row(values, width=None):
    width = width or max(len(values), 1)
    padded = torch.full((1, width), float("nan"), dtype=torch.float64)
    padded[0, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return padded, torch.arange(width).unsqueeze(0) < len(values)


@given(entropies, shares)
def test_opener_equals_the_oracle(values, share):
    mask = selection.opener_mask(*row(values, 32), share)[0]
    length = oracles.opener_length(values, share)
    assert mask.tolist() == [i < length for i in range(32)]


@given(entropies, shares)
def test_top_entropy_equals_the_oracle(values, fraction):
    mask = selection.top_entropy_mask(*row(values, 32), fraction)[0]
    assert mask.nonzero().flatten().tolist() == oracles.top_entropy_indices(values, fraction)
    assert mask.sum() == selection.top_count(len(values), fraction)


@pytest.mark.parametrize("rule", [selection.opener_mask, selection.top_entropy_mask])
def test_a_batch_equals_its_rows_and_holes_change_nothing(rule):
    entropy = torch.rand(4, 20, dtype=torch.float64)
    lengths = [20, 7, 1, 0]
    mask = torch.arange(20) < torch.tensor(lengths).unsqueeze(1)
    whole = rule(entropy.masked_fill(~mask, float("nan")), mask, 0.3)
    for i, length in enumerate(lengths):
        alone = rule(entropy[i : i + 1, :length], mask[i : i + 1, :length], 0.3)
        assert whole[i, :length].tolist() == alone[0].tolist() and not whole[i, length:].any()
    # the same trained tokens with untrained ones between them
    spread, holes = torch.full((1, 40), 9.0, dtype=torch.float64), torch.zeros(1, 40, dtype=torch.bool)
    spread[0, ::2], holes[0, ::2] = entropy[0], True
    assert rule(spread, holes, 0.3)[0, ::2].tolist() == whole[0].tolist()
    assert not rule(spread, holes, 0.3)[0, 1::2].any()


def test_the_opener_holds_its_share_and_no_token_less_does():
    entropy = torch.rand(1, 50, dtype=torch.float64)
    mask = torch.ones(1, 50, dtype=torch.bool)
    for share in (0.1, 0.5, 0.9):
        n = int(selection.opener_mask(entropy, mask, share).sum())
        assert entropy[0, :n].sum() >= share * entropy.sum() > entropy[0, : n - 1].sum()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "a lot"])
def test_shares_outside_zero_one_are_refused(share):
    values, mask = row([1.0, 2.0])
    with pytest.raises(ValueError, match="opener_entropy_share"):
        selection.opener_mask(values, mask, share)
    with pytest.raises(ValueError, match="top_entropy_fraction"):
        selection.top_entropy_mask(values, mask, share)


def test_gate_equals_the_oracle_and_stops_the_gradient():
    student, teacher = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    s = torch.tensor(oracles.entropy(student.tolist()), dtype=torch.float64, requires_grad=True)
    t = torch.tensor(oracles.entropy(teacher.tolist()), dtype=torch.float64)
    weight = selection.entropy_gap_gate(s, t, 2.5)
    assert weight.item() == pytest.approx(oracles.gate(student.tolist(), teacher.tolist(), 2.5), abs=1e-12)
    assert not weight.requires_grad


def test_resolve_gate():
    assert selection.resolve_gate("none") is None
    assert selection.resolve_gate("entropy_gap", 2.0) == selection.EntropyGapGate(2.0)
    own = lambda statistics: statistics.student_entropy  # noqa: E731
    assert selection.resolve_gate(own) is own
    with pytest.raises(ValueError, match="gate='entropy' is unknown; choose one of: divergence_aware, entropy_gap, none"):
        selection.resolve_gate("entropy")
    with pytest.raises(ValueError, match="gate_sharpness=0"):
        selection.resolve_gate("entropy_gap", 0.0)


def test_rules_read_statistics():
    values, mask = row([1.0, 3.0, 3.0, 2.0])
    statistics = TokenStatistics(mask=mask, student_entropy=values, teacher_entropy=values)
    assert selection.Opener(0.4)(statistics).tolist() == selection.opener_mask(values, mask, 0.4).tolist()
    assert selection.TopEntropy(0.5)(statistics).tolist() == [[False, True, True, False]]
    assert selection.EntropyGapGate()(statistics).tolist() == [[0.5] * 4]


@given(st.lists(st.lists(st.floats(-3, 3), max_size=6), min_size=1, max_size=20))
def test_adaptive_opener_equals_the_oracle(steps):
    opener = selection.OpenerHistory(selection.AdaptiveOpener(window=16, warmup=5))
    raw, smoothed = [], []
    for difficulties in steps:
        expected, raw, smoothed = oracles.adaptive_opener_shares(raw, smoothed, difficulties, window=16, minimum=5)
        assert opener.shares_for(difficulties) == expected
        opener.append(difficulties)
        assert opener.smoothed == pytest.approx(smoothed[-16:])


def test_adaptive_opener_continues_from_its_state():
    first = selection.OpenerHistory(selection.AdaptiveOpener(warmup=2))
    first.append([0.1, 0.5, 0.2])
    second = selection.OpenerHistory(selection.AdaptiveOpener(warmup=2))
    second.load_state_dict(first.state_dict())
    assert second.shares_for([0.0, 0.3, 9.0]) == first.shares_for([0.0, 0.3, 9.0]) == [0.10, 0.15, 0.20]


def test_adaptive_opener_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 quantile edges make 3 intervals but 1 shares"):
        selection.AdaptiveOpener(edges=(0.2, 0.4), shares=(0.1,))
    with pytest.raises(ValueError, match="must rise"):
        selection.AdaptiveOpener(edges=(0.5, 0.5), shares=(0.1, 0.1, 0.1))
