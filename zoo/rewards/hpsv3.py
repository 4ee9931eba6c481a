"""HPSv3, as `--reward zoo.rewards.hpsv3:reward`: an example of wrapping somebody else's package.

    pip install hpsv3    not in requirements.txt: it brings its own versions of other packages

HPSv3 is a Qwen2-VL of 7 billion parameters whose head gives (mu, sigma) of a preference score; the
reward is mu. The package takes picture files, so pictures are written out as 8-bit PNG first. It
was tested against a stand-in of the package's interface only: the package has not been run here.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from hpsv3 import HPSv3RewardInferencer
from PIL import Image
from torch import Tensor


@functools.cache
def scorer(device: str) -> HPSv3RewardInferencer:
    """The package's model, loaded on first use, once for each device."""
    return HPSv3RewardInferencer(device=device)


@torch.no_grad()
def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """mu of images float [B, 3, H, W] in [0, 1] and B prompts: float32 [B] on the CPU."""
    bytes_ = (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{i}.png")) for i in range(len(images))]
        for file, pixels in zip(files, bytes_, strict=True):
            Image.fromarray(pixels).save(file)
        scores = scorer(str(images.device)).reward(prompts=list(prompts), image_paths=files)
    return torch.stack([torch.as_tensor(score).flatten()[0].float().cpu() for score in scores])
