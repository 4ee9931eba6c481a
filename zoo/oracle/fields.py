"""Velocity fields that the oracle puts the method on, from those with an answer on paper to the embedded model.

    constant   v = theta                               a straight flow: v is constant along every ODE path
    point      v = (x - theta) / t                     the other straight flow: all data at theta
    gaussian   v = E[x_1 - x_0 | x_t], x_0 ~ N(m, q)   affine in x; its samplers have a law in closed form
    network    v = tanh([x, t, c] W_1) W_2             curved in x and t, mildly
    rapid      the same, with its clock RAPID times faster: what a decomposition finds hardest
    embedded   the shapes model (zoo/shapes/model.py), in float64 unless told otherwise; or the model of --model

Each is a torch module called as velocity(x, t, c); its parameters are the theta that gradients are taken for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pave_grpo import Process
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes

DIM = 6  # dimensions of the fields without a picture
RAPID = 25.0  # about four turns of the hidden units over t in [0, 1]
PROMPTS = ("two red circles", "a blue square left of a green triangle")


class Fixture(NamedTuple):
    """A field and the shape of its states."""

    name: str
    field: nn.Module
    shape: tuple[int, ...]


def column(t: Tensor, x: Tensor) -> Tensor:
    """A number per row, t [B], shaped to multiply x [B, *event]."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Constant(nn.Module):
    """v = theta."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.theta.expand_as(x)


class Point(Constant):
    """v = (x - theta) / t, the exact velocity of data at theta. t > 0."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return (x - self.theta) / column(t, x)


def gaussian_velocity(x: Tensor, t: Tensor | float, m: Tensor, q: Tensor) -> Tensor:
    """v = (t - (1-t) q) / ((1-t)^2 q + t^2) (x - (1-t) m) - m, for data x_0 ~ N(m, diag q); q = exp(log_q)."""
    return (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2) * (x - (1 - t) * m) - m


class Gaussian(nn.Module):
    """The exact velocity of data N(m, diag q), q = exp(log_q); m and log_q are [*event], or one row per prompt."""

    def __init__(self, m: Tensor, log_q: Tensor):
        super().__init__()
        self.m, self.log_q = nn.Parameter(m), nn.Parameter(log_q)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        m, log_q = (p if p.ndim < x.ndim else p[c] for p in (self.m, self.log_q))
        return gaussian_velocity(x, column(t, x), m, log_q.exp())


class Network(nn.Module):
    """tanh([x, pace t, c] W_1) W_2 with 16 hidden units: nothing about it is known in closed form."""

    def __init__(self, generator: torch.Generator, dim: int = DIM, pace: float = 1.0):
        super().__init__()
        self.pace = pace
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * scale)
            for shape, scale in (((dim + 2, 16), 0.6), ((16, dim), 0.5))
        )

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        rows = torch.cat([x, self.pace * column(t, x), column(c % 5, x) / 2 - 1], dim=1)
        return torch.tanh(rows @ self.w1) @ self.w2


class Pictured(nn.Module):
    """A shapes model whose prompt c is prompts[c mod their number], computing in its own dtype."""

    def __init__(self, model: nn.Module, prompts: Sequence[str] = PROMPTS):
        super().__init__()
        self.model = model
        self.register_buffer("tokens", shapes_model.tokenize(list(prompts)))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return self.model(x.to(dtype), t.to(dtype), self.tokens[c % len(self.tokens)])


def pictured(
    path: str = "", prompts: Sequence[str] = PROMPTS, dtype: torch.dtype = torch.float64
) -> Fixture:
    """The embedded model, or a checkpoint of train.py, as a fixture. ValueError for a path that is no checkpoint."""
    model = shapes_model.load(path or shapes_model.CHECKPOINT).to(dtype)
    for prompt in prompts:
        shapes.parse(prompt)
    return Fixture("embedded", Pictured(model, prompts), (3, shapes.SIZE, shapes.SIZE))


class Piped(nn.Module):
    """The velocity of an SD3 or FLUX pipeline (zoo/released/pipeline.py), prompt c mod their number; theta: its transformer.

    Guidance is FLUX's usual 3.5 where the model takes it, and none elsewhere.
    """

    def __init__(
        self, path: str, prompts: Sequence[str], dtype: torch.dtype, size: tuple[int, int]
    ):
        super().__init__()
        from zoo.released import pipeline as diffusion  # diffusers takes seconds to import

        flow = diffusion.load(path, dtype)
        self.shape, self.prompts = flow.shape(*size), len(prompts)
        self.network = flow.transformer.requires_grad_(True)
        guidance = 3.5 if flow.is_flux and self.network.config.guidance_embeds else 0.0
        texts = flow.encode(prompts)
        flow.drop_encoders()
        self.velocity = flow.velocity(texts, *size, guidance)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.velocity(x.float(), t.float(), c % self.prompts)


