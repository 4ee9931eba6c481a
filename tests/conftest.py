"""One thread; Hypothesis without deadlines, the same examples under CI; a process of its own."""

import os
import signal

import pytest
import torch
from hypothesis import settings

from zoo.training import prompts

torch.set_num_threads(1)
settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile(
    "ci", deadline=None, max_examples=60, derandomize=True, report_multiple_bugs=False
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


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


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing, where a test looks at no picture: plots take seconds."""

    def draw_nothing(*args, **how):
        pass

    monkeypatch.setattr("zoo.training.pictures.draw_grid", draw_nothing)
    monkeypatch.setattr("zoo.training.pictures.draw_curve", draw_nothing)
