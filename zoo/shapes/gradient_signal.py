"""Where in the model, and at which stochastic step, is the policy gradient more than noise?

    python -m zoo.shapes.gradient_signal                    two minutes on 2 CPU cores
    python -m zoo.shapes.gradient_signal --kernel cps --batches 60

Draws independent batches of groups at the embedded model, one stochastic step at a time, and prints for each part of
the network the share of signal in one batch's gradient g,

    signal = E <g, g'> / E |g|^2,    g and g' of independent batches,

the mean off the diagonal of their Gram matrix over the mean on it: 1 without noise, 0 if the expected gradient is lost
in it, and about zero below that by chance. Also the gradient's root mean square norm, which does not tell them apart.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes

PROMPTS, MEMBERS, STEPS = 8, 12, 8


def batch_gradient(
    model, process: pave.Process, step: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The gradient of one batch's loss (S = {2, 3}, paper form, shared anchors), by part of the network."""
    chosen = torch.randint(len(shapes.TRAIN_PROMPTS), (PROMPTS,), generator=generator).tolist()
    prompts = [shapes.TRAIN_PROMPTS[i] for i in chosen]
    tokens = shapes_model.tokenize(prompts)
    velocity = lambda x, t, c: model(x, t, tokens[c])
    noise = pave.draw_noise([generator] * PROMPTS, MEMBERS, (3, shapes.SIZE, shapes.SIZE), 1)
    rollout = pave.rollout_shared_anchor(velocity, process, noise, (step,))
    owners = [p for p in prompts for _ in range(MEMBERS)]
    rewards = shapes.reward(shapes_model.to_images(rollout.x_0.flatten(0, 2)), owners)
    advantages = pave.group_advantages(rewards.unflatten(0, (PROMPTS, 1, MEMBERS)))
    model.zero_grad()
    pave.policy_loss(velocity, rollout, advantages, factors=(2, 3)).loss.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        parts.setdefault(name.split(".")[0], []).append(p.grad.flatten())
    return {name: torch.cat(grads) for name, grads in parts.items()}


def signal(gradients: Tensor) -> tuple[float, float]:
    """(share of signal, root mean square norm) of independent gradients [n, parameters]."""
    gram, n = gradients @ gradients.T, len(gradients)
    on = gram.diagonal().mean()
    off = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    return (off / on).item(), on.sqrt().item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        "python -m zoo.shapes.gradient_signal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel", choices=tuple(pave.KERNELS), default="flow_sde", help="default: %(default)s"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=30,
        help="independent batches, 2 or more (default: %(default)s)",
    )
    parser.add_argument(
        "--sde-steps", type=int, nargs="+", default=[0, 1, 2, 3], help="of 8 (default: 0 1 2 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    o = parser.parse_args()
    process = pave.Process(pave.schedule(STEPS), o.kernel, 0.7)
    if o.batches < 2 or o.seed < 0:
        parser.exit(
            2,
            f"zoo.shapes.gradient_signal: error: --batches {o.batches} --seed {o.seed}: must be >= 2, and >= 0\n",
        )
    try:
        process.stochastic_steps(o.sde_steps)
    except ValueError as problem:
        parser.exit(2, f"zoo.shapes.gradient_signal: error: {problem}\n")
    model = shapes_model.load()
    print("signal (norm) by part of the network; * at pixel resolution")
    for step in o.sde_steps:
        generator = torch.Generator().manual_seed(o.seed)
        drawn = [
            batch_gradient(model, process, step, generator)
            for _ in tqdm(range(o.batches), leave=False)
        ]
        shown = []
        for name in drawn[0]:
            share, norm = signal(torch.stack([g[name] for g in drawn]))
            shown.append(
                f"{name}{'*' * (name in shapes_model.PIXEL_LAYERS)} {share:.3f} ({norm:.1e})"
            )
        t, s = process.grid[step : step + 2].tolist()
        print(f"step {step}, t = {t:g} -> {s:g}:  " + "  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
