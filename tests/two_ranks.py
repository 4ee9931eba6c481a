"""Run train.py's main on several command lines, keeping every rollout's noise: `two_ranks.py JOBS.json NAME`.

Started alone or by torchrun; writes NAME-CASE/, the run folder, and NAME-RANK-CASE.pt, the noise of each iteration.
"""

import json
import os
import sys
from pathlib import Path

import torch

import train
from zoo import prompts


def main(jobs: str, name: str) -> None:
    train.dist.destroy_process_group = lambda: None  # one group for all command lines
    shown, draw = prompts.Prompts.shown, train.pave.draw_noise
    prompts.Prompts.shown = lambda self, shape, kind: shown(self, shape, kind, 1)
    for case, flags in json.loads(Path(jobs).read_text()).items():
        kept = []

        def kept_noise(*args, kept=kept, **kwargs):
            noise = draw(*args, **kwargs)
            kept.append(noise.steps.clone())
            return noise

        train.pave.draw_noise = kept_noise
        train.main([*flags, "--out", f"{name}-{case}"])
        torch.save(kept, f"{name}-{os.environ.get('RANK', 0)}-{case}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
