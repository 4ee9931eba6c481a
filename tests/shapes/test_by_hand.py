"""The rule and the drawing against pictures and readings made by hand.

world.py gives both of them their tables. Here colours, shapes and places are typed again, pictures
are painted by plain loops, and drawn ones are read by nearest colour and flood fill.
"""

import math
from itertools import pairwise

import pytest
import torch

from zoo.shapes import rule, world

GROUND = (0.96, 0.95, 0.92)
PAINT = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.15, 0.32, 0.85),
    "yellow": (0.95, 0.78, 0.10),
}


def inside(shape, x, y, r):
    """Is the point (x, y), from the centroid, in the shape that has the area of a circle of r?"""
    if shape == "circle":
        return x * x + y * y <= r * r
    if shape == "square":
        return max(abs(x), abs(y)) <= r * math.sqrt(math.pi) / 2
    side = 2 * r * math.sqrt(math.pi / math.sqrt(3))  # area side^2 sqrt(3)/4
    height = side * math.sqrt(3) / 2
    up = y + 2 * height / 3  # below the apex, which is at the top
    return 0 <= up <= height and abs(x) <= up / math.sqrt(3)


def paint(*objects, ground=GROUND):
    """A picture [3, 32, 32] of objects (colour or RGB, shape, x, y, r), by 4 x 4 points a pixel."""
    picture = torch.tensor(ground)[:, None, None].repeat(1, 32, 32)
    points = [(i + 0.5) / 4 for i in range(4)]
    for colour, shape, cx, cy, r in objects:
        rgb = torch.tensor(PAINT.get(colour, colour))
        for row in range(max(0, int(cy - 2 * r)), min(32, int(cy + 2 * r) + 1)):
            for column in range(max(0, int(cx - 2 * r)), min(32, int(cx + 2 * r) + 1)):
                hits = sum(
                    inside(shape, column + a - cx, row + b - cy, r) for a in points for b in points
                )
                own = picture[:, row, column]
                picture[:, row, column] = own + hits / 16 * (rgb - own)
    return picture


def block(picture, rgb, rows, columns):
    """The picture with a rectangle of full pixels."""
    picture = picture.clone()
    picture[:, rows[0] : rows[1], columns[0] : columns[1]] = torch.tensor(rgb)[:, None, None]
    return picture


def judge(picture, prompt):
    return rule.judge(picture[None], [prompt])


# ---- What is right -------------------------------------------------------------------------------

SINGLES = [f"a {colour} {shape}" for colour in PAINT for shape in ("circle", "square", "triangle")]


def test_each_object_is_itself_and_no_other():
    """Twelve pictures by twelve prompts: right on the diagonal alone."""
    pictures = torch.stack([paint((*prompt.split()[1:], 16, 17, 5.5)) for prompt in SINGLES])
    for i, prompt in enumerate(SINGLES):
        right = rule.right(pictures, [prompt] * 12)
        assert right.tolist() == [float(i == j) for j in range(12)], prompt


CIRCLES = [("red", "circle", 7, 8, 4), ("red", "circle", 24, 9, 4), ("red", "circle", 16, 23, 4)]
SQUARES = [("blue", "square", 7, 24, 3.8), ("blue", "square", 25, 24, 3.8)]
SCENES = {
    "a red circle": CIRCLES[:1],
    "two red circles": CIRCLES[:2],
    "three red circles": CIRCLES,
    "a red circle and a blue square": [CIRCLES[0], SQUARES[1]],
    "a red circle and two blue squares": [("red", "circle", 16, 8, 4), *SQUARES],
    "two red circles and a blue square": [*CIRCLES[:2], SQUARES[0]],
}


def test_numbers_are_counted():
    """Six scenes by six prompts; the reward is 1 where it is right and below 0.9 elsewhere."""
    pictures = torch.stack([paint(*objects) for objects in SCENES.values()])
    for i, prompt in enumerate(SCENES):
        scores = rule.reward(pictures, [prompt] * 6)
        assert scores[i] == 1 and (scores[torch.arange(6) != i] < 0.9).all(), prompt


