"""The folder a run leaves: what is written, drawn and said, when, and by which rank."""

import json
import math
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.training import run as run_module
from zoo.training.finite import Found, NotFinite
from zoo.training.options import Options, is_free
from zoo.training.pictures import Block
from zoo.training.policies import Sizes
from zoo.training.prompts import Prompts
from zoo.training.ranks import Interrupted, Ranks, Stopped, Unwritable
from zoo.training.run import Run, free_folder

pytestmark = pytest.mark.usefixtures("one_process")


class Gathering(Ranks):
    """A rank of two that counts how often it waits for the other."""

    def gather(self, value):
        waits.append(value)
        return [value, value]


waits = []


class Toy:
    """A policy of one weight."""

    name, shape = "toy", (2,)
    sizes = Sizes(weights=1, tuned=1, rows=1, frozen=0, masters=4)

    def __init__(self):
        self.tuned = [torch.nn.Parameter(torch.ones(1))]

    def kind(self, prompt):
        return ""


def always():
    return True


class Studio:
    """Stands in for judging and drawing, and notes what is asked."""

    def __init__(self, monkeypatch):
        self.judged, self.grids, self.curves, self.blocks = [], [], [], 0
        self.on_judging = always
        monkeypatch.setattr(run_module, "judge_heldout", self.judge_heldout)
        monkeypatch.setattr(run_module, "draw_block", self.draw_block)
        monkeypatch.setattr(run_module.pictures, "draw_grid", self.draw_grid)
        monkeypatch.setattr(run_module.pictures, "draw_curve", self.draw_curve)

    def judge_heldout(self, o, policy, judges, data, steps, ranks, listen):
        listen()
        assert self.on_judging()
        self.judged.append(tuple(steps))
        value = len(self.judged) / 10
        return {
            "heldout": {
                str(n): {"first": round(value + n / 1000, 3), "second": 0.0} for n in steps
            },
            "family": {"kind": value},
            "diversity": 10 * value,
        }

    def draw_block(self, o, policy, judges, prompts, noise, ranks, listen):
        listen()
        self.blocks += 1
        number = self.blocks / 255
        return Block(torch.full((1, 1, 3, 2, 2), number), torch.full((1, 1), number))

    def draw_grid(self, blocks, prompts, path, headline):
        path.touch()
        drawn = {title: round(255 * block.images.max().item()) for title, block in blocks.items()}
        self.grids.append((drawn, bool(headline)))

    def draw_curve(self, lines, judge, path, pairs):
        path.touch()
        self.curves.append((len(lines), judge, pairs))


O = Options(out="a/b", seed=5, iterations=4, heldout=8, eval_steps=(16, 8), eval_every=2)
JUDGES = SimpleNamespace(rewards={"first": None, "second": None})


def made(rank=0, o=O, checkpoint=None):
    """A run of rank `rank` of two."""
    waits.clear()
    return Run(o, Toy(), JUDGES, Prompts(), Gathering(rank, 2, torch.device("cpu")), checkpoint)


def whole_run(rank=0, complete=True, o=O):
    """A run judged before, after two iterations and at the end, saved after two and at the end."""
    run = made(rank, o)
    run.begin("the optimiser", None)
    run.look()
    for done, reward in ((1, 0.5), (2, None), (3, 0.75), (4, None)):
        if reward:
            run.log(done, {"reward": reward})
        run.done = done
        if run.save_is_due():
            run.save()
        run.look()
    run.finish(complete)
    return run


@pytest.fixture
def studio(monkeypatch):
    return Studio(monkeypatch)


@pytest.fixture
def written(monkeypatch):
    """Stands in for the writing of checkpoints: what was asked, and which were kept."""
    asked = []

    def write(folder, iteration, policy, optimizer, average, state, needed, ranks):
        asked.append((folder, iteration, state, needed))
        return "weights.file"

    def prune(folder, done, best):
        asked.append(("prune", done, best))

    monkeypatch.setattr(run_module.checkpoints, "write", write)
    monkeypatch.setattr(run_module.checkpoints, "prune", prune)
    monkeypatch.setattr(Gathering, "all", lambda self, holds: holds)
    return asked


