"""The two levels that rewards enter: advantages, and the loss with its gradient."""

from __future__ import annotations

import functools
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle.judging import advantages as reading
from zoo.oracle.judging.advantages import Advantages, Reading
from zoo.oracle.judging.asked import Field, Message
from zoo.oracle.judging.conditions import Setting
from zoo.oracle.judging.conventions import Clip, LossConvention, due_under, gradient_by_theta
from zoo.oracle.judging.groups import (
    OUTLIER_GROUP,
    OUTLIERS,
    REWARDS,
    SPREADS,
    clip_of,
    group_of,
    rewards_of,
    rollout_of,
)
from zoo.oracle.judging.levels import (
    Ask,
    Axes,
    Case,
    Due,
    Level,
    Recognised,
    Send,
    Unusable,
    Values,
    draw_etas,
    draw_events,
    draw_seed,
    draw_times,
    message,
    shaped,
    tensor_of,
)
from zoo.oracle.judging.recognising import Recogniser

USUAL_ADVANTAGES = [
    Advantages(scale, "std + eps", eps, f"{eps:g}", clamp, str(clamp))
    for scale, eps, clamp in product(("ddof 1", "ddof 0"), (1e-8, 1e-4), (5.0, None))
]


# ---- advantages ----------------------------------------------------------------------------------


class AdvantagesLevel(Level):
    """What are the advantages of N groups of rewards?"""

    name = "advantages"
    required = ("rewards",)
    shown = ("rewards", "rows", "groups")
    bug_levels = ("advantages",)
    unobservable = ("mean or sum", "constants", "1/(2 std^2)", "g or std", "clip", "weights", "KL")

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """Kinds of rewards, sizes and numbers of groups."""
        return {"rewards": REWARDS, "rows": (8, 2, 5, OUTLIER_GROUP), "groups": (1, 2, 3)}

    def settings(self) -> list[Setting]:
        """Each kind of rewards with each number of groups."""
        drawn = []
        for kind, groups in product(REWARDS, self.axes["groups"]):
            rows = OUTLIER_GROUP if kind in OUTLIERS else (8, 5, 2)[groups - 1]
            seed = draw_seed(self.generator)
            drawn.append(Setting(rewards=kind, rows=rows, groups=groups, seed=seed))
        return drawn

    def rewards(self, setting: Setting) -> Tensor:
        """[N, G]."""
        generator = torch.Generator().manual_seed(setting.seed)
        return rewards_of(setting.rewards, setting.groups, setting.rows, generator)

    def call(self, setting: Setting) -> Message:
        """rewards [N, G]."""
        return message({}, {"rewards": self.rewards(setting)})

    def read(self, reply: Message, setting: Setting) -> Values:
        """{"A": [N, G]}. Raises Unusable for other values or shapes."""
        shape = (setting.groups, setting.rows)
        if len(reply.words["returned"]) != 1:
            raise Unusable(f"returns {len(reply.words['returned'])} values, must be 1")
        return {"A": shaped(tensor_of(reply, 0, "the advantages"), shape, "advantages")}

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """Std, eps and clamp, as zoo/oracle/judging/advantages.py reads them."""
        answered = [case for case in cases if case.values is not None]
        found = recognised_advantages(answered, self.rewards)
        told = found.told() if found else {}
        return Recognised(found or Advantages(), told)

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """A [N, G]; by a patched copy as near to the convention as its arguments go."""
        if module is pave:
            return {"A": Due(convention.of(self.rewards(setting)), 1e-3)}
        return {"A": Due(module_advantages(module, convention, self.rewards(setting)), 1e-3)}

    def bug_conventions(self, found: Recognised) -> list[Any]:
        return [found.convention, *USUAL_ADVANTAGES]

    def afterwards(self, found: Recognised, cases: list[Case], send: Send) -> str:
        """Equal rewards whose mean is rounded: most codebases give them rounding over eps."""
        rewards = torch.full((1, 8), 0.1, dtype=torch.float64)
        reply = send(message({}, {"rewards": rewards}), "eight rewards of 0.1")
        largest = reply.tensors["0"].abs().max().item() if "0" in reply.tensors else 0.0
        if largest > 1e-6:
            self.findings.append(f"eight rewards of 0.1 get |A| = {largest:.2g}: rounding over eps")
        return ""


def recognised_advantages(cases: list[Case], rewards: Any) -> Advantages | None:
    """From all answers; else from as many kinds of rewards as one convention explains."""
    subsets = [cases, [case for case in cases if case.setting.rewards in SPREADS]]
    subsets.append([case for case in cases if case.setting.rewards in SPREADS[:3]])
    subsets += [[c for c in cases if c.setting.groups == 1], cases[:1]]
    for some in subsets:
        for precision in (1e-9, reading.READING, 3e-6):
            read = [Reading(rewards(c.setting), (c.values or {})["A"], precision) for c in some]
            found = reading.recognise(read) if read else None
            if found:
                return found
    return None


def module_advantages(module: ModuleType, convention: Advantages, rewards: Tensor) -> Tensor:
    """By the group_advantages of a patched copy, as near to the convention as its arguments go."""
    ddof = 0 if convention.scale.endswith("0") else 1
    standardise = not convention.scale.startswith("none")
    A: Tensor = module.group_advantages(
        rewards, ddof, convention.eps, convention.clamp, standardise
    )
    return A


# ---- loss ----------------------------------------------------------------------------------------


