"""Released models on the command line of train.py: presets, costs, what is refused in a line."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

import train
from zoo.released import families, random_pipelines
from zoo.training.command_line import parse, settle
from zoo.training.options import policy_of

pytestmark = pytest.mark.usefixtures("one_process")
PAPER = {
    "size": (512, 512),
    "steps": 16,
    "sde_steps": (0, 2, 4, 6),
    "shift": 3.0,
    "eta": 0.8,
    "group_size": 12,
    "factors": (2, 3),
    "kernel": "flow_sde",
    "rollouts": "shared_anchor",
    "weight_decay": 1e-4,
    "kl": 0.0,
    "max_grad_norm": 1.0,
    "iterations": 300,
    "prompts_per_iteration": 8,
    "updates": 1,
    "warmup": 0,
    "dtype": "bfloat16",
    "rank": 64,
    "alpha": 128.0,
    "eval_steps": (16, 40),
}


@pytest.mark.parametrize(("name", "guidance"), [("flux", 3.5), ("sd3", 4.5)])
def test_presets_are_the_authors_setting(folders, name, guidance):
    """By family; without a preset LoRA at its own rate; what is given wins."""
    given = {"model": str(folders[name]), "reward": ("zoo.rewards.example:warmth:2",)}
    preset = given | {"preset": f"paper-{name}"}
    for o in (settle(given), settle(preset)):
        assert {key: getattr(o, key) for key in PAPER} == PAPER and o.guidance == guidance
        assert o.eval_reward == ("zoo.rewards.example:warmth",)
    assert (settle(given).tune, settle(given).lr) == ("lora", 1e-4)
    assert (settle(preset).tune, settle(preset).lr) == ("full", 2e-6)
    assert settle(preset | {"tune": "lora"}).lr == 1e-4
    assert settle(given | {"lr": 3e-5}).lr == 3e-5


@pytest.mark.parametrize("more", ["--rank 2", "--tune full"])
def test_the_cost_is_printed_without_weights(folders, flags, more, capsys):
    """--dry-run reads configurations alone; numbers of parameters are those of what is loaded."""
    for file in folders["sd3"].rglob("*.json"):
        copy = Path("bare", file.relative_to(folders["sd3"]))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    total = sum(p.numel() for p in families.load(str(folders["sd3"])).transformer.parameters())
    policy = policy_of(parse(flags("sd3", more))).load(["a"], torch.device("cpu"))
    trained = sum(p.numel() for p in policy.tuned)
    train.main([*flags("sd3", more), "--model", "bare", "--dry-run"])
    printed = capsys.readouterr().out
    assert f"{total:,} of the network" in printed and f"{trained:,} trained" in printed
    assert "each is 2 rows of the network, for guidance" in printed
    assert (trained == total) == ("full" in more)


def test_weights_are_gathered_on_several_ranks_only(flags, monkeypatch):
    """On one, a run that goes on can do without."""
    assert not parse(flags("sd3", "--tune full --no-gather-rollouts")).gather_rollouts
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(flags("sd3", "--tune full --gather-rollouts")).gather_rollouts


def test_the_released_sizes_are_those_of_the_released_models():
    """11.9 billion parameters for FLUX.1, 2.5 for SD3.5 Medium with its table of positions."""
    flux_sizes = random_pipelines.configuration(random_pipelines.FLUX, real=True)
    sd3_sizes = random_pipelines.configuration(random_pipelines.SD3, real=True)
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**flux_sizes, guidance_embeds=True)
        sd3 = SD3Transformer2DModel(**sd3_sizes)
    sizes = [sum(z.numel() for z in (*m.parameters(), *m.buffers())) / 1e9 for m in (flux, sd3)]
    assert sizes == [pytest.approx(11.9, abs=0.05), pytest.approx(2.5, abs=0.05)]


BAD = {
    "--guidance 0": "guidance=0.0: must be above 0",
    "--size 30 32": "size 30 x 32",
    "--size 32": "--size 32",
    "--tune transformer": "--tune transformer",
    "--preset paper-sd3": "--preset paper-sd3: must be paper-flux",
    "--reward": "--reward",
    "--reward rule": "judge the embedded world only",
    "--reward nothing": "reward 'nothing'",
    "--sigmas pipeline --shift 2": "--shift",
    "--tune full --rank 4": "--rank",
    "--rank 0": "--rank 0",
    "--gather-rollouts": "--gather-rollouts: must be left out, being read only with --tune full",
    "--tune full --gather-rollouts": "--gather-rollouts: must be left out on one rank",
    "--reward zoo.no:f": "zoo.no",
    "--reward zoo.rewards.example:no": "has no attribute 'no'",
    "--reward clip=nowhere_at_all": "reward 'clip': cannot be loaded",
    "--reward clip:much": "its weight must be",
    "--reward zoo.rewards.hpsv3:reward": (
        "'zoo.rewards.hpsv3:reward': cannot be loaded (ModuleNotFoundError: No module named"
    ),
    "--revision main": "revision 'main': must be a folder, without a revision",
    "--out /proc/run": "--out /proc/run",
    "--reward clip=.@main": "revision 'main' must be left out",
    "--eval-reward clip:7": "must be without weights",
}


@pytest.mark.parametrize(("more", "named"), BAD.items())
def test_what_does_not_fit_is_one_line(flags, more, named, capsys, monkeypatch):
    """Status 2 and one line that names it, before a run folder is made."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        train.main(flags("flux", more))
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(err) == 1 and named in err[0], err
    assert not any(Path().iterdir())


SD3_BAD = {
    "--guidance 0.5": "guidance=0.5: must be above 1, or 0 for none",
    "--size 32 512": "size 32 x 512: both must be positive multiples of 4 up to 192",
}


@pytest.mark.parametrize(("more", "named"), SD3_BAD.items())
def test_what_sd3_cannot_do_is_refused(flags, more, named, capsys):
    """Guidance that would be none, and pictures beyond its table of positions."""
    with pytest.raises(SystemExit):
        parse(flags("sd3", more))
    assert named in capsys.readouterr().err


def test_held_out_prompts_are_held_out(flags, capsys):
    """A prompt of both files is refused."""
    Path("both.txt").write_text("a bird\ntwo cats\n")
    with pytest.raises(SystemExit):
        parse(flags("flux", "--eval-prompts both.txt"))
    assert "'two cats' is a training prompt; must be held out" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["missing", "cut short", "a file"])
def test_a_pipeline_that_cannot_be_read_is_one_line(folders, flags, broken, capsys):
    """No weights, half of them, or a path to a file: status 2 and the model named."""
    folder = Path("pipeline")
    shutil.copytree(folders["flux"], folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    if broken == "missing":
        weights.unlink()
    elif broken == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        folder = folder / "model_index.json"
    with pytest.raises(SystemExit) as stop:
        train.main([*flags("flux"), "--model", str(folder), "--out", "run"])
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1
    assert f"model '{folder}'" in err[0] and not Path("run").exists()
