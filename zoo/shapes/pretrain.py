"""Pretrain the embedded model: the one command that made zoo/shapes/shapes.safetensors and docs/pretraining.png.

    python -m zoo.shapes.pretrain              about 7 minutes on 2 CPU cores
    python -m zoo.shapes.pretrain --dry-run    one step and one validation, nothing written

Every batch is drawn afresh from all prompts, those held out of alignment too: the model that alignment starts
from knows the whole grammar, and held-out prompts measure whether alignment generalises. The budget is a
number of steps and all randomness comes from the seed: two runs differ by the rounding of their machines.

    loss         |v - (x_1 - x_0)|^2, mean over batch and pixels; t = sigmoid(MIDDLE + SPREAD n), n ~ N(0, 1)
    prompts      the three families in equal shares: a prompt for one circle is as common as all relations
    rate         warm-up over WARMUP steps, then constant: averaging the weights is the decay, and a run of fewer
                 steps is the beginning of a run of more
    weights      Muon for the matrices of the blocks, AdamW for the rest; their running mean is what is kept
    validation   the share of held-out prompts drawn fully right by the rule, 8 Euler steps, on one noise;
                 the best is kept, so this figure is a little optimistic: the summary draws fresh noise
"""

import argparse
import copy
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from zoo.shapes import world as shapes
from zoo.shapes.model import CHECKPOINT, ShapesFlow, save, to_images, tokenize

WARMUP = 100
# Flat shapes of some 80 pixels stand out of the noise until t is about 0.9: what is where, and of which colour, is
# decided above 0.8, where the usual sigmoid(n) would put 8 % of the times. These put half of them there.
MIDDLE, SPREAD = 1.4, 1.2

FAMILIES = {
    family: [p for p in shapes.PROMPTS if shapes.parse(p).family == family]
    for family in ("count", "conjunction", "relation")
}


