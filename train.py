"""Align a text-to-image flow with a reward, by Pave-GRPO.

    python train.py                                        a laptop: the embedded model, in under five minutes
    torchrun --nproc_per_node=8 train.py                   a node: the same samples and the same gradient
    python train.py --factors                              S = {}: the Flow-GRPO / Flow-CPS / DanceGRPO baseline
    torchrun --nproc_per_node=8 train.py --model stabilityai/stable-diffusion-3.5-medium --reward hpsv2 clip:0.01 \\
        --eval-reward pickscore --prompts train.txt --eval-prompts heldout.txt

One iteration is Algorithm 1 (pave_grpo.py): sample groups, reward them, re-score every observed transition under
its decompositions, ascend. Prompts are the unit of work: --prompts-per-iteration is global, and all randomness of a
prompt comes from one CPU generator seeded by (seed, iteration, prompt index), so that neither the number of ranks nor
the device changes what is drawn. Held-out prompts are never trained on and are judged with fixed noise.

Departures from the paper's setting: without --model, the model, the reward and every size, which are those of a laptop,
one stochastic step, where the gradient is most signal, and layers at pixel resolution as they are; with it, LoRA unless
--preset says otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.rewards import spec as zoo_rewards
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes
from zoo.training import costs, pictures, policies
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts, generator_of

# ---- Options -----------------------------------------------------------------------------------------------


def option(default, help, **how):
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. Each field is a flag: prompts_per_iteration is --prompts-per-iteration.

    Defaults are the embedded model's; those of --model are RELEASED, below.
    """

    model: str = option(
        "", "an SD3 or FLUX pipeline, folder or hub id; default: the embedded model"
    )
    revision: str = option("", "with --model: the hub revision")
    preset: str = option(
        "",
        "with --model: the authors' setting, full fine-tuning",
        choices=("paper-flux", "paper-sd3"),
    )
    prompts: str = option("", "training prompts, a text file, one per line", metavar="FILE")
    eval_prompts: str = option(
        "", "held-out prompts, likewise; none may be a training prompt", metavar="FILE"
    )
    reward: tuple[str, ...] = option(
        ("rule",),
        "rewards to ascend, NAME[=PLACE[@REVISION]][:WEIGHT], summed: clip, "
        "pickscore, hpsv2, imagereward, rule, right, or module:function",
        metavar="REWARD",
    )
    eval_reward: tuple[str, ...] = option(
        ("right", "rule"),
        "rewards that judge held-out prompts, the first also in "
        "pictures; with --model default: those of --reward",
        metavar="REWARD",
    )
    iterations: int = option(40, "training iterations, >= 1")
    prompts_per_iteration: int = option(
        8, "P, prompts per iteration over all ranks; a multiple of the ranks"
    )
    group_size: int = option(24, "G, members of a group, >= 2")
    size: tuple[int, ...] = option(
        (), "with --model: height and width of the pictures", metavar="PIXELS"
    )
    guidance: float = option(
        0.0, "with --model: classifier-free guidance of SD3 (above 1), the guidance input of FLUX"
    )
    steps: int = option(8, "T, steps of the sampling grid")
    shift: float = option(1.0, "shift of the grid; above 1 spends more steps near the noise")
    sigmas: str = option(
        "shifted",
        "with --model: the grid of --shift, or the pipeline's own",
        choices=("shifted", "pipeline"),
    )
    sde_steps: tuple[int, ...] = option(
        (1,), "stochastic steps, from 0; no number: all that have a density"
    )
    kernel: str = option("flow_sde", "kernel of the stochastic steps", choices=tuple(pave.KERNELS))
    eta: float = option(0.7, "stochasticity of the kernel, > 0")
    rollouts: str = option(
        "shared_anchor",
        "groups branch from one ODE trajectory, or are G chains of their own",
        choices=("shared_anchor", "independent"),
    )
    own_start: bool = option(False, "independent rollouts: every member starts from its own noise")
    factors: tuple[int, ...] = option(
        (2, 3), "S, the decomposition factors, each >= 2; none: plain GRPO"
    )
    form: str = option(
        "paper",
        "density of the k-terms: the paper's, or matched to the sampling one (E7 in README.md)",
        choices=("paper", "matched"),
    )
    reduction: str = option(
        "mean",
        "log-probabilities averaged (the field) or summed (true density) over dimensions",
        choices=("mean", "sum"),
    )
    updates: int = option(1, "updates per rollout; with 1 every ratio is 1 and --clip cannot act")
    clip: float = option(
        1e-4, "clip range of the ratios, > 0; 'mean' ratios stay within about 1e-3 of 1"
    )
    kl: float = option(0.0, "coefficient of the KL to the initial model, >= 0")
    tune: str = option(
        "transformer",
        "what is trained: of the embedded model the transformer, or all in full, layers "
        "at pixel resolution too; with --model lora or full",
        choices=("transformer", "lora", "full"),
    )
    rank: int = option(64, "with --tune lora: rank of the adapters, >= 1")
    alpha: float = option(128.0, "with --tune lora: their scaling is alpha / rank, > 0")
    dtype: str = option(
        "float32",
        "with --model: what networks compute in; what is trained is kept in float32",
        choices=("float32", "bfloat16"),
    )
    checkpointing: bool = option(
        False,
        "with --model: gradient checkpointing, a forward more for less memory",
        action=argparse.BooleanOptionalAction,
    )
    lr: float = option(2e-4, "learning rate, > 0")
    warmup: int = option(15, "iterations over which the learning rate rises to --lr, >= 0")
    optimizer: str = option("adamw", "adamw, or sgd without momentum", choices=("adamw", "sgd"))
    weight_decay: float = option(1e-4, "decoupled weight decay of adamw, >= 0")
    max_grad_norm: float = option(
        1.0, "gradient norm above which the gradient is scaled down, > 0; inf: never"
    )
    ema: float = option(
        0.0, "decay of an average of the weights, in [0, 1); above 0 it is what is judged and saved"
    )
    rollout_batch: int = option(0, "rows of one velocity call while sampling; 0: all at once")
    decode_batch: int = option(4, "with --model: states per call of the VAE; 0: all at once")
    reward_batch: int = option(0, "pictures per call of a reward; 0: all at once")
    update_batch: int = option(
        0, "observed states x_t per backward pass, gradients added up; 0: all at once"
    )
    eval_batch: int = option(
        128, "held-out pictures drawn together, a multiple of 4, the images per prompt"
    )
    seed: int = option(0, "seed of prompts, noise and adapters, >= 0")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = option(0, "CPU threads per rank; 0: torch's own choice")
    out: str = option(
        "",
        "folder to write, new or empty; default: the first free runs/NAME-N, with --sample this one",
    )
    eval_every: int = option(
        0,
        "judge the held-out prompts (first of --eval-steps) every N iterations; 0: before and "
        "after only",
    )
    eval_steps: tuple[int, ...] = option(
        (16, 8, 40), "ODE steps to judge with; the first also in pictures and curve"
    )
    heldout: int = option(
        512, "held-out (prompt, noise) pairs to judge: a multiple of 4, the images per prompt"
    )
    evaluate: str = option(
        "",
        "judge this checkpoint of the embedded model, print the result as JSON, and stop",
        metavar="CHECKPOINT",
    )
    sample: str = option(
        "",
        "draw --prompt with this checkpoint into OUT/samples.png, and stop",
        metavar="CHECKPOINT",
    )
    prompt: tuple[str, ...] = option((), "with --sample: prompts to draw", metavar="TEXT")
    dry_run: bool = option(False, "print what an iteration would cost and hold, and stop")


