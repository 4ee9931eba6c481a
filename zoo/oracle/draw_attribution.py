"""Draw what a group's rewards ask of mu^(k), in a real two-dimensional flow.

    python -m zoo.oracle.draw_attribution docs/asked.png

The data are three narrow Gaussians, whose velocity is exact. Members are drawn by pave_grpo's
rollouts, rewarded by how near they end to one of the three, and scored by its decomposition.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

import pave_grpo as pave
from zoo import style
from zoo.oracle.fields import gaussian_velocity

MODES = torch.tensor([[1.6, 0.9], [-1.5, 1.1], [0.1, -1.7]], dtype=torch.float64)
Q = 0.03  # variance of each
TARGET = MODES[0]
GRID, STEP = (1.0, 0.85, 0.45, 0.2, 0.0), 1  # the stochastic step is that from 0.85 to 0.45
KERNEL, ETA, G, SEED = "flow_sde", 0.6, 12, 6
KS = (1, 2, 3)


def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t = x] of the data, x [B, 2], t [B]: the modes', each by its weight at x."""
    w = t[:, None, None]
    apart = x[:, None] - (1 - w) * MODES
    var = (1 - w) ** 2 * Q + w**2
    of_mode = gaussian_velocity(x[:, None], w, MODES, torch.tensor(Q, dtype=x.dtype))
    weight = (-apart.square().sum(-1) / (2 * var[..., 0])).softmax(-1)
    return (weight[..., None] * of_mode).sum(1)


class Group(NamedTuple):
    """A group as it was sampled, and what it asks of the mean that each k scores."""

    x_t: Tensor  # [1 or G, 2]
    x_s: Tensor  # [G, 2]
    advantages: Tensor  # [G]
    mean: dict[int, Tensor]  # mu^(k), [1 or G, 2]
    std: dict[int, float]
    pull: dict[int, Tensor]  # the attribution, mean_i A_i (x_s - mu^(k)) / c_k^2, [2]


def sampled(mode: str) -> Group:
    """By shared anchor or by independent trajectories, from one seed."""
    own = mode == "independent"
    sample = pave.rollout_independent if own else pave.rollout_shared_anchor
    process = pave.Process(torch.tensor(GRID, dtype=torch.float64), KERNEL, ETA)
    generator = torch.Generator().manual_seed(SEED)
    noise = pave.draw_noise([generator], G, (2,), 1, own, torch.float64)
    rollout = sample(velocity, process, noise, [STEP])
    rewards = -(rollout.x_0 - TARGET).square().sum(-1)
    A = pave.group_advantages(rewards)[0, 0]
    p = pave.rescore(velocity, rollout, KS[1:])
    x_s = rollout.x_s[0, 0]
    pull = {}
    for k, scored in p.items():
        credit = A[:, None] * (x_s - scored.mean[0, 0]) / scored.std[0, 0, 0] ** 2
        pull[k] = credit.mean(0)
    mean = {k: scored.mean[0, 0] for k, scored in p.items()}
    std = {k: scored.std[0, 0, 0].item() for k, scored in p.items()}
    return Group(rollout.x_t[0, 0], x_s, A, mean, std, pull)


def states(x: Tensor, k: int) -> Tensor:
    """Where the k-term asks for velocities, x_t, x', ..., [k, 2]."""
    t, s = GRID[STEP : STEP + 2]
    found = [x]
    for j in range(k - 1):
        time = torch.tensor([t - j * (t - s) / k], dtype=torch.float64)
        v = velocity(found[-1][None], time, torch.tensor([0]))[0]
        found.append(found[-1] - (t - s) / k * v)
    return torch.stack(found)


@style.styled
def draw(path: Path) -> None:
    """A panel for one anchor, one for trajectories of their own, and one for the states trained."""
    t, s = GRID[STEP : STEP + 2]
    note = (
        f"A step from t = {t:g} (squares) to {s:g} (dots; blue earned more than the mean, orange "
        "less, and the thin\narrows are what that asks of k = 1). Circles: N(μ⁽ᵏ⁾, c_k²), one std. "
        "Below: the group's sum of what\nis asked, for each k, brought to one length; × says how "
        "much longer than that of k = 1 it is."
    )
    message = "From one anchor, every k is pushed the same way"
    figure = style.canvas(4.1, message, note)
    shared, own, trained = figure.subplots(1, 3)
    draw_group(shared, sampled("shared_anchor"), "one anchor: parallel")
    draw_group(own, sampled("independent"), "their own trajectories: not")
    draw_states(trained, sampled("shared_anchor"))
    figure.savefig(path, dpi=style.DPI)


