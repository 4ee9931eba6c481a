"""What the levels share: drawing questions, reading replies, comparing.

A level draws questions, reads replies, knows what is due under each of its conventions, and says
which convention a function follows. What is due comes from pave_grpo, or from a copy of it with a
known bug (zoo/oracle/bugs.py), so that bugs are recognised by their numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle.judging.asked import Field, Message
from zoo.oracle.judging.conditions import Setting

# Relative: far above rounding, far below what any bug does.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
# A state's rounding moves a log-probability by |z| |x| / std times that of float32: this part of
# the tolerance, which is five roundings.
STATE_ROUNDINGS = 0.03
DRAWS = 100  # of a setting, before it is given up as one that makes no sense
TIMES_AS = ("numbers", "tensors", "tensors of a row each")

DROPPED = "dropped: steps are weighted by 2 std^2"  # of 1/(2 std^2)

Values = dict[str, Tensor]
Axes = dict[str, Sequence[Any]]


class Unusable(Exception):
    """A reply that is no answer of the level: the words complete "it"."""


class Due(NamedTuple):
    """What is due, and the size of what it is computed from beyond its own: see `close`."""

    value: Tensor
    scale: float = 0.0


def close(theirs: Tensor, due: Due, tolerance: float) -> bool:
    """|theirs - ours| <= tolerance (max |ours| + |ours| + scale), everywhere; never for a NaN."""
    ours = due.value
    allowed = tolerance * (ours.abs().max() + ours.abs() + due.scale)
    return bool(((theirs - ours).abs() <= allowed).all())


def precision_of(theirs: Values, due: dict[str, Due]) -> str:
    """To which of TOLERANCES all quantities agree; "" to none."""
    for name, tolerance in TOLERANCES.items():
        if all(close(theirs[quantity], due[quantity], tolerance) for quantity in theirs):
            return name
    return ""


# ---- Drawing -------------------------------------------------------------------------------------


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number between low and high with eight binary digits: exact in every precision asked."""
    u = torch.rand((), generator=generator).item()
    return round((low + (high - low) * u) * 256) / 256


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """From low to high, both possible."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def pick(generator: torch.Generator, values: Sequence[Any]) -> Any:
    """One of them."""
    return values[integer(generator, 0, len(values) - 1)]


def draw_times(generator: torch.Generator) -> list[tuple[float, float]]:
    """Steps t -> s: in the middle, from t = 1, near it, nearer, long, short, near 0, to s = 0."""
    middle = uniform(generator, 0.5, 0.8)
    near_one = uniform(generator, 0.95, 0.99)
    short = uniform(generator, 0.25, 0.45)
    low = uniform(generator, 0.05, 0.09)
    last = uniform(generator, 0.2, 0.5)
    return [
        (middle, uniform(generator, 0.6, 0.8) * middle // (1 / 256) / 256),
        (1.0, uniform(generator, 0.7, 0.9)),
        (near_one, near_one - uniform(generator, 0.05, 0.1)),
        (1 - 1 / 128, uniform(generator, 0.85, 0.95)),
        (uniform(generator, 0.75, 0.9), uniform(generator, 0.2, 0.35)),
        (short, short - uniform(generator, 0.03, 0.05)),
        (low, low - uniform(generator, 0.01, 0.03)),
        (last, 0.0),
    ]


def draw_events(generator: torch.Generator) -> list[tuple[int, ...]]:
    """Shapes of one to four axes; none of their sizes is 1 or a number of rows."""
    sizes = (2, 3, 4, 6)
    wide = (pick(generator, (4, 6)),)
    return [
        wide,
        (3,),
        (pick(generator, sizes), pick(generator, sizes)),
        (2, pick(generator, (3, 4)), pick(generator, (3, 4))),
        (2, 2, pick(generator, (2, 3)), pick(generator, (2, 3))),
        (4, 4, 6),
    ]


def draw_etas(generator: torch.Generator) -> list[float]:
    """The usual one, and three others."""
    ranges = ((0.2, 0.4), (0.45, 0.65), (0.75, 1.0))
    return [uniform(generator, *some) for some in ranges] + [0.7]


def draw_seed(generator: torch.Generator) -> int:
    """Of the tensors of one question."""
    return integer(generator, 0, 2**31)


def has_density(kernel: str, times: tuple[float, float]) -> bool:
    """cps has none at s = 0."""
    return kernel != "cps" or times[1] > 0


@functools.cache
def field_of(seed: int, event: tuple[int, ...]) -> Field:
    """A field on states of that shape."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(event)
    w1 = 0.6 * normal(generator, size + 2, 16) * min(1.0, (6 / size) ** 0.5)
    return Field(w1, 0.5 * normal(generator, 16, size))


def weights_of(field: Field, name: str) -> Values:
    """Its weights as they travel."""
    return {f"{name}.w1": field.w1.detach().clone(), f"{name}.w2": field.w2.detach().clone()}


