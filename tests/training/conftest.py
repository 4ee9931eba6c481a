"""Where the tests of training run: a folder of their own, one thread, no torchrun."""

import signal

import pytest
import torch

from zoo.training import prompts


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """Every test runs as if started alone in an empty folder; pictures are small."""
    monkeypatch.chdir(tmp_path)
    shown = prompts.Prompts.shown

    def two_shown(self, shape, kind):
        return shown(self, shape, kind, 2)

    monkeypatch.setattr(prompts.Prompts, "shown", two_shown)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
