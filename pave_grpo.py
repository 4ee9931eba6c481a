"""Pave-GRPO: group-relative policy optimisation of a flow, with average-velocity decomposition.

The method of "Pave-GRPO: Beyond Instantaneous Guidance through Principled Average Velocity Decomposition"
(arXiv 2606.01636), from noise to gradient, in one file. It knows no model, no reward and no file.

Algorithm 1.  Each iteration, with theta_old <- theta:
  1. sample G members per prompt with T steps, some of them stochastic:       rollout_independent,
     x_t -> x_s ~ p_old(x_s|x_t) = N(mu_old, std^2 I)                         rollout_shared_anchor
  2. reward every finished sample; A = (r - mean r) / std r in its group      group_advantages
  3. for every observed transition and every k in {1} + S:                    decompose
       p^(k) = (k-1) ODE sub-steps, then one SDE sub-step, from the same x_t to the same x_s
       ratio_k = p^(k)_theta(x_s|x_t) / p^(k)_old(x_s|x_t)                    k = 1 is the sampled step
  4. ascend J = mean sum_k w_k min(ratio_k A, clip(ratio_k) A) - kl KL        policy_loss
     with w_1 = 1 and w_k = 1/|S|: nothing new is sampled, nothing new is rewarded.

  symbol    name here        shape                 meaning, range
  x         x_s              [P, n, G, *event]     state; P prompts, n stochastic steps, G members
            x_t, x_0         as in Rollout         where the step began; what is rewarded
  t, s      t, s             [B], float64          0 <= s < t <= 1: a step goes from t down to s
  v         v                like x                velocity dx/dt = E[x_1 - x_0 | x_t]
  k, S      k, factors       integers >= 2         sub-steps of a decomposition, and the set of them
  eta       eta              > 0                   how stochastic the kernel is
  mu        mean             like x                mean of a transition
  c_k       std              [B], float64          standard deviation of a transition (never g)
  g         g                scalar                diffusion coefficient; std = g sqrt(t - s) where both exist
  r, A      rewards,         [P, N, G]             N = n groups per prompt with a shared anchor (one per
            advantages                             stochastic step), N = 1 with independent members

Time: t = 1 is noise, t = 0 is data, x_t = (1-t) x_0 + t x_1 (rectified flow).
A velocity is any callable velocity(x, t, c) -> v with x [B, *event], t [B] like x and c [B], the integer index of
the prompt a row belongs to. Images, packed latents, video and a point in the plane are all the same to it:

    >>> net = torch.nn.Linear(3, 2, dtype=torch.float32)
    >>> velocity = lambda x, t, c: net(torch.cat([x, t[:, None]], dim=1))
    >>> process = Process(schedule(8), kernel="cps", eta=0.7)
    >>> noise = draw_noise([torch.Generator().manual_seed(0)], group_size=16, shape=(2,), n_steps=3)
    >>> rollout = rollout_shared_anchor(velocity, process, noise, sde_steps=[0, 2, 4])
    >>> rewards = -rollout.x_0.square().sum(dim=-1)                  # pull the point towards the origin
    >>> result = policy_loss(velocity, rollout, group_advantages(rewards), factors=(2, 3))
    >>> result.loss.backward()                                      # then step any optimiser of net
    >>> rollout.x_s.shape, rewards.shape, result.terms[3].ratio_mean
    (torch.Size([1, 3, 16, 2]), torch.Size([1, 3, 16]), 1.0)

Departures from the paper: form="matched" scores x_s under a density centred on the one that produced it (E7);
term_weights replaces 1 and 1/|S|; a group of equal rewards has advantage zero, not rounding noise over eps.
The released code has no clip and no KL and averages log-probabilities over dimensions ("mean", our default;
"sum" is the true density, E10). A sum over T steps in the paper is a mean over the n stochastic ones here.
Statements named E1, E2, ... are listed in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def per_row(w: Tensor, x: Tensor) -> Tensor:
    """A number per row, w [*batch], cast to x's dtype and shaped to multiply x [*batch, *event]."""
    return w.to(x.dtype).reshape(w.shape + (1,) * (x.ndim - w.ndim))


