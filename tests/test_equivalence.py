"""Gradients and attribution, decomposed against original: of any transition, group and network.

The oracle (verify_equivalence.py) measures these statements at chosen points and says by how much;
here the points are drawn.
"""

import math
from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slow import (
    EPS,
    FORMS,
    SAMPLERS,
    GaussianFlow,
    each_kernel,
    etas,
    gradient,
    kernels,
    modes,
    network,
    normal,
    roll,
    seeds,
    times,
)

import pave_grpo as pg
from zoo.oracle import theory
from zoo.oracle.bench import Scene
from zoo.oracle.fields import Constant, OnlyCall, Point
from zoo.oracle.measures import attribution

dims, groups, forms = st.integers(1, 5), st.integers(2, 9), st.sampled_from(FORMS)
grids = st.tuples(st.sampled_from([1.0, 0.9]), st.floats(0.3, 0.8), st.floats(0.05, 0.25))
factor_sets = st.sets(st.integers(2, 6), min_size=1, max_size=3).map(tuple)
some = settings(max_examples=40)
GRID = (1.0, 0.6, 0.2)


def observe(seed, kernel, mode, eta=0.7, grid=GRID, d=3, G=4, centred=True, net=None):
    """A rollout of two prompts over both steps of a grid, with advantages out of the air."""
    net = network(seed % 997, d) if net is None else net
    process = pg.Process(torch.tensor(grid, dtype=torch.float64), kernel, eta)
    rollout = roll(mode, net, process, P=2, G=G, d=d, seed=seed)
    A = pg.group_advantages(normal(seed + 1, *rollout.x_0.shape[:3]), clamp=None)
    return net, rollout, A if centred else A + normal(seed + 2, *rollout.x_0.shape[:2], 1)


def credits_of(p, rollout, A):
    """A (x_s - mu) / std^2 of every member, [P, n, G, d]."""
    return A[..., None] * (rollout.x_s - p.mean) / p.std[..., None] ** 2


def rounding(p, rollout, A):
    """What rounding may do to a mean of credits: 32 roundings of its largest term."""
    largest = A.abs().max() * (rollout.x_s.abs().max() + p.mean.abs().max()) / p.std.min() ** 2
    return 32 * EPS * largest.item()


@some
@given(seed=seeds, kernel=kernels, eta=etas, grid=grids, d=dims, G=groups, k=st.integers(2, 7))
@example(seed=0, kernel="flow_sde", eta=0.7, grid=(1.0, 0.5, 0.1), d=3, G=2, k=2)
@example(seed=0, kernel="flow_sde", eta=1.0, grid=(1.0, 0.8, 0.05), d=1, G=9, k=7)
@example(seed=0, kernel="cps", eta=1.0, grid=(1.0, 0.5, 0.1), d=1, G=2, k=2)
@example(seed=0, kernel="dance", eta=0.1, grid=(0.9, 0.3, 0.05), d=5, G=3, k=5)
def test_e2_group_attribution_keeps_direction_and_has_the_stated_scale(
    seed, kernel, eta, grid, d, G, k
):
    """Shared anchors, sum A = 0: mean_i A_i (x_s - mu^(k))/c_k^2 is (c_1/c_k)^2 the original."""
    net, rollout, A = observe(seed, kernel, "shared_anchor", eta, grid, d, G)
    with torch.no_grad():
        p = pg.rescore(net, rollout, (k,))
    whole = {j: credits_of(q, rollout, A).mean(2) for j, q in p.items()}
    for i in range(2):
        wanted = theory.of(kernel, eta).scale(k, grid[i], grid[i + 1])
        bound = 2 * max(1.0, wanted) * max(rounding(q, rollout, A) for q in p.values())
        assert (whole[k][:, i] - wanted * whole[1][:, i]).abs().max() <= bound


@some
@given(
    seed=seeds,
    kernel=kernels,
    mode=modes,
    eta=etas,
    grid=grids,
    d=dims,
    G=groups,
    k=st.integers(2, 6),
)
def test_e7_matched_attribution_is_the_original_member_by_member(
    seed, kernel, mode, eta, grid, d, G, k
):
    """For any advantages, in both modes; the density is the one that sampled, bit for bit."""
    net, rollout, A = observe(seed, kernel, mode, eta, grid, d, G, centred=False)
    first = pg.policy_loss(net, rollout, A, factors=(k,), form="matched", reduction="sum").old
    assert torch.equal(first.log_probs[k], first.log_probs[1])
    scene = Scene(net, rollout, A)
    off = attribution(scene, k, "matched") - attribution(scene, 1)
    # Read off an offset of the last velocity, which is divided by its coefficient b.
    smallest_b = 1.0
    for t, s in pairwise(grid):
        for start in (t, s + (t - s) / k):
            step = torch.tensor([start, s], dtype=torch.float64)
            smallest_b = min(smallest_b, rollout.process.coefficients(*step).b.abs().item())
    p = pg.rescore(net, rollout, (k,))
    bound = G * sum(rounding(q, rollout, A) for q in p.values()) / smallest_b
    assert off.abs().max() <= bound


@some
@given(
    seed=seeds,
    mode=modes,
    eta=etas,
    grid=grids,
    G=groups,
    factors=factor_sets,
    field=st.sampled_from([Constant, Point]),
    form=forms,
)
def test_straight_flows_under_cps_only_double_the_gradient(
    seed, mode, eta, grid, G, factors, field, form
):
    """E4: coarse + 1/|S| sum of k-terms is twice the coarse term: Pave-GRPO is Flow-CPS."""
    net, rollout, A = observe(seed, "cps", mode, eta, grid, 3, G, net=field(normal(seed, 3)))
    plain = gradient(pg.policy_loss(net, rollout, A, factors=(), form=form).loss, net)
    pave = gradient(pg.policy_loss(net, rollout, A, factors=factors, form=form).loss, net)
    with torch.no_grad():
        c_1 = pg.rescore(net, rollout, ())[1].std.min().item()
    # A mean is off by 10 roundings in each of 6 sub-steps of states below 10, v by 1/t <= 20 times;
    # credit divides that by c^2.
    bound = 10 * 6 * 10 * 20 * EPS * A.abs().max().item() / c_1**2
    assert (pave - 2 * plain).abs().max() <= bound


