"""Where a process stands among others, and how all of them stop together."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

# Its functions have the process group of the moment as a default argument. Imported later, by
# torch's own optimisers, they would keep the group's threads alive beyond `Ranks.stop`, and one of
# them that ends while Python does aborts the process: a finished run with an exit status of -6.
import torch.distributed.nn.functional

T = TypeVar("T")


# Exit statuses. A run that is over ends with 0, and Python ends one interrupted twice.
STOPPED, REFUSED, INTERRUPTED = 1, 2, 3


class Stopped(Exception):
    """A run cannot go on: what it has so far is saved, if it can be kept."""

    keep = True


class Unwritable(Stopped):
    """The disk does not take what it should."""

    keep = False


class Interrupted(Exception):
    """A run was asked to end early."""


def fail(message: str, anywhere: bool = False, status: int = REFUSED) -> NoReturn:
    """End this process with a status and a line on standard error: a node's, or any rank's."""
    if anywhere or "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")):
        said = " ".join(message.splitlines())  # it may quote what was typed
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {said}\n")
    sys.exit(status)


@contextmanager
def stopping() -> Iterator[None]:
    """Within, Stopped ends the program with status 1, after the traceback of code not ours."""
    try:
        yield
    except Stopped as problem:
        cause = problem.__cause__
        if cause is not None and not isinstance(cause, ValueError):
            traceback.print_exception(cause)
        fail(str(problem), status=STOPPED)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among `world` of them. Without torchrun: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str, threads: int) -> Ranks:
        """This process's place, its device and threads set up, a process group among others.

        device is cpu, cuda or auto; threads 0 leaves their number to torch.
        """
        rank, world, local = place()
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            most = f"must be {torch.cuda.device_count()} ranks or fewer"
            fail(f"rank {local} of this node has no GPU: {most}", anywhere=True)
        own = torch.device(f"cuda:{local}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(own)
            # Convolutions in true float32, as on the CPU.
            torch.backends.cudnn.allow_tf32 = False
        else:
            keep_memory()
        if threads:
            torch.set_num_threads(threads)
        if world > 1 and not dist.is_initialized():
            # Ranks wait for each other while one loads or writes tens of gigabytes.
            try:
                dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
            except (ValueError, RuntimeError) as problem:  # torchrun's variables, or the network
                fail(f"ranks cannot meet: {problem}", anywhere=True)
        return cls(rank, world, own)

    def stop(self) -> None:
        """Close the process group."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's contiguous part of range(n)."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, job: Callable[..., T], *arguments: Any) -> T:
        """job(*arguments) on every rank; where one fails, Stopped or Unwritable on all.

        So nobody waits for a rank that is gone.
        """
        value, failed, said = None, None, ""
        kind: type[Stopped] = Stopped
        try:
            value = job(*arguments)
        except Stopped as error:
            kind = Unwritable if isinstance(error, Unwritable) else Stopped
            said = str(error)
        except Exception as error:  # somebody else's reward
            failed, said = error, f"{type(error).__name__}: {error}"
        for its_kind, message in self.gather((kind, said)):
            if message:
                raise its_kind(message) from failed
        return value  # type: ignore[return-value]  # nothing failed

    def all(self, holds: bool) -> bool:
        """Whether it holds on every rank; one number is exchanged."""
        if self.world == 1:
            return holds
        failing = torch.tensor([0.0 if holds else 1.0], device=self.device)
        dist.all_reduce(failing)
        return not failing.item()

    def mean(self, vector: torch.Tensor) -> torch.Tensor:
        """The mean of the ranks' vectors, in place."""
        if self.world > 1:
            dist.all_reduce(vector)
            vector /= self.world
        return vector

    def average_gradients(self, tuned: Sequence[torch.nn.Parameter]) -> None:
        """The mean over ranks: equal shares of prompts make it the gradient of the global mean."""
        for p in tuned:
            if p.grad is not None:  # None on every rank: no path leads there
                self.mean(p.grad)


# Of mallopt(3): from what size on memory comes from the system and goes back to it; how much may
# lie free at the end of the heap. 32 MiB is the most that glibc takes for the first.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MIB = 2**20


def keep_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; whether it was so told.

    It would give the larger ones back at once, and every page that is asked for again is a page
    fault. Elsewhere than on Linux with glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    taken = mallopt(MMAP_THRESHOLD, 32 * MIB) and mallopt(TRIM_THRESHOLD, 1024 * MIB)
    return bool(taken)


def place() -> tuple[int, int, int]:
    """(rank, number of ranks, rank within this node), as torchrun says them.

    What cannot be a place is one line, of whichever process, and status 2.
    """
    rank, world, local = (number_of(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < world:
        fail(f"RANK={rank}: must be below WORLD_SIZE={world}", anywhere=True)
    return rank, world, local


def number_of(name: str) -> int:
    """One of torchrun's variables, and what it is without torchrun."""
    least = 1 if name == "WORLD_SIZE" else 0
    text = os.environ.get(name, str(least))
    fits = text.isascii() and text.isdigit() and len(text) < 10
    if not fits or int(text) < least:
        fail(f"{name}={text!r}: must be a whole number, {least} or more", anywhere=True)
    return int(text)
