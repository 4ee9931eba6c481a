"""Ranks: who does what, how all stop together, what is averaged; two of them are two threads."""

import os
import platform
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from thread_ranks import together

from zoo.training import files
from zoo.training import ranks as ranks_module
from zoo.training.ranks import Ranks, Stopped, Unwritable, fail, place, stopping

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_values_are_gathered_in_the_order_of_ranks(monkeypatch):
    """Every rank has all of them; alone it has its own."""
    found = together(monkeypatch, lambda ranks: ranks.gather(f"of {ranks.rank}"), world=3)
    assert found == [["of 0", "of 1", "of 2"]] * 3
    assert Ranks(0, 1, CPU).gather("mine") == ["mine"]


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ZeroDivisionError, MemoryError])
def test_whatever_a_reward_raises_stops_the_run(error):
    """It is somebody else's code; its error is told by name."""

    def reward():
        raise error("gone")

    try:
        Ranks(0, 1, CPU).together(reward)
    except Exception as stop:
        assert isinstance(stop, Stopped) and str(stop).startswith(f"{error.__name__}: ")
    else:
        pytest.fail("it went on")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_reward_that_fails_on_one_of_two_ranks_stops_both(failing, monkeypatch):
    """With the message of the one that failed; its own error is the cause there, and only there."""

    def reward(rank):
        if rank == failing:
            raise ValueError("no number")
        return rank

    found = together(monkeypatch, lambda ranks: ranks.together(reward, ranks.rank))
    assert [str(error) for error in found] == ["ValueError: no number"] * 2
    assert all(isinstance(error, Stopped) for error in found)
    causes = [error.__cause__ for error in found]
    assert isinstance(causes[failing], ValueError) and causes[1 - failing] is None
    assert together(monkeypatch, lambda ranks: ranks.together(reward, ranks.rank + 5)) == [5, 6]


def test_gradients_are_averaged_and_not_added(monkeypatch):
    """The mean over ranks; a weight without a gradient is left out."""

    def job(ranks):
        with_one, without = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        with_one.grad = torch.tensor([1.0, 2.0]) * (1 + 2 * ranks.rank)
        ranks.average_gradients([without, with_one])
        return without.grad, with_one.grad.tolist()

    assert together(monkeypatch, job) == [(None, [2.0, 4.0])] * 2
    alone = torch.nn.Parameter(torch.zeros(1))
    alone.grad = torch.ones(1)
    Ranks(0, 1, CPU).average_gradients([alone])
    assert alone.grad.item() == 1


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_what_holds_on_every_rank_holds(failing, monkeypatch):
    """And what fails on one holds on none."""
    found = together(monkeypatch, lambda ranks: ranks.all(ranks.rank != failing))
    assert found == [failing is None] * 2
    assert Ranks(0, 1, CPU).all(True) and not Ranks(0, 1, CPU).all(False)


def test_what_stops_one_rank_stops_both_in_its_own_words(monkeypatch):
    """Without the name of a class."""

    def job(rank):
        if rank == 1:
            raise Stopped("the disk is full")

    found = together(monkeypatch, lambda ranks: ranks.together(job, ranks.rank))
    assert [str(error) for error in found] == ["the disk is full"] * 2


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left"), SafetensorError("No space left")]
)
def test_a_disk_that_fails_the_first_rank_stops_both(problem, monkeypatch):
    """In one line of the run; the other writes nothing, and does not wait."""

    def write(where):
        raise problem

    def job(ranks):
        files.by_first(ranks, Path("run"), write, "there")

    found = together(monkeypatch, job)
    assert all(isinstance(error, Unwritable) for error in found)
    assert {str(error).split(";")[0] for error in found} == {
        "run: cannot be written (No space left)"
    }


def test_ranks_that_cannot_meet_are_one_line(monkeypatch, capsys):
    """Without an address to meet at."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        Ranks.start("cpu", 0)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "ranks cannot meet: " in err and "MASTER_ADDR" in err


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("RANK", "x", "RANK='x': must be a whole number, 0 or more"),
        ("RANK", "-1", "RANK='-1'"),
        ("RANK", "1", "RANK=1: must be below WORLD_SIZE=1"),
        ("RANK", "9" * 5000, "RANK='999"),
        ("WORLD_SIZE", "0", "WORLD_SIZE='0': must be a whole number, 1 or more"),
        ("WORLD_SIZE", "-1", "WORLD_SIZE='-1'"),
        ("LOCAL_RANK", "", "LOCAL_RANK=''"),
        ("LOCAL_RANK", "\u00b2", "LOCAL_RANK='\u00b2'"),
    ],
)
def test_what_is_no_place_is_one_line(name, value, wanted, monkeypatch, capsys):
    """Status 2, before a process group is waited for, whatever rank this is."""
    for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        Ranks.start("cpu", 0)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and wanted in err and err.count("\n") == 1


def test_shares_are_parts_of_a_whole():
    """One after another, as even as can be."""
    for n, world in ((8, 2), (8, 4), (9, 3), (7, 2)):
        shares = [list(Ranks(rank, world, CPU).share(n)) for rank in range(world)]
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks(0, 2, CPU).leads and not Ranks(1, 2, CPU).leads


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs, as far as a test can tell; what was set up on it."""
    calls = Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(torch, "set_num_threads", calls.set_num_threads)
    monkeypatch.setattr(ranks_module, "keep_memory", calls.keep_memory)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(ranks_module.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks_module.dist, "init_process_group", calls.init)
    monkeypatch.setattr(ranks_module.dist, "destroy_process_group", calls.destroy)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(calls=calls, env=monkeypatch.setenv)


