"""The options of a run. Each is one field of `Options`: flag, help, values, the runs that read it.

To add one, add a field and use it. What options must be to each other, and how a command line
becomes options, is in command_line.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.released import families
from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.training import policies
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts

ROLLOUTS = {
    "shared_anchor": pave.rollout_shared_anchor,
    "independent": pave.rollout_independent,
}


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "standardised": pave.group_advantages,
    # The clamp is one of standardised advantages: rewards have any scale.
    "centred": partial(pave.group_advantages, clamp=None, standardise=False),
}


class Rule(NamedTuple):
    """A condition, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


# What a value must be.
MOST = 10**6  # of anything that is counted
COUNT = Rule(f"1 or more, {MOST} at most", lambda z: 1 <= z <= MOST)
NATURAL = Rule(f"0 or more, {MOST} at most", lambda z: 0 <= z <= MOST)
AMOUNT = Rule("0 or a positive number", lambda z: 0 <= z < math.inf)
POSITIVE = Rule("a positive number", lambda z: 0 < z < math.inf)
# Beyond these, float32 has no room left for the squares and quotients of a step.
SCALE = Rule("a positive number from 1e-6 to 1e6", lambda z: 1e-6 <= z <= 1e6)
SEED = Rule("0 or more, below 2^63", lambda z: 0 <= z < 2**63)
IN_FOURS = Rule(
    f"a positive multiple of {IMAGES_PER_PROMPT}, {MOST} at most",
    lambda z: 0 < z <= MOST and z % IMAGES_PER_PROMPT == 0,
)

# Which runs read an option.
WITH_MODEL = Rule("with --model", lambda o: bool(o.model))
WITH_LORA = Rule("with --tune lora", lambda o: o.tune == "lora")
WITH_FULL_MODEL = Rule(
    "with --tune full of a --model", lambda o: bool(o.model) and o.tune == "full"
)
WITH_SHIFT = Rule("with --sigmas shifted", lambda o: o.sigmas == "shifted")
WITH_CHAINS = Rule("with --rollouts independent", lambda o: o.rollouts == "independent")
WITH_FORM = Rule(
    "with --factors of one number or more, or as midpoint with --factors of none",
    lambda o: bool(o.factors) != (o.form == "midpoint"),
)
WITH_GRADIENTS = Rule(
    "with --factors of one number or more, and without --tune full of a --model",
    lambda o: bool(o.factors) and not WITH_FULL_MODEL.holds(o),
)
WITH_PAPER_TERMS = Rule(
    "with --form paper and --factors of one number or more",
    lambda o: bool(o.factors) and o.form == "paper",
)
WITH_WINDOW = Rule("with --window-every", lambda o: o.window_every > 0)
WITH_MIDPOINT = Rule("with --form midpoint", lambda o: o.form == "midpoint")
WITH_DECAY = Rule("with --optimizer adamw", lambda o: o.optimizer == "adamw")


# What each family of released models has of its own.
PRESETS = tuple(family.preset for family in families.FAMILIES.values())
GUIDANCE = ", ".join(f"{z.default_guidance} of {z.name}" for z in families.FAMILIES.values())


def is_free(folder: str) -> bool:
    """Whether a run may write there: no such path, an empty folder, or "" for a default.

    Half a first file, of a run that was killed as it began, is nothing.
    """
    try:
        return not folder or all(name.startswith(".part-") for name in os.listdir(folder))
    except OSError:
        return not os.path.lexists(folder)


def is_run(folder: str) -> bool:
    """Whether a run has been begun there, or "" for none."""
    return not folder or os.path.isfile(os.path.join(folder, "config.json"))


def is_device(name: str) -> bool:
    """Whether this machine has such a device."""
    return name in ("auto", "cpu") or (name == "cuda" and torch.cuda.is_available())


def are_judges(texts: Sequence[str]) -> bool:
    """Whether these are rewards with no weight but 1. Raises ValueError for what is no reward."""
    return bool(texts) and all(reward.weight == 1 for reward in spec.parse(texts))


class About(NamedTuple):
    """What is known of an option besides its name, its type and its default."""

    group: str
    help: str
    rule: Rule | None
    only: Rule | None
    released: Any
    argument: dict[str, Any]


