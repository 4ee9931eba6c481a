"""The training program: what it does to the weights, leaves and costs, and how it stops."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.training import command_line, costs, draw, evaluate, policies, prompts
from zoo.training.metrics import merge
from zoo.training.options import policy_of, stochastic_steps
from zoo.training.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_process", "small_network")
SHORT = shlex.split(
    "--prompts-per-iteration 2 --group-size 4 --steps 4 --sde-steps 0 1 "
    "--reward zoo.rewards.example:warmth --heldout 4 --eval-steps 2 4"
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def run(out: str, flags: str) -> list[dict]:
    """A short run; the lines of its metrics.jsonl without the clock."""
    train.main([*SHORT, "--out", out, *flags.split()])
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights_of(out: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}/checkpoint.safetensors")


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_run_leaves_what_the_documents_promise(device, capsys):
    """Config, metrics, pictures, a complete summary, and a checkpoint one can judge and draw."""
    lines = run("run", f"--iterations 2 --eval-every 1 --device {device}")
    summary = json.loads(Path("run/summary.json").read_text())
    assert set(summary["heldout"]) == {"before", "after"}
    assert set(summary["heldout"]["after"]) == {"2", "4"}
    assert set(summary["heldout"]["after"]["2"]) == {"right", "rule"}
    kept = {"diversity", "seconds", "iterations", "seed", "device", "versions", "command"}
    assert kept <= set(summary)
    assert summary["iterations"] == 2 and not summary["interrupted"]
    assert json.loads(Path("run/config.json").read_text())["group_size"] == 4
    for picture in ("before_after.png", "curve.png"):
        assert Path("run", picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [line["iteration"] for line in lines] == [0, 1, 1, 2, 2]
    trained = [line for line in lines if "reward" in line]
    judged = [line for line in lines if "heldout_right" in line]
    assert len(trained) == 2 and len(judged) == 3
    for line in trained:  # one update: E9
        assert line["ratio_3"] == 1 and line["clip_fraction_3"] == 0

    capsys.readouterr()
    checkpoint = "run/checkpoint.safetensors"
    on = ["--device", device]
    evaluate.main([checkpoint, "--heldout", "4", "--eval-steps", "2", "4", *on])
    assert json.loads(capsys.readouterr().out)["heldout"] == summary["heldout"]["after"]
    asked = ["--prompt", "two red circles", "a green square"]
    draw.main([checkpoint, *asked, "--out", "drawn", *on])
    assert Path("drawn/samples.png").stat().st_size > 1000


@pytest.mark.usefixtures("no_pictures")
def test_same_seed_same_numbers_and_another_seed_others():
    """A run is a function of its options: equal metrics and weights for equal seeds."""
    flags = "--iterations 1 --updates 2 --kl 0.1 --seed"
    lines = {out: run(out, f"{flags} {seed}") for out, seed in (("a", 0), ("b", 0), ("c", 1))}
    weights = {out: weights_of(out) for out in lines}
    assert lines["a"] == lines["b"] != lines["c"]
    assert all(torch.equal(w, weights["b"][name]) for name, w in weights["a"].items())
    assert any(not torch.equal(w, weights["c"][name]) for name, w in weights["a"].items())
    (line,) = [line for line in lines["a"] if "reward" in line]
    assert line["ratio_1"] != 1 and line["kl"] > 0  # the second update has moved


@pytest.mark.usefixtures("no_pictures")
def test_only_what_is_tuned_moves():
    """--tune transformer leaves layers at pixel resolution alone, bit for bit; full does not."""
    network = shapes_model.load(shapes_model.CHECKPOINT)
    start = network.state_dict()
    modules = {name for name, _ in network.named_children()}
    pixel = set(shapes_model.PIXEL_LAYERS)
    assert pixel < modules
    for tune, moving in (("transformer", set()), ("full", pixel)):
        run(tune, f"--iterations 1 --tune {tune}")
        moved = {
            name.split(".")[0]
            for name, w in weights_of(tune).items()
            if not torch.equal(w, start[name])
        }
        assert moved & pixel == moving and "blocks" in moved


@pytest.mark.usefixtures("no_pictures", "small_network")
def test_no_gradient_is_held_while_sampling(monkeypatch):
    """The first iteration's are gone when the second samples: they are as large as the weights."""
    plain, held, tuned = train.ROLLOUTS["shared_anchor"], [], []
    optimizer_of = train.optimizer_of

    def noted(o, parameters, *given):
        tuned.extend(parameters)
        return optimizer_of(o, parameters, *given)

    def sampled(*args):
        held.append(sum(p.grad is not None for p in tuned))
        return plain(*args)

    monkeypatch.setattr(train, "optimizer_of", noted)
    monkeypatch.setitem(train.ROLLOUTS, "shared_anchor", sampled)
    run("run", "--iterations 2")
    assert tuned and held == [0, 0]


