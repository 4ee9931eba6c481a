"""Schedule, kernels, Process and log-probability, against the table, scalar arithmetic and torch.distributions."""

import math

import pytest
import torch
from slow import EPS, KERNELS, each_kernel, etas, kernels, normal, seeds, slow_step, spans
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import Normal

import pave_grpo as pg


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def table(kernel, t, s, eta, t_1=None):
    """(a, b, c) by the table of coefficients, in Python floats."""
    D, h = t - s, eta * math.pi / 2
    g = eta * math.sqrt(t / (1 - (t_1 if t == 1 else t))) if kernel == "flow_sde" else eta
    if kernel == "cps":
        return (1 - s) + s * math.cos(h), -(1 - s) * t + s * math.cos(h) * (1 - t), s * math.sin(h)
    return 1 - g**2 * D / (2 * t), -(1 + g**2 * (1 - t) / (2 * t)) * D, g * math.sqrt(D)


# ---- Schedule ------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 60), shift=st.floats(0.02, 50))
@example(steps=1, shift=1.0)
@example(steps=16, shift=3.0)
def test_schedule_is_the_shifted_uniform_grid(steps, shift):
    """T = shift u / (1 + (shift-1) u) on uniform u, decreasing from exactly 1 to exactly 0, in float64."""
    grid = pg.schedule(steps, shift)
    assert (
        grid.dtype == torch.float64
        and grid[0] == 1
        and grid[-1] == 0
        and bool((grid.diff() < 0).all())
    )
    for i, t in enumerate(grid.tolist()):
        u = 1 - i / steps
        # About ten roundings, which the denominator amplifies by at most the shift or its inverse.
        assert abs(t - shift * u / (1 + (shift - 1) * u)) <= 10 * EPS * max(shift, 1 / shift)


@pytest.mark.parametrize(
    "steps, shift", [(0, 1.0), (-1, 1.0), (4, 0.0), (4, -3.0), (4, math.inf), (4, math.nan)]
)
def test_schedule_refuses(steps, shift):
    """A grid needs one step or more and a positive finite shift."""
    with pytest.raises(ValueError, match=r"^schedule\(.*must be.*$"):
        pg.schedule(steps, shift)


# ---- Kernels -------------------------------------------------------------------------------------------------


@given(kernel=kernels, span=spans, eta=etas, t_1=st.floats(0.5, 0.99))
@example(kernel="flow_sde", span=(1.0, 0.9), eta=0.7, t_1=0.9)
@example(kernel="flow_sde", span=(1.0, 0.3), eta=0.7, t_1=0.9)
@example(kernel="dance", span=(1.0, 0.0), eta=0.3, t_1=0.9)
@example(kernel="cps", span=(0.4, 0.0), eta=1.0, t_1=0.9)
def test_coefficients_are_the_table(kernel, span, eta, t_1):
    """A, b and c of each kernel are those of the table; at t = 1 flow_sde takes g at the grid's t_1."""
    t, s = span
    ours = pg.KERNELS[kernel](scalar(t), scalar(s), eta, scalar(t_1))
    for name, got, want in zip(("a", "b", "std"), ours, table(kernel, t, s, eta, t_1), strict=True):
        assert got.dtype == torch.float64
        # Ten roundings of terms no larger than 1 + g^2 D/(2t) <= 1 + g^2; 1 - t loses EPS/(1-t), which g^2 inherits.
        g2 = eta**2 / (1 - (t if t < 1 else t_1)) if kernel == "flow_sde" else 1
        slack = 1 / (1 - t) if t < 1 else 1
        assert abs(got.item() - want) <= 10 * EPS * (1 + g2) * slack, name


