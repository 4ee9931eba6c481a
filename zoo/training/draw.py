"""Drawing pictures by the ODE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.rewards import spec as zoo_rewards
from zoo.training import pictures
from zoo.training.options import Options
from zoo.training.prompts import generator_of
from zoo.training.ranks import Ranks


def chunked(velocity: pave.Velocity, rows: int) -> pave.Velocity:
    """The same velocity, at most `rows` rows a call; 0: all at once."""
    if not rows:
        return velocity
    return lambda x, t, c: torch.cat(
        [velocity(*part) for part in zip(x.split(rows), t.split(rows), c.split(rows))]
    )


@torch.no_grad()
def draw(
    o: Options, policy, prompts: list[str], noise: Tensor, steps: int, device: torch.device
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], on the device, by `steps` ODE steps from noise [B, *shape]."""
    velocity = chunked(policy.velocity(prompts), o.rollout_batch)
    return policy.decode(pave.ode_sample(velocity, policy.grid(steps), noise.to(device)))


def draw_block(
    o: Options, policy, judges: zoo_rewards.Rewards, prompts: list[str], noise: Tensor, ranks: Ranks
) -> pictures.Block:
    """A row per prompt, from its noise [rows, n, *shape], by the first number of --eval-steps."""
    grid = noise.shape[:2]
    owners = [prompt for prompt in prompts for _ in range(grid[1])]
    images = draw(o, policy, owners, noise.flatten(0, 1), o.eval_steps[0], ranks.device)
    scores = next(iter(ranks.together(judges, images, owners).values()))
    return pictures.Block(images.cpu().unflatten(0, grid), scores.unflatten(0, grid))


def sample(o: Options, policy, judges: zoo_rewards.Rewards, ranks: Ranks) -> None:
    """Eight images of each --prompt as a picture."""
    folder = Path(o.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.stack(
        [
            torch.randn(8, *policy.shape, generator=generator_of(o.seed, i))
            for i in range(len(o.prompt))
        ]
    )
    block = draw_block(o, policy, judges, list(o.prompt), noise, ranks)
    pictures.draw_grid(
        {f"{o.eval_steps[0]} ODE steps": block}, list(o.prompt), folder / "samples.png"
    )
    print(f"look at {folder / 'samples.png'}")
