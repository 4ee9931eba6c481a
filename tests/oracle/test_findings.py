"""Verdicts at their edges: just inside and just outside, on both sides, and no number at all."""

import math

import pytest
import torch

from zoo.oracle import findings
from zoo.oracle.claims import about, near, status_of
from zoo.oracle.findings import CONVERGES, HOLDS, INCONCLUSIVE, REFUTED, Z

JUST = 1e-9  # relative


def test_the_registered_rates():
    """One false alarm in a million reports, shared by 600 rows: six standard errors."""
    assert (findings.FALSE_ALARM, findings.STATISTICS) == (1e-6, 600)
    assert math.erfc(Z / 2**0.5) == pytest.approx(1e-6 / 600, rel=1e-9)
    assert 6.02 < Z < 6.03


@pytest.mark.parametrize("tolerance", [0.0, 1e-12, 0.5])
def test_an_exact_claim_ends_at_its_tolerance(tolerance):
    """Equal holds, above does not, NaN is neither, infinity does not."""
    above = math.nextafter(tolerance, 1)
    for error, verdict in ((tolerance, HOLDS), (above, REFUTED), (math.inf, REFUTED)):
        found = findings.exact(error, tolerance)
        assert (found.verdict, found.difference, found.tolerance) == (verdict, error, tolerance)
    assert findings.exact(torch.tensor(math.nan), tolerance).verdict == INCONCLUSIVE


@pytest.mark.parametrize("side", [1, -1])
def test_a_statistic_ends_at_z_standard_errors_on_both_sides(side):
    """And holds only where a miss of its effect, 2 Z standard errors, would have been seen."""
    se, effect = 0.25, 2 * Z * 0.25
    for z, verdict in ((Z * (1 - JUST), HOLDS), (Z * (1 + JUST), REFUTED)):
        found = findings.statistic(2.0 + side * z * se, 2.0, se, effect * (1 + JUST), 7)
        assert found.verdict == verdict and found.z == pytest.approx(side * z)
        assert found.tolerance == pytest.approx(Z * se) and found.n == 7
    assert findings.statistic(2.0, 2.0, se, effect * (1 - JUST), 7).verdict == INCONCLUSIVE
    # What is refuted is so whatever it could not have seen.
    assert findings.statistic(2.0 + side, 2.0, se / 100, 1e-9, 7).verdict == REFUTED


