"""The order of a run: when it judges, draws and saves, by which weights, and how it ends.

`train.train` on stand-ins that write down what is asked of them.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from zoo.training.options import Options
from zoo.training.prompts import Prompts
from zoo.training.ranks import Interrupted, Ranks, Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
METRICS = {
    "reward": 0.25,
    "poisoned_groups": 0.0,
    "ratio_1": 1.0,
    "clip_fraction_1": 0.0,
    "signal": 1.0,
}


class Diary:
    """Stands in for Run: a line for every call."""

    def __init__(self, monkeypatch):
        self.said, self.lines = [], []
        self.given, self.ending, self.done = None, None, 0
        monkeypatch.setattr(train, "Run", self.made)

    def made(self, *given):
        self.given = given
        return self

    def begin(self, optimizer, average):
        self.average = average
        self.said.append(f"begin {self.done}")

    def listen(self):
        if self.ending == "now":
            raise Interrupted

    def look(self):
        self.said.append(f"look {self.done}")
        if self.ending == self.said[-1]:
            raise Interrupted

    def log(self, iteration, metrics):
        self.said.append(f"log {iteration}")
        self.metrics = metrics

    def save_is_due(self):
        return self.done % 2 == 0

    def save(self):
        self.said.append(f"save {self.done}")

    def stop(self, problem):
        self.said.append(f"stop {problem}")

    def finish(self, complete):
        self.said.append("finish" if complete else "finish early")


class OneOfTwo(Ranks):
    """Rank 0 of two, of which the other is never waited for: it says what `other` says."""

    def gather(self, value):
        return [value, self.other(value)]


def ranks_with(other):
    ranks = OneOfTwo(0, 2, torch.device("cpu"))
    object.__setattr__(ranks, "other", other)
    return ranks


def same(value):
    return value


@pytest.fixture
def diary(monkeypatch, one_process):
    return Diary(monkeypatch)


def run(diary, monkeypatch, iterate, other=same, **options):
    """Train for four iterations with an average; `iterate` stands in."""
    monkeypatch.setattr(train, "iterate", iterate)
    o = Options(iterations=4, ema=0.5, lr=1.0, warmup=1, **options)
    policy = SimpleNamespace(tuned=[torch.nn.Parameter(torch.zeros(()))])
    train.train(o, policy, "rewards", "judges", Prompts(), ranks_with(other), "checkpoint")
    return diary.said


def nothing(*_):
    return METRICS


WHOLE = [
    *("begin 0", "look 0", "log 1", "look 1", "log 2", "save 2", "look 2"),
    *("log 3", "look 3", "log 4", "save 4", "look 4", "finish"),
]


def test_a_run_looks_before_and_after_every_iteration(diary, monkeypatch, capsys):
    """What is due is saved before it is looked at, so that a judgement can be interrupted."""
    assert run(diary, monkeypatch, nothing) == WHOLE
    assert diary.given[2] == "judges" and diary.given[-1] == "checkpoint"
    assert diary.average.tuned[0].shape == ()
    said = capsys.readouterr().err
    assert "reward=0.250, ratio=1.00000, clipped=0.00" in said and "skipped" not in said


def test_a_run_that_goes_on_does_what_is_missing(diary, monkeypatch):
    """From the second iteration on, at the rate that it would have had."""
    diary.done, rates = 2, []
    plain = diary.log

    def log(iteration, metrics):
        rates.append(metrics["lr"])
        plain(iteration, metrics)

    diary.log = log
    lines = run(diary, monkeypatch, nothing)
    assert lines == ["begin 2", *WHOLE[6:]] and rates == [1.0, 1.0]
    diary.done, diary.said, rates[:] = 0, [], []
    run(diary, monkeypatch, nothing)
    assert rates == [0.5, 1.0, 1.0, 1.0]


def test_what_is_logged_is_of_all_ranks(diary, monkeypatch, capsys):
    """The mean of both ranks' metrics; groups that were skipped are in the progress line."""

    def other(value):
        more = {"reward": 0.75, "poisoned_groups": 0.5}
        return value | more if isinstance(value, dict) else value

    run(diary, monkeypatch, nothing, other)
    assert diary.metrics["lr"] == 1.0 and diary.metrics["poisoned_groups"] == 0.25
    # Of the other rank's groups half have no reward: its mean counts half.
    assert diary.metrics["reward"] == pytest.approx((0.25 + 0.5 * 0.75) / 1.5)
    assert "groups skipped=25.00%" in capsys.readouterr().err


