"""The rule: reads any picture without a network, and scores it by what a prompt asks.

    pixel -> colour and coverage -> connected component -> shape -> number, colours, relation, dirt

The rule is meant to be checked by eye, and to be a reward, hence to be attacked. What it refuses:

    specks, noise          components below MIN_AREA pixels, and pixels unlike every palette colour,
                           are dirt: more than CLEAN_SHARE of it is not right, and dirt scales the
                           whole score
    fog, a tinted ground   a background pixel must be close to the background colour, not only
                           closest to it
    pale or mixed colours  likewise inside an object; only its border, one pixel each way, may blend
    blobs, merged or cut   the best outline must share MIN_OVERLAP of its union with the object
    a giant shape          an object above MAX_AREA pixels has no shape
    a bit of everything    credit is divided by the number of objects found where it exceeds the
                           number asked
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.shapes.world import (
    BACKGROUND,
    COLOURS,
    FAMILIES,
    PALETTE,
    SHAPES,
    SIZE,
    Scene,
    directions,
    draw,
    lies_along,
    outlines,
    parse,
)

MIN_AREA, MAX_AREA = 12, 256  # pixels of an object; the smallest one drawn has 36, the largest 133
MIN_OVERLAP = 0.85  # intersection over union with the best outline; drawn objects have 0.96 or more
COLOUR_RADIUS = 0.30  # Euclidean distance in RGB within which a pixel is of a palette colour
CLEAN_SHARE, DIRTY_SHARE = 0.01, 0.20  # share of dirt still clean; share that leaves no credit
WEIGHTS = {"objects": 0.4, "colours": 0.2, "number": 0.2, "relation": 0.2}
_NO_SHAPE = len(SHAPES)  # the number of an object's shape when it has none of them


class Judgement(NamedTuple):
    """What the rule says of each picture; every field is [B], on the device of the pictures.

    n objects are asked, m found; an extra one costs as much as a missing one:
        objects   found objects that have an asked colour and shape, over max(n, m)
        colours   found objects that have an asked colour, whatever their shape, over max(n, m)
        number    max(0, 1 - |m - n| / n)
        relation  1 if the two asked colours are there and lie as asked, else 0; 1 and without
                  weight where no relation is asked
        clean     1 up to CLEAN_SHARE of dirt, 0 from DIRTY_SHARE on, linear between
    """

    score: Tensor  # clean * mean by WEIGHTS of the first four, in [0, 1]
    right: Tensor  # bool: every part is 1, which is to say that the score is 1
    objects: Tensor
    colours: Tensor
    number: Tensor
    relation: Tensor
    clean: Tensor


# ---- Pixels --------------------------------------------------------------------------------------


class _Pixels(NamedTuple):
    """Every pixel read as background + a (colour - background), by the colour that fits best."""

    cover: Tensor  # a in [0, 1] by each of the colours, [B, 4, SIZE, SIZE]
    solid: Tensor  # bool, alike: the best colour, where its a >= 1/2
    blend: Tensor  # distance to the nearest such mixture, [B, SIZE, SIZE]
    plain: Tensor  # distance to the nearest colour or the background, unmixed, alike


def _unmix(images: Tensor) -> _Pixels:
    """Read pixels by least squares, for each colour: minimise |offset - a towards|^2 over a.

    A blend keeps its direction from the background, so the edge of a red shape never looks yellow,
    as it does to a nearest-colour rule: half-way from red to the background is nearest to yellow.
    """
    background = torch.tensor(BACKGROUND, dtype=images.dtype, device=images.device)
    palette = torch.tensor(PALETTE, dtype=images.dtype, device=images.device)
    towards = palette - background  # [4, RGB]
    offset = images - background[:, None, None]  # [B, RGB, SIZE, SIZE]
    dots = torch.einsum("bchw,kc->bkhw", offset, towards)
    length2 = towards.square().sum(1)[:, None, None]
    norm2 = offset.square().sum(1, keepdim=True)
    cover = (dots / length2).clamp(0, 1)
    blend2, best = (norm2 - 2 * cover * dots + cover.square() * length2).min(1)
    plain2 = torch.minimum((norm2 - 2 * dots + length2).amin(1), norm2[:, 0])
    is_best = torch.zeros_like(cover, dtype=torch.bool).scatter_(1, best[:, None], True)
    solid = is_best & (cover >= 0.5)
    # Rounding may leave a square slightly below zero.
    return _Pixels(cover, solid, blend2.clamp(min=0).sqrt(), plain2.clamp(min=0).sqrt())


def _spread(z: Tensor) -> Tensor:
    """The largest value in the 3 x 3 around each pixel of z [..., H, W] >= 0.

    By shifted copies, since max_pool2d is slower here.
    """
    z = pad(z, (1, 1, 1, 1))
    z = torch.maximum(torch.maximum(z[..., :-2], z[..., 1:-1]), z[..., 2:])
    return torch.maximum(torch.maximum(z[..., :-2, :], z[..., 1:-1, :]), z[..., 2:, :])


def _cleanliness(pixels: _Pixels, specks: Tensor) -> Tensor:
    """1 - dirt, rescaled as in `Judgement`, [B]. Only borders, a pixel each way, may be blends."""
    border = (_spread(pixels.solid) & _spread(~pixels.solid)).any(1)
    distance = torch.where(border, pixels.blend, pixels.plain)
    is_dirt = specks | (distance > COLOUR_RADIUS)
    dirt = is_dirt.to(distance.dtype).mean((1, 2))
    return ((DIRTY_SHARE - dirt) / (DIRTY_SHARE - CLEAN_SHARE)).clamp(0, 1)


# ---- Objects -------------------------------------------------------------------------------------


class _Objects(NamedTuple):
    """The N objects in a batch of pictures: every field is [N]."""

    picture: Tensor  # its index in the batch
    colour: Tensor
    shape: Tensor  # _NO_SHAPE if it fits no outline
    x: Tensor  # of the centroid
    y: Tensor


def _index(device: torch.device) -> Tensor:
    """A number from 1 for each pixel, int64 [SIZE, SIZE]."""
    return torch.arange(1, SIZE * SIZE + 1, device=device).view(SIZE, SIZE)


def _components(solid: Tensor) -> Tensor:
    """Label the 8-connected components of bool [B, 4, SIZE, SIZE] by the largest index in each.

    The largest index spreads a pixel a turn until nothing changes. Returns int64; 0 is no object.
    """
    label = _index(solid.device).short() * solid
    while True:
        before = label
        for _ in range(4):  # a comparison costs as much as a turn: compare rarely
            label = _spread(label) * solid
        if torch.equal(label, before):
            return label.long()


def _areas(label: Tensor) -> Tensor:
    """The number of pixels in each pixel's component, int64 like label; 0 outside components."""
    flat = label.flatten(2)
    count = torch.zeros(*flat.shape[:2], SIZE * SIZE + 1, dtype=torch.long, device=label.device)
    count.scatter_add_(2, flat, torch.ones_like(flat))
    return count.gather(2, flat).view_as(label) * (label > 0)