@some
@given(seed=seeds, kernel=kernels, mode=modes, k=st.integers(2, 5))
def test_the_shares_of_the_moments_add_up(seed, kernel, mode, k):
    """A k-term's gradient is the sum over its k velocity calls of the gradient through one."""
    net, rollout, A = observe(seed, kernel, mode)

    def gradient_of(field):
        weights = {1: 0.0, k: 1.0}
        result = pg.policy_loss(field, rollout, A, factors=(k,), term_weights=weights)
        return gradient(result.loss, net)

    whole, parts = gradient_of(net), [gradient_of(OnlyCall(net, j)) for j in range(k)]
    assert all(part.norm() > 0 for part in parts)  # every moment is supervised
    assert (sum(parts) - whole).norm() <= 1e4 * EPS * max(part.norm() for part in parts)


@each_kernel
def test_refining_the_decomposition_converges(kernel):
    """K -> infinity: k-1 Euler sub-steps tend to the ODE's path, at first order in 1/k."""
    net, x, ks = network(3), normal(4, 4, 3), (8, 16, 32, 64, 128)
    process = pg.Process(torch.tensor([0.7, 0.4], dtype=torch.float64), kernel)
    p = pg.decompose(net, process, x, times(0.7, 4), times(0.4, 4), torch.arange(4), ks)
    differences = [(p[2 * k].mean - p[k].mean).norm().item() for k in ks[:-1]]
    orders = [math.log2(a / b) for a, b in pairwise(differences)]
    # The error is a/k + b/k^2: from k = 16 on, the orders of differences are within 0.15 of 1.
    assert all(abs(order - 1) <= 0.15 for order in orders[1:]), orders


# ---- Metamorphic ---------------------------------------------------------------------------------


def sample_and_differentiate(net, process, mode, noise, form):
    """x_0 of a rollout, and the gradient of its loss."""
    rollout = SAMPLERS[mode](net, process, noise)
    A = pg.group_advantages(-rollout.x_0.square().sum(-1))
    return rollout.x_0, gradient(pg.policy_loss(net, rollout, A, form=form).loss, net)


@some
@given(seed=seeds, kernel=kernels, mode=modes, G=st.integers(3, 9), form=forms)
def test_permuting_a_group_changes_nothing(seed, kernel, mode, G, form):
    """Members have no order: permuted noise gives the permuted rollout and the same gradient."""
    net, own = network(seed % 997), mode == "independent"
    process = pg.Process(torch.tensor(GRID, dtype=torch.float64), kernel)
    x_1, z = normal(seed, 2, G if own else 1, 3), normal(seed + 1, 2, 2, G, 3)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    permuted = pg.Noise(x_1[:, order] if own else x_1, z[:, :, order])
    x_0, g = sample_and_differentiate(net, process, mode, pg.Noise(x_1, z), form)
    y_0, h = sample_and_differentiate(net, process, mode, permuted, form)
    assert (x_0[:, :, order] - y_0).abs().max() <= 1e4 * EPS
    assert (g - h).norm() <= 1e7 * EPS * max(1, h.norm())


@some
@given(seed=seeds, kernel=kernels, mode=modes, form=forms)
def test_a_second_group_leaks_nothing_into_the_first(seed, kernel, mode, form):
    """Prompts have parameters of their own; the first's gradient ignores the second, bit for bit.

    The second's own gradient does change.
    """
    process = pg.Process(torch.tensor(GRID, dtype=torch.float64), kernel)
    gradients, samples = [], []
    for other in (1, 2):
        flow = GaussianFlow(normal(seed, 2, 3), [0.5, 2.0, 0.1])
        generators = [torch.Generator().manual_seed(z) for z in (seed, seed + other)]
        own = mode == "independent"
        noise = pg.draw_noise(generators, 4, (3,), 2, own, torch.float64)
        rollout = SAMPLERS[mode](flow, process, noise)
        A = pg.group_advantages(-rollout.x_0.square().sum(-1))
        loss = pg.policy_loss(flow, rollout, A, form=form).loss
        gradients.append(torch.autograd.grad(loss, flow.m)[0])
        samples.append(rollout.x_0[0])
    assert torch.equal(*samples) and torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


@some
@given(seed=seeds, kernel=kernels, mode=modes, factors=st.permutations([2, 3, 5]))
def test_s_is_a_set_and_its_terms_do_not_see_each_other(seed, kernel, mode, factors):
    """Order and company of k change nothing about its term, bit for bit on a closed form."""
    flow = GaussianFlow(normal(seed, 2, 3), [0.5, 2.0, 0.1])
    process = pg.Process(torch.tensor(GRID, dtype=torch.float64), kernel)
    rollout = roll(mode, flow, process, P=2, G=4, seed=seed % 1000)
    A = pg.group_advantages(-rollout.x_0.square().sum(-1))
    together = pg.policy_loss(flow, rollout, A, factors=factors)
    assert torch.equal(together.loss, pg.policy_loss(flow, rollout, A, factors=(2, 3, 5)).loss)
    for k in factors:
        alone = pg.policy_loss(flow, rollout, A, factors=(k,)).old
        assert torch.equal(alone.log_probs[k], together.old.log_probs[k])