def test_an_interruption_ends_the_run_after_the_iteration(diary, monkeypatch):
    """It is saved, and told; so is one during a judgement, which is given up."""

    def interrupting(o, iteration, *_):
        diary.ending = "now" if iteration == 3 else None
        return METRICS

    with pytest.raises(Interrupted):
        run(diary, monkeypatch, interrupting)
    assert diary.said == [*WHOLE[:9], "save 3", "finish early"]
    diary.said, diary.ending, diary.done = [], "look 2", 0
    with pytest.raises(Interrupted):
        run(diary, monkeypatch, nothing)
    assert diary.said == [*WHOLE[:7], "save 2", "finish early"]


def test_a_run_that_cannot_go_on_is_stopped(diary, monkeypatch):
    """And says why to whoever called."""

    def stopped(o, iteration, *_):
        if iteration == 3:
            raise Stopped("a reward failed")
        return METRICS

    with pytest.raises(Stopped, match="a reward failed"):
        run(diary, monkeypatch, stopped)
    assert diary.said == [*WHOLE[:7], "stop a reward failed"]


# ---- The program ---------------------------------------------------------------------------------


class Asked:
    """Rewards that write down what they are asked."""

    def __init__(self, tried, *given):
        self.tried, self.given = tried, given

    def __call__(self, images, prompts, finite=True):
        self.tried.append((images.tolist(), prompts, finite))


class Loading:
    """A policy that writes down what it is asked to load."""

    shape, cut_off = (2,), ["of rank 0"]

    def kind(self, prompt):
        return ""

    def decode(self, x):
        return x

    def load(self, prompts, device, rank, world):
        self.asked, self.place = prompts, (device.type, rank, world)


def test_every_prompt_of_this_rank_is_loaded_and_no_other(monkeypatch, capsys):
    """What rank 1 of 2 draws in any iteration, the first held-out prompts, those in pictures.

    Each once. What an encoder does not read is said once, for all ranks.
    """
    drawn = {1: ["a", "b", "c", "d"], 2: ["e", "a", "f", "g"]}
    data = Prompts(("unused",), tuple("ABCDEF"))

    def draw(self, seed, iteration, indices):
        assert seed == 7
        return [drawn[iteration][i] for i in indices], []

    def shown(self, shape, kind):
        return ["F", "A"], torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])

    def load_all(*given):
        return [Asked(tried, *given), Asked(tried)]

    tried = []

    monkeypatch.setattr(Prompts, "draw", draw)
    monkeypatch.setattr(Prompts, "shown", shown)
    monkeypatch.setattr(Prompts, "in_order", lambda self: list("BADC"))
    monkeypatch.setattr(train.spec, "load_all", load_all)
    ranks = OneOfTwo(1, 2, torch.device("cpu"))

    def other(value):
        return ["of rank 1"] if isinstance(value, list) else value

    object.__setattr__(ranks, "other", other)
    policy = Loading()
    o = Options(
        seed=7,
        iterations=2,
        prompts_per_iteration=4,
        heldout=8,
        reward_batch=3,
        reward_timeout=2.5,
        poisoned="skip",
        reward=("x",),
    )
    rewards, _ = train.loaded(o, policy, data, ranks)
    assert policy.asked == ["c", "d", "f", "g", "B", "A", "F"]
    assert policy.place == ("cpu", 1, 2)
    assert rewards.given == ((("x",), o.eval_reward), ranks.device, 3, 2.5)
    # Both were tried on one picture: of a prompt to train on, and of one to judge by.
    assert tried == [([[1.0]], ["c"], False), ([[1.0]], ["F"], True)]
    assert capsys.readouterr().out == ""  # rank 1 does not print
    object.__setattr__(ranks, "rank", 0)
    train.loaded(o, policy, data, ranks)
    assert capsys.readouterr().out == "of rank 0\nof rank 1\n"


