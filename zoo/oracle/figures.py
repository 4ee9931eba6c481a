"""The oracle's pictures."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import pave_grpo as pave
from zoo.oracle.bench import Bench, one_step

STYLES = {
    "flow_sde": ("o-", "0.0"),
    "cps": ("s--", "0.35"),
    "dance": ("^:", "0.6"),
}  # readable in grey


def draw_figures(bench: Bench, table: list[dict], folder: Path) -> list[Path]:
    """weight.png, cosine.png, gap.png and attribution.png: one message each."""
    from matplotlib.figure import Figure

    pictures, k = {}, bench.factors[-1]

    def canvas(name, title, xlabel, ylabel):
        """Axes of a new picture."""
        pictures[name] = figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        ax = figure.subplots()
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_title(title, fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
        return ax

    def line(ax, kernel, x, y, label, size=5.0):
        style, grey = STYLES[kernel]
        ax.plot(x, y, style, color=grey, ms=size, lw=1.2, label=label)

    ax = canvas(
        "weight",
        "How loud a k-term is beside its written weight 1/|S|",
        "start t of the step (16 steps, shift 3)",
        r"effective weight $(c_1/c_k)^2$",
    )
    for kernel in bench.kernels:
        process = pave.Process(pave.schedule(16, 3.0), kernel, 0.8)
        steps = list(process.stochastic_steps())
        t, s = process.grid[:-1][steps], process.grid[1:][steps]
        for factor in bench.factors[:2]:
            weight = (
                process.coefficients(t, s).std / process.coefficients(s + (t - s) / factor, s).std
            ) ** 2
            line(ax, kernel, t, weight, f"{kernel}, k = {factor}", 3.0 * factor - 2)
    ax.set_ylim(bottom=0)
    ax.invert_xaxis()

    model = Path(bench.model.path).name or "embedded model" if bench.model else "embedded model"
    ax = canvas(
        "cosine",
        f"Parameter gradients of a k-term beside the original's\n({model}, k = {k})",
        "start t of the step (8 steps)",
        "cosine with the original",
    )
    for kernel in bench.kernels:
        rows = [r for r in table if r["kernel"] == kernel and r["k"] == k]
        line(
            ax,
            kernel,
            [r["t"] for r in rows],
            [r["cosine"] for r in rows],
            f"{kernel}: parameter gradient",
        )
    rows = [r for r in table if r["k"] == k]
    ax.plot(
        [r["t"] for r in rows],
        [r["group"] for r in rows],
        "x",
        color="0.2",
        ms=8,
        label="all: group's attribution",
    )
    ax.invert_xaxis()

    ax = canvas(
        "gap",
        "How the two means meet as steps shrink",
        "step size D = t - s, from t = 0.7",
        rf"$|\mu^{{({k})}} - \mu^{{(1)}}| \,/\, c_1$",
    )
    name = "embedded" if bench.model else "network"
    x = bench.normal(2, *bench.fixture(name).shape, of="e6 0")
    sizes = [2.0**-i for i in range(2, 9 if bench.model else 13)]
    for kernel in bench.kernels:
        with torch.no_grad():
            pairs = [
                one_step(bench.fixture(name).field, kernel, x, 0.7, 0.7 - D, (k,)) for D in sizes
            ]
        gaps = [((p[k].mean - p[1].mean).norm() / p[1].std[0]).item() for p in pairs]
        slope = math.log(gaps[-1] / gaps[-5]) / math.log(sizes[-1] / sizes[-5])
        line(ax, kernel, sizes, gaps, f"{kernel}: slope {slope:.2f}")
    ax.set(xscale="log", yscale="log")

    kernel = bench.kernels[0]
    ax = canvas(
        "attribution",
        f"One step's reward reaches k moments instead of one\n({model}, {kernel}, k = {k})",
        "time t' at which a velocity is evaluated",
        "share of the step's gradient",
    )
    for n, r in enumerate(r for r in table if r["kernel"] == kernel and r["k"] == k):
        ax.bar(
            [t for t, _ in r["share"]],
            [f for _, f in r["share"]],
            width=0.8 * (r["t"] - r["s"]) / k,
            color=("0.25", "0.65")[n % 2],
            edgecolor="0.1",
            lw=0.5,
        )
        ax.plot(
            r["t"],
            1.0,
            "v",
            color="0.1",
            ms=5,
            label="" if n else "original: all of it where the step starts",
        )
    ax.axhline(0, color="0.1", lw=0.6)
    ax.invert_xaxis()

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.axes[0].legend(fontsize=8, frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in pictures]
