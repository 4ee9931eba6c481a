"""What a run is asked with, and how it is cut: prompts of files, parts of a rollout, calls of a velocity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pave_grpo as pg
import train
from zoo.training import costs, policies, prompts


@st.composite
def rollouts(draw):
    """A velocity with parameters that knows its prompt, a rollout of either mode, its advantages, float64."""
    P, n, G = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    seed, shared = draw(st.integers(0, 10**6)), draw(st.booleans())
    net = torch.nn.Linear(4, 2).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def velocity(x, t, c):
        return torch.tanh(net(torch.cat([x, t[:, None], c[:, None].double()], 1)))

    process = pg.Process(pg.schedule(4, 2.0), draw(st.sampled_from(["flow_sde", "cps"])), 0.7)
    noise = pg.draw_noise([generator] * P, G, (2,), n, own_start=not shared, dtype=torch.float64)
    sample = pg.rollout_shared_anchor if shared else pg.rollout_independent
    rollout = sample(velocity, process, noise, tuple(range(n)))
    return net, velocity, rollout, pg.group_advantages(rollout.x_0.square().sum(-1))


def gradient(net, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@given(
    rollouts(),
    st.integers(0, 40),
    st.sampled_from(["paper", "matched"]),
    st.sampled_from([0.0, 0.5]),
)
def test_the_parts_of_a_rollout_add_up_to_its_loss(made, batch, form, kl):
    """sum share * loss(part) is the loss and has its gradient, to float64 rounding; no part is larger than asked."""
    net, velocity, rollout, A = made
    how = {
        "factors": (2, 3),
        "form": form,
        "kl": kl,
        "reference": (lambda x, t, c: 0.9 * velocity(x, t, c).detach()) if kl else None,
    }
    whole = pg.policy_loss(velocity, rollout, A, **how).loss
    total, states = 0.0, 0
    size = costs.part_sizes(*rollout.x_t.shape[:3], batch)  # what the cost of a run is counted with
    passes = [part.rollout.x_t.shape[:3].numel() for part in train.parts_of(rollout, A, batch)]
    assert len(passes) == math.prod(math.ceil(z / s) for z, s in zip(rollout.x_t.shape, size))
    assert max(passes) == math.prod(size)
    for part in train.parts_of(rollout, A, batch):
        first = part.prompts.start
        shifted = lambda v, first=first: None if v is None else (lambda x, t, c: v(x, t, c + first))
        result = pg.policy_loss(
            shifted(velocity),
            part.rollout,
            part.advantages,
            **{**how, "reference": shifted(how["reference"])},
        )
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

    def velocity(x, t, c):
        seen.append(len(x))
        return x * t[:, None] + c[:, None]

    x, t, c = (
        torch.randn(n, 3, generator=g),
        torch.rand(n, generator=g),
        torch.randint(5, (n,), generator=g),
    )
    assert torch.equal(train.chunked(velocity, rows)(x, t, c), x * t[:, None] + c[:, None])
    assert sum(seen) == n and max(seen) <= (rows or n)


def test_a_prompt_file_is_accounted_for_line_by_line(tmp_path):
    """Distinct prompts in their order; empty lines and repetitions are reported with their number, nothing else is."""
    path = tmp_path / "prompts.txt"
    path.write_text(" a cat\n\na dög\na cat \n   \na cat on a mat\n", encoding="utf-8")
    found, report = prompts.read(path)
    assert found == ["a cat", "a dög", "a cat on a mat"]
    assert report == [
        f"{path}, line 2: empty, left out",
        f"{path}, line 4: 'a cat' is line 1 again, left out",
        f"{path}, line 5: empty, left out",
    ]
    path.write_bytes("\ufeffa bird\n".encode())  # a byte order mark is no part of a prompt
    assert prompts.read(path) == (["a bird"], [])
    for content, said in ((b"\n\n", "at least one prompt"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            prompts.read(path)


def test_shown_prompts_are_of_all_kinds_and_few_are_enough():
    """Eight of the embedded world, kinds in equal parts; a file of one prompt shows one."""
    world, policy = prompts.Prompts(), policies.Embedded()
    shown, noise = world.shown(policy.shape, policy.kind)
    kinds = [policy.kind(p) for p in shown]
    assert len(set(shown)) == 8 and noise.shape == (8, 4, 3, 32, 32)
    assert {kinds.count(kind) for kind in ("count", "conjunction", "relation")} == {2, 3}
    assert prompts.Prompts(("a",), ("b",)).shown((2,), lambda p: "")[1].shape == (1, 4, 2)


def test_the_average_is_the_recursion():
    """theta_ema <- d theta_ema + (1 - d) theta, kept apart from theta, and swapped in and out exactly."""
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
