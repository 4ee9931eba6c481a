"""Align the embedded text-to-image model with a rule, by Pave-GRPO.

    python train.py                                        a laptop: under five minutes on 2 CPU cores
    torchrun --nproc_per_node=8 train.py                   a node: the same samples and the same gradient
    python train.py --factors                              S = {}: the Flow-GRPO / Flow-CPS / DanceGRPO baseline
    python train.py --sample runs/shapes-1/checkpoint.safetensors --prompt "two red circles"

One iteration is Algorithm 1 (pave_grpo.py): sample groups, reward them, re-score every observed transition under
its decompositions, ascend. Prompts are the unit of work: --prompts-per-iteration is global, and all randomness of a
prompt comes from one CPU generator seeded by (seed, iteration, prompt index), so that neither the number of ranks nor
the device changes what is drawn. Held-out prompts are never trained on and are judged with fixed noise.

Departures from the paper's setting: the model, the reward and every size, which are those of a laptop; one stochastic
step, where the gradient is most signal; and layers at pixel resolution stay as they are (--tune), as under LoRA.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo import shapes, shapes_model

# ---- Options -----------------------------------------------------------------------------------------------


def option(default, help, **how):
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. Each field is a flag: prompts_per_iteration is --prompts-per-iteration."""

    iterations: int = option(40, "training iterations, >= 1")
    prompts_per_iteration: int = option(8, "P, prompts per iteration over all ranks; a multiple of the ranks")
    group_size: int = option(24, "G, members of a group, >= 2")
    steps: int = option(8, "T, steps of the sampling grid")
    shift: float = option(1.0, "shift of the grid; above 1 spends more steps near the noise")
    sde_steps: tuple[int, ...] = option((1,), "stochastic steps, from 0; no number: all that have a density")
    kernel: str = option("flow_sde", "kernel of the stochastic steps", choices=tuple(pave.KERNELS))
    eta: float = option(0.7, "stochasticity of the kernel, > 0")
    rollouts: str = option("shared_anchor", "groups branch from one ODE trajectory, or are G chains of their own",
                           choices=("shared_anchor", "independent"))
    own_start: bool = option(False, "independent rollouts: every member starts from its own noise")
    factors: tuple[int, ...] = option((2, 3), "S, the decomposition factors, each >= 2; none: plain GRPO")
    form: str = option("paper", "density of the k-terms: the paper's, or matched to the sampling one (E7 in README.md)",
                       choices=("paper", "matched"))
    reduction: str = option("mean", "log-probabilities averaged (the field) or summed (true density) over dimensions",
                            choices=("mean", "sum"))
    updates: int = option(1, "updates per rollout; with 1 every ratio is 1 and --clip cannot act")
    clip: float = option(1e-4, "clip range of the ratios, > 0; 'mean' ratios stay within about 1e-3 of 1")
    kl: float = option(0.0, "coefficient of the KL to the initial model, >= 0")
    tune: str = option("transformer", "what is trained: the transformer, or all, the layers at pixel resolution too",
                       choices=("transformer", "all"))
    lr: float = option(2e-4, "learning rate, > 0")
    warmup: int = option(15, "iterations over which the learning rate rises to --lr, >= 0")
    optimizer: str = option("adamw", "adamw, or sgd without momentum", choices=("adamw", "sgd"))
    weight_decay: float = option(1e-4, "decoupled weight decay of adamw, >= 0")
    max_grad_norm: float = option(1.0, "gradient norm above which the gradient is scaled down, > 0; inf: never")
    seed: int = option(0, "seed of prompts and noise, >= 0")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = option(0, "CPU threads per rank; 0: torch's own choice")
    out: str = option("",
                      "folder to write, new or empty; default: the first free runs/shapes-N, with --sample this one")
    eval_every: int = option(0, "judge the held-out prompts (16 steps) every N iterations; 0: before and after only")
    heldout: int = option(512, "held-out (prompt, noise) pairs to judge: a multiple of 4, the images per prompt")
    evaluate: str = option("", "judge this checkpoint on the held-out prompts, print the result as JSON, and stop",
                           metavar="CHECKPOINT")
    sample: str = option("", "draw --prompt with this checkpoint into OUT/samples.png, and stop", metavar="CHECKPOINT")
    prompt: tuple[str, ...] = option((), "with --sample: prompts to draw", metavar="TEXT")
    dry_run: bool = option(False, "print what an iteration would cost, and stop")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and status 2."""
        self.exit(2, f"train.py: error: {message}\n")


def parse(argv: list[str] | None = None) -> Options:
    """Command line -> options. A flag of a tuple takes any number of values. Bad input: one line, status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Options):
        how = dict(f.metadata)
        if isinstance(f.default, bool):
            how["action"] = "store_true"
        elif isinstance(f.default, tuple):
            how |= {"nargs": "*", "type": str if f.name == "prompt" else int}
        else:
            how["type"] = type(f.default)
        shown = "none" if f.default == () else f.default
        how["help"] += "" if f.default is False or f.default == "" else f" (default: {shown})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how)
    values = vars(parser.parse_args(argv))
    o = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    try:
        check(o)
    except ValueError as problem:
        parser.error(str(problem))
    return o


