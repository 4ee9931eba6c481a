"""What the studies found, as tables and two figures; docs/EVIDENCE.md has them.

python -m zoo.study report                prints the tables
python -m zoo.study report --figures docs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from zoo import style
from zoo.study import gradients
from zoo.study.inference import Interval, holm, interval, seeds_needed
from zoo.study.plan import Contrast, Plan
from zoo.study.training import read

Line = dict[str, Any]
MINUS = "−"


# ---- Study B -------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A contrast at one number of ODE steps, over the seeds that all its arms have."""

    contrast: Contrast
    rates: tuple[float, ...]  # learning rates of its arms
    steps: int
    right: Interval
    rule: Interval
    diversity: Interval | None  # measured at the first number of steps alone
    complete: bool  # whether every seed of the plan is there


def by_seed(plan: Plan, lines: Sequence[Line], arm: str, rate: str) -> dict[int, Line]:
    """An arm's judged lines, at its own rate ("own") or at the common one ("common")."""
    found = [line for line in lines if line["role"] != "before" and line["arm"] == arm]
    own = {line["seed"]: line for line in found if line["role"] == "judged"}
    if rate == "own":
        return own
    return {
        line["seed"]: line
        for line in found
        if line["role"] in ("judged", "common") and line["lr"] == plan.common
    }


def difference(
    plan: Plan, lines: Sequence[Line], contrast: Contrast, rate: str, steps: int
) -> Difference | None:
    """None where fewer than two seeds have both arms."""
    arms = {name: by_seed(plan, lines, name, rate) for name in contrast.arms}
    seeds = sorted(set.intersection(*(set(own) for own in arms.values())))
    if len(seeds) < 2:
        return None

    def summed(of: Callable[[Line], float]) -> Interval:
        return interval(
            [sum(count * of(arms[name][seed]) for count, name in contrast.parts) for seed in seeds]
        )

    def outcome(judge: str) -> Interval:
        return summed(lambda line: line["heldout"][str(steps)][judge])

    spread = summed(lambda line: line["diversity"]) if steps == plan.eval_steps[0] else None
    complete = len(seeds) == min(plan.arm(name).seeds for name in contrast.arms)
    rates = tuple(own[seeds[0]]["lr"] for own in arms.values())
    return Difference(contrast, rates, steps, outcome("right"), outcome("rule"), spread, complete)


def differences(plan: Plan, lines: Sequence[Line]) -> Iterator[Difference]:
    """Every contrast at every number of steps; the primary ones at the common rate too.

    Where the arms' own rates are the common one these are the same, and given once.
    """
    for contrast in plan.contrasts:
        for steps in sorted(plan.eval_steps):
            own = difference(plan, lines, contrast, "own", steps)
            if own:
                yield own
            if contrast.primary:
                common = difference(plan, lines, contrast, "common", steps)
                if common and own and common.rates != own.rates:
                    yield common


def is_own(plan: Plan, lines: Sequence[Line], one: Difference) -> bool:
    """Whether all arms have their own rates."""
    names = dict.fromkeys(one.contrast.arms)
    owned = tuple(next(iter(by_seed(plan, lines, name, "own").values()))["lr"] for name in names)
    return one.rates == owned


def corrected(plan: Plan, lines: Sequence[Line]) -> dict[str, float]:
    """{primary contrast: p by Holm} at the first number of steps; {} until all are complete."""
    primary = [
        difference(plan, lines, contrast, "own", plan.eval_steps[0])
        for contrast in plan.contrasts
        if contrast.primary
    ]
    found = [one for one in primary if one and one.complete]
    if len(found) < len(primary):
        return {}
    names = [one.contrast.name for one in found]
    return dict(zip(names, holm([one.right.p for one in found]), strict=True))


def decides(plan: Plan, lines: Sequence[Line], one: Difference) -> bool:
    """Whether this is one of the differences that decide: primary, at own rates and main steps."""
    at_main = one.steps == plan.eval_steps[0]
    return one.contrast.primary and at_main and is_own(plan, lines, one)


def is_shown(plan: Plan, lines: Sequence[Line], one: Difference) -> bool:
    """Whether a difference is claimed: by Holm's p where it decides, else by its interval."""
    p = corrected(plan, lines)
    if p and decides(plan, lines, one):
        return p[one.contrast.name] < 0.05
    return one.right.excludes_0


def signed(value: float) -> str:
    """With its sign, three digits."""
    return f"{value:+.3f}".replace("-", MINUS)


def bounds(found: Interval) -> str:
    """mean (low to high)."""
    return f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})"


