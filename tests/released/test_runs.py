"""train.py on tiny pipelines of the real classes: pictures, weights and steps, on 1 and 2 ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file

from zoo.shapes import model as shapes_model
from zoo.training.command_line import parse
from zoo.training.options import policy_of, prompts_of

pytestmark = pytest.mark.usefixtures("one_process")
ROOT = Path(__file__).parents[2]
SGD = "--optimizer sgd --lr 10 --max-grad-norm inf"
JUDGE = "zoo.rewards.example:contrast"


def distance(a, b):
    return math.sqrt(sum((a[name].float() - b[name].float()).square().sum().item() for name in a))


def summary_of(out):
    return json.loads(Path(out, "summary.json").read_text())


def start_of(folder):
    """The transformer's weights in a pipeline's folder."""
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


# ---- What is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_lora_run_gives_plain_diffusers_our_pictures(folders, flags, run, name, capsys):
    """load_lora_weights on the saved folder makes the run's pictures, not the released ones."""
    more = "--rank 2 --alpha 6 --lr 0.5 --sigmas pipeline"
    metrics, _ = run(name, "run", more)
    printed = capsys.readouterr().out
    assert "line 2: empty, left out" in printed and "line 4: 'a red dog' is line 1 again" in printed
    assert "of which CLIPTokenizer reads 77" in printed and "trained (4 forwards each)" in printed
    assert metrics["reward"] == pytest.approx(2 * metrics["reward_zoo.rewards.example:warmth"])
    assert metrics["grad_norm"] > 0
    summary = summary_of("run")
    assert summary["weights"] == "lora" and set(summary["heldout"]["after"]) == {"2"}
    for picture in ("before_after.png", "curve.png"):
        assert Path("run", picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    pipe = DiffusionPipeline.from_pretrained(str(folders[name]), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    o = parse(flags(name, more))
    asked, noise = prompts_of(o).pairs(policy_of(o).shape, 4)

    def contrast():
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
        return images.float().flatten(1).std(1).mean().item()

    released = contrast()
    pipe.load_lora_weights("run/lora")
    theirs = [released, contrast()]
    ours = [summary["heldout"][when]["2"][JUDGE] for when in ("before", "after")]
    assert ours == pytest.approx(theirs, abs=2e-5) and abs(ours[1] - ours[0]) > 1e-3


@pytest.mark.usefixtures("no_pictures", "short_texts")
@pytest.mark.parametrize(
    ("name", "cls"), [("sd3", SD3Transformer2DModel), ("flux", FluxTransformer2DModel)]
)
def test_a_full_run_saves_what_from_pretrained_loads(folders, run, name, cls):
    """Every weight of the class, moved by an SGD step; in the dtype of computation."""
    run(name, "run", f"{SGD} --tune full")
    start = cls.from_pretrained(str(folders[name] / "transformer")).state_dict()
    moved = cls.from_pretrained("run/transformer").state_dict()
    assert set(start) == set(moved) and distance(start, moved) > 1e-3
    _, halves = run(name, "half", f"{SGD} --tune full --dtype bfloat16")
    assert {w.dtype for w in halves.values()} == {torch.bfloat16} and distance(start, halves) > 1e-3


# ---- The same gradient ---------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures", "short_texts")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_batches_and_checkpointing_change_memory_and_not_the_step(folders, flags, run, name):
    """All four batch flags and gradient checkpointing: the same samples and SGD step.

    To float32 rounding: rows of other batch shapes round otherwise, relative 1e-5 of a step; a lost
    part or weight, or another's text, is an error of order 1.
    """
    o = parse(flags(name))
    drawn, _ = prompts_of(o).draw(o.seed, 1, range(o.prompts_per_iteration))
    assert len(set(drawn)) == 2  # so that a part that asks for the wrong one is seen
    common = f"{SGD} --tune full --kl 0.1 --updates 2"
    at_once = "--rollout-batch 0 --decode-batch 0 --reward-batch 0 --update-batch 0"
    small = "--rollout-batch 2 --decode-batch 5 --reward-batch 7 --update-batch 1"
    metrics, whole = run(name, "run", f"{common} --no-checkpointing {at_once}")
    others = (
        run(name, "small", f"{common} --checkpointing {small}"),
        run(name, "threes", f"{common} --no-checkpointing --rollout-batch 3 --update-batch 3"),
    )
    step = distance(start_of(folders[name]), whole)
    for other, weights in others:
        assert distance(weights, whole) <= 1e-4 * step
        assert other["reward"] == pytest.approx(metrics["reward"], abs=1e-6)
        for key in ("grad_norm", "kl", "ratio_2", "ratio_3_max", "clip_fraction_1"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-3), key
    assert metrics["kl"] > 0 and metrics["ratio_1"] != 1


def test_one_rank_and_two_ranks_take_the_same_step(folders, flags):
    """The embedded model and LoRA replicated, and full sharded with an EMA and a sharded reference.

    The same noise bit for bit, the same samples and SGD steps to float32 rounding. Each rank sees
    half the prompts, so matrix products are split otherwise: relative error about 1e-5 of the
    steps, and a bound ten times that. Forgetting to average is an error of order 1. And in either
    world one iteration and one more, by --resume, are two, bit for bit; on two ranks the second has
    its weights gathered once to sample.
    """
    common = f"{SGD} --iterations 2 --eval-every 1 --threads 1"
    embedded = (
        "--prompts-per-iteration 2 --group-size 4 --steps 4 --sde-steps 0 1 --heldout 4 "
        f"--eval-steps 1 --warmup 0 --device cpu {common} --lr 0.1"
    )
    adam = "--optimizer adamw --lr 0.01 --eval-every 1 --threads 1 --tune full --ema 0.5"
    more = ["--iterations", "2", "--resume"]
    jobs = {
        "embedded": embedded.split(),
        "lora": flags("sd3", f"--rank 2 --alpha 4 {common}"),
        "lora-half": flags("sd3", f"--rank 2 --alpha 4 {common} --iterations 1"),
        "lora-more": [*more, "lora-half"],
        "adam": flags("sd3", f"{adam} --iterations 2"),
        "adam-half": flags("sd3", f"{adam} --iterations 1"),
        "adam-more": ["--gather-rollouts", *more, "adam-half"],
        "full": flags("sd3", f"--tune full --kl 0.1 --ema 0.5 {common}"),
    }
    Path("jobs.json").write_text(json.dumps(jobs))
    script = [str(ROOT / "tests" / "two_ranks.py"), "jobs.json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, *launch, *script, out], env=environment)
        for launch, out in (([], "one"), (torchrun, "two"))
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]

    alone, *both = (torch.load(f"{rank}-swap.pt") for rank in ("one-0", "two-0", "two-1"))
    for sharded in both:  # before, averaged, after: no swap is missed
        for a, b in zip(alone, sharded, strict=True):
            assert (a - b).norm() <= 1e-4 * (alone[0] - alone[1]).norm()
    starts = {"embedded": shapes_model.load().state_dict(), "full": start_of(folders["sd3"])}
    for case in ("embedded", "lora", "full"):
        same_noise(case)
        same_steps(case, starts.get(case))
        same_metrics(case)

    for world in ("one", "two"):
        for case in ("lora", "adam"):
            same_bits(Path(f"{world}-{case}"), Path(f"{world}-{case}-half"))
    for rank in (0, 1):
        few_gathers(torch.load(f"two-{rank}-gathers.pt"))


PARTS = 3  # of the sharded SD3: two blocks, and what is around them


def few_gathers(found):
    """Every velocity gathers each part to sample or draw; with --gather-rollouts none does.

    Each part is gathered once then, and takes the memory that is printed. Of three steps the
    first two are stochastic: a rollout asks for both, for two steps behind the first and one
    behind the second. A picture takes two.
    """
    gathers, held, printed = found["entry"]
    assert gathers == PARTS and held == printed > 0
    calls = {"rollout": 5, "drawn": 2}
    for case, each in {"adam": PARTS, "full": PARTS, "lora": 0, "adam-more": 0}.items():
        assert {name for name, *_ in found[case]} == calls.keys()
        assert all(n == each * calls[name] for name, asked, n in found[case])
        assert all(asked == calls[name] for name, asked, _ in found[case])


def same_bits(whole, parts):
    """A run that went on has the state, to the last bit, and the metrics of one that did not."""
    ours, theirs = ({**tensors_in(z / "checkpoints/000002")} for z in (whole, parts))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(z, theirs[name]) for name, z in ours.items())
    assert lines_of(whole) == lines_of(parts)


def tensors_in(checkpoint):
    """All but torch's own generators."""
    paths = [z for z in checkpoint.rglob("*.safetensors") if z.name != "random.safetensors"]
    return {(z.name, name): value for z in paths for name, value in load_file(z).items()}


def lines_of(out):
    """Metrics without the clock."""
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: z for name, z in line.items() if name != "seconds"} for line in lines]