@given(kernel=kernels, span=spans, eta=etas, x=st.floats(-4, 4), v=st.floats(-4, 4))
@example(kernel="flow_sde", span=(1.0, 0.8), eta=0.7, x=1.0, v=-2.0)
def test_mean_is_the_derivation_form(kernel, span, eta, x, v):
    """A x + b v is the Euler-Maruyama step with the score -x1_hat/t, or cps's mix of predicted ends."""
    t, s = span
    process = pg.Process([t, s], kernel, eta)
    got = process.transition(scalar(x)[None], scalar(v)[None], scalar(t), scalar(s))
    mean, std = slow_step(kernel, eta, t, s, x, v, t_1=s)
    # About 20 roundings of terms no larger than 8 (1 + g^2), each as sensitive as 1/(1 - t).
    g2, slack = (
        (eta**2 / (1 - (t if t < 1 else s)), 1 / (1 - t) if t < 1 else 1)
        if kernel == "flow_sde"
        else (1, 1)
    )
    assert abs(got.mean.item() - mean) <= 20 * EPS * 8 * (1 + g2) * slack
    assert abs(got.std.item() - std) <= 20 * EPS * (1 + g2) * slack


@given(t=st.floats(0.05, 0.95), fraction=st.floats(0, 0.95), eta=etas)
@example(t=0.7, fraction=0.55 / 0.7, eta=0.7)
def test_flow_sde_simplifies_below_one(t, fraction, eta):
    """For t < 1, flow_sde has b = -(1 + eta^2/2) D and a = 1 - eta^2 D/(2(1-t)), without any t/t."""
    D = t - t * fraction
    a, b, std = pg.flow_sde(scalar(t), scalar(t * fraction), eta, scalar(0.99))
    # Ten roundings; 1/(1-t) <= 20 scales the terms and 1 - t's own rounding is amplified by at most 20 again.
    assert abs(b.item() + (1 + eta**2 / 2) * D) <= 10 * EPS * 20
    assert abs(a.item() - (1 - eta**2 * D / (2 * (1 - t)))) <= 10 * EPS * 20 * 20
    assert abs(std.item() ** 2 - eta**2 * t / (1 - t) * D) <= 10 * EPS * 20 * 20


@given(t_1=st.floats(0.01, 0.99), eta=etas)
def test_flow_sde_at_one(t_1, eta):
    """At t = 1 the convention gives a = 1 - eta^2/2, b = -D, c = eta for the step 1 -> t_1."""
    a, b, std = pg.Process([1, t_1, 0], "flow_sde", eta).coefficients(scalar(1), scalar(t_1))
    assert b.item() == -(1 - t_1)  # (1 - t)/2t is exactly 0 at t = 1
    assert (
        abs(a.item() - (1 - eta**2 / 2)) <= 4 * EPS and abs(std.item() - eta) <= 4 * EPS
    )  # D/D rounds, then a sqrt
    # t_1 is the grid's second point, even for a step that ends elsewhere: g^2 = eta^2 / (1 - t_1), D = 1 - t_1/2.
    wide = pg.Process([1, t_1, 0], "flow_sde", eta).coefficients(scalar(1), scalar(t_1 / 2)).std
    assert abs(wide.item() - eta * math.sqrt((1 - t_1 / 2) / (1 - t_1))) <= 10 * EPS * wide.item()


@given(t_1=st.floats(0.5, 0.99), t=st.floats(0.05, 0.95), eta=etas)
def test_the_convention_is_only_for_one(t_1, t, eta):
    """T_1 enters g of the step that starts at t = 1 and nothing else."""
    for kernel in KERNELS:
        at = lambda start, t_1, kernel=kernel: pg.KERNELS[kernel](
            scalar(start), scalar(t / 2), eta, scalar(t_1)
        )
        assert at(t, t_1) == at(t, 0.123), kernel
        assert kernel == "flow_sde" or at(1.0, t_1) == at(1.0, 0.123), kernel


@given(seed=seeds, t=st.floats(0.01, 1))
@example(seed=0, t=1.0)
def test_predicted_ends_meet_the_state(seed, t):
    """X0_hat = x - t v and x1_hat = x + (1-t) v, so x = (1-t) x0_hat + t x1_hat and v = x1_hat - x0_hat."""
    x, v = normal(seed, 2, 5, 3)
    ends = pg.predicted_ends(x, v, scalar(t).expand(5))
    bound = 8 * EPS * 8  # eight roundings of numbers below 8
    assert torch.equal(ends.x0_hat, x - t * v) and torch.equal(ends.x1_hat, x + (1 - t) * v)
    assert ((1 - t) * ends.x0_hat + t * ends.x1_hat - x).abs().max() <= bound
    assert (ends.x1_hat - ends.x0_hat - v).abs().max() <= bound


