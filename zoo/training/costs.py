"""What an iteration costs and holds, counted before it is spent; o is the Options of train.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from zoo.rewards import spec as rewards
from zoo.training import policies
from zoo.training.options import Options, finishing_steps, terms_of
from zoo.training.prompts import IMAGES_PER_PROMPT


class Cost(NamedTuple):
    """Of one iteration, over all ranks: images to reward, and rows of velocity evaluated."""

    images: int
    sampled: int
    trained: int
    reference: int
    states: int  # x_t that the loss evaluates, once per update
    live: int  # rows of the largest velocity call while sampling

    def forwards(self, checkpointing: bool) -> int:
        """All of it in forward passes; a trained evaluation costs as many as `per_trained`."""
        return self.sampled + per_trained(checkpointing) * self.trained + self.reference


def per_trained(checkpointing: bool) -> int:
    """Forwards a trained evaluation costs: its own, a backward of two; checkpointing, one more."""
    return 4 if checkpointing else 3


def part_sizes(prompts: int, steps: int, members: int, batch: int) -> tuple[int, int, int]:
    """How many prompts, steps and members a backward pass takes, for at most `batch` states x_t.

    Whole prompts where one fits, else some steps of one, else some members of one step. 0: all.
    """
    batch = batch or prompts * steps * members
    return (
        min(prompts, max(1, batch // (steps * members))),
        min(steps, max(1, batch // members)),
        min(members, batch),
    )


def cost_of(o: Options, steps: Sequence[int], factors: Sequence[int]) -> Cost:
    """Counted for the stochastic steps and S."""
    P, G, n = o.prompts_per_iteration, o.group_size, len(steps)
    before = steps[-1] + 1  # grid steps up to the end of the last stochastic one
    if o.rollouts == "shared_anchor":
        # The anchor goes that far; G members of each stochastic step finish from there.
        images, states = P * G * n, P * n
        after = sum(finishing_steps(o, i) for i in steps)
        sampled, live = P * (before + G * after), P * G if after else P
    else:
        images, states = P * G, P * G * n
        sampled, live = P * G * (before + finishing_steps(o, steps[-1])), P * G
    return Cost(
        images=images,
        sampled=sampled,
        trained=o.updates * states * (1 + sum(k - 1 for k in factors)),
        reference=o.updates * states if o.kl else 0,
        states=states,
        live=live,
    )


def plural(n: int, word: str) -> str:
    """1 rank, 2 ranks."""
    return f"{n} {word}{'s' * (n > 1)}"


def calls(total: int, batch: int) -> str:
    """How many calls take `total` rows, and of how many; batch 0: one of all."""
    size = min(batch or total, total)
    return f"{math.ceil(total / size)} of up to {size}"


def describe(
    o: Options,
    steps: Sequence[int],
    policy: policies.Policy,
    heldout: int,
    ranks: int,
    device: str,
) -> str:
    """What one iteration costs, what S adds, what batches mean, what is held, what is judged.

    steps: the stochastic ones; heldout: how many held-out prompts there are.
    """
    lines = [
        *work(o, steps, policy, ranks, device),
        *on_a_rank(o, steps, ranks),
        memory(o, policy, ranks),
        judgement(o, heldout),
    ]
    judges = {spec.name for spec in rewards.parse(o.eval_reward)}
    ascended = {spec.name for spec in rewards.parse(o.reward)}
    if o.model and judges <= ascended:
        lines.append(
            "every judge is ascended too, and will rise whatever happens to the pictures: see "
            "--eval-reward"
        )
    return "\n".join(lines)


def work(
    o: Options, steps: Sequence[int], policy: policies.Policy, ranks: int, device: str
) -> list[str]:
    """Images and velocities of an iteration, and what of it is due to S."""
    cost, plain, rows = cost_of(o, steps, terms_of(o)), cost_of(o, steps, ()), policy.sizes.rows
    more = cost.forwards(o.checkpointing) / plain.forwards(o.checkpointing) - 1
    reference = f", {cost.reference} reference" if o.kl else ""
    guided = f"; each is {rows} rows of the network, for guidance" if rows > 1 else ""
    return [
        f"one iteration: {cost.images} images in groups of {o.group_size} from "
        f"{o.prompts_per_iteration} prompts on {plural(ranks, 'rank')} ({device})",
        f"  velocity evaluations: {cost.sampled} sampled, {cost.trained} trained "
        f"({per_trained(o.checkpointing)} forwards each){reference}{guided}",
        f"  S = {{{', '.join(map(str, terms_of(o)))}}} adds {cost.trained - plain.trained} trained "
        f"evaluations, {100 * more:.1f} % more forwards; no image, no reward",
        *window(o, steps),
        *comparison(o, cost),
    ]


def window(o: Options, steps: Sequence[int]) -> list[str]:
    """What --window-every makes of these figures."""
    if not o.window_every:
        return []
    return [
        f"  the stochastic steps are {', '.join(map(str, steps))} at first, and move by "
        f"{o.window_by} every {plural(o.window_every, 'iteration')}: these figures are of the first"
    ]


def comparison(o: Options, cost: Cost) -> list[str]:
    """What --compare-every adds: each velocity of each term twice, and all of them once more."""
    if not o.compare_every:
        return []
    terms = sum(2 * k for k in (1, *o.factors))
    again = 1 + sum(k - 1 for k in o.factors)
    return [
        f"  every {plural(o.compare_every, 'iteration')} k-terms are compared with the original: "
        f"{cost.states * (terms + again)} more velocity evaluations, {cost.states * terms} of them "
        "with gradients; nothing else changes"
    ]


def on_a_rank(o: Options, steps: Sequence[int], ranks: int) -> list[str]:
    """How the batches cut a rank's share."""
    cost = cost_of(o, steps, terms_of(o))
    images, states, live = cost.images // ranks, cost.states // ranks, cost.live // ranks
    members = 1 if o.rollouts == "shared_anchor" else o.group_size
    axes = (o.prompts_per_iteration // ranks, len(steps), members)
    sizes = part_sizes(*axes, o.update_batch)
    passes = math.prod(math.ceil(n / size) for n, size in zip(axes, sizes, strict=True))
    decoded = f"VAE calls {calls(images, o.decode_batch)} (--decode-batch {o.decode_batch}); "
    return [
        f"  on a rank: {images} images; velocity calls of a step at most "
        f"{calls(live, o.rollout_batch)} rows (--rollout-batch {o.rollout_batch}); "
        f"{decoded if o.model else ''}"
        f"reward calls {calls(images, o.reward_batch)} (--reward-batch {o.reward_batch})",
        f"  {plural(o.updates, 'update')}, each of {states} observed states on a rank in backward "
        f"passes: {passes} of up to {math.prod(sizes)} (--update-batch {o.update_batch}), "
        f"gradients added up: the same gradient",
    ]


def memory(o: Options, policy: policies.Policy, ranks: int) -> str:
    """Counts of parameters, and what a rank holds of them, in GiB."""
    sizes = policy.sizes
    masters = sizes.masters / 2**30
    held = {
        "frozen weights": sizes.frozen / 2**30,
        "trained, float32": masters,
        "gradients": masters,
        "Adam": 2 * masters if o.optimizer == "adamw" else 0,
        "EMA": masters if o.ema else 0,
        "gathered to sample": sizes.gathered / 2**30,
    }
    sharded = f", sharded over {ranks} ranks" if policy.sharded else ""
    parts = " + ".join(f"{size:.2f} {name}" for name, size in held.items() if size)
    besides = "activations, VAE and reward models" if o.model else "activations"
    return (
        f"parameters: {sizes.weights:,} of the network, {sizes.tuned:,} trained{sharded}; memory "
        f"of a rank, GiB: {parts} = {sum(held.values()):.2f}, {besides} besides"
    )


def judgement(o: Options, heldout: int) -> str:
    """When is judged, and how many pictures of how many prompts."""
    asked = o.heldout // IMAGES_PER_PROMPT
    between = f", every {o.eval_every} iterations" if o.eval_every else ""
    repeated = " or more" if asked > heldout else ""
    return (
        f"judged, before{between} and after: {o.heldout} pictures of {min(asked, heldout)} of the "
        f"{heldout} held-out prompts, {IMAGES_PER_PROMPT} each{repeated} (--heldout {o.heldout})"
    )
