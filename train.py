"""Align a text-to-image flow with a reward, by Pave-GRPO.

    python train.py                          a laptop: the embedded model, in a few minutes
    torchrun --nproc_per_node=8 train.py     a node: the same samples and the same gradient
    python train.py --factors                S = {}: the Flow-GRPO / Flow-CPS / DanceGRPO baseline
    torchrun --nproc_per_node=8 train.py --model stabilityai/stable-diffusion-3.5-medium \\
        --reward hpsv2 clip:0.01 --eval-reward pickscore \\
        --prompts train.txt --eval-prompts heldout.txt

One iteration is Algorithm 1 of pave_grpo.py. Prompts are the unit of work: the P prompts of an
iteration are shared among the ranks, and all randomness of a prompt comes from one CPU generator
seeded by (seed, iteration, its index). So neither the number of ranks nor the device changes what
is drawn. Held-out prompts are never trained on, and are judged with fixed noise.

Departures from the paper's setting. Without --model: the model, the reward and every size, which
are those of a laptop; one stochastic step, where the gradient is most signal; and layers at pixel
resolution as they are. With it: LoRA, unless --preset says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.rewards import spec
from zoo.training import costs, policies
from zoo.training.command_line import parse
from zoo.training.compare import Line, compare
from zoo.training.draw import chunked
from zoo.training.metrics import Metrics, measure, merge
from zoo.training.options import (
    ADVANTAGES,
    ROLLOUTS,
    Options,
    policy_of,
    process_of,
    prompts_of,
    stochastic_steps,
    terms_of,
    weights_of,
)
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts
from zoo.training.ranks import Ranks, Stopped, fail, stopping
from zoo.training.run import Interrupt, Run


def train(
    o: Options,
    policy: policies.Policy,
    rewards: spec.Rewards,
    judges: spec.Rewards,
    data: Prompts,
    ranks: Ranks,
) -> None:
    """Judge, align, judge again.

    The first Ctrl-C ends the run after the iteration it falls in; a failing reward ends it
    immediately. Both keep what there is.
    """
    run, interrupt, done = Run(o, policy, judges, data, ranks), Interrupt(), 0
    optimizer, rate = optimizer_of(o, policy.tuned)
    average = policies.EMA(policy.tuned, o.ema) if o.ema else None
    averaged = average.applied if average else nullcontext
    try:
        run.picture("before")
        run.judge(0, "before")
        bar = tqdm(range(1, o.iterations + 1), "aligning", disable=not ranks.leads)
        for iteration in bar:
            if any(ranks.gather(interrupt.noted)):
                break
            due = o.compare_every and iteration % o.compare_every == 0
            compared = run.compare if due else None
            own = iterate(o, iteration, policy, rewards, data, optimizer, average, ranks, compared)
            metrics = merge(ranks.gather(own))
            run.log(iteration, {**metrics, "lr": float(rate.get_last_lr()[0])})
            rate.step()
            bar.set_postfix_str(
                f"reward={metrics['reward']:.3f}, ratio={metrics['ratio_1']:.5f}, "
                f"clipped={metrics['clip_fraction_1']:.2f}"
            )
            done = iteration
            if o.eval_every and done % o.eval_every == 0 and done < o.iterations:
                with averaged():
                    run.judge(done)
                    run.picture(f"after {done} iterations")
                    run.save(done)
        with averaged():
            if done == o.iterations:
                run.judge(done, "after")
            run.picture(f"after {done} iterations")
    except Stopped:
        if done:
            with averaged():
                run.finish(done, complete=False)
        raise
    with averaged():
        run.finish(done, complete=done == o.iterations)


def iterate(
    o: Options,
    iteration: int,
    policy: policies.Policy,
    rewards: spec.Rewards,
    data: Prompts,
    optimizer: torch.optim.Optimizer,
    average: policies.EMA | None,
    ranks: Ranks,
    compared: Callable[[int, list[Line]], None] | None = None,
) -> Metrics:
    """One iteration of Algorithm 1 on this rank's share of the prompts. Returns its metrics.

    compared is told how the k-terms compare with the original, before the first update.
    """
    process, steps = process_of(o, policy), stochastic_steps(o, policy, iteration)
    prompts, generators = data.draw(o.seed, iteration, ranks.share(o.prompts_per_iteration))

    # 1. Sample G members per prompt; some of the T steps are stochastic, x_t -> x_s.
    noise = pave.draw_noise(
        generators, o.group_size, policy.shape, len(steps), o.own_start, device=ranks.device
    )
    velocity = chunked(policy.velocity(prompts), o.rollout_batch)
    rollout = ROLLOUTS[o.rollouts](velocity, process, noise, steps)

    # 2. Reward every finished sample x_0; A = (r - mean r) / std r in its group.
    groups = rollout.x_0.shape[:3]  # P, N, G
    asked = [prompt for prompt in prompts for _ in range(groups[1] * groups[2])]
    images = policy.decode(rollout.x_0.flatten(0, 2))
    scores = ranks.together(rewards, images, asked)
    total = rewards.total(scores).to(ranks.device).unflatten(0, groups)
    advantages = ADVANTAGES[o.advantages](total)

    if compared is not None:
        compared(iteration, compare(o, policy, prompts, rollout, advantages, parts_of, ranks))
    u = 0.5 if o.place == "half" else pave.draw_places(generators, *rollout.x_t.shape[1:3])
    weights = weights_of(o, process, steps)
    parts = list(parts_of(rollout, advantages, o.update_batch, u, weights))
    for _ in range(o.updates):
        optimizer.zero_grad()
        # 3. Score each observed x_t -> x_s again, for every k in {1} + S.
        measured = [score(o, policy, prompts, part) for part in parts]
        # 4. Ascend J: the gradient of all parts and all ranks, cut to a norm.
        grad_norm = step(o, policy, optimizer, average, ranks)
    return {
        "reward": total.mean().item(),
        **{f"reward_{name}": z.mean().item() for name, z in scores.items()},
        "silent_groups": (advantages == 0).all(-1).float().mean().item(),
        "grad_norm": grad_norm,
        **merge(measured, [part.share for part in parts]),
    }


def score(o: Options, policy: policies.Policy, prompts: Sequence[str], part: Part) -> Metrics:
    """A part's loss, its gradient added to the parameters', and its metrics."""
    own = prompts[part.prompts]
    result = pave.policy_loss(
        policy.velocity(own),
        part.rollout,
        part.advantages,
        factors=terms_of(o),
        form=o.form,
        u=part.u,
        clip=o.clip,
        kl=o.kl,
        reference=policy.reference_velocity(own) if o.kl else None,
        term_weights=part.weights,
        reduction=o.reduction,
        ratio_norm=o.ratio_norm,
        old=part.old,
    )
    part.old = result.old  # the first pass is theta_old for the others
    (part.share * result.loss).backward()
    return measure(result, part.advantages)


@dataclass
class Part:
    """A piece of a rollout for one backward pass."""

    rollout: pave.Rollout
    advantages: Tensor
    prompts: slice  # of the rollout's
    share: float  # of the rollout's states: the weight of its mean in the mean
    u: float | Tensor  # place of the midpoint form's evaluations in their steps
    weights: dict[int, Tensor] | None  # of every k, at each of its steps
    old: pave.OldPolicy | None = None


def parts_of(
    rollout: pave.Rollout,
    advantages: Tensor,
    batch: int,
    u: float | Tensor = 0.5,
    weights: dict[int, Tensor] | None = None,
) -> Iterator[Part]:
    """Cut into pieces of at most `batch` states x_t; 0: one piece.

    By prompts, within one by steps, within one by members. The loss is a mean over states or over
    their members, alike in number: the sum over parts of share * loss(part) is the loss.
    """
    P, n, M = rollout.x_t.shape[:3]  # M states a step: 1, the shared anchor, or one a member
    prompts, steps, members = costs.part_sizes(P, n, M, batch)
    every = slice(None)
    for p in slices(P, prompts):
        for i in slices(n, steps):
            for m in slices(M, members):
                own = m if M > 1 else every  # all members left a shared anchor
                group = i if rollout.x_0.shape[1] == n else every  # chains: one x_0 for all steps
                x_t = rollout.x_t[p, i, m]
                piece = rollout._replace(
                    sde_steps=rollout.sde_steps[i],
                    x_t=x_t,
                    x_s=rollout.x_s[p, i, own],
                    log_prob=rollout.log_prob[p, i, own],
                    x_0=rollout.x_0[p, group, own],
                    v=None if rollout.v is None else rollout.v[p, i, m],
                )
                share = x_t.shape[:3].numel() / (P * n * M)
                place = u[p, i, m] if isinstance(u, Tensor) else u
                w = None if weights is None else {k: w_k[i] for k, w_k in weights.items()}
                yield Part(piece, advantages[p, group, own], p, share, place, w)


def slices(total: int, size: int) -> list[slice]:
    """range(total) in pieces of `size`, the last perhaps smaller."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


