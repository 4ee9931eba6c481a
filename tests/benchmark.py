"""What an iteration of Pave-GRPO costs on this machine, as ratios that are measured in one run.

    python -m tests.benchmark                               the embedded model, in a few minutes
    python -m tests.benchmark --model FOLDER --dtype bfloat16 --device cuda
    python -m tests.benchmark --sections network update --rounds 9 --json costs.json

One prompt in the authors' setting: T = 16, stochastic steps 0, 2, 4, 6, G = 12. Updates take one
state a pass, whole iterations as many as train.py does: all four of the embedded model. Jobs that
are compared take turns: every round runs each of them once, in an order of its own. A ratio is the
median of the rounds' own ratios, its range beside it. Gradients are compared before anything else,
whatever sections are asked for. docs/COSTS.md shows figures, and what to make of them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from counting import peak, waited  # noqa: E402
from slow import slow_loss  # noqa: E402

import pave_grpo as pave  # noqa: E402
import train  # noqa: E402
from zoo.rewards import spec  # noqa: E402
from zoo.training import costs, policies  # noqa: E402
from zoo.training.command_line import (  # noqa: E402
    Parser,
    check_alone,
    check_tune,
    refusing,
    settle,
)
from zoo.training.draw import chunked  # noqa: E402
from zoo.training.options import Options, policy_of, process_of, stochastic_steps  # noqa: E402
from zoo.training.prompts import Prompts  # noqa: E402
from zoo.training.ranks import Ranks, fail  # noqa: E402

READ = (
    *("model", "revision", "size", "guidance", "dtype", "tune", "rank", "checkpointing"),
    *("device", "threads", "rollout_batch"),
)
WARMTH = "zoo.rewards.example:warmth"
AUTHORS: dict[str, Any] = dict(
    steps=16,
    sde_steps=(0, 2, 4, 6),
    group_size=12,
    shift=3.0,
    eta=0.8,
    prompts_per_iteration=1,
    warmup=0,
    lr=1e-12,  # the policy stays where it is
)
# S, and what the paper's Table 4 says of an iteration with it, S = {} being 1.
PAPER: dict[tuple[int, ...], float | None] = {
    (2,): 1.028,
    (2, 3): 1.085,
    (2, 3, 4): 1.155,
    (2, 3, 4, 5): 1.254,
}
# A gradient in other batches, relative to its norm: what roundings of a dtype may leave.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1}


class Row(NamedTuple):
    """A figure: the median, and the range where it was measured several times."""

    name: str
    value: float
    unit: str = ""  # "" is a ratio
    low: float | None = None
    high: float | None = None
    beside: str = ""  # what to compare it with


# ---- Measuring -----------------------------------------------------------------------------------

Job = Callable[[], object]


def timed(
    jobs: dict[str, Job], rounds: int, device: torch.device, said: str
) -> dict[str, list[float]]:
    """Seconds of each job in each round, whose order is drawn. All run once before."""
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in tqdm(names, f"{said}: once each", leave=False):
        jobs[name]()
    for turn in tqdm(range(rounds), said, leave=False):
        random.Random(turn).shuffle(names)
        for name in names:
            wait(device)
            start = time.perf_counter()
            jobs[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row_of(name: str, values: Sequence[float], unit: str = "", beside: str = "") -> Row:
    """Median and range of what each round gave."""
    return Row(name, statistics.median(values), unit, min(values), max(values), beside)


def ratios(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> list[float]:
    """Each round's own quotient, times a factor."""
    return [scale * a / b for a, b in zip(above, below, strict=True)]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The least squares slope of log seconds on log size: 1 is linear growth."""
    x = [math.log(size) for size in sizes]
    y = [math.log(z) for z in seconds]
    return statistics.linear_regression(x, y).slope


def held(job: Job, device: torch.device) -> float:
    """MiB at a job's peak beyond those held before it; it has run once already."""
    job()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peak(job)[1] / 2**20


# ---- What is measured ----------------------------------------------------------------------------


