"""What claims are tested with: kernels and factors, fixtures and rollouts, and what is measured on them."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.findings import Finding, Row

KERNELS, MODES, ETA = tuple(pave.KERNELS), ("shared_anchor", "independent"), 0.7
POINT = (0.70, 0.55)  # a step (t, s) in the middle; THEORY.md quotes its figures there
SAMPLES = 100_000  # of a statistical row
GROUPS, MEMBERS = (
    20_000,
    8,
)  # of the estimator that is compared with the closed-form policy gradient


class Scene(NamedTuple):
    """A rollout on a fixture, with advantages from a smooth reward."""

    field: nn.Module
    rollout: pave.Rollout
    advantages: Tensor


class Model(NamedTuple):
    """A checkpoint of train.py, or a pipeline with its pictures' size, the prompts to ask, the dtype to compute in."""

    path: str
    prompts: tuple[str, ...]
    dtype: torch.dtype
    size: tuple[int, int] | None = None

    def fixture(self) -> fields.Fixture:
        return fields.piped(*self) if self.size else fields.pictured(*self[:3])


class Bench:
    """What claims are tested with: kernels and factors, fixtures and rollouts, and named streams of noise."""

    def __init__(
        self,
        kernels: Sequence[str] = KERNELS,
        factors: Sequence[int] = (2, 3, 5),
        seed: int = 0,
        device: str = "cpu",
        model: Model | None = None,
    ):
        self.kernels, self.factors, self.seed, self.model = (
            tuple(kernels),
            tuple(factors),
            seed,
            model,
        )
        self.device = torch.device(device)
        self.dtype = (
            torch.float32
            if model and (model.size or model.dtype != torch.float64)
            else torch.float64
        )
        self.eps = torch.finfo(self.dtype).eps
        self.net_eps = (
            torch.finfo(model.dtype).eps if model else self.eps
        )  # of what a network returns
        self.fixture, self.scene = functools.cache(self._fixture), functools.cache(self._scene)
        self.precise = functools.cache(self._precise)

    def generator(self, *name: object) -> torch.Generator:
        """A CPU generator whose stream depends on the seed and the name alone, so claims can be run one by one."""
        return torch.Generator().manual_seed(zlib.crc32(repr((self.seed, *name)).encode()))

    def normal(self, *shape: int, of: object) -> Tensor:
        return torch.randn(*shape, generator=self.generator(of), dtype=self.dtype).to(self.device)

    def _fixture(self, name: str) -> fields.Fixture:
        made = (
            self.model.fixture()
            if self.model
            else fields.make(name, self.generator("fixture", name))
        )
        return made._replace(field=made.field.to(self.device))

    def _precise(self) -> nn.Module | None:
        """The model in higher precision, float64 for shapes and float32 for a pipeline; None where it is so already."""
        best = torch.float32 if self.model and self.model.size else torch.float64
        if not self.model or self.model.dtype == best:
            return None
        return self.model._replace(dtype=best).fixture().field.to(self.device)

    def _scene(self, name: str, kernel: str, mode: str, clamp: float | None = None) -> Scene:
        """P prompts x G members on a shifted grid that begins at t = 1, every step with a density stochastic."""
        fixture, own = self.fixture(name), mode == "independent"
        P, G, T = (
            (len(self.model.prompts) if self.model else 1, 3, 2)
            if name == "embedded"
            else (3, 12, 5)
        )
        process = pave.Process(pave.schedule(T, 2.0), kernel, ETA)
        noise = pave.Noise(
            self.normal(P, G if own else 1, *fixture.shape, of=("start", name, mode)),
            self.normal(
                P, len(process.stochastic_steps()), G, *fixture.shape, of=("steps", name, mode)
            ),
        )
        rollout = (pave.rollout_independent if own else pave.rollout_shared_anchor)(
            fixture.field, process, noise
        )
        return Scene(
            fixture.field, rollout, pave.group_advantages(reward(rollout.x_0), clamp=clamp)
        )

    def scenes(self, *names: str) -> Iterator[tuple[Scene, dict]]:
        """Every kernel and mode on these fixtures, with the row's fields; on the model alone, where one is given."""
        for kernel in self.kernels:
            for mode in MODES:
                for name in ("embedded",) if self.model else names:
                    yield (
                        self.scene(name, kernel, mode),
                        dict(kernel=kernel, rollouts=mode, fixture=name),
                    )

    def row(
        self,
        finding: Finding,
        registered: str,
        what: str,
        kernel: str = "",
        k: int | None = None,
        rollouts: str = "",
        form: str = "",
        fixture: str = "",
    ) -> Row:
        verdict, *rest = finding
        return Row(
            "", what, kernel, k, rollouts, form, fixture, verdict, registered, *rest, self.seed
        )


