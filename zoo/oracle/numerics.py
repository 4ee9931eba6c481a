"""On one's own model and dtype: does a replay agree with its rollout, does Adam see the gradient?

    replay     log p(x_s|x_t) is stored while sampling, where anchors share a call, and evaluated
               again in training, where other rows do, with gradients on. What lies between is
               rounding. A ratio that divides by the stored one is off by as much, and a clip range
               below it cuts members of an unchanged policy. (policy_loss divides by its first pass)
    gradient   Adam steps by lr m / (sqrt(v) + eps). Where gradients are far below eps the step is
               lr m / eps, which shrinks with them, and training does nothing without saying so

It judges nothing: the exit status is that of the claims. Gradients are those that
backward passes of one observed state each add up in p.grad, in the model's dtype, as in training;
none is copied, so that a model that can be trained can be measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pave_grpo as pave
from zoo.oracle import fields
from zoo.oracle.bench import ETA, Bench, Scene, reward
from zoo.oracle.measures import only, projections
from zoo.oracle.report import wrapped

STEPS, MEMBERS = 8, 4  # of the rollout
CLIPS = (("mean", 1e-5), ("mean", 1e-4), ("sum", 0.2))  # shipped, by reduction of log p
EPS = 1e-8  # Adam's


def measure(bench: Bench) -> list[dict[str, Any]]:
    """A line for each stochastic step and, with step None, one for all of them, of every kernel.

    kernel, step, t, s
    dimensions  d, of a state: summed log-probabilities, their gaps and gradients are d times these
    gap         |log p replayed - log p sampled|/d, the mean over prompts and members
    gap_max     the largest
    outside     [(reduction, clip, share)]: how many ratios replayed/sampled the clip range leaves
                out, of an unchanged policy
    rms_plain   root mean square over theta of the loss's gradient, S = {}, at theta_old
    rms         the same with S the factors, in the paper's form
    along       of a large model [(k, a, b)]: the derivatives of each term along two directions
    """
    return [line for kernel in bench.kernels for line in kernel_lines(bench, kernel)]


def kernel_lines(bench: Bench, kernel: str) -> list[dict[str, Any]]:
    """The lines of one kernel."""
    scene = sampled(bench, kernel)
    gaps, grid = replay_gaps(scene), scene.rollout.process.grid.tolist()
    n = len(scene.rollout.sde_steps)
    lines = []
    for j, i in enumerate(tqdm(scene.rollout.sde_steps, kernel, leave=False, file=sys.stderr)):
        place = {"kernel": kernel, "step": i, "t": grid[i], "s": grid[i + 1]}
        lines.append(place | line_of(bench, scene, gaps, [j]))
    place = {"kernel": kernel, "step": None, "t": None, "s": None}
    return [*lines, place | line_of(bench, scene, gaps, range(n))]


def sampled(bench: Bench, kernel: str) -> Scene:
    """Shared anchors of every prompt, in one call at each time, with a smooth reward."""
    fixture = bench.fixture("embedded")
    process = pave.Process(pave.schedule(STEPS), kernel, ETA)
    P, n = len(bench.model.prompts) if bench.model else 1, len(process.stochastic_steps())
    x_1 = bench.normal(P, 1, *fixture.shape, of="numerics")
    z = bench.normal(P, n, MEMBERS, *fixture.shape, of="numerics steps")
    rollout = pave.rollout_shared_anchor(fixture.field, process, pave.Noise(x_1, z))
    return Scene(fixture.field, rollout, pave.group_advantages(reward(rollout.x_0)))


class Asked(nn.Module):
    """A field of one prompt alone, by its index."""

    def __init__(self, field: nn.Module, index: int):
        super().__init__()
        self.field, self.index = field, index

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        v: Tensor = self.field(x, t, prompt + self.index)
        return v


def observed(scene: Scene, p: int, j: int) -> Scene:
    """The one state that prompt p left by its j-th stochastic step, and its members."""
    whole, own = scene.rollout, (slice(p, p + 1), slice(j, j + 1))
    rollout = whole._replace(
        sde_steps=(whole.sde_steps[j],),
        x_t=whole.x_t[own],
        x_s=whole.x_s[own],
        log_prob=whole.log_prob[own],
        x_0=whole.x_0[own],
        v=None,
    )
    return Scene(Asked(scene.field, p), rollout, scene.advantages[own])


# ---- What is measured ----------------------------------------------------------------------------


def replay_gaps(scene: Scene) -> Tensor:
    """log p(x_s|x_t) replayed less the one stored while sampling, over d: float64 [P, n, G].

    Each state is replayed in a call of its own, with gradients on, as `accumulate` does.
    """
    gaps = torch.zeros_like(scene.rollout.log_prob)
    P, n = gaps.shape[:2]
    for p in range(P):
        for j in range(n):
            one = observed(scene, p, j)
            replayed = pave.rescore(one.field, one.rollout, ())[1].log_prob(one.rollout.x_s, "sum")
            gaps[p, j] = (replayed.detach() - one.rollout.log_prob)[0, 0]
    return gaps / dimensions(scene)


def dimensions(scene: Scene) -> int:
    """d, the numbers of one state."""
    return scene.rollout.x_s[0, 0, 0].numel()


def line_of(bench: Bench, scene: Scene, gaps: Tensor, steps: Sequence[int]) -> dict[str, Any]:
    """What `measure` says of the stochastic steps with these places among them."""
    d, own = dimensions(scene), gaps[:, steps]
    accumulate(scene, steps, factors=())
    rms_plain, terms = root_mean_square(scene.field), []
    for k in (1, *bench.factors) if bench.is_large else ():
        accumulate(scene, steps, **only(k))
        grads = [p.grad for p in scene.field.parameters()]
        terms.append((k, *projections(grads).tolist()))
    accumulate(scene, steps, factors=bench.factors)
    rms = root_mean_square(scene.field)
    scene.field.zero_grad()
    return {
        "dimensions": d,
        "gap": own.abs().mean().item(),
        "gap_max": own.abs().max().item(),
        "outside": [(how, clip, share_outside(own, how, clip, d)) for how, clip in CLIPS],
        "rms_plain": rms_plain,
        "rms": rms,
        "along": terms,
    }


def share_outside(gaps: Tensor, reduction: str, clip: float, d: int) -> float:
    """How many of the ratios exp(gap) lie outside [1 - clip, 1 + clip], or are no number."""
    log_ratio = gaps * (d if reduction == "sum" else 1)
    return 1 - (log_ratio.expm1().abs() <= clip).double().mean().item()


def accumulate(scene: Scene, steps: Sequence[int], **how: Any) -> None:
    """p.grad of policy_loss over these stochastic steps, by one backward pass for each state."""
    scene.field.zero_grad()
    P = len(scene.rollout.x_s)
    for p in range(P):
        for j in steps:
            one = observed(scene, p, j)
            loss = pave.policy_loss(one.field, one.rollout, one.advantages, clip=None, **how).loss
            (loss / (P * len(steps))).backward()


def root_mean_square(field: nn.Module) -> float:
    """sqrt(sum over theta of grad^2 / their number), of p.grad, added up in float64."""
    square, number = 0.0, 0
    for p in field.parameters():
        number += p.numel()
        if p.grad is not None:
            square += torch.linalg.vector_norm(p.grad, dtype=torch.float64).item() ** 2
    return math.sqrt(square / number)


# ---- What is printed of it -----------------------------------------------------------------------

LEGEND = """Rounding in {dtype}: {prompts} x {members} members from shared anchors, {steps} steps, \
{d:,} numbers a state.
gap      |log p(x_s|x_t) replayed, a state a call - stored while sampling, anchors in a call| / {d}
outside  %, ratios of the two that a shipped clip range cuts by rounding alone; 0.2: of summed log p
rms      of the loss's gradient by one of {theta:,} weights, over Adam's eps, 1e-8"""
HEAD = f"{'':13}t     s      gap      max   outside 1e-05  1e-04    0.2   rms, S = {{}}  "
LEFT_OUT = (
    "{theta:,} parameters, more than {whole:,}: no gradient is held whole. Claims compare its "
    "derivatives along two directions of random signs; what needs an angle is left out (E6, "
    "--compare, --plots). Those of each term:"
)


def show(lines: Sequence[dict[str, Any]], bench: Bench) -> str:
    """The table, then what follows from it in sentences, in at most 100 columns."""
    model, theta = bench.model, fields.size(bench.fixture("embedded").field)
    legend = LEGEND.format(
        dtype=str(model.dtype if model else bench.dtype).removeprefix("torch."),
        prompts=len(model.prompts) if model else 1,
        members=MEMBERS,
        steps=STEPS,
        d=lines[0]["dimensions"],
        theta=theta,
    )
    text = [legend, "", HEAD + set_of(bench), *map(table_line, lines), ""]
    text += wrapped(said_of_gaps(lines)) + wrapped(said_of_gradients(lines, bench))
    if bench.is_large:
        text += wrapped(LEFT_OUT.format(theta=theta, whole=fields.WHOLE))
        text += along_lines(lines)
    return "\n".join(text)


def set_of(bench: Bench) -> str:
    """S, written as a set."""
    return "{" + ", ".join(map(str, bench.factors)) + "}"


def place_of(line: dict[str, Any]) -> str:
    """Kernel and step, 20 columns."""
    when = "all steps" if line["step"] is None else f"{line['t']:.3f} {line['s']:.3f}"
    return f"{line['kernel']:8} {when:11}"


def table_line(line: dict[str, Any]) -> str:
    """One step, or all of them."""
    narrow, wide, summed = (f"{100 * share:.0f}" for _, _, share in line["outside"])
    gap, largest = (f"{line[key]:.1e}" if line[key] else "0" for key in ("gap", "gap_max"))
    return (
        f"{place_of(line)} {gap:>8} {largest:>8} {narrow:>15} {wide:>6} "
        f"{summed:>6} {line['rms_plain'] / EPS:13.3g}  {line['rms'] / EPS:.3g}"
    )


def along_lines(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every step and k."""
    rows = []
    for line in lines:
        rows += [f"{place_of(line)} k = {k}: {a:+.3e} {b:+.3e}" for k, a, b in line["along"]]
    return rows