def pattern(miss, spread, n=800):
    """Draws [n, 4] of mean 1 + miss in every coordinate, whose mean has covariance spread^2 I."""
    scale = spread * math.sqrt(4 * (n - 1))  # n/8 draws at +-scale on each axis
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double() * scale
    return axes.repeat(n // 8, 1) + 1 + miss


def tail(x):
    """P(T^2 > x) for chi^2 with 4 degrees of freedom, by the incomplete gamma function."""
    return torch.special.gammaincc(torch.tensor(2.0).double(), torch.tensor(x / 2).double()).item()


def threshold():
    """The T^2 whose tail is the two-sided one of Z, by bisection."""
    low, high = 1.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > math.erfc(Z / 2**0.5) else (low, middle)
    return low


@pytest.mark.parametrize("side", [1, -1])
def test_a_joint_statistic_ends_at_the_same_probability(side):
    """Four coordinates off by the same: T^2 = 4 miss^2/spread^2 against chi^2's tail."""
    wanted, spread, edge = torch.ones(4).double(), 0.01, threshold()
    assert 46 < edge < 50
    for T2, verdict in ((edge * (1 - 1e-6), HOLDS), (edge * (1 + 1e-6), REFUTED)):
        miss = side * spread * math.sqrt(T2 / 4)
        found = findings.joint(pattern(miss, spread), wanted, effect=1.0)
        assert found.verdict == verdict and found.n == 800
        assert math.erfc(found.z / 2**0.5) == pytest.approx(tail(T2), rel=1e-6)
        assert found.difference == pytest.approx(abs(miss), rel=1e-9)  # over |wanted|, as |miss|
    assert findings.joint(pattern(0.5, spread), wanted, effect=1.0).verdict == REFUTED


def test_a_joint_statistic_must_have_seen_its_effect():
    """A relative miss of 2 Z standard errors of the widest direction, and no less."""
    wanted, spread = torch.ones(4).double(), 0.01
    seen = 2 * Z * spread / 2  # |wanted| is 2
    assert findings.joint(pattern(0, spread), wanted, seen * (1 + 1e-6)).verdict == HOLDS
    unseen = findings.joint(pattern(0, spread), wanted, seen * (1 - 1e-6))
    assert unseen.verdict == INCONCLUSIVE and unseen.tolerance == pytest.approx(seen / 2)
    wide = pattern(0, spread) * torch.tensor([1.0, 1.0, 1.0, 3.0]) - torch.tensor([0, 0, 0, 2.0])
    assert findings.joint(wide, wanted, 3 * seen * (1 - 1e-6)).verdict == INCONCLUSIVE
    assert findings.joint(wide, wanted, 3 * seen * (1 + 1e-6)).verdict == HOLDS


def test_what_is_no_number_decides_nothing():
    """NaN neither confirms nor refutes, least of all what is registered as refuted."""
    assert findings.statistic(math.nan, 1.0, 0.01, 0.5, 100).verdict == INCONCLUSIVE
    wanted = torch.ones(4).double()
    assert findings.joint(pattern(math.nan, 0.01), wanted, 1.0).verdict == INCONCLUSIVE


SIZES = (1e-2, 1e-3, 1e-4, 1e-5)


@pytest.mark.parametrize("off", [0.1, -0.1])
def test_an_order_ends_at_its_margin(off):
    """A power off by a tenth, on either side; the slope is measured from end to end."""
    for share, verdict in ((1 - 1e-6, CONVERGES), (1 + 1e-6, REFUTED)):
        found = findings.order(SIZES, [3 * h ** (1.5 + share * off) for h in SIZES], 1.5)
        assert found.verdict == verdict and found.measured == pytest.approx(1.5 + share * off)
        assert (found.tolerance, found.n) == (0.1, 4)


def test_an_order_must_be_clear():
    """Slopes between neighbours may differ by twice the margin; errors must be numbers above 0."""
    for share, verdict in ((1 - 1e-6, CONVERGES), (1 + 1e-6, INCONCLUSIVE)):
        slopes = (1 - 0.1 * share, 1 + 0.1 * share, 1.0)  # between sizes ten times apart
        errors = [10.0 ** -sum(slopes[:i]) for i in range(4)]
        assert findings.order(SIZES, errors, 1.0).verdict == verdict
    for wrong in (0.0, math.inf, math.nan, -1e-3):
        assert findings.order(SIZES, [1.0, 0.1, 0.01, wrong], 1.0).verdict == INCONCLUSIVE


def test_the_largest_is_of_all_and_of_either_sign():
    """An error that is lost in a maximum would be a claim that holds."""
    assert findings.largest(torch.tensor([1.0, -3.0]), torch.tensor(2.0)) == 3
    assert findings.largest(torch.tensor(2.0), torch.tensor([[1.0], [-4.0]])) == 4
    assert findings.largest(torch.tensor(0.0), torch.tensor(math.nan)).isnan()


def test_sizes_that_are_registered():
    """Theory's size to a millionth, or to an absolute error."""
    assert about(2.0) == pytest.approx((2 - 2e-6, 2 + 2e-6), abs=1e-15)
    assert about(2.0, 0.5) == (1.0, 3.0) and near(2.0, 0.25) == (1.75, 2.25)


class Row:
    """As much of a row as decides a status."""

    def __init__(self, verdict, as_registered):
        self.verdict, self.as_registered = verdict, as_registered


GOOD, REFUTES = Row(HOLDS, True), Row(REFUTED, True)
WRONG, WRONG_SIZE, UNCLEAR = Row(REFUTED, False), Row(CONVERGES, False), Row(INCONCLUSIVE, False)
STATUS = [
    ([], 0),
    ([GOOD, REFUTES], 0),
    ([WRONG], 1),
    ([GOOD, WRONG_SIZE], 1),
    ([UNCLEAR], 3),
    ([GOOD, UNCLEAR, GOOD], 3),
    ([UNCLEAR, WRONG], 1),
    ([WRONG, UNCLEAR], 1),
    ([Row(HOLDS, False), GOOD], 1),
]


@pytest.mark.parametrize(("rows", "status"), STATUS)
def test_one_wrong_row_fails_a_report(rows, status):
    """Wherever it stands, and before what is inconclusive."""
    assert status_of(rows) == status
