"""What the training study compares, and what decides, registered before any of its runs.

An arm is a setting of train.py. Each arm gets one learning rate by the same small search, on seeds
of the search; then it is trained anew on seeds that nothing has seen, the same for all arms, and
judged on the same held-out pairs. docs/EVIDENCE.md says it in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Arm:
    """A setting: the flags of train.py by which it departs from the plan's own."""

    name: str
    says: str
    flags: tuple[str, ...]
    seeds: int  # how many of the plan's seeds it is judged on
    rate_of: str = ""  # the arm whose rate it takes, "" for one of its own


@dataclass(frozen=True)
class Contrast:
    """A sum of outcomes of arms, each times a number, seed by seed: mostly an arm less another."""

    name: str
    parts: tuple[tuple[float, str], ...]
    primary: bool = False
    added: bool = False  # after the registration; docs/EVIDENCE.md says when

    @property
    def arms(self) -> tuple[str, ...]:
        """Of the parts."""
        return tuple(name for _, name in self.parts)


def less(name: str, arm: str, beside: str, primary: bool = False, added: bool = False) -> Contrast:
    """arm minus beside."""
    return Contrast(name, ((1.0, arm), (-1.0, beside)), primary, added)


@dataclass(frozen=True)
class Run:
    """One run of train.py. role: "search" of a rate, "judged" at it, "common" at Plan.common."""

    role: str
    arm: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed beforehand."""

    name: str
    stages: tuple[tuple[Arm, ...], ...]  # in this order; within one, a seed of every arm in turn
    contrasts: tuple[Contrast, ...]
    seeds: tuple[int, ...]  # of judged runs
    search_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    common: float  # the one rate of the secondary comparison
    common_arms: tuple[str, ...]
    eval_steps: tuple[int, ...]  # the first decides, alone in the search
    heldout: int
    outcome: str = "right"  # the judge that decides
    flags: tuple[str, ...] = ()  # of every arm

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Those of all stages."""
        return tuple(chain.from_iterable(self.stages))

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def search(self, stage: Sequence[Arm]) -> list[Run]:
        """Every rate on every seed of the search, of every arm with a rate of its own."""
        return [
            Run("search", arm.name, lr, seed)
            for arm in stage
            if not arm.rate_of
            for lr in self.rates
            for seed in self.search_seeds
        ]

    def judged(self, stage: Sequence[Arm], lr: Mapping[str, float]) -> list[Run]:
        """The runs that count, each arm at its own rate, and at the common one where it differs."""
        runs = []
        for i, seed in enumerate(self.seeds):
            for arm in stage:
                if i < arm.seeds:
                    runs.append(Run("judged", arm.name, lr[arm.name], seed))
                if i < arm.seeds and arm.name in self.common_arms and lr[arm.name] != self.common:
                    runs.append(Run("common", arm.name, self.common, seed))
        return runs


K1: tuple[str, ...] = ("--factors",)
S23: tuple[str, ...] = ("--factors", "2", "3")
MIDPOINT: tuple[str, ...] = ("--factors", "--form", "midpoint")
# Three stochastic steps of eight members: as many rollout evaluations as one of twenty-four.
SEVERAL: tuple[str, ...] = ("--sde-steps", "0", "1", "2", "--group-size", "8")
GAMMA: tuple[str, ...] = ("--step-weights", "gamma")
LEVEL: tuple[str, ...] = ("--step-weights", "level")
UNIFORM: tuple[str, ...] = ("--place", "uniform")
CPS: tuple[str, ...] = ("--kernel", "cps")
# One prompt more costs 12 % of an iteration's time here, S = {2, 3} 6 %: the least that covers it.
MORE: tuple[str, ...] = ("--prompts-per-iteration", "9")


def stages(
    primary: int, secondary: int, several: tuple[str, ...] = SEVERAL
) -> tuple[tuple[Arm, ...], ...]:
    """In the order in which they are run. primary, secondary: how many seeds."""
    return (
        (
            Arm("k1", "k = 1", K1, primary),
            Arm("S23", "S = {2, 3}", S23, primary),
            Arm("midpoint", "midpoint", MIDPOINT, primary),
        ),
        (
            Arm("several k1", "k = 1, weight 1", K1 + several, secondary),
            Arm("several k1 gamma", "k = 1, weight Γ", S23 + GAMMA + several, secondary),
            Arm("several S23 level", "S = {2, 3}, weight 1", S23 + LEVEL + several, secondary),
            Arm("several S23", "S = {2, 3}, weight Γ: as printed", S23 + several, secondary),
        ),
        (
            Arm("k1 more", "k = 1, 9 prompts", K1 + MORE, secondary, rate_of="k1"),
            Arm("k1 gamma", "k = 1, weight Γ, single step", S23 + GAMMA, secondary, rate_of="k1"),
        ),
        (Arm("uniform", "uniform u", MIDPOINT + UNIFORM, secondary),),
        (
            Arm("cps k1", "k = 1, cps", K1 + CPS, secondary),
            Arm("cps S23", "S = {2, 3}, cps", S23 + CPS, secondary),
        ),
    )


