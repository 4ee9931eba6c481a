"""Known ways to get Pave-GRPO wrong, as small patches of pave_grpo.py, and a few ways to write it that are right.

One table for two uses: verify_equivalence.py --against recognises the numbers that a bug produces, and
tests/planted_bugs.py plants each bug and asks whether the test suite notices. A bug is a replacement of text that
occurs exactly once. Its level is where it first shows: in a transition's mean and std, in a log-probability, in
advantages, in a loss, or in the sampler alone.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pave_grpo


class Patch(NamedTuple):
    """`old` -> `new` in the text of pave_grpo.py."""

    name: str
    level: str  # transition, log_prob, advantages, loss or sampler
    says: str  # completes "it ..."
    old: str
    new: str


_DENSE = (
    "transitions[k] = process.transition(chains.pop(k), velocities.pop(k), t - j * (t - s) / k, s)"
)
_TIMES = "times = [t - (j + 1) * (t - s) / k for k in chains]"
_EULER = "chains[k] = chains[k] - per_row((t - s) / k, x) * velocities[k]"
_OLD = "log_prob_old = old.log_probs[k] if old else log_probs[k].detach()"
_MATCHED = "p = Transition(means_old[1] + (p.mean - means_old[k]), transitions[1].std)"
_WEIGHTS = "1.0 if k == 1 else 1 / (len(ks) - 1) for k in ks"

BUGS = tuple(
    Patch(*row)
    for row in (
        # The decomposition.
        (
            "coarse std",
            "transition",
            "uses the coarse std for the fine step",
            _DENSE,
            _DENSE + "; transitions[k] = Transition(transitions[k].mean, transitions[1].std)",
        ),
        (
            "coarse coefficients",
            "transition",
            "takes the kernel's coefficients of the whole step for the last sub-step",
            "t - j * (t - s) / k, s)",
            "t, s)",
        ),
        (
            "first coefficients",
            "transition",
            "takes the kernel's coefficients of the first sub-step for the last",
            "t - j * (t - s) / k, s)",
            "t, t - (t - s) / k)",
        ),
        (
            "long Euler",
            "transition",
            "lets k-1 Euler sub-steps cover the whole step",
            "per_row((t - s) / k, x)",
            "per_row((t - s) / (k - 1), x)",
        ),
        (
            "whole Euler",
            "transition",
            "makes every Euler sub-step as long as the whole step",
            "per_row((t - s) / k, x)",
            "per_row(t - s, x)",
        ),
        (
            "Euler uphill",
            "transition",
            "takes Euler sub-steps towards the noise",
            _EULER,
            _EULER.replace(" - per_row", " + per_row"),
        ),
        (
            "stale time",
            "transition",
            "evaluates every velocity at the time the step began",
            _TIMES,
            "times = [t for k in chains]",
        ),
        (
            "time ahead",
            "transition",
            "evaluates velocities one sub-step too late",
            _TIMES,
            _TIMES.replace("j + 1", "j + 2"),
        ),
        (
            "stale velocity",
            "transition",
            "reuses the first velocity in every sub-step",
            "velocities = dict(zip(chains, v.chunk(len(chains)), strict=True))",
            "velocities = {k: velocities[k] for k in chains}",
        ),
        (
            "chains crossed",
            "transition",
            "hands the velocities of one k to another",
            "v.chunk(len(chains))",
            "v.chunk(len(chains))[::-1]",
        ),
        (
            "prompts crossed",
            "transition",
            "interleaves prompts where chains are concatenated",
            "c.repeat(len(chains))",
            "c.repeat_interleave(len(chains))",
        ),
        (
            "states cut",
            "loss",
            "lets no gradient through the intermediate states",
            "torch.cat([*chains.values()]), torch.cat(times)",
            "torch.cat([*chains.values()]).detach(), torch.cat(times)",
        ),
        (
            "Euler cut",
            "loss",
            "lets no gradient through the Euler sub-steps",
            _EULER,
            _EULER + ".detach()",
        ),
        # The kernels.
        (
            "flow_sde: variance for std",
            "transition",
            "returns the variance as the std",
            "(g2 * D).sqrt())",
            "g2 * D)",
        ),
        (
            "flow_sde: eta once",
            "transition",
            "does not square eta in g^2",
            "g2 = eta**2 * t",
            "g2 = eta * t",
        ),
        (
            "flow_sde: signal level",
            "transition",
            "leaves (1-t) out of the velocity's coefficient",
            "-(1 + g2 * (1 - t) / (2 * t)) * D",
            "-(1 + g2 / (2 * t)) * D",
        ),
        (
            "flow_sde: drift sign",
            "transition",
            "adds the score term to x where it is subtracted",
            "1 - g2 * D / (2 * t), -(1",
            "1 + g2 * D / (2 * t), -(1",
        ),
        (
            "flow_sde: half",
            "transition",
            "forgets the half of g^2/2 in the coefficient of x",
            "1 - g2 * D / (2 * t), -(1",
            "1 - g2 * D / t, -(1",
        ),
        (
            "flow_sde: no score",
            "transition",
            "adds noise without the drift that pays for it",
            "1 - g2 * D / (2 * t), -(1 + g2 * (1 - t) / (2 * t)) * D",
            "1 + 0 * t, -D",
        ),
        (
            "flow_sde: clamp at 1",
            "transition",
            "clamps t to 0.99 where g is singular",
            "torch.where(t == 1, t_1, t)",
            "t.clamp(max=0.99)",
        ),
        (
            "flow_sde: t = 1 everywhere",
            "transition",
            "replaces t by t_1 outside g as well",
            "g2 = eta**2",
            "t = torch.where(t == 1, t_1, t); g2 = eta**2",
        ),
        (
            "cps: radians",
            "transition",
            "takes eta itself for the angle, not eta pi/2",
            "math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)",
            "math.cos(eta), math.sin(eta)",
        ),
        (
            "cps: cos and sin",
            "transition",
            "exchanges cos and sin",
            "math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)",
            "math.sin(eta * math.pi / 2), math.cos(eta * math.pi / 2)",
        ),
        (
            "cps: old noise level",
            "transition",
            "draws noise at the level of t, not of s",
            "s * cos * (1 - t), s * sin)",
            "s * cos * (1 - t), t * sin)",
        ),
        (
            "cps: noise added",
            "transition",
            "adds noise without shrinking the old noise by cos h",
            "cos, sin = math.cos(eta * math.pi / 2),",
            "cos, sin = 1.0,",
        ),
        (
            "cps: data sign",
            "transition",
            "adds t v where x0_hat subtracts it",
            "-(1 - s) * t + s",
            "(1 - s) * t + s",
        ),
        (
            "dance: variance for std",
            "transition",
            "scales the noise by D, not by sqrt(D)",
            "eta * D.sqrt())",
            "eta * D)",
        ),
        (
            "dance: no score in v",
            "transition",
            "leaves the score term out of the velocity's coefficient",
            "-D - eta**2 * D * (1 - t) / (2 * t), eta",
            "-D, eta",
        ),
        (
            "dance: score sign",
            "transition",
            "adds the score term to x where it is subtracted",
            "1 - eta**2 * D / (2 * t), -D",
            "1 + eta**2 * D / (2 * t), -D",
        ),
        # The density.
        (
            "std for variance",
            "log_prob",
            "divides the square by std, not by its square",
            "/ per_row(self.std, x)",
            "/ per_row(self.std.sqrt(), x)",
        ),
        (
            "no half",
            "log_prob",
            "forgets the half of the exponent",
            "-squares.mean(-1) / 2",
            "-squares.mean(-1)",
        ),
        (
            "wrong sign",
            "log_prob",
            "rewards distance from the mean",
            "-squares.mean(-1) / 2",
            "squares.mean(-1) / 2",
        ),
        (
            "log variance",
            "log_prob",
            "subtracts log std^2 where log std is due",
            "- self.std.log()",
            "- 2 * self.std.log()",
        ),
        (
            "batch mean",
            "log_prob",
            "averages over the batch as well",
            "-squares.mean(-1) / 2",
            "-squares.mean() / 2",
        ),
        # The advantages.
        (
            "leaking mean",
            "advantages",
            "centres by the mean of all groups",
            "r.mean(-1, keepdim=True)",
            "r.mean()",
        ),
        (
            "leaking std",
            "advantages",
            "divides by the std of all rewards",
            "r.std(-1, correction=ddof, keepdim=True)",
            "r.std(correction=ddof)",
        ),
        (
            "not centred",
            "advantages",
            "does not subtract the mean",
            "centred = r - r.mean(-1, keepdim=True)",
            "centred = r",
        ),
        ("variance of rewards", "advantages", "divides by the variance", "r.std(-1,", "r.var(-1,"),
        (
            "no blame",
            "advantages",
            "cuts negative advantages",
            "advantages.clamp(-clamp, clamp)",
            "advantages.clamp(0, clamp)",
        ),
        # The loss.
        (
            "ratio inverted",
            "loss",
            "divides the old density by the new one",
            "clipped_surrogate(log_probs[k] - log_prob_old",
            "clipped_surrogate(log_prob_old - log_probs[k]",
        ),
        (
            "old forgotten",
            "loss",
            "compares each update with itself: the ratio is 1 and the clip cannot act",
            _OLD,
            "log_prob_old = log_probs[k].detach()",
        ),
        (
            "coarse old",
            "loss",
            "divides every k by the coarse old density",
            _OLD,
            "log_prob_old = old.log_probs[1] if old else log_probs[1].detach()",
        ),
        (
            "optimist's clip",
            "loss",
            "takes the larger of the clipped and the unclipped term",
            "clipped = cut * advantages < ratio",
            "clipped = cut * advantages > ratio",
        ),
        (
            "one-sided clip",
            "loss",
            "clips ratios from above only",
            "clamp(1 - clip, 1 + clip)",
            "clamp(max=1 + clip)",
        ),
        (
            "clip without min",
            "loss",
            "clips on both sides whatever the advantage's sign",
            "clipped = cut * advantages < ratio.detach() * advantages",
            "clipped = cut != ratio.detach()",
        ),
        (
            "clip ignored",
            "loss",
            "never clips",
            "clipped = cut * advantages < ratio.detach() * advantages",
            "clipped = torch.zeros_like(ratio, dtype=torch.bool)",
        ),
        ("descent", "loss", "descends the reward", "kl * divergence - J", "kl * divergence + J"),
        ("weights not shared", "loss", "gives every k-term weight 1", _WEIGHTS, "1.0 for k in ks"),
        (
            "weights shared by all",
            "loss",
            "divides the coarse term by |S| + 1 too",
            _WEIGHTS,
            "1 / len(ks) for k in ks",
        ),
        (
            "last k only",
            "loss",
            "keeps the last term where it should add",
            "J = J + (weight",
            "J = (weight",
        ),
        (
            "silent groups dropped",
            "loss",
            "averages over groups with a signal only",
            "J = J + (weight * value).mean()",
            "J = J + (weight * value).sum() / (advantages != 0).expand_as(value).sum()",
        ),
        (
            "matched: fine std",
            "loss",
            "gives the matched form the fine step's std",
            _MATCHED,
            _MATCHED.replace("transitions[1].std", "p.std"),
        ),
        (
            "matched: live coarse mean",
            "loss",
            "lets the matched form's constant follow theta",
            _MATCHED,
            _MATCHED.replace("means_old[1] +", "transitions[1].mean +"),
        ),
        (
            "KL pushes away",
            "loss",
            "subtracts the KL from the loss",
            "kl * divergence - J",
            "-kl * divergence - J",
        ),
        (
            "KL without gradient",
            "loss",
            "detaches the KL",
            "mu = transitions[1].mean\n",
            "mu = transitions[1].mean.detach()\n",
        ),
        (
            "KL without std",
            "loss",
            "leaves 1/c_1^2 out of the KL",
            "p_ref = rescore(reference, rollout, ())[1]",
            "p_ref = rescore(reference, rollout, ())[1]._replace(std=torch.ones_like(transitions[1].std))",
        ),
        # The sampler, which no reward can judge.
        (
            "variance as std",
            "sampler",
            "scales the noise by the variance",
            "per_row(self.std, self.mean) * noise",
            "per_row(self.std**2, self.mean) * noise",
        ),
        (
            "shift inverted",
            "sampler",
            "shifts the grid towards the data",
            "(1 - u) / shift)",
            "(1 - u) * shift)",
        ),
        (
            "wrong state stored",
            "sampler",
            "stores the state after the step as the one before",
            "observed.append((x[:, :1], x_s",
            "observed.append((moved[:, :1], x_s",
        ),
        (
            "branches sharing noise",
            "sampler",
            "gives all steps the noise of the first",
            "p = Transition(p.mean[:, :1], p.std[:, :1])\n"
            "            x_s = p.sample(noise.steps[:, len(observed)])",
            "p = Transition(p.mean[:, :1], p.std[:, :1])\n            x_s = p.sample(noise.steps[:, 0])",
        ),
    )
)

VARIANTS = tuple(
    Patch(*row)
    for row in (
        (
            "flow_sde simplified",
            "transition",
            "writes g^2/(2t) as eta^2/(2(1-t'))",
            "Coefficients(1 - g2 * D / (2 * t), -(1 + g2 * (1 - t) / (2 * t)) * D,",
            "Coefficients(1 - eta**2 * D / (2 * (1 - torch.where(t == 1, t_1, t))), -D - (1 - t) * g2 * D / (2 * t),",
        ),
        (
            "cps by ends",
            "transition",
            "multiplies the ends out in another order",
            "Coefficients((1 - s) + s * cos, -(1 - s) * t + s * cos * (1 - t), s * sin)",
            "Coefficients(1 - s * (1 - cos), s * cos - t * (1 - s * (1 - cos)), sin * s)",
        ),
        (
            "Euler by times",
            "transition",
            "takes sub-steps as differences of times",
            _EULER,
            "chains[k] = chains[k] + per_row((t - (j + 1) * (t - s) / k) - (t - j * (t - s) / k), x) * velocities[k]",
        ),
        (
            "density by squares",
            "log_prob",
            "divides the sum of squares once",
            "z = (x - self.mean) / per_row(self.std, x)",
            "z = (x - self.mean) * per_row(1 / self.std, x)",
        ),
        (
            "advantages by root",
            "advantages",
            "writes the std as a root of a sum",
            "r.std(-1, correction=ddof, keepdim=True)",
            "(centred.square().sum(-1, keepdim=True) / (G - ddof)).sqrt()",
        ),
        (
            "clip by maximum",
            "loss",
            "names the cut members another way",
            "clipped = cut * advantages < ratio.detach() * advantages",
            "clipped = torch.where(advantages > 0, ratio > cut, ratio < cut) & (advantages != 0)",
        ),
    )
)


def patched_source(patch: Patch) -> str:
    """The text of pave_grpo.py with the patch applied. Raises ValueError unless its place occurs exactly once."""
    source = Path(pave_grpo.__file__).read_text()
    if source.count(patch.old) != 1:
        raise ValueError(
            f"patch {patch.name!r}: its text occurs {source.count(patch.old)} times in pave_grpo.py; "
            f"must be 1"
        )
    return source.replace(patch.old, patch.new)


@functools.cache
def patched(patch: Patch) -> ModuleType:
    """pave_grpo with the patch applied, as a module of its own; the real one is untouched."""
    module = ModuleType(f"pave_grpo_with_{patch.name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    exec(
        compile(patched_source(patch), f"pave_grpo.py with {patch.name!r}", "exec"), module.__dict__
    )
    return module
