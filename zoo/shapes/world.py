"""A world of coloured shapes: the prompts it knows, and pictures of them. No network lives here.

    grammar   count         "a red circle", "two red circles", "three red circles"
              conjunction   "a red circle and two blue squares"  two colours, at most 3 objects
              relation      "a blue square left of a green triangle"  or right of, above, below
    picture   float [B, 3, 32, 32] in [0, 1], four flat colours on a light ground, none overlapping

The rule that judges pictures (rule.py) shares the tables and `outlines` with the drawing, so that
what is drawn and what is recognised cannot drift apart.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 32  # side of the picture, in pixels
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
COUNTS = ("a", "two", "three")
# From the first object to the second, in pixels (x to the right, y downwards).
DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}

BACKGROUND = (0.96, 0.95, 0.92)
PALETTE = ((0.86, 0.16, 0.16), (0.16, 0.62, 0.24), (0.15, 0.32, 0.85), (0.95, 0.78, 0.10))


# ---- Grammar -------------------------------------------------------------------------------------


class Group(NamedTuple):
    """`number` (1..3) objects of one colour (index in COLOURS) and one shape (index in SHAPES)."""

    number: int
    colour: int
    shape: int

    def __str__(self) -> str:
        plural = "s" if self.number > 1 else ""
        return f"{COUNTS[self.number - 1]} {COLOURS[self.colour]} {SHAPES[self.shape]}{plural}"


class Scene(NamedTuple):
    """What a prompt asks for; `relation` is None, or how groups[0] lies to groups[1]."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def family(self) -> str:
        """One of "count", "conjunction" and "relation"."""
        if self.relation:
            return "relation"
        return "conjunction" if len(self.groups) == 2 else "count"

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.groups))

    def key(self) -> str:
        """One name for all wordings: "A and B" is "B and A", "A right of B" is "B left of A"."""
        if self.relation == "right of":
            return str(Scene(self.groups[::-1], "left of"))
        if self.relation == "below":
            return str(Scene(self.groups[::-1], "above"))
        return str(self if self.relation else Scene(tuple(sorted(self.groups))))


def _scenes() -> list[Scene]:
    """All scenes of the grammar: 36 counts, 324 conjunctions, 432 relations."""
    kinds = list(product(range(len(COLOURS)), range(len(SHAPES))))
    pairs = [(a, b) for a, b in permutations(kinds, 2) if a[0] != b[0]]
    numbers = ((1, 1), (1, 2), (2, 1))
    counts = [Scene((Group(n, *kind),)) for n in (1, 2, 3) for kind in kinds]
    conjunctions = [Scene((Group(m, *a), Group(n, *b))) for m, n in numbers for a, b in pairs]
    relations = [Scene((Group(1, *a), Group(1, *b)), word) for word in DIRECTIONS for a, b in pairs]
    return counts + conjunctions + relations


