"""The pictures a run leaves: images with their scores, before and after, and the curve in between.

python -m zoo.training.pictures runs/shapes-1 [--beside runs/shapes-2] --out curve.png
    draws the curves of finished runs into one picture
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from zoo import style

# A grid in its own pixels: a picture's width, and the room between a pair, between pairs, below a
# picture for its score, at the left for the prompts, for a line of text, and at the edges.
SIDE, NEAR, APART, BELOW, NAMES, LINE, EDGE = 128, 4, 30, 44, 244, 24, 14


class Block(NamedTuple):
    """Images [rows, n, 3, H, W] of one moment, and the first judge's scores [rows, n]."""

    images: Tensor
    scores: Tensor


@style.styled
def draw_grid(
    columns: dict[str, Block], prompts: Sequence[str], path: Path, headline: str = ""
) -> None:
    """A row per prompt: for each noise, the pictures of all columns side by side, scores below.

    Scores that are all 0 or 1 are shown as wrong or right, and pairs that differ are tinted.
    """
    blocks, paired = list(columns.values()), len(columns) > 1
    n, _, H, W = blocks[0].images.shape[1:]
    high = round(SIDE * H / W)
    binary = all(bool((block.scores * (block.scores - 1) == 0).all()) for block in blocks)
    pitch = len(blocks) * (SIDE + NEAR) + (APART if paired else NEAR)  # from noise to noise
    top = EDGE + LINE * (3 if headline else 1)
    size = (NAMES + n * pitch, top + len(prompts) * (high + BELOW))
    inches = (size[0] / style.DPI, size[1] / style.DPI)
    figure = Figure(figsize=inches, dpi=style.DPI)
    ax = figure.add_axes((0, 0, 1, 1))  # measured in pixels, from the upper left corner
    ax.axis("off")

    note = ("pairs of the same noise: " if paired else "") + " → ".join(columns)
    note += "; tinted where the verdict changed" if paired and binary else ""
    ax.text(EDGE, EDGE, headline, size=13, weight="bold", va="top")
    ax.text(NAMES, top - 10, note, color=style.FAINT, size=9, va="bottom")
    for i, prompt in enumerate(prompts):
        y = top + i * (high + BELOW)
        name = textwrap.fill(prompt, 21, max_lines=(high + BELOW) // LINE, placeholder=" …")
        name_at = (NAMES - EDGE, y + high / 2)
        ax.text(*name_at, name, size=9, ha="right", va="center", parse_math=False)
        for j in range(n):
            group = [Block(block.images[i, j], block.scores[i, j]) for block in blocks]
            draw_group(ax, group, NAMES + j * pitch, y, high, binary)
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    figure.savefig(path, dpi=style.DPI * (1 if W <= SIDE else 2))


def draw_group(
    ax: Axes, group: Sequence[Block], x: float, y: float, high: float, binary: bool
) -> None:
    """The pictures [3, H, W] of one noise from (x, y) to the right, each over its score []."""
    scores = [score.item() for _, score in group]
    if binary and scores[0] != scores[-1]:
        wide = len(group) * (SIDE + NEAR) - NEAR
        tint = style.RIGHT if scores[-1] else style.WRONG
        box = Rectangle((x - 8, y - 8), wide + 16, high + BELOW - 8, linewidth=0)
        box.set(color=tint, alpha=0.13)
        ax.add_patch(box)
    for (image, _), score in zip(group, scores):
        smooth = "nearest" if image.shape[-1] <= SIDE else "antialiased"
        place = (x, x + SIDE, y + high, y)
        ax.imshow(image.permute(1, 2, 0).numpy(), extent=place, interpolation=smooth, zorder=2)
        text, size, colour = f"{score:#.3g}".rstrip("."), 10, style.INK
        if binary:
            text, size, colour = ("✓", 14, style.RIGHT) if score else ("✗", 14, style.WRONG)
        below = (x + SIDE / 2, y + high + 15)
        ax.text(*below, text, size=size, color=colour, ha="center", va="center")
        x += SIDE + NEAR


class Curve(NamedTuple):
    """A run to draw: its name, and the lines of its metrics.jsonl."""

    name: str
    lines: Sequence[dict]

    def points(self, metric: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a metric, where it was measured."""
        found = [line for line in self.lines if metric in line]
        return [line["iteration"] for line in found], [line[metric] for line in found]


def headline(lines: Sequence[dict], judge: str) -> str:
    """The judge's held-out mean, first and last: what the lines of a metrics.jsonl have to say."""
    _, values = Curve("", lines).points(f"heldout_{judge}")
    ends = values[:1] + values[1:][-1:]
    return f"Held-out {judge}: " + " → ".join(f"{value:.3f}" for value in ends) if ends else ""


@style.styled
def draw_curve(
    lines: Sequence[dict],
    judge: str,
    path: Path,
    *,
    pairs: int = 0,
    name: str = "",
    beside: Sequence[Curve] = (),
    note: str = "",
) -> None:
    """The judge's held-out mean and, as units may differ, below it the reward of the rollouts.

    pairs: how many the mean is over. The judge `right` says 0 or 1 of each, so that its mean p has
    a standard error, sqrt(p (1 - p) / pairs), drawn as a band. beside: other runs, in these axes.
    """
    figure = style.canvas(5.4, headline(lines, judge), note)
    held, train = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    banded = pairs > 0 and judge == "right"
    band = f", and one standard error of {pairs} pairs" if banded else ""
    held.set_title(f"held-out, {judge}: mean{band}", color=style.FAINT)
    train.set_title("reward of the rollouts, and its running mean", color=style.FAINT)
    ends: dict[Axes, list[style.Label]] = {held: [], train: []}
    for colour, curve in zip(style.PALETTE, [Curve(name, lines), *beside]):
        at, means = curve.points(f"heldout_{judge}")
        held.plot(at, means, "o-", color=colour)
        if banded:
            errors = [(p * (1 - p) / pairs) ** 0.5 for p in means]
            low = [p - error for p, error in zip(means, errors)]
            high = [p + error for p, error in zip(means, errors)]
            held.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        ends[held] += [style.Label(p, f"{p:.3f}  {curve.name}", colour) for p in means[-1:]]

        at, rewards = curve.points("reward")
        near = len(rewards) // 16
        smooth = [fmean(rewards[max(0, i - near) : i + near + 1]) for i in range(len(rewards))]
        train.plot(at, rewards, color=colour, alpha=0.35, linewidth=1)
        train.plot(at, smooth, color=colour)
        ends[train] += [style.Label(r, f"{r:.3f}  {curve.name}", colour) for r in smooth[-1:]]
    train.set_xlabel("iteration")
    train.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.label_right(figure, ends)
    figure.savefig(path, dpi=style.DPI)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves of run folders. Where there is no run: one line, status 2."""
    parser = argparse.ArgumentParser("python -m zoo.training.pictures", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders of other runs")
    parser.add_argument("--out", type=Path, default="curve.png", help="picture to write")
    o = parser.parse_args(argv)
    curves, notes, configs = [], [], []
    try:
        for folder in (o.run, *o.beside):
            config = json.loads((folder / "config.json").read_text())
            summary = json.loads((folder / "summary.json").read_text())
            log = (folder / "metrics.jsonl").read_text().splitlines()
            name = "S = {" + ", ".join(map(str, config["factors"])) + "}"
            curves.append(Curve(name, [json.loads(line) for line in log]))
            notes.append(f"{name}: {summary['command']}  (seed {config['seed']})")
            configs.append(config)
    except OSError as problem:
        parser.exit(2, f"zoo.training.pictures: error: {problem.filename}: {problem.strerror}\n")
    draw_curve(
        curves[0].lines,
        configs[0]["eval_reward"][0],
        o.out,
        pairs=configs[0]["heldout"],
        name=curves[0].name,
        beside=curves[1:],
        note="\n".join(notes),
    )


if __name__ == "__main__":
    main()
