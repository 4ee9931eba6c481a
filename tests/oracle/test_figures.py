"""The oracle's pictures, number by number: what is drawn, read from the axes."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from zoo.oracle import draw_attribution, draw_decomposition, figures, theory
from zoo.oracle.bench import ETA, Bench

KERNELS = ("flow_sde", "cps")


@pytest.fixture
def bench():
    return Bench(KERNELS, (2, 3))


def drawn(ax, kernel):
    """The curves of a kernel, [[x], [y]] each, in the order they were drawn."""
    own = figures.colour_of(kernel)
    return [np.array(line.get_data()).tolist() for line in ax.lines if line.get_color() == own]


def test_weights_are_drawn_on_the_papers_schedule(bench):
    """(c_1/c_k)^2 of theory for k = 2 and 3, 16 steps, shift 3, eta 0.8; t = 1 set apart."""
    first, rest = figures.weight(bench).axes
    u = [1 - i / 16 for i in range(17)]
    grid = [3 * z / (1 + 2 * z) for z in u]
    for column, kernel in enumerate(KERNELS):
        record = theory.of(kernel, 0.8)
        steps = range(15 if kernel == "cps" else 16)  # cps has no density at s = 0
        for i, k in enumerate((2, 3)):
            wanted = [record.scale(k, grid[j], grid[j + 1]) for j in steps]
            x, y = drawn(rest, kernel)[i]
            assert x == pytest.approx(grid[1 : len(steps)]) and y == pytest.approx(wanted[1:])
            x, y = drawn(first, kernel)[i]
            assert x == [column] and y == pytest.approx(wanted[:1])


def rows_of(k, shift=0.0):
    """Two steps of each kernel, every number its own."""
    made = []
    for n, kernel in enumerate(KERNELS):
        for step, t in enumerate((1.0, 0.75)):
            number = 0.1 * n + 0.01 * step + shift
            shares = [(t - j * 0.25 / k, 0.2 + 0.1 * j + number / 10) for j in range(k)]
            row = {"kernel": kernel, "k": k, "t": t, "s": t - 0.25, "share": shares}
            made.append(row | {"cosine": 0.5 + number, "group": 0.9 + number / 10})
    return made


def test_cosines_are_drawn_by_kernel(bench):
    """Each kernel its own steps; the group's attribution of all of them in one mark."""
    rows = rows_of(3)
    (ax,) = figures.cosine(bench, rows, "a note").axes
    for kernel in KERNELS:
        own = [row for row in rows if row["kernel"] == kernel]
        ((x, y),) = drawn(ax, kernel)
        assert x == [row["t"] for row in own] and y == [row["cosine"] for row in own]
    crosses = next(line for line in ax.lines if line.get_marker() == "x")
    assert list(crosses.get_ydata()) == [row["group"] for row in rows]
    assert list(crosses.get_xdata()) == [row["t"] for row in rows]


def test_gaps_are_drawn_by_size(bench):
    """|mu^(k) - mu^(1)| / c_1 by definition, and the slope of the last four sizes beside it."""
    (ax,) = figures.gap(bench, 3).axes
    field = bench.fixture("network").field
    x = bench.normal(2, *bench.fixture("network").shape, of="e6 0")
    for kernel in KERNELS:
        record, gaps = theory.of(kernel, ETA), []
        sizes = [2.0**-i for i in range(2, 13)]

        def velocity(state, t):
            with torch.no_grad():
                return field(state, torch.full((2,), t, dtype=torch.float64), torch.arange(2))

        for D in sizes:
            fine, _ = record.decomposed(velocity, x, 0.7, 0.7 - D, 3)
            coarse, std = record.decomposed(velocity, x, 0.7, 0.7 - D, 1)
            gaps.append(((fine - coarse).norm() / std).item())
        ((found_x, found_y),) = drawn(ax, kernel)
        assert found_x == sizes and found_y == pytest.approx(gaps, rel=1e-6)
        slope = math.log2(gaps[-5] / gaps[-1]) / 4
        assert any(f"{kernel}: $D^{{{slope:.2f}}}$" in text.get_text() for text in ax.texts)


