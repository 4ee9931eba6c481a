"""A fourth kernel, registered in one place: every claim tests it, every prediction counts."""

import math

import pytest
import torch

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import report, theory
from zoo.oracle.claims import status_of
from zoo.oracle.findings import CONVERGES, HOLDS, REFUTED


def root(t, s, eta, t_1):
    """Euler-Maruyama with g = eta sqrt(t)."""
    D = t - s
    return pave.Coefficients(
        a=1 - eta**2 * D / 2, b=-D - eta**2 * D * (1 - t) / 2, std=eta * (t * D).sqrt()
    )


class Root(theory.EulerMaruyama):
    """All of its predictions follow from g: sum w_j = b_1 from t = 1 only."""

    def g2(self, t, s):
        return self.eta**2 * t


@pytest.fixture
def register(monkeypatch):
    """theory.register, undone after the test."""
    monkeypatch.setattr(pave, "KERNELS", dict(pave.KERNELS))
    monkeypatch.setattr(theory, "RECORDS", dict(theory.RECORDS))
    return theory.register


def test_a_fourth_kernel_is_tested_by_every_claim(register, small):
    """All claims are as registered with it, what it refutes included; --kernels takes it."""
    register("root", root, Root)
    rows = oracle.CLAIMS.run(small(["root"], (2, 3)), tuple(oracle.CLAIMS))
    assert [row for row in rows if not row.as_registered] == []
    assert {row.claim for row in rows} == set(oracle.CLAIMS)
    verdicts = {row.statement: row.registered for row in rows}
    for statement in ("E4.density", "E5.middle", "E5.end", "E6.bias", "E11.step"):
        assert verdicts[statement] == REFUTED
    assert verdicts["E5.start"] == verdicts["E11.data"] == HOLDS
    assert verdicts["E11.limit"] == CONVERGES
    assert oracle.main(["--kernels", "root", "cps", "--claims", "E5", "--factors", "2"]) == 0


def test_four_kernels_fit_the_page(register, small):
    """Columns that do not fit beside the others go below them."""
    register("root", root, Root)
    bench = small(None, (2,))
    rows = oracle.CLAIMS.run(bench, ["E5", "E11"])
    page = report.front_page(rows, oracle.CLAIMS, bench, 1.0)
    assert max(map(len, page.splitlines())) <= 100 and page.count("they add up, 1 to 0.8") == 2


class Altered(Root):
    """Root, with one wrong prediction each."""


class WrongStd(Altered):
    def g2(self, t, s):
        return 1.5 * super().g2(t, s)


class WrongScale(Altered):
    def scale(self, k, t, s):
        return float(k)


class WrongWeights(Altered):
    def weight_sum(self, k, t, s):
        return super().weight_sum(k, t, s) * (1 if k == 1 else 0.99)


class WrongConservation(Altered):
    def conserves(self, t, s):
        return True


class WrongGap(Altered):
    def gap(self, x1_hat, k, t, s):
        return 0.99 * super().gap(x1_hat, k, t, s)


class Straight(Altered):
    straight = True


class Unbiased(Altered):
    biased = False


class WrongBias(Altered):
    def bias(self, x1_hat, k, t):
        return 0.98 * super().bias(x1_hat, k, t)


class WrongOrder(Altered):
    gap_order = 1.0


class WrongGradient(Altered):
    def gradient_limit(self, k, t):
        return 1.0


class WrongVariance(Altered):
    def variance_after(self, t, s):
        return s**2


class WrongLaw(Altered):
    def limit_variance(self, q):
        return q * (1 + math.cos(self.eta * math.pi / 2)) / 2


class WrongRate(Altered):
    law_order = 2 / 3


class WrongStart(Altered):
    start_order = 0.5


class WrongCentre(Altered):
    def centre_limit(self, k, t):
        return 0.5


class WrongWeightOf(Altered):
    def weights(self, k, t, s):
        return [*super().weights(k, t, s)[:-1], -(t - s) / k]


class WrongStep(Altered):
    def step(self, x, v, t, s):
        mean, std = super().step(x, v, t, s)
        return mean - 0.1 * (t - s) * v, std


WRONG = [
    (WrongStd, "E3"),
    (WrongStd, "MARGINAL"),
    (WrongScale, "E2"),
    (WrongScale, "E3"),
    (WrongWeights, "E5"),
    (WrongWeights, "E4"),
    (WrongConservation, "E5"),
    (WrongGap, "E4"),
    (Straight, "E4"),
    (Unbiased, "E6"),
    (WrongBias, "E6"),
    (WrongOrder, "E6"),
    (WrongGradient, "E6"),
    (WrongVariance, "E11"),
    (WrongLaw, "E11"),
    (WrongRate, "E11"),
    (WrongStart, "E11"),
    (WrongCentre, "E13"),
    (WrongCentre, "E14"),
    (WrongWeightOf, "E13"),
    (WrongWeightOf, "E14"),
    (WrongScale, "E12"),
    (WrongStep, "E2"),
    (WrongStep, "E6"),
    (WrongStep, "TRUTH"),
]


@pytest.mark.parametrize(("record", "claim"), WRONG)
def test_a_wrong_prediction_fails_the_claim_about_it(record, claim, register, small):
    """A prediction nobody tests would be a comment."""
    register("root", root, record)
    assert status_of(oracle.CLAIMS.run(small(["root"], (2,)), [claim])) == 1


def test_a_kernel_without_a_record_is_refused_by_name(monkeypatch, capsys):
    """In one line, with status 2, whether it is asked for or one of all; the others still run."""
    monkeypatch.setattr(pave, "KERNELS", {**pave.KERNELS, "root": root})
    for flags in (["--kernels", "root"], ["--claims", "E5"]):
        with pytest.raises(SystemExit) as stop:
            oracle.main(flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "kernel root" in err
    with pytest.raises(ValueError, match="kernel root: must have a record"):
        oracle.Bench()
    assert oracle.main(["--kernels", "cps", "--claims", "E5", "--factors", "2"]) == 0


@pytest.mark.parametrize("kernel", theory.RECORDS)
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.7, 0.55), (0.3, 0.1)])
def test_definition_and_coefficients_are_one_step(kernel, eta, t, s):
    """Two ways to write a kernel: predicted ends or Euler-Maruyama here, a x + b v in the core."""
    record = theory.of(kernel, eta)
    times = torch.tensor([t, s], dtype=torch.float64)
    a, b, std = pave.Process(times, kernel, eta).coefficients(*times)
    x, v = 1.3, -0.4
    mean, c = record.step(x, v, t, s)
    assert abs(mean - (a * x + b * v)) <= 1e-15 and abs(c - std) <= 1e-15
