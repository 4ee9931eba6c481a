"""What is measured of a scene or a step: gradients, attribution, p^(k) beside p^(1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, Scene
from zoo.oracle.theory import Theory


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each [*event] of x [P, n, *event]."""
    return x.flatten(2).norm(dim=-1)


def unit(x: Tensor) -> Tensor:
    """Each [*event] of x [P, n, *event] over its norm."""
    return x / pave.per_row(norms(x), x)


def cosine(a: Tensor, b: Tensor) -> float:
    return (torch.dot(a, b) / (a.norm() * b.norm())).item()


def turned(a: Tensor, b: Tensor) -> Tensor:
    """Distance of two vectors' directions: |a/|a| - b/|b||."""
    return (a / a.norm() - b / b.norm()).norm()


def only(k: int, weight: float | Tensor = 1.0) -> dict[str, Any]:
    """Arguments of policy_loss that leave the k-term alone."""
    if k == 1:
        return {"factors": (), "term_weights": {1: weight}}
    return {"factors": (k,), "term_weights": {1: 0.0, k: weight}}


# ---- Gradients -----------------------------------------------------------------------------------


def flat_gradient(value: Tensor, field: nn.Module) -> Tensor:
    """d value / d theta as one float64 vector; zeros where theta does not enter.

    Of a large field (fields.is_large) its two `projections`: equal gradients have equal ones, and
    their sums and multiples are those of the gradients; angles cannot be told from them.
    """
    grads = torch.autograd.grad(
        value,
        [*field.parameters()],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    if fields.is_large(field):
        return projections(grads)
    return torch.cat([g.flatten().double() for g in grads])


def projections(grads: Sequence[Tensor | None]) -> Tensor:
    """A gradient's derivatives along two directions of random signs, float64 [2]; None is zero.

    The directions are r_1, r_2 in {-1, 1}^theta, the same in every call on a device. They are drawn
    one parameter at a time and thrown away. (r . g)^2 is |g|^2 on average.
    """
    along = torch.zeros(2, dtype=torch.float64)
    for i, g in enumerate(grads):
        if g is None:
            continue
        for n in range(2):
            coins = torch.Generator(g.device).manual_seed(2 * i + n)
            heads = torch.randint(0, 2, g.shape, generator=coins, device=g.device, dtype=torch.int8)
            signs = (2 * heads - 1).to(g.dtype)
            along[n] += (signs * g).sum(dtype=torch.float64).cpu()
    return along


def term_gradient(
    scene: Scene, k: int, form: str = "paper", weight: float | Tensor = 1.0
) -> Tensor:
    """The parameter gradient of the k-term of policy_loss at theta_old."""
    result = pave.policy_loss(
        scene.field, scene.rollout, scene.advantages, form=form, clip=None, **only(k, weight)
    )
    return flat_gradient(result.loss, scene.field)


# ---- Attribution ---------------------------------------------------------------------------------


def attribution(
    scene: Scene, k: int, form: str = "paper", updated: nn.Module | None = None
) -> Tensor:
    """What policy_loss asks of mu^(k): the sum over members of ratio A (x_s - mu)/std^2.

    At theta_old, where every ratio is 1, or at an updated theta.

    [P, n, 1|G, *event], read off the loss itself: mu^(k) ends in b_k v(x', t'), so that an offset
    of the velocity at the time t', and at no other, moves mu^(k) alone, by b_k times itself.
    """
    rollout, process = scene.rollout, scene.rollout.process
    batch, i = rollout.x_t.shape[:3], torch.tensor(rollout.sde_steps)
    t, s = process.grid[i], process.grid[i + 1]
    last = t if k == 1 else s + (t - s) / k
    b = process.coefficients(last, s).b.to(rollout.x_t)
    last_of_row = last.view(1, -1, 1).expand(batch).flatten().to(rollout.x_t)
    near = ((t - s) / (2 * k)).view(1, -1, 1).expand(batch).flatten().to(rollout.x_t)
    offset = torch.zeros_like(rollout.x_t.flatten(0, 2)).requires_grad_()

    def velocity(x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        v: Tensor = (updated or scene.field)(x, time, prompt)
        here = (time - last_of_row).abs() < near
        return v.to(x) + pave.per_row(here, x) * offset

    how: dict[str, Any] = {"form": form, "reduction": "sum", "clip": None, **only(k)}
    old = None
    if updated is not None:
        with torch.no_grad():
            old = pave.policy_loss(scene.field, rollout, scene.advantages, **how).old
    result = pave.policy_loss(velocity, rollout, scene.advantages, old=old, **how)
    pull = -torch.autograd.grad(result.loss, offset)[0].unflatten(0, batch)
    members = math.prod(rollout.x_s.shape[:3])  # the loss is a mean over them
    return members * pull / pave.per_row(b.view(1, -1, 1), pull)


def condition(scene: Scene, k: int, whole: Tensor) -> float:
    """How much larger the terms of a group's attribution are than their sum `whole`."""
    x_s = scene.rollout.x_s
    A = scene.advantages.expand(x_s.shape[:3]).abs()
    with torch.no_grad():
        p = pave.rescore(scene.field, scene.rollout, only(k)["factors"])[k]
    terms = pave.per_row(A, x_s) * (x_s.abs() + p.mean.abs()) / pave.per_row(p.std, p.mean) ** 2
    return (norms(terms.sum(2)) / norms(whole)).max().item()


def rounding_of(scene: Scene) -> float:
    """The largest |x_s|/c: by how much rounding of a mean is magnified in a log-density."""
    rollout = scene.rollout
    with torch.no_grad():
        std = pave.rescore(scene.field, rollout, ())[1].std
    return max(1.0, (rollout.x_s.abs() / pave.per_row(std, rollout.x_s)).max().item())


# ---- The same by definition, free of pave_grpo's decomposition -----------------------------------


def mean_by_definition(scene: Scene, theory: Theory, k: int) -> Tensor:
    """mu^(k) of every observed step, [P, n, 1|G, *event]."""
    x_t, grid = scene.rollout.x_t, scene.rollout.process.grid
    P, _, rows = x_t.shape[:3]
    velocity = timed(scene.field, torch.arange(P, device=x_t.device).repeat_interleave(rows))
    means = []
    for j, i in enumerate(scene.rollout.sde_steps):
        t, s = grid[i : i + 2].tolist()
        mean, _ = theory.decomposed(velocity, x_t[:, j].flatten(0, 1), t, s, k)
        means.append(mean.unflatten(0, (P, rows)))
    return torch.stack(means, dim=1)


@torch.no_grad()
def group_pull(scene: Scene, theory: Theory, k: int) -> Tensor:
    """sum_i A_i (x_s - mu^(k)) of every group, [P, n, *event]."""
    apart = scene.rollout.x_s - mean_by_definition(scene, theory, k)
    return (pave.per_row(scene.advantages.expand(apart.shape[:3]), apart) * apart).sum(2)


@torch.no_grad()
def updated_pull(scene: Scene, updated: nn.Module, theory: Theory, k: int, form: str) -> Tensor:
    """sum_i ratio_i A_i (x_s - mu) of every group after an update, [P, n, d], d one axis."""
    x_s, grid = scene.rollout.x_s, scene.rollout.process.grid.tolist()
    scored = 1 if form == "matched" else k
    old = mean_by_definition(scene, theory, scored)
    new = mean_by_definition(scene._replace(field=updated), theory, k)
    if form == "matched":
        new = old + new - mean_by_definition(scene, theory, k)
    stds = [theory.std(scored, grid[i], grid[i + 1]) for i in scene.rollout.sde_steps]
    var = torch.tensor(stds, dtype=torch.float64).to(old).view(1, -1, 1) ** 2
    A = scene.advantages * log_ratio(new, old, x_s, var).exp()
    return (A[..., None] * (x_s - new)).sum(2)


def gradient_by_definition(scene: Scene, theory: Theory, k: int, form: str) -> Tensor:
    """Along d/d theta of the k-term at theta_old: sum A (x_s - mu)/std^2 d mu^(k)/d theta."""
    mean, scored = mean_by_definition(scene, theory, k), k if form == "paper" else 1
    apart = scene.rollout.x_s - mean_by_definition(scene, theory, scored).detach()
    grid, steps = scene.rollout.process.grid.tolist(), scene.rollout.sde_steps
    stds = [theory.std(scored, grid[i], grid[i + 1]) for i in steps]
    A = scene.advantages / torch.tensor(stds, dtype=torch.float64).to(mean).view(1, -1, 1) ** 2
    return flat_gradient((pave.per_row(A, apart) * apart * mean).sum(), scene.field)


# ---- One step ------------------------------------------------------------------------------------


def timed(field: nn.Module, prompt: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The field as a velocity(x, t) of one time for all rows x [B, *event]."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v: Tensor = field(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), prompt)
        return v.to(x)

    return velocity


def one_step(
    field: nn.Module, kernel: str, x: Tensor, t: float, s: float, factors: Sequence[int]
) -> dict[int, pave.Transition]:
    """p^(k) of rows x [B, *event], all by one step t -> s; row b asks prompt b.

    The grid is that step, so that flow_sde at t = 1 takes its g at s.
    """
    start = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    end = torch.full((len(x),), s, dtype=torch.float64, device=x.device)
    process = pave.Process(torch.tensor([t, s], dtype=torch.float64), kernel, ETA)
    prompt = torch.arange(len(x), device=x.device)
    return pave.decompose(field, process, x, start, end, prompt, [k for k in factors if k > 1])


def log_ratio(new: Tensor, old: Tensor, x_s: Tensor, var: float | Tensor) -> Tensor:
    """log N(x_s; new, var I) - log N(x_s; old, var I) of rows [B, d], multiplied out."""
    return ((new - old) * (x_s - (new + old) / 2)).sum(-1) / var