def test_bars_stand_where_velocities_are_evaluated(bench):
    """A panel for each kernel; a bar for each share, at its time; a circle at each step's start."""
    rows = rows_of(3)
    for ax, kernel in zip(figures.attribution(bench, rows, "a note").axes, KERNELS, strict=True):
        own = [row for row in rows if row["kernel"] == kernel]
        wanted = [share for row in own for share in row["share"]]
        bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches]
        assert np.allclose(bars, wanted)
        circles = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert circles == [row["t"] for row in own]


def test_the_largest_k_is_drawn_and_no_other(bench, monkeypatch, tmp_path):
    """Rows of other k are left out, and each picture has its own name."""
    seen = {}
    for name in ("cosine", "gap", "attribution"):
        plain = getattr(figures, name)

        def noted(bench, of, *note, name=name, plain=plain):
            seen[name] = of
            made = plain(bench, of, *note)
            made.savefig = lambda path, dpi: seen.update({path.name: name})
            return made

        monkeypatch.setattr(figures, name, noted)
    figures.draw_figures(bench, rows_of(2, shift=0.5) + rows_of(3), tmp_path)
    assert seen["cosine"] == seen["attribution"] == rows_of(3) and seen["gap"] == 3
    assert {path: seen[path] for path in ("cosine.png", "gap.png", "attribution.png")} == {
        "cosine.png": "cosine",
        "gap.png": "gap",
        "attribution.png": "attribution",
    }


# ---- The drawn decomposition ---------------------------------------------------------------------


def test_the_drawn_flow_is_of_its_data():
    """N(1, 0.02): v = (t - (1-t) q) / ((1-t)^2 q + t^2) (x - (1-t) m) - m."""
    x, t = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    wanted = (0.6 - 0.4 * 0.02) / (0.16 * 0.02 + 0.36) * (0.4 - 0.4) - 1.0
    assert draw_decomposition.velocity(x, t, None).item() == pytest.approx(wanted)
    assert draw_decomposition.velocity(x + 1, t, None).item() == pytest.approx(
        wanted + (0.6 - 0.4 * 0.02) / (0.16 * 0.02 + 0.36)
    )


def test_every_row_ends_at_the_observed_state_under_its_gaussian(monkeypatch, tmp_path):
    """Sub-steps from x_t to x_s; the density is that of its mean and std, and integrates to 1."""
    kept = {}
    plain = draw_decomposition.style.canvas

    def canvas(*given):
        kept["figure"] = plain(*given)
        return kept["figure"]

    monkeypatch.setattr(draw_decomposition.style, "canvas", canvas)
    draw_decomposition.draw(tmp_path / "drawn.svg")
    record = theory.of("flow_sde", 0.7)
    for ax, k in zip(kept["figure"].axes, (1, 2, 3), strict=True):
        steps = [np.array(line.get_data()) for line in ax.lines if len(line.get_xdata()) == 200]
        *sub_steps, curve = steps
        assert len(sub_steps) == k
        assert sub_steps[0][:, 0] == pytest.approx([0.7, -0.6])
        assert sub_steps[-1][:, -1] == pytest.approx([0.3, 0.9], abs=1e-6)

        def velocity(x, t):
            at = torch.tensor([t], dtype=torch.float64)
            x = torch.tensor([[x]], dtype=torch.float64)
            return draw_decomposition.velocity(x, at, None).item()

        d = 0.4 / k
        for before, after in pairwise(sub_steps):  # Euler, from the dot at its start
            (t, x), (t_1, x_1) = before[:, 0], after[:, 0]
            assert before[:, -1] == pytest.approx([t_1, x_1])
            assert (t_1, x_1) == pytest.approx((t - d, x - d * velocity(x, t)))

        mean, std = record.decomposed(velocity, -0.6, 0.7, 0.3, k)
        density, x = (0.27 - curve[0]) / 0.085, curve[1]
        area = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert area == pytest.approx(0.9973, abs=1e-3)  # within 3 std
        assert density.max() == pytest.approx(1 / (std * math.sqrt(2 * math.pi)), rel=1e-3)
        assert (x[0] + x[-1]) / 2 == pytest.approx(mean)


