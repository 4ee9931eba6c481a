"""Setups of E12 to E15: one statistic of the rewards, and a k-term as a rule of quadrature.

J_k = d mu^(k)/d theta is taken along a direction u of the means, so that it is one vector; W_k =
sum_j w_j is its weight and tau_k its centre, the first moment of the w_j in time (theory.py). Dv/Dt
= dv/dt + (v . grad) v is the velocity's rate along its own path.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, POINT, Bench, Scene
from zoo.oracle.experiments import SAMPLES, move
from zoo.oracle.measures import (
    flat_gradient,
    gradient_by_definition,
    mean_by_definition,
    one_step,
    timed,
    turned,
)
from zoo.oracle.theory import Theory

ARMS, REWARDS = 3, 12  # sets of weights, and of advantages, of E12


# ---- One statistic (E12) -------------------------------------------------------------------------


def one_group(scene: Scene, step: int) -> Scene:
    """The first prompt's members at one of its stochastic steps."""
    r = scene.rollout
    here = slice(step, step + 1)
    own = here if r.x_0.shape[1] == len(r.sde_steps) else slice(None)
    alone = r._replace(
        sde_steps=r.sde_steps[here],
        x_t=r.x_t[:1, here],
        x_s=r.x_s[:1, here],
        log_prob=r.log_prob[:1, here],
        x_0=r.x_0[:1, own],
        v=None,
    )
    return Scene(scene.field, alone, scene.advantages[:1, own])


class OneStatistic(NamedTuple):
    """What the group's rewards can say, seen in ARMS sets of weights at once."""

    error: float  # of the gradient against c_1^-2 y^T sum_k w_k lambda_k J_k, relative
    beyond: float  # singular value d + 1 of REWARDS gradients, over the first
    predicted: float  # the same of gradients by definition


def one_statistic(bench: Bench, scene: Scene, kernel: str) -> OneStatistic:
    """Random advantages that sum to zero, in random weights of every k, at step 1 of a scene."""
    theory, alone = bench.theory(kernel), one_group(scene, 1)
    field, rollout = alone.field, alone.rollout
    ks, G = (1, *bench.factors), rollout.x_s.shape[2]
    t, s = rollout.process.grid[rollout.sde_steps[0] :][:2].tolist()
    weights = bench.normal(ARMS, len(ks), of="e12 weights").abs() + 0.1
    means = {k: mean_by_definition(alone, theory, k) for k in ks}
    errors, found, wanted = [], [], []
    for i in range(REWARDS):
        A = bench.normal(1, 1, G, of=("e12", i))
        one = alone._replace(advantages=A - A.mean(-1, keepdim=True))
        y = (one.advantages[..., None] * rollout.x_s).mean(2, keepdim=True)
        arms, by_definition = [], []
        for row in weights:
            w = dict(zip(ks, row.tolist(), strict=True))
            loss = pave.policy_loss(
                field,
                rollout,
                one.advantages,
                factors=bench.factors,
                clip=None,
                reduction="sum",
                term_weights=w,
            ).loss
            arms.append(-flat_gradient(loss, field))
            lam = {k: theory.scale(k, t, s) for k in ks}
            if rollout.x_t.shape[2] == 1:
                pushed = sum(w[k] * lam[k] * (y * means[k]).sum() for k in ks)
                direction = flat_gradient(pushed / theory.std(1, t, s) ** 2, field)
                errors.append(((arms[-1] - direction).norm() / direction.norm()).item())
            else:
                parts = [w[k] * gradient_by_definition(one, theory, k, "paper") for k in ks]
                direction = torch.stack(parts).sum(0) / G
            by_definition.append(direction)
        found.append(torch.cat(arms))
        wanted.append(torch.cat(by_definition))
    d = rollout.x_s[0, 0, 0].numel()
    return OneStatistic(max(errors, default=0.0), beyond(found, d), beyond(wanted, d))


