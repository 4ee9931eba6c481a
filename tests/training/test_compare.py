"""Decomposed beside original on a run's own rollouts: by slow loops, and nothing is changed."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import slow
import torch
from safetensors.torch import load_file
from slow import each_mode
from thread_ranks import together

import pave_grpo as pave
import train
from zoo.training import compare as module
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")
FACTORS = (2, 3)


class Toy:
    """A network asked by the numbers of its prompts."""

    def __init__(self, network):
        self.network, self.tuned = network, [*network.parameters()]

    def velocity(self, prompts):
        numbers = torch.tensor([int(prompt) for prompt in prompts])
        return lambda x, t, prompt: self.network(x, t, numbers[prompt])


def options(**more):
    how = {"factors": FACTORS, "form": "paper", "reduction": "sum"}
    return SimpleNamespace(**how | {"update_batch": 2, "rollout_batch": 0} | more)


def rolled(mode, network, P=2):
    """A rollout of two stochastic steps, with advantages, a silent group among them."""
    process = pave.Process(pave.schedule(4), "flow_sde", 0.7)
    rollout = slow.roll(mode, network, process, P=P, G=4, steps=(0, 2))
    advantages = slow.some_advantages(rollout)
    advantages[-1, -1] = 0
    return rollout, advantages


def compared(o, network, rollout, advantages, ranks=None, prompts=("0", "1")):
    ranks = ranks or Ranks(0, 1, CPU)
    given = (o, Toy(network), list(prompts), rollout, advantages, train.parts_of, ranks)
    return module.compare(*given)


def slow_gradients(o, network, rollout, advantages, j, k):
    """The ascent of the k-term at theta_old through each velocity, one member at a time."""
    thetas, total = [copy.deepcopy(network) for _ in range(k)], 0.0
    A = advantages.expand(rollout.x_s.shape[:3])
    steps = [step for step in slow.observations(rollout) if step.index[1] == j]
    for step in steps:
        calls = iter(thetas)

        def velocity(x, t, prompt, calls=calls):
            return next(calls)(x, t, prompt)

        mean, std = slow.slow_transition(velocity, rollout.process, k, step)
        scored, own = mean, std
        if o.form == "matched":
            scored, own = slow.slow_transition(network, rollout.process, 1, step)
        credit = A[step.index] * (step.x_s - scored.detach()) / own**2
        dims = 1 if o.reduction == "sum" else mean.numel()
        total = total - (credit * mean).sum() / dims / len(steps)
    return [slow.gradient(total, theta) for theta in thetas]


def slow_attribution(o, network, rollout, advantages, j, k):
    """(member, group): cosines with the original's, of members and of the least group."""
    A = advantages.expand(rollout.x_s.shape[:3])
    members, groups = [], {}
    for step in slow.observations(rollout):
        p, at, _ = step.index
        if at != j or A[step.index] == 0:
            continue
        credit = []
        for i in (k if o.form == "paper" else 1, 1):
            mean, _ = slow.slow_transition(network, rollout.process, i, step)
            credit.append(A[step.index] * (step.x_s - mean).flatten().detach())
        members.append(torch.cosine_similarity(*credit, dim=0))
        sums = groups.setdefault(p, [0.0, 0.0])
        groups[p] = [total + own for total, own in zip(sums, credit)]
    least = min(torch.cosine_similarity(*sums, dim=0) for sums in groups.values())
    return (sum(members) / len(members)).item(), least.item()


