"""Run train.py on several command lines, keeping every rollout's noise: `two_ranks.py JOBS NAME`.

Texts are short, and nothing is drawn.

JOBS is a JSON file {case: flags}; flags [..., "--resume", CASE] go on with the run of another case.
Started alone, where --gather-rollouts is left out, or by torchrun. Leaves NAME-CASE/, the run
folder; NAME-RANK-CASE.pt, the noise of each iteration; NAME-RANK-gathers.pt, what each sampling of
a case gathers; and NAME-RANK-swap.pt, what `swapped` returns.
"""

import json
import os
import sys
from pathlib import Path

import torch
from short_texts import PIPELINES, shortened
from torch.utils._python_dispatch import TorchDispatchMode

import pave_grpo as pave
import train
from zoo.training import command_line, pictures, policies, prompts
from zoo.training.options import policy_of

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
plain_draw, plain_shown = pave.draw_noise, prompts.Prompts.shown
kept: list[torch.Tensor] = []  # z of every rollout of a case
sampled: list[tuple[str, int, int]] = []  # samplings of a case: which, velocity calls, all-gathers


def draw_and_keep(*args, **kwargs):
    noise = plain_draw(*args, **kwargs)
    kept.append(noise.z.clone())
    return noise


class Gathers(TorchDispatchMode):
    """Counts all-gathers of tensors: FSDP2's, as ranks gather their other values as objects.

    torch's own CommDebugMode also follows modules, and fails at those of diffusers.
    """

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.c10d._allgather_base_.default
        return op(*args, **(kwargs or {}))


def counting(name, sampler):
    """The sampler, which tells `sampled` what it does."""

    def sample(velocity, *args, **kwargs):
        calls = []

        def called(*at):
            calls.append(at)
            return velocity(*at)

        with Gathers() as seen:
            found = sampler(called, *args, **kwargs)
        sampled.append((name, len(calls), seen.count))
        return found

    return sample


def show_one(self, shape, kind):
    return plain_shown(self, shape, kind, 1)


def draw_nothing(content, about, path, *given, **how):
    path.touch()


def stay_open():
    """One process group serves all command lines."""


def main(jobs: str, name: str) -> None:
    pave.draw_noise = draw_and_keep
    prompts.Prompts.shown = show_one
    pictures.draw_grid = pictures.draw_curve = draw_nothing
    for pipeline in PIPELINES:
        pipeline.encode_prompt = shortened(pipeline)
    torch.distributed.destroy_process_group = stay_open
    pave.ode_sample = counting("drawn", pave.ode_sample)
    for rollouts, sampler in train.ROLLOUTS.items():
        train.ROLLOUTS[rollouts] = counting("rollout", sampler)
    gathers = {}
    for case, flags in json.loads(Path(jobs).read_text()).items():
        kept.clear()
        sampled.clear()
        if WORLD == 1:
            flags = [flag for flag in flags if flag != "--gather-rollouts"]
        if "--resume" in flags:
            train.main([*flags[:-1], f"{name}-{flags[-1]}"])
        else:
            train.main([*flags, "--out", f"{name}-{case}"])
            torch.save(list(kept), f"{name}-{RANK}-{case}.pt")
            averaged = flags
        gathers[case] = list(sampled)
    if WORLD > 1:
        gathers["entry"] = entered([*averaged, "--gather-rollouts"])
    torch.save(gathers, f"{name}-{RANK}-gathers.pt")
    torch.save(swapped(averaged), f"{name}-{RANK}-swap.pt")


def entered(flags: list[str]) -> tuple[int, int, int]:
    """What it takes to have all weights of the model of some flags: gathers, bytes; as printed."""
    policy = policy_of(command_line.parse(flags), WORLD)
    policy.load(["a dog"], torch.device("cpu"), RANK, WORLD)
    with Gathers() as seen, policy.gathered():
        held = sum(p.nbytes for p in policy.network.parameters())
    return seen.count, held, policy.sizes.gathered


def swapped(flags: list[str]) -> list[torch.Tensor]:
    """A velocity of the model of some flags: by its weights, by an average, by its own again."""
    policy = policy_of(command_line.parse(flags), WORLD)
    policy.load(["a dog"], torch.device("cpu"), RANK, WORLD)
    average = policies.EMA(policy.tuned, 0.5)
    x = torch.randn(1, *policy.shape, generator=torch.Generator().manual_seed(0))

    def ask():
        return policy.velocity(["a dog"])(x, torch.tensor([0.5]), torch.tensor([0]))

    with torch.no_grad():
        for p in policy.tuned:
            p.mul_(1.1)
        own = ask()
        with average.applied():
            averaged = ask()
        return [own, averaged, ask()]


if __name__ == "__main__":
    main(*sys.argv[1:])