def said_of_gaps(lines: Sequence[dict[str, Any]]) -> str:
    """The least clip range that rounding alone does not reach, for either reduction."""
    gap = torch.tensor([line["gap_max"] for line in lines], dtype=torch.float64).max()
    if gap == 0:
        return (
            "Replays agree with their rollout bit for bit: here no clip range cuts by rounding "
            "alone. Another device or batch may round otherwise."
        )
    mean, summed = gap.expm1(), (lines[0]["dimensions"] * gap).expm1()
    return (
        f"A clip range below {mean:.1e} cuts by rounding alone, with summed log p below "
        f"{summed:.1e}, where a ratio divides by the log p that sampling stored; "
        f"policy_loss divides by its first pass instead."
    )


def said_of_gradients(lines: Sequence[dict[str, Any]], bench: Bench) -> str:
    """Which loss over all steps has a gradient whose root mean square is below Adam's eps."""
    sizes = {}
    for line in lines:
        if line["step"] is None:
            sizes[f"{line['kernel']}, S = {{}}"] = line["rms_plain"] / EPS
            sizes[f"{line['kernel']}, S = {set_of(bench)}"] = line["rms"] / EPS
    small = [f"{size:.2g} of it under {name}" for name, size in sizes.items() if not size >= 1]
    if not small:
        return f"Gradients are above Adam's eps: the least is {min(sizes.values()):.3g} times it."
    return (
        f"Adam's eps drowns the gradient: {'; '.join(small)}. A step is then lr m / eps, "
        f"proportional to the gradient and next to nothing. Ascend summed log p, of "
        f"{lines[0]['dimensions']:,} times the gradient, or scale the loss up, or lower eps."
    )
