"""Both rollout modes: against a loop of one row at a time, against closed-form Gaussian laws, and their accounting."""

import math
from itertools import pairwise

import pytest
import torch
from slow import (
    EPS,
    MODES,
    Constant,
    Counting,
    GaussianFlow,
    Net,
    column,
    each_kernel,
    each_mode,
    gaussian_law,
    generators,
    kernels,
    modes,
    normal,
    roll,
    seeds,
    slow_rollout,
    some_advantages,
)
from hypothesis import example, given
from hypothesis import strategies as st

import pave_grpo as pg

FLOW = GaussianFlow(
    [[1.0, -0.5, 0.2], [-2.0, 0.3, 1.0]], [0.5, 2.0, 0.1]
)  # two prompts, three dimensions
step_sets = st.sets(st.integers(0, 3), min_size=1).map(
    sorted
)  # of T = 5 steps, the last one excluded for cps


# ---- Against the plain loop ----------------------------------------------------------------------------------

# A step is some 30 roundings of numbers below 16, and each of five steps amplifies an error at most threefold
# (flow_sde's first: 1 - eta^2/2 + D |slope|): 30 * 16 * 3^5 * EPS = 2.6e-11.
LOOP = 30 * 16 * 3**5 * EPS


@given(
    seed=seeds, kernel=kernels, eta=st.floats(0.2, 1.0), steps=step_sets, own_start=st.booleans()
)
@example(seed=0, kernel="flow_sde", eta=0.7, steps=[0, 1, 2, 3, 4], own_start=True)
def test_independent_is_the_plain_loop(seed, kernel, eta, steps, own_start):
    """An independent member is its own chain of SDE and ODE steps, in a batch as when run alone."""
    process, P, G = pg.Process(pg.schedule(5, 2.0), kernel, eta), 2, 3
    noise = pg.draw_noise(generators(seed, P), G, (3,), len(steps), own_start, torch.float64)
    rollout = pg.rollout_independent(FLOW, process, noise, steps)
    assert (
        rollout.sde_steps == tuple(steps)
        and rollout.x_0.shape == (P, 1, G, 3)
        and rollout.anchor_x_0 is None
    )
    for p in range(P):
        for g in range(G):
            own = {i: noise.steps[p, j, g][None] for j, i in enumerate(steps)}
            start = noise.start[p, g if own_start else 0][None]
            with torch.no_grad():
                x_0, observed = slow_rollout(FLOW, process, start, own, steps, torch.tensor([p]))
            assert (rollout.x_0[p, 0, g] - x_0[0]).abs().max() <= LOOP
            for j, i in enumerate(steps):
                assert (rollout.x_t[p, j, g] - observed[i][0][0]).abs().max() <= LOOP
                assert (rollout.x_s[p, j, g] - observed[i][1][0]).abs().max() <= LOOP


@given(seed=seeds, kernel=kernels, eta=st.floats(0.2, 1.0), steps=step_sets, finish=st.booleans())
@example(seed=0, kernel="dance", eta=0.7, steps=[0, 4], finish=False)
@example(seed=0, kernel="cps", eta=1.0, steps=[3], finish=True)
def test_shared_anchor_is_the_plain_loop(seed, kernel, eta, steps, finish):
    """G members leave the prompt's ODE trajectory at each chosen step by one SDE step and finish by ODE."""
    process, P, G = pg.Process(pg.schedule(5, 2.0), kernel, eta), 2, 3
    noise = pg.draw_noise(generators(seed, P), G, (3,), len(steps), dtype=torch.float64)
    rollout = pg.rollout_shared_anchor(FLOW, process, noise, steps, finish_anchor=finish)
    assert rollout.sde_steps == tuple(steps) and rollout.x_t.shape == (P, len(steps), 1, 3)
    for p in range(P):
        for j, i in enumerate(steps):
            for g in range(G):
                with torch.no_grad():
                    c, own = torch.tensor([p]), {i: noise.steps[p, j, g][None]}
                    x_0, observed = slow_rollout(FLOW, process, noise.start[p], own, [i], c)
                assert (rollout.x_t[p, j] - observed[i][0]).abs().max() <= LOOP
                assert (rollout.x_s[p, j, g] - observed[i][1][0]).abs().max() <= LOOP
                assert (rollout.x_0[p, j, g] - x_0[0]).abs().max() <= LOOP
        if finish:
            with torch.no_grad():
                x_0, _ = slow_rollout(FLOW, process, noise.start[p], {}, [], torch.tensor([p]))
            assert (rollout.anchor_x_0[p] - x_0[0]).abs().max() <= LOOP
    assert finish or rollout.anchor_x_0 is None


