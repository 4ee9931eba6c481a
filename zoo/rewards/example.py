"""A reward of your own, as `--reward zoo.rewards.example:warmth`: any function of this signature in any module.

Called with at most --reward-batch pictures at a time, on the device where they were drawn; what it returns is checked
(one finite number an image) and logged as reward_<name>. A model it needs is loaded once, at import or on first call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """mean red - mean blue of a picture: images float [B, 3, H, W] in [0, 1], B prompts (not read) -> float [B]."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Standard deviation of a picture's values, float [B]: something else to judge warmer pictures by."""
    return images.flatten(1).std(1)