def beyond(rows: list[Tensor], d: int) -> float:
    """The singular value d + 1 of these rows, over the first."""
    values = torch.linalg.svdvals(torch.stack(rows))
    return (values[d] / values[0]).item()


# ---- Centres (E13) -------------------------------------------------------------------------------


def rates(field: nn.Module, x: Tensor, t: float, u: Tensor, held: bool = False) -> tuple:
    """d/d theta of u . v and of u . Dv/Dt at (x, t); held: with the v in (v . grad) a constant."""
    prompt = torch.arange(len(x), device=x.device)
    time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
    h = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
    v = field(x, time, prompt)
    ahead = field(x + h * (v.detach() if held else v), time + h, prompt)
    (rate,) = torch.autograd.grad((u * ahead).sum(), h, create_graph=True)
    return flat_gradient((u * v).sum(), field), flat_gradient(rate, field)


def flow_map(field: nn.Module, x: Tensor, t: float, s: float, steps: int = 8) -> Tensor:
    """x_s of the ODE from x_t = x, by the classical Runge-Kutta rule of fourth order."""
    velocity = timed(field, torch.arange(len(x), device=x.device))
    D = (t - s) / steps
    for i in range(steps):
        time = t - i * D
        v_1 = velocity(x, time)
        v_2 = velocity(x - D / 2 * v_1, time - D / 2)
        v_3 = velocity(x - D / 2 * v_2, time - D / 2)
        v_4 = velocity(x - D * v_3, time - D)
        x = x - D / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
    return x


def states(bench: Bench) -> tuple[Tensor, Tensor]:
    """Four states, and a direction u of the means."""
    return bench.normal(4, fields.DIM, of="e13 0"), bench.normal(4, fields.DIM, of="e13 1")


def midpoint_mean(field: nn.Module, kernel: str, x: Tensor, t: float, s: float) -> Tensor:
    """a x + b v_u of pave_grpo.midpoint, by one step t -> s from x [B, d]; row b asks prompt b."""
    process = pave.Process(torch.tensor([t, s], dtype=torch.float64), kernel, ETA)
    with torch.no_grad():
        v = timed(field, torch.arange(len(x), device=x.device))(x, t)
    x_t, unused = x[:, None, None], torch.zeros(len(x), 1, 1, device=x.device)
    rollout = pave.Rollout(process, (0,), x_t, x_t, unused, x_t, v[:, None, None])
    return pave.midpoint(field, rollout).mean.flatten(0, 2)


class Centres(NamedTuple):
    """As the steps D from t = 0.7 shrink; differences over |d v/d theta|."""

    D: list[float]
    off: list[float]  # of J_k / W_k from dv - tau_k d(Dv/Dt)
    flow: list[float]  # of J_ode / (-D) from dv - D/2 d(Dv/Dt)
    held: list[float]  # of the midpoint's J / b_1 from the same, the v in (v . grad) held
    limit: list[float]  # of tau_k / D from its limit
    centre: float  # tau_k / D, read off J_k at the smallest D


def centres(bench: Bench, kernel: str, name: str, k: int) -> Centres:
    """D = 2^-10 .. 2^-16, for one k."""
    theory, field, t = bench.theory(kernel), bench.fixture(name).field, 0.7
    x, u = states(bench)
    dv, d_rate = rates(field, x, t, u)
    _, d_held = rates(field, x, t, u, held=True)
    found = Centres([2.0**-i for i in (10, 12, 14, 16)], [], [], [], [], 0.0)
    seen = 0.0
    for D in found.D:
        s = t - D
        mean = one_step(field, kernel, x, t, s, (k,))[k].mean
        per_weight = flat_gradient((u * mean).sum(), field) / theory.weight_sum(k, t, s)
        flow = flat_gradient((u * flow_map(field, x, t, s)).sum(), field) / -D
        mid = flat_gradient((u * midpoint_mean(field, kernel, x, t, s)).sum(), field)
        mid = mid / theory.weight_sum(1, t, s)
        tau = theory.centre(k, t, s)
        found.off.append(relative(per_weight - dv + tau * d_rate, dv))
        found.flow.append(relative(flow - dv + D / 2 * d_rate, dv))
        found.held.append(relative(mid - dv + D / 2 * d_held, dv))
        found.limit.append(abs(tau / D - theory.centre_limit(k, t)))
        seen = (torch.dot(dv - per_weight, d_rate) / torch.dot(d_rate, d_rate)).item() / D
    return found._replace(centre=seen)