def same_noise(case):
    """What two ranks drew is what one drew, iteration by iteration."""
    one, *two = (torch.load(f"{rank}-{case}.pt") for rank in ("one-0", "two-0", "two-1"))
    assert len(one) == 2
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole, torch.cat(halves))


def weights_of(out):
    """The newest ones, as others load them."""
    newest = out / summary_of(out)["weights"]
    return load_file(newest if newest.is_file() else next(newest.glob("*.safetensors")))


def same_steps(case, start):
    """The saved weights went the same way from the start, which is zero for adapters."""
    one, two = (weights_of(Path(f"{z}-{case}")) for z in ("one", "two"))
    zero = start or {name: torch.zeros_like(w) for name, w in one.items()}
    assert distance(one, zero) > 0
    assert distance(one, two) <= 1e-4 * distance(one, zero)


def same_metrics(case):
    """What was measured on the way is the same."""
    one, two = (Path(f"{z}-{case}/metrics.jsonl").read_text().splitlines() for z in ("one", "two"))
    measured = {"reward", "grad_norm", "kl", f"heldout_{JUDGE}", "heldout_rule"}
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        for key in measured.intersection(a):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), (case, key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("name", "tune"), [("sd3", "lora"), ("flux", "full")])
def test_a_gpu_takes_the_step_of_the_cpu(run, name, tune):
    """In float32 the same judgement and norm of the gradient; in bfloat16 a finite step."""
    common = f"--tune {tune} --kl 0.1 {SGD}"
    cpu, _ = run(name, "cpu", common)
    gpu, _ = run(name, "gpu", f"{common} --device cuda")
    half, weights = run(name, "half", f"{common} --device cuda --dtype bfloat16")
    before, there = (summary_of(out)["heldout"]["before"]["2"] for out in ("cpu", "gpu"))
    assert before == pytest.approx(there, rel=1e-3)
    assert cpu["grad_norm"] == pytest.approx(gpu["grad_norm"], rel=1e-2)
    assert half["grad_norm"] > 0 and all(w.isfinite().all() for w in weights.values())
    summary = summary_of("half")
    assert summary["peak_memory_gib"] > 0 and "cpu" not in summary["device"]


