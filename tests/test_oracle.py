"""The oracle itself: its verdicts can go wrong, its words follow them, and it knows bugs from conventions."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import bugs, fields

ROOT = Path(__file__).parents[1]
CLAIMS = tuple(oracle.CLAIMS)


def small(factors=(2, 3), seed=0):
    """A bench without the embedded model and with fewer groups: all claims in seconds."""
    bench = oracle.Bench(factors=factors, seed=seed)
    everything = bench.scenes
    bench.scenes = lambda *names: everything(*(name for name in names if name != "embedded"))
    return bench


@pytest.fixture(scope="module")
def rows():
    """Every claim, on the small fixtures."""
    return oracle.run_claims(small(), CLAIMS)


# ---- Verdicts --------------------------------------------------------------------------------------------------


def test_verdicts_of_known_cases():
    """Each kind of test says EXACT, BROKEN, FIRST ORDER and INCONCLUSIVE where it is due."""
    assert (
        oracle.exact(1e-16, 1e-15, "").verdict == oracle.EXACT
        and oracle.exact(2e-15, 1e-15, "").verdict == oracle.BROKEN
    )
    assert (
        oracle.exact(math.nan, 1.0, "").verdict == oracle.UNCLEAR
    )  # else a NaN would confirm what is claimed false
    assert oracle.largest(torch.tensor([1.0, math.nan]), torch.tensor(2.0)).isnan()
    assert oracle.statistic(1.02, 1.0, 0.01, 0.5, 100).verdict == oracle.EXACT
    assert oracle.statistic(1.2, 1.0, 0.01, 0.5, 100).verdict == oracle.BROKEN
    assert (
        oracle.statistic(1.02, 1.0, 0.01, 0.05, 100).verdict == oracle.UNCLEAR
    )  # could not have seen 0.05
    assert oracle.statistic(math.nan, 1.0, 0.01, 0.5, 100).verdict == oracle.UNCLEAR
    draws = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.ones(4, dtype=torch.float64)
    assert oracle.joint(draws + wanted, wanted, 0.5).verdict == oracle.EXACT
    assert (
        oracle.joint(draws + 1.1 * wanted, wanted, 0.5).verdict == oracle.BROKEN
    )  # each mean off by ten of its errors
    assert oracle.joint(draws + wanted, wanted, 0.01).verdict == oracle.UNCLEAR
    h = [0.1, 0.05, 0.025, 0.0125]
    assert oracle.order(h, [x**0.5 for x in h], 0.5).verdict == oracle.ORDER
    assert oracle.order(h, [x**2 for x in h], 1.0).verdict == oracle.BROKEN
    assert oracle.order(h, [0.1, 0.09, 0.01, 0.009], 1.0).verdict == oracle.UNCLEAR
    assert oracle.order(h, [0.1, 0.05, 0.0, 0.0], 1.0).verdict == oracle.UNCLEAR


def test_the_z_limit_is_the_registered_false_alarm_rate():
    """STATISTICS rows, each two-sided beyond Z, raise FALSE_ALARM in all by the union bound."""
    assert oracle.STATISTICS * math.erfc(oracle.Z / 2**0.5) == pytest.approx(
        oracle.FALSE_ALARM, rel=1e-9
    )


def test_every_claim_has_its_registered_verdict(rows):
    """Status 0, and what is claimed false was tested as well as what is claimed true."""
    assert [row for row in rows if row.verdict != row.registered] == []
    assert oracle.status_of(rows) == 0 and {row.claim for row in rows} == set(CLAIMS)
    for claim in ("E2", "E3", "E4", "E5", "E8", "E10", "E11", "TRUTH"):
        assert {"EXACT", "BROKEN"} <= {row.registered for row in rows if row.claim == claim}, claim
    assert sum(map(oracle.is_statistical, rows)) == 66 * 2 + 21


def test_a_changed_verdict_changes_the_words_and_the_status(rows):
    """The conclusion is said from the verdicts: at most 15 lines, and the line of the claim follows them."""
    line_of = lambda z, claim: next(
        line for line in oracle.conclusion(z).splitlines() if line.startswith(f"{claim}:")
    )
    words = oracle.conclusion(rows)
    assert len(words.splitlines()) <= 15 and words.splitlines()[-1].startswith("All")
    for claim, text, verdict, about, where in oracle.SENTENCES:
        hit = [
            r
            for r in rows
            if r.claim == claim
            and about in r.what
            and all(getattr(r, k) == v for k, v in where.items())
        ]
        assert hit and text.split("{}")[0] in line_of(rows, claim), (claim, about)
        other = oracle.BROKEN if verdict != oracle.BROKEN else oracle.EXACT
        changed = [replace(r, verdict=other) if r in hit else r for r in rows]
        assert line_of(changed, claim) != line_of(rows, claim), text
        assert oracle.status_of(changed) == 1 and "NOT" in oracle.conclusion(changed)
        assert "<-" in oracle.summarise(changed) and "<-" not in oracle.summarise(rows)
        unclear = [replace(r, verdict=oracle.UNCLEAR) if r in hit[:1] else r for r in rows]
        assert oracle.status_of(unclear) == 3 and f"undecided: {hit[0].kernel}" in line_of(
            unclear, claim
        )
    # A clause about which nothing was tested is not said.
    assert "means meet" not in oracle.conclusion([r for r in rows if "over c_1" not in r.what])


PLANTED = [
    ("coarse std", "E2"),
    ("flow_sde: half", "E4"),
    ("stale time", "E4"),
    ("cps: radians", "E5"),
    ("flow_sde: t = 1 everywhere", "E4"),
    ("std for variance", "E3"),
    ("no half", "E3"),
    ("matched: fine std", "E7"),
    ("matched: live coarse mean", "E7"),
    ("ratio inverted", "TRUTH"),
    ("states cut", "GRADIENT"),
    ("wrong state stored", "E7"),
    ("variance as std", "MARGINAL"),
    ("clip without min", "E9"),
    ("one-sided clip", "E9"),
    ("coarse old", "E9"),
    ("cps: noise added", "E11"),
    ("KL without gradient", "GRADIENT"),
]


@pytest.mark.parametrize(("name", "claim"), PLANTED)
def test_the_oracle_sees_a_planted_bug(name, claim, rows, monkeypatch):
    """With the bug in pave_grpo the claim about it fails, which without it does not: not by inconclusive rows alone."""
    bug = next(b for b in bugs.BUGS if b.name == name)
    monkeypatch.setattr(oracle, "pave", bugs.patched(bug))
    assert oracle.status_of([row for row in rows if row.claim == claim]) == 0
    assert oracle.status_of(oracle.run_claims(small(), [claim])) == 1


def test_the_closed_form_gradient_is_that_of_a_slow_simulation():
    """Propagating mean and variance agrees with the sample average of rewards under common random numbers."""
    m, log_q, target = (
        torch.tensor(z, dtype=torch.float64) for z in ([0.5, -0.3], [-0.7, 0.2], [1.0, 0.4])
    )
    process = oracle.pave.Process(oracle.pave.schedule(4), "dance", 0.7)
    steps = process.stochastic_steps()
    truth = fields.policy_gradient(process, m, log_q, target, steps)
    noise = oracle.pave.Noise(
        *(
            torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            for shape in ((40_000, 1, 2), (40_000, 4, 1, 2))
        )
    )

    def mean_reward(values):
        field = fields.Gaussian(values[:2], values[2:])
        x = oracle.pave.rollout_independent(field, process, noise).x_0
        return -(x - target).square().sum(-1).mean().item()

    at, h = torch.cat([m, log_q]), 1e-4
    numeric = torch.tensor(
        [
            (mean_reward(at + h * e) - mean_reward(at - h * e)) / (2 * h)
            for e in torch.eye(4).double()
        ]
    )
    # 40,000 samples of a derivative with spread below 4 per coordinate: six standard errors are 0.12
    assert (numeric - truth).abs().max() <= 0.12 and truth.abs().max() > 1


# ---- The program -------------------------------------------------------------------------------------------------


def test_a_report_has_the_promised_schema(tmp_path, capsys):
    """--json holds every field the readers of the report rely on; the exit status is 0."""
    file = tmp_path / "report.json"
    assert (
        oracle.main(
            ["--claims", "E5", "E11", "--kernels", "cps", "--factors", "4", "--json", str(file)]
        )
        == 0
    )
    report = json.loads(file.read_text())
    assert report["schema"] == oracle.SCHEMA and report["status"] == 0
    assert {"python", "torch", "device", "dtype", "commit", "dirty"} <= set(report["environment"])
    assert {
        "claim",
        "kernel",
        "k",
        "rollouts",
        "form",
        "fixture",
        "verdict",
        "registered",
        "measured",
        "predicted",
        "tolerance",
        "n",
        "seed",
        "seconds",
    } <= set(report["rows"][0])
    assert {row["k"] for row in report["rows"] if row["claim"] == "E5"} == {4}
    assert {row["kernel"] for row in report["rows"]} == {"cps"}
    assert report["conclusion"] in capsys.readouterr().out


def test_rows_do_not_depend_on_which_claims_run():
    """Streams are named: a claim alone gives the numbers it gives in company, and another seed gives others."""
    measured = lambda seed, *claims: [
        r.measured
        for r in oracle.run_claims(oracle.Bench(factors=(2,), seed=seed), claims)
        if r.claim == "E10"
    ]
    assert measured(0, "E10") == measured(0, "E5", "E10") != measured(1, "E10")


BAD = {
    "--claims E99": "E99",
    "--kernels ddpm": "ddpm",
    "--factors 1": "factors=[1]",
    "--factors 2 2": "factors=[2, 2]",
    "--seed -1": "--seed -1",
    "--vary-seed 0": "--vary-seed 0",
    "--prompt circle": "--prompt",
    "--dtype float32": "--dtype",
    "--model embedded --prompt circle": "circle",
    "--model nowhere": "nowhere",
    "--model embedded --claims E3": "E3",
    "--vectors a --against b:c": "--vectors",
    "--vectors a --json b": "--json",
    "--against a:b --claims E2": "--claims",
    "--factors 2 3 4 5 6 7": "--factors",
    "--kernels cps cps": "--kernels",
    "--claims E2 E2": "--claims",
    "--model embedded --size 32 32": "--size",
    "--json .": "--json",
    "--vary-seed 2 --claims E2": "--claims",
    "--vectors a --seed 1": "--seed",
    "--json no/where": "no/where",
}


@pytest.mark.parametrize(("flags", "named"), BAD.items())
def test_bad_usage_is_one_line_and_status_2(flags, named, capsys):
    """Before any work."""
    with pytest.raises(SystemExit) as stop:
        oracle.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err


def test_a_model_in_bfloat16_keeps_what_does_not_depend_on_the_network(capsys):
    """--model --dtype bfloat16: attribution (E2) and the matched form (E7) survive, to float32 rounding."""
    code = oracle.main(
        [
            "--model",
            "embedded",
            "--dtype",
            "bfloat16",
            "--claims",
            "E2",
            "E7",
            "--kernels",
            "cps",
            "--factors",
            "2",
            "--prompt",
            "two red circles",
        ]
    )
    assert code == 0, capsys.readouterr().out


def test_vary_seed_reports_its_failure_rate(capsys):
    """Fresh seeds, statistical rows only."""
    assert (
        oracle.main(["--vary-seed", "2", "--claims", "E10", "--kernels", "cps", "--factors", "2"])
        == 0
    )
    assert capsys.readouterr().out.startswith(
        "0 of 8 statistical verdicts were wrong and 0 inconclusive"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_claims_hold_on_cuda(capsys):
    """The same verdicts on the GPU."""
    assert oracle.main(["--device", "cuda", "--factors", "2", "3"]) == 0, capsys.readouterr().out


def test_it_runs_from_any_folder(tmp_path):
    """As a script, from elsewhere."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "verify_equivalence.py"), "--claims", "E5", "--factors", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "Conclusion" in done.stdout, done.stderr