READ = {"evaluate": ("heldout", "device", "threads"), "sample": ("prompt", "out", "seed", "device", "threads")}


def check(o: Options) -> None:
    """Everything that can be known to be wrong before any work. Raises ValueError of one line."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rules = [
        (o.iterations >= 1, "iterations", "1 or more"),
        (o.prompts_per_iteration > 0 and o.prompts_per_iteration % world == 0, "prompts_per_iteration",
         f"a positive multiple of the {world} rank{'s' * (world > 1)}"),
        (o.group_size >= 2, "group_size", "2 or more"),
        (o.updates >= 1, "updates", "1 or more"),
        (0 < o.clip < math.inf, "clip", "a positive number"),
        (0 <= o.kl < math.inf, "kl", "0 or more"),
        (0 < o.lr < math.inf, "lr", "a positive number"),
        (o.warmup >= 0, "warmup", "0 or more"),
        (0 <= o.weight_decay < math.inf, "weight_decay", "0 or more"),
        (o.max_grad_norm > 0, "max_grad_norm", "positive, or inf"),
        (o.seed >= 0, "seed", "0 or more"),
        (o.threads >= 0, "threads", "0 or more"),
        (o.eval_every >= 0, "eval_every", "0 or more"),
        (o.heldout > 0 and o.heldout % IMAGES_PER_PROMPT == 0, "heldout",
         f"a positive multiple of {IMAGES_PER_PROMPT}"),
        (not o.own_start or o.rollouts == "independent", "own_start", "left out unless --rollouts independent"),
        (not o.prompt or o.sample, "prompt", "left out without --sample"),
        (not o.sample or o.prompt, "sample", "given with --prompt"),
        (o.factors or o.form == "paper", "form", "left out with --factors of no number: there are no k-terms"),
        (o.optimizer == "adamw" or o.weight_decay == Options.weight_decay, "weight_decay", "left out with sgd"),
        (o.device in ("auto", "cpu", "cuda"), "device", "cpu, cuda or auto"),
        (o.device != "cuda" or torch.cuda.is_available(), "device", "cpu: no CUDA device is available"),
        (not o.sample or o.out or not Path("samples.png").exists(), "sample",
         "given with --out where samples.png exists"),
        (not o.sample or world == 1, "sample", "run without torchrun"),
        (not o.out or not Path(o.out).exists() or (Path(o.out).is_dir() and not any(Path(o.out).iterdir())), "out",
         "a new or empty folder"),
    ]
    for good, name, wanted in rules:
        if not good:
            value = getattr(o, name)
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    for mode, read in READ.items():
        unread = [f.name for f in fields(o) if getattr(o, f.name) != f.default and f.name not in {mode, *read}]
        if getattr(o, mode) and unread:
            raise ValueError(f"--{unread[0].replace('_', '-')}: must be left out with --{mode}, which does not read it")
    pave.check_factors(o.factors)
    make_process(o).stochastic_steps(o.sde_steps or None)
    for prompt in o.prompt:
        shapes.parse(prompt)
    for checkpoint in filter(None, (o.evaluate, o.sample)):
        shapes_model.load(checkpoint)


def make_process(o: Options) -> pave.Process:
    return pave.Process(pave.schedule(o.steps, o.shift), o.kernel, o.eta)


# ---- Ranks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among `world` of them. Without torchrun: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, o: Options) -> Ranks:
        """This process's place, its device and threads set up, the process group opened if there are others."""
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        cuda = o.device == "cuda" or (o.device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            sys.exit(f"train.py: error: rank {local} of this node has no GPU: must be {torch.cuda.device_count()} "
                     f"ranks or fewer")
        device = torch.device(f"cuda:{local}" if cuda else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # convolutions in true float32, as on the CPU
        if o.threads:
            torch.set_num_threads(o.threads)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device)

    def share(self, n: int) -> range:
        """This rank's contiguous part of range(n)."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, value) -> list:
        """Every rank's value, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def average_gradients(self, model: torch.nn.Module) -> None:
        """The mean over ranks: equal shares of prompts make it the gradient of the global mean."""
        if self.world > 1:
            for p in model.parameters():
                if p.requires_grad:
                    dist.all_reduce(p.grad)
                    p.grad /= self.world


# ---- The model as a velocity, the reward, the held-out prompts ---------------------------------------------

SHAPE = (3, shapes.SIZE, shapes.SIZE)
IMAGES_PER_PROMPT = 4  # of a held-out prompt, each from its own noise: diversity is measured among them
EVAL_STEPS = (8, 16, 40)
EVAL_BATCH = 128  # a fixed size, so that no figure depends on the number of ranks


def velocity_of(model: torch.nn.Module, prompts: list[str], device: torch.device) -> pave.Velocity:
    """v(x, t, c) for rows that belong to prompts[c]; the prompts are tokenised once."""
    tokens = shapes_model.tokenize(prompts).to(device)
    return lambda x, t, c: model(x, t, tokens[c])


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator of its own stream for every tuple of integers, of any length (SeedSequence pads with zeros)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


@torch.no_grad()
def draw(model: torch.nn.Module, prompts: list[str], noise: Tensor, steps: int, device: torch.device) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] on the CPU by `steps` uniform ODE steps from noise [B, 3, H, W]."""
    x = pave.ode_sample(velocity_of(model, prompts, device), pave.schedule(steps), noise.to(device))
    return shapes_model.to_images(x).cpu()


def heldout_pairs(n: int) -> tuple[list[str], Tensor]:
    """The first n of the fixed (prompt, noise) pairs: IMAGES_PER_PROMPT noises for each held-out prompt, in turn."""
    order = torch.randperm(len(shapes.HELDOUT_PROMPTS), generator=generator_of(0)).tolist()
    turns = [order[j % len(order)] for j in range(n // IMAGES_PER_PROMPT)]
    noise = [torch.randn(IMAGES_PER_PROMPT, *SHAPE, generator=generator_of(0, j)) for j in range(len(turns))]
    return [shapes.HELDOUT_PROMPTS[i] for i in turns for _ in range(IMAGES_PER_PROMPT)], torch.cat(noise)


def judge_heldout(model: torch.nn.Module, n: int, steps_list: tuple[int, ...], ranks: Ranks) -> dict:
    """{"right": {T: fraction}, "family": {name: fraction}, "score": mean, "diversity": distance} on n held-out pairs.

    Family, score and diversity are those of 16 steps. Diversity is the root mean square pixel distance between images
    of one prompt from different noise, averaged over pairs and prompts.
    """
    prompts, noise = heldout_pairs(n)
    batches = [range(i, min(i + EVAL_BATCH, n)) for i in range(0, n, EVAL_BATCH)]
    jobs = [(steps, rows) for steps in steps_list for rows in batches]
    found = []  # (steps, first row, right, score, distances)
    for j in tqdm(range(ranks.rank, len(jobs), ranks.world), "held-out", leave=False, disable=ranks.rank > 0):
        steps, rows = jobs[j]
        chosen = [prompts[i] for i in rows]
        images = draw(model, chosen, noise[rows.start:rows.stop], steps, ranks.device)
        verdict = shapes.judge(images, chosen)
        distances = [torch.pdist(four.flatten(1)).mean().item() for four in images.split(IMAGES_PER_PROMPT)]
        found.append((steps, rows.start, verdict.right.tolist(), verdict.score.tolist(), distances))
    found = sorted(part for parts in ranks.gather(found) for part in parts)

    def joined(steps: int, what: int) -> list:
        return [value for part in found if part[0] == steps for value in part[what]]

    family = [shapes.parse(p).family for p in prompts]
    return {
        "right": {str(T): statistics.fmean(joined(T, 2)) for T in steps_list},
        "family": {name: statistics.fmean(right for right, own in zip(joined(16, 2), family) if own == name)
                   for name in sorted(set(family))},
        "score": statistics.fmean(joined(16, 3)),
        "diversity": statistics.fmean(joined(16, 4)) / math.prod(SHAPE) ** 0.5,
    }


# ---- Pictures ----------------------------------------------------------------------------------------------


def draw_grid(columns: dict[str, Tensor], prompts: list[str], path: Path) -> None:
    """One row per prompt, one block of images [rows, n, 3, H, W] per column title, each marked right or wrong."""
    rows, n = len(prompts), next(iter(columns.values())).shape[1]
    figure = Figure(figsize=(0.9 * n * len(columns) + 2.6, 0.92 * rows + 0.5))
    axes = figure.subplots(rows, n * len(columns), squeeze=False)
    for block, (title, images) in enumerate(columns.items()):
        for i, prompt in enumerate(prompts):
            right = shapes.judge(images[i], [prompt] * n).right.tolist()
            for j in range(n):
                ax = axes[i, block * n + j]
                ax.imshow(images[i, j].permute(1, 2, 0).numpy(), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                colour = "#2a7f3b" if right[j] else "#c0392b"
                for side in ax.spines.values():
                    side.set(color=colour, linewidth=2)
                ax.text(0.97, 0.03, "✓" if right[j] else "✗", transform=ax.transAxes, ha="right", va="bottom",
                        color=colour, fontsize=11, fontweight="bold")
        axes[0, block * n].set_title(title, loc="left", fontsize=11)
    for i, prompt in enumerate(prompts):
        axes[i, 0].set_ylabel(prompt.replace(" of ", " of\n").replace(" and ", "\nand ").replace("ve ", "ve\n"),
                              rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)


def draw_curve(lines: list[dict], path: Path) -> None:
    """Training reward and held-out correctness against iterations."""
    trained = [m for m in lines if "reward" in m]
    judged = [m for m in lines if "heldout_right" in m]
    figure = Figure(figsize=(6, 3.4))
    ax = figure.subplots()
    for name, style, label in (("reward", "-", "reward of the rollouts"), ("right", ":", "rollouts fully right")):
        ax.plot([m["iteration"] for m in trained], [m[name] for m in trained], style, color="0.45", label=label)
    ax.plot([m["iteration"] for m in judged], [m["heldout_right"] for m in judged], "o-", color="#1f5fa8",
            label="held-out images fully right (16 ODE steps)")
    ax.set(xlabel="iteration", ylabel="fraction", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def shown_prompts() -> tuple[list[str], Tensor]:
    """Eight held-out prompts of all families, four noises each: what before_after.png shows."""
    prompts = list(dict.fromkeys(heldout_pairs(len(shapes.HELDOUT_PROMPTS) * IMAGES_PER_PROMPT)[0]))
    chosen = [p for family, n in (("count", 2), ("conjunction", 3), ("relation", 3))
              for p in [p for p in prompts if shapes.parse(p).family == family][:n]]
    return chosen, torch.stack([torch.randn(4, *SHAPE, generator=generator_of(1, i)) for i in range(len(chosen))])


def draw_shown(model: torch.nn.Module, device: torch.device) -> Tensor:
    """Images [8, 4, 3, H, W] of shown_prompts by 16 ODE steps."""
    prompts, noise = shown_prompts()
    images = draw(model, [p for p in prompts for _ in range(4)], noise.flatten(0, 1), 16, device)
    return images.unflatten(0, (len(prompts), 4))


# ---- One iteration -----------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one iteration, over all ranks: images to reward, and rows of velocity evaluated."""

    images: int
    sampled: int
    trained: int
    reference: int

    @property
    def forwards(self) -> int:
        """A trained evaluation costs about three forwards: itself, and a backward of twice that."""
        return self.sampled + 3 * self.trained + self.reference