def bare(ax: Axes, title: str, centre: Tensor, half: float) -> None:
    """Equal axes without marks around a point."""
    x, y = centre.tolist()
    ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[])
    ax.set_aspect("equal")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title)


def colour_of(k: int) -> str:
    return (style.INK, style.PALETTE[3], style.PALETTE[2])[KS.index(k)]


def draw_group(ax: Axes, group: Group, title: str) -> None:
    """Anchor or anchors, members, their credits under k = 1, the Gaussians, and the sums."""
    middle = group.mean[1].mean(0) - torch.tensor([0.0, 0.35], dtype=torch.float64)
    half = 2.6
    bare(ax, title, middle, half)
    ax.plot(*group.x_t.T.tolist(), "s", color=style.INK, markersize=4, zorder=4)
    largest = group.advantages.abs().max().item()
    for i in range(G):
        mean, end = group.mean[1][i % len(group.mean[1])], group.x_s[i]
        A = group.advantages[i].item()
        tint, alpha = style.PALETTE[0] if A > 0 else style.PALETTE[1], 0.3 + 0.7 * abs(A) / largest
        ax.plot(*end.tolist(), "o", color=tint, alpha=alpha, markersize=6, zorder=3)
        arrow(ax, end, 0.3 * A * (end - mean), tint, 0.9, alpha)
    if len(group.mean[1]) == 1:
        x, y = group.x_t[0].tolist()
        ax.text(x, y - 0.1, "$x_t$", ha="center", va="top")
        for k in KS:
            draw_gaussian(ax, group, k)
    for place, k in zip((-0.6, 0.0, 0.6), KS, strict=True):
        draw_sum(ax, group, k, middle + half * torch.tensor([place, -0.86], dtype=torch.float64))


def draw_gaussian(ax: Axes, group: Group, k: int) -> None:
    """The anchor's sub-steps under k, and one std around mu^(k)."""
    path = torch.cat([states(group.x_t[0], k), group.mean[k]])
    ax.plot(*path.T.tolist(), ".-", color=colour_of(k), linewidth=1.2, markersize=5, zorder=4)
    x, y = group.mean[k][0].tolist()
    ring = Circle((x, y), group.std[k], fill=False, color=colour_of(k))
    ring.set(linewidth=1.4, zorder=2)
    ax.add_patch(ring)


def draw_sum(ax: Axes, group: Group, k: int, place: Tensor) -> None:
    """The direction of the group's attribution under k, and its size over that of k = 1."""
    pull, size = group.pull[k], (group.pull[k].norm() / group.pull[1].norm()).item()
    arrow(ax, place, 0.62 * pull / pull.norm(), colour_of(k), 2.6, 1.0)
    x, y = place.tolist()
    words = f"k = {k}\n×{size:.1f}"
    ax.text(x, y - 0.12, words, color=colour_of(k), size=9, ha="center", va="top")


def arrow(ax: Axes, start: Tensor, step: Tensor, colour: str, width: float, alpha: float) -> None:
    """From a point along a vector."""
    how = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "alpha": alpha}
    how |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 4 + 3 * width}
    (x, y), (x_1, y_1) = start.tolist(), (start + step).tolist()
    ax.annotate("", (x_1, y_1), (x, y), arrowprops=how, zorder=5, annotation_clip=False)


def draw_states(ax: Axes, group: Group) -> None:
    """The velocity field half way, and where each k asks for it; rows are set apart."""
    t, s = GRID[STEP : STEP + 2]
    x_t, end = group.x_t[0], states(group.x_t[0], 3)[-1]
    middle, half = (x_t + end) / 2, 0.85 * (end - x_t).norm().item()
    bare(ax, "what is trained: v at k states", middle, half)
    side = torch.linspace(-0.95 * half, 0.95 * half, 8, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1) + middle
    times = torch.full((len(places),), (t + s) / 2, dtype=torch.float64)
    v = -velocity(places, times, torch.zeros(len(places), dtype=torch.long))
    ax.quiver(*places.T.tolist(), *v.T.tolist(), color=style.HAIR, width=0.006, zorder=0)
    across = torch.stack([-(end - x_t)[1], (end - x_t)[0]]) / (end - x_t).norm()
    for row, k in enumerate(KS):
        path = states(x_t, k) + 0.45 * half * (1 - row) * across
        ax.plot(*path.T.tolist(), "-", color=colour_of(k), linewidth=1.4)
        ax.plot(*path.T.tolist(), "o", color=colour_of(k), markersize=8)
        x, y = path[0].tolist()
        ax.text(x, y - 0.1 * half, f"k = {k}", color=colour_of(k), size=9, ha="center", va="top")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
