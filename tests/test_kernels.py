"""Schedule, kernels, Process and Transition, against derivations, figures and distributions."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from slow import EPS, each_kernel, etas, kernels, network, normal, roll, seeds, spans
from torch.distributions import Normal

import pave_grpo as pg
from zoo.oracle import theory


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


# ---- Schedule ------------------------------------------------------------------------------------


@given(T=st.integers(1, 60), shift=st.floats(0.02, 50))
@example(T=1, shift=1.0)
@example(T=16, shift=3.0)
def test_schedule_is_the_shifted_uniform_grid(T, shift):
    """t = shift u / (1 + (shift-1) u) of uniform u, from exactly 1 to exactly 0, in float64."""
    grid = pg.schedule(T, shift)
    assert grid.dtype == torch.float64
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    for i, t in enumerate(grid.tolist()):
        u = 1 - i / T
        # About ten roundings, which the denominator amplifies by at most the shift or its inverse.
        assert abs(t - shift * u / (1 + (shift - 1) * u)) <= 10 * EPS * max(shift, 1 / shift)


BAD_SCHEDULES = [(0, 1.0), (-1, 1.0), (4, 0.0), (4, -3.0), (4, math.inf), (4, math.nan)]


@pytest.mark.parametrize("T, shift", BAD_SCHEDULES)
def test_schedule_refuses(T, shift):
    """A grid needs one step or more and a positive finite shift."""
    with pytest.raises(ValueError, match=r"^schedule\(.*must be.*$"):
        pg.schedule(T, shift)


# ---- Kernels -------------------------------------------------------------------------------------


@given(kernel=kernels, span=spans, eta=etas, x=st.floats(-4, 4), v=st.floats(-4, 4))
@example(kernel="flow_sde", span=(1.0, 0.9), eta=0.7, x=1.0, v=-2.0)
@example(kernel="dance", span=(1.0, 0.0), eta=0.3, x=1.0, v=-2.0)
@example(kernel="cps", span=(0.4, 0.0), eta=1.0, x=1.0, v=-2.0)
def test_a_step_is_its_definition(kernel, span, eta, x, v):
    """a, b and std are those of the kernel's record, which knows predicted ends and a score."""
    (t, s), record = span, theory.of(kernel, eta)
    process = pg.Process([t, s], kernel, eta)
    a, b, std = process.coefficients(scalar(t), scalar(s))
    assert a.dtype == b.dtype == std.dtype == torch.float64
    # 10 roundings of terms below 1 + g^2 D/(2t) <= 1 + g^2, whose 1 - t is as good as 1/(1 - t).
    sensitivity = 1 / (1 - (t if t < 1 else s))
    bound = 10 * EPS * (1 + eta**2 * sensitivity) * sensitivity
    want_a, want_std = record.step(1.0, 0.0, t, s)
    want_b, _ = record.step(0.0, 1.0, t, s)
    assert abs(a.item() - want_a) <= bound
    assert abs(b.item() - want_b) <= bound
    assert abs(std.item() - want_std) <= bound

    p = process.transition(scalar(x)[None], scalar(v)[None], scalar(t), scalar(s))
    mean, _ = record.step(x, v, t, s)
    assert abs(p.mean.item() - mean) <= 2 * 8 * bound  # |x| + |v| <= 8, and as much again
    assert torch.equal(p.std, std)


@given(t_1=st.floats(0.01, 0.99), eta=etas)
def test_flow_sde_at_one(t_1, eta):
    """At t = 1 the convention gives a = 1 - eta^2/2, b = -D, std = eta for the step 1 -> t_1.

    g is that of the grid's second point t_1 even for a step that ends elsewhere.
    """
    process = pg.Process([1, t_1, 0], "flow_sde", eta)
    a, b, std = process.coefficients(scalar(1), scalar(t_1))
    assert b.item() == -(1 - t_1)  # (1 - t)/2t is exactly 0 at t = 1
    # D/D rounds, and then a root.
    assert abs(a.item() - (1 - eta**2 / 2)) <= 4 * EPS and abs(std.item() - eta) <= 4 * EPS
    far = process.coefficients(scalar(1), scalar(t_1 / 2)).std.item()  # D = 1 - t_1/2
    assert abs(far - eta * math.sqrt((1 - t_1 / 2) / (1 - t_1))) <= 10 * EPS * far


@each_kernel
@given(t_1=st.floats(0.5, 0.99), t=st.floats(0.05, 0.95), eta=etas)
def test_the_convention_is_only_for_one(kernel, t_1, t, eta):
    """t_1 enters the g of a flow_sde step that starts at t = 1 and nothing else."""
    step, s, other = pg.KERNELS[kernel], scalar(t / 2), scalar(0.123)
    assert step(scalar(t), s, eta, scalar(t_1)) == step(scalar(t), s, eta, other)
    if kernel != "flow_sde":
        assert step(scalar(1.0), s, eta, scalar(t_1)) == step(scalar(1.0), s, eta, other)


