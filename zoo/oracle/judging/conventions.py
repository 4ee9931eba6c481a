"""By what right losses differ, and what is due under each convention: a loss and its gradient.

What is due is written out here, term by term, for every convention; only transitions and their
log-probabilities come from pave_grpo.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle.judging.advantages import Advantages
from zoo.oracle.judging.asked import Field
from zoo.oracle.judging.conditions import Setting
from zoo.oracle.judging.groups import Group, clip_of, group_of, rollout_of, terms_before
from zoo.oracle.judging.levels import (
    DROPPED,
    STATE_ROUNDINGS,
    Due,
    process_of,
    time_rows,
)


class Clip(NamedTuple):
    """How far a ratio may go."""

    kind: str = "as given"  # none; fixed, times: of other ends; mask, fixed or mask, times
    low: float = 1.0  # below 1, or the threshold of a mask: a number, or times the clip given
    high: float = 1.0  # above 1
    words: str = ""  # the threshold of a mask

    def bounds(self, clip: float) -> tuple[float, float]:
        """(lower, upper) end of the range of ratios."""
        unit = 1.0 if self.kind == "fixed" else clip
        return 1 - self.low * unit, 1 + self.high * unit

    def threshold(self, clip: float) -> float:
        """The KL from which a mask cuts."""
        return self.low * (clip if self.kind == "mask, times" else 1.0)

    def said(self) -> str:
        """In words."""
        if self.kind == "fixed":
            return f"from 1 - {self.low:.4g} to 1 + {self.high:.4g}, whatever is given"
        if self.kind == "times":
            return f"from 1 - {self.low:.4g} clip to 1 + {self.high:.4g} clip"
        if self.kind.startswith("mask"):
            return f"a divergence mask (Flow-DPPO), from a KL of {self.words}"
        return self.kind


STEP_WEIGHTS = ("1", "std", "std/D", "1/D", "D", "std^2", "sqrt(D)", "1/sqrt(D)", "t")


USUAL_THRESHOLDS = tuple(m * 10.0**e for e in range(-1, -8, -1) for m in (1, 2, 5))


class LossConvention(NamedTuple):
    """Everything by which right losses differ."""

    reduction: str = "mean"
    no_half_square: tuple[str, ...] = ()  # the kernels that drop 1/(2 std^2)
    advantages: Advantages = Advantages()
    form: str = "paper"
    ratio: str = "plain"  # or "GRPO-Guard's"
    clip: Clip = Clip()
    weights: str = "1 and 1/|S|"
    step_weight: str = "1"
    policy: str = "off"  # "on": velocity_old does not count
    kl: str = "as the ratio"  # or "mean", or "sum": what the KL is reduced by

    def told(self) -> dict[str, str]:
        """In words."""
        dropped = ", ".join(self.no_half_square)
        told = {
            "mean or sum": self.reduction,
            "1/(2 std^2)": f"{DROPPED} ({dropped})" if dropped else "kept",
            **self.advantages.told(),
            "form": self.form,
            "ratio": self.ratio,
            "clip": self.clip.said(),
            "weights": self.weights,
        }
        if self.kl != "as the ratio":
            told["KL over dimensions"] = self.kl
        if self.step_weight != "1":
            told["weight of a step"] = self.step_weight
        return told


RESCALED = "1 and (c_k/c_1)^2/|S|"
WEIGHTS = ("1 and 1/|S|", RESCALED)


@functools.cache
def std_of(setting: Setting) -> Tensor:
    """c_1, the std of the whole step."""
    t, s = time_rows(setting, 1)
    std: Tensor = process_of(pave, setting).coefficients(t, s).std[0]
    return std


def step_weight_of(name: str, setting: Setting) -> Tensor:
    """The factor of a whole step."""
    std = std_of(setting)
    t = torch.tensor(setting.times[0], dtype=torch.float64)
    D = t - setting.times[1]
    by_name = {
        "1": torch.ones_like(std),
        "std": std,
        "std/D": std / D,
        "1/D": 1 / D,
        "D": D,
        "std^2": std.square(),
        "sqrt(D)": D.sqrt(),
        "1/sqrt(D)": 1 / D.sqrt(),
        "t": t,
    }
    return by_name[name]


class Terms(NamedTuple):
    """One k of a question under a convention: log-ratios [P, G], and where they come from."""

    log_ratio: Tensor
    divergence: Tensor  # KL of the update, averaged over dimensions [P, G]
    weight: Tensor
    std: float


def terms_of(setting: Setting, convention: LossConvention, new: Field) -> dict[int, Terms]:
    """Of every k, at the group's states."""
    group = group_of(setting)
    rollout = rollout_of(setting, group)
    p_new = pave.rescore(new, rollout, setting.factors)
    p_old = terms_before(setting)
    terms = {}
    for k, p in p_new.items():
        scored, old = p, p_old[k]
        if convention.form == "matched" and k > 1:
            mean = p_old[1].mean + p.mean - p_old[k].mean
            scored = pave.Transition(mean, p_old[1].std)
            old = p_old[1]
        log_prob = scored.log_prob(group.x_s, convention.reduction)
        log_prob_old = old.log_prob(group.x_s, convention.reduction)
        if convention.policy == "on":
            log_prob_old = log_prob.detach()
        log_ratio = (log_prob - log_prob_old)[:, 0]
        std = scored.std[:, 0]
        if setting.kernel in convention.no_half_square:
            log_ratio = log_ratio * 2 * std.square()
        delta = (p.mean - p_old[k].mean)[:, 0]
        squares = delta.square().flatten(2).mean(-1) / (2 * std.square())
        if convention.ratio != "plain":
            dims = math.prod(setting.event) if convention.reduction == "sum" else 1
            log_ratio = std * (log_ratio + dims * squares)
        weight = torch.ones((), dtype=torch.float64)
        if k > 1:
            weight = weight / len(setting.factors)
            if convention.weights == RESCALED:
                weight = weight * (std.flatten()[0] / p_old[1].std.flatten()[0]).square()
        terms[k] = Terms(log_ratio, squares.detach(), weight, std.min().item())
    return terms