def test_the_rate_warms_up_to_what_was_asked():
    """i / (warmup + 1) of it in iteration i, and exactly all of it afterwards."""
    o = command_line.parse(["--warmup", "15", "--lr", "2e-4"])
    optimizer, rate = train.optimizer_of(o, [torch.nn.Parameter(torch.zeros(()))])
    rates = []
    for _ in range(40):
        rates.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    assert rates[:15] == pytest.approx([2e-4 * i / 16 for i in range(1, 16)], rel=1e-12)
    assert rates[15:] == [2e-4] * 25


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_there(which, monkeypatch, capsys):
    """The first lets the iteration finish, saves, says how to go on, and has its own status."""
    plain = train.iterate

    def interrupted(*args):
        os.kill(os.getpid(), which)
        return plain(*args)

    monkeypatch.setattr(train, "iterate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("run", "--iterations 5")
    assert stop.value.code == 3 and "add --resume run to train.py" in capsys.readouterr().out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["interrupted"] and summary["iterations"] == 1
    assert "after" not in summary["heldout"]
    assert weights_of("run") and Path("run/before_after.png").exists()


class Counted(torch.nn.Module):
    """A network of one weight that counts its rows by what they are for."""

    def __init__(self, rows: dict[str, int], reference: bool):
        super().__init__()
        self.w, self.rows, self.reference = torch.nn.Parameter(torch.ones(())), rows, reference

    def forward(self, x, t, tokens):
        kind = "trained" if torch.is_grad_enabled() else "sampled"
        self.rows["reference" if self.reference else kind] += len(x)
        return self.w * x


@pytest.mark.parametrize("rollouts", ["shared_anchor", "independent"])
@pytest.mark.parametrize("flags", ["", "--updates 2 --kl 0.1", "--factors"])
def test_the_announced_cost_is_the_cost(rollouts, flags):
    """Network rows counted in one iteration are those printed before the run."""
    o = command_line.parse([*SHORT, "--rollouts", rollouts, *flags.split()])
    rows = {"sampled": 0, "trained": 0, "reference": 0}
    policy, ranks = policy_of(o), Ranks(0, 1, torch.device("cpu"))
    policy.network, policy.reference = Counted(rows, False), Counted(rows, True)
    policy.tuned = list(policy.network.parameters())
    (rule,) = spec.load_all([o.reward])
    optimizer = torch.optim.SGD(policy.tuned, 0.1)
    train.iterate(o, 1, policy, rule, prompts.Prompts(), optimizer, None, ranks)
    cost = costs.cost_of(o, stochastic_steps(o, policy), o.factors)
    assert rows == {"sampled": cost.sampled, "trained": cost.trained, "reference": cost.reference}


def test_dry_run_prints_the_papers_floor_and_writes_nothing(capsys):
    """In the authors' setting 583 rows are sampled a prompt, and S = {2, 3} adds 6 %."""
    setting = "--group-size 12 --steps 16 --shift 3 --sde-steps 0 2 4 6 --kernel flow_sde"
    train.main(["--dry-run", "--prompts-per-iteration", "1", *setting.split()])
    out = capsys.readouterr().out
    assert "583 sampled, 16 trained" in out and "48 images" in out and "6.1 %" in out
    assert not any(Path().iterdir())


def test_metrics_of_ranks_merge_by_their_names():
    """Means of means, extremes of extremes, clip fractions by the members they are fractions of."""
    one = {"reward": 0.2, "ratio_1_min": 0.9, "ratio_1_max": 1.1}
    two = {"reward": 0.6, "ratio_1_min": 0.8, "ratio_1_max": 1.0}
    one |= {"clip_fraction_1": 1.0, "signal": 0.25}
    two |= {"clip_fraction_1": 0.0, "signal": 0.75}
    wanted = {"reward": 0.4, "ratio_1_min": 0.8, "ratio_1_max": 1.1}
    wanted |= {"clip_fraction_1": 0.25, "signal": 0.5}
    assert merge([one, two]) == pytest.approx(wanted)
    by_share = merge([one, two], [0.75, 0.25])
    assert by_share["reward"] == pytest.approx(0.3) and by_share["ratio_1_min"] == 0.8
    assert by_share["clip_fraction_1"] == pytest.approx(0.5)  # 3/4 * 1/4 against 1/4 * 3/4


def test_a_picture_does_not_depend_on_its_batch():
    """It depends on its own prompt and noise, up to float32 rounding."""
    o, policy, device = command_line.parse([]), policies.Embedded(), torch.device("cpu")
    asked, noise = prompts.Prompts().pairs(policy.shape, 8)
    batch = draw.draw(o, policy, asked, noise, 2, device)
    for i, prompt in enumerate(asked):
        alone = draw.draw(o, policy, [prompt], noise[i : i + 1], 2, device)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-4)
