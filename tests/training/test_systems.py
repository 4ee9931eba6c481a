"""Neighbouring methods, run by the commands of docs/CONVENTIONS.md, against their published rules.

Each rule is written out here for one member at a time, with the step as its paper has it: nothing
of pave_grpo.py is used. Two iterations of plain gradient ascent, one update each, end where the
program ends, to the rounding of float32 networks. Clipping acts from the second update on only.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from replay import asked_warmth
from safetensors.torch import load_file

import train
from zoo.training.command_line import parse
from zoo.training.options import policy_of, prompts_of
from zoo.training.prompts import generator_of

pytestmark = pytest.mark.usefixtures("one_process", "no_pictures", "small_network")
PAGE = (Path(__file__).parents[2] / "docs/CONVENTIONS.md").read_text()
SMALL = (
    "--reward replay:asked_warmth --eval-reward rule --heldout 4 --eval-steps 1 --iterations 2 "
    "--prompts-per-iteration 2 --group-size 3 --device cpu --seed 7 --optimizer sgd --lr 0.3 "
    "--warmup 0 --max-grad-norm inf --steps 5"
)
LR, G, T = 0.3, 3, 5


class System(NamedTuple):
    """A published rule: its step, where it is stochastic in iteration 1 and 2, and the rest."""

    step: object  # (x, v, t, s, t_1) -> (mean, std)
    steps: tuple
    branches: bool = False  # members leave one ODE trajectory, and only one of their steps is drawn
    own_start: bool = False
    weigh_by_noise: bool = False
    replaced: tuple = ()  # flags of the command that such a short run cannot have


def euler_maruyama(x, v, t, s, g):
    """dx = [v + g^2/(2t) (x + (1-t) v)] dt + g dw, run backwards from t to s."""
    dt = s - t
    mean = x + (v + g**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return mean, g * math.sqrt(-dt)


def flow_grpo(x, v, t, s, t_1):
    """sigma_t = 0.7 sqrt(t/(1-t)), with the next time in 1 - t at t = 1."""
    return euler_maruyama(x, v, t, s, 0.7 * math.sqrt(t / (1 - (t_1 if t == 1 else t))))


def dance_grpo(x, v, t, s, t_1):
    """Drift with the score -(x - (1-t) x0_hat)/t^2 and a constant eta."""
    eta, x_0 = 0.3, x - t * v
    score = -(x - (1 - t) * x_0) / t**2
    mean = x + (v - eta**2 / 2 * score) * (s - t)
    return mean, eta * math.sqrt(t - s)


def flow_cps(x, v, t, s, t_1):
    """Predicted ends, with noise of s sin(eta pi/2) new and the rest of it kept."""
    std = s * math.sin(0.7 * math.pi / 2)
    x_0, x_1 = x - t * v, x + (1 - t) * v
    return (1 - s) * x_0 + math.sqrt(s**2 - std**2) * x_1, std


SYSTEMS = {
    "Flow-GRPO": System(flow_grpo, ((0, 1, 2, 3, 4),) * 2, own_start=True),
    "DanceGRPO": System(dance_grpo, ((0, 1, 2, 3, 4),) * 2),
    "Flow-CPS": System(flow_cps, ((0, 1, 2, 3),) * 2, own_start=True),
    "MixGRPO": System(
        flow_grpo, ((0, 1, 2, 3), (1, 2, 3, 4)), replaced=("--window-every 25", "--window-every 1")
    ),
    "TempFlow-GRPO": System(flow_grpo, ((0, 1, 2, 3, 4),) * 2, branches=True, weigh_by_noise=True),
    "Granular-GRPO": System(flow_grpo, ((0, 1, 2, 3),) * 2, branches=True),
}


def commands():
    """{method: flags} of the table."""
    rows = re.findall(r"^\| ([\w.-]+) \| `python train\.py (--factors[^`]*)` \|", PAGE, re.M)
    return dict(rows)


def test_the_page_has_every_system():
    """Six, each with a rule here."""
    assert commands().keys() == SYSTEMS.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_command_is_the_published_rule(name):
    """What two iterations of SGD move, by the program and by the rule."""
    system, flags = SYSTEMS[name], commands()[name]
    if system.replaced:
        assert system.replaced[0] in flags
        flags = flags.replace(*system.replaced)
    line = [*SMALL.split(), *flags.split()]
    train.main([*line, "--out", "run"])
    found = load_file("run/checkpoint.safetensors")
    o = parse(line)
    policy = policy_of(o)
    policy.load((), torch.device("cpu"))
    start = {k: p.detach().clone() for k, p in policy.network.named_parameters()}
    for iteration in (1, 2):
        J = objective(system, policy, prompts_of(o), iteration)
        with torch.no_grad():
            for p, g in zip(policy.tuned, torch.autograd.grad(J, policy.tuned)):
                p += LR * g
    moved = 0.0
    for k, wanted in policy.network.named_parameters():
        error, step = (found[k] - wanted).norm(), (start[k] - wanted).norm()
        assert error <= 1e-3 * step + 8 * 2**-24 * wanted.norm(), (k, error, step)
        moved += step.item()
    assert moved > 0


def objective(system, policy, data, iteration):
    """mean over prompts, stochastic steps and members of w A log p(x_s | x_t) per dimension."""
    steps = system.steps[iteration - 1]
    grid = [1 - i / T for i in range(T)] + [0.0]
    terms, weights = [], []
    for index in range(2):
        generator = generator_of(7, iteration, index)
        prompt = data.train[torch.randint(len(data.train), (), generator=generator)]
        starts = torch.randn(G if system.own_start else 1, *policy.shape, generator=generator)
        z = torch.randn(len(steps), G, *policy.shape, generator=generator)
        members = [starts[m if system.own_start else 0] for m in range(G)]

        def velocity(x, t, prompt=prompt):
            time = torch.full((1,), t)
            return policy.velocity([prompt])(x[None], time, torch.zeros(1).long())[0]

        if system.branches:
            groups = [
                [trajectory(system, velocity, grid, x, {i: z[j, m]}) for m, x in enumerate(members)]
                for j, i in enumerate(steps)
            ]
        else:
            noises = [{i: z[j, m] for j, i in enumerate(steps)} for m in range(G)]
            groups = [[trajectory(system, velocity, grid, *own) for own in zip(members, noises)]]
        for group in groups:
            images = torch.cat([policy.decode(x_0[None]) for x_0, _ in group])
            rewards = torch.cat([asked_warmth(image[None], [prompt]) for image in images])
            A = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
            for a, (_, observed) in zip(A, group):
                for x, x_s, t, s in observed:
                    mean, std = system.step(x, velocity(x, t), t, s, grid[1])
                    terms.append(a * -((x_s - mean).double() ** 2).mean() / (2 * std**2))
                    weights.append(std if system.weigh_by_noise else 1.0)
    average = sum(weights) / len(weights)  # over all steps: those that weigh by noise are all steps
    return sum(w / average * term for w, term in zip(weights, terms)) / len(terms)


@torch.no_grad()
def trajectory(system, velocity, grid, x, noise):
    """(x_0, [(x_t, x_s, t, s)] of its stochastic steps); noise: {step: z}."""
    observed = []
    for i in range(T):
        t, s = grid[i], grid[i + 1]
        v = velocity(x, t)
        if i in noise:
            mean, std = system.step(x, v, t, s, grid[1])
            x_s = mean + std * noise[i]
            observed.append((x, x_s, t, s))
            x = x_s
        else:
            x = x - (t - s) * v
    return x, observed
