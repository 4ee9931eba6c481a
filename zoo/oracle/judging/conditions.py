"""The smallest condition under which something happens, found by trying the axes one by one.

A `Setting` says what a question is about, an `Axis` which values one of its fields can take. From a
setting where it happens, every other value of every axis is tried, one at a time. An axis along
which it always happens says nothing; another is named: only at t = 1, only from k = 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What a question is about. Each level reads what it needs; tensors are drawn from the seed."""

    kernel: str = "flow_sde"
    k: int = 1
    factors: tuple[int, ...] = ()
    times: tuple[float, float] = (0.625, 0.5)  # (t, s), with few binary digits: exact in float32
    eta: float = 0.7
    event: tuple[int, ...] = (6,)
    rows: int = 5  # of a group where there are groups
    groups: int = 1
    start: str = "own"  # or "shared": do members leave one state?
    policy: str = "off"  # or "on": is velocity_old the velocity?
    rewards: str = "spread"
    kl: float = 0.0
    ratio: str = "mean"  # whose ratios the clip is drawn between: mean, sum, guard mean, guard sum
    spread: float = 0.1  # of log-ratios over the members, about
    clip: str = "between ratios"  # or "between divergences", or "wide"
    seed: int = 0

    def described(self, names: Iterable[str]) -> str:
        """The named fields, in words."""
        return ", ".join(AXES[name].said(getattr(self, name)) for name in names)


Test = Callable[[Any], bool]


class Axis(NamedTuple):
    """A field of Setting: how a value of it is said, and in which ways values are told apart."""

    said: Callable[[Any], str]
    # (words, test) pairs, simplest first, that could tell the values given from others
    ways: Callable[[Sequence[Any]], Iterator[tuple[str, Test]]]


def is_value(value: Any) -> Test:
    """The test for one value."""

    def test(other: Any) -> bool:
        return bool(other == value)

    return test


def negated(test: Test) -> Test:
    """The opposite test."""

    def opposite(value: Any) -> bool:
        return not test(value)

    return opposite


def at_least(bound: float, key: Callable[[Any], float]) -> Test:
    """Is key(value) >= bound?"""

    def test(value: Any) -> bool:
        return key(value) >= bound

    return test


def contains(k: int) -> Test:
    """Is k in S?"""

    def test(factors: tuple[int, ...]) -> bool:
        return k in factors

    return test


def identity(value: float) -> float:
    """The value itself."""
    return value


def each(values: Sequence[Any], said: Callable[[Any], str]) -> Iterator[tuple[str, Test]]:
    """One value; all but one."""
    for value in values:
        yield said(value), is_value(value)
    for value in values:
        yield f"where not {said(value)}", negated(is_value(value))


def thresholds(
    values: Sequence[Any], key: Callable[[Any], float], name: str
) -> Iterator[tuple[str, Test]]:
    """From a value, or below it."""
    for bound in sorted({key(value) for value in values}):
        yield f"from {name} = {bound:g}", at_least(bound, key)
        yield f"below {name} = {bound:g}", negated(at_least(bound, key))