def test_cps_keeps_signal_and_noise_levels():
    """A cps step gives x_s the levels (1-s) of x0_hat and s of noise in all, by sin^2 + cos^2 = 1."""
    t, s, eta = scalar(0.7), scalar(0.4), 0.7
    process = pg.Process([0.7, 0.4], "cps", eta)
    x, v = normal(0, 2, 1, 3)
    ends = pg.predicted_ends(x, v, t)
    p = process.transition(x, v, t, s)
    noise_kept = (p.mean - 0.6 * ends.x0_hat) / ends.x1_hat
    assert (
        noise_kept**2 + p.std**2 - 0.4**2
    ).abs().max() <= 1e-14  # division by x1_hat > 0.1: some 50 EPS


# ---- Process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(grid=[0.5]), "grid="),
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
    ],
)
def test_process_refuses(arguments, message):
    """A grid that does not decrease in [0, 1], an unknown kernel or a bad eta is one clear line, at once."""
    with pytest.raises(ValueError) as error:
        pg.Process(**{"grid": [1.0, 0.5, 0.0], **arguments})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_cps_has_no_last_step():
    """Cps at s = 0 is a Dirac, dropped when all steps are meant, refused when it is named; others keep it."""
    grid = pg.schedule(4)
    assert pg.Process(grid, "cps").stochastic_steps() == (0, 1, 2)
    assert all(
        pg.Process(grid, kernel).stochastic_steps() == (0, 1, 2, 3)
        for kernel in ("flow_sde", "dance")
    )
    assert pg.Process(grid[:-1], "cps").stochastic_steps() == (0, 1, 2)
    assert pg.Process(grid, "cps").stochastic_steps([0, 2]) == (0, 2)
    with pytest.raises(
        ValueError, match=r"step 3 ends at t = 0, where the cps kernel has zero std and no density"
    ):
        pg.Process(grid, "cps").stochastic_steps([0, 3])


@pytest.mark.parametrize("steps", [[], [0, 0], [2, 0], [-1], [4], [0, 9]])
def test_stochastic_steps_refuses(steps):
    """The stochastic steps are increasing integers of 0..T-1, at least one."""
    with pytest.raises(ValueError, match=r"^sde_steps=.*increasing integers from 0 to 3$"):
        pg.Process(pg.schedule(4)).stochastic_steps(steps)


def test_adding_a_kernel_is_adding_an_entry(monkeypatch):
    """The kernel table is open: a new entry samples, decomposes and trains with no other change."""
    brownian = lambda t, s, eta, t_1: pg.Coefficients(
        torch.ones_like(t), s - t, eta * torch.ones_like(t)
    )
    monkeypatch.setitem(pg.KERNELS, "brownian", brownian)
    process = pg.Process(pg.schedule(3), "brownian", 2.0)
    noise = pg.draw_noise([torch.Generator().manual_seed(0)], 4, (2,), 3)
    theta = torch.tensor(0.5, requires_grad=True)
    velocity = lambda x, t, c: theta * x
    rollout = pg.rollout_shared_anchor(velocity, process, noise)
    result = pg.policy_loss(
        velocity, rollout, pg.group_advantages(rollout.x_0.sum(-1)), factors=(2,)
    )
    assert result.loss.isfinite() and torch.autograd.grad(result.loss, theta)[0] != 0
    assert torch.equal(result.terms[2].effective_weight, torch.ones(3, dtype=torch.float64))


# ---- Log-probability -----------------------------------------------------------------------------------------


