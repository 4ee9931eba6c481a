"""Both rollout modes: against one row at a time, against closed-form laws, and their accounting."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from slow import (
    EPS,
    SAMPLERS,
    Counting,
    GaussianFlow,
    asking,
    each_kernel,
    each_mode,
    generators,
    kernels,
    modes,
    network,
    normal,
    of_prompts,
    roll,
    seeds,
    slow_finish,
    slow_rollout,
    some_advantages,
    times,
)

import pave_grpo as pg
from zoo.oracle import theory
from zoo.oracle.fields import gaussian_law

FLOW = GaussianFlow([[1.0, -0.5, 0.2], [-2.0, 0.3, 1.0]], [0.5, 2.0, 0.1])  # two prompts
step_sets = st.sets(st.integers(0, 3), min_size=1).map(sorted)  # of T = 5; cps has no last one
mid_etas = st.floats(0.2, 1.0)


def states(rollout):
    """What a rollout holds of its members."""
    return rollout.x_t, rollout.x_s, rollout.log_prob, rollout.x_0


def assert_same(a, b):
    """Two rollouts agree bit for bit."""
    for ours, theirs in zip(states(a), states(b), strict=True):
        assert torch.equal(ours, theirs)


# ---- Against the slow loop -----------------------------------------------------------------------

# A step is some 30 roundings of numbers below 16, and each of five steps amplifies an error at
# most threefold (flow_sde's first: 1 - eta^2/2 + D |slope|): 30 * 16 * 3^5 * EPS = 2.6e-11.
LOOP = 30 * 16 * 3**5 * EPS


@given(seed=seeds, kernel=kernels, eta=mid_etas, steps=step_sets, own_start=st.booleans())
@example(seed=0, kernel="flow_sde", eta=0.7, steps=[0, 1, 2, 3, 4], own_start=True)
def test_independent_is_the_slow_loop(seed, kernel, eta, steps, own_start):
    """An independent member is its own chain of SDE and ODE steps, in a batch as when alone."""
    process, P, G = pg.Process(pg.schedule(5, 2.0), kernel, eta), 2, 3
    noise = pg.draw_noise(generators(seed, P), G, (3,), len(steps), own_start, torch.float64)
    rollout = pg.rollout_independent(FLOW, process, noise, steps)
    assert rollout.sde_steps == tuple(steps) and rollout.x_0.shape == (P, 1, G, 3)
    for p in range(P):
        for g in range(G):
            z = {i: noise.z[p, j, g][None] for j, i in enumerate(steps)}
            x_1 = noise.x_1[p, g if own_start else 0][None]
            x_0, observed = slow_rollout(FLOW, process, x_1, z, torch.tensor([p]))
            assert (rollout.x_0[p, 0, g] - x_0).abs().max() <= LOOP
            for j, i in enumerate(steps):
                x_t, x_s = observed[i]
                assert (rollout.x_t[p, j, g] - x_t).abs().max() <= LOOP
                assert (rollout.x_s[p, j, g] - x_s).abs().max() <= LOOP


@given(seed=seeds, kernel=kernels, eta=mid_etas, steps=step_sets)
@example(seed=0, kernel="dance", eta=0.7, steps=[0, 4])
@example(seed=0, kernel="cps", eta=1.0, steps=[3])
def test_shared_anchor_is_the_slow_loop(seed, kernel, eta, steps):
    """G members leave the prompt's ODE trajectory by one SDE step each, and finish by ODE."""
    process, P, G = pg.Process(pg.schedule(5, 2.0), kernel, eta), 2, 3
    noise = pg.draw_noise(generators(seed, P), G, (3,), len(steps), dtype=torch.float64)
    rollout = pg.rollout_shared_anchor(FLOW, process, noise, steps)
    assert rollout.sde_steps == tuple(steps) and rollout.x_t.shape == (P, len(steps), 1, 3)
    for p in range(P):
        for j, i in enumerate(steps):
            for g in range(G):
                z = {i: noise.z[p, j, g][None]}
                x_0, observed = slow_rollout(FLOW, process, noise.x_1[p], z, torch.tensor([p]))
                x_t, x_s = observed[i]
                assert (rollout.x_t[p, j] - x_t).abs().max() <= LOOP
                assert (rollout.x_s[p, j, g] - x_s).abs().max() <= LOOP
                assert (rollout.x_0[p, j, g] - x_0).abs().max() <= LOOP


