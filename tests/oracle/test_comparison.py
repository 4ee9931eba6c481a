"""The comparison: each of its figures against a slow computation, and what is printed of it."""

import copy
from types import SimpleNamespace

import pytest
import torch

import pave_grpo as pave
from zoo.oracle import comparison, fields, theory
from zoo.oracle.bench import ETA, Bench, Model, reward
from zoo.shapes import model as shapes_model
from zoo.shapes import rule

FACTORS, STEPS, GROUP = (2, 3), 3, 4
PROMPTS = ("one", "another")


def network(seed):
    return fields.Network(torch.Generator().manual_seed(seed))


@pytest.fixture
def bench(monkeypatch):
    """A network of two prompts in place of a pipeline, and a slightly different precise one."""
    monkeypatch.setattr(comparison, "GROUP", GROUP)
    made = Bench(None, FACTORS, model=Model("", PROMPTS, torch.float32, (1, 1)))
    field = fields.Fixture("embedded", network(1), (fields.DIM,))
    made.dtype, made.fixture = torch.float64, lambda name: field
    near = fields.nudged(field.field, 1e-3, torch.Generator().manual_seed(2))
    made.precise = lambda: near
    return made


def mean_of(velocities, record, row, k):
    """mu^(k) of one prompt's state, its j-th velocity from velocities[j]."""
    calls, (p, x_t, t, s) = iter(velocities), row

    def velocity(x, time):
        return next(calls)(x, torch.tensor([time], dtype=torch.float64), torch.tensor([p]))

    return record.decomposed(velocity, x_t, t, s, k)[0][0]


def slow_line(bench, scene, kernel, j, k):
    """A line of the table by loops over prompts and members, a copy of theta for each velocity."""
    rollout, record = scene.rollout, theory.of(kernel, ETA)
    t, s = rollout.process.grid[j : j + 2].tolist()
    std = {i: record.std(i, t, s) for i in (1, k)}
    thetas = {i: [copy.deepcopy(scene.field) for _ in range(i)] for i in (1, k)}
    square, off, members, groups, scored = [], [], [], [], {1: 0.0, k: 0.0}
    for p in range(len(PROMPTS)):
        row = (p, rollout.x_t[p, j], t, s)
        mean = {i: mean_of(thetas[i], record, row, i) for i in (1, k)}
        precise = mean_of([bench.precise()] * k, record, row, k)
        square.append((mean[k] - mean[1]).square().mean().item())
        off.append((mean[k] - precise).square().mean().item())
        whole = {1: 0.0, k: 0.0}
        credit = {}
        for g in range(GROUP):
            A, x_s = scene.advantages[p, j, g], rollout.x_s[p, j, g]
            for i in (1, k):
                credit[i] = A * (x_s - mean[i].detach()) / std[i] ** 2
                whole[i] = whole[i] + credit[i] / GROUP
                scored[i] = scored[i] - (credit[i] * mean[i]).mean() / (len(PROMPTS) * GROUP)
            members.append(cosine(credit[k], credit[1]))
        groups.append(cosine(whole[k], whole[1]))
    parts = {i: gradients(scored[i], thetas[i]) for i in (1, k)}
    grad = {i: sum(parts[i]) for i in (1, k)}
    shares = [((part @ grad[k]) / (grad[k] @ grad[k])).item() for part in parts[k]]
    return {
        "step": j,
        "t": t,
        "s": s,
        "k": k,
        "weight": record.scale(k, t, s),
        "gap": average(square) ** 0.5 / std[1],
        "off": average(off) ** 0.5 / std[k],
        "member": average(members),
        "group": min(groups),
        "original": grad[1].norm().item(),
        "norm": (grad[k].norm() / grad[1].norm()).item(),
        "cosine": cosine(grad[k], grad[1]),
        "share": [(t - call * (t - s) / k, share) for call, share in enumerate(shares)],
    }


def gradients(loss, thetas):
    """d loss / d theta of each copy, as a vector each."""
    found = []
    for theta in thetas:
        grads = torch.autograd.grad(loss, [*theta.parameters()], retain_graph=True)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return found


def cosine(a, b):
    return ((a @ b) / (a @ a).sqrt() / (b @ b).sqrt()).item()


