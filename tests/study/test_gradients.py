"""Study A: arms against loss and theory, products against slow loops, steps that are undone."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

import pave_grpo as pave
from zoo.oracle import theory
from zoo.study import gradients, report
from zoo.study.__main__ import main
from zoo.training.policies import Embedded
from zoo.training.prompts import Prompts

GRID = pave.schedule(8).tolist()
SIZE = gradients.Size(4, 2, 1, 3, 8, (0.05,), (1,))


def wave(images, prompts):
    """A reward that tells all pictures apart, so that every group speaks."""
    weights = torch.linspace(-1, 1, images[0].numel())
    return (images.flatten(1) @ weights / 10).sin()


@pytest.fixture
def policy(monkeypatch):
    """The shipped model, judged by a reward under which no group is silent."""
    monkeypatch.setattr(gradients.rule, "reward", wave)
    return Embedded()


def test_arms_are_the_gradients_of_the_loss(policy):
    """Each by policy_loss itself, in its own form and weights, from the rollout of the batch.

    float32 networks: to 1e-4 of the gradient, where a wrong weight is an error of order 1.
    """
    kept = {}

    def spied(*args):
        kept["given"] = args
        return gradients_of(*args)

    gradients_of = gradients.term_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "term_gradients", spied)
        terms = gradients.batch_gradients(policy, Prompts(), SIZE, 0)
    _, prompts, rollout, A, u = kept["given"]
    assert rollout.sde_steps == gradients.STEPS and not torch.equal(u, u.round())
    record = theory.of("flow_sde", 0.7)
    scale = {k: [record.scale(k, GRID[i], GRID[i + 1]) for i in range(4)] for k in (2, 3)}
    gamma = 1 + (torch.tensor(scale[2]) + torch.tensor(scale[3])) / 2
    plain = {"factors": ()}
    losses = {
        "k = 1": plain,
        "k = 1, weight Γ": plain | {"term_weights": {1: gamma}},
        "S = {2, 3}": {"factors": (2, 3)},
        "matched": {"factors": (2, 3), "form": "matched"},
        "k = 2": {"factors": (2,), "term_weights": {1: 0.0, 2: 1.0}},
        "k = 3": {"factors": (3,), "term_weights": {1: 0.0, 3: 1.0}},
        "midpoint": plain | {"form": "midpoint"},
        "uniform u": plain | {"form": "midpoint", "u": u},
    }
    arms = gradients.coefficients(GRID)
    assert arms.keys() == losses.keys() | {"second order"}
    for name, how in losses.items():
        loss = pave.policy_loss(policy.velocity(prompts), rollout, A, clip=None, **how).loss
        parts = torch.autograd.grad(-loss, policy.tuned)
        wanted = torch.cat([g.flatten() for g in parts])
        found = torch.einsum("ju,jup->p", arms[name].float(), terms) / 4
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_second_order_weights_lie_at_the_middle():
    """E14: as one rule, its weights add up to W_1, and their centre is D/2."""
    record = theory.of("flow_sde", 0.7)
    for i, row in enumerate(gradients.coefficients(GRID)["second order"].tolist()):
        t, s = GRID[i], GRID[i + 1]
        D, total, first = t - s, 0.0, 0.0
        for k, count in ((1, row[0]), (2, row[1] * record.scale(2, t, s))):
            for j, w in enumerate(record.weights(k, t, s)):
                total += count * w
                first += count * w * j * D / k
        assert row[2:] == [0, 0, 0]
        assert total == pytest.approx(record.weight_sum(1, t, s), rel=1e-12)
        assert first / total == pytest.approx(D / 2, rel=1e-12)


# ---- Products ------------------------------------------------------------------------------------


def synthetic(noise, seed=0, blocks=6, batches=3):
    """Blocks of 5 parameters: batches around one expectation, with this much noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    expected = normal(4, 5, 5)
    found, every = [], []
    for _ in range(blocks):
        batch = [expected + noise * normal(4, 5, 5) for _ in range(batches)]
        flat = [g.flatten(0, 1) for g in batch]
        inner = torch.stack([g.double() @ g.double().T for g in flat])
        found.append({"total": torch.stack(batch).sum(0), "inner": inner})
        every.append(batch)
    return expected, found, every


