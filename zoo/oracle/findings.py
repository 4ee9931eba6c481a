"""What one measurement found, and its verdict.

HOLDS          both sides agree to the tolerance, which is derived: rounding, or Z standard errors
CONVERGES      they agree in the limit of small steps; the error vanishes with the power expected
REFUTED        they differ by more than the tolerance
INCONCLUSIVE   it could not have told: too few samples for the effect, no clear slope, no number
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

HOLDS, CONVERGES, REFUTED, INCONCLUSIVE = "HOLDS", "CONVERGES", "REFUTED", "INCONCLUSIVE"
FALSE_ALARM = 1e-6  # of a whole report, shared out equally (Bonferroni) over
STATISTICS = 600  # the most statistical rows: 25 for a kernel and k, 9 more for a kernel
Z = -NormalDist().inv_cdf(FALSE_ALARM / STATISTICS / 2)  # two-sided: 6.0 standard errors


class Finding(NamedTuple):
    """A verdict and the numbers it rests on."""

    verdict: str
    measured: float
    predicted: float
    tolerance: float  # of measured - predicted
    n: int = 1
    z: float | None = None  # (measured - predicted) / standard error, where there is one

    @property
    def difference(self) -> float:
        return abs(self.measured - self.predicted)


def exact(error: Tensor | float, tolerance: float) -> Finding:
    """Is an error (absolute or relative, >= 0) within its rounding? HOLDS or REFUTED."""
    error = error.item() if isinstance(error, Tensor) else error
    verdict = HOLDS if error <= tolerance else REFUTED
    return Finding(INCONCLUSIVE if math.isnan(error) else verdict, error, 0.0, tolerance)


def judged(z: float, seen: float, effect: float) -> str:
    """REFUTED beyond Z; HOLDS if a miss of size `seen` would have stood out, and effect >= seen."""
    if math.isnan(z):
        return INCONCLUSIVE
    if abs(z) > Z:
        return REFUTED
    return HOLDS if seen <= effect else INCONCLUSIVE


def statistic(mean: Tensor | float, predicted: float, se: float, effect: float, n: int) -> Finding:
    """Does a sample mean agree with its prediction? It must be able to see a miss of size `effect`.

    A miss of 2 Z standard errors is seen: it is refuted unless the sample errs by Z the other way.
    """
    mean = float(mean)
    z = (mean - predicted) / se
    return Finding(judged(z, 2 * Z * se, effect), mean, predicted, Z * se, n, z)


def joint(draws: Tensor, wanted: Tensor, effect: float) -> Finding:
    """As `statistic` for a vector: draws [n, 4] against wanted [4]; errors relative to |wanted|.

    Hotelling's T^2 of the mean is chi^2 with 4 degrees, P(T^2 > x) = e^(-x/2) (1 + x/2). z is the
    two-sided normal deviate of the same probability.
    """
    n, miss = len(draws), draws.mean(0) - wanted
    if not miss.isfinite().all():
        return Finding(INCONCLUSIVE, math.nan, 0.0, math.nan, n, math.nan)
    spread = torch.cov(draws.T) / n
    x = (miss @ torch.linalg.solve(spread, miss)).item()
    p = math.exp(-x / 2) * (1 + x / 2)
    z = -NormalDist().inv_cdf(max(p / 2, 1e-300))
    widest = (torch.linalg.eigvalsh(spread)[-1].sqrt() / wanted.norm()).item()
    error = (miss.norm() / wanted.norm()).item()
    return Finding(judged(z, 2 * Z * widest, effect), error, 0.0, Z * widest, n, z)


def direction_of(draws: Tensor, wanted: Tensor) -> Finding:
    """Is the direction of a sample mean that of a vector? Draws [n, m]; the error is an angle's."""
    mean = draws.mean(0)
    spread = torch.cov(draws.T) / len(draws)
    widest = (torch.linalg.eigvalsh(spread)[-1].sqrt() / mean.norm()).item()
    error = (mean / mean.norm() - wanted / wanted.norm()).norm().item()
    verdict = HOLDS if error <= Z * widest else REFUTED
    return Finding(
        INCONCLUSIVE if math.isnan(error) else verdict, error, 0.0, Z * widest, len(draws)
    )


def order(
    sizes: Sequence[float], errors: Sequence[float], predicted: float, margin: float = 0.1
) -> Finding:
    """Does the error vanish as size^predicted? Measured is the slope on log axes, end to end.

    It is clear if the slopes between neighbours agree: the expansion's next term is small by now.
    """
    if not all(0 < e < math.inf for e in errors):
        return Finding(INCONCLUSIVE, math.nan, predicted, margin, len(errors))
    points = [(math.log(h), math.log(e)) for h, e in zip(sizes, errors, strict=True)]
    slopes = [(f - e) / (h - g) for (g, e), (h, f) in pairwise(points)]
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    clear = max(slopes) - min(slopes) <= 2 * margin
    verdict = CONVERGES if abs(slope - predicted) <= margin else REFUTED
    return Finding(verdict if clear else INCONCLUSIVE, slope, predicted, margin, len(errors))


def largest(*errors: Tensor) -> Tensor:
    """The largest absolute entry of all; NaN if any is (Python's max would lose it)."""
    return torch.stack([e.detach().abs().max().double() for e in errors]).max()