# ---- The optimiser -------------------------------------------------------------------------------


def optimizer_of(
    o: Options, tuned: Sequence[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser, and its learning rate, which rises through i / (warmup + 1) of --lr."""

    def warm_up(i: int) -> float:
        # torch's LinearLR does the same by products, whose rounding stays in the rate for good.
        return min(1.0, (i + 1) / (o.warmup + 1))

    optimizer: torch.optim.Optimizer
    if o.optimizer == "sgd":
        optimizer = torch.optim.SGD(tuned, o.lr)
    else:
        optimizer = torch.optim.AdamW(tuned, o.lr, weight_decay=o.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)


def step(
    o: Options,
    policy: policies.Policy,
    optimizer: torch.optim.Optimizer,
    average: policies.EMA | None,
    ranks: Ranks,
) -> float:
    """One step along the mean of the ranks' gradients; returns its norm before it was cut.

    The average of the weights, if there is one, follows.
    """
    if not policy.sharded:  # FSDP2 has averaged them in the backward pass
        ranks.average_gradients(policy.tuned)
    norm = torch.nn.utils.clip_grad_norm_(policy.tuned, o.max_grad_norm)
    optimizer.step()
    if average:
        average.update()
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


# ---- The program ---------------------------------------------------------------------------------


def loaded(
    o: Options, policy: policies.Policy, data: Prompts, ranks: Ranks
) -> tuple[spec.Rewards, spec.Rewards]:
    """(rewards, judges), the policy loaded too, with every prompt this rank will ever ask for.

    What cannot be loaded is one line, of each rank where it fails, and status 2.
    """
    drawn = [
        data.draw(o.seed, iteration, ranks.share(o.prompts_per_iteration))[0]
        for iteration in range(1, o.iterations + 1)
    ]
    judged = data.in_order()[: o.heldout // IMAGES_PER_PROMPT]
    shown, _ = data.shown(policy.shape, policy.kind)
    asked = list(dict.fromkeys([*chain.from_iterable(drawn), *judged, *shown]))
    try:
        lists = (o.reward, o.eval_reward)
        rewards, judges = spec.load_all(lists, ranks.device, o.reward_batch)
        policy.load(asked, ranks.device, ranks.rank, ranks.world)
    except ValueError as problem:
        fail(str(problem), anywhere=True)
    cut_off = sorted(set(chain.from_iterable(ranks.gather(policy.cut_off))))
    if ranks.leads and cut_off:
        print("\n".join(cut_off), flush=True)
    return rewards, judges


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it will cost, then train, as the command line says."""
    o = parse(argv, __doc__)
    ranks = Ranks.start(o.device, o.threads)
    ranks.gather(None)  # every rank has found --out empty before one writes there
    policy, data = policy_of(o, ranks.world), prompts_of(o)
    if ranks.leads:
        steps, heldout, device = stochastic_steps(o, policy), len(data.heldout), ranks.device.type
        cost = costs.describe(o, steps, policy, heldout, ranks.world, device)
        print("\n".join([*data.report, cost]), flush=True)
    if not o.dry_run:
        rewards, judges = loaded(o, policy, data, ranks)
        with stopping():
            train(o, policy, rewards, judges, data, ranks)
    ranks.stop()


if __name__ == "__main__":
    main()
