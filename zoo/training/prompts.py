"""What a model is asked, and the randomness that belongs to each question.

Prompts come from text files, one per line, or from the embedded world. Training prompts are drawn; held-out ones have
a fixed order and fixed noise, the same before and after and for every seed: IMAGES_PER_PROMPT pictures of each, and
again where more are asked for than there are prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.shapes import world as shapes

IMAGES_PER_PROMPT = (
    4  # of a held-out prompt, each from its own noise: diversity is measured among them
)


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator of its own stream for every tuple of integers, of any length (SeedSequence pads with zeros)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def read(path: str | Path) -> tuple[list[str], list[str]]:
    """(prompts, report): distinct prompts in their order; a line for each line left out, empty or seen before.

    UTF-8, with or without a byte order mark; spaces around a prompt are not part of it. Raises ValueError for a file
    that cannot be read or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts {str(path)!r}: cannot be read ({error}); must be a text file in UTF-8"
        ) from None
    first, report = {}, []
    for number, prompt in enumerate(map(str.strip, lines), 1):
        if not prompt:
            report.append(f"{path}, line {number}: empty, left out")
        elif prompt in first:
            report.append(
                f"{path}, line {number}: {prompt!r} is line {first[prompt]} again, left out"
            )
        else:
            first[prompt] = number
    if not first:
        raise ValueError(f"prompts {str(path)!r}: must hold at least one prompt")
    return list(first), report


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and to judge by; what was noticed about their files."""

    train: tuple[str, ...] = shapes.TRAIN_PROMPTS
    heldout: tuple[str, ...] = shapes.HELDOUT_PROMPTS
    report: tuple[str, ...] = ()

    @classmethod
    def of_files(cls, train: str | Path, heldout: str | Path) -> Prompts:
        """Raises ValueError for a file that cannot be used, or for a held-out prompt that is a training prompt."""
        (one, before), (two, after) = read(train), read(heldout)
        for prompt in two:
            if prompt in one:
                raise ValueError(
                    f"prompts {str(heldout)!r}: {prompt!r} is a training prompt; must be held out"
                )
        return cls(tuple(one), tuple(two), (*before, *after))

    def draw(self, generator: torch.Generator) -> str:
        """A training prompt, each as likely."""
        return self.train[int(torch.randint(len(self.train), (), generator=generator))]

    def in_order(self) -> list[str]:
        """The held-out prompts in their fixed random order."""
        return [
            self.heldout[i]
            for i in torch.randperm(len(self.heldout), generator=generator_of(0)).tolist()
        ]

    def pairs(self, shape: tuple[int, ...], n: int) -> tuple[list[str], Tensor]:
        """The first n held-out (prompt, noise) pairs: n prompts, noise [n, *shape], IMAGES_PER_PROMPT each in turn."""
        turns = [prompt for _, prompt in zip(range(n // IMAGES_PER_PROMPT), cycle(self.in_order()))]
        noise = [
            torch.randn(IMAGES_PER_PROMPT, *shape, generator=generator_of(0, j))
            for j in range(len(turns))
        ]
        return [prompt for prompt in turns for _ in range(IMAGES_PER_PROMPT)], torch.cat(noise)

    def shown(
        self, shape: tuple[int, ...], kind: Callable[[str], str], n: int = 8
    ) -> tuple[list[str], Tensor]:
        """Up to n held-out prompts, as many of each kind, and their noise [n, 4, *shape]: what pictures show."""
        kinds: dict[str, list[str]] = {}
        for prompt in self.in_order():
            kinds.setdefault(kind(prompt), []).append(prompt)
        in_turn = [prompt for turn in zip_longest(*kinds.values()) for prompt in turn if prompt][:n]
        prompts = sorted(in_turn, key=kind)
        return prompts, torch.stack(
            [torch.randn(4, *shape, generator=generator_of(1, i)) for i in range(len(prompts))]
        )