JACOBIAN_AT_1 = ((1.0, "several S23 level"), (-1.0, "several k1"))
JACOBIAN_AT_GAMMA = ((1.0, "several S23"), (-1.0, "several k1 gamma"))
WEIGHTS_OF_K1 = ((1.0, "several k1 gamma"), (-1.0, "several k1"))
WEIGHTS_OF_S23 = ((1.0, "several S23"), (-1.0, "several S23 level"))


def times(number: float, parts: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
    """The same difference, so many times."""
    return tuple((number * count, name) for count, name in parts)


CONTRASTS = (
    less("S = {2, 3} − k = 1", "S23", "k1", primary=True),
    less("midpoint − k = 1", "midpoint", "k1", primary=True),
    less("midpoint − S = {2, 3}", "midpoint", "S23"),
    less("S = {2, 3} − k = 1 with 9 prompts", "S23", "k1 more"),
    less("midpoint − k = 1 with 9 prompts", "midpoint", "k1 more"),
    less("k = 1 with 9 prompts − k = 1", "k1 more", "k1", added=True),
    less("k = 1 with weight Γ − k = 1", "k1 gamma", "k1", added=True),
    less("uniform u − k = 1", "uniform", "k1"),
    Contrast("3 steps: Jacobian, at weights 1", JACOBIAN_AT_1),
    Contrast("3 steps: Jacobian, at weights Γ", JACOBIAN_AT_GAMMA),
    Contrast("3 steps: weights Γ, with k = 1", WEIGHTS_OF_K1),
    Contrast("3 steps: weights Γ, with S = {2, 3}", WEIGHTS_OF_S23),
    less("3 steps: S = {2, 3} as printed − k = 1", "several S23", "several k1"),
    Contrast(
        "3 steps: Jacobian, mean of both",
        times(0.5, JACOBIAN_AT_1) + times(0.5, JACOBIAN_AT_GAMMA),
        added=True,
    ),
    Contrast(
        "3 steps: weights Γ, mean of both",
        times(0.5, WEIGHTS_OF_K1) + times(0.5, WEIGHTS_OF_S23),
        added=True,
    ),
    Contrast(
        "3 steps: interaction",
        JACOBIAN_AT_GAMMA + times(-1.0, JACOBIAN_AT_1),
        added=True,
    ),
    less("cps: S = {2, 3} − k = 1", "cps S23", "cps k1"),
)

LAPTOP = Plan(
    "laptop",
    stages(primary=12, secondary=8),
    CONTRASTS,
    seeds=tuple(range(200, 212)),
    search_seeds=(100, 101),
    rates=(1e-4, 2e-4, 4e-4),
    common=2e-4,
    common_arms=("k1", "S23", "midpoint"),
    eval_steps=(16, 8, 40),
    heldout=512,
)

# For a GPU: a grid of 16 steps, and twice the seeds. Steps 1, 2 and 3 of 8 members are as many
# rollout evaluations as step 2 of 24.
GPU = Plan(
    "gpu",
    stages(24, 16, several=("--sde-steps", "1", "2", "3", "--group-size", "8")),
    CONTRASTS,
    seeds=tuple(range(300, 324)),
    search_seeds=(100, 101, 102, 103),
    rates=(5e-5, 1e-4, 2e-4, 4e-4),
    common=2e-4,
    common_arms=("k1", "S23", "midpoint"),
    eval_steps=(16, 8, 40, 80),
    heldout=2048,
    flags=("--steps", "16", "--sde-steps", "2", "--device", "cuda"),
)

# For the tests: a study that is over in half a minute and shows nothing.
QUICK = Plan(
    "quick",
    ((Arm("k1", "k = 1", K1, 2), Arm("midpoint", "midpoint", MIDPOINT, 2, "k1")),),
    (less("midpoint − k = 1", "midpoint", "k1", primary=True),),
    seeds=(200, 201),
    search_seeds=(100,),
    rates=(2e-4,),
    common=2e-4,
    common_arms=("k1", "midpoint"),
    eval_steps=(2,),
    heldout=4,
    flags=("--iterations", "1", "--prompts-per-iteration", "1", "--group-size", "2"),
)

PLANS = {plan.name: plan for plan in (LAPTOP, GPU, QUICK)}


def chosen(plan: Plan, arm: Arm, scores: Sequence[tuple[float, float]]) -> float:
    """The rate with the best mean outcome, of (rate, outcome) of every run of the search.

    Of equal ones the smallest. Raises ValueError where the search is not complete.
    """
    found: dict[float, list[float]] = {lr: [] for lr in plan.rates}
    for lr, score in scores:
        found[lr].append(score)
    if any(len(values) != len(plan.search_seeds) for values in found.values()):
        raise ValueError(f"search of {arm.name!r}: {len(scores)} runs, not all of its own")
    return max(plan.rates, key=lambda lr: (sum(found[lr]), -lr))
