"""The folder a run leaves: what is written, drawn and said, when, and by which rank."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.training import run as run_module
from zoo.training.options import Options
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks, Stopped
from zoo.training.run import Run, free_folder

pytestmark = pytest.mark.usefixtures("one_process")


class Gathering(Ranks):
    """A rank of two that counts how often it waits for the other."""

    def gather(self, value):
        waits.append(value)
        return [value, value]


waits = []


class Saving:
    """A policy that notes where it is told to save."""

    name, shape = "toy", (2,)

    def __init__(self):
        self.saved = []

    def kind(self, prompt):
        return ""

    def save(self, folder, main):
        self.saved.append((folder, main))
        return "weights.file"


class Studio:
    """Stands in for judging and drawing, and notes what is asked."""

    def __init__(self, monkeypatch):
        self.judged, self.grids, self.curves, self.blocks = [], [], [], 0
        monkeypatch.setattr(run_module, "judge_heldout", self.judge_heldout)
        monkeypatch.setattr(run_module, "draw_block", self.draw_block)
        monkeypatch.setattr(run_module.pictures, "draw_grid", self.draw_grid)
        monkeypatch.setattr(run_module.pictures, "draw_curve", self.draw_curve)

    def judge_heldout(self, o, policy, judges, data, steps, ranks):
        self.judged.append(tuple(steps))
        value = len(self.judged) / 10
        return {
            "heldout": {
                str(n): {"first": round(value + n / 1000, 3), "second": 0.0} for n in steps
            },
            "family": {"kind": value},
            "diversity": 10 * value,
        }

    def draw_block(self, o, policy, judges, prompts, noise, ranks):
        self.blocks += 1
        return f"block {self.blocks}"

    def draw_grid(self, blocks, prompts, path, headline):
        self.grids.append((dict(blocks), bool(headline)))

    def draw_curve(self, lines, judge, path, pairs):
        self.curves.append((len(lines), judge, path, pairs))


O = Options(out="a/b", seed=5, iterations=4, heldout=8, eval_steps=(16, 8), prompts_per_iteration=2)
JUDGES = SimpleNamespace(rewards={"first": None, "second": None})


def whole_run(studio, rank=0, complete=True, o=O):
    """A run judged before, after two iterations and at the end; the policy it saved."""
    waits.clear()
    policy = Saving()
    run = Run(o, policy, JUDGES, Prompts(), Gathering(rank, 2, torch.device("cpu")))
    run.picture("before")
    run.judge(0, "before")
    run.log(1, {"reward": 0.5})
    run.judge(2)
    run.picture("after 2 iterations")
    run.save(2)
    run.log(3, {"reward": 0.75})
    run.judge(4, "after")
    run.picture("after 4 iterations")
    run.finish(4, complete)
    return policy


@pytest.fixture
def studio(monkeypatch):
    return Studio(monkeypatch)


def test_the_first_rank_writes_what_was_judged_drawn_and_saved(studio, monkeypatch, capsys):
    """Files, what is printed, and where the weights go; every save is waited for."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--reward", "two words"])
    policy = whole_run(studio)
    folder = Path("a/b")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "summary.json",
    ]
    assert json.loads((folder / "config.json").read_text())["eval_steps"] == [16, 8]
    assert studio.judged == [(16, 8), (16,), (16, 8)]  # between, by the first number alone
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line.pop("seconds") for line in lines]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert lines == [
        {"iteration": 0, "heldout_first": 0.116, "heldout_second": 0.0},
        {"iteration": 1, "reward": 0.5},
        {"iteration": 2, "heldout_first": 0.216, "heldout_second": 0.0},
        {"iteration": 3, "reward": 0.75},
        {"iteration": 4, "heldout_first": 0.316, "heldout_second": 0.0},
    ]
    # The first block is kept, the ones between are not; a headline speaks of what was just judged.
    assert studio.grids == [
        ({"before": "block 1"}, False),
        ({"before": "block 1", "after 2 iterations": "block 2"}, True),
        ({"before": "block 1", "after 4 iterations": "block 3"}, True),
    ]
    assert studio.curves == [(n, "first", folder / "curve.png", 8) for n in (3, 5)]
    assert policy.saved == [(folder, True), (folder, True)] and waits == [None, None]

    summary = json.loads((folder / "summary.json").read_text())
    before = {"16": {"first": 0.116, "second": 0.0}, "8": {"first": 0.108, "second": 0.0}}
    after = {"16": {"first": 0.316, "second": 0.0}, "8": {"first": 0.308, "second": 0.0}}
    assert summary["heldout"] == {"before": before, "after": after}
    assert summary["heldout_family"] == {"before": {"kind": 0.1}, "after": {"kind": 0.3}}
    assert summary["diversity"] == {"before": 1.0, "after": pytest.approx(3.0)}
    assert summary["weights"] == "weights.file" and summary["ranks"] == 2
    assert (summary["iterations"], summary["interrupted"], summary["seed"]) == (4, False, 5)
    assert summary["device"] == "cpu, 1 threads" and summary["seconds"] >= seconds[-1] - 0.1
    assert summary["command"] == "python train.py --reward 'two words'"
    assert summary["versions"].keys() == {"python", "torch", "numpy"}
    assert summary["versions"]["torch"] == torch.__version__

    said = capsys.readouterr().out.splitlines()
    assert said[0] == "writing a/b/" and len(said) == 4
    words = "held-out, by ODE steps: first 8: 0.108, 16: 0.116; second 8: 0.000, 16: 0.000; "
    assert said[1] == f"before: {words}kind 0.10; diversity 1.000"
    assert said[2].startswith("after: held-out, by ODE steps: first 8: 0.308, 16: 0.316")
    assert said[3].startswith("finished after 4 iterations and 0 s: look at a/b/before_after.png")


