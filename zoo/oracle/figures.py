"""The oracle's pictures, one message each: `python verify_equivalence.py --plots DIR`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter, PercentFormatter

import pave_grpo as pave
from zoo import style
from zoo.oracle.bench import Bench
from zoo.oracle.measures import one_step


@style.styled
def draw_figures(bench: Bench, table: list[dict], folder: Path) -> list[Path]:
    """weight.png, cosine.png, gap.png and attribution.png. table: what comparison.compare gives."""
    k = bench.factors[-1]
    rows = [row for row in table if row["k"] == k]
    path = bench.model.path if bench.model else ""
    model = Path(path).name or "embedded model"
    pictures = {
        "weight": weight(bench),
        "cosine": cosine(bench, rows, f"k = {k}, 8 steps, {model}"),
        "gap": gap(bench, k),
        "attribution": attribution(bench, rows, f"k = {k}, {model}"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=style.DPI)
    return [folder / f"{name}.png" for name in pictures]


def colour_of(kernel: str) -> str:
    """A kernel's own colour, by its place in pave_grpo."""
    return style.colour_of(kernel, list(pave.KERNELS))


def weight(bench: Bench) -> Figure:
    """(c_1/c_k)^2 along the schedule the paper trains with."""
    message = "How loud a k-term is beside its written weight 1/|S|"
    note = (
        "16 steps, shift 3, η = 0.8. Set apart: the step from t = 1, where a kernel whose g is\n"
        "infinite takes it from the grid's second point."
    )
    figure, labels = style.canvas(4.6, message, note), [style.Label(1.0, "as written", style.INK)]
    first, rest = figure.subplots(1, 2, sharey=True, width_ratios=(1, 7))
    for column, kernel in enumerate(bench.kernels):
        process, colour = pave.Process(pave.schedule(16, 3.0), kernel, 0.8), colour_of(kernel)
        steps = list(process.stochastic_steps())
        t, s = process.grid[:-1][steps], process.grid[1:][steps]
        for k, marker in zip(bench.factors[:2], "os"):
            c_1 = process.coefficients(t, s).std
            c_k = process.coefficients(s + (t - s) / k, s).std
            ratio = (c_1 / c_k) ** 2
            first.plot(column, ratio[0], marker, color=colour)
            rest.plot(t[1:], ratio[1:], marker + "-", color=colour, markersize=5)
            labels.append(style.Label(ratio[-1].item(), f"{kernel}, k = {k}", colour))
    for ax in (first, rest):
        ax.axhline(1, color=style.INK, linewidth=1, zorder=1)
    first.set(xlim=(-0.7, len(bench.kernels) - 0.3), xticks=[], xlabel="t = 1", yscale="log")
    first.set_ylabel(r"effective weight $(c_1/c_k)^2$")
    first.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    first.yaxis.set_major_formatter("{x:g}")
    first.yaxis.set_minor_formatter(NullFormatter())
    rest.set_xlabel("start t of the step")
    rest.invert_xaxis()
    style.label_right(figure, {rest: labels})
    return figure


def cosine(bench: Bench, rows: list[dict], note: str) -> Figure:
    """The cosine of parameter gradients, and of the group's attribution, with the original's."""
    message = "Attribution keeps its direction, parameter gradients turn"
    figure = style.canvas(4.2, message, note)
    ax, labels = figure.subplots(), []
    group = [row["group"] for row in rows]
    times = [row["t"] for row in rows]
    ax.plot(times, group, "x", color=style.INK, markersize=8, markeredgewidth=1.5)
    labels.append(style.Label(1.0, "group's attribution,\nevery kernel", style.INK))
    for kernel in bench.kernels:
        own = [row for row in rows if row["kernel"] == kernel]
        cosines = [row["cosine"] for row in own]
        ax.plot([row["t"] for row in own], cosines, "o-", color=colour_of(kernel))
        labels.append(style.Label(cosines[-1], f"gradient, {kernel}", colour_of(kernel)))
    ax.set(xlabel="start t of the step", ylabel="cosine with the original")
    ax.invert_xaxis()
    style.label_right(figure, {ax: labels})
    return figure


