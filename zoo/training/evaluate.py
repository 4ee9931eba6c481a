"""Judging held-out pictures."""

from __future__ import annotations

import math
import statistics

import torch
from tqdm import tqdm

from zoo.rewards import spec as zoo_rewards
from zoo.training.draw import draw
from zoo.training.options import Options
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts
from zoo.training.ranks import Ranks


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