PLACES = {  # where the green triangle is, seen from a blue square in the middle
    "left of": (26, 16),
    "right of": (6, 16),
    "above": (16, 26),
    "below": (16, 6),
}


def test_relations_are_read_as_they_are_said():
    """ "A left of B": B is to the right. In words of the first object or of the second."""
    pictures = [
        paint(("blue", "square", 16, 16, 4), ("green", "triangle", x, y, 4))
        for x, y in PLACES.values()
    ]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for i, word in enumerate(PLACES):
        for prompt in (
            f"a blue square {word} a green triangle",
            f"a green triangle {opposite[word]} a blue square",
        ):
            right = rule.right(torch.stack(pictures), [prompt] * 4)
            assert right.tolist() == [float(i == j) for j in range(4)], prompt


@pytest.mark.parametrize(("dx", "dy", "word"), [(12, 11, "left of"), (11, 12, "above")])
def test_a_relation_goes_further_along_than_across(dx, dy, word):
    """Slightly more to the right than down is "left of", and not "above"."""
    at = paint(("red", "circle", 8, 8, 4), ("blue", "circle", 8 + dx, 8 + dy, 4))
    for asked in PLACES:
        relation = judge(at, f"a red circle {asked} a blue circle").relation
        assert relation == (asked == word), asked


def test_along_and_across():
    """More than the margin, and more than the slope times across; along nothing, all lies."""
    x, y, none = (torch.tensor(z, dtype=torch.float32) for z in ((1, 0), (0, -1), (0, 0)))

    def lies(dx, dy, direction):
        dx, dy = torch.tensor(float(dx)), torch.tensor(float(dy))
        return bool(world.lies_along(dx, dy, direction, margin=3.0, slope=2.0))

    assert lies(3.1, 0, x) and not lies(3, 0, x) and not lies(-9, 0, x)
    assert lies(8.1, 4, x) and lies(8.1, -4, x) and not lies(8, 4, x)
    assert lies(0, -3.1, y) and not lies(0, 3.1, y) and not lies(4, -8, y)
    assert lies(-5, 7, none)


# ---- Where the rule ends -------------------------------------------------------------------------

CLEAN = ("red", "circle", 22, 22, 5.5)
RED = PAINT["red"]


def test_what_is_too_small_is_dirt_and_what_is_not_is_an_object():
    """Eleven solid pixels are a speck, twelve an object too many."""
    speck = judge(block(block(paint(CLEAN), RED, (2, 4), (2, 7)), RED, (4, 5), (2, 3)), SINGLES[0])
    assert speck.number == 1 and speck.objects == 1 and speck.clean < 1 and not speck.right
    more = judge(block(paint(CLEAN), RED, (2, 5), (2, 6)), SINGLES[0])
    assert more.number == 0 and more.objects == 0.5 and more.clean == 1


@pytest.mark.parametrize(("side", "taken"), [(16, True), (17, False)])
def test_what_is_too_large_has_no_shape(side, taken):
    """A square of 256 pixels is one, of 289 none; its colour still counts."""
    found = judge(block(paint(), RED, (5, 5 + side), (5, 5 + side)), "a red square")
    assert found.objects == taken and found.colours == 1 and bool(found.right) == taken


@pytest.mark.parametrize(("width", "taken"), [(10, True), (9, False)])
def test_what_is_misshapen_has_no_shape(width, taken):
    """A rectangle a x b meets the square of its area in a / (2 sqrt(ab) - a): 0.91 or 0.83."""
    found = judge(block(paint(), RED, (8, 19), (8, 8 + width)), "a red square")
    assert found.objects == taken


@pytest.mark.parametrize(("off", "clean"), [(0.29, True), (0.31, False)])
def test_a_colour_ends_where_it_says(off, clean):
    """Three tenths from the palette's, or from the background's, in RGB."""
    tinted = paint(((0.86, 0.16, 0.16 + off), *CLEAN[1:]))
    assert bool(judge(tinted, SINGLES[0]).clean == 1) == clean
    r, g, b = GROUND
    grey = off / math.sqrt(3)
    dark = paint(CLEAN, ground=(r - grey, g - grey, b - grey))
    assert bool(judge(dark, SINGLES[0]).clean == 1) == clean


