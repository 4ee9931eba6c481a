"""Gradients and reward attribution, decomposed against original, as properties: of any transition, group and network.

The oracle (verify_equivalence.py) measures these statements at chosen points and says by how much; here they are drawn.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slow import (
    EPS,
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
)

import pave_grpo as pg
import verify_equivalence as oracle
from zoo.oracle.fields import Constant, OnlyCall, Point

dims, groups = st.integers(1, 5), st.integers(2, 9)
grids = st.tuples(st.sampled_from([1.0, 0.9]), st.floats(0.3, 0.8), st.floats(0.05, 0.25))
some = settings(max_examples=40)


def observe(seed, kernel, mode, eta, grid, d, G, centred=True, net=None):
    """A rollout of two prompts over both stochastic steps of a grid of three times, with advantages out of the air."""
    net = network(seed % 997, d) if net is None else net
    rollout = roll(mode, net, pg.Process(list(grid), kernel, eta), P=2, G=G, d=d, seed=seed)
    A = pg.group_advantages(normal(seed + 1, *rollout.x_0.shape[:3]), clamp=None)
    return net, rollout, A if centred else A + normal(seed + 2, *rollout.x_0.shape[:2], 1)


def credits(p, rollout, A):
    """A (x_s - mu) / std^2 of every member, [P, n, G, d]."""
    return A[..., None] * (rollout.x_s - p.mean) / p.std[..., None] ** 2


def rounding(p, rollout, A):
    """What rounding may do to a mean of credits: 32 roundings of its largest term."""
    largest = A.abs().max() * (rollout.x_s.abs().max() + p.mean.abs().max()) / p.std.min() ** 2
    return 32 * EPS * largest.item()


def scale(kernel, k, t, s):
    """(c_1/c_k)^2 as THEORY.md states it; the grid's first step is the only one that may start at t = 1."""
    last = s + (t - s) / k
    return {
        "cps": 1,
        "dance": k,
        "flow_sde": (k - 1) / last if t == 1 else k * t * (1 - last) / ((1 - t) * last),
    }[kernel]


@some
@given(seed=seeds, kernel=kernels, eta=etas, grid=grids, d=dims, G=groups, k=st.integers(2, 7))
@example(seed=0, kernel="flow_sde", eta=0.7, grid=(1.0, 0.5, 0.1), d=3, G=2, k=2)
@example(seed=0, kernel="flow_sde", eta=1.0, grid=(1.0, 0.8, 0.05), d=1, G=9, k=7)
@example(seed=0, kernel="cps", eta=1.0, grid=(1.0, 0.5, 0.1), d=1, G=2, k=2)
@example(seed=0, kernel="dance", eta=0.1, grid=(0.9, 0.3, 0.05), d=5, G=3, k=5)
def test_e2_group_attribution_keeps_direction_and_has_the_stated_scale(
    seed, kernel, eta, grid, d, G, k
):
    """Shared anchors, sum A = 0: mean_i A_i (x_s - mu^(k))/c_k^2 is (c_1/c_k)^2 times the original, as a vector."""
    net, rollout, A = observe(seed, kernel, "shared_anchor", eta, grid, d, G)
    with torch.no_grad():
        p = pg.rescore(net, rollout, (k,))
    whole = {j: credits(q, rollout, A).mean(2) for j, q in p.items()}
    for i in range(2):
        wanted = scale(kernel, k, *grid[i : i + 2])
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
@example(
    seed=0, kernel="flow_sde", mode="independent", eta=0.7, grid=(1.0, 0.5, 0.1), d=3, G=2, k=2
)
def test_e7_matched_attribution_is_the_original_member_by_member(
    seed, kernel, mode, eta, grid, d, G, k
):
    """The gradient of a matched term with respect to its mean is the coarse one, for any advantages, in both modes."""
    net, rollout, A = observe(seed, kernel, mode, eta, grid, d, G, centred=False)
    first = pg.policy_loss(net, rollout, A, factors=(k,), form="matched", reduction="sum").old
    assert torch.equal(
        first.log_probs[k], first.log_probs[1]
    )  # at theta_old it is the density that sampled
    scene = oracle.Scene(
        net, rollout, A
    )  # the credit is read off policy_loss, by an offset of the last velocity
    got, want = oracle.attribution(scene, k, "matched"), oracle.attribution(scene, 1)
    p = pg.rescore(net, rollout, (k,))
    b = min(
        abs(
            pg.Process(list(grid), kernel, eta)
            .coefficients(*torch.tensor(e, dtype=torch.float64))
            .b.item()
        )
        for t, s in pairwise(grid)
        for e in ((t, s), (s + (t - s) / k, s))
    )
    assert (got - want).abs().max() <= G * sum(rounding(q, rollout, A) for q in p.values()) / min(
        1.0, b
    )


