"""decompose: p^(k) against a plain loop, arithmetic by hand, straight flows (E4), sums (E5) and orders in D (E6)."""

import math
from itertools import pairwise

import pytest
import torch
from slow import (
    EPS,
    KERNELS,
    Constant,
    Counting,
    GaussianFlow,
    Net,
    Radial,
    each_kernel,
    etas,
    factor_sets,
    gradient,
    kernels,
    moved,
    normal,
    seeds,
    slow_step,
    slow_transition,
    spans,
)
from hypothesis import example, given
from hypothesis import strategies as st

import pave_grpo as pg


def rows(value, B):
    return torch.full((B,), value, dtype=torch.float64)


def split(velocity, kernel, x, t, s, factors, eta=0.7, c=None):
    """decompose of a batch x [B, d] whose rows share one step t -> s, prompts 0, 1, 2, ... unless said otherwise."""
    c = torch.arange(len(x)) if c is None else c
    return pg.decompose(
        velocity, pg.Process([t, s], kernel, eta), x, rows(t, len(x)), rows(s, len(x)), c, factors
    )


# ---- What it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, eta, coarse, mean, std",
    [
        # t = 0.8, s = 0.4, k = 2, v(x) = x, x_t = 1. d = 0.2; Euler to t' = 0.6: x' = 1 - 0.2 * 1 = 0.8, v' = 0.8.
        # dance, eta = 1/2, 0.6 -> 0.4: a_2 = 1 - 0.25 * 0.2 / 1.2 = 23/24, b_2 = -0.2 - 0.25 * 0.2 * 0.4 / 1.2 = -13/60,
        #   mu = (23/24 - 13/60) * 0.8 = 89/150, c_2 = sqrt(0.2)/2; coarse: 1 - 0.0625 - 0.4 - 0.0125 = 0.525.
        ("dance", 1 / 2, 0.525, 89 / 150, math.sqrt(0.2) / 2),
        # flow_sde, eta = 1: g^2 = 0.6/0.4 = 1.5, a_2 = 1 - 1.5 * 0.2/1.2 = 0.75, b_2 = -(1 + 1.5 * 0.4/1.2) 0.2 = -0.3,
        #   mu = 0.45 * 0.8 = 0.36, c_2 = sqrt(1.5 * 0.2); coarse: g^2 = 4, 1 - 4 * 0.4/1.6 - (1 + 4 * 0.2/1.6) 0.4 = -0.6.
        ("flow_sde", 1.0, -0.6, 0.36, math.sqrt(0.3)),
        # cps, eta = 2/3: cos h = 1/2, a_2 = 0.6 + 0.4/2 = 0.8, b_2 = -0.6 * 0.6 + 0.4/2 * 0.4 = -0.28,
        #   mu = 0.52 * 0.8 = 0.416, c_2 = 0.4 sin 60; coarse: 0.8 - 0.6 * 0.8 + 0.2 * 0.2 = 0.36.
        ("cps", 2 / 3, 0.36, 0.416, 0.4 * math.sqrt(3) / 2),
    ],
)
def test_one_transition_by_hand(kernel, eta, coarse, mean, std):
    """One Euler sub-step and one SDE sub-step, in numbers anyone can check."""
    p = split(lambda x, t, c: x, kernel, torch.ones(1, 1, dtype=torch.float64), 0.8, 0.4, (2,), eta)
    assert abs(p[1].mean.item() - coarse) <= 20 * EPS  # some 20 roundings of numbers below 2
    assert abs(p[2].mean.item() - mean) <= 20 * EPS and abs(p[2].std.item() - std) <= 20 * EPS


@given(seed=seeds, kernel=kernels, span=spans, eta=etas, factors=factor_sets)
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), eta=0.7, factors=(2, 3))
@example(seed=0, kernel="flow_sde", span=(0.9, 0.0), eta=0.7, factors=(5, 2))
@example(seed=0, kernel="cps", span=(1.0, 0.5), eta=1.0, factors=(6,))
@example(seed=0, kernel="dance", span=(0.7, 0.55), eta=0.7, factors=())
def test_lock_step_is_a_plain_loop_per_factor(seed, kernel, span, eta, factors):
    """Every p^(k) is k-1 Euler sub-steps and one SDE sub-step, whichever chains advance beside it."""
    (t, s), net, x = span, Net(seed % 1000), normal(seed, 4, 3)
    process = pg.Process([t, s], kernel, eta)
    got = split(net, kernel, x, t, s, factors, eta)
    assert list(got) == [1, *sorted(factors)]
    for k, p in got.items():
        for b in range(4):
            mean, std = slow_transition(net, process, t, s, k, x[b : b + 1], torch.tensor([b]))
            # k <= 6 sub-steps of about 100 roundings (a network of 8 units) of numbers below 50, each amplified at
            # most 10 times by the field in all; the last step by 1 + g^2 with 1 - t' as sensitive as 1/(1 - t').
            last = s + (t - s) / k
            g2 = eta**2 / (1 - (last if last < 1 else s)) if kernel == "flow_sde" else 1
            bound = (
                6 * 100 * 50 * 10 * EPS * (1 + g2) * (1 / (1 - last) if last < 1 else 1 / (1 - s))
            )
            assert (p.mean[b] - mean[0]).abs().max() <= bound and abs(
                p.std[b].item() - std
            ) <= bound