def cost_of(o: Options, factors: tuple[int, ...]) -> Cost:
    """Counted: the anchor up to its last stochastic step, and G branches from each."""
    steps = make_process(o).stochastic_steps(o.sde_steps or None)
    P, G, T, n = o.prompts_per_iteration, o.group_size, o.steps, len(steps)
    shared = o.rollouts == "shared_anchor"
    states = P * n * (1 if shared else G) * o.updates  # x_t that the loss evaluates
    return Cost(images=P * G * (n if shared else 1),
                sampled=P * (G * sum(T - 1 - i for i in steps) + steps[-1] + 1 if shared else G * T),
                trained=states * (1 + sum(k - 1 for k in factors)),
                reference=states if o.kl else 0)


def describe(o: Options, ranks: Ranks) -> str:
    """What one iteration costs, and what S adds, before it is spent."""
    cost, plain = cost_of(o, o.factors), cost_of(o, ())
    return (f"one iteration: {cost.images} images in groups of {o.group_size} from {o.prompts_per_iteration} prompts "
            f"on {ranks.world} rank{'s' * (ranks.world > 1)} ({ranks.device.type})\n"
            f"  velocity evaluations: {cost.sampled} sampled, {cost.trained} trained (three forwards each)"
            f"{f', {cost.reference} reference' if o.kl else ''}\n"
            f"  S = {{{', '.join(map(str, o.factors))}}} adds {cost.trained - plain.trained} trained evaluations, "
            f"{100 * (cost.forwards / plain.forwards - 1):.1f} % more forwards; no image, no reward")


