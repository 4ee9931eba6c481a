"""Draw one observed transition under k = 1, 2, 3, from a real one-dimensional flow.

    python -m zoo.oracle.draw_decomposition docs/decomposition.svg

The data are N(M, Q), their velocity is exact, and the Gaussians are those of pave_grpo.decompose.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pave_grpo as pave
from zoo import style
from zoo.oracle.fields import gaussian_velocity

T, S, X_T, X_S = 0.7, 0.3, -0.6, 0.9  # the observed transition
M, Q, KERNEL, ETA = 1.0, 0.02, "flow_sde", 0.7
LOW, HIGH = -1.2, 2.3  # of the state, in every row
EULER, SDE = style.PALETTE[0], style.PALETTE[1]


def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """The velocity of data N(M, Q); x is [B, 1]."""
    return gaussian_velocity(x, pave.per_row(t, x), torch.tensor(M), torch.tensor(Q))


def states(k: int) -> tuple[list[float], list[float]]:
    """Times and states x_t, x', x'', ... at which the k-term asks for a velocity."""
    times = [T - j * (T - S) / k for j in range(k)]
    x = [X_T]
    for t in times[:-1]:
        here = torch.tensor([[x[-1]]], dtype=torch.float64)
        v = velocity(here, torch.tensor([t], dtype=torch.float64), torch.tensor([0])).item()
        x.append(x[-1] - (T - S) / k * v)
    return times, x


def gaussians() -> dict[int, pave.Transition]:
    """The transition to x_s under k = 1, 2, 3."""
    process = pave.Process(torch.tensor([T, S], dtype=torch.float64), KERNEL, ETA)
    x, t, s = (torch.tensor([z], dtype=torch.float64) for z in (X_T, T, S))
    return pave.decompose(velocity, process, x[:, None], t, s, torch.tensor([0]), (2, 3))


@style.styled
def draw(path: Path) -> None:
    """A row per k: its sub-steps against time, and at their end its Gaussian along the state."""
    note = (
        "k − 1 Euler sub-steps (straight), then one Gaussian sub-step (wavy), whose density is at\n"
        f"the end of its row. Under {KERNEL} its mean and width change with k; the end it scores "
        "does not."
    )
    figure = style.canvas(6.0, "One observed transition, scored under k = 1, 2, 3", note)
    axes = figure.subplots(3, sharex=True)
    for ax, (k, gaussian) in zip(axes, gaussians().items()):
        ax.text(T + 0.075, X_T, f"k = {k}", size=12, weight="bold", va="center")
        ax.plot([T, S - 0.2], [X_S, X_S], color=style.FAINT, linewidth=0.8, dashes=(2, 3))
        draw_steps(ax, k)
        draw_gaussian(ax, k, gaussian.mean.item(), gaussian.std.item())
        ax.set(xlim=(T + 0.08, S - 0.22), ylim=(LOW, HIGH), yticks=[])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(bottom=False)
    axes[-1].set_xticks([T, S], ["t", "s"], style="italic")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_steps(ax: Axes, k: int) -> None:
    """The sub-steps of the k-term, from x_t to the observed x_s."""
    times, x = states(k)
    ends = [*zip(times, x), (S, X_S)]
    u = np.linspace(0, 1, 200)
    for j in range(k):
        (t_0, x_0), (t_1, x_1) = ends[j : j + 2]
        prime = "'" * j
        wave, colour = 0.0 * u, EULER
        if j == k - 1:
            wave, colour = 0.11 * np.sin(2 * np.pi * u * round(36 * (t_0 - t_1))), SDE
        ax.plot(t_0 + u * (t_1 - t_0), x_0 + u * (x_1 - x_0) + wave, color=colour)
        middle = ((t_0 + t_1) / 2, (x_0 + x_1) / 2 - 0.22)
        ax.text(*middle, f"$v(x{prime}, t{prime})$", color=colour, va="top")
        ax.plot(t_0, x_0, "o", color=style.INK, markerfacecolor="white" if j else style.INK)
        ax.text(t_0, x_0 + 0.25, f"$x{prime or '_t'}$", ha="center")
    ax.plot(S, X_S, "o", color=style.INK, zorder=3)
    ax.text(S, X_S + 0.25, "$x_s$", ha="center")


def draw_gaussian(ax: Axes, k: int, mean: float, std: float) -> None:
    """The density of N(mean, std^2), to the right of s; its value at x_s, its mean and its std."""
    base, unit = S - 0.03, -0.085  # where the density is 0, and how far right of it 1 is
    x = np.linspace(mean - 3 * std, mean + 3 * std, 200)
    curve = base + unit * normal_density(x, mean, std)
    ax.fill_betweenx(x, base, curve, color=SDE, alpha=0.2, linewidth=0)
    ax.plot(curve, x, color=SDE)
    ax.plot(base + unit * normal_density(X_S, mean, std), X_S, "o", color=style.INK, zorder=3)
    peak = base + unit * normal_density(mean, mean, std)
    ax.text(peak - 0.006, mean, rf"$\mu^{{({k})}}$", color=SDE, va="center")
    ax.plot([base - 0.008] * 2, [mean, mean - std], color=SDE, marker="_", markersize=5, lw=1)
    ax.text(base - 0.013, mean - std / 2, f"$c_{k}$", color=SDE, size=9, va="center")


def normal_density(x: Any, mean: float, std: float) -> Any:
    """The density of N(mean, std^2) at x."""
    return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