@pytest.mark.parametrize(("share", "found"), [(0.45, False), (0.55, True)])
def test_an_object_is_at_least_half_of_its_colour(share, found):
    """Paler than half way from the ground it is none, whatever its outline."""
    pale = tuple(g + share * (c - g) for g, c in zip(GROUND, RED))
    assert judge(paint((pale, *CLEAN[1:])), SINGLES[0]).colours == found


def dirty(pixels):
    """The clean picture with so many single grey pixels, away from its circle and each other."""
    picture, left = paint(("red", "circle", 26, 26, 4)), pixels
    for row in range(0, 32, 2):
        for column in range(0, 32, 2):
            near = row > 18 and column > 18
            if left and not near:
                picture[:, row, column] = 0.5
                left -= 1
    assert not left
    return picture


def test_dirt_scales_the_score():
    """Ten pixels of 1024 are clean, eleven are not; a fifth of the picture leaves nothing."""
    found = {n: judge(dirty(n), SINGLES[0]) for n in (0, 10, 11, 100, 204, 205)}
    assert found[0].right and found[10].right and not found[11].right
    for n in (11, 100, 204):
        wanted = (0.2 - n / 1024) / 0.19
        assert found[n].score.item() == pytest.approx(wanted, abs=1e-6)
    assert found[205].score == 0 < found[204].score


def test_parts_weigh_as_they_say():
    """Objects 0.4, colours 0.2, number 0.2, relation 0.2; the last only where it is asked."""
    square = paint(("red", "square", 16, 16, 5.5))
    assert judge(square, "a red circle").score.item() == pytest.approx((0.2 + 0.2) / 0.8)
    pair = paint(("red", "circle", 8, 16, 4), ("blue", "circle", 24, 16, 4))
    wrong = judge(pair, "a red circle right of a blue circle")
    assert wrong.score.item() == pytest.approx(0.8) and wrong.relation == 0
    half = judge(pair, "a red circle left of a blue square")
    assert half.score.item() == pytest.approx(0.4 / 2 + 0.2 + 0.2 + 0.2)
    one = judge(paint(("red", "circle", 8, 16, 4)), "a red circle left of a blue circle")
    assert one.score.item() == pytest.approx(0.4 / 2 + 0.2 / 2 + 0.2 / 2) and one.relation == 0


# ---- What is drawn -------------------------------------------------------------------------------


def components(picture):
    """[(colour, pixels)] of what is painted, by nearest typed colour and flood fill."""
    palette = torch.tensor([*PAINT.values(), GROUND])
    nearest = (picture.permute(1, 2, 0)[:, :, None] - palette).norm(dim=-1)
    sure = (nearest.min(-1).values < 0.02).tolist()
    index = nearest.argmin(-1).tolist()
    seen, found = set(), []
    for start in [(r, c) for r in range(32) for c in range(32)]:
        colour = index[start[0]][start[1]]
        if start in seen or colour == 4 or not sure[start[0]][start[1]]:
            continue
        body, queue = [], [start]
        seen.add(start)
        while queue:
            r, c = queue.pop()
            body.append((r, c))
            for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                fits = 0 <= near[0] < 32 and 0 <= near[1] < 32 and near not in seen
                if fits and index[near[0]][near[1]] == colour and sure[near[0]][near[1]]:
                    seen.add(near)
                    queue.append(near)
        found.append((list(PAINT)[colour], body))
    return found


def middle(body, axis):
    return sum(place[axis] for place in body) / len(body)


DRAWN = [*SCENES, "three yellow triangles", "two green squares"]
DRAWN += [f"a red circle {word} a blue square" for word in PLACES]