def test_cps_keeps_signal_and_noise_levels():
    """A cps step gives x_s the level 1-s of x0_hat and s of noise in all, by sin^2 + cos^2 = 1."""
    t, s = 0.7, 0.4
    x, v = normal(0, 2, 1, 3)
    x0_hat, x1_hat = x - t * v, x + (1 - t) * v
    p = pg.Process([t, s], "cps", 0.7).transition(x, v, scalar(t), scalar(s))
    noise_kept = (p.mean - (1 - s) * x0_hat) / x1_hat
    # Division by x1_hat > 0.1: some 50 EPS.
    assert (noise_kept**2 + p.std**2 - s**2).abs().max() <= 1e-14


# ---- Process -------------------------------------------------------------------------------------

BAD_PROCESSES = [
    (dict(grid=[0.5]), "grid=[0.5]: must be 2 or more "),
    (dict(grid=[0.0, 1.0]), "grid="),
    (dict(grid=[1.0, 0.5, 0.5]), "grid="),
    (dict(grid=[1.1, 0.5]), "grid="),
    (dict(grid=[0.5, -0.1]), "grid="),
    (dict(grid=[1.0, math.nan]), "grid="),
    (dict(grid=[[1.0, 0.0]]), "grid="),
    (dict(kernel="ddim"), "kernel='ddim'"),
    (dict(eta=0.0), "eta=0.0"),
    (dict(eta=-1.0), "eta=-1.0"),
    (dict(eta=math.nan), "eta=nan"),
    (dict(eta=math.inf), "eta=inf"),
    (dict(kernel="cps", eta=1.1), "eta=1.1: the cps kernel"),
]


@pytest.mark.parametrize("arguments, message", BAD_PROCESSES)
def test_process_refuses(arguments, message):
    """A grid that does not fall in [0, 1], an unknown kernel or a bad eta is one line, at once."""
    with pytest.raises(ValueError) as error:
        pg.Process(**{"grid": [1.0, 0.5, 0.0], **arguments})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_cps_has_no_last_step():
    """cps at s = 0 is a Dirac: left out when all steps are meant, refused when it is named."""
    grid = pg.schedule(4)
    assert pg.Process(grid, "flow_sde").stochastic_steps() == (0, 1, 2, 3)
    assert pg.Process(grid, "dance").stochastic_steps() == (0, 1, 2, 3)
    assert pg.Process(grid, "cps").stochastic_steps() == (0, 1, 2)
    assert pg.Process(grid[:-1], "cps").stochastic_steps() == (0, 1, 2)
    assert pg.Process(grid, "cps").stochastic_steps([0, 2]) == (0, 2)
    zero = r"^sde_steps=\[0, 3\]: step 3 ends at t = 0, where cps has zero std, no density"
    with pytest.raises(ValueError, match=zero):
        pg.Process(grid, "cps").stochastic_steps([0, 3])


@pytest.mark.parametrize("steps", [[], [0, 0], [2, 0], [-1], [4], [0, 9], [0.0], [True]])
def test_stochastic_steps_refuses(steps):
    """The stochastic steps are increasing integers of 0..T-1, at least one."""
    with pytest.raises(ValueError, match=r"^sde_steps=.*increasing integers from 0 to 3$"):
        pg.Process(pg.schedule(4)).stochastic_steps(steps)


def test_adding_a_kernel_is_adding_an_entry(monkeypatch):
    """The kernel table is open: a new entry samples, decomposes and trains with no other change."""

    def brownian(t, s, eta, t_1):
        return pg.Coefficients(torch.ones_like(t), s - t, eta * torch.ones_like(t))

    monkeypatch.setitem(pg.KERNELS, "brownian", brownian)
    process, net = pg.Process(pg.schedule(3), "brownian", 2.0), network()
    rollout = roll("shared_anchor", net, process)
    A = pg.group_advantages(rollout.x_0.sum(-1))
    result = pg.policy_loss(net, rollout, A, factors=(2,))
    assert result.loss.isfinite() and torch.autograd.grad(result.loss, net.w1)[0].norm() > 0
    assert torch.equal(result.terms[2].effective_weight, torch.ones(3, dtype=torch.float64))


# ---- Transition ----------------------------------------------------------------------------------