def gap(bench: Bench, k: int) -> Figure:
    """|mu^(k) - mu^(1)| / c_1 of steps from t = 0.7, against their size D."""
    name = "embedded" if bench.model else "network"
    fixture = bench.fixture(name)
    x = bench.normal(2, *fixture.shape, of="e6 0")
    sizes = [2.0**-i for i in range(2, 9 if bench.model else 13)]
    field = "the model" if bench.model else "a small tanh network"
    figure = style.canvas(4.2, "How the two means meet as steps shrink", f"k = {k}, {field}")
    ax, labels = figure.subplots(), []
    for kernel in bench.kernels:
        gaps = []
        for D in sizes:
            with torch.no_grad():
                p = one_step(fixture.field, kernel, x, 0.7, 0.7 - D, (k,))
            gaps.append(((p[k].mean - p[1].mean).norm() / p[1].std[0]).item())
        slope = math.log(gaps[-1] / gaps[-5]) / math.log(sizes[-1] / sizes[-5])
        ax.plot(sizes, gaps, "o-", color=colour_of(kernel))
        labels.append(style.Label(gaps[-1], f"{kernel}: $D^{{{slope:.2f}}}$", colour_of(kernel)))
    ax.set(xscale="log", yscale="log", xlabel="step size D = t − s, from t = 0.7")
    ax.set_ylabel(rf"$|\mu^{{({k})}} - \mu^{{(1)}}| \,/\, c_1$")
    ax.invert_xaxis()
    style.label_right(figure, {ax: labels})
    return figure


def attribution(bench: Bench, rows: list[dict], note: str) -> Figure:
    """Where in time the k-term's gradient acts: a panel per kernel, all to one scale."""
    owns = {kernel: [row for row in rows if row["kernel"] == kernel] for kernel in bench.kernels}
    spans = {kernel: span(own) for kernel, own in owns.items()}
    ratios = [high - low for low, high in spans.values()]
    figure = style.canvas(
        1.4 + 0.3 * len(owns) + 0.6 * sum(ratios),
        "One step's reward reaches k moments instead of one",
        f"{note}. Bars: shares of the k-term's gradient, adding up to 100% in each step.\n"
        "Circles: the original, all of it where the step starts.",
    )
    axes = figure.subplots(len(owns), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (kernel, own) in zip(axes, owns.items()):
        colour, (low, high) = colour_of(kernel), spans[kernel]
        ax.set_title(kernel, color=colour, weight="bold")
        for n, row in enumerate(own):
            times = [time for time, _ in row["share"]]
            shares = [share for _, share in row["share"]]
            width = 0.85 * (row["t"] - row["s"]) / len(times)
            bars = ax.bar(times, shares, width, color=colour, alpha=(1.0, 0.55)[n % 2])
            beyond = ["" if -0.5 < share <= 1 else f"{share:.0%}" for share in shares]
            ax.bar_label(bars, beyond, size=9, padding=1)
            ax.plot(row["t"], 1.0, "o", color=style.INK, markerfacecolor="white", markersize=5)
        ax.axhline(0, color=style.FAINT, linewidth=0.8)
        ax.grid(visible=False, axis="x")
        ax.yaxis.set_major_locator(MultipleLocator(0.5))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylim(low, high)
    axes[-1].set_xlabel("time t′ at which a velocity is evaluated")
    axes[-1].invert_xaxis()
    return figure


def span(own: list[dict]) -> tuple[float, float]:
    """The shares a panel has to hold, 0 and 1 among them, and room for labels."""
    shares = [share for row in own for _, share in row["share"]]
    low, high = min(0.0, *shares), max(1.0, *shares)
    return low - (0.35 if low < -0.5 else 0.1), high + (0.4 if high > 1 else 0.2)