def process_of(module: ModuleType, setting: Setting) -> Any:
    """The module's Process of the one step t -> s."""
    grid = torch.tensor(setting.times, dtype=torch.float64)
    return module.Process(grid, setting.kernel, setting.eta)


def time_rows(setting: Setting, n: int) -> tuple[Tensor, Tensor]:
    """t and s in n rows."""
    t, s = setting.times
    return torch.full((n,), t, dtype=torch.float64), torch.full((n,), s, dtype=torch.float64)


def message(
    numbers: dict[str, Any],
    tensors: Values,
    velocities: dict[str, Field] | None = None,
    prompted: bool = False,
    gradient: str = "",
    times: str = TIMES_AS[0],
    rows: int = 0,
) -> Message:
    """A call as it travels."""
    fields = velocities or {}
    words = {
        "numbers": numbers,
        "tensors": list(tensors),
        "velocities": list(fields),
        "prompted": prompted,
        "gradient": gradient,
        "times": times,
        "rows": rows,
    }
    travelling = dict(tensors)
    for name, field in fields.items():
        travelling |= weights_of(field, name)
    return Message(words, travelling)


# ---- Levels --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A question, and what was answered: values, or why there are none."""

    setting: Setting
    values: Values | None
    why: str = ""


Ask = Callable[[Setting], Case]
Send = Callable[[Message, str], Message]


class Recognised(NamedTuple):
    """The convention that explains most of the answers, as an object for `due`, and in words."""

    convention: Any
    told: dict[str, str]
    scope: tuple[str, ...] = ()


class Level:
    """What a function of this level is asked, and what is due to it."""

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]]  # the fields of a setting that say which question it is
    bug_levels: ClassVar[tuple[str, ...]]  # where a bug that shows here may sit
    unobservable: ClassVar[tuple[str, ...]]

    def __init__(self, parameters: dict[str, Any], generator: torch.Generator):
        self.parameters = parameters
        self.axes = self.draw_axes(generator)
        self.generator = generator
        self.findings: list[str] = []

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """The values that each field of a setting may take."""
        raise NotImplementedError

    def settings(self) -> list[Setting]:
        """What is asked."""
        raise NotImplementedError

    def allowed(self, setting: Setting) -> bool:
        """Does the question make sense?"""
        return has_density(setting.kernel, setting.times)

    def prepare(self, send: Send, settings: Sequence[Setting]) -> None:
        """Find out how the function wants to be called."""

    def call(self, setting: Setting) -> Message:
        """The question as it travels."""
        raise NotImplementedError

    def read(self, reply: Message, setting: Setting) -> Values:
        """The quantities answered. Raises Unusable."""
        raise NotImplementedError

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """The convention that is followed."""
        raise NotImplementedError

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """The quantities due under a convention, by pave_grpo or a patched copy."""
        raise NotImplementedError

    def bug_conventions(self, found: Recognised) -> list[Any]:
        """Under which conventions known bugs are tried."""
        return [found.convention]

    def afterwards(self, found: Recognised, cases: list[Case], send: Send) -> str:
        """What else is to be seen, once its numbers are right: what is wrong, or ""."""
        return ""

    def random_settings(self, generator: torch.Generator, **fixed: Any) -> list[Setting]:
        """One, with a value of each axis but for what is fixed; none where none makes sense."""
        for _ in range(DRAWS):
            drawn = {name: pick(generator, values) for name, values in self.axes.items()}
            setting = Setting(**(drawn | fixed), seed=draw_seed(generator))
            if self.allowed(setting):
                return [setting]
        return []


def tensor_of(reply: Message, i: int, what: str) -> Tensor:
    """The i-th value, in its own dtype. Raises Unusable where it is no tensor."""
    if i >= len(reply.words["returned"]):
        raise Unusable(f"returns {len(reply.words['returned'])} values and no {what}")
    if str(i) not in reply.tensors:
        raise Unusable(f"returns {reply.words['returned'][i]} for {what}, must be floating point")
    return reply.tensors[str(i)]


def shaped(value: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """The value in float64 and that shape. Raises Unusable for another."""
    if tuple(value.shape) != shape:
        raise Unusable(f"returns {what} of shape {list(value.shape)}, must be {list(shape)}")
    return value.double()


def one_per_row(value: Tensor, rows: int, what: str) -> Tensor:
    """What broadcasts to [B, ...] and is one number in each row, as [B]. Raises Unusable else."""
    wanted = f"returns {what} of shape {list(value.shape)}, must be one number a row"
    if value.numel() == 0:
        raise Unusable(wanted)
    if value.numel() == 1:
        return value.double().flatten().expand(rows)
    if value.shape[0] not in (1, rows):
        raise Unusable(wanted)
    numbers = value.double().flatten(1) if value.ndim > 1 else value.double()[:, None]
    same = (numbers == numbers[:, :1]) | numbers.isnan()
    if not bool(same.all()):
        raise Unusable(wanted)
    return numbers[:, 0].expand(rows)
