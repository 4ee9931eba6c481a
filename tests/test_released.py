"""train.py on tiny pipelines of the real classes: what is trained, measured and saved, on one rank and on two."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file

import pave_grpo as pg
import train
from zoo.released import pipeline as diffusion
from zoo.released import random_pipelines
from zoo.shapes import model as shapes_model
from zoo.training import policies, prompts

ROOT = Path(__file__).parents[1]
SMALL = [
    "--reward",
    "zoo.rewards.example:warmth:2",
    "--eval-reward",
    "zoo.rewards.example:contrast",
    "--size",
    "32",
    "32",
    "--heldout",
    "4",
    "--iterations",
    "1",
    "--eval-steps",
    "2",
    "--eval-every",
    "0",
    "--prompts-per-iteration",
    "2",
    "--group-size",
    "3",
    "--steps",
    "3",
    "--sde-steps",
    "0",
    "1",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
SGD = ["--optimizer", "sgd", "--lr", "10", "--max-grad-norm", "inf"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two pipelines, and prompts to train on and to judge by."""
    made = {
        name: make(tmp_path_factory.mktemp(name))
        for name, make in (("sd3", random_pipelines.sd3), ("flux", random_pipelines.flux))
    }
    texts = tmp_path_factory.mktemp("texts")
    (texts / "train.txt").write_text(
        "a red dog\n\n two cats \na red dog\na house\nthree trees\na boat\n"
    )
    (texts / "heldout.txt").write_text("a bird and " + "word " * 90 + "\n")
    return {**made, "texts": texts}


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """Every test runs in a folder of its own, as if started without torchrun; pictures are few."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    shown = prompts.Prompts.shown
    monkeypatch.setattr(
        prompts.Prompts, "shown", lambda self, shape, kind: shown(self, shape, kind, 1)
    )


def without_t5(folder):
    """The same pipeline saved without its third text encoder, as some do to save memory."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        str(folder), text_encoder_3=None, tokenizer_3=None
    )
    pipe.save_pretrained("without")
    return "without"


def flags(folders, name, *more):
    texts = folders["texts"]
    return [
        "--model",
        str(folders[name]),
        "--prompts",
        str(texts / "train.txt"),
        "--eval-prompts",
        str(texts / "heldout.txt"),
        *SMALL,
        *more,
    ]


def run(folders, name, out, *more):
    """A run in the folder `out`: its metrics after line 0, and what it saved."""
    train.main([*flags(folders, name, *more), "--out", out])
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    (weights,) = Path(out).glob("*/*.safetensors")
    return lines[1], load_file(weights)


def distance(a, b):
    return math.sqrt(sum((a[name].float() - b[name].float()).square().sum().item() for name in a))