@given(seed=seeds, kernel=kernels, span=spans, factors=factor_sets)
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), factors=(2,))
def test_k_one_is_the_coarse_step(seed, kernel, span, factors):
    """K = 1 is the coarse transition itself, bitwise, whatever is in S."""
    (t, s), net, x = span, Net(seed % 1000), normal(seed, 4, 3)
    coarse = pg.Process([t, s], kernel).transition(
        x, net(x, rows(t, 4), torch.arange(4)), rows(t, 4), rows(s, 4)
    )
    got = split(net, kernel, x, t, s, factors)[1]
    assert torch.equal(got.mean, coarse.mean) and torch.equal(got.std, coarse.std)


@given(seed=seeds, kernel=kernels, span=spans, k=st.integers(1, 7))
@example(seed=0, kernel="flow_sde", span=(1.0, 0.9), k=2)
def test_mean_is_a_weighted_ensemble_of_velocities(seed, kernel, span, k):
    """Mu^(k) = a_k x_t - a_k d sum v_j + b_k v_{k-1}, the v_j being those of the Euler path."""
    (t, s), x, d = span, normal(seed, 1, 3), (span[0] - span[1]) / k
    velocity = Counting(Net(seed % 1000))
    state, path = x, []
    for j in range(k):
        path.append(velocity.velocity(state, rows(t - j * d, 1), torch.tensor([0])))
        state = state - d * path[-1]
    step = lambda x, v: slow_step(kernel, 0.7, t - (k - 1) * d, s, x, v, s)
    (a, std), b = step(1.0, 0.0), step(0.0, 1.0)[0]
    weights = [-a * d] * (k - 1) + [b]
    p = split(velocity, kernel, x, t, s, (k,) if k > 1 else ())[k]
    last = s + d if k > 1 else t
    bound = (
        60000 * EPS * (1 + 1 / (1 - (last if last < 1 else s))) ** 2
    )  # as in the plain loop, k <= 7
    want = a * x + sum(w * v for w, v in zip(weights, path, strict=True))
    assert (p.mean - want).abs().max() <= bound and abs(p.std.item() - std) <= bound
    assert all(bool((times <= t).all() and (times > s).all()) for times in velocity.t)


