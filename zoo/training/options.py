"""The options of a run: a flag each, what it may be, and which runs read it."""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import pave_grpo as pave
from zoo.rewards import spec as zoo_rewards
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes
from zoo.training import policies
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts


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
