"""A run of the embedded model against its replay: parameters, averages, rates, every metric."""

import json
from pathlib import Path

import pytest
from replay import Replay, asked_warmth, same_lines
from safetensors.torch import load_file

import train
from zoo.rewards import example
from zoo.shapes import rule
from zoo.training.command_line import parse

pytestmark = pytest.mark.usefixtures("one_process", "no_pictures")
WARMTH, CONTRAST = "replay:asked_warmth", "zoo.rewards.example:contrast"
REWARDS = {WARMTH: (asked_warmth, 2.0), CONTRAST: (example.contrast, 0.5)}
JUDGES = {CONTRAST: example.contrast, "rule": rule.reward}
COMMON = (
    f"--reward {WARMTH}:2 {CONTRAST}:0.5 --eval-reward {CONTRAST} rule --heldout 8 "
    "--eval-steps 2 1 --eval-every 1 --iterations 2 --updates 2 --prompts-per-iteration 2 "
    "--group-size 3 --steps 3 --sde-steps 0 1 --device cpu --warmup 1 --seed 5"
)
RUNS = [
    "--lr 1e-3 --weight-decay 1 --clip 1e-4 --kl 3 --update-batch 1 --ema 0.75",
    "--lr 1e-3 --weight-decay 0 --rollouts independent --form matched --factors 2 --kernel cps "
    "--update-batch 2 --rollout-batch 5 --reward-batch 4 --eval-batch 4",
    "--optimizer sgd --lr 0.3 --max-grad-norm 1e-2 --rollouts independent --own-start --tune full "
    "--reduction sum --clip 0.2 --kl 0.1 --factors 3 --shift 2 --eta 0.4 --ema 0.5",
    "--lr 1e-3 --factors --form midpoint --place uniform --kl 3 --clip 1e-4 --update-batch 1",
    "--optimizer sgd --lr 0.3 --factors --form midpoint --rollouts independent --update-batch 2 "
    "--kernel cps",
    "--optimizer sgd --lr 1 --factors --max-grad-norm inf --kernel dance --update-batch 1",
    "--lr 1e-3 --step-weights noise --ratio-norm --clip 1e-5 --update-batch 1",
    "--lr 1e-3 --step-weights noise --term-weights rescaled --optimizer sgd --kernel dance",
    "--lr 1e-3 --step-weights level --advantages centred --optimizer sgd --lr 3 --update-batch 1 "
    "--factors 2",
    "--step-weights gamma --term-weights rescaled --optimizer sgd --lr 0.3 --kernel dance "
    "--max-grad-norm inf",
    "--step-weights gamma --optimizer sgd --lr 0.3 --max-grad-norm inf --rollouts independent "
    "--window-every 1 --window-by -1 --steps 4 --sde-steps 2 3 --iterations 4 --update-batch 1",
    "--lr 1e-3 --form matched --ratio-norm --reduction sum --clip 1e-2 --kernel cps",
    "--optimizer sgd --lr 1 --factors --form midpoint --ratio-norm --step-weights noise "
    "--window-every 2 --window-by 1 --sde-steps 0 --iterations 4 --kernel dance",
]


@pytest.mark.parametrize("flags", RUNS)
def test_a_run_is_its_replay(flags, request):
    """Two iterations of two updates, judged after each: to the rounding of float32 networks.

    Parts, chunks and batches round otherwise: 1e-3 of a step, where a lost part, a gradient kept,
    another rate or a stale weight is an error of order 1. Each of some ten updates rounds a weight
    by 2^-24 of itself, in either program.

    The two runs with a window train the shipped network: at their rates the gradient of the small
    one grows a hundredfold, or vanishes.
    """
    if "--window-every" not in flags:
        request.getfixturevalue("small_network")
    line = [*COMMON.split(), *flags.split()]
    train.main([*line, "--out", "run"])
    replay = Replay(parse(line), REWARDS, JUDGES).run()
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    same_lines(lines, replay.lines)
    summary = json.loads(Path("run/summary.json").read_text())
    for when, means in replay.judged.items():
        assert set(summary["heldout"][when]) == set(means)
        for steps, own in means.items():
            assert summary["heldout"][when][steps] == pytest.approx(own, abs=1e-5)

    found, start = (
        load_file("run/checkpoint.safetensors"),
        dict(replay.initial.network.named_parameters()),
    )
    moved = 0.0
    for name, wanted in replay.policy.network.named_parameters():
        error, step = (found[name] - wanted).norm(), (start[name] - wanted).norm()
        rounding = 20 * 2**-24 * wanted.norm()
        assert error <= 1e-3 * step + rounding, (name, error, step)
        moved += step.item()
    assert moved > 0


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("reward", "silent", "signal"), [("by_turns", 0, 2 / 3), ("alike", 1, 0)])
def test_silence_is_counted_by_group_and_signal_by_member(reward, silent, signal):
    """A group with one silent member speaks; one of equal rewards moves nothing."""
    flags = f"--reward replay:{reward} --iterations 1 --updates 1"
    train.main([*COMMON.split(), *flags.split(), "--out", "run"])
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[1])
    assert (line["silent_groups"], line["signal"]) == (silent, pytest.approx(signal))
    assert (line["grad_norm"] == 0) == (signal == 0)
