"""Velocity fields that the oracle puts the method on, from those with a known answer to a model.

    constant   v = theta                               a straight flow: v is constant along paths
    point      v = (x - theta) / t                     the other straight flow: all data at theta
    gaussian   v = E[x_1 - x_0 | x_t], x_0 ~ N(m, q)   affine in x; its samplers' law is known
    network    v = tanh([x, t, prompt] W_1) W_2        curved in x and t, mildly
    rapid      the same, with its clock RAPID times faster: what a decomposition finds hardest
    embedded   the shapes model (zoo/shapes/model.py) in float64, or the model of --model

Each is a torch module called as velocity(x, t, prompt); its parameters are the theta that gradients
are taken for. The truth about a Gaussian flow stands at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pave_grpo import Process, Velocity
from zoo.oracle import theory
from zoo.released import families
from zoo.shapes import model as shapes_model
from zoo.shapes import world

DIM = 6  # dimensions of the fields without a picture
RAPID = 25.0  # about four turns of the hidden units over t in [0, 1]
PROMPTS = ("two red circles", "a blue square left of a green triangle")
# Up to so many parameters gradients are held whole, in float64, several at once (0.4 GB each);
# beyond, each is reduced to its derivatives along two directions as soon as it is taken.
WHOLE = 50_000_000


class Fixture(NamedTuple):
    """A field and the shape of its states."""

    name: str
    field: nn.Module
    shape: tuple[int, ...]


def size(field: nn.Module) -> int:
    """How many numbers theta is."""
    return sum(p.numel() for p in field.parameters())


def is_large(field: nn.Module) -> bool:
    """Whether gradients of theta are too large to be held whole."""
    return size(field) > WHOLE


def column(t: Tensor, x: Tensor) -> Tensor:
    """A number per row, t [B], shaped to multiply x [B, *event]."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Constant(nn.Module):
    """v = theta."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.theta.expand_as(x)


class Point(Constant):
    """v = (x - theta) / t, the exact velocity of data at theta. t > 0."""

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return (x - self.theta) / column(t, x)


def gaussian_velocity(x: Tensor, t: Tensor | float, m: Tensor, q: Tensor) -> Tensor:
    """The exact velocity of data x_0 ~ N(m, diag q).

    v = (t - (1-t) q) / ((1-t)^2 q + t^2) (x - (1-t) m) - m
    """
    return (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2) * (x - (1 - t) * m) - m


class Gaussian(nn.Module):
    """gaussian_velocity with q = exp(log_q); m and log_q are [*event], or one row per prompt."""

    def __init__(self, m: Tensor, log_q: Tensor):
        super().__init__()
        self.m, self.log_q = nn.Parameter(m), nn.Parameter(log_q)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        per_prompt = self.m.ndim == x.ndim
        m = self.m[prompt] if per_prompt else self.m
        log_q = self.log_q[prompt] if per_prompt else self.log_q
        return gaussian_velocity(x, column(t, x), m, log_q.exp())


class Network(nn.Module):
    """tanh([x, pace t, prompt] W_1) W_2 with 16 hidden units: nothing in closed form."""

    def __init__(self, generator: torch.Generator, dim: int = DIM, pace: float = 1.0):
        super().__init__()
        self.pace = pace
        w1 = torch.randn(dim + 2, 16, generator=generator, dtype=torch.float64)
        w2 = torch.randn(16, dim, generator=generator, dtype=torch.float64)
        self.w1, self.w2 = nn.Parameter(0.6 * w1), nn.Parameter(0.5 * w2)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        prompts = column(prompt % 5, x) / 2 - 1
        rows = torch.cat([x, self.pace * column(t, x), prompts], dim=1)
        return torch.tanh(rows @ self.w1) @ self.w2


class Pictured(nn.Module):
    """A shapes model in its own dtype; prompt i is prompts[i mod their number]."""

    tokens: Tensor

    def __init__(self, model: nn.Module, prompts: Sequence[str] = PROMPTS):
        super().__init__()
        self.model = model
        self.register_buffer("tokens", shapes_model.tokenize(list(prompts)))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        v: Tensor = self.model(x.to(dtype), t.to(dtype), self.tokens[prompt % len(self.tokens)])
        return v


def pictured(
    path: str = "", prompts: Sequence[str] = PROMPTS, dtype: torch.dtype = torch.float64
) -> Fixture:
    """The embedded model, or a checkpoint of train.py. ValueError for what is no checkpoint."""
    model = shapes_model.load(path or shapes_model.CHECKPOINT).to(dtype)
    for prompt in prompts:
        world.parse(prompt)
    return Fixture("embedded", Pictured(model, prompts), (3, world.SIZE, world.SIZE))


class Piped(nn.Module):
    """The velocity of a released pipeline, prompt mod their number; theta: its transformer.

    Its guidance is the family's usual one that takes one evaluation a row.
    """

    def __init__(
        self, path: str, prompts: Sequence[str], dtype: torch.dtype, size: tuple[int, int]
    ):
        super().__init__()
        flow = families.load(path, dtype)
        height, width = size
        self.shape = flow.shape(height, width)
        self.prompts = len(prompts)
        self.network = flow.transformer.requires_grad_(True)
        if is_large(self.network):
            flow.transformer.enable_gradient_checkpointing()
        texts = flow.encode(prompts)
        flow.drop_encoders()

        def velocity_of(network: nn.Module) -> Velocity:
            return flow.velocity(texts, height, width, flow.single_guidance, network=network)

        self.velocity_of = velocity_of  # of a copy's own network: a closure is not copied

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.velocity_of(self.network)(x.float(), t.float(), prompt % self.prompts)


def piped(path: str, prompts: Sequence[str], dtype: torch.dtype, size: tuple[int, int]) -> Fixture:
    """A pipeline's folder or hub id as a fixture.

    Raises ValueError for another family or a size that does not divide.
    """
    field = Piped(path, prompts, dtype, size)
    return Fixture("embedded", field, field.shape)


def make(name: str, generator: torch.Generator) -> Fixture:
    """The fixture of that name, its parameters drawn from the generator, float64, on the CPU."""
    theta = torch.randn(DIM, generator=generator, dtype=torch.float64)
    field: nn.Module
    match name:
        case "embedded":
            return pictured()
        case "constant":
            field = Constant(theta)
        case "point":
            field = Point(theta)
        case "gaussian":
            field = Gaussian(theta, 0.5 * theta.flip(0) - 1)
        case "network":
            field = Network(generator)
        case "rapid":
            field = Network(generator, pace=RAPID)
        case _:
            raise ValueError(f"fixture {name}: must be one of the module's table")
    return Fixture(name, field, (DIM,))


def nudged(field: nn.Module, size: float, generator: torch.Generator) -> nn.Module:
    """A copy, every parameter moved by size times a standard normal number."""
    field = copy.deepcopy(field)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return field


@torch.no_grad()
def shifted(field: nn.Module, step: Tensor) -> nn.Module:
    """A copy of the field with a vector added to its parameters."""
    moved = copy.deepcopy(field)
    vector = torch.nn.utils.parameters_to_vector(moved.parameters())
    torch.nn.utils.vector_to_parameters(vector + step.to(vector), moved.parameters())
    return moved


class OnlyCall(nn.Module):
    """The field, with theta alive in one of its calls (counted from 0) and constant in all others.

    A gradient through k calls is the sum over them of the gradients through one: each moment's
    share. With factors = (k,), call j is policy_loss's v_j.
    """

    def __init__(self, field: nn.Module, alive: int):
        super().__init__()
        self.field, self.alive, self.calls = field, alive, 0

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 == self.alive:
            v: Tensor = self.field(x, t, prompt)
            return v
        constant = {name: p.detach() for name, p in self.field.named_parameters()}
        return functional_call(self.field, constant, (x, t, prompt))


# ---- The truth about a Gaussian flow -------------------------------------------------------------


def gaussian_law(
    process: Process,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    sde_steps: Collection[int],
    held: Collection[int] = (),
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance after the grid's steps first..last-1, from N(mean, var) before them.

    The velocity is the exact one of N(m, diag q), and every step affine in the state, so that the
    law stays Gaussian: no sample, no density, no score. In the steps `held`, theta is a constant:
    no log-probability credits it there. Steps are those that define the kernel (theory.py).
    """
    record = theory.of(process.kernel, process.eta)
    steps = list(pairwise(process.grid.tolist()))
    for i in range(first, len(steps) if last is None else last):
        t, s = steps[i]
        a, b = (m.detach(), q.detach()) if i in held else (m, q)
        v = gaussian_velocity(mean, t, a, b)
        slope = (t - (1 - t) * b) / ((1 - t) ** 2 * b + t**2)  # dv/dx
        if i in sde_steps:
            gain, _ = record.step(1.0, slope, t, s)  # d mean / dx: the step is linear in (x, v)
            mean, std = record.step(mean, v, t, s)
            var = gain**2 * var + std**2
        else:
            mean = mean - (t - s) * v
            var = (1 - (t - s) * slope) ** 2 * var
    return mean, var


