"""SD3 and FLUX as velocities: the pipelines' own latents and pictures, prompt by prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import fields, numerics
from zoo.oracle.bench import Bench, Model
from zoo.oracle.comparison import compare
from zoo.released import families
from zoo.released.sd3 import SD3
from zoo.training import policies

PROMPTS = ["two red circles", "a square", "a dog"]
GUIDANCES = {"sd3": (1.0, 4.5), "flux": (3.5, 1.0), "schnell": (0.0,)}
CASES = [(name, guidance) for name, guidances in GUIDANCES.items() for guidance in guidances]


@pytest.fixture(scope="module")
def flows(folders):
    """Each family, loaded from its folder."""
    return {name: families.load(str(folder)) for name, folder in folders.items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def velocity_of(flow, prompts, size, guidance):
    texts, empty = flow.encode(prompts, batch=2), flow.encode_empty(guidance)
    return flow.velocity(texts, *size, guidance, empty)


@pytest.mark.parametrize(("name", "guidance"), CASES)
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_our_ode_gives_the_pipelines_latents(flows, name, guidance, size):
    """Given the pipeline's sigmas, noise, prompts and guidance, ode_sample is the pipeline.

    To float32 rounding: a wrong timestep, packing, id, pooled embedding or guidance changes latents
    by far more than the bound, 4 steps of some 1e3 roundings of numbers of order 1, magnified by
    guidance.
    """
    flow, (height, width) = flows[name], size
    noise = normal(len(PROMPTS), *flow.shape(height, width))

    def pipeline(output):
        return flow.pipe(
            PROMPTS,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type=output,
        ).images

    with torch.no_grad():
        latents, pictures = pipeline("latent"), pipeline("pt")
    grid = flow.sigmas(4, height, width)
    x = pave.ode_sample(velocity_of(flow, PROMPTS, size, guidance), grid, noise)
    assert (
        x.shape == latents.shape and (x - noise).abs().mean() > 0.01
    )  # the network does something
    bound = 4e3 * torch.finfo(torch.float32).eps * max(1.0, guidance)
    assert (x - latents).abs().max() <= bound * latents.abs().max()
    assert (flow.decode(x, height, width, batch=2) - pictures).abs().max() <= 1e-3
    assert flow.decode(x, height, width).shape == (3, 3, height, width)


@pytest.mark.parametrize("name", GUIDANCES)
def test_rows_belong_to_their_prompts(flows, name):
    """Row b of a batch is prompt[b], whatever the others are; another prompt, another velocity."""
    flow = flows[name]
    x, t = normal(3, *flow.shape(32, 32), seed=1), torch.tensor([0.9, 0.5, 0.5])
    velocity = velocity_of(flow, PROMPTS, (32, 32), GUIDANCES[name][0])
    with torch.no_grad():
        together = velocity(x, t, torch.tensor([2, 0, 1]))
        others = velocity(x, t, torch.tensor([0, 1, 2]))
        for row, prompt in enumerate((2, 0, 1)):
            one = slice(row, row + 1)
            alone = velocity(x[one], t[one], torch.tensor([prompt]))
            assert (alone - together[row]).abs().max() <= 1e-5
    assert (others - together).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", GUIDANCES)
def test_pave_grpo_runs_on_it(flows, name):
    """A group branches, is scored under k = 1, 2, 3, and the transformer gets a finite gradient."""
    flow = flows[name]
    velocity = velocity_of(flow, PROMPTS[:2], (32, 32), GUIDANCES[name][0])
    process = pave.Process(pave.schedule(4, 3.0), "flow_sde", 0.8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = pave.draw_noise(generators, 3, flow.shape(32, 32), 2)
    rollout = pave.rollout_shared_anchor(velocity, process, noise, (0, 2))
    advantages = pave.group_advantages(rollout.x_0.flatten(3).mean(-1))
    flow.transformer.requires_grad_(True)
    try:
        result = pave.policy_loss(velocity, rollout, advantages, factors=(2, 3))
        result.loss.backward()
        grads = [p.grad for p in flow.transformer.parameters() if p.grad is not None]
        assert sum(g.norm() for g in grads) > 0 and all(g.isfinite().all() for g in grads)
        assert result.old.sampling_gap < 1e-4  # float32 networks see other batches
    finally:
        flow.transformer.requires_grad_(False)
        flow.transformer.zero_grad()


def test_bfloat16_networks_keep_float32_states(flows, folders):
    """The sampler's arithmetic is float32 whatever the network computes in."""
    halved = families.load(str(folders["sd3"]), dtype=torch.bfloat16)
    noise = normal(2, *halved.shape(32, 32), seed=2)
    x, y = (
        pave.ode_sample(velocity_of(flow, PROMPTS[:2], (32, 32), 1.0), pave.schedule(3), noise)
        for flow in (halved, flows["sd3"])
    )
    assert x.dtype == torch.float32 and 0 < (x - y).abs().max() < 0.1