@some
@given(
    seed=seeds,
    mode=modes,
    eta=etas,
    grid=grids,
    G=groups,
    factors=st.sets(st.integers(2, 6), min_size=1, max_size=3),
    field=st.sampled_from([Constant, Point]),
    form=st.sampled_from(["paper", "matched"]),
)
def test_straight_flows_under_cps_only_double_the_gradient(
    seed, mode, eta, grid, G, factors, field, form
):
    """E4: each k-term has the coarse gradient, so coarse + 1/|S| sum of them is twice it: Pave-GRPO is Flow-CPS."""
    net, rollout, A = observe(seed, "cps", mode, eta, grid, 3, G, net=field(normal(seed, 3)))
    plain, pave = (
        gradient(pg.policy_loss(net, rollout, A, factors=f, form=form).loss, net)
        for f in ((), tuple(factors))
    )
    with torch.no_grad():
        p = pg.rescore(net, rollout, tuple(factors))
    # A mean is off by 10 roundings a sub-step (states below 10, 1/t up to 20); credit divides that by c^2.
    bound = 10 * 6 * 10 * 20 * EPS * A.abs().max().item() / p[1].std.min().item() ** 2
    assert (pave - 2 * plain).abs().max() <= bound


@some
@given(seed=seeds, kernel=kernels, mode=modes, k=st.integers(2, 5))
def test_the_shares_of_the_moments_add_up(seed, kernel, mode, k):
    """A k-term's parameter gradient is the sum over its k velocity calls of the gradient through that call alone."""
    net, rollout, A = observe(seed, kernel, mode, 0.7, (1.0, 0.6, 0.2), 3, 4)
    weights = {1: 0.0, k: 1.0}
    loss = lambda field: pg.policy_loss(field, rollout, A, factors=(k,), term_weights=weights).loss
    whole = gradient(loss(net), net)
    parts = [gradient(loss(OnlyCall(net, j)), net) for j in range(k)]
    assert all(part.norm() > 0 for part in parts)  # every moment is supervised
    assert (sum(parts) - whole).norm() <= 1e4 * EPS * max(part.norm() for part in parts)


# ---- Metamorphic ---------------------------------------------------------------------------------------------


@some
@given(
    seed=seeds,
    kernel=kernels,
    mode=modes,
    G=st.integers(3, 9),
    form=st.sampled_from(["paper", "matched"]),
)
def test_permuting_a_group_changes_nothing(seed, kernel, mode, G, form):
    """Members have no order: noise and rewards permuted together give the permuted rollout and the same gradient."""
    net, process = network(seed % 997), pg.Process([1.0, 0.6, 0.2], kernel)
    own = mode == "independent"
    start, steps = normal(seed, 2, G if own else 1, 3), normal(seed + 1, 2, 2, G, 3)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    sample = pg.rollout_independent if own else pg.rollout_shared_anchor
    values = []
    for noise in (
        pg.Noise(start, steps),
        pg.Noise(start[:, order] if own else start, steps[:, :, order]),
    ):
        rollout = sample(net, process, noise)
        A = pg.group_advantages(-rollout.x_0.square().sum(-1))
        values.append((rollout.x_0, gradient(pg.policy_loss(net, rollout, A, form=form).loss, net)))
    assert (values[0][0][:, :, order] - values[1][0]).abs().max() <= 1e4 * EPS
    assert (values[0][1] - values[1][1]).norm() <= 1e7 * EPS * max(1, values[0][1].norm())


@some
@given(seed=seeds, G=groups, shift=st.floats(-100, 100), factor=st.floats(0.01, 100))
def test_shifting_and_scaling_rewards_changes_no_advantage(seed, G, shift, factor):
    """With eps = 0, A(a r + b) = A(r) for a > 0: to the rounding of r + b, relative to the rewards' spread."""
    r = normal(seed, 3, 2, G)
    A, B = (pg.group_advantages(z, eps=0.0, clamp=None) for z in (r, factor * r + shift))
    size = (abs(shift) + factor * r.abs().max().item()) / (factor * r.std(-1).min().item())
    assert (A - B).abs().max() <= 100 * EPS * size * G


