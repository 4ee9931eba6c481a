"""What theory predicts of each kernel: one record per kernel, free of pave_grpo's coefficients.

A kernel is its coefficients (pave_grpo.KERNELS) and a record beside them, a class of this file.
`register` puts both in their place, and every claim of verify_equivalence.py then tests the kernel.
A kernel without a record is refused by name.

Notation: D = t - s; x1_hat = x + (1-t) v is the noise that a velocity predicts, x0_hat = x - t v
the data; t' = s + D/k is where the last of k sub-steps begins; w_j is the weight of the j-th
velocity in mu^(k), so that sum w_j = b_1 for k = 1. Times are floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

import pave_grpo as pave

Number = Any  # a float or a tensor: what steps are made of


def last_start(k: int, t: float, s: float) -> float:
    """t', where the last of k sub-steps of t -> s begins; exactly t for k = 1."""
    return t if k == 1 else s + (t - s) / k


class Theory:
    """The predictions for one kernel at one eta. E2, E4, ... are the claims that test them."""

    straight: ClassVar[bool]  # E4: on straight flows every p^(k) is p^(1)
    biased: ClassVar[bool]  # E6: (mu^(k) - mu^(1)) / c_k^2 does not vanish with D
    gap_order: ClassVar[float]  # E6: |mu^(k) - mu^(1)|/c_1 falls as D to this power
    law_order: ClassVar[float]  # E11: the variance of samples converges as D to this power

    @property
    def start_order(self) -> float:
        """E11: the same where sampling starts at t = 1."""
        return self.law_order

    def __init__(self, eta: float):
        self.eta = eta

    def step(self, x: Number, v: Number, t: float, s: float) -> tuple[Number, float]:
        """Mean and std of the step t -> s in the form that defines the kernel."""
        raise NotImplementedError

    def scale(self, k: int, t: float, s: float) -> float:
        """(c_1/c_k)^2 (E2)."""
        raise NotImplementedError

    def weight_sum(self, k: int, t: float, s: float) -> float:
        """sum_j w_j (E5)."""
        raise NotImplementedError

    def conserves(self, t: float, s: float) -> bool:
        """Whether sum_j w_j = b_1 for every k (E5)."""
        raise NotImplementedError

    def gap(self, x1_hat: Tensor, k: int, t: float, s: float) -> Tensor:
        """mu^(k) - mu^(1) on a straight flow (E4)."""
        raise NotImplementedError

    def bias(self, x1_hat: Tensor, k: int, t: float) -> Tensor:
        """The limit of (mu^(k) - mu^(1)) / c_k^2 as s -> t (E6)."""
        raise NotImplementedError

    def gradient_limit(self, k: int, t: float) -> float:
        """The limit, as s -> t, of d mu^(k)/d theta over d mu^(1)/d theta (E6)."""
        raise NotImplementedError

    def variance_after(self, t: float, s: float) -> float:
        """Variance after one step from the exact marginal N(0, t^2) of data at the origin (E11)."""
        raise NotImplementedError

    def limit_variance(self, q: float) -> float:
        """Variance of samples of data of variance q as steps shrink, from t < 1 (E11)."""
        raise NotImplementedError

    def centre_limit(self, k: int, t: float) -> float:
        """The limit of tau_k / D as s -> t (E13)."""
        raise NotImplementedError

    def weights(self, k: int, t: float, s: float) -> list[float]:
        """w_j of mu^(k) = a_k x_t + sum_j w_j v_j."""
        last, d = last_start(k, t, s), (t - s) / k
        a, _ = self.step(1.0, 0.0, last, s)
        b, _ = self.step(0.0, 1.0, last, s)
        return [-a * d] * (k - 1) + [b]

    def centre(self, k: int, t: float, s: float) -> float:
        """tau_k = d sum_j j w_j / sum_j w_j, how far into the step the weights lie (E13)."""
        w, d = self.weights(k, t, s), (t - s) / k
        return d * sum(j * w_j for j, w_j in enumerate(w)) / sum(w)

    def std(self, k: int, t: float, s: float) -> float:
        """c_k, the std of the last of k sub-steps."""
        return self.step(0.0, 0.0, last_start(k, t, s), s)[1]

    def decomposed(
        self, velocity: Callable[[Any, float], Any], x: Any, t: float, s: float, k: int
    ) -> tuple[Any, float]:
        """mu^(k) and c_k by definition: k-1 Euler sub-steps, then `step`. velocity(x, t) -> v."""
        d = (t - s) / k
        for j in range(k - 1):
            x = x - d * velocity(x, t - j * d)
        last = last_start(k, t, s)
        return self.step(x, velocity(x, last), last, s)