def option(
    group: str,
    default: Any,
    help: str,
    rule: Rule | None = None,
    *,
    only: Rule | None = None,
    released: Any = None,
    **argument: Any,
) -> Any:
    """A field of Options.

    rule      what its value must be
    only      the runs that read it; given to another it is refused
    released  its default with --model, where that is another; in words where `settle` finds it
    argument  what else argparse is told of it
    """
    about = About(group, help, rule, only, released, argument)
    return dataclasses.field(default=default, metadata={"about": about})


# A kind of field for each heading of --help.
align = partial(option, "what to align, and with what")
run = partial(option, "the run")
method = partial(option, "the method, in the letters of pave_grpo.py")
judging = partial(option, "judging")
optimisation = partial(option, "optimisation")
batches = partial(option, "batches, which change memory and not the gradient; 0: all at once")


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. The field prompts_per_iteration is --prompts-per-iteration."""

    # What to align, and with what
    model: str = align(
        "",
        "SD3 or FLUX pipeline, a folder or hub id; default: the embedded model",
        metavar="PIPELINE",
    )
    reward: tuple[str, ...] = align(
        ("rule",),
        "rewards to ascend, summed, each NAME[=PLACE[@REVISION]][:WEIGHT]: clip, pickscore, hpsv2, "
        "imagereward, rule, right, or module:function; with --model it must be given",
        Rule("given: one reward or more", bool),
        released=(),
        metavar="REWARD",
    )
    reward_timeout: float = align(
        0.0,
        "seconds that a call of a reward may take; 0: any",
        Rule("0 or a positive number, 1e6 at most", lambda z: 0 <= z <= 1e6),
        metavar="SECONDS",
    )
    prompts: str = align("", "training prompts, a text file, one per line", metavar="FILE")
    eval_prompts: str = align(
        "", "held-out prompts, likewise; none may be a training prompt", metavar="FILE"
    )
    tune: str = align(
        "transformer",
        "what is trained: of the embedded model the transformer, or in full the layers at pixel "
        "resolution too; with --model lora or full",
        released="lora",
        choices=("transformer", "lora", "full"),
    )
    rank: int = align(64, "rank of the adapters", COUNT, only=WITH_LORA)
    alpha: float = align(128.0, "scaling of the adapters, alpha / rank", SCALE, only=WITH_LORA)
    preset: str = align(
        "",
        "the authors' full fine-tuning",
        only=WITH_MODEL,
        choices=PRESETS,
    )
    revision: str = align("", "revision at the hub", only=WITH_MODEL)
    size: tuple[int, ...] = align(
        (),
        "height and width of the pictures",
        Rule("a height and a width", lambda z: len(z) == 2),
        only=WITH_MODEL,
        released=(512, 512),
        metavar="PIXELS",
    )
    guidance: float = align(
        0.0,
        "classifier-free guidance of SD3 (above 1), the guidance input of FLUX",
        only=WITH_MODEL,
        released=GUIDANCE,
    )

    # The run
    iterations: int = run(40, "training iterations", COUNT, released=300)
    out: str = run(
        "",
        "folder to write, new or empty; default: the first free runs/NAME-N",
        Rule("a new or empty folder", is_free),
        metavar="FOLDER",
    )
    resume: str = run(
        "",
        "go on with a run from its newest whole checkpoint; its options hold, but for those that "
        "cannot change its numbers, and for more --iterations",
        Rule("the folder of a run", is_run),
        metavar="RUN",
    )
    save_every: int = run(
        10,
        "write a checkpoint every so many iterations, beside those before a judgement and at the "
        "end; 0: no others",
        NATURAL,
        released=50,
    )
    dry_run: bool = run(False, "print what an iteration would cost and hold, and stop")
    device: str = run(
        "auto",
        "cpu, cuda, or auto: cuda where there is one",
        Rule("cpu, auto, or cuda where there is a CUDA device", is_device),
    )
    threads: int = run(
        0,
        "CPU threads per rank; 0: torch's own choice",
        Rule("0 or more, 1024 at most", lambda z: 0 <= z <= 1024),
    )
    seed: int = run(0, "seed of prompts, noise and adapters", SEED)

    # The method
    factors: tuple[int, ...] = method(
        (2, 3), "S, the factors k >= 2 of the decompositions; none: plain GRPO"
    )
    prompts_per_iteration: int = method(
        8, "P, prompts per iteration over all ranks; a multiple of the ranks"
    )
    group_size: int = method(
        24,
        "G, members of a group",
        Rule(f"2 or more, {MOST} at most", lambda z: 2 <= z <= MOST),
        released=12,
    )
    steps: int = method(8, "T, steps of the sampling grid", COUNT, released=16)
    sde_steps: tuple[int, ...] = method(
        (1,), "stochastic steps, from 0; no number: all that have a density", released=(0, 2, 4, 6)
    )
    window_every: int = method(
        0,
        "iterations after which the stochastic steps move along the grid (MixGRPO); 0: never",
        NATURAL,
    )
    window_by: int = method(
        1,
        "grid steps they move by, below 0 towards the noise; beyond the grid they start over",
        Rule("other than 0", bool),
        only=WITH_WINDOW,
    )
    shift: float = method(
        1.0,
        "shift of the grid; above 1 spends more steps near the noise",
        SCALE,
        only=WITH_SHIFT,
        released=3.0,
    )
    sigmas: str = method(
        "shifted",
        "the grid of --shift, or the pipeline's own",
        only=WITH_MODEL,
        choices=("shifted", "pipeline"),
    )
    kernel: str = method("flow_sde", "kernel of the stochastic steps", choices=tuple(pave.KERNELS))
    eta: float = method(0.7, "eta, how stochastic the kernel is", SCALE, released=0.8)
    rollouts: str = method(
        "shared_anchor",
        "groups branch from one ODE trajectory, or are G chains of their own",
        choices=tuple(ROLLOUTS),
    )
    own_start: bool = method(False, "every member starts from its own noise", only=WITH_CHAINS)
    finish_stride: int = method(
        1,
        "grid steps that an ODE step spans on the way from the last noise to the picture; above 1 "
        "rollouts take fewer evaluations, and their rewards are of other pictures",
        COUNT,
    )
    finish_order: int = method(
        1, "these ODE steps: 1, Euler's, or 2, by two velocities (Adams-Bashforth)", choices=(1, 2)
    )
    form: str = method(
        "paper",
        "density of the k-terms: the paper's, or matched to the one that sampled (E7); midpoint: "
        "no k-terms, one velocity inside the step (E14)",
        only=WITH_FORM,
        choices=("paper", "matched", "midpoint"),
    )
    place: str = method(
        "half",
        "where the midpoint form asks for its velocity: half a step in, or uniformly drawn",
        only=WITH_MIDPOINT,
        choices=("half", "uniform"),
    )
    term_weights: str = method(
        "printed",
        "weights of the k-terms: 1/|S|, or rescaled: times (c_k/c_1)^2, so that 1/|S| is in effect",
        only=WITH_PAPER_TERMS,
        choices=("printed", "rescaled"),
    )
    step_weights: str = method(
        "one",
        "weights of the stochastic steps. one: alike; noise: in proportion to their std "
        "(TempFlow-GRPO). Of Gamma, which S makes a step weigh (E12), level: terms over Gamma; "
        "gamma: the original term times Gamma, without k-terms",
        choices=("one", "level", "gamma", "noise"),
    )
    advantages: str = method(
        "standardised",
        "rewards less the group's mean, over its std or as they are (Dr.GRPO)",
        choices=tuple(ADVANTAGES),
    )
    poisoned: str = method(
        "stop",
        "what a group does whose reward or advantage is not finite: stop the run, or be skipped "
        "and counted",
        choices=("stop", "skip"),
    )
    ratio_norm: bool = method(
        False, "centre log-ratios and scale them by the step's std (GRPO-Guard)"
    )
    reduction: str = method(
        "mean",
        "log-probabilities averaged over dimensions (the field), or summed (the true density)",
        choices=("mean", "sum"),
    )
    updates: int = method(
        1, "updates per rollout; in the first every ratio is 1 and --clip cannot act", COUNT
    )
    clip: float = method(
        1e-4, "clip range of the ratios; 'mean' ratios stay within about 1e-3 of 1", POSITIVE
    )
    kl: float = method(0.0, "coefficient of the KL to the initial model", AMOUNT)

    # Judging
    eval_reward: tuple[str, ...] = judging(
        ("right", "rule"),
        "rewards that judge held-out prompts, the first also in pictures",
        Rule("without weights, as judges are not summed, and one or more", are_judges),
        released="those of --reward",
        metavar="REWARD",
    )
    heldout: int = judging(
        512,
        f"held-out (prompt, noise) pairs to judge, {IMAGES_PER_PROMPT} of a prompt",
        IN_FOURS,
        released=64,
    )
    eval_steps: tuple[int, ...] = judging(
        (16, 8, 40),
        "numbers of ODE steps to judge with; the first also in pictures and curve",
        Rule(
            f"distinct numbers, 1 or more, {MOST} at most",
            lambda z: z and len(set(z)) == len(z) and all(1 <= n <= MOST for n in z),
        ),
        released=(16, 40),
    )
    eval_every: int = judging(
        0,
        "judge, with the first of --eval-steps, every so many iterations; 0: before and after only",
        NATURAL,
        released=50,
    )
    draw_at: tuple[int, ...] = judging(
        (10, 20, 30),
        "iterations after which before_after.png is drawn, without judging; with --model none",
        Rule(f"numbers from 1 to {MOST}", lambda z: all(1 <= n <= MOST for n in z)),
        released=(),
    )
    compare_every: int = judging(
        0,
        "compare k-terms with the original, on its rollouts, every so many iterations; 0: never",
        NATURAL,
        only=WITH_GRADIENTS,
    )
    eval_batch: int = judging(128, "held-out pictures drawn together", IN_FOURS, released=16)

    # Optimisation
    lr: float = optimisation(2e-4, "learning rate", POSITIVE, released="1e-4 of lora, 2e-6 of full")
    warmup: int = optimisation(15, "iterations in which it rises to --lr", NATURAL, released=0)
    optimizer: str = optimisation(
        "adamw", "adamw, or sgd without momentum", choices=("adamw", "sgd")
    )
    weight_decay: float = optimisation(1e-4, "decoupled weight decay", AMOUNT, only=WITH_DECAY)
    max_grad_norm: float = optimisation(
        1.0,
        "gradient norm above which the gradient is scaled down; inf: never",
        Rule("positive, or inf", lambda z: z > 0),
    )
    ema: float = optimisation(
        0.0,
        "decay of an average of the weights; above 0 the average is what is judged and saved",
        Rule("at least 0 and below 1", lambda z: 0 <= z < 1),
    )
    dtype: str = optimisation(
        "float32",
        "what networks compute in; what is trained is kept in float32",
        only=WITH_MODEL,
        released="bfloat16",
        choices=("float32", "bfloat16"),
    )
    checkpointing: bool = optimisation(
        False,
        "gradient checkpointing: one more forward, for less memory",
        only=WITH_MODEL,
        released=True,
        action=argparse.BooleanOptionalAction,
    )

    # Batches
    rollout_batch: int = batches(
        0, "rows of one velocity call while sampling", NATURAL, released=16
    )
    update_batch: int = batches(0, "observed states x_t per backward pass", NATURAL, released=1)
    reward_batch: int = batches(0, "pictures per call of a reward", NATURAL, released=16)
    decode_batch: int = batches(4, "states per call of the VAE", NATURAL, only=WITH_MODEL)
    gather_rollouts: bool = batches(
        False,
        "on several ranks, gather all weights once to sample, and not in every velocity call; "
        "--dry-run prints what they take",
        only=WITH_FULL_MODEL,
        action=argparse.BooleanOptionalAction,
    )


# What a run that goes on may be given anew: it changes no number but by rounding.
FREE = (
    *("iterations", "resume", "save_every", "dry_run", "device", "threads", "reward_timeout"),
    *("eval_every", "eval_batch", "rollout_batch", "update_batch", "reward_batch", "decode_batch"),
    *("checkpointing", "draw_at", "gather_rollouts"),
)

ABOUT: dict[str, About] = {f.name: f.metadata["about"] for f in dataclasses.fields(Options)}
TYPES: dict[str, Any] = get_type_hints(Options)


# ---- What options name ---------------------------------------------------------------------------


def prompts_of(o: Options) -> Prompts:
    """Those of the files, read anew, or the embedded world's. Raises ValueError of one line."""
    return Prompts.of_files(o.prompts, o.eval_prompts) if o.prompts else Prompts()


