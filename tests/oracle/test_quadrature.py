"""The setups of E12 to E15 against slow or closed forms of their own."""

import math

import pytest
import slow
import torch
from torch.autograd.functional import jacobian
from torch.distributions import Normal

import pave_grpo as pave
from zoo.oracle import experiments, fields, findings, measures, quadrature, theory
from zoo.oracle.bench import ETA, Bench

TIMES = (0.7, 0.55)


def test_the_flow_map_is_the_flow():
    """Of a Gaussian flow: x_s - (1-s) m is x_t - (1-t) m over the ratio of standard deviations.

    Eight steps of fourth order over 0.3: off by about (0.3/8)^4 = 2e-6 of the path, or less.
    """
    m, q = torch.tensor([0.4, -0.2]).double(), torch.tensor([0.5, 1.5]).double()
    x, (t, s) = slow.normal(1, 3, 2), (0.8, 0.5)

    def std(time):
        return ((1 - time) ** 2 * q + time**2).sqrt()

    wanted = (1 - s) * m + std(s) / std(t) * (x - (1 - t) * m)
    found = quadrature.flow_map(fields.Gaussian(m, q.log()), x, t, s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_rates_are_derivatives_along_the_path():
    """Of v at (x + h v, t + h), by differences in h; and with that v held at another theta's."""
    field, x, u, t = slow.network(2, 6), slow.normal(1, 4, 6), slow.normal(2, 4, 6), 0.7
    prompt, time = torch.arange(4), torch.full((4,), t, dtype=torch.float64)
    v_old = field(x, time, prompt).detach()
    dv, d_rate = quadrature.rates(field, x, t, u)
    _, d_held = quadrature.rates(field, x, t, u, held=True)

    def along(h, held):
        v = v_old if held else field(x, time, prompt)
        return (u * field(x + h * v, time + h, prompt)).sum()

    torch.testing.assert_close(dv, slow.gradient(along(0.0, False), field))
    h = 1e-4
    for held, found in ((False, d_rate), (True, d_held)):
        ends = [slow.gradient(along(z, held), field) for z in (h, -h)]
        torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)
    assert (d_rate - d_held).norm() > 0.1 * d_rate.norm()


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance"])
def test_centres_are_first_moments_of_the_weights(kernel):
    """w_j read off pave_grpo: mu^(k) as a function of each velocity it asks for."""
    record, (t, s), k = theory.of(kernel, ETA), TIMES, 3

    def mean(v):
        asked = iter(v)

        def velocity(x, time, prompt):
            return next(asked).expand_as(x)

        x = torch.zeros(1, 1, dtype=torch.float64)
        at = [torch.tensor([z], dtype=torch.float64) for z in (t, s)]
        process = pave.Process(torch.tensor([t, s], dtype=torch.float64), kernel, ETA)
        return pave.decompose(velocity, process, x, *at, torch.tensor([0]), (k,))[k].mean.sum()

    weights = jacobian(mean, torch.ones(k, dtype=torch.float64)).tolist()
    assert record.weights(k, t, s) == pytest.approx(weights)
    d = (t - s) / k
    centre = d * (weights[1] + 2 * weights[2]) / sum(weights)
    assert record.centre(k, t, s) == pytest.approx(centre)
    share = quadrature.second_order_share(record, k, t, s)
    assert share * centre == pytest.approx((t - s) / 2)


def test_limits_of_centres():
    """The figures of docs/THEORY.md: eta = 0.7, t = 0.7."""
    wanted = {"flow_sde": (0.277, 0.419), "dance": (0.262, 0.408), "cps": (0.5, 0.8)}
    for kernel, limits in wanted.items():
        found = [theory.of(kernel, ETA).centre_limit(k, 0.7) for k in (2, 5)]
        assert found == pytest.approx(limits, abs=5e-4)


def test_ranks_are_counted_to_d():
    """The singular value after the d-th, over the first."""
    rows = [torch.tensor(row).double() for row in ([4.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0])]
    found = [quadrature.beyond(rows, d) for d in (1, 2)]
    assert found == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
