"""A sharded network whose weights are gathered once to sample: within, after, and after errors.

FSDP2 is real here, on one rank. What two ranks exchange is counted in test_runs.py.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import pave_grpo as pave
import train
from zoo.released import tuning
from zoo.training import policies
from zoo.training.command_line import parse
from zoo.training.draw import draw
from zoo.training.options import policy_of
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")


class Tower(nn.Module):
    """Blocks between two matrices, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.last(x).float()


@pytest.fixture(scope="module")
def mesh():
    """Of one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def tower(mesh):
    """A sharded one that computes in bfloat16."""
    torch.manual_seed(0)
    network = Tower()
    tuning.shard(network, torch.bfloat16, mesh)
    return network


X = torch.linspace(-1, 1, 8).view(2, 4)


@torch.no_grad()
def plain(network):
    """What it gives when every call gathers."""
    return network(X)


@torch.no_grad()
def sampled(network):
    """What it gives in the second call of a rollout."""
    with tuning.gathered(network):
        network(X)
        return network(X)


def slices(network):
    """How many of its weights are slices, of how many."""
    held = list(network.parameters())
    return sum(isinstance(p, DTensor) for p in held), len(held)


@pytest.mark.parametrize("warm", [False, True])
def test_within_all_weights_are_there(tower, warm):
    """In the dtype of computation, through calls; before and after they are float32 slices.

    Also where no call has come before, which is when FSDP2 finds its root.
    """
    if warm:
        plain(tower)
    numbers = sum(p.numel() for p in tower.parameters())
    assert slices(tower) == (10, 10)
    with tuning.gathered(tower):
        for _ in range(2):
            assert slices(tower) == (0, 10)
            assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
            assert sum(p.nbytes for p in tower.parameters()) == 2 * numbers
            plain(tower)
    assert slices(tower) == (10, 10) and {p.dtype for p in tower.parameters()} == {torch.float32}


def test_it_gives_the_same_numbers_and_later_gradients(tower):
    """Bit for bit; in training every block is cut again after its forward."""
    velocity = plain(tower)
    tower(X).square().sum().backward()
    gradients = [p.grad.full_tensor() for p in tower.parameters()]
    assert any(g.abs().max() > 0 for g in gradients)
    tower.zero_grad()
    assert torch.equal(sampled(tower), velocity)
    loss = tower(X).square().sum()
    assert slices(tower) == (10, 10)
    loss.backward()
    for p, gradient in zip(tower.parameters(), gradients, strict=True):
        assert torch.equal(p.grad.full_tensor(), gradient)


def between_calls(tower, patch):
    raise KeyboardInterrupt


def in_a_block(tower, patch):
    """Inside a call, where FSDP2 believes that a forward is going on."""

    def broken(x):
        raise KeyboardInterrupt

    patch.setattr(tower.blocks[1], "forward", broken)
    tower(X)


@pytest.mark.parametrize("fails", [between_calls, in_a_block])
def test_after_an_error_all_are_slices_again(tower, fails, monkeypatch):
    """Also of blocks that the error stopped in their forward."""
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), tuning.gathered(tower):
        fails(tower, monkeypatch)
    assert slices(tower) == (10, 10)


def test_after_a_gather_that_fails_all_are_slices_again(tower, monkeypatch):
    """Where memory lacks for the rest of them."""

    def lacking():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tower.blocks[2], "unshard", lacking)
    with pytest.raises(torch.OutOfMemoryError), tuning.gathered(tower):
        pytest.fail("it went on")
    assert slices(tower) == (10, 10)


def test_the_next_rollout_has_the_weights_of_its_time(tower):
    """After an optimiser's step, in an average and after it."""
    tuned = list(tower.parameters())
    average = policies.EMA(tuned, 0.5)
    first = sampled(tower)
    tower(X).square().sum().backward()
    torch.optim.SGD(tuned, 0.5).step()
    moved = sampled(tower)
    assert torch.equal(moved, plain(tower)) and not torch.equal(moved, first)
    with average.applied():
        assert torch.equal(sampled(tower), first)
    assert torch.equal(sampled(tower), moved)


def test_a_whole_network_stays_as_it_is():
    """On one rank nothing is sharded."""
    network = Tower()
    held = list(network.parameters())
    with tuning.gathered(network):
        assert all(a is b for a, b in zip(network.parameters(), held, strict=True))
    assert all(a is b for a, b in zip(network.parameters(), held, strict=True))


def test_a_policy_gathers_where_it_is_told(folders, monkeypatch):
    """Its own network, and only then."""
    asked = []
    monkeypatch.setattr(tuning, "gathered", asked.append)
    how = {"size": (32, 32), "guidance": 4.5, "tune": "full", "world": 2}
    for told in (False, True):
        policy = policies.Released(str(folders["sd3"]), gather_rollouts=told, **how)
        policy.network = "its own"
        policy.gathered()
        assert asked == ["its own"] * told


# ---- Where a run samples -------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
def test_rollouts_and_drawing_are_within_and_nothing_else(monkeypatch):
    """Decoding and scoring, which need memory themselves, are outside."""
    line = "--prompts-per-iteration 1 --group-size 2 --steps 3 --sde-steps 0 --device cpu"
    o = parse(line.split())
    policy, data, ranks = policy_of(o), Prompts(), Ranks(0, 1, CPU)
    seen, inside = [], []

    @contextmanager
    def gathered():
        inside.append(True)
        try:
            yield
        finally:
            inside.clear()

    def noted(name, job):
        def done(*args, **how):
            seen.append((name, bool(inside)))
            return job(*args, **how)

        return done

    monkeypatch.setattr(policy, "gathered", gathered)
    monkeypatch.setattr(policy, "decode", noted("decode", policy.decode))
    monkeypatch.setattr(policy.network, "forward", noted("network", policy.network.forward))
    monkeypatch.setattr(pave, "policy_loss", noted("loss", pave.policy_loss))
    draw(o, policy, ["a red circle"], torch.zeros(1, *policy.shape), 2, CPU)
    assert seen == [("network", True)] * 2 + [("decode", False)]
    seen.clear()
    rewards, _ = train.loaded(o, policy, data, ranks)
    seen.clear()
    optimizer, _ = train.optimizer_of(o, policy.tuned)
    train.iterate(o, 1, policy, rewards, data, optimizer, None, ranks)
    sampling = seen.index(("decode", False))
    assert seen[:sampling] == [("network", True)] * 3
    assert ("loss", False) in seen[sampling:] and ("network", True) not in seen[sampling:]
