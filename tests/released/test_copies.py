"""What is cast, what is moved, and where the host waits: counted by the operators that run."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pave_grpo as pave
from zoo.released import families, tuning
from zoo.training import policies
from zoo.training.draw import chunked

GUIDANCES = {"sd3": 4.5, "flux": 3.5}
CPU, META = torch.device("cpu"), torch.device("meta")
PROMPTS = ["a dog", "two cats", "a house"]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Made(TorchFunctionMode):
    """Counts tensors made of Python numbers away from the CPU, of which no operator tells."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.waits["made"] += out.device.type != "cpu"
        return out


class Seen(TorchDispatchMode):
    """Counts casts, and calls in which the host waits for a device.

    These read a number from a device other than the CPU, or copy between two devices and do not say
    non_blocking, or copy to the CPU. The meta device stands for one that is not here: a number read
    from it is 1, and a copy from it an error.
    """

    def __init__(self):
        super().__init__()
        self.casts, self.waits = 0, Counter()
        self.made = Made(self.waits)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [z for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero") and given[0].device.type != "cpu":
            self.waits[name] += 1
            if name == "_local_scalar_dense" and given[0].is_meta:
                return 1
        out = func(*args, **kwargs)
        if name == "_to_copy":
            self.casts += given[0].dtype != out.dtype
        if name in ("_to_copy", "copy_"):
            source = given[-1]
            late = kwargs.get("non_blocking") or args[2:] == (True,)
            moved = source.device != out.device
            self.waits[name] += moved and not (late and source.device.type == "cpu")
        return out


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=CUDA)])
def test_the_counter_sees_where_the_host_waits(device):
    """One wait in each of these calls, and none in those."""
    here, there = torch.ones(2), torch.ones(2, device=device)
    into = torch.empty(2, device=device)
    waits = [
        lambda: there.sum().item(),
        lambda: bool((there > 0).all()),
        lambda: here.to(device),
        lambda: into.copy_(here),
        lambda: torch.tensor([1.0, 2.0], device=device),
    ]
    if device == "cuda":
        waits.append(there.cpu)  # from the meta device there is nothing to copy
    for wait in waits:
        with Seen() as seen:
            wait()
        assert sum(seen.waits.values()) == 1
    with Seen() as seen:
        here.to(device, non_blocking=True)
        into.copy_(here, non_blocking=True)
        into.copy_(there).double().float()
        here.sum().item()
        torch.arange(3, device=device)
    assert not sum(seen.waits.values()) and seen.casts == 2


# ---- Casts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", GUIDANCES)
def test_peft_casts_nothing_that_autocast_casts(folders, name, checkpointing):
    """Two casts fewer a matrix, in a block computed again too; output and gradients bit for bit."""
    flow = families.load(str(folders[name]), torch.bfloat16, autocast=True, bars=False)
    if checkpointing:
        flow.transformer.enable_gradient_checkpointing()
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in tuned:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    texts, empty = flow.encode(PROMPTS), flow.encode_empty(GUIDANCES[name])
    velocity = flow.velocity(texts, 32, 32, GUIDANCES[name], empty)
    x = torch.randn(2, *flow.shape(32, 32), generator=generator)
    adapted = tuning.matrices(flow.transformer, [z + ".base_layer" for z in flow.lora_targets])

    def run():
        for p in tuned:
            p.grad = None
        with Seen() as forward:
            v = velocity(x, torch.tensor([0.9, 0.5]), torch.tensor([1, 0]))
        with Seen() as backward:
            v.square().sum().backward()
        return [v.detach(), *(p.grad for p in tuned)], forward.casts, backward.casts

    ours, forward, backward = run()
    for key in adapted:
        layer = flow.transformer.get_submodule(key.removesuffix(".base_layer"))
        layer.cast_input_dtype_enabled = True
    peft, peft_forward, peft_backward = run()
    assert all(torch.equal(a, b) for a, b in zip(ours, peft, strict=True))
    assert all(z.any() for z in ours[1:3])
    fewer = 2 * len(adapted)
    assert peft_forward - forward == fewer > 0
    assert peft_backward - backward >= (fewer if checkpointing else 1)


