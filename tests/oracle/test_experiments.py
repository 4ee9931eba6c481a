"""The setups of claims, against slow loops: no figure may hide behind an equal one beside it."""

import math

import pytest
import slow
import torch
from torch.distributions import Normal

import pave_grpo as pave
from zoo.oracle import experiments, theory
from zoo.oracle.bench import ETA, POINT, Bench, Scene


@pytest.mark.parametrize(("name", "pace"), [("network", 1), ("rapid", 25)])
def test_the_networks_see_state_clock_and_prompt(name, pace):
    """tanh([x, pace t, prompt mod 5] W_1) W_2, the prompts from -1 to 1, row by row."""
    field = Bench().fixture(name).field
    x, t = slow.normal(1, 7, 6), torch.linspace(0.1, 1, 7, dtype=torch.float64)
    found = field(x, t, torch.arange(7))
    for i in range(7):
        row = torch.cat(
            [x[i], torch.stack([pace * t[i], torch.tensor([-1, -0.5, 0, 0.5, 1])[i % 5]])]
        )
        wanted = [(torch.tanh(row @ field.w1) @ w).item() for w in field.w2.T]
        assert found[i].tolist() == pytest.approx(wanted, abs=1e-13)


# ---- E8 ------------------------------------------------------------------------------------------


def slow_product(kernel, k, field, other, states, shares, anew):
    """(score and ratio, clipped ratio): how far the product of sub-steps is from the step."""
    record, (t, s) = theory.of(kernel, ETA), POINT
    x, rows = states[0], range(len(states[0]))
    of_mean, of_variance = shares

    def velocity(f, x, time, row):
        return f(x[None], torch.tensor([time], dtype=torch.float64), torch.tensor([row]))[0]

    whole = {f: 0.0 for f in (field, other)}
    fine = {f: [0.0] * k for f in (field, other)}
    ratios, clipped = [], []
    for row in rows:
        start = x[row]
        log_p, log_q = {}, {}
        for f in (field, other):
            mean, c = record.step(start, velocity(f, start, t, row), t, s)
            log_p[f] = Normal(mean, c).log_prob(states[-1][row]).sum()
            log_q[f] = []
            for j in range(k):
                here = states[j][row]
                v = (
                    velocity(f, here, t - j * (t - s) / k, row)
                    if anew
                    else velocity(f, start, t, row)
                )
                shift = record.step(start, v, t, s)[0] - start
                sub = Normal(here + of_mean[j] * shift, c * math.sqrt(of_variance[j]))
                log_q[f].append(sub.log_prob(states[j + 1][row]).sum())
                fine[f][j] = fine[f][j] + log_q[f][j]
            whole[f] = whole[f] + log_p[f]
        ratio = log_p[other] - log_p[field]
        parts = [new - old for new, old in zip(log_q[other], log_q[field])]
        ratios.append((sum(parts) - ratio).abs().item())
        cut = math.prod(min(max(part.exp().item(), 0.9), 1.1) for part in parts)
        clipped.append(abs(cut - min(max(ratio.exp().item(), 0.9), 1.1)))
    score_1, score_k = slow.gradient(whole[field], field), slow.gradient(sum(fine[field]), field)
    off = ((score_k - score_1) / score_1.norm()).abs().max().item()
    return max(off, *ratios), max(clipped)


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
@pytest.mark.parametrize(("equal", "anew"), [(True, False), (False, False), (True, True)])
def test_products_of_sub_steps_are_those_of_slow_loops(kernel, equal, anew):
    """What is measured and what is predicted, each by itself; 1e-10: rounding."""
    k, field = 3, slow.network(4, 6)
    other = slow.moved(field, 5, 0.3)
    states = [slow.normal(i, 2, 6) for i in range(k + 1)]
    even = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    uneven = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    shares = (even if equal else uneven, even)
    process = pave.Process(torch.tensor(POINT, dtype=torch.float64), kernel, ETA)
    chain = experiments.Chain(states, *POINT, process)
    found = experiments.product(chain, field, other, shares, anew)
    error, clipped = slow_product(kernel, k, field, other, states, shares, anew)
    measured = [found.error.item(), found.predicted.item()]
    assert measured == pytest.approx([error, error], rel=1e-9, abs=1e-10)
    measured = [found.clipped.item(), found.clipped_predicted.item()]
    assert measured == pytest.approx([clipped, clipped], rel=1e-9, abs=1e-10)
    assert (error < 1e-10) == (equal and not anew) and clipped > 1e-3


