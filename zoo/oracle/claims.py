"""What a claim is: a sentence, its statements with their registered verdicts, and a measurement.

All there is to say about a claim stands in one place, its decorator in verify_equivalence.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from zoo.oracle.bench import Bench
from zoo.oracle.findings import HOLDS, INCONCLUSIVE, REFUTED, Finding
from zoo.oracle.theory import Theory


class Clause(NamedTuple):
    """What a statement adds to a line of the conclusion, by its verdict."""

    topic: str
    true: str  # where it holds or converges
    false: str  # where it is refuted


class Statement:
    """One line of the report: a sentence that is true or false of a kernel.

    key         its id is CLAIM.key
    text        affirmative, so that "refuted" negates it once; it has to fit the report
    registered  the verdict before anything is measured, or what says it from the kernel's record
    basis       where the tolerance comes from
    """

    def __init__(
        self,
        key: str,
        text: str,
        registered: str | Callable[[Theory], str],
        basis: str,
        *clauses: Clause,
    ):
        self.key, self.text, self.registered, self.basis = key, text, registered, basis
        self.clauses = clauses

    def registered_for(self, theory: Theory) -> str:
        return self.registered if isinstance(self.registered, str) else self.registered(theory)


def holds_where(true_of: Callable[[Theory], bool]) -> Callable[[Theory], str]:
    """Registers HOLDS for the kernels of which theory says so, REFUTED for the rest."""

    def registered(theory: Theory) -> str:
        return HOLDS if true_of(theory) else REFUTED

    return registered


class Range(NamedTuple):
    """How large the difference of a refuted statement must be."""

    low: float
    high: float


def about(size: float, relative: float = 1e-6) -> Range:
    """A difference that theory knows, to a relative error; by default far above rounding."""
    return Range(size * (1 - relative), size * (1 + relative))


def near(size: float, allowed: float) -> Range:
    """A difference that theory knows, measured to an absolute error."""
    return Range(size - allowed, size + allowed)


class Measured(NamedTuple):
    """What a claim's test yields: a finding on one of its statements, and where it was made."""

    statement: str  # the statement's key
    finding: Finding
    difference: Range | None = None  # required where the statement is registered as REFUTED
    kernel: str = ""
    k: int | None = None
    rollouts: str = ""
    form: str = ""
    fixture: str = ""
    estimate: list[float] | None = None  # a policy gradient, and the true one beside it
    truth: list[float] | None = None


Measurements = Iterator[Measured]


@dataclass(frozen=True)
class Row:
    """One measurement of the report. A registered difference has bounds, low and high."""

    claim: str
    statement: str
    kernel: str
    k: int | None
    rollouts: str
    form: str
    fixture: str
    verdict: str
    registered: str
    measured: float
    predicted: float
    tolerance: float
    difference: float
    low: float | None
    high: float | None
    z: float | None
    n: int
    seed: int
    seconds: float  # since the row before
    estimate: list[float] | None
    truth: list[float] | None

    @property
    def as_registered(self) -> bool:
        """The verdict is the registered one, and what is refuted is so by a size registered too."""
        if self.low is not None and self.high is not None:
            return self.verdict == self.registered and self.low <= self.difference <= self.high
        return self.verdict == self.registered


@dataclass(frozen=True)
class Claim:
    """A statement of the theory in one plain sentence, and its test."""

    name: str
    sentence: str
    statements: dict[str, Statement]  # by id
    measure: Callable[[Bench], Measurements] = field(repr=False)
    on_model: bool  # whether --model tests it too
    statistical: bool  # whether some of its rows are drawn, and may fail by chance

    def test(self, bench: Bench) -> Iterator[Row]:
        """Measure, and set each finding beside what is registered."""
        began = time.perf_counter()
        for measured in self.measure(bench):
            now = time.perf_counter()
            yield self.row(bench, measured, round(now - began, 4))
            began = now

    def row(self, bench: Bench, measured: Measured, seconds: float) -> Row:
        """Raises ValueError if a statement is registered as REFUTED and no size is."""
        name, finding = f"{self.name}.{measured.statement}", measured.finding
        registered = self.statements[name].registered_for(bench.theory(measured.kernel))
        size = measured.difference if registered == REFUTED else None
        if registered == REFUTED and size is None:
            raise ValueError(
                f"{name}: must say how large the difference is, being registered REFUTED"
            )
        return Row(
            claim=self.name,
            statement=name,
            kernel=measured.kernel,
            k=measured.k,
            rollouts=measured.rollouts,
            form=measured.form,
            fixture=measured.fixture,
            verdict=finding.verdict,
            registered=registered,
            measured=finding.measured,
            predicted=finding.predicted,
            tolerance=finding.tolerance,
            difference=finding.difference,
            low=size.low if size else None,
            high=size.high if size else None,
            z=finding.z,
            n=finding.n,
            seed=bench.seed,
            seconds=seconds,
            estimate=measured.estimate,
            truth=measured.truth,
        )


class Claims(dict[str, Claim]):
    """All claims by name, in the order of the report."""

    def add(
        self,
        name: str,
        *statements: Statement,
        on_model: bool = False,
        statistical: bool = False,
    ) -> Callable[[Callable[[Bench], Measurements]], Callable[[Bench], Measurements]]:
        """Decorates the generator of a claim's measurements, whose docstring is the claim."""

        def register(measure: Callable[[Bench], Measurements]) -> Callable[[Bench], Measurements]:
            by_id = {f"{name}.{statement.key}": statement for statement in statements}
            sentence = " ".join((measure.__doc__ or "").split())
            self[name] = Claim(name, sentence, by_id, measure, on_model, statistical)
            return measure

        return register

    def statements(self) -> dict[str, Statement]:
        """Every statement by id."""
        return {name: s for claim in self.values() for name, s in claim.statements.items()}

    def run(self, bench: Bench, names: Sequence[str]) -> list[Row]:
        """All rows of the named claims."""
        rows: list[Row] = []
        for name in tqdm(names, "claims", leave=False, file=sys.stderr):
            rows += self[name].test(bench)
        return rows


def status_of(rows: Sequence[Row]) -> int:
    """0: all as registered; 1: one is not; 3: none is wrong but one is inconclusive."""
    odd = [row.verdict for row in rows if not row.as_registered]
    if any(verdict != INCONCLUSIVE for verdict in odd):
        return 1
    return 3 if odd else 0


def as_json(row: Row) -> dict[str, Any]:
    """A row with its fields by name."""
    return {**vars(row), "as_registered": row.as_registered}
