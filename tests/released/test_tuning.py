"""LoRA on tiny pipelines: the first policy, the reference, the KL, what plain diffusers loads."""

import pytest
import torch
from diffusers import DiffusionPipeline

import pave_grpo as pave
from zoo.released import families, tuning

GUIDANCES = {"sd3": 1.0, "flux": 3.5}
MATRICES = {"sd3": 12 + 9, "flux": 12 + 5}  # an inner and a last block; a joint and a single one
PROMPTS = ["two red circles", "a dog"]


def loaded(folders, name, dtype=torch.float32):
    flow = families.load(str(folders[name]), dtype)
    return flow, flow.velocity(flow.encode(PROMPTS), 32, 32, GUIDANCES[name])


def stirred(tuned):
    """Adapters away from zero, as after some updates."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in tuned:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def noise_of(flow):
    return torch.randn(2, *flow.shape(32, 32), generator=torch.Generator().manual_seed(1))


def sampled(flow, velocity):
    return pave.ode_sample(velocity, flow.sigmas(3, 32, 32), noise_of(flow))


@pytest.mark.parametrize("name", GUIDANCES)
def test_adapters_start_at_the_released_model_and_the_reference_stays_there(folders, name):
    """B = 0: the same samples bit for bit; after updates others, with adapters off the first."""
    flow, velocity = loaded(folders, name)
    before = sampled(flow, velocity)
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    assert torch.equal(sampled(flow, velocity), before)
    assert len(tuned) == 2 * MATRICES[name]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in tuned)
    assert sum(p.requires_grad for p in flow.transformer.parameters()) == len(tuned)
    stirred(tuned)
    assert (sampled(flow, velocity) - before).abs().max() > 1e-3
    with tuning.reference(flow):
        assert torch.equal(sampled(flow, velocity), before)
    assert (sampled(flow, velocity) - before).abs().max() > 1e-3  # and on again


def test_an_adapter_adds_its_product(folders):
    """W x + (alpha / rank) B A x, for a matrix as for all."""
    flow, _ = loaded(folders, "sd3")
    stirred(tuning.add_lora(flow, rank=4, alpha=8))
    layer = flow.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
    product = layer.lora_B["default"](layer.lora_A["default"](x))
    assert product.abs().max() > 1e-2
    assert torch.allclose(layer(x), layer.base_layer(x) + 8 / 4 * product, atol=1e-6)


@pytest.mark.parametrize("name", GUIDANCES)
def test_plain_diffusers_loads_what_is_saved(folders, name, tmp_path):
    """load_lora_weights into a fresh pipeline gives our latents, with alpha twice the rank."""
    flow, velocity = loaded(folders, name)
    released = sampled(flow, velocity)
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    stirred(tuned)
    ours = sampled(flow, velocity)
    tuning.save_lora(flow, tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(str(folders[name]), dtype=torch.float32)
    for module in (pipe.text_encoder, pipe.text_encoder_2):
        module.eval()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipe(
            PROMPTS,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=GUIDANCES[name],
            latents=noise_of(flow),
            output_type="latent",
        ).images
    assert (theirs - ours).abs().max() <= 1e-3 * (ours - released).abs().max()


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_step_on_adapters_alone_with_a_kl_that_has_a_gradient(folders, name):
    """With the reference and no reward, gradients reach every adapter and nothing else."""
    flow, velocity = loaded(folders, name)
    tuned = tuning.add_lora(flow, rank=4, alpha=8)
    stirred(tuned)
    process = pave.Process(pave.schedule(4, 3.0), "flow_sde", 0.8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = pave.draw_noise(generators, 3, flow.shape(32, 32), 1)
    rollout = pave.rollout_shared_anchor(velocity, process, noise, (1,))

    def released(x, t, prompt):
        with tuning.reference(flow):
            return velocity(x, t, prompt)

    advantages = torch.zeros(2, 1, 3)  # no reward: the KL alone
    result = pave.policy_loss(velocity, rollout, advantages, kl=1.0, reference=released)
    result.loss.backward()
    assert result.kl > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in tuned)
    assert sum(p.grad.norm() for p in tuned) > 0
    assert all(p.grad is None for p in flow.transformer.parameters() if not p.requires_grad)


def test_a_bfloat16_model_has_float32_adapters(folders):
    """Small updates survive: masters of what is trained are float32, and the model runs."""
    flow, velocity = loaded(folders, "flux", torch.bfloat16)
    tuned = tuning.add_lora(flow, rank=2, alpha=4)
    assert {p.dtype for p in tuned} == {torch.float32} and flow.transformer.dtype == torch.bfloat16
    assert sampled(flow, velocity).isfinite().all()


def test_the_same_seed_gives_the_same_adapters(folders):
    """Adapters do not depend on the global generator."""
    made = []
    for stir in (1, 2):
        torch.manual_seed(stir)
        made.append(tuning.add_lora(loaded(folders, "sd3")[0], rank=2, alpha=2, seed=7))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_bad_arguments_are_one_line(folders):
    """A rank, a scaling and targets that cannot be."""
    flow = families.outline(str(folders["sd3"]))
    with pytest.raises(ValueError, match="rank=0"):
        tuning.add_lora(flow, rank=0, alpha=1)
    with pytest.raises(ValueError, match="alpha=0"):
        tuning.add_lora(flow, rank=1, alpha=0)
    with pytest.raises(ValueError, match="name no matrix"):
        tuning.matrices(flow.transformer, ["x"])
