"""Checkpoints: whole or not there, whatever fails; verified, pruned, the same on every rank."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.training import checkpoints, files
from zoo.training.options import Options
from zoo.training.policies import EMA, Sizes
from zoo.training.ranks import Ranks, Unwritable

pytestmark = pytest.mark.usefixtures("one_process")
ALONE = Ranks(0, 1, torch.device("cpu"))
RUN = Path("run")


class Toy:
    """A policy of two trained weights and one that is not."""

    def __init__(self, value):
        self.network = nn.ParameterDict({name: torch.full((2,), value) for name in "abc"})
        self.network["c"].requires_grad_(False)
        self.tuned = [self.network["b"], self.network["a"]]

    def save(self, folder, main):
        if main:
            save_file(
                {name: p.detach() for name, p in self.network.items()}, folder / "w.safetensors"
            )
        return "w.safetensors"


def trained(value=1.0, steps=3):
    """A toy after some steps of Adam, its optimiser and its average."""
    policy = Toy(value)
    optimizer = torch.optim.AdamW(policy.tuned, 0.1)
    average = EMA(policy.tuned, 0.5)
    for step in range(steps):
        for p in policy.tuned:
            p.grad = torch.tensor([1.0, -2.0 - step])
        optimizer.step()
        average.update()
    return policy, optimizer, average


def write(iteration, moved, needed=0, ranks=ALONE):
    if not RUN.exists():
        RUN.mkdir()
    return checkpoints.write(RUN, iteration, *moved, {"seconds": 1.5}, needed, ranks)


def all_of(policy, optimizer, average):
    """Everything that a checkpoint should bring back."""
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in policy.tuned]
    return [p.detach().clone() for p in policy.tuned], moments, [z.clone() for z in average.average]


def test_what_is_written_is_what_comes_back():
    """Weights, moments, average and generators; what is saved as weights is the average."""
    moved = trained()
    wanted = all_of(*moved)
    torch.manual_seed(8)
    assert write(7, moved) == "w.safetensors"
    drawn = torch.rand(3)
    folder = checkpoints.place_of(RUN, 7)
    assert checkpoints.problem_of(folder) == "" and checkpoints.newest(RUN) == (folder, [])
    exported = load_file(RUN / "w.safetensors")
    assert torch.equal(exported["b"], moved[2].average[0]) and torch.equal(
        exported["c"], torch.ones(2)
    )
    others = trained(5.0, 1)
    state = checkpoints.restore(folder, *others, ALONE)
    assert (state["iteration"], state["seconds"], state["weights"]) == (7, 1.5, "w.safetensors")
    found = all_of(*others)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(others[0].network["c"], torch.full((2,), 5.0))  # nobody trains it


def test_a_checkpoint_of_another_model_is_refused():
    """By the names of its weights."""
    write(1, trained())
    other = Toy(1.0)
    other.tuned = other.tuned[:1]
    with pytest.raises(ValueError, match="holds other weights than this model trains"):
        checkpoints.restore(
            checkpoints.place_of(RUN, 1), other, torch.optim.SGD(other.tuned), None, ALONE
        )


SPOILED = {
    "state/00000.safetensors is missing": lambda f: (f / "state/00000.safetensors").unlink(),
    "w.safetensors has 3 bytes, must have": lambda f: (f / "w.safetensors").write_bytes(b"abc"),
    "state.json is not what was written": lambda f: swap(f / "state.json"),
    "random.safetensors is not what was written": lambda f: swap(f / "random.safetensors"),
    "manifest.json cannot be read": lambda f: (f / "manifest.json").write_text(""),
    "manifest.json does not list": lambda f: (f / "manifest.json").write_text("{}"),
    "manifest.json cannot": lambda f: (f / "manifest.json").write_text('{"state.json": 3}'),
    "manifest.json cannot be ": lambda f: (f / "manifest.json").write_text("[" * 10**5),
    "more.safetensors is not in manifest.json": lambda f: (f / "more.safetensors").write_text("x"),
    "manifest.json cannot be": lambda f: (f / "manifest.json").unlink(),
}


def swap(path):
    """The last two different bytes in each other's place."""
    content = bytearray(path.read_bytes())
    i = next(i for i in range(len(content) - 2, 0, -1) if content[i] != content[i + 1])
    content[i], content[i + 1] = content[i + 1], content[i]
    path.write_bytes(content)