# ---- Moves ---------------------------------------------------------------------------------------


def loaded(folders, name, device):
    """A policy on adapters. The meta device cannot load or autocast: what is on it is moved."""
    path, guidance = str(folders[name]), GUIDANCES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = policies.Released(path, size=(32, 32), guidance=guidance, rank=2, dtype=dtype)
    policy.load(PROMPTS, CPU if device == META else device)
    if device == META:
        policy.device = device
        policy.empty = policy.empty and policy.empty.to(device)
        policy.network.to(device)
    return policy


@contextmanager
def no_waits(device):
    """Within, the host waits nowhere: what torch itself says of CUDA, and what Seen counts."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Seen() as seen:
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not sum(seen.waits.values()), seen.waits


@pytest.mark.parametrize("name", GUIDANCES)
def test_texts_are_moved_once_a_rollout(folders, name):
    """Tokens and pooled for all its velocities, of parts and of the reference too."""
    policy = loaded(folders, name, META)
    x = torch.empty(2, *policy.shape, device=META)
    at = x, torch.empty(2, device=META), torch.zeros(2, dtype=torch.long, device=META)

    def ask(*prompts):
        with Seen() as seen:
            for velocity in (policy.velocity(prompts), policy.reference_velocity(prompts)):
                velocity(*at)
                velocity(*at)
        return sum(seen.waits.values())

    assert ask("a dog", "two cats", "a dog") == 2
    assert [ask("a dog"), ask("two cats", "a dog"), ask("two cats")] == [0, 0, 0]
    assert ask("two cats", "a house") == 2
    velocity = policy.flow.velocity(policy.texts, 32, 32, GUIDANCES[name], policy.empty)
    waits = []
    for _ in range(3):
        with Seen() as seen:
            velocity(*at)
        waits.append(sum(seen.waits.values()))
    assert waits == [2, 0, 0]  # texts that lie elsewhere


@pytest.mark.parametrize("name", GUIDANCES)
def test_rows_are_told_their_own_prompts(folders, name):
    """Of a rollout's prompts, some, twice, in any order: the texts themselves, bit for bit."""
    policy = loaded(folders, name, CPU)
    x = torch.randn(3, *policy.shape, generator=torch.Generator().manual_seed(0))
    t, prompt = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([2, 0, 1])
    direct = policy.flow.velocity(policy.texts, 32, 32, GUIDANCES[name], policy.empty)
    with torch.no_grad():
        for asked in (PROMPTS[:2], PROMPTS[::-1], PROMPTS[1:] * 2, PROMPTS[:1] * 3):
            own = torch.tensor([PROMPTS.index(asked[i % len(asked)]) for i in prompt.tolist()])
            told = policy.velocity(asked)(x, t, prompt % len(asked))
            assert torch.equal(told, direct(x, t, own))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", GUIDANCES)
def test_nobody_waits_inside_a_sampling_loop(folders, name, device):
    """Groups, chains and ODE samples, in chunks of rows."""
    device = torch.device(device)
    policy = loaded(folders, name, device)
    velocity = chunked(policy.velocity(PROMPTS[:2]), 3)
    process = pave.Process(policy.grid(4), "flow_sde", 0.8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = pave.draw_noise(generators, 3, policy.shape, 2, device=device)
    velocity(noise.x_1[:, 0], torch.ones(2, device=device), torch.arange(2, device=device))
    with no_waits(device):
        pave.rollout_shared_anchor(velocity, process, noise, (0, 2))
        pave.rollout_independent(velocity, process, noise, (0, 2))
        pave.ode_sample(velocity, process.grid, noise.x_1[:, 0])
