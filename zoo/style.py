"""One style for every picture: sizes, inks, a palette, and labels beside what they name.

A picture is WIDTH inches wide and is read at some 800 pixels: its text is then as large as the
page's. The palette is Okabe and Ito's, which colour-blind readers can tell apart, and whatever has
a colour has a word or a mark as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

P = ParamSpec("P")
R = TypeVar("R")

WIDTH, DPI = 8.0, 160
INK, FAINT, HAIR = "#1f2328", "#6e7781", "#d0d7de"  # text and axes; what comes second; lines behind
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RIGHT, WRONG = "#007a5a", "#d55e00"

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.xmargin": 0.02,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": HAIR,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "pave-grpo",  # the same file from the same picture
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """The same drawing function, in this style."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(RC):
            return draw(*args, **kwargs)

    return in_style


def colour_of(name: str, names: Sequence[str]) -> str:
    """The colour of a name by its place among names; beyond the palette, colours come again."""
    return PALETTE[list(names).index(name) % len(PALETTE)]


def canvas(height: float, message: str, note: str = "") -> Figure:
    """An empty picture, `height` inches high: its message, and below it lines on what is drawn."""
    top = 0.45 + 0.18 * len(note.splitlines())
    room = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - top / height), w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(WIDTH, height), layout=room)
    figure.text(0.08 / WIDTH, 1 - 0.1 / height, message, size=13, weight="bold", va="top")
    figure.text(0.08 / WIDTH, 1 - 0.4 / height, note, size=9, color=FAINT, va="top")
    return figure


class Label(NamedTuple):
    """Words that name what is drawn at height y of the data, in its colour."""

    y: float
    text: str
    colour: str


def label_right(figure: Figure, labels_of: dict[Axes, list[Label]]) -> None:
    """Write labels to the right of finished axes, each at its height or as near as can be read."""
    layout = figure.get_layout_engine()
    if layout:
        layout.execute(figure)  # settles where the axes are
    for ax, labels in labels_of.items():
        label_axes_right(figure, ax, labels)


def label_axes_right(figure: Figure, ax: Axes, labels: Sequence[Label]) -> None:
    """The labels of one of them."""
    line = 0.17 / (ax.get_position().height * figure.get_figheight())
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform((ax.get_xlim()[1], label.y))[1] for label in labels]
    for label, height in zip(labels, spread(heights, line)):
        text = ax.text(1.015, height, label.text, color=label.colour, size=9, va="center")
        text.set_transform(ax.transAxes)


def spread(heights: Sequence[float], least: float) -> list[float]:
    """The heights, those closer than `least` moved apart by equal parts; their order stays."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=placed.__getitem__)
    for _ in range(100):
        for low, high in pairwise(order):
            overlap = least - (placed[high] - placed[low])
            if overlap > 0:
                placed[low] -= overlap / 2
                placed[high] += overlap / 2
    return placed
