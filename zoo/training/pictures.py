"""The pictures a run leaves: images with their scores, before and after, and the curve in between."""

from __future__ import annotations

import textwrap
from itertools import product
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


class Block(NamedTuple):
    """Images [rows, n, 3, H, W] of one moment, and the first judge's scores [rows, n]."""

    images: Tensor
    scores: Tensor


def draw_grid(columns: dict[str, Block], prompts: list[str], path: Path) -> None:
    """One row per prompt, one block per column title; each image has its score: right or wrong if it is 1 or 0."""
    rows, (n, _, H, W) = len(prompts), next(iter(columns.values())).images.shape[1:]
    width = min(max(0.9, W / 150), 2.4)  # inches
    figure = Figure(
        figsize=(width * n * len(columns) + 2.6, (width * H / W + 0.15) * rows + 0.5),
        layout="constrained",
    )
    axes = figure.subplots(rows, n * len(columns), squeeze=False)
    smooth = "nearest" if W <= 64 else "antialiased"
    for column, (title, block) in enumerate(columns.items()):
        for i, j in product(range(rows), range(n)):
            ax, score = axes[i, column * n + j], block.scores[i, j].item()
            ax.imshow(block.images[i, j].permute(1, 2, 0).numpy(), interpolation=smooth)
            ax.set(xticks=[], yticks=[])
            if score in (0, 1):
                mark, colour = ("✗", "#c0392b") if score == 0 else ("✓", "#2a7f3b")
                ax.text(
                    0.97,
                    0.03,
                    mark,
                    transform=ax.transAxes,
                    ha="right",
                    va="bottom",
                    color=colour,
                    fontsize=11,
                    fontweight="bold",
                )
                for edge in ax.spines.values():
                    edge.set(color=colour, linewidth=2)
            else:
                ax.set_xlabel(f"{score:.3g}", fontsize=8, labelpad=2)
        axes[0, column * n].set_title(title, loc="left", fontsize=11)
    for i, prompt in enumerate(prompts):
        axes[i, 0].set_ylabel(
            textwrap.fill(prompt, 22, max_lines=6), rotation=0, ha="right", va="center", fontsize=8
        )
    figure.savefig(path, dpi=110)


def draw_curve(lines: list[dict], judge: str, path: Path) -> None:
    """Training reward, and below it the first judge's held-out mean, against iterations: their units may differ."""
    figure = Figure(figsize=(6, 4.2))
    axes = figure.subplots(2, sharex=True)
    for ax, name, style, colour, label in (
        (axes[0], "reward", "-", "0.45", "reward of the rollouts"),
        (axes[1], f"heldout_{judge}", "o-", "#1f5fa8", f"held-out, {judge}"),
    ):
        points = [(m["iteration"], m[name]) for m in lines if name in m]
        ax.plot([i for i, _ in points], [y for _, y in points], style, color=colour)
        ax.set_title(label, loc="left", fontsize=9)
        ax.grid(alpha=0.3)
    axes[1].set_xlabel("iteration")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