strides = st.integers(1, 6)
orders = st.sampled_from((1, 2))


@given(seed=seeds, mode=modes, steps=step_sets, stride=strides, order=orders)
@example(seed=0, mode="independent", steps=[1], stride=2, order=2)  # a short step, a long one
@example(seed=0, mode="shared_anchor", steps=[0, 4], stride=3, order=2)
def test_the_way_to_the_picture_is_the_slow_one(seed, mode, steps, stride, order):
    """After the last noise ODE steps of any stride and order; nothing before it is another."""
    process, P, G = pg.Process(pg.schedule(5, 2.0)), 2, 3
    noise = pg.draw_noise(generators(seed, P), G, (3,), len(steps), dtype=torch.float64)
    plain = SAMPLERS[mode](FLOW, process, noise, steps)
    rollout = SAMPLERS[mode](FLOW, process, noise, steps, stride, order)
    for name in ("x_t", "x_s", "v", "log_prob"):
        assert torch.equal(getattr(rollout, name), getattr(plain, name))
    last = range(len(steps)) if mode == "shared_anchor" else [len(steps) - 1]
    for p, (row, j), g in product(range(P), enumerate(last), range(G)):
        x_s, prompt = rollout.x_s[p, j, g][None], torch.tensor([p])
        x_0 = slow_finish(FLOW, process, x_s, steps[j] + 1, stride, order, prompt)
        assert (rollout.x_0[p, row, g] - x_0).abs().max() <= LOOP


@pytest.mark.parametrize("order", (1, 2))
def test_the_order_of_the_way_to_the_picture(order):
    """Halving the steps of a curved flow divides what is left to the fine solution by 2^order."""

    def x_0(T):
        process = pg.Process(torch.cat([torch.ones(1), pg.schedule(T, 3.0) * 0.9]))
        noise = pg.Noise(normal(0, 1, 1, 3), normal(1, 1, 1, 2, 3))
        return pg.rollout_shared_anchor(FLOW, process, noise, [0], order=order).x_0

    fine = x_0(4096)
    far, near = ((x_0(T) - fine).norm().item() for T in (64, 128))
    assert order - 0.15 < math.log2(far / near) < order + 0.15


def test_ode_sample_is_the_slow_loop():
    """ode_sample is Euler along the grid, row b asking prompt b; the anchor takes the same steps.

    An anchor that branches at step i stands, bitwise, where ode_sample on the grid up to t_i ends.
    """
    grid = pg.schedule(5, 2.0)
    process, x_1 = pg.Process(grid), normal(0, 2, 3)
    x_0 = pg.ode_sample(FLOW, grid, x_1)
    for p in range(2):
        alone, _ = slow_rollout(FLOW, process, x_1[p][None], {}, torch.tensor([p]))
        assert (x_0[p] - alone).abs().max() <= LOOP
    noise = pg.Noise(x_1[:, None], normal(1, 2, 1, 4, 3))
    anchor = pg.rollout_shared_anchor(FLOW, process, noise, [4]).x_t[:, 0, 0]
    assert torch.equal(anchor, pg.ode_sample(FLOW, grid[:5], x_1))


# ---- What is remembered of the sampling ----------------------------------------------------------


@given(seed=seeds, kernel=kernels, mode=modes, steps=step_sets, half=st.booleans())
def test_the_first_pass_recomputes_the_sampling_bitwise(seed, kernel, mode, steps, half):
    """log p_old stored while sampling is `==` the update's, for an elementwise velocity."""
    process = pg.Process(pg.schedule(5, 3.0), kernel)
    dtype = torch.float32 if half else torch.float64
    rollout = roll(mode, FLOW, process, steps=steps, seed=seed, dtype=dtype)
    A = some_advantages(rollout)
    old = pg.policy_loss(FLOW, rollout, A, reduction="sum").old
    assert torch.equal(old.log_probs[1], rollout.log_prob) and old.sampling_gap == 0.0
    # "mean" stores the sum and divides it again: d m / d differs from m by at most two roundings.
    averaged = pg.policy_loss(FLOW, rollout, A).old
    assert averaged.sampling_gap <= 2 * EPS * averaged.log_probs[1].abs().max().item()