@pytest.mark.parametrize("said", SPOILED)
def test_whatever_is_wrong_with_a_checkpoint_is_named(said):
    """And the one before it is what a run goes on from."""
    write(1, trained())
    write(2, trained())
    folder = checkpoints.place_of(RUN, 2)
    SPOILED[said](folder)
    assert said in checkpoints.problem_of(folder)
    found, skipped = checkpoints.newest(RUN)
    assert found == checkpoints.place_of(RUN, 1)
    assert len(skipped) == 1 and skipped[0].startswith(f"{folder}: skipped, since {said}")
    SPOILED[said](checkpoints.place_of(RUN, 1))
    with pytest.raises(ValueError, match="no checkpoint is whole; run/check"):
        checkpoints.newest(RUN)
    write(2, trained())  # takes the place of the spoiled one
    assert checkpoints.newest(RUN) == (folder, [])


def test_nothing_else_is_taken_for_a_checkpoint():
    """A file, a part of one, another name."""
    assert checkpoints.newest(RUN) == (None, [])
    write(3, trained())
    for name in (".000009.part", "latest", "٣"):
        (RUN / "checkpoints" / name).mkdir()
    assert checkpoints.saved(RUN) == [3]
    write(4, trained())  # what an interruption has left is cleared away
    assert not list((RUN / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("best", "kept"), [(None, [4, 5]), (2, [2, 4, 5]), (5, [4, 5])])
def test_the_last_ones_and_the_best_stay(best, kept):
    """Others are removed whole."""
    for iteration in range(1, 6):
        write(iteration, trained())
    checkpoints.prune(RUN, 5, best)
    assert checkpoints.saved(RUN) == kept
    assert all(not checkpoints.problem_of(checkpoints.place_of(RUN, n)) for n in kept)


def test_later_checkpoints_that_are_spoiled_are_not_the_last_ones():
    """A run that went on from before them keeps what it has."""
    for iteration in (1, 2, 8, 9):
        write(iteration, trained())
    for iteration in (8, 9):
        (checkpoints.place_of(RUN, iteration) / "manifest.json").write_text("")
    write(3, trained())
    checkpoints.prune(RUN, 3, None)
    assert checkpoints.saved(RUN) == [2, 3, 8, 9]
    assert checkpoints.newest(RUN)[0] == checkpoints.place_of(RUN, 3)


# ---- Disks that fail -----------------------------------------------------------------------------


class Disk:
    """Counts what is done to the disk, and fails at the n-th."""

    def __init__(self, monkeypatch, fail_at=None, error=errno.ENOSPC):
        self.done, self.fail_at, self.error = [], fail_at, error
        for place, name in (
            (checkpoints, "save_file"),
            (checkpoints.os, "rename"),
            (checkpoints.os, "replace"),
            (checkpoints.os, "fsync"),
            (Path, "write_text"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(place, name, self.failing(name, getattr(place, name)))

    def failing(self, name, plain):
        def watched(*given, **how):
            self.done.append(name)
            if len(self.done) == self.fail_at:
                raise OSError(self.error, os.strerror(self.error))
            return plain(*given, **how)

        return watched


def test_a_disk_that_fails_at_any_moment_leaves_what_was_there(monkeypatch):
    """One line, nothing half-written, and the checkpoint of before whole; then it goes on."""
    moved = trained()
    write(1, moved)
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        write(2, moved)
    moments = len(disk.done)
    assert moments > 15 and {"save_file", "rename", "fsync", "write_text"} <= set(disk.done)
    for moment in range(1, moments + 1):
        files.link(RUN / "w.safetensors", "checkpoints/000001/w.safetensors")
        shutil.rmtree(checkpoints.place_of(RUN, 2), ignore_errors=True)
        before = all_of(*moved)
        with monkeypatch.context() as patch:
            Disk(patch, fail_at=moment)
            with pytest.raises(Unwritable, match=r"^run: cannot be written \(No space left"):
                write(2, moved)
        assert checkpoints.problem_of(checkpoints.place_of(RUN, 1)) == ""
        whole = [
            n
            for n in checkpoints.saved(RUN)
            if not checkpoints.problem_of(checkpoints.place_of(RUN, n))
        ]
        assert whole == checkpoints.saved(RUN)  # no half
        assert load_file(RUN / "w.safetensors").keys() == {"a", "b", "c"}
        for a, b in zip(all_of(*moved), before):
            torch.testing.assert_close(a, b, rtol=0, atol=0)  # the average is out of the way again
    write(2, moved)
    assert checkpoints.saved(RUN) == [1, 2]


def test_all_is_on_the_disk_before_the_folder_has_its_name(monkeypatch):
    """Every file and folder is flushed, then renamed, then the names are flushed."""
    order = []
    plain_flush, plain_rename = files.flush, os.rename
    monkeypatch.setattr(files, "flush", lambda path: (order.append(path.name), plain_flush(path)))
    monkeypatch.setattr(
        checkpoints.os, "rename", lambda a, b: (order.append("rename"), plain_rename(a, b))
    )
    write(1, trained())
    at = order.index("rename")
    flushed = {"manifest.json", "state.json", "random.safetensors", "w.safetensors", "state"}
    assert flushed | {"00000.safetensors", ".000001.part"} == set(order[:at])
    assert order[at + 1] == "checkpoints"


def test_room_is_looked_for_on_the_disk_of_the_run(monkeypatch):
    """Before anything is written, and one line says what there is and what is needed."""
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=2**30)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    RUN.mkdir()
    with pytest.raises(Unwritable, match=r"--out run: its disk has 1.00 GiB free, must have 3.00"):
        write(1, trained(), needed=3 * 2**30)
    assert asked == [RUN] and not checkpoints.saved(RUN)
    checkpoints.check_room(Path("run/not/there/yet"), 2**30)
    assert asked[-1] == RUN.absolute()
    sizes = Sizes(weights=1000, tuned=100, rows=1, frozen=0, masters=0)
    takes = {
        4 * 3 * 100 + 4 * 1000: Options(),
        4 * 4 * 100 + 4 * 1000: Options(ema=0.5),
        4 * 1 * 100 + 4 * 100: Options(optimizer="sgd", tune="lora"),
        4 * 3 * 100 + 2 * 1000: Options(tune="full", dtype="bfloat16"),
    }
    for wanted, o in takes.items():
        assert checkpoints.bytes_of(o, sizes) == wanted


def test_files_have_the_usual_mode():
    """Whoever may read what Python writes may read these."""
    plain = os.umask(0o027)
    try:
        write(1, trained())
        files.write_json(Path("plain.json"), {})
    finally:
        os.umask(plain)
    paths = [path for path in RUN.rglob("*") if path.is_file() and not path.is_symlink()]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (*paths, Path("plain.json"))}
    assert len(paths) == 5 and modes == {0o640}


# ---- Single files --------------------------------------------------------------------------------


def test_a_file_is_the_old_or_the_new(monkeypatch):
    """Also where writing fails, and where it is interrupted."""
    path = Path("file.json")
    files.write_json(path, {"a": 1})
    before = path.read_text()
    assert json.loads(before) == {"a": 1}
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), files.replacing(path) as part:
            part.write_text("half")
            assert part.suffix == ".json" and path.read_text() == before
            raise error
    assert path.read_text() == before and os.listdir() == ["file.json"]


def test_json_is_strict():
    """What is not finite is a word; nested, too."""
    value = {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": -float("inf"), "d": True}}
    wanted = {"a": ["nan", [1.5, "inf"]], "b": {"c": "-inf", "d": True}}
    assert json.loads(files.to_json(value), parse_constant=pytest.fail) == wanted
    files.append_line(Path("lines"), value)
    files.append_line(Path("lines"), {})
    assert Path("lines").read_text().splitlines() == [json.dumps(wanted), "{}"]