# ---- What is saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_lora_run_gives_plain_diffusers_our_pictures(folders, name, capsys):
    """load_lora_weights on the saved folder makes the pictures of the run itself, which are not the released ones."""
    more = ["--rank", "2", "--alpha", "6", "--lr", "0.5", "--sigmas", "pipeline"]
    metrics, _ = run(folders, name, "run", *more)
    printed = capsys.readouterr().out
    assert "line 2: empty, left out" in printed and "line 4: 'a red dog' is line 1 again" in printed
    assert "of which CLIPTokenizer reads 77" in printed and "trained (4 forwards each)" in printed
    assert metrics["reward"] == pytest.approx(2 * metrics["reward_zoo.rewards.example:warmth"])
    assert metrics["grad_norm"] > 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["weights"] == "lora" and set(summary["heldout"]["after"]) == {"2"}
    for picture in ("before_after.png", "curve.png"):
        assert Path("run", picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    pipe = DiffusionPipeline.from_pretrained(str(folders[name]), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for module in filter(
        None, (pipe.text_encoder, pipe.text_encoder_2, getattr(pipe, "text_encoder_3", None))
    ):
        module.eval()
    o = train.parse(flags(folders, name, *more))
    asked, noise = train.prompts_of(o).pairs(train.policy_of(o).shape, 4)
    scores = []
    for _ in ("released", "aligned"):
        with torch.no_grad():
            images = pipe(
                asked,
                height=32,
                width=32,
                num_inference_steps=2,
                guidance_scale=o.guidance,
                latents=noise.clone(),
                output_type="pt",
            ).images
        scores.append(images.float().flatten(1).std(1).mean().item())
        pipe.load_lora_weights("run/lora")
    judge = "zoo.rewards.example:contrast"
    ours = [summary["heldout"][when]["2"][judge] for when in ("before", "after")]
    assert ours == pytest.approx(scores, abs=2e-5) and abs(ours[1] - ours[0]) > 1e-3


@pytest.mark.parametrize(
    ("name", "cls"), [("sd3", SD3Transformer2DModel), ("flux", FluxTransformer2DModel)]
)
def test_a_full_run_saves_what_from_pretrained_loads(folders, name, cls):
    """Every weight of the class, moved by an SGD step; in bfloat16 if the run computes in it, from float32 masters."""
    run(folders, name, "run", *SGD, "--tune", "full")
    start, moved = (
        cls.from_pretrained(str(Path(z, "transformer"))).state_dict()
        for z in (folders[name], "run")
    )
    assert set(start) == set(moved) and distance(start, moved) > 1e-3
    _, halves = run(folders, name, "half", *SGD, "--tune", "full", "--dtype", "bfloat16")
    assert {w.dtype for w in halves.values()} == {torch.bfloat16} and distance(start, halves) > 1e-3


def test_the_average_is_what_is_saved_and_judged(folders):
    """EMA of decay 1/2 over two SGD steps is (theta_0 + theta_1 + 2 theta_2) / 4; training does not see it."""
    kept = [load_file(folders["flux"] / "transformer/diffusion_pytorch_model.safetensors")]
    for n in ("1", "2"):
        kept.append(run(folders, "flux", f"plain{n}", *SGD, "--tune", "full", "--iterations", n)[1])
    _, average = run(
        folders,
        "flux",
        "ema",
        *SGD,
        "--tune",
        "full",
        "--iterations",
        "2",
        "--ema",
        "0.5",
        "--eval-every",
        "1",
    )
    wanted = {name: (kept[0][name] + kept[1][name] + 2 * kept[2][name]) / 4 for name in average}
    step = distance(kept[0], kept[2])
    assert distance(average, wanted) <= 1e-5 * step < 1e-2 * distance(average, kept[2])
    plain, ema = (
        json.loads(Path(z, "summary.json").read_text())["heldout"] for z in ("plain2", "ema")
    )
    assert plain["before"] == ema["before"] and plain["after"] != ema["after"]


# ---- The same gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_batches_and_checkpointing_change_memory_and_not_the_step(folders, name):
    """All four batch flags and gradient checkpointing: the same samples and SGD step, to float32 rounding.

    Rows of other batch shapes round otherwise, relative 1e-5 of a step; a lost part or weight, or another's text,
    is an error of order 1.
    """
    o = train.parse(flags(folders, name))
    drawn, _ = train.drawn_prompts(
        o, train.prompts_of(o), 1, train.Ranks(0, 1, torch.device("cpu"))
    )
    assert len(set(drawn)) == 2  # so that a part that asks for the wrong one is seen
    start = load_file(folders[name] / "transformer/diffusion_pytorch_model.safetensors")
    results = [
        run(
            folders, name, f"run{i}", *SGD, "--tune", "full", "--kl", "0.1", "--updates", "2", *more
        )
        for i, more in enumerate(
            (
                [
                    "--no-checkpointing",
                    *(
                        z
                        for flag in ("rollout", "decode", "reward", "update")
                        for z in (f"--{flag}-batch", "0")
                    ),
                ],
                [
                    "--checkpointing",
                    "--rollout-batch",
                    "2",
                    "--decode-batch",
                    "5",
                    "--reward-batch",
                    "7",
                    "--update-batch",
                    "1",
                ],
                ["--no-checkpointing", "--rollout-batch", "3", "--update-batch", "3"],
            )
        )
    ]
    (metrics, whole), *others = results
    for other, weights in others:
        assert distance(weights, whole) <= 1e-4 * distance(start, whole)
        assert other["reward"] == pytest.approx(metrics["reward"], abs=1e-6)
        for key in ("grad_norm", "kl", "ratio_2", "ratio_3_max", "clip_fraction_1"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-3), key
    assert metrics["kl"] > 0 and metrics["ratio_1"] != 1


def test_one_rank_and_two_ranks_take_the_same_step(folders):
    """The embedded model and LoRA replicated, and full sharded (FSDP2, EMA, KL to a sharded copy): the same noise bit
    for bit, the same samples and SGD steps to float32 rounding.

    tests/two_ranks.py keeps the noise of both ranks. Each rank sees half the prompts, so matrix products are split
    otherwise: relative error about 1e-5 of the steps, and a bound ten times that. Forgetting to average is an error of
    order 1.
    """
    common = [*SGD, "--iterations", "2", "--eval-every", "1", "--threads", "1"]
    jobs = {
        "embedded": [
            "--prompts-per-iteration",
            "2",
            "--group-size",
            "4",
            "--steps",
            "4",
            "--sde-steps",
            "0",
            "1",
            "--heldout",
            "4",
            "--eval-steps",
            "1",
            "--warmup",
            "0",
            "--device",
            "cpu",
            *common,
            "--lr",
            "0.1",
        ],
        "lora": flags(folders, "sd3", "--rank", "2", "--alpha", "4", *common),
        "full": flags(folders, "sd3", "--tune", "full", "--kl", "0.1", "--ema", "0.5", *common),
    }
    start = {
        "embedded": shapes_model.load().state_dict(),
        "lora": {},
        "full": load_file(folders["sd3"] / "transformer/diffusion_pytorch_model.safetensors"),
    }
    Path("jobs.json").write_text(json.dumps(jobs))
    script, world = (
        [str(ROOT / "tests" / "two_ranks.py"), "jobs.json"],
        ["-m", "torch.distributed.run", "--standalone"],
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for launch, out in (([], "one"), ([*world, "--nproc_per_node=2"], "two")):
        subprocess.run(
            [sys.executable, *launch, *script, out], check=True, timeout=120, env=environment
        )
    alone, *both = (torch.load(f"{z}-swap.pt") for z in ("one-0", "two-0", "two-1"))
    for sharded in both:  # before, averaged, after: no swap is missed
        assert all(
            (a - b).norm() <= 1e-4 * (alone[0] - alone[1]).norm() for a, b in zip(alone, sharded)
        )
    for case in jobs:
        one, *two = (torch.load(f"{z}-{case}.pt") for z in ("one-0", "two-0", "two-1"))
        assert len(one) == 2 and all(
            torch.equal(whole, torch.cat(halves)) for whole, *halves in zip(one, *two)
        )
        weights = [
            load_file(next(Path(f"{z}-{case}").rglob("*.safetensors"))) for z in ("one", "two")
        ]
        zero = start[case] or {name: torch.zeros_like(w) for name, w in weights[0].items()}
        assert (
            distance(*weights) <= 1e-4 * distance(weights[0], zero)
            and distance(weights[0], zero) > 0
        )
        lines = [
            [
                json.loads(line)
                for line in Path(f"{z}-{case}/metrics.jsonl").read_text().splitlines()
            ]
            for z in ("one", "two")
        ]
        for a, b in zip(*lines, strict=True):
            for key in {
                "reward",
                "grad_norm",
                "kl",
                "heldout_zoo.rewards.example:contrast",
                "heldout_rule",
            } & set(a):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), (case, key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("name", "tune"), [("sd3", "lora"), ("flux", "full")])
def test_a_gpu_takes_the_step_of_the_cpu(folders, name, tune):
    """In float32 the same judgement of held-out pictures and norm of the gradient; in bfloat16 a finite step."""
    common = ["--tune", tune, "--kl", "0.1", *SGD]
    (cpu, _), (gpu, _), (half, weights) = (
        run(folders, name, out, *common, *more)
        for out, more in (
            ("cpu", []),
            ("gpu", ["--device", "cuda"]),
            ("half", ["--device", "cuda", "--dtype", "bfloat16"]),
        )
    )
    before, there = (
        json.loads(Path(z, "summary.json").read_text())["heldout"]["before"]["2"]
        for z in ("cpu", "gpu")
    )
    assert before == pytest.approx(there, rel=1e-3)
    assert cpu["grad_norm"] == pytest.approx(gpu["grad_norm"], rel=1e-2)
    assert half["grad_norm"] > 0 and all(w.isfinite().all() for w in weights.values())
    summary = json.loads(Path("half/summary.json").read_text())
    assert summary["peak_memory_gib"] > 0 and "cpu" not in summary["device"]


# ---- Before any work ---------------------------------------------------------------------------------------------


def test_presets_are_the_authors_setting(folders):
    """PAPER.md's values, by family; without a preset LoRA at its own rate; what is given wins."""
    paper = {
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
    for name, guidance in (("flux", 3.5), ("sd3", 4.5)):
        given = {"model": str(folders[name]), "reward": ("zoo.rewards.example:warmth:2",)}
        o, preset = train.settle(given), train.settle(given | {"preset": f"paper-{name}"})
        for z in (o, preset):
            assert {key: getattr(z, key) for key in paper} == paper and z.guidance == guidance
            assert z.eval_reward == ("zoo.rewards.example:warmth",)
        assert (o.tune, o.lr) == ("lora", 1e-4) and (preset.tune, preset.lr) == ("full", 2e-6)
        assert train.settle(given | {"preset": f"paper-{name}", "tune": "lora"}).lr == 1e-4
        assert train.settle(given | {"lr": 3e-5}).lr == 3e-5


def test_the_cost_is_printed_without_weights(folders, tmp_path, capsys):
    """--dry-run reads configurations: it works where the weights are gone; numbers of parameters are the real ones."""
    copy = tmp_path / "bare"
    for file in folders["sd3"].rglob("*.json"):
        (copy / file.relative_to(folders["sd3"])).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(folders["sd3"])).write_text(file.read_text())
    given = [str(copy) if z == str(folders["sd3"]) else z for z in flags(folders, "sd3")]
    network = diffusion.load(str(folders["sd3"])).transformer
    total = sum(p.numel() for p in network.parameters())
    for more, trained in ((["--rank", "2"], None), (["--tune", "full"], total)):
        train.main([*given, "--dry-run", *more])
        printed = capsys.readouterr().out
        assert (
            f"{total:,} of the network" in printed
            and "each is 2 rows of the network, for guidance" in printed
        )
        if trained is None:
            o = train.parse(flags(folders, "sd3", *more))
            trained = sum(
                p.numel() for p in train.policy_of(o).load(["a"], torch.device("cpu")).tuned
            )
        assert f"{trained:,} trained" in printed


def test_the_released_sizes_are_those_of_the_released_models():
    """11.9 billion parameters for FLUX.1, 2.5 billion for SD3.5 Medium with its table of positions."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**random_pipelines.REAL_FLUX, guidance_embeds=True)
        sd3 = SD3Transformer2DModel(**random_pipelines.REAL_SD3)
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
    "--reward zoo.no:f": "zoo.no",
    "--reward zoo.rewards.example:no": "has no attribute 'no'",
    "--reward clip=nowhere_at_all": "reward 'clip': cannot be loaded",
    "--reward clip:much": "its weight must be",
    "--reward zoo.rewards.hpsv3:reward": "reward 'zoo.rewards.hpsv3:reward': cannot be loaded (No module named 'hpsv3')",
    "--revision main": "revision 'main': must be a folder, without a revision",
    "--out /proc/run": "--out /proc/run",
    "--reward clip=.@main": "revision 'main' must be left out",
    "--eval-reward clip:7": "must be without weights",
}


@pytest.mark.parametrize(("more", "named"), BAD.items())
def test_what_does_not_fit_is_one_line(folders, more, named, capsys, monkeypatch):
    """Status 2 and one line that names it, before a run folder is made."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags(folders, "flux"), *more.split()])
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(err) == 1 and named in err[0], err
    assert not any(Path().iterdir())


@pytest.mark.parametrize("broken", ["missing", "cut short", "a file"])
def test_a_pipeline_that_cannot_be_read_is_one_line(folders, tmp_path, broken, capsys):
    """No weights, half of them, or a path to a file instead of the folder: status 2 and the model named."""
    folder = tmp_path / "pipeline"
    shutil.copytree(folders["flux"], folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    if broken == "missing":
        weights.unlink()
    elif broken == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        folder = folder / "model_index.json"
    with pytest.raises(SystemExit) as stop:
        train.main([*flags(folders, "flux"), "--model", str(folder), "--out", "run"])
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (
        stop.value.code == 2
        and len(err) == 1
        and f"model '{folder}'" in err[0]
        and not Path("run").exists()
    )


@pytest.mark.parametrize("failing", ["reward", "judge"])
def test_a_reward_that_fails_ends_the_run_and_keeps_it(folders, failing, monkeypatch, capsys):
    """The second iteration's reward is NaN: one line with the prompt, status 2, and the first iteration is saved."""
    calls = []

    def failing_at_last(images, _):
        calls.append(1)
        return images.mean((1, 2, 3)) * (float("nan") if len(calls) == 3 else 1)

    what = {"reward": "warmth", "judge": "contrast"}[failing]
    if failing == "reward":
        calls.append(1)
    monkeypatch.setattr(f"zoo.rewards.example.{what}", failing_at_last)
    with pytest.raises(SystemExit) as stop:
        run(folders, "flux", "run", "--iterations", "2", "--rank", "2")
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (
        stop.value.code == 2
        and len(err) == 1
        and "of prompt '" in err[0]
        and "is nan: must be a finite" in err[0]
    )
    summary = json.loads(Path("run/summary.json").read_text())
    done = {"reward": 1, "judge": 2}[
        failing
    ]  # judged twice before: a picture, and all of the held-out ones
    assert (
        summary["iterations"] == done
        and summary["interrupted"]
        and list(Path("run/lora").iterdir())
    )
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == done + 1


@pytest.mark.parametrize(
    ("more", "named"),
    {
        "--guidance 0.5": "guidance=0.5: must be above 1, or 0 for none",
        "--size 32 512": "size 32 x 512: both must be positive multiples of 4 up to 192",
    }.items(),
)
def test_what_sd3_cannot_do_is_refused(folders, more, named, capsys):
    """Guidance that would be none, and pictures beyond its table of positions."""
    with pytest.raises(SystemExit):
        train.parse([*flags(folders, "sd3"), *more.split()])
    assert named in capsys.readouterr().err


def test_held_out_prompts_are_held_out(folders, capsys):
    """A prompt of both files is refused."""
    Path("both.txt").write_text("a bird\ntwo cats\n")
    with pytest.raises(SystemExit):
        train.parse([*flags(folders, "flux"), "--eval-prompts", "both.txt"])
    assert "'two cats' is a training prompt; must be held out" in capsys.readouterr().err


# ---- Policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_reference_stays_where_the_policy_began(folders, tune, dtype):
    """After a step the reference is the initial policy bit for bit, the policy is not, and their KL has a gradient."""
    policy = policies.Released(
        str(folders["sd3"]),
        size=(32, 32),
        guidance=4.5,
        tune=tune,
        rank=2,
        alpha=4,
        dtype=getattr(torch, dtype),
        reference=True,
    )
    policy.load(["a dog", "two cats"], torch.device("cpu"))
    computed = []
    for module in policy.network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, out: computed.append(out))
    asked = ["two cats", "a dog", "two cats"]
    x = torch.randn(3, *policy.shape, generator=torch.Generator().manual_seed(0))
    at = x, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        before, reference = policy.velocity(asked)(*at), policy.reference_velocity(asked)(*at)
        assert {p.dtype for p in policy.tuned} == {torch.float32} and before.dtype == torch.float32
        assert {z.dtype for z in computed} == {getattr(torch, dtype)}  # adapters and all
        assert torch.equal(reference, before) or (
            dtype == "bfloat16" and (reference - before).abs().mean() < 0.02
        )
        for p in policy.tuned:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(policy.reference_velocity(asked)(*at), reference)
        assert (policy.velocity(asked)(*at) - before).abs().max() > 1e-3
    process = pg.Process(policy.grid(4), "flow_sde", 0.8)
    noise = pg.draw_noise([torch.Generator().manual_seed(i) for i in range(2)], 2, policy.shape, 1)
    rollout = pg.rollout_shared_anchor(policy.velocity(asked[:2]), process, noise, (1,))
    result = pg.policy_loss(
        policy.velocity(asked[:2]),
        rollout,
        torch.zeros(2, 1, 2),
        kl=1.0,
        reference=policy.reference_velocity(asked[:2]),
    )
    result.loss.backward()
    assert result.kl > 0 and sum(p.grad.norm() for p in policy.tuned if p.grad is not None) > 0


def test_every_batch_flag_bounds_its_calls(folders, monkeypatch):
    """Rows of the network while sampling and per backward pass, of the VAE and of the reward, are what the flags say;
    blocks are recomputed with --checkpointing, and text encoders are gone."""
    o = train.parse(
        flags(
            folders,
            "sd3",
            "--rollout-batch",
            "3",
            "--decode-batch",
            "4",
            "--reward-batch",
            "5",
            "--update-batch",
            "1",
            "--rank",
            "2",
            "--checkpointing",
        )
    )
    data, ranks = train.prompts_of(o), train.Ranks(0, 1, torch.device("cpu"))
    policy = train.policy_of(o)
    seen = {"sampled": [], "trained": [], "vae": [], "reward": [], "block": []}
    monkeypatch.setattr(
        "zoo.rewards.example.warmth",
        lambda images, _: seen["reward"].append(len(images)) or images.mean((1, 2, 3)),
    )
    reward, _ = train.loaded(o, policy, data, ranks)
    kind = lambda: "trained" if torch.is_grad_enabled() else "sampled"
    policy.network.register_forward_pre_hook(
        lambda _, args, given: seen[kind()].append(len(given["hidden_states"]) // 2),
        with_kwargs=True,
    )
    policy.network.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: seen["block"].append(kind())
    )
    vae, decode = policy.flow.pipe.vae, policy.flow.pipe.vae.decode
    monkeypatch.setattr(
        vae, "decode", lambda z, **how: seen["vae"].append(len(z)) or decode(z, **how)
    )
    train.iterate(o, 1, policy, reward, data, torch.optim.SGD(policy.tuned, 0.1), None, ranks)
    assert seen["sampled"] and max(seen["sampled"]) == 3
    assert (
        seen["trained"] == [1, 2, 1] * 4
    )  # per state: the first velocity; the next of k = 2 and 3; the last of 3
    assert seen["vae"] == [4, 4, 4] and seen["reward"] == [5, 5, 2]
    assert seen["block"].count("trained") == 2 * len(
        seen["trained"]
    )  # once forward, once more backward
    assert (
        policy.flow.pipe.text_encoder
        is policy.flow.pipe.text_encoder_2
        is policy.flow.pipe.text_encoder_3
        is None
    )


def test_an_sd3_without_t5_is_one_too(folders):
    """model_index.json says that the third encoder is absent: it is loaded so, and its words count as nothing."""
    policy = policies.Released(
        without_t5(folders["sd3"]), size=(32, 32), guidance=4.5, dtype=torch.float32, rank=2
    )
    policy.load(["a dog", "word " * 300], torch.device("cpu"))
    assert [line.split()[-1] for line in policy.cut_off] == ["77"]
    with torch.no_grad():
        v = policy.velocity(["a dog"])(
            torch.zeros(1, *policy.shape), torch.tensor([0.5]), torch.tensor([0])
        )
    assert v.isfinite().all()


def test_the_grid_is_shifted_or_the_pipelines(folders):
    """--sigmas pipeline takes the scheduler's own grid at this size, shifted the paper's."""
    for name in ("sd3", "flux"):
        shifted, own = (
            policies.Released(
                str(folders[name]), size=(32, 64), guidance=3.5, shift=3.0, sigmas=sigmas
            )
            for sigmas in ("shifted", "pipeline")
        )
        assert torch.equal(shifted.grid(4), pg.schedule(4, 3.0))
        assert torch.equal(own.grid(4), diffusion.load(str(folders[name])).sigmas(4, 32, 64))
