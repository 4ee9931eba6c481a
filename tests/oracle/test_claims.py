"""The claims: as registered, by the registered size; their closed forms; their streams of noise."""

import math
from dataclasses import replace

import pytest
import torch

import pave_grpo as pave
import verify_equivalence as oracle
from zoo.oracle import fields, findings
from zoo.oracle.claims import Claims, Measured, Statement, about, near, status_of
from zoo.oracle.findings import HOLDS, REFUTED

CLAIMS = oracle.CLAIMS


def one_row(registered, finding, difference=None):
    """The row of a claim with one statement."""
    claims = Claims()

    @claims.add("X", Statement("y", "a statement", registered, "by construction"))
    def x(bench):
        """A sentence."""
        yield Measured("y", finding, difference, kernel="cps")

    (row,) = claims.run(oracle.Bench(["cps"]), ["X"])
    return row


def test_what_is_refuted_must_differ_by_the_registered_size():
    """A difference too small or too large fails, and so does one that nobody registered."""
    found = findings.exact(0.3, 1e-12)
    assert one_row(REFUTED, found, about(0.3)).as_registered
    for wrong in (about(0.2), about(0.4), near(0.1, 0.1)):
        row = one_row(REFUTED, found, wrong)
        assert row.verdict == REFUTED and not row.as_registered and status_of([row]) == 1
    assert not one_row(REFUTED, findings.exact(0.0, 1e-12), about(0.0)).as_registered
    with pytest.raises(ValueError, match=r"X\.y: must say how large"):
        one_row(REFUTED, found)
    assert not one_row(HOLDS, found, about(0.3)).as_registered
    unclear = one_row(HOLDS, findings.exact(math.nan, 1.0))
    assert status_of([unclear]) == 3 and status_of([unclear, one_row(HOLDS, found)]) == 1


def test_every_claim_is_as_registered(rows):
    """Status 0, and what is claimed false was tested as well as what is claimed true."""
    assert [row for row in rows if not row.as_registered] == []
    assert status_of(rows) == 0
    assert {row.statement for row in rows} == set(CLAIMS.statements())
    for claim in ("E2", "E3", "E4", "E5", "E7", "E8", "E10", "E11", "E12", "E13", "TRUTH"):
        assert {HOLDS, REFUTED} <= {row.registered for row in rows if row.claim == claim}, claim
    # 25 statistical rows for a kernel and k, and 9 more for a kernel.
    statistical = [row for row in rows if row.z is not None]
    assert len(statistical) == 3 * (25 * 2 + 9) <= findings.STATISTICS
    assert {row.claim for row in statistical} == {
        name for name in CLAIMS if CLAIMS[name].statistical
    }
    assert findings.STATISTICS >= 4 * (25 * 5 + 9)  # a fourth kernel and five k


def test_a_refutation_that_is_too_small_or_too_large_is_found(rows):
    """Every row that is registered as refuted has a range, and fails on either side of it."""
    refuted = [row for row in rows if row.registered == REFUTED]
    assert len({row.statement for row in refuted}) >= 18
    for row in refuted:
        assert 0 < row.low <= row.high < math.inf or row.z is not None, row
        assert not replace(row, difference=row.low - 1e-9 - row.low * 1e-3).as_registered, row
        assert not replace(row, difference=row.high * 1.001 + 1e-9).as_registered, row


def test_the_closed_form_gradient_is_that_of_a_slow_simulation():
    """Propagating mean and variance agrees with finite differences under common random numbers."""
    m, log_q, target = torch.tensor([[0.5, -0.3], [-0.7, 0.2], [1.0, 0.4]], dtype=torch.float64)
    process = pave.Process(pave.schedule(4), "dance", 0.7)
    truth = fields.policy_gradient(process, m, log_q, target, process.stochastic_steps())
    random = torch.Generator().manual_seed(1)
    x_1 = torch.randn(40_000, 1, 2, generator=random, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    z = torch.randn(40_000, 4, 1, 2, generator=random, dtype=torch.float64)

    def mean_reward(values):
        field = fields.Gaussian(values[:2], values[2:])
        x = pave.rollout_independent(field, process, pave.Noise(x_1, z)).x_0
        return -(x - target).square().sum(-1).mean().item()

    at, h = torch.cat([m, log_q]), 1e-4
    numeric = [
        (mean_reward(at + h * e) - mean_reward(at - h * e)) / (2 * h)
        for e in torch.eye(4, dtype=torch.float64)
    ]
    # 40,000 samples of a derivative with spread below 4 per coordinate: 6 standard errors are 0.12.
    assert (torch.tensor(numeric) - truth).abs().max() <= 0.12 and truth.abs().max() > 1


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance"])
def test_the_expected_estimate_of_the_original_is_the_true_gradient(kernel):
    """Quadrature over (x_t, z) against propagated mean and variance: both are closed forms."""
    m, log_q, target = torch.tensor([[0.5, -0.3], [-0.7, 0.2], [1.0, 0.4]], dtype=torch.float64)
    process = pave.Process(pave.schedule(4), kernel, 0.7)
    steps = process.stochastic_steps()
    held = [i for i in range(4) if i not in steps]
    truth = fields.policy_gradient(process, m, log_q, target, steps, held)
    for form in ("paper", "matched"):
        expected = fields.expected_estimate(process, m, log_q, target, steps, 1, form)
        assert (expected - truth).abs().max() <= 1e-12
    biased = fields.expected_estimate(process, m, log_q, target, steps, 2, "paper")
    assert (biased - truth).norm() > 0.1


def test_rows_do_not_depend_on_which_claims_run():
    """Streams are named: a claim draws the same alone and in company; another seed does not."""

    def measured(seed, *claims):
        rows = CLAIMS.run(oracle.Bench(factors=(2,), seed=seed), claims)
        return [row.measured for row in rows if row.claim == "E10"]

    assert measured(0, "E10") == measured(0, "E5", "E10") != measured(1, "E10")


def test_a_claim_can_be_tested_by_itself():
    """The test of every claim takes a bench and yields rows, estimates included."""
    rows = list(CLAIMS["TRUTH"].test(oracle.Bench(["cps"], (2,))))
    assert len(rows[0].estimate) == len(rows[0].truth) == 4
