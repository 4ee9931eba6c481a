"""A reward of your own, as `--reward zoo.rewards.example:warmth`: any such function in any module.

It is given at most --reward-batch pictures at a time. What it returns is checked (one finite number
an image) and logged as reward_<name>. Load a model once, at import or on the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """mean red - mean blue of images [B, 3, H, W] in [0, 1]: [B]; the prompts are not read."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Standard deviation of a picture's values, [B] >= 0: something else to judge warmth by."""
    return images.flatten(1).std(1)