def arms_table(plan: Plan, lines: Sequence[Line]) -> list[str]:
    """A row for every arm: its rate, its seeds, the mean of every outcome."""
    steps_list = sorted(plan.eval_steps)
    head = ["arm", "rate", "seeds", *(f"right, {n} steps" for n in steps_list)]
    head += [f"rule, {plan.eval_steps[0]} steps", "diversity"]
    rows = []
    start = [line for line in lines if line["role"] == "before"]
    if start:
        rows.append(["before", "", "", *outcomes(plan, start)])
    for arm in plan.arms:
        own = by_seed(plan, lines, arm.name, "own")
        if own:
            rate = f"{next(iter(own.values()))['lr']:g}"
            rows.append([arm.says, rate, str(len(own)), *outcomes(plan, list(own.values()))])
    return table(head, rows)


def outcomes(plan: Plan, lines: Sequence[Line]) -> list[str]:
    """Means over lines: right by steps, rule at the first, diversity."""
    n = len(lines)
    right = [
        sum(line["heldout"][str(steps)]["right"] for line in lines) / n
        for steps in sorted(plan.eval_steps)
    ]
    rule = sum(line["heldout"][str(plan.eval_steps[0])]["rule"] for line in lines) / n
    diversity = sum(line["diversity"] for line in lines) / n
    return [f"{value:.3f}" for value in (*right, rule, diversity)]


def differences_table(plan: Plan, lines: Sequence[Line]) -> list[str]:
    """A row for every contrast and number of steps."""
    head = ["difference", "rates", "steps", "seeds", "right", "rule", "diversity", "seeds needed"]
    rows = []
    p = corrected(plan, lines)
    for one in differences(plan, lines):
        name = one.contrast.name
        if p and decides(plan, lines, one):
            name = f"**{name}** (decides: p = {p[name]:.4f} by Holm)"
        if one.contrast.added:
            name += " (added)"
        seeds = str(one.right.n) + ("" if one.complete else " so far")
        needed = "" if is_shown(plan, lines, one) else str(seeds_needed(one.right) or "")
        spread = bounds(one.diversity) if one.diversity else ""
        right, rule = bounds(one.right), bounds(one.rule)
        rates = " and ".join(f"{rate:g}" for rate in dict.fromkeys(one.rates))
        rows.append([name, rates, str(one.steps), seeds, right, rule, spread, needed])
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Of Markdown, a line for each row."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [f" {cell} " if cell else " " for cell in row]
        lines.append("|" + "|".join(cells) + "|")
    return lines


# ---- Study A -------------------------------------------------------------------------------------


def interval_of(found: Line | None) -> str:
    """mean (low to high) of a line of gradients.json."""
    return (
        "" if found is None else f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
    )


def gradients_table(lines: Sequence[Line]) -> list[str]:
    """A row for every arm: share of signal and cosine with k = 1, all steps, and step 1."""
    head = ["arm", "signal, all steps", "cosine, all steps", "signal, step 1", "cosine, step 1"]
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = {line["steps"]: line for line in lines if line["arm"] == arm}
        row = [arm]
        for place in ("all", "1"):
            row += [interval_of(own[place]["signal"]), interval_of(own[place].get("cosine"))]
        rows.append(row)
    return table(head, rows)


def cosines_table(cosines: dict[str, dict[str, float | None]]) -> list[str]:
    """Of every pair of arms, all steps together."""
    names = list(cosines)
    rows = []
    for name, own in cosines.items():
        cells = [own[other] for other in names]
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in cells)])
    return table(["", *names], rows)


def gains_table(lines: Sequence[Line], norm: float, how: str) -> list[str]:
    """Held-out reward after a step of this norm: the gain of k = 1, and the others less it.

    how: along the mean gradient ("plain"), or with Adam's preconditioner ("adam").
    """
    steps_list = sorted(map(int, next(iter(lines))["rewards"]))
    rows = []
    for arm in gradients.ARMS:
        beside = "start" if arm == "k = 1" else "k = 1"
        found = [gradients.paired(lines, arm, beside, how, norm, n) for n in steps_list]
        rows.append([f"{arm} {MINUS} {beside}", *map(bounds, found)])
    return table(["difference", *(f"{n} steps" for n in steps_list)], rows)


# ---- All of it -----------------------------------------------------------------------------------


def report(plan: Plan, folder: Path) -> str:
    """Every table that there are results for."""
    parts = []
    trained = read(folder / f"train-{plan.name}.jsonl", plan)
    if trained:
        parts += ["Study B, arms", *arms_table(plan, trained), ""]
        parts += ["Study B, paired differences", *differences_table(plan, trained), ""]
        lost = [f"{line['arm']}, seed {line['seed']}" for line in trained if "diverged" in line]
        if lost:
            parts += [f"diverged, with every outcome 0: {'; '.join(lost)}", ""]
    described = folder / "gradients.json"
    if described.exists():
        found = json.loads(described.read_text())
        parts += ["Study A, gradients", *gradients_table(found["arms"]), ""]
        parts += ["Study A, cosines of expected gradients", *cosines_table(found["cosines"]), ""]
    gained = gradients.read_gains(folder / "gains.jsonl")
    for norm in complete_norms(gained):
        for how in ("plain", "adam"):
            title = f"Study A, a step of norm {norm:g}, {how}"
            parts += [title, *gains_table(gained, norm, how), ""]
    return "\n".join(parts)