@each_mode
@each_kernel
def test_the_sampling_gap_of_a_network_is_float32_rounding(kernel, mode):
    """With a float32 network the gap is what other batch sizes' rounding allows, and no more."""
    net, process = network(3, dtype=torch.float32), pg.Process(pg.schedule(5, 3.0), kernel)
    rollout = roll(mode, net, process, G=7, steps=[0, 2], dtype=torch.float32)
    assert rollout.x_t.abs().max() <= 5
    # Forward error of two evaluations: a dot product of n terms is off by n u |w||x| either way,
    # tanh is 1-Lipschitz and itself off by some 4u; |x| <= 5 for inputs, |tanh| <= 1.
    u = 2.0**-24
    w1, w2 = net.w1.detach().double().abs(), net.w2.detach().double().abs()
    hidden = 2 * 6 * u * 5 * w1.sum(0) + 8 * u
    v_error = (hidden @ w2 + 2 * 17 * u * w2.sum(0)).max().item()
    # d(z^2/2) = |z| dz with |z| <= 5 and dz = (|b| v_error + rounding of the mean, 4 u 10) / c.
    i = torch.tensor(rollout.sde_steps)
    _, b, c = process.coefficients(process.grid[i], process.grid[i + 1])
    gap = pg.policy_loss(net, rollout, some_advantages(rollout), factors=(2,)).old.sampling_gap
    assert gap <= (5 * (b.abs() * v_error + 40 * u) / c).max().item()


@each_mode
def test_rollouts_carry_no_gradient(mode):
    """A rollout is made under theta_old, so nothing in it requires grad."""
    rollout = roll(mode, FLOW, pg.Process(pg.schedule(3)))
    for state in states(rollout):
        assert not state.requires_grad
    assert not pg.ode_sample(FLOW, pg.schedule(2), normal(0, 2, 3)).requires_grad


@each_mode
@each_kernel
def test_e1_rollouts_do_not_know_the_decomposition(kernel, mode):
    """E1: rollouts and advantages are bitwise the same whatever S and form updates between use."""
    process, net = pg.Process(pg.schedule(4), kernel), network()
    first = roll(mode, net, process)
    kept = first._replace(
        x_t=first.x_t.clone(),
        x_s=first.x_s.clone(),
        log_prob=first.log_prob.clone(),
        x_0=first.x_0.clone(),
    )
    A = pg.group_advantages(first.x_0.sum(-1))
    for factors, form in (((), "paper"), ((2, 3), "paper"), ((5,), "matched")):
        pg.policy_loss(net, first, A, factors=factors, form=form).loss.backward()
        again = roll(mode, net, process)
        assert_same(first, kept)
        assert_same(again, kept)
        assert torch.equal(pg.group_advantages(again.x_0.sum(-1)), A)


# ---- Against the closed-form law -----------------------------------------------------------------

# 13 cases of 2 means and 2 variances are 52 z-scores. |z| <= 6 has a false-alarm rate of
# 52 * 2e-9 = 1.0e-7 in all, and seeds are fixed. N = 100,000 detects a mean off by 1.9% of a
# standard deviation and a variance off by 2.7%.
N, Z = 100_000, 6.0
MEAN, VAR = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0])  # of the data
SPREAD = GaussianFlow(MEAN[None], VAR)


def check_law(x, mean, var):
    """The members x [N, 2] have this mean and variance."""
    z_mean = (x.mean(0) - mean) / (var / N).sqrt()
    z_var = (x.var(0) / var - 1) / math.sqrt(2 / (N - 1))
    assert z_mean.abs().max() <= Z and z_var.abs().max() <= Z, (z_mean, z_var)


@pytest.mark.parametrize("steps", [None, [1, 2]])
@each_kernel
def test_independent_samples_have_the_exact_law(kernel, steps):
    """Under a Gaussian flow x_0 has the mean and variance that the affine steps propagate."""
    process = pg.Process(pg.schedule(4, 2.0), kernel, 0.8)
    rollout = roll("independent", SPREAD, process, P=1, G=N, d=2, steps=steps)
    x_1 = rollout.x_t[0, 0]
    assert steps or len(x_1.unique(dim=0)) == N  # every member has its own start
    law = gaussian_law(process, MEAN, VAR, 0 * MEAN, 1 + 0 * VAR, rollout.sde_steps)
    check_law(rollout.x_0[0, 0], *law)