def evaluate(velocity: Velocity, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """v(x, t, c) in the dtype of the state, whatever the model computes in.

    Raises ValueError for a wrong shape, and for a state below float32: a sampler in half precision is another sampler.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x of dtype {x.dtype}: the state must be float32 or float64, whatever the model computes in")
    v = velocity(x, t.to(x.dtype), c)
    if v.shape != x.shape:
        raise ValueError(f"velocity returned shape {tuple(v.shape)} for x of shape {tuple(x.shape)}: must be equal")
    return v.to(x.dtype)


# ---- Schedule and predicted ends ---------------------------------------------------------------------------


def schedule(steps: int, shift: float = 1.0) -> Tensor:
    """The grid 1 = t_0 > ... > t_T = 0, float64 [T+1]: uniform u, then t = shift u / (1 + (shift-1) u).

    steps >= 1 is T; shift > 0, above 1 spends more steps near the noise (FLUX and SD3 use 3).
    """
    if steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"schedule(steps={steps}, shift={shift}): steps must be >= 1 and shift > 0")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return u / (u + (1 - u) / shift)  # the same function, written so that both ends are exact


class Ends(NamedTuple):
    """The two ends a velocity predicts for a state, each like x."""

    x0_hat: Tensor  # data
    x1_hat: Tensor  # noise


def predicted_ends(x: Tensor, v: Tensor, t: Tensor) -> Ends:
    """x0_hat = x - t v,  x1_hat = x + (1-t) v. t is [B]; x and v are [B, *event]."""
    return Ends(x - per_row(t, x) * v, x + per_row(1 - t, x) * v)


# ---- The policy is a Gaussian ------------------------------------------------------------------------------


class Transition(NamedTuple):
    """p(x_s | x_t) = N(mean, std^2 I): mean [*batch, *event], std [*batch] in float64."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """x_s = mean + std * noise, noise ~ N(0, I) given by the caller."""
        return self.mean + per_row(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduction: str = "mean") -> Tensor:
        """log N(x; mean, std^2 I), constants included, float64 [*batch].

        x broadcasts against mean: one mean can score a whole group. reduction "sum" is the log-density
            sum_d -(x - mean)_d^2 / (2 std^2) - log std - log(2 pi)/2,
        "mean" divides it by the number of dimensions (the field's convention, E10). Raises ValueError where
        std is zero: a Dirac has no density.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
        if not bool((self.std > 0).all()):
            raise ValueError(f"std={self.std.min().item()}: a transition with zero std has no density")
        z = (x - self.mean) / per_row(self.std, x)
        # Added up in float64: a float32 sum over an image would be off by more than a clip range.
        squares = z.double().reshape(*z.shape[: self.std.ndim], -1).square()
        per_dimension = -squares.mean(-1) / 2 - self.std.log() - math.log(2 * math.pi) / 2
        return per_dimension * (squares.shape[-1] if reduction == "sum" else 1)

    def unflatten(self, batch: tuple[int, ...]) -> Transition:
        """The same transitions with their one batch axis split into several."""
        return Transition(self.mean.unflatten(0, batch), self.std.unflatten(0, batch))


# ---- Kernels: x_s | x_t ~ N(a x + b v, std^2 I) -----------------------------------------------------------


class Coefficients(NamedTuple):
    """Of one stochastic step: mean = a x + b v. Each float64, shaped like t."""

    a: Tensor
    b: Tensor
    std: Tensor


def flow_sde(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """Flow-GRPO's step, F_sde^mar: Euler-Maruyama on the marginal-preserving SDE with g = eta sqrt(t/(1-t)).

    a = 1 - g^2 D/(2t),  b = -(1 + g^2 (1-t)/(2t)) D,  std = g sqrt(D),  D = t - s.
    At t = 1, where g is infinite, the field evaluates g, and only g, at t/(1 - t_1), t_1 the grid's second point.
    """
    D = t - s
    g2 = eta**2 * t / (1 - torch.where(t == 1, t_1, t))
    return Coefficients(1 - g2 * D / (2 * t), -(1 + g2 * (1 - t) / (2 * t)) * D, (g2 * D).sqrt())


def cps(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """Flow-CPS's step, F_sde^snr: mean (1-s) x0_hat + s cos(h) x1_hat, std s sin(h), h = eta pi/2, 0 < eta <= 1.

    a = (1-s) + s cos(h),  b = -(1-s) t + s cos(h) (1-t): signal and noise keep their levels exactly.
    At s = 0 the step is a Dirac (std = 0). Raises ValueError for eta above 1, where cos(h) turns negative.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta={eta}: the cps kernel needs 0 < eta <= 1")
    cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    return Coefficients((1 - s) + s * cos, -(1 - s) * t + s * cos * (1 - t), s * sin)


def dance(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """DanceGRPO's step: as flow_sde with a constant diffusion coefficient g = eta.

    a = 1 - eta^2 D/(2t),  b = -D - eta^2 D (1-t)/(2t),  std = eta sqrt(D),  D = t - s.
    """
    D = t - s
    return Coefficients(1 - eta**2 * D / (2 * t), -D - eta**2 * D * (1 - t) / (2 * t), eta * D.sqrt())


KERNELS = {"flow_sde": flow_sde, "cps": cps, "dance": dance}  # to add a kernel, add an entry


@dataclass(frozen=True, eq=False)
class Process:
    """What turns a velocity into a policy: a decreasing grid [T+1] in [0, 1], a kernel's name, and eta > 0.

    The grid is kept in float64 on the CPU. Raises ValueError for anything else, before any work.
    """

    grid: Tensor
    kernel: str = "flow_sde"
    eta: float = 0.7

    def __post_init__(self):
        grid = torch.as_tensor(self.grid, dtype=torch.float64, device="cpu")
        if grid.ndim != 1 or len(grid) < 2 or not bool((grid.diff() < 0).all() and grid[0] <= 1 and grid[-1] >= 0):
            raise ValueError(f"grid={grid.tolist()}: must hold two or more times that strictly decrease within [0, 1]")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r}: must be one of {', '.join(KERNELS)}")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta={self.eta}: must be a positive number")
        object.__setattr__(self, "grid", grid)
        self.coefficients(grid[:-1], grid[1:])  # the kernel may refuse this eta: now rather than later

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        """(a, b, std) of the kernel's step t -> s, float64, shaped like t."""
        return KERNELS[self.kernel](t, s, self.eta, self.grid[1].to(t.device))

    def transition(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        """p(x_s | x_t) = N(a x + b v, std^2 I) for x, v [B, *event] and t, s [B]."""
        a, b, std = self.coefficients(t, s)
        return Transition(per_row(a, x) * x + per_row(b, x) * v, std)

    def stochastic_steps(self, sde_steps: Sequence[int] | None = None) -> tuple[int, ...]:
        """The steps i (from t_i to t_{i+1}) that are stochastic: those named, or None for all with a density.

        Raises ValueError for a step outside 0..T-1, out of order, or without a density (cps ending at s = 0).
        """
        std = self.coefficients(self.grid[:-1], self.grid[1:]).std
        if sde_steps is None:
            return tuple(torch.nonzero(std > 0).flatten().tolist())
        steps = tuple(sde_steps)  # noise and term_weights come in their order
        if not steps or any(type(i) is not int for i in steps) or any(i >= j for i, j in pairwise(steps)) \
                or not 0 <= steps[0] <= steps[-1] < len(std):
            raise ValueError(f"sde_steps={list(sde_steps)}: must be increasing integers from 0 to {len(std) - 1}")
        for i in steps:
            if not std[i] > 0:
                raise ValueError(f"sde_steps={list(sde_steps)}: step {i} ends at t = {self.grid[i + 1].item():g}, "
                                 f"where the {self.kernel} kernel has zero std and no density; leave it out")
        return steps


# ---- Decomposition -----------------------------------------------------------------------------------------
#
#   k = 1   x_t ~~~~~~~~~~~~~~~~~ SDE ~~~~~~~~~~~~~~~~~> x_s     observed; its velocity is v(x_t, t) alone
#   k = 2   x_t ------ ODE ------> x' ~~~~~~ SDE ~~~~~~> x_s     the same two ends, the same reward, but now
#   k = 3   x_t -- ODE --> x' -- ODE --> x'' ~~~ SDE ~~> x_s     v(x', t'), v(x'', t'') are supervised too
#           t                                            s


def check_factors(factors: Sequence[int]) -> tuple[int, ...]:
    """S as a sorted tuple. Raises ValueError unless it holds distinct integers >= 2 (empty: plain GRPO)."""
    if any(type(k) is not int or k < 2 for k in factors) or len(set(factors)) < len(factors):
        raise ValueError(f"factors={list(factors)}: must be distinct integers >= 2 (k = 1, the coarse step, is in)")
    return tuple(sorted(factors))


def decompose(velocity: Velocity, process: Process, x: Tensor, t: Tensor, s: Tensor, c: Tensor,
              factors: Sequence[int]) -> dict[int, Transition]:
    """p^(k)(x_s | x_t) for k = 1 and every k in factors: k-1 Euler sub-steps, then one SDE sub-step.

    With d = (t-s)/k, x^(j+1) = x^(j) - d v_j and v_j = v(x^(j), t - j d), this is
        mu^(k) = a_k x^(k-1) + b_k v_{k-1} = a_k x_t - a_k d sum_{j<k-1} v_j + b_k v_{k-1},
    (a_k, b_k, c_k) the kernel's step s + d -> s. x is [B, *event]; t, s float64 [B]; c [B].
    All chains advance in lock step and share their first velocity: max(S) calls, 1 + sum_k (k-1) evaluations a
    row. Gradients flow through every velocity and every intermediate state. Returns {k: Transition}, k = 1 first.
    """
    chains = dict.fromkeys((1, *check_factors(factors)), x)  # k -> x^(j)
    velocities = dict.fromkeys(chains, evaluate(velocity, x, t, c))  # k -> v_j
    transitions = {}
    for j in range(max(chains)):
        # SDE sub-step of the one chain that has reached its end, s + d = t - (k-1) d.
        k = j + 1
        if k in chains:
            transitions[k] = process.transition(chains.pop(k), velocities.pop(k), t - j * (t - s) / k, s)
        # Euler sub-step of the others, and one call for all their next velocities.
        if chains:
            for k in chains:
                chains[k] = chains[k] - per_row((t - s) / k, x) * velocities[k]
            times = [t - (j + 1) * (t - s) / k for k in chains]
            v = evaluate(velocity, torch.cat([*chains.values()]), torch.cat(times), c.repeat(len(chains)))
            velocities = dict(zip(chains, v.chunk(len(chains)), strict=True))
    return transitions


# ---- Sampling a group --------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """All the randomness of a rollout: start = x_1, [P, 1 or G, *event]; steps [P, n, G, *event]."""

    start: Tensor
    steps: Tensor


def draw_noise(generators: Sequence[torch.Generator], group_size: int, shape: Sequence[int], n_steps: int,
               own_start: bool = False, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu") -> Noise:
    """Standard normal noise, one generator per prompt, so that a prompt's noise depends on nothing else.

    Drawn on the generator's device, start first, then moved: CPU generators give the same noise everywhere.
    own_start gives every member its own x_1 (independent rollouts); otherwise the group shares one.
    """
    if not generators or group_size < 2 or n_steps < 1:
        raise ValueError(f"{len(generators)} generators, group_size={group_size}, n_steps={n_steps}: must be one "
                         f"generator per prompt, two or more members, one or more steps")
    rows = [group_size if own_start else 1, n_steps * group_size]
    draws = [[torch.randn(r, *shape, generator=g, device=g.device, dtype=dtype) for r in rows] for g in generators]
    start, steps = (torch.stack(column).to(device) for column in zip(*draws, strict=True))
    return Noise(start, steps.unflatten(1, (n_steps, group_size)))


class Rollout(NamedTuple):
    """Sampled groups: everything the loss needs. A = 1 state x_t per group (shared anchor) or G of them."""

    process: Process
    sde_steps: tuple[int, ...]  # n of them
    x_t: Tensor  # [P, n, A, *event], where the stochastic step began
    x_s: Tensor  # [P, n, G, *event], where it ended: the observed action
    log_prob: Tensor  # [P, n, G], log p_old(x_s | x_t) stored while sampling, summed over dimensions
    x_0: Tensor  # [P, N, G, *event], to be rewarded; N = n (shared anchor) or 1 (independent)
    anchor_x_0: Tensor | None  # [P, *event], the ODE's own sample, if it was asked for


def sde_step(velocity: Velocity, process: Process, x: Tensor, i: int) -> tuple[Tensor, Transition]:
    """v and p(. | x) of every row of x [P, R, *event] at step i of the grid, in one call."""
    P, R = x.shape[:2]
    c = torch.arange(P, device=x.device).repeat_interleave(R)
    t, s = (process.grid[j].to(x.device).expand(P * R) for j in (i, i + 1))
    v = evaluate(velocity, x.flatten(0, 1), t, c)
    return v.unflatten(0, (P, R)), process.transition(x.flatten(0, 1), v, t, s).unflatten((P, R))


def check_noise(noise: Noise, sde_steps: tuple[int, ...], starts: Sequence[int]) -> None:
    """Raises ValueError where the noise does not fit the steps, or has not one of the given numbers of starts."""
    P, n = noise.steps.shape[:2]
    if n != len(sde_steps) or noise.start.shape not in [(P, a, *noise.steps.shape[3:]) for a in starts]:
        raise ValueError(f"noise with start {tuple(noise.start.shape)} and steps {tuple(noise.steps.shape)}: for "
                         f"{len(sde_steps)} stochastic steps, need start [P, {' or '.join(map(str, starts))}, *event] "
                         f"and steps [P, {len(sde_steps)}, G, *event]")


@torch.no_grad()
def rollout_independent(velocity: Velocity, process: Process, noise: Noise,
                        sde_steps: Sequence[int] | None = None) -> Rollout:
    """G trajectories per prompt, each its own chain (Algorithm 1 as printed); the other steps are ODE.

    x_1 is shared by the group or each member's own, as the noise has it. One velocity call per time. Raises
    ValueError for steps or noise that do not fit.
    """
    steps = process.stochastic_steps(sde_steps)
    P, G = noise.steps.shape[0], noise.steps.shape[2]
    check_noise(noise, steps, starts=(1, G))
    x = noise.start.expand(P, G, *noise.start.shape[2:])
    observed = []  # (x_t, x_s, log p) of each stochastic step
    for i, (t, s) in enumerate(pairwise(process.grid.tolist())):
        v, p = sde_step(velocity, process, x, i)
        if i in steps:
            x_s = p.sample(noise.steps[:, len(observed)])
            observed.append((x, x_s, p.log_prob(x_s, "sum")))
            x = x_s
        else:
            x = x - (t - s) * v
    x_t, x_s, log_prob = (torch.stack(column, dim=1) for column in zip(*observed, strict=True))
    return Rollout(process, steps, x_t, x_s, log_prob, x.unsqueeze(1), None)


@torch.no_grad()
def rollout_shared_anchor(velocity: Velocity, process: Process, noise: Noise,
                          sde_steps: Sequence[int] | None = None, finish_anchor: bool = False) -> Rollout:
    """One ODE trajectory per prompt; at each stochastic step G members branch from it and finish by ODE.

    Each (prompt, step) is its own group (the released training setting). The anchor stops after its last
    stochastic step unless finish_anchor. All live rows of all prompts advance in one velocity call per time.
    Raises ValueError for steps or noise that do not fit.
    """
    steps = process.stochastic_steps(sde_steps)
    (P, n, G), event = noise.steps.shape[:3], noise.steps.shape[3:]
    check_noise(noise, steps, starts=(1,))
    anchor, branches = noise.start, noise.start.new_empty(P, 0, *event)  # [P, 1, ...], [P, branched so far * G, ...]
    observed = []
    for i, (t, s) in enumerate(pairwise(process.grid.tolist())):
        x = torch.cat([anchor, branches], dim=1)
        v, p = sde_step(velocity, process, x, i)
        moved = x - (t - s) * v  # ODE step of every row
        alive = anchor.shape[1]
        anchor, branches = moved[:, :alive], moved[:, alive:]
        if i in steps:  # G members leave the anchor by an SDE step
            p = Transition(p.mean[:, :1], p.std[:, :1])
            x_s = p.sample(noise.steps[:, len(observed)])
            observed.append((x[:, :1], x_s, p.log_prob(x_s, "sum")))
            branches = torch.cat([branches, x_s], dim=1)
        if i == steps[-1] and not finish_anchor:
            anchor = anchor[:, :0]
    x_t, x_s, log_prob = (torch.stack(column, dim=1) for column in zip(*observed, strict=True))
    anchor_x_0 = anchor.squeeze(1) if finish_anchor else None
    return Rollout(process, steps, x_t, x_s, log_prob, branches.unflatten(1, (n, G)), anchor_x_0)


@torch.no_grad()
def ode_sample(velocity: Velocity, grid: Tensor, x: Tensor) -> Tensor:
    """Euler along the grid, x <- x - (t - s) v(x, t), from x_1 = x [B, *event] to x_0; row b has c = b."""
    c = torch.arange(len(x), device=x.device)
    for t, s in pairwise(grid.tolist()):
        x = x - (t - s) * evaluate(velocity, x, torch.full((len(x),), t, dtype=torch.float64, device=x.device), c)
    return x


# ---- Advantages --------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, ddof: int = 1, eps: float = 1e-8, clamp: float | None = 5.0) -> Tensor:
    """A = (r - mean r) / (std r + eps) over the last axis of rewards [..., G], then clamped to [-clamp, clamp].

    The released defaults: ddof 1, eps 1e-8, clamp 5, which cannot act for G <= 26 since |A| <= (G-1)/sqrt(G); where
    it does act, sum A = 0 and with it E2 are lost. A group of equal rewards gets exact zeros, not rounding noise
    over eps; it stays in every mean. The result is float32, or float64 if the rewards are. Raises ValueError for a
    reward that is not finite.
    """
    G = rewards.shape[-1]
    if G < 2 or ddof not in (0, 1) or not eps >= 0 or not (clamp is None or clamp > 0):
        raise ValueError(f"group of {G}, ddof={ddof}, eps={eps}, clamp={clamp}: must be a group of 2 or more, "
                         f"ddof 0 or 1, eps >= 0, clamp > 0 or None")
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards: {(~rewards.isfinite()).sum().item()} of {rewards.numel()} are not finite")
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = r - r.mean(-1, keepdim=True)
    equal = r.amax(-1, keepdim=True) == r.amin(-1, keepdim=True)
    advantages = centred / torch.where(equal, 1, r.std(-1, correction=ddof, keepdim=True) + eps)
    advantages = torch.where(equal, 0, advantages)
    return advantages if clamp is None else advantages.clamp(-clamp, clamp)


# ---- Loss --------------------------------------------------------------------------------------------------


class Old(NamedTuple):
    """theta_old, remembered from the first pass over a rollout, detached; one entry per k."""

    means: dict[int, Tensor]  # mu^(k)_old, [P, n, A, *event]
    log_probs: dict[int, Tensor]  # of x_s under what was scored, [P, n, G]
    form: str
    reduction: str
    rollout: Rollout  # what they were computed for
    sampling_gap: float  # max |log p(x_s|x_t) while sampling - in the first pass|, in the loss's reduction


class Term(NamedTuple):
    """What one k did in a loss. Ratios are p_theta / p_old in the loss's reduction."""

    ratio_mean: float
    ratio_min: float
    ratio_max: float
    clip_fraction: float  # share of members with a non-zero advantage whose term the clip cut
    effective_weight: Tensor  # [n], (c_1 / std scored)^2: the scale of this term's attribution (E2)


class PolicyLoss(NamedTuple):
    """The loss to descend, with its named statistics."""

    loss: Tensor  # scalar, float64
    terms: dict[int, Term]
    kl: float  # mean KL to the reference, in the loss's reduction; 0 without one
    groups_without_signal: int  # groups whose advantages are all zero; they count in the mean
    old: Old  # pass it to the next update on the same rollout


class Surrogate(NamedTuple):
    """PPO's term and its parts, each shaped like the advantages."""

    value: Tensor
    ratio: Tensor
    clipped: Tensor  # bool: the clip cut this member's term, and with it the gradient


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float | None) -> Surrogate:
    """min(ratio A, clip(ratio, 1-clip, 1+clip) A), to be maximised; clip None never cuts (as released)."""
    ratio = log_ratio.exp()
    cut = ratio.detach() if clip is None else ratio.detach().clamp(1 - clip, 1 + clip)
    clipped = cut * advantages < ratio.detach() * advantages
    # A ratio that overflows must not turn the zero gradient of a cut or silent member into 0 * inf.
    kept = torch.where(clipped | (advantages == 0), 0, log_ratio).exp() * advantages
    return Surrogate(torch.where(clipped, cut * advantages, kept), ratio, clipped)


def check_loss(rollout: Rollout, advantages: Tensor, form: str, clip: float | None, kl: float,
               reference: Velocity | None, ks: tuple[int, ...], term_weights: Mapping | None, reduction: str,
               old: Old | None) -> None:
    """Raises ValueError, in one line, for arguments of policy_loss that do not fit together."""
    (P, n, G), N = rollout.x_s.shape[:3], rollout.x_0.shape[1]
    if advantages.shape != (P, N, G):
        raise ValueError(f"advantages of shape {tuple(advantages.shape)}: must be {(P, N, G)}, as rollout.x_0 begins")
    if form not in ("paper", "matched"):
        raise ValueError(f"form={form!r}: must be 'paper' or 'matched'")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip}: must be positive, or None not to clip")
    if not 0 <= kl < math.inf or (kl > 0) != (reference is not None):
        raise ValueError(f"kl={kl}: must be >= 0, with a reference velocity if and only if it is positive")
    if term_weights is not None and set(term_weights) != set(ks):
        raise ValueError(f"term_weights for k = {sorted(term_weights)}: must name exactly k = {list(ks)}")
    for k, weight in (term_weights or {}).items():
        if (shape := torch.as_tensor(weight).shape) not in [(), (n,)]:
            raise ValueError(f"term_weights[{k}] of shape {tuple(shape)}: must be a number or [{n}]")
    if old is not None and (set(old.log_probs) != set(ks) or (old.form, old.reduction) != (form, reduction)
                            or old.rollout is not rollout):
        raise ValueError(f"old is of k = {sorted(old.log_probs)}, {old.form!r}, {old.reduction!r}: must be of the same "
                         f"rollout, k = {list(ks)}, {form!r}, {reduction!r}")


def rescore(velocity: Velocity, rollout: Rollout, factors: Sequence[int]) -> dict[int, Transition]:
    """p^(k) of every observed transition, k = 1 first, in one batch: means [P, n, A, *event], stds [P, n, A]."""
    process, batch, device = rollout.process, rollout.x_t.shape[:3], rollout.x_t.device
    ends = (process.grid[[i + j for i in rollout.sde_steps]].to(device) for j in (0, 1))
    t, s = (end[None, :, None].expand(batch).flatten() for end in ends)
    c = torch.arange(batch[0], device=device).repeat_interleave(batch[1] * batch[2])
    transitions = decompose(velocity, process, rollout.x_t.flatten(0, 2), t, s, c, factors)
    return {k: p.unflatten(batch) for k, p in transitions.items()}


def policy_loss(velocity: Velocity, rollout: Rollout, advantages: Tensor, *, factors: Sequence[int] = (2, 3),
                form: str = "paper", clip: float | None = 0.2, kl: float = 0.0, reference: Velocity | None = None,
                term_weights: Mapping[int, float | Tensor] | None = None, reduction: str = "mean",
                old: Old | None = None) -> PolicyLoss:
    """-J of Algorithm 1: J = mean sum_k w_k min(ratio_k A, clip(ratio_k) A) - kl KL, over members, steps, prompts.

    factors        S; empty is Flow-GRPO, Flow-CPS or DanceGRPO, by the rollout's kernel
    form           "paper" scores x_s under N(mu^(k), c_k^2 I); "matched" (E7) under
                   N(mu^(1)_old + mu^(k) - mu^(k)_old, c_1^2 I), which at theta_old produced the sample
    term_weights   {k: w_k}, a number or one per stochastic step [n]; default 1 for k = 1 and 1/|S| for the rest
    reference      velocity of pi_ref; KL = |mu - mu_ref|^2 / (2 c_1^2) of the coarse steps at the observed x_t,
                   reduced as the log-probability is
    clip           > 0; ratios of "mean" log-probabilities stay close to 1 (E10), and so must a clip that is to act
    old            the result's .old of the first update; None makes this pass theta_old, so every ratio is 1
    advantages     [P, N, G], as group_advantages gives them for the rewards of rollout.x_0
    Raises ValueError, before any evaluation, for arguments that do not fit together. Paper, Algorithm 1.
    """
    ks = (1, *check_factors(factors))
    check_loss(rollout, advantages, form, clip, kl, reference, ks, term_weights, reduction, old)
    weights = term_weights or {k: 1.0 if k == 1 else 1 / (len(ks) - 1) for k in ks}

    # p^(k) for every k; one mean per x_t, broadcast over the members that left it.
    transitions = rescore(velocity, rollout, factors)
    means_old = old.means if old else {k: p.mean.detach() for k, p in transitions.items()}
    log_probs, terms, J = {}, {}, 0.0
    for k, p in transitions.items():
        if form == "matched" and k > 1:
            p = Transition(means_old[1] + (p.mean - means_old[k]), transitions[1].std)
        log_probs[k] = p.log_prob(rollout.x_s, reduction)
        log_prob_old = old.log_probs[k] if old else log_probs[k].detach()
        value, ratio, clipped = clipped_surrogate(log_probs[k] - log_prob_old, advantages, clip)
        weight = torch.as_tensor(weights[k], dtype=value.dtype, device=value.device).reshape(-1, 1)
        J = J + (weight * value).mean()
        cut = clipped.sum() / (advantages != 0).expand_as(clipped).sum().clamp(min=1)
        scale = ((transitions[1].std / p.std) ** 2)[0, :, 0]
        terms[k] = Term(*(f.item() for f in (ratio.mean(), ratio.min(), ratio.max(), cut)), scale)

    # KL(pi_theta || pi_ref): of Gaussians with one std, the log-ratio at the mean.
    divergence = torch.zeros((), dtype=torch.float64, device=rollout.x_t.device)
    if reference is not None:
        with torch.no_grad():
            p_ref = rescore(reference, rollout, ())[1]
        mu = transitions[1].mean
        divergence = (transitions[1].log_prob(mu, reduction) - p_ref.log_prob(mu, reduction)).mean()

    if old is None:
        dims = 1 if reduction == "sum" else rollout.x_s[0, 0, 0].numel()
        gap = (rollout.log_prob / dims - log_probs[1].detach()).abs().max().item()
        old = Old(means_old, {k: p.detach() for k, p in log_probs.items()}, form, reduction, rollout, gap)
    silent = int((advantages == 0).all(dim=-1).sum())
    return PolicyLoss(kl * divergence - J, terms, divergence.item(), silent, old)
