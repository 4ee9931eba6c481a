"""The midpoint form: one velocity inside the step, no k-term (E14), against slow loops."""

import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow import each_kernel, each_mode

import pave_grpo as pg

places = st.one_of(st.floats(0, 1), st.integers(0, 99))


def place_of(drawn, rollout):
    """A number for all states, or one for each, [P, n, 1|G]."""
    if isinstance(drawn, float):
        return drawn
    generator = torch.Generator().manual_seed(drawn)
    return torch.rand(rollout.x_t.shape[:3], generator=generator, dtype=torch.float64)


@given(
    kernel=slow.kernels,
    mode=slow.modes,
    drawn=places,
    clip=st.sampled_from([None, 0.05]),
    reduction=st.sampled_from(["mean", "sum"]),
    kl=st.sampled_from([0.0, 0.3]),
    seed=slow.seeds,
)
def test_loss_and_gradient_are_those_of_slow_loops(kernel, mode, drawn, clip, reduction, kl, seed):
    """After an update, with and without clip and KL; at any place of each state's own."""
    old = slow.network(seed % 97)
    process = pg.Process(pg.schedule(3), kernel, 0.6)
    rollout = slow.roll(mode, old, process, G=3, steps=(0, 1), seed=seed)
    A, u = slow.some_advantages(rollout, seed), place_of(drawn, rollout)
    new, reference = slow.moved(old, 1, 0.1), slow.moved(old, 2, 0.1)
    how = {"factors": (), "form": "midpoint", "u": u, "clip": clip, "reduction": reduction}
    if kl:
        how |= {"kl": kl, "reference": reference}
    first = pg.policy_loss(old, rollout, A, **how)
    result = pg.policy_loss(new, rollout, A, old=first.old, **how)
    every = torch.as_tensor(u, dtype=torch.float64).expand(rollout.x_t.shape[:3])
    wanted = slow.slow_midpoint_loss(
        new, old, rollout, A, every, clip, reduction, kl, reference if kl else None
    )
    # Some hundred roundings of ratios and of x_s/std below 1e3.
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-11)
    found, due = slow.gradient(result.loss, new), slow.gradient(wanted, new)
    torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-10 * (1 + due.abs().max().item()))


@each_kernel
@each_mode
@pytest.mark.parametrize("drawn", [0.0, 0.5, 1.0, 7])
def test_at_theta_old_it_is_the_density_that_sampled(kernel, mode, drawn):
    """Ratio 1 exactly; its log-density is the one stored while sampling; no clip acts."""
    field = slow.network(3)
    process = pg.Process(pg.schedule(4), kernel, 0.7)
    rollout = slow.roll(mode, field, process, steps=(0, 2))
    A, u = slow.some_advantages(rollout), place_of(drawn, rollout)
    how = {"factors": (), "form": "midpoint", "u": u, "reduction": "sum"}
    result = pg.policy_loss(field, rollout, A, clip=1e-9, **how)
    free = pg.policy_loss(field, rollout, A, clip=None, **how)
    assert result.terms[1].ratio_min == result.terms[1].ratio_max == 1
    assert torch.equal(slow.gradient(result.loss, field), slow.gradient(free.loss, field))
    torch.testing.assert_close(result.old.log_probs[1], rollout.log_prob, rtol=1e-11, atol=1e-11)
    assert torch.equal(result.terms[1].effective_weight, torch.ones(2, dtype=torch.float64))


