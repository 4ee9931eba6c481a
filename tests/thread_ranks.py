"""Several ranks in one process: a thread each, which meet where torch.distributed would."""

import threading

import torch

from zoo.training import ranks as ranks_module
from zoo.training.ranks import Ranks

CPU = torch.device("cpu")


class Meeting:
    """Stands in for torch.distributed among threads: each gives its value and gets them all."""

    def __init__(self, world):
        self.barrier, self.values = threading.Barrier(world, timeout=10), [None] * world
        self.own = threading.local()

    def all_gather_object(self, values, value):
        self.values[self.own.rank] = value
        self.barrier.wait()
        values[:] = self.values
        self.barrier.wait()

    def all_reduce(self, tensor):
        values = [None] * len(self.values)
        self.all_gather_object(values, tensor.clone())
        tensor.copy_(sum(values))


def together(monkeypatch, job, world=2):
    """job(ranks) on every rank at once; what each returned or raised."""
    meeting, found = Meeting(world), [None] * world
    for name in ("all_gather_object", "all_reduce"):
        monkeypatch.setattr(ranks_module.dist, name, getattr(meeting, name))

    def run(rank):
        meeting.own.rank = rank
        try:
            found[rank] = job(Ranks(rank, world, CPU))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found