def test_a_shared_start_conditions_the_law():
    """Members that share x_1 have the law given it."""
    process = pg.Process(pg.schedule(4, 2.0), "dance", 0.8)
    noise = pg.draw_noise(generators(0, 1), N, (2,), 4, dtype=torch.float64)
    rollout = pg.rollout_independent(SPREAD, process, noise)
    x_1 = rollout.x_t[0, 0]
    assert torch.equal(x_1, noise.x_1[0].expand(N, 2))
    law = gaussian_law(process, MEAN, VAR, x_1[0], 0 * VAR, rollout.sde_steps)
    check_law(rollout.x_0[0, 0], *law)


@each_kernel
def test_shared_anchor_branches_have_the_exact_law(kernel):
    """Given x_1, a branch is Gaussian: an ODE shift, one SDE step's variance, and ODE gains."""
    process = pg.Process(pg.schedule(4, 2.0), kernel, 0.8)
    rollout = roll("shared_anchor", SPREAD, process, P=1, G=N, d=2, steps=[0, 2])
    x_1 = rollout.x_t[0, 0, 0]
    for j, i in enumerate((0, 2)):
        check_law(rollout.x_0[0, j], *gaussian_law(process, MEAN, VAR, x_1, 0 * VAR, [i]))
    noises = (rollout.x_s - rollout.x_s.mean(2, keepdim=True)) / rollout.x_s.std(2, keepdim=True)
    correlation = (noises[0, 0] * noises[0, 1]).mean().item()
    assert abs(correlation) <= Z / math.sqrt(2 * N)  # steps draw their own noise


def variance_error(kernel, T, start, q=0.3, eta=0.7):
    """var x_0 less its limit, after T of the code's own transitions from the exact marginal."""
    process = pg.Process(pg.schedule(T) * start, kernel, eta)
    t, s = process.grid[:-1], process.grid[1:]
    slope = (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2)
    p = process.transition(torch.ones(T, 1, dtype=torch.float64), slope[:, None], t, s)
    var = (1 - start) ** 2 * q + start**2
    for gain, std in zip(p.mean.flatten().tolist(), p.std.tolist(), strict=True):
        var = gain**2 * var + std**2
    return var - theory.of(kernel, eta).limit_variance(q)


@each_kernel
def test_e11_limit_of_many_steps(kernel):
    """E11: as T grows flow_sde and dance reach the data's variance q, cps only q (1 + cos h)/2."""
    order = theory.of(kernel, 0.7).law_order
    errors = [abs(variance_error(kernel, T, start=0.9)) for T in (256, 1024, 4096)]
    for wide, narrow in pairwise(errors):
        assert abs(math.log(wide / narrow, 4) - order) <= 0.05, errors
    assert errors[-1] <= 1e-3 and abs(variance_error(kernel, 16384, start=1.0)) <= 1e-3


@each_kernel
def test_e11_one_step_from_the_exact_marginal(kernel):
    """E11: with data at the origin one step has variance s^2 under cps, more under the others."""
    t, s, eta = 0.7, 0.4, 0.7
    x, v = times(1.0, 1)[:, None], times(1 / t, 1)[:, None]
    p = pg.Process([t, s], kernel, eta).transition(x, v, times(t, 1), times(s, 1))
    variance = (p.mean * t).item() ** 2 + p.std.item() ** 2
    # 30 roundings below 1.
    assert abs(variance - theory.of(kernel, eta).variance_after(t, s)) <= 30 * EPS


# ---- Accounting ----------------------------------------------------------------------------------


def calls_of(velocity):
    """[(t, rows)] of a rollout's calls, every row of a call at the same time."""
    assert all((t == t[0]).all() for t in velocity.t)
    return [(t[0].item(), len(t)) for t in velocity.t]


@pytest.mark.parametrize("steps", [[0, 2, 4], [3], [5]])
def test_shared_anchor_cost(steps):
    """A prompt costs G sum_i (T-1-i) rows for its branches and max_i + 1 for its anchor.

    One call for each time of the anchor, and for each time of a step's branches, of all prompts.
    """
    process, P, G, T = pg.Process(pg.schedule(6, 3.0)), 2, 4, 6
    velocity, t = Counting(FLOW), process.grid.tolist()
    roll("shared_anchor", velocity, process, P, G, steps=steps)
    assert velocity.rows == P * (G * sum(T - 1 - i for i in steps) + max(steps) + 1)
    anchor = [(t[i], P) for i in range(max(steps) + 1)]
    branches = [(t[j], P * G) for i in steps for j in range(i + 1, T)]
    assert sorted(calls_of(velocity)) == sorted(anchor + branches)


