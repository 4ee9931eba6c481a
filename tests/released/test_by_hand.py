"""What of a released model is tuned, sharded, kept and counted, by names and numbers typed here."""

from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.fsdp as fsdp
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)

from zoo.released import families, tuning
from zoo.training import policies

CPU = torch.device("cpu")


@pytest.fixture
def flow(folders):
    """flow(name, **how): a pipeline loaded anew."""

    def loaded(name, dtype=torch.float32, **how):
        return families.load(str(folders[name]), dtype, **how)

    return loaded


# ---- Adapters ------------------------------------------------------------------------------------

JOINT = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
CONTEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
INNER = [*JOINT, *CONTEXT, "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]
SINGLE = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
ADAPTED = {
    # The last block of SD3 has no output for its words.
    "sd3": {
        *(f"transformer_blocks.0.{name}" for name in INNER),
        *(f"transformer_blocks.1.{name}" for name in (*JOINT, *CONTEXT)),
    },
    "flux": {
        *(f"transformer_blocks.0.{name}" for name in INNER),
        *(f"single_transformer_blocks.0.{name}" for name in SINGLE),
    },
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_on_these_matrices(name, flow):
    """Attention and feed-forward of every block, of pictures and of words; nothing outside."""
    loaded = flow(name)
    found = tuning.matrices(loaded.transformer, loaded.lora_targets)
    assert set(found) == ADAPTED[name]
    widths = [matrix.in_features + matrix.out_features for matrix in found.values()]
    assert tuning.lora_size(loaded, 3) == 3 * sum(widths)
    state = torch.get_rng_state()
    tuned = tuning.add_lora(loaded, 3, 6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert sum(p.numel() for p in tuned) == 3 * sum(widths)
    for key, p in loaded.transformer.named_parameters():
        if "lora_B" in key:
            assert not p.any() and p.shape[1] == 3
        if "lora_A" in key:
            assert p.std() > 0 and p.shape[0] == 3


def test_adapters_are_on_again_after_an_error(flow):
    """A reference that fails does not leave the policy at the reference."""
    loaded = flow("sd3")
    tuning.add_lora(loaded, 2, 4)
    layer = loaded.transformer.transformer_blocks[0].attn.to_q
    with suppress(RuntimeError), tuning.reference(loaded):
        assert layer.disable_adapters
        raise RuntimeError("out of memory")
    assert not layer.disable_adapters


def test_an_average_is_taken_out_again_after_an_error():
    """Weights and average are where they were, though what stood between failed."""
    p = torch.nn.Parameter(torch.tensor([4.0]))
    average = policies.EMA([p], 0.5)
    assert average.average[0].item() == 4.0  # it begins at the weights
    with torch.no_grad():
        p.fill_(8.0)
    average.update()
    for _ in range(2):
        with suppress(RuntimeError), average.applied():
            assert (p.item(), average.average[0].item()) == (6.0, 8.0)
            raise RuntimeError("a judge failed")
        assert (p.item(), average.average[0].item()) == (8.0, 6.0)


# ---- Full fine-tuning ----------------------------------------------------------------------------


def test_what_is_sharded_and_how(flow, monkeypatch):
    """Every block and then the whole; gathered in the dtype of computation, averaged in float32.

    Inputs keep their dtype, for times; all is resharded after a forward, for the average's swap.
    """
    calls = []

    def sharded(module, **how):
        calls.append((module, how))

    monkeypatch.setattr(fsdp, "fully_shard", sharded)
    for name in ("sd3", "flux"):
        calls.clear()
        network = flow(name).transformer
        tuning.shard(network, torch.bfloat16, "mesh")
        blocks = [*network.transformer_blocks]
        blocks += [*getattr(network, "single_transformer_blocks", [])]
        assert [module for module, _ in calls] == [*blocks, network]
        for _, how in calls:
            policy = how["mp_policy"]
            assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
            assert not policy.cast_forward_inputs
            assert how["mesh"] == "mesh" and how.get("reshard_after_forward") is True


def test_a_frozen_copy_is_another_network(flow):
    """In the dtype of computation, on the CPU, without gradients, not moved by training."""
    loaded = flow("sd3", torch.bfloat16, master=torch.float32)
    network = loaded.transformer
    assert network.dtype == torch.float32 and loaded.pipe.vae.dtype == torch.bfloat16
    copy = tuning.frozen_copy(loaded, network.state_dict())
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    same = flow("flux")
    kept = tuning.frozen_copy(same, same.transformer.state_dict())
    before = kept.proj_out.weight.clone()
    with torch.no_grad():
        same.transformer.proj_out.weight.add_(1.0)
    assert torch.equal(kept.proj_out.weight, before)


def test_one_rank_writes_the_whole(flow, tmp_path):
    """Every rank helps to gather it; the others write nothing."""
    loaded = flow("sd3")
    tuning.save_full(loaded, tmp_path / "none", main=False)
    assert not (tmp_path / "none").exists()
    tuning.save_full(loaded, tmp_path / "one", main=True)
    assert (tmp_path / "one" / "config.json").is_file()


# ---- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_loaded_pipeline_is_frozen_and_evaluates(name, flow):
    """Every part: dropout would be noise in a log-probability."""
    loaded = flow(name, torch.bfloat16, autocast=True)
    assert (loaded.dtype, loaded.autocast) == (torch.bfloat16, True)
    for part in loaded.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training and part.dtype == torch.bfloat16
            assert not any(p.requires_grad for p in part.parameters())


def test_a_revision_is_asked_of_every_file(folders, monkeypatch):
    """Of index, weights, configurations and scheduler; pickled weights are never read."""
    asked, safe = [], []

    def of_folder(place, name):
        plain = getattr(place, name)

        def noted(path, *args, **how):
            if path != "owner/name":
                return plain(path, *args, **how)
            asked.append((name, how.get("subfolder"), how.pop("revision", None)))
            if place is DiffusionPipeline and name == "from_pretrained":
                safe.append((how.get("use_safetensors"), how.get("trust_remote_code")))
            return plain(str(folders["flux"]), *args, **how)

        monkeypatch.setattr(place, name, noted)

    of_folder(DiffusionPipeline, "load_config")
    of_folder(DiffusionPipeline, "from_pretrained")
    of_folder(AutoencoderKL, "load_config")
    of_folder(FluxTransformer2DModel, "load_config")
    of_folder(FlowMatchEulerDiscreteScheduler, "from_pretrained")
    families.outline("owner/name", "abc")
    parts = {(name, part) for name, part, revision in asked if revision == "abc"}
    assert {("load_config", None), ("load_config", "vae"), ("load_config", "transformer")} <= parts
    assert ("from_pretrained", "scheduler") in parts
    asked.clear()
    families.load("owner/name", revision="abc")
    assert ("from_pretrained", None, "abc") in asked and ("load_config", None, "abc") in asked
    assert all(revision == "abc" for name, part, revision in asked if part is None)
    assert safe == [(True, False)]


def test_a_policy_loads_what_its_options_say(monkeypatch, folders):
    """Masters in float32 for full; products cast where dtypes are mixed; revision and bars."""
    asked = Mock(side_effect=RuntimeError("seen"))
    monkeypatch.setattr(policies.families, "load", asked)
    outline = families.outline(str(folders["sd3"]))
    monkeypatch.setattr(policies.families, "outline", lambda path, revision: outline)
    cases = [
        ("lora", torch.bfloat16, 0, (None, True, True)),
        ("full", torch.bfloat16, 1, (torch.float32, True, False)),
        ("full", torch.float32, 0, (torch.float32, False, True)),
    ]
    for tune, dtype, rank, wanted in cases:
        policy = policies.Released("p", "abc", size=(32, 32), guidance=4.5, dtype=dtype, tune=tune)
        with suppress(RuntimeError):
            policy.load(["a dog"], CPU, rank, 2)
        assert asked.call_args.args == ("p", dtype, "abc")
        how = asked.call_args.kwargs
        assert (how["master"], how["autocast"], how["bars"]) == wanted


def test_a_policy_encodes_forgets_moves_and_tunes_in_this_order(monkeypatch, folders):
    """Encoders on the device while they are needed; adapters by rank, alpha and seed, after."""
    made = Mock()
    made.flow.cut_off.return_value = ["a line"]
    monkeypatch.setattr(policies.families, "load", lambda *_, **__: made.flow)
    monkeypatch.setattr(policies.tuning, "add_lora", made.add_lora)
    how = {"size": (32, 32), "guidance": 4.5, "rank": 3, "alpha": 7.0, "seed": 9}
    policy = policies.Released(str(folders["sd3"]), checkpointing=True, **how)
    policy.load(["b", "a", "b"], "somewhere")
    steps = [name.removeprefix("flow.") for name, _, _ in made.mock_calls]
    wanted = ["cut_off", "move_encoders", "encode", "encode_empty", "drop_encoders", "pipe.vae.to"]
    wanted += ["transformer.enable_gradient_checkpointing", "transformer.to", "add_lora"]
    assert [step for step in steps if step in wanted] == wanted
    assert made.flow.encode.call_args.args == (["b", "a"],)  # each once
    for moved in (made.flow.move_encoders, made.flow.pipe.vae.to, made.flow.transformer.to):
        moved.assert_called_once_with("somewhere")
    made.add_lora.assert_called_once_with(made.flow, 3, 7.0, 9)
    assert policy.cut_off == ["a line"] and policy.row == {"b": 0, "a": 1}


# ---- Prompts and pictures ------------------------------------------------------------------------


def test_prompts_are_encoded_in_order_and_kept_on_the_cpu(flow):
    """Eight at a time or one: the same texts, each its own prompt's."""
    loaded = flow("sd3")
    prompts = ["a dog", "two cats", "a house", "a dog on a mat", "rain"]
    whole, parts = loaded.encode(prompts, batch=5), loaded.encode(prompts, batch=2)
    assert whole.tokens.device == CPU and len(parts.tokens) == 5
    torch.testing.assert_close(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.pooled, parts.pooled)
    assert len({tuple(row.tolist()) for row in parts.pooled}) == 5
    picked = parts.pick(torch.tensor([3, 0, 3])).to(CPU, torch.bfloat16)
    assert picked.tokens.dtype == torch.bfloat16
    assert torch.equal(picked.pooled.float(), parts.pooled[[3, 0, 3]].bfloat16().float())


def test_a_prompt_that_just_fits_is_not_cut(flow):
    """Of 77 tokens none is lost, of the next prompt some are."""
    loaded, prompt = flow("flux"), "a"
    while len(loaded.pipe.tokenizer(prompt + " a").input_ids) <= 77:
        prompt += " a"
    assert len(loaded.pipe.tokenizer(prompt).input_ids) == 77
    assert not [line for line in loaded.cut_off([prompt]) if line.endswith("reads 77")]
    assert [line for line in loaded.cut_off([prompt + " a"]) if line.endswith("reads 77")]


def test_guidance_of_one_is_none(flow):
    """Above one SD3 takes two evaluations a row; FLUX never does."""
    sd3, dev, schnell = flow("sd3"), flow("flux"), flow("schnell")
    assert [sd3.splits(z) for z in (0.0, 1.0, 1.01, 4.5)] == [False, False, True, True]
    assert not dev.splits(3.5) and not schnell.splits(0.0)
    assert (sd3.single_guidance, dev.single_guidance, schnell.single_guidance) == (0.0, 3.5, 0.0)


def test_a_scheduler_with_sigmas_of_its_own_is_asked_for_steps(flow):
    """Where its configuration says so; else the pipeline's even sigmas, 1 to 1/steps, are given."""
    loaded = flow("flux")
    even = loaded.timesteps(4, 32, 32)
    assert even["sigmas"].tolist() == [1.0, 0.75, 0.5, 0.25] and "num_inference_steps" not in even
    loaded.pipe.scheduler.register_to_config(use_flow_sigmas=True)
    own = loaded.timesteps(4, 32, 32)
    assert own["num_inference_steps"] == 4 and "sigmas" not in own


def test_adapters_are_written_by_one_rank(folders, tmp_path):
    """The others take part, and write nothing."""
    policy = policies.Released(str(folders["sd3"]), size=(32, 32), guidance=0.0, rank=2)
    policy.load(["a dog"], CPU)
    assert policy.save(tmp_path, main=False) == "lora" and not any(tmp_path.iterdir())
    assert policy.save(tmp_path, main=True) == "lora" and (tmp_path / "lora").is_dir()


def test_encoders_are_moved_and_forgotten(flow):
    """All of them, to where prompts are encoded; none is left after."""
    loaded = flow("flux")
    loaded.move_encoders(torch.device("meta"))
    assert {loaded.pipe.text_encoder.device.type, loaded.pipe.text_encoder_2.device.type} == {
        "meta"
    }
    loaded.drop_encoders()
    assert loaded.pipe.text_encoder is None and loaded.pipe.text_encoder_2 is None


def test_pictures_are_latents_scaled_and_shifted(flow):
    """vae(x / scaling + shift), its [-1, 1] as [0, 1], cut there; in calls of at most `batch`."""
    loaded = flow("sd3")
    config, seen = loaded.pipe.vae.config, []
    assert config.scaling_factor != 1 and config.shift_factor != 0

    class Twice:
        """A VAE that doubles, and notes its calls."""

        dtype, device = torch.float32, CPU

        def decode(self, x, return_dict):
            seen.append(len(x))
            return (2 * x,)

    Twice.config = config
    loaded.pipe.__dict__.pop("vae", None)
    object.__setattr__(loaded, "pipe", SimpleNamespace(vae=Twice(), transformer=None))
    x = torch.linspace(-1, 1, 5 * 4).view(5, 1, 2, 2)
    found = loaded.decode(x, 32, 32, batch=2)
    wanted = (x / config.scaling_factor + config.shift_factor + 0.5).clamp(0, 1)
    assert torch.allclose(found, wanted) and seen == [2, 2, 1] and found.min() == 0
    seen.clear()
    loaded.decode(x, 32, 32, batch=0)
    assert seen == [5]


# ---- Grids ---------------------------------------------------------------------------------------


def mu_of(tokens, base=0.5, most=1.15):
    """Linear from 256 tokens to 4096."""
    return base + (most - base) * (tokens - 256) / (4096 - 256)


@pytest.mark.parametrize(
    ("name", "config", "mu"),
    [
        ("flux", {}, mu_of(8 * 16)),
        ("flux", {"max_shift": 2.0, "base_shift": 0.25}, mu_of(8 * 16, 0.25, 2.0)),
        ("sd3", {"use_dynamic_shifting": True, "max_shift": 1.16}, mu_of(8 * 16, most=1.16)),
        ("sd3", {"use_dynamic_shifting": False, "shift": 2.5}, None),
    ],
)
def test_a_pipelines_grid_is_shifted_by_its_tokens(name, config, mu, flow):
    """sigma = e^mu / (e^mu + 1/u - 1), or by a constant; once, however often it is asked."""
    loaded = flow(name)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        dict(loaded.pipe.scheduler.config) | {"max_shift": None, "base_shift": None}
    )
    plain = {key: z for key, z in dict(scheduler.config).items() if z is not None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(plain | config)
    loaded.pipe.scheduler = scheduler
    unit = 2 * 2 ** (len(loaded.pipe.vae.config.block_out_channels) - 1)
    height, width = 8 * unit, 16 * unit
    own = scheduler.sigmas.clone()
    first, again = (loaded.sigmas(4, height, width) for _ in range(2))
    assert torch.equal(scheduler.sigmas, own)  # the pipeline's scheduler is where it was
    assert torch.equal(first, again) and first[-1] == 0 and first.dtype == torch.float64
    if name == "flux":
        u = torch.linspace(1, 1 / 4, 4).double()
        shift = torch.tensor(mu).double().exp()
        torch.testing.assert_close(first[:-1], shift / (shift + 1 / u - 1), rtol=1e-6, atol=1e-6)
    asked = loaded.timesteps(4, height, width)
    if mu is None:
        assert "mu" not in asked
    else:
        assert asked["mu"] == pytest.approx(mu)


# ---- Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "frozen", "masters"),
    [
        ({"tune": "lora", "rank": 2}, 2, 0),  # bytes a weight: bfloat16, and none of it trained
        ({"tune": "lora", "rank": 2, "world": 2, "reference": True}, 2, 0),
        ({"tune": "lora", "rank": 2, "dtype": torch.float32}, 4, 0),
        ({"tune": "full"}, 0, 4),
        ({"tune": "full", "reference": True}, 2, 4),
        ({"tune": "full", "reference": True, "world": 2}, 1, 2),  # sharded over two
    ],
)
def test_memory_is_counted_by_weight(how, frozen, masters, folders, flow):
    """Frozen weights in the dtype of computation, masters in float32, shards of either."""
    policy = policies.Released(str(folders["sd3"]), size=(32, 32), guidance=4.5, **how)
    network = flow("sd3").transformer
    weights = sum(p.numel() for p in network.parameters())
    assert policy.sizes.weights == weights and policy.sizes.rows == 2
    assert policy.sizes.frozen == frozen * weights
    if masters:
        assert policy.sizes.masters == masters * weights and policy.sizes.tuned == weights
    else:
        assert policy.sizes.masters == 4 * policy.sizes.tuned < 4 * weights
    unguided = policies.Released(str(folders["sd3"]), size=(32, 32), guidance=0.0, **how)
    assert unguided.sizes.rows == 1
    assert policy.sharded == (how["tune"] == "full" and how.get("world", 1) > 1)
    assert policy.sizes.gathered == 0
    if policy.sharded:
        gathering = dict(how, gather_rollouts=True, size=(32, 32), guidance=4.5)
        policy = policies.Released(str(folders["sd3"]), **gathering)
        assert policy.sizes.gathered == 2 * weights  # all of them on every rank, in bfloat16