def test_products_of_blocks_are_slow_loops():
    """E <g_a, g_b'> over pairs of different blocks, and no block with itself."""
    _, found, _ = synthetic(1.0)
    a, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = gradients.products(found)
    total, pairs = 0.0, 0
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            if i != j:
                g_a = (a[:, None] * one["total"].flatten(0, 1).double()).sum(0)
                g_b = (b[:, None] * other["total"].flatten(0, 1).double()).sum(0)
                total, pairs = total + (g_a * g_b).sum().item(), pairs + 1
    assert gradients.between(inner, a, b) == pytest.approx(total / pairs, rel=1e-10)


def test_without_noise_all_is_signal_and_cosines_are_exact():
    """Share 1 and the cosine of the expected gradients, of all steps together and of each."""
    expected, found, _ = synthetic(0.0)
    arms = gradients.coefficients(GRID)
    for line in gradients.described(found, gradients.products(found), GRID):
        assert line["signal"]["mean"] == pytest.approx(1, rel=1e-6)
        mask = torch.ones(4) if line["steps"] == "all" else torch.eye(4)[int(line["steps"])]

        def of(name, mask=mask):
            return torch.einsum("j,ju,jup->p", mask.double(), arms[name], expected.double())

        if line["arm"] == "k = 1":
            assert "cosine" not in line
            continue
        wanted = torch.cosine_similarity(of(line["arm"]), of("k = 1"), 0).item()
        assert line["cosine"]["mean"] == pytest.approx(wanted, abs=1e-6)


def test_cosines_of_every_pair_are_those_of_expected_gradients():
    """Without noise exactly; symmetric; 1 with itself. Of pure noise nothing is said."""
    expected, found, _ = synthetic(0.0)
    arms = gradients.coefficients(GRID)
    seen = gradients.cosines(gradients.products(found), GRID)
    vectors = {n: torch.einsum("ju,jup->p", arm, expected.double()) for n, arm in arms.items()}
    for a, b in itertools.product(arms, repeat=2):
        wanted = torch.cosine_similarity(vectors[a], vectors[b], 0).item()
        assert seen[a][b] == pytest.approx(wanted, abs=1e-6)
    # Two squared norms that are estimated below 0 have a positive product.
    inner = -torch.ones(3, 3, 20, 20, dtype=torch.float64)
    a, b = arms["k = 1"].flatten(), arms["k = 2"].flatten()
    assert gradients.between(inner, a, a) < 0 and math.isnan(gradients.cosine_of(inner, a, b))


