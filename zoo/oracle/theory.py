"""What theory predicts of a kernel."""

from __future__ import annotations

import math

from zoo.oracle.bench import ETA


def scale_of(kernel: str, k: int, t: float, s: float) -> float:
    """(c_1/c_k)^2 by THEORY.md, E2."""
    last = s + (t - s) / k
    return {
        "cps": 1.0,
        "dance": float(k),
        "flow_sde": (k - 1) / last if t == 1 else k * t * (1 - last) / ((1 - t) * last),
    }[kernel]


def weight_sum(kernel: str, k: int, t: float, s: float) -> float:
    """sum_j w_j by THEORY.md, E5, with c_k^2 from the kernel's definition. At k = 1 it is b_1."""
    D, last, h = t - s, s + (t - s) / k, ETA * math.pi / 2
    if kernel == "cps":
        return -(1 - s) * t + s * math.cos(h) * (1 - t)
    g2 = ETA**2 * (1 if kernel == "dance" else last / (1 - (last if last < 1 else s)))
    return -D - (1 - t) * g2 * (D / k) / (2 * last)
