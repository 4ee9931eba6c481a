"""SD3 and FLUX as velocities: the pipelines' own latents and pictures, prompt by prompt."""

import json

import pytest
import torch

import pave_grpo as pg
import verify_equivalence as oracle
from zoo.released import pipeline as diffusion
from zoo.released import random_pipelines as pipelines

PROMPTS = ["two red circles", "a square", "a dog"]
FAMILIES = {
    "sd3": pipelines.sd3,
    "flux-dev": lambda f: pipelines.flux(f, True),
    "flux-schnell": lambda f: pipelines.flux(f, False),
}


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """Each family, saved as a folder and loaded from it."""
    return {
        name: diffusion.load(str(make(tmp_path_factory.mktemp(name))))
        for name, make in FAMILIES.items()
    }


def guidances(name):
    return {"sd3": (1.0, 4.5), "flux-dev": (3.5, 1.0), "flux-schnell": (0.0,)}[name]


def velocity_of(flow, prompts, height, width, guidance):
    empty = flow.encode([""]) if not flow.is_flux and guidance > 1 else None
    return flow.velocity(flow.encode(prompts, batch=2), height, width, guidance, empty)


@pytest.mark.parametrize(("name", "guidance"), [(n, g) for n in FAMILIES for g in guidances(n)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64)])
def test_our_ode_gives_the_pipelines_latents(flows, name, guidance, height, width):
    """Given the pipeline's sigmas, noise, prompts and guidance, ode_sample is the pipeline, to float32 rounding.

    A wrong timestep, packing, id, pooled embedding or guidance changes latents by far more than the bound: 4 steps of
    some 1e3 roundings of numbers of order 1, magnified by guidance.
    """
    flow = flows[name]
    shape = flow.shape(height, width)
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = flow.pipe(
            PROMPTS,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="latent",
        ).images
    grid = flow.sigmas(4, height, width)
    x = pg.ode_sample(velocity_of(flow, PROMPTS, height, width, guidance), grid, noise)
    assert x.shape == wanted.shape and (x - noise).abs().mean() > 0.01  # the network does something
    assert (x - wanted).abs().max() <= 4e3 * torch.finfo(torch.float32).eps * max(
        1.0, guidance
    ) * wanted.abs().max()
    with torch.no_grad():
        pictures = flow.pipe(
            PROMPTS,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="pt",
        ).images
    assert (flow.decode(x, height, width, batch=2) - pictures).abs().max() <= 1e-3
    assert flow.decode(x, height, width).shape == (3, 3, height, width)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_belong_to_their_prompts(flows, name):
    """Row b of a batch is prompt c[b], whatever the others are; another prompt gives another velocity."""
    flow = flows[name]
    x = torch.randn(3, *flow.shape(32, 32), generator=torch.Generator().manual_seed(1))
    velocity = velocity_of(flow, PROMPTS, 32, 32, guidances(name)[0])
    t = torch.tensor([0.9, 0.5, 0.5])
    with torch.no_grad():
        together = velocity(x, t, torch.tensor([2, 0, 1]))
        for b, c in enumerate((2, 0, 1)):
            alone = velocity(x[b : b + 1], t[b : b + 1], torch.tensor([c]))
            assert (alone - together[b]).abs().max() <= 1e-5
        assert (velocity(x, t, torch.tensor([0, 1, 2])) - together).abs().amax(
            dim=tuple(range(1, x.ndim))
        ).min() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_pave_grpo_runs_on_it(flows, name):
    """A group branches, is scored under k = 1, 2, 3, and the transformer gets a finite gradient."""
    flow = flows[name]
    velocity = velocity_of(flow, PROMPTS[:2], 32, 32, guidances(name)[0])
    process = pg.Process(pg.schedule(4, 3.0), "flow_sde", 0.8)
    noise = pg.draw_noise(
        [torch.Generator().manual_seed(i) for i in range(2)], 3, flow.shape(32, 32), 2
    )
    rollout = pg.rollout_shared_anchor(velocity, process, noise, (0, 2))
    A = pg.group_advantages(rollout.x_0.flatten(3).mean(-1))
    flow.transformer.requires_grad_(True)
    try:
        result = pg.policy_loss(velocity, rollout, A, factors=(2, 3))
        result.loss.backward()
        grads = [p.grad for p in flow.transformer.parameters() if p.grad is not None]
        assert sum(g.norm() for g in grads) > 0 and all(g.isfinite().all() for g in grads)
        assert result.old.sampling_gap < 1e-4  # float32 networks see other batches
    finally:
        flow.transformer.requires_grad_(False)
        flow.transformer.zero_grad()


