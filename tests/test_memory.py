"""What a rollout and a loss hold and wait for: bytes at their peak, copies from a device.

Bytes are those that torch's allocator gave out, in units of x_s, the states of all branches. An
accelerator is played by the device "meta", whose tensors have no numbers: what the host would wait
for can be seen, and counted, without one.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from counting import peak, waited
from slow import Counting, gradient, moved, normal

import pave_grpo as pg
import train
from zoo.training.metrics import fetch
from zoo.training.options import Options

EVENT, G, STEPS = (8, 24, 24), 24, (0, 2, 4)


class Scale(torch.nn.Module):
    """A velocity that holds nothing but what it returns."""

    def __init__(self, seed=0):
        super().__init__()
        self.w = torch.nn.Parameter(normal(seed, 8, 1, 1, dtype=torch.float32))

    def forward(self, x, t, prompt):
        return self.w * x


class Convolution(torch.nn.Module):
    """A velocity whose gradient adds up numbers of all places."""

    def __init__(self, seed=0):
        super().__init__()
        self.w = torch.nn.Parameter(0.1 * normal(seed, 8, 8, 3, 3, dtype=torch.float32))

    def forward(self, x, t, prompt):
        return torch.tanh(torch.conv2d(x, self.w, padding=1))


def noise_of_pictures(seed=0):
    """Float32 noise for one prompt and three stochastic steps."""
    return pg.draw_noise([torch.Generator().manual_seed(seed)], G, EVENT, len(STEPS))


def pictures(sampler, net, noise=None):
    """A rollout of pictures."""
    process = pg.Process(pg.schedule(8, 3.0), "flow_sde", 0.7)
    return sampler(net, process, noise_of_pictures() if noise is None else noise, STEPS)


def advantages_for(rollout):
    return pg.group_advantages(normal(1, *rollout.x_0.shape[:3], dtype=torch.float32))


# ---- Bytes ---------------------------------------------------------------------------------------


def test_the_peak_of_a_rollout():
    """The noise, what was observed, the pictures, and of one step's members x, v and D v.

    It was 11.1 units with means of every row, and views of the anchor that kept all rows.
    """
    net, noise = Scale(), noise_of_pictures()
    rollout, most = peak(lambda: pictures(pg.rollout_shared_anchor, net, noise))
    unit = rollout.x_s.numel() * 4
    assert 4 * unit < most <= 4.3 * unit <= 11.1 * unit / 1.5


# sampler, factors, with a reference, units now (in the backward pass), units with a float64 copy of
# z for each k. Independent rollouts also hold means and states of every member.
PEAKS = [
    (pg.rollout_shared_anchor, (2, 3), False, 7.2, 14.1),
    (pg.rollout_shared_anchor, (2, 3), True, 7.2, 14.1),
    (pg.rollout_shared_anchor, (), False, 5.1, 10.0),
    (pg.rollout_independent, (2, 3), False, 12.1, 17.0),
    (pg.rollout_independent, (2, 3), True, 15.1, 21.0),
]


@pytest.mark.parametrize("sampler, factors, has_reference, now, before", PEAKS)
def test_the_peak_of_a_loss(sampler, factors, has_reference, now, before):
    """Of every member one float32 state is kept for each k; a float64 copy would be two."""
    net = Scale()
    rollout = pictures(sampler, net)
    A = advantages_for(rollout)
    options = dict(kl=0.1, reference=Scale(1)) if has_reference else {}

    def update():
        pg.policy_loss(net, rollout, A, factors=factors, **options).loss.backward()

    update()  # what a first call allocates for good
    unit = rollout.x_s.numel() * 4
    assert unit * len((1, *factors)) < peak(update)[1] <= now * unit
    assert now <= before / (1.5 if sampler is pg.rollout_shared_anchor else 1.35)


def test_the_anchor_is_kept_alone():
    """x_t and v of a shared anchor hold its rows, not those of the batch they were taken from."""
    rollout = pictures(pg.rollout_shared_anchor, Scale())
    for kept in (rollout.x_t, rollout.v):
        assert kept.shape == (1, len(STEPS), 1, *EVENT)
        assert kept.untyped_storage().nbytes() == kept.numel() * 4


# ---- Rounding ------------------------------------------------------------------------------------


def in_float64(p, x, reduction):
    """`log_density` with a float64 copy of the group: nothing rounds after z."""
    z = ((x - p.mean) / pg.per_row(p.std, x)).double().flatten(p.std.ndim)
    log_p = -z.square().mean(-1) / 2 - p.std.log() - math.log(2 * math.pi) / 2
    return log_p * (z.shape[-1] if reduction == "sum" else 1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_mean_of_float32_squares_is_off_by_their_rounding(size):
    """log p is off by 2^-24 of its quadratic part, however far x_s lies; in float64 by nothing."""
    mean, x = size * normal(0, 2, 5, *EVENT, dtype=torch.float32)
    p = pg.Transition(mean, torch.full((5,), 0.3, dtype=torch.float64))
    quadratic = in_float64(p, mean, "mean") - in_float64(p, x, "mean")
    off = (p.log_prob(x) - in_float64(p, x, "mean")).abs()
    assert off.max() > 0 and (off <= 2**-24 * quadratic + 1e-15).all()
    exact = pg.Transition(mean.double(), p.std)
    assert torch.equal(exact.log_prob(x.double()), in_float64(exact, x.double(), "mean"))


@pytest.mark.parametrize("form", ["paper", "matched"])
def test_a_gradient_moves_by_rounding_only(form, monkeypatch):
    """A float32 gradient is as close to that of float64 as it is with a float64 copy of z."""
    old = Convolution()
    rollout = pictures(pg.rollout_shared_anchor, old)
    A = advantages_for(rollout)
    wide = {"x_t", "x_s", "log_prob", "x_0", "v"}
    exact = rollout._replace(**{name: getattr(rollout, name).double() for name in wide})

    def found(rollout, dtype):
        """The gradient of a second update, in double."""
        before, theta = moved(old, 0, 0.0).to(dtype), moved(old, 2, 1e-3).to(dtype)
        first = pg.policy_loss(before, rollout, A, form=form).old
        loss = pg.policy_loss(theta, rollout, A, form=form, old=first).loss
        return gradient(loss, theta).double()

    truth = found(exact, torch.float64)
    ours = (found(rollout, torch.float32) - truth).norm() / truth.norm()
    monkeypatch.setattr(pg.Transition, "log_density", in_float64)
    copied = (found(rollout, torch.float32) - truth).norm() / truth.norm()
    assert 0 < ours <= 2 * copied and ours <= 1e-5


# ---- Waiting for a device ------------------------------------------------------------------------


def far(sampler, P=4):
    """A network on the device and a rollout of it, with the waits of the rollout."""
    linear = torch.nn.Linear(4, 3, device="meta")

    def velocity(x, t, prompt):
        return linear(torch.cat([x, t[:, None]], 1))

    noise = pg.draw_noise([torch.Generator()] * P, 6, (3,), len(STEPS), device="meta")
    process = pg.Process(pg.schedule(8, 3.0), "flow_sde", 0.7)
    rollout, count = waited(lambda: sampler(velocity, process, noise, STEPS))
    return linear, Counting(velocity), rollout, count


def test_waits_are_counted():
    """Each way of waiting counts once, and sending without waiting does not."""
    x = torch.ones(3, device="meta")
    ways = [
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.tensor(1.0, device="meta"),
        lambda: torch.as_tensor(1.0, device=x.device),
        lambda: torch.equal(x, x),
    ]
    assert [waited(way)[1] for way in ways] == [1] * len(ways)
    assert waited(lambda: torch.ones(3).to("meta", non_blocking=True).sum() * 2)[1] == 0
    assert waited(lambda: torch.ones(3).sum().item())[1] == 0


@pytest.mark.parametrize("sampler", [pg.rollout_shared_anchor, pg.rollout_independent])
@pytest.mark.parametrize("form", ["paper", "matched", "midpoint"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_loss_waits_once(sampler, form, kl):
    """A rollout waits for nothing, a loss for its numbers, all at once, in every update."""
    _, velocity, rollout, count = far(sampler)
    assert count == 0
    A = torch.ones(rollout.x_0.shape[:3], device="meta")
    options = dict(form=form, kl=kl, reference=velocity if kl else None)
    options |= dict(factors=()) if form == "midpoint" else {}
    first, count = waited(lambda: pg.policy_loss(velocity, rollout, A, **options))
    assert count == 1
    assert waited(lambda: first.loss.backward())[1] == 0
    again = waited(lambda: pg.policy_loss(velocity, rollout, A, **options, old=first.old))
    assert again[1] == 1 and again[0].old is first.old


def test_a_step_without_a_density_is_refused_before_any_work():
    """A loss knows from the grid that a step is a Dirac, and asks neither device nor model."""
    _, velocity, rollout, _ = far(pg.rollout_shared_anchor)
    process = pg.Process(rollout.process.grid, "cps", 0.7)
    last = rollout._replace(process=process, sde_steps=(0, 2, 7))
    A = torch.ones(rollout.x_0.shape[:3], device="meta")
    calls = len(velocity.t)
    with pytest.raises(ValueError, match=r"^sde_steps=\[0, 2, 7\]: step 7 ends at t = 0"):
        pg.policy_loss(velocity, last, A)
    assert len(velocity.t) == calls


@pytest.mark.parametrize(
    "term_weights", [None, {1: torch.ones(3), 2: torch.ones(3), 3: torch.ones(3)}]
)
def test_an_update_waits_a_handful_of_times(term_weights):
    """One update of four parts, S = {2, 3}: once a part, for its metrics, and for the norm.

    Before the statistics were fetched together it was 121 times.
    """
    linear, velocity, rollout, _ = far(pg.rollout_shared_anchor)
    A = torch.ones(rollout.x_0.shape[:3], device="meta")
    tuned = list(linear.parameters())
    policy = SimpleNamespace(velocity=lambda prompts: velocity, tuned=tuned, sharded=False)
    ranks = SimpleNamespace(average_gradients=lambda tuned: None)
    parts = list(train.parts_of(rollout, A, 3, weights=term_weights))
    assert len(parts) == 4

    def update():
        measured = fetch([train.score(Options(), policy, "abcd", part) for part in parts])
        return measured, train.gradient(Options(), policy, ranks)

    for _ in range(2):
        (measured, norm), count = waited(update)
        assert count == len(parts) + 2
        assert len(measured) == len(parts) and isinstance(norm, float)
        assert all(type(value) is float for metrics in measured for value in metrics.values())
