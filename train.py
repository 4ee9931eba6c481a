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

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import pave_grpo as pave
from zoo.rewards import spec
from zoo.training import checkpoints, costs, finite, policies
from zoo.training.command_line import parse_and_read, refusing
from zoo.training.compare import Line, compare
from zoo.training.draw import chunked
from zoo.training.metrics import Metrics, fetch, measure, merge
from zoo.training.options import (
    ADVANTAGES,
    ROLLOUTS,
    Options,
    policy_of,
    process_of,
    stochastic_steps,
    terms_of,
    weights_of,
)
from zoo.training.prompts import IMAGES_PER_PROMPT, Prompts, summarised
from zoo.training.ranks import INTERRUPTED, Interrupted, Ranks, Stopped, fail, stopping
from zoo.training.run import Run


def train(
    o: Options,
    policy: policies.Policy,
    rewards: spec.Rewards,
    judges: spec.Rewards,
    data: Prompts,
    ranks: Ranks,
    checkpoint: Path | None = None,
) -> None:
    """Judge, align, judge again; from a checkpoint, go on as if there had been no interruption.

    The first Ctrl-C or SIGTERM ends the run after the iteration it falls in, with Interrupted; a
    failing reward ends it immediately. Both save what there is. Numbers that are not finite end it
    before they reach the weights.
    """
    run = Run(o, policy, judges, data, ranks, checkpoint)
    optimizer, rate = optimizer_of(o, policy.tuned, run.done)
    average = policies.EMA(policy.tuned, o.ema) if o.ema else None
    run.begin(optimizer, average)
    skipped = sum(line.get("poisoned_groups", 0.0) for line in run.lines)
    try:
        run.look()
        todo = range(run.done + 1, o.iterations + 1)
        bar = tqdm(todo, "aligning", o.iterations, initial=run.done, disable=not ranks.leads)
        for iteration in bar:
            run.listen()
            due = o.compare_every and iteration % o.compare_every == 0
            compared = run.compare if due else None
            own = iterate(o, iteration, policy, rewards, data, optimizer, average, ranks, compared)
            metrics = merge(ranks.gather(own))
            run.log(iteration, {**metrics, "lr": float(rate.get_last_lr()[0])})
            rate.step()
            skipped += metrics["poisoned_groups"]
            bar.set_postfix_str(
                f"reward={metrics['reward']:.3f}, ratio={metrics['ratio_1']:.5f}, "
                f"clipped={metrics['clip_fraction_1']:.2f}"
                + (f", groups skipped={skipped / iteration:.2%}" if skipped else "")
            )
            run.done = iteration
            if run.save_is_due():
                run.save()
            run.look()
    except Interrupted:
        run.save()
        run.finish(complete=False)
        raise
    except Stopped as problem:
        run.stop(problem)
        raise
    run.finish(complete=True)


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

    compared is told how the k-terms compare with the original, before the first update. Raises
    Stopped where a reward fails, and NotFinite before the weights would move by such numbers.
    """
    process, steps = process_of(o, policy), stochastic_steps(o, policy, iteration)
    optimizer.zero_grad()  # the last iteration's gradients take no memory while sampling
    prompts, generators = data.draw(o.seed, iteration, ranks.share(o.prompts_per_iteration))

    # 1. Sample G members per prompt; some of the T steps are stochastic, x_t -> x_s.
    noise = pave.draw_noise(
        generators, o.group_size, policy.shape, len(steps), o.own_start, device=ranks.device
    )
    velocity = chunked(policy.velocity(prompts), o.rollout_batch)
    sample = ROLLOUTS[o.rollouts]
    with policy.gathered():
        rollout = sample(velocity, process, noise, steps, o.finish_stride, o.finish_order)
    finite.require(ranks, iteration, finite.among("a sample", prompts, rollout.x_0))

    # 2. Reward every finished sample x_0; A = (r - mean r) / std r in its group.
    groups = rollout.x_0.shape[:3]  # P, N, G
    asked = [prompt for prompt in prompts for _ in range(groups[1] * groups[2])]
    images = policy.decode(rollout.x_0.flatten(0, 2))
    scores = ranks.together(rewards, images, asked, False)
    total = rewards.total(scores).to(ranks.device).unflatten(0, groups)
    advantages, poisoned = advantages_of(o, iteration, prompts, scores, total, ranks)

    if compared is not None:
        compared(iteration, compare(o, policy, prompts, rollout, advantages, parts_of, ranks))
    u = 0.5 if o.place == "half" else pave.draw_places(generators, *rollout.x_t.shape[1:3])
    weights = weights_of(o, process, steps)
    parts = list(parts_of(rollout, advantages, o.update_batch, u, weights))
    for _ in range(o.updates):
        optimizer.zero_grad()
        # 3. Score each observed x_t -> x_s again, for every k in {1} + S.
        measured = fetch([score(o, policy, prompts, part) for part in parts])
        # 4. Ascend J: along the gradient of all parts and all ranks, cut to a norm.
        grad_norm = gradient(o, policy, ranks)
        finite.require(ranks, iteration, bad_update(prompts, parts, measured, grad_norm))
        optimizer.step()
        if average:
            average.update()
    kept = ~poisoned[..., None].expand(groups).flatten().cpu()
    return {
        "reward": mean_of(total.flatten().cpu(), kept),
        **{f"reward_{name}": mean_of(z, kept) for name, z in scores.items()},
        "poisoned_groups": poisoned.float().mean().item(),
        "silent_groups": (advantages == 0).all(-1).float().mean().item(),
        "grad_norm": grad_norm,
        "grad_rms": grad_norm / math.sqrt(policy.sizes.tuned),
        **merge(measured, [part.share for part in parts]),
    }


def advantages_of(
    o: Options,
    iteration: int,
    prompts: Sequence[str],
    scores: dict[str, Tensor],
    total: Tensor,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Advantages [P, N, G] of the total reward, and which groups [P, N] are poisoned.

    These have a reward or an advantage that is not finite. With --poisoned skip their advantages
    are 0. Raises NotFinite without it, and where no rank has any other group.
    """
    finite_groups = total.isfinite().all(-1, keepdim=True)
    advantages = ADVANTAGES[o.advantages](total.where(finite_groups, 0.0))
    poisoned = ~(finite_groups & advantages.isfinite().all(-1, keepdim=True))
    if o.poisoned == "stop" or ranks.all(bool(poisoned.all())):
        quantities = {f"reward {name!r}": z.view(total.shape) for name, z in scores.items()}
        quantities |= {"the total reward": total, "an advantage": advantages}
        found = [finite.among(name, prompts, values) for name, values in quantities.items()]
        first = next((one for one in found if one), None)
        finite.require(ranks, iteration, first, keep=True)
    return advantages.masked_fill(poisoned, 0.0), poisoned.squeeze(-1)


