"""A network like the shipped one, narrow, coarse and drawn at random: runs of it are soon over.

It draws nothing that the rule knows, so that a run that should learn needs a reward of any picture.
"""

from __future__ import annotations

from pathlib import Path

import torch

from zoo.shapes.model import Config, ShapesFlow, save


def write(path: Path) -> Path:
    """Its checkpoint, the same every time."""
    config = Config(width=32, depth=2, heads=2, patch=8, stem=4, head=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ShapesFlow(config)
        with torch.no_grad():
            for p in network.parameters():  # also of what starts closed
                p.add_(0.1 * torch.randn_like(p))
    save(network, path, dtype=torch.float32)
    return path
