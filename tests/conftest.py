"""One thread; Hypothesis without deadlines, the same examples under CI; a process a core.

python -m pytest --shuffle 1        files, and tests within each, in an order drawn from a seed
"""

import os
import random
import signal

import pytest
import small_network as small_network_file
import torch
from hypothesis import settings

from zoo.shapes import model as shapes_model
from zoo.training import prompts

EVERY_CLAIM = ("oracle/test_claims.py", "oracle/test_report.py", "oracle/test_rows.py")

torch.set_num_threads(1)
# Of processes started from here: one thread, unless more are asked for, and none that waits busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, report_multiple_bugs=False
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, help="run tests in an order drawn from this seed")


def pytest_xdist_auto_num_workers(config):
    """The whole suite is run by a process a core, up to four; a part of it by this one."""
    is_part = config.args_source is config.ArgsSource.ARGS
    return 0 if is_part else min(4, os.cpu_count() or 1)


def pytest_xdist_make_scheduler(config, log):
    """Of --dist loadfile: files that measure every claim are one; the order of --shuffle stays."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "every claim" if file.endswith(EVERY_CLAIM) else file

    if config.option.shuffle is not None:
        config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Whole files change places, so that what a file's tests share is made once."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        order = random.Random(seed)
        order.shuffle(items)
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: files.index(item.path))


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
    threads = torch.get_num_threads()
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for which, handler in handlers.items():
        signal.signal(which, handler)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """The checkpoint of small_network.py."""
    return small_network_file.write(tmp_path_factory.mktemp("small") / "small.safetensors")


@pytest.fixture
def small_network(small_checkpoint, monkeypatch):
    """The embedded model is the small one, where a test asks nothing of what it has learnt."""
    monkeypatch.setattr(shapes_model, "CHECKPOINT", small_checkpoint)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing, where a test looks at no picture: plots take seconds."""

    def draw_nothing(content, about, path, *args, **how):
        path.touch()

    monkeypatch.setattr("zoo.training.pictures.draw_grid", draw_nothing)
    monkeypatch.setattr("zoo.training.pictures.draw_curve", draw_nothing)


@pytest.fixture
def short_texts(monkeypatch):
    """Pipelines read texts as in short_texts.py."""
    import short_texts  # and with it diffusers: seconds, for few tests

    for pipeline in short_texts.PIPELINES:
        monkeypatch.setattr(pipeline, "encode_prompt", short_texts.shortened(pipeline))