@pytest.mark.parametrize("form", ["paper", "matched"])
def test_an_updated_groups_attribution_is_that_of_slow_loops(kernel, form):
    """sum_i ratio_i A_i (x_s - mu)/std^2, member by member, by both ways of the oracle."""
    scene = Bench([kernel], (3,)).scene("network", kernel, "shared_anchor")
    few = quadrature.one_group(scene, 1)
    theta, record = slow.moved(few.field, 5, 0.05), theory.of(kernel, ETA)
    total, pull = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step in slow.observations(few.rollout):
        found = slow.slow_scored(theta, few.field, few.rollout.process, 3, form, step)
        new, old = Normal(found.mu, found.std), Normal(found.mu_old, found.std)
        ratio = (new.log_prob(step.x_s) - old.log_prob(step.x_s)).sum().exp()
        asked = ratio * few.advantages[step.index] * (step.x_s - found.mu)[0]
        pull, total = pull + asked.detach(), total + (asked / found.std**2).detach()
    measured = measures.attribution(few, 3, form, theta).sum(2).flatten()
    torch.testing.assert_close(measured, total, rtol=1e-9, atol=1e-9)
    by_definition = measures.updated_pull(few, theta, record, 3, form).flatten()
    torch.testing.assert_close(by_definition, pull, rtol=1e-9, atol=1e-9)


def test_the_modified_policy_is_simulated():
    """The matched term's own policy: its gradient by differences of 200,000 common samples.

    Along one direction; 5 standard errors of the mean of paired differences.
    """
    m, log_q, target = (
        torch.tensor(z, dtype=torch.float64) for z in ([0.5, -0.3], [-0.7, 0.2], [1.0, 0.4])
    )
    process, k, h, n = pave.Process(pave.schedule(3), "flow_sde", ETA), 2, 1e-3, 200_000
    steps = process.stochastic_steps()
    found = fields.matched_policy_gradient(process, m, log_q, target, steps, k)
    record = theory.of("flow_sde", ETA)
    direction = torch.tensor([0.6, -0.3, 0.5, 0.4], dtype=torch.float64)

    def reward(sign):
        a, b = m + sign * h * direction[:2], log_q + sign * h * direction[2:]
        x = slow.normal(1, n, 2)
        for i, (t, s) in enumerate(zip(process.grid.tolist(), process.grid[1:].tolist())):

            def held(z, time):
                return fields.gaussian_velocity(z, time, m, log_q.exp())

            def alive(z, time):
                return fields.gaussian_velocity(z, time, a, b.exp())

            mean, c_1 = record.decomposed(held, x, t, s, 1)
            moved = record.decomposed(alive, x, t, s, k)[0] - record.decomposed(held, x, t, s, k)[0]
            x = mean + moved + c_1 * slow.normal(10 + i, n, 2)
        return -(x - target).square().sum(-1)

    slopes = (reward(1) - reward(-1)) / (2 * h)
    se = slopes.std().item() / math.sqrt(n)
    assert abs(slopes.mean().item() - (found @ direction).item()) < 5 * se
    assert se < 0.01 * found.norm().item()


def test_a_direction_is_found_to_its_error():
    """The chord between two directions, beside Z standard errors of the widest."""
    draws = torch.cat([torch.eye(2), -torch.eye(2)]).double() + torch.tensor([3.0, 4.0])
    found = findings.direction_of(draws, torch.tensor([8.0, 6.0]).double())
    chord = math.hypot(0.6 - 0.8, 0.8 - 0.6)
    assert found.difference == pytest.approx(chord)
    spread = (2 / 3 / 4) ** 0.5 / 5  # of the mean of four draws, over its length
    assert found.tolerance == pytest.approx(findings.Z * spread)
    assert found.verdict == findings.HOLDS  # of four draws nothing more can be said
    many = draws.repeat(10_000, 1)
    refuted = findings.direction_of(many, torch.tensor([8.0, 6.0]).double())
    assert refuted.verdict == findings.REFUTED and refuted.n == 40_000
    assert findings.direction_of(many, torch.tensor([3.0, 4.0]).double()).verdict == findings.HOLDS
    nothing = findings.direction_of(many * math.nan, torch.tensor([3.0, 4.0]).double())
    assert nothing.verdict == findings.INCONCLUSIVE


def test_straight_sums_weigh_every_step():
    """E4.summed's prediction is along the whole gradient of a straight flow."""
    bench = Bench(["flow_sde"], (2,))
    for name in ("constant", "point"):
        scene = bench.scene(name, "flow_sde", "shared_anchor")
        for k, form in ((1, "paper"), (2, "paper"), (2, "matched")):
            pull = experiments.straight_sum(bench.theory("flow_sde"), scene, k, name, form)
            found = measures.term_gradient(scene, k, form)
            assert measures.turned(pull, -found).item() < 1e-12