@each_mode
def test_a_shorter_way_costs_less(mode):
    """From t_2 of 8 points every third: t_2, t_4, t_7 at order 1 and 2 alike."""
    process, t = pg.Process(pg.schedule(10)), pg.schedule(10).tolist()
    for order in (1, 2):
        velocity = Counting(FLOW)
        noise = pg.draw_noise(generators(0, 2), 4, (3,), 1, dtype=torch.float64)
        SAMPLERS[mode](velocity, process, noise, [1], 3, order)
        before = 2 if mode == "shared_anchor" else 8
        assert calls_of(velocity) == [
            (t[0], before),
            (t[1], before),
            *((t[i], 8) for i in (2, 4, 7)),
        ]


def test_independent_cost():
    """P G trajectories of T steps are P G T rows, in one call per time."""
    process, velocity = pg.Process(pg.schedule(6, 3.0)), Counting(FLOW)
    roll("independent", velocity, process, P=2, G=4, steps=[1, 3])
    assert calls_of(velocity) == [(t, 2 * 4) for t in process.grid[:-1].tolist()]


@given(seed=seeds, kernel=kernels, mode=modes, P=st.integers(2, 4))
def test_a_batch_of_prompts_is_each_prompt_alone(seed, kernel, mode, P):
    """A prompt's rollout knows its own noise and index alone: bitwise the same in a batch."""
    process = pg.Process(pg.schedule(4, 2.0), kernel)
    flow = GaussianFlow(normal(seed, P, 3), [0.5, 2.0, 0.1])
    together = roll(mode, flow, process, P, seed=seed, steps=[0, 2])
    for p in range(P):
        alone = roll(mode, asking(flow, [p]), process, 1, seed=seed + p, steps=[0, 2])
        assert_same(of_prompts(together, [p]), alone)


@each_mode
def test_prompts_reach_their_rows(mode):
    """v = prompt moves prompt p by exactly -p in all, on every path, however stochastic."""

    def calm(x, t, prompt):
        return prompt.to(x)[:, None].expand_as(x)

    process, shift = pg.Process(pg.schedule(4), "dance", 1e-12), torch.arange(3.0)[:, None, None]
    rollout = roll(mode, calm, process, P=3, G=2)
    # dance with eta = 1e-12: noise below 4 eta T, drift eta^2; the rest rounds numbers below 8.
    moved = rollout.x_0 - rollout.x_t[:, :1]
    assert (moved + shift[:, None]).abs().max() <= 16e-12 + 40 * EPS
    assert (rollout.x_t[:, 1] - rollout.x_t[:, 0] + shift / 4).abs().max() <= 2e-11


# ---- Noise and dtype -----------------------------------------------------------------------------


@each_mode
def test_noise_comes_from_the_generators_alone(mode):
    """E1 needs given noise: the global generator is neither read nor moved."""
    process, rollouts = pg.Process(pg.schedule(4)), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        rollouts.append(roll(mode, FLOW, process, seed=5))
        pg.ode_sample(FLOW, process.grid, normal(0, 2, 3))
        assert torch.equal(before, torch.get_rng_state())
    assert_same(*rollouts)
    assert not torch.equal(rollouts[0].x_0, roll(mode, FLOW, process, seed=6).x_0)