def piped(path: str, prompts: Sequence[str], dtype: torch.dtype, size: tuple[int, int]) -> Fixture:
    """A pipeline's folder or hub id as a fixture. ValueError for another family or a size that does not divide."""
    field = Piped(path, prompts, dtype, size)
    return Fixture("embedded", field, field.shape)


def make(name: str, generator: torch.Generator) -> Fixture:
    """The fixture of that name (module docstring), its parameters drawn from the generator, float64, on the CPU."""
    theta = torch.randn(DIM, generator=generator, dtype=torch.float64)
    if name == "embedded":
        return pictured()
    field = {
        "constant": lambda: Constant(theta),
        "point": lambda: Point(theta),
        "gaussian": lambda: Gaussian(theta, 0.5 * theta.flip(0) - 1),
        "network": lambda: Network(generator),
        "rapid": lambda: Network(generator, pace=RAPID),
    }[name]()
    return Fixture(name, field, (DIM,))


def nudged(field: nn.Module, size: float, generator: torch.Generator) -> nn.Module:
    """A copy of the field, every parameter moved by size times a standard normal number: theta after some updates."""
    field = copy.deepcopy(field)
    with torch.no_grad():
        for p in field.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
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

    A gradient through k calls is the sum over them of the gradients through one: the share of each moment.
    """

    def __init__(self, field: nn.Module, alive: int):
        super().__init__()
        self.field, self.alive, self.calls = field, alive, 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 == self.alive:
            return self.field(x, t, c)
        return functional_call(
            self.field, {n: p.detach() for n, p in self.field.named_parameters()}, (x, t, c)
        )


# ---- The truth about a Gaussian flow ---------------------------------------------------------------------------


def gaussian_law(
    process: Process,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    sde_steps: Sequence[int],
    held: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_0 from N(mean, var) at the grid's first time, under the exact velocity of N(m, diag q).

    Every step is affine, so the law stays Gaussian: no sample, no density, no score (THEORY.md, section 4). In the
    steps `held`, theta is a constant: no log-probability credits it there. Steps are written from their definition
    (predicted ends, Euler-Maruyama), not from pave_grpo's coefficients.
    """
    grid = process.grid.tolist()
    for i, (t, s) in enumerate(pairwise(grid)):
        a, b = (m.detach(), q.detach()) if i in held else (m, q)
        slope, D = (t - (1 - t) * b) / ((1 - t) ** 2 * b + t**2), t - s
        v = slope * (mean - (1 - t) * a) - a
        if i not in sde_steps:
            mean, var = mean - D * v, (1 - D * slope) ** 2 * var
            continue
        if process.kernel == "cps":
            h = process.eta * math.pi / 2
            std, keep = s * math.sin(h), s * math.cos(h)
            step = lambda x, v, t=t, s=s, keep=keep: (
                (1 - s) * (x - t * v) + keep * (x + (1 - t) * v)
            )
        else:
            g2 = process.eta**2 * (
                1 if process.kernel == "dance" else t / (1 - (t if t < 1 else grid[1]))
            )
            std = (g2 * D) ** 0.5
            step = lambda x, v, t=t, D=D, g2=g2: x - D * v - D * g2 / (2 * t) * (x + (1 - t) * v)
        mean, var = step(mean, v), step(1.0, slope) ** 2 * var + std**2
    return mean, var


def policy_gradient(
    process: Process,
    m: Tensor,
    log_q: Tensor,
    target: Tensor,
    sde_steps: Sequence[int],
    held: Sequence[int] = (),
) -> Tensor:
    """d E[-|x_0 - target|^2] / d (m, log_q), from noise N(0, I), by propagating mean and variance: [2 d]."""
    a, b = m.detach().requires_grad_(), log_q.detach().requires_grad_()
    mean, var = gaussian_law(
        process, a, b.exp(), torch.zeros_like(m), torch.ones_like(m), sde_steps, held
    )
    return torch.cat(torch.autograd.grad(-(var + (mean - target) ** 2).sum(), [a, b]))
