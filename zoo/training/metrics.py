"""What is written of an iteration; docs/RUNS.md says what each metric means."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import pave_grpo as pave

Metrics = dict[str, float]


def measure(result: pave.PolicyLoss, advantages: Tensor) -> dict[str, float | Tensor]:
    """The metrics of one loss, some of them on its device: `fetch` them with those of all parts."""
    metrics: dict[str, float | Tensor] = {
        "loss": result.loss.detach(),
        "kl": result.kl,
        "sampling_gap_max": result.old.sampling_gap,
        "signal": (advantages != 0).float().mean(),
    }
    for k, term in result.terms.items():
        metrics[f"ratio_{k}"] = term.ratio_mean
        metrics[f"ratio_{k}_min"] = term.ratio_min
        metrics[f"ratio_{k}_max"] = term.ratio_max
        metrics[f"clip_fraction_{k}"] = term.clip_fraction
        metrics[f"weight_{k}"] = term.effective_weight.mean().item()
    return metrics


def fetch(parts: Sequence[Mapping[str, float | Tensor]]) -> list[Metrics]:
    """The same as numbers, by one copy from the device: each would be waited for."""
    away = [
        value.double() for part in parts for value in part.values() if isinstance(value, Tensor)
    ]
    found = iter(torch.stack(away).tolist())
    return [
        {name: next(found) if isinstance(value, Tensor) else value for name, value in part.items()}
        for part in parts
    ]


def merge(parts: Sequence[Metrics], shares: Sequence[float] = ()) -> Metrics:
    """Metrics of parts or ranks as one: extremes of _min and _max, means of the rest.

    A part weighs by its share of the states (default: all alike); its clip fraction, which is one
    of members with a signal, by their number, and its rewards by the groups that have any.
    """
    shares = shares or [1.0] * len(parts)
    rewarded = [
        z * (1 - part.get("poisoned_groups", 0)) for z, part in zip(shares, parts, strict=True)
    ]
    signal = [share * part["signal"] for share, part in zip(shares, parts, strict=True)]
    merged: Metrics = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.endswith("_min"):
            merged[name] = min(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        elif name.startswith("clip_fraction") and any(signal):
            merged[name] = statistics.fmean(values, signal)
        elif name.startswith("reward") and any(rewarded):
            merged[name] = statistics.fmean(values, rewarded)
        else:
            merged[name] = statistics.fmean(values, shares)
    return merged
