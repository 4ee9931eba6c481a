"""Drawing: rows and chunks; the two programs that draw and judge a checkpoint, as asked."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.shapes import model as shapes_model
from zoo.training import draw, evaluate
from zoo.training.options import Options
from zoo.training.prompts import Prompts, generator_of
from zoo.training.ranks import Ranks, Stopped

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


class Numbers:
    """A policy whose velocity is its prompt's number, on the grid that was asked for."""

    shape = (1, 1, 1)
    gathered = nullcontext

    def __init__(self):
        self.rows, self.grids = [], []

    def velocity(self, prompts):
        own = torch.tensor([float(prompt) for prompt in prompts])

        def velocity(x, t, prompt):
            self.rows.append(len(x))
            return own[prompt].view(-1, 1, 1, 1).expand_as(x)

        return velocity

    def grid(self, steps):
        self.grids.append(steps)
        return torch.linspace(1, 0.5, steps + 1, dtype=torch.float64)

    def decode(self, x):
        return x.expand(-1, 3, -1, -1)


def test_a_block_has_a_row_of_pictures_and_scores_for_every_prompt():
    """Each picture is its own prompt's, from its own noise, and is judged by it first judge first.

    x_0 = x_1 - prompt/2 on this grid; the score is the picture's value and its prompt, added.
    """

    def judges(images, prompts):
        own = torch.tensor([float(prompt) for prompt in prompts])
        return {"sum": images[:, 0, 0, 0] + own, "other": own - own}

    noise = torch.arange(6.0).view(2, 3, 1, 1, 1)
    policy, o = Numbers(), Options(eval_steps=(4, 2), rollout_batch=4)
    block = draw.draw_block(o, policy, judges, ["10", "20"], noise, ALONE)
    wanted = torch.tensor([[-5.0, -4.0, -3.0], [-7.0, -6.0, -5.0]])
    assert torch.equal(block.images[:, :, 0, 0, 0], wanted)
    assert torch.equal(block.scores, wanted + torch.tensor([[10.0], [20.0]]))
    assert policy.grids == [4] and policy.rows == [4, 2] * 4


def test_drawing_listens_before_every_step():
    """So that it can be ended within one."""
    heard = []
    policy = Numbers()

    def listen():
        heard.append(len(policy.rows))
        if len(heard) == 3:
            raise KeyError

    noise = torch.zeros(2, 1, 1, 1)
    with pytest.raises(KeyError):
        draw.draw(Options(), policy, ["1", "2"], noise, 5, CPU, listen)
    assert heard == [0, 1, 2]


def other_weights(path):
    """A checkpoint that is not the shipped one."""
    network = shapes_model.load()
    with torch.no_grad():
        network.words.weight.mul_(2)
    shapes_model.save(network, path)


def test_the_program_that_draws_does_as_it_is_told(monkeypatch, capsys):
    """Checkpoint, prompts, seed, shift, threads, folder arrive; a prompt has noise of its own."""
    other_weights("other.safetensors")
    seen = SimpleNamespace()

    def noted(o, policy, judges, prompts, noise, ranks):
        seen.policy, seen.judges, seen.prompts, seen.noise = policy, judges, prompts, noise
        seen.threads, seen.steps = torch.get_num_threads(), o.eval_steps[0]
        pictures = torch.zeros(2, 8, 3, 32, 32)
        return draw.pictures.Block(pictures, torch.zeros(2, 8))

    monkeypatch.setattr(draw, "draw_block", noted)
    prompts = ["a red circle", "a blue square"]
    flags = "--out here/there --seed 9 --shift 3 --threads 2 --device cpu"
    draw.main(["other.safetensors", "--prompt", *prompts, *flags.split()])
    assert list(seen.prompts) == prompts and seen.threads == 2
    for i in range(2):
        wanted = torch.randn(8, 3, 32, 32, generator=generator_of(9, i))
        assert torch.equal(seen.noise[i], wanted)
    assert seen.policy.grid(2)[1] == 0.75  # of u = 1/2: 3 u / (1 + 2 u)
    shipped = shapes_model.load().words.weight
    assert torch.allclose(seen.policy.network.words.weight, 2 * shipped, rtol=1e-3)
    assert list(seen.judges.rewards) == ["right", "rule"]
    assert Path("here/there/samples.png").is_file() and "look at here" in capsys.readouterr().out


def test_the_program_that_judges_does_as_it_is_told(monkeypatch, capsys):
    """Its flags reach the judgement, which is printed as JSON and nothing else."""
    other_weights("other.safetensors")
    seen = SimpleNamespace()

    def noted(o, policy, judges, data, steps, ranks):
        seen.o, seen.policy, seen.judges, seen.data, seen.steps = o, policy, judges, data, steps
        seen.threads = torch.get_num_threads()
        return {"heldout": {"3": {"rule": 0.5}}}

    monkeypatch.setattr(evaluate, "judge_heldout", noted)
    flags = "--heldout 12 --eval-reward rule --eval-steps 3 5 --eval-batch 8 --shift 3 --threads 2"
    evaluate.main(["other.safetensors", *flags.split(), "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == {"heldout": {"3": {"rule": 0.5}}}
    assert (seen.o.heldout, seen.o.eval_batch, seen.steps) == (12, 8, (3, 5))
    assert list(seen.judges.rewards) == ["rule"] and seen.data == Prompts() and seen.threads == 2
    assert seen.policy.grid(2)[1] == 0.75
    shipped = shapes_model.load().words.weight
    assert torch.allclose(seen.policy.network.words.weight, 2 * shipped, rtol=1e-3)


@pytest.mark.parametrize("program", ["draw", "evaluate"])
def test_a_judge_that_fails_is_one_line_and_status_1(program, monkeypatch, capsys):
    """Of either program, as of train.py."""

    def stopped(*_):
        raise Stopped("ValueError: reward 'rule' is nan")

    monkeypatch.setattr(draw, "draw_block", stopped)
    monkeypatch.setattr(evaluate, "judge_heldout", stopped)
    main, more = {
        "draw": (draw.main, ["--prompt", "a red circle"]),
        "evaluate": (evaluate.main, []),
    }[program]
    with pytest.raises(SystemExit) as stop:
        main([str(shapes_model.CHECKPOINT), *more])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "'rule' is nan" in err