def option(default: object, text: str):
    """A field whose documentation is its line of --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """The command line; see --help."""

    steps: int = option(900, "optimiser steps")
    batch: int = option(64, "pictures per step")
    lr: float = option(2e-3, "peak learning rate, of both optimisers")
    ema: float = option(0.998, "decay per step of the running mean of the weights")
    drop: float = option(
        0.0, "share of prompts replaced by the empty one; above zero to make guidance possible"
    )
    seed: int = option(0, "seed of weights, pictures, times and noise")
    threads: int = option(2, "CPU threads")
    validate_every: int = option(200, "steps between validations")
    pairs: int = option(256, "pictures per validation")
    out: str = option(str(CHECKPOINT), "checkpoint to write")
    figure: str = option(
        str(CHECKPOINT.parents[1] / "docs" / "pretraining.png"), "learning curve to write"
    )
    dry_run: bool = option(False, "one step and one validation, write nothing")

    @classmethod
    def from_command_line(cls) -> "Options":
        """The options of sys.argv. Bad input: one line, status 2."""
        parser = argparse.ArgumentParser(
            "python -m zoo.shapes.pretrain",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.error = lambda message: parser.exit(2, f"zoo.shapes.pretrain: error: {message}\n")
        for f in fields(cls):
            kind = (
                {"action": "store_true"}
                if f.type is bool
                else {"type": f.type, "default": f.default}
            )
            text = f.metadata["help"] + ("" if f.type is bool else " (default: %(default)s)")
            parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
        options = cls(**vars(parser.parse_args()))
        for name in ("steps", "batch", "lr", "threads", "validate_every", "pairs"):
            if not 0 < getattr(options, name) < float("inf"):
                parser.error(f"{name} is {getattr(options, name)}; it must be above zero")
        if not (0 <= options.drop <= 1 and 0 <= options.ema < 1 and options.seed >= 0):
            parser.error(
                f"drop {options.drop}, ema {options.ema}, seed {options.seed}; "
                "they must be in [0, 1], in [0, 1), and 0 or more"
            )
        return options


class Muon(torch.optim.Optimizer):
    """Momentum U S V^T with its singular values made equal: W <- W - lr 0.2 sqrt(max(rows, columns)) U V^T.

    The factor gives steps the size that AdamW's usually have, so both share one rate. torch.optim.Muon
    iterates in bfloat16, slow on a CPU without it; here it is float32, matrices of one shape in one product.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One step from the gradients in place."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for w in group["params"]:
                mean = self.state[w].setdefault("mean", torch.zeros_like(w))
                mean.lerp_(w.grad, 1 - group["momentum"])
                by_shape[w.shape].append(
                    (w, w.grad.lerp(mean, group["momentum"]))
                )  # Nesterov's look-ahead
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonal(torch.stack([m for _, m in pairs]))
                for (w, _), u in zip(pairs, updates, strict=True):
                    w.sub_(u, alpha=group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def orthogonal(m: Tensor) -> Tensor:
    """Towards U V^T for each of m [n, rows, columns] = U S V^T: singular values s land within about 0.3 of 1.

    Five steps of s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5, the coefficients of Jordan (2024), on s in (0, 1].
    """
    if m.shape[1] > m.shape[2]:
        return orthogonal(m.mT).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s2 = m @ m.mT
        m = 3.4445 * m + (-4.7750 * s2 + 2.0315 * s2 @ s2) @ m
    return m


def batch_of(options: Options, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fresh pictures x_0 [B, 3, 32, 32] in [-1, 1] and their tokens, some of them the empty prompt's."""
    pools = list(FAMILIES.values())
    pick = torch.randint(2**40, (options.batch,), generator=generator).tolist()
    prompts = [pools[i % 3][i // 3 % len(pools[i % 3])] for i in pick]
    keep = torch.rand(options.batch, 1, generator=generator) >= options.drop
    return 2 * shapes.draw(prompts, generator) - 1, tokenize(prompts) * keep


def flow_loss(model: ShapesFlow, x0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """E |v(x_t, t) - (x_1 - x_0)|^2 at x_t = (1 - t) x_0 + t x_1, by one draw of x_1 and t per picture."""
    x1 = torch.randn(x0.shape, generator=generator)
    t = (MIDDLE + SPREAD * torch.randn(len(x0), generator=generator)).sigmoid()
    at = t.view(-1, 1, 1, 1)
    return mse_loss(model((1 - at) * x0 + at * x1, t, tokens), x1 - x0)


@torch.no_grad()
def judged(model: ShapesFlow, prompts: list[str], steps: int, generator: torch.Generator) -> Tensor:
    """Draw each prompt from fresh noise by `steps` equal Euler steps; fully right or not, bool [B]."""
    right = []
    for start in range(0, len(prompts), 128):
        part = prompts[start : start + 128]
        tokens = tokenize(part)
        x = torch.randn(len(part), 3, shapes.SIZE, shapes.SIZE, generator=generator)
        for i in range(steps, 0, -1):
            x = x - model(x, torch.tensor(i / steps), tokens) / steps
        right.append(shapes.judge(to_images(x), part).right)
    return torch.cat(right)


def heldout(pairs: int) -> list[str]:
    """`pairs` held-out prompts: the whole list as often as it fits, then some spread evenly over it."""
    pool = list(shapes.HELDOUT_PROMPTS)
    times, rest = divmod(pairs, len(pool))
    return pool * times + [pool[i * len(pool) // rest] for i in range(rest)]


def draw_curve(
    losses: list[float], scores: list[tuple[int, float]], minutes: float, path: str
) -> None:
    """Loss (a mean over each hundredth of the run) and validation against steps and minutes, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(7, 3.6), layout="constrained")
    width = max(1, len(losses) // 100)
    smooth = torch.tensor(losses)[: len(losses) // width * width].view(-1, width).mean(1)
    left.plot(
        [(i + 0.5) * width for i in range(len(smooth))], smooth, color="0.55", label="loss (left)"
    )
    left.set(
        xlabel="optimiser steps", ylabel="flow-matching loss", yscale="log", xlim=(0, len(losses))
    )
    right = left.twinx()
    right.plot(
        *zip(*scores, strict=True),
        "o-",
        ms=3,
        color="tab:blue",
        label="held-out fully right (right)",
    )
    right.set(ylabel="fraction fully right, 8 Euler steps", ylim=(0, 1))
    per_step = minutes / len(losses)
    top = left.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda m: m / per_step))
    top.set_xlabel("minutes")
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], loc="center right", frameon=False)
    for axis in (left, right):
        axis.spines["top"].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def summary(model: ShapesFlow, options: Options) -> None:
    """Print the share fully right by family: each held-out prompt twice, on noise not used to validate."""
    prompts = heldout(2 * len(shapes.HELDOUT_PROMPTS))
    families = [shapes.parse(p).family for p in prompts]
    for steps in (8, 16):
        right = judged(
            model, prompts, steps, torch.Generator().manual_seed(options.seed + 2)
        ).float()
        by_family = ", ".join(
            f"{family} {right[[f == family for f in families]].mean():.3f}"
            for family in ("count", "conjunction", "relation")
        )
        print(f"held-out, {steps:2} Euler steps, fully right: {right.mean():.3f}   ({by_family})")


def optimisers(model: ShapesFlow, options: Options) -> list:
    """(optimiser, schedule) pairs: Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [
        p
        for name, p in model.blocks.named_parameters()
        if p.dim() == 2 and "modulation" not in name
    ]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]

    def rate(i: int) -> float:
        return min(1, (i + 1) / WARMUP)

    both = [
        Muon(matrices, options.lr),
        torch.optim.AdamW(others, options.lr, (0.9, 0.98), weight_decay=0.0),
    ]
    return [(o, torch.optim.lr_scheduler.LambdaLR(o, rate)) for o in both]


@torch.no_grad()
def follow(mean: ShapesFlow, model: ShapesFlow, decay: float) -> None:
    """mean <- decay mean + (1 - decay) model."""
    for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def main() -> None:
    """Train for the budget, keep the best weights by validation, draw the curve, print the summary."""
    options = Options.from_command_line()
    torch.set_num_threads(options.threads)
    with torch.random.fork_rng():  # initialisers know only the global generator
        torch.manual_seed(options.seed)
        model = ShapesFlow()
    mean = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = optimisers(model, options)
    generator = torch.Generator().manual_seed(options.seed)
    settings = ", ".join(f"{name}={value}" for name, value in asdict(options).items())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {settings}")

    losses, scores, best, start = [], [], -1.0, time.perf_counter()
    steps = 1 if options.dry_run else options.steps
    for step in (bar := tqdm(range(1, steps + 1), mininterval=5)):
        loss = flow_loss(model, *batch_of(options, generator), generator)
        loss.backward()
        for optimiser, schedule in pairs:
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        follow(
            mean, model, min(options.ema, step / (step + 10))
        )  # a short memory first: forget the start
        losses.append(loss.item())
        if step % options.validate_every and step < steps:
            continue

        noise = torch.Generator().manual_seed(options.seed + 1)
        score = judged(mean, heldout(options.pairs), 8, noise).float().mean().item()
        scores.append((step, score))
        bar.write(
            f"step {step:5}  {(time.perf_counter() - start) / 60:5.1f} min  fully right {score:.3f}  "
            f"loss {sum(losses[-100:]) / len(losses[-100:]):.4f}"
        )
        if score >= best and not options.dry_run:
            best, kept = score, copy.deepcopy(mean)
            save(
                kept,
                options.out,
                {
                    "command": shlex.join(["python", "-m", "zoo.shapes.pretrain", *sys.argv[1:]]),
                    "seed": str(options.seed),
                    "step": str(step),
                    "steps": str(options.steps),
                    "validation": f"{score:.4f} of {options.pairs} held-out prompts fully right, 8 Euler steps",
                },
            )
    if options.dry_run:
        return
    draw_curve(losses, scores, (time.perf_counter() - start) / 60, options.figure)
    print(
        f"kept the weights with validation {best:.3f} in {options.out}, the curve in {options.figure}"
    )
    summary(kept, options)


if __name__ == "__main__":
    main()
