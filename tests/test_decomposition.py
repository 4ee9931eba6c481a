"""decompose: p^(k) against slow loops, arithmetic by hand, straight flows, sums and orders in D."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from slow import (
    EPS,
    Counting,
    GaussianFlow,
    Observed,
    derivative_along,
    each_kernel,
    etas,
    factor_sets,
    gradient,
    kernels,
    moved,
    network,
    normal,
    seeds,
    slow_transition,
    spans,
    times,
)

import pave_grpo as pg
from zoo.oracle import theory
from zoo.oracle.fields import Constant, Point

each_straight_flow = pytest.mark.parametrize("field", [Constant, Point])


def split(velocity, kernel, x, t, s, factors, eta=0.7):
    """decompose of a batch x [B, d] of prompts 0, 1, 2, ... that share one step t -> s."""
    process, B = pg.Process([t, s], kernel, eta), len(x)
    return pg.decompose(velocity, process, x, times(t, B), times(s, B), torch.arange(B), factors)


def sum_of_weights(kernel, t, s, factors, eta=0.7):
    """{k: sum_j w_j}, the mean that v = 1 takes x_t = 0 to."""
    one, zero = Constant(torch.ones(1, dtype=torch.float64)), times(0.0, 1)[:, None]
    p = split(one, kernel, zero, t, s, factors, eta)
    return {k: p[k].mean.item() for k in p}


# ---- What it computes ----------------------------------------------------------------------------

# t = 0.8, s = 0.4, k = 2, v(x) = x, x_t = 1: d = 0.2, and Euler to t' = 0.6 gives x' = v' = 0.8.
BY_HAND = [
    # eta = 1/2, from 0.6 to 0.4: a_2 = 1 - 0.25 * 0.2 / 1.2 = 23/24,
    #   b_2 = -0.2 - 0.25 * 0.2 * 0.4 / 1.2 = -13/60, mu = (23/24 - 13/60) * 0.8, c_2 = sqrt(0.2)/2;
    #   coarse: 1 - 0.0625 - 0.4 - 0.0125.
    ("dance", 1 / 2, 0.525, 89 / 150, math.sqrt(0.2) / 2),
    # eta = 1: g^2 = 0.6/0.4 = 1.5, a_2 = 1 - 1.5 * 0.2/1.2 = 0.75,
    #   b_2 = -(1 + 1.5 * 0.4/1.2) 0.2 = -0.3, mu = 0.45 * 0.8, c_2 = sqrt(1.5 * 0.2);
    #   coarse: g^2 = 4, 1 - 4 * 0.4/1.6 - (1 + 4 * 0.2/1.6) 0.4.
    ("flow_sde", 1.0, -0.6, 0.36, math.sqrt(0.3)),
    # eta = 2/3: cos h = 1/2, a_2 = 0.6 + 0.4/2 = 0.8, b_2 = -0.6 * 0.6 + 0.4/2 * 0.4 = -0.28,
    #   mu = 0.52 * 0.8, c_2 = 0.4 sin 60; coarse: 0.8 - 0.6 * 0.8 + 0.2 * 0.2.
    ("cps", 2 / 3, 0.36, 0.416, 0.4 * math.sqrt(3) / 2),
]


@pytest.mark.parametrize("kernel, eta, coarse, mean, std", BY_HAND)
def test_one_transition_by_hand(kernel, eta, coarse, mean, std):
    """One Euler sub-step and one SDE sub-step, in numbers anyone can check."""

    def expanding(x, t, prompt):
        return x

    p = split(expanding, kernel, times(1.0, 1)[:, None], 0.8, 0.4, (2,), eta)
    assert abs(p[1].mean.item() - coarse) <= 20 * EPS  # some 20 roundings of numbers below 2
    assert abs(p[2].mean.item() - mean) <= 20 * EPS and abs(p[2].std.item() - std) <= 20 * EPS


def loop_rounding(t, s, k, eta):
    """How far rounding may take mu^(k) of a network from another way to compute it.

    k <= 7 sub-steps of about 100 roundings of numbers below 50, each amplified at most tenfold by
    the field; the last step multiplies that by 1 + g^2, with 1 - t' as good as 1/(1 - t').
    """
    last = theory.last_start(k, t, s)
    sensitivity = 1 / (1 - (last if last < 1 else s))
    return 7 * 100 * 50 * 10 * EPS * (1 + eta**2 * sensitivity) * sensitivity


@given(seed=seeds, kernel=kernels, span=spans, eta=etas, factors=factor_sets)
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), eta=0.7, factors=(2, 3))
@example(seed=0, kernel="flow_sde", span=(0.9, 0.0), eta=0.7, factors=(5, 2))
@example(seed=0, kernel="cps", span=(1.0, 0.5), eta=1.0, factors=(6,))
@example(seed=0, kernel="dance", span=(0.7, 0.55), eta=0.7, factors=())
def test_it_is_a_slow_loop_per_row_and_factor(seed, kernel, span, eta, factors):
    """Every p^(k) is k-1 Euler sub-steps and one SDE sub-step, whichever k stand beside it."""
    (t, s), net, x = span, network(seed), normal(seed, 4, 3)
    process = pg.Process([t, s], kernel, eta)
    got = split(net, kernel, x, t, s, factors, eta)
    assert list(got) == [1, *sorted(factors)]
    for k, p in got.items():
        bound = loop_rounding(t, s, k, eta)
        for b in range(4):
            row = Observed((b, 0, 0), t, s, torch.tensor([b]), x[b][None], x[b][None])
            mean, std = slow_transition(net, process, k, row)
            assert (p.mean[b] - mean[0]).abs().max() <= bound
            assert abs(p.std[b].item() - std) <= bound


@given(seed=seeds, kernel=kernels, span=spans, factors=factor_sets)
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), factors=(2,))
def test_k_one_is_the_coarse_step(seed, kernel, span, factors):
    """k = 1 is the coarse transition itself, bitwise, whatever is in S."""
    net, x = network(seed), normal(seed, 4, 3)
    t, s = times(span[0], 4), times(span[1], 4)
    coarse = pg.Process(span, kernel).transition(x, net(x, t, torch.arange(4)), t, s)
    got = split(net, kernel, x, *span, factors)[1]
    assert torch.equal(got.mean, coarse.mean) and torch.equal(got.std, coarse.std)


@given(seed=seeds, kernel=kernels, span=spans, k=st.integers(1, 7))
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), k=2)
def test_mean_is_a_weighted_ensemble_of_velocities(seed, kernel, span, k):
    """mu^(k) = a_k x_t - a_k d sum v_j + b_k v_{k-1}, the v_j being those of the Euler path."""
    (t, s), net, x = span, network(seed), normal(seed, 1, 3)
    d, state, path = (t - s) / k, x, []
    for j in range(k):
        path.append(net(state, times(t - j * d, 1), torch.tensor([0])))
        state = state - d * path[-1]
    record, last = theory.of(kernel, 0.7), theory.last_start(k, t, s)
    a_k, _ = record.step(1.0, 0.0, last, s)
    b_k, _ = record.step(0.0, 1.0, last, s)
    want = a_k * x - a_k * d * sum(path[:-1]) + b_k * path[-1]
    p = split(net, kernel, x, t, s, (k,) if k > 1 else ())[k]
    assert (p.mean - want).abs().max() <= loop_rounding(t, s, k, 0.7)


@given(factors=factor_sets, B=st.integers(1, 4))
@example(factors=(3, 2), B=1)
@example(factors=(), B=2)
def test_cost_and_times(factors, B):
    """1 + sum (k-1) calls of B rows: v_0 at t, then for each k ascending v_j at t - j d.

    Each row keeps its own prompt.
    """
    velocity, t, s = Counting(network()), 0.9, 0.3
    split(velocity, "cps", normal(0, B, 3), t, s, factors)
    want = [t]
    for k in sorted(factors):
        want += [t - j * (t - s) / k for j in range(1, k)]
    assert len(velocity.t) == len(want) == 1 + sum(k - 1 for k in factors)
    for time, expected, prompt in zip(velocity.t, want, velocity.prompt, strict=True):
        assert time.shape == (B,) and (time - expected).abs().max() <= 4 * EPS
        assert torch.equal(prompt, torch.arange(B))


@each_kernel
def test_rows_keep_their_own_times(kernel):
    """One batch may hold transitions of different t, s and prompts; each row is as if alone."""
    flow = GaussianFlow(normal(0, 4, 3), [0.5, 2.0, 0.1])
    x, grid, prompt = normal(1, 4, 3), pg.schedule(4, 3.0), torch.arange(4)
    process = pg.Process(grid, kernel)
    batch = pg.decompose(flow, process, x, grid[:4], grid[1:], prompt, (2, 3))
    for b in range(4):
        row = slice(b, b + 1)
        t, s = grid[:4][row], grid[1:][row]
        alone = pg.decompose(flow, process, x[row], t, s, prompt[row], (2, 3))
        for k, p in alone.items():
            assert torch.equal(p.mean, batch[k].mean[row])
            assert torch.equal(p.std, batch[k].std[row])


@pytest.mark.parametrize("factors", [(1,), (0,), (-2,), (2, 2), (2.0,), (True,), (2, "3")])
def test_bad_factors_are_refused(factors):
    """S holds distinct integers >= 2, since k = 1 is always in."""
    with pytest.raises(ValueError, match=r"^factors=.*must be distinct integers >= 2"):
        split(network(), "cps", normal(0, 2, 3), 0.7, 0.4, factors)


def test_factors_are_sorted():
    """S has no order; the terms are computed from small k to large."""
    assert pg.check_factors([3, 2]) == (2, 3) and pg.check_factors([]) == ()


# ---- Gradients -----------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("k", [2, 3, 5])
def test_gradient_flows_through_states_and_velocities(kernel, k):
    """d mu^(k)/d theta includes every velocity and every intermediate state: finite differences."""
    net, x, u = network(1), normal(2, 4, 3), normal(3, 4, 3)

    def value(velocity):
        return (u * split(velocity, kernel, x, 0.8, 0.3, (k,))[k].mean).sum()

    def forgetful(x, t, prompt):
        return net(x.detach(), t, prompt)

    analytic = gradient(value(net), net)
    direction = normal(5, len(analytic))
    exact = (analytic @ direction).item()
    assert abs(derivative_along(direction, value, net) - exact) <= 1e-8 * max(1.0, abs(exact))
    # With the intermediate states detached the derivative would be visibly another.
    assert (gradient(value(forgetful), net) - analytic).norm() > 1e-3 * analytic.norm()


# ---- Straight flows (E4) and the sum of weights (E5) ---------------------------------------------

# |x|, |theta| < 6 and 1/t <= 5 give |v| < 60; 10 k <= 60 roundings; each division by t' >= 0.02
# amplifies errors of the state by the d/t' of one step, a product below t/s = 10.
STRAIGHT = 60 * 60 * 10 * EPS
fractions = st.floats(0.1, 0.9)


def jacobian(mean, module):
    """d mean/d theta of one row's mean [d]: [d, number of parameters]."""
    return torch.stack([gradient(m, module) for m in mean])