@pytest.mark.usefixtures("no_pictures", "short_texts")
@pytest.mark.parametrize(("failing", "done"), [("warmth", 1), ("contrast", 2)])
def test_a_reward_that_fails_ends_the_run_and_keeps_it(run, failing, done, monkeypatch, capsys):
    """A reward or a judge that is NaN: one line with the prompt, status 1; what is done is saved.

    The first call of either is a trial. The reward fails in the second iteration. The judge's
    fourth call is that of the end: before, it judged a picture and all of the held-out ones.
    """
    good = {"warmth": 2, "contrast": 3}[failing]
    calls = []

    def failing_at_last(images, _):
        calls.append(1)
        return images.mean((1, 2, 3)) * (float("nan") if len(calls) == good + 1 else 1)

    monkeypatch.setattr(f"zoo.rewards.example.{failing}", failing_at_last)
    with pytest.raises(SystemExit) as stop:
        run("flux", "run", "--iterations 2 --rank 2")
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 1 and len(err) == 1
    assert "of prompt '" in err[0] and "is nan" in err[0] and "finite" in err[0]
    summary = summary_of("run")
    assert summary["iterations"] == done and summary["interrupted"]
    assert list(Path("run/lora").iterdir())
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == done + 1


@pytest.mark.usefixtures("no_pictures", "short_texts")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_adapters_are_compared_and_nothing_else_changes(name, run):
    """Each k-term beside the original, under gradient checkpointing too; bit for bit the run."""
    more = "--factors 2 3 --update-batch 1 --lr 0.01"
    plain, weights = run(name, "plain", more)
    told, compared = run(name, "compared", f"{more} --compare-every 1")
    assert {**plain, "seconds": 0} == {**told, "seconds": 0}
    assert all(torch.equal(weights[key], compared[key]) for key in weights)
    text = Path("compared/compare.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["step"], line["k"]) for line in lines] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    for line in lines:
        assert line["group"] == pytest.approx(1, abs=1e-3) and 0 < line["cosine"] < 1
        assert sum(share for _, share in line["share"]) == pytest.approx(1, abs=1e-5)
    assert Path("compared/compare.png").is_file() and not Path("plain/compare.jsonl").exists()