_SCENE_OF = {str(scene): scene for scene in _scenes()}


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for. Raises ValueError for a prompt outside the grammar."""
    if not isinstance(prompt, str) or prompt not in _SCENE_OF:
        raise ValueError(
            f"prompt {prompt!r} is not in the grammar of shapes; write for example "
            "'two red circles', 'a red circle and two blue squares' or "
            "'a blue square left of a green triangle'"
        )
    return _SCENE_OF[prompt]


def is_heldout(prompt: str) -> bool:
    """Is the prompt held out of alignment (never of pretraining)? True for 19 % of all prompts.

    It is where the checksum of its scene's key is divisible by six: CRC-32 is the same on every
    machine, and by the key a scene is held out in all its wordings, so that no held-out prompt is a
    training prompt turned round. These are 7 counts, 64 conjunctions and 80 relations.
    """
    return zlib.crc32(parse(prompt).key().encode()) % 6 == 0


PROMPTS = tuple(_SCENE_OF)
HELDOUT_PROMPTS = tuple(prompt for prompt in PROMPTS if is_heldout(prompt))
TRAIN_PROMPTS = tuple(prompt for prompt in PROMPTS if not is_heldout(prompt))
FAMILIES = {
    family: tuple(prompt for prompt in PROMPTS if parse(prompt).family == family)
    for family in ("count", "conjunction", "relation")
}


# ---- Geometry ------------------------------------------------------------------------------------

# Every shape of radius r has the area pi r^2 of the circle, so that size says nothing about shape.
_SQUARE = math.sqrt(math.pi) / 2  # half side / r
_TRIANGLE = math.sqrt(math.pi / (3 * math.sqrt(3)))  # inradius / r of the equilateral one, apex up


def outlines(cx: Tensor, cy: Tensor, r: Tensor) -> Tensor:
    """Coverage of each pixel by each shape of centroid (cx, cy) and radius r, in pixels, all [...].

    clamp(1/2 - d, 0, 1), with d the signed distance from the pixel's centre to the outline: exact
    along straight upright edges, without supersampling. Returns [..., 3, SIZE, SIZE] in [0, 1], in
    the order of SHAPES.
    """
    pixel = torch.arange(SIZE, dtype=r.dtype, device=r.device) + 0.5
    x = (pixel - cx[..., None])[..., None, :].abs()  # [..., 1, SIZE]: shapes are their mirror image
    y = (pixel - cy[..., None])[..., :, None]  # [..., SIZE, 1]
    r = r[..., None, None]
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x, y.abs()) - _SQUARE * r
    triangle = torch.maximum(y, math.sqrt(0.75) * x - 0.5 * y) - _TRIANGLE * r
    return (0.5 - torch.stack([circle, square, triangle], dim=-3)).clamp(0, 1)


def directions(scenes: Sequence[Scene], device: str | torch.device) -> Tensor:
    """From the first object to the second, float32 [B, 2 (x, y)]; (0, 0) without a relation."""
    rows = [DIRECTIONS[s.relation] if s.relation else (0, 0) for s in scenes]
    return torch.tensor(rows, dtype=torch.float32, device=device).view(-1, 2)


def lies_along(dx: Tensor, dy: Tensor, direction: Tensor, margin: float, slope: float) -> Tensor:
    """Does (dx, dy) go `margin` pixels along `direction`, and `slope` times as far as across it?

    direction [..., 2] is a unit vector, or (0, 0), along which everything lies. Returns bool [...].
    """
    along = dx * direction[..., 0] + dy * direction[..., 1]
    across = (dx * direction[..., 1] - dy * direction[..., 0]).abs()
    return ((along > margin) & (along > slope * across)) | (direction == 0).all(-1)


# ---- Drawing -------------------------------------------------------------------------------------

_MOST = 3  # objects in a picture
_RADII = {1: (4.5, 6.5), 2: (3.8, 5.4), 3: (3.4, 4.6)}  # range of r, by the number of objects
_EXTENT = (  # of each shape / r: half its width, its height above and below the centroid
    (1.0, 1.0, 1.0),
    (_SQUARE, _SQUARE, _SQUARE),
    (math.sqrt(3) * _TRIANGLE, 2 * _TRIANGLE, _TRIANGLE),
)
_EDGE = 1.0  # least distance to the frame
_GAP = 2.5  # least distance between objects
_TRIES = 32  # layouts drawn at once for each picture that has none yet


class _Layout(NamedTuple):
    """Objects as bounding boxes in pixels: every field is [b, tries, 3 objects]."""

    x: Tensor  # of the centroid
    y: Tensor
    r: Tensor
    half: Tensor  # half the width
    up: Tensor  # from the centroid to the top
    down: Tensor  # from the centroid to the bottom

    def apart(self, i: int, j: int) -> Tensor:
        """bool [b, tries]: is there _GAP between objects i and j, sideways or up and down?"""
        width = self.half[..., i] + self.half[..., j]
        sideways = (self.x[..., i] - self.x[..., j]).abs() > width + _GAP
        top = self.y - self.up
        i_above_j = top[..., j] - self.y[..., i] - self.down[..., i] > _GAP
        j_above_i = top[..., i] - self.y[..., j] - self.down[..., j] > _GAP
        return sideways | i_above_j | j_above_i


def _try_layouts(radii: Tensor, extent: Tensor, generator: torch.Generator) -> _Layout:
    """_TRIES random layouts a picture, inside the frame but perhaps overlapping.

    radii [b, 2] is the range of r, extent [b, 3 objects, 3] the rows of _EXTENT.
    """
    u = torch.rand(len(radii), _TRIES, 3, _MOST, generator=generator)  # for x, y and r
    smallest, largest = radii[:, 0].view(-1, 1, 1), radii[:, 1].view(-1, 1, 1)
    r = smallest + u[:, :, 2] * (largest - smallest)
    half = extent[:, None, :, 0] * r
    up = extent[:, None, :, 1] * r
    down = extent[:, None, :, 2] * r
    x = _EDGE + half + u[:, :, 0] * (SIZE - 2 * _EDGE - 2 * half)
    y = _EDGE + up + u[:, :, 1] * (SIZE - 2 * _EDGE - up - down)
    return _Layout(x, y, r, half, up, down)


def _place(
    shape: Tensor, present: Tensor, direction: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, y, r of the objects, each [B, 3], by rejection: none overlap, and relations hold.

    shape int64 [B, 3], present bool [B, 3], direction [B, 2] as from `directions`.
    """
    radii = torch.tensor([_RADII[int(n)] for n in present.sum(1)]).view(-1, 2)
    extent = torch.tensor(_EXTENT)[shape]
    place = torch.empty(len(shape), 3, _MOST)
    todo = torch.arange(len(shape))  # pictures without a layout
    while len(todo):
        layout = _try_layouts(radii[todo], extent[todo], generator)
        dx = layout.x[..., 1] - layout.x[..., 0]
        dy = layout.y[..., 1] - layout.y[..., 0]
        # Drawn with a wider margin than the rule asks, so that pictures are clear cases.
        fits = lies_along(dx, dy, direction[todo, None], margin=7.0, slope=1.4)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            both = present[todo, i] & present[todo, j]
            fits = fits & (layout.apart(i, j) | ~both[:, None])
        found, first = fits.max(1)
        drawn = torch.stack([layout.x, layout.y, layout.r], 2)
        place[todo[found]] = drawn[found, first[found]]
        todo = todo[~found]
    return place[:, 0], place[:, 1], place[:, 2]


def draw(prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """Pictures of the prompts, places and sizes at random: float32 [B, 3, SIZE, SIZE] in [0, 1].

    On the CPU, as the generator is. Raises ValueError for a prompt outside the grammar.
    """
    scenes = [parse(prompt) for prompt in prompts]
    rows = []
    for scene in scenes:
        objects = [group for group in scene.groups for _ in range(group.number)]
        rows.append(objects + [Group(0, 0, 0)] * (_MOST - len(objects)))
    table = torch.tensor(rows, dtype=torch.long).view(-1, _MOST, 3)  # [B, 3 objects, Group]
    present = table[..., 0] > 0
    colour = table[..., 1]
    shape = table[..., 2]
    x, y, r = _place(shape, present, directions(scenes, "cpu"), generator)

    picture = torch.arange(len(scenes))[:, None]
    cover = outlines(x, y, r)[picture, torch.arange(_MOST), shape]  # [B, 3 objects, SIZE, SIZE]
    cover = cover * present[..., None, None]
    background = torch.tensor(BACKGROUND)
    paint = torch.tensor(PALETTE)[colour] - background  # [B, 3 objects, RGB]
    return background[:, None, None] + torch.einsum("bnhw,bnc->bchw", cover, paint)