def test_another_rank_takes_part_and_leaves_nothing(studio, capsys):
    """It judges and draws with the first, says nothing, and saves nowhere of its own."""
    Path("a/b").mkdir(parents=True)  # by the first rank
    policy = whole_run(studio, rank=1)
    assert not any(Path("a/b").iterdir()) and capsys.readouterr().out == ""
    assert len(studio.judged) == 3 and studio.blocks == 3 and not studio.grids + studio.curves
    assert policy.saved == [(Path(), False)] * 2 and len(waits) == 2


def test_an_interrupted_run_says_so(studio, capsys):
    """In its last line and in its summary; released models name the versions they run on."""
    whole_run(studio, complete=False, o=Options(out="c", eval_steps=(16,), model="some/pipeline"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted after 4 iterations")
    summary = json.loads(Path("c/summary.json").read_text())
    assert summary["interrupted"] is True
    assert {"diffusers", "transformers", "peft"} < summary["versions"].keys()


def test_a_run_has_a_folder_of_its_own(studio, capsys):
    """The first of runs/NAME-1, -2 that is free; one that cannot be written ends it by name."""
    Path("runs/toy-1").mkdir(parents=True)
    Path("runs/toy-3").mkdir()
    assert free_folder("toy") == Path("runs/toy-2") and free_folder("x") == Path("runs/x-1")
    Run(Options(), Saving(), JUDGES, Prompts(), Gathering(0, 2, torch.device("cpu")))
    assert Path("runs/toy-2/config.json").is_file()
    Path("file").write_text("")
    with pytest.raises(Stopped, match=r"--out file/below: cannot be written"):
        Run(Options(out="file/below"), Saving(), JUDGES, Prompts(), Ranks(0, 1, "cpu"))


def test_the_second_interrupt_is_the_last(monkeypatch):
    """The first is noted and nothing else; the next is Python's own."""
    handlers = []
    monkeypatch.setattr(
        run_module.signal, "signal", lambda which, what: handlers.append((which, what))
    )
    interrupt = run_module.Interrupt()
    assert not interrupt.noted and handlers == [(signal.SIGINT, interrupt.note)]
    interrupt.note(signal.SIGINT, None)
    assert interrupt.noted
    assert handlers[1:] == [(signal.SIGINT, signal.default_int_handler)]