class Multiply(nn.Module):
    """A network of one multiplication."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.w = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.w * x


class Null(policies.Policy):
    """A policy whose network costs nothing: what is left of an iteration is outside of networks."""

    sharded = False

    def __init__(self, policy: policies.Policy, device: torch.device):
        self.shape, self.grid, self.kind = policy.shape, policy.grid, policy.kind
        self.sizes = policy.sizes
        self.network = Multiply(device)
        self.tuned = list(self.network.parameters())

    def velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        return self.network

    def decode(self, x: Tensor) -> Tensor:
        """Pictures of one place: a VAE's time is not the method's."""
        return x.flatten(1)[:, :3, None, None].sigmoid()


@dataclass
class Bench:
    """A loaded policy, and the options that all jobs start from."""

    o: Options
    policy: Any
    ranks: Ranks
    rounds: int
    data: Prompts

    def __post_init__(self) -> None:
        self.device = self.ranks.device
        self.rewards, _ = spec.load_all([(WARMTH,), (WARMTH,)], self.device)
        # One for all jobs: each would hold moments of its own. At this rate it moves nothing.
        self.optimizer, _ = train.optimizer_of(self.o, self.policy.tuned)

    @property
    def network(self) -> nn.Module:
        """What the policy evaluates."""
        return self.policy.network

    def timed(self, jobs: dict[str, Job], said: str) -> dict[str, list[float]]:
        """`timed`, on this device."""
        return timed(jobs, self.rounds, self.device, said)

    def iteration(self, **options: Any) -> Job:
        """train.py's own."""
        o = replace(self.o, **options)
        arguments = (self.policy, self.rewards, self.data, self.optimizer, None, self.ranks)
        return lambda: train.iterate(o, 1, *arguments)

    def rollout(self, **options: Any) -> tuple[Options, list[str], pave.Rollout]:
        """The options, the prompts and a rollout."""
        o = replace(self.o, **options)
        process, steps = process_of(o, self.policy), stochastic_steps(o, self.policy)
        prompts, generators = self.data.draw(o.seed, 1, range(o.prompts_per_iteration))
        noise = pave.draw_noise(
            generators, o.group_size, self.policy.shape, len(steps), device=self.device
        )
        velocity = chunked(self.policy.velocity(prompts), o.rollout_batch)
        sample = train.ROLLOUTS[o.rollouts]
        found = sample(velocity, process, noise, steps, o.finish_stride, o.finish_order)
        return o, prompts, found

    def update(self, **options: Any) -> Job:
        """Loss and gradient of one rollout, in passes of --update-batch states."""
        o, prompts, rollout = self.rollout(**options)
        A = pave.group_advantages(standing(rollout))
        parts = list(train.parts_of(rollout, A, o.update_batch))

        def job() -> None:
            self.network.zero_grad()
            for part in parts:
                part.old = None
            train.fetch([train.score(o, self.policy, prompts, part) for part in parts])

        return job

    def rewarding(self) -> Job:
        """Pictures of one rollout, and their rewards."""
        _, prompts, rollout = self.rollout()
        states = rollout.x_0.flatten(0, 2)
        asked = [prompt for prompt in prompts for _ in range(len(states) // len(prompts))]

        def job() -> None:
            self.rewards(self.policy.decode(states), asked)

        return job

    def gradient(self) -> Tensor:
        """What the last update left in the tuned weights, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.policy.tuned if p.grad is not None])

    def inputs(self, rows: int) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
        """A velocity of one prompt, and x, t, prompt of so many rows."""
        x = torch.randn(rows, *self.policy.shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((rows,), 0.5, device=self.device)
        prompt = torch.zeros(rows, dtype=torch.long, device=self.device)
        return self.policy.velocity(self.data.train[:1]), x.to(self.device), t, prompt

    def forward(self, rows: int) -> Job:
        """One call, without a graph."""
        velocity, *inputs = self.inputs(rows)

        @torch.no_grad()
        def job() -> Tensor:
            return velocity(*inputs)

        return job

    def trained(self, rows: int) -> Job:
        """One call, and the gradient of its sum."""
        velocity, *inputs = self.inputs(rows)

        def job() -> None:
            self.network.zero_grad()
            velocity(*inputs).sum().backward()

        return job


def standing(rollout: pave.Rollout) -> Tensor:
    """Rewards that differ within every group: 0, 1, ..., G - 1."""
    P, N, G = rollout.x_0.shape[:3]
    return torch.arange(G, dtype=torch.float32, device=rollout.x_0.device).expand(P, N, G)


# ---- Sections ------------------------------------------------------------------------------------


def gradients(bench: Bench) -> Iterator[Row]:
    """The update's gradient: in passes of one state, all at once, and by a slow plain loop."""
    small = dict(group_size=3, steps=4, sde_steps=(0, 2), rollout_batch=0, factors=(2, 3))
    o, prompts, rollout = bench.rollout(**small)
    A = pave.group_advantages(standing(rollout))
    velocity = bench.policy.velocity(prompts)
    bench.network.zero_grad()
    loop = slow_loss(velocity, velocity, rollout, A, o.factors, o.form, o.clip, o.reduction)
    loop.backward()
    truth = bench.gradient()
    for name, batch in (("one state a pass", 1), ("all at once", 0)):
        bench.update(**small, update_batch=batch)()
        apart = ((bench.gradient() - truth).norm() / truth.norm()).item()
        limit = ROUNDING[getattr(torch, bench.o.dtype)]
        yield Row(f"gradient, {name}, less the slow loop's", apart, beside=f"at most {limit:g}")
        if not apart <= limit:
            fail(f"gradients differ by {apart:g} of their norm: must be at most {limit:g}")


def matmuls(bench: Bench, n: int) -> Job:
    """A product of n x n matrices in the dtype of computation."""
    dtype = getattr(torch, bench.o.dtype)
    a = torch.randn(n, n, device=bench.device, dtype=dtype)
    return lambda: a @ a


def network(bench: Bench) -> Iterator[Row]:
    """A row of the network, alone and among 16, its training evaluation, and the rate of both.

    Frozen matrices have no gradient of their own: adapters take a forward less than is counted.
    """
    n = 8192 if bench.device.type == "cuda" else 2048  # long enough for the clock
    jobs: dict[str, Job] = {"matmul": matmuls(bench, n)}
    for rows in (1, 16):
        jobs[f"forward {rows}"] = bench.forward(rows)
        jobs[f"trained {rows}"] = bench.trained(rows)
    seconds = bench.timed(jobs, "network")
    rate = [2 * n**3 / z for z in seconds["matmul"]]
    yield row_of(f"products of {n} x {n} matrices", [z / 1e12 for z in rate], "TFLOP/s")
    counted_as = costs.per_trained(bench.o.checkpointing)
    taken = counted_as - (bench.o.tune == "lora")
    for rows in (1, 16):
        forward, trained = f"forward {rows}", f"trained {rows}"
        per_row = [1e3 * z / rows for z in seconds[forward]]
        yield row_of(f"a row of the network, {rows} a call", per_row, "ms")
        flops = flops_of(jobs[forward])
        yield share_of_rate(flops, seconds[forward], rate)
        in_forwards = ratios(seconds[trained], seconds[forward])
        name = f"a training evaluation in forwards, {rows} a call"
        yield row_of(name, in_forwards, beside=f"counted as {counted_as}")
        yield share_of_rate(taken * flops, seconds[trained], rate)


def flops_of(job: Job) -> int:
    """What a forward multiplies and adds, by torch's formulas.

    That of a grouped convolution's gradient gives many times what it takes: backwards are counted
    in forwards.
    """
    with FlopCounterMode(display=False) as counted:
        job()
    return counted.get_total_flops()


def share_of_rate(flops: int, seconds: Sequence[float], rate: Sequence[float]) -> Row:
    """What is multiplied and added in a second, over what products do."""
    own = [flops / z for z in seconds]
    return row_of("    its share of the rate of products", ratios(own, rate))


def update(bench: Bench) -> Iterator[Row]:
    """The update for each S, one state a pass, over that of S = {}; an added evaluation."""
    alone = {name_of(S): bench.update(factors=S, update_batch=1) for S in ((), *PAPER)}
    midpoint = bench.update(factors=(), form="midpoint", update_batch=1)
    at_once = bench.update(factors=(2, 3), update_batch=0)
    jobs = {**alone, "midpoint": midpoint, "at once": at_once}
    seconds = bench.timed(jobs, "update")
    plain = seconds[name_of(())]
    for S in PAPER:
        added = sum(k - 1 for k in S)
        found = ratios(seconds[name_of(S)], plain)
        yield row_of(f"update, S = {name_of(S)}", found, beside=f"evaluations: {1 + added}")
        marginal = [(z - 1) / added for z in found]
        yield row_of("    an added evaluation, in updates of S = {}", marginal)
    yield row_of("update, midpoint", ratios(seconds["midpoint"], plain), beside="evaluations: 1")
    once = ratios(seconds["at once"], seconds[name_of((2, 3))])
    yield row_of("update, S = {2, 3}, all at once, over one state a pass", once)


def name_of(S: Sequence[int]) -> str:
    """{2, 3}."""
    return "{" + ", ".join(map(str, S)) + "}"


def iteration(bench: Bench) -> Iterator[Row]:
    """A whole iteration over that of S = {}, beside the count and the paper; shares of one.

    The method's own arithmetic is an iteration with a network that costs nothing. Cutting the
    gradient to its norm is in none of the shares.
    """
    free = replace(bench, policy=Null(bench.policy, bench.device))
    jobs = {name_of(S): bench.iteration(factors=S) for S in ((), *PAPER)}
    jobs["midpoint"] = bench.iteration(factors=(), form="midpoint")
    jobs["free"] = free.iteration(factors=(2, 3))
    jobs["decode and reward"] = bench.rewarding()
    jobs["optimiser"] = bench.optimizer.step
    seconds = bench.timed(jobs, "iteration")
    plain = seconds[name_of(())]
    steps = bench.o.sde_steps
    floor = costs.cost_of(bench.o, steps, ())
    yield row_of("iteration, S = {}", plain, "s")
    for S, theirs in PAPER.items():
        cost = costs.cost_of(bench.o, steps, S)
        without, checkpointed = (cost.forwards(z) / floor.forwards(z) for z in (False, True))
        found = ratios(seconds[name_of(S)], plain)
        beside = f"counted {without:.3f}; checkpointed {checkpointed:.3f}, paper {theirs}"
        yield row_of(f"iteration, S = {name_of(S)}", found, beside=beside)
    midpoint = ratios(seconds["midpoint"], plain)
    yield row_of("iteration, midpoint", midpoint, beside="counted 1.000")
    whole = seconds[name_of((2, 3))]
    yield row_of("share of S = {2, 3}: the method's own arithmetic", ratios(seconds["free"], whole))
    for name in ("decode and reward", "optimiser"):
        yield row_of(f"share of S = {{2, 3}}: {name}", ratios(seconds[name], whole))


def memory(bench: Bench) -> Iterator[Row]:
    """Peaks, beyond what was held before."""

    def peak_of(name: str, job: Job) -> Row:
        return Row(name, held(job, bench.device), "MiB")

    sizes = bench.policy.sizes
    yield Row("weights, frozen and trained", (sizes.frozen + sizes.masters) / 2**20, "MiB")
    yield peak_of("peak of a rollout", bench.rollout)
    for batch, said in ((1, "one state a pass"), (0, "all at once")):
        for S in ((), (2, 3)):
            job = bench.update(factors=S, update_batch=batch)
            yield peak_of(f"peak of an update, S = {name_of(S)}, {said}", job)
    job = bench.update(factors=(), form="midpoint", update_batch=1)
    yield peak_of("peak of an update, midpoint, one state a pass", job)


def waits(bench: Bench) -> Iterator[Row]:
    """How often a host would wait for its device, counted on the device "meta"."""
    meta = torch.device("meta")
    null = Null(bench.policy, meta)
    o = replace(bench.o, factors=(2, 3))
    process = process_of(o, bench.policy)
    noise = pave.draw_noise([torch.Generator()], o.group_size, bench.policy.shape, 4, device=meta)
    velocity = null.velocity(())
    steps = bench.o.sde_steps
    rollout, count = waited(lambda: pave.rollout_shared_anchor(velocity, process, noise, steps))
    yield Row("waits of a rollout", count, "times")
    A = torch.ones(rollout.x_0.shape[:3], device="meta")
    parts = list(train.parts_of(rollout, A, batch=1))
    alone = SimpleNamespace(average_gradients=list)

    def job() -> None:
        train.fetch([train.score(o, null, ("",), part) for part in parts])
        train.gradient(o, null, alone)

    yield Row(f"waits of an update in {len(parts)} passes", waited(job)[1], "times")


def growth(bench: Bench) -> Iterator[Row]:
    """Slopes of log seconds on log size: rows of a rollout, states, evaluations, tokens."""
    small = dict(prompts_per_iteration=1, group_size=4, steps=8, sde_steps=(1,))
    axes: dict[str, tuple[str, list[Any]]] = {
        "P, prompts": ("prompts_per_iteration", [2, 4, 8]),
        "G, members": ("group_size", [4, 8, 16]),
        "T, steps": ("steps", [4, 8, 16]),
    }
    for said, (option, values) in axes.items():
        jobs = {}
        for value in values:
            options = {**small, option: value}
            rows = costs.cost_of(replace(bench.o, **options), (1,), ()).sampled
            jobs[str(rows)] = lambda options=options: bench.rollout(**options)
        yield grown(bench, f"rollout, with {said}", jobs)
    jobs = {}
    for n in (1, 2, 4):
        jobs[str(n)] = bench.update(**{**small, "sde_steps": tuple(range(n))}, factors=(2,))
    yield grown(bench, "update, with n, stochastic steps", jobs)
    jobs = {}
    for S in ((), (2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)):
        evaluations = 1 + sum(k - 1 for k in S)
        jobs[str(evaluations)] = bench.update(**small, factors=S)
    yield grown(bench, "update, with 1 + sum (k - 1), evaluations", jobs)
    if bench.o.model:  # the embedded model has one size
        yield tokens(bench)


def tokens(bench: Bench) -> Row:
    """The slope over the tokens of a released model's row: its words and wider pictures."""
    words = bench.policy.texts.tokens.shape[1]
    jobs = {}
    for times in (1, 2, 4):
        policy = copy.copy(bench.policy)
        policy.width = times * policy.width
        policy.shape = policy.flow.shape(policy.height, policy.width)
        h, w = policy.flow.sides(policy.height, policy.width)
        patches = h * w // policy.flow.patch**2
        jobs[str(words + patches)] = replace(bench, policy=policy).forward(1)
    return grown(bench, "a row of the network, with tokens", jobs)


def grown(bench: Bench, name: str, jobs: dict[str, Job]) -> Row:
    """The slope over jobs, each named by its size."""
    seconds = bench.timed(jobs, name)
    sizes = [float(size) for size in jobs]
    found = [slope(sizes, turn) for turn in zip(*seconds.values(), strict=True)]
    return row_of(name, found, beside="linear is 1")


# Strides and orders of a rollout's way to the picture.
WAYS = ((1, 2), (2, 1), (2, 2), (3, 1), (3, 2))


def finishing(bench: Bench) -> Iterator[Row]:
    """Rollouts that take fewer steps to the picture.

    The embedded model's are of train.py's default setting; beside their time are the mean reward by
    the rule, its difference from the whole grid's, and the cosine of advantages with the grid's.
    """
    plain = Options()
    setting = {name: getattr(plain, name) for name in ("steps", "sde_steps", "shift", "eta")}
    setting |= {"prompts_per_iteration": 8, "group_size": plain.group_size}
    if bench.o.model:
        setting = {}
    ways = {way: dict(finish_stride=way[0], finish_order=way[1]) for way in ((1, 1), *WAYS)}
    jobs = {
        str(way): lambda options=options: bench.rollout(**setting, **options)
        for way, options in ways.items()
    }
    seconds = bench.timed(jobs, "finishing")
    o = replace(bench.o, **setting)
    sampled = costs.cost_of(o, o.sde_steps, ()).sampled
    rewards = {way: rule(bench, {**setting, **options}) for way, options in ways.items()}
    for way, options in ways.items():
        o = replace(o, **options)
        counted = sampled / costs.cost_of(o, o.sde_steps, ()).sampled
        found = ratios(seconds["(1, 1)"], seconds[str(way)])
        said = f"counted {counted:.2f}"
        if not bench.o.model:
            said += "; " + compared(rewards[way], rewards[1, 1])
        yield row_of(f"rollouts faster by, stride {way[0]}, order {way[1]}", found, beside=said)


def rule(bench: Bench, options: dict[str, Any]) -> Tensor:
    """Rewards [P, N, G] of a rollout by the rule, which knows the embedded world alone."""
    if bench.o.model:
        return torch.empty(0)
    _, prompts, rollout = bench.rollout(**options)
    groups = rollout.x_0.shape[:3]
    (rewards,) = spec.load_all([("rule",)], bench.device)
    asked = [prompt for prompt in prompts for _ in range(groups[1] * groups[2])]
    images = bench.policy.decode(rollout.x_0.flatten(0, 2))
    return rewards.total(rewards(images, asked)).unflatten(0, groups)


def compared(rewards: Tensor, whole: Tensor) -> str:
    """Rewards beside those of the whole grid."""
    apart = (rewards - whole).abs().mean().item()
    A, B = pave.group_advantages(rewards).flatten(), pave.group_advantages(whole).flatten()
    cosine = torch.nn.functional.cosine_similarity(A, B, dim=0).item()
    return f"reward {rewards.mean():.3f}, apart {apart:.3f}, cosine {cosine:.2f}"


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "gradients": gradients,
    "network": network,
    "update": update,
    "iteration": iteration,
    "memory": memory,
    "waits": waits,
    "growth": growth,
    "finishing": finishing,
}


# ---- The program ---------------------------------------------------------------------------------


def environment(bench: Bench) -> dict[str, Any]:
    """The machine, what runs on it, and how busy it was."""
    cuda = bench.device.type == "cuda"
    card = torch.cuda.get_device_name(bench.device) if cuda else processor()
    return {
        "device": card,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        "cuda": torch.version.cuda if cuda else None,
        "network": bench.policy.name,
        "parameters": bench.policy.sizes.weights,
        "trained": bench.policy.sizes.tuned,
        "rounds": bench.rounds,
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else platform.processor()


def shown(row: Row) -> str:
    """A line of the text."""
    value = f"{row.value:.4g}"
    if row.low is not None and row.high is not None:
        value += f" ({row.low:.3g} to {row.high:.3g})"
    return f"  {row.name:<56} {value} {row.unit}{'  ' if row.unit else ' '}{row.beside}".rstrip()


def bench_of(o: Options, rounds: int) -> Bench:
    """The policy, loaded; its prompts are the embedded world's, or three of a released model."""
    ranks = Ranks.start(o.device, o.threads)
    policy = policy_of(o)
    texts = ("a red dog", "a blue bird", "two cats")
    data = Prompts(texts, texts) if o.model else Prompts()
    policy.load(data.train if o.model else (), ranks.device)
    return Bench(o, policy, ranks, rounds, data)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON where --json says. Bad input: one line, status 2."""
    parser = Parser("python -m tests.benchmark [options]", __doc__, READ)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="times that each job is timed")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--attention", default="", help="an attention backend of diffusers")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    given = parser.read(argv)
    own = {name: given.pop(name, None) for name in ("sections", "rounds", "json")}
    attention, compiled = given.pop("attention", ""), given.pop("compile", False)
    with refusing():
        if own["rounds"] < 1:
            raise ValueError(f"--rounds {own['rounds']}: must be 1 or more")
        o = settle({**given, **AUTHORS, "reward": (WARMTH,)})
        check_alone(o, given)
        check_tune(o)
        if (attention or compiled) and not o.model:
            raise ValueError("--attention, --compile: must be left out without --model")
        if own["json"] and not own["json"].absolute().parent.is_dir():
            raise ValueError(f"--json {own['json']}: must be a file in a folder that exists")
        bench = bench_of(o, own["rounds"])
        if attention:
            bench.network.set_attention_backend(attention)
        if compiled:
            bench.network.compile_repeated_blocks()
    about = environment(bench)
    said = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    print(f"{said}, {bench.o.dtype}", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(["gradients", *own["sections"]]):
        print(f"\n{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", flush=True)
        rows[name] = []
        for row in SECTIONS[name](bench):
            print(shown(row), flush=True)
            rows[name].append(row._asdict())
    about["options"] = {**asdict(o), "attention": attention, "compile": compiled}
    about["load at the end"] = round(os.getloadavg()[0], 2)
    if own["json"]:
        own["json"].write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