# ---- The drawn attribution -----------------------------------------------------------------------


def test_the_drawn_modes_have_their_velocity():
    """E[x_1 - x_0 | x_t]: each mode's conditional mean, weighed by its density at x_t."""
    t, q = 0.6, draw_attribution.Q
    x = torch.tensor([[0.3, -0.4], [1.2, 0.1]], dtype=torch.float64)
    found = draw_attribution.velocity(x, torch.full((2,), t, dtype=torch.float64), None)
    for row, v in zip(x, found):
        total, wanted = 0.0, torch.zeros(2, dtype=torch.float64)
        for m in draw_attribution.MODES:
            mean, var = (1 - t) * m, (1 - t) ** 2 * q + t**2
            density = Normal(mean, var**0.5).log_prob(row).sum().exp()
            x_0 = m + (1 - t) * q / var * (row - mean)
            x_1 = t / var * (row - mean)
            total, wanted = total + density, wanted + density * (x_1 - x_0)
        torch.testing.assert_close(v, wanted / total, rtol=0, atol=1e-12)


def test_the_drawn_sums_are_what_the_groups_ask():
    """Parallel from one anchor, as long as (c_1/c_k)^2; of their own trajectories apart."""
    t, s = draw_attribution.GRID[1:3]
    record = theory.of(draw_attribution.KERNEL, draw_attribution.ETA)
    for mode in ("shared_anchor", "independent"):
        group, turned = draw_attribution.sampled(mode), {}
        for k in (1, 2, 3):
            c_k, total = record.std(k, t, s), torch.zeros(2, dtype=torch.float64)
            for i, A in enumerate(group.advantages):
                x = group.x_t[i % len(group.x_t)][None]

                def velocity(x, time):
                    at = torch.tensor([time], dtype=torch.float64)
                    return draw_attribution.velocity(x, at, None)

                mean, std = record.decomposed(velocity, x, t, s, k)
                total += A * (group.x_s[i] - mean[0]) / c_k**2 / 12
                assert group.std[k] == pytest.approx(std)
            torch.testing.assert_close(group.pull[k], total, rtol=1e-9, atol=1e-9)
            turned[k] = (total / total.norm()) @ group.pull[1] / group.pull[1].norm()
            if mode == "shared_anchor":
                size = (total.norm() / group.pull[1].norm()).item()
                assert size == pytest.approx(record.scale(k, t, s))
        apart = [math.degrees(math.acos(min(1.0, turned[k].item()))) for k in (2, 3)]
        assert max(apart) < 1e-5 if mode == "shared_anchor" else min(apart) > 10


def test_the_sums_are_drawn_in_their_directions(monkeypatch, tmp_path):
    """Three arrows below each group; the third panel has one, two and three states."""
    seen, kept = [], {}
    plain, canvas = draw_attribution.arrow, draw_attribution.style.canvas

    def arrow(ax, start, step, colour, width, alpha):
        if width > 2:
            seen.append((ax, step))
        plain(ax, start, step, colour, width, alpha)

    def kept_canvas(*given):
        kept["figure"] = canvas(*given)
        return kept["figure"]

    monkeypatch.setattr(draw_attribution, "arrow", arrow)
    monkeypatch.setattr(draw_attribution.style, "canvas", kept_canvas)
    draw_attribution.draw(tmp_path / "drawn.png")
    for ax, mode in zip(kept["figure"].axes, ("shared_anchor", "independent")):
        steps = [step for place, step in seen if place is ax]
        pulls = draw_attribution.sampled(mode).pull.values()
        for step, pull in zip(steps, pulls, strict=True):
            torch.testing.assert_close(step / step.norm(), pull / pull.norm())
    dots = [line for line in kept["figure"].axes[2].lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [1, 2, 3]