def test_ode_sample_is_the_plain_loop():
    """Ode_sample is Euler along the grid, row b under condition b, and gives the finished anchor bitwise."""
    process, x = pg.Process(pg.schedule(5, 2.0)), normal(0, 2, 3)
    with torch.no_grad():
        loop = [
            slow_rollout(FLOW, process, x[p : p + 1], {}, [], torch.tensor([p]))[0]
            for p in range(2)
        ]
    assert (pg.ode_sample(FLOW, process.grid, x) - torch.cat(loop)).abs().max() <= LOOP
    rollout = roll("shared_anchor", FLOW, process, finish_anchor=True)
    start = torch.stack(
        [torch.randn(3, generator=g, dtype=torch.float64) for g in generators(0, 2)]
    )
    assert torch.equal(rollout.anchor_x_0, pg.ode_sample(FLOW, process.grid, start))


# ---- What is remembered of the sampling ----------------------------------------------------------------------


@given(seed=seeds, kernel=kernels, mode=modes, steps=step_sets, half=st.booleans())
def test_the_first_pass_recomputes_the_sampling_bitwise(seed, kernel, mode, steps, half):
    """Log p_old stored while sampling is `==` the one the update computes, for an elementwise velocity."""
    process = pg.Process(pg.schedule(5, 3.0), kernel)
    rollout = roll(
        mode, FLOW, process, steps=steps, seed=seed, dtype=torch.float32 if half else torch.float64
    )
    result = pg.policy_loss(FLOW, rollout, some_advantages(rollout), reduction="sum")
    assert torch.equal(result.old.log_probs[1], rollout.log_prob) and result.old.sampling_gap == 0.0
    # "mean" stores the sum and divides it again: d m / d differs from m by at most two roundings.
    averaged = pg.policy_loss(FLOW, rollout, some_advantages(rollout)).old
    assert averaged.sampling_gap <= 2 * EPS * averaged.log_probs[1].abs().max().item()


@each_mode
@each_kernel
def test_the_sampling_gap_of_a_network_is_float32_rounding(kernel, mode):
    """With a float32 network the gap is what other batch sizes' matmul rounding allows, and no more."""
    net, process = Net(3, width=32, dtype=torch.float32), pg.Process(pg.schedule(5, 3.0), kernel)
    rollout = roll(mode, net, process, G=7, steps=[0, 2], dtype=torch.float32)
    u = 2.0**-24
    # Forward error of two evaluations: a dot product of n terms is off by n u |w||x| either way, tanh is 1-Lipschitz
    # and itself off by some 4u; |x| <= 5 for inputs, |tanh| <= 1.
    w1, w2 = (w.detach().double().abs() for w in (net.w1, net.w2))
    first = 2 * 6 * u * 5 * w1.sum(0)
    v_error = ((first + 8 * u) @ w2 + 2 * 33 * u * w2.sum(0)).max().item()
    assert rollout.x_t.abs().max() <= 5
    gap = pg.policy_loss(net, rollout, some_advantages(rollout), factors=(2,)).old.sampling_gap
    # d(z^2/2) = |z| dz with |z| <= 5 and dz = (|b| v_error + rounding of the mean, 4 u 10) / c.
    i = torch.tensor(rollout.sde_steps)
    _, b, c = process.coefficients(process.grid[i], process.grid[i + 1])
    assert gap <= (5 * (b.abs() * v_error + 40 * u) / c).max().item()


@each_mode
def test_rollouts_carry_no_gradient(mode):
    """A rollout is made under theta_old, so nothing in it requires grad."""
    rollout = roll(mode, FLOW, pg.Process(pg.schedule(3)))
    assert not any(
        f.requires_grad for f in (rollout.x_t, rollout.x_s, rollout.log_prob, rollout.x_0)
    )
    assert not pg.ode_sample(FLOW, pg.schedule(2), normal(0, 2, 3)).requires_grad


@each_mode
@each_kernel
def test_e1_rollouts_do_not_know_the_decomposition(kernel, mode):
    """E1: rollouts, rewards and advantages are bitwise the same whatever S and form the updates between them use."""
    process, net = pg.Process(pg.schedule(4), kernel), Net(0)
    first = roll(mode, net, process)
    kept = [f.clone() for f in (first.x_t, first.x_s, first.log_prob, first.x_0)]
    A = pg.group_advantages(first.x_0.sum(-1))
    for factors, form in (((), "paper"), ((2, 3), "paper"), ((5,), "matched")):
        pg.policy_loss(net, first, A, factors=factors, form=form).loss.backward()
        again = roll(mode, net, process)
        assert all(map(torch.equal, (first.x_t, first.x_s, first.log_prob, first.x_0), kept))
        assert all(map(torch.equal, (again.x_t, again.x_s, again.log_prob, again.x_0), kept))
        assert torch.equal(pg.group_advantages(again.x_0.sum(-1)), A)


