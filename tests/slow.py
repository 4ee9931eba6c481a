"""Velocity fields whose answers are known, Algorithm 1 in slow plain loops, and small rollouts to try them on.

The slow functions are written from the equations in another form than pave_grpo.py (Euler-Maruyama and predicted ends
instead of coefficients, one row instead of a batch, torch.distributions instead of a formula) and share no code
with it, so that agreement means something.
"""

import copy
import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import strategies as st
from torch.distributions import Normal

import pave_grpo as pg
from zoo.oracle.fields import gaussian_law  # noqa: F401  (the law of a sampler without a sample)

EPS = torch.finfo(torch.float64).eps  # one rounding is off by at most EPS / 2, relatively
KERNELS, MODES = ("flow_sde", "cps", "dance"), ("independent", "shared_anchor")
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_mode = pytest.mark.parametrize("mode", MODES)

# What Hypothesis draws: scalars and seeds, never tensors.
seeds = st.integers(0, 2**31 - 1)
kernels, modes = st.sampled_from(KERNELS), st.sampled_from(MODES)
etas = st.floats(0.1, 1.0)
factor_sets = st.sets(st.integers(2, 6), max_size=3).map(tuple)
spans = st.tuples(st.floats(0.05, 1.0), st.floats(0.02, 0.98)).map(
    lambda p: (p[0], p[0] * p[1])
)  # (t, s), s < t


def normal(seed, *shape, dtype=torch.float64):
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(t, x):
    """t [B] shaped to multiply x [B, *event]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


# ---- Velocities ----------------------------------------------------------------------------------------------


class GaussianFlow(torch.nn.Module):
    """The exact velocity of data N(m_c, diag q): affine in x, elementwise, each prompt its own mean.

    It uses + - * / alone, which IEEE rounds the same way in a batch of any size: bitwise claims hold for it.
    """

    def __init__(self, m, q):
        super().__init__()
        self.m, self.q = (
            torch.nn.Parameter(torch.as_tensor(p, dtype=torch.float64)) for p in (m, q)
        )

    def forward(self, x, t, c):
        m, q, t = self.m[c % len(self.m)].to(x.dtype), self.q.to(x.dtype), column(t, x)
        return (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2) * (x - (1 - t) * m) - m


class Net(torch.nn.Module):
    """A tanh network of (x, t, c), curved in x and t: nothing about it is known in closed form."""

    def __init__(self, seed=0, d=3, width=8, dtype=torch.float64):
        super().__init__()
        self.w1 = torch.nn.Parameter(normal(seed, d + 2, width, dtype=dtype))
        self.w2 = torch.nn.Parameter(normal(seed + 1, width, d, dtype=dtype) / 2)

    def forward(self, x, t, c):
        rows = torch.cat([x, column(t, x), (column(c, x) % 5).to(x.dtype) - 1], dim=1)
        return torch.tanh(rows @ self.w1) @ self.w2


class Constant(torch.nn.Module):
    """v = theta everywhere: a straight flow, whose dv/dtheta is the identity."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(theta)

    def forward(self, x, t, c):
        return self.theta.expand_as(x)


class Radial(Constant):
    """v = (x - theta) / t, all data at theta: the other straight flow."""

    def forward(self, x, t, c):
        return (x - self.theta) / column(t, x)


class Counting:
    """Wraps a velocity and remembers the t and c of every call."""

    def __init__(self, velocity):
        self.velocity, self.t, self.c = velocity, [], []

    def __call__(self, x, t, c):
        self.t.append(t)
        self.c.append(c)
        return self.velocity(x, t, c)

    @property
    def rows(self):
        return sum(map(len, self.t))


def moved(module, seed, size):
    """A copy of the module with parameters a little (size) away: theta after some updates."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += size * normal(seed + i, *p.shape, dtype=p.dtype)
    return module


def gradient(value, module):
    """The gradient of a scalar with respect to all parameters of a module, as one vector."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, [*module.parameters()], retain_graph=True)]
    )


# ---- The algorithm, slowly -----------------------------------------------------------------------------------


