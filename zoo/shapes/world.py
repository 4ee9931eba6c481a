"""A world of coloured shapes: the prompts it knows, pictures of them, and a rule that judges any picture.

No network lives here. The three parts share one definition of a shape, `outlines`, so that what is drawn and
what is recognised cannot drift apart.

    grammar   count         "a red circle", "two red circles", "three red circles"
              conjunction   "a red circle and two blue squares"          (of two colours, at most three)
              relation      "a blue square left of a green triangle"     (or right of, above, below)
    picture   float [B, 3, 32, 32] in [0, 1], four flat colours on a light ground, upright, none overlapping
    rule      pixel -> colour and coverage -> connected component -> shape -> number, colours, relation, dirt

The rule is meant to be checked by eye, and to be a reward, hence to be attacked. What it refuses, and how:

    specks, noise          components below MIN_AREA pixels, and pixels unlike every palette colour, are dirt:
                           more than CLEAN_SHARE of it is not right, and dirt scales the whole score
    fog, a tinted ground   a background pixel must be close to the background colour, not only closest to it
    pale or mixed colours  likewise inside an object; only its border, one pixel each way, may be a blend
    blobs, merged or cut   the best of the three outlines must share MIN_OVERLAP of its union with the object
    a giant shape          an object above MAX_AREA pixels has no shape
    a bit of everything    credit is divided by the number of objects found where that exceeds the asked
"""

import math
import zlib
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SIZE = 32  # side of the picture, in pixels
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
COUNTS = ("a", "two", "three")
DIRECTIONS = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}  # to the second

BACKGROUND = (0.96, 0.95, 0.92)
PALETTE = ((0.86, 0.16, 0.16), (0.16, 0.62, 0.24), (0.15, 0.32, 0.85), (0.95, 0.78, 0.10))

MIN_AREA, MAX_AREA = 12, 256  # pixels of an object; the smallest one drawn has 36, the largest 133
MIN_OVERLAP = 0.85  # intersection over union with the best outline; drawn objects have 0.96 or more
COLOUR_RADIUS = 0.30  # Euclidean distance in RGB within which a pixel is of a palette colour
CLEAN_SHARE, DIRTY_SHARE = (
    0.01,
    0.20,
)  # share of dirt that is still clean; share that leaves no credit
WEIGHTS = {"objects": 0.4, "colours": 0.2, "number": 0.2, "relation": 0.2}


# ---------------------------------------------------------------------------------------------------- grammar


class Group(NamedTuple):
    """`count` (1..3) objects of one colour (index in COLOURS) and one shape (index in SHAPES)."""

    count: int
    colour: int
    shape: int

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {COLOURS[self.colour]} {SHAPES[self.shape]}{'s' * (self.count > 1)}"


