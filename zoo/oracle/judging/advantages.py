"""How a function makes advantages of rewards, read off the advantages that it gives.

A = clamp((r - mean r) / delta, -C, C) for a delta of each group. From groups whose rewards spread
over many powers of ten, delta tells the std (which ddof, of the group or of the batch, or none) and
the eps beside it, as a range: the precision of the numbers says how small it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The usual values of eps, each recognised within a range.
USUAL_EPS = (1e-8, 1e-4, 1e-6, 1e-5, 1e-7, 1e-3, 1e-9, 1e-12, 1e-10)
# What a decoded advantage may be off by, relative, whatever its float type.
READING = 1e-7


def deviation(rewards: Tensor, ddof: int) -> Tensor:
    """The std of each group [N, 1]."""
    return rewards.std(-1, correction=ddof, keepdim=True)


class Scale(NamedTuple):
    """What centred rewards are divided by, but for eps."""

    name: str
    of: Callable[[Tensor], Tensor]  # [N, G] -> [N, 1]


def ddof_1(rewards: Tensor) -> Tensor:
    """With G - 1."""
    return deviation(rewards, 1)


def ddof_0(rewards: Tensor) -> Tensor:
    """With G."""
    return deviation(rewards, 0)


def batch_1(rewards: Tensor) -> Tensor:
    """Of all rewards, with N G - 1."""
    return rewards.std(correction=1).expand(len(rewards), 1)


def batch_0(rewards: Tensor) -> Tensor:
    """Of all rewards, with N G."""
    return rewards.std(correction=0).expand(len(rewards), 1)


def centred_batch_1(rewards: Tensor) -> Tensor:
    """Of all centred rewards, with N G - 1."""
    return batch_1(rewards - rewards.mean(-1, keepdim=True))


def centred_batch_0(rewards: Tensor) -> Tensor:
    """Of all centred rewards, with N G."""
    return batch_0(rewards - rewards.mean(-1, keepdim=True))


def one(rewards: Tensor) -> Tensor:
    """Nothing is divided by."""
    return torch.ones_like(rewards[:, :1])


SCALES = (
    Scale("none (Dr.GRPO)", one),
    Scale("ddof 1", ddof_1),
    Scale("ddof 0", ddof_0),
    Scale("of the whole batch, ddof 1", batch_1),
    Scale("of the whole batch, ddof 0", batch_0),
    Scale("of the whole batch, centred by group, ddof 1", centred_batch_1),
    Scale("of the whole batch, centred by group, ddof 0", centred_batch_0),
)
BY_NAME = {scale.name: scale for scale in SCALES}
EPS_FORMS = ("std + eps", "max(std, eps)", "sqrt(std^2 + eps)", "sqrt(std^2 + eps^2)")


def with_eps(std: Tensor, eps: float, form: str) -> Tensor:
    """delta."""
    if form == "std + eps":
        return std + eps
    if form == "max(std, eps)":
        return std.clamp(min=eps)
    return (std.square() + (eps if form == "sqrt(std^2 + eps)" else eps**2)).sqrt()


class Advantages(NamedTuple):
    """A convention of advantages."""

    scale: str = "ddof 1"  # a name of SCALES
    form: str = "std + eps"  # of EPS_FORMS
    eps: float = 1e-8
    eps_said: str = "1e-08"
    clamp: float | None = 5.0
    clamp_said: str = "5"

    def of(self, rewards: Tensor) -> Tensor:
        """A [N, G] of rewards [N, G]; exactly zero where all rewards of a group are equal."""
        centred = rewards - rewards.mean(-1, keepdim=True)
        equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
        delta = with_eps(BY_NAME[self.scale].of(rewards), self.eps, self.form)
        if self.scale.startswith("none"):
            delta = torch.ones_like(delta)
        A = torch.where(equal, 0, centred / torch.where(equal, 1, delta))
        return A if self.clamp is None else A.clamp(-self.clamp, self.clamp)

    def told(self) -> dict[str, str]:
        """In words."""
        told = {"std": self.scale}
        if not self.scale.startswith("none"):
            told["eps"] = f"{self.eps_said}, in {self.form}"
        return told | {"clamp": self.clamp_said}


class Reading(NamedTuple):
    """One call's rewards and advantages, [N, G] each, and the precision they are read to."""

    rewards: Tensor
    A: Tensor
    precision: float = READING


class GroupRead(NamedTuple):
    """What one group tells: delta, and where a clamp acted."""

    delta: float
    precision: float
    clamped_at: float  # 0 where no clamp acted
    largest: float  # |A| that no clamp cut


