"""The three levels on which a step is judged: step, transition, log_prob."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle.judging.asked import Message
from zoo.oracle.judging.conditions import Setting
from zoo.oracle.judging.levels import (
    DROPPED,
    STATE_ROUNDINGS,
    TIMES_AS,
    TOLERANCES,
    Ask,
    Axes,
    Case,
    Due,
    Level,
    Recognised,
    Send,
    Unusable,
    Values,
    close,
    draw_etas,
    draw_events,
    draw_times,
    field_of,
    has_density,
    message,
    normal,
    one_per_row,
    precision_of,
    process_of,
    shaped,
    tensor_of,
    time_rows,
)

# ---- Log-probabilities ---------------------------------------------------------------------------


class LogProbConvention(NamedTuple):
    """What a log-probability is reduced by, and which of its parts are kept."""

    reduction: str = "mean"
    constants: str = "kept"
    half_square: str = "kept"

    def of(self, log_prob: Tensor, std: Tensor, dims: int) -> Tensor:
        """What becomes of a density's logarithm, constants included, [B]."""
        log_std = -std.log()
        half_log = torch.full_like(std, -math.log(2 * math.pi) / 2)
        many = dims if self.reduction == "sum" else 1
        square = log_prob - many * (log_std + half_log)
        if self.half_square != "kept":
            square = square * 2 * std.square()
        if self.constants == "kept":
            return square + many * (log_std + half_log)
        return square + many * log_std if self.constants == LOG_STD_KEPT else square


LOG_STD_KEPT = "log std kept, log(2 pi)/2 dropped"
LOG_PROB_CONVENTIONS = [
    LogProbConvention(*names)
    for names in product(("mean", "sum"), ("kept", LOG_STD_KEPT, "dropped"), ("kept", DROPPED))
]


def log_prob_due(
    module: ModuleType, p: Any, x_s: Tensor, size: Tensor, convention: LogProbConvention
) -> Due:
    """log N(x_s; p) under a convention; `size` [B, *event] is that of what the mean was made of."""
    dims = x_s[0].numel()
    std = p.std.expand(len(x_s))
    value = convention.of(p.log_prob(x_s, convention.reduction), std, dims)
    z = (x_s - p.mean).abs() / pave.per_row(std, x_s)
    error = (z * (size + x_s.abs()) / pave.per_row(std, x_s)).flatten(1).mean(1)
    error = error * log_prob_unit(convention, std, dims)
    return Due(value, STATE_ROUNDINGS * error.max().item())


# ---- Conventions, kernel by kernel ---------------------------------------------------------------


def best(options: Sequence[Any], agreements: Callable[[Any], int], possible: int) -> Any:
    """The first option with the most agreements; there are `possible` at most."""
    counts: list[int] = []
    for option in options:
        counts.append(agreements(option))
        if counts[-1] == possible:
            break
    return options[counts.index(max(counts))]


def together(told: dict[str, str]) -> str:
    """{kernel: words} in one line: the words, where all kernels share them."""
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    by_words: dict[str, list[str]] = {}
    for kernel, words in told.items():
        by_words.setdefault(words, []).append(kernel)
    return "; ".join(f"{words} ({', '.join(kernels)})" for words, kernels in by_words.items())


class Chosen(NamedTuple):
    """A convention of a step: what is called std, and the log-probability's; one per kernel."""

    called: str = "std is the step's"
    log_prob: LogProbConvention = LogProbConvention()


CALLED_G = "g = std / sqrt(D)"
CALLED = (Chosen().called, CALLED_G)


def choices(cases: list[Case]) -> Iterator[str]:
    """The kernels that were answered."""
    yield from dict.fromkeys(case.setting.kernel for case in cases if case.values is not None)


# ---- transition ----------------------------------------------------------------------------------