def mean_of(values: Tensor, kept: Tensor) -> float:
    """The mean of those that are kept; 0 where there is none, which then has no weight."""
    if kept.all():
        return values.mean().item()
    return values[kept].mean().item() if kept.any() else 0.0


def bad_update(
    prompts: Sequence[str], parts: Sequence[Part], measured: Sequence[Metrics], grad_norm: float
) -> finite.Found | None:
    """A loss, or else the gradient's norm, that is not finite."""
    for part, metrics in zip(parts, measured, strict=True):
        if not math.isfinite(metrics["loss"]):
            return finite.Found("the loss", prompts[part.prompts][0], [metrics["loss"]])
    if not math.isfinite(grad_norm):
        return finite.Found("the gradient's norm", "", [grad_norm])
    return None


def score(
    o: Options, policy: policies.Policy, prompts: Sequence[str], part: Part
) -> dict[str, float | Tensor]:
    """A part's loss, its gradient added to the parameters', and what is to be fetched of it."""
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
    o: Options, tuned: Sequence[torch.nn.Parameter], done: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser, and its learning rate, which rises through i / (warmup + 1) of --lr.

    done   iterations that the rate has behind it
    """

    def warm_up(i: int) -> float:
        # torch's LinearLR does the same by products, whose rounding stays in the rate for good.
        return min(1.0, (i + 1) / (o.warmup + 1))

    optimizer: torch.optim.Optimizer
    if o.optimizer == "sgd":
        optimizer = torch.optim.SGD(tuned, o.lr)
    else:
        optimizer = torch.optim.AdamW(tuned, o.lr, weight_decay=o.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = o.lr  # which torch asks for where some is done
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up, last_epoch=done - 1)


def gradient(o: Options, policy: policies.Policy, ranks: Ranks) -> float:
    """The mean of the ranks' gradients, cut to --max-grad-norm; its norm before that."""
    if not policy.sharded:  # FSDP2 has averaged them in the backward pass
        ranks.average_gradients(policy.tuned)
    norm = torch.nn.utils.clip_grad_norm_(policy.tuned, o.max_grad_norm)
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
    shown, noise = data.shown(policy.shape, policy.kind)
    asked = list(dict.fromkeys([*chain.from_iterable(drawn), *judged, *shown]))
    try:
        lists = (o.reward, o.eval_reward)
        rewards, judges = spec.load_all(lists, ranks.device, o.reward_batch, o.reward_timeout)
        policy.load(asked, ranks.device, ranks.rank, ranks.world)
    except ValueError as problem:
        fail(str(problem), anywhere=True)
    cut_off = sorted(set(chain.from_iterable(ranks.gather(policy.cut_off))))
    if ranks.leads and cut_off:
        print("\n".join(summarised(cut_off)), flush=True)
    try:  # a reward that cannot work is found before any long work
        picture = policy.decode(noise[0, :1].to(ranks.device))
        ranks.together(rewards, picture, drawn[0][:1], o.poisoned == "stop")
        ranks.together(judges, picture, shown[:1])
    except Stopped as problem:
        fail(str(problem))
    return rewards, judges


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it will cost, then train, as the command line says."""
    o, data = parse_and_read(argv, __doc__)
    ranks = Ranks.start(o.device, o.threads)
    ranks.gather(None)  # every rank has found --out empty before one writes there
    policy = policy_of(o, ranks.world)
    checkpoint = checkpoints.found(o, data, ranks)
    if ranks.leads:
        with refusing():
            folder = Path(o.resume or o.out or "runs")
            checkpoints.check_room(folder, checkpoints.bytes_of(o, policy.sizes))
        steps, heldout, device = stochastic_steps(o, policy), len(data.heldout), ranks.device.type
        cost = costs.describe(o, steps, policy, heldout, ranks.world, device)
        print("\n".join([*data.report, cost]), flush=True)
    status = 0
    if not o.dry_run:
        rewards, judges = loaded(o, policy, data, ranks)
        with stopping():
            try:
                train(o, policy, rewards, judges, data, ranks, checkpoint)
            except Interrupted:
                status = INTERRUPTED
    ranks.stop()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
