"""LoRA on tiny pipelines: the first policy, the reference, the KL, and what plain diffusers loads."""

import pytest
import torch
from diffusers import DiffusionPipeline

import pave_grpo as pg
from zoo.released import pipeline as diffusion
from zoo.released import random_pipelines as pipelines
from zoo.released import tuning

FAMILIES = {"sd3": pipelines.sd3, "flux": lambda folder: pipelines.flux(folder, True)}
PROMPTS = ["two red circles", "a dog"]


def loaded(name, folder, dtype=torch.float32):
    path = FAMILIES[name](folder)
    flow = diffusion.load(str(path), dtype)
    return path, flow, flow.velocity(flow.encode(PROMPTS), 32, 32, 3.5 if flow.is_flux else 1.0)


def stirred(tuned):
    """Adapters away from zero, as after some updates."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in tuned:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def sampled(flow, velocity):
    noise = torch.randn(2, *flow.shape(32, 32), generator=torch.Generator().manual_seed(1))
    return noise, pg.ode_sample(velocity, flow.sigmas(3, 32, 32), noise)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_start_at_the_released_model_and_the_reference_stays_there(name, tmp_path):
    """B = 0: the same samples, bit for bit; after updates other samples, and with adapters off the released ones."""
    _, flow, velocity = loaded(name, tmp_path)
    before = sampled(flow, velocity)[1]
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    assert torch.equal(sampled(flow, velocity)[1], before)
    assert tuned and all(p.dtype == torch.float32 and p.requires_grad for p in tuned)
    assert sum(p.requires_grad for p in flow.transformer.parameters()) == len(tuned)
    stirred(tuned)
    assert (sampled(flow, velocity)[1] - before).abs().max() > 1e-3
    with tuning.reference(flow):
        assert torch.equal(sampled(flow, velocity)[1], before)
    assert (sampled(flow, velocity)[1] - before).abs().max() > 1e-3  # and on again


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_loads_what_is_saved(name, tmp_path):
    """load_lora_weights into a fresh pipeline gives our latents, with alpha twice the rank: its scaling is not lost."""
    path, flow, velocity = loaded(name, tmp_path)
    released = sampled(flow, velocity)[1]
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    stirred(tuned)
    noise, ours = sampled(flow, velocity)
    tuning.save_lora(flow, tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(str(path), dtype=torch.float32)
    for module in (pipe.text_encoder, pipe.text_encoder_2):
        module.eval()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    pipe.set_progress_bar_config(disable=True)
    guidance = 3.5 if flow.is_flux else 1.0
    with torch.no_grad():
        theirs = pipe(
            PROMPTS,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="latent",
        ).images
    assert (theirs - ours).abs().max() <= 1e-3 * (ours - released).abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_adapters_alone_with_a_kl_that_has_a_gradient(name, tmp_path):
    """policy_loss with the reference: gradients reach every adapter and nothing else, and the KL's own is not zero."""
    _, flow, velocity = loaded(name, tmp_path)
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    stirred(tuned)
    process = pg.Process(pg.schedule(4, 3.0), "flow_sde", 0.8)
    noise = pg.draw_noise(
        [torch.Generator().manual_seed(i) for i in range(2)], 3, flow.shape(32, 32), 1
    )
    rollout = pg.rollout_shared_anchor(velocity, process, noise, (1,))

    def released(x, t, c):
        with tuning.reference(flow):
            return velocity(x, t, c)

    result = pg.policy_loss(
        velocity, rollout, torch.zeros(2, 1, 3), kl=1.0, reference=released
    )  # no reward: KL alone
    result.loss.backward()
    assert result.kl > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in tuned)
    assert sum(p.grad.norm() for p in tuned) > 0
    assert all(p.grad is None for p in flow.transformer.parameters() if not p.requires_grad)


def test_a_bfloat16_model_has_float32_adapters(tmp_path):
    """Small updates survive: the master weights of what is trained are float32, and the model runs."""
    _, flow, velocity = loaded("flux", tmp_path, torch.bfloat16)
    tuned = tuning.add_lora(flow, rank=2, alpha=4)
    assert {p.dtype for p in tuned} == {torch.float32} and flow.transformer.dtype == torch.bfloat16
    assert sampled(flow, velocity)[1].isfinite().all()


def test_the_same_seed_gives_the_same_adapters_and_bad_arguments_one_line(tmp_path):
    """Adapters do not depend on the global generator."""
    made = []
    for i, stir in enumerate((1, 2)):
        torch.manual_seed(stir)
        made.append(tuning.add_lora(loaded("sd3", tmp_path / str(i))[1], rank=2, alpha=2, seed=7))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    flow = loaded("sd3", tmp_path / "c")[1]
    for arguments, message in (
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"targets": ["x"]}, "name no matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            tuning.add_lora(flow, **arguments)