class Scene(NamedTuple):
    """What a prompt asks for; `relation` is None, or how groups[0] lies to groups[1] (DIRECTIONS)."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def family(self) -> str:
        return "relation" if self.relation else "conjunction" if len(self.groups) == 2 else "count"

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.groups))

    def key(self) -> str:
        """One name for every wording of a scene: "A and B" is "B and A", "A right of B" is "B left of A"."""
        mirror = {"right of": "left of", "below": "above"}.get(self.relation)
        if mirror:
            return str(Scene(self.groups[::-1], mirror))
        return str(self if self.relation else Scene(tuple(sorted(self.groups))))


def _scenes() -> list[Scene]:
    kinds = list(product(range(len(COLOURS)), range(len(SHAPES))))
    pairs = [(a, b) for a, b in permutations(kinds, 2) if a[0] != b[0]]
    counts = [Scene((Group(n, *kind),)) for n in (1, 2, 3) for kind in kinds]
    numbers = ((1, 1), (1, 2), (2, 1))
    conjunctions = [Scene((Group(m, *a), Group(n, *b))) for m, n in numbers for a, b in pairs]
    relations = [Scene((Group(1, *a), Group(1, *b)), word) for word in DIRECTIONS for a, b in pairs]
    return counts + conjunctions + relations


_SCENE_OF = {str(scene): scene for scene in _scenes()}
PROMPTS = tuple(_SCENE_OF)  # 36 counts, 324 conjunctions, 432 relations

# Held out of alignment, never of pretraining: the scenes whose name has a checksum divisible by six. CRC-32
# is the same on every machine, and a scene is held out in all its wordings, so that none is a training
# prompt turned round. They are 7 counts, 64 conjunctions and 80 relations: 19 % of all prompts.
HELDOUT_PROMPTS = tuple(p for p in PROMPTS if zlib.crc32(_SCENE_OF[p].key().encode()) % 6 == 0)
TRAIN_PROMPTS = tuple(sorted(set(PROMPTS) - set(HELDOUT_PROMPTS), key=PROMPTS.index))


def parse(prompt: str) -> Scene:
    """The scene a prompt asks for; ValueError for what the grammar (module docstring) does not contain."""
    try:
        return _SCENE_OF[prompt]
    except (KeyError, TypeError):
        raise ValueError(
            f"prompt {prompt!r} is not in the grammar of shapes; write for example "
            "'two red circles', 'a red circle and two blue squares' or "
            "'a blue square left of a green triangle'"
        ) from None


# ---------------------------------------------------------------------------------------------------- drawing

# Every shape of radius r has the area pi r^2 of the circle, so that size says nothing about shape.
_SQUARE = math.sqrt(math.pi) / 2  # half side / r
_TRIANGLE = math.sqrt(math.pi / (3 * math.sqrt(3)))  # inradius / r of the equilateral one, apex up
_EXTENT = (
    (1.0, 1.0, 1.0),  # half width, height above and below centre, / r
    (_SQUARE, _SQUARE, _SQUARE),
    (math.sqrt(3) * _TRIANGLE, 2 * _TRIANGLE, _TRIANGLE),
)
_RADII = {1: (4.5, 6.5), 2: (3.8, 5.4), 3: (3.4, 4.6)}  # range of r, by the number of objects
_EDGE, _GAP = 1.0, 2.5  # least distance to the frame, and between objects


def outlines(cx: Tensor, cy: Tensor, r: Tensor) -> Tensor:
    """Coverage in [0, 1] of each pixel by each shape of centroid (cx, cy) and radius r, in pixels, all [...].

    Returns [..., 3, SIZE, SIZE], in the order of SHAPES. The coverage is clamp(1/2 - d, 0, 1), d the signed
    distance from the pixel's centre to the outline: exact along straight upright edges, and no supersampling.
    """
    pixel = torch.arange(SIZE, dtype=r.dtype, device=r.device) + 0.5
    x = (pixel - cx[..., None])[
        ..., None, :
    ].abs()  # [..., 1, SIZE]: each shape is its mirror image
    y = (pixel - cy[..., None])[..., :, None]  # [..., SIZE, 1]
    r = r[..., None, None]
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x, y.abs()) - _SQUARE * r
    triangle = torch.maximum(y, math.sqrt(0.75) * x - 0.5 * y) - _TRIANGLE * r
    return (0.5 - torch.stack([circle, square, triangle], dim=-3)).clamp(0, 1)


def _layout(
    shape: Tensor, present: Tensor, direction: Tensor, generator: torch.Generator
) -> Tensor:
    """Random places of three objects a picture, [B, 3 (cx, cy, r), 3 objects], by rejection; 32 tries a turn.

    `shape` [B, 3] int64, `present` [B, 3] bool, `direction` [B, 2] (zero where no relation is asked).
    """
    low, high = torch.tensor([_RADII[int(n)] for n in present.sum(1)]).view(-1, 2, 1, 1).unbind(1)
    half, up, down = torch.tensor(_EXTENT)[shape].unbind(-1)  # each [B, 3]
    place, todo = torch.empty(len(shape), 3, 3), torch.arange(len(shape))
    while len(todo):
        u = torch.rand(len(todo), 32, 3, 3, generator=generator)
        r = low[todo] + u[:, :, 2] * (high - low)[todo]  # [b, 32, 3]
        w, a, d = (extent[todo, None] * r for extent in (half, up, down))
        x = _EDGE + w + u[:, :, 0] * (SIZE - 2 * _EDGE - 2 * w)
        y = _EDGE + a + u[:, :, 1] * (SIZE - 2 * _EDGE - a - d)
        fits = torch.ones(x.shape[:2], dtype=torch.bool)
        for i, j in ((0, 1), (0, 2), (1, 2)):  # bounding boxes apart, sideways or up and down
            sideways = (x[..., i] - x[..., j]).abs() > w[..., i] + w[..., j] + _GAP
            upright = (
                torch.maximum(
                    y[..., j] - a[..., j] - y[..., i] - d[..., i],
                    y[..., i] - a[..., i] - y[..., j] - d[..., j],
                )
                > _GAP
            )
            fits &= sideways | upright | ~(present[todo, i] & present[todo, j])[:, None]
        dx, dy = x[..., 1] - x[..., 0], y[..., 1] - y[..., 0]
        fits &= _holds(dx, dy, direction[todo, None], margin=7.0, slope=1.4)
        found, first = fits.max(1)
        place[todo[found]] = torch.stack([x, y, r], 2)[found, first[found]]
        todo = todo[~found]
    return place


def _holds(dx: Tensor, dy: Tensor, direction: Tensor, margin: float, slope: float) -> Tensor:
    """Does (dx, dy) go `margin` pixels along `direction` [..., 2], and `slope` times as far as across it?"""
    along = dx * direction[..., 0] + dy * direction[..., 1]
    across = (dx * direction[..., 1] - dy * direction[..., 0]).abs()
    return ((along > margin) & (along > slope * across)) | (direction == 0).all(-1)


def _directions(scenes: list[Scene], device: str | torch.device) -> Tensor:
    """From the first object to the second, [B, 2] (x, y), where a relation is asked; zero elsewhere."""
    rows = [DIRECTIONS.get(scene.relation, (0, 0)) for scene in scenes]
    return torch.tensor(rows, dtype=torch.float32, device=device).view(-1, 2)


def draw(prompts: list[str], generator: torch.Generator) -> Tensor:
    """Pictures of the prompts, places and sizes random: float32 [B, 3, SIZE, SIZE] in [0, 1], on the CPU."""
    scenes = [parse(prompt) for prompt in prompts]
    objects = [[g for g in scene.groups for _ in range(g.count)] for scene in scenes]
    padded = [row + [Group(0, 0, 0)] * (3 - len(row)) for row in objects]
    present, colour, shape = (
        torch.tensor(padded, dtype=torch.long).view(-1, 3, 3).unbind(-1)
    )  # each [B, 3]
    cx, cy, r = _layout(shape, present > 0, _directions(scenes, "cpu"), generator).unbind(1)
    rows = torch.arange(len(scenes))[:, None]
    cover = (
        outlines(cx, cy, r)[rows, torch.arange(3), shape] * (present > 0)[..., None, None]
    )  # [B, 3, H, W]
    paint = torch.tensor(PALETTE)[colour] - torch.tensor(BACKGROUND)  # [B, 3, RGB]
    return torch.tensor(BACKGROUND)[:, None, None] + torch.einsum("bnhw,bnc->bchw", cover, paint)


# ------------------------------------------------------------------------------------------------------- rule


class Judgement(NamedTuple):
    """What the rule says of each picture; every field is [B], on the device of the pictures.

    n objects are asked, m found, and an extra one costs as much as a missing one:
        objects   found objects that have an asked colour and shape, over max(n, m)
        colours   found objects that have an asked colour, whatever their shape, over max(n, m)
        number    max(0, 1 - |m - n| / n)
        relation  1 if the two asked colours are there and lie as asked; where none is asked, 1 and unweighted
        clean     1 up to CLEAN_SHARE of dirt, 0 from DIRTY_SHARE on, linear between
    """

    score: Tensor  # clean * mean by WEIGHTS of objects, colours, number and relation, in [0, 1]
    right: Tensor  # bool: every part is 1, which is to say the score is complete
    objects: Tensor
    colours: Tensor
    number: Tensor
    relation: Tensor
    clean: Tensor


class _Objects(NamedTuple):
    """The objects in a batch of pictures, one row each: picture, colour, shape (3 means none), centroid."""

    picture: Tensor
    colour: Tensor
    shape: Tensor
    x: Tensor
    y: Tensor


def _unmix(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read each pixel as background + a (colour - background), by least squares, by the best of 4 colours.

    Returns `cover` a in [0, 1] by each colour and `solid`, the best colour where a >= 1/2, both [B, 4, H, W];
    `blend` and `plain`, the distances to the nearest such blend and to the nearest of the five pure colours,
    both [B, H, W]. A blend keeps its direction from the background, so the edge of a red shape never looks
    yellow, as it does to a nearest-colour rule: half-way from red to the background is nearest to yellow.
    """
    ground = torch.tensor(BACKGROUND, dtype=images.dtype, device=images.device)
    towards = torch.tensor(PALETTE, dtype=images.dtype, device=images.device) - ground  # [4, RGB]
    offset = images - ground[:, None, None]
    dots = torch.einsum("bchw,kc->bkhw", offset, towards)
    length2 = towards.square().sum(1)[:, None, None]
    norm2 = offset.square().sum(1, keepdim=True)
    cover = (dots / length2).clamp(0, 1)
    blend2, best = (norm2 - 2 * cover * dots + cover.square() * length2).min(1)
    plain2 = torch.minimum((norm2 - 2 * dots + length2).amin(1), norm2[:, 0])
    is_best = torch.zeros_like(cover, dtype=torch.bool).scatter_(1, best[:, None], True)
    return cover, is_best & (cover >= 0.5), blend2.clamp(min=0).sqrt(), plain2.clamp(min=0).sqrt()