def _recognise(pixels: _Pixels) -> tuple[_Objects, Tensor]:
    """The objects in the pictures; and the specks, bool [B, SIZE, SIZE].

    Specks are components of less than MIN_AREA pixels, too small to be objects.
    """
    label = _components(pixels.solid)
    area = _areas(label)
    index = _index(label.device)
    # One pixel stands for each component: the one whose index is the label.
    is_object = (label == index) & (area >= MIN_AREA)
    picture, colour, row, column = is_object.nonzero(as_tuple=True)  # each [N]
    specks = ((area > 0) & (area < MIN_AREA)).any(1)

    # An object is its solid pixels and the share it covers of the unclaimed pixels around them.
    body = label[picture, colour] == index[row, column][:, None, None]  # [N, SIZE, SIZE]
    around = _spread(body) & ~pixels.solid.any(1)[picture]
    mass = (body | around) * pixels.cover[picture, colour]
    total = mass.sum((1, 2)).clamp(min=1e-6)
    centre = torch.arange(SIZE, dtype=mass.dtype, device=mass.device) + 0.5
    x = (mass.sum(1) * centre).sum(1) / total
    y = (mass.sum(2) * centre).sum(1) / total

    # Its shape is the outline of the same centroid and area that shares most with it.
    ideal = outlines(x, y, (total / math.pi).sqrt())  # [N, 3 shapes, SIZE, SIZE]
    mass = mass[:, None]
    shared = torch.minimum(ideal, mass).sum((2, 3))
    overlap = shared / torch.maximum(ideal, mass).sum((2, 3))
    best, shape = overlap.max(1)
    is_shape = (best >= MIN_OVERLAP) & (area[picture, colour, row, column] <= MAX_AREA)
    return _Objects(picture, colour, torch.where(is_shape, shape, _NO_SHAPE), x, y), specks


def _tally(objects: _Objects, values: Tensor, pictures: int) -> Tensor:
    """Sums of values [N] over the objects of each kind: [B, colour, shape or none]."""
    sums = torch.zeros(pictures, len(COLOURS), len(SHAPES) + 1, device=values.device)
    place = (objects.picture, objects.colour, objects.shape)
    return sums.index_put_(place, values, accumulate=True)


# ---- What is asked -------------------------------------------------------------------------------


def _asked(scenes: Sequence[Scene], device: torch.device) -> Tensor:
    """How many of each object the prompts ask, as `_tally` counts them; none without a shape."""
    asked = torch.zeros(len(scenes), len(COLOURS), len(SHAPES) + 1)
    for i, scene in enumerate(scenes):
        for group in scene.groups:
            asked[i, group.colour, group.shape] = group.number
    return asked.to(device)