def policy_of(o: Options, ranks: int = 1) -> policies.Policy:
    """What is aligned; a released one's weights are not read yet. Raises ValueError of one line."""
    if not o.model:
        return policies.Embedded(shapes_model.CHECKPOINT, o.tune, o.shift, reference=o.kl > 0)
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
        gather_rollouts=o.gather_rollouts,
        world=ranks,
    )


def process_of(o: Options, policy: policies.Policy) -> pave.Process:
    """What makes the policy's velocity a stochastic sampler."""
    return pave.Process(policy.grid(o.steps), o.kernel, o.eta)


def stochastic_steps(o: Options, policy: policies.Policy, iteration: int = 1) -> tuple[int, ...]:
    """Those named, or all that have a density, moved to where --window-every has them by now.

    Raises ValueError as `places_of`.
    """
    places = places_of(o, policy)
    moves = (iteration - 1) // o.window_every if o.window_every else 0
    return places[moves % len(places)]


def places_of(o: Options, policy: policies.Policy) -> list[tuple[int, ...]]:
    """The stochastic steps, and with --window-every all that they become.

    Raises ValueError for one that has no density, and for steps that cannot move.
    """
    process = process_of(o, policy)
    first = process.stochastic_steps(o.sde_steps or None)
    if not o.window_every:
        return [first]
    places = windows(first, process.stochastic_steps(), o.window_by)
    if len(places) == 1:
        said = f"--window-every {o.window_every}: must be 0, since --sde-steps"
        raise ValueError(f"{said} {' '.join(map(str, first))} cannot move by {o.window_by}")
    return places