def average(numbers):
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_every_figure_is_that_of_slow_loops(kernel, bench, monkeypatch):
    """Step by step, and k by k: none is of another step, k, std or network."""
    scene = comparison.anchored(bench, kernel, STEPS)
    # Advantages whose sum is not 0: the directions of a group's attribution differ.
    scene = scene._replace(advantages=scene.advantages + 0.4)
    monkeypatch.setattr(comparison, "anchored", lambda *given: scene)
    table = comparison.compare(bench, kernel, STEPS)
    assert all(line["group"] < 1 - 1e-6 for line in table)
    steps = scene.rollout.sde_steps
    assert steps == ((0, 1) if kernel == "cps" else (0, 1, 2))
    assert [(line["step"], line["k"]) for line in table] == [(j, k) for j in steps for k in FACTORS]
    for line in table:
        wanted = slow_line(bench, scene, kernel, line["step"], line["k"])
        assert line.pop("kernel") == kernel and line.keys() == wanted.keys()
        shares, wanted_shares = line.pop("share"), wanted.pop("share")
        assert line == pytest.approx(wanted, rel=1e-8, abs=1e-10)
        for share, wanted_share in zip(shares, wanted_shares, strict=True):
            assert share == pytest.approx(wanted_share, rel=1e-8, abs=1e-8)


def test_a_pipeline_is_scored_by_the_smooth_reward(bench):
    """On the asked kernel and grid, from noise of its own for every prompt and member."""
    scene = comparison.anchored(bench, "dance", STEPS)
    process = scene.rollout.process
    assert (process.kernel, process.eta) == ("dance", ETA)
    assert torch.equal(process.grid, pave.schedule(STEPS))
    assert scene.rollout.x_s.shape == (2, STEPS, GROUP, fields.DIM)
    assert len(scene.rollout.x_s.flatten(0, 2).unique(dim=0)) == 2 * STEPS * GROUP
    wanted = pave.group_advantages(reward(scene.rollout.x_0))
    torch.testing.assert_close(scene.advantages, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", [("a red circle", "two blue squares"), ()])
def test_a_checkpoint_is_scored_by_the_rule(asked, monkeypatch):
    """Each picture by its own prompt; a tenth of the smooth reward tells equal scores apart."""
    monkeypatch.setattr(comparison, "GROUP", 3)
    bench = Bench(model=Model("", asked, torch.float64) if asked else None)
    rollout, advantages = comparison.anchored(bench, "cps", 3)[1:]
    prompts = asked or fields.PROMPTS[:1]
    assert rollout.x_0.shape[:3] == (len(prompts), 2, 3)
    for p, prompt in enumerate(prompts):
        for j in range(2):
            images = shapes_model.to_images(rollout.x_0[p, j].float())
            scores = [rule.judge(image[None], [prompt]).score.item() for image in images]
            smooth = -(rollout.x_0[p, j] - 1).square().flatten(1).mean(1)
            r = torch.tensor(scores, dtype=torch.float64) + 0.1 * smooth
            wanted = (r - r.mean()) / (r.std() + 1e-8)
            torch.testing.assert_close(advantages[p, j], wanted, rtol=0, atol=1e-6)


LINE = {"t": 1.0, "s": 0.875, "k": 2, "original": 0.0123, "norm": 1.25, "cosine": 0.875}
LINE |= {"member": 0.75, "group": 0.5, "gap": 0.0625, "off": 3e-4, "weight": 2.5}
LINE |= {"share": [(1.0, 0.25), (0.9375, 0.75)]}
PRINTED = "1.000 0.875  2 1.23e-02  1.25  0.875  0.750 0.5000  0.062"


@pytest.mark.parametrize(
    ("precise", "size", "off", "said"),
    [
        (None, None, "", ""),
        (1, None, " 3e-04", "off: a mean's error against float64, over c_k"),
        (1, (8, 8), " 3e-04", "off: a mean's error against float32, over c_k"),
    ],
)
def test_a_line_is_printed_figure_by_figure(precise, size, off, said):
    """Under a head that names each; a kernel's name stands once; shares are per cent."""
    bench = SimpleNamespace(precise=lambda: precise, model=SimpleNamespace(size=size))
    table = [LINE | {"kernel": kernel} for kernel in ("flow_sde", "flow_sde", "dance")]
    text = comparison.show_comparison(table, bench)
    head, *lines = text.splitlines()[-4:]
    assert lines == [
        f"{name:8} {PRINTED}{off}   2.50   25   75" for name in ("flow_sde", "", "dance")
    ]
    assert head.split()[:8] == ["t", "s", "k", "|grad", "1|", "x", "cos", "member"]
    assert head.split()[8:] == ["group", "gap", *(["off"] if off else []), "weight", "share"]
    assert said in text and ("error against" in text) == bool(off)
