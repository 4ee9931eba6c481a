"""Drawing pictures by the ODE, and a program that draws what one asks a checkpoint for.

python -m zoo.training.draw runs/shapes-1/checkpoint.safetensors --prompt "a red circle" --out drawn
    writes samples.png: eight pictures of each prompt, with their scores
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.rewards import spec as rewards
from zoo.shapes import world
from zoo.training import pictures, policies
from zoo.training.command_line import Parser, check_alone, refusal, refusing
from zoo.training.options import Options
from zoo.training.prompts import generator_of
from zoo.training.ranks import Ranks, stopping

READ = ("out", "seed", "shift", "device", "threads")
EACH = 8  # pictures of a prompt


def chunked(velocity: pave.Velocity, rows: int) -> pave.Velocity:
    """The same velocity, at most `rows` rows a call; 0: all at once."""
    if not rows:
        return velocity

    def in_chunks(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        parts = zip(x.split(rows), t.split(rows), prompt.split(rows), strict=True)
        return torch.cat([velocity(*part) for part in parts])

    return in_chunks


@torch.no_grad()
def draw(
    o: Options,
    policy: policies.Policy,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    device: torch.device,
    listen: Callable[[], None] | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], on the device, by `steps` ODE steps from noise [B, *event].

    listen is called before every step, and may raise.
    """
    plain = chunked(policy.velocity(prompts), o.rollout_batch)

    def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        if listen:
            listen()
        return plain(x, t, prompt)

    with policy.gathered():
        x = pave.ode_sample(velocity, policy.grid(steps), noise.to(device))
    return policy.decode(x)


def draw_block(
    o: Options,
    policy: policies.Policy,
    judges: rewards.Rewards,
    prompts: Sequence[str],
    noise: Tensor,
    ranks: Ranks,
    listen: Callable[[], None] | None = None,
) -> pictures.Block:
    """A row per prompt, from its noise [rows, n, *event], by the first number of --eval-steps.

    listen as in `draw`.
    """
    rows, n = noise.shape[:2]
    owners = [prompt for prompt in prompts for _ in range(n)]
    steps = o.eval_steps[0]
    images = draw(o, policy, owners, noise.flatten(0, 1), steps, ranks.device, listen)
    scores = next(iter(ranks.together(judges, images, owners).values()))
    return pictures.Block(images.cpu().unflatten(0, (rows, n)), scores.unflatten(0, (rows, n)))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for. Bad input: one line, status 2."""
    parser = Parser(
        "python -m zoo.training.draw CHECKPOINT --prompt TEXT ... [options]", __doc__, READ
    )
    parser.add_argument("checkpoint", help="a checkpoint of the embedded model")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="what to draw")
    given = parser.read(argv)
    checkpoint, prompts = given.pop("checkpoint"), given.pop("prompt")
    with refusing():
        o = Options(**given)
        check_alone(o, given)
        folder = Path(o.out or ".")
        if (folder / "samples.png").exists():
            raise refusal(o, "out", "given where samples.png exists")
        for prompt in prompts:
            world.parse(prompt)
        policy = policies.Embedded(checkpoint, shift=o.shift)
    ranks = Ranks.start(o.device, o.threads)
    policy.load((), ranks.device)
    (judges,) = rewards.load_all([o.eval_reward], ranks.device)
    noise = [
        torch.randn(EACH, *policy.shape, generator=generator_of(o.seed, i))
        for i in range(len(prompts))
    ]
    with stopping():
        block = draw_block(o, policy, judges, prompts, torch.stack(noise), ranks)
    if ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{o.eval_steps[0]} ODE steps"
        pictures.draw_grid({title: block}, prompts, folder / "samples.png")
        print(f"look at {folder / 'samples.png'}")
    ranks.stop()


if __name__ == "__main__":
    main()
