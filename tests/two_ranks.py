"""Run train.py's main on several command lines, keeping every rollout's noise: `two_ranks.py JOBS.json NAME`.

Started alone or by torchrun; writes NAME-CASE/, the run folder, and NAME-RANK-CASE.pt, the noise of each iteration.
"""

import json
import os
import sys
from pathlib import Path

import torch

import train
from zoo.training import policies, prompts


def main(jobs: str, name: str) -> None:
    train.dist.destroy_process_group = lambda: None  # one group for all command lines
    shown, draw = prompts.Prompts.shown, train.pave.draw_noise
    prompts.Prompts.shown = lambda self, shape, kind: shown(self, shape, kind, 1)
    for case, flags in json.loads(Path(jobs).read_text()).items():
        kept = []

        def kept_noise(*args, kept=kept, **kwargs):
            noise = draw(*args, **kwargs)
            kept.append(noise.z.clone())
            return noise

        train.pave.draw_noise = kept_noise
        train.main([*flags, "--out", f"{name}-{case}"])
        torch.save(kept, f"{name}-{os.environ.get('RANK', 0)}-{case}.pt")
    torch.save(swapped(flags), f"{name}-{os.environ.get('RANK', 0)}-swap.pt")


def swapped(flags: list[str]) -> list[torch.Tensor]:
    """Velocities of the last command line's model with its own weights, with an average of them, and again its own."""
    o = train.parse(flags)
    policy = train.policy_of(o, int(os.environ.get("WORLD_SIZE", 1)))
    policy.load(["a dog"], torch.device("cpu"), 0, int(os.environ.get("WORLD_SIZE", 1)))
    average = policies.EMA(policy.tuned, 0.5)
    x = torch.randn(1, *policy.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in policy.tuned:
            p.mul_(1.1)
        ask = lambda: policy.velocity(["a dog"])(x, torch.tensor([0.5]), torch.tensor([0]))
        own = ask()
        with average.applied():
            averaged = ask()
        return [own, averaged, ask()]


if __name__ == "__main__":
    main(*sys.argv[1:])
