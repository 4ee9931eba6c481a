"""Each k-term beside the original, on a training run's own rollouts, before their first update.

A line of compare.jsonl is of one stochastic step and one k of S:

    iteration, step, t, s, k
    original    |grad_1|, the size of the original term's parameter gradient
    norm        |grad_k| / |grad_1|, each term with weight 1
    cosine      of the two
    member      cosine of the members' attributions A (x_s - mu) / std^2, the mean over members
    group       cosine of the groups' attributions, the least over groups
    weight      (c_1 / std scored)^2, the scale of the k-term's attribution by E2
    share       [time, part]: the k-term's gradient by the velocities it passes through, projected
                on the whole; parts add up to 1

In the matched form member, group and weight are 1 by construction. null stands where a gradient is
zero. Gradients are of what is trained, in the run's form and reduction, and means over ranks;
without clip, KL, ratio normalisation and the weights of terms and steps, so that k-terms are also
compared where --step-weights gamma leaves them out. Nothing of the run is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

import pave_grpo as pave
from zoo import style
from zoo.training import policies
from zoo.training.draw import chunked
from zoo.training.options import Options
from zoo.training.ranks import Ranks

Line = dict[str, Any]


def compare(
    o: Options,
    policy: policies.Policy,
    prompts: Sequence[str],
    rollout: pave.Rollout,
    advantages: Tensor,
    parts_of: Callable[[pave.Rollout, Tensor, int], Iterable[Any]],
    ranks: Ranks,
) -> list[Line]:
    """A line for every stochastic step and k, all but `iteration`; parts_of is train.py's."""
    lines = []
    grid = rollout.process.grid.tolist()
    for j, i in enumerate(rollout.sde_steps):
        one, A = step_of(rollout, advantages, j)
        parts = list(parts_of(one, A, o.update_batch))
        (original,) = gradients(o, policy, prompts, parts, 1, ranks)
        attributions = attribution(o, policy, prompts, one, A, ranks)
        for k in o.factors:
            through = gradients(o, policy, prompts, parts, k, ranks)
            t, s = grid[i : i + 2]
            place = {"step": i, "t": t, "s": s, "k": k}
            times = [t - call * (t - s) / k for call in range(k)]
            lines.append({**place, **beside(original, through, times), **attributions[k]})
    return lines


def step_of(rollout: pave.Rollout, advantages: Tensor, j: int) -> tuple[pave.Rollout, Tensor]:
    """The j-th stochastic step of a rollout, alone, with its advantages."""
    here = slice(j, j + 1)
    group = here if rollout.x_0.shape[1] == len(rollout.sde_steps) else slice(None)
    one = rollout._replace(
        sde_steps=rollout.sde_steps[here],
        x_t=rollout.x_t[:, here],
        x_s=rollout.x_s[:, here],
        log_prob=rollout.log_prob[:, here],
        x_0=rollout.x_0[:, group],
        v=None,
    )
    return one, advantages[:, group]


def gradients(
    o: Options,
    policy: policies.Policy,
    prompts: Sequence[str],
    parts: Sequence[Any],
    k: int,
    ranks: Ranks,
) -> list[Tensor]:
    """The k-term's gradient by theta through each of its velocities, vectors; their sum is all.

    A velocity's part is d v / d theta, taken again at the same state, times what the loss asks of
    that v, later velocities that depend on it included.
    """
    own: dict[str, Any] = {"factors": (), "term_weights": {1: 1.0}}
    if k > 1:
        own = {"factors": (k,), "term_weights": {1: 0.0, k: 1.0}}
    total: list[Tensor] = []
    for part in parts:
        velocity = policy.velocity(prompts[part.prompts])
        calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def recorded(
            x: Tensor, t: Tensor, prompt: Tensor, velocity: Any = velocity, calls: Any = calls
        ) -> Tensor:
            v: Tensor = velocity(x, t, prompt)
            calls.append((x.detach(), t, prompt, v))
            return v

        loss = pave.policy_loss(
            recorded,
            part.rollout,
            part.advantages,
            form=o.form,
            clip=None,
            reduction=o.reduction,
            **own,
        ).loss
        asked = torch.autograd.grad(part.share * loss, [v for *_, v in calls])
        found = []
        for (x, t, prompt, _), push in zip(calls, asked, strict=True):
            grads = torch.autograd.grad(
                velocity(x, t, prompt),
                policy.tuned,
                push,
                allow_unused=True,
                materialize_grads=True,
            )
            found.append(torch.cat([grad.flatten() for grad in grads]).double())
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return [ranks.mean(vector) for vector in total]


