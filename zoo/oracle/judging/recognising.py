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
from typing import Any

import torch
from torch import Tensor

import pave_grpo as pave
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
    log_prob_gradients,
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
    process_of,
    time_rows,
)


class Recogniser:
    """Which convention a loss follows, found out by experiments, one choice after another."""

    def __init__(self, axes: Axes, seeds: Sequence[int], cases: list[Case], ask: Ask):
        self.axes = axes
        self.seeds = seeds
        self.ask = ask
        self.reads_advantages = False
        self.ratio = "mean"  # whose ratios the clips of experiments are drawn between
        answered = [case for case in cases if case.values is not None]
        self.answered = answered
        self.kernels = [*dict.fromkeys(case.setting.kernel for case in answered)]
        sets = {case.setting.factors for case in answered}
        self.plain = () if () in sets else min(sets, key=len)
        self.events = [*dict.fromkeys(case.setting.event for case in answered)]
        self.policies = {case.setting.policy for case in answered}

    def setting(self, seed: int, **own: Any) -> Setting:
        """An experiment of a kind that was answered, own states, eight members."""
        event = (6,) if (6,) in self.events else max(self.events, key=math.prod)
        usual: dict[str, Any] = {
            "kernel": self.kernels[0],
            "factors": self.plain,
            "event": event,
            "rows": 8,
        }
        usual |= {"rewards": "1", "times": self.axes["times"][0], "eta": 0.7}
        usual |= {"ratio": self.ratio, "policy": "off" if "off" in self.policies else "on"}
        return Setting(**(usual | own), seed=self.seeds[seed])

    def agreements(self, settings: Iterable[Setting], convention: LossConvention) -> int:
        """How many experiments it explains; one with no answer counts for nobody."""
        count = 0
        for setting in settings:
            values = self.ask(setting).values
            if values is not None and precision_of(values, due_under(setting, convention)):
                count += 1
        return count

    def best_of(
        self, settings: Sequence[Setting], options: Iterable[LossConvention]
    ) -> tuple[LossConvention | None, bool]:
        """(the first convention that explains most experiments, does it explain all?)."""
        answered = [z for z in settings if self.ask(z).values is not None]
        best: tuple[int, LossConvention | None] = (0, None)
        for convention in options:
            count = self.agreements(answered, convention)
            if count > best[0]:
                best = count, convention
            if count == len(answered):
                break
        return best[1], best[0] == len(answered) > 0

    def found(self) -> Recognised:
        """One choice after another; what cannot be explained keeps its usual value."""
        convention, scales = self.read_advantages()
        convention = self.read_half_squares(convention, scales)
        convention = self.read_ratios(convention)
        convention = self.read_weights(convention)
        scope = []
        if convention.policy == "on" and "off" in self.policies:
            scope.append("on policy only: velocity_old does not count, every ratio is 1")
        told = convention.told()
        if self.plain == () and not any(case.setting.factors for case in self.answered):
            told |= dict.fromkeys(("form", "weights"), "not observable without k-terms")
        if convention.policy == "on" or "off" not in self.policies:
            for name in ("clip", "ratio"):
                told[name] = "not observable on policy"
        return Recognised(convention, told, tuple(scope))

    # -- advantages: the numbers before an update --------------------------------------------------

    def decoded(self, setting: Setting, convention: LossConvention) -> Tensor | None:
        """c_i G of the k = 1 term [P, G], from the gradient; None where there are no such numbers.

        Before an update, or where velocity_old does not count, it is A_i times what a
        log-probability is multiplied by.
        """
        values = self.ask(setting).values
        if values is None:
            return None
        jacobian = log_prob_gradients(setting)
        gradient = values["gradient"]
        if not bool(gradient.isfinite().all()):
            return None
        solution = torch.linalg.lstsq(jacobian.T, -gradient[:, None], driver="gelsd").solution[:, 0]
        rest = (jacobian.T @ solution + gradient).norm()
        if not rest <= 1e-5 * gradient.norm() + 1e-14:
            return None
        members = setting.groups * setting.rows
        return solution[:members].reshape(setting.groups, setting.rows) * members

    def read_advantages(self) -> tuple[LossConvention, tuple[str, bool, str]]:
        """How rewards become advantages, with (reduction, drops 1/(2 std^2)?, weight of a step)."""
        default = LossConvention(), ("mean", False, "1")
        on = "on" if "on" in self.policies else "off"
        settings = [self.setting(i, rewards=kind, policy=on) for i, kind in enumerate(SPREADS)]
        for i, kind in enumerate(OUTLIERS):
            settings.append(self.setting(6 + i, rewards=kind, rows=OUTLIER_GROUP, policy=on))
        if "groups" in self.axes:
            settings += [self.setting(8, groups=3, policy=on), self.setting(9, groups=2, policy=on)]
        read = []
        for setting in settings:
            numbers = self.decoded(setting, LossConvention())
            if numbers is not None:
                read.append((setting, numbers))
        if not read:
            return default
        for some in (read, [pair for pair in read if pair[0].rows == 8], read[:1]):
            for precision in (1e-9, reading.READING, 3e-6):
                for scale in product(("mean", "sum"), (False, True), STEP_WEIGHTS):
                    readings = [
                        Reading(group_of(z).rewards, A / unit_of(z, scale), precision)
                        for z, A in some
                    ]
                    found = reading.recognise(readings) if readings else None
                    if found:
                        self.reads_advantages = True
                        return LossConvention(scale[0], (), found), scale
        return default

    def read_half_squares(
        self, convention: LossConvention, scale: tuple[str, bool, str]
    ) -> LossConvention:
        """The kernels that drop 1/(2 std^2), and the weight of a step, which all share."""
        on = "on" if "on" in self.policies else "off"
        other = self.axes["times"][-1 if len(self.axes["times"]) < 4 else 3]
        best: tuple[int, LossConvention] = (-1, convention)
        for reduction, step_weight in product(("mean", "sum"), STEP_WEIGHTS):
            dropping, explained = [], 0
            for kernel in self.kernels:
                for drops in (False, True):
                    own = (kernel,) if drops else ()
                    option = convention._replace(
                        reduction=reduction, step_weight=step_weight, no_half_square=own
                    )
                    settings = [
                        self.setting(10, kernel=kernel, policy=on),
                        self.setting(11, kernel=kernel, policy=on, times=other),
                    ]
                    if self.on_policy_gradients_agree(settings, option):
                        explained += 1
                        dropping += [kernel] if drops else []
                        break
            if explained > best[0]:
                option = convention._replace(
                    reduction=reduction, step_weight=step_weight, no_half_square=tuple(dropping)
                )
                best = explained, option
        self.ratio = best[1].reduction
        return best[1]

    def on_policy_gradients_agree(self, settings: Sequence[Setting], c: LossConvention) -> bool:
        """Are the numbers before an update those of the convention?"""
        count = 0
        for setting in settings:
            numbers = self.decoded(setting, c)
            if numbers is None:
                continue
            count += 1
            drops = setting.kernel in c.no_half_square
            A = c.advantages.of(group_of(setting).rewards)
            expected = A * unit_of(setting, (c.reduction, drops, c.step_weight))
            if not close(numbers, Due(expected), 10 * TOLERANCES["float32"]):
                return False
        return count > 0

    # -- ratios and clip: the numbers after it -----------------------------------------------------

    def read_ratios(self, convention: LossConvention) -> LossConvention:
        """Does velocity_old count, which ratio is it, and what cuts it?"""
        if "off" not in self.policies:
            return convention._replace(policy="on")
        settings = [self.setting(12 + i, kernel=kernel) for i, kernel in enumerate(self.kernels)]
        settings.append(
            self.setting(15, times=self.axes["times"][-1 if len(self.axes["times"]) < 4 else 3])
        )
        wide = [setting._replace(rows=7) for setting in settings]
        plain = convention._replace(clip=Clip("none"))
        options = [
            convention,
            plain,
            convention._replace(policy="on", clip=Clip("none")),
        ]
        both = [*settings, *wide]
        simple, explained = self.best_of(both, options)
        if explained and simple:
            return simple
        guard, guarded = self.read_guard(convention)
        if guarded and guard:
            return guard
        many = [*both, *self.more_clips()]
        clips = self.other_clips(many, convention)
        other, explained = self.best_of(many, (convention._replace(clip=clip) for clip in clips))
        if explained and other:
            return other
        # None explains all: the one that explains most of its own experiments.
        counts = {
            option: self.agreements(both, option) for option in (simple, guard, other) if option
        }
        chosen = max(counts, key=lambda option: counts[option]) if counts else convention
        if chosen == guard:
            self.ratio = f"guard {convention.reduction}"
        return chosen

    def read_guard(self, convention: LossConvention) -> tuple[LossConvention | None, bool]:
        """GRPO-Guard's ratio, whose step weighs std as much: with or without a division by D."""
        if convention.step_weight not in ("std", "std/D"):
            return None, False
        ratio = f"guard {convention.reduction}"
        settings = [
            self.setting(12 + i, kernel=kernel, ratio=ratio)
            for i, kernel in enumerate(self.kernels)
        ]
        step_weight = "1/D" if convention.step_weight == "std/D" else "1"
        guard = convention._replace(ratio="GRPO-Guard's", step_weight=step_weight)
        found, explained = self.best_of(settings, [guard, guard._replace(clip=Clip("none"))])
        if explained:
            self.ratio = ratio
        return found, explained

    def more_clips(self) -> list[Setting]:
        """Experiments enough to tell where a range of ratios ends, and all that were answered."""
        drawn = []
        for i, kernel in product(range(len(self.seeds)), self.kernels):
            drawn.append(
                self.setting(
                    i, kernel=kernel, rows=7, eta=self.axes["eta"][i % len(self.axes["eta"])]
                )
            )
        plain = [case.setting for case in self.answered if case.setting.factors == self.plain]
        return [*drawn, *[z for z in plain if z.start == "own" and z.policy == "off"]]

    def other_clips(
        self, settings: Sequence[Setting], convention: LossConvention
    ) -> Iterable[Clip]:
        """Ranges of other ends, and a mask, as far as the experiments tell them."""
        subsets = [settings]
        subsets += [[z for z in settings if z.kernel == kernel] for kernel in self.kernels]
        for some in subsets:
            ends = self.ends_of(some, convention)
            if ends:
                (low, high), (low_times, high_times) = ends
                yield Clip("times", low_times, high_times)
                yield Clip("fixed", low, high)
            yield from self.masks_of(some, convention)

    def ends_of(
        self, settings: Sequence[Setting], convention: LossConvention
    ) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """(low, high) as numbers and as multiples of the clip, from what is left of cut members.

        The loss of a group is known but for the members that are cut: their A adds up to
        (1 + high) sum A above and (1 - low) sum A below. Each group gives one equation.
        """
        fixed, times, rest = [], [], []
        free = convention._replace(clip=Clip("none"))
        for setting in settings:
            values = self.ask(setting).values
            kept = self.kept_members(setting, free)
            if values is None or kept is None or not bool(values["loss"].isfinite()):
                continue
            group = group_of(setting)
            A = convention.advantages.of(group.rewards)
            term = terms_of(setting, free, group.new, group)[1]
            ratio = term.log_ratio.detach().exp()
            t, s = time_rows(setting, 1)
            std = process_of(pave, setting).coefficients(t, s).std[0]
            factor = step_weight_of(convention.step_weight, setting, std)
            left = -values["loss"] / factor * A.numel() - (ratio * A)[kept].sum()
            above, below = A[~kept & (A > 0)].sum(), A[~kept & (A < 0)].sum()
            clip = clip_of(setting)
            fixed.append([above.item(), -below.item()])
            times.append([above.item() * clip, -below.item() * clip])
            rest.append((left - above - below).item())
        if not rest or len(self.plain) > 0:
            return None
        ends = []
        for equations in (fixed, times):
            matrix = torch.tensor(equations, dtype=torch.float64)
            due = torch.tensor(rest, dtype=torch.float64)[:, None]
            high, low = torch.linalg.lstsq(matrix, due, driver="gelsd").solution[:, 0].tolist()
            ends.append((low, high))
        return ends[0], ends[1]

    def kept_members(self, setting: Setting, free: LossConvention) -> Tensor | None:
        """[P, G]: whose number is that of an uncut ratio; None where one is neither that nor 0."""
        numbers = self.decoded(setting, free)
        if numbers is None or setting.factors:
            return None
        group = group_of(setting)
        A = free.advantages.of(group.rewards)
        ratio = terms_of(setting, free, group.new, group)[1].log_ratio.detach().exp()
        drops = setting.kernel in free.no_half_square
        expected = ratio * A * unit_of(setting, (free.reduction, drops, free.step_weight))
        size = 1e-4 * expected.abs().max()
        kept = (numbers - expected).abs() <= size
        cut = numbers.abs() <= size
        return kept if bool((kept | cut).all()) else None

    def masks_of(self, settings: Sequence[Setting], convention: LossConvention) -> Iterable[Clip]:
        """Thresholds that tell masked members from others: as numbers, and as parts of the clip."""
        free = convention._replace(clip=Clip("none"))
        masked: list[tuple[float, float]] = []
        passed: list[tuple[float, float]] = []
        for setting in settings:
            kept = self.kept_members(setting, free)
            if kept is None:
                continue
            group = group_of(setting)
            A = convention.advantages.of(group.rewards)
            term = terms_of(setting, free, group.new, group)[1]
            ratio = term.log_ratio.detach().exp()
            away = ((ratio > 1) & (A > 0)) | ((ratio < 1) & (A < 0))
            for is_kept, far, size in zip(
                kept.flatten(), away.flatten(), term.divergence.flatten().tolist(), strict=True
            ):
                pair = (size, size / clip_of(setting))
                if not is_kept:
                    masked.append(pair)
                elif far:
                    passed.append(pair)
        for i, high in ((1, 1.0), (0, 0.0)):
            above = min((pair[i] for pair in masked), default=math.inf)
            below = max((pair[i] for pair in passed), default=0.0)
            if below < above < math.inf:
                is_clip = i == 1 and below < 1 <= above
                usual = [z for z in USUAL_THRESHOLDS if i == 0 and below < z <= above]
                if usual:
                    yield Clip("mask", usual[0], high, f"{usual[0]:g}")
                    continue
                threshold = f"{below:.3g} to {above:.3g}" + (" times clip" if i == 1 else "")
                middle = 1.0 if is_clip else (below + above) / 2
                yield Clip("mask", middle, high, "clip" if is_clip else threshold)

    # -- weights and form: several terms -----------------------------------------------------------

    def read_weights(self, convention: LossConvention) -> LossConvention:
        """How k-terms are scored and weighed."""
        sets = [z for z in ((2,), (2, 3), (3,), (2, 5, 7)) if self.is_answered(z)]
        if not sets:
            return convention
        settings = []
        for i, factors in enumerate(sets[:2]):
            for kernel in self.kernels:
                settings.append(self.setting(16 + i, factors=factors, kernel=kernel))
        options = [
            convention._replace(form=form, weights=weights)
            for form, weights in product(("paper", "matched"), WEIGHTS)
        ]
        found, _ = self.best_of(settings, options)
        return found or convention

    def is_answered(self, factors: tuple[int, ...]) -> bool:
        """Was a question with this S answered?"""
        return any(case.setting.factors == factors for case in self.answered)
