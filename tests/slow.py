"""Algorithm 1 in slow plain loops, and small rollouts and networks to try it on.

The slow functions are written from the equations in another form than pave_grpo.py: one row where
it has a batch, torch.distributions where it has a formula, and a kernel's step as its record in
zoo/oracle/theory.py defines it, by predicted ends or Euler-Maruyama, where it has coefficients.
They share no code with it, so that agreement means something. Velocities whose answers are known
are those of zoo/oracle/fields.py.
"""

from itertools import pairwise, product
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

import pave_grpo as pg
from zoo.oracle import theory
from zoo.oracle.fields import Network, gaussian_velocity, nudged, shifted

EPS = torch.finfo(torch.float64).eps  # one rounding is off by at most EPS / 2, relatively

SAMPLERS = {"independent": pg.rollout_independent, "shared_anchor": pg.rollout_shared_anchor}
KERNELS, MODES, FORMS = tuple(pg.KERNELS), tuple(SAMPLERS), ("paper", "matched")
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_form = pytest.mark.parametrize("form", FORMS)


# ---- What Hypothesis draws: scalars and seeds, never tensors -------------------------------------


def falling(pair):
    """(t, s) with s < t, from a time and a fraction of it."""
    t, fraction = pair
    return t, t * fraction


seeds = st.integers(0, 2**31 - 1)
kernels, modes, forms = st.sampled_from(KERNELS), st.sampled_from(MODES), st.sampled_from(FORMS)
etas = st.floats(0.1, 1.0)
factor_sets = st.sets(st.integers(2, 6), max_size=3).map(tuple)
spans = st.tuples(st.floats(0.05, 1.0), st.floats(0.02, 0.98)).map(falling)


# ---- Numbers, networks and gradients -------------------------------------------------------------


def normal(seed, *shape, dtype=torch.float64):
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(value, B):
    """One time for every row of a batch, [B]."""
    return torch.full((B,), value, dtype=torch.float64)


def network(seed=0, d=3, dtype=torch.float64):
    """A curved velocity with 16 hidden units, of which nothing is known in closed form."""
    return Network(torch.Generator().manual_seed(seed), d).to(dtype)


class GaussianFlow(torch.nn.Module):
    """The exact velocity of data N(m_p, diag q), each prompt p its own mean.

    It uses + - * / alone, which IEEE rounds the same way in a batch of any size: bitwise claims
    hold for it.
    """

    def __init__(self, m, q):
        super().__init__()
        self.m = torch.nn.Parameter(torch.as_tensor(m, dtype=torch.float64))
        self.q = torch.nn.Parameter(torch.as_tensor(q, dtype=torch.float64))

    def forward(self, x, t, prompt):
        m, q = self.m[prompt % len(self.m)].to(x), self.q.to(x)
        return gaussian_velocity(x, t[:, None], m, q)


def moved(module, seed, size):
    """A copy of the module with parameters a little (size) away: theta after some updates."""
    return nudged(module, size, torch.Generator().manual_seed(seed))