@given(seed=seeds, std=st.floats(0.05, 3), event=st.sampled_from([(1,), (3,), (2, 3)]))
def test_log_prob_is_the_normal_density(seed, std, event):
    """Log N(x; mean, std^2 I) with its constants, summed over the dimensions or averaged."""
    mean, x = normal(seed, 2, 5, *event)
    p = pg.Transition(mean, std * torch.arange(1, 6, dtype=torch.float64))
    truth = Normal(mean, pg.per_row(p.std, mean)).log_prob(x).flatten(1)
    # About 10 + d roundings of squares below (8/std)^2 / 2, which are <= 12,800.
    bound = (10 + truth.shape[1]) * EPS * max(1, 32 / std**2)
    assert (p.log_prob(x, "mean") - truth.mean(1)).abs().max() <= bound
    assert (p.log_prob(x, "sum") - truth.sum(1)).abs().max() <= bound * truth.shape[1]
    assert torch.equal(p.log_prob(x), p.log_prob(x, "mean"))


def test_one_mean_scores_a_group():
    """Mu^(k) of an anchor is shared by its G members, as if it had been repeated G times."""
    mean, std, x = normal(0, 2, 3, 1, 4), normal(1, 2, 3, 1).abs(), normal(2, 2, 3, 5, 4)
    shared = pg.Transition(mean, std).log_prob(x, "sum")
    repeated = pg.Transition(mean.expand_as(x), std.expand(2, 3, 5)).log_prob(x, "sum")
    assert shared.shape == (2, 3, 5) and torch.equal(shared, repeated)


def test_log_prob_refuses():
    """A Dirac has no density and a reduction has a name: both are refused, never guessed or clamped."""
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^std=0\.0: .*no density$"):
        pg.Transition(x, torch.tensor([1.0, 0.0], dtype=torch.float64)).log_prob(x)
    with pytest.raises(ValueError, match=r"^std=nan"):
        pg.Transition(x, torch.tensor([math.nan, math.nan], dtype=torch.float64)).log_prob(x)
    with pytest.raises(ValueError, match=r"^reduction='avg': must be 'mean' or 'sum'$"):
        pg.Transition(x, torch.ones(2, dtype=torch.float64)).log_prob(x, "avg")


@each_kernel
def test_log_prob_of_a_float32_image_is_accurate(kernel):
    """The log-density of a float32 state with 200,000 dimensions is added up without losing a clip range."""
    process = pg.Process([0.7, 0.55], kernel, 0.7)
    d = 200_000
    x, v, noise = normal(0, 3, 1, d, dtype=torch.float32)
    p = process.transition(x, v, scalar(0.7), scalar(0.55))
    x_s = p.sample(noise)
    truth = Normal(p.mean.double(), p.std).log_prob(x_s.double()).sum()
    # Each z = (x - mean)/std carries three float32 roundings (2^-24 each) and its square twice as many, all of them
    # at most in one direction: d * E[z^2]/2 * 6 * 2^-24 = 0.036. Nothing may accumulate beyond that.
    assert abs(p.log_prob(x_s, "sum").item() - truth.item()) <= d / 2 * 1.02 * 6 * 2**-24
    assert p.log_prob(x_s).dtype == torch.float64


def test_sample_is_the_mean_plus_std_times_noise():
    """X_s = mean + c z, in the dtype of the state."""
    for dtype in (torch.float32, torch.float64):
        mean, noise = normal(0, 2, 5, 3, dtype=dtype)
        std = torch.arange(1, 6, dtype=torch.float64)
        x_s = pg.Transition(mean, std).sample(noise)
        assert x_s.dtype == dtype and torch.equal(x_s, mean + std.to(dtype)[:, None] * noise)


@pytest.mark.parametrize(
    "bad", [lambda x, t, c: x[:, :1], lambda x, t, c: x.sum(1), lambda x, t, c: x[None]]
)
def test_velocity_of_a_wrong_shape_is_refused(bad):
    """A velocity is shaped like its state; one that would broadcast silently is refused."""
    with pytest.raises(ValueError, match=r"^velocity returned shape .* must be equal$"):
        pg.ode_sample(bad, pg.schedule(2), torch.zeros(2, 3))