def test_a_prompts_noise_is_its_own():
    """x_1 is drawn first, prompt by prompt: no prompt changes another, and no two rows agree."""
    noise = pg.draw_noise(generators(0, 3), 4, (2, 2), 5, own_start=True)
    alone = pg.draw_noise(generators(2, 1), 4, (2, 2), 5, own_start=True)
    assert noise.x_1.shape == (3, 4, 2, 2) and noise.z.shape == (3, 5, 4, 2, 2)
    assert torch.equal(noise.x_1[2], alone.x_1[0]) and torch.equal(noise.z[2], alone.z[0])
    assert torch.equal(noise.x_1[2], torch.randn(4, 2, 2, generator=generators(2, 1)[0]))
    everything = torch.cat([noise.x_1.flatten(0, 1), noise.z.flatten(0, 2)]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 3 * 4 + 3 * 5 * 4
    assert pg.draw_noise(generators(0, 3), 4, (2, 2), 5).x_1.shape == (3, 1, 2, 2)
    exact = pg.draw_noise(generators(2, 1), 4, (2, 2), 5, own_start=True, dtype=torch.float64)
    drawn = torch.randn(4, 2, 2, generator=generators(2, 1)[0], dtype=torch.float64)
    assert torch.equal(exact.x_1[0], drawn) and not torch.equal(drawn, drawn.float().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_mode
def test_the_states_have_the_dtype_of_the_noise(mode, dtype):
    """Float64 noise gives a float64 trajectory; log-densities are float64 always."""
    rollout = roll(mode, FLOW, pg.Process(pg.schedule(3)), dtype=dtype)
    assert rollout.x_t.dtype == rollout.x_s.dtype == rollout.x_0.dtype == dtype
    assert rollout.log_prob.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_mode
def test_the_model_may_compute_in_another_dtype(mode, dtype):
    """Whatever a model returns, float32 states stay float32, those of its velocity in float32."""

    def model(x, t, prompt):
        assert x.dtype == t.dtype == torch.float32
        return FLOW(x, t, prompt).to(dtype)

    def cast(x, t, prompt):
        return model(x, t, prompt).float()

    process, x_1 = pg.Process(pg.schedule(4)), normal(0, 2, 3, dtype=torch.float32)
    ours = roll(mode, model, process, dtype=torch.float32)
    assert ours.x_0.dtype == ours.x_s.dtype == torch.float32
    assert_same(ours, roll(mode, cast, process, dtype=torch.float32))
    assert not torch.equal(ours.x_0, ours.x_0.bfloat16().float())
    assert pg.ode_sample(model, process.grid, x_1).dtype == torch.float32


# Of four members in two stochastic steps: too many steps, too few, starts of neither kind, and
# one draw that would be broadcast over the dimensions of a state.
BAD_NOISE = [
    ("independent", (2, 1, 3), (2, 3, 4, 3)),
    ("shared_anchor", (2, 1, 3), (2, 1, 4, 3)),
    ("independent", (2, 3, 3), (2, 2, 4, 3)),
    ("shared_anchor", (2, 4, 3), (2, 2, 4, 3)),
    ("independent", (2, 1, 3), (2, 2, 4, 1)),
    ("shared_anchor", (2, 1, 3), (2, 2, 4, 1)),
]


@pytest.mark.parametrize("mode, x_1, z", BAD_NOISE)
def test_noise_that_does_not_fit_is_refused(mode, x_1, z):
    """Noise has one draw per stochastic step, and one start per group or per member."""
    noise = pg.Noise(torch.zeros(x_1), torch.zeros(z))
    with pytest.raises(ValueError, match=r"^noise with x_1 .* and z .*: must be .*$"):
        SAMPLERS[mode](FLOW, pg.Process(pg.schedule(4)), noise, [0, 2])


@pytest.mark.parametrize("stride, order", [(0, 1), (-1, 1), (1.0, 1), (2, 0), (2, 3)])
@each_mode
def test_a_way_that_cannot_be_is_refused(mode, stride, order):
    """Before any work: a step spans a whole number of grid steps, and is of order 1 or 2."""
    noise = pg.Noise(torch.zeros(1, 1, 3), torch.zeros(1, 1, 2, 3))
    velocity = Counting(FLOW)
    with pytest.raises(ValueError, match=r"^stride=.*, order=.*: must be an integer"):
        SAMPLERS[mode](velocity, pg.Process(pg.schedule(4)), noise, [0], stride, order)
    assert not velocity.t


@pytest.mark.parametrize("P, G, n", [(1, 1, 2), (1, 0, 2), (1, 4, 0), (0, 4, 2)])
def test_draw_noise_refuses(P, G, n):
    """There is a prompt, a group has two members or more, and a stochastic step is one or more."""
    with pytest.raises(ValueError, match=r"^\d generators, group_size=.*, n_steps=.*must be"):
        pg.draw_noise(generators(0, P), G, (3,), n)
