"""How an iteration is cut, and that it does not matter: parts of a rollout, calls of a velocity."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

import pave_grpo as pg
import train
from zoo.training import costs, policies


@st.composite
def rollouts(draw):
    """A network, its velocity, which knows the prompt, a rollout, its advantages; in float64."""
    P, n, G = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    seed, shared = draw(st.integers(0, 10**6)), draw(st.booleans())
    net = torch.nn.Linear(4, 2).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def velocity(x, t, prompt):
        return torch.tanh(net(torch.cat([x, t[:, None], prompt[:, None].double()], 1)))

    process = pg.Process(pg.schedule(4, 2.0), draw(st.sampled_from(["flow_sde", "cps"])), 0.7)
    noise = pg.draw_noise([generator] * P, G, (2,), n, own_start=not shared, dtype=torch.float64)
    sample = pg.rollout_shared_anchor if shared else pg.rollout_independent
    rollout = sample(velocity, process, noise, tuple(range(n)))
    return net, velocity, rollout, pg.group_advantages(rollout.x_0.square().sum(-1))


def from_prompt(velocity, first):
    """The velocity of prompts first, first + 1, ..., numbered from 0 as a part numbers them."""

    def shifted(x, t, prompt):
        return velocity(x, t, prompt + first)

    return shifted


def gradient(net, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@given(
    rollouts(),
    st.integers(0, 40),
    st.sampled_from(["paper", "matched"]),
    st.sampled_from([0.0, 0.5]),
)
def test_the_parts_of_a_rollout_add_up_to_its_loss(made, batch, form, kl):
    """sum share * loss(part) is the loss, with its gradient; no part is larger than asked."""
    net, velocity, rollout, A = made

    def reference(x, t, prompt):
        return 0.9 * velocity(x, t, prompt).detach()

    how = {"factors": (2, 3), "form": form, "kl": kl, "reference": reference if kl else None}
    whole = pg.policy_loss(velocity, rollout, A, **how).loss
    total, states = 0.0, 0
    size = costs.part_sizes(*rollout.x_t.shape[:3], batch)  # what the cost of a run is counted with
    passes = [part.rollout.x_t.shape[:3].numel() for part in train.parts_of(rollout, A, batch)]
    assert len(passes) == math.prod(math.ceil(z / s) for z, s in zip(rollout.x_t.shape, size))
    assert max(passes) == math.prod(size)
    for part in train.parts_of(rollout, A, batch):
        first = part.prompts.start
        how["reference"] = from_prompt(reference, first) if kl else None
        own = from_prompt(velocity, first)
        result = pg.policy_loss(own, part.rollout, part.advantages, **how)
        total, size = total + part.share * result.loss, part.rollout.x_t.shape[:3].numel()
        states += size
        assert size <= (batch or states)
        assert result.old.sampling_gap < 1e-12  # members kept their own noise
    assert states == rollout.x_t.shape[:3].numel()
    assert abs((total - whole).item()) <= 1e-12 * (1 + abs(whole.item()))
    one, other = gradient(net, whole), gradient(net, total)
    assert (one - other).norm() <= 1e-11 * (1 + one.norm())


@given(st.integers(0, 9), st.integers(1, 7), st.integers(0, 10**6))
def test_a_velocity_in_chunks_is_the_velocity(rows, n, seed):
    """Every row meets its own time and prompt, and no call sees more rows than asked."""
    g, seen = torch.Generator().manual_seed(seed), []

    def velocity(x, t, prompt):
        seen.append(len(x))
        return x * t[:, None] + prompt[:, None]

    x, t = torch.randn(n, 3, generator=g), torch.rand(n, generator=g)
    prompt = torch.randint(5, (n,), generator=g)
    wanted = x * t[:, None] + prompt[:, None]
    assert torch.equal(train.chunked(velocity, rows)(x, t, prompt), wanted)
    assert sum(seen) == n and max(seen) <= (rows or n)


def test_the_average_is_the_recursion():
    """theta_ema <- d theta_ema + (1 - d) theta, apart from theta, swapped in and out exactly."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    average, wanted = policies.EMA([p], 0.75), p.detach().clone()
    for step in range(3):
        with torch.no_grad():
            p += step
        average.update()
        wanted = 0.75 * wanted + 0.25 * p.detach()
    own = p.detach().clone()
    with average.applied():
        assert torch.allclose(p, wanted, rtol=1e-6)
    assert torch.equal(p, own)