class TransitionLevel(Level):
    """What is p^(k)(x_s | x_t)?"""

    name = "transition"
    required = ("x", "velocity", "t", "s", "k", "kernel", "eta")
    optional = ("prompt",)
    shown = ("kernel", "k", "times", "eta", "event")
    bug_levels = ("transition",)
    unobservable = ("gradient", "mean or sum", "constants", "1/(2 std^2)", "ddof", "eps", "clamp")

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """k from 1 to 7, and what a step has; several groups where prompts are asked for."""
        groups = (1, 2, 3) if "prompt" in self.parameters else (1,)
        return {
            "k": range(1, 8),
            "kernel": tuple(pave.KERNELS),
            "times": draw_times(generator),
            "eta": draw_etas(generator),
            "event": draw_events(generator),
            "rows": (5, 7),
            "groups": groups,
        }

    def settings(self) -> list[Setting]:
        """Each k of each kernel three times, each value of the other axes, each time with k = 1."""
        drawn = []
        for kernel in self.axes["kernel"]:
            for k in self.axes["k"]:
                for _ in range(3):
                    drawn += self.random_settings(self.generator, kernel=kernel, k=k)
            for name in ("times", "event", "groups"):
                for value in self.axes[name]:
                    fixed = {"kernel": kernel, name: value}
                    if name != "times" or has_density(kernel, value):
                        drawn += self.random_settings(self.generator, **fixed)
            for times in self.axes["times"]:  # a whole step: sub-steps begin later
                if has_density(kernel, times) and 1 in self.axes["k"]:
                    drawn += self.random_settings(self.generator, kernel=kernel, times=times, k=1)
        return drawn

    def call(self, setting: Setting) -> Message:
        """x [B, *event], t, s, k, kernel, eta, a velocity; prompt [B] where it is asked for."""
        x, prompt = chain_begin(setting)
        t, s = setting.times
        numbers = {"t": t, "s": s, "k": setting.k, "kernel": setting.kernel, "eta": setting.eta}
        prompted = "prompt" in self.parameters
        tensors = {"x": x, "prompt": prompt} if prompted else {"x": x}
        velocities = {"velocity": field_of(setting.seed, setting.event)}
        return message(numbers, tensors, velocities, prompted)

    def read(self, reply: Message, setting: Setting) -> Values:
        """{"mean": [B, *event], "std": [B]}. Raises Unusable for other values or shapes."""
        x, _ = chain_begin(setting)
        if len(reply.words["returned"]) != 2:
            raise Unusable(f"returns {len(reply.words['returned'])} values, must be 2: mean, std")
        mean = shaped(tensor_of(reply, 0, "the mean"), tuple(x.shape), "a mean")
        return {"mean": mean, "std": one_per_row(tensor_of(reply, 1, "the std"), len(x), "a std")}

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """mean and std of p^(k)(x_s | x), std or g = std / sqrt(D) as each kernel calls it."""
        p = chain_end(setting, module)
        called = convention.get(setting.kernel, CALLED[0])
        D = (setting.times[0] - setting.times[1]) / setting.k
        return {"mean": Due(p.mean), "std": Due(p.std if called == CALLED[0] else p.std / D**0.5)}

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """Which kernels call g their std."""
        convention = {}
        for kernel in choices(cases):
            own = [case for case in cases if case.values and case.setting.kernel == kernel]
            agreements = functools.partial(self.agreements, own, kernel)
            convention[kernel] = best(CALLED, agreements, len(own))
        told = {kernel: called for kernel, called in convention.items()}
        return Recognised(convention, {"g or std": together(told)})

    def agreements(self, cases: list[Case], kernel: str, called: str) -> int:
        """How many answers of a kernel agree if that is what it calls its std."""
        due = [self.due(case.setting, {kernel: called}) for case in cases]
        return sum(
            bool(precision_of(case.values or {}, d)) for case, d in zip(cases, due, strict=True)
        )


def chain_begin(setting: Setting) -> tuple[Tensor, Tensor]:
    """(x, prompt), one row for each member of each group."""
    generator = torch.Generator().manual_seed(setting.seed)
    n = setting.rows * setting.groups
    prompt = torch.arange(setting.groups).repeat_interleave(setting.rows)
    return normal(generator, n, *setting.event), prompt


@functools.cache
@torch.no_grad()
def chain_end(setting: Setting, module: ModuleType) -> Any:
    """p^(k). Other k are asked for as well: a bug may carry one over to the next."""
    x, prompt = chain_begin(setting)
    t, s = time_rows(setting, len(x))
    factors = sorted({2, 3, setting.k} - {1})
    velocity = field_of(setting.seed, setting.event)
    process = process_of(module, setting)
    return module.decompose(velocity, process, x, t, s, prompt, factors)[setting.k]


