"""Decomposed against original, step by step."""

from __future__ import annotations

import sys

import torch
from torch import nn
from tqdm import tqdm

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, Bench, Scene, cosine, reward, term_gradient
from zoo.shapes import model as shapes_model
from zoo.shapes.rule import judge


def compare(bench: Bench, kernel: str, steps: int = 8) -> list[dict]:
    """Per stochastic step and k, on the embedded model (or --model): what the k-term is beside the original.

    weight (c_1/c_k)^2. gap |mu^(k) - mu^(1)|/c_1, root mean square per dimension. original, norm: |grad_1|, and
    |grad_k|/|grad_1| in the paper's form; cosine of the two. member, group: cosine of the credit vectors, mean over
    members and least over groups. share [(time, share)]: the part of the k-term's gradient that passes through its
    velocity at that time, projected on the whole; shares add up to 1. off: how far mu^(k) is from that of the same
    model in float64 (a pipeline: in float32), over c_k, root mean square.
    """
    fixture, P, G = bench.fixture("embedded"), len(bench.model.prompts) if bench.model else 1, 12
    field, process = fixture.field, pave.Process(pave.schedule(steps), kernel, ETA)
    stochastic = process.stochastic_steps()
    noise = pave.Noise(
        bench.normal(P, 1, *fixture.shape, of="compare"),
        bench.normal(P, len(stochastic), G, *fixture.shape, of="compare steps"),
    )
    rollout = pave.rollout_shared_anchor(field, process, noise, stochastic)
    prompts = bench.model.prompts if bench.model else fields.PROMPTS
    owners = [prompts[p % len(prompts)] for p in range(P) for _ in range(len(stochastic) * G)]
    score = reward(rollout.x_0)
    if not (
        bench.model and bench.model.size
    ):  # the rule; the smooth reward tells members of equal credit apart
        rule = judge(shapes_model.to_images(rollout.x_0.flatten(0, 2).float()), owners).score
        score = rule.to(score).unflatten(0, score.shape) + 0.1 * score
    advantages, table, precise = pave.group_advantages(score), [], bench.precise()
    alike = lambda a, b, n: nn.functional.cosine_similarity(a.flatten(n), b.flatten(n), dim=-1)
    for j, i in enumerate(tqdm(stochastic, f"comparing, {kernel}", leave=False, file=sys.stderr)):
        one = {
            name: getattr(rollout, name)[:, j : j + 1] for name in ("x_t", "x_s", "log_prob", "x_0")
        }
        scene = Scene(field, rollout._replace(sde_steps=(i,), **one), advantages[:, j : j + 1])
        A = pave.per_row(scene.advantages, scene.rollout.x_s)
        credit = lambda p, A=A, x_s=scene.rollout.x_s: (
            A * (x_s - p.mean.detach()) / pave.per_row(p.std, x_s) ** 2
        )
        with torch.no_grad():
            p = pave.rescore(field, scene.rollout, bench.factors)
            state = (
                scene.rollout.x_t.double()
                if precise and not bench.model.size
                else scene.rollout.x_t
            )
            exactly = (
                pave.rescore(precise, scene.rollout._replace(x_t=state), bench.factors)
                if precise
                else p
            )
        (t, s), g_1 = process.grid[i : i + 2].tolist(), term_gradient(scene, 1)
        for k in bench.factors:
            g = term_gradient(scene, k)
            parts = [
                term_gradient(scene._replace(field=fields.OnlyCall(field, call)), k)
                for call in range(k - 1)
            ]
            parts.append(g - sum(parts))  # what is left passes through the last call
            rms = lambda z, std: (z.double().square().mean().sqrt() / std.flatten()[0]).item()
            table.append(
                {
                    "kernel": kernel,
                    "step": i,
                    "t": t,
                    "s": s,
                    "k": k,
                    "weight": (p[1].std / p[k].std).square().flatten()[0].item(),
                    "gap": rms(p[k].mean - p[1].mean, p[1].std),
                    "off": rms(p[k].mean - exactly[k].mean, p[k].std),
                    "original": g_1.norm().item(),
                    "norm": (g.norm() / g_1.norm()).item(),
                    "cosine": cosine(g, g_1),
                    "member": alike(credit(p[k]), credit(p[1]), 3).mean().item(),
                    "group": alike(credit(p[k]).mean(2), credit(p[1]).mean(2), 2).min().item(),
                    "share": [
                        (t - c * (t - s) / k, (torch.dot(a, g) / torch.dot(g, g)).item())
                        for c, a in enumerate(parts)
                    ],
                }
            )
    return table


def show_comparison(table: list[dict], reference: str) -> str:
    """The comparison as text, one line per kernel, step and k; reference: the dtype of a more precise model, or ''."""
    lines = [
        "Decomposed against original, step by step: parameter gradients (size of the original's, size and cosine "
        "of",
        "the k-term's beside it), reward attribution (cosine by member, and of the whole group), the gap of the "
        "means",
        "over c_1"
        + (f", the mean's error against {reference} over c_k" if reference else "")
        + ", the effective weight (c_1/c_k)^2, and the share of the gradient by the time of its velocity",
        "",
        "kernel    step  t -> s          k  |grad 1|  ratio  grad cos  member cos  group cos     gap"
        + ("      off" if reference else "")
        + "  weight  share by time",
    ]
    for r in table:
        lines.append(
            f"{r['kernel']:9} {r['step']:4}  {r['t']:.3f} -> {r['s']:.3f} {r['k']:2}  {r['original']:.2e} "
            f"{r['norm']:6.2f}  {r['cosine']:8.4f}  {r['member']:10.4f}  {r['group']:9.6f} {r['gap']:7.4f}"
            + (f"  {r['off']:.1e}" if reference else "")
            + f"  {r['weight']:6.2f}  "
            + "  ".join(f"{t:.2f}: {100 * f:.0f} %" for t, f in r["share"])
        )
    return "\n".join(lines)


def show_estimates(estimates: list[tuple]) -> str:
    """The policy gradients of TRUTH side by side."""
    lines = [
        "Policy gradients of a Gaussian flow by (m_1, m_2, log q_1, log q_2), against the true one: scale, bias "
        "and",
        "Jacobian apart",
        "",
        "kernel     k  form      estimate                          cosine   size",
    ]
    vector = lambda z: " ".join(f"{x:+7.3f}" for x in z)
    for kernel in dict.fromkeys(e[0] for e in estimates):
        own = [e for e in estimates if e[0] == kernel]
        lines.append(f"{kernel:9} --  truth     {vector(own[0][4])}")
        lines += [
            f"{kernel:9} {k:2}  {form:9} {vector(mean)}   {cos:.4f}  {size:5.2f}"
            for _, k, form, mean, _, cos, size in own
        ]
    return "\n".join(lines)