# With --model: the authors' setting (sizes, schedule, rates), their LoRA, and batches that only memory knows of.
RELEASED = {
    "reward": (),
    "eval_reward": (),
    "iterations": 300,
    "group_size": 12,
    "size": (512, 512),
    "steps": 16,
    "shift": 3.0,
    "sde_steps": (0, 2, 4, 6),
    "eta": 0.8,
    "tune": "lora",
    "dtype": "bfloat16",
    "warmup": 0,
    "checkpointing": True,
    "rollout_batch": 16,
    "reward_batch": 16,
    "update_batch": 1,
    "eval_batch": 16,
    "eval_every": 50,
    "eval_steps": (16, 40),
    "heldout": 64,
}
PRESETS = {
    "FluxPipeline": ("paper-flux", {"guidance": 3.5}),  # a schnell has no guidance: --guidance 0
    "StableDiffusion3Pipeline": ("paper-sd3", {"guidance": 4.5}),
}  # of SD3 the paper gives no guidance
LR = {"lora": 1e-4, "full": 2e-6}


def settle(given: dict) -> Options:
    """Options of a command line: what it says, over the preset's values, over the defaults. ValueError of one line."""
    defaults = {}
    if given.get("model"):
        from zoo.released import pipeline as diffusion  # diffusers takes seconds to import

        preset, own = PRESETS[diffusion.family_of(given["model"], given.get("revision") or None)]
        if given.get("preset", preset) != preset:
            raise ValueError(f"--preset {given['preset']}: must be {preset} for this model")
        defaults = RELEASED | own | ({"tune": "full"} if "preset" in given else {})
        defaults["lr"] = LR.get(given.get("tune", defaults["tune"]), LR["lora"])
        defaults["eval_reward"] = tuple(map(zoo_rewards.unweighted, given.get("reward", ())))
    return Options(**(defaults | given))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, of rank 0, and status 2."""
        self.exit(
            2, f"train.py: error: {message}\n" if os.environ.get("RANK", "0") == "0" else None
        )


def parse(argv: list[str] | None = None) -> Options:
    """Command line -> options. A flag of a tuple takes any number of values. Bad input: one line, status 2."""
    released = ", ".join(
        f"{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, tuple) else v}"
        for k, v in (RELEASED | LR).items()
        if v not in ((), True)
    )
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=textwrap.fill(
            f"with --model the defaults are: {released} (the learning rate), "
            f"checkpointing; guidance 3.5 for FLUX, 4.5 for SD3",
            110,
        ),
    )
    for f in fields(Options):
        how = dict(f.metadata)
        if isinstance(f.default, bool):
            how.setdefault("action", "store_true")
        elif isinstance(f.default, tuple):
            how |= {"nargs": "*", "type": str if "str" in f.type else int}
        else:
            how["type"] = type(f.default)
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        how["help"] += "" if shown in (False, "") else f" (default: {shown})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()
    }
    try:
        o = settle(given)
        check(o, set(given))
    except ValueError as problem:
        parser.error(str(problem))
    return o


ONLY_RELEASED = (
    "revision",
    "preset",
    "size",
    "guidance",
    "sigmas",
    "rank",
    "alpha",
    "dtype",
    "checkpointing",
    "decode_batch",
)


def unread(o: Options) -> dict[str, tuple[str, ...]]:
    """{why: options that a run of this kind does not read}."""
    every = {f.name for f in fields(o)}
    return {
        "with --evaluate": ()
        if not o.evaluate
        else tuple(
            every
            - {
                "evaluate",
                "eval_reward",
                "eval_steps",
                "eval_batch",
                "heldout",
                "shift",
                "device",
                "threads",
            }
        ),
        "with --sample": ()
        if not o.sample
        else tuple(every - {"sample", "prompt", "out", "seed", "shift", "device", "threads"}),
        "without --model": () if o.model else ONLY_RELEASED,
        "unless --tune is lora": ("rank", "alpha") if o.tune != "lora" else (),
        "with --sigmas pipeline": ("shift",) if o.sigmas == "pipeline" else (),
        "unless --rollouts is independent": ("own_start",) if o.rollouts != "independent" else (),
        "without --sample": ("prompt",) if not o.sample else (),
        "with --factors of no number: there are no k-terms": ("form",) if not o.factors else (),
        "with --optimizer sgd": ("weight_decay",) if o.optimizer == "sgd" else (),
    }


def check(o: Options, given: set[str]) -> None:
    """Everything that can be known to be wrong before any work. Raises ValueError of one line."""
    for why, names in unread(o).items():
        for name in sorted(given.intersection(names)):
            raise ValueError(f"--{name.replace('_', '-')}: must be left out {why}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, good, wanted in rules(o, world):
        value = getattr(o, name)
        if not good(value):
            flag, values = (
                "--" + name.replace("_", "-"),
                value if isinstance(value, tuple) else (value,),
            )
            raise ValueError(f"{' '.join(map(str, (flag, *values))).strip()}: must be {wanted}")
    pave.check_factors(o.factors)
    data, specs = (
        prompts_of(o),
        [spec for texts in (o.reward, o.eval_reward) for spec in zoo_rewards.parse(texts)],
    )
    asked = (*data.train, *data.heldout, *o.prompt)
    if o.sample or any(spec.name in zoo_rewards.RULES for spec in specs):
        if o.model:
            raise ValueError(
                "--reward, --eval-reward: 'rule' and 'right' judge the embedded world only"
            )
        for prompt in asked:
            shapes.parse(prompt)
    if not o.model:
        shapes_model.tokenize(list(asked))
    stochastic_steps(o, policy_of(o, world))


def rules(o: Options, world: int) -> list[tuple[str, Callable, str]]:
    """(option, what its value must satisfy, in words) for what can be said of one option at a time."""
    positive, natural = (
        (lambda z: 0 < z < math.inf, "a positive number"),
        (lambda z: z >= 0, "0 or more"),
    )
    in_fours = (
        lambda z: z > 0 and z % IMAGES_PER_PROMPT == 0,
        f"a positive multiple of {IMAGES_PER_PROMPT}",
    )
    return [
        *(
            (name, *natural)
            for name in (
                "warmup",
                "seed",
                "threads",
                "eval_every",
                "rollout_batch",
                "decode_batch",
                "reward_batch",
                "update_batch",
            )
        ),
        *((name, *positive) for name in ("iterations", "updates", "clip", "lr", "rank", "alpha")),
        ("heldout", *in_fours),
        ("eval_batch", *in_fours),
        (
            "prompts_per_iteration",
            lambda z: z > 0 and z % world == 0,
            f"a positive multiple of the {world} rank{'s' * (world > 1)}",
        ),
        ("group_size", lambda z: z >= 2, "2 or more"),
        ("kl", lambda z: 0 <= z < math.inf, "0 or more"),
        ("weight_decay", lambda z: 0 <= z < math.inf, "0 or more"),
        ("max_grad_norm", lambda z: z > 0, "positive, or inf"),
        ("ema", lambda z: 0 <= z < 1, "at least 0 and below 1"),
        (
            "eval_steps",
            lambda z: z and min(z) > 0 and len(set(z)) == len(z),
            "distinct positive numbers",
        ),
        ("size", lambda z: not o.model or len(z) == 2, "a height and a width"),
        (
            "tune",
            lambda z: z == "full" or (z == "lora") == bool(o.model),
            "lora or full" if o.model else "transformer or full without --model",
        ),
        ("reward", bool, "given: one reward or more"),
        ("eval_reward", bool, "given: one reward or more"),
        (
            "eval_reward",
            lambda z: all(spec.weight == 1 for spec in zoo_rewards.parse(z)),
            "without weights: judges are not summed",
        ),
        ("prompts", lambda z: z or not o.model, "given with --model"),
        (
            "eval_prompts",
            lambda z: bool(z) == bool(o.prompts),
            "given with --prompts, and only with it",
        ),
        ("sample", lambda z: bool(z) == bool(o.prompt), "given with --prompt"),
        (
            "sample",
            lambda z: not z or o.out or not Path("samples.png").exists(),
            "given with --out where samples.png exists",
        ),
        ("sample", lambda z: not z or world == 1, "run without torchrun"),
        ("device", lambda z: z in ("auto", "cpu", "cuda"), "cpu, cuda or auto"),
        (
            "device",
            lambda z: z != "cuda" or torch.cuda.is_available(),
            "cpu: no CUDA device is available",
        ),
        (
            "out",
            lambda z: (
                not z or not Path(z).exists() or (Path(z).is_dir() and not any(Path(z).iterdir()))
            ),
            "a new or empty folder",
        ),
    ]


def policy_of(o: Options, world: int = 1) -> policies.Embedded | policies.Released:
    """What the options align, its weights not read yet where it is released. Raises ValueError of one line."""
    if not o.model:
        return policies.Embedded(
            o.evaluate or o.sample or shapes_model.CHECKPOINT, o.tune, o.shift, o.kl > 0
        )
    return policies.Released(
        o.model,
        o.revision or None,
        size=o.size,
        guidance=o.guidance,
        dtype=getattr(torch, o.dtype),
        sigmas=o.sigmas,
        shift=o.shift,
        tune=o.tune,
        rank=o.rank,
        alpha=o.alpha,
        seed=o.seed,
        checkpointing=o.checkpointing,
        reference=o.kl > 0,
        decode_batch=o.decode_batch,
        world=world,
    )


def prompts_of(o: Options) -> Prompts:
    """Those of the files, or the embedded world's. Raises ValueError of one line."""
    return Prompts.of_files(o.prompts, o.eval_prompts) if o.prompts else Prompts()


