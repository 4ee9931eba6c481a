"""Decomposed against original, step by step, on the embedded model or the one of --model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, Bench, Scene, reward
from zoo.oracle.measures import cosine, term_gradient
from zoo.shapes import model as shapes_model
from zoo.shapes import rule

GROUP = 12


def compare(bench: Bench, kernel: str, steps: int = 8) -> list[dict[str, Any]]:
    """A line for each stochastic step and k: what the k-term is beside the original.

    kernel, step, t, s, k
    weight      (c_1/c_k)^2
    gap         |mu^(k) - mu^(1)|/c_1, root mean square per dimension
    off         |mu^(k) - that of the same model in float64|/c_k (a pipeline: in float32), likewise
    original    |grad_1|, the size of the original's parameter gradient
    norm        |grad_k|/|grad_1|, in the paper's form
    cosine      of the two
    member      cosine of the members' credit vectors, the mean over members
    group       cosine of the groups' credit vectors, the least over groups
    share       [(time, part)] of the k-term's gradient by the velocities it passes through,
                projected on the whole; parts add up to 1
    """
    scene = anchored(bench, kernel, steps)
    rollout = scene.rollout
    table = []
    for j, i in enumerate(tqdm(rollout.sde_steps, kernel, leave=False, file=sys.stderr)):
        alone = rollout._replace(
            sde_steps=(i,),
            x_t=rollout.x_t[:, j : j + 1],
            x_s=rollout.x_s[:, j : j + 1],
            log_prob=rollout.log_prob[:, j : j + 1],
            x_0=rollout.x_0[:, j : j + 1],
            v=None if rollout.v is None else rollout.v[:, j : j + 1],
        )
        one = Scene(scene.field, alone, scene.advantages[:, j : j + 1])
        t, s = rollout.process.grid[i : i + 2].tolist()
        place = {"kernel": kernel, "step": i, "t": t, "s": s}
        means, gradient = transitions(bench, one), term_gradient(one, 1)
        for k in bench.factors:
            line = {**place, "k": k, **means[k], **gradients(one, k, t, s, gradient)}
            table.append(line)
    return table


def anchored(bench: Bench, kernel: str, steps: int) -> Scene:
    """Shared anchors of every prompt; members of a checkpoint are judged by the rule.

    The smooth reward tells members of equal credit apart; a pipeline has no other.
    """
    fixture = bench.fixture("embedded")
    prompts = bench.model.prompts if bench.model else fields.PROMPTS[:1]
    process = pave.Process(pave.schedule(steps), kernel, ETA)
    P, n = len(prompts), len(process.stochastic_steps())
    x_1 = bench.normal(P, 1, *fixture.shape, of="compare")
    z = bench.normal(P, n, GROUP, *fixture.shape, of="compare steps")
    rollout = pave.rollout_shared_anchor(fixture.field, process, pave.Noise(x_1, z))
    score = reward(rollout.x_0)
    if not (bench.model and bench.model.size):
        images = shapes_model.to_images(rollout.x_0.flatten(0, 2).float())
        asked = [prompt for prompt in prompts for _ in range(n * GROUP)]
        judged = rule.judge(images, asked).score.to(score)
        score = judged.view(score.shape) + 0.1 * score
    return Scene(fixture.field, rollout, pave.group_advantages(score))


@torch.no_grad()
def transitions(bench: Bench, scene: Scene) -> dict[int, dict[str, float]]:
    """weight, gap, off, member and group of every k, in one step."""
    rollout, precise = scene.rollout, bench.precise()
    p = pave.rescore(scene.field, rollout, bench.factors)
    exact = p
    if precise:
        in_float64 = not (bench.model and bench.model.size)
        x_t = rollout.x_t.double() if in_float64 else rollout.x_t
        exact = pave.rescore(precise, rollout._replace(x_t=x_t), bench.factors)
    credit = {k: credits_of(scene, q) for k, q in p.items()}
    found = {}
    for k in bench.factors:
        found[k] = {
            "weight": (p[1].std / p[k].std).square().flatten()[0].item(),
            "gap": spread(p[k].mean - p[1].mean, p[1].std),
            "off": spread(p[k].mean - exact[k].mean, p[k].std),
            "member": alike(credit[k], credit[1], 3).mean().item(),
            "group": alike(credit[k].mean(2), credit[1].mean(2), 2).min().item(),
        }
    return found


def credits_of(scene: Scene, p: pave.Transition) -> Tensor:
    """A (x_s - mu)/std^2 of every member, [P, 1, G, *event]."""
    x_s = scene.rollout.x_s
    return pave.per_row(scene.advantages, x_s) * (x_s - p.mean) / pave.per_row(p.std, x_s) ** 2


def spread(z: Tensor, std: Tensor) -> float:
    """Root mean square of z over the one std of a step."""
    return (z.double().square().mean().sqrt() / std.flatten()[0]).item()


def alike(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """Cosine over all but the first axes."""
    return nn.functional.cosine_similarity(a.flatten(axes), b.flatten(axes), dim=-1)


def gradients(scene: Scene, k: int, t: float, s: float, original: Tensor) -> dict[str, Any]:
    """original, norm, cosine and share of a k-term in one step."""
    whole = term_gradient(scene, k)
    parts = []
    for call in range(k - 1):
        only = scene._replace(field=fields.OnlyCall(scene.field, call))
        parts.append(term_gradient(only, k))
    parts.append(whole - torch.stack(parts).sum(0))  # what is left passes through the last call
    square = torch.dot(whole, whole)
    share = [
        (t - call * (t - s) / k, (torch.dot(part, whole) / square).item())
        for call, part in enumerate(parts)
    ]
    return {
        "original": original.norm().item(),
        "norm": (whole.norm() / original.norm()).item(),
        "cosine": cosine(whole, original),
        "share": share,
    }


LEGEND = """Decomposed against original, step by step, with shared anchors and in the paper's form.
|grad 1|   size of the original's parameter gradient; x and cos: the k-term's, over it and with it
member     cosine of the attribution by member; group: of a whole group, the least
gap        of the means, over c_1{off}
weight     (c_1/c_k)^2
share      of the gradient, in %, by the velocity it passes through, in the order of time
"""


def show_comparison(table: list[dict[str, Any]], bench: Bench) -> str:
    """The comparison as text, one line per kernel, step and k, in at most 100 columns."""
    reference = ""
    if bench.precise() is not None:
        reference = "float32" if bench.model and bench.model.size else "float64"
    off = f"; off: a mean's error against {reference}, over c_k" if reference else ""
    head = "          t     s  k |grad 1|     x    cos member  group    gap"
    lines = [LEGEND.format(off=off), head + ("   off" if reference else "") + " weight  share"]
    last = ""
    for line in table:
        name = line["kernel"] if line["kernel"] != last else ""
        last = line["kernel"]
        text = f"{name:8} {line['t']:.3f} {line['s']:.3f} {line['k']:2} {line['original']:8.2e} "
        text += f"{line['norm']:5.2f} {line['cosine']:6.3f} {line['member']:6.3f} "
        text += f"{line['group']:6.4f} {line['gap']:6.3f}"
        text += f" {line['off']:5.0e}" if reference else ""
        text += f" {line['weight']:6.2f} "
        text += " ".join(f"{100 * part:4.0f}" for _, part in line["share"])
        lines.append(text)
    return "\n".join(lines)