def test_bfloat16_networks_keep_float32_states(flows, tmp_path):
    """The sampler's arithmetic is float32 whatever the network computes in."""
    flow = diffusion.load(str(pipelines.sd3(tmp_path)), dtype=torch.bfloat16)
    noise = torch.randn(2, *flow.shape(32, 32), generator=torch.Generator().manual_seed(2))
    x = pg.ode_sample(velocity_of(flow, PROMPTS[:2], 32, 32, 1.0), pg.schedule(3), noise)
    y = pg.ode_sample(velocity_of(flows["sd3"], PROMPTS[:2], 32, 32, 1.0), pg.schedule(3), noise)
    assert x.dtype == torch.float32 and 0 < (x - y).abs().max() < 0.1


def test_what_does_not_fit_is_refused(flows, tmp_path):
    """One line each: another family, no pipeline, sizes that do not divide, guidance that the model cannot take."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(
        ValueError, match="is a WanPipeline; must be one of StableDiffusion3Pipeline, FluxPipeline"
    ):
        diffusion.load(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file named model_index\.json"):
        diffusion.load(str(tmp_path / "empty"))
    for name, flow in flows.items():
        with pytest.raises(ValueError, match="size 30 x 32: both must be positive multiples of 4"):
            flow.shape(30, 32)
        wrong = {"sd3": 4.5, "flux-dev": 0.0, "flux-schnell": 3.5}[name]
        with pytest.raises(ValueError, match=f"guidance={wrong}"):
            flow.velocity(flow.encode(["a"]), 32, 32, wrong)


def test_encoders_can_be_dropped(flows, tmp_path):
    """Texts are kept on the CPU; without encoders the velocity still works, and nothing else is lost."""
    flow = diffusion.load(str(pipelines.flux(tmp_path, True)))
    texts = flow.encode(PROMPTS)
    flow.drop_encoders()
    assert flow.pipe.text_encoder is None and flow.pipe.text_encoder_2 is None
    x = torch.randn(1, *flow.shape(32, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        v = flow.velocity(texts, 32, 32, 3.5)(x, torch.tensor([0.5]), torch.tensor([1]))
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize("flags", [["--size", "30", "32"], ["--dtype", "float64"]])
def test_the_oracle_refuses_what_a_pipeline_cannot_do(flags, tmp_path, capsys):
    """One line and status 2, whether found on the command line or on loading."""
    try:
        code = oracle.main(["--model", str(pipelines.sd3(tmp_path)), "--prompt", "a dog", *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and capsys.readouterr().err.strip().count("error:") == 1


@pytest.mark.parametrize(("name", "dtype"), [("sd3", "float32"), ("flux-dev", "bfloat16")])
def test_the_oracle_takes_a_pipeline(name, dtype, tmp_path, capsys):
    """--model FOLDER: attribution and the matched form hold on it, and the comparison is printed step by step."""
    folder = FAMILIES[name](tmp_path)
    code = oracle.main(
        [
            "--model",
            str(folder),
            "--size",
            "32",
            "32",
            "--dtype",
            dtype,
            "--prompt",
            "a dog",
            "a square",
            "--claims",
            "E1",
            "E2",
            "E7",
            "--kernels",
            "flow_sde",
            "--factors",
            "2",
        ]
    )
    assert code == 0, capsys.readouterr().out
    bench = oracle.Bench(
        ("cps",), (2,), model=oracle.Model(str(folder), ("a dog",), getattr(torch, dtype), (32, 32))
    )
    table = oracle.compare(bench, "cps", steps=3)
    assert [row["step"] for row in table] == [0, 1] and all(
        row["group"] > 1 - 1e-5 for row in table
    )
    assert all(abs(sum(share for _, share in row["share"]) - 1) < 1e-2 for row in table)
    assert all((row["off"] == 0) == (dtype == "float32") for row in table)
