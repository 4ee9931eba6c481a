"""The order of a run: when it judges, draws and saves, by which weights, and how it ends.

`train.train` on stand-ins that write down what is asked of them.
"""

import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import train
from zoo.training.options import Options
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks, Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
METRICS = {"reward": 0.25, "ratio_1": 1.0, "clip_fraction_1": 0.0, "signal": 1.0}


class Diary:
    """Stands in for Run, and for the average: a line for every call."""

    def __init__(self, monkeypatch):
        self.lines, self.given = [], None
        monkeypatch.setattr(train, "Run", self.begin)
        monkeypatch.setattr(train.policies, "EMA", self.average)

    def begin(self, *given):
        self.given = given
        return self

    def average(self, tuned, decay):
        self.decay = decay
        return self

    @contextmanager
    def applied(self):
        self.lines.append("average on")
        yield
        self.lines.append("average off")

    def picture(self, title):
        self.lines.append(f"draw {title}")

    def judge(self, iteration, when=""):
        self.lines.append(f"judge {iteration} {when}".strip())

    def log(self, iteration, metrics):
        self.lines.append(f"log {iteration}")
        self.metrics = metrics

    def save(self, done):
        self.lines.append(f"save {done}")

    def finish(self, done, complete):
        self.lines.append(f"finish {done} {'complete' if complete else 'interrupted'}")


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
    """Train for four iterations, judging every second, with an average; `iterate` stands in."""
    monkeypatch.setattr(train, "iterate", iterate)
    o = Options(iterations=4, eval_every=2, ema=0.5, lr=1.0, warmup=1, **options)
    policy = SimpleNamespace(tuned=[torch.nn.Parameter(torch.zeros(()))])
    train.train(o, policy, "rewards", "judges", Prompts(), ranks_with(other))
    return diary.lines


def nothing(*_):
    return METRICS


BEFORE = ["draw before", "judge 0 before"]
BETWEEN = ["average on", "judge 2", "draw after 2 iterations", "save 2", "average off"]


def test_a_run_judges_draws_and_saves_the_average(diary, monkeypatch, capsys):
    """Before by the model as it is; between, after and at the end by the average, once each."""
    assert run(diary, monkeypatch, nothing) == [
        *BEFORE,
        *("log 1", "log 2"),
        *BETWEEN,
        *("log 3", "log 4"),
        *("average on", "judge 4 after", "draw after 4 iterations", "average off"),
        *("average on", "finish 4 complete", "average off"),
    ]
    assert diary.decay == 0.5 and diary.given[2] == "judges"
    assert "reward=0.250, ratio=1.00000, clipped=0.00" in capsys.readouterr().err


def test_what_is_logged_is_of_all_ranks(diary, monkeypatch):
    """The mean of both ranks' metrics, and the rate that the iteration was made with."""

    def other(value):
        return value | {"reward": 0.75} if isinstance(value, dict) else value

    run(diary, monkeypatch, nothing, other)
    assert diary.metrics["reward"] == 0.5 and diary.metrics["lr"] == 1.0


INTERRUPTED = ["average on", "draw after 2 iterations", "average off"]
INTERRUPTED += ["average on", "finish 2 interrupted", "average off"]


def test_ctrl_c_on_any_rank_ends_both_after_the_iteration(diary, monkeypatch):
    """Another rank's, noted in the second iteration: nothing more is trained, or judged as done."""
    done = []

    def counting(*_):
        done.append(1)
        return METRICS

    def other(value):
        return len(done) == 2 if value is False else value

    lines = run(diary, monkeypatch, counting, other)
    assert lines == [*BEFORE, "log 1", "log 2", *BETWEEN, *INTERRUPTED]


def test_a_second_ctrl_c_ends_at_once(diary, monkeypatch):
    """The first is noted and the iteration goes on; after it Python's own handler is back."""
    noted = []

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        noted.append(signal.getsignal(signal.SIGINT))
        return METRICS

    lines = run(diary, monkeypatch, interrupted)
    assert noted == [signal.default_int_handler]
    assert lines[-2] == "finish 1 interrupted" and "log 1" in lines


@pytest.mark.parametrize("failing", [1, 3])
def test_a_run_that_cannot_go_on_keeps_what_there_is(diary, monkeypatch, failing):
    """What is done is saved, by the average, as interrupted; nothing where nothing is done."""

    def stopped(o, iteration, *_):
        if iteration == failing:
            raise Stopped("a reward failed")
        return METRICS

    with pytest.raises(Stopped, match="a reward failed"):
        run(diary, monkeypatch, stopped)
    kept = ["average on", "finish 2 interrupted", "average off"]
    expected = [*BEFORE, "log 1", "log 2", *BETWEEN, *kept] if failing == 3 else BEFORE
    assert diary.lines == expected


# ---- The program ---------------------------------------------------------------------------------


class Loading:
    """A policy that writes down what it is asked to load."""

    shape, cut_off = (2,), ["of rank 0"]

    def kind(self, prompt):
        return ""

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
        return ["F", "A"], None

    monkeypatch.setattr(Prompts, "draw", draw)
    monkeypatch.setattr(Prompts, "shown", shown)
    monkeypatch.setattr(Prompts, "in_order", lambda self: list("BADC"))
    monkeypatch.setattr(train.spec, "load_all", lambda *given: [given, "judges"])
    ranks = OneOfTwo(1, 2, torch.device("cpu"))
    object.__setattr__(ranks, "other", lambda value: ["of rank 1"])
    policy = Loading()
    o = Options(
        seed=7, iterations=2, prompts_per_iteration=4, heldout=8, reward_batch=3, reward=("x",)
    )
    rewards, judges = train.loaded(o, policy, data, ranks)
    assert policy.asked == ["c", "d", "f", "g", "B", "A", "F"]
    assert policy.place == ("cpu", 1, 2) and judges == "judges"
    assert rewards == ((("x",), o.eval_reward), ranks.device, 3)
    assert capsys.readouterr().out == ""  # rank 1 does not print
    object.__setattr__(ranks, "rank", 0)
    train.loaded(o, policy, data, ranks)
    assert capsys.readouterr().out == "of rank 0\nof rank 1\n"


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

    monkeypatch.setattr(train, "parse", noted("parse", o))
    monkeypatch.setattr(train.Ranks, "start", noted("start", ranks))
    monkeypatch.setattr(OneOfTwo, "stop", lambda self: done.append(("stop",)))
    monkeypatch.setattr(train, "policy_of", noted("policy", "the policy"))
    monkeypatch.setattr(train, "prompts_of", noted("prompts", Prompts(report=("line 2: empty",))))
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
    names = [name for name, *_ in done if name not in ("steps", "cost")]
    assert names == ["parse", "start", "policy", "prompts", "load", "train", "stop"]
    given = dict((name, arguments) for name, *arguments in done)
    assert given["parse"] == [["--some", "flags"], train.__doc__]
    assert given["start"] == ["cpu", 3] and given["policy"] == [o, 2]
    assert given["train"][1:4] == ["the policy", "the rewards", "the judges"]
    if rank == 0:
        heldout = len(Prompts().heldout)
        assert given["cost"] == [o, (1,), "the policy", heldout, 2, "cpu"]


def test_a_dry_run_neither_loads_nor_trains(monkeypatch):
    """It counts, and leaves."""
    done, _ = program(monkeypatch, 0, dry_run=True)
    assert [name for name, *_ in done][-1] == "stop"
    assert not {"load", "train"} & {name for name, *_ in done}