def policy_gradient(
    process: Process,
    m: Tensor,
    log_q: Tensor,
    target: Tensor,
    sde_steps: Collection[int],
    held: Collection[int] = (),
) -> Tensor:
    """d E[-|x_0 - target|^2] / d (m, log_q), [2 d], for samples from noise N(0, I)."""
    a, b = m.detach().requires_grad_(), log_q.detach().requires_grad_()
    start, unit = torch.zeros_like(m), torch.ones_like(m)
    mean, var = gaussian_law(process, a, b.exp(), start, unit, sde_steps, held)
    return torch.cat(torch.autograd.grad(-(var + (mean - target) ** 2).sum(), [a, b]))


def expected_estimate(
    process: Process,
    m: Tensor,
    log_q: Tensor,
    target: Tensor,
    sde_steps: Collection[int],
    k: int,
    form: str,
) -> Tensor:
    """What the k-term's estimate of `policy_gradient` is on average, [2 d], with no sample drawn.

    It is the sum over steps of Cov(r, credit d mu^(k)/d theta), with credit (x_s - mu^(k))/c_k^2
    ("paper"), over (c_1/c_k)^2 ("rescaled"), or (x_s - mu^(1))/c_1^2 ("matched"). Both factors are
    quadratic in the Gaussian pair (x_t, z), where three Gauss-Hermite nodes each are exact.
    """
    record, q = theory.of(process.kernel, process.eta), log_q.exp()
    a, b = m.detach().requires_grad_(), log_q.detach().requires_grad_()
    node = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=m.dtype, device=m.device)
    w = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=m.dtype, device=m.device)
    x_t_node, z, w = node.view(3, 1, 1), node.view(1, 3, 1), (w[:, None] * w)[..., None]

    def held_velocity(x: Tensor, t: float) -> Tensor:
        return gaussian_velocity(x, t, m, q)

    def velocity(x: Tensor, t: float) -> Tensor:
        return gaussian_velocity(x, t, a, b.exp())

    total = torch.zeros((), dtype=m.dtype, device=m.device)
    start, unit = torch.zeros_like(m), torch.ones_like(m)
    for i in sde_steps:
        t, s = process.grid[i : i + 2].tolist()
        mean, var = gaussian_law(process, m, q, start, unit, sde_steps, last=i)
        x_t = mean + var.sqrt() * x_t_node
        mu_1, c_1 = record.decomposed(held_velocity, x_t, t, s, 1)
        x_s = mu_1 + c_1 * z
        x_0, _ = gaussian_law(process, m, q, x_s, unit, sde_steps, first=i + 1)
        r = -((x_0 - target) ** 2)  # given x_s: what later noise adds does not depend on it
        centred = w * (r - (w * r).sum((0, 1)))
        mu_k, c_k = record.decomposed(velocity, x_t, t, s, k)
        scored = mu_1 if form == "matched" else mu_k.detach()
        credit = (x_s - scored) / (c_k if form == "paper" else c_1) ** 2
        total = total + (centred * credit * mu_k).sum()
    return torch.cat(torch.autograd.grad(total, [a, b]))