def iterate(o: Options, iteration: int, model, reference, optimizer, ranks: Ranks) -> dict:
    """One iteration of Algorithm 1 on this rank's prompts. Returns this rank's metrics."""
    process, device = make_process(o), ranks.device
    steps = process.stochastic_steps(o.sde_steps or None)

    # Sample groups. A prompt's choice and noise depend on (seed, iteration, its index) alone.
    generators = [generator_of(o.seed, iteration, i) for i in ranks.share(o.prompts_per_iteration)]
    chosen = [int(torch.randint(len(shapes.TRAIN_PROMPTS), (), generator=g)) for g in generators]
    prompts = [shapes.TRAIN_PROMPTS[i] for i in chosen]
    noise = pave.draw_noise(generators, o.group_size, SHAPE, len(steps), o.own_start, device=device)
    velocity = velocity_of(model, prompts, device)
    sample = pave.rollout_shared_anchor if o.rollouts == "shared_anchor" else pave.rollout_independent
    rollout = sample(velocity, process, noise, steps)

    # Reward.
    groups = rollout.x_0.shape[:3]
    owners = [p for p in prompts for _ in range(groups[1] * groups[2])]
    verdict = shapes.judge(shapes_model.to_images(rollout.x_0.flatten(0, 2)), owners)
    rewards = verdict.score.to(device).unflatten(0, groups)
    advantages = pave.group_advantages(rewards)

    # Ascend; the first update's pass is theta_old for the others.
    old = None
    for _ in range(o.updates):
        result = pave.policy_loss(velocity, rollout, advantages, factors=o.factors, form=o.form, clip=o.clip, kl=o.kl,
                                  reference=velocity_of(reference, prompts, device) if o.kl else None,
                                  reduction=o.reduction, old=old)
        old = result.old
        optimizer.zero_grad()
        result.loss.backward()
        ranks.average_gradients(model)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm).item()
        optimizer.step()

    metrics = {"reward": rewards.mean().item(), "right": verdict.right.float().mean().item(),
               "loss": result.loss.item(), "grad_norm": grad_norm, "kl": result.kl,
               "silent_groups": result.groups_without_signal / (groups[0] * groups[1]),
               "sampling_gap_max": old.sampling_gap}
    for k, term in result.terms.items():
        metrics |= {f"ratio_{k}": term.ratio_mean, f"ratio_{k}_min": term.ratio_min, f"ratio_{k}_max": term.ratio_max,
                    f"clip_fraction_{k}": term.clip_fraction, f"weight_{k}": term.effective_weight.mean().item()}
    return metrics


