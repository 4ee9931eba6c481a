"""Pave-GRPO from noise to gradient, in one file that knows no model, no reward and no disk.

The method of "Pave-GRPO: Beyond Instantaneous Guidance through Principled Average Velocity
Decomposition" (arXiv 2606.01636).

Algorithm 1. Each iteration, with theta_old <- theta:
  1. sample G members per prompt; some of the T steps are stochastic:   rollout_independent,
     x_s ~ p_old(x_s|x_t) = N(mu_old, std^2 I)                          rollout_shared_anchor
  2. reward every finished sample; A = (r - mean r) / std r             group_advantages
  3. score each observed x_t -> x_s again, for every k in {1} + S:      decompose
     p^(k) = (k-1) ODE sub-steps, then one SDE sub-step
     ratio_k = p^(k)_theta(x_s|x_t) / p^(k)_old(x_s|x_t)                k = 1: the sampled step
  4. ascend J = mean sum_k w_k min(ratio_k A, clip(ratio_k) A) - kl KL  policy_loss
     with w_1 = 1 and w_k = 1/|S|: nothing new is sampled, nothing new is rewarded

Time: t = 1 is noise, t = 0 is data, x_t = (1-t) x_0 + t x_1 (rectified flow).
Axes: P prompts, n stochastic steps, G members of a group; *event is the shape of one state.

  symbol   shape               meaning, range
  x_1      [P, 1|G, *event]    the noise a trajectory starts from, shared by its group or not
  x_t      [P, n, 1|G, *event] where a stochastic step began: one state per group, or G
  x_s      [P, n, G, *event]   where it ended, the observed action
  x_0      [P, N, G, *event]   what is rewarded; N = n (shared anchor) or 1 (independent)
  z        [P, n, G, *event]   standard normal noise of the stochastic steps
  t, s     [B], float64        a step goes from t down to s, 0 <= s < t <= 1; B rows of a batch
  v        like x              velocity dx/dt = E[x_1 - x_0 | x_t]
  k, S     integers            sub-steps of a decomposition; S, the factors, is a set of k >= 2
  stride   1, 2, ...           grid steps of an ODE step between the last noise and x_0; its order
                               is 1 or 2
  eta      > 0                 how stochastic a kernel is; g its diffusion coefficient
  mu, std  like x; [B]         mean and standard deviation of a transition (mu^(k), c_k; never g)
  r, A     [P, N, G]           reward and advantage

A velocity is any callable velocity(x, t, prompt) -> v with x [B, *event], t [B] like x and
prompt [B], the integer index of the prompt a row belongs to. Pictures, packed latents, video
and a point in the plane are all the same to it:

    >>> net = torch.nn.Linear(3, 2)
    >>> def velocity(x, t, prompt):
    ...     return net(torch.cat([x, t[:, None]], dim=1))
    >>> process = Process(schedule(8), kernel="cps", eta=0.7)
    >>> noise = draw_noise([torch.Generator().manual_seed(0)], group_size=16, shape=(2,), n_steps=3)
    >>> rollout = rollout_shared_anchor(velocity, process, noise, sde_steps=[0, 2, 4])
    >>> rewards = -rollout.x_0.square().sum(dim=-1)               # pull points to the origin
    >>> result = policy_loss(velocity, rollout, group_advantages(rewards), factors=(2, 3))
    >>> result.loss.backward()                                    # then step an optimiser of net
    >>> rollout.x_s.shape, rewards.shape, result.terms[3].ratio_mean
    (torch.Size([1, 3, 16, 2]), torch.Size([1, 3, 16]), 1.0)

Departures from the paper: form="matched" scores x_s under a density centred on the one that
produced it (E7); form="midpoint" trains one velocity inside the step and no k-term (E14);
term_weights replaces 1 and 1/|S|; stride and order above 1 take fewer or better steps from the
last noise to x_0; a group of equal rewards has advantage zero, where rounding noise over eps would
do. The released code has no clip and no KL, and averages log-probabilities over dimensions: "mean",
our default; "sum" is the true density (E10). The paper's sum over T steps is a mean over the n
stochastic ones. E1, E2, ... are statements that verify_equivalence.py puts to the test
(docs/VERDICTS.md).
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
    """A number per row, w [*batch], in x's dtype and shaped to multiply x [*batch, *event]."""
    return w.to(x.dtype).reshape(w.shape + (1,) * (x.ndim - w.ndim))


def beside(x: Tensor, w: float | Tensor) -> Tensor:
    """w in float64 on the device of x, by a copy that is not waited for."""
    return torch.as_tensor(w, dtype=torch.float64).to(x.device, non_blocking=True)


def fetched(*numbers: Tensor) -> tuple[Tensor, ...]:
    """These vectors on the CPU, by one copy: each is waited for."""
    return torch.split(torch.cat(numbers).cpu(), [len(vector) for vector in numbers])


