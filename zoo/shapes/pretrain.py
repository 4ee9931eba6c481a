"""Pretrain the embedded model: the one command that made shapes.safetensors, with its picture.

    python -m zoo.shapes.pretrain              about 7 minutes on 2 CPU cores
    python -m zoo.shapes.pretrain --dry-run    one step and one validation, nothing written

Every batch is drawn afresh from all prompts, those held out of alignment too: the model that
alignment starts from knows the whole grammar, and held-out prompts measure whether alignment
generalises. The budget is a number of steps and all randomness comes from the seed: two runs differ
by the rounding of their machines.

    loss         |v - (x_1 - x_0)|^2, mean over batch and pixels; t = sigmoid(MIDDLE + SPREAD n),
                 n ~ N(0, 1)
    prompts      the three families in equal shares: a prompt for one circle is as common as all
                 relations
    rate         warm-up over WARMUP steps, then constant: averaging the weights is the decay, and a
                 run of fewer steps is the beginning of a run of more
    weights      Muon for the matrices of the blocks, AdamW for the rest; their running mean is kept
    validation   the share of held-out prompts drawn fully right by the rule, 8 Euler steps, on one
                 noise; the best is kept, so this figure is a little optimistic: the summary draws
                 fresh noise
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import pave_grpo as pave
from zoo import style
from zoo.shapes import rule, world
from zoo.shapes.model import CHECKPOINT, ShapesFlow, save, to_images, tokenize, velocity_of

FIGURE = Path(__file__).parents[2] / "docs" / "pretraining.png"
WARMUP = 100
# Flat shapes of some 80 pixels stand out of the noise until t is about 0.9: what is where, and of
# which colour, is decided above 0.8, where the usual sigmoid(n) would put 8 % of the times. These
# put half of them there.
MIDDLE, SPREAD = 1.4, 1.2


def command_line() -> argparse.Namespace:
    """The options of sys.argv. Bad input: one line, status 2."""
    parser = argparse.ArgumentParser(
        "zoo.shapes.pretrain",
        usage=argparse.SUPPRESS,  # an error is then one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, default: float | str, text: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} (default: {default})"
        )

    add("--steps", 900, "optimiser steps")
    add("--batch", 64, "pictures per step")
    add("--lr", 2e-3, "peak learning rate, of both optimisers")
    add("--ema", 0.998, "decay per step of the running mean of the weights")
    add("--drop", 0.0, "share of prompts made empty; above zero to make guidance possible")
    add("--seed", 0, "seed of weights, pictures, times and noise")
    add("--threads", 2, "CPU threads")
    add("--validate-every", 200, "steps between validations")
    add("--pairs", 256, "pictures per validation")
    add("--out", str(CHECKPOINT), "checkpoint to write")
    add("--figure", str(FIGURE), "learning curve to write")
    parser.add_argument("--dry-run", action="store_true", help="one step and one validation only")
    options = parser.parse_args()
    for name in ("steps", "batch", "lr", "threads", "validate_every", "pairs"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"{name} is {getattr(options, name)}; it must be above zero")
    if not (0 <= options.drop <= 1 and 0 <= options.ema < 1 and options.seed >= 0):
        parser.error(
            f"drop {options.drop}, ema {options.ema}, seed {options.seed}; "
            "they must be in [0, 1], in [0, 1), and 0 or more"
        )
    return options


# ---- What is learned -----------------------------------------------------------------------------


def batch_of(size: int, drop: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fresh pictures x_0 [size, 3, 32, 32] in [-1, 1] and their tokens.

    A share `drop` of the tokens is the empty prompt's.
    """
    pools = list(world.FAMILIES.values())
    prompts = []
    for pick in torch.randint(2**40, (size,), generator=generator).tolist():
        pool = pools[pick % len(pools)]
        prompts.append(pool[pick // len(pools) % len(pool)])
    keep = torch.rand(size, 1, generator=generator) >= drop
    x_0 = 2 * world.draw(prompts, generator) - 1
    return x_0, tokenize(prompts) * keep


def flow_loss(model: nn.Module, x_0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """E |v(x_t, t) - (x_1 - x_0)|^2 at x_t = (1 - t) x_0 + t x_1: one x_1 and t per picture."""
    x_1 = torch.randn(x_0.shape, generator=generator)
    t = (MIDDLE + SPREAD * torch.randn(len(x_0), generator=generator)).sigmoid()
    w = t.view(-1, 1, 1, 1)
    x_t = (1 - w) * x_0 + w * x_1
    return mse_loss(model(x_t, t, tokens), x_1 - x_0)


# ---- How it is optimised -------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum U S V^T with its singular values made equal.

        W <- W - lr 0.2 sqrt(max(rows, columns)) U V^T

    The factor gives steps the size that AdamW's usually have, so both share one rate.
    torch.optim.Muon iterates in bfloat16, slow on a CPU without it; here it is float32, matrices of
    one shape in one product.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients in place."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for w in group["params"]:
                by_shape[w.shape].append(w)
            for (rows, columns), alike in by_shape.items():
                ahead = [self.look_ahead(w, group["momentum"]) for w in alike]
                updates = orthogonal(torch.stack(ahead))
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for w, update in zip(alike, updates, strict=True):
                    w.sub_(update, alpha=size)

    def look_ahead(self, w: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the gradient and its running mean, averaged once more."""
        assert w.grad is not None
        mean = self.state[w].setdefault("mean", torch.zeros_like(w))
        mean.lerp_(w.grad, 1 - momentum)
        return w.grad.lerp(mean, momentum)


def orthogonal(m: Tensor) -> Tensor:
    """Towards U V^T for each of m = U S V^T, [n, rows, columns].

    Five steps of s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5 on the singular values s in (0, 1], with
    the coefficients of Jordan (2024): they land within about 0.3 of 1.
    """
    if m.shape[1] > m.shape[2]:
        return orthogonal(m.mT).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s2 = m @ m.mT
        m = 3.4445 * m + (-4.7750 * s2 + 2.0315 * s2 @ s2) @ m
    return m


def warm_up(step: int) -> float:
    """The share of the peak rate at a step, from 0."""
    return min(1, (step + 1) / WARMUP)


def optimisers(model: ShapesFlow, lr: float) -> list[tuple[torch.optim.Optimizer, LambdaLR]]:
    """Muon for the matrices of the blocks, AdamW for everything else; each with its schedule."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        is_matrix = name.startswith("blocks.") and p.dim() == 2 and "modulation" not in name
        (matrices if is_matrix else others).append(p)
    muon = Muon(matrices, lr)
    adamw = torch.optim.AdamW(others, lr, (0.9, 0.98), weight_decay=0.0)
    return [(muon, LambdaLR(muon, warm_up)), (adamw, LambdaLR(adamw, warm_up))]


@torch.no_grad()
def follow(mean: nn.Module, model: nn.Module, decay: float) -> None:
    """mean <- decay mean + (1 - decay) model."""
    for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


# ---- How it is judged ----------------------------------------------------------------------------


@torch.no_grad()
def judged(
    model: nn.Module, prompts: Sequence[str], steps: int, generator: torch.Generator
) -> Tensor:
    """Draw each prompt from fresh noise by `steps` Euler steps: is it fully right? bool [B]."""
    right = []
    for start in range(0, len(prompts), 128):
        part = prompts[start : start + 128]
        x_1 = torch.randn(len(part), 3, world.SIZE, world.SIZE, generator=generator)
        x_0 = pave.ode_sample(velocity_of(model, part), pave.schedule(steps), x_1)
        right.append(rule.judge(to_images(x_0), part).right)
    return torch.cat(right)


def heldout(n: int) -> list[str]:
    """n held-out prompts: the whole list as often as it fits, then some spread evenly over it."""
    pool = list(world.HELDOUT_PROMPTS)
    times, rest = divmod(n, len(pool))
    return pool * times + [pool[i * len(pool) // rest] for i in range(rest)]


def summary(model: nn.Module, seed: int) -> None:
    """Print the share fully right by family: each held-out prompt twice, on fresh noise."""
    prompts = heldout(2 * len(world.HELDOUT_PROMPTS))
    families = [world.parse(prompt).family for prompt in prompts]
    for steps in (8, 16):
        right = judged(model, prompts, steps, torch.Generator().manual_seed(seed + 2)).float()
        shares = []
        for family in world.FAMILIES:
            own = right[[f == family for f in families]]
            shares.append(f"{family} {own.mean():.3f}")
        every = f"held-out, {steps:2} Euler steps, fully right: {right.mean():.3f}"
        print(f"{every}   ({', '.join(shares)})")


# ---- The run -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run leaves."""

    model: ShapesFlow  # the running mean of the weights, at its best validation
    score: float  # that validation
    losses: list[float]  # of every step
    scores: list[tuple[int, float]]  # (step, validation)


def pretrain(options: argparse.Namespace) -> Run:
    """Train for the budget, and write the weights at each best validation."""
    with torch.random.fork_rng():  # initialisers know only the global generator
        torch.manual_seed(options.seed)
        model = ShapesFlow()
    kept = mean = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = optimisers(model, options.lr)
    generator = torch.Generator().manual_seed(options.seed)
    settings = ", ".join(f"{name}={value}" for name, value in vars(options).items())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {settings}")

    losses: list[float] = []
    scores: list[tuple[int, float]] = []
    best, start = -1.0, time.perf_counter()
    steps = 1 if options.dry_run else options.steps
    for step in (bar := tqdm(range(1, steps + 1), mininterval=5)):
        x_0, tokens = batch_of(options.batch, options.drop, generator)
        loss = flow_loss(model, x_0, tokens, generator)
        loss.backward()
        for optimiser, schedule in pairs:
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        follow(
            mean, model, min(options.ema, step / (step + 10))
        )  # short at first: forget the start
        losses.append(loss.item())
        if step % options.validate_every and step < steps:
            continue

        noise = torch.Generator().manual_seed(options.seed + 1)
        score = judged(mean, heldout(options.pairs), 8, noise).float().mean().item()
        scores.append((step, score))
        recent = losses[-100:]
        minutes = (time.perf_counter() - start) / 60
        bar.write(
            f"step {step:5}  {minutes:5.1f} min  fully right {score:.3f}  "
            f"loss {sum(recent) / len(recent):.4f}"
        )
        if score >= best:
            best, kept = score, copy.deepcopy(mean)
            if not options.dry_run:
                save(kept, options.out, provenance(options, step, score))
    return Run(kept, best, losses, scores)


def provenance(options: argparse.Namespace, step: int, score: float) -> dict[str, str]:
    """How a checkpoint was made, kept in its file."""
    return {
        "command": shlex.join(["python", "-m", "zoo.shapes.pretrain", *sys.argv[1:]]),
        "seed": str(options.seed),
        "step": str(step),
        "steps": str(options.steps),
        "validation": f"{score:.4f} of {options.pairs} held-out prompts fully right, 8 Euler steps",
    }


@style.styled
def draw(run: Run, options: argparse.Namespace, path: Path) -> None:
    """The loss, a mean over each hundredth of the run, and beside it the validations."""
    steps, pairs = len(run.losses), options.pairs
    note = f"{steps} steps of {options.batch} fresh pictures, seed {options.seed}"
    message = f"Pretraining: {run.score:.0%} of {pairs} held-out pictures fully right"
    figure = style.canvas(3.7, message, note)
    left, right = figure.subplots(1, 2)
    left.set_title("flow-matching loss", color=style.FAINT)
    right.set_title("fully right, 8 Euler steps", color=style.FAINT)
    width = max(1, steps // 100)
    starts = range(0, steps - width + 1, width)
    means = [statistics.fmean(run.losses[start : start + width]) for start in starts]
    left.plot([start + width / 2 for start in starts], means)
    left.set(xlabel="optimiser steps", yscale="log", xlim=(0, steps))
    right.plot([step for step, _ in run.scores], [score for _, score in run.scores], "o-")
    right.set(xlabel="optimiser steps", xlim=(0, 1.03 * steps), ylim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=style.DPI)


def main() -> None:
    """Pretrain, draw the learning curve, print the summary."""
    options = command_line()
    torch.set_num_threads(options.threads)
    run = pretrain(options)
    if options.dry_run:
        return
    draw(run, options, Path(options.figure))
    kept = f"kept the weights with validation {run.score:.3f} in {options.out}"
    print(f"{kept}, the curve in {options.figure}")
    summary(run.model, options.seed)


if __name__ == "__main__":
    main()
