"""Run train.py on several command lines, keeping every rollout's noise: `two_ranks.py JOBS NAME`.

JOBS is a JSON file {case: flags}; flags [..., "--resume", CASE] go on with the run of another case.
Started alone or by torchrun. Leaves NAME-CASE/, the run folder;
NAME-RANK-CASE.pt, the noise of each iteration; and NAME-RANK-swap.pt, what `swapped` returns.
"""

import json
import os
import sys
from pathlib import Path

import torch

import pave_grpo as pave
import train
from zoo.training import command_line, policies, prompts
from zoo.training.options import policy_of

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
plain_draw, plain_shown = pave.draw_noise, prompts.Prompts.shown
kept: list[torch.Tensor] = []  # z of every rollout of a case


def draw_and_keep(*args, **kwargs):
    noise = plain_draw(*args, **kwargs)
    kept.append(noise.z.clone())
    return noise


def show_one(self, shape, kind):
    return plain_shown(self, shape, kind, 1)


def stay_open():
    """One process group serves all command lines."""


def main(jobs: str, name: str) -> None:
    pave.draw_noise = draw_and_keep
    prompts.Prompts.shown = show_one
    torch.distributed.destroy_process_group = stay_open
    for case, flags in json.loads(Path(jobs).read_text()).items():
        kept.clear()
        if "--resume" in flags:
            train.main([*flags[:-1], f"{name}-{flags[-1]}"])
            continue
        train.main([*flags, "--out", f"{name}-{case}"])
        torch.save(list(kept), f"{name}-{RANK}-{case}.pt")
        averaged = flags
    torch.save(swapped(averaged), f"{name}-{RANK}-swap.pt")


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
