"""Benches small enough for a test, and the rows of every claim on one of them."""

import pytest

import verify_equivalence as oracle


def small_bench(kernels=None, factors=(2, 3), seed=0):
    """A bench without the embedded model: all claims in seconds."""
    bench = oracle.Bench(kernels, factors, seed)
    everything = bench.scenes

    def scenes(*names):
        return everything(*(name for name in names if name != "embedded"))

    bench.scenes = scenes
    return bench


@pytest.fixture(scope="session")
def small():
    """small_bench(kernels, factors, seed)."""
    return small_bench


@pytest.fixture(scope="session")
def rows():
    """Every claim on a small bench."""
    return oracle.CLAIMS.run(small_bench(), tuple(oracle.CLAIMS))