def surrogate(term: Terms, A: Tensor, clip: Clip, given: float) -> Tensor:
    """min(ratio A, clip(ratio) A), or what the convention has in its place, [P, G]."""
    ratio = term.log_ratio.exp()
    if clip.kind == "none":
        return ratio * A
    if clip.kind.startswith("mask"):
        away = (ratio - 1) * A > 0
        masked = away & (term.divergence >= clip.threshold(given))
        return torch.where(masked, 0, ratio * A)
    low, high = clip.bounds(given)
    return torch.minimum(ratio * A, ratio.clamp(low, high) * A)


def divergence_of(setting: Setting, group: Group, new: Field, reduction: str) -> Tensor:
    """KL of the k = 1 step to the reference, mean over members, reduced as log_prob is."""
    rollout = rollout_of(setting, group)
    p = pave.rescore(new, rollout, ())[1]
    with torch.no_grad():
        p_ref = pave.rescore(group.reference, rollout, ())[1]
    squares = (p.mean - p_ref.mean).square().flatten(3) / (2 * p.std[..., None].square())
    per_member = squares.sum(-1) if reduction == "sum" else squares.mean(-1)
    return per_member.mean()


def gradient_by_theta(loss: Tensor, field: Field) -> Tensor:
    """d loss / d theta as one vector."""
    parts = torch.autograd.grad(
        loss, [*field.parameters()], allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])


@functools.cache
def due_under(setting: Setting, convention: LossConvention) -> dict[str, Due]:
    """The loss and its gradient under a convention."""
    group = group_of(setting)
    new = Field(group.new.w1.detach(), group.new.w2.detach())
    A = convention.advantages.of(group.rewards)
    J = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    terms = terms_of(setting, convention, new)
    for term in terms.values():
        value = surrogate(term, A, convention.clip, clip_of(setting))
        J = J + term.weight * value.mean()
        size = size + term.weight * (A.abs() * term.log_ratio.exp()).mean().detach()
    factor = step_weight_of(convention.step_weight, setting)
    loss = -factor * J
    if setting.kl:
        reduction = convention.reduction if convention.kl == "as the ratio" else convention.kl
        loss = loss + setting.kl * divergence_of(setting, group, new, reduction)
    gradient = gradient_by_theta(loss, new)
    # Values of both signs nearly cancel in a loss; its size is that of what is added up. Rounding
    # of the states moves (x_s - mean) / std, which all numbers are made of.
    narrowest = min(term.std for term in terms.values())
    rounding = STATE_ROUNDINGS * group.x_s.abs().max().item() / narrowest
    return {
        "loss": Due(loss.detach(), (1 + rounding) * (factor * size).item()),
        "gradient": Due(gradient, rounding * gradient.abs().max().item()),
    }


def unit_of(setting: Setting, scale: tuple[str, bool, str]) -> Tensor:
    """What a mean log-probability with all its parts is multiplied by.

    scale   its reduction, whether 1/(2 std^2) is dropped, the weight of a step
    """
    reduction, drops, step_weight = scale
    unit = step_weight_of(step_weight, setting)
    if drops:
        unit = unit * 2 * std_of(setting).square()
    return unit * (math.prod(setting.event) if reduction == "sum" else 1)


@functools.lru_cache(128)
def log_ratio_gradients(setting: Setting, convention: LossConvention) -> Tensor:
    """d log-ratio_k of each member by theta, a row for each k and member, in a convention."""
    group = group_of(setting)
    new = Field(group.new.w1.detach(), group.new.w2.detach())
    rows = []
    for term in terms_of(setting, convention, new).values():
        for log_ratio in term.log_ratio.flatten():
            parts = torch.autograd.grad(log_ratio, [*new.parameters()], retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)