def test_what_does_not_fit_is_refused(flows, tmp_path):
    """One line each: another family, no pipeline, wrong sizes, guidance the model cannot take."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    known = "is a WanPipeline; must be one of StableDiffusion3Pipeline, FluxPipeline"
    with pytest.raises(ValueError, match=known):
        families.load(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file named model_index\.json"):
        families.load(str(tmp_path / "empty"))
    for name, flow in flows.items():
        with pytest.raises(ValueError, match="size 30 x 32: both must be positive multiples of 4"):
            flow.shape(30, 32)
        wrong = {"sd3": 4.5, "flux": 0.0, "schnell": 3.5}[name]
        with pytest.raises(ValueError, match=f"guidance={wrong}"):
            flow.velocity(flow.encode(["a"]), 32, 32, wrong)


def test_encoders_can_be_dropped(folders):
    """Texts are kept on the CPU; without encoders the velocity still works."""
    flow = families.load(str(folders["flux"]))
    texts = flow.encode(PROMPTS)
    flow.drop_encoders()
    assert flow.pipe.text_encoder is None and flow.pipe.text_encoder_2 is None
    x = normal(1, *flow.shape(32, 32), seed=3)
    with torch.no_grad():
        v = flow.velocity(texts, 32, 32, 3.5)(x, torch.tensor([0.5]), torch.tensor([1]))
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize(("name", "t5"), [("sd3", 256), ("flux", 512)])
def test_a_prompt_that_is_cut_off_is_named(flows, name, t5):
    """Once for each kind of encoder, with what it reads: of T5 what the pipeline asks of it."""
    flow, long = flows[name], "word " * 300
    lines = flow.cut_off(["a dog", long])
    assert [int(line.split()[-1]) for line in lines] == [77, t5]
    assert all(line.startswith("prompt 'word word") for line in lines)
    assert flow.encode([long]).tokens.shape[1] == {"sd3": 77 + t5, "flux": t5}[name]


# ---- Families ------------------------------------------------------------------------------------


def test_the_registry_needs_no_library():
    """What train.py reads of every family costs no import of diffusers, transformers or peft."""
    code = (
        "import sys; from zoo.training import policies; from zoo.released.families import FAMILIES;"
        "print([(z.name, z.preset, z.default_guidance) for z in FAMILIES.values()],"
        "{'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", code]
    printed = subprocess.run(run, cwd=root, check=True, capture_output=True, text=True).stdout
    wanted = "[('sd3', 'paper-sd3', 4.5), ('flux', 'paper-flux', 3.5)] set()"
    assert printed.strip() == wanted


def test_another_family_is_a_class_and_an_entry(folders, monkeypatch):
    """An entry of FAMILIES is what is loaded, named, sized and tuned, without a word elsewhere."""

    class Smaller(SD3):
        name = "smaller"
        lora_targets = ("attn.to_q",)

        def splits(self, guidance):
            return False

    monkeypatch.setitem(families.FAMILIES, "StableDiffusion3Pipeline", Smaller)
    assert families.family_of(str(folders["sd3"])) is Smaller
    policy = policies.Released(str(folders["sd3"]), size=(32, 32), guidance=9.0, rank=2)
    assert policy.name == "smaller" and policy.sizes.rows == 1
    policy.load(["a dog"], torch.device("cpu"))
    assert sum(p.numel() for p in policy.tuned) == policy.sizes.tuned == 2 * 2 * (32 + 32)


# ---- The oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--size", "30", "32"], ["--dtype", "float64"]])
def test_the_oracle_refuses_what_a_pipeline_cannot_do(flags, folders, capsys):
    """One line and status 2, whether found on the command line or on loading."""
    try:
        code = oracle.main(["--model", str(folders["sd3"]), "--prompt", "a dog", *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and capsys.readouterr().err.strip().count("error:") == 1


def test_a_nudged_pipeline_is_another_policy(folders):
    """The copy moves with its own weights, and the original stays."""
    fixture = fields.piped(str(folders["sd3"]), ["a dog"], torch.float32, (32, 32))
    x = torch.randn(1, *fixture.shape)
    t, prompt = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        before = fixture.field(x, t, prompt)
        moved = fields.nudged(fixture.field, 0.01, torch.Generator().manual_seed(0))
        assert not torch.allclose(moved(x, t, prompt), before)
        assert torch.equal(fixture.field(x, t, prompt), before)


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(("name", "dtype"), [("sd3", "float32"), ("flux", "bfloat16")])
def test_the_oracle_takes_a_pipeline(name, dtype, folders, capsys, monkeypatch):
    """--model FOLDER: attribution and the matched form hold on it, and steps are compared."""
    monkeypatch.setattr(numerics, "STEPS", 3)  # whose rounding is told of bfloat16
    folder = str(folders[name])
    flags = f"--size 32 32 --dtype {dtype} --claims E1 E2 E7 E9 --kernels flow_sde --factors 2"
    code = oracle.main(["--model", folder, *flags.split(), "--prompt", "a dog", "a square"])
    assert code == 0, capsys.readouterr().out
    model = Model(folder, ("a dog",), getattr(torch, dtype), (32, 32))
    table = compare(Bench(("cps",), (2,), model=model), "cps", steps=3)
    assert [row["step"] for row in table] == [0, 1]
    for row in table:
        assert row["group"] > 1 - 1e-5
        assert abs(sum(share for _, share in row["share"]) - 1) < 1e-2
        assert (row["off"] == 0) == (dtype == "float32")