# ---- Against the closed-form law -----------------------------------------------------------------------------

# 15 cases of 2 means and 2 variances: 60 z-scores. |z| <= 6 has a false-alarm rate of 60 * 2e-9 = 1.2e-7 in all, and
# seeds are fixed. With N = 100,000 it detects a mean off by 1.9% of a standard deviation, a variance off by 2.7%.
N, Z = 100_000, 6.0


def check_law(x, mean, var):
    z_mean = (x.mean(0) - mean) / (var / N).sqrt()
    z_var = (x.var(0) / var - 1) / math.sqrt(2 / (N - 1))
    assert z_mean.abs().max() <= Z and z_var.abs().max() <= Z, (z_mean, z_var)


@pytest.mark.parametrize("steps", [None, [1, 2]])
@each_kernel
def test_independent_samples_have_the_exact_law(kernel, steps):
    """Under a Gaussian flow x_0 is Gaussian, with the mean and variance that the affine steps propagate."""
    m, q = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0])
    process = pg.Process(pg.schedule(4, 2.0), kernel, 0.8)
    rollout = roll("independent", GaussianFlow(m[None], q), process, P=1, G=N, d=2, steps=steps)
    check_law(rollout.x_0[0, 0], *gaussian_law(process, m, q, 0 * m, 1 + 0 * q, rollout.sde_steps))


@pytest.mark.parametrize("start", ["own_start", "shared_start"])
def test_a_shared_start_conditions_the_law(start):
    """Members that share x_1 have the law given it; members with their own have the full one."""
    m, q, own = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0]), start == "own_start"
    process = pg.Process(pg.schedule(4, 2.0), "dance", 0.8)
    rollout = roll("independent", GaussianFlow(m[None], q), process, P=1, G=N, d=2, own_start=own)
    x_1 = rollout.x_t[0, 0]
    assert (len(x_1.unique(dim=0)) == N) if own else torch.equal(x_1, x_1[:1].expand(N, 2))
    law = gaussian_law(process, m, q, 0 * m if own else x_1[0], q * 0 + own, rollout.sde_steps)
    check_law(rollout.x_0[0, 0], *law)


@each_kernel
def test_shared_anchor_branches_have_the_exact_law(kernel):
    """Given x_1, a branch at step i is Gaussian: an ODE shift, one SDE step's variance, and ODE gains."""
    m, q = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0])
    process = pg.Process(pg.schedule(4, 2.0), kernel, 0.8)
    rollout = roll("shared_anchor", GaussianFlow(m[None], q), process, P=1, G=N, d=2, steps=[0, 2])
    for j, i in enumerate((0, 2)):
        check_law(
            rollout.x_0[0, j],
            *gaussian_law(process, m, q, rollout.x_t[0, 0, 0].double(), 0 * q, [i]),
        )
    noises = (rollout.x_s - rollout.x_s.mean(2, keepdim=True)) / rollout.x_s.std(2, keepdim=True)
    assert abs((noises[0, 0] * noises[0, 1]).mean().item()) <= Z / math.sqrt(
        2 * N
    )  # steps draw their own noise


def variance_error(kernel, T, start, q=0.3, eta=0.7):
    """var x_0 minus its limit after T steps from the exact marginal at t = start, by the code's own transitions."""
    process = pg.Process(pg.schedule(T) * start, kernel, eta)
    t, s = process.grid[:-1], process.grid[1:]
    slope = (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2)
    p = process.transition(torch.ones(T, 1, dtype=torch.float64), slope[:, None], t, s)
    var = (1 - start) ** 2 * q + start**2
    for gain, std in zip(p.mean.flatten().tolist(), p.std.tolist(), strict=True):
        var = gain**2 * var + std**2
    return var - (q * (1 + math.cos(eta * math.pi / 2)) / 2 if kernel == "cps" else q)


@pytest.mark.parametrize("kernel, order", [("flow_sde", 1), ("dance", 1), ("cps", 2 / 3)])
def test_e11_limit_of_many_steps(kernel, order):
    """E11: as T grows flow_sde and dance reach the data's variance q, at order 1, and cps only q (1 + cos h)/2."""
    errors = [abs(variance_error(kernel, T, start=0.9)) for T in (256, 1024, 4096)]
    slopes = [math.log(a / b, 4) for a, b in pairwise(errors)]
    assert all(abs(slope - order) <= 0.05 for slope in slopes), slopes
    assert errors[-1] <= 1e-3 and abs(variance_error(kernel, 16384, start=1.0)) <= 1e-3


