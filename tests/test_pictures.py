"""Pictures: images where they belong and unspoiled, curves with their error, one style."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import pave_grpo as pg
from zoo import style
from zoo.oracle import draw_decomposition, fields
from zoo.oracle import figures as oracle_figures
from zoo.training import pictures
from zoo.training.pictures import EDGE, LINE, NAMES, NEAR, SIDE

LINES = [
    {"iteration": 0, "heldout_right": 0.5, "heldout_rule": 0.8},
    {"iteration": 1, "reward": 0.1},
    {"iteration": 2, "reward": 0.3},
    {"iteration": 2, "heldout_right": 0.8, "heldout_rule": 0.9},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been written."""
    kept = []

    def keep(figure, path, **options):
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def block(seed, H, W, binary):
    """2 x 3 images of one colour each, and their scores."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(256, (2, 3, 3, 1, 1), generator=generator) / 255
    scores = torch.rand(2, 3, generator=generator)
    images = colours.expand(2, 3, 3, H, W)
    return pictures.Block(images, scores.round() if binary else 20 * scores)


@pytest.mark.parametrize("H, W, scale", [(32, 32, 1), (16, 32, 1), (192, 256, 2)])
@pytest.mark.parametrize("titles", [("before",), ("before", "after 40 iterations")])
@pytest.mark.parametrize("binary", [True, False])
def test_a_grid_shows_each_image_in_its_place(tmp_path, H, W, scale, titles, binary):
    """Pictures of one noise are neighbours, and nothing is written on any of them."""
    columns = {title: block(seed, H, W, binary) for seed, title in enumerate(titles)}
    path = tmp_path / "grid.png"
    pictures.draw_grid(columns, ["it costs $5, not $6", "short"], path, "a headline")
    drawn = imread(path)[::scale, ::scale, :3]
    high = SIDE * H // W
    pitch = (drawn.shape[1] - NAMES) // 3
    row = (drawn.shape[0] - EDGE - 3 * LINE) // 2
    for column, (images, _) in enumerate(columns.values()):
        for i in range(2):
            for j in range(3):
                x = NAMES + j * pitch + column * (SIDE + NEAR)
                y = EDGE + 3 * LINE + i * row
                inside = drawn[y + 1 : y + high - 1, x + 1 : x + SIDE - 1]
                wanted = images[i, j].permute(1, 2, 0)[0, 0].numpy()
                assert np.abs(inside - wanted).max() < 0.5 / 255, (column, i, j)


@pytest.mark.parametrize("binary", [True, False])
def test_only_pairs_whose_verdict_changed_are_tinted(figures, tmp_path, binary):
    """A score of 0 or 1 is a verdict; other scores always change."""
    columns = {title: block(seed, 32, 32, binary) for seed, title in enumerate(("before", "after"))}
    pictures.draw_grid(columns, ["one", "two"], tmp_path / "grid.png")
    changed = (columns["before"].scores != columns["after"].scores).sum().item()
    assert changed > 0
    assert len(figures[0].axes[0].patches) == (changed if binary else 0)
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    right = sum(int(b.scores.sum()) for b in columns.values())
    assert texts.count("✓") == (right if binary else 0)
    assert texts.count("✗") == (12 - right if binary else 0)


def test_a_headline_says_the_first_and_the_last_heldout_mean():
    assert pictures.headline(LINES, "right") == "Held-out right: 0.500 → 0.800"
    assert pictures.headline(LINES[:2], "right") == "Held-out right: 0.500"
    assert pictures.headline(LINES, "pickscore") == ""


@pytest.mark.parametrize(
    "judge, pairs, bands", [("right", 64, 1), ("right", 0, 0), ("rule", 64, 0)]
)
def test_the_band_is_one_standard_error_of_a_share(figures, tmp_path, judge, pairs, bands):
    """sqrt(p (1 - p) / n) about 0.5 and 0.8 of 64 pairs, where the judge says 0 or 1."""
    pictures.draw_curve(LINES, judge, tmp_path / "curve.png", pairs=pairs)
    held, train = figures[0].axes
    assert len(held.collections) == bands
    assert held.lines[0].get_xydata()[:, 0].tolist() == [0, 2]
    assert train.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.3]]
    if bands:
        corners = {
            tuple(round(z, 6) for z in xy) for xy in held.collections[0].get_paths()[0].vertices
        }
        assert {(0, 0.4375), (0, 0.5625), (2, 0.75), (2, 0.85)} <= corners


def test_runs_are_drawn_beside_each_other_from_their_folders(figures, tmp_path, capsys):
    """One colour and one name per run; a folder without a run is one line and status 2."""
    for name, factors in (("a", [2, 3]), ("b", [])):
        folder = tmp_path / name
        folder.mkdir()
        config = {"factors": factors, "seed": 7, "eval_reward": ["right"], "heldout": 64}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(
            json.dumps({"command": f"python train.py --out {name}"})
        )
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    pictures.main([str(tmp_path / "a"), "--beside", str(tmp_path / "b"), "--out", "curve.png"])
    held = figures[0].axes[0]
    assert len({line.get_color() for line in held.lines}) == 2
    assert {text.get_text() for text in held.texts} == {"0.800  S = {2, 3}", "0.800  S = {}"}
    notes = "".join(text.get_text() for text in figures[0].texts)
    assert "S = {}: python train.py --out b  (seed 7)" in notes

    with pytest.raises(SystemExit) as stop:
        pictures.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_labels_are_moved_apart_only_where_they_would_overlap():
    assert style.spread([0.9, 0.1, 0.5], 0.2) == [0.9, 0.1, 0.5]
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    moved = style.spread([0.52, 0.5, 0.51, 0.0], 0.1)
    assert moved[1] < moved[2] < moved[0] and moved[3] == 0
    assert np.diff(sorted(moved)).min() == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_drawn_sub_steps_end_in_the_drawn_gaussian(k):
    """From the last state drawn, the kernel's step has the mean and width of the k-term."""
    here = draw_decomposition
    times, states = here.states(k)
    assert len(states) == k and states[0] == here.X_T and times[0] == here.T
    x = torch.tensor([[states[-1]]], dtype=torch.float64)
    t, s = torch.tensor([times[-1]]).double(), torch.tensor([here.S]).double()
    process = pg.Process(torch.tensor([here.T, here.S], dtype=torch.float64), here.KERNEL, here.ETA)
    last = process.transition(x, here.velocity(x, t, torch.tensor([0])), t, s)
    drawn = here.gaussians()[k]
    assert last.mean.item() == pytest.approx(drawn.mean.item(), rel=1e-6)
    assert last.std.item() == pytest.approx(drawn.std.item(), rel=1e-6)