def complete_norms(gained: Sequence[Line]) -> list[float]:
    """Those at which a step was made along every arm, plain and with Adam's preconditioner."""
    wanted = set(product(gradients.ARMS, ("plain", "adam")))
    norms = sorted({line["norm"] for line in gained} - {0.0})
    return [
        norm
        for norm in norms
        if {(line["arm"], line["how"]) for line in gained if line["norm"] == norm} == wanted
    ]


def figures(plan: Plan, folder: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each study that there are results for; of Study A at its smallest norm."""
    trained = read(folder / f"train-{plan.name}.jsonl", plan)
    if any(True for _ in differences(plan, trained)):
        yield "evidence.png", draw_differences(plan, trained)
    gained = gradients.read_gains(folder / "gains.jsonl")
    norms = complete_norms(gained)
    if norms:
        found = json.loads((folder / "gradients.json").read_text())
        yield "gradients.png", draw_gradients(found, gained, "adam", norms[0])


@style.styled
def draw_differences(plan: Plan, lines: Sequence[Line]) -> Figure:
    """Every contrast with its interval, by ODE steps; each arm at its own rate."""
    found = [one for one in differences(plan, lines) if is_own(plan, lines, one)]
    names = list(dict.fromkeys(one.contrast.name for one in found))
    steps_list = sorted({one.steps for one in found})
    figure = style.canvas(
        1.6 + 0.5 * len(names),
        "What S, the weights and the midpoint change, paired by seed",
        "Share of held-out pictures that are right in everything: difference and 95 % interval,\n"
        "by number of ODE steps. Bold: what decides. Filled: other than 0 (bold by Holm's p).",
    )
    ax = figure.subplots()
    ax.axvline(0, color=style.INK, linewidth=1)
    for j, steps in enumerate(steps_list):
        colour = style.PALETTE[j]
        for one in found:
            if one.steps != steps:
                continue
            y = names.index(one.contrast.name) + 0.22 * (j - (len(steps_list) - 1) / 2)
            ax.plot([one.right.low, one.right.high], [y, y], color=colour)
            face = colour if is_shown(plan, lines, one) else "white"
            ax.plot(one.right.mean, y, "o", color=colour, markerfacecolor=face, zorder=3)
        ax.plot([], [], "o-", color=colour, label=f"{steps} steps")
    bold = {contrast.name for contrast in plan.contrasts if contrast.primary}
    ax.set_yticks(range(len(names)), names)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in bold else "normal")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8, frameon=False)
    return figure


@style.styled
def draw_gradients(found: Line, lines: Sequence[Line], how: str, norm: float) -> Figure:
    """Of every arm: share of signal, cosine with k = 1, and what a step is worth beside k = 1's."""
    arms = list(gradients.ARMS)
    by_arm = {line["arm"]: line for line in found["arms"] if line["steps"] == "all"}
    steps_list = sorted(map(int, next(iter(lines))["rewards"]))
    along = {"plain": "along the gradient", "adam": "with Adam's preconditioner"}[how]
    figure = style.canvas(
        1.8 + 0.42 * len(arms),
        "What each arm's expected gradient is, and what a step along it is worth",
        "At the shipped model, all four steps, 95 % intervals. Left: share of signal in a batch's\n"
        "gradient. Middle: cosine with that of k = 1. Right: held-out reward after a step of\n"
        f"norm {norm:g} {along}, less that of k = 1, by number of ODE steps.",
    )
    left, middle, right = figure.subplots(1, 3, sharey=True)
    for y, arm in enumerate(arms):
        for ax, name in ((left, "signal"), (middle, "cosine")):
            one = by_arm[arm].get(name)
            if one:
                ax.plot([one["low"], one["high"]], [y, y], color=style.PALETTE[0])
                ax.plot(one["mean"], y, "o", color=style.PALETTE[0])
        for j, steps in enumerate(steps_list if arm != "k = 1" else ()):
            gain = gradients.paired(lines, arm, "k = 1", how, norm, steps)
            place = y + 0.18 * (j - (len(steps_list) - 1) / 2)
            right.plot([gain.low, gain.high], [place, place], color=style.PALETTE[j], linewidth=1.5)
            right.plot(gain.mean, place, "o", color=style.PALETTE[j], markersize=4)
    for j, steps in enumerate(steps_list):
        right.plot([], [], "o-", color=style.PALETTE[j], label=f"{steps} steps")
    right.axvline(0, color=style.INK, linewidth=1)
    right.legend(fontsize=7, frameon=False)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    for ax, title in ((left, "share of signal"), (middle, "cosine"), (right, "reward")):
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
    return figure
