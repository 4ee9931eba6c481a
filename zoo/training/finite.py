"""Numbers that are not finite: found before weights move, told by name, on every rank alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.training.ranks import Ranks, Stopped


class Found(NamedTuple):
    """A quantity with a value that is not finite."""

    quantity: str
    prompt: str  # whose it is; "" where it is nobody's
    values: list[float]  # some of those that are not finite


class NotFinite(Stopped):
    """A run that cannot go on with such numbers.

    keep   the weights are still those after the last iteration, so that they can be saved
    """

    def __init__(self, iteration: int, found: Found, keep: bool):
        self.keep = keep
        self.report = {"iteration": iteration, **found._asdict()}
        of = f" of prompt {found.prompt!r}" if found.prompt else ""
        said = f"{found.quantity}{of} is {found.values[0]}, which is not finite"
        super().__init__(f"iteration {iteration}: {said}")


def require(ranks: Ranks, iteration: int, found: Found | None, keep: bool = False) -> None:
    """Raise NotFinite on every rank, with what the first has that has found anything."""
    if not ranks.all(found is None):
        first = next(one for one in ranks.gather(found) if one)
        raise NotFinite(iteration, first, keep)


def among(quantity: str, prompts: Sequence[str], values: Tensor) -> Found | None:
    """The first of the prompts with such a value, and up to eight of its; values [prompts, ...]."""
    finite = values.flatten(1).isfinite().all(1).tolist()
    if all(finite):
        return None
    worst = finite.index(False)
    return Found(quantity, prompts[worst], not_finite(values[worst]))


def weights(tuned: Sequence[Tensor]) -> Found | None:
    """The first of these weights, or of this rank's parts of them, with such a number."""
    parts = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in tuned]
    finite = torch.stack([part.isfinite().all() for part in parts]).tolist()
    return None if all(finite) else Found("a weight", "", not_finite(parts[finite.index(False)]))


def not_finite(values: Tensor) -> list[float]:
    """Up to eight of the values that are not finite."""
    found: list[float] = values[~values.isfinite()][:8].tolist()
    return found