def merge(parts: list[dict]) -> dict:
    """Metrics of all ranks as one: the extremes of what is named _min or _max, the mean of the rest."""
    merged = {}
    for name in parts[0]:
        combine = min if name.endswith("_min") else max if name.endswith("_max") else statistics.fmean
        merged[name] = combine([part[name] for part in parts])
    return merged


# ---- The run -----------------------------------------------------------------------------------------------


class Run:
    """The run folder, which only rank 0 writes: config.json, metrics.jsonl, pictures, checkpoint, summary.json."""

    def __init__(self, o: Options, ranks: Ranks):
        self.o, self.ranks, self.lines, self.began = o, ranks, [], time.perf_counter()
        self.summary: dict = {"heldout": {}, "heldout_family": {}, "diversity": {}}
        if ranks.rank == 0:
            self.folder = Path(o.out) if o.out else next(
                folder for folder in (Path(f"runs/shapes-{i}") for i in range(1, 10**6)) if not folder.exists())
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(asdict(o), indent=1) + "\n")
            print(f"writing {self.folder}/")

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl, with the seconds since the start."""
        line["seconds"] = round(time.perf_counter() - self.began, 2)
        self.lines.append(line)
        if self.ranks.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def picture(self, columns: dict[str, Tensor]) -> None:
        """Draw before_after.png from blocks of draw_shown's images."""
        if self.ranks.rank == 0:
            draw_grid(columns, shown_prompts()[0], self.folder / "before_after.png")

    def judge(self, model, when: str) -> None:
        """Held-out figures of all step counts, as summary["heldout"][when]."""
        result = judge_heldout(model, self.o.heldout, EVAL_STEPS, self.ranks)
        self.summary["heldout"][when] = result["right"]
        self.summary["heldout_family"][when] = result["family"]
        self.summary["diversity"][when] = result["diversity"]
        if self.ranks.rank == 0:
            print(f"{when}: held-out images fully right, by ODE steps: "
                  + ", ".join(f"{T}: {f:.3f}" for T, f in result["right"].items())
                  + "; by family at 16: " + ", ".join(f"{name} {f:.2f}" for name, f in result["family"].items())
                  + f"; diversity {result['diversity']:.3f}")

    def save(self, model, iterations: int) -> None:
        """Write checkpoint.safetensors, curve.png and summary.json as of now."""
        if self.ranks.rank > 0:
            return
        shapes_model.save(model, self.folder / "checkpoint.safetensors", {"iterations": str(iterations)}, torch.float32)
        draw_curve(self.lines, self.folder / "curve.png")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        cuda = self.ranks.device.type == "cuda"
        where = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
        self.summary |= {"seconds": round(time.perf_counter() - self.began, 1), "iterations": iterations,
                         "interrupted": iterations < self.o.iterations, "seed": self.o.seed, "device": where,
                         "ranks": self.ranks.world,
                         "versions": versions, "command": shlex.join(["python", *sys.argv])}
        (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")


def train(o: Options, ranks: Ranks) -> None:
    """Judge, align, judge again. The first Ctrl-C ends the run after the iteration it falls in; all of it is kept."""
    run, stop = Run(o, ranks), []
    signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    model = shapes_model.load(device=ranks.device)
    reference = copy.deepcopy(model).requires_grad_(False) if o.kl else None
    for name, p in model.named_parameters():
        p.requires_grad_(o.tune == "all" or name.split(".")[0] not in shapes_model.PIXEL_LAYERS)
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD(tuned, o.lr) if o.optimizer == "sgd"
                 else torch.optim.AdamW(tuned, o.lr, weight_decay=o.weight_decay))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / (o.warmup + 1)))

    columns = {"before": draw_shown(model, ranks.device)}
    run.picture(columns)
    run.judge(model, "before")
    run.log({"iteration": 0, "heldout_right": run.summary["heldout"]["before"]["16"]})
    done = 0
    bar = tqdm(range(1, o.iterations + 1), "aligning", disable=ranks.rank > 0)
    for iteration in bar:
        if any(ranks.gather(bool(stop))):
            break
        metrics = merge(ranks.gather(iterate(o, iteration, model, reference, optimizer, ranks)))
        done, line = iteration, {"iteration": iteration, **metrics, "lr": rate.get_last_lr()[0]}
        rate.step()
        bar.set_postfix({"reward": f"{metrics['reward']:.3f}", "ratio": f"{metrics['ratio_1']:.5f}",
                         "clipped": f"{metrics['clip_fraction_1']:.2f}"})
        evaluated = o.eval_every and iteration % o.eval_every == 0 and iteration < o.iterations
        if evaluated:
            line["heldout_right"] = judge_heldout(model, o.heldout, (16,), ranks)["right"]["16"]
        run.log(line)
        if evaluated:
            run.picture(columns | {f"after {iteration} iterations": draw_shown(model, ranks.device)})
            run.save(model, done)
    interrupted = done < o.iterations
    run.picture(columns | {f"after {done} iterations": draw_shown(model, ranks.device)})
    if not interrupted:
        run.judge(model, "after")
        run.log({"iteration": done, "heldout_right": run.summary["heldout"]["after"]["16"]})
    run.save(model, done)
    if ranks.rank == 0:
        print(f"{'interrupted' if interrupted else 'finished'} after {done} iterations and "
              f"{run.summary['seconds']:.0f} s: look at {run.folder / 'before_after.png'}")


def main(argv: list[str] | None = None) -> None:
    """Evaluate, sample, print the cost, or train: what the command line says."""
    o = parse(argv)
    ranks = Ranks.start(o)
    if o.evaluate:
        result = judge_heldout(shapes_model.load(o.evaluate, ranks.device), o.heldout, EVAL_STEPS, ranks)
        print(json.dumps(result, indent=1) if ranks.rank == 0 else "", end="")
    elif o.sample:
        model = shapes_model.load(o.sample, ranks.device)
        folder = Path(o.out or ".")
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.stack([torch.randn(8, *SHAPE, generator=generator_of(o.seed, i)) for i in range(len(o.prompt))])
        images = draw(model, [p for p in o.prompt for _ in range(8)], noise.flatten(0, 1), 16, ranks.device)
        draw_grid({"16 ODE steps": images.unflatten(0, (-1, 8))}, list(o.prompt), folder / "samples.png")
        print(f"look at {folder / 'samples.png'}")
    else:
        if ranks.rank == 0:
            print(describe(o, ranks))
        if not o.dry_run:
            train(o, ranks)
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
