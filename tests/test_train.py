"""The training program: its options, its bookkeeping, its runs on one rank and on two."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from zoo.rewards import spec as rewards
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes
from zoo.training import costs, policies, prompts

ROOT = Path(__file__).parents[1]
SHORT = [
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
    "2",
    "4",
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
    ),
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """Every test runs in a folder of its own, on one thread, as if started without torchrun; pictures are small."""
    monkeypatch.chdir(tmp_path)
    shown = prompts.Prompts.shown
    monkeypatch.setattr(
        prompts.Prompts, "shown", lambda self, shape, kind: shown(self, shape, kind, 2)
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


def metrics_of(folder: str) -> list[dict]:
    """Lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_run_leaves_what_the_readme_promises(device, capsys):
    """Config, metrics, pictures, a checkpoint that --evaluate judges as the run did, and a complete summary."""
    train.main(
        [*SHORT, "--iterations", "2", "--eval-every", "1", "--out", "run", "--device", device]
    )
    summary = json.loads(Path("run/summary.json").read_text())
    assert set(summary["heldout"]) == {"before", "after"} and set(summary["heldout"]["after"]) == {
        "2",
        "4",
    }
    assert set(summary["heldout"]["after"]["2"]) == {"right", "rule"}
    assert {"diversity", "seconds", "iterations", "seed", "device", "versions", "command"} <= set(
        summary
    )
    assert summary["iterations"] == 2 and not summary["interrupted"]
    assert json.loads(Path("run/config.json").read_text())["group_size"] == 4
    for picture in ("before_after.png", "curve.png"):
        assert Path("run", picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = metrics_of("run")
    assert [line["iteration"] for line in lines] == [0, 1, 1, 2, 2]
    trained, judged = (
        [m for m in lines if "reward" in m],
        [m for m in lines if "heldout_right" in m],
    )
    assert len(trained) == 2 and len(judged) == 3
    assert all(
        line["ratio_3"] == 1 and line["clip_fraction_3"] == 0 for line in trained
    )  # one update: E9
    capsys.readouterr()
    train.main(
        [
            "--evaluate",
            "run/checkpoint.safetensors",
            "--heldout",
            "4",
            "--device",
            device,
            "--eval-steps",
            "2",
            "4",
        ]
    )
    assert json.loads(capsys.readouterr().out)["heldout"] == summary["heldout"]["after"]
    train.main(
        [
            "--sample",
            "run/checkpoint.safetensors",
            "--prompt",
            "two red circles",
            "a green square",
            "--out",
            "drawn",
            "--device",
            device,
        ]
    )
    assert Path("drawn/samples.png").stat().st_size > 1000


def test_same_seed_same_numbers_and_another_seed_others():
    """A run is a function of its options: equal metrics and weights for equal seeds, different ones otherwise."""
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train.main(
            [
                *SHORT,
                "--iterations",
                "1",
                "--seed",
                seed,
                "--out",
                folder,
                "--updates",
                "2",
                "--kl",
                "0.1",
            ]
        )
    weights = {folder: load_file(f"{folder}/checkpoint.safetensors") for folder in "abc"}
    assert metrics_of("a") == metrics_of("b") != metrics_of("c")
    assert all(torch.equal(w, weights["b"][name]) for name, w in weights["a"].items())
    assert any(not torch.equal(w, weights["c"][name]) for name, w in weights["a"].items())
    (line,) = [
        m for m in metrics_of("a") if "reward" in m
    ]  # the second update has moved, and knows the reference
    assert line["ratio_1"] != 1 and line["kl"] > 0


def test_only_what_is_tuned_moves():
    """--tune transformer leaves the layers at pixel resolution as they are, bit for bit; --tune full moves them too."""
    start = shapes_model.load().state_dict()
    modules = {name for name, _ in shapes_model.load().named_children()}
    assert set(shapes_model.PIXEL_LAYERS) < modules
    for tune in ("transformer", "full"):
        train.main([*SHORT, "--iterations", "1", "--tune", tune, "--out", tune])
        moved = {
            name.split(".")[0]
            for name, w in load_file(f"{tune}/checkpoint.safetensors").items()
            if not torch.equal(w, start[name])
        }
        assert moved & set(shapes_model.PIXEL_LAYERS) == (
            set() if tune == "transformer" else set(shapes_model.PIXEL_LAYERS)
        )
        assert "blocks" in moved


def test_the_optimizers_options_act():
    """One step has the length that rate, warm-up and norm clipping give it, and weight decay pulls by rate * decay."""
    start = shapes_model.load().state_dict()

    def stepped(out, *flags):
        train.main([*SHORT, "--iterations", "1", "--out", out, *flags])
        weights = load_file(f"{out}/checkpoint.safetensors")
        return metrics_of(out)[1], {name: w - start[name] for name, w in weights.items()}

    def length(moved):
        return sum(z.double().square().sum() for z in moved.values()) ** 0.5

    sgd = ["--optimizer", "sgd", "--lr", "4", "--warmup", "3"]
    metrics, moved = stepped("sgd", *sgd)
    assert metrics["lr"] == 1 and length(moved) == pytest.approx(metrics["grad_norm"], rel=1e-3)
    metrics, clipped = stepped("clipped", *sgd, "--max-grad-norm", "1e-3")
    assert metrics["grad_norm"] > 1e-3 and length(clipped) == pytest.approx(1e-3, rel=1e-2)
    adam = ["--lr", "0.01", "--warmup", "0", "--weight-decay"]
    (_, free), (_, pulled) = stepped("free", *adam, "0"), stepped("pulled", *adam, "2")
    for name in free:
        if name.split(".")[0] not in shapes_model.PIXEL_LAYERS:
            torch.testing.assert_close(
                pulled[name] - free[name], -0.02 * start[name], rtol=1e-3, atol=1e-6
            )


def test_every_key_has_a_stream_of_its_own():
    """Keys of other lengths or with zeros at their end are other streams: training never draws held-out noise."""
    keys = [
        (0,),
        (0, 0),
        (0, 0, 0),
        (0, 1),
        (0, 1, 0),
        (1,),
        (1, 0),
        (1, 0, 0),
        (1, 1, 0),
        (0, 1, 1),
    ]
    first = {torch.randn(4, generator=prompts.generator_of(*key)).sum().item() for key in keys}
    assert len(first) == len(keys)


def test_ctrl_c_keeps_what_is_there(monkeypatch):
    """The first Ctrl-C lets the iteration finish, then saves checkpoint, pictures and a summary that says so."""
    plain = train.iterate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(train, "iterate", interrupted)
    train.main([*SHORT, "--iterations", "5", "--out", "run"])
    summary = json.loads(Path("run/summary.json").read_text())
    assert (
        summary["interrupted"] and summary["iterations"] == 1 and "after" not in summary["heldout"]
    )
    assert load_file("run/checkpoint.safetensors") and Path("run/before_after.png").exists()


BAD = {  # the command line, and what the one line must name
    "--group-size 1": "--group-size 1",
    "--factors 1": "factors=[1]",
    "--factors 2 2": "factors=[2, 2]",
    "--kernel ddpm": "--kernel",
    "--eta 0": "eta=0.0",
    "--kernel cps --eta 1.5": "eta=1.5",
    "--form both": "--form",
    "--kernel cps --sde-steps 7": "step 7 ends at t = 0",
    "--sde-steps 8": "sde_steps=[8]",
    "--steps 0": "steps=0",
    "--shift 0": "shift=0.0",
    "--prompts-per-iteration 0": "--prompts-per-iteration 0",
    "--clip -1": "--clip -1",
    "--lr nan": "--lr nan",
    "--heldout 6": "--heldout 6",
    "--own-start": "--own-start",
    "--prompt circle": "--prompt",
    "--sample no.safetensors --prompt circle": "circle",
    "--evaluate no.safetensors": "no.safetensors",
    f"--evaluate {ROOT / 'train.py'}": "train.py",
    "--updates 0": "--updates 0",
    f"--out {ROOT}": "--out",
    "--kl -0.1": "--kl -0.1",
    "--seed -1": "--seed -1",
    "--device tpu": "--device tpu",
    "--iterations x": "'x'",
    "--max-grad-norm 0": "--max-grad-norm 0",
    "--threads -1": "--threads -1",
    "--eval-every -1": "--eval-every -1",
    "--warmup -1": "--warmup -1",
    "--weight-decay -1": "--weight-decay -1",
    "--iterations -1": "--iterations -1",
    "--iterations 0": "--iterations 0",
    "--dry-run --evaluate x": "--dry-run",
    "--sample x --prompt y --kernel dance": "--kernel",
    "--optimizer sgd --weight-decay 0.1": "--weight-decay: must be left out",
    "--factors --form matched": "--form",
    "--sde-steps 2 1": "sde_steps=[2, 1]",
    "--tune head": "--tune",
    "--sample x": "--sample x",
    "--iter 3": "--iter",
    "--device cuda:9": "--device cuda:9",
    "--evaluate x --out y": "--out",
    "--guidance 3": "--guidance",
    "--dtype bfloat16": "--dtype",
    "--size 64 64": "--size",
    "--rank 4": "--rank",
    "--preset paper-flux": "--preset",
    "--tune lora": "--tune lora",
    "--ema 1": "--ema 1",
    "--decode-batch 2": "--dec",
    "--update-batch -1": "--update-batch -1",
    "--eval-batch 6": "--eval-batch 6",
    "--eval-steps": "--eval-steps",
    "--eval-steps 8 8": "--eval-steps 8 8",
    "--reward": "--reward",
    "--reward aesthetics": "'aesthetics'",
    "--reward rule:-1": "'rule:-1'",
    "--reward rule rule:2": "given twice",
    "--prompts no.txt": "--eval-prompts",
    "--prompts no.txt --eval-prompts no.txt": "'no.txt'",
    f"--model {ROOT}": "model_index.json",
    f"--prompts {ROOT}/requirements.txt --eval-prompts {ROOT}/LICENSE": "torch==",
}


@pytest.mark.parametrize(("flags", "named"), BAD.items())
def test_bad_options_give_one_clear_line_and_status_2_before_any_work(
    flags, named, capsys, monkeypatch
):
    """One line on standard error that names what was wrong, exit status 2, and nothing written."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err
    assert not any(Path().iterdir())


def test_prompts_must_divide_among_the_ranks(monkeypatch, capsys):
    """Eight prompts on three ranks are refused: ranks of unequal shares would weigh prompts unequally."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        train.parse([])
    assert "multiple of the 3 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("rollouts", ["shared_anchor", "independent"])
@pytest.mark.parametrize(
    "flags", [[], ["--updates", "2", "--kl", "0.1"], ["--factors"]], ids=["S", "KL", "plain"]
)
def test_the_announced_cost_is_the_cost(rollouts, flags):
    """Network rows counted in one iteration, sampled and trained, are those printed before the run."""
    o = train.parse([*SHORT, "--rollouts", rollouts, *flags])
    rows = {"sampled": 0, "trained": 0, "reference": 0}

    class Counted(torch.nn.Module):
        def __init__(self, reference: bool):
            super().__init__()
            self.w, self.reference = torch.nn.Parameter(torch.ones(())), reference

        def forward(self, x, t, tokens):
            kind = (
                "reference"
                if self.reference
                else "trained"
                if torch.is_grad_enabled()
                else "sampled"
            )
            rows[kind] += len(x)
            return self.w * x

    policy, ranks = train.policy_of(o), train.Ranks(0, 1, torch.device("cpu"))
    policy.network, policy.reference = Counted(False), Counted(True)
    policy.tuned = list(policy.network.parameters())
    rule = rewards.load_all([o.reward])[0]
    train.iterate(
        o, 1, policy, rule, prompts.Prompts(), torch.optim.SGD(policy.tuned, 0.1), None, ranks
    )
    cost = costs.cost_of(o, train.stochastic_steps(o, policy), o.factors)
    assert rows == {"sampled": cost.sampled, "trained": cost.trained, "reference": cost.reference}


def test_dry_run_prints_the_paper_floor_and_writes_nothing(capsys):
    """In the authors' setting the count gives 583 sampled rows a prompt and S = {2, 3} adds 6 % (PAPER.md)."""
    train.main(
        [
            "--dry-run",
            "--prompts-per-iteration",
            "1",
            "--group-size",
            "12",
            "--steps",
            "16",
            "--shift",
            "3",
            "--sde-steps",
            "0",
            "2",
            "4",
            "6",
            "--kernel",
            "flow_sde",
        ]
    )
    out = capsys.readouterr().out
    assert "583 sampled, 16 trained" in out and "48 images" in out and "6.1 %" in out
    assert not any(Path().iterdir())


def test_randomness_belongs_to_the_prompt():
    """A prompt's generator depends on (seed, iteration, index) alone, and no two of them share a stream."""
    keys = [(s, i, j) for s in range(3) for i in range(3) for j in range(3)]
    draws = {key: torch.randn(4, generator=prompts.generator_of(*key)) for key in keys}
    assert torch.equal(draws[0, 1, 2], torch.randn(4, generator=prompts.generator_of(0, 1, 2)))
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    shares = [train.Ranks(rank, 4, torch.device("cpu")).share(8) for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(8))


def test_heldout_pairs_are_fixed_and_never_trained_on():
    """512 pairs, the same every time, 4 noises a prompt, from prompts that alignment never draws."""
    asked, noise = prompts.Prompts().pairs((3, 32, 32), 512)
    again, same = prompts.Prompts().pairs((3, 32, 32), 512)
    assert asked == again and torch.equal(noise, same) and noise.shape == (512, 3, 32, 32)
    assert len({tuple(z.flatten()[:8].tolist()) for z in noise}) == 512
    assert not set(asked) & set(shapes.TRAIN_PROMPTS)
    assert {shapes.parse(p).family for p in asked} == {"count", "conjunction", "relation"}


def test_metrics_of_ranks_merge_by_their_names():
    """Means of means, extremes of extremes, clip fractions by the members they are fractions of."""
    parts = [
        {
            "reward": 0.2,
            "ratio_min": 0.9,
            "ratio_max": 1.1,
            "clip_fraction_1": 1.0,
            "signal": 0.25,
            "share": 0.5,
        },
        {
            "reward": 0.6,
            "ratio_min": 0.8,
            "ratio_max": 1.0,
            "clip_fraction_1": 0.0,
            "signal": 0.75,
            "share": 0.5,
        },
    ]
    wanted = {
        "reward": 0.4,
        "ratio_min": 0.8,
        "ratio_max": 1.1,
        "clip_fraction_1": 0.25,
        "signal": 0.5,
    }
    assert train.merge(parts) == pytest.approx(wanted)


def test_deterministic_evaluation_steps_do_not_mix_rows():
    """An image depends on its own prompt and noise, not on the batch it is drawn in (float32 rounding apart)."""
    o, policy, device = train.parse([]), policies.Embedded(), torch.device("cpu")
    asked, noise = prompts.Prompts().pairs(policy.shape, 8)
    together = train.draw(o, policy, asked, noise, 2, device)
    alone = torch.cat(
        [train.draw(o, policy, [p], z[None], 2, device) for p, z in zip(asked, noise)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
