"""What a test saw, and its verdict: exact, statistical, or an order of convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

FALSE_ALARM = 1e-6  # of a whole report, shared out equally (Bonferroni) over
STATISTICS = 400  # the most statistical rows a report may hold: 66 for each k, and 21
Z = -NormalDist().inv_cdf(FALSE_ALARM / STATISTICS / 2)  # two-sided: 6.0 standard errors
EXACT, ORDER, BROKEN, UNCLEAR = "EXACT", "FIRST ORDER", "BROKEN", "INCONCLUSIVE"


class Finding(NamedTuple):
    """What a test saw. `basis` says where the tolerance comes from."""

    verdict: str
    measured: float
    predicted: float | None
    tolerance: float
    basis: str
    n: int = 1


def exact(error: Tensor | float, tolerance: float, basis: str) -> Finding:
    """Is an error (absolute or relative, >= 0) within its rounding? EXACT or BROKEN."""
    error = float(torch.as_tensor(error).detach())
    verdict = UNCLEAR if math.isnan(error) else EXACT if error <= tolerance else BROKEN
    return Finding(verdict, error, 0.0, tolerance, basis)


def statistic(mean: Tensor | float, predicted: float, se: float, effect: float, n: int) -> Finding:
    """Does a sample mean agree with its prediction? `effect` is the size the test must be able to see.

    BROKEN beyond Z standard errors; within, EXACT if an effect of that size would have stood out by 2 Z, else
    INCONCLUSIVE.
    """
    mean = float(mean)
    z = (mean - predicted) / se
    verdict = (
        UNCLEAR
        if math.isnan(z)
        else BROKEN
        if abs(z) > Z
        else EXACT
        if 2 * Z * se <= effect
        else UNCLEAR
    )
    return Finding(
        verdict, mean, predicted, Z * se, f"z = {z:+.1f} of {Z:.1f}; n sees {2 * Z * se:.1e}", n
    )


def joint(draws: Tensor, wanted: Tensor, effect: float) -> Finding:
    """As `statistic` for a vector: draws [n, 4] against wanted [4], by Hotelling's T^2, which is chi^2 with 4 degrees.

    Measured is the relative error of the mean; z is the two-sided normal deviate of the same probability.
    """
    n, mean = len(draws), draws.mean(0)
    miss, spread = mean - wanted, torch.cov(draws.T) / n
    x = (miss @ torch.linalg.solve(spread, miss)).item()
    z = -NormalDist().inv_cdf(
        max(math.exp(-x / 2) * (1 + x / 2) / 2, 1e-300)
    )  # P(chi^2_4 > x) = e^(-x/2) (1 + x/2)
    seen = 2 * Z * (torch.linalg.eigvalsh(spread)[-1].sqrt() / wanted.norm()).item()
    verdict = (
        UNCLEAR if math.isnan(x) else BROKEN if z > Z else EXACT if seen <= effect else UNCLEAR
    )
    error = (miss.norm() / wanted.norm()).item()
    return Finding(verdict, error, 0.0, seen / 2, f"z = {z:.1f} of {Z:.1f}; n sees {seen:.1e}", n)


def order(
    sizes: Sequence[float], errors: Sequence[float], predicted: float, margin: float = 0.1
) -> Finding:
    """Does the error vanish as size^predicted? Slope on log axes between the extremes; its interval, neighbours'."""
    if not all(0 < e < math.inf for e in errors):
        return Finding(
            UNCLEAR, math.nan, predicted, margin, "an error is zero or not finite", len(errors)
        )
    points = [(math.log(h), math.log(e)) for h, e in zip(sizes, errors, strict=True)]
    slopes = [(f - e) / (h - g) for (g, e), (h, f) in pairwise(points)]
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    clear = (
        max(slopes) - min(slopes) <= 2 * margin
    )  # the next term of the expansion is small by now
    verdict = UNCLEAR if not clear else ORDER if abs(slope - predicted) <= margin else BROKEN
    basis = f"slopes {min(slopes):.2f} to {max(slopes):.2f} over {sizes[0]:.0e}..{sizes[-1]:.0e}"
    return Finding(verdict, slope, predicted, margin, basis, len(points))


def largest(*errors: Tensor) -> Tensor:
    """The largest absolute entry of all; NaN if any is (Python's max would lose it)."""
    return torch.stack([e.detach().abs().max().double() for e in errors]).max()


@dataclass(frozen=True)
class Row:
    """One line of the report. `registered` is the verdict that the theory predicts."""

    claim: str
    what: str
    kernel: str
    k: int | None
    rollouts: str
    form: str
    fixture: str
    verdict: str
    registered: str
    measured: float
    predicted: float | None
    tolerance: float
    basis: str
    n: int
    seed: int
    seconds: float = 0.0
