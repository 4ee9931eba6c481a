"""policies.Released: the reference, what batch flags bound, SD3 without T5, grids."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import pave_grpo as pave
import train
from zoo.released import families
from zoo.training import policies
from zoo.training.command_line import parse
from zoo.training.options import policy_of, prompts_of
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_reference_stays_where_the_policy_began(folders, tune, dtype):
    """After a step the reference is the initial policy bit for bit, and the KL has a gradient."""
    policy = policies.Released(
        str(folders["sd3"]),
        size=(32, 32),
        guidance=4.5,
        tune=tune,
        rank=2,
        alpha=4,
        dtype=dtype,
        reference=True,
    )
    policy.load(["a dog", "two cats"], CPU)
    computed = []

    def note_dtype(module, inputs, output):
        computed.append(output.dtype)

    for module in policy.network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note_dtype)
    asked = ["two cats", "a dog", "two cats"]
    x = torch.randn(3, *policy.shape, generator=torch.Generator().manual_seed(0))
    at = x, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        before, reference = policy.velocity(asked)(*at), policy.reference_velocity(asked)(*at)
        assert {p.dtype for p in policy.tuned} == {torch.float32} and before.dtype == torch.float32
        assert set(computed) == {dtype}  # adapters and all
        close = dtype == torch.bfloat16 and (reference - before).abs().mean() < 0.02
        assert torch.equal(reference, before) or close
        for p in policy.tuned:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(policy.reference_velocity(asked)(*at), reference)
        assert (policy.velocity(asked)(*at) - before).abs().max() > 1e-3

    velocity, released = policy.velocity(asked[:2]), policy.reference_velocity(asked[:2])
    process = pave.Process(policy.grid(4), "flow_sde", 0.8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = pave.draw_noise(generators, 2, policy.shape, 1)
    rollout = pave.rollout_shared_anchor(velocity, process, noise, (1,))
    advantages = torch.zeros(2, 1, 2)
    result = pave.policy_loss(velocity, rollout, advantages, kl=1.0, reference=released)
    result.loss.backward()
    assert result.kl > 0 and sum(p.grad.norm() for p in policy.tuned if p.grad is not None) > 0


def test_every_batch_flag_bounds_its_calls(flags, monkeypatch):
    """Rows of the network, the VAE and the reward in a call are what the flags say.

    Blocks are computed again with --checkpointing, and text encoders are gone.
    """
    batches = "--rollout-batch 3 --decode-batch 4 --reward-batch 5 --update-batch 1"
    o = parse(flags("sd3", f"{batches} --rank 2 --checkpointing"))
    data, ranks, policy = prompts_of(o), Ranks(0, 1, CPU), policy_of(o)
    seen = {"sampled": [], "trained": [], "vae": [], "reward": [], "block": []}

    def mean_colour(images, prompts):
        seen["reward"].append(len(images))
        return images.mean((1, 2, 3))

    monkeypatch.setattr("zoo.rewards.example.warmth", mean_colour)
    reward, _ = train.loaded(o, policy, data, ranks)
    assert seen.pop("reward") == [1]  # a trial
    seen["reward"] = []
    vae = policy.flow.pipe.vae
    decode = vae.decode

    def kind():
        return "trained" if torch.is_grad_enabled() else "sampled"

    def note_rows(module, args, given):
        seen[kind()].append(len(given["hidden_states"]) // 2)

    def note_block(module, args):
        seen["block"].append(kind())

    def noted_decode(latents, **how):
        seen["vae"].append(len(latents))
        return decode(latents, **how)

    policy.network.register_forward_pre_hook(note_rows, with_kwargs=True)
    policy.network.transformer_blocks[0].register_forward_pre_hook(note_block)
    monkeypatch.setattr(vae, "decode", noted_decode)
    train.iterate(o, 1, policy, reward, data, torch.optim.SGD(policy.tuned, 0.1), None, ranks)
    assert seen["sampled"] and max(seen["sampled"]) == 3
    assert seen["trained"] == [1, 1, 1, 1] * 4  # of a state: v_0, one more of k = 2, two of k = 3
    assert seen["vae"] == [4, 4, 4] and seen["reward"] == [5, 5, 2]
    twice = 2 * len(seen["trained"])  # once forward, once more backward
    assert seen["block"].count("trained") == twice
    assert all(getattr(policy.flow.pipe, name) is None for name in policy.flow.encoders)


def test_an_sd3_without_t5_is_one_too(folders, tmp_path):
    """A pipeline saved without its third encoder is loaded so, and its words count as nothing."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        str(folders["sd3"]), text_encoder_3=None, tokenizer_3=None
    )
    pipe.save_pretrained(tmp_path)
    how = {"size": (32, 32), "guidance": 4.5, "dtype": torch.float32, "rank": 2}
    policy = policies.Released(str(tmp_path), **how)
    policy.load(["a dog", "word " * 300], CPU)
    assert [line.split()[-1] for line in policy.cut_off] == ["77"]
    x, t, prompt = torch.zeros(1, *policy.shape), torch.tensor([0.5]), torch.tensor([0])
    with torch.no_grad():
        assert policy.velocity(["a dog"])(x, t, prompt).isfinite().all()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_grid_is_shifted_or_the_pipelines(folders, name):
    """--sigmas pipeline takes the scheduler's own grid at this size, shifted the paper's."""
    folder, how = str(folders[name]), {"size": (32, 64), "guidance": 3.5, "shift": 3.0}
    shifted = policies.Released(folder, sigmas="shifted", **how)
    own = policies.Released(folder, sigmas="pipeline", **how)
    assert torch.equal(shifted.grid(4), pave.schedule(4, 3.0))
    assert torch.equal(own.grid(4), families.load(folder).sigmas(4, 32, 64))