# ---- log_prob ------------------------------------------------------------------------------------


class LogProbLevel(Level):
    """What is log N(x_s; mean, std^2 I)?"""

    name = "log_prob"
    required = ("x_s", "mean", "std")
    shown = ("event", "rows")
    bug_levels = ("log_prob",)
    unobservable = ("gradient", "g or std", "ddof", "eps", "clamp")

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """Shapes of states, and numbers of rows."""
        return {"event": draw_events(generator), "rows": (5, 7)}

    def settings(self) -> list[Setting]:
        """Each shape twice."""
        drawn = []
        for event in [*self.axes["event"]] * 2:
            drawn += self.random_settings(self.generator, event=event)
        return drawn

    def given(self, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
        """(x_s, mean, std); std from 0.005 to 1, another in each row, so that constants show."""
        generator = torch.Generator().manual_seed(setting.seed)
        shape = (setting.rows, *setting.event)
        std = 0.005 ** torch.rand(setting.rows, generator=generator, dtype=torch.float64)
        mean = normal(generator, *shape)
        return mean + pave.per_row(std, mean) * normal(generator, *shape) * 1.5, mean, std

    def call(self, setting: Setting) -> Message:
        """x_s, mean [B, *event], std [B]."""
        x_s, mean, std = self.given(setting)
        return message({}, {"x_s": x_s, "mean": mean, "std": std})

    def read(self, reply: Message, setting: Setting) -> Values:
        """{"log-probability": [B]}. Raises Unusable for other values or shapes."""
        if len(reply.words["returned"]) != 1:
            raise Unusable(f"returns {len(reply.words['returned'])} values, must be 1")
        value = tensor_of(reply, 0, "the log-probability")
        return {"log-probability": one_per_row(value, setting.rows, "a log-probability")}

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """log N(x_s; mean, std^2 I) [B], under a LogProbConvention."""
        x_s, mean, std = self.given(setting)
        p = module.Transition(mean, std)
        return {"log-probability": log_prob_due(module, p, x_s, mean.abs(), convention)}

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """Reduction, constants, and whether 1/(2 std^2) is there."""
        answered = [case for case in cases if case.values is not None]
        agreements = functools.partial(self.agreements, answered)
        convention = best(LOG_PROB_CONVENTIONS, agreements, len(answered))
        told = {
            "mean or sum": convention.reduction,
            "constants": convention.constants,
            "1/(2 std^2)": convention.half_square,
        }
        return Recognised(convention, told)

    def agreements(self, cases: list[Case], convention: LogProbConvention) -> int:
        """How many answers agree with it."""
        due = [self.due(case.setting, convention) for case in cases]
        return sum(
            bool(precision_of(case.values or {}, d)) for case, d in zip(cases, due, strict=True)
        )

    def bug_conventions(self, found: Recognised) -> list[Any]:
        kept = [c for c in LOG_PROB_CONVENTIONS if c.half_square == "kept"]
        return [found.convention, *kept]


# ---- step ----------------------------------------------------------------------------------------


class StepLevel(Level):
    """What does one stochastic step return? Its mean and std where it says them, its density."""

    name = "step"
    required = ("v", "x_t", "t", "s", "eta", "x_s")
    optional = ("kernel",)
    shown = ("kernel", "times", "eta", "event")
    bug_levels = ("transition", "log_prob")
    unobservable = ("k > 1", "ddof", "eps", "clamp")

    def __init__(self, parameters: dict[str, Any], generator: torch.Generator):
        super().__init__(parameters, generator)
        self.is_named = "kernel" in parameters  # else the kernel is to be found out
        self.only = ""  # what was found out
        self.dead: tuple[str, ...] = ()  # kernels whose log_prob has no gradient
        # How the function of each kernel wants to be called, once that is known.
        self.times_as = dict.fromkeys(pave.KERNELS, TIMES_AS[0])
        self.gradient = dict.fromkeys(pave.KERNELS, "v")

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """What one step has; one kernel where the function names none."""
        return {
            "kernel": tuple(pave.KERNELS) if "kernel" in self.parameters else (NAMELESS,),
            "times": draw_times(generator),
            "eta": draw_etas(generator),
            "event": draw_events(generator),
            "rows": (5, 7),
        }

    def settings(self) -> list[Setting]:
        """Each value of each axis for each kernel, and ten more."""
        drawn = []
        for kernel in self.axes["kernel"]:
            for name in ("times", "eta", "event"):
                for value in self.axes[name]:
                    fixed = {"kernel": kernel, name: value}
                    if name != "times" or self.allowed(Setting(**fixed)):
                        drawn += self.random_settings(self.generator, **fixed)
            for _ in range(10):
                drawn += self.random_settings(self.generator, kernel=kernel)
        return drawn

    def kernel_of(self, setting: Setting) -> str:
        """What is computed, as far as it is known: cps, which asks for most, where it is not."""
        return setting.kernel if self.is_named else self.only or "cps"

    def allowed(self, setting: Setting) -> bool:
        return has_density(self.kernel_of(setting), setting.times)

    def call(self, setting: Setting, samples: bool = False) -> Message:
        """v, x_t, x_s [B, *event] (None: it samples), t, s, eta, and kernel where it is named."""
        v, x_t, x_s = step_states(setting)
        t, s = setting.times
        numbers: dict[str, Any] = {"t": t, "s": s, "eta": setting.eta}
        if self.is_named:
            numbers["kernel"] = setting.kernel
        tensors = {"v": v, "x_t": x_t}
        if samples:
            numbers["x_s"] = None
        else:
            tensors["x_s"] = x_s
        gradient, times = self.gradient[setting.kernel], self.times_as[setting.kernel]
        return message(numbers, tensors, {}, False, gradient, times, setting.rows)

    def prepare(self, send: Send, settings: Sequence[Setting]) -> None:
        """Times as numbers, or as it wants them; v with a gradient, or as it wants it."""
        kernels = [*dict.fromkeys(setting.kernel for setting in settings)]
        unusable: list[str] = []
        for kernel in kernels:
            own = [setting for setting in settings if setting.kernel == kernel][:12]
            for gradient, times in product(("v", ""), TIMES_AS):
                self.gradient[kernel], self.times_as[kernel] = gradient, times
                if self.answers_one_of(own, send):
                    break
            else:
                unusable.append(kernel)
        for kernel in unusable:  # asked in the way that another understands, it says why
            like = next((other for other in kernels if other not in unusable), "")
            gradient, times = self.gradient.get(like, "v"), self.times_as.get(like, TIMES_AS[0])
            self.gradient[kernel], self.times_as[kernel] = gradient, times
        kernels = [kernel for kernel in kernels if kernel not in unusable]
        told = {kernel: self.times_as[kernel] for kernel in kernels}
        if any(times != TIMES_AS[0] for times in told.values()):
            self.findings.append(f"t and s are given as {together(told)}")

    def answers_one_of(self, settings: Sequence[Setting], send: Send) -> bool:
        """Is there a usable answer?"""
        for setting in settings:
            if self.is_usable(send(self.call(setting), "how it is called"), setting):
                return True
        return False

    def is_usable(self, reply: Message, setting: Setting) -> bool:
        """Was that an answer?"""
        if reply.words["error"]:
            return False
        try:
            self.read(reply, setting)
        except Unusable:
            return False
        return True

    def read(self, reply: Message, setting: Setting) -> Values:
        """What was returned of QUANTITIES, in their order. Raises Unusable for other shapes."""
        rows = setting.rows
        shape = (rows, *setting.event)
        returned = reply.words["returned"]
        if not reply.words["many"] or not 2 <= len(returned) <= 4:
            given = f"{len(returned)} values" if reply.words["many"] else returned[0]
            raise Unusable(f"returns {given}, must be x_s, log_prob, mean, std")
        values: Values = {}
        if returned[0] != "NoneType":
            values["x_s"] = shaped(tensor_of(reply, 0, "x_s"), shape, "x_s")
        log_prob = tensor_of(reply, 1, "log_prob")
        values["log-probability"] = one_per_row(log_prob, rows, "a log-probability")
        for i in range(2, len(returned)):
            if returned[i] == "NoneType":
                continue
            value = tensor_of(reply, i, "mean" if i == 2 else "std")
            is_std = i == 3 or (len(returned) == 3 and value.numel() in (1, rows))
            if is_std:
                values["std"] = one_per_row(value, rows, "a std")
            else:
                values["mean"] = shaped(value, shape, "a mean")
        if "gradient" in reply.tensors:
            values["gradient"] = reply.tensors["gradient"]
        return {name: values[name] for name in QUANTITIES if name in values}

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """QUANTITIES of the step, each kernel under the Chosen that is its own."""
        kernel = self.kernel_of(setting)
        return self.due_under(setting, kernel, convention.get(kernel, Chosen()), module)

    def due_under(
        self, setting: Setting, kernel: str, chosen: Chosen, module: ModuleType = pave
    ) -> dict[str, Due]:
        """What is due of a kernel at the states of a question; d (sum log_prob) / d v, too."""
        return step_due(step_asked(setting, kernel, chosen.log_prob.reduction, module), chosen)

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """The convention of each kernel, and which kernel it is of a function that names none."""
        more = () if self.is_named else self.choose_kernel(cases, ask)
        everything = [*cases, *more]
        convention = {}
        for kernel in choices(everything) if self.is_named else [self.only]:
            own = [case for case in everything if self.kernel_of(case.setting) == kernel]
            quantities = sum(len(case.values or ()) for case in own)
            agreements = functools.partial(self.agreements, own, kernel)
            convention[kernel] = best(CHOICES, agreements, quantities)
        told = {}
        for name in ("reduction", "constants", "half_square"):
            words = {
                kernel: getattr(chosen.log_prob, name) for kernel, chosen in convention.items()
            }
            told[TOLD[name]] = together(words)
        answered = [case.values for case in everything if case.values is not None]
        if any("std" in values for values in answered):
            told["g or std"] = together(
                {kernel: chosen.called for kernel, chosen in convention.items()}
            )
        missing = [name for name in ("mean", "std") if not any(name in v for v in answered)]
        if missing:
            self.findings.append(f"it returns no {' and no '.join(missing)}")
        self.dead = self.kernels_without_gradient(everything, [*convention])
        if self.dead:
            dead = "log_prob carries no gradient by v: it scores, it cannot train"
            self.findings.append(f"{', '.join(self.dead)}: {dead}")
        self.look_for_a_deaf_function(cases, convention)
        scope = () if self.is_named else (f"kernel {self.only} only",)
        return Recognised(convention, told, scope)

    def kernels_without_gradient(
        self, cases: Sequence[Case], kernels: Sequence[str]
    ) -> tuple[str, ...]:
        """Those none of whose answers has one."""
        alive = set()
        for case in cases:
            if "gradient" in (case.values or {}):
                alive.add(self.kernel_of(case.setting))
        return tuple(kernel for kernel in kernels if kernel not in alive)

    def choose_kernel(self, cases: list[Case], ask: Ask) -> tuple[Case, ...]:
        """Which kernel it is, of a function that has no say; with questions that only it allows."""
        counts = {}
        for kernel in pave.KERNELS:
            counts[kernel] = max(self.agreements(cases, kernel, chosen) for chosen in CHOICES)
        self.only = max(counts, key=lambda kernel: counts[kernel])
        more = []
        for times in self.axes["times"]:
            if has_density(self.only, times) and not has_density("cps", times):
                for _ in range(3):
                    more += self.random_settings(self.generator, times=times)
        return tuple(ask(setting) for setting in more)

    def look_for_a_deaf_function(self, cases: list[Case], convention: dict[str, Chosen]) -> None:
        """Say so where it computes one kernel whatever it is asked for."""
        for kernel, chosen in convention.items():
            answered = [case for case in cases if case.values is not None]
            others = [case for case in answered if case.setting.kernel != kernel]
            own = [case for case in others if has_density(kernel, case.setting.times)][:6]
            quantities = sum(len(case.values or ()) for case in own)
            if self.is_named and own and self.agreements(own, kernel, chosen) == quantities:
                cure = "leave out the parameter, or raise for the others"
                self.findings.append(f"it computes {kernel} whatever kernel is asked for: {cure}")

    def agreements(self, cases: list[Case], kernel: str, chosen: Chosen) -> int:
        """How many quantities of how many answers agree with it."""
        count = 0
        for case in cases:
            if case.values is not None:
                due = self.due_under(case.setting, kernel, chosen)
                for name, value in case.values.items():
                    count += close(value, due[name], TOLERANCES["float32"])
        return count

    def afterwards(self, found: Recognised, cases: list[Case], send: Send) -> str:
        """Let it sample: is that the Gaussian whose density it gives, and another every time?"""
        cut = [kernel for kernel in self.dead if self.gradient[kernel]]
        if cut and len(self.dead) < len(found.convention):
            return f"log_prob has a gradient by v, but not that of {', '.join(cut)}"
        answered = [case.setting for case in cases if case.values is not None]
        for kernel in [*found.convention]:
            own = [setting for setting in answered if self.kernel_of(setting) == kernel]
            chosen = found.convention[kernel]
            for setting in self.sampled_settings(own):
                replies = [send(self.call(setting, samples=True), "sampling") for _ in range(2)]
                if not all(self.is_usable(reply, setting) for reply in replies):
                    why = replies[0].words["error"] or "it returns something else"
                    self.findings.append(f"{kernel} does not sample ({why})")
                    break
                values = [self.read(reply, setting) for reply in replies]
                if all("x_s" not in one for one in values):
                    self.findings.append(f"{kernel} does not sample: it returns no x_s")
                    break
                wrong = self.what_is_wrong(setting, chosen, values)
                if wrong:
                    return f"sampled at {setting.described(self.shown)}: {wrong}"
        return ""

    def sampled_settings(self, answered: Sequence[Setting]) -> list[Setting]:
        """From t = 1, to s = 0 and between, as far as that was answered, with many numbers each."""
        first: dict[tuple[bool, bool], Setting] = {}
        for setting in answered:
            first.setdefault((setting.times[0] == 1, setting.times[1] == 0), setting)
        drawn = []
        for setting in first.values():
            drawn.append(setting._replace(event=(64 * setting.event[0], *setting.event[1:])))
        return drawn

    def what_is_wrong(self, setting: Setting, chosen: Chosen, drawn: Sequence[Values]) -> str:
        """Of two answers to one question, each with an x_s of its own; in words, or ""."""
        v, x_t, _ = step_states(setting)
        kernel = self.kernel_of(setting)
        if torch.equal(drawn[0]["x_s"], drawn[1]["x_s"]):
            return "x_s is the same both times"
        for values in drawn:
            own = setting._replace(kernel=kernel)
            reduction = chosen.log_prob.reduction
            step = scored_step(own, reduction, pave, v, x_t, values["x_s"])
            due = step_due(step, chosen)
            wrong = what_is_wrong_with(values["x_s"], step.mean, step.std)
            if wrong:
                return f"x_s: {wrong}"
            for name in values:
                if name == "gradient":
                    continue
                if not close(values[name], due[name], TOLERANCES["float32"]):
                    return f"{name} is not that of the x_s that it draws"
        cut = "x_s must be detached for log_prob to have its gradient"
        if "gradient" in values and not close(
            values["gradient"], due["gradient"], TOLERANCES["float32"]
        ):
            self.findings.append(f"what it samples depends on v: {cut}")
        return ""


QUANTITIES = ("x_s", "mean", "std", "log-probability", "gradient")
NAMELESS = "flow_sde"  # asked for in the place of a kernel that has no name yet
TOLD = {"reduction": "mean or sum", "constants": "constants", "half_square": "1/(2 std^2)"}
CHOICES = [Chosen(*names) for names in product(CALLED, LOG_PROB_CONVENTIONS)]
# Of a standard score. At most 9 draws of 10^4 numbers are looked at twice each: a function that is
# right fails once in 10^7 times, nearly all of it for the largest of 10^4 correlations.
SAMPLING_Z = 7.0


def what_is_wrong_with(x_s: Tensor, mean: Tensor, std: Tensor) -> str:
    """Is (x_s - mean) / std standard normal, and another in every row? In words where it is not.

    By its mean, variance and fourth moment, and by the correlation of the numbers with each other,
    at every distance of one from another, at SAMPLING_Z standard errors; of some thousand numbers
    that tells a std off by a tenth, and noise that is shared by rows, channels or pixels.
    """
    z = ((x_s - mean) / pave.per_row(std, x_s)).flatten()
    n = z.numel()
    statistics = {
        "mean": (z.mean(), 0.0, n**-0.5),
        "variance": (z.square().mean(), 1.0, (2 / n) ** 0.5),
        "fourth moment": (z.square().square().mean(), 3.0, (96 / n) ** 0.5),
        "largest correlation with itself": (largest_correlation(z), 0.0, n**-0.5),
    }
    for name, (found, due, error) in statistics.items():
        score = (found.item() - due) / error
        if not abs(score) < SAMPLING_Z:
            return f"the {name} of its noise is {found:.3g} where {due:g} is due (z = {score:.0f})"
    return ""


def largest_correlation(z: Tensor) -> Tensor:
    """Of the numbers with themselves, moved round by 1, 2, ... places: n sums by one transform."""
    power = torch.fft.rfft(z).abs().square()
    return torch.fft.irfft(power, n=len(z))[1:].abs().max() / len(z)


class Scored(NamedTuple):
    """One step, and the logarithm of its density at x_s, reduced and with all its parts."""

    x_s: Tensor
    mean: Tensor
    std: Tensor  # [B]
    D: float
    log_prob: Tensor  # [B]
    gradient: Tensor  # of its sum, by v
    size: Tensor  # [B, *event], of what the mean is made of


def scored_step(
    setting: Setting, reduction: str, module: ModuleType, v: Tensor, x_t: Tensor, x_s: Tensor
) -> Scored:
    """The step of a setting at given states."""
    v = v.detach().requires_grad_(True)
    t, s = time_rows(setting, len(x_t))
    with torch.enable_grad():
        p = process_of(module, setting).transition(x_t, v, t, s)
        log_prob = p.log_prob(x_s, reduction)
        (gradient,) = torch.autograd.grad(log_prob.sum(), v)
    size = x_t.abs() + pave.per_row(t - s, v) * v.detach().abs()
    D = setting.times[0] - setting.times[1]
    std = p.std.expand(len(x_t))
    return Scored(x_s, p.mean.detach(), std, D, log_prob.detach(), gradient.flatten(), size)


def step_states(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """(v, x_t, x_s), x_s about where the kernel of the question puts it."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.rows, *setting.event)
    v = normal(generator, *shape)
    x_t = normal(generator, *shape)
    z = normal(generator, *shape)
    t, s = time_rows(setting, len(x_t))
    return v, x_t, process_of(pave, setting).transition(x_t, v, t, s).sample(1.5 * z)


@functools.cache
def step_asked(setting: Setting, kernel: str, reduction: str, module: ModuleType) -> Scored:
    """The step of a kernel at the states of a question, and its density."""
    v, x_t, x_s = step_states(setting)
    return scored_step(setting._replace(kernel=kernel), reduction, module, v, x_t, x_s)


def step_due(step: Scored, chosen: Chosen) -> dict[str, Due]:
    """What one step returns under a convention, and the std that the density has."""
    dims = step.x_s[0].numel()
    unit = log_prob_unit(chosen.log_prob, step.std, dims)
    log_prob = chosen.log_prob.of(step.log_prob, step.std, dims)
    z = (step.x_s - step.mean).abs() / pave.per_row(step.std, step.x_s)
    states = step.size + step.x_s.abs()
    error = (z * states / pave.per_row(step.std, step.x_s)).flatten(1).mean(1) * unit
    # Rounding of the states moves the gradient, too: (x_s - mean) b / std^2.
    moved = states.max() / step.std.min() ** 2 / dims * unit.max()
    # Of a reduced log-probability a convention keeps 1 or 2 std^2: of its gradient, too.
    kept = unit[0] / (dims if chosen.log_prob.reduction == "sum" else 1)
    return {
        "x_s": Due(step.x_s),
        "mean": Due(step.mean),
        "std": Due(step.std if chosen.called == CALLED[0] else step.std / step.D**0.5),
        "log-probability": Due(log_prob, STATE_ROUNDINGS * error.max().item()),
        "gradient": Due(kept * step.gradient, STATE_ROUNDINGS * moved.item()),
    }


def log_prob_unit(convention: LogProbConvention, std: Tensor, dims: int) -> Tensor:
    """What a convention multiplies the mean of squares / (2 std^2) by."""
    many = dims if convention.reduction == "sum" else 1
    return many * (torch.ones_like(std) if convention.half_square == "kept" else 2 * std.square())