@each_kernel
@each_mode
def test_without_a_place_it_is_the_sampled_step(kernel, mode):
    """u = 0 is Flow-GRPO's term: loss and gradient after an update, to rounding."""
    old = slow.network(4)
    process = pg.Process(pg.schedule(4), kernel, 0.7)
    rollout = slow.roll(mode, old, process, steps=(0, 1))
    A, new = slow.some_advantages(rollout), slow.moved(old, 5, 0.1)
    gradients = []
    for how in ({"form": "paper"}, {"form": "midpoint", "u": 0.0}):
        first = pg.policy_loss(old, rollout, A, factors=(), **how).old
        loss = pg.policy_loss(new, rollout, A, factors=(), old=first, **how).loss
        gradients.append(torch.cat([loss[None], slow.gradient(loss, new)]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@each_mode
def test_it_asks_for_one_velocity_a_state(mode):
    """In the step, at its own time; the rollout has kept the others."""
    field = slow.network(6)
    process = pg.Process(pg.schedule(4), "flow_sde", 0.7)
    rollout = slow.roll(mode, field, process, steps=(1, 2))
    counted, A = slow.Counting(field), slow.some_advantages(rollout)
    pg.policy_loss(counted, rollout, A, factors=(), form="midpoint", u=0.25)
    assert len(counted.t) == 1 and counted.rows == rollout.x_t.shape[:3].numel()
    assert set(counted.t[0].tolist()) == {0.75 - 0.0625, 0.5 - 0.0625}
    steps = [step for step in slow.observations(rollout) if step.index[2] < rollout.x_t.shape[2]]
    for step in steps:
        wanted = field(step.x_t, torch.tensor([step.t], dtype=torch.float64), step.prompt)
        torch.testing.assert_close(rollout.v[step.index][None], wanted)


def test_places_are_of_their_prompts_generator():
    """Uniform in [0, 1), after the noise; another prompt's draws change nothing."""
    one, two, alone = (torch.Generator().manual_seed(seed) for seed in (1, 2, 2))
    for generators in ([one, two], [alone]):
        pg.draw_noise(generators, 4, (3,), 2)
    u, again = pg.draw_places([one, two], 2, 4), pg.draw_places([alone], 2, 4)
    assert u.shape == (2, 2, 4) and u.dtype == torch.float64
    assert torch.equal(u[1], again[0]) and len(u.unique()) == 16
    many = pg.draw_places([torch.Generator().manual_seed(3)], 10_000)
    # 10,000 uniform numbers: a mean off by 6 of its standard errors of 0.0029 has chance 2e-9.
    assert abs(many.mean().item() - 0.5) < 6 * (1 / 12 / 10_000) ** 0.5
    assert many.min() >= 0 and many.max() < 1 and abs(many.var().item() - 1 / 12) < 0.01


FIELD = slow.network(8)
ROLLOUT = slow.roll("shared_anchor", FIELD, pg.Process(pg.schedule(4)), steps=(0, 1))
REFUSED = {
    "factors": ({"factors": (2,)}, "factors"),
    "above": ({"u": 1.5}, "u from"),
    "below": ({"u": -0.1}, "u from"),
    "not a number": ({"u": float("nan")}, "u from"),
    "another shape": ({"u": torch.zeros(2, 1, 1)}, "u of shape"),
    "no place": ({"u": torch.zeros(0)}, "u of shape"),
    "another form": ({"form": "paper", "u": 0.25}, "u 0.25: must be left out"),
    "another form of many": ({"form": "matched", "u": torch.full((2, 2, 1), 0.5)}, "must be left"),
    "no velocity": ({}, "rollout.v"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    """In one line that names it, before any evaluation."""
    changed, named = REFUSED[case]
    rollout = ROLLOUT._replace(v=None) if case == "no velocity" else ROLLOUT
    counted, A = slow.Counting(FIELD), slow.some_advantages(rollout)
    with pytest.raises(ValueError, match=named) as refused:
        pg.policy_loss(counted, rollout, A, **{"factors": (), "form": "midpoint", **changed})
    assert not counted.t and "\n" not in str(refused.value)


def test_a_rollout_without_velocities_has_no_midpoint():
    """Whoever asks for it directly is told in one line, too."""
    with pytest.raises(ValueError, match=r"rollout\.v=None"):
        pg.midpoint(FIELD, ROLLOUT._replace(v=None))


def test_the_place_stays_for_all_updates():
    """An old policy of another place is refused."""
    A = slow.some_advantages(ROLLOUT)
    how = {"factors": (), "form": "midpoint"}
    old = pg.policy_loss(FIELD, ROLLOUT, A, u=0.25, **how).old
    pg.policy_loss(FIELD, ROLLOUT, A, u=0.25, old=old, **how)
    with pytest.raises(ValueError, match="u: must be that of the first update"):
        pg.policy_loss(FIELD, ROLLOUT, A, u=0.5, old=old, **how)