def _related(scenes: Sequence[Scene], objects: _Objects, by_colour: Tensor) -> Tensor:
    """bool [B]: do the means of the first and second colour lie as the relation asks?

    True where none is asked. by_colour [B, colour] is the number of objects found.
    """
    direction = directions(scenes, by_colour.device)
    colours = [(scene.groups[0].colour, scene.groups[-1].colour) for scene in scenes]
    pair = torch.tensor(colours, dtype=torch.long, device=by_colour.device).view(-1, 2)
    both = (by_colour.gather(1, pair) > 0).all(1)
    number = by_colour.clamp(min=1)
    x = _tally(objects, objects.x, len(scenes)).sum(2) / number  # means, [B, colour]
    y = _tally(objects, objects.y, len(scenes)).sum(2) / number
    dx = x.gather(1, pair).diff(dim=1)[:, 0]
    dy = y.gather(1, pair).diff(dim=1)[:, 0]
    return ~direction.any(1) | (both & lies_along(dx, dy, direction, margin=3.0, slope=1.0))


# ---- The verdict ---------------------------------------------------------------------------------


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what is outside the contract of `judge`."""
    if images.dim() != 4 or images.shape[1:] != (3, SIZE, SIZE) or not images.is_floating_point():
        raise ValueError(
            f"images is {images.dtype} {list(images.shape)}; it must be float [B, 3, 32, 32]"
        )
    if len(prompts) != len(images):
        raise ValueError(
            f"prompts has {len(prompts)} entries; it must have one per image, {len(images)}"
        )
    # Written so that NaN fails too.
    if len(images) and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise ValueError(
            f"images spans [{images.min():.3g}, {images.max():.3g}]; it must lie in [0, 1]"
        )


@torch.no_grad()
def judge(images: Tensor, prompts: Sequence[str]) -> Judgement:
    """Judge each picture, float [B, 3, SIZE, SIZE] in [0, 1], by its prompt; rows are independent.

    Raises ValueError for pictures of another kind and for a prompt outside the grammar.
    """
    _check(images, prompts)
    scenes = [parse(prompt) for prompt in prompts]
    pixels = _unmix(images.float())
    objects, specks = _recognise(pixels)
    asked = _asked(scenes, images.device)  # [B, colour, shape]
    found = _tally(objects, torch.ones_like(objects.x), len(scenes))

    n, m = asked.sum((1, 2)), found.sum((1, 2))
    most = torch.maximum(n, m)
    parts = {
        "objects": torch.minimum(asked, found).sum((1, 2)) / most,
        "colours": torch.minimum(asked.sum(2), found.sum(2)).sum(1) / most,
        "number": (1 - (m - n).abs() / n).clamp(min=0),
        "relation": _related(scenes, objects, found.sum(2)).float(),
    }
    clean = _cleanliness(pixels, specks)

    values = torch.stack([parts[name] for name in WEIGHTS], 1)  # [B, 4]
    weights = torch.tensor(list(WEIGHTS.values()), device=images.device).repeat(len(scenes), 1)
    weights[[scene.relation is None for scene in scenes], -1] = 0  # of "relation", the last
    score = clean * (values * weights).sum(1) / weights.sum(1)
    right = (values == 1).all(1) & (clean == 1)
    score = torch.where(right, 1.0, score)  # 1, not 1 - 1e-7
    return Judgement(score, right, clean=clean, **parts)


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score as a reward: images float [B, 3, SIZE, SIZE] in [0, 1] -> float [B] in [0, 1]."""
    return judge(images, prompts).score


def right(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Is the picture fully right? By the same contract, float [B], 0 or 1."""
    return judge(images, prompts).right.float()


# ---- How well the rule judges --------------------------------------------------------------------


class Accuracy(NamedTuple):
    """Shares in [0, 1] of drawn pictures on which the rule is right."""

    accepted: float  # pictures judged by their own prompt, found right
    rejected: float  # pictures judged by the prompt of another scene, found not right


def accuracy(n: int, generator: torch.Generator) -> Accuracy:
    """How well the rule judges n drawn pictures, families in equal shares.

    Each is judged by its own prompt and by a wrong one: of the same family, and of another scene
    that the picture could not show as well.
    """
    pools = list(FAMILIES.values())
    own, wrong = [], []
    for i in range(n):
        pool = pools[i % len(pools)]
        j = int(torch.randint(len(pool), (), generator=generator))
        shift = int(torch.randint(1, len(pool), (), generator=generator))
        while parse(pool[(j + shift) % len(pool)]).key() == parse(pool[j]).key():
            shift += 1
        own.append(pool[j])
        wrong.append(pool[(j + shift) % len(pool)])
    images = draw(own, generator)
    accepted = right(images, own).mean().item()
    confused = right(images, wrong).mean().item()
    return Accuracy(accepted, 1 - confused)