def test_drawn_pictures_show_what_is_asked():
    """Number and colour of every object, inside the frame, apart, of the size of its number.

    Full pixels of a colour are up to two pixels a side fewer than the object's outline.
    """
    pictures = world.draw(DRAWN * 3, torch.Generator().manual_seed(3))
    largest = {1: math.pi * 6.5**2, 2: math.pi * 5.4**2, 3: math.pi * 4.6**2}
    for prompt, picture in zip(DRAWN * 3, pictures):
        found, words = components(picture), prompt.split()
        asked = []
        for number, colour in pairwise(words):
            if number in ("a", "two", "three"):
                asked += [colour] * {"a": 1, "two": 2, "three": 3}[number]
        assert sorted(colour for colour, _ in found) == sorted(asked), prompt
        for _, body in found:
            assert 12 <= len(body) <= largest[len(asked)]
            assert all(1 <= place <= 30 for pixel in body for place in pixel), prompt
        for i, (_, one) in enumerate(found):
            for _, other in found[:i]:
                rows = min(abs(a[0] - b[0]) for a in one for b in other)
                columns = min(abs(a[1] - b[1]) for a in one for b in other)
                assert max(rows, columns) >= 3, prompt
        if words[3:] and words[3] in ("left", "right", "above", "below"):
            red, blue = (next(b for c, b in found if c == name) for name in ("red", "blue"))
            dy, dx = (middle(blue, axis) - middle(red, axis) for axis in (0, 1))
            along, across = (dx, dy) if words[3] in ("left", "right") else (dy, dx)
            along = along if words[3] in ("left", "above") else -along
            assert along > 6 and along > 1.2 * abs(across), prompt


def test_drawn_objects_stand_apart_and_anywhere():
    """Three pixels between full ones, sideways or up and down; each above the other at times."""
    above = set()
    prompts = ["a red circle and a blue square"] * 60 + ["three green triangles"] * 60
    for picture in world.draw(prompts, torch.Generator().manual_seed(5)):
        found = components(picture)
        boxes = []
        for colour, body in found:
            rows, columns = zip(*body)
            boxes.append((colour, min(rows), max(rows), min(columns), max(columns)))
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                upright = max(one[1] - other[2], other[1] - one[2])
                sideways = max(one[3] - other[4], other[3] - one[4])
                assert max(upright, sideways) >= 4
                if sideways < 0 and one[0] != other[0]:
                    above.add(min(one, other, key=lambda box: box[1])[0])
    assert above == {"red", "blue"}


def test_drawn_shapes_are_the_typed_ones():
    """Coverage is that of the shape, within what a distance can say of a corner."""
    place = torch.tensor([16.3]), torch.tensor([15.8]), torch.tensor([6.0])
    for found, shape in zip(world.outlines(*place)[0], ("circle", "square", "triangle")):
        typed = paint(((0.0, 0.0, 0.0), shape, 16.3, 15.8, 6.0), ground=(1.0, 1.0, 1.0))
        off = (1 - found - typed[0]).abs()
        assert off.max() <= 0.45 and off.mean() <= 0.004, shape
        assert found.sum().item() == pytest.approx(math.pi * 36, rel=0.02)


def test_drawing_depends_on_its_generator_alone():
    """The same seed draws the same; places and sizes vary; the global generator is left alone."""
    state = torch.get_rng_state()
    one, same, other = (
        world.draw(["a red circle"] * 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    sizes = [len(body) for picture in one for _, body in components(picture)]
    places = [middle(body, 0) for picture in one for _, body in components(picture)]
    assert max(sizes) > 1.3 * min(sizes) and max(places) - min(places) > 5


# ---- The grammar ---------------------------------------------------------------------------------


ENDS = {
    "count": ("a red circle", "three red triangles"),
    "conjunction": ("a red circle and a green circle", "two yellow triangles and a green square"),
    "relation": ("a red circle left of a green square", "a yellow triangle below a blue square"),
}


def test_the_heldout_prompts_are_these():
    """7 counts, 64 conjunctions, 80 relations; the first and the last of each, typed."""
    kinds = {"count": [], "conjunction": [], "relation": []}
    for prompt in world.HELDOUT_PROMPTS:
        kinds[world.parse(prompt).family].append(prompt)
    assert [len(own) for own in kinds.values()] == [7, 64, 80]
    assert {family: (own[0], own[-1]) for family, own in kinds.items()} == ENDS