@each_straight_flow
@given(seed=seeds, t=st.floats(0.2, 1.0), fraction=fractions, eta=etas, k=st.integers(2, 6))
@example(seed=0, t=1.0, fraction=0.9, eta=0.7, k=2)
def test_e4_straight_flows_make_cps_exact(field, seed, t, fraction, eta, k):
    """E4: where v is constant along ODE paths, cps has p^(k) = p^(1).

    So have its mean, its std, its gradient and the ratio after an update.
    """
    theta, x, x_s = normal(seed, 3, 1, 3)
    straight, s = field(theta[0]), t * fraction
    p = split(straight, "cps", x, t, s, (k,), eta)
    assert torch.equal(p[k].std, p[1].std) and (p[k].mean - p[1].mean).abs().max() <= STRAIGHT
    fine, coarse = jacobian(p[k].mean[0], straight), jacobian(p[1].mean[0], straight)
    assert (fine - coarse).abs().max() <= STRAIGHT

    updated = split(moved(straight, seed + 1, 0.3), "cps", x, t, s, (k,), eta)
    log_ratio = {j: updated[j].log_prob(x_s, "sum") - p[j].log_prob(x_s, "sum") for j in (1, k)}
    # d log p/d mean = z/c: |z| < 60/c, so the bound is 2 * 3 * 60/c^2 times the means' error.
    assert (log_ratio[1] - log_ratio[k]).abs().max() <= 360 * STRAIGHT / p[1].std.item() ** 2