@some
@given(seed=seeds, kernel=kernels, mode=modes, form=st.sampled_from(["paper", "matched"]))
def test_a_second_group_leaks_nothing_into_the_first(seed, kernel, mode, form):
    """Each prompt has parameters of its own: those of the first have the same gradient, bit for bit, whatever the
    second group drew and earned; and the second group's own gradient does change."""
    process, grads, firsts = pg.Process([1.0, 0.6, 0.2], kernel), [], []
    for other in (1, 2):
        flow = GaussianFlow(normal(seed, 2, 3), [0.5, 2.0, 0.1])
        noise = pg.draw_noise(
            [torch.Generator().manual_seed(z) for z in (seed, seed + other)],
            4,
            (3,),
            2,
            mode == "independent",
            torch.float64,
        )
        rollout = (pg.rollout_independent if mode == "independent" else pg.rollout_shared_anchor)(
            flow, process, noise
        )
        A = pg.group_advantages(-rollout.x_0.square().sum(-1))
        loss = pg.policy_loss(flow, rollout, A, form=form).loss
        grads.append(torch.autograd.grad(loss, flow.m)[0])
        firsts.append(rollout.x_0[0])
    assert torch.equal(firsts[0], firsts[1]) and torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


@some
@given(seed=seeds, kernel=kernels, mode=modes, form=st.sampled_from(["paper", "matched"]))
def test_a_split_batch_has_the_same_gradient(seed, kernel, mode, form):
    """The loss is a mean over prompts: the mean of the gradients of two halves is the gradient of the whole."""
    net, rollout, A = observe(seed, kernel, mode, 0.7, (1.0, 0.6, 0.2), 3, 4)
    halves = []
    for p in (0, 1):
        part = rollout._replace(
            x_t=rollout.x_t[p : p + 1],
            x_s=rollout.x_s[p : p + 1],
            log_prob=rollout.log_prob[p : p + 1],
            x_0=rollout.x_0[p : p + 1],
        )
        velocity = lambda x, t, c, p=p: net(x, t, c + p)
        halves.append(gradient(pg.policy_loss(velocity, part, A[p : p + 1], form=form).loss, net))
    whole = gradient(pg.policy_loss(net, rollout, A, form=form).loss, net)
    assert (sum(halves) / 2 - whole).norm() <= 1e6 * EPS * max(1, *(h.norm() for h in halves))


@some
@given(seed=seeds, kernel=kernels, mode=modes, factors=st.permutations([2, 3, 5]))
def test_s_is_a_set_and_its_terms_do_not_see_each_other(seed, kernel, mode, factors):
    """Order and company of k change nothing about its term: log-probabilities agree bit for bit on a closed form."""
    flow = GaussianFlow(normal(seed, 2, 3), [0.5, 2.0, 0.1])
    rollout = roll(mode, flow, pg.Process([1.0, 0.6, 0.2], kernel), P=2, G=4, seed=seed % 1000)
    A = pg.group_advantages(-rollout.x_0.square().sum(-1))
    together = pg.policy_loss(flow, rollout, A, factors=factors)
    again = pg.policy_loss(flow, rollout, A, factors=sorted(factors))
    assert torch.equal(together.loss, again.loss)
    for k in factors:
        alone = pg.policy_loss(flow, rollout, A, factors=(k,)).old
        assert torch.equal(alone.log_probs[k], together.old.log_probs[k])


@each_kernel
def test_refining_the_decomposition_converges(kernel):
    """K -> infinity: k-1 Euler sub-steps tend to the ODE's path, so mu^(k) converges, at first order in 1/k."""
    net, x = network(3), normal(4, 4, 3)
    rows = [torch.full((4,), u, dtype=torch.float64) for u in (0.7, 0.4)]
    ks = (8, 16, 32, 64, 128)
    p = pg.decompose(net, pg.Process([0.7, 0.4], kernel), x, *rows, torch.arange(4), ks)
    differences = [(p[2 * k].mean - p[k].mean).norm().item() for k in ks[:-1]]
    orders = [math.log2(a / b) for a, b in pairwise(differences)]
    # the error is a/k + b/k^2: successive differences halve up to 1/k, so orders are within 0.15 of 1 from k = 16 on
    assert all(abs(order - 1) <= 0.15 for order in orders[1:]), orders


@pytest.mark.parametrize("clamp", [0.5, 1.0])
def test_a_clamp_that_acts_breaks_e2(clamp):
    """Clamped advantages do not sum to zero, mu no longer cancels, and the direction is lost by more than rounding."""
    net, rollout, A = observe(3, "flow_sde", "shared_anchor", 0.7, (0.9, 0.6, 0.2), 3, 9)
    A = A.clamp(-clamp, clamp)
    assert A.sum(-1).abs().min() > 0.01
    p = pg.rescore(net, rollout, (2,))
    a, b = (credits(q, rollout, A).mean(2).flatten() for q in (p[1], p[2]))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) < 0.999
