"""What an iteration of train.py costs and holds, counted before it is spent; o is its Options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from zoo.rewards import spec as rewards
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
        """A trained evaluation costs about three forwards, its own and a backward of two; checkpointing, one more."""
        return self.sampled + (4 if checkpointing else 3) * self.trained + self.reference


def part_sizes(prompts: int, steps: int, members: int, batch: int) -> tuple[int, int, int]:
    """How many prompts, steps and members a backward pass takes, for at most `batch` states x_t (0: all of them).

    Whole prompts where one fits, else some steps of one, else some members of one step.
    """
    batch = batch or prompts * steps * members
    return (
        min(prompts, max(1, batch // (steps * members))),
        min(steps, max(1, batch // members)),
        min(members, batch),
    )


def cost_of(o, steps: Sequence[int], factors: Sequence[int]) -> Cost:
    """Counted, for the stochastic steps and S: the anchor up to its last stochastic step, and G branches from each."""
    P, G, T, n = o.prompts_per_iteration, o.group_size, o.steps, len(steps)
    shared = o.rollouts == "shared_anchor"
    states = P * n * (1 if shared else G)
    return Cost(
        images=P * G * (n if shared else 1),
        sampled=P * (G * sum(T - 1 - i for i in steps) + steps[-1] + 1 if shared else G * T),
        trained=o.updates * states * (1 + sum(k - 1 for k in factors)),
        reference=o.updates * states if o.kl else 0,
        states=states,
        live=P
        * (
            max((i <= steps[-1]) + G * sum(j < i for j in steps) for i in range(T)) if shared else G
        ),
    )


def describe(o, steps: Sequence[int], policy, heldout: int, world: int, device: str) -> str:
    """What one iteration costs, what S adds, what the batches mean, what is held in memory, what is judged.

    policy as in zoo/training/policies.py; heldout is the number of held-out prompts there are, world that of the ranks.
    """
    cost, plain, sizes = cost_of(o, steps, o.factors), cost_of(o, steps, ()), policy.sizes
    more = cost.forwards(o.checkpointing) / plain.forwards(o.checkpointing) - 1
    images, states, live = (z // world for z in (cost.images, cost.states, cost.live))

    def calls(total: int, batch: int) -> str:
        size = min(batch or total, total)
        return f"{math.ceil(total / size)} of up to {size}"

    axes = (
        o.prompts_per_iteration // world,
        len(steps),
        1 if o.rollouts == "shared_anchor" else o.group_size,
    )
    part = part_sizes(*axes, o.update_batch)
    passes = math.prod(math.ceil(total / size) for total, size in zip(axes, part, strict=True))
    judged = o.heldout // IMAGES_PER_PROMPT
    masters = sizes.masters / 2**30
    held = [
        ("frozen weights", sizes.frozen / 2**30),
        ("trained, float32", masters),
        ("gradients", masters),
        ("Adam", 2 * masters if o.optimizer == "adamw" else 0),
        ("EMA", masters if o.ema else 0),
    ]
    lines = [
        f"one iteration: {cost.images} images in groups of {o.group_size} from {o.prompts_per_iteration} prompts on "
        f"{world} rank{'s' * (world > 1)} ({device})",
        f"  velocity evaluations: {cost.sampled} sampled, {cost.trained} trained "
        f"({4 if o.checkpointing else 3} forwards each)"
        + (f", {cost.reference} reference" if o.kl else "")
        + (f"; each is {sizes.rows} rows of the network, for guidance" if sizes.rows > 1 else ""),
        f"  S = {{{', '.join(map(str, o.factors))}}} adds {cost.trained - plain.trained} trained evaluations, "
        f"{100 * more:.1f} % more forwards; no image, no reward",
        f"  on a rank: {images} images; velocity calls of a step at most {calls(live, o.rollout_batch)} rows "
        f"(--rollout-batch {o.rollout_batch})"
        + (
            "; VAE calls " + calls(images, o.decode_batch) + f" (--decode-batch {o.decode_batch})"
            if o.model
            else ""
        )
        + f"; reward calls {calls(images, o.reward_batch)} (--reward-batch {o.reward_batch})",
        f"  {o.updates} update{'s' * (o.updates > 1)}, each of {states} observed states on a rank in backward passes: "
        f"{passes} of up to {math.prod(part)} (--update-batch {o.update_batch}), gradients added up: the same gradient"
        f"; velocity calls of up to {math.prod(part) * max(1, len(o.factors))} rows",
        f"parameters: {sizes.weights:,} of the network, {sizes.tuned:,} trained"
        + (f", sharded over {world} ranks" if policy.sharded else "")
        + "; memory of a rank, GiB: "
        + " + ".join(f"{size:.2f} {name}" for name, size in held if size)
        + f" = {sum(s for _, s in held):.2f}, "
        f"activations{', VAE and reward models' if o.model else ''} besides",
        f"judged, before{f', every {o.eval_every} iterations' * bool(o.eval_every)} and after: {o.heldout} pictures of "
        f"{min(judged, heldout)} of the {heldout} held-out prompts, {IMAGES_PER_PROMPT} each"
        f"{' or more' * (judged > heldout)} (--heldout {o.heldout})",
    ]
    judges, ascended = ({spec.name for spec in rewards.parse(z)} for z in (o.eval_reward, o.reward))
    if o.model and judges <= ascended:
        lines.append(
            "every judge is ascended too, and will rise whatever happens to the pictures: see --eval-reward"
        )
    return "\n".join(lines)
