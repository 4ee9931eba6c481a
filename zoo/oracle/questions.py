"""What other implementations are asked, and what is due to them: one class for each level.

The signatures are in zoo/oracle/judging.py, which asks and compares. Each level has conventions,
which are named and never held against anyone; what is due is said under one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import pave_grpo as pave
from zoo.oracle import fields


@dataclass(frozen=True, eq=False)
class Question:
    """One call of a function. A subclass is a level, its fields the parameters of the function."""

    name: ClassVar[str]
    quantities: ClassVar[tuple[str, ...]]  # what is compared
    bug_levels: ClassVar[tuple[str, ...]]  # where a bug that shows in them may sit
    unobservable: ClassVar[tuple[str, ...]]

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """The names by which a function chooses this level."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def arguments(self) -> dict[str, Any]:
        """What the function is given: copies of tensors, and velocities as it will call them."""
        given = {name: getattr(self, name) for name in self.parameters()}
        for name, value in given.items():
            if isinstance(value, Tensor):
                given[name] = value.clone()
            if isinstance(value, nn.Module):
                given[name] = of_one_prompt(value)
        return given

    def due(self, module: ModuleType, convention: Any) -> Iterable[Tensor]:
        """The quantities, by pave_grpo or a patched copy, under one of the level's conventions."""
        raise NotImplementedError


def of_one_prompt(field: nn.Module) -> Callable[[Tensor, Tensor | float], Tensor]:
    """velocity(x, t) of prompt 0, t a number or [B]; float64 within, x's dtype outside."""

    def velocity(x: Tensor, t: Tensor | float) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        return field(x.double(), times, torch.zeros(len(x), dtype=torch.long)).to(x.dtype)

    return velocity


# ---- Drawing -------------------------------------------------------------------------------------


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def rows(t: float, n: int) -> Tensor:
    """The same time in n rows."""
    return torch.full((n,), t, dtype=torch.float64)


def process_of(module: ModuleType, t: float, s: float, kernel: str, eta: float) -> Any:
    """The module's Process of the one step t -> s."""
    return module.Process(torch.tensor([t, s], dtype=torch.float64), kernel, eta)