def _spread(z: Tensor) -> Tensor:
    """The largest value in the 3 x 3 around each pixel of z [..., H, W] >= 0 (max_pool2d is slower)."""
    z = pad(z, (1, 1, 1, 1))
    z = torch.maximum(torch.maximum(z[..., :-2], z[..., 1:-1]), z[..., 2:])
    return torch.maximum(torch.maximum(z[..., :-2, :], z[..., 1:-1, :]), z[..., 2:, :])


def _components(solid: Tensor) -> Tensor:
    """Label the 8-connected components of each mask [B, K, H, W] by the largest index in each, from 1."""
    label = _index(solid.device).short() * solid
    while True:  # the largest index spreads a pixel a turn
        before = label
        for _ in range(4):  # a comparison costs a spread: compare rarely
            label = _spread(label) * solid
        if torch.equal(label, before):
            return label.long()


def _index(device: torch.device) -> Tensor:
    return torch.arange(1, SIZE * SIZE + 1, device=device).view(SIZE, SIZE)


def _recognise(cover: Tensor, solid: Tensor) -> tuple[_Objects, Tensor]:
    """The objects in the pictures; the mask [B, H, W] of the specks, components too small to be objects."""
    label = _components(solid)
    area = torch.zeros(*label.shape[:2], SIZE * SIZE + 1, dtype=torch.long, device=label.device)
    area.scatter_add_(2, label.flatten(2), torch.ones_like(label).flatten(2))
    size = area.gather(2, label.flatten(2)).view_as(label) * solid
    index = _index(label.device)
    b, k, row, column = ((label == index) & (size >= MIN_AREA)).nonzero(
        as_tuple=True
    )  # a pixel of each
    pixels = size[b, k, row, column]

    # An object is its solid pixels and the share it covers of the unclaimed pixels around them.
    body = label[b, k] == index[row, column][:, None, None]  # [N, H, W]
    mass = (body | _spread(body) & ~solid.any(1)[b]) * cover[b, k]
    total = mass.sum((1, 2)).clamp(min=1e-6)
    at = torch.arange(SIZE, dtype=cover.dtype, device=cover.device) + 0.5
    x, y = (mass.sum(1) * at).sum(1) / total, (mass.sum(2) * at).sum(1) / total
    ideal = outlines(x, y, (total / math.pi).sqrt())  # [N, 3, H, W]
    mass = mass[:, None]
    overlap = torch.minimum(ideal, mass).sum((2, 3)) / torch.maximum(ideal, mass).sum((2, 3))
    best, shape = overlap.max(1)
    shape = torch.where((best >= MIN_OVERLAP) & (pixels <= MAX_AREA), shape, 3)
    return _Objects(b, k, shape, x, y), ((size > 0) & (size < MIN_AREA)).any(1)