@each_mode
@pytest.mark.parametrize("form", ["paper", "matched"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_figure_is_that_of_slow_loops(mode, form, reduction):
    """Step by step and k by k, whatever the parts of a backward pass."""
    o, network = options(form=form, reduction=reduction), slow.network(1)
    rollout, advantages = rolled(mode, network)
    lines = compared(o, network, rollout, advantages)
    assert [(line["step"], line["k"]) for line in lines] == [(0, 2), (0, 3), (2, 2), (2, 3)]
    grid = rollout.process.grid.tolist()
    for line in lines:
        j, k = (0, 2).index(line["step"]), line["k"]
        t, s = grid[line["step"] : line["step"] + 2]
        assert (line["t"], line["s"]) == (t, s)
        (original,) = slow_gradients(o, network, rollout, advantages, j, 1)
        through = slow_gradients(o, network, rollout, advantages, j, k)
        whole = sum(through)
        assert line["original"] == pytest.approx(original.norm().item(), rel=1e-9)
        assert line["norm"] == pytest.approx((whole.norm() / original.norm()).item(), rel=1e-9)
        cosine = torch.cosine_similarity(whole, original, dim=0).item()
        assert line["cosine"] == pytest.approx(cosine, rel=1e-9)
        times = [t - call * (t - s) / k for call in range(k)]
        shares = [((part @ whole) / (whole @ whole)).item() for part in through]
        assert [time for time, _ in line["share"]] == pytest.approx(times)
        assert [share for _, share in line["share"]] == pytest.approx(shares, abs=1e-9)
        member, group = slow_attribution(o, network, rollout, advantages, j, k)
        assert (line["member"], line["group"]) == pytest.approx((member, group), abs=1e-9)
        record = slow.theory.of("flow_sde", 0.7)
        weight = 1.0 if form == "matched" else (record.std(1, t, s) / record.std(k, t, s)) ** 2
        assert line["weight"] == pytest.approx(weight)


def test_two_ranks_say_what_one_says(monkeypatch):
    """Gradients and attributions are means over ranks before they are compared."""
    network = slow.network(2)
    rollout, advantages = rolled("shared_anchor", network, P=4)
    whole = compared(options(), network, rollout, advantages, prompts="0123")

    def job(ranks):
        own = [2 * ranks.rank, 2 * ranks.rank + 1]
        part = slow.of_prompts(rollout, own)
        return compared(options(), copy.deepcopy(network), part, advantages[own], ranks, own)

    for found in together(monkeypatch, job):
        for line, wanted in zip(found, whole, strict=True):
            for name, value in wanted.items():
                if name == "share":
                    assert torch.allclose(torch.tensor(line[name]), torch.tensor(value))
                else:
                    assert line[name] == pytest.approx(value, rel=1e-9), name


def test_silence_is_null():
    """Where no member has an advantage there is nothing to compare, and nothing is NaN."""
    network = slow.network(3)
    rollout, advantages = rolled("shared_anchor", network)
    for line in compared(options(), network, rollout, 0 * advantages):
        assert line["original"] == 0 and line["weight"] > 1
        assert all(line[name] is None for name in ("norm", "cosine", "share", "member", "group"))
        json.dumps(line, allow_nan=False)


FLAGS = (
    "--iterations 2 --group-size 3 --prompts-per-iteration 2 --steps 3 --sde-steps 0 1 --heldout 4 "
    "--eval-steps 1 --device cpu --updates 2 --update-batch 1 --ema 0.5 "
    "--reward zoo.rewards.example:warmth"
)


@pytest.mark.usefixtures("one_process", "no_pictures", "small_network")
def test_nothing_else_of_a_run_changes():
    """Metrics and weights, bit for bit; the lines are of the iterations asked for."""
    for out, more in (("with", "--compare-every 2"), ("without", "")):
        train.main([*FLAGS.split(), *more.split(), "--out", out])
    lines = [json.loads(x) for x in Path("with/compare.jsonl").read_text().splitlines()]
    assert [(x["iteration"], x["step"], x["k"]) for x in lines] == [
        (2, step, k) for step in (0, 1) for k in FACTORS
    ]
    assert Path("with/compare.png").is_file() and not Path("without/compare.jsonl").exists()
    weights = [load_file(Path(out, "checkpoint.safetensors")) for out in ("with", "without")]
    for name, w in weights[0].items():
        assert torch.equal(w, weights[1][name]), name
    metrics = []
    for out in ("with", "without"):
        kept = [json.loads(x) for x in Path(out, "metrics.jsonl").read_text().splitlines()]
        metrics.append([{**line, "seconds": None} for line in kept])
    assert metrics[0] == metrics[1]


def test_curves_are_those_of_the_lines():
    """Of each step its own row; cosine, size and weight of each k, shares of the largest."""
    lines = []
    for iteration in (1, 2):
        for step in (0, 2):
            for k in FACTORS:
                unique = iteration + 10 * step + 100 * k
                line = {"iteration": iteration, "step": step, "t": 1.0, "s": 0.5, "k": k}
                line |= {"cosine": unique, "norm": unique + 0.1, "weight": unique + 0.2}
                line |= {"group": unique + 0.3, "member": unique + 0.4, "original": 1.0}
                line["share"] = [[1 - call / k, unique + call / 10] for call in range(k)]
                lines.append(line)
    figure = module.draw_comparison(lines)
    rows = [figure.axes[:3], figure.axes[3:]]
    for step, row in zip((0, 2), rows, strict=True):
        drawn = [[[*line.get_ydata()] for line in ax.lines] for ax in row]
        own = [x for x in lines if x["step"] == step]
        names = [("cosine", "group", "member"), ("norm", "weight")]
        for panel, kinds in zip(drawn, names):
            wanted = [[x[name] for x in own if x["k"] == k] for k in FACTORS for name in kinds]
            assert panel == wanted
        last = [x for x in own if x["k"] == 3]
        assert drawn[2] == [[x["share"][call][1] for x in last] for call in range(3)]
        assert all([*line.get_xdata()] == [1, 2] for ax in row for line in ax.lines)