def word_axis(name: str) -> Axis:
    """An axis of words."""

    def said(value: Any) -> str:
        return f"{name} {value}"

    def ways(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
        """One word; all but one."""
        yield from each(values, said)

    return Axis(said, ways)


def number_axis(name: str) -> Axis:
    """An axis of numbers."""

    def said(value: Any) -> str:
        return f"{name} = {value:g}"

    def ways(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
        """One number; from it or below it; all but one."""
        for value in values:
            yield said(value), is_value(value)
        yield from thresholds(values, identity, name)
        yield from each(values, said)

    return Axis(said, ways)


def say_factors(factors: tuple[int, ...]) -> str:
    """S in braces."""
    return "S = {" + ", ".join(map(str, factors)) + "}"


def ways_of_factors(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
    """S empty or not; with a k in it; larger than a number; with a k that is large."""
    yield "S = {}", is_value(())
    yield "where S is not empty", negated(is_value(()))
    for k in range(2, 8):
        yield f"where k = {k} is in S", contains(k)
    yield from thresholds(values, len, "|S|")

    def largest(factors: tuple[int, ...]) -> float:
        return max(factors, default=1)

    yield from thresholds(values, largest, "k")
    yield from each(values, say_factors)


def t_of(times: tuple[float, float]) -> float:
    """t."""
    return times[0]


def s_of(times: tuple[float, float]) -> float:
    """s."""
    return times[1]


def ways_of_times(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
    """At t = 1 or below; at s = 0 or above; by the size of t, s or the step."""

    def length(times: tuple[float, float]) -> float:
        return times[0] - times[1]

    def begins_at_one(times: tuple[float, float]) -> bool:
        return times[0] == 1

    def ends_at_zero(times: tuple[float, float]) -> bool:
        return times[1] == 0

    yield "at t = 1", begins_at_one
    yield "at s = 0", ends_at_zero
    yield "at t < 1", negated(begins_at_one)
    yield "at s > 0", negated(ends_at_zero)
    yield from thresholds(values, t_of, "t")
    yield from thresholds(values, s_of, "s")
    yield from thresholds(values, length, "t - s")


def say_times(times: tuple[float, float]) -> str:
    """Both."""
    return f"t = {times[0]:g}, s = {times[1]:g}"


def say_event(event: tuple[int, ...]) -> str:
    """Its shape."""
    return f"states of shape {list(event)}"


def ways_of_events(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
    """By the number of axes, or of dimensions."""

    def axes(n: int) -> Test:
        """Are there n axes?"""

        def test(event: tuple[int, ...]) -> bool:
            return len(event) == n

        return test

    for n in range(1, 5):
        yield f"for states of {n} {'axis' if n == 1 else 'axes'}", axes(n)
    yield from thresholds(values, len, "axes")
    for n in range(1, 5):
        yield f"where states have not {n} {'axis' if n == 1 else 'axes'}", negated(axes(n))
    yield from thresholds(values, math.prod, "dimensions")
    yield from each(values, say_event)


def say_rewards(kind: str) -> str:
    """Equal, with an outlier, or how wide."""
    return f"rewards of std {kind}" if kind[0].isdigit() else f"{kind} rewards"


def ways_of_rewards(values: Sequence[Any]) -> Iterator[tuple[str, Test]]:
    """One kind, or all but one."""
    yield from each(values, say_rewards)


AXES: dict[str, Axis] = {
    "kernel": word_axis("kernel"),
    "k": number_axis("k"),
    "factors": Axis(say_factors, ways_of_factors),
    "times": Axis(say_times, ways_of_times),
    "eta": number_axis("eta"),
    "event": Axis(say_event, ways_of_events),
    "rows": number_axis("rows"),
    "groups": number_axis("groups"),
    "start": word_axis("starts:"),
    "policy": word_axis("policy:"),
    "rewards": Axis(say_rewards, ways_of_rewards),
    "kl": number_axis("kl"),
    "spread": number_axis("spread of log-ratios"),
    "clip": word_axis("clip"),
}


class Condition(NamedTuple):
    """Where it happens: for each axis that matters, the values tried there where it does."""

    happens: dict[str, tuple[Any, ...]]
    elsewhere: dict[str, tuple[Any, ...]]  # and those where it does not

    def covers(self, setting: Setting) -> bool:
        """Is the setting one of those where it happens, as far as values were tried?"""
        return all(getattr(setting, name) in values for name, values in self.happens.items())

    def widened(self, settings: Iterable[Setting]) -> Condition:
        """The condition with what it does not cover: places where it was seen to happen, too."""
        seen = list(settings)
        happens: dict[str, tuple[Any, ...]] = {}
        elsewhere: dict[str, tuple[Any, ...]] = {}
        for name, inside in self.happens.items():
            more = {getattr(setting, name) for setting in seen}
            outside = tuple(value for value in self.elsewhere[name] if value not in more)
            if outside:
                happens[name] = tuple(sorted({*inside, *more}, key=str))
                elsewhere[name] = outside
        return Condition(happens, elsewhere)

    def words(self) -> str:
        """ "" where no axis matters."""
        words = []
        for name, inside in self.happens.items():
            say = listed if name == "kernel" else named
            words.append(say(name, inside, self.elsewhere[name]))
        return ", ".join(words)

    def scope(self) -> str:
        """Of what is refused: what is left, in words, where that is shorter."""
        if len(self.happens) == 1:
            (name,) = self.happens
            left = self.elsewhere[name]
            if len(left) <= len(self.happens[name]):
                return f"{listed(name, left, self.happens[name])} only"
        return f"all but {self.words()}"


def listed(name: str, inside: Sequence[Any], outside: Sequence[Any]) -> str:
    """Values of one axis: a list where they have no words of their own."""
    if len(inside) > 1 and name in ("k", "kernel"):
        values = ", ".join(map(str, sorted(inside)))
        return f"k in {{{values}}}" if name == "k" else f"kernels {values}"
    return named(name, inside, outside)


def named(name: str, inside: Sequence[Any], outside: Sequence[Any]) -> str:
    """The simplest words that tell the values inside from those outside."""
    axis = AXES[name]
    for words, test in axis.ways([*inside, *outside]):
        if all(map(test, inside)) and not any(map(test, outside)):
            return words
    return " or ".join(axis.said(value) for value in inside)


def condition_of(
    setting: Setting, happens: Callable[[Setting], bool | None], values: dict[str, Sequence[Any]]
) -> Condition:
    """Try every value of every axis from a setting where it happens; None: it cannot be said."""
    where: dict[str, tuple[Any, ...]] = {}
    elsewhere: dict[str, tuple[Any, ...]] = {}
    for name, candidates in values.items():
        inside = [getattr(setting, name)]
        outside: list[Any] = []
        for value in candidates:
            if value == inside[0]:
                continue
            found = happens(setting._replace(**{name: value}))
            if found is not None:
                (inside if found else outside).append(value)
        if outside:
            where[name] = tuple(sorted(inside, key=str))
            elsewhere[name] = tuple(sorted(outside, key=str))
    return Condition(where, elsewhere)