@given(factors=factor_sets, B=st.integers(1, 4))
@example(factors=(2, 3), B=1)
@example(factors=(), B=2)
def test_cost_and_times(factors, B):
    """Max(S) calls and B (1 + sum (k-1)) rows, chain k at times t - j d, each row with its own condition."""
    velocity, t, s = Counting(Net(0)), 0.9, 0.3
    split(velocity, "cps", normal(0, B, 3), t, s, factors)
    assert len(velocity.t) == max((1, *factors)) and velocity.rows == B * (
        1 + sum(k - 1 for k in factors)
    )
    times = sorted(time for call in velocity.t for time in call.tolist())
    want = sorted([t] * B + [t - j * (t - s) / k for k in factors for j in range(1, k)] * B)
    assert max(abs(a - b) for a, b in zip(times, want, strict=True)) <= 4 * EPS
    assert all(torch.equal(c, torch.arange(B).repeat(len(c) // B)) for c in velocity.c)


def test_rows_keep_their_own_times():
    """One batch may hold transitions of different t, s and prompts; each row is as if alone."""
    flow, x = GaussianFlow(normal(0, 4, 3), [0.5, 2.0, 0.1]), normal(1, 4, 3)
    grid = pg.schedule(4, 3.0)
    for kernel in KERNELS:
        process = pg.Process(grid, kernel)
        batch = pg.decompose(flow, process, x, grid[:4], grid[1:], torch.arange(4), (2, 3))
        for b in range(4):
            row = [f[b : b + 1] for f in (x, grid[:4], grid[1:], torch.arange(4))]
            for k, p in pg.decompose(flow, process, *row, (2, 3)).items():
                assert torch.equal(p.mean, batch[k].mean[b : b + 1]) and torch.equal(
                    p.std, batch[k].std[b : b + 1]
                )


@pytest.mark.parametrize("factors", [(1,), (0,), (-2,), (2, 2), (2.0,), (True,), (2, "3")])
def test_bad_factors_are_refused(factors):
    """S holds distinct integers >= 2, since k = 1 is always in."""
    with pytest.raises(ValueError, match=r"^factors=.*must be distinct integers >= 2"):
        split(Net(0), "cps", normal(0, 2, 3), 0.7, 0.4, factors)
    assert pg.check_factors([3, 2]) == (2, 3) and pg.check_factors([]) == ()


# ---- Gradients -----------------------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("k", [2, 3, 5])
def test_gradient_flows_through_states_and_velocities(kernel, k):
    """D mu^(k)/d theta includes every velocity and every intermediate state, as finite differences see it."""
    net, x, u = Net(1), normal(2, 4, 3), normal(3, 4, 3)
    value = lambda module: (u * split(module, kernel, x, 0.8, 0.3, (k,))[k].mean).sum()
    analytic, direction = (
        gradient(value(net), net),
        [normal(5 + i, *p.shape) for i, p in enumerate(net.parameters())],
    )

    def at(h):
        module = moved(net, 0, 0.0)
        with torch.no_grad():
            for p, v in zip(module.parameters(), direction, strict=True):
                p += h * v
            return value(module).item()

    h = 1e-3  # five-point formula: truncation h^4 f^(5)/30 ~ 1e-12 * 1e3, rounding 1e-14/h ~ 1e-11
    numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    exact = (analytic @ torch.cat([v.flatten() for v in direction])).item()
    assert abs(numeric - exact) <= 1e-8 * max(1.0, abs(exact))
    # The test has teeth: with the intermediate states detached the derivative would be visibly another.
    stopped = value(lambda x, t, c: net(x.detach(), t, c))
    assert (gradient(stopped, net) - analytic).norm() > 1e-3 * analytic.norm()


def jacobian(module, kernel, x, t, s, k, eta):
    """d mu^(k)/d theta of a one-row x, [d, number of parameters]."""
    mean = split(module, kernel, x, t, s, (k,) if k > 1 else (), eta)[k].mean[0]
    return torch.stack([gradient(m, module) for m in mean])


# ---- Straight flows (E4) and the sum of weights (E5) ---------------------------------------------------------


@pytest.mark.parametrize("field", [Constant, Radial])
@given(
    seed=seeds, t=st.floats(0.2, 1.0), fraction=st.floats(0.1, 0.9), eta=etas, k=st.integers(2, 6)
)
@example(seed=0, t=1.0, fraction=0.9, eta=0.7, k=2)
def test_e4_straight_flows_make_cps_exact(field, seed, t, fraction, eta, k):
    """E4: where v is constant along ODE paths, cps has p^(k) = p^(1): mean, std, gradient and off-policy ratio."""
    theta, x, x_s = normal(seed, 3, 3)
    straight, s = field(theta), t * fraction
    other = moved(straight, seed + 1, 0.3)
    here, there = (split(v, "cps", x[None], t, s, (k,), eta) for v in (straight, other))
    # |x|, |theta| < 6, 1/t <= 5, so |v| < 60, and 10 k <= 60 roundings; each division by t' >= 0.02 amplifies state
    # errors by the d/t' of one step (a product below t/s = 10).
    bound = 60 * 60 * 10 * EPS
    assert (
        torch.equal(here[k].std, here[1].std) and (here[k].mean - here[1].mean).abs().max() <= bound
    )
    fine, coarse = (jacobian(straight, "cps", x[None], t, s, j, eta) for j in (k, 1))
    assert (fine - coarse).abs().max() <= bound
    ratio = [
        there[j].log_prob(x_s[None], "sum") - here[j].log_prob(x_s[None], "sum") for j in (1, k)
    ]
    # d log p/d mean = z/c: |z| < 60/c, so the bound is 2 * 3 * 60/c^2 times the means' error.
    assert (ratio[0] - ratio[1]).abs().max() <= 360 * bound / here[1].std.item() ** 2


@pytest.mark.parametrize("field", [Constant, Radial])
@pytest.mark.parametrize("kernel", ["flow_sde", "dance"])
@given(
    seed=seeds, t=st.floats(0.2, 0.95), fraction=st.floats(0.1, 0.9), eta=etas, k=st.integers(2, 6)
)
def test_e4_mean_gap_of_the_other_kernels(field, kernel, seed, t, fraction, eta, k):
    """E4: on straight flows mu^(k) - mu^(1) = x1_hat/2 (c_1^2/t - c_k^2/t') under flow_sde and dance, not zero."""
    (theta, x), s = normal(seed, 2, 1, 3), t * fraction
    straight = field(theta[0])
    p, last = split(straight, kernel, x, t, s, (k,), eta), s + (t - s) / k
    x1_hat = x + (1 - t) * straight(x, rows(t, 1), None)
    want = x1_hat / 2 * (p[1].std ** 2 / t - p[k].std ** 2 / last)
    bound = 60 * 60 * 10 * EPS * 20  # as above, times 1 + g^2 <= 20 at t = 0.95
    assert (p[k].mean - p[1].mean - want).abs().max() <= bound
    # The direction of the parameter gradient is exact, its length sum w_j / b_1.
    d = (t - s) / k
    a_k, b_k = (slow_step(kernel, eta, last, s, *unit)[0] for unit in ((1.0, 0.0), (0.0, 1.0)))
    b_1 = slow_step(kernel, eta, t, s, 0.0, 1.0)[0]
    shrink = (b_k - (k - 1) * a_k * d) / b_1
    fine, coarse = (jacobian(straight, kernel, x, t, s, j, eta) for j in (k, 1))
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
    """E5: sum w_j = b_1 under cps; -D - (1-t) c_k^2/(2t') otherwise, b_1 again at t = 1 and, for dance, at s = 0."""
    s = t * fraction
    unit = split(
        Constant(torch.ones(1, dtype=torch.float64)),
        kernel,
        torch.zeros(1, 1, dtype=torch.float64),
        t,
        s,
        (k,),
        eta,
    )
    total, b_1, last = unit[k].mean.item(), unit[1].mean.item(), s + (t - s) / k
    g2 = eta**2 / (1 - last) if kernel == "flow_sde" else 1
    bound = 20 * k * EPS * (1 + g2) / (1 - last)  # 20 k roundings below 1 + g^2, through 1 - t'
    if kernel == "cps":
        assert abs(total - b_1) <= bound
    else:
        assert abs(total + (t - s) + (1 - t) * unit[k].std.item() ** 2 / (2 * last)) <= bound
        same = t == 1 or (kernel == "dance" and s == 0)
        assert abs(total - b_1) <= bound if same else abs(total) <= abs(b_1) + bound


def test_e5_figures():
    """E5: the printed ratios sum w_j / b_1 at t = 0.70, s = 0.55, eta = 0.7 for k = 2, 3, 5, to their two digits."""
    for kernel, figures in {
        "flow_sde": (0.88, 0.85, 0.83),
        "dance": (0.96, 0.94, 0.93),
        "cps": (1, 1, 1),
    }.items():
        unit = split(
            Constant(torch.ones(1)),
            kernel,
            torch.zeros(1, 1, dtype=torch.float64),
            0.7,
            0.55,
            (2, 3, 5),
        )
        assert all(
            abs((unit[k].mean / unit[1].mean).item() - f) <= 0.005
            for k, f in zip((2, 3, 5), figures, strict=True)
        ), kernel


# ---- Orders in D (E6) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, order", [("cps", 1.0), ("flow_sde", 0.5), ("dance", 0.5)])
@pytest.mark.parametrize("k", [2, 3])
def test_e6_order_of_the_standardised_mean_gap(kernel, order, k):
    """E6: |mu^(k) - mu^(1)| / c_1 shrinks as D under cps and as sqrt(D) under flow_sde and dance, on a network."""
    net, x, gaps = Net(4), normal(5, 4, 3), []
    for D in (2.0**-8, 2.0**-10, 2.0**-12):
        p = split(net, kernel, x, 0.7, 0.7 - D, (k,))
        gaps.append(((p[k].mean - p[1].mean).norm() / p[1].std[0]).item())
    # The expansion's next term is a factor 1 + O(sqrt(D)) = 1 +- 0.06 or better: 0.05 of slope between factors of 4.
    assert all(abs(math.log(a / b, 4) - order) <= 0.05 for a, b in pairwise(gaps)), gaps