def slow_step(kernel, eta, t, s, x, v, t_1=None):
    """(mean, std) of one SDE step in its derivation form; t, s are floats, x and v anything."""
    x0_hat, x1_hat = x - t * v, x + (1 - t) * v
    if (
        kernel == "cps"
    ):  # signal and noise keep their levels; cos(h) of the noise is the old one, sin(h) is fresh
        h = eta * math.pi / 2
        return (1 - s) * x0_hat + s * math.cos(h) * x1_hat, s * math.sin(h)
    # Euler-Maruyama, backwards over D, on dx = (v - g^2/2 score) dt + g dw with score = -x1_hat / t.
    g = eta if kernel == "dance" else eta * math.sqrt(t / (1 - (t_1 if t == 1 else t)))
    score = -x1_hat / t
    return x - (t - s) * (v - g**2 / 2 * score), g * math.sqrt(t - s)


def slow_transition(velocity, process, t, s, k, x, c):
    """(mu^(k), c_k) for one row x [1, *event]: k - 1 Euler sub-steps, then the SDE step over what is left."""
    d, time = (t - s) / k, t
    for j in range(k - 1):
        x = x - d * velocity(x, torch.tensor([time], dtype=x.dtype), c)
        time = t - (j + 1) * d
    v = velocity(x, torch.tensor([time], dtype=x.dtype), c)
    return slow_step(process.kernel, process.eta, time, s, x, v, process.grid[1].item())


def slow_loss(velocity, old, rollout, advantages, factors, form, clip, reduction):
    """-J of Algorithm 1 (kl = 0) and E7's matched form, one member, one step and one k at a time."""
    (P, n, G), A, N = rollout.x_s.shape[:3], rollout.x_t.shape[2], advantages.shape[1]
    grid, total = rollout.process.grid.tolist(), 0.0
    for p, j, g in product(range(P), range(n), range(G)):
        i, c = rollout.sde_steps[j], torch.tensor([p])
        x_t, x_s = rollout.x_t[p, j, g % A][None], rollout.x_s[p, j, g][None]
        advantage = advantages[p, j % N, g].item()
        at = lambda field, k, i=i, x=x_t, c=c: slow_transition(
            field, rollout.process, grid[i], grid[i + 1], k, x, c
        )
        mu_sampled, c_sampled = at(old, 1)
        for k in (1, *factors):
            (mu, std), (mu_old, _) = at(velocity, k), at(old, k)
            if form == "matched":
                mu, mu_old, std = mu_sampled.detach() + mu - mu_old.detach(), mu_sampled, c_sampled
            log_ratio = Normal(mu, std).log_prob(x_s) - Normal(mu_old.detach(), std).log_prob(x_s)
            ratio = (log_ratio.sum() if reduction == "sum" else log_ratio.mean()).exp()
            term = ratio * advantage
            if clip is not None and (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip):
                term = (1 + clip if advantage > 0 else 1 - clip) * advantage  # cut: a constant
            total = total + (1 if k == 1 else 1 / len(factors)) * term
    return -torch.as_tensor(total, dtype=torch.float64) / (P * n * G)


def slow_rollout(velocity, process, start, steps_noise, sde_steps, c):
    """x_0 and the observed {i: (x_t, x_s)} of one trajectory from start [1, *event]; steps_noise {i: [1, *event]}."""
    x, observed, grid = start, {}, process.grid.tolist()
    for i, (t, s) in enumerate(pairwise(grid)):
        v = velocity(x, torch.tensor([t], dtype=x.dtype), c)
        if i in sde_steps:
            mean, std = slow_step(process.kernel, process.eta, t, s, x, v, grid[1])
            observed[i] = (x, mean + std * steps_noise[i])
            x = observed[i][1]
        else:
            x = x - (t - s) * v
    return x, observed


# ---- Small rollouts ------------------------------------------------------------------------------------------


def generators(seed, P):
    return [torch.Generator().manual_seed(seed + p) for p in range(P)]


def roll(
    mode,
    velocity,
    process,
    P=2,
    G=4,
    d=3,
    steps=None,
    seed=0,
    own_start=None,
    dtype=torch.float64,
    **kwargs,
):
    """A rollout in either mode; independent members have their own starts unless told otherwise."""
    own_start = mode == "independent" if own_start is None else own_start
    n = len(process.stochastic_steps(steps))
    noise = pg.draw_noise(generators(seed, P), G, (d,), n, own_start, dtype)
    sampler = {"independent": pg.rollout_independent, "shared_anchor": pg.rollout_shared_anchor}[
        mode
    ]
    return sampler(velocity, process, noise, steps, **kwargs)


def some_advantages(rollout, seed=0, centred=False):
    """Advantages out of the air, [P, N, G]: no theorem may depend on where they came from."""
    A = normal(seed, *rollout.x_0.shape[:3])
    return A - A.mean(-1, keepdim=True) if centred else A