def test_the_share_of_signal_is_unbiased():
    """Over 300 studies of noise as large as the signal: within 4 standard errors of the truth."""
    arm = gradients.coefficients(GRID)["S = {2, 3}"].flatten()
    expected, _, _ = synthetic(1.0)
    tops, bottoms = [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(1000 + seed)
        found = []
        for _ in range(4):
            batch = expected + torch.randn(3, 4, 5, 5, generator=generator)
            flat = batch.flatten(1, 2).double()
            found.append({"total": batch.sum(0), "inner": flat @ flat.transpose(1, 2)})
        inner = gradients.products(found)
        tops.append(gradients.between(inner, arm, arm) / 9)
        bottoms.append(torch.einsum("u,iuv,v->i", arm, found[0]["inner"], arm).mean().item())
    wanted = (arm @ expected.flatten(0, 1).double()).square().sum().item()
    tops = torch.tensor(tops)
    assert abs(tops.mean() - wanted) <= 4 * tops.std() / 300**0.5
    noise = 5 * arm.square().sum().item()  # of one batch, in five parameters
    bottoms = torch.tensor(bottoms)
    assert abs(bottoms.mean() - wanted - noise) <= 4 * bottoms.std() / 300**0.5


def test_a_block_is_the_sum_of_its_batches(policy):
    """Totals, squares of arms, products of a batch with itself; every batch is of its own seed."""
    found = gradients.block(policy, Prompts(), SIZE, 1, lambda: None)
    one, two = (gradients.batch_gradients(policy, Prompts(), SIZE, i) for i in (2, 3))
    assert not torch.equal(one, two)
    assert torch.equal(found["total"], one + two)
    arms = gradients.coefficients(GRID)
    wanted = [torch.einsum("ju,jup->p", arms["k = 2"].float(), g) / 4 for g in (one, two)]
    square = wanted[0] ** 2 + wanted[1] ** 2
    place = list(arms).index("k = 2")
    assert (found["square"][place] - square).norm() <= 1e-5 * square.norm()
    inner = (one[1, 3].double() * one[2, 0].double()).sum().item()
    assert found["inner"][0, 1 * 5 + 3, 2 * 5].item() == pytest.approx(inner, rel=1e-9)


def test_directions_are_unit_steps_of_ascent_and_of_adam():
    """m / |m|, and m / (sqrt(mean g^2) + 1e-8) by every number."""
    _, found, every = synthetic(0.5)
    arms = torch.stack(list(gradients.coefficients(GRID).values())).float()
    for part, batches in zip(found, every):
        gs = torch.stack([torch.einsum("aju,jup->ap", arms, g) / 4 for g in batches])
        part["square"] = gs.square().sum(0)
    flat = [g for batches in every for g in batches]
    seen = list(gradients.directions(found, GRID))
    assert len(seen) == 2 * len(arms)
    for number, (_, how, d) in enumerate(seen):
        gs = torch.stack([torch.einsum("ju,jup->p", arms[number // 2], g) / 4 for g in flat])
        wanted = gs.mean(0)
        if how == "adam":
            wanted = wanted / (gs.square().mean(0).sqrt() + 1e-8)
        assert torch.allclose(d, wanted / wanted.norm(), atol=1e-5)
        assert how == ("plain", "adam")[number % 2]


# ---- Steps along them ----------------------------------------------------------------------------


def test_a_step_moves_by_its_norm_and_is_undone(policy, monkeypatch):
    """Rewards are of the moved parameters; afterwards they are what they were."""
    start = [p.detach().clone() for p in policy.tuned]
    d = torch.randn(
        sum(p.numel() for p in policy.tuned), generator=torch.Generator().manual_seed(0)
    )
    d = d / d.norm()
    seen = []

    def rewards(policy, size):
        seen.append(torch.cat([(p - q).flatten() for p, q in zip(policy.tuned, start)]))
        return {"1": [0.5]}

    monkeypatch.setattr(gradients, "rewards", rewards)
    assert gradients.moved(policy, SIZE, d, 0.3) == {"1": [0.5]}
    # A parameter of size up to 10 is rounded by 2^-24 of itself.
    assert (seen[0] - 0.3 * d).abs().max() <= 1e-6
    assert all(torch.equal(p, q) for p, q in zip(policy.tuned, start))


def test_rewards_are_of_the_held_out_pairs(policy):
    """Means over the four pictures of a prompt, in order, whatever the number of ODE steps."""
    size = dataclasses.replace(SIZE, eval_steps=(1, 2))
    found = gradients.rewards(policy, size)
    prompts, noise = Prompts().pairs(policy.shape, 8)
    for steps, means in found.items():
        x_0 = pave.ode_sample(policy.velocity(prompts), policy.grid(int(steps)), noise)
        scores = wave(policy.decode(x_0), prompts).tolist()
        wanted = [sum(scores[:4]) / 4, sum(scores[4:]) / 4]
        assert means == pytest.approx(wanted, abs=1e-6)


def test_differences_are_paired_by_prompt():
    """Of one arm less another at the same norm, and of k = 1 less where it started."""
    lines = [
        {"arm": "start", "how": "", "norm": 0.0, "rewards": {"8": [0.1, 0.2, 0.3]}},
        {"arm": "k = 1", "how": "plain", "norm": 0.1, "rewards": {"8": [0.2, 0.4, 0.3]}},
        {"arm": "k = 2", "how": "plain", "norm": 0.1, "rewards": {"8": [0.3, 0.6, 0.4]}},
    ]
    gain = gradients.paired(lines, "k = 1", "start", "plain", 0.1, 8)
    more = gradients.paired(lines, "k = 2", "k = 1", "plain", 0.1, 8)
    assert gain.mean == pytest.approx(0.1) and gain.n == 3
    assert more.mean == pytest.approx(0.4 / 3)
    assert more.se == pytest.approx(torch.tensor([0.1, 0.2, 0.1]).std().item() / 3**0.5, rel=1e-5)


def test_the_quick_study_runs_and_goes_on(tmp_path, capsys, monkeypatch, small_checkpoint):
    """End to end; a line for the start and each arm, direction and norm; nothing is done twice.

    On a network that draws nothing the rule knows, hence under another reward.
    """
    monkeypatch.setattr(gradients, "Embedded", lambda: Embedded(small_checkpoint))
    monkeypatch.setattr(gradients.rule, "reward", wave)
    out, work = tmp_path / "out", tmp_path / "work"
    command = ["gradients", "--quick", "--out", str(out), "--work", str(work)]
    main(command)
    lines = (out / "gains.jsonl").read_text().splitlines()
    assert (
        len(lines) == 1 + 9 * 2
        and len(json.loads((out / "gradients.json").read_text())["arms"]) == 45
    )
    # The whole study, of many blocks and hours, takes nothing of a small one for its own.
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gradients, "block", lambda *_: pytest.fail("work started"))
        main([*command[:1], *command[2:]])
    assert "block-0.safetensors: is of another study" in capsys.readouterr().err
    (out / "gains.jsonl").write_text("\n".join(lines[:7]) + "\n")
    (work / "block-1.safetensors").unlink()
    before = (work / "block-0.safetensors").stat().st_mtime_ns
    main(command)
    assert (work / "block-0.safetensors").stat().st_mtime_ns == before
    again = (out / "gains.jsonl").read_text().splitlines()
    assert again[:7] == lines[:7] and sorted(again) == sorted(lines)
    (out / "gains.jsonl").write_text("\n".join(again)[:-9])
    with pytest.raises(SystemExit):
        main(command)
    assert "gains.jsonl, line 19: must be a line of a study" in capsys.readouterr().err
    (out / "gains.jsonl").write_text("\n".join(again) + "\n")
    (work / "block-2.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit):
        main(command)
    assert "block-2.safetensors: cannot be read" in capsys.readouterr().err
    main(["report", "--results", str(out), "--figures", str(tmp_path)])
    assert "Study A, a step of norm 0.05, adam" in capsys.readouterr().out
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    seen_in_the_figure(out)


def seen_in_the_figure(out):
    """Every signal, every cosine there is, and every gain beside k = 1 has its mark."""
    found = json.loads((out / "gradients.json").read_text())
    lines = gradients.read_gains(out / "gains.jsonl")
    figure = report.draw_gradients(found, lines, "plain", 0.05)
    marks = []
    for ax in figure.axes:
        drawn = [z for z in ax.lines if z.get_marker() == "o" and len(z.get_xdata())]
        marks.append(sorted(float(z.get_xdata()[0]) for z in drawn))
    whole = [line for line in found["arms"] if line["steps"] == "all"]
    assert marks[0] == sorted(line["signal"]["mean"] for line in whole if line["signal"])
    assert marks[1] == sorted(line["cosine"]["mean"] for line in whole if line.get("cosine"))
    gains = [
        gradients.paired(lines, arm, "k = 1", "plain", 0.05, steps).mean
        for arm in gradients.ARMS[1:]
        for steps in (1, 2)
    ]
    assert marks[2] == sorted(gains)