def beside(original: Tensor, through: Sequence[Tensor], times: Sequence[float]) -> Line:
    """original, norm, cosine and share of a k-term's gradient."""
    whole = torch.stack(list(through)).sum(0)
    size, sized = original.norm().item(), whole.norm().item()
    if size == 0 or sized == 0:
        return {"original": size, "norm": None, "cosine": None, "share": None}
    square = torch.dot(whole, whole)
    shares = [(torch.dot(part, whole) / square).item() for part in through]
    return {
        "original": size,
        "norm": sized / size,
        "cosine": (torch.dot(whole, original) / (sized * size)).item(),
        "share": [[time, share] for time, share in zip(times, shares, strict=True)],
    }


@torch.no_grad()
def attribution(
    o: Options,
    policy: policies.Policy,
    prompts: Sequence[str],
    one: pave.Rollout,
    advantages: Tensor,
    ranks: Ranks,
) -> dict[int, Line]:
    """member, group and weight of every k, at one step; null where no advantage is other than 0."""
    velocity = chunked(policy.velocity(prompts), o.rollout_batch)
    p = pave.rescore(velocity, one, o.factors)
    A = advantages.expand(one.x_s.shape[:3]).double()
    credit = {}
    for k, term in p.items():
        scored = p[1] if o.form == "matched" else term
        apart = (one.x_s - scored.mean).double()
        credit[k] = pave.per_row(A, apart) * apart
    speaking = (A != 0).any(-1)
    found = {}
    for k in o.factors:
        member = alike(credit[k], credit[1], 3)[A != 0]
        group = alike(credit[k].sum(2), credit[1].sum(2), 2)[speaking]
        scored = p[1] if o.form == "matched" else p[k]
        sums = ranks.gather((member.sum().item(), member.numel(), group.tolist()))
        number = sum(n for _, n, _ in sums)
        groups = [value for *_, values in sums for value in values]
        found[k] = {
            "member": sum(total for total, *_ in sums) / number if number else None,
            "group": min(groups) if groups else None,
            "weight": (p[1].std / scored.std).square().flatten()[0].item(),
        }
    return found


def alike(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """Cosine over all but the first axes."""
    return torch.cosine_similarity(a.flatten(axes), b.flatten(axes), dim=-1)


# ---- The picture ---------------------------------------------------------------------------------


@style.styled
def draw_comparison(lines: Sequence[Line]) -> Figure:
    """Over the run: direction, size, and where in time the largest k's gradient acts.

    A row for each stochastic step.
    """
    steps = sorted({line["step"] for line in lines})
    ks = sorted({line["k"] for line in lines})
    figure = style.canvas(
        1.3 + 2.1 * len(steps),
        "The k-terms beside the original, on the run's own rollouts",
        "Left: cosine with the original, of parameter gradients (lines), of a group's attribution\n"
        "(crosses, the least) and of members' (dots). Middle: size of the gradient over the\n"
        f"original's (lines), and (c_1/c_k)² (dashes). Right: shares of k = {ks[-1]} by time.",
    )
    axes = figure.subplots(len(steps), 3, sharex=True, squeeze=False)
    for row, step in zip(axes, steps, strict=True):
        own = [line for line in lines if line["step"] == step and line["cosine"] is not None]
        draw_step(row, own, ks)
        row[0].set_ylabel(f"step {step}")
    for ax, title in zip(axes[0], ("cosine", "size", f"share, k = {ks[-1]}"), strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in axes:
        row[2].yaxis.set_major_formatter(PercentFormatter(1.0))
        low, high = row[2].get_ylim()
        row[2].set_ylim(min(0.0, low), high + 0.6 * (high - min(0.0, low)))  # room for the legend
    axes[0][0].legend(fontsize=8, frameon=False)
    axes[0][2].legend(fontsize=8, frameon=False)
    return figure


def draw_step(row: Sequence[Any], lines: Sequence[Line], ks: Sequence[int]) -> None:
    """One step's three panels."""
    for k, colour in zip(ks, style.PALETTE * len(ks)):
        own = [line for line in lines if line["k"] == k]
        at = [line["iteration"] for line in own]
        row[0].plot(at, [line["cosine"] for line in own], "-", color=colour, label=f"k = {k}")
        row[0].plot(at, [line["group"] for line in own], "x", color=colour, markersize=5)
        row[0].plot(at, [line["member"] for line in own], ".", color=colour, markersize=5)
        row[1].plot(at, [line["norm"] for line in own], "-", color=colour)
        row[1].plot(at, [line["weight"] for line in own], "--", color=colour, linewidth=1)
    last = [line for line in lines if line["k"] == ks[-1]]
    for call in range(ks[-1]):
        at = [line["iteration"] for line in last]
        shares = [line["share"][call][1] for line in last]
        time = last[0]["share"][call][0] if last else 0.0
        row[2].plot(at, shares, color=style.PALETTE[call % 6], label=f"t = {time:.3f}")
