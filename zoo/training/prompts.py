"""What a model is asked, and the randomness that belongs to each question.

Prompts come from text files, one per line, or from the embedded world. Training prompts are drawn.
Held-out ones have a fixed order and fixed noise, the same before and after and for every seed:
IMAGES_PER_PROMPT pictures of each, and again where more are asked for than there are prompts.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.shapes import world

IMAGES_PER_PROMPT = 4  # of a held-out prompt, each from its own noise: diversity is among them


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator with a stream of its own for every tuple of integers, of any length."""
    # SeedSequence pads with zeros: the length tells (0,) from (0, 0).
    state = np.random.SeedSequence((len(key), *key)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def read(path: str | Path) -> tuple[list[str], list[str]]:
    """(prompts, report): distinct prompts in their order, and a line for each line left out.

    Left out is what is empty or seen before. UTF-8, with or without a byte order mark; a line ends
    with \\n or \\r\\n, and spaces around a prompt are not part of it. Raises ValueError for a
    file that cannot be read, holds a NUL, or has no prompt.
    """
    at = f"prompts {str(path)!r}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{at}: cannot be read ({said}); must be a text file in UTF-8") from None
    first: dict[str, int] = {}
    report = []
    # Not splitlines, which would cut a prompt at a form feed or a U+2028 in it.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        prompt = line.strip()
        if "\0" in prompt:
            raise ValueError(f"{at}, line {number}: holds a NUL; must be text")
        if not prompt:
            report.append(f"{path}, line {number}: empty, left out")
        elif prompt in first:
            again = f"{prompt!r} is line {first[prompt]} again, left out"
            report.append(f"{path}, line {number}: {again}")
        else:
            first[prompt] = number
    if not first:
        raise ValueError(f"{at}: must hold at least one prompt")
    return list(first), report


def folded(prompt: str) -> str:
    """A form that prompts share which differ in case or in how accents are encoded alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", prompt).casefold())


def summarised(report: Sequence[str], most: int = 8) -> list[str]:
    """A report of at most `most` lines, and how many more there are."""
    more = len(report) - most
    return [*report[:most], f"... and {more} lines more of this kind"] if more > 0 else list(report)


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and to judge by; what was noticed about their files."""

    train: tuple[str, ...] = world.TRAIN_PROMPTS
    heldout: tuple[str, ...] = world.HELDOUT_PROMPTS
    report: tuple[str, ...] = ()

    @classmethod
    def of_files(cls, train: str | Path, heldout: str | Path) -> Prompts:
        """Those of two files.

        Raises ValueError for a file that cannot be used, or a held-out prompt that is trained on,
        in other letters or accents too.
        """
        ours, report = read(train)
        held, report_held = read(heldout)
        trained = set(map(folded, ours))
        for prompt in held:
            if folded(prompt) in trained:
                wanted = f"{prompt!r} is a training prompt; must be held out"
                raise ValueError(f"prompts {str(heldout)!r}: {wanted}")
        both = [*summarised(report), *summarised(report_held)]
        return cls(tuple(ours), tuple(held), tuple(both))

    def digest(self) -> str:
        """SHA-256 of all prompts, in order."""
        told = json.dumps([self.train, self.heldout]).encode()
        return hashlib.sha256(told).hexdigest()

    def draw(
        self, seed: int, iteration: int, indices: Iterable[int]
    ) -> tuple[list[str], list[torch.Generator]]:
        """Training prompts of an iteration, each as likely, and the generators of their noise.

        The choice and the noise of a prompt depend on (seed, iteration, its index) alone.
        """
        prompts, generators = [], []
        for index in indices:
            generator = generator_of(seed, iteration, index)
            choice = int(torch.randint(len(self.train), (), generator=generator))
            prompts.append(self.train[choice])
            generators.append(generator)
        return prompts, generators

    def in_order(self) -> list[str]:
        """The held-out prompts in their fixed random order."""
        order = torch.randperm(len(self.heldout), generator=generator_of(0))
        return [self.heldout[i] for i in order.tolist()]

    def pairs(self, shape: tuple[int, ...], n: int) -> tuple[list[str], Tensor]:
        """The first n held-out (prompt, noise) pairs: n prompts, noise [n, *shape].

        IMAGES_PER_PROMPT pairs of each prompt in turn.
        """
        turns = list(islice(cycle(self.in_order()), n // IMAGES_PER_PROMPT))
        noise = [
            torch.randn(IMAGES_PER_PROMPT, *shape, generator=generator_of(0, j))
            for j in range(len(turns))
        ]
        return [prompt for prompt in turns for _ in range(IMAGES_PER_PROMPT)], torch.cat(noise)

    def shown(
        self, shape: tuple[int, ...], kind: Callable[[str], str], n: int = 8
    ) -> tuple[list[str], Tensor]:
        """What pictures show: up to n held-out prompts, their noise [n, IMAGES_PER_PROMPT, *shape].

        As many of each kind of prompt, kinds one after another.
        """
        kinds: dict[str, list[str]] = {}
        for prompt in self.in_order():
            kinds.setdefault(kind(prompt), []).append(prompt)
        in_turn = [prompt for turn in zip_longest(*kinds.values()) for prompt in turn if prompt]
        prompts = sorted(in_turn[:n], key=kind)
        noise = [
            torch.randn(IMAGES_PER_PROMPT, *shape, generator=generator_of(1, i))
            for i in range(len(prompts))
        ]
        return prompts, torch.stack(noise)
