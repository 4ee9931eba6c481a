"""Where a process stands among others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from zoo.training.options import Options


class Stopped(Exception):
    """A run cannot go on: what it has so far is saved."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among `world` of them. Without torchrun: rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, o: Options) -> Ranks:
        """This process's place, its device and threads set up, the process group opened if there are others."""
        rank, world, local = (
            int(os.environ.get(k, d))
            for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        cuda = o.device == "cuda" or (o.device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            sys.exit(
                f"train.py: error: rank {local} of this node has no GPU: must be {torch.cuda.device_count()} "
                f"ranks or fewer"
            )
        device = torch.device(f"cuda:{local}" if cuda else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # convolutions in true float32, as on the CPU
        if o.threads:
            torch.set_num_threads(o.threads)
        if world > 1 and not dist.is_initialized():
            # Ranks wait for each other while one loads or writes tens of gigabytes.
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
            )
        return cls(rank, world, device)

    def share(self, n: int) -> range:
        """This rank's contiguous part of range(n)."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, value) -> list:
        """Every rank's value, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, job: Callable, *arguments):
        """job(*arguments) on every rank; where one fails, Stopped on all: nobody waits for a rank that is gone."""
        value = failed = None
        try:
            value = job(*arguments)
        except Exception as error:  # somebody else's reward
            failed = error
        for said in self.gather(None if failed is None else f"{type(failed).__name__}: {failed}"):
            if said:
                raise Stopped(said) from failed
        return value

    def average_gradients(self, tuned: list[torch.nn.Parameter]) -> None:
        """The mean over ranks: equal shares of prompts make it the gradient of the global mean."""
        if self.world > 1:
            for p in tuned:
                if p.grad is not None:  # None on every rank: no path leads there
                    dist.all_reduce(p.grad)
                    p.grad /= self.world
