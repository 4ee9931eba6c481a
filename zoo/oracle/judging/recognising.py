"""Which convention a loss follows, found out by experiments.

A loss is read, not guessed. Its gradient is a sum over members i and terms k of numbers c_ik times
the gradients of log p^(k)(x_s^i); with more parameters than members these numbers can be solved
for. Before an update they are advantages, up to what a log-probability is multiplied by; after it
they say whose ratio was clipped, where, and how terms are weighed. What has no such numbers, or
other ones than any convention has, disagrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.oracle.judging import advantages as reading
from zoo.oracle.judging.advantages import Reading
from zoo.oracle.judging.conditions import Setting
from zoo.oracle.judging.conventions import (
    STEP_WEIGHTS,
    USUAL_THRESHOLDS,
    WEIGHTS,
    Clip,
    LossConvention,
    due_under,
    log_ratio_gradients,
    step_weight_of,
    terms_of,
    unit_of,
)
from zoo.oracle.judging.groups import (
    OUTLIER_GROUP,
    OUTLIERS,
    SPREADS,
    clip_of,
    group_of,
)
from zoo.oracle.judging.levels import (
    TOLERANCES,
    Ask,
    Axes,
    Case,
    Due,
    Recognised,
    close,
    precision_of,
)


class Recogniser:
    """Which convention a loss follows, found out by experiments, one choice after another."""

    def __init__(self, axes: Axes, seeds: Sequence[int], cases: list[Case], ask: Ask):
        self.axes = axes
        self.seeds = seeds
        self.ask = ask
        self.reads_advantages = False
        self.answered = [case for case in cases if case.values is not None]
        settings = [case.setting for case in self.answered]
        self.kernels = [*dict.fromkeys(setting.kernel for setting in settings)]
        self.events = sorted({setting.event for setting in settings}, key=math.prod)
        self.policies = {setting.policy for setting in settings}
        sets = {setting.factors for setting in settings}
        self.plain = () if () in sets else min(sets, key=len)

    def experiment(self, number: int, **own: Any) -> Setting:
        """A question of a kind that was answered: own states, eight members, before an update."""
        usual = Setting(
            kernel=self.kernels[0],
            factors=self.plain,
            times=self.axes["times"][0],
            event=(6,) if (6,) in self.events else self.events[-1],
            rows=8,
            policy="on" if "on" in self.policies else "off",
            rewards="1",
            seed=self.seeds[number % len(self.seeds)],
        )
        return usual._replace(**own)

    def long_step(self) -> tuple[float, float]:
        """Another step than that of most experiments."""
        times: tuple[float, float] = self.axes["times"][min(4, len(self.axes["times"]) - 1)]
        return times

    def agreements(self, settings: Iterable[Setting], convention: LossConvention) -> int:
        """How many experiments it explains."""
        count = 0
        for setting in settings:
            values = self.ask(setting).values
            if values is not None and precision_of(values, due_under(setting, convention)):
                count += 1
        return count

    def first_of(
        self, settings: Sequence[Setting], options: Iterable[LossConvention]
    ) -> tuple[LossConvention | None, bool]:
        """(the first convention that explains most experiments, does it explain all?)."""
        answered = [setting for setting in settings if self.ask(setting).values is not None]
        most = 0
        chosen: LossConvention | None = None
        for convention in options:
            count = self.agreements(answered, convention)
            if count > most:
                most, chosen = count, convention
            if count == len(answered):
                break
        return chosen, most == len(answered) > 0

    def found(self) -> Recognised:
        """One choice after another; what cannot be explained keeps its usual value."""
        convention = self.read_half_squares(self.read_advantages())
        convention = self.read_ratios(convention)
        convention = self.read_weights(convention)
        convention = self.read_kl(convention)
        told = convention.told()
        if not self.reads_advantages:
            told |= dict.fromkeys(("std", "eps", "clamp"), "not recognised")
        if self.plain == () and not any(case.setting.factors for case in self.answered):
            told |= dict.fromkeys(("form", "weights"), "not observable without k-terms")
        scope = []
        if convention.policy == "on":
            told |= dict.fromkeys(("clip", "ratio"), "not observable on policy")
            if "off" in self.policies:
                scope.append("on policy only: velocity_old does not count, every ratio is 1")
        return Recognised(convention, told, tuple(scope))

    # -- advantages: the numbers before an update --------------------------------------------------

    def decoded(self, setting: Setting, convention: LossConvention) -> Tensor | None:
        """[P, G], the numbers c_i G with which gradients of the k = 1 log-ratios make up theirs.

        Before an update, and where velocity_old does not count, they are A_i times what the
        convention does not multiply a log-ratio by. None where there are no such numbers.
        """
        values = self.ask(setting).values
        if values is None or not bool(values["gradient"].isfinite().all()):
            return None
        gradient = values["gradient"][:, None]
        rows = log_ratio_gradients(setting, convention._replace(clip=Clip("none")))
        solution = torch.linalg.lstsq(rows.T, -gradient, driver="gelsd").solution
        if not (rows.T @ solution + gradient).norm() <= 1e-5 * gradient.norm() + 1e-14:
            return None
        members = setting.groups * setting.rows
        return solution[:members, 0].reshape(setting.groups, setting.rows) * members

    def read_advantages(self) -> LossConvention:
        """How rewards become advantages, with a reduction and a weight of steps that fit."""
        settings = [self.experiment(i, rewards=kind) for i, kind in enumerate(SPREADS)]
        for i, kind in enumerate(OUTLIERS):
            settings.append(self.experiment(6 + i, rewards=kind, rows=OUTLIER_GROUP))
        if "groups" in self.axes:
            settings += [self.experiment(8, groups=3), self.experiment(9, groups=2)]
        plain = LossConvention()
        decoded = [(setting, self.decoded(setting, plain)) for setting in settings]
        read = [(setting, numbers) for setting, numbers in decoded if numbers is not None]
        small = [pair for pair in read if pair[0].rows == 8]
        # What is usual, from fewer groups if not from all; then what is not, from all alone.
        for pairs, usual in ((read, True), (small, True), (read[:1], True), (read, False)):
            for precision, scale in product((1e-9, reading.READING, 3e-6), UNITS):
                readings = []
                for setting, numbers in pairs:
                    A = numbers / unit_of(setting, scale)
                    readings.append(Reading(group_of(setting).rewards, A, precision))
                found = reading.recognise(readings, usual)
                if found:
                    self.reads_advantages = True
                    return LossConvention(scale[0], (), found, step_weight=scale[2])
        return plain

    def read_half_squares(self, convention: LossConvention) -> LossConvention:
        """The kernels that drop 1/(2 std^2), and what all share: reduction and weight of a step."""
        most, chosen = -1, convention
        for reduction, step_weight in product(("mean", "sum"), STEP_WEIGHTS):
            shared = convention._replace(reduction=reduction, step_weight=step_weight)
            dropping, explained = [], 0
            for kernel in self.kernels:
                settings = [
                    self.experiment(10, kernel=kernel),
                    self.experiment(11, kernel=kernel, times=self.long_step()),
                ]
                keeps = self.numbers_are_advantages(settings, shared)
                drops = shared._replace(no_half_square=(kernel,))
                if keeps or self.numbers_are_advantages(settings, drops):
                    explained += 1
                    dropping += [] if keeps else [kernel]
            if explained > most:
                most, chosen = explained, shared._replace(no_half_square=tuple(dropping))
        return chosen

    def numbers_are_advantages(
        self, settings: Sequence[Setting], convention: LossConvention
    ) -> bool:
        """Before an update, with the convention's weight of a step."""
        count = 0
        for setting in settings:
            numbers = self.decoded(setting, convention)
            if numbers is not None:
                count += 1
                A = convention.advantages.of(group_of(setting).rewards)
                due = Due(A * step_weight_of(convention.step_weight, setting))
                if not close(numbers, due, 10 * TOLERANCES["float32"]):
                    return False
        return count > 0

    # -- ratios and clip: the numbers after it -----------------------------------------------------

    def updates(self, ratio: str, many: int = 1) -> list[Setting]:
        """Experiments after an update: small and large, with a clip that cuts some, all, nobody."""
        drawn: list[Setting] = []
        for i, kernel in product(range(many), self.kernels):
            for j in range(6):
                one = self.experiment(12 + 6 * i + j, kernel=kernel, policy="off", ratio=ratio)
                eta = self.axes["eta"][i % len(self.axes["eta"])]
                one = one._replace(eta=eta if i else one.eta)
                if j == 1:
                    one = one._replace(rows=7, times=self.long_step())
                if j == 2:
                    one = one._replace(spread=0.02 if i % 2 else 0.004)
                if j >= 3:
                    one = one._replace(spread=0.4, event=self.events[0])
                clip = (BETWEEN, BETWEEN, "between divergences")[j % 3]
                drawn.append(one._replace(clip="wide" if j == 5 else clip))
        return drawn

    def read_ratios(self, convention: LossConvention) -> LossConvention:
        """Does velocity_old count, which ratio is it, and what cuts it?"""
        if "off" not in self.policies:
            return convention._replace(policy="on")
        settings = self.updates(convention.reduction)
        no_clip = convention._replace(clip=Clip("none"))
        options = [convention, no_clip, no_clip._replace(policy="on")]
        simple, explained = self.first_of(settings, options)
        if explained and simple:
            return simple
        candidates = [simple] if simple else []
        for ratio, option in self.ratios_of(convention):
            found, explained = self.other_clip(ratio, option)
            if explained and found:
                return found
            candidates += [found] if found else []
        counts = [self.agreements(settings, option) for option in candidates]
        return candidates[counts.index(max(counts))] if candidates else convention

    def other_clip(
        self, ratio: str, convention: LossConvention
    ) -> tuple[LossConvention | None, bool]:
        """Of this ratio: the clip given, none, or as members that are cut tell it."""
        settings = self.updates(ratio, MANY)
        if ratio == "mean":
            settings += self.answered_plainly()
        few = settings[:: 1 + len(settings) // FEW]
        cut = [self.cut_group(setting, convention) for setting in settings]
        groups = [group for group in cut if group is not None]
        # With no such groups there is nothing to read, and a range of other ends explains nothing.
        clips = [Clip(), Clip("none")]
        if 2 * len(groups) > len(settings) // len(self.kernels):
            clips += clips_of(groups)
            for kernel in self.kernels if len(self.kernels) > 1 else ():
                clips += clips_of([group for group in groups if group.kernel == kernel])
        options = [convention._replace(clip=clip) for clip in dict.fromkeys(clips)]
        promising, _ = self.first_of(few, options)
        if promising is None:
            return None, False
        counts = {option: self.agreements(few, option) for option in options}
        best = [option for option in options if counts[option] == counts[promising]]
        if len(best) > 1:  # k-terms move less far, and tell thresholds apart
            answered = [case.setting for case in self.answered if case.setting.policy == "off"]
            best.sort(key=lambda option: -self.agreements(answered, option))
        return self.first_of(settings, best)

    def ratios_of(self, convention: LossConvention) -> list[tuple[str, LossConvention]]:
        """(whose ratios clips are drawn between, the convention): plain, and GRPO-Guard's.

        A step of the latter weighs std as much before an update, with or without a division by D.
        """
        pairs = [(convention.reduction, convention)]
        if convention.step_weight in ("std", "std/D"):
            step_weight = "1/D" if convention.step_weight == "std/D" else "1"
            guard = convention._replace(ratio="GRPO-Guard's", step_weight=step_weight)
            pairs.insert(0, (f"guard {convention.reduction}", guard))
        return pairs

    def answered_plainly(self) -> list[Setting]:
        """What was answered without k-terms after an update, from states of their own."""
        settings = [case.setting for case in self.answered]
        own = [
            setting for setting in settings if setting.start == "own" and setting.policy == "off"
        ]
        return [setting for setting in own if setting.factors == self.plain]

    def cut_group(self, setting: Setting, convention: LossConvention) -> CutGroup | None:
        """Who was cut, where every member's number is that of an uncut ratio, or 0; else None."""
        free = convention._replace(clip=Clip("none"))
        numbers = self.decoded(setting, free)
        values = self.ask(setting).values
        if numbers is None or values is None or setting.factors:
            return None
        if not bool(values["loss"].isfinite()):
            return None
        group = group_of(setting)
        A = free.advantages.of(group.rewards)
        term = terms_of(setting, free, group.new)[1]
        ratio = term.log_ratio.detach().exp()
        weight = step_weight_of(free.step_weight, setting)
        expected = ratio * A * weight
        size = 1e-4 * expected.abs().max()
        kept = (numbers - expected).abs() <= size
        if not bool((kept | (numbers.abs() <= size)).all()):
            return None
        clip = clip_of(setting)
        J = -values["loss"] / weight
        return CutGroup(setting.kernel, A, ratio, term.divergence, kept, J, clip)

    # -- weights and form: several terms; and the KL -----------------------------------------------

    def read_weights(self, convention: LossConvention) -> LossConvention:
        """How k-terms are scored and weighed; as usual, where nothing explains them."""
        answered = {case.setting.factors for case in self.answered}
        sets = [S for S in ((2,), (2, 3), (3,), (2, 5, 7)) if S in answered]
        settings = []
        for i, factors in enumerate(sets[:2]):
            for kernel in self.kernels:
                off = {"policy": "off", "ratio": convention.reduction}
                how = off if "off" in self.policies else {}
                settings.append(self.experiment(16 + i, factors=factors, kernel=kernel, **how))
        options = []
        for form, weights in product(("paper", "matched"), WEIGHTS):
            options.append(convention._replace(form=form, weights=weights))
        found, explained = self.first_of(settings, options)
        return found if found and explained else convention

    def read_kl(self, convention: LossConvention) -> LossConvention:
        """What the KL is reduced by, where there is one."""
        settings = []
        if "kl" in self.axes:
            for kernel in self.kernels:
                settings.append(self.experiment(18, kernel=kernel, kl=1.0))
        options = [convention._replace(kl=kl) for kl in ("as the ratio", "mean", "sum")]
        found, _ = self.first_of(settings, options)
        return found or convention


MANY = 6  # groups of each kind and kernel, for what a few do not tell
FEW = 24  # experiments that choose among clips before all of them do
BETWEEN = Setting().clip  # ratios
UNITS = [*product(("mean", "sum"), (False, True), STEP_WEIGHTS)]


class CutGroup(NamedTuple):
    """A group after an update: advantages, ratios and KL [P, G], and who was not cut."""

    kernel: str
    A: Tensor
    ratio: Tensor
    divergence: Tensor
    kept: Tensor
    J: Tensor  # mean of the members' terms
    clip: float  # that was given


def clips_of(groups: Sequence[CutGroup]) -> list[Clip]:
    """Ranges of other ends, and masks, that these groups may have been cut by."""
    clips = []
    for kind in ("times", "fixed"):
        ends = ends_of(groups, kind)
        if ends:
            clips.append(Clip(kind, *ends))
    return [*clips, *masks_of(groups)]


def ends_of(groups: Sequence[CutGroup], kind: str) -> tuple[float, float] | None:
    """(low, high) of a range of ratios, as numbers ("fixed") or multiples of the clip ("times").

    What the members that are cut leave in a loss is (1 + high) sum A of those above and (1 - low)
    sum A of those below: each group gives one equation. An end that nobody shows is as usual.
    """
    equations, left = [], []
    for group in groups:
        cut = ~group.kept
        above = group.A[cut & (group.A > 0)].sum()
        below = group.A[cut & (group.A < 0)].sum()
        rest = group.J * group.A.numel() - (group.ratio * group.A)[group.kept].sum() - above - below
        unit = group.clip if kind == "times" else 1.0
        equations.append([unit * -below.item(), unit * above.item()])
        left.append([rest.item()])
    if not equations:
        return None
    matrix = torch.tensor(equations, dtype=torch.float64)
    seen = matrix.abs().sum(0) > 0
    solution = torch.linalg.lstsq(
        matrix, torch.tensor(left, dtype=torch.float64), driver="gelsd"
    ).solution[:, 0]
    low, high = torch.where(seen, solution, solution[seen].mean() if seen.any() else 1.0).tolist()
    return low, high


def masks_of(groups: Sequence[CutGroup]) -> Iterable[Clip]:
    """Thresholds that tell masked members from others: as parts of the clip, or as numbers."""
    for kind in ("times", "fixed"):
        below, above = 0.0, math.inf
        for group in groups:
            sizes = group.divergence / (group.clip if kind == "times" else 1.0)
            away = (group.ratio - 1) * group.A > 0
            passed = sizes[group.kept & away]
            masked = sizes[~group.kept]
            below = max([below, *passed.tolist()])
            above = min([above, *masked.tolist()])
        if not below < above < math.inf:
            continue
        usual = (1.0,) if kind == "times" else USUAL_THRESHOLDS
        inside = [value for value in usual if below < value <= above]
        for value in inside:
            yield Clip(
                f"mask, {kind}", value, value, "the clip" if kind == "times" else f"{value:g}"
            )
        # An end that nothing shows, times the clip, would explain whatever is below it.
        if not inside and (below > 0 or kind == "fixed"):
            middle = (below + above) / 2
            words = f"{below:.3g} to {above:.3g}" + (" times the clip" if kind == "times" else "")
            yield Clip(f"mask, {kind}", middle, middle, words)