@each_kernel
def test_e11_one_step_from_the_exact_marginal(kernel):
    """E11: with data at the origin one step has variance s^2 under cps, s^2 + g^2 D^2/t + g^4 D^2/(4t^2) otherwise."""
    t, s, eta = 0.7, 0.4, 0.7
    p = pg.Process([t, s], kernel, eta).transition(
        torch.ones(1, 1, dtype=torch.float64),
        torch.full((1, 1), 1 / t, dtype=torch.float64),
        torch.tensor([t], dtype=torch.float64),
        torch.tensor([s], dtype=torch.float64),
    )
    g2 = eta**2 * (t / (1 - t) if kernel == "flow_sde" else 1)
    excess = 0 if kernel == "cps" else g2 * (t - s) ** 2 / t + g2**2 * (t - s) ** 2 / (4 * t**2)
    assert (
        abs((p.mean * t).item() ** 2 + p.std.item() ** 2 - s**2 - excess) <= 30 * EPS
    )  # 30 roundings below 1


# ---- Accounting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, finish", [([0, 2, 4], False), ([0, 2, 4], True), ([3], False), ([5], False)]
)
def test_shared_anchor_cost(steps, finish):
    """A prompt costs G sum_i (T-1-i) for branches plus max_i + 1 (T if finished), one call per time."""
    process, P, G, T = pg.Process(pg.schedule(6, 3.0)), 2, 4, 6
    velocity = Counting(FLOW)
    roll("shared_anchor", velocity, process, P, G, steps=steps, finish_anchor=finish)
    rows = P * (G * sum(T - 1 - i for i in steps) + (T if finish else max(steps) + 1))
    assert velocity.rows == rows
    assert (
        all(bool((t == process.grid[i]).all()) for i, t in enumerate(velocity.t))
        and len(velocity.t) == T
    )


def test_independent_cost():
    """P G trajectories of T steps are P G T evaluations in T calls, each at one time of the grid."""
    process, velocity = pg.Process(pg.schedule(6, 3.0)), Counting(FLOW)
    roll("independent", velocity, process, P=2, G=4, steps=[1, 3])
    assert velocity.rows == 2 * 4 * 6
    assert (
        all(bool((t == process.grid[i]).all()) for i, t in enumerate(velocity.t))
        and len(velocity.t) == 6
    )


@given(seed=seeds, kernel=kernels, mode=modes, P=st.integers(2, 4))
def test_a_batch_of_prompts_is_each_prompt_alone(seed, kernel, mode, P):
    """A prompt's rollout knows its own noise and condition alone: bitwise the same in a batch."""
    process = pg.Process(pg.schedule(4, 2.0), kernel)
    flow = GaussianFlow(normal(seed, P, 3), [0.5, 2.0, 0.1])
    together = roll(mode, flow, process, P, seed=seed, steps=[0, 2])
    for p in range(P):
        alone = roll(
            mode, lambda x, t, c, p=p: flow(x, t, c + p), process, 1, seed=seed + p, steps=[0, 2]
        )
        for name in ("x_t", "x_s", "log_prob", "x_0"):
            assert torch.equal(getattr(together, name)[p], getattr(alone, name)[0]), name


@each_mode
def test_conditions_reach_their_rows(mode):
    """V = c moves prompt c by exactly -c in all, on every path from t = 1 to 0, however stochastic."""
    process, calm = (
        pg.Process(pg.schedule(4), "dance", 1e-12),
        lambda x, t, c: column(c, x).expand_as(x),
    )
    rollout = roll(mode, calm, process, P=3, G=2)
    start = rollout.x_t[:, :1, :, :]
    # dance with eta = 1e-12: noise below 4 eta T, drift eta^2; the rest is rounding of numbers below 8.
    assert (
        rollout.x_0 - (start - torch.arange(3.0)[:, None, None, None])
    ).abs().max() <= 16e-12 + 40 * EPS
    assert (
        rollout.x_t[:, 1] - rollout.x_t[:, 0] + torch.arange(3.0)[:, None, None] / 4
    ).abs().max() <= 2e-11


# ---- Noise and dtype -----------------------------------------------------------------------------------------