def finishing_steps(o: Options, i: int) -> int:
    """ODE steps from the end of stochastic step i to the picture."""
    return math.ceil((o.steps - 1 - i) / o.finish_stride)


def windows(first: tuple[int, ...], able: Sequence[int], by: int) -> list[tuple[int, ...]]:
    """first, and where it gets in moves of `by`, not 0, while all its steps are among `able`."""
    places = []
    place = first
    while set(place) <= set(able):
        places.append(place)
        place = tuple(i + by for i in place)
    return places


def terms_of(o: Options) -> tuple[int, ...]:
    """The factors of the k-terms in the loss: S, or none where S gives the weight Gamma alone."""
    return () if o.step_weights == "gamma" else o.factors


def weights_of(o: Options, process: pave.Process, steps: Sequence[int]) -> dict[int, Tensor]:
    """{k: w_k [n]} of the loss, for every k in it and every stochastic step.

    w_1 = 1 and w_k = 1/|S|, or (c_k/c_1)^2/|S| if rescaled. A step's weight in effect is
    Gamma = 1 + sum_k w_k (c_1/c_k)^2 (E12). Then the weights of a step are divided by Gamma
    (level), or multiplied by c_1 over its mean of all steps that can be stochastic (noise); or
    there is w_1 = Gamma alone (gamma).
    """
    index = torch.tensor(steps)
    t, s = process.grid[index], process.grid[index + 1]
    c_1 = process.coefficients(t, s).std
    able = torch.tensor(process.stochastic_steps())
    every = process.coefficients(process.grid[able], process.grid[able + 1]).std
    weights = {1: torch.ones_like(c_1)}
    gamma = torch.ones_like(c_1)
    for k in o.factors:
        c_k = process.coefficients(s + (t - s) / k, s).std
        scale = (c_1 / c_k) ** 2
        printed = torch.full_like(c_1, 1 / len(o.factors))
        weights[k] = printed / scale if o.term_weights == "rescaled" else printed
        gamma = gamma + weights[k] * scale
    if o.step_weights == "gamma":
        return {1: gamma}
    per_step = {"one": torch.ones_like(c_1), "level": 1 / gamma, "noise": c_1 / every.mean()}
    return {k: w * per_step[o.step_weights] for k, w in weights.items()}
