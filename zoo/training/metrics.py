"""The metrics of an iteration."""

from __future__ import annotations

import statistics

from torch import Tensor

import pave_grpo as pave


def measure(result: pave.PolicyLoss, advantages: Tensor) -> dict:
    """The metrics of one loss."""
    metrics = {
        "loss": result.loss.item(),
        "kl": result.kl,
        "sampling_gap_max": result.old.sampling_gap,
        "signal": (advantages != 0).float().mean().item(),
    }
    for k, term in result.terms.items():
        metrics |= {
            f"ratio_{k}": term.ratio_mean,
            f"ratio_{k}_min": term.ratio_min,
            f"ratio_{k}_max": term.ratio_max,
            f"clip_fraction_{k}": term.clip_fraction,
            f"weight_{k}": term.effective_weight.mean().item(),
        }
    return metrics


def merge(parts: list[dict]) -> dict:
    """Metrics of parts or ranks as one: extremes of what is named _min or _max, means of the rest, by their share.

    A clip fraction is of the members with a signal, and weighs by their number.
    """
    merged, shares = {}, [part.get("share", 1.0) for part in parts]
    signal = [share * part["signal"] for share, part in zip(shares, parts)]
    for name in parts[0]:
        values = [part[name] for part in parts]
        weights = signal if name.startswith("clip_fraction") and sum(signal) else shares
        merged[name] = (
            min(values)
            if name.endswith("_min")
            else max(values)
            if name.endswith("_max")
            else statistics.fmean(values, weights)
        )
    merged.pop("share", None)
    return merged
