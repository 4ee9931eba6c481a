"""What claims are tested with: kernels, factors, fixtures, rollouts and named streams of noise."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pave_grpo as pave
from zoo.oracle import fields, theory

MODES = ("shared_anchor", "independent")
ETA = 0.7
POINT = (0.70, 0.55)  # a step (t, s) in the middle


class Scene(NamedTuple):
    """A rollout on a fixture, with advantages from a smooth reward."""

    field: nn.Module
    rollout: pave.Rollout
    advantages: Tensor


class Model(NamedTuple):
    """A checkpoint of train.py, or a pipeline with its pictures' size; its prompts and dtype."""

    path: str
    prompts: tuple[str, ...]
    dtype: torch.dtype
    size: tuple[int, int] | None = None

    def fixture(self) -> fields.Fixture:
        if self.size:
            return fields.piped(self.path, self.prompts, self.dtype, self.size)
        return fields.pictured(self.path, self.prompts, self.dtype)


def reward(x_0: Tensor) -> Tensor:
    """A smooth reward of samples [P, N, G, *event]: -(x_0 - 1)^2, mean over dimensions."""
    return -(x_0 - 1).square().flatten(3).mean(-1)


class Bench:
    """One choice of all that. Raises ValueError for a kernel without predictions."""

    def __init__(
        self,
        kernels: Sequence[str] | None = None,
        factors: Sequence[int] = (2, 3, 5),
        seed: int = 0,
        device: str = "cpu",
        model: Model | None = None,
    ):
        self.kernels = tuple(pave.KERNELS if kernels is None else kernels)
        self.records = {kernel: theory.of(kernel, ETA) for kernel in self.kernels}
        self.factors, self.seed, self.model = tuple(factors), seed, model
        self.device = torch.device(device)
        coarse = model is not None and (model.size is not None or model.dtype != torch.float64)
        self.dtype = torch.float32 if coarse else torch.float64
        self.eps = torch.finfo(self.dtype).eps
        self.net_eps = (
            torch.finfo(model.dtype).eps if model else self.eps
        )  # of what a network returns
        self.fixture = functools.cache(self._fixture)
        self.scene = functools.cache(self.new_scene)
        self.precise = functools.cache(self._precise)

    @property
    def is_large(self) -> bool:
        """Whether the gradients of --model are too large to be held whole."""
        return self.model is not None and fields.is_large(self.fixture("embedded").field)

    def theory(self, kernel: str) -> theory.Theory:
        return self.records[kernel]

    def factors_on(self, fixture: str) -> tuple[int, ...]:
        """S; on the shipped model, whose float64 gradients are slow, its first k alone."""
        return self.factors if fixture != "embedded" or self.model else self.factors[:1]

    def generator(self, *name: object) -> torch.Generator:
        """A CPU generator by seed and name alone: a claim draws the same alone and in company."""
        return torch.Generator().manual_seed(zlib.crc32(repr((self.seed, *name)).encode()))

    def normal(self, *shape: int, of: object) -> Tensor:
        """Standard normal numbers [*shape] of the stream with this name."""
        z = torch.randn(*shape, generator=self.generator(of), dtype=self.dtype)
        return z.to(self.device)

    def _fixture(self, name: str) -> fields.Fixture:
        if self.model:
            made = self.model.fixture()
        else:
            made = fields.make(name, self.generator("fixture", name))
        return made._replace(field=made.field.to(self.device))

    def _precise(self) -> nn.Module | None:
        """The model in float64 (a pipeline: in float32); None where it computes so already."""
        best = torch.float32 if self.model and self.model.size else torch.float64
        if not self.model or self.model.dtype == best:
            return None
        return self.model._replace(dtype=best).fixture().field.to(self.device)

    def new_scene(self, name: str, kernel: str, mode: str, clamp: float | None = None) -> Scene:
        """P prompts x G members from t = 1 on a shifted grid, stochastic wherever possible."""
        fixture, own = self.fixture(name), mode == "independent"
        if name == "embedded":
            P, G, T = len(self.model.prompts) if self.model else 1, 3, 2
        else:
            P, G, T = 3, 12, 5
        process = pave.Process(pave.schedule(T, 2.0), kernel, ETA)
        n = len(process.stochastic_steps())
        x_1 = self.normal(P, G if own else 1, *fixture.shape, of=("start", name, mode))
        z = self.normal(P, n, G, *fixture.shape, of=("steps", name, mode))
        sample = pave.rollout_independent if own else pave.rollout_shared_anchor
        rollout = sample(fixture.field, process, pave.Noise(x_1, z))
        advantages = pave.group_advantages(reward(rollout.x_0), clamp=clamp)
        return Scene(fixture.field, rollout, advantages)

    def scenes(self, *names: str) -> Iterator[tuple[Scene, dict[str, Any]]]:
        """Every kernel and mode on these fixtures (or --model's alone), with the row's fields."""
        for kernel in self.kernels:
            for mode in MODES:
                for name in ("embedded",) if self.model else names:
                    where = {"kernel": kernel, "rollouts": mode, "fixture": name}
                    yield self.scene(name, kernel, mode), where