def test_the_decomposition_is_drawn_the_same_twice(tmp_path):
    """The generator writes no date and no random names: one picture, one file."""
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        draw_decomposition.draw(file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_kernel_nobody_has_heard_of_is_drawn_in_a_colour_of_its_own(
    figures, monkeypatch, tmp_path
):
    """Four pictures of four kernels; shares beyond 0 and 1 are inside their panel, with figures."""
    monkeypatch.setitem(pg.KERNELS, "fourth", pg.dance)
    network = fields.make("network", torch.Generator().manual_seed(0))
    bench = SimpleNamespace(
        kernels=tuple(pg.KERNELS),
        factors=(2, 3),
        model=None,
        fixture=lambda name: network,
        normal=lambda *shape, of: torch.randn(*shape, dtype=torch.float64),
    )
    shares = {"fourth": [(1.0, -0.9), (0.8, 0.1), (0.6, 1.8)]}
    table = [
        {"kernel": kernel, "k": 3, "t": 1.0, "s": 0.4, "cosine": 0.9, "group": 1.0}
        | {"share": shares.get(kernel, [(1.0, 0.2), (0.8, 0.3), (0.6, 0.5)])}
        for kernel in bench.kernels
    ]
    names = [path.name for path in oracle_figures.draw_figures(bench, table, tmp_path)]
    assert names == ["weight.png", "cosine.png", "gap.png", "attribution.png"]

    weight, cosine, gap, attribution = figures
    own = oracle_figures.colour_of("fourth")
    assert own not in [oracle_figures.colour_of(kernel) for kernel in bench.kernels[:3]]
    for ax in (weight.axes[1], cosine.axes[0], gap.axes[0]):
        assert own in {line.get_color() for line in ax.lines}
        assert any("fourth" in text.get_text() for text in ax.texts)
    assert [ax.get_title(loc="left") for ax in attribution.axes] == list(bench.kernels)
    low, high = attribution.axes[3].get_ylim()
    assert low < -0.9 and high > 1.8
    assert {"-90%", "180%"} <= {text.get_text() for text in attribution.axes[3].texts}