def test_a_process_alone_needs_no_group(machine):
    """Rank 0 of 1 on the device that is asked for, with as many threads."""
    assert place() == (0, 1, 0)
    alone = Ranks.start("cpu", 3)
    assert (alone.rank, alone.world, alone.device) == (0, 1, CPU)
    machine.calls.set_num_threads.assert_called_once_with(3)
    machine.calls.keep_memory.assert_called_once_with()
    assert Ranks.start("auto", 0).device == torch.device("cuda:0")
    machine.calls.set_num_threads.assert_called_once_with(3)  # 0 leaves torch its choice
    machine.calls.keep_memory.assert_called_once_with()  # CUDA has an allocator of its own
    alone.stop()
    assert not machine.calls.init.called and not machine.calls.destroy.called


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_ranks_find_each_other(device, backend, machine):
    """By torchrun's variables; GPUs by their number in the node; patience for large files."""
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1)):
        machine.env(name, str(value))
    assert place() == (5, 8, 1)
    ranks = Ranks.start(device, 0)
    assert (ranks.rank, ranks.world) == (5, 8)
    assert ranks.device == torch.device("cpu" if device == "cpu" else "cuda:1")
    assert machine.calls.set_device.called == (device == "cuda")
    assert torch.backends.cudnn.allow_tf32 == (device == "cpu")  # float32 means float32
    machine.calls.init.assert_called_once_with(backend, timeout=timedelta(hours=2))
    ranks.stop()
    assert machine.calls.destroy.called


def test_a_rank_without_a_gpu_says_so(machine, capsys):
    """Whichever rank it is: status 2 and one line."""
    for name, value in (("RANK", 2), ("WORLD_SIZE", 3), ("LOCAL_RANK", 2)):
        machine.env(name, str(value))
    with pytest.raises(SystemExit) as stop:
        Ranks.start("cuda", 0)
    assert stop.value.code == 2
    assert "rank 2 of this node has no GPU: must be 2 ranks or fewer" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "anywhere", "said"), [(0, 0, 1), (1, 0, 0), (1, 1, 1), (0, 1, 1)])
def test_what_fails_is_said_once(rank, anywhere, said, monkeypatch, capsys):
    """By the first rank, where all fail alike; by any, where one does. Status 2 on all."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("sys.argv", ["some/where/train.py"])
    with pytest.raises(SystemExit) as stop:
        fail("it is wrong", anywhere=bool(anywhere))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: it is wrong\n" * said


@pytest.mark.parametrize(
    ("cause", "traced"), [(None, False), (ValueError("x"), False), (KeyError("theirs"), True)]
)
def test_a_stop_is_one_line_after_the_traceback_of_others(cause, traced, monkeypatch, capsys):
    """A value that was refused needs no traceback; an error of a reward's own code does."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop, stopping():
        raise Stopped("the reward failed") from cause
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.endswith("error: the reward failed\n")
    assert ("KeyError: 'theirs'" in err) == traced and (traced or err.count("\n") == 1)


FAULTS = """
import resource
from zoo.training.ranks import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        held = [bytearray(8 << 20) for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
told = keep_memory()
faults()
print(told, first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_memory_that_is_freed_is_kept_for_the_next_tensors():
    """Pages are asked for once, and not in every round anew."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    told, first, then = done.stdout.split()
    assert told == "True" and int(then) < int(first) / 4, done.stdout


@pytest.mark.parametrize("error", [None, OSError, TypeError])
def test_another_libc_is_told_nothing(error, monkeypatch):
    """One without mallopt, and a system that has no such library to ask."""

    def library(name):
        if error:
            raise error
        return object()

    monkeypatch.setattr(ranks_module.ctypes, "CDLL", library)
    assert not ranks_module.keep_memory()


ALONE = """
import os, torch
from zoo.training.ranks import Ranks
ranks = Ranks.start("cpu", 1)
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
ranks.gather(0)
torch.optim.AdamW([p]).step()
ranks.stop()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print("left:", [name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux")
def test_no_thread_of_the_group_outlives_it():
    """One that ends while Python does can abort a finished run."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE], env={**os.environ, **place, "RANK": rank}, **how
        )
        for rank in "01"
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "left: []\n", err


def free_port():
    """A TCP port that is free now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