# ---- transition ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TransitionQuestion(Question):
    """What is p^(k)(x_s | x)? A convention: the kernels that call g = std / sqrt(D) their std."""

    x: Tensor
    velocity: nn.Module
    t: float
    s: float
    k: int
    kernel: str
    eta: float

    name = "transition"
    quantities = ("mean", "std")
    bug_levels = ("transition",)
    unobservable = ("gradient", "mean or sum", "constants", "1/(2 std^2)", "ddof", "eps", "clamp")

    def __str__(self) -> str:
        return f"kernel {self.kernel}, k = {self.k}, t = {self.t:.3f}, s = {self.s:.3f}"

    @torch.no_grad()
    def due(self, module: ModuleType, convention: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(mean, std). Other k are asked for as well: a bug may carry one over to the next."""
        process = process_of(module, self.t, self.s, self.kernel, self.eta)
        t, s = rows(self.t, len(self.x)), rows(self.s, len(self.x))
        prompt = torch.zeros(len(self.x), dtype=torch.long)
        factors = sorted({2, 3, self.k} - {1})
        p = module.decompose(self.velocity, process, self.x, t, s, prompt, factors)[self.k]
        D = (self.t - self.s) / self.k
        return p.mean, p.std / D**0.5 if self.kernel in convention else p.std


def transition_questions(generator: torch.Generator) -> list[TransitionQuestion]:
    """All kernels, k = 1, 2, 3, 5, two steps in the middle and one from t = 1; three rows each."""
    network = fields.Network(generator)
    eta = uniform(generator, 0.5, 0.9)
    questions = []
    for kernel, k in product(pave.KERNELS, (1, 2, 3, 5)):
        times = (uniform(generator, 0.5, 0.9), uniform(generator, 0.2, 0.5), 1.0)
        for t in times:
            x = normal(generator, 3, fields.DIM)
            s = t * uniform(generator, 0.6, 0.9)
            questions.append(TransitionQuestion(x, network, t, s, k, kernel, eta))
    return questions


# ---- log_prob ------------------------------------------------------------------------------------


class LogProbConvention(NamedTuple):
    """What a log-probability is reduced by, and which of its constants are kept."""

    reduction: str
    constants: str

    def left_out(self, std: Tensor) -> Tensor:
        """What it leaves out of -log std - log(2 pi)/2, the constants of each dimension."""
        if self.constants == "kept":
            return torch.zeros_like(std)
        half_log = torch.full_like(std, math.log(2 * math.pi) / 2)
        return -std.log() - half_log if self.constants == "dropped" else -half_log


LOG_PROB_CONVENTIONS = [
    LogProbConvention(reduction, constants)
    for reduction in ("mean", "sum")
    for constants in ("kept", "log std kept, log(2 pi)/2 dropped", "dropped")
]


@dataclass(frozen=True, eq=False)
class LogProbQuestion(Question):
    """What is log N(x_s; mean, std^2 I)?"""

    x_s: Tensor
    mean: Tensor
    std: Tensor

    name = "log_prob"
    quantities = ("log-probability",)
    bug_levels = ("log_prob",)
    unobservable = ("gradient", "g or std", "ddof", "eps", "clamp")

    def __str__(self) -> str:
        return f"x_s of shape {tuple(self.x_s.shape)}"

    def due(self, module: ModuleType, convention: LogProbConvention) -> tuple[Tensor]:
        """The log-probability, reduced and with constants as the convention has it."""
        log_prob = module.Transition(self.mean, self.std).log_prob(self.x_s, convention.reduction)
        dims = self.x_s[0].numel() if convention.reduction == "sum" else 1
        return (log_prob - dims * convention.left_out(self.std),)


def log_prob_questions(generator: torch.Generator) -> list[LogProbQuestion]:
    """Vectors and pictures; std differs from row to row, so that a dropped constant shows."""
    questions = []
    for shape in ((4, 5), (3, 2, 4, 4)):
        x_s, mean = normal(generator, *shape), normal(generator, *shape)
        std = 0.2 + torch.rand(shape[0], generator=generator, dtype=torch.float64)
        questions.append(LogProbQuestion(x_s, mean, std))
    return questions


# ---- loss ----------------------------------------------------------------------------------------


class LossConvention(NamedTuple):
    """How advantages are computed, and x_s is scored; clip "none" is never to cut."""

    reduction: str
    ddof: int
    eps: float
    clamp: float | None
    form: str = "paper"
    clip: str = "as given"


# Values in use, the usual one first.
EPS = (1e-8, 0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
CLAMPS = (5.0, None, 3.0, 1.0)
FORMS = ("paper", "matched")
CLIPS = ("as given", "none")
LOSS_CONVENTIONS = [
    LossConvention(*names) for names in product(("mean", "sum"), (1, 0), EPS, CLAMPS, FORMS, CLIPS)
]
USUAL_LOSS_CONVENTIONS = [
    LossConvention(*names) for names in product(("mean", "sum"), (1, 0), (1e-8, 1e-4), (5.0, None))
]


@dataclass(frozen=True, eq=False)
class LossQuestion(Question):
    """What is the loss of a group, and its gradient by the parameters of `velocity`?"""

    velocity: nn.Module
    velocity_old: nn.Module
    x_t: Tensor
    x_s: Tensor
    t: float
    s: float
    rewards: Tensor
    factors: tuple[int, ...]
    kernel: str
    eta: float
    clip: float

    name = "loss"
    quantities = ("loss", "gradient")
    bug_levels = ("transition", "log_prob", "advantages", "loss")
    unobservable = ("constants", "g or std", "t = 1", "several groups", "equal rewards", "KL")

    def __str__(self) -> str:
        start = "shared" if torch.equal(self.x_t, self.x_t[:1].expand_as(self.x_t)) else "own"
        return f"kernel {self.kernel}, S = {set(self.factors) or '{}'}, {start} states"

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d theta as one vector, zero where theta has no part."""
        theta = [*self.velocity.parameters()]
        parts = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    def due(self, module: ModuleType, convention: LossConvention) -> Iterator[Tensor]:
        """The loss, then its gradient."""
        reduction, ddof, eps, clamp, form, clip = convention
        process = process_of(module, self.t, self.s, self.kernel, self.eta)
        x_t, x_s = self.x_t[None, None], self.x_s[None, None]
        unused = torch.zeros(x_s.shape[:3], dtype=torch.float64)  # log-probabilities of sampling
        rollout = module.Rollout(process, (0,), x_t, x_s, unused, x_s)
        A = module.group_advantages(self.rewards[None, None], ddof, eps, clamp)
        options: dict[str, Any] = {"factors": self.factors, "form": form, "reduction": reduction}
        options["clip"] = self.clip if clip == "as given" else None
        with torch.no_grad():
            old = module.policy_loss(self.velocity_old, rollout, A, **options).old
        loss = module.policy_loss(self.velocity, rollout, A, old=old, **options).loss
        yield loss.detach()
        yield self.gradient(loss)


def loss_questions(generator: torch.Generator) -> list[LossQuestion]:
    """A group of 40 with one outlier, so that a clamp at 5 acts, after an update.

    Ratios lie on both sides of the clip. Members leave one state, or each its own.
    """
    G, eta, clip = 40, 0.7, 0.02
    rewards = 0.01 * normal(generator, G)
    rewards[7] += 0.2
    old = fields.Network(generator)
    new = fields.nudged(old, 0.05, generator)
    own = normal(generator, G, fields.DIM)
    shared = normal(generator, 1, fields.DIM).expand(G, fields.DIM).contiguous()
    t = uniform(generator, 0.5, 0.9)
    s = 0.75 * t
    z = normal(generator, G, fields.DIM)
    questions = []
    for kernel, factors, x_t in product(pave.KERNELS, ((), (2, 3)), (own, shared)):
        with torch.no_grad():
            v = of_one_prompt(old)(x_t, t)
            process = process_of(pave, t, s, kernel, eta)
            x_s = process.transition(x_t, v, rows(t, G), rows(s, G)).sample(z)
        group = (new, old, x_t, x_s, t, s, rewards)
        questions.append(LossQuestion(*group, factors, kernel, eta, clip))
    return questions
