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
OUTLIERS = ("outlier above", "outlier below")
REWARDS = (*SPREADS, *OUTLIERS, "equal")
OUTLIER_GROUP = 40  # large enough for |A| > 5
LOG_RATIO = 0.1  # its std over the members, at most


def rewards_of(kind: str, groups: int, size: int, generator: torch.Generator) -> Tensor:
    """[groups, size]: as wide as the kind says, each group at a place and a width of its own."""
    z = normal(generator, groups, size)
    if kind == "equal":
        return torch.full((groups, size), 0.75, dtype=torch.float64)
    if kind in OUTLIERS:
        sign = 1 if kind == "outlier above" else -1
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
    # A mean log-ratio falls by D/2 times the square of its spread: less, so that some rise.
    wanted = LOG_RATIO
    if setting.ratio.endswith("mean"):
        wanted = min(wanted, 0.5 / math.prod(setting.event))
    with torch.no_grad():
        spread = log_ratio_between(setting, group, probe).std().item()
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


def log_ratio_between(setting: Setting, group: Group, new: Field) -> Tensor:
    """log p_new(x_s|x_t) - log p_old of the sampled step, reduced as the setting says."""
    rollout = rollout_of(setting, group)
    reduction = setting.ratio.split()[-1]
    p_new, p_old = (pave.rescore(field, rollout, ())[1] for field in (new, group.old))
    log_ratio = p_new.log_prob(group.x_s, reduction) - p_old.log_prob(group.x_s, reduction)
    if setting.ratio.startswith("guard"):
        delta = p_new.mean - p_old.mean
        return pave.normalised_log_ratio(log_ratio, delta, p_new.std, reduction)
    return log_ratio


@functools.cache
@torch.no_grad()
def clip_of(setting: Setting) -> float:
    """A clip that cuts about half of the members that it can, and lies in a gap of the ratios."""
    group = group_of(setting)
    generator = torch.Generator().manual_seed(setting.seed + 1)
    if setting.policy == "on":
        return 0.05 + 0.3 * torch.rand((), generator=generator).item()
    rollout = rollout_of(setting, group)
    reduction = setting.ratio.split()[-1]
    distances = []
    new, old = (pave.rescore(z, rollout, setting.factors) for z in (group.new, group.old))
    for k in new:
        log_ratio = new[k].log_prob(group.x_s, reduction) - old[k].log_prob(group.x_s, reduction)
        if setting.ratio.startswith("guard"):
            delta = new[k].mean - old[k].mean
            log_ratio = pave.normalised_log_ratio(log_ratio, delta, new[k].std, reduction)
        distances.append((log_ratio.exp() - 1).abs().flatten())
    inner = torch.cat(distances).sort().values
    inner = inner[len(inner) // 4 : max(len(inner) // 4 + 2, len(inner) * 3 // 4)]
    widest = (inner[1:] / inner[:-1].clamp(min=1e-12)).argmax()
    return ((inner[widest] + inner[widest + 1]) / 2).item()


@functools.cache
def log_prob_gradients(setting: Setting) -> Tensor:
    """d log p^(k)(x_s^i) / d theta, averaged over dimensions: one row for each k and member."""
    group = group_of(setting)
    new = Field(group.new.w1.detach(), group.new.w2.detach())
    transitions = pave.rescore(new, rollout_of(setting, group), setting.factors)
    rows = []
    for p in transitions.values():
        for log_prob in p.log_prob(group.x_s).flatten():
            parts = torch.autograd.grad(log_prob, [*new.parameters()], retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)
