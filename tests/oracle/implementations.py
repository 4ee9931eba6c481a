"""What the judge is judged by: implementations in plain torch, with faults, without, and unseen.

`Plain` computes the five levels of zoo/oracle/judging without pave_grpo: step, transition,
log_prob, advantages and loss. FAULTS are ways to get it wrong, none of them in bugs.txt: the judge
must disagree with each. VARIANTS are other ways to write the same, or less of it: it must agree,
and name what they do. UNSEEN are faults that no answer at their level shows: it agrees with them,
and cannot do better.

A fault overrides one small method of Plain, so that everything else in it is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal


class Fault(NamedTuple):
    """An implementation to disagree with."""

    name: str
    level: str
    function: Callable
    where: str = ""  # a pattern to be found in the judgement's `where`


class Variant(NamedTuple):
    """An implementation to agree with."""

    name: str
    level: str
    function: Callable
    conventions: dict[str, str] = {}  # noqa: RUF012 -- patterns to be found in the judgement's
    scope: tuple[str, ...] = ()  # patterns, each to be found in a line of its scope


class Unseen(NamedTuple):
    """A fault to agree with, and why."""

    name: str
    level: str
    function: Callable
    reason: str


Moments = tuple[Tensor, Tensor]  # mean [B, *event] and std [B] of a transition
Coefficients = tuple[Tensor, Tensor, Tensor]  # a, b and std [B]: mean = a x + b v
Velocity = Callable[[Tensor, Tensor], Tensor]


class Steps(NamedTuple):
    """Observed steps x_t -> x_s, and the kernel that took them."""

    x_t: Tensor
    x_s: Tensor
    t: float | Tensor
    s: float | Tensor
    kernel: str
    eta: float


def rows(w: float | Tensor, x: Tensor) -> Tensor:
    """A number, or one per row, as float64 [B]."""
    return torch.as_tensor(w, dtype=torch.float64).expand(len(x))


def column(w: Tensor, x: Tensor) -> Tensor:
    """One number per row, [B], shaped to multiply x [B, *event]."""
    return w.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def of_prompts(velocity: Callable, prompt: Tensor) -> Velocity:
    """velocity(x, t, prompt) as a velocity(x, t) of these rows."""
    return lambda x, t: velocity(x, t, prompt)


class Plain:
    """Pave-GRPO at every level, with nothing left out and nothing clever."""

    # ---- The kernels

    def below_1(self, t: Tensor, s: Tensor) -> Tensor:
        """What stands for t in 1 - t, which must not be zero."""
        return torch.where(t == 1, s, t)

    def squared_g(self, t: Tensor, s: Tensor, kernel: str, eta: float) -> Tensor:
        """The squared diffusion coefficient of the two SDE kernels."""
        if kernel == "flow_sde":
            return eta**2 * t / (1 - self.below_1(t, s))
        return {"dance": eta**2}[kernel] * torch.ones_like(t)

    def sde(self, t: Tensor, s: Tensor, kernel: str, eta: float) -> Coefficients:
        """An Euler-Maruyama step of length D, its score being -(x + (1-t) v)/t."""
        D = t - s
        g2 = self.squared_g(t, s, kernel, eta)
        half = g2 * D / (2 * t)
        return 1 - half, -D - half * (1 - t), (g2 * D).sqrt()

    def cps(self, t: Tensor, s: Tensor, eta: float) -> Coefficients:
        """(1-s) (x - t v) + s cos(h) (x + (1-t) v), h = eta pi/2."""
        cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        return (1 - s) + s * cos, -(1 - s) * t + s * cos * (1 - t), s * sin

    def coefficients(self, t: Tensor, s: Tensor, kernel: str, eta: float) -> Coefficients:
        """Of one stochastic step t -> s."""
        return self.cps(t, s, eta) if kernel == "cps" else self.sde(t, s, kernel, eta)

    def moments(
        self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, kernel: str, eta: float
    ) -> Moments:
        """Mean and std of one stochastic step."""
        a, b, std = self.coefficients(t, s, kernel, eta)
        return column(a, x) * x + column(b, x) * v, std

    # ---- Level log_prob

    def reduce(self, x: Tensor) -> Tensor:
        """[B] of [B, *event]."""
        return x.flatten(1).mean(1)

    def log_prob(self, x_s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """log N(x_s; mean, std^2 I)."""
        return self.reduce(Normal(mean, column(std, mean)).log_prob(x_s))

    # ---- Level step

    def noise(self, like: Tensor) -> Tensor:
        """What x_s is drawn with."""
        return torch.randn_like(like)

    def drawn(self, mean: Tensor, std: Tensor, D: Tensor) -> Tensor:
        """x_s, through which no gradient goes."""
        return (mean + column(std, mean) * self.noise(mean)).detach()

    def step(self, v, x_t, t, s, eta, kernel, x_s=None):
        """One step, drawn or scored."""
        t, s = rows(t, x_t), rows(s, x_t)
        mean, std = self.moments(x_t, v, t, s, kernel, eta)
        if x_s is None:
            x_s = self.drawn(mean, std, t - s)
        return x_s.clone(), self.log_prob(x_s, mean, std), mean, std

    # ---- Level transition

    def substep(self, t: Tensor, s: Tensor, k: int) -> Tensor:
        """How long each of k sub-steps is."""
        return (t - s) / k

    def euler(self, x: Tensor, v: Tensor, d: Tensor) -> Tensor:
        """One sub-step of the ODE."""
        return x - column(d, x) * v

    def time(self, t: Tensor, d: Tensor, j: int, k: int) -> Tensor:
        """When sub-step j of k begins."""
        return t - j * d

    def chain(
        self, x: Tensor, velocity: Velocity, t: Tensor, s: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """x and v from which the last of k sub-steps begins."""
        d = self.substep(t, s, k)
        v = velocity(x, t)
        for j in range(1, k):
            x = self.euler(x, v, d)
            v = velocity(x, self.time(t, d, j, k))
        return x, v

    def transition(self, x, velocity, t, s, k, kernel, eta):
        """k - 1 sub-steps of the ODE, then one of the kernel."""
        t, s = rows(t, x), rows(s, x)
        x, v = self.chain(x, velocity, t, s, k)
        begin = t if k == 1 else s + (t - s) / k
        return self.moments(x, v, begin, s, kernel, eta)

    def transition_of_prompts(self, x, velocity, t, s, k, kernel, eta, prompt):
        """The same with a velocity that is asked for prompts."""
        return self.transition(x, of_prompts(velocity, prompt), t, s, k, kernel, eta)

    # ---- Level advantages

    def centre(self, rewards: Tensor) -> Tensor:
        """What is subtracted."""
        return rewards.mean(-1, keepdim=True)

    def scale(self, rewards: Tensor) -> Tensor:
        """What is divided by."""
        return rewards.std(-1, keepdim=True) + 1e-8

    def clamp(self, A: Tensor) -> Tensor:
        """What is done to outliers."""
        return A.clamp(-5, 5)

    def advantages(self, rewards):
        """Of N groups [N, G]; zeros for a group of equal rewards."""
        equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
        centred = torch.where(equal, 0, rewards - self.centre(rewards))
        return self.clamp(centred / self.scale(rewards))

    # ---- Level loss

    def weight(self, k: int, factors: tuple[int, ...]) -> float:
        """What a term counts."""
        return 1.0 if k == 1 else 1 / len(factors)

    def policy(self, velocity: Velocity, steps: Steps, ks: tuple[int, ...]) -> dict[int, Moments]:
        """The transitions of every k."""
        x, _, t, s, kernel, eta = steps
        return {k: self.transition(x, velocity, t, s, k, kernel, eta) for k in ks}

    def old_policy(
        self, velocity: Velocity, steps: Steps, ks: tuple[int, ...]
    ) -> dict[int, Moments]:
        """The same of the policy that sampled, without a gradient."""
        with torch.no_grad():
            return self.policy(velocity, steps, ks)

    def scored(
        self, k: int, new: dict[int, Moments], old: dict[int, Moments]
    ) -> tuple[Moments, Moments]:
        """The two densities of x_s in the ratio of a k."""
        return new[k], old[k]

    def log_ratio(self, x_s: Tensor, new: Moments, old: Moments) -> Tensor:
        """log p_new - log p_old."""
        return self.log_prob(x_s, *new) - self.log_prob(x_s, *old)

    def bounded(self, ratio: Tensor, clip: float) -> Tensor:
        """The clipped ratio."""
        return ratio.clamp(1 - clip, 1 + clip)

    def surrogate(self, log_ratio: Tensor, A: Tensor, clip: float) -> Tensor:
        """PPO's term of each member."""
        ratio = log_ratio.exp()
        return torch.minimum(ratio * A, self.bounded(ratio, clip) * A)

    def term(
        self, k: int, x_s: Tensor, new: Moments, old: Moments, A: Tensor, clip: float
    ) -> Tensor:
        """What a k adds to each member, before its weight."""
        return self.surrogate(self.log_ratio(x_s, new, old), A, clip)

    def total(self, members: Tensor) -> Tensor:
        """What is made of all members."""
        return members.mean()

    def objective(
        self,
        velocity: Velocity,
        velocity_old: Velocity,
        steps: Steps,
        A: Tensor,
        factors: tuple[int, ...],
        clip: float,
    ) -> Tensor:
        """J, to be ascended."""
        ks = (1, *factors)
        new = self.policy(velocity, steps, ks)
        old = self.old_policy(velocity_old, steps, ks)
        J = torch.zeros_like(A)
        for k in ks:
            term = self.term(k, steps.x_s, *self.scored(k, new, old), A, clip)
            J = J + self.weight(k, factors) * term
        return self.total(J)

    def loss(self, velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
        """One group, to be descended."""
        A = self.advantages(rewards[None])[0]
        steps = Steps(x_t, x_s, t, s, kernel, eta)
        return -self.objective(velocity, velocity_old, steps, A, factors, clip)

    def grouped(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        """Advantages of several groups, whose rows are in any order."""
        order = prompt.argsort(stable=True)
        groups = rewards[order].reshape(len(prompt.unique()), -1)
        return self.advantages(groups).flatten()[order.argsort()]

    def old_prompt(self, prompt: Tensor) -> Tensor:
        """The prompts that the old policy is asked for."""
        return prompt

    def loss_of_prompts(
        self, velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip, prompt
    ):
        """Several groups, one of each prompt."""
        new, old = of_prompts(velocity, prompt), of_prompts(velocity_old, self.old_prompt(prompt))
        steps = Steps(x_t, x_s, t, s, kernel, eta)
        return -self.objective(new, old, steps, self.grouped(rewards, prompt), factors, clip)

    def divergence(self, mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
        """KL of two Gaussians of one std, [B]."""
        return self.reduce((mean - other).square() / (2 * column(std, mean).square()))

    def kl_std(self, std: Tensor, D: Tensor) -> Tensor:
        """The std in the KL."""
        return std

    def reference(self, velocity_ref: Velocity, velocity_old: Velocity) -> Velocity:
        """Whom the KL keeps close to."""
        return velocity_ref

    def loss_with_kl(
        self,
        velocity,
        velocity_old,
        x_t,
        x_s,
        t,
        s,
        rewards,
        factors,
        kernel,
        eta,
        clip,
        kl,
        velocity_ref,
    ):
        """One group, held to a reference."""
        loss = self.loss(
            velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip
        )
        steps = Steps(x_t, x_s, t, s, kernel, eta)
        mean, std = self.policy(velocity, steps, (1,))[1]
        held_to = self.reference(velocity_ref, velocity_old)
        mean_ref, _ = self.old_policy(held_to, steps, (1,))[1]
        std = self.kl_std(std, rows(t, x_t) - rows(s, x_t))
        return loss + kl * self.divergence(mean, mean_ref, std).mean()


# ==== Faults: step ================================================================================


class FixedEta(Plain):
    """Has eta = 0.7 written into its kernels."""

    def coefficients(self, t, s, kernel, eta):
        return super().coefficients(t, s, kernel, 0.7)


class LastAxisMean(Plain):
    """Right for vectors; the other axes of a picture are summed."""

    def reduce(self, x):
        return x.mean(-1).flatten(1).sum(1) if x.ndim > 2 else x.mean(-1)


class InfinityToNumber(Plain):
    """At t = 1 takes the largest g that it thinks of."""

    def below_1(self, t, s):
        return t

    def squared_g(self, t, s, kernel, eta):
        return super().squared_g(t, s, kernel, eta).nan_to_num(posinf=100.0)


class NeverQuiteData(Plain):
    """Stops short of s = 0."""

    def coefficients(self, t, s, kernel, eta):
        return super().coefficients(t, s.clamp(min=1e-3), kernel, eta)


class GuardedDivision(Plain):
    """Divides by max(t, 0.1) where it should by t."""

    def sde(self, t, s, kernel, eta):
        D = t - s
        g2 = self.squared_g(t, s, kernel, eta)
        half = g2 * D / (2 * t.clamp(min=0.1))
        return 1 - half, -D - half * (1 - t), (g2 * D).sqrt()


class HalfPrecisionMean(Plain):
    """Rounds the mean to bfloat16."""

    def moments(self, x, v, t, s, kernel, eta):
        mean, std = super().moments(x, v, t, s, kernel, eta)
        return mean.bfloat16().to(mean.dtype), std


class DrawnWithG(Plain):
    """Scores with std, and draws with g."""

    def drawn(self, mean, std, D):
        return super().drawn(mean, std / D.sqrt(), D)


class UniformNoise(Plain):
    """Of mean 0 and variance 1."""

    def noise(self, like):
        return (2 * torch.rand_like(like) - 1) * 3**0.5


class SharedNoise(Plain):
    """One draw for all rows."""

    def noise(self, like):
        return torch.randn_like(like[:1]).expand_as(like)


class HalfGradient(Plain):
    """Has the right value, and half the gradient."""

    def log_prob(self, x_s, mean, std):
        full = super().log_prob(x_s, mean, std)
        return (full + full.detach()) / 2


class LiveSample(Plain):
    """A drawn x_s follows its mean, and its log-probability has no gradient."""

    def drawn(self, mean, std, D):
        return mean + column(std, mean) * self.noise(mean)


class HalfPrecisionScore(Plain):
    """Has squares added up in float16."""

    def log_prob(self, x_s, mean, std):
        return super().log_prob(x_s, mean, std).half().to(mean.dtype)


class DeadScore(Plain):
    """Lets the gradient through the drift alone, and not through the score."""

    def moments(self, x, v, t, s, kernel, eta):
        mean, std = super().moments(x, v.detach(), t, s, kernel, eta)
        return mean - column(t - s, x) * (v - v.detach()), std


class WrongEnd(Plain):
    """Predicts the noise at the end of the step with the time of its end."""

    def cps(self, t, s, eta):
        a, _, std = super().cps(t, s, eta)
        return a, -(1 - s) * t + s * math.cos(eta * math.pi / 2) * (1 - s), std


class OneKernel(Plain):
    """Takes flow_sde's step for every kernel."""

    def coefficients(self, t, s, kernel, eta):
        return super().coefficients(t, s, "flow_sde", eta)


class Annealed(Plain):
    """Is a little less stochastic with every call."""

    calls = 0

    def coefficients(self, t, s, kernel, eta):
        self.calls += 1
        return super().coefficients(t, s, kernel, eta * 0.99**self.calls)


def step_that_returns_x_t(v, x_t, t, s, eta, x_s=None, kernel="flow_sde"):
    """Returns where a given x_s came from in its place."""
    drawn, *rest = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return drawn if x_s is None else x_t.clone(), *rest


def step_with_one_noise(v, x_t, t, s, eta, x_s=None, kernel="flow_sde"):
    """Draws the same noise in every call."""
    if x_s is None:
        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype)
        _, _, mean, std = Plain().step(v, x_t, t, s, eta, kernel, x_t)
        x_s = (mean + column(std, mean) * z).detach()
    return Plain().step(v, x_t, t, s, eta, kernel, x_s)


def step_without_mean_when_drawing(v, x_t, t, s, eta, x_s=None, kernel="flow_sde"):
    """Returns zeros for the mean where it draws."""
    drawn, log_prob, mean, std = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return drawn, log_prob, mean * 0 if x_s is None else mean, std


def step_still_at_the_start(v, x_t, t, s, eta, x_s=None, kernel="flow_sde"):
    """Does not move where it draws from t = 1."""
    if x_s is None and t == 1:
        x_s = x_t.clone()
    return Plain().step(v, x_t, t, s, eta, kernel, x_s)


def nameless_step_lost_at_the_end(v, x_t, t, s, eta, x_s=None):
    """Has one kernel, and no mean at s = 0."""
    drawn, log_prob, mean, std = Plain().step(v, x_t, t, s, eta, "dance", x_s)
    return drawn, log_prob, mean * 0 if s == 0 else mean, std


def deaf_step(v, x_t, t, s, eta, x_s=None, kernel="dance"):
    """Takes its default for every kernel."""
    return Plain().step(v, x_t, t, s, eta, "dance", x_s)


def jittery_step(v, x_t, t, s, eta, x_s=None, kernel="cps"):
    """Scores with a little noise."""
    drawn, log_prob, mean, std = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return drawn, log_prob * (1 + 1e-7 * torch.randn_like(log_prob)), mean, std


STEP_FAULTS = [
    Fault("x_t for x_s", "step", step_that_returns_x_t),
    Fault("one noise for all calls", "step", step_with_one_noise),
    Fault("no mean when drawing", "step", step_without_mean_when_drawing),
    Fault("still at t = 1 when drawing", "step", step_still_at_the_start),
    Fault("no kernel named, lost at s = 0", "step", nameless_step_lost_at_the_end, r"s = 0\b"),
    Fault("deaf to the kernel", "step", deaf_step, "flow_sde"),
    Fault("random score", "step", jittery_step),
    Fault("eta is 0.7", "step", FixedEta().step),
    Fault("mean over the last axis only", "step", LastAxisMean().step, r"ax[ie]s"),
    Fault("infinite g made a number", "step", InfinityToNumber().step, r"t = 1\b"),
    Fault("s above 0", "step", NeverQuiteData().step, r"s = 0\b"),
    Fault("small t guarded", "step", GuardedDivision().step, r"\bt\b"),
    Fault("bfloat16 mean", "step", HalfPrecisionMean().step),
    Fault("drawn with g", "step", DrawnWithG().step),
    Fault("uniform noise", "step", UniformNoise().step),
    Fault("one noise for all rows", "step", SharedNoise().step),
    Fault("half the gradient", "step", HalfGradient().step),
    Fault("scored in float16", "step", HalfPrecisionScore().step),
    Fault("no gradient through the score", "step", DeadScore().step),
    Fault("cps: noise predicted with s", "step", WrongEnd().step, "cps"),
    Fault("one kernel for all", "step", OneKernel().step, "cps|dance"),
    Fault("eta falls with every call", "step", Annealed().step),
]


# ==== Faults: transition ==========================================================================


class ThirdStale(Plain):
    """Asks for v_2 of k = 3 at the time of v_1."""

    def time(self, t, d, j, k):
        return t - d if k == 3 else t - j * d


class AtMostFive(Plain):
    """Takes no more than five sub-steps, and leaves the rest of the way out."""

    def chain(self, x, velocity, t, s, k):
        d = self.substep(t, s, k)
        v = velocity(x, t)
        for j in range(1, min(k, 5)):
            x = self.euler(x, v, d)
            v = velocity(x, self.time(t, d, j, k))
        return x, v


class LastTimeLate(Plain):
    """Asks for the last velocity a sub-step too early."""

    def time(self, t, d, j, k):
        return t - (j - 1) * d if j == k - 1 else t - j * d


class SubstepOfEnd(Plain):
    """Divides s by k where D is to be divided."""

    def substep(self, t, s, k):
        return (t - s) / k if k == 1 else s / k


class FivePointGrid(Plain):
    """Knows that a step is 1/4 long."""

    def substep(self, t, s, k):
        return torch.full_like(t, 0.25 / k)


class AlwaysCoarse(Plain):
    """Takes the whole step for every k."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        return super().transition(x, velocity, t, s, 1, kernel, eta)


class NeverAskedAtOne(Plain):
    """Asks the velocity at t <= 0.999."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        def guarded(x, t):
            return velocity(x, t.clamp(max=0.999))

        return super().transition(x, guarded, t, s, k, kernel, eta)


class FirstStepApart(Plain):
    """Takes t_1 for the time of the last sub-step of a step from t = 1."""

    from_1 = False

    def transition(self, x, velocity, t, s, k, kernel, eta):
        self.from_1 = t == 1
        return super().transition(x, velocity, t, s, k, kernel, eta)

    def below_1(self, t, s):
        return s if self.from_1 else t


class RootOfK(Plain):
    """Takes c_1 / sqrt(k) for c_k: right for dance alone."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        mean, _ = super().transition(x, velocity, t, s, k, kernel, eta)
        _, _, coarse = self.coefficients(rows(t, x), rows(s, x), kernel, eta)
        return mean, coarse / k**0.5


class Heun(Plain):
    """Takes sub-steps of second order."""

    def chain(self, x, velocity, t, s, k):
        d = self.substep(t, s, k)
        v = velocity(x, t)
        for j in range(1, k):
            ahead = velocity(self.euler(x, v, d), t - j * d)
            x = self.euler(x, (v + ahead) / 2, d)
            v = velocity(x, t - j * d)
        return x, v


class InPlace(Plain):
    """Moves the caller's x."""

    def euler(self, x, v, d):
        return x.sub_(column(d, x) * v)


class FirstStdKept(Plain):
    """Computes std once for every k."""

    def __init__(self):
        self.kept = {}

    def transition(self, x, velocity, t, s, k, kernel, eta):
        mean, std = super().transition(x, velocity, t, s, k, kernel, eta)
        return mean, torch.full_like(std, self.kept.setdefault(k, std[0].item()))


TRANSITION_FAULTS = [
    Fault("third velocity late", "transition", ThirdStale().transition, r"k = 3\b"),
    Fault("five sub-steps at most", "transition", AtMostFive().transition, r"k = 6\b"),
    Fault("last time off by one", "transition", LastTimeLate().transition, r"\bk\b"),
    Fault("sub-step of s", "transition", SubstepOfEnd().transition, r"\bk\b"),
    Fault("grid of five points", "transition", FivePointGrid().transition, r"\bk\b"),
    Fault("k ignored", "transition", AlwaysCoarse().transition, r"\bk\b"),
    Fault("velocity not asked at 1", "transition", NeverAskedAtOne().transition, r"t = 1\b"),
    Fault("t_1 in sub-steps", "transition", FirstStepApart().transition, r"t = 1\b"),
    Fault("std by the root of k", "transition", RootOfK().transition, r"\bk\b|flow_sde|cps"),
    Fault("Heun for Euler", "transition", Heun().transition, r"\bk\b"),
    Fault("x moved in place", "transition", InPlace().transition),
    Fault("std kept from the first call", "transition", FirstStdKept().transition),
]


# ==== Faults: log_prob ============================================================================


class FirstStd(Plain):
    """Takes the first row's std for all rows."""

    def log_prob(self, x_s, mean, std):
        return super().log_prob(x_s, mean, std[:1].expand_as(std))


class ThreeDimensions(Plain):
    """A mean, for whom it has three numbers."""

    def reduce(self, x):
        return x.flatten(1).sum(1) / 3


class FirstChannel(Plain):
    """Scores the first channel of a picture."""

    def reduce(self, x):
        return x.flatten(1).mean(1) if x.ndim == 2 else x[:, 0].flatten(1).mean(1)


class HalfPrecisionSum(Plain):
    """Adds up in float16."""

    def reduce(self, x):
        return x.half().flatten(1).mean(1).to(x.dtype)


class ConstantsOnce(Plain):
    """Sums squares over dimensions, and subtracts log std and log(2 pi)/2 once."""

    def log_prob(self, x_s, mean, std):
        z = (x_s - mean) / column(std, mean)
        return -z.square().flatten(1).sum(1) / 2 - std.log() - math.log(2 * math.pi) / 2


LOG_PROB_FAULTS = [
    Fault("std of the first row", "log_prob", FirstStd().log_prob),
    Fault("three dimensions", "log_prob", ThreeDimensions().log_prob),
    Fault("first channel only", "log_prob", FirstChannel().log_prob, r"ax[ie]s"),
    Fault("float16 accumulation", "log_prob", HalfPrecisionSum().log_prob),
    Fault("constants of one dimension", "log_prob", ConstantsOnce().log_prob),
]


# ==== Faults: advantages ==========================================================================


class Median(Plain):
    """Centres by the median."""

    def centre(self, rewards):
        return rewards.median(-1, keepdim=True).values


class Range(Plain):
    """Divides by the largest reward less the smallest."""

    def scale(self, rewards):
        return rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) + 1e-8


class StdOfSizes(Plain):
    """Divides by the std of |r|: right for rewards of one sign."""

    def scale(self, rewards):
        return rewards.abs().std(-1, keepdim=True) + 1e-8


class ClampedAbove(Plain):
    """Clamps good luck at 3, and bad luck nowhere."""

    def clamp(self, A):
        return A.clamp(max=3)


class NoSilentGroups(Plain):
    """Divides zero by zero in a group of equal rewards."""

    def advantages(self, rewards):
        return self.clamp((rewards - self.centre(rewards)) / rewards.std(-1, keepdim=True))


class NeighboursStd(Plain):
    """Divides by the std of the group before."""

    def scale(self, rewards):
        return super().scale(rewards).roll(1, 0)


class LeaveOneOut(Plain):
    """Centres by the mean of the others, and divides by the std of all."""

    def advantages(self, rewards):
        G = rewards.shape[-1]
        return self.clamp(super().advantages(rewards) * G / (G - 1))


class RunningStd(Plain):
    """Divides by the std of all rewards that it has ever seen."""

    def __init__(self):
        self.seen = []

    def scale(self, rewards):
        self.seen.append(rewards.flatten())
        return torch.cat(self.seen).std() + 1e-8


ADVANTAGES_FAULTS = [
    Fault("centred by the median", "advantages", Median().advantages),
    Fault("divided by the range", "advantages", Range().advantages),
    Fault("std of |r|", "advantages", StdOfSizes().advantages),
    Fault("clamped above only", "advantages", ClampedAbove().advantages),
    Fault("0/0 for equal rewards", "advantages", NoSilentGroups().advantages, "equal"),
    Fault("std of another group", "advantages", NeighboursStd().advantages),
    Fault("mean of the others", "advantages", LeaveOneOut().advantages),
    Fault("std of all calls", "advantages", RunningStd().advantages),
]


# ==== Faults: loss ================================================================================


class WeightHalf(Plain):
    """Gives k-terms the weight of two factors."""

    def weight(self, k, factors):
        return 1.0 if k == 1 else 0.5


class OneMoreFactor(Plain):
    """Counts k = 1 among the factors, and still gives it weight 1."""

    def weight(self, k, factors):
        return 1.0 if k == 1 else 1 / (len(factors) + 1)


class FirstFactor(Plain):
    """Has k-terms of the first factor alone."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        return super().objective(velocity, velocity_old, steps, A, factors[:1], clip)


class NoFactors(Plain):
    """Has no k-terms."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        return super().objective(velocity, velocity_old, steps, A, (), clip)


class InvertedForLosers(Plain):
    """Turns the ratio over where A < 0."""

    def surrogate(self, log_ratio, A, clip):
        return super().surrogate(torch.where(A < 0, -log_ratio, log_ratio), A, clip)


class ClippedTooSoon(Plain):
    """Clips the log-ratio by the bounds of the ratio."""

    def surrogate(self, log_ratio, A, clip):
        bounded = self.bounded(log_ratio, clip).exp()
        return torch.minimum(log_ratio.exp() * A, bounded * A)


class OnlyCoarseClipped(Plain):
    """Never clips a k-term."""

    def term(self, k, x_s, new, old, A, clip):
        return super().term(k, x_s, new, old, A, clip if k == 1 else 1e9)


class FineRatiosOne(Plain):
    """Takes the new policy for the old in every k-term."""

    def scored(self, k, new, old):
        mean, std = new[k]
        return new[k], old[k] if k == 1 else (mean.detach(), std)


class OldUnderCoarseStd(Plain):
    """Gives the old density of a k-term the std of the whole step."""

    def scored(self, k, new, old):
        return new[k], (old[k][0], old[1][1])


class LastVelocityCut(Plain):
    """In a k-term the gradient goes through the Euler sub-steps alone."""

    def chain(self, x, velocity, t, s, k):
        x, v = super().chain(x, velocity, t, s, k)
        return x, v if k == 1 else v.detach()


class NoRatio(Plain):
    """Weighs the log-probability, as REINFORCE does, after an update as well."""

    def term(self, k, x_s, new, old, A, clip):
        return self.log_prob(x_s, *new) * A


class MinOfMeans(Plain):
    """Takes the lower of two means over the group, not the mean of what is lower."""

    def surrogate(self, log_ratio, A, clip):
        ratio = log_ratio.exp()
        free, bounded = (ratio * A).mean(), (self.bounded(ratio, clip) * A).mean()
        return torch.minimum(free, bounded).expand_as(A)


class OneRatioForAll(Plain):
    """Adds log-ratios of all k, and takes one surrogate of the sum."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        ks = (1, *factors)
        new = self.policy(velocity, steps, ks)
        old = self.old_policy(velocity_old, steps, ks)
        joint = torch.zeros_like(A)
        for k in ks:
            joint = joint + self.weight(k, factors) * self.log_ratio(steps.x_s, new[k], old[k])
        return self.total(self.surrogate(joint, A, clip))


class Summed(Plain):
    """Adds members up."""

    def total(self, members):
        return members.sum()


class KLByStd(Plain):
    """Divides by std where std^2 is due."""

    def kl_std(self, std, D):
        return std.sqrt()


class KLToOld(Plain):
    """Holds to the policy that sampled, and forgets the reference."""

    def reference(self, velocity_ref, velocity_old):
        return velocity_old


class KLWithoutHalf(Plain):
    """Forgets the half of the KL."""

    def divergence(self, mean, other, std):
        return 2 * super().divergence(mean, other, std)


class OldPromptsTurned(Plain):
    """Asks the old policy for the prompts of the rows in the opposite order."""

    def old_prompt(self, prompt):
        return prompt.flip(0)


class OneGroup(Plain):
    """Takes rows of all prompts for one group."""

    def grouped(self, rewards, prompt):
        return self.advantages(rewards[None])[0]


class OldKept(Plain):
    """Computes the old policy once for each k and shape."""

    def __init__(self):
        self.kept = {}

    def old_policy(self, velocity, steps, ks):
        old = super().old_policy(velocity, steps, ks)
        return {k: self.kept.setdefault((k, steps.x_t.shape), old[k]) for k in ks}


OF_FACTORS = r"\bS\b|\bk\b|factors"

LOSS_FAULTS = [
    Fault("weight 1/2", "loss", WeightHalf().loss, OF_FACTORS),
    Fault("weight 1/(|S| + 1)", "loss", OneMoreFactor().loss, OF_FACTORS),
    Fault("first factor only", "loss", FirstFactor().loss, OF_FACTORS),
    Fault("factors ignored", "loss", NoFactors().loss, OF_FACTORS),
    Fault("inverted where A < 0", "loss", InvertedForLosers().loss),
    Fault("log-ratio clipped by 1 +- clip", "loss", ClippedTooSoon().loss),
    Fault("k-terms not clipped", "loss", OnlyCoarseClipped().loss, OF_FACTORS),
    Fault("ratios of k-terms 1", "loss", FineRatiosOne().loss, OF_FACTORS),
    Fault(
        "old k-terms under the coarse std",
        "loss",
        OldUnderCoarseStd().loss,
        OF_FACTORS + "|flow_sde|dance",
    ),
    Fault("last velocity cut", "loss", LastVelocityCut().loss, OF_FACTORS),
    Fault("log-probability for ratio", "loss", NoRatio().loss),
    Fault("lower of two means", "loss", MinOfMeans().loss),
    Fault("one ratio for all k", "loss", OneRatioForAll().loss, OF_FACTORS),
    Fault("sum over the group", "loss", Summed().loss),
    Fault("KL by std", "loss", KLByStd().loss_with_kl),
    Fault("KL to the old policy", "loss", KLToOld().loss_with_kl),
    Fault("KL without the half", "loss", KLWithoutHalf().loss_with_kl),
    Fault("prompts of old turned", "loss", OldPromptsTurned().loss_of_prompts),
    Fault("one group of all prompts", "loss", OneGroup().loss_of_prompts),
    Fault("old policy kept from the first call", "loss", OldKept().loss),
]


FAULTS = [
    *STEP_FAULTS,
    *TRANSITION_FAULTS,
    *LOG_PROB_FAULTS,
    *ADVANTAGES_FAULTS,
    *LOSS_FAULTS,
]


# ==== Variants: step ==============================================================================


class Summing(Plain):
    """Sums over dimensions."""

    def reduce(self, x):
        return x.flatten(1).sum(1)


class NoConstants(Plain):
    """Keeps the square alone."""

    def log_prob(self, x_s, mean, std):
        z = (x_s - mean) / column(std, mean)
        return -self.reduce(z.square()) / 2


class SummingNoConstants(Summing, NoConstants):
    """Both."""


class BareSquare(Plain):
    """Flow-CPS's log-probability."""

    def log_prob(self, x_s, mean, std):
        return -self.reduce((x_s - mean).square())


class OnlyCps(Plain):
    """Has one kernel."""

    def coefficients(self, t, s, kernel, eta):
        if kernel != "cps":
            raise NotImplementedError(f"kernel {kernel}")
        return super().coefficients(t, s, kernel, eta)


class BareCps(OnlyCps, BareSquare):
    """Flow-CPS."""


class ByParts(Plain):
    """An Euler-Maruyama step as a drift, and cps as a walk between the ends."""

    def moments(self, x, v, t, s, kernel, eta):
        if kernel == "cps":
            level = column(s * math.cos(eta * math.pi / 2), x)
            noise = x + column(1 - t, x) * v
            mean = column(1 - s, x) * (noise - v) + level * noise
            return mean, s * math.sqrt(1 - math.cos(eta * math.pi / 2) ** 2)
        g2 = self.squared_g(t, s, kernel, eta)
        score = -(x + column(1 - t, x) * v) / column(t, x)
        drift = v - column(g2 / 2, x) * score
        return x + column(s - t, x) * drift, g2.sqrt() * (t - s).sqrt()


def float32_step(v, x_t, t, s, eta, kernel, x_s=None):
    """All tensors in float32."""
    x_s = None if x_s is None else x_s.float()
    x_s, log_prob, mean, std = Plain().step(v.float(), x_t.float(), t, s, eta, kernel, x_s)
    return x_s, log_prob.float(), mean, std.float()


def step_with_g(v, x_t, t, s, eta, kernel, x_s=None):
    """Returns g, shaped like x."""
    x_s, log_prob, mean, std = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return x_s, log_prob, mean, column(std / (rows(t, x_t) - rows(s, x_t)).sqrt(), x_t)


def step_with_number(v, x_t, t, s, eta, kernel, x_s=None):
    """Returns std as a number, and log-probabilities summed, without constants."""
    x_s, log_prob, mean, std = SummingNoConstants().step(v, x_t, t, s, eta, kernel, x_s)
    return x_s, log_prob, mean, std[0]


def step_without_moments(v, x_t, t, s, eta, kernel, x_s=None):
    """Returns x_s and a column of log-probabilities."""
    x_s, log_prob, _, _ = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return x_s, log_prob[:, None]


def step_without_std(v, x_t, t, s, eta, kernel, x_s=None):
    """Returns no std."""
    return Plain().step(v, x_t, t, s, eta, kernel, x_s)[:3]


def step_without_mean(v, x_t, t, s, eta, kernel, x_s=None):
    """Returns None for the mean, and a column of std."""
    x_s, log_prob, _, std = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return x_s, log_prob, None, std[:, None]


def step_of_flow_sde(v, x_t, t, s, eta, x_s=None):
    """Has one kernel, and leaves t = 1 to others."""
    if t == 1:
        raise ValueError("t = 1")
    return Plain().step(v, x_t, t, s, eta, "flow_sde", x_s)


def step_of_pictures(v, x_t, t, s, eta, kernel, x_s=None):
    """Wants t and s as tensors, and B, C, H, W."""
    B, _, _, _ = x_t.shape
    t, s = t.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    a, b, std = Plain().coefficients(t, s, kernel, eta)
    mean = a * x_t + b * v
    if x_s is None:
        x_s = (mean + std * torch.randn_like(mean)).detach()
    log_prob = Normal(mean, std).log_prob(x_s).mean(dim=(1, 2, 3))
    return x_s.clone(), log_prob, mean, std.expand(B, 1, 1, 1)


@torch.no_grad()
def step_of_rows(v, x_t, t, s, eta, kernel, x_s=None):
    """Wants a time for each row, and has no gradient."""
    if t.shape != (len(x_t),) or s.shape != (len(x_t),):
        raise ValueError("t and s: must be [B]")
    return Plain().step(v, x_t, t, s, eta, kernel, x_s)


USUAL = {"mean or sum": "mean", "constants": "kept", "precision": "float64"}
NAMED_G = r"(^|\W)g\b"


def step_with_whole_std(v, x_t, t, s, eta, x_s=None, kernel="cps"):
    """Has a std for every number, and numpy where it is allowed."""
    if kernel == "cps":
        v = torch.from_numpy(v.numpy())
    drawn, log_prob, mean, std = Plain().step(v, x_t, t, s, eta, kernel, x_s)
    return drawn, log_prob, mean, column(std, mean).expand_as(mean)


STEP_VARIANTS = [
    Variant("step with a whole std, numpy inside", "step", step_with_whole_std, USUAL),
    Variant("plain step", "step", Plain().step, USUAL | {"g or std": "std"}),
    Variant("step by drift and by ends", "step", ByParts().step, USUAL),
    Variant("float32 step", "step", float32_step, {"precision": "float32"}),
    Variant("step with g, like x", "step", step_with_g, USUAL | {"g or std": NAMED_G}),
    Variant(
        "step with a number for std, summed, no constants",
        "step",
        step_with_number,
        {"mean or sum": "sum", "constants": "dropped"},
    ),
    Variant("step without mean and std", "step", step_without_moments, USUAL),
    Variant("step without std", "step", step_without_std, USUAL),
    Variant("step with a column of std", "step", step_without_mean, USUAL | {"g or std": "std"}),
    Variant("Flow-CPS's step", "step", BareCps().step, {"1/(2 std^2)": "dropped"}, (r"cps only",)),
    Variant("step of one kernel", "step", step_of_flow_sde, USUAL, (r"all but at t = 1",)),
    Variant("step of pictures", "step", step_of_pictures, USUAL, (r"3 axes",)),
    Variant("step of rows, no gradient", "step", step_of_rows, USUAL),
]


# ==== Variants: transition ========================================================================


class Ensemble(Plain):
    """A weighted sum of k velocities."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        t, s = float(t), float(s)
        d = (t - s) / k
        begin, end = rows(s + d if k > 1 else t, x), rows(s, x)
        a, b, std = self.coefficients(begin, end, kernel, eta)
        velocities = [velocity(x, rows(t, x))]
        for j in range(1, k):
            velocities.append(velocity(x - d * sum(velocities), rows(t - j * d, x)))
        mean = column(a, x) * (x - d * sum(velocities[:-1])) + column(b, x) * velocities[-1]
        return mean, std[0].item()


class OneOrTwo(Plain):
    """Has the released factors 1 and 2 in a table."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        k = {1: 1, 2: 2}[k]
        return super().transition(x, velocity, t, s, k, kernel, eta)


class CpsWithG(OnlyCps):
    """Flow-CPS, whose caller multiplies by sqrt(D)."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        mean, std = super().transition(x, velocity, t, s, k, kernel, eta)
        return mean, std / ((t - s) / k) ** 0.5


TRANSITION_VARIANTS = [
    Variant("plain transition", "transition", Plain().transition, {"g or std": "std"}),
    Variant("ensemble of velocities", "transition", Ensemble().transition, {"g or std": "std"}),
    Variant("k = 1 and 2", "transition", OneOrTwo().transition, {}, (r"k in \{1, 2\} only",)),
    Variant(
        "cps with g", "transition", CpsWithG().transition, {"g or std": NAMED_G}, ("cps only",)
    ),
    Variant("transition of prompts", "transition", Plain().transition_of_prompts),
]


# ==== Variants: log_prob ==========================================================================


def float32_log_prob(x_s, mean, std):
    """In float32, with log std, without log(2 pi)/2."""
    z = (x_s - mean).float() / column(std, mean).float()
    return -z.square().flatten(1).mean(1) / 2 - std.float().log()


LOG_PROB_VARIANTS = [
    Variant("plain log_prob", "log_prob", Plain().log_prob, USUAL),
    Variant("summed log_prob", "log_prob", Summing().log_prob, {"mean or sum": "sum"}),
    Variant(
        "float32 log_prob without log(2 pi)",
        "log_prob",
        float32_log_prob,
        {"mean or sum": "mean", "constants": "dropped", "precision": "float32"},
    ),
    Variant("bare square", "log_prob", BareSquare().log_prob, {"1/(2 std^2)": "dropped"}),
]


# ==== Variants: advantages ========================================================================


class Unclamped(Plain):
    """Clamps nothing."""

    def clamp(self, A):
        return A


class Ddof0(Unclamped):
    """Divides by std + 1e-4, of the group as a population."""

    def scale(self, rewards):
        return rewards.std(-1, correction=0, keepdim=True) + 1e-4


class Floored(Plain):
    """Divides by max(std, 1e-6), and clamps at 3."""

    def scale(self, rewards):
        return rewards.std(-1, keepdim=True).clamp(min=1e-6)

    def clamp(self, A):
        return A.clamp(-3, 3)


class EpsInRoot(Plain):
    """Divides by sqrt(var + 1e-4)."""

    def scale(self, rewards):
        return (rewards.var(-1, keepdim=True) + 1e-4).sqrt()


class DrGRPO(Unclamped):
    """Divides by nothing."""

    def scale(self, rewards):
        return torch.ones_like(rewards)


class BatchStd(Plain):
    """Divides by the std of all rewards."""

    def scale(self, rewards):
        return rewards.std() + 1e-8


ADVANTAGES_VARIANTS = [
    Variant(
        "plain advantages", "advantages", Plain().advantages, {"std": "ddof 1", "clamp": r"\b5"}
    ),
    Variant(
        "ddof 0, eps 1e-4, no clamp",
        "advantages",
        Ddof0().advantages,
        {"std": "ddof 0", "eps": r"std \+ eps", "clamp": "(?i)no|observ"},
    ),
    Variant(
        "max(std, 1e-6), clamp 3",
        "advantages",
        Floored().advantages,
        {"std": "ddof 1", "clamp": r"\b3"},
    ),
    Variant("eps in the root", "advantages", EpsInRoot().advantages, {"eps": "root|sqrt"}),
    Variant("Dr.GRPO", "advantages", DrGRPO().advantages, {"std": "none"}),
    Variant("std of the batch", "advantages", BatchStd().advantages, {"std": "whole batch"}),
]


# ==== Variants: loss ==============================================================================


class SummingDdof0(Summing, Ddof0):
    """Another usual set of conventions."""


class HigherAbove(Plain):
    """Clips twice as far from 1 above as below."""

    def bounded(self, ratio, clip):
        return ratio.clamp(1 - clip, 1 + 2 * clip)


class FixedClip(Plain):
    """Has its own bounds."""

    def bounded(self, ratio, clip):
        return ratio.clamp(1 - 0.02, 1 + 0.028)


class NoClip(Plain):
    """Never clips."""

    def bounded(self, ratio, clip):
        return ratio


class Guard(Plain):
    """GRPO-Guard's ratio, centred and of one width at all steps."""

    def log_ratio(self, x_s, new, old):
        distance = self.divergence(new[0], old[0], new[1])
        return new[1] * (super().log_ratio(x_s, new, old) + distance)


class GuardByStep(Guard):
    """The same with its loss divided by D."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        A = A / (rows(steps.t, A) - rows(steps.s, A))
        return super().objective(velocity, velocity_old, steps, A, factors, clip)


class DivergenceMask(Plain):
    """Flow-DPPO: drops a member that is far and moves further, and clips nothing."""

    threshold = 0.01

    def term(self, k, x_s, new, old, A, clip):
        ratio = self.log_ratio(x_s, new, old).exp()
        far = self.divergence(new[0], old[0], new[1]) >= self.threshold
        further = ((ratio > 1) & (A > 0)) | ((ratio < 1) & (A < 0))
        return torch.where(far & further, 0, ratio * A)


class EvenGradients(Plain):
    """Divides k-terms by (c_1/c_k)^2, the scale of their gradients."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        self.stds = {k: std for k, (_, std) in self.policy(velocity, steps, (1, *factors)).items()}
        return super().objective(velocity, velocity_old, steps, A, factors, clip)

    def term(self, k, x_s, new, old, A, clip):
        scale = (self.stds[1] / self.stds[k]).square()
        return super().term(k, x_s, new, old, A, clip) / scale


class Matched(Plain):
    """Scores under what moves with a k from the density that sampled."""

    def scored(self, k, new, old):
        if k == 1:
            return new[1], old[1]
        centre, std = old[1]
        return (centre + new[k][0] - old[k][0], std), (centre, std)


class OnPolicy(Plain):
    """exp(lp - lp.detach()), as released."""

    def log_ratio(self, x_s, new, old):
        log_prob = self.log_prob(x_s, *new)
        return log_prob - log_prob.detach()


class NoDecomposition(Plain):
    """Flow-GRPO."""

    def objective(self, velocity, velocity_old, steps, A, factors, clip):
        if factors:
            raise ValueError(f"factors {factors}")
        return super().objective(velocity, velocity_old, steps, A, factors, clip)


AS_USUAL = {"clip": "as given", "form": "paper", "ratio": "plain", "weights": r"1/\|S\|"}

LOSS_VARIANTS = [
    Variant("plain loss", "loss", Plain().loss, AS_USUAL | {"mean or sum": "mean"}),
    Variant("plain loss of prompts", "loss", Plain().loss_of_prompts, {"clip": "as given"}),
    Variant("plain loss with KL", "loss", Plain().loss_with_kl, {"clip": "as given"}),
    Variant(
        "summed loss, ddof 0", "loss", SummingDdof0().loss, {"mean or sum": "sum", "std": "ddof 0"}
    ),
    Variant("clip higher", "loss", HigherAbove().loss, {"clip": "from 1 - "}),
    Variant("clip of its own", "loss", FixedClip().loss, {"clip": r"from 1 - 0\.02"}),
    Variant("loss without clip", "loss", NoClip().loss, {"clip": "none"}),
    Variant("GRPO-Guard", "loss", Guard().loss, {"ratio": "Guard"}),
    Variant(
        "GRPO-Guard, divided by D",
        "loss",
        GuardByStep().loss,
        {"ratio": "Guard", "weight of a step": "1/D"},
    ),
    Variant("Flow-DPPO", "loss", DivergenceMask().loss, {"clip": "divergence mask"}),
    Variant("even gradients", "loss", EvenGradients().loss, {"weights": r"c_k ?/ ?c_1"}),
    Variant("matched", "loss", Matched().loss, {"form": "matched"}),
    Variant("on policy", "loss", OnPolicy().loss, {}, ("on policy only",)),
    Variant("Flow-GRPO", "loss", NoDecomposition().loss, {}, (r"S = \{\} only",)),
]

VARIANTS = [
    *STEP_VARIANTS,
    *TRANSITION_VARIANTS,
    *LOG_PROB_VARIANTS,
    *ADVANTAGES_VARIANTS,
    *LOSS_VARIANTS,
]


# ==== Unseen ======================================================================================


class ShortTails(Plain):
    """Draws no noise beyond 6."""

    def noise(self, like):
        return super().noise(like).clamp(-6, 6)


class AtMostSeven(Plain):
    """Takes seven sub-steps for eight."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        return super().transition(x, velocity, t, s, min(k, 7), kernel, eta)


class NoGradient(Plain):
    """Builds no graph."""

    @torch.no_grad()
    def transition(self, x, velocity, t, s, k, kernel, eta):
        return super().transition(x, velocity, t, s, k, kernel, eta)


class OnTheCPU(Plain):
    """Takes every model and state off its GPU."""

    def transition(self, x, velocity, t, s, k, kernel, eta):
        return super().transition(x.cpu(), velocity, t, s, k, kernel, eta)


class FlooredStd(Plain):
    """Divides by max(std, 1e-6)."""

    def log_prob(self, x_s, mean, std):
        return super().log_prob(x_s, mean, std.clamp(min=1e-6))


class OwnPrecision(Plain):
    """Adds up in the precision of what it is given."""

    def log_prob(self, x_s, mean, std):
        z = (x_s - mean) / column(std, mean)
        squares = z.square().flatten(1).sum(1, dtype=x_s.dtype) / x_s[0].numel()
        return -squares / 2 - std.log() - math.log(2 * math.pi) / 2


class BrokenRewardsHidden(Plain):
    """Takes a NaN for a reward of 0."""

    def advantages(self, rewards):
        return super().advantages(rewards.nan_to_num())


class FirstMembersCount(Plain):
    """Takes mean and std of the first 4096 members."""

    def centre(self, rewards):
        return super().centre(rewards[..., :4096])

    def scale(self, rewards):
        return super().scale(rewards[..., :4096])


class OldLearns(Plain):
    """Lets the gradient into the old policy too."""

    def old_policy(self, velocity, steps, ks):
        return self.policy(velocity, steps, ks)


class NoManySteps(Plain):
    """Drops factors above 7, and counts them in |S|."""

    def term(self, k, x_s, new, old, A, clip):
        return super().term(k, x_s, new, old, A, clip) * (k <= 7)


UNSEEN = [
    Unseen("drawn x_s not detached", "step", LiveSample().step, "a finding: it scores rightly"),
    Unseen("noise cut at 6 sigma", "step", ShortTails().step, "one draw in 5e8 is beyond"),
    Unseen("seven sub-steps at most", "transition", AtMostSeven().transition, "k is up to 7"),
    Unseen("no gradient", "transition", NoGradient().transition, "mean and std are numbers"),
    Unseen("state moved to the CPU", "transition", OnTheCPU().transition, "all is on the CPU"),
    Unseen("std at least 1e-6", "log_prob", FlooredStd().log_prob, "no std is that small"),
    Unseen("own precision", "log_prob", OwnPrecision().log_prob, "all is given in float64"),
    Unseen("NaN made 0", "advantages", BrokenRewardsHidden().advantages, "rewards are finite"),
    Unseen("first 4096 members", "advantages", FirstMembersCount().advantages, "groups are small"),
    Unseen("old policy learns", "loss", OldLearns().loss, "gradients are velocity's alone"),
    Unseen("factors above 7 dropped", "loss", NoManySteps().loss, "factors are up to 7"),
]