class EulerMaruyama(Theory):
    """x_s = x - D v - (g^2 D / 2t) x1_hat + g sqrt(D) z: a step of the marginal-preserving SDE.

    Its drift is v - (g^2/2) score, the score being -x1_hat / t. All follows from g(t).
    """

    straight = False
    biased = True
    gap_order = 0.5
    law_order = 1.0

    def g2(self, t: float, s: float) -> float:
        """g(t)^2; s, the end of the step, serves where g is infinite."""
        raise NotImplementedError

    def c2(self, k: int, t: float, s: float) -> float:
        """c_k^2 = g(t')^2 D/k."""
        return self.g2(last_start(k, t, s), s) * (t - s) / k

    def step(self, x: Number, v: Number, t: float, s: float) -> tuple[Number, float]:
        D, g2 = t - s, self.g2(t, s)
        x1_hat = x + (1 - t) * v
        return x - D * v - D * g2 / (2 * t) * x1_hat, math.sqrt(g2 * D)

    def scale(self, k: int, t: float, s: float) -> float:
        """k g(t)^2 / g(t')^2."""
        return k * self.g2(t, s) / self.g2(last_start(k, t, s), s)

    def weight_sum(self, k: int, t: float, s: float) -> float:
        """-D - (1-t) c_k^2 / (2 t'): where v = 1 and x_t = 0, x1_hat is 1 - t all along."""
        return -(t - s) - (1 - t) * self.c2(k, t, s) / (2 * last_start(k, t, s))

    def conserves(self, t: float, s: float) -> bool:
        """From t = 1, where the second term of weight_sum vanishes."""
        return t == 1

    def gap(self, x1_hat: Tensor, k: int, t: float, s: float) -> Tensor:
        """x1_hat is constant along a straight flow, and enters mu^(k) with -c_k^2 / (2 t')."""
        return x1_hat / 2 * (self.c2(1, t, s) / t - self.c2(k, t, s) / last_start(k, t, s))

    def bias(self, x1_hat: Tensor, k: int, t: float) -> Tensor:
        """(k-1) x1_hat / (2t): `gap` over c_k^2, where c_1^2 -> k c_k^2."""
        return (k - 1) * x1_hat / (2 * t)

    def gradient_limit(self, k: int, t: float) -> float:
        """sum w_j / b_1 in the limit."""
        kappa = self.kappa(t)
        return (1 + kappa / k) / (1 + kappa)

    def kappa(self, t: float) -> float:
        """g^2 (1-t) / (2t): b = -(1 + kappa) D."""
        return self.g2(t, t) * (1 - t) / (2 * t)

    def centre_limit(self, k: int, t: float) -> float:
        """k - 1 weights of D/k and one of (1 + kappa) D/k."""
        kappa = self.kappa(t)
        return (k - 1) * (k + 2 * kappa) / (2 * k * (k + kappa))

    def variance_after(self, t: float, s: float) -> float:
        """(t - D - g^2 D / 2t)^2 + g^2 D, since v = x/t and x1_hat = x/t."""
        D, g2 = t - s, self.g2(t, s)
        return s**2 + g2 * D**2 / t + g2**2 * D**2 / (4 * t**2)

    def limit_variance(self, q: float) -> float:
        """The SDE's own: the data's."""
        return q


class FlowSDE(EulerMaruyama):
    """g^2 = eta^2 t/(1-t); at t = 1 the 1 - t below is 1 - s, s being the grid's second time."""

    @property
    def start_order(self) -> float:
        """What the first steps leave decays by prod (1 - eta^2 D/(2(1-t)))^2 ~ D^(eta^2) only."""
        return min(1.0, self.eta**2)

    def g2(self, t: float, s: float) -> float:
        return self.eta**2 * t / (1 - (t if t < 1 else s))


class Dance(EulerMaruyama):
    """g = eta."""

    def g2(self, t: float, s: float) -> float:
        return self.eta**2

    def conserves(self, t: float, s: float) -> bool:
        """Also to s = 0, where c_k^2/t' = eta^2 for every k."""
        return t == 1 or s == 0


class CPS(Theory):
    """x_s = (1-s) x0_hat + s cos(h) x1_hat + s sin(h) z, h = eta pi/2: levels are kept exactly."""

    straight = True
    biased = False
    gap_order = 1.0
    law_order = 2 / 3  # observed; the limit is derived, the rate is not

    def __init__(self, eta: float):
        super().__init__(eta)
        self.cos, self.sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)

    def step(self, x: Number, v: Number, t: float, s: float) -> tuple[Number, float]:
        x0_hat, x1_hat = x - t * v, x + (1 - t) * v
        return (1 - s) * x0_hat + s * self.cos * x1_hat, s * self.sin

    def scale(self, k: int, t: float, s: float) -> float:
        """The std depends on s alone."""
        return 1.0

    def weight_sum(self, k: int, t: float, s: float) -> float:
        """x0_hat and x1_hat are constant where v is: no k enters."""
        return -(1 - s) * t + s * self.cos * (1 - t)

    def conserves(self, t: float, s: float) -> bool:
        return True

    def gap(self, x1_hat: Tensor, k: int, t: float, s: float) -> Tensor:
        return 0 * x1_hat

    def bias(self, x1_hat: Tensor, k: int, t: float) -> Tensor:
        """The gap vanishes and c_k does not."""
        return 0 * x1_hat

    def gradient_limit(self, k: int, t: float) -> float:
        return 1.0

    def centre_limit(self, k: int, t: float) -> float:
        """The last weight alone does not shrink with D: all of it is where v_{k-1} is."""
        return (k - 1) / k

    def variance_after(self, t: float, s: float) -> float:
        """x0_hat = 0 and x1_hat = x/t: s^2 (cos^2 + sin^2)."""
        return s**2

    def limit_variance(self, q: float) -> float:
        """q (1 + cos h)/2."""
        return q * (1 + self.cos) / 2


RECORDS: dict[str, type[Theory]] = {"flow_sde": FlowSDE, "cps": CPS, "dance": Dance}


def register(
    name: str, coefficients: Callable[..., pave.Coefficients], record: type[Theory]
) -> None:
    """A kernel for the whole project: what it computes, and what the oracle holds it to."""
    pave.KERNELS[name] = coefficients
    RECORDS[name] = record


def of(kernel: str, eta: float) -> Theory:
    """The record of a kernel. Raises ValueError for a kernel without one."""
    if kernel not in RECORDS:
        raise ValueError(f"kernel {kernel}: must have a record in zoo/oracle/theory.py")
    return RECORDS[kernel](eta)