def evaluate(velocity: Velocity, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """v(x, t, prompt) in the dtype of the state, whatever the model computes in.

    Raises ValueError for a v of another shape than x, and for a state below float32.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x of dtype {x.dtype}: must be float32 or float64, whatever the model's")
    v = velocity(x, t.to(x.dtype), prompt)
    if v.shape != x.shape:
        raise ValueError(f"velocity returned shape {tuple(v.shape)}: must be x's, {tuple(x.shape)}")
    return v.to(x.dtype)


def schedule(T: int, shift: float = 1.0) -> Tensor:
    """The grid 1 = t_0 > ... > t_T = 0, float64 [T+1]: t = shift u / (1 + (shift-1) u), u uniform.

    T >= 1. shift > 0; above 1 it spends more steps near the noise (FLUX and SD3 use 3).
    """
    if T < 1 or not 0 < shift < math.inf:
        raise ValueError(f"schedule(T={T}, shift={shift}): must be T >= 1 and shift > 0")
    u = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    return u / (u + (1 - u) / shift)  # the same function, written so that both ends are exact


# ---- The policy is a Gaussian --------------------------------------------------------------------


class Transition(NamedTuple):
    """p(x_s | x_t) = N(mean, std^2 I): mean [*batch, *event], std [*batch] in float64."""

    mean: Tensor
    std: Tensor

    def sample(self, z: Tensor) -> Tensor:
        """x_s = mean + std z, with z ~ N(0, I) given by the caller."""
        return self.mean + per_row(self.std, self.mean) * z

    def log_prob(self, x: Tensor, reduction: str = "mean") -> Tensor:
        """log N(x; mean, std^2 I), constants included, float64 [*batch].

        x broadcasts against mean: one mean can score a whole group. reduction "sum" is the density,
            sum_d -(x - mean)_d^2 / (2 std^2) - log std - log(2 pi)/2,
        "mean" divides it by the number of dimensions (the field's convention, E10). Squares are
        taken in x's dtype and added up in float64: of float32 each is off by a factor within
        1 +- 2^-24, and so is their mean; float32 sums would be off by more than a clip range.
        Raises ValueError where std is zero: a Dirac has no density.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
        if not bool((self.std > 0).all()):
            raise ValueError(f"std={self.std.min().item()}: must be positive to have a density")
        return self.log_density(x, reduction)

    def log_density(self, x: Tensor, reduction: str) -> Tensor:
        """`log_prob` where std is known to be positive: to ask a device is to wait for it."""
        z = (x - self.mean) / per_row(self.std, x)
        z = z.reshape(*z.shape[: self.std.ndim], -1)
        d = z.shape[-1]
        mean_square = z.square().sum(-1, dtype=torch.float64) / d
        per_dimension = -mean_square / 2 - self.std.log() - math.log(2 * math.pi) / 2
        return per_dimension * (d if reduction == "sum" else 1)

    def unflatten(self, batch: tuple[int, ...]) -> Transition:
        """The same transitions with their one batch axis split into several."""
        event = self.mean.shape[1:]
        return Transition(self.mean.reshape(*batch, *event), self.std.reshape(batch))


# ---- Kernels: x_s | x_t ~ N(a x + b v, std^2 I) --------------------------------------------------


class Coefficients(NamedTuple):
    """Of one stochastic step: mean = a x + b v. Each float64, shaped like t."""

    a: Tensor
    b: Tensor
    std: Tensor


Kernel = Callable[[Tensor, Tensor, float, Tensor], Coefficients]


def flow_sde(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """Flow-GRPO's step, F_sde^mar: Euler-Maruyama, marginals kept by g = eta sqrt(t/(1-t)).

    a = 1 - g^2 D/(2t),  b = -(1 + g^2 (1-t)/(2t)) D,  std = g sqrt(D),  D = t - s.
    At t = 1, where g is infinite, the field takes t_1, the grid's second point, for t in 1 - t.
    """
    D = t - s
    g2 = eta**2 * t / (1 - torch.where(t == 1, t_1, t))
    a = 1 - g2 * D / (2 * t)
    b = -(1 + g2 * (1 - t) / (2 * t)) * D
    return Coefficients(a, b, (g2 * D).sqrt())


def cps(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """Flow-CPS's step, F_sde^snr: signal and noise keep their levels. h = eta pi/2, 0 < eta <= 1.

    mean = (1-s) x0_hat + s cos(h) x1_hat of the predicted ends x0_hat = x - t v, x1_hat = x +
    (1-t) v:  a = (1-s) + s cos(h),  b = -(1-s) t + s cos(h) (1-t),  std = s sin(h).
    At s = 0 the step is a Dirac, std = 0. Raises ValueError for eta > 1, where cos(h) < 0.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta={eta}: the cps kernel needs 0 < eta <= 1")
    h = eta * math.pi / 2
    cos = math.cos(h)
    sin = math.sin(h)
    a = (1 - s) + s * cos
    b = -(1 - s) * t + s * cos * (1 - t)
    return Coefficients(a, b, s * sin)


def dance(t: Tensor, s: Tensor, eta: float, t_1: Tensor) -> Coefficients:
    """DanceGRPO's step: as flow_sde, with a constant diffusion coefficient g = eta.

    a = 1 - eta^2 D/(2t),  b = -D - eta^2 D (1-t)/(2t),  std = eta sqrt(D),  D = t - s.
    """
    D = t - s
    a = 1 - eta**2 * D / (2 * t)
    b = -D - eta**2 * D * (1 - t) / (2 * t)
    return Coefficients(a, b, eta * D.sqrt())


# To add a kernel, add an entry; what theory predicts of it stands in zoo/oracle/theory.py.
KERNELS: dict[str, Kernel] = {"flow_sde": flow_sde, "cps": cps, "dance": dance}


@dataclass(frozen=True, eq=False)
class Process:
    """What makes a velocity a policy: a decreasing grid [T+1] in [0, 1], a kernel and eta > 0.

    The grid is kept in float64 on the CPU. Raises ValueError for anything else, before any work.
    """

    grid: Tensor
    kernel: str = "flow_sde"
    eta: float = 0.7

    def __post_init__(self) -> None:
        grid = torch.as_tensor(self.grid, dtype=torch.float64, device="cpu")
        object.__setattr__(self, "grid", grid)
        check_process(self)

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        """(a, b, std) of the kernel's step t -> s, float64, shaped like t."""
        return KERNELS[self.kernel](t, s, self.eta, beside(t, self.grid[1]))

    def transition(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        """p(x_s | x_t) = N(a x + b v, std^2 I) for x, v [B, *event] and t, s [B]."""
        a, b, std = self.coefficients(t, s)
        return Transition(per_row(a, x) * x + per_row(b, x) * v, std)

    def stochastic_steps(self, sde_steps: Sequence[int] | None = None) -> tuple[int, ...]:
        """The steps i, from t_i to t_{i+1}, that are stochastic: those named, or all that can be.

        A step can be where its std is positive; cps ending at s = 0 cannot. Raises ValueError for
        a step that cannot be, is outside 0..T-1, or is out of order.
        """
        std = self.coefficients(self.grid[:-1], self.grid[1:]).std
        if sde_steps is None:
            return tuple(torch.nonzero(std > 0).flatten().tolist())
        check_steps(self, std, sde_steps)
        return tuple(sde_steps)


# ---- Decomposition -------------------------------------------------------------------------------
#
#   k = 1   x_t ~~~~~~~~~~~~~~~~~ SDE ~~~~~~~~~~~~~~~~~> x_s   observed; supervises v(x_t, t) alone
#   k = 2   x_t ------ ODE ------> x' ~~~~~~ SDE ~~~~~~> x_s   the same ends and the same reward,
#   k = 3   x_t -- ODE --> x' -- ODE --> x'' ~~~ SDE ~~> x_s   but now v(x', t') is supervised too
#           t                                            s


def decompose(
    velocity: Velocity,
    process: Process,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    prompt: Tensor,
    factors: Sequence[int],
) -> dict[int, Transition]:
    """p^(k)(x_s | x_t) for k = 1 and every k in factors: k-1 Euler sub-steps, one SDE sub-step.

    With d = (t-s)/k, v_j = v(x^(j), t - j d) and x^(j+1) = x^(j) - d v_j, from x^(0) = x:
        mu^(k) = a x^(k-1) + b v_{k-1}, with the kernel's (a, b, std) of its sub-step s + d -> s.
    x is [B, *event]; t, s float64 [B]; prompt [B]. All k share v_0: 1 + sum_k (k-1) evaluations
    a row. Gradients flow through every velocity and every state. Returns {k: p^(k)}.
    """
    v_0 = evaluate(velocity, x, t, prompt)
    transitions = {1: process.transition(x, v_0, t, s)}
    for k in check_factors(factors):
        d = (t - s) / k
        x_j = x
        v_j = v_0
        for j in range(1, k):
            x_j = x_j - per_row(d, x) * v_j
            v_j = evaluate(velocity, x_j, t - j * d, prompt)
        transitions[k] = process.transition(x_j, v_j, t - (k - 1) * d, s)
    return transitions


# ---- Sampling a group ----------------------------------------------------------------------------


class Noise(NamedTuple):
    """All the randomness of a rollout: x_1 [P, 1|G, *event] and z [P, n, G, *event]."""

    x_1: Tensor
    z: Tensor


def draw_noise(
    generators: Sequence[torch.Generator],
    group_size: int,
    shape: Sequence[int],
    n_steps: int,
    own_start: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Noise:
    """Noise from one generator per prompt, so that a prompt's noise depends on nothing else.

    Drawn on the generator's device, x_1 first, then moved: CPU generators give the same noise
    everywhere. own_start gives every member its own x_1 (independent rollouts), else one is shared.
    """
    check_draw(len(generators), group_size, n_steps)

    def normal(generator: torch.Generator, *axes: int) -> Tensor:
        where = generator.device
        return torch.randn(*axes, *shape, generator=generator, device=where, dtype=dtype)

    x_1, z = [], []
    for generator in generators:
        x_1.append(normal(generator, group_size if own_start else 1))
        z.append(normal(generator, n_steps, group_size))
    return Noise(torch.stack(x_1).to(device), torch.stack(z).to(device))


def draw_places(generators: Sequence[torch.Generator], n_steps: int, states: int = 1) -> Tensor:
    """Places u in [0, 1) for form="midpoint", uniform, float64 [P, n, states] on the CPU.

    From one generator per prompt, after its noise; states is 1 (shared anchor) or G.
    """
    drawn = []
    for generator in generators:
        device = generator.device
        u = torch.rand(n_steps, states, generator=generator, device=device, dtype=torch.float64)
        drawn.append(u.cpu())
    return torch.stack(drawn)


class Rollout(NamedTuple):
    """Sampled groups: everything the loss needs. Shapes as in the module's table."""

    process: Process
    sde_steps: tuple[int, ...]  # n of them
    x_t: Tensor
    x_s: Tensor
    log_prob: Tensor  # [P, n, G], log p_old(x_s | x_t) stored while sampling, summed
    x_0: Tensor
    v: Tensor | None = None  # like x_t, v_old(x_t, t) kept while sampling


class Observed(NamedTuple):
    """One stochastic step of a rollout, as it was sampled."""

    x_t: Tensor
    x_s: Tensor
    log_prob: Tensor
    v: Tensor


def rollout_of(
    process: Process, steps: tuple[int, ...], observed: list[Observed], x_0: Tensor
) -> Rollout:
    """The observed steps side by side on axis 1."""
    x_t = torch.stack([step.x_t for step in observed], dim=1)
    x_s = torch.stack([step.x_s for step in observed], dim=1)
    log_prob = torch.stack([step.log_prob for step in observed], dim=1)
    v = torch.stack([step.v for step in observed], dim=1)
    return Rollout(process, steps, x_t, x_s, log_prob, x_0, v)


def velocity_at(velocity: Velocity, process: Process, x: Tensor, i: int) -> Tensor:
    """v of x [P, R, *event], R rows a prompt, where step i of the grid begins, in one call."""
    P, R = x.shape[:2]
    prompt = torch.arange(P, device=x.device).repeat_interleave(R)
    t = beside(x, process.grid[i]).expand(P * R)
    return evaluate(velocity, x.flatten(0, 1), t, prompt).reshape(x.shape)


def transition_at(process: Process, x: Tensor, v: Tensor, i: int) -> Transition:
    """p(. | x) of step i of the grid for x, v [P, R, *event]."""
    t, s = beside(x, process.grid[i : i + 2])
    return process.transition(x, v, t.expand(x.shape[:2]), s.expand(x.shape[:2]))


def finished(
    velocity: Velocity, process: Process, x: Tensor, i: int, stride: int, order: int
) -> Tensor:
    """x_0 of x [P, R, *event] at point i of the grid, by ODE steps that span `stride` of its steps.

    The first spans what is left over. With v where it begins and D its length, a step of order 1 is
    Euler's x <- x - D v. One of order 2 is Adams' and Bashforth's, from the second step on: the
    line through v and the velocity before it, a step of D_before ago, at the middle of the step,
        x <- x - D (v + D / (2 D_before) (v - v_before)).
    """
    grid = process.grid.tolist()
    points = [i, *reversed(range(len(grid) - 1, i, -stride))]  # counted from the end
    v_before: Tensor | None = None
    D_before = 0.0
    for here, there in pairwise(points):
        D = grid[here] - grid[there]
        v = velocity_at(velocity, process, x, here)
        slope = v
        if v_before is not None:
            slope = v + D / (2 * D_before) * (v - v_before)
        x = x - D * slope
        v_before = v if order == 2 else None
        D_before = D
    return x


@torch.no_grad()
def rollout_independent(
    velocity: Velocity,
    process: Process,
    noise: Noise,
    sde_steps: Sequence[int] | None = None,
    stride: int = 1,
    order: int = 1,
) -> Rollout:
    """G trajectories per prompt, each a chain of its own (Algorithm 1 as printed).

    Steps that are not stochastic are Euler steps of the ODE, or after the last stochastic one those
    of `finished`, with stride and order. x_1 is shared by the group or each member's own, as the
    noise has it. One velocity call per time. Raises ValueError for steps, noise, stride or order
    that do not fit.
    """
    steps = process.stochastic_steps(sde_steps)
    P, _, G = noise.z.shape[:3]
    check_noise(noise, steps, starts=(1, G))
    check_finish(stride, order)
    grid = process.grid.tolist()
    x = noise.x_1.expand(P, G, *noise.x_1.shape[2:])
    observed: list[Observed] = []
    for i in range(steps[-1] + 1):
        v = velocity_at(velocity, process, x, i)
        if i in steps:
            p = transition_at(process, x, v, i)
            x_s = p.sample(noise.z[:, len(observed)])
            observed.append(Observed(x, x_s, p.log_density(x_s, "sum"), v))
            x = x_s
        else:
            x = x - (grid[i] - grid[i + 1]) * v
    x_0 = finished(velocity, process, x, steps[-1] + 1, stride, order)
    return rollout_of(process, steps, observed, x_0.unsqueeze(1))


@torch.no_grad()
def rollout_shared_anchor(
    velocity: Velocity,
    process: Process,
    noise: Noise,
    sde_steps: Sequence[int] | None = None,
    stride: int = 1,
    order: int = 1,
) -> Rollout:
    """One ODE trajectory per prompt, the anchor; at each stochastic step G members branch from it.

    Each (prompt, step) is a group of its own, whose members get to their x_0 by the ODE steps of
    `finished`, with stride and order: the released training setting at 1 and 1. The anchor stops
    after its last stochastic step. One velocity call per time for the anchor, and one for each
    step's members. Raises ValueError for steps, noise, stride or order that do not fit.
    """
    steps = process.stochastic_steps(sde_steps)
    check_noise(noise, steps, starts=(1,))
    check_finish(stride, order)
    grid = process.grid.tolist()
    x = noise.x_1
    observed: list[Observed] = []
    x_0: list[Tensor] = []
    for i in range(steps[-1] + 1):
        v = velocity_at(velocity, process, x, i)
        if i in steps:
            p = transition_at(process, x, v, i)
            x_s = p.sample(noise.z[:, len(observed)])
            observed.append(Observed(x, x_s, p.log_density(x_s, "sum"), v))
            x_0.append(finished(velocity, process, x_s, i + 1, stride, order))
        x = x - (grid[i] - grid[i + 1]) * v
    return rollout_of(process, steps, observed, torch.stack(x_0, dim=1))


@torch.no_grad()
def ode_sample(velocity: Velocity, grid: Tensor, x: Tensor) -> Tensor:
    """x_0 by Euler steps x <- x - (t - s) v from x = x_1 [B, *event]; row b asks prompt b."""
    prompt = torch.arange(len(x), device=x.device)
    for t, s in pairwise(grid.tolist()):
        times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        x = x - (t - s) * evaluate(velocity, x, times, prompt)
    return x


# ---- Advantages ----------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor,
    ddof: int = 1,
    eps: float = 1e-8,
    clamp: float | None = 5.0,
    standardise: bool = True,
) -> Tensor:
    """A = (r - mean r) / (std r + eps) over the last axis of [..., G], clamped to [-clamp, clamp].

    The released defaults. standardise=False is Dr.GRPO's A = r - mean r, which has no ddof and no
    eps. A clamp at 5 cannot act for G <= 26, since |A| <= (G-1)/sqrt(G) if standardised; where
    a clamp acts, sum A = 0 is lost, and E2 with it. A group of equal rewards gets exact zeros and
    stays in every mean. float32, or float64 if the rewards are. Raises ValueError for a reward that
    is not finite.
    """
    check_group(rewards, ddof, eps, clamp)
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = r - r.mean(-1, keepdim=True)
    equal = r.amax(-1, keepdim=True) == r.amin(-1, keepdim=True)
    std = r.std(-1, correction=ddof, keepdim=True)
    scale = std + eps if standardise else torch.ones_like(std)
    A = torch.where(equal, 0, centred / torch.where(equal, 1, scale))
    return A if clamp is None else A.clamp(-clamp, clamp)


# ---- Loss ----------------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """PPO's term and its parts, each shaped like the advantages."""

    value: Tensor
    ratio: Tensor
    is_cut: Tensor  # bool: the clip acts on this member, which then has no gradient


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float | None) -> Surrogate:
    """min(ratio A, clip(ratio, 1-clip, 1+clip) A), to be maximised; clip None never acts."""
    ratio = log_ratio.detach().exp()
    bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    is_cut = bounded * advantages < ratio * advantages
    # A ratio that overflows must not turn the zero gradient of a cut or silent member into 0 * inf.
    free = torch.where(is_cut | (advantages == 0), 0, log_ratio).exp() * advantages
    return Surrogate(torch.where(is_cut, bounded * advantages, free), ratio, is_cut)


def normalised_log_ratio(log_ratio: Tensor, delta: Tensor, std: Tensor, reduction: str) -> Tensor:
    """GRPO-Guard's c (log ratio + |delta|^2 / (2 c^2)) = delta . (x_s - mu_old) / c, [P, n, G].

    delta = mu - mu_old [P, n, 1|G, *event] and c = std [P, n, 1|G] are of what x_s was scored
    under; delta . z is reduced as the log-probability is. Where that is what x_s was drawn from
    (k = 1, and the forms matched and midpoint) it is centred, and as wide at every step for an
    equal delta, so that one clip range suits all steps (arXiv 2510.22319, equation 8).
    """
    squared = delta.square().flatten(std.ndim)
    add = torch.sum if reduction == "sum" else torch.mean
    distance = add(squared, -1, dtype=torch.float64)
    return std * (log_ratio + distance / (2 * std.square()))


class TermStatistics(NamedTuple):
    """What one k did in a loss. Ratios are p_theta / p_old in the loss's reduction, as clipped."""

    ratio_mean: float
    ratio_min: float
    ratio_max: float
    clip_fraction: float  # of the members with a non-zero advantage, how many the clip cut
    # (c_1 / std scored)^2, with ratio_norm its root: the scale of the term's attribution (E2),
    # [n] on the CPU
    effective_weight: Tensor


def statistics_of(term: Surrogate, advantages: Tensor, weight: Tensor) -> Tensor:
    """The fields of TermStatistics as one vector; weight [P, n, 1|G] depends on the step alone."""
    ratio = term.ratio
    speaking = (advantages != 0).expand_as(term.is_cut).sum()
    clip_fraction = (term.is_cut.sum() / speaking.clamp(min=1)).double()
    numbers = torch.stack([ratio.mean(), ratio.min(), ratio.max(), clip_fraction])
    return torch.cat([numbers, weight[0, :, 0]])


def named(numbers: Tensor) -> TermStatistics:
    """What `statistics_of` measured, once it is fetched."""
    ratio_mean, ratio_min, ratio_max, clip_fraction = numbers[:4].tolist()
    return TermStatistics(ratio_mean, ratio_min, ratio_max, clip_fraction, numbers[4:])


class OldPolicy(NamedTuple):
    """pi_old, remembered from the first pass over a rollout, detached; one entry per k."""

    means: dict[int, Tensor]  # mu^(k)_old, [P, n, 1|G, *event]
    log_probs: dict[int, Tensor]  # of x_s under what was scored, [P, n, G]
    form: str
    u: float | Tensor
    reduction: str
    rollout: Rollout  # what they were computed for
    # max |log p(x_s|x_t) while sampling - in the first pass|; the midpoint form starts from the v
    # that was kept while sampling, so that this compares the rollout with itself.
    sampling_gap: float


class PolicyLoss(NamedTuple):
    """The loss to descend, with its statistics."""

    loss: Tensor  # scalar, float64
    terms: dict[int, TermStatistics]
    kl: float  # mean KL to the reference, in the loss's reduction; 0 without one
    old: OldPolicy  # pass it to the next update on the same rollout


def rows_of(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t [B, *event], t, s and prompt [B] of every state that a step left, B = P n (1|G)."""
    P, n, states = batch = rollout.x_t.shape[:3]
    x = rollout.x_t.flatten(0, 2)
    grid = rollout.process.grid
    steps = torch.tensor(rollout.sde_steps)
    times = beside(x, torch.stack([grid[steps], grid[steps + 1]]))
    t, s = times.view(2, 1, -1, 1).expand(2, *batch).flatten(1)
    prompt = torch.arange(P, device=x.device).repeat_interleave(n * states)
    return x, t, s, prompt


def rescore(velocity: Velocity, rollout: Rollout, factors: Sequence[int]) -> dict[int, Transition]:
    """p^(k) of every observed x_t -> x_s: {k: mean [P, n, 1|G, *event], std [P, n, 1|G]}."""
    x, t, s, prompt = rows_of(rollout)
    transitions = decompose(velocity, rollout.process, x, t, s, prompt, factors)
    return {k: p.unflatten(rollout.x_t.shape[:3]) for k, p in transitions.items()}


def kept_velocity(rollout: Rollout) -> Tensor:
    """v_old(x_t, t) of every row [B, *event]. Raises ValueError for a rollout that kept none."""
    if rollout.v is None:
        raise ValueError("rollout.v=None: form='midpoint' needs the velocity kept while sampling")
    return rollout.v.flatten(0, 2)


def midpoint(velocity: Velocity, rollout: Rollout, u: float | Tensor = 0.5) -> Transition:
    """N(a x_t + b v_u, c_1^2 I), v_u = v(x_t - u D v_old, t - u D): one evaluation a state (E14).

    v_old is the rollout's, so that where the velocity is asked for does not depend on theta. u = 0
    is the step as it was sampled. Shapes as `rescore`; u a number or [P, n, 1|G] in [0, 1]. Raises
    ValueError for a rollout that kept no velocity.
    """
    x, t, s, prompt = rows_of(rollout)
    batch = rollout.x_t.shape[:3]
    place = beside(x, u).expand(batch).flatten()
    D_u = place * (t - s)
    x_u = x - per_row(D_u, x) * kept_velocity(rollout)
    v_u = evaluate(velocity, x_u, t - D_u, prompt)
    return rollout.process.transition(x, v_u, t, s).unflatten(batch)


def sampled(rollout: Rollout) -> Transition:
    """N(a x_t + b v_old, c_1^2 I), the density that x_s was drawn from. Shapes as `rescore`."""
    x, t, s, _ = rows_of(rollout)
    p = rollout.process.transition(x, kept_velocity(rollout), t, s)
    return p.unflatten(rollout.x_t.shape[:3])


def transitions_of(
    velocity: Velocity, rollout: Rollout, factors: Sequence[int], form: str, u: float | Tensor
) -> dict[int, Transition]:
    """What each k evaluates: `rescore`, or `midpoint` alone under k = 1."""
    if form == "midpoint":
        return {1: midpoint(velocity, rollout, u)}
    return rescore(velocity, rollout, factors)


def matched(sampled: Transition, p: Transition, mean_old: Tensor) -> Transition:
    """N(mu_sampled + mu - mu_old, c_1^2 I): at theta_old, the density that sampled (E7, E14)."""
    mean = sampled.mean + (p.mean - mean_old)
    return Transition(mean, sampled.std)


def scored(
    form: str,
    k: int,
    transitions: dict[int, Transition],
    means_old: dict[int, Tensor],
    rollout: Rollout,
) -> Transition:
    """What x_s is scored under: p^(k) itself, or what moves with it from the one that sampled."""
    p = transitions[k]
    if form == "midpoint":
        return matched(sampled(rollout), p, means_old[k])
    if form == "matched" and k > 1:
        return matched(Transition(means_old[1], transitions[1].std), p, means_old[k])
    return p


def policy_loss(
    velocity: Velocity,
    rollout: Rollout,
    advantages: Tensor,
    *,
    factors: Sequence[int] = (2, 3),
    form: str = "paper",
    u: float | Tensor = 0.5,
    clip: float | None = 0.2,
    kl: float = 0.0,
    reference: Velocity | None = None,
    term_weights: Mapping[int, float | Tensor] | None = None,
    reduction: str = "mean",
    ratio_norm: bool = False,
    old: OldPolicy | None = None,
) -> PolicyLoss:
    """-J of Algorithm 1: J = mean sum_k w_k min(ratio_k A, clip(ratio_k) A) - kl KL.

    advantages    [P, N, G], as group_advantages gives them for the rewards of rollout.x_0
    factors       S; empty is Flow-GRPO, Flow-CPS or DanceGRPO, by the rollout's kernel
    form          "paper" scores x_s under p^(k) = N(mu^(k), c_k^2 I); "matched" under `matched`;
                  "midpoint" does so for `midpoint` in place of k = 1, and takes no factors
    u             place of the midpoint's evaluation in the step, a number or [P, n, 1|G] in [0, 1]
    clip          > 0, or None; ratios of "mean" log-probabilities stay close to 1 (E10)
    reference     velocity of pi_ref, given where kl > 0: KL = |mu - mu_ref|^2 / (2 c_1^2) of the
                  coarse steps at the observed x_t, mu = a x_t + b v_u in the midpoint form,
                  reduced as the log-probability is
    term_weights  {k: w_k}, each a number or [n], one per stochastic step; default 1 and 1/|S|
    ratio_norm    clip and weigh by GRPO-Guard's `normalised_log_ratio` in place of the log-ratio
    old           .old of the first update on this rollout; None: this pass is theta_old, ratios 1
    The mean is over members, steps, prompts. ValueError where arguments do not fit together.
    """
    ks = (1, *check_factors(factors))
    check_loss(rollout, advantages, form, clip, kl, reference, ks, term_weights, reduction, old)
    check_place(rollout, form, u, factors, old)
    weights = term_weights or {k: 1.0 if k == 1 else 1 / len(factors) for k in ks}

    # Score every observed x_s again: one mean per x_t serves all members that left it.
    transitions = transitions_of(velocity, rollout, factors, form, u)
    means_old = old.means if old else {k: p.mean.detach() for k, p in transitions.items()}
    std_1 = transitions[1].std
    log_probs: dict[int, Tensor] = {}
    statistics: dict[int, Tensor] = {}
    J = torch.zeros((), dtype=torch.float64, device=std_1.device)
    for k in ks:
        p = scored(form, k, transitions, means_old, rollout)
        log_probs[k] = p.log_density(rollout.x_s, reduction)
        log_prob_old = old.log_probs[k] if old else log_probs[k].detach()
        log_ratio = log_probs[k] - log_prob_old
        if ratio_norm:
            delta = transitions[k].mean - means_old[k]
            log_ratio = normalised_log_ratio(log_ratio, delta, p.std, reduction)
        term = clipped_surrogate(log_ratio, advantages, clip)
        w_k = beside(std_1, weights[k]).reshape(-1, 1)
        J = J + (w_k * term.value).mean()
        scale = std_1 / p.std
        statistics[k] = statistics_of(term, advantages, scale if ratio_norm else scale**2)

    # KL(pi_theta || pi_ref) of the coarse steps: Gaussians of one std, the log-ratio at the mean.
    KL = torch.zeros((), dtype=torch.float64, device=std_1.device)
    if reference is not None:
        with torch.no_grad():
            p_ref = transitions_of(reference, rollout, (), form, u)[1]
        mu = transitions[1].mean
        KL = (transitions[1].log_density(mu, reduction) - p_ref.log_density(mu, reduction)).mean()

    log_probs_now = {k: log_prob.detach() for k, log_prob in log_probs.items()}
    dims = 1 if reduction == "sum" else rollout.x_s[0, 0, 0].numel()
    gap = (rollout.log_prob / dims - log_probs_now[1]).abs().max()
    numbers, *of_terms = fetched(torch.stack([KL.detach(), gap]), *statistics.values())
    mean_KL, sampling_gap = numbers.tolist()
    terms = {k: named(own) for k, own in zip(ks, of_terms)}
    old = old or OldPolicy(means_old, log_probs_now, form, u, reduction, rollout, sampling_gap)
    return PolicyLoss(kl * KL - J, terms, mean_KL, old)


# ---- What is refused, in one line, before any work -----------------------------------------------


def check_process(process: Process) -> None:
    """The grid decreases within [0, 1], the kernel is known and takes this eta."""
    grid = process.grid
    kernel = process.kernel
    eta = process.eta
    decreasing = grid.ndim == 1 and len(grid) >= 2 and bool((grid.diff() < 0).all())
    if not decreasing or not 0 <= grid[-1] < grid[0] <= 1:
        raise ValueError(f"grid={grid.tolist()}: must be 2 or more falling times in [0, 1]")
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: must be one of {', '.join(KERNELS)}")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta={eta}: must be a positive number")
    process.coefficients(grid[:-1], grid[1:])  # the kernel may refuse this eta


def check_steps(process: Process, std: Tensor, sde_steps: Sequence[int]) -> None:
    """Noise and weights come in the order of the steps, so steps are increasing."""
    steps = list(sde_steps)
    integers = all(type(i) is int for i in steps)
    if not steps or not integers or steps != sorted({*steps} & {*range(len(std))}):
        raise ValueError(f"sde_steps={steps}: must be increasing integers from 0 to {len(std) - 1}")
    for i in steps:
        if not std[i] > 0:
            place = f"step {i} ends at t = {process.grid[i + 1].item():g}, where {process.kernel}"
            raise ValueError(f"sde_steps={steps}: {place} has zero std, no density; leave it out")


def check_draw(prompts: int, group_size: int, n_steps: int) -> None:
    """There is something to draw."""
    if prompts < 1 or group_size < 2 or n_steps < 1:
        given = f"{prompts} generators, group_size={group_size}, n_steps={n_steps}"
        raise ValueError(f"{given}: must be 1 or more (one per prompt), 2 or more, 1 or more")


def check_factors(factors: Sequence[int]) -> tuple[int, ...]:
    """S as a sorted tuple of distinct integers >= 2; empty is plain GRPO."""
    if any(type(k) is not int or k < 2 for k in factors) or len(set(factors)) < len(factors):
        raise ValueError(f"factors={list(factors)}: must be distinct integers >= 2 (k = 1 is in)")
    return tuple(sorted(factors))


def check_noise(noise: Noise, steps: tuple[int, ...], starts: Sequence[int]) -> None:
    """The noise has a z for every stochastic step and one of these numbers of starts."""
    P, n, _, *event = noise.z.shape
    if n != len(steps) or list(noise.x_1.shape) not in [[P, start, *event] for start in starts]:
        given = f"noise with x_1 {tuple(noise.x_1.shape)} and z {tuple(noise.z.shape)}"
        wanted = f"[P, {' or '.join(map(str, starts))}, *event] and [P, {len(steps)}, G, *event]"
        raise ValueError(f"{given}: must be {wanted}")


def check_finish(stride: int, order: int) -> None:
    """A step spans one grid step or more, and continues a constant or a line."""
    if type(stride) is not int or stride < 1 or order not in (1, 2):
        raise ValueError(f"stride={stride}, order={order}: must be an integer >= 1, and 1 or 2")


def check_group(rewards: Tensor, ddof: int, eps: float, clamp: float | None) -> None:
    """A group is two or more finite rewards."""
    G = rewards.shape[-1]
    if G < 2 or ddof not in (0, 1) or not eps >= 0 or not (clamp is None or clamp > 0):
        given = f"group of {G}, ddof={ddof}, eps={eps}, clamp={clamp}"
        raise ValueError(f"{given}: must be 2 or more, 0 or 1, >= 0, and > 0 or None")
    infinite = int((~rewards.isfinite()).sum())
    if infinite:
        raise ValueError(f"rewards: {infinite} of {rewards.numel()} are not finite")


def check_loss(
    rollout: Rollout,
    advantages: Tensor,
    form: str,
    clip: float | None,
    kl: float,
    reference: Velocity | None,
    ks: tuple[int, ...],
    term_weights: Mapping[int, float | Tensor] | None,
    reduction: str,
    old: OldPolicy | None,
) -> None:
    """The arguments of policy_loss fit together."""
    rollout.process.stochastic_steps(rollout.sde_steps)  # each has a density
    P, n, G = rollout.x_s.shape[:3]
    N = rollout.x_0.shape[1]
    if advantages.shape != (P, N, G):
        raise ValueError(f"advantages of shape {tuple(advantages.shape)}: must be {(P, N, G)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    if form not in ("paper", "matched", "midpoint"):
        raise ValueError(f"form={form!r}: must be 'paper', 'matched' or 'midpoint'")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip}: must be positive, or None not to clip")
    if not 0 <= kl < math.inf or (kl > 0) != (reference is not None):
        raise ValueError(f"kl={kl}: must be >= 0, with a reference if and only if it is positive")
    if term_weights is not None and set(term_weights) != set(ks):
        raise ValueError(f"term_weights for k = {sorted(term_weights)}: must name k = {list(ks)}")
    for k, w in (term_weights or {}).items():
        shape = torch.as_tensor(w).shape
        if shape not in [(), (n,)]:
            raise ValueError(
                f"term_weights[{k}] of shape {tuple(shape)}: must be a number or [{n}]"
            )
    if old is not None:
        same = (set(old.log_probs), old.form, old.reduction) == (set(ks), form, reduction)
        if not same or old.rollout is not rollout:
            given = f"old is of k = {sorted(old.log_probs)}, {old.form!r}, {old.reduction!r}"
            wanted = f"the same rollout, k = {list(ks)}, {form!r}, {reduction!r}"
            raise ValueError(f"{given}: must be of {wanted}")


def check_place(
    rollout: Rollout,
    form: str,
    u: float | Tensor,
    factors: Sequence[int],
    old: OldPolicy | None,
) -> None:
    """The midpoint stands alone, in the step, and stays where it was for all updates."""
    if form != "midpoint":
        if isinstance(u, Tensor) or u != 0.5:
            given = f"of shape {tuple(u.shape)}" if isinstance(u, Tensor) else f"{u}"
            raise ValueError(f"u {given}: must be left out with form={form!r}, without a midpoint")
        return
    if factors:
        raise ValueError(f"factors={list(factors)}: must be empty with form='midpoint'")
    kept_velocity(rollout)  # there must be one
    place, batch = torch.as_tensor(u), rollout.x_t.shape[:3]
    if place.shape not in [(), batch]:
        raise ValueError(f"u of shape {tuple(place.shape)}: must be a number or {tuple(batch)}")
    if not bool(((place >= 0) & (place <= 1)).all()):
        raise ValueError(f"u from {place.min():g} to {place.max():g}: must be from 0 to 1")
    if old is not None and not torch.equal(torch.as_tensor(old.u), place):
        raise ValueError("u: must be that of the first update on this rollout")