def read_group(r: Tensor, A: Tensor, precision: float) -> GroupRead | None:
    """delta of one group, from the members that no clamp cut; None where nothing fits."""
    centred = r - r.mean()
    if not bool(A.isfinite().all()) or not bool((A * centred > 0).any()):
        return None
    firm = centred.abs() > 0.05 * centred.abs().max()
    ratios = centred[firm] / A[firm]
    if not bool((ratios > 0).all()):
        return None
    # A clamp makes |A| smaller and the ratio larger: the smallest is free of it.
    free = ratios <= ratios.min() * (1 + 20 * precision)
    sizes = A[firm][free].abs()
    delta = (ratios[free] * sizes).sum() / sizes.sum()
    expected = centred / delta
    error = (A - expected).abs()
    cut = error > 20 * precision * expected.abs().max()
    if not bool(cut.any()):
        return GroupRead(delta.item(), precision, 0.0, A.abs().max().item())
    bound = A[cut].abs()
    if bound.max() - bound.min() > 20 * precision * bound.max():
        return None
    if bool((A[cut] * expected[cut] <= 0).any()) or bool((expected[cut].abs() < bound[0]).any()):
        return None
    return GroupRead(delta.item(), precision, bound.mean().item(), 0.0)


def eps_range(deltas: Tensor, stds: Tensor, precision: Tensor, form: str) -> tuple[float, float]:
    """The eps with which a form explains every delta, as (low, high); empty where low > high."""
    low_delta = deltas * (1 - 3 * precision)
    high_delta = deltas * (1 + 3 * precision)
    if form == "std + eps":
        low, high = low_delta - stds, high_delta - stds
    elif form == "max(std, eps)":
        is_std = (low_delta <= stds) & (stds <= high_delta)
        low = torch.where(is_std, 0, torch.where(low_delta > stds, low_delta, torch.inf))
        high = torch.where(is_std, stds, high_delta)
    else:
        low, high = low_delta**2 - stds**2, high_delta**2 - stds**2
        if form == "sqrt(std^2 + eps^2)":
            low, high = low.clamp(min=0).sqrt(), high.sqrt().nan_to_num(nan=-1.0)
    return max(0.0, low.max().item()), high.min().item()


def say_range(low: float, high: float) -> tuple[float, str]:
    """(a value, words): a usual value where it is the only one; never one of several."""
    inside = [eps for eps in USUAL_EPS if low <= eps <= high]
    narrow = high - low < 0.005 * (low + high) / 2
    if len(inside) == 1 and low > 0:
        exact = f"{inside[0]:g}"
        return inside[0], exact if narrow else f"{exact} (from {low:.2g} to {high:.2g})"
    if low == 0:
        return 0.0, f"0 (or below {high:.1g})"
    middle = (low + high) / 2
    if narrow:
        return middle, f"{middle:.3g}"
    return middle, f"between {low:.2g} and {high:.2g}"


def is_usual(low: float, high: float) -> bool:
    """May eps be 0, or one of the values in use?"""
    return low == 0 or any(low <= eps <= high for eps in USUAL_EPS)


def recognise(readings: Sequence[Reading], usual: bool = False) -> Advantages | None:
    """The first convention that explains all readings; None where none does.

    usual: only with an eps in use, or none.
    """
    groups: list[GroupRead] = []
    batches: list[tuple[Reading, int]] = []
    for reading in readings:
        for n in range(len(reading.rewards)):
            r, A = reading.rewards[n], reading.A[n]
            if bool((r == r[0]).all()):
                if A.abs().max() > 1e-6:
                    return None
                continue
            group = read_group(r, A, reading.precision)
            if group is None:
                return None
            groups.append(group)
            batches.append((reading, n))
    if not groups:
        return None
    clamp = clamp_of(groups)
    if clamp is None:
        return None
    deltas = torch.tensor([group.delta for group in groups], dtype=torch.float64)
    precision = torch.tensor([group.precision for group in groups], dtype=torch.float64)
    for scale in SCALES:
        parts = [scale.of(reading.rewards)[n, 0] for reading, n in batches]
        stds = torch.stack(parts).double()
        if scale.name.startswith("none"):
            if bool(((deltas - 1).abs() <= 3 * precision).all()):
                return Advantages(scale.name, eps=0.0, clamp=clamp[0], clamp_said=clamp[1])
            continue
        for form in EPS_FORMS:
            low, high = eps_range(deltas, stds, precision, form)
            if low <= high and (is_usual(low, high) or not usual):
                eps, said = say_range(low, high)
                return Advantages(scale.name, form, eps, said, *clamp)
    return None


def clamp_of(groups: Sequence[GroupRead]) -> tuple[float | None, str] | None:
    """(C, words); None where groups contradict each other."""
    bounds = [group.clamped_at for group in groups if group.clamped_at]
    largest = max(group.largest for group in groups)
    if not bounds:
        return None, f"none, or above {largest:.3g}"
    middle = sum(bounds) / len(bounds)
    precision = max(group.precision for group in groups)
    if max(bounds) - min(bounds) > 40 * precision * middle:
        return None
    if largest > middle * (1 + 40 * precision):
        return None
    usual = round(middle, 3)
    near = abs(usual - middle) <= 40 * precision * middle
    return (usual if near else middle), f"{usual if near else middle:g}"