def relative(error: Tensor, size: Tensor) -> float:
    return (error.norm() / size.norm()).item()


# ---- Rules of higher order (E14) -----------------------------------------------------------------


class Turns(NamedTuple):
    """Distance of directions from that of the flow map's gradient, as D shrinks."""

    D: list[float]
    original: list[float]
    term: list[float]  # of the k-term
    second: list[float]  # of the weights of second order
    midpoint: list[float]


def second_order_share(theory: Theory, k: int, t: float, s: float) -> float:
    """p of J_k/W_k beside 1 - p of J_1/W_1 whose centres add up to D/2: D / (2 tau_k)."""
    return (t - s) / (2 * theory.centre(k, t, s))


def turns(bench: Bench, kernel: str, name: str, k: int) -> Turns:
    """D = 2^-9 .. 2^-12 from t = 0.7, for one k."""
    theory, field, t = bench.theory(kernel), bench.fixture(name).field, 0.7
    x, u = states(bench)
    found = Turns([2.0**-i for i in (9, 10, 11, 12)], [], [], [], [])
    for D in found.D:
        s = t - D
        p = one_step(field, kernel, x, t, s, (k,))
        coarse, fine = (
            flat_gradient((u * p[j].mean).sum(), field) / theory.weight_sum(j, t, s) for j in (1, k)
        )
        flow = flat_gradient((u * flow_map(field, x, t, s)).sum(), field) / -D
        mid = flat_gradient((u * midpoint_mean(field, kernel, x, t, s)).sum(), field)
        mid = mid / theory.weight_sum(1, t, s)
        share = second_order_share(theory, k, t, s)
        found.original.append(turned(coarse, flow).item())
        found.term.append(turned(fine, flow).item())
        found.second.append(turned(share * fine + (1 - share) * coarse, flow).item())
        found.midpoint.append(turned(mid, flow).item())
    return found


class MidpointRatio(NamedTuple):
    """policy_loss's mean ratio of a moved theta in the midpoint form, and its standard error."""

    ratio: float
    se: float


def midpoint_ratio(bench: Bench, name: str, kernel: str) -> MidpointRatio:
    """One anchor, SAMPLES members, a theta that moves the midpoint's mean by c_1/2."""
    field, c_1 = bench.fixture(name).field, bench.theory(kernel).std(1, *POINT)
    process = pave.Process(torch.tensor(POINT, dtype=torch.float64), kernel, ETA)
    x_1 = bench.normal(1, 1, fields.DIM, of=("e14", name))
    z = bench.normal(1, 1, SAMPLES, fields.DIM, of=("e14 steps", name, kernel))
    rollout = pave.rollout_shared_anchor(field, process, pave.Noise(x_1, z))

    def mean_of(theta: nn.Module) -> Tensor:
        return pave.midpoint(theta, rollout).mean

    moved = move(field, mean_of, torch.ones(fields.DIM).to(x_1), c_1 / 2)
    ones = torch.ones(1, 1, SAMPLES, dtype=bench.dtype, device=bench.device)
    how: dict[str, Any] = {"factors": (), "form": "midpoint", "reduction": "sum", "clip": None}
    with torch.no_grad():
        old = pave.policy_loss(field, rollout, ones, **how).old
        result = pave.policy_loss(moved, rollout, ones, old=old, **how)
        delta = (mean_of(moved) - mean_of(field)).norm().item()
    se = math.sqrt(math.expm1((delta / c_1) ** 2) / SAMPLES)
    return MidpointRatio(result.terms[1].ratio_mean, se)