def test_finer_steps_are_asked_in_three_ways(monkeypatch):
    """Equal shares, unequal ones, and a velocity evaluated anew; another theta, k states more."""
    seen = []

    def product(chain, field, other, shares, anew):
        seen.append((chain, field, other, *shares, anew))

    monkeypatch.setattr(experiments, "product", product)
    assert list(experiments.finer_steps(Bench(), "cps", 4)) == ["equal", "unequal", "anew"]
    for chain, field, other, of_mean, of_variance, _ in seen:
        assert len(chain.states) == 5 and (chain.t, chain.s) == POINT
        assert not torch.equal(field.w1, other.w1)
        for shares in (of_mean, of_variance):
            assert shares.sum().item() == pytest.approx(1) and shares.min() > 0
        assert len(of_variance.unique()) == 4
    same = [torch.equal(of_mean, of_variance) for *_, of_mean, of_variance, _ in seen]
    assert same == [True, False, True] and [anew for *_, anew in seen] == [False, False, True]


# ---- GRADIENT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "matched"])
@pytest.mark.parametrize("mode", ["shared_anchor", "independent"])
def test_derivatives_are_of_the_whole_loss_of_an_updated_theta(form, mode):
    """In the asked form, against theta_old, with KL: autograd through slow loops."""
    bench = Bench(["flow_sde"], (2, 3))
    scene = bench.scene("network", "flow_sde", mode)
    few = scene.rollout._replace(
        x_t=scene.rollout.x_t[:, :, :2],
        x_s=scene.rollout.x_s[:, :, :2],
        log_prob=scene.rollout.log_prob[:, :, :2],
        x_0=scene.rollout.x_0[:, :, :2],
    )
    scene = Scene(scene.field, few, scene.advantages[:, ..., :2])
    reverse, forward, central = experiments.derivatives(bench, scene, form)

    tangent = [
        bench.normal(*p.shape, of=("tangent", i)) for i, p in enumerate(scene.field.parameters())
    ]
    moved = Bench(["flow_sde"], (2, 3)).fixture("network").field
    with torch.no_grad():
        for p, v in zip(moved.parameters(), tangent):
            p.add_(0.01 * v.flip(0))
    A = scene.advantages.expand(few.x_s.shape[:3])
    loss = slow.slow_loss(moved, scene.field, few, A, (2, 3), form, None, "sum")
    KL = 0.0
    steps = slow.observations(few)
    for step in steps:
        new, std = slow.slow_transition(moved, few.process, 1, step)
        old, _ = slow.slow_transition(scene.field, few.process, 1, step)
        KL = KL + ((new - old.detach()) ** 2).sum() / (2 * std**2) / len(steps)
    direction = torch.cat([v.flatten() for v in tangent])
    wanted = (slow.gradient(loss + 0.1 * KL, moved) @ direction).item()
    found = [reverse.item(), forward.item(), central]
    assert found == pytest.approx([wanted] * 3, rel=1e-6)
    assert reverse.item() == pytest.approx(wanted, rel=1e-10)


# ---- E3, E7, E10 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "reduction"), [("paper", "sum"), ("matched", "sum"), ("matched", "mean")]
)
def test_the_ratio_of_an_update_is_that_of_its_members(form, reduction):
    """Its mean, expectation and standard error, beside the members' own log-densities.

    100,000 members: their mean is known to 1/316 of their spread, their spread to a few per cent.
    """
    bench, k, size = Bench(["flow_sde"], (3,)), 3, 0.05
    u = experiments.update(bench, "network", "flow_sde", k, size, form, reduction)
    assert u.delta.norm().item() == pytest.approx(size, rel=0.01)
    assert torch.equal(u.delta, (u.new.mean - u.old[k].mean).flatten())
    record = theory.of("flow_sde", ETA)
    c = record.std(k if form == "paper" else 1, *POINT)
    old = u.old[k].mean if form == "paper" else u.old[1].mean
    log_ratio = Normal(old + u.delta, c).log_prob(u.x_s) - Normal(old, c).log_prob(u.x_s)
    ratio = (log_ratio.sum(-1) if reduction == "sum" else log_ratio.mean(-1)).exp()
    assert u.ratio == pytest.approx(ratio.mean().item(), rel=1e-9)
    assert ratio.numel() == 100_000 and (u.x_s - u.old[1].mean).std().item() == pytest.approx(
        record.std(1, *POINT), rel=0.01
    )
    assert u.se == pytest.approx(ratio.std().item() / 100_000**0.5, rel=0.1)
    assert abs(u.ratio - u.expected) < 6 * u.se
