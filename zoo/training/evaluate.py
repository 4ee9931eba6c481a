"""Judging held-out pictures, and a program that judges a checkpoint.

python -m zoo.training.evaluate runs/shapes-1/checkpoint.safetensors
    prints, as JSON, what a run writes of its held-out pictures into summary.json
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from zoo.rewards import spec as rewards
from zoo.training import policies
from zoo.training.command_line import Parser, check_alone, refusing
from zoo.training.draw import draw
from zoo.training.options import Options
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts
from zoo.training.ranks import Ranks, stopping

READ = ("heldout", "eval_reward", "eval_steps", "eval_batch", "shift", "device", "threads")


class Judged(NamedTuple):
    """A batch of held-out pictures that one rank drew and judged."""

    steps: int  # ODE steps they were drawn with
    start: int  # number of the first of their pairs
    scores: dict[str, list[float]]  # by judge, one a picture
    distances: list[float]  # between pictures of one prompt, one a prompt


def judge_heldout(
    o: Options,
    policy: policies.Policy,
    judges: rewards.Rewards,
    data: Prompts,
    steps_list: Sequence[int],
    ranks: Ranks,
    listen: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Means over the held-out pairs, for each number of ODE steps, and of the first of them more.

    listen is called before every ODE step, on all ranks, and may raise.

    {"heldout": {steps: {judge: mean}}, "family": {kind of prompt: mean of the first judge},
     "diversity": distance between pictures of one prompt, mean over prompts}
    """
    prompts, noise = data.pairs(policy.shape, o.heldout)
    found = judge_pairs(o, policy, judges, prompts, noise, steps_list, ranks, listen)
    return means_of(found, [policy.kind(prompt) for prompt in prompts], steps_list)


def judge_pairs(
    o: Options,
    policy: policies.Policy,
    judges: rewards.Rewards,
    prompts: Sequence[str],
    noise: Tensor,
    steps_list: Sequence[int],
    ranks: Ranks,
    listen: Callable[[], None] | None = None,
) -> list[Judged]:
    """All batches of these (prompt, noise) pairs, in order, on every rank."""
    n, size = len(prompts), min(o.eval_batch, len(prompts))
    starts = range(0, n, size)
    # In every round every rank draws as many pictures, some for nothing: a sharded network needs
    # all ranks at once.
    rounds = list(product(steps_list, range(0, len(starts), ranks.world)))
    found: list[Judged] = []
    for steps, first in tqdm(rounds, "held-out", leave=False, disable=not ranks.leads):
        mine = first + ranks.rank < len(starts)
        start = starts[first + ranks.rank] if mine else starts[-1]
        rows = [min(i, n - 1) for i in range(start, start + size)]
        asked = [prompts[i] for i in rows]
        images = draw(o, policy, asked, noise[rows], steps, ranks.device, listen)[: n - start]
        scores = (
            ranks.together(judges, images, asked[: n - start]) if mine else ranks.together(dict)
        )
        if mine:
            listed = {name: z.tolist() for name, z in scores.items()}
            found.append(Judged(steps, start, listed, distances_of(images)))
    return sorted(chain.from_iterable(ranks.gather(found)), key=lambda z: z[:2])


def distances_of(images: Tensor) -> list[float]:
    """Root mean square pixel distance between pictures of one prompt, mean over their pairs."""
    pixels = math.prod(images.shape[1:])
    groups = images.flatten(1).split(IMAGES_PER_PROMPT)
    return [torch.pdist(group).mean().item() / pixels**0.5 for group in groups]


def means_of(
    found: Sequence[Judged], kinds: Sequence[str], steps_list: Sequence[int]
) -> dict[str, Any]:
    """What judge_heldout returns, from all batches in order; kinds: of each pair's prompt."""
    scores: dict[int, dict[str, list[float]]] = {steps: {} for steps in steps_list}
    for batch in found:
        for judge, values in batch.scores.items():
            scores[batch.steps].setdefault(judge, []).extend(values)
    main = steps_list[0]
    by_kind: dict[str, list[float]] = {}
    for kind, score in zip(kinds, next(iter(scores[main].values())), strict=True):
        by_kind.setdefault(kind, []).append(score)
    return {
        "heldout": {
            str(steps): {judge: statistics.fmean(values) for judge, values in own.items()}
            for steps, own in scores.items()
        },
        "family": {kind: statistics.fmean(by_kind[kind]) for kind in sorted(by_kind) if kind},
        "diversity": statistics.fmean(
            distance for batch in found if batch.steps == main for distance in batch.distances
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Judge the checkpoint a command line names. Bad input: one line, status 2."""
    parser = Parser("python -m zoo.training.evaluate CHECKPOINT [options]", __doc__, READ)
    parser.add_argument("checkpoint", help="a checkpoint of the embedded model")
    given = parser.read(argv)
    checkpoint = given.pop("checkpoint")
    with refusing():
        o = Options(**given)
        check_alone(o, given)
        policy = policies.Embedded(checkpoint, shift=o.shift)
    ranks = Ranks.start(o.device, o.threads)
    with refusing():
        (judges,) = rewards.load_all([o.eval_reward], ranks.device)
    policy.load((), ranks.device)
    with stopping():
        result = judge_heldout(o, policy, judges, Prompts(), o.eval_steps, ranks)
    if ranks.leads:
        print(json.dumps(result, indent=1))
    ranks.stop()


if __name__ == "__main__":
    main()