def matched_policy_gradient(
    process: Process, m: Tensor, log_q: Tensor, target: Tensor, sde_steps: Collection[int], k: int
) -> Tensor:
    """d E[-|x_0 - target|^2] / d (m, log_q) of the policy that the matched k-term scores, [2 d].

    Its steps are N(mu^(1)_old + mu^(k)_theta - mu^(k)_old, c_1^2 I), affine in the state; others
    are Euler steps of theta_old.
    """
    record, q = theory.of(process.kernel, process.eta), log_q.exp()
    a, b = m.detach().requires_grad_(), log_q.detach().requires_grad_()

    def held(x: Tensor, t: float) -> Tensor:
        return gaussian_velocity(x, t, m, q)

    def alive(x: Tensor, t: float) -> Tensor:
        return gaussian_velocity(x, t, a, b.exp())

    mean, var = torch.zeros_like(m), torch.ones_like(m)
    for i, (t, s) in enumerate(pairwise(process.grid.tolist())):
        if i not in sde_steps:
            mean, var = gaussian_law(process, m, q, mean, var, (), first=i, last=i + 1)
            continue
        _, c_1 = record.decomposed(held, mean, t, s, 1)
        ends = []
        for x in (mean, mean + 1):  # affine: the slope is a difference
            moved = record.decomposed(alive, x, t, s, k)[0] - record.decomposed(held, x, t, s, k)[0]
            ends.append(record.decomposed(held, x, t, s, 1)[0] + moved)
        mean, gain = ends[0], ends[1] - ends[0]
        var = gain**2 * var + c_1**2
    return torch.cat(torch.autograd.grad(-(var + (mean - target) ** 2).sum(), [a, b]))