def test_the_first_rank_writes_what_was_judged_drawn_and_saved(
    studio, written, monkeypatch, capsys
):
    """Files, what is printed, and what checkpoints hold."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--reward", "two words"])
    whole_run()
    folder = Path("a/b")
    assert sorted(p.name for p in folder.iterdir()) == [
        "before.safetensors",
        "before_after.png",
        "config.json",
        "curve.png",
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
        ({"before": 1}, False),
        ({"before": 1, "after 2 iterations": 2}, True),
        ({"before": 1, "after 4 iterations": 3}, True),
    ]
    assert studio.curves == [(n, "first", 8) for n in (3, 5)]
    # A checkpoint is of before the judgement, the best one by what was judged before it.
    (first, after_first, last, after_last) = written
    assert (first[:2], last[:2]) == ((folder, 2), (folder, 4))
    assert (after_first, after_last) == (("prune", 2, None), ("prune", 4, 2))
    assert first[2]["options"]["out"] == "a/b" and first[2]["prompts"] == Prompts().digest()
    assert first[3] == last[3] == 4 * 3 * 1 + 4  # bytes: theta, two moments; the weights as such

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


def test_the_shipped_judgement_is_the_first_where_it_is_this_runs(
    studio, written, monkeypatch, capsys
):
    """It is told the pictures just drawn; it is logged as if computed, and said to be shipped."""
    asked = []

    def judgement(o, data, block, ranks):
        asked.append((o.seed, data, block.scores.item(), ranks.world))
        means = {"16": {"first": 0.25, "second": 0.5}, "8": {"first": 0.75, "second": 1.0}}
        return {"heldout": means, "family": {"kind": 0.0}, "diversity": 2.0}

    monkeypatch.setattr(run_module.shipped, "judgement", judgement)
    whole_run()
    assert asked == [(5, Prompts(), pytest.approx(1 / 255), 2)]
    assert studio.judged == [(16,), (16, 8)] and studio.blocks == 3
    log = Path("a/b/metrics.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    del first["seconds"]
    assert first == {"iteration": 0, "heldout_first": 0.25, "heldout_second": 0.5}
    summary = json.loads(Path("a/b/summary.json").read_text())
    assert summary["heldout"]["before"]["8"] == {"first": 0.75, "second": 1.0}
    assert summary["heldout_family"]["before"] == {"kind": 0.0}
    assert summary["diversity"]["before"] == 2.0
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert [line.endswith(" (shipped with the weights)") for line in said] == [True, False]


def test_pictures_are_drawn_early_and_nothing_is_judged(studio, written, capsys):
    """After the iterations named, each once, also where something is judged anyway."""
    o = replace(O, eval_every=2, draw_at=(1, 2, 4, 9))
    whole_run(o=o)
    assert studio.judged == [(16, 8), (16,), (16, 8)]
    titles = [list(columns) for columns, _ in studio.grids]
    assert titles == [
        ["before"],
        ["before", "after 1 iterations"],
        ["before", "after 2 iterations"],
        ["before", "after 4 iterations"],
    ]
    assert [headed for _, headed in studio.grids] == [False, False, True, True]
    assert [iteration for _, iteration, *_ in written if iteration in (1, 3)] == []
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after 1")]
    assert said == ["after 1 iterations, 0 s: a/b/before_after.png"]
    whole_run(rank=1, o=replace(o, out="c"))
    assert studio.blocks == 8 and "c/" not in capsys.readouterr().out


def test_another_rank_takes_part_and_leaves_nothing(studio, written, capsys):
    """It judges, draws and saves with the first, says nothing, and writes nothing."""
    Path("a/b").mkdir(parents=True)  # by the first rank
    whole_run(rank=1)
    assert not any(Path("a/b").iterdir()) and capsys.readouterr().out == ""
    assert len(studio.judged) == 3 and studio.blocks == 3 and not studio.grids + studio.curves
    assert [iteration for _, iteration, *_ in written] == [2, 4] and len(waits) > 10


def test_an_interrupted_run_says_so(studio, written, capsys):
    """In its last line and in its summary; released models name the versions they run on."""
    whole_run(complete=False, o=Options(out="c", eval_steps=(16,), model="some/pipeline"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("interrupted after 4 iterations")
    assert said.endswith("to go on, add --resume c to train.py")
    summary = json.loads(Path("c/summary.json").read_text())
    assert summary["interrupted"] is True
    assert {"diffusers", "transformers", "peft"} < summary["versions"].keys()


def test_what_goes_on_begins_with_what_was(studio, written, monkeypatch, capsys):
    """Lines, figures, clock and first pictures; metrics beyond the checkpoint are dropped."""
    run = whole_run()
    state = written[0][2] | {"seconds": 100.0, "lines": run.lines[:2]}
    monkeypatch.setattr(run_module.checkpoints, "restore", lambda *_: state)
    o = replace(O, resume="a/b", out="")
    again = made(0, o, Path("a/b/checkpoints/000002"))
    again.begin("the optimiser", None)
    assert (again.done, again.saved, again.folder) == (2, 2, Path("a/b"))
    lines = [json.loads(text) for text in Path("a/b/metrics.jsonl").read_text().splitlines()]
    assert lines == run.lines[:2]
    again.look()  # what was due when it was interrupted
    assert again.lines[2]["iteration"] == 2 and again.lines[2]["seconds"] >= 100
    assert next(iter(studio.grids[-1][0].items())) == ("before", 1)
    assert "resume" not in json.loads(Path("a/b/config.json").read_text())
    Path("a/b/before.safetensors").write_text("spoiled")
    capsys.readouterr()
    made(0, o, Path("a/b/checkpoints/000002")).begin("the optimiser", None)
    assert "before.safetensors: cannot be read; pictures begin" in capsys.readouterr().out


def test_a_run_that_stops_keeps_what_can_be_kept(studio, written):
    """Weights after a reward failed, and where only a reward was not finite; else nothing more."""
    found = Found("reward 'x'", "a cat", [math.nan, math.inf])
    for problem, saved in (
        (Stopped("a reward failed"), True),
        (NotFinite(3, found, keep=True), True),
        (NotFinite(3, found, keep=False), False),
        (Unwritable("the disk is full"), False),
    ):
        written.clear()
        run = made(o=replace(O, out=f"stop{len(str(problem))}-{saved}"))
        run.begin("the optimiser", None)
        run.done = 3
        run.stop(problem)
        assert bool(written) == saved
        report = run.folder / "not_finite.json"
        assert report.exists() == isinstance(problem, NotFinite)
        if report.exists():
            assert json.loads(report.read_text()) == {
                "iteration": 3,
                "quantity": "reward 'x'",
                "prompt": "a cat",
                "values": ["nan", "inf"],
            }
        assert (run.folder / "summary.json").exists() != isinstance(problem, Unwritable)


class Average:
    """An average that writes down when it is on."""

    average = ()

    def __init__(self):
        self.on = []

    @contextmanager
    def applied(self):
        self.on.append(True)
        yield
        self.on.append(False)


def test_what_is_judged_and_drawn_is_the_average(studio, written):
    """Before, between and after; it is put away again."""
    run, average = made(), Average()
    run.begin("the optimiser", average)
    for done in (0, 1, 2, 4):
        run.done = done
        studio.judged.clear()
        average.on.clear()
        studio.on_judging = lambda: average.on == [True]
        run.look()
        assert average.on == [True, False] and len(studio.judged) == (done != 1)


def test_an_interruption_of_any_rank_is_heard(written, monkeypatch):
    """Of another one too."""
    run = made()
    run.listen()
    run.interrupt.noted = True
    with pytest.raises(Interrupted):
        run.listen()
    run.interrupt.noted = False
    monkeypatch.setattr(Gathering, "all", lambda self, holds: False)
    with pytest.raises(Interrupted):
        run.listen()


def test_weights_that_are_not_finite_are_not_saved(studio, written):
    """Nor an average that is not."""
    run = made()
    run.begin("the optimiser", None)
    run.done = 1
    with torch.no_grad():
        run.policy.tuned[0].fill_(math.nan)
    with pytest.raises(NotFinite, match="iteration 1: a weight is nan, which is not finite"):
        run.save()
    assert not written
    with torch.no_grad():
        run.policy.tuned[0].fill_(1)
    run.average = SimpleNamespace(average=[torch.tensor([1.0, -math.inf])])
    with pytest.raises(NotFinite, match="a weight is -inf"):
        run.save()


def test_a_run_has_a_folder_of_its_own(studio, capsys):
    """The first of runs/NAME-1, -2 that is free; one that cannot be written ends it by name."""
    Path("runs/toy-1").mkdir(parents=True)
    Path("runs/toy-3").mkdir()
    assert free_folder("toy") == Path("runs/toy-2") and free_folder("x") == Path("runs/x-1")
    made(o=Options())
    assert Path("runs/toy-2/config.json").is_file()
    Path("begun").mkdir()
    Path("begun/.part-config.json").write_text("{")  # all that a run killed at once has left
    assert is_free("begun") and not is_free("runs")
    Path("file").write_text("")
    with pytest.raises(Stopped, match=r"file/below: cannot be written"):
        made(o=Options(out="file/below"))


def test_the_second_interrupt_is_the_last(monkeypatch):
    """The first is noted and nothing else; after it a signal does what it does elsewhere."""
    interrupt = run_module.Interrupt()
    both = signal.SIGINT, signal.SIGTERM
    assert not interrupt.noted
    assert [signal.getsignal(which) for which in both] == [interrupt.note] * 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.noted
    assert [signal.getsignal(which) for which in both] == [
        signal.default_int_handler,
        signal.SIG_DFL,
    ]