@each_straight_flow
@each_kernel
@given(seed=seeds, t=st.floats(0.2, 0.95), fraction=fractions, eta=etas, k=st.integers(2, 6))
def test_e4_mean_gap_and_gradient_on_straight_flows(field, kernel, seed, t, fraction, eta, k):
    """E4: mu^(k) - mu^(1) is x1_hat/2 (c_1^2/t - c_k^2/t') under flow_sde and dance, not zero.

    The parameter gradient keeps its direction; its length is sum w_j / b_1.
    """
    theta, x = normal(seed, 2, 1, 3)
    straight, s, record = field(theta[0]), t * fraction, theory.of(kernel, eta)
    p = split(straight, kernel, x, t, s, (k,), eta)
    x1_hat = x + (1 - t) * straight(x, times(t, 1), None)
    bound = STRAIGHT * 20  # 1 + g^2 <= 20 at t = 0.95
    assert (p[k].mean - p[1].mean - record.gap(x1_hat, k, t, s)).abs().max() <= bound

    shrink = record.weight_sum(k, t, s) / record.weight_sum(1, t, s)
    fine, coarse = jacobian(p[k].mean[0], straight), jacobian(p[1].mean[0], straight)
    assert (fine - shrink * coarse).abs().max() <= bound * 20


@given(
    kernel=kernels,
    t=st.floats(0.05, 1.0),
    fraction=st.floats(0.02, 0.95),
    eta=etas,
    k=st.integers(2, 8),
)
@example(kernel="flow_sde", t=0.7, fraction=0.55 / 0.7, eta=0.7, k=2)
@example(kernel="flow_sde", t=1.0, fraction=0.9, eta=0.7, k=2)
@example(kernel="dance", t=1.0, fraction=0.9, eta=0.7, k=3)
@example(kernel="dance", t=0.7, fraction=0.0, eta=0.7, k=3)
def test_e5_sum_of_velocity_weights(kernel, t, fraction, eta, k):
    """E5: sum w_j is b_1 under cps and -D - (1-t) c_k^2/(2t') under the others.

    There it is b_1 again at t = 1 and, for dance, at s = 0; elsewhere it is smaller in size.
    """
    s, record = t * fraction, theory.of(kernel, eta)
    total = sum_of_weights(kernel, t, s, (k,), eta)
    # 20 k roundings below 1 + g^2, through 1 - t'.
    sensitivity = 1 / (1 - theory.last_start(k, t, s))
    bound = 20 * k * EPS * (1 + eta**2 * sensitivity) * sensitivity
    assert abs(total[k] - record.weight_sum(k, t, s)) <= bound
    if record.conserves(t, s):
        assert abs(total[k] - total[1]) <= bound
    else:
        assert abs(total[k]) <= abs(total[1]) + bound


