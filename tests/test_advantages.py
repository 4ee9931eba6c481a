"""group_advantages: the formula, silence on equal rewards, the clamp, and its invariances."""

import math
import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from slow import EPS, normal, seeds

import pave_grpo as pg

sizes, ddofs = st.integers(2, 30), st.sampled_from([0, 1])


@given(seed=seeds, G=sizes, ddof=ddofs, eps=st.sampled_from([0.0, 1e-8, 1e-4, 1.0]))
@example(seed=0, G=2, ddof=1, eps=1e-8)
def test_advantages_are_the_formula(seed, G, ddof, eps):
    """A = (r - mean r) / (std r + eps), with the sample's std or the population's."""
    rewards = normal(seed, 2, 3, G)
    got = pg.group_advantages(rewards, ddof, eps, clamp=None)
    for group, A in zip(rewards.flatten(0, 1).tolist(), got.flatten(0, 1).tolist(), strict=True):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        if ddof == 0:
            std = statistics.pstdev(group)
        # G + 10 roundings of numbers below 8, divided by a std as small as the draw makes it.
        bound = (G + 10) * EPS * 8 / std * 8 / std
        for a, r in zip(A, group, strict=True):
            assert abs(a - (r - mean) / (std + eps)) <= bound


def test_the_defaults_are_the_released_ones():
    """ddof 1, eps 1e-8, clamp 5: rewards 0, 1, 2 have std 1, and a lone winner of 40 is cut."""
    A = pg.group_advantages(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    want = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / (1 + 1e-8)
    assert (A - want).abs().max() <= 2 * EPS
    lone = torch.eye(40)[0]
    assert pg.group_advantages(lone).max() == 5.0
    assert pg.group_advantages(lone, clamp=None).max() > 5.0


@given(seed=seeds, G=sizes)
def test_centred_advantages_are_rewards_less_their_mean(seed, G):
    """Dr.GRPO's: whatever ddof and eps; silent groups and the clamp as ever."""
    rewards = normal(seed, 2, 3, G)
    got = pg.group_advantages(rewards, standardise=False, clamp=None)
    for group, found in zip(rewards.flatten(0, 1).tolist(), got.flatten(0, 1).tolist()):
        mean = sum(group) / G
        size = max(map(abs, group))
        assert all(abs(a - (r - mean)) <= 4 * G * EPS * size for a, r in zip(found, group))
    assert torch.equal(pg.group_advantages(rewards, 0, 1.0, None, standardise=False), got)
    cut = pg.group_advantages(10 * rewards, clamp=2.0, standardise=False)
    assert torch.equal(cut, (10 * rewards - (10 * rewards).mean(-1, keepdim=True)).clamp(-2, 2))
    assert not pg.group_advantages(torch.full((G,), 0.3), standardise=False).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(G=sizes, value=st.floats(-1e6, 1e6, width=32), ddof=ddofs)
@example(G=3, value=0.10000000149011612, ddof=1)
@example(G=12, value=0.10000000149011612, ddof=1)
@example(G=2, value=0.0, ddof=0)
def test_equal_rewards_are_silent(dtype, G, value, ddof):
    """A group of equal rewards has advantage exactly zero, never rounding over eps nor 0/0."""
    rewards = torch.full((2, G), value, dtype=dtype)
    for eps in (1e-8, 0.0):
        A = pg.group_advantages(rewards, ddof, eps)
        assert A.shape == (2, G) and (A == 0).all()


@given(seed=seeds, G=sizes, clamp=st.floats(0.1, 6))
@example(seed=0, G=26, clamp=5.0)
def test_the_clamp(seed, G, clamp):
    """E2: |A| <= (G-1)/sqrt(G) with ddof 1, sqrt(G-1) with ddof 0: a clamp above cannot act.

    At 5 it cannot for G <= 26. Both sides are cut.
    """
    rewards, lone = normal(seed, 3, G), torch.eye(G, dtype=torch.float64)[0]
    for ddof, limit in ((1, (G - 1) / math.sqrt(G)), (0, math.sqrt(G - 1))):
        free = pg.group_advantages(rewards, ddof, clamp=None)
        assert free.abs().max() <= limit * (1 + 100 * EPS)
        clamped = pg.group_advantages(rewards, ddof, clamp=clamp)
        assert torch.equal(clamped, free.clamp(-clamp, clamp))
        # One winner attains the bound, and so does one loser.
        assert abs(pg.group_advantages(lone, ddof, 0.0, None).max().item() - limit) <= 100 * EPS
        assert abs(pg.group_advantages(-lone, ddof, 0.0, None).min().item() + limit) <= 100 * EPS
    assert ((G - 1) / math.sqrt(G) < 5) == (G <= 26)


@given(seed=seeds, G=sizes, shift=st.floats(-8, 8), scale=st.floats(0.1, 10))
def test_invariances(seed, G, shift, scale):
    """Advantages follow a permutation, sum to zero, and at eps = 0 ignore a shift and a scale."""
    rewards = normal(seed, 2, G)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    A = pg.group_advantages(rewards, eps=0.0)
    # G + 10 roundings of numbers below 20, over the std twice (A's own derivative is over it too).
    spread = rewards.std(-1).min().item()
    bound = (G + 10) * EPS * 20 / spread * 20 / min(spread, spread * scale)
    assert (pg.group_advantages(rewards[:, order], eps=0.0) - A[:, order]).abs().max() <= bound
    assert (pg.group_advantages(rewards + shift, eps=0.0) - A).abs().max() <= bound
    assert (pg.group_advantages(rewards * scale, eps=0.0) - A).abs().max() <= bound
    assert A.sum(-1).abs().max() <= bound * G


def test_groups_do_not_leak():
    """Each (prompt, step) is its own group: another's rewards change nothing, silent or not."""
    rewards = normal(0, 2, 3, 5)
    changed = rewards.clone()
    changed[1, 2] = 100 * normal(1, 5)
    silent = rewards.clone()
    silent[1, 2] = 0.1
    A = pg.group_advantages(rewards)
    for others in (pg.group_advantages(changed), pg.group_advantages(silent)):
        assert torch.equal(A[0], others[0]) and torch.equal(A[1, :2], others[1, :2])
        assert (A[1, 2] != others[1, 2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_narrow_rewards_are_widened(dtype):
    """Rewards of a narrow type are normalised in float32, as if they had been given in it."""
    rewards = torch.tensor([[1, 2, 4, 7]], dtype=dtype)
    assert pg.group_advantages(rewards).dtype == torch.float32
    assert torch.equal(pg.group_advantages(rewards), pg.group_advantages(rewards.float()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(bad):
    """One broken reward would poison its whole group, so it is refused and counted."""
    with pytest.raises(ValueError, match=r"^rewards: 1 of 6 are not finite$"):
        pg.group_advantages(torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]))


BAD_ARGUMENTS = [
    (1, {}),
    (0, {}),
    (3, {"ddof": 2}),
    (3, {"eps": -1.0}),
    (3, {"clamp": 0.0}),
    (3, {"clamp": -5.0}),
    (3, {"eps": math.nan}),
    (3, {"clamp": math.nan}),
]


@pytest.mark.parametrize("G, arguments", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(G, arguments):
    """A group of one has no spread to compare with; ddof, eps and clamp have their ranges."""
    with pytest.raises(ValueError, match=rf"^group of {G}, ddof=.*: must be 2 or more"):
        pg.group_advantages(torch.zeros(2, G), **arguments)