class LossLevel(Level):
    """What is the loss of a group, and its gradient by the parameters of `velocity`?"""

    name = "loss"
    required = (
        "velocity",
        "velocity_old",
        "x_t",
        "x_s",
        "t",
        "s",
        "rewards",
        "factors",
        "kernel",
        "eta",
        "clip",
    )
    optional = ("prompt", "kl", "velocity_ref")
    shown = ("kernel", "factors", "policy", "times", "eta", "event", "rows", "rewards", "start")
    bug_levels = ("transition", "log_prob", "advantages", "loss")

    def __init__(self, parameters: dict[str, Any], generator: torch.Generator):
        super().__init__(parameters, generator)
        self.seeds = [draw_seed(generator) for _ in range(60)]
        one = [] if "prompt" in parameters else ["several groups", "std of the batch"]
        kl = [] if "kl" in parameters else ["KL"]
        self.unobservable = ("constants", "g or std", *one, *kl)  # type: ignore[misc]

    def draw_axes(self, generator: torch.Generator) -> Axes:
        """All that a loss depends on, several groups and a KL where they are asked for."""
        axes: Axes = {
            "factors": ((), (2,), (3,), (2, 3), (4,), (2, 5, 7), (5,), (6,), (7,)),
            "policy": ("off", "on"),
            "kernel": tuple(pave.KERNELS),
            "times": draw_times(generator),
            "eta": draw_etas(generator),
            "event": draw_events(generator),
            "rows": (8, 5, 7),
            "start": ("own", "shared"),
            "rewards": ("1", "0.001", "equal"),
            "spread": (0.1, 0.4, 0.02),
            "clip": ("between ratios", "between divergences", "wide"),
        }
        if "prompt" in self.parameters:
            axes["groups"] = (1, 2, 3)
        if "kl" in self.parameters:
            axes["kl"] = (0.0, 0.25, 2.0)
        return axes

    def settings(self) -> list[Setting]:
        """Each value of each axis for each kernel, and six more."""
        drawn = []
        usual: dict[str, Any] = {"rows": 8, "rewards": "1"}
        for kernel in self.axes["kernel"]:
            for name, values in self.axes.items():
                for value in values if name != "kernel" else ():
                    fixed = usual | {"kernel": kernel, name: value}
                    if name != "times" or self.allowed(Setting(**fixed)):
                        drawn += self.random_settings(self.generator, **fixed)
            for _ in range(6):
                drawn += self.random_settings(self.generator, kernel=kernel)
        return drawn

    def call(self, setting: Setting) -> Message:
        """The group [B, *event], B = P G, its rewards [B], S, clip, and the velocities."""
        group = group_of(setting)
        t, s = setting.times
        numbers = {
            "t": t,
            "s": s,
            "factors": list(setting.factors),
            "kernel": setting.kernel,
            "eta": setting.eta,
            "clip": clip_of(setting),
        }
        x_t, x_s = group.x_t.flatten(0, 2), group.x_s.flatten(0, 2)
        tensors = {"x_t": x_t, "x_s": x_s, "rewards": group.rewards.flatten()}
        velocities = {"velocity": group.new, "velocity_old": group.old}
        prompted = "prompt" in self.parameters
        if prompted:
            tensors["prompt"] = torch.arange(setting.groups).repeat_interleave(setting.rows)
        if "kl" in self.parameters:
            numbers["kl"] = setting.kl
            velocities["velocity_ref"] = group.reference
        return message(numbers, tensors, velocities, prompted, "theta")

    def read(self, reply: Message, setting: Setting) -> Values:
        """{"loss": [], "gradient": [parameters of theta]}. Raises Unusable for another loss."""
        if len(reply.words["returned"]) != 1:
            raise Unusable(f"returns {len(reply.words['returned'])} values, must be a scalar")
        value = tensor_of(reply, 0, "the loss")
        if value.numel() != 1:
            raise Unusable(f"returns a loss of shape {list(value.shape)}, must be a scalar")
        return {"loss": value.double().reshape(()), "gradient": reply.tensors["gradient"]}

    def due(self, setting: Setting, convention: Any, module: ModuleType = pave) -> dict[str, Due]:
        """The loss and its gradient by theta, under a LossConvention."""
        if module is pave:
            return due_under(setting, convention)
        return due_by(module, setting, convention)

    def recognise(self, cases: list[Case], ask: Ask) -> Recognised:
        """By experiments: zoo/oracle/judging/recognising.py."""
        reader = Recogniser(self.axes, self.seeds, cases, ask)
        found = reader.found()
        self.reads_advantages = reader.reads_advantages
        return found

    def bug_conventions(self, found: Recognised) -> list[Any]:
        """With the clip that was given, too; with usual advantages where none could be read."""
        tried = [found.convention, found.convention._replace(clip=Clip())]
        if not self.reads_advantages:
            usual = [tried[1]._replace(advantages=advantages) for advantages in USUAL_ADVANTAGES]
            tried += usual
        return [*dict.fromkeys(tried)]


@functools.cache
def due_by(module: ModuleType, setting: Setting, convention: LossConvention) -> dict[str, Due]:
    """The loss and its gradient by the policy_loss of a patched copy."""
    group = group_of(setting)
    new = Field(group.new.w1.detach(), group.new.w2.detach())
    rollout = rollout_of(setting, group, module)
    A = module_advantages(module, convention.advantages, group.rewards)[:, None]
    options: dict[str, Any] = {
        "factors": setting.factors,
        "form": convention.form,
        "reduction": convention.reduction,
        "clip": clip_of(setting) if convention.clip.kind == "as given" else None,
        "ratio_norm": convention.ratio != "plain",
    }
    if setting.kl:
        options |= {"kl": setting.kl, "reference": group.reference}
    with torch.no_grad():
        old = module.policy_loss(group.old, rollout, A, **options).old
    if convention.policy == "on":
        old = None
    loss = module.policy_loss(new, rollout, A, old=old, **options).loss
    gradient = gradient_by_theta(loss, new)
    return {"loss": Due(loss.detach(), A.abs().mean().item()), "gradient": Due(gradient)}
