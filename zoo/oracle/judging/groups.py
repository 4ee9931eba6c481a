"""What a loss is asked about: groups of observed steps, after an update of a size that tells."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle.judging.asked import Field
from zoo.oracle.judging.conditions import Setting
from zoo.oracle.judging.levels import field_of, normal, process_of

SPREADS = ("1", "0.01", "0.001", "1e-05", "1e-07", "1e-09")  # the std of rewards, about
OUTLIERS = ("high outlier", "low outlier")
REWARDS = (*SPREADS, *OUTLIERS, "equal")
OUTLIER_GROUP = 40  # large enough for |A| > 5


def rewards_of(kind: str, groups: int, size: int, generator: torch.Generator) -> Tensor:
    """[groups, size]: as wide as the kind says, each group at a place and a width of its own."""
    z = normal(generator, groups, size)
    if kind == "equal":
        return torch.full((groups, size), 0.75, dtype=torch.float64)
    if kind in OUTLIERS:
        sign = 1 if kind == "high outlier" else -1
        r = 0.01 * z
        r[:, size // 3] += 0.2 * sign
        return r
    width = float(kind)
    places = 0.7 + torch.arange(groups)[:, None]
    widths = torch.tensor([1.0, 3.0, 0.2, 7.0, 0.5])[torch.arange(groups) % 5][:, None]
    return width * (places + widths * z)


class Group(NamedTuple):
    """What a loss is asked about: P groups of G members, in pave_grpo's shapes."""

    new: Field
    old: Field
    reference: Field
    x_t: Tensor  # [P, 1, G, *event]
    x_s: Tensor
    rewards: Tensor  # [P, G]


@functools.cache
def group_of(setting: Setting) -> Group:
    """Drawn from the seed; theta as far from theta_old as moves log-ratios by LOG_RATIO."""
    generator = torch.Generator().manual_seed(setting.seed)
    P, G = setting.groups, setting.rows
    old = field_of(setting.seed, setting.event)
    reference = moved(old, direction(old, generator), 0.05)
    shape = (P, 1, 1 if setting.start == "shared" else G, *setting.event)
    x_t = normal(generator, *shape).expand(P, 1, G, *setting.event).contiguous()
    z = normal(generator, P, 1, G, *setting.event)
    rewards = rewards_of(setting.rewards, P, G, generator)
    step = direction(old, generator)
    group = Group(old, old, reference, x_t, x_t, rewards)
    with torch.no_grad():
        first = pave.rescore(old, rollout_of(setting, group), ())[1]
        group = group._replace(x_s=first.sample(z))
    if setting.policy == "on":
        return group
    probe = moved(old, step, 1e-4)
    wanted = setting.spread
    if wanted <= 0.1 and setting.ratio.endswith("mean"):
        # A mean log-ratio falls by D/2 times the square of its spread: less, so that some rise.
        wanted = min(wanted, 0.5 / math.prod(setting.event))
    with torch.no_grad():
        log_ratios = log_ratios_between(setting, group, probe)
        spread = max(log_ratio.std().item() for log_ratio in log_ratios.values())
    size = min(0.3, 1e-4 * wanted / max(spread, 1e-12))
    return group._replace(new=moved(old, step, size))


def direction(field: Field, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal numbers for every parameter."""
    return normal(generator, *field.w1.shape), normal(generator, *field.w2.shape)


def moved(field: Field, step: tuple[Tensor, Tensor], size: float) -> Field:
    """A copy, its parameters moved by size times the step."""
    return Field(field.w1.detach() + size * step[0], field.w2.detach() + size * step[1])


def rollout_of(setting: Setting, group: Group, module: ModuleType = pave) -> Any:
    """The group as a rollout of one step."""
    unused = torch.zeros(group.x_s.shape[:3], dtype=torch.float64)
    process = process_of(module, setting)
    return module.Rollout(process, (0,), group.x_t, group.x_s, unused, group.x_s)


def log_ratios_between(setting: Setting, group: Group, new: Field) -> dict[int, Tensor]:
    """log p^(k)_new(x_s|x_t) - log p^(k)_old of every k, reduced as the setting says."""
    rollout = rollout_of(setting, group)
    reduction = setting.ratio.split()[-1]
    p_new, p_old = (pave.rescore(field, rollout, setting.factors) for field in (new, group.old))
    log_ratios = {}
    for k in p_new:
        log_prob = p_new[k].log_prob(group.x_s, reduction)
        log_ratios[k] = log_prob - p_old[k].log_prob(group.x_s, reduction)
        if setting.ratio.startswith("guard"):
            delta = p_new[k].mean - p_old[k].mean
            log_ratios[k] = pave.normalised_log_ratio(log_ratios[k], delta, p_new[k].std, reduction)
    return log_ratios


@functools.cache
@torch.no_grad()
def terms_before(setting: Setting) -> dict[int, pave.Transition]:
    """p^(k) of velocity_old, of every k."""
    group = group_of(setting)
    return pave.rescore(group.old, rollout_of(setting, group), setting.factors)


def divergences(setting: Setting, group: Group) -> Tensor:
    """|mu - mu_old|^2 / (2 c_1^2) of the sampled step, averaged over dimensions, of each member."""
    rollout = rollout_of(setting, group)
    p_new, p_old = (pave.rescore(field, rollout, ())[1] for field in (group.new, group.old))
    squares = (p_new.mean - p_old.mean).square().flatten(3).mean(-1)
    return (squares / (2 * p_new.std.square())).flatten()


@functools.cache
@torch.no_grad()
def clip_of(setting: Setting) -> float:
    """A clip, below 1: in a gap of the ratios or divergences, so that it cuts some, or wide."""
    group = group_of(setting)
    generator = torch.Generator().manual_seed(setting.seed + 1)
    if setting.policy == "on" or setting.clip == "wide":
        return 0.5 + 0.4 * torch.rand((), generator=generator).item()
    if setting.clip == "between divergences":
        return gap_in(divergences(setting, group))
    log_ratios = log_ratios_between(setting, group, group.new).values()
    return gap_in(torch.cat([(z.exp() - 1).abs().flatten() for z in log_ratios]))


def gap_in(numbers: Tensor) -> float:
    """The middle of the widest gap among the inner half of the numbers that are below 0.9.

    Where they are all alike, as the KL of members that leave one state are: nine tenths of them.
    """
    low = numbers[numbers < 0.9].sort().values
    if len(low) < 2:
        return 0.9
    inner = low[len(low) // 4 : max(len(low) // 4 + 2, len(low) * 3 // 4)]
    if inner[-1] < 1.001 * inner[0]:
        return 0.9 * inner[0].item()
    widest = (inner[1:] / inner[:-1].clamp(min=1e-12)).argmax()
    return ((inner[widest] + inner[widest + 1]) / 2).item()