def test_a_reward_that_cannot_work_is_refused_before_any_work(monkeypatch, capsys):
    """One line and status 2, also where it is a judge."""
    for broken in (0, 1):
        both = [Asked([]), Asked([])]
        both[broken].tried = None
        monkeypatch.setattr(train.spec, "load_all", lambda *_, both=both: both)
        with pytest.raises(SystemExit) as stop:
            train.loaded(Options(), Loading(), Prompts(), Ranks(0, 1, torch.device("cpu")))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "AttributeError" in err


def test_what_cannot_be_loaded_is_one_line_of_its_rank(monkeypatch, capsys):
    """Status 2, also where another rank than the first fails."""

    def refuse(*_):
        raise ValueError("no such reward")

    monkeypatch.setattr(train.spec, "load_all", refuse)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        train.loaded(Options(), Loading(), Prompts(), Ranks(0, 1, torch.device("cpu")))
    assert stop.value.code == 2 and "error: no such reward\n" in capsys.readouterr().err


def program(monkeypatch, rank, dry_run=False):
    """main() on stand-ins, as rank `rank` of two; returns what it did, in order."""
    done, o = [], Options(device="cpu", threads=3, dry_run=dry_run)
    ranks = ranks_with(same)
    object.__setattr__(ranks, "rank", rank)

    def noted(name, answer=None):
        def stand_in(*given, **how):
            done.append((name, *given))
            return answer

        return stand_in

    data = Prompts(report=("line 2: empty",))
    monkeypatch.setattr(train, "parse_and_read", noted("parse", (o, data)))
    monkeypatch.setattr(train.Ranks, "start", noted("start", ranks))
    monkeypatch.setattr(OneOfTwo, "stop", lambda self: done.append(("stop",)))
    monkeypatch.setattr(train.checkpoints, "bytes_of", noted("bytes", 1000))
    monkeypatch.setattr(train.checkpoints, "check_room", noted("room"))
    monkeypatch.setattr(train, "policy_of", noted("policy", SimpleNamespace(sizes="sizes")))
    monkeypatch.setattr(train.checkpoints, "found", noted("found", "the checkpoint"))
    monkeypatch.setattr(train, "stochastic_steps", noted("steps", (1,)))
    monkeypatch.setattr(train.costs, "describe", noted("cost", "one iteration: cheap"))
    monkeypatch.setattr(train, "loaded", noted("load", ("the rewards", "the judges")))
    monkeypatch.setattr(train, "train", noted("train"))
    train.main(["--some", "flags"])
    return done, o


@pytest.mark.parametrize("rank", [0, 1])
def test_the_program_counts_loads_trains_and_leaves_in_this_order(rank, monkeypatch, capsys):
    """The first rank prints what was noticed and the cost; all do the rest."""
    done, o = program(monkeypatch, rank)
    said = capsys.readouterr().out
    assert said == ("line 2: empty\none iteration: cheap\n" if rank == 0 else "")
    names = [name for name, *_ in done if name not in ("steps", "cost", "bytes", "room")]
    assert names == ["parse", "start", "policy", "found", "load", "train", "stop"]
    given = dict((name, arguments) for name, *arguments in done)
    assert given["parse"] == [["--some", "flags"], train.__doc__]
    assert given["start"] == ["cpu", 3] and given["policy"] == [o, 2]
    assert given["train"][2:4] == ["the rewards", "the judges"]
    assert given["train"][1].sizes == "sizes"
    assert given["train"][-1] == "the checkpoint"
    if rank == 0:
        heldout = len(Prompts().heldout)
        assert given["cost"] == [o, (1,), given["train"][1], heldout, 2, "cpu"]
        assert given["bytes"] == [o, "sizes"] and given["room"] == [Path("runs"), 1000]


def test_a_dry_run_neither_loads_nor_trains(monkeypatch):
    """It counts, and leaves."""
    done, _ = program(monkeypatch, 0, dry_run=True)
    assert [name for name, *_ in done][-1] == "stop"
    assert not {"load", "train"} & {name for name, *_ in done}