def gradient(value, module):
    """The gradient of a scalar with respect to all parameters of a module, as one vector."""
    grads = torch.autograd.grad(value, [*module.parameters()], retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def derivative_along(direction, value, module):
    """d value(module with parameters theta + h direction)/dh at h = 0, by five points.

    It is off by h^4 f^(5)/30, about 3e-18 f^(5), and by roundings of 1e-14/h = 1e-10.
    """

    def at(h):
        with torch.no_grad():
            return value(shifted(module, h * direction)).item()

    h = 1e-4
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


class Counting:
    """Wraps a velocity and remembers the t and the prompts of every call."""

    def __init__(self, velocity):
        self.velocity, self.t, self.prompt = velocity, [], []

    def __call__(self, x, t, prompt):
        self.t.append(t)
        self.prompt.append(prompt)
        return self.velocity(x, t, prompt)

    @property
    def rows(self):
        return sum(map(len, self.t))


# ---- The algorithm, slowly -----------------------------------------------------------------------


class Observed(NamedTuple):
    """One member's stochastic step, alone: x_t and x_s [1, *event], prompt [1], floats t and s."""

    index: tuple[int, int, int]  # prompt, stochastic step, member
    t: float
    s: float
    prompt: Tensor
    x_t: Tensor
    x_s: Tensor


def observations(rollout):
    """The observed steps of a rollout, one by one."""
    (P, n, G), starts = rollout.x_s.shape[:3], rollout.x_t.shape[2]
    grid, seen = rollout.process.grid.tolist(), []
    for p, j, g in product(range(P), range(n), range(G)):
        i = rollout.sde_steps[j]
        x_t, x_s = rollout.x_t[p, j, g % starts][None], rollout.x_s[p, j, g][None]
        prompt = torch.tensor([p], device=x_t.device)
        seen.append(Observed((p, j, g), grid[i], grid[i + 1], prompt, x_t, x_s))
    return seen


def slow_transition(velocity, process, k, step):
    """(mu^(k), c_k) of one observed step: k - 1 Euler sub-steps, then the SDE step to s."""

    def at(x, t):
        return velocity(x, torch.tensor([t], dtype=x.dtype, device=x.device), step.prompt)

    record = theory.of(process.kernel, process.eta)
    return record.decomposed(at, step.x_t, step.t, step.s, k)


class Scored(NamedTuple):
    """What one k-term scores x_s under, now and at theta_old: N(mu, std^2) and N(mu_old, std^2)."""

    mu: Tensor
    mu_old: Tensor
    std: float


def slow_scored(velocity, old, process, k, form, step):
    """The Gaussians of the k-term of one observed step, in the paper's or E7's matched form."""
    mu, std = slow_transition(velocity, process, k, step)
    mu_old = slow_transition(old, process, k, step)[0].detach()
    if form == "paper":
        return Scored(mu, mu_old, std)
    sampled, std_sampled = slow_transition(old, process, 1, step)
    sampled = sampled.detach()
    return Scored(sampled + mu - mu_old, sampled, std_sampled)


def slow_loss(velocity, old, rollout, advantages, factors, form, clip, reduction):
    """-J of Algorithm 1 (kl = 0), one member, one step and one k at a time."""
    A, total = advantages.expand(rollout.x_s.shape[:3]), 0.0
    for step in observations(rollout):
        advantage = A[step.index].item()
        for k in (1, *factors):
            mu, mu_old, std = slow_scored(velocity, old, rollout.process, k, form, step)
            log_ratio = Normal(mu, std).log_prob(step.x_s) - Normal(mu_old, std).log_prob(step.x_s)
            ratio = (log_ratio.sum() if reduction == "sum" else log_ratio.mean()).exp()
            term = ratio * advantage
            if clip is not None and advantage > 0 and ratio > 1 + clip:
                term = (1 + clip) * advantage  # cut: a constant
            if clip is not None and advantage < 0 and ratio < 1 - clip:
                term = (1 - clip) * advantage
            total = total + (1 if k == 1 else 1 / len(factors)) * term
    return -torch.as_tensor(total, dtype=torch.float64) / A.numel()


def slow_midpoint_loss(
    velocity, old, rollout, advantages, u, clip, reduction, kl=0.0, reference=None
):
    """-J of E14's midpoint form, one member and one step at a time; u like rollout.x_t's batch.

    N(mu_old + b (v_u - v_u_old), c^2 I), where v_u asks at x_t - u D v_old and t - u D.
    """
    A, total, KL = advantages.expand(rollout.x_s.shape[:3]), 0.0, 0.0
    record = theory.of(rollout.process.kernel, rollout.process.eta)
    for step in observations(rollout):
        p, j, g = step.index
        x, t, s = step.x_t, step.t, step.s
        D_u = u[p, j, g % rollout.x_t.shape[2]].item() * (t - s)

        def at(field, x, t, prompt=step.prompt):
            return field(x, torch.tensor([t], dtype=x.dtype, device=x.device), prompt)

        v_old = at(old, x, t).detach()
        x_u = x - D_u * v_old
        means = {f: record.step(x, at(f, x_u, t - D_u), t, s)[0] for f in (velocity, old)}
        sampled, std = record.step(x, v_old, t, s)
        mean = sampled + means[velocity] - means[old].detach()
        log_ratio = Normal(mean, std).log_prob(step.x_s) - Normal(sampled, std).log_prob(step.x_s)
        ratio = (log_ratio.sum() if reduction == "sum" else log_ratio.mean()).exp()
        advantage = A[step.index].item()
        term = ratio * advantage
        if clip is not None and advantage > 0 and ratio > 1 + clip:
            term = (1 + clip) * advantage
        if clip is not None and advantage < 0 and ratio < 1 - clip:
            term = (1 - clip) * advantage
        total = total + term
        if reference is not None:
            wanted = record.step(x, at(reference, x_u, t - D_u), t, s)[0].detach()
            apart = (means[velocity] - wanted).square() / (2 * std**2)
            KL = KL + (apart.sum() if reduction == "sum" else apart.mean())
    return (kl * KL - torch.as_tensor(total, dtype=torch.float64)) / A.numel()


def slow_rollout(velocity, process, x_1, z, prompt):
    """x_0 and the observed {i: (x_t, x_s)} of one trajectory from x_1 [1, *event].

    z {i: [1, *event]} names the stochastic steps and holds their noise.
    """
    x, observed, record = x_1, {}, theory.of(process.kernel, process.eta)
    for i, (t, s) in enumerate(pairwise(process.grid.tolist())):
        with torch.no_grad():
            v = velocity(x, torch.tensor([t], dtype=x.dtype, device=x.device), prompt)
        if i in z:
            mean, std = record.step(x, v, t, s)
            observed[i] = x, mean + std * z[i]
            x = observed[i][1]
        else:
            x = x - (t - s) * v
    return x, observed


def slow_finish(velocity, process, x, i, stride, order, prompt):
    """x_0 of one state x [1, *event] at point i of the grid, in steps counted from the end.

    Order 2 takes the line through this velocity and the one before it, in the middle of the step.
    """
    grid = process.grid.tolist()
    points = [grid[i], *grid[::-1][: len(grid) - 1 - i : stride][::-1]]
    before = None
    for t, s in pairwise(points):
        with torch.no_grad():
            v = velocity(x, torch.tensor([t], dtype=x.dtype, device=x.device), prompt)
        rise = 0.0 if before is None else (v - before[1]) / (t - before[0])
        x = x + (s - t) * (v + rise * ((t + s) / 2 - t))
        before = (t, v) if order == 2 else None
    return x


# ---- Small rollouts ------------------------------------------------------------------------------


def generators(seed, P):
    """One generator per prompt; prompt p of a batch has the noise of prompt 0 at seed + p."""
    return [torch.Generator().manual_seed(seed + p) for p in range(P)]


def roll(mode, velocity, process, P=2, G=4, d=3, steps=None, seed=0, dtype=torch.float64):
    """A rollout in either mode; independent members have their own starts."""
    n, own_start = len(process.stochastic_steps(steps)), mode == "independent"
    noise = pg.draw_noise(generators(seed, P), G, (d,), n, own_start, dtype)
    return SAMPLERS[mode](velocity, process, noise, steps)


def some_advantages(rollout, seed=0, centred=False):
    """Advantages out of the air, [P, N, G]: no theorem may depend on where they came from."""
    A = normal(seed, *rollout.x_0.shape[:3])
    return A - A.mean(-1, keepdim=True) if centred else A


def of_prompts(rollout, kept):
    """The rollout of these prompts alone, numbered 0, 1, ... in it; its velocity is `asking`."""
    names = ("x_t", "x_s", "log_prob", "x_0")
    return rollout._replace(**{name: getattr(rollout, name)[kept] for name in names})


def asking(velocity, kept):
    """The velocity of a batch whose prompt b is kept[b]."""

    def renumbered(x, t, prompt):
        return velocity(x, t, torch.tensor(kept)[prompt])

    return renumbered
