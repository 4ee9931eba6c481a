"""Paired intervals, Holm's correction and the jackknife, of a few seeds or blocks."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mpmath  # Student's distribution; sympy, which torch needs, brings it
import torch
from torch import Tensor


def student_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's t with df degrees of freedom, t >= 0."""
    if t * t < df:  # where the tail is nearly 1 its complement is exact
        return 1 - float(mpmath.betainc(0.5, df / 2, 0, t * t / (df + t * t), regularized=True))
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


@functools.cache
def student_quantile(level: float, df: int) -> float:
    """The t with P(|T| > t) = level, by bisection; 0 < level < 1."""
    low, high = 0.0, 1.0
    while student_tail(high, df) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if student_tail(middle, df) > level:
            low = middle
        else:
            high = middle
    return high


class Interval(NamedTuple):
    """A mean with its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float
    se: float  # standard error of the mean
    p: float  # two-sided, of mean 0; not corrected
    n: int

    @property
    def excludes_0(self) -> bool:
        """Whether 0 is outside, without correction for how many intervals there are."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """Of two independent values or more. Raises ValueError for fewer."""
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values: must be 2 or more to have an interval")
    return from_error(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n), n)


def from_error(mean: float, se: float, n: int) -> Interval:
    """Of a mean of n with this standard error."""
    half = student_quantile(0.05, n - 1) * se
    certain = 0.0 if mean else 1.0
    p = student_tail(abs(mean) / se, n - 1) if se else certain
    return Interval(mean, mean - half, mean + half, se, p, n)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for being several, by Holm's step-down, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def seeds_needed(found: Interval, power: float = 0.8) -> int | None:
    """Pairs that show a difference of the size seen at 5 % with this power; None if it is 0.

    The least n with n >= ((t_n + z) sd / mean)^2, z the normal quantile of the power. None also
    beyond a million.
    """
    if found.mean == 0:
        return None
    sd = found.se * math.sqrt(found.n)
    normal = statistics.NormalDist().inv_cdf
    z = normal(power)
    if abs(found.mean) < 0.003 * sd:
        return None
    n = max(2, math.ceil(((normal(0.975) + z) * sd / found.mean) ** 2))  # t_n is larger: a start
    while n < ((student_quantile(0.05, n - 1) + z) * sd / found.mean) ** 2:
        n += 1
    return n


def jackknife(n: int, of: Callable[[Tensor], float]) -> Interval | None:
    """A statistic of n blocks, by leaving out each in turn; None where one of them is not finite.

    of takes the numbers of the blocks that are kept. Raises ValueError for fewer than 3 blocks.
    """
    if n < 3:
        raise ValueError(f"{n} blocks: must be 3 or more for a jackknife of products of two")
    every = torch.arange(n)
    whole = of(every)
    without = [of(every[every != i]) for i in range(n)]
    if not all(map(math.isfinite, (whole, *without))):
        return None
    spread = sum((value - statistics.fmean(without)) ** 2 for value in without)
    return from_error(whole, math.sqrt((n - 1) / n * spread), n)
