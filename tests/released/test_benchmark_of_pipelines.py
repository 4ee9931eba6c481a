"""The benchmark of a released model: what it times is of the pipeline's own tokens and ways."""

import math
from dataclasses import replace

import benchmark
import pytest
from benchmark import WARMTH

from zoo.training.command_line import settle

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_released_model_is_measured(folders, name):
    """The slope over tokens is of three widths; ways to the picture are counted for its steps."""
    sizes = dict(size=(32, 32), dtype="float32", device="cpu", threads=1)
    o = settle({"model": str(folders[name]), "reward": (WARMTH,), **sizes})
    small = dict(group_size=2, steps=4, sde_steps=(0,), prompts_per_iteration=1)
    bench = benchmark.bench_of(replace(o, **small), rounds=1)
    assert math.isfinite(benchmark.tokens(bench).value)
    rows = list(benchmark.finishing(bench))
    # From step 0 of 4 three steps of 2 members, or 2; the anchor takes 1.
    assert [row.beside for row in rows if "stride 2" in row.name] == ["counted 1.40"] * 2
    assert all(row.value <= 1e-3 for row in benchmark.gradients(bench))