def _cleanliness(solid: Tensor, specks: Tensor, blend: Tensor, plain: Tensor) -> Tensor:
    """1 - dirt, rescaled, [B], as in `Judgement`. Borders, a pixel each way, may be blends; no other may."""
    border = (_spread(solid) & _spread(~solid)).any(1)
    dirt = (
        (specks | (torch.where(border, blend, plain) > COLOUR_RADIUS)).to(plain.dtype).mean((1, 2))
    )
    return ((DIRTY_SHARE - dirt) / (DIRTY_SHARE - CLEAN_SHARE)).clamp(0, 1)


def _check(images: Tensor, prompts: list[str]) -> None:
    if images.dim() != 4 or images.shape[1:] != (3, SIZE, SIZE) or not images.is_floating_point():
        raise ValueError(
            f"images is {images.dtype} {list(images.shape)}; it must be float [B, 3, 32, 32]"
        )
    if len(prompts) != len(images):
        raise ValueError(
            f"prompts has {len(prompts)} entries; it must have one per image, {len(images)}"
        )
    if len(images) and not (
        images.min() >= -1e-3 and images.max() <= 1 + 1e-3
    ):  # False for NaN as well
        raise ValueError(
            f"images spans [{images.min():.3g}, {images.max():.3g}]; it must lie in [0, 1]"
        )


