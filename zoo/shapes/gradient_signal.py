"""Where in the model, and at which stochastic step, is the policy gradient more than noise?

    python -m zoo.shapes.gradient_signal                    two minutes on 2 CPU cores
    python -m zoo.shapes.gradient_signal --kernel cps --batches 60

Draws independent batches of groups at the embedded model, one stochastic step at a time, and prints
for each part of the network the share of signal in the gradient g of one batch,

    signal = E <g, g'> / E |g|^2,    g and g' of independent batches:

the mean off the diagonal of their Gram matrix over the mean on it. It is 1 without noise, 0 if the
expected gradient is lost in it, and then by chance a little below or above. In brackets stands the
gradient's root mean square norm, which does not tell the two apart.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.shapes import rule, world
from zoo.shapes.model import PIXEL_LAYERS, ShapesFlow, load, to_images, velocity_of

PROMPTS, MEMBERS, STEPS, FACTORS = 8, 12, 8, (2, 3)


def batch_gradient(
    model: ShapesFlow, process: pave.Process, step: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The gradient of one batch's loss by part of the network, flat.

    Paper form, shared anchors, random training prompts.
    """
    chosen = torch.randint(len(world.TRAIN_PROMPTS), (PROMPTS,), generator=generator)
    prompts = [world.TRAIN_PROMPTS[i] for i in chosen.tolist()]
    velocity = velocity_of(model, prompts)
    noise = pave.draw_noise([generator] * PROMPTS, MEMBERS, (3, world.SIZE, world.SIZE), 1)
    rollout = pave.rollout_shared_anchor(velocity, process, noise, (step,))

    asked = [prompt for prompt in prompts for _ in range(MEMBERS)]
    rewards = rule.reward(to_images(rollout.x_0.flatten(0, 2)), asked)
    advantages = pave.group_advantages(rewards.unflatten(0, (PROMPTS, 1, MEMBERS)))
    model.zero_grad()
    pave.policy_loss(velocity, rollout, advantages, factors=FACTORS).loss.backward()
    parts = defaultdict(list)
    for name, p in model.named_parameters():
        assert p.grad is not None
        parts[name.split(".")[0]].append(p.grad.flatten())
    return {name: torch.cat(gradients) for name, gradients in parts.items()}


def signal(gradients: Tensor) -> tuple[float, float]:
    """(share of signal, root mean square norm) of independent gradients [n >= 2, parameters]."""
    n = len(gradients)
    gram = gradients @ gradients.T
    on = gram.diagonal().mean()
    off = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    return (off / on).item(), on.sqrt().item()


def command_line() -> tuple[argparse.Namespace, pave.Process]:
    """The options of sys.argv, and the process they name. Bad input: one line, status 2."""
    parser = argparse.ArgumentParser(
        "zoo.shapes.gradient_signal",
        usage=argparse.SUPPRESS,  # an error is then one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernel", choices=tuple(pave.KERNELS), default="flow_sde", help="default: %(default)s")
    add("--batches", type=int, default=30, help="independent ones, 2 or more (default: 30)")
    add("--sde-steps", type=int, nargs="+", default=[0, 1, 2, 3], help="of 8 (default: 0 1 2 3)")
    add("--seed", type=int, default=0, help="0 or more (default: 0)")
    options = parser.parse_args()
    if options.batches < 2 or options.seed < 0:
        given = f"--batches {options.batches} --seed {options.seed}"
        parser.error(f"{given}: must be >= 2, and >= 0")
    process = pave.Process(pave.schedule(STEPS), options.kernel, 0.7)
    try:
        process.stochastic_steps(options.sde_steps)
    except ValueError as problem:
        parser.error(str(problem))
    return options, process


def main() -> None:
    """Print the table: a line per step."""
    options, process = command_line()
    model = load()
    print("signal (norm) by part of the network; * at pixel resolution")
    for step in options.sde_steps:
        generator = torch.Generator().manual_seed(options.seed)
        drawn = [
            batch_gradient(model, process, step, generator)
            for _ in tqdm(range(options.batches), leave=False)
        ]
        shown = []
        for name in drawn[0]:
            share, norm = signal(torch.stack([gradients[name] for gradients in drawn]))
            star = "*" if name in PIXEL_LAYERS else ""
            shown.append(f"{name}{star} {share:.3f} ({norm:.1e})")
        t, s = process.grid[step : step + 2].tolist()
        print(f"step {step}, t = {t:g} -> {s:g}:  " + "  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
