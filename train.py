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

import json
import math
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.rewards import spec as zoo_rewards
from zoo.training import costs, policies
from zoo.training.draw import chunked, draw, sample
from zoo.training.evaluate import judge_heldout
from zoo.training.metrics import measure, merge
from zoo.training.options import (
    Options,
    Parser,
    make_process,
    parse,
    policy_of,
    prompts_of,
    settle,
    stochastic_steps,
)
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts, generator_of
from zoo.training.ranks import Ranks, Stopped
from zoo.training.run import Run

__all__ = ["draw", "settle"]


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
    old: list[pave.OldPolicy | None] = [None] * len(parts)
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


if __name__ == "__main__":
    main()