@given(seed=seeds, std=st.floats(0.05, 3), event=st.sampled_from([(1,), (3,), (2, 3)]))
def test_log_prob_is_the_normal_density(seed, std, event):
    """log N(x; mean, std^2 I) with its constants, summed over the dimensions or averaged."""
    mean, x = normal(seed, 2, 5, *event)
    p = pg.Transition(mean, std * torch.arange(1, 6, dtype=torch.float64))
    truth = Normal(mean, p.std.reshape(5, *[1] * len(event))).log_prob(x).flatten(1)
    # About 10 + d roundings of squares below (8/std)^2 / 2, which are <= 12,800.
    bound = (10 + truth.shape[1]) * EPS * max(1, 32 / std**2)
    assert (p.log_prob(x, "mean") - truth.mean(1)).abs().max() <= bound
    assert (p.log_prob(x, "sum") - truth.sum(1)).abs().max() <= bound * truth.shape[1]
    assert torch.equal(p.log_prob(x), p.log_prob(x, "mean"))


def test_one_mean_scores_a_group():
    """mu^(k) of an anchor is shared by its G members, as if it had been repeated G times."""
    mean, std, x = normal(0, 2, 3, 1, 4), normal(1, 2, 3, 1).abs(), normal(2, 2, 3, 5, 4)
    shared = pg.Transition(mean, std).log_prob(x, "sum")
    repeated = pg.Transition(mean.expand_as(x), std.expand(2, 3, 5)).log_prob(x, "sum")
    assert shared.shape == (2, 3, 5) and torch.equal(shared, repeated)


def test_log_prob_refuses():
    """A Dirac has no density and a reduction has a name: neither is guessed or clamped."""
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^std=0\.0: must be positive to have a density$"):
        pg.Transition(x, torch.tensor([1.0, 0.0], dtype=torch.float64)).log_prob(x)
    with pytest.raises(ValueError, match=r"^std=nan"):
        pg.Transition(x, torch.tensor([math.nan, math.nan], dtype=torch.float64)).log_prob(x)
    with pytest.raises(ValueError, match=r"^reduction='avg': must be 'mean' or 'sum'$"):
        pg.Transition(x, torch.ones(2, dtype=torch.float64)).log_prob(x, "avg")


@each_kernel
def test_log_prob_of_a_float32_image_is_accurate(kernel):
    """The log-density of a float32 state of 200,000 dimensions is added up to a clip range."""
    process, d = pg.Process([0.7, 0.55], kernel, 0.7), 200_000
    x, v, z = normal(0, 3, 1, d, dtype=torch.float32)
    p = process.transition(x, v, scalar(0.7), scalar(0.55))
    x_s = p.sample(z)
    truth = Normal(p.mean.double(), p.std).log_prob(x_s.double()).sum()
    # Each z = (x - mean)/std carries three float32 roundings (2^-24 each) and its square twice as
    # many, all of them at most in one direction: d E[z^2]/2 * 6 * 2^-24 = 0.036, and no more.
    assert abs(p.log_prob(x_s, "sum").item() - truth.item()) <= d / 2 * 1.02 * 6 * 2**-24
    assert p.log_prob(x_s).dtype == torch.float64

    # Against a mean of zero and a std of one only squares and their sum can round. The squares do
    # so in float32; the sum in float64, or it shows.
    zero = pg.Transition(torch.zeros(1, d), torch.ones(1, dtype=torch.float64))
    truth = -(z.square().double().sum() + d * math.log(2 * math.pi)) / 2
    assert abs(zero.log_prob(z, "sum").item() / truth.item() - 1) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_is_the_mean_plus_std_times_noise(dtype):
    """x_s = mean + std z, in the dtype of the state."""
    mean, z = normal(0, 2, 5, 3, dtype=dtype)
    std = torch.arange(1, 6, dtype=torch.float64)
    x_s = pg.Transition(mean, std).sample(z)
    assert x_s.dtype == dtype and torch.equal(x_s, mean + std.to(dtype)[:, None] * z)


# ---- Velocities ----------------------------------------------------------------------------------


def narrow(x, t, prompt):
    return x[:, :1]


def reduced(x, t, prompt):
    return x.sum(1)


def deep(x, t, prompt):
    return x[None]


@pytest.mark.parametrize("velocity", [narrow, reduced, deep])
def test_velocity_of_a_wrong_shape_is_refused(velocity):
    """A velocity is shaped like its state; one that would broadcast silently is refused."""
    with pytest.raises(ValueError, match=r"^velocity returned shape .*: must be x's, \(2, 3\)$"):
        pg.ode_sample(velocity, pg.schedule(2), torch.zeros(2, 3))


def test_a_state_below_float32_is_refused():
    """A rollout in half precision would lose the sub-steps it is scored by."""
    with pytest.raises(ValueError, match=r"^x of dtype torch.bfloat16: must be float32 or float64"):
        pg.ode_sample(network(), pg.schedule(2), torch.zeros(2, 3, dtype=torch.bfloat16))
