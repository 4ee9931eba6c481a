"""The judgement shipped with the weights: it is what judging gives; when a run uses it.

Whoever changes the world, the rule, the prompts, their noise, the model or the sampler makes it
anew: python -m zoo.training.shipped
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.training import prompts, shipped
from zoo.training.draw import draw_block
from zoo.training.evaluate import judge_heldout, judge_pairs
from zoo.training.options import Options, policy_of
from zoo.training.pictures import Block
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
O, DATA = Options(), Prompts()
HOW_TO = "python -m zoo.training.shipped makes it anew"


def judges_of(o):
    return spec.load_all([o.eval_reward], CPU)[0]


@pytest.fixture(scope="module")
def policy():
    return policy_of(O).load((), CPU)


@pytest.fixture(scope="module")
def kept():
    """What the file holds."""
    return load_file(shipped.FILE)


@pytest.fixture(scope="module")
def block(policy):
    """What a default run draws before training."""
    shown, noise = DATA.shown(policy.shape, policy.kind)
    return draw_block(O, policy, judges_of(O), shown, noise, ALONE)


@pytest.mark.parametrize(("steps", "pairs"), [(16, 16), (8, 64), (40, 8)])
def test_the_shipped_scores_are_what_judging_gives(steps, pairs, policy, kept):
    """Of the first pairs, for every number of ODE steps; distances up to rounding."""
    asked = DATA.pairs(policy.shape, pairs)
    found = judge_pairs(O, policy, judges_of(O), *asked, (steps,), ALONE)
    row = O.eval_steps.index(steps)
    for judge, name in enumerate(O.eval_reward):
        own = [score for batch in found for score in batch.scores[name]]
        assert own == kept["scores"][row, judge, :pairs].tolist(), HOW_TO
    distances = [distance for batch in found for distance in batch.distances]
    wanted = kept["distances"][row, : pairs // prompts.IMAGES_PER_PROMPT].tolist()
    assert distances == pytest.approx(wanted, abs=1e-6), HOW_TO


def test_the_shipped_pictures_are_what_drawing_gives(block, kept):
    """Up to one of 255 values, with the same verdicts."""
    drawn = (255 * block.images).round().int()
    assert drawn.shape == kept["images"].shape, HOW_TO
    assert (drawn - kept["images"].int()).abs().max() <= 1, HOW_TO
    assert torch.equal(block.scores, kept["verdicts"]), HOW_TO


# What `python -m zoo.training.evaluate zoo/shapes/shapes.safetensors` prints: it judges.
JUDGED = {
    "heldout": {
        "16": {"right": 282 / 512, "rule": 0.8362142003315967},
        "8": {"right": 250 / 512, "rule": 0.8110758538532536},
        "40": {"right": 287 / 512, "rule": 0.8401235016935971},
    },
    "family": {
        "conjunction": 0.4305555555555556,
        "count": 0.5833333333333334,
        "relation": 0.6433823529411765,
    },
    "diversity": 0.24181320999884234,
}


def test_a_default_run_uses_it(block):
    """All means are those of judging, to the last bit."""
    assert shipped.judgement(O, DATA, block, ALONE) == JUDGED, HOW_TO


OTHERWISE = {
    "model": "somewhere",
    "shift": 2.0,
    "eval_reward": ("right",),
    "heldout": 64,
    "eval_steps": (16, 8),
    "eval_batch": 64,
    "rollout_batch": 64,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_judgement_is_computed(name, block):
    """Whatever is judged otherwise, in number, by whom, with which steps or on which grid."""
    assert OTHERWISE.keys() == set(shipped.DECIDING)
    o = dataclasses.replace(O, **{name: OTHERWISE[name]})
    assert shipped.judgement(o, DATA, block, ALONE) is None


def test_other_prompts_devices_and_weights_are_judged(block, monkeypatch, tmp_path):
    """They are told apart by digests."""
    fewer = dataclasses.replace(DATA, heldout=DATA.heldout[:-1])
    assert shipped.judgement(O, fewer, block, ALONE) is None
    assert shipped.judgement(O, DATA, block, Ranks(0, 1, torch.device("cuda"))) is None
    other = tmp_path / "shapes.safetensors"
    other.write_bytes(shapes_model.CHECKPOINT.read_bytes() + b" ")
    monkeypatch.setattr(shapes_model, "CHECKPOINT", other)
    assert shipped.judgement(O, DATA, block, ALONE) is None


def test_where_pictures_are_others_it_is_computed(block):
    """A value by two of 255, a verdict, their number; not a value by one, which is rounding."""
    images, scores = block
    for step, used in ((1, True), (2, False)):
        moved = images.clone()
        value = moved[0, 0, 0, 0, 0]
        value += (step if value < 0.5 else -step) / 255
        assert (shipped.judgement(O, DATA, Block(moved, scores), ALONE) is not None) == used
    turned = scores.clone()
    turned[0, 0] = 1 - turned[0, 0]
    assert shipped.judgement(O, DATA, Block(images, turned), ALONE) is None
    assert shipped.judgement(O, DATA, Block(images[:2], scores[:2]), ALONE) is None


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_without_a_file_it_is_computed(content, block, monkeypatch, tmp_path):
    """Where it is gone or spoiled."""
    path = tmp_path / "before.safetensors"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(shipped, "FILE", path)
    assert shipped.judgement(O, DATA, block, ALONE) is None


def test_the_program_writes_what_a_run_would_compute(one_process, monkeypatch, policy, capsys):
    """In small: bit for bit the judgement that judge_heldout returns, from several batches."""
    o = Options(heldout=12, eval_steps=(2, 1), eval_batch=8, threads=1)
    monkeypatch.setattr(shipped, "Options", lambda: o)
    shipped.main(["--out", "made.safetensors"])
    shipped.main(["--out", "again.safetensors"])
    assert capsys.readouterr().out == "wrote made.safetensors\nwrote again.safetensors\n"
    with open("made.safetensors", "rb") as made, open("again.safetensors", "rb") as again:
        assert made.read() == again.read()
    monkeypatch.setattr(shipped, "FILE", "made.safetensors")
    shown, noise = DATA.shown(policy.shape, policy.kind)
    block = draw_block(o, policy, judges_of(o), shown, noise, ALONE)
    wanted = judge_heldout(o, policy, judges_of(o), DATA, o.eval_steps, ALONE)
    assert shipped.judgement(o, DATA, block, ALONE) == wanted


def test_no_number_is_missing(kept):
    """Every pair, every prompt, each kind of number in its range."""
    assert {name: tuple(z.shape) for name, z in kept.items()} == {
        "images": (8, 4, 3, 32, 32),
        "verdicts": (8, 4),
        "scores": (3, 2, 512),
        "distances": (3, 128),
    }
    assert set(kept["scores"][:, 0].unique().tolist()) == {0.0, 1.0}
    assert kept["scores"].min() >= 0 and kept["scores"].max() <= 1