FIGURES = {"flow_sde": (0.88, 0.85, 0.83), "dance": (0.96, 0.94, 0.93), "cps": (1, 1, 1)}


@pytest.mark.parametrize("kernel", FIGURES)
def test_e5_figures(kernel):
    """E5: the ratios sum w_j / b_1 that theory prints for t = 0.70, s = 0.55, eta = 0.7."""
    total = sum_of_weights(kernel, 0.7, 0.55, (2, 3, 5))
    for k, figure in zip((2, 3, 5), FIGURES[kernel], strict=True):
        assert abs(total[k] / total[1] - figure) <= 0.005


# ---- Orders in D (E6) ----------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("k", [2, 3])
def test_e6_order_of_the_standardised_mean_gap(kernel, k):
    """E6: |mu^(k) - mu^(1)| / c_1 shrinks as D under cps and as sqrt(D) under the others."""
    net, x, gaps, order = network(4), normal(5, 4, 3), [], theory.of(kernel, 0.7).gap_order
    for D in (2.0**-8, 2.0**-10, 2.0**-12):
        p = split(net, kernel, x, 0.7, 0.7 - D, (k,))
        gaps.append(((p[k].mean - p[1].mean).norm() / p[1].std[0]).item())
    # The expansion goes on with a factor 1 + O(sqrt(D)) = 1 +- 0.06, or 0.05 of slope.
    for wide, narrow in pairwise(gaps):
        assert abs(math.log(wide / narrow, 4) - order) <= 0.05, gaps