def test_noise_comes_from_the_generators_alone():
    """E1 needs given noise: the global generator is neither read nor moved, and equal seeds give equal rollouts."""
    process, rollouts = pg.Process(pg.schedule(4)), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        rollouts += [roll(mode, FLOW, process, seed=5) for mode in MODES]
        pg.ode_sample(FLOW, process.grid, normal(0, 2, 3))
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a.x_0, b.x_0) for a, b in zip(rollouts[:2], rollouts[2:], strict=True))
    assert not torch.equal(rollouts[0].x_0, roll("independent", FLOW, process, seed=6).x_0)


def test_a_prompts_noise_is_its_own():
    """Noise is drawn start first, prompt by prompt: other prompts do not change it, and no two rows agree."""
    noise = pg.draw_noise(generators(0, 3), 4, (2, 2), 5, own_start=True)
    alone = pg.draw_noise(generators(2, 1), 4, (2, 2), 5, own_start=True)
    assert noise.start.shape == (3, 4, 2, 2) and noise.steps.shape == (3, 5, 4, 2, 2)
    assert torch.equal(noise.start[2], alone.start[0]) and torch.equal(
        noise.steps[2], alone.steps[0]
    )
    assert torch.equal(noise.start[2], torch.randn(4, 2, 2, generator=generators(2, 1)[0]))
    everything = torch.cat([noise.start.flatten(0, 1), noise.steps.flatten(0, 2)])
    assert len(everything.flatten(1).unique(dim=0)) == len(everything) == 3 * 4 + 3 * 5 * 4
    assert pg.draw_noise(generators(0, 3), 4, (2, 2), 5).start.shape == (3, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_mode
def test_the_states_have_the_dtype_of_the_noise(mode, dtype):
    """Float64 noise gives a float64 trajectory and float32 a float32 one; log-densities are float64."""
    rollout = roll(mode, FLOW, pg.Process(pg.schedule(3)), dtype=dtype)
    assert rollout.x_t.dtype == rollout.x_s.dtype == rollout.x_0.dtype == dtype
    assert rollout.log_prob.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_mode
def test_the_model_may_compute_in_another_dtype(mode, dtype):
    """Whatever a model returns, float32 states stay float32, bitwise those of its velocity in float32."""
    seen = []

    def model(x, t, c):
        seen.append((x.dtype, t.dtype))
        return FLOW(x, t, c).to(dtype)

    cast = lambda x, t, c: FLOW(x, t, c).to(dtype).float()
    process = pg.Process(pg.schedule(4))
    ours, same = (roll(mode, v, process, dtype=torch.float32) for v in (model, cast))
    assert ours.x_0.dtype == ours.x_s.dtype == torch.float32 and set(seen) == {
        (torch.float32, torch.float32)
    }
    assert torch.equal(ours.x_0, same.x_0) and torch.equal(ours.x_s, same.x_s)
    assert not torch.equal(ours.x_0, ours.x_0.bfloat16().float())
    assert (
        pg.ode_sample(model, process.grid, normal(0, 2, 3, dtype=torch.float32)).dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    "noise_steps, start_rows, mode",
    [
        (3, 1, "independent"),
        (1, 1, "shared_anchor"),
        (2, 3, "independent"),
        (2, 4, "shared_anchor"),
    ],
)
def test_noise_that_does_not_fit_is_refused(noise_steps, start_rows, mode):
    """Noise has one draw per stochastic step and one start per group, or one per independent member."""
    noise = pg.Noise(torch.zeros(2, start_rows, 3), torch.zeros(2, noise_steps, 4, 3))
    sampler = pg.rollout_independent if mode == "independent" else pg.rollout_shared_anchor
    with pytest.raises(
        ValueError, match=r"^noise with start .* for 2 stochastic steps, need start .*$"
    ):
        sampler(FLOW, pg.Process(pg.schedule(4)), noise, [0, 2])


@each_mode
def test_noise_of_another_event_is_refused(mode):
    """The noise of a step is N(0, I) of the state's own shape: one draw broadcast over dimensions is not."""
    noise = pg.Noise(torch.zeros(2, 1, 3), torch.zeros(2, 2, 4, 1))
    sampler = pg.rollout_independent if mode == "independent" else pg.rollout_shared_anchor
    with pytest.raises(ValueError, match=r"^noise with start"):
        sampler(Constant(torch.zeros(3)), pg.Process(pg.schedule(4)), noise, [0, 2])


@pytest.mark.parametrize("G, n", [(1, 2), (0, 2), (4, 0)])
def test_draw_noise_refuses(G, n):
    """A group has two members or more and a rollout one stochastic step or more."""
    with pytest.raises(ValueError, match=r"group_size=.*must be .*two or more members"):
        pg.draw_noise(generators(0, 1), G, (3,), n)