# ---- What is measured ----------------------------------------------------------------------------------------


def reward(x_0: Tensor) -> Tensor:
    """A smooth reward of samples [P, N, G, *event]: -(x_0 - 1)^2, mean over dimensions."""
    return -(x_0 - 1).square().flatten(3).mean(-1)


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each [*event] of x [P, n, *event]."""
    return x.flatten(2).norm(dim=-1)


def cosine(a: Tensor, b: Tensor) -> float:
    return (torch.dot(a, b) / (a.norm() * b.norm())).item()


def only(k: int, weight: float | Tensor = 1.0) -> dict:
    """Arguments of policy_loss that leave the k-term alone."""
    return {
        "factors": () if k == 1 else (k,),
        "term_weights": {1: weight} if k == 1 else {1: 0.0, k: weight},
    }


def attribution(scene: Scene, k: int, form: str = "paper") -> Tensor:
    """What policy_loss asks of mu^(k) at theta_old: sum over members of A (x_s - mu)/std^2, [P, n, A, *event].

    Read off the loss itself: an offset of the last velocity moves mu^(k), and nothing else, by b_k times itself.
    """
    rollout, process, calls = scene.rollout, scene.rollout.process, []
    offset = torch.zeros_like(rollout.x_t.flatten(0, 2)).requires_grad_()

    def velocity(x, t, c):
        calls.append(t)
        v = scene.field(x, t, c)
        return v.to(x) + offset if len(calls) == k else v

    loss = pave.policy_loss(
        velocity, rollout, scene.advantages, form=form, reduction="sum", clip=None, **only(k)
    ).loss
    t, s = (process.grid[[i + j for i in rollout.sde_steps]].to(offset.device) for j in (0, 1))
    b = process.coefficients(t if k == 1 else s + (t - s) / k, s).b.to(offset.dtype)
    pull = -torch.autograd.grad(loss, offset)[0].unflatten(0, rollout.x_t.shape[:3]) * math.prod(
        rollout.x_s.shape[:3]
    )
    return pull / b.view(1, -1, 1, *[1] * (pull.ndim - 3))


def condition(scene: Scene, k: int, whole: Tensor) -> float:
    """How much larger the terms of a group's attribution are than their sum `whole` [P, n, *event]."""
    x_s, A = scene.rollout.x_s, scene.advantages.expand(scene.rollout.x_s.shape[:3]).abs()
    with torch.no_grad():
        p = pave.rescore(scene.field, scene.rollout, () if k == 1 else (k,))[k]
    terms = pave.per_row(A, x_s) * (x_s.abs() + p.mean.abs()) / pave.per_row(p.std, p.mean) ** 2
    return (norms(terms.sum(2)) / norms(whole)).max().item()


def flat_gradient(value: Tensor, field: nn.Module) -> Tensor:
    """d value / d theta as one float64 vector; zeros where theta does not enter."""
    grads = torch.autograd.grad(
        value, [*field.parameters()], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten().double() for g in grads])


def term_gradient(
    scene: Scene, k: int, form: str = "paper", weight: float | Tensor = 1.0
) -> Tensor:
    """The parameter gradient of the k-term of policy_loss at theta_old."""
    loss = pave.policy_loss(
        scene.field, scene.rollout, scene.advantages, form=form, clip=None, **only(k, weight)
    ).loss
    return flat_gradient(loss, scene.field)


def one_step(
    field: nn.Module, kernel: str, x: Tensor, t: float, s: float, factors: Sequence[int]
) -> dict[int, pave.Transition]:
    """p^(k) of rows x [B, *event], all by one step t -> s; the grid ends there, so that t_1 = s if t = 1."""
    rows = [torch.full((len(x),), u, dtype=torch.float64, device=x.device) for u in (t, s)]
    factors = tuple(k for k in factors if k > 1)
    return pave.decompose(
        field,
        pave.Process([t, s], kernel, ETA),
        x,
        *rows,
        torch.arange(len(x), device=x.device),
        factors,
    )