def _asked(scenes: list[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many of each object is asked, [B, colour, shape]; the first and last colours named, [B, 2]."""
    wanted = torch.zeros(len(scenes), 4, 4)  # the fourth shape is none, which is never asked
    pair = torch.zeros(len(scenes), 2, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for group in scene.groups:
            wanted[i, group.colour, group.shape] = group.count
        pair[i, 0], pair[i, 1] = scene.groups[0].colour, scene.groups[-1].colour
    return wanted.to(device), pair.to(device)


@torch.no_grad()
def judge(images: Tensor, prompts: list[str]) -> Judgement:
    """Judge each picture, float [B, 3, SIZE, SIZE] in [0, 1], by its prompt; rows do not see each other."""
    _check(images, prompts)
    scenes, device = [parse(prompt) for prompt in prompts], images.device
    cover, solid, blend, plain = _unmix(images.float())
    objects, specks = _recognise(cover, solid)
    wanted, pair = _asked(scenes, device)

    def tally(values: Tensor) -> Tensor:  # sums over objects: [B, colour, shape]
        place = (objects.picture, objects.colour, objects.shape)
        return torch.zeros_like(wanted).index_put_(place, values, accumulate=True)

    found = tally(torch.ones_like(objects.x))
    n, m, by_colour = wanted.sum((1, 2)), found.sum((1, 2)), found.sum(2)
    most = torch.maximum(n, m)
    right_objects = torch.minimum(wanted, found).sum((1, 2)) / most
    right_colours = torch.minimum(wanted.sum(2), by_colour).sum(1) / most
    number = (1 - (m - n).abs() / n).clamp(min=0)

    direction = _directions(scenes, device)
    related = direction.any(1)
    there = (by_colour.gather(1, pair) > 0).all(1)
    x, y = (
        tally(at).sum(2) / by_colour.clamp(min=1) for at in (objects.x, objects.y)
    )  # means, [B, colour]
    dx, dy = (mean.gather(1, pair).diff(dim=1)[:, 0] for mean in (x, y))
    relation = (~related | (there & _holds(dx, dy, direction, margin=3.0, slope=1.0))).float()

    clean = _cleanliness(solid, specks, blend, plain)
    parts = torch.stack([right_objects, right_colours, number, relation], 1)
    weights = torch.tensor(list(WEIGHTS.values()), device=device)
    weights = weights * torch.stack(
        [torch.ones_like(related)] * 3 + [related], 1
    )  # ordered as parts
    right = (parts == 1).all(1) & (clean == 1)
    score = torch.where(
        right, 1.0, clean * (parts * weights).sum(1) / weights.sum(1)
    )  # 1, not 1 - 1e-7
    return Judgement(score, right, right_objects, right_colours, number, relation, clean)


def reward(images: Tensor, prompts: list[str]) -> Tensor:
    """The reward contract: images float [B, 3, SIZE, SIZE] in [0, 1], B prompts -> float [B] in [0, 1]."""
    return judge(images, prompts).score


def right(images: Tensor, prompts: list[str]) -> Tensor:
    """By the same contract, whether the rule is fully met: float [B], 0 or 1."""
    return judge(images, prompts).right.float()


class Accuracy(NamedTuple):
    """Shares in [0, 1] of drawn pictures on which the rule is right."""

    accepted: float  # pictures judged by their own prompt, found right
    rejected: float  # pictures judged by the prompt of another scene, found not right


def accuracy(n: int, generator: torch.Generator) -> Accuracy:
    """How well the rule judges n drawn pictures, families in equal shares, by their own and a wrong prompt.

    The wrong prompt is of the same family, and of another scene that the picture could not show as well.
    """
    families = ("count", "conjunction", "relation")
    pools = [[p for p in PROMPTS if parse(p).family == family] for family in families]
    own, wrong = [], []
    for i in range(n):
        pool = pools[i % 3]
        j, shift = (int(torch.randint(low, len(pool), (), generator=generator)) for low in (0, 1))
        while parse(pool[(j + shift) % len(pool)]).key() == parse(pool[j]).key():
            shift += 1
        own.append(pool[j])
        wrong.append(pool[(j + shift) % len(pool)])
    images = draw(own, generator)
    accepted, confused = (
        judge(images, prompts).right.float().mean().item() for prompts in (own, wrong)
    )
    return Accuracy(accepted, 1 - confused)
