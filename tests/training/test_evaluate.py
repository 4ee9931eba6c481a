"""Judging held-out pictures: batches, ranks, and who gets which score.

A picture is flat, at a value that says which pair it is of; the first judge reads it back.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from thread_ranks import together

from zoo.training import evaluate
from zoo.training.options import Options
from zoo.training.prompts import Prompts

DATA = Prompts(("t",), tuple("abcde"))


class Flat:
    """Pictures as bright as their prompt's number plus their noise, times one plus ODE steps."""

    shape = (1,)
    gathered = nullcontext

    def __init__(self):
        self.rows = []

    def kind(self, prompt):
        return "vowel" if prompt in "ae" else ""

    def velocity(self, prompts):
        numbers = torch.tensor([float("abcde".index(prompt)) for prompt in prompts])

        def velocity(x, t, prompt):
            self.rows.append(len(x))
            return -numbers[prompt, None]

        return velocity

    def grid(self, steps):
        self.steps = steps
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def decode(self, x):
        return (1 + self.steps) * x.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def judges(images, prompts):
    """What the picture says, and the number of the prompt it is judged by."""
    said = images[:, 0, 0, 0]
    numbers = torch.tensor([float("abcde".index(prompt)) for prompt in prompts])
    return {"said": said, "asked": numbers}


def slowly(heldout, steps_list):
    """The same, pair by pair."""
    prompts, noise = DATA.pairs((1,), heldout)
    heldout_means, families, spreads = {}, [], []
    for steps in steps_list:
        said = ["abcde".index(prompt) + z.item() for prompt, z in zip(prompts, noise)]
        said = [(1 + steps) * value for value in said]
        numbers = ["abcde".index(prompt) for prompt in prompts]
        heldout_means[str(steps)] = {
            "said": sum(said) / len(said),
            "asked": sum(numbers) / len(numbers),
        }
        if steps == steps_list[0]:
            families = [value for prompt, value in zip(prompts, said) if prompt in "ae"]
    for group in noise.view(-1, 4):
        pairs = [(a - b).abs().item() for i, a in enumerate(group) for b in group[:i]]
        spreads.append((1 + steps_list[0]) * sum(pairs) / 6)
    return {
        "heldout": heldout_means,
        "family": {"vowel": sum(families) / len(families)},
        "diversity": sum(spreads) / len(spreads),
    }


def same(found, wanted):
    assert found["heldout"].keys() == wanted["heldout"].keys()
    for steps, means in wanted["heldout"].items():
        assert list(found["heldout"][steps]) == ["said", "asked"]
        assert found["heldout"][steps] == pytest.approx(means, abs=1e-5)
    assert found["family"] == pytest.approx(wanted["family"], abs=1e-5)
    assert found["diversity"] == pytest.approx(wanted["diversity"], abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 8, 12, 64])
def test_batches_and_ranks_change_no_judgement(world, batch, monkeypatch):
    """28 pairs: batches that do not divide them, ranks that draw for nothing, every order."""
    o, steps = Options(heldout=28, eval_batch=batch), (3, 1)
    calls = []

    def job(ranks):
        policy = Flat()
        result = evaluate.judge_heldout(o, policy, judges, DATA, steps, ranks)
        calls.append(policy.rows)
        return result

    for found in together(monkeypatch, job, world):
        if isinstance(found, Exception):
            raise found
        same(found, slowly(28, steps))
    # A sharded network needs all ranks in every call: they make as many, of one size.
    rounds = math.ceil(math.ceil(28 / batch) / world)
    assert calls == [[min(batch, 28)] * (rounds * (3 + 1))] * world


def test_a_judge_that_fails_on_one_rank_stops_all(monkeypatch):
    """Also the rank that draws for nothing."""

    def failing(images, prompts):
        raise ValueError("unreadable")

    def job(ranks):
        o = Options(heldout=4, eval_batch=4)
        return evaluate.judge_heldout(o, Flat(), failing, DATA, (1,), ranks)

    found = together(monkeypatch, job, 2)
    assert [str(error) for error in found] == ["ValueError: unreadable"] * 2


def test_distance_is_of_pictures_of_one_prompt():
    """Root mean square over pixels, mean over the six pairs of four pictures."""
    flat = torch.tensor([0.0, 0.1, 0.1, 0.3, 1.0, 1.0, 1.0, 1.0])
    images = flat.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    pairs = [0.1, 0.1, 0.3, 0.0, 0.2, 0.2]
    assert evaluate.distances_of(images) == pytest.approx([sum(pairs) / 6, 0.0], abs=1e-6)
    checks = torch.zeros(4, 3, 2, 2)
    checks[0, :, 0, 0] = 1.0  # one pixel of four: a distance of one half
    assert evaluate.distances_of(checks) == pytest.approx([3 * 0.5 / 6], abs=1e-6)