def make_process(o: Options, policy) -> pave.Process:
    return pave.Process(policy.grid(o.steps), o.kernel, o.eta)


def stochastic_steps(o: Options, policy) -> tuple[int, ...]:
    return make_process(o, policy).stochastic_steps(o.sde_steps or None)


# ---- Ranks -------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A run cannot go on: what it has so far is saved."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among `world` of them. Without torchrun: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, o: Options) -> Ranks:
        """This process's place, its device and threads set up, the process group opened if there are others."""
        rank, world, local = (
            int(os.environ.get(k, d))
            for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        cuda = o.device == "cuda" or (o.device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            sys.exit(
                f"train.py: error: rank {local} of this node has no GPU: must be {torch.cuda.device_count()} "
                f"ranks or fewer"
            )
        device = torch.device(f"cuda:{local}" if cuda else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # convolutions in true float32, as on the CPU
        if o.threads:
            torch.set_num_threads(o.threads)
        if world > 1 and not dist.is_initialized():
            # Ranks wait for each other while one loads or writes tens of gigabytes.
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
            )
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

    def together(self, job: Callable, *arguments):
        """job(*arguments) on every rank; where one fails, Stopped on all: nobody waits for a rank that is gone."""
        value = failed = None
        try:
            value = job(*arguments)
        except Exception as error:  # somebody else's reward
            failed = error
        for said in self.gather(None if failed is None else f"{type(failed).__name__}: {failed}"):
            if said:
                raise Stopped(said) from failed
        return value

    def average_gradients(self, tuned: list[torch.nn.Parameter]) -> None:
        """The mean over ranks: equal shares of prompts make it the gradient of the global mean."""
        if self.world > 1:
            for p in tuned:
                if p.grad is not None:  # None on every rank: no path leads there
                    dist.all_reduce(p.grad)
                    p.grad /= self.world


# ---- Prompts of a run ---------------------------------------------------------------------------------------


def drawn_prompts(
    o: Options, data: Prompts, iteration: int, ranks: Ranks
) -> tuple[list[str], list[torch.Generator]]:
    """This rank's prompts of an iteration, and their generators, which the noise is drawn from next."""
    generators = [generator_of(o.seed, iteration, i) for i in ranks.share(o.prompts_per_iteration)]
    return [data.draw(generator) for generator in generators], generators


def needed_prompts(o: Options, policy, data: Prompts, ranks: Ranks) -> list[str]:
    """Every prompt this rank will ask for in the whole run: what has to be encoded, once."""
    drawn = [p for i in range(1, o.iterations + 1) for p in drawn_prompts(o, data, i, ranks)[0]]
    judged = data.in_order()[: o.heldout // IMAGES_PER_PROMPT]
    return list(dict.fromkeys([*drawn, *judged, *data.shown(policy.shape, policy.kind)[0]]))


# ---- Evaluation --------------------------------------------------------------------------------------------


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


def judge_heldout(
    o: Options,
    policy,
    judges: zoo_rewards.Rewards,
    data: Prompts,
    steps_list: tuple[int, ...],
    ranks: Ranks,
) -> dict:
    """Means over the held-out pairs: {"heldout": {T: {judge: mean}}, "family": {kind: mean}, "diversity": distance}.

    Family is of the first judge; it and diversity are of the first T. Diversity is the root mean square pixel distance
    between images of one prompt from different noise, averaged over pairs and prompts.
    """
    prompts, noise = data.pairs(policy.shape, o.heldout)
    n, size = len(prompts), min(o.eval_batch, len(prompts))
    starts = list(range(0, n, size))
    # In every round every rank draws as many images, some for nothing: a sharded network needs all ranks at once.
    rounds = [
        (steps, first) for steps in steps_list for first in range(0, len(starts), ranks.world)
    ]
    found = []  # (steps, first row, {judge: scores}, distances)
    for steps, first in tqdm(rounds, "held-out", leave=False, disable=ranks.rank > 0):
        start = starts[min(first + ranks.rank, len(starts) - 1)]
        rows = [min(i, n - 1) for i in range(start, start + size)]
        images = draw(o, policy, [prompts[i] for i in rows], noise[rows], steps, ranks.device)[
            : n - start
        ]
        mine = first + ranks.rank < len(starts)
        scores = (
            ranks.together(judges, images, prompts[start : start + size])
            if mine
            else ranks.together(dict)
        )
        if mine:
            distances = [
                torch.pdist(z.flatten(1)).mean().item() for z in images.split(IMAGES_PER_PROMPT)
            ]
            found.append(
                (
                    steps,
                    start,
                    {name: z.tolist() for name, z in scores.items()},
                    [d / math.prod(images.shape[1:]) ** 0.5 for d in distances],
                )
            )
    found = sorted(
        (part for parts in ranks.gather(found) for part in parts), key=lambda part: part[:2]
    )
    joined = {
        (steps, name): [z for part in found if part[0] == steps for z in part[2][name]]
        for steps in steps_list
        for name in judges.rewards
    }
    main, (judge, *_) = steps_list[0], judges.rewards
    kinds = [policy.kind(prompt) for prompt in prompts]
    return {
        "heldout": {
            str(T): {name: statistics.fmean(joined[T, name]) for name in judges.rewards}
            for T in steps_list
        },
        "family": {
            kind: statistics.fmean(z for z, own in zip(joined[main, judge], kinds) if own == kind)
            for kind in sorted(set(kinds) - {""})
        },
        "diversity": statistics.fmean(d for part in found if part[0] == main for d in part[3]),
    }


def draw_block(
    o: Options, policy, judges: zoo_rewards.Rewards, prompts: list[str], noise: Tensor, ranks: Ranks
) -> pictures.Block:
    """A row per prompt, from its noise [rows, n, *shape], by the first number of --eval-steps."""
    grid = noise.shape[:2]
    owners = [prompt for prompt in prompts for _ in range(grid[1])]
    images = draw(o, policy, owners, noise.flatten(0, 1), o.eval_steps[0], ranks.device)
    scores = next(iter(ranks.together(judges, images, owners).values()))
    return pictures.Block(images.cpu().unflatten(0, grid), scores.unflatten(0, grid))


# ---- One iteration -----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A piece of a rollout for one backward pass."""

    rollout: pave.Rollout
    advantages: Tensor
    prompts: slice
    share: float  # of the rollout's states: the weight of its mean in the mean


def parts_of(rollout: pave.Rollout, advantages: Tensor, batch: int) -> Iterator[Part]:
    """Cut into pieces of at most `batch` states x_t (0: one piece): by prompts, within one by steps, then by members.

    The loss is a mean over states or over their members, alike in number: sum_parts share * loss(part) is the loss.
    """
    P, n, A = rollout.x_t.shape[:3]
    sizes = costs.part_sizes(P, n, A, batch)
    cuts = [
        [slice(i, min(i + size, total)) for i in range(0, total, size)]
        for size, total in zip(sizes, (P, n, A))
    ]
    every = slice(None)
    for p, i, a in product(*cuts):
        members = a if A > 1 else every
        own = (
            i if rollout.x_0.shape[1] == n else every
        )  # independent chains: one x_0 for all their steps
        x_t = rollout.x_t[p, i, a]
        yield Part(
            rollout._replace(
                sde_steps=rollout.sde_steps[i],
                x_t=x_t,
                x_s=rollout.x_s[p, i, members],
                log_prob=rollout.log_prob[p, i, members],
                x_0=rollout.x_0[p, own, members],
            ),
            advantages[p, own, members],
            p,
            math.prod(x_t.shape[:3]) / (P * n * A),
        )


def iterate(
    o: Options,
    iteration: int,
    policy,
    rewards: zoo_rewards.Rewards,
    data: Prompts,
    optimizer,
    average,
    ranks: Ranks,
) -> dict:
    """One iteration of Algorithm 1 on this rank's prompts. Returns this rank's metrics."""
    process, steps, device = make_process(o, policy), stochastic_steps(o, policy), ranks.device

    # Sample groups. A prompt's choice and noise depend on (seed, iteration, its index) alone.
    prompts, generators = drawn_prompts(o, data, iteration, ranks)
    noise = pave.draw_noise(
        generators, o.group_size, policy.shape, len(steps), o.own_start, device=device
    )
    sample = (
        pave.rollout_shared_anchor if o.rollouts == "shared_anchor" else pave.rollout_independent
    )
    rollout = sample(chunked(policy.velocity(prompts), o.rollout_batch), process, noise, steps)

    # Reward.
    groups = rollout.x_0.shape[:3]
    owners = [p for p in prompts for _ in range(groups[1] * groups[2])]
    scores = ranks.together(rewards, policy.decode(rollout.x_0.flatten(0, 2)), owners)
    total = rewards.total(scores).to(device).unflatten(0, groups)
    advantages = pave.group_advantages(total)

    # Ascend; the first update's pass is theta_old for the others.
    parts = list(parts_of(rollout, advantages, o.update_batch))
    old: list[pave.Old | None] = [None] * len(parts)
    for _ in range(o.updates):
        measured = []
        optimizer.zero_grad()
        for j, part in enumerate(parts):
            own = prompts[part.prompts]
            result = pave.policy_loss(
                policy.velocity(own),
                part.rollout,
                part.advantages,
                factors=o.factors,
                form=o.form,
                clip=o.clip,
                kl=o.kl,
                reference=policy.reference_velocity(own) if o.kl else None,
                reduction=o.reduction,
                old=old[j],
            )
            (part.share * result.loss).backward()
            old[j] = result.old
            measured.append(measure(result, part.advantages) | {"share": part.share})
        if not policy.sharded:
            ranks.average_gradients(policy.tuned)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.tuned, o.max_grad_norm)
        optimizer.step()
        if average:
            average.update()
    return {
        "reward": total.mean().item(),
        **{f"reward_{name}": z.mean().item() for name, z in scores.items()},
        "silent_groups": (advantages == 0).all(-1).float().mean().item(),
        "grad_norm": (grad_norm.full_tensor() if policy.sharded else grad_norm).item(),
        **merge(measured),
    }


def measure(result: pave.PolicyLoss, advantages: Tensor) -> dict:
    """The metrics of one loss."""
    metrics = {
        "loss": result.loss.item(),
        "kl": result.kl,
        "sampling_gap_max": result.old.sampling_gap,
        "signal": (advantages != 0).float().mean().item(),
    }
    for k, term in result.terms.items():
        metrics |= {
            f"ratio_{k}": term.ratio_mean,
            f"ratio_{k}_min": term.ratio_min,
            f"ratio_{k}_max": term.ratio_max,
            f"clip_fraction_{k}": term.clip_fraction,
            f"weight_{k}": term.effective_weight.mean().item(),
        }
    return metrics


def merge(parts: list[dict]) -> dict:
    """Metrics of parts or ranks as one: extremes of what is named _min or _max, means of the rest, by their share.

    A clip fraction is of the members with a signal, and weighs by their number.
    """
    merged, shares = {}, [part.get("share", 1.0) for part in parts]
    signal = [share * part["signal"] for share, part in zip(shares, parts)]
    for name in parts[0]:
        values = [part[name] for part in parts]
        weights = signal if name.startswith("clip_fraction") and sum(signal) else shares
        merged[name] = (
            min(values)
            if name.endswith("_min")
            else max(values)
            if name.endswith("_max")
            else statistics.fmean(values, weights)
        )
    merged.pop("share", None)
    return merged


# ---- The run -----------------------------------------------------------------------------------------------


class Run:
    """The run folder, which only rank 0 writes: config.json, metrics.jsonl, pictures, weights, summary.json."""

    def __init__(
        self, o: Options, policy, judges: zoo_rewards.Rewards, data: Prompts, ranks: Ranks
    ):
        self.o, self.policy, self.judges, self.data, self.ranks = o, policy, judges, data, ranks
        self.lines, self.columns, self.began, self.complete = [], {}, time.perf_counter(), False
        self.summary: dict = {"heldout": {}, "heldout_family": {}, "diversity": {}}
        if ranks.rank == 0:
            self.folder = (
                Path(o.out)
                if o.out
                else next(
                    folder
                    for folder in (Path(f"runs/{policy.name}-{i}") for i in range(1, 10**6))
                    if not folder.exists()
                )
            )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.json").write_text(json.dumps(asdict(o), indent=1) + "\n")
            except OSError as problem:
                Parser().error(f"--out {self.folder}: cannot be written ({problem.strerror})")
            print(f"writing {self.folder}/")

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl, with the seconds since the start."""
        line["seconds"] = round(time.perf_counter() - self.began, 2)
        self.lines.append(line)
        if self.ranks.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def picture(self, title: str) -> None:
        """Draw before_after.png: what was drawn first, and now."""
        prompts, noise = self.data.shown(self.policy.shape, self.policy.kind)
        block = draw_block(self.o, self.policy, self.judges, prompts, noise, self.ranks)
        self.columns = dict([*list(self.columns.items())[:1], (title, block)])
        if self.ranks.rank == 0:
            pictures.draw_grid(self.columns, prompts, self.folder / "before_after.png")

    def judge(self, when: str = "") -> dict:
        """Held-out figures as a log line: of the first number of steps or, kept as summary["heldout"][when], of all."""
        steps = self.o.eval_steps if when else self.o.eval_steps[:1]
        result = judge_heldout(self.o, self.policy, self.judges, self.data, steps, self.ranks)
        first = result["heldout"][str(steps[0])]
        if when:
            for key, name in (
                ("heldout", "heldout"),
                ("heldout_family", "family"),
                ("diversity", "diversity"),
            ):
                self.summary[key][when] = result[name]
            if self.ranks.rank == 0:
                print(
                    f"{when}: held-out, by ODE steps: "
                    + "; ".join(
                        f"{name} "
                        + ", ".join(
                            f"{T}: {result['heldout'][str(T)][name]:.3f}" for T in sorted(steps)
                        )
                        for name in first
                    )
                    + "".join(f"; {name} {value:.2f}" for name, value in result["family"].items())
                    + f"; diversity {result['diversity']:.3f}"
                )
        return {f"heldout_{name}": value for name, value in first.items()}

    def save(self, iterations: int) -> None:
        """Write the weights, curve.png and summary.json as of now; no rank goes on, or away, before that is done."""
        main = self.ranks.rank == 0
        self.summary["weights"] = self.policy.save(self.folder if main else Path(), main)
        if main:
            pictures.draw_curve(
                self.lines, next(iter(self.judges.rewards)), self.folder / "curve.png"
            )
            self.summarise(iterations)
        self.ranks.gather(None)

    def summarise(self, iterations: int) -> None:
        """Write summary.json: held-out figures, and where, with what and how long."""
        o, device = self.o, self.ranks.device
        packages = (
            ("torch", "numpy", "diffusers", "transformers", "peft")
            if o.model
            else ("torch", "numpy")
        )
        versions = {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        }
        where = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        )
        self.summary |= {
            "seconds": round(time.perf_counter() - self.began, 1),
            "iterations": iterations,
            "interrupted": not self.complete,
            "seed": o.seed,
            "device": where,
            "ranks": self.ranks.world,
            "versions": versions,
            "command": shlex.join(["python", *sys.argv]),
        }
        if device.type == "cuda":
            self.summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")


def train(
    o: Options,
    policy,
    rewards: zoo_rewards.Rewards,
    judges: zoo_rewards.Rewards,
    data: Prompts,
    ranks: Ranks,
) -> None:
    """Judge, align, judge again.

    The first Ctrl-C ends the run after the iteration it falls in, a reward that fails at once; both keep what there is.
    """
    run, stop, done, problem = Run(o, policy, judges, data, ranks), [], 0, None
    signal.signal(
        signal.SIGINT,
        lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)),
    )
    optimizer = (
        torch.optim.SGD(policy.tuned, o.lr)
        if o.optimizer == "sgd"
        else torch.optim.AdamW(policy.tuned, o.lr, weight_decay=o.weight_decay)
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / (o.warmup + 1))
    )
    average = policies.EMA(policy.tuned, o.ema) if o.ema else None
    averaged = average.applied if average else nullcontext

    try:
        run.picture("before")
        run.log({"iteration": 0, **run.judge("before")})
        bar = tqdm(range(1, o.iterations + 1), "aligning", disable=ranks.rank > 0)
        for iteration in bar:
            if any(ranks.gather(bool(stop))):
                break
            metrics = merge(
                ranks.gather(
                    iterate(o, iteration, policy, rewards, data, optimizer, average, ranks)
                )
            )
            done, line = iteration, {"iteration": iteration, **metrics, "lr": rate.get_last_lr()[0]}
            rate.step()
            bar.set_postfix(
                {
                    "reward": f"{metrics['reward']:.3f}",
                    "ratio": f"{metrics['ratio_1']:.5f}",
                    "clipped": f"{metrics['clip_fraction_1']:.2f}",
                }
            )
            evaluated = o.eval_every and iteration % o.eval_every == 0 and iteration < o.iterations
            run.log(line)
            if evaluated:
                with averaged():
                    run.log({"iteration": iteration, **run.judge()})
                    run.picture(f"after {iteration} iterations")
                    run.save(done)
        with averaged():
            run.picture(f"after {done} iterations")
            if done == o.iterations:
                run.log({"iteration": done, **run.judge("after")})
    except Stopped as error:
        problem = error
    run.complete = done == o.iterations and not problem
    if done or not problem:
        with averaged():
            run.save(done)
        if ranks.rank == 0:
            print(
                f"{'finished' if run.complete else 'interrupted'} after {done} iterations and "
                f"{run.summary['seconds']:.0f} s: look at {run.folder / 'before_after.png'}"
            )
    if problem:
        raise problem


def loaded(o: Options, policy, data: Prompts, ranks: Ranks) -> list[zoo_rewards.Rewards]:
    """[rewards, judges], the policy loaded too. What cannot be loaded is one line, of each rank where it fails."""
    try:
        found = zoo_rewards.load_all((o.reward, o.eval_reward), ranks.device, o.reward_batch)
        asked = () if o.evaluate or o.sample else needed_prompts(o, policy, data, ranks)
        policy.load(asked, ranks.device, ranks.rank, ranks.world)
    except ValueError as problem:
        sys.stderr.write(f"train.py: error: {problem}\n")  # perhaps of this rank alone
        sys.exit(2)
    cut_off = sorted(set(chain(*ranks.gather(policy.cut_off))))
    if ranks.rank == 0 and cut_off:
        print("\n".join(cut_off), flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Evaluate, sample, print the cost, or train: what the command line says."""
    o = parse(argv)
    ranks = Ranks.start(o)
    ranks.gather(None)  # every rank has found --out empty before one writes there
    policy, data = policy_of(o, ranks.world), prompts_of(o)
    if not (o.evaluate or o.sample) and ranks.rank == 0:
        print(
            "\n".join(
                [
                    *data.report,
                    costs.describe(
                        o,
                        stochastic_steps(o, policy),
                        policy,
                        len(data.heldout),
                        ranks.world,
                        ranks.device.type,
                    ),
                ]
            ),
            flush=True,
        )
    if not o.dry_run:
        rewards, judges = loaded(o, policy, data, ranks)
        try:
            if o.evaluate:
                result = judge_heldout(o, policy, judges, data, o.eval_steps, ranks)
                print(json.dumps(result, indent=1) if ranks.rank == 0 else "", end="")
            elif o.sample:
                sample(o, policy, judges, ranks)
            else:
                train(o, policy, rewards, judges, data, ranks)
        except Stopped as problem:
            if not isinstance(problem.__cause__, ValueError | None):
                traceback.print_exception(problem.__cause__)  # where somebody else's code failed
            Parser().error(str(problem))
    if ranks.world > 1:
        dist.destroy_process_group()


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


if __name__ == "__main__":
    main()
