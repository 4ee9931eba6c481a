"""Intervals, corrections and the jackknife against closed forms and printed tables."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.study import inference


@given(t=st.floats(0.0, 50.0))
def test_tails_are_those_in_closed_form(t):
    """1 - (2/pi) arctan t with one degree of freedom, 1 - t/sqrt(2 + t^2) with two."""
    assert inference.student_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-13)
    assert inference.student_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-13)


@pytest.mark.parametrize(
    ("level", "df", "printed"),
    [(0.05, 1, 12.706), (0.05, 7, 2.365), (0.025, 11, 2.593), (0.05, 15, 2.131), (0.5, 3, 0.765)],
)
def test_quantiles_are_those_of_printed_tables(level, df, printed):
    """To the digits that tables have."""
    assert inference.student_quantile(level, df) == pytest.approx(printed, abs=6e-4)


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t of two degrees of freedom 4.3027."""
    found = inference.interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.se == pytest.approx(1 / math.sqrt(3))
    assert found.high - 2 == pytest.approx(2 - found.low) == pytest.approx(4.302653 / math.sqrt(3))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert not found.excludes_0 and inference.interval([2.0, 2.1, 2.2]).excludes_0
    assert inference.interval([-2.0, -2.1]).excludes_0
    with pytest.raises(ValueError, match="1 values: must be 2 or more"):
        inference.interval([1.0])


def test_equal_values_leave_no_doubt():
    """No spread: the interval is a point, p is 0, or 1 where the point is 0."""
    assert inference.interval([0.5, 0.5])[:5] == (0.5, 0.5, 0.5, 0.0, 0.0)
    assert inference.interval([0.0, 0.0]).p == 1


def test_holm_by_hand():
    """4, 3, 2 and 1 times the sorted p, never falling, never above 1; in the order given."""
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert inference.holm([0.9, 0.8]) == [1.0, 1.0]


@given(mean=st.floats(0.01, 1.0), se=st.floats(0.001, 0.1), n=st.integers(3, 20))
def test_seeds_needed_are_the_least_that_do(mean, se, n):
    """z = 0.8416 for a power of 80 %: so many satisfy the formula, one fewer does not."""
    needed = inference.seeds_needed(inference.from_error(-mean, se, n))
    sd = se * math.sqrt(n)

    def enough(m):
        t = inference.student_quantile(0.05, m - 1)
        return m >= ((t + 0.8416212) * sd / mean) ** 2 * (1 - 1e-9)

    assert needed >= 2 and enough(needed) and (needed == 2 or not enough(needed - 1))
    assert inference.seeds_needed(inference.from_error(0.0, se, n)) is None


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """Exact for a mean; of a square, which is biased, the error is what the delta method says."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    plain = inference.interval(values.tolist())
    found = inference.jackknife(40, lambda kept: values[kept].mean().item())
    assert found == pytest.approx(plain)
    squared = inference.jackknife(40, lambda kept: values[kept].mean().item() ** 2)
    assert squared.se == pytest.approx(2 * plain.mean * plain.se, rel=0.02)


def test_the_jackknife_says_where_there_is_nothing_to_say():
    """None for what is not finite, a line for too few blocks."""
    assert inference.jackknife(3, lambda kept: math.nan if 1 in kept else 1.0) is None
    with pytest.raises(ValueError, match="2 blocks: must be 3 or more"):
        inference.jackknife(2, len)
