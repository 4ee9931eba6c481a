"""The oracle fails where it should: every statement can be seen to, and so does the program."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import bench, bugs, experiments, fields, measures, quadrature, theory
from zoo.oracle.claims import status_of
from zoo.oracle.findings import INCONCLUSIVE

ROOT = Path(__file__).parents[2]

# Ways to break what no known bug breaks: a loss that changes its rollout, a rollout that is not
# reproducible, a gradient that reverse mode alone gets wrong.
CHANGED = bugs.Patch(
    "changes its rollout",
    "loss",
    "",
    "    # Score every observed x_s again",
    "    rollout.x_s.add_(1e-12 * len(factors))\n    # Score every observed x_s again",
)
CHANGED_MATCHED = CHANGED._replace(
    name="changes its rollout when matched",
    new=CHANGED.new.replace("len(factors)", "(form == 'matched')"),
)
UNREPEATED = bugs.Patch(
    "draws noise of its own",
    "sampler",
    "",
    "return self.mean + per_row(self.std, self.mean) * z",
    "return self.mean + per_row(self.std, self.mean) * (z + 1e-9 * torch.randn_like(z))",
)
HOOKED = bugs.Patch(
    "scales gradients on their way back",
    "loss",
    "",
    "    return PolicyLoss(kl * KL - J, terms, mean_KL, old)",
    "    if J.requires_grad:\n        J.register_hook(lambda g: 1.01 * g)\n"
    "    return PolicyLoss(kl * KL - J, terms, mean_KL, old)",
)
OTHERS = bugs.Patch(
    "asks another prompt",
    "transition",
    "",
    "    v_0 = evaluate(velocity, x, t, prompt)",
    "    v_0 = evaluate(velocity, x, t, prompt.flip(0))",
)
OTHERS_INSIDE = bugs.Patch(
    "asks another prompt inside the step",
    "loss",
    "",
    "evaluate(velocity, x_u, t - D_u, prompt)",
    "evaluate(velocity, x_u, t - D_u, prompt.flip(0))",
)
OWN = (CHANGED, CHANGED_MATCHED, UNREPEATED, HOOKED, OTHERS, OTHERS_INSIDE)
PATCHES = {bug.name: bug for bug in (*bugs.BUGS, *OWN)}

# For each statement a bug that it must report, under flow_sde.
SEEN_BY = {
    "E1.same": "changes its rollout",
    "E1.same matched": "changes its rollout when matched",
    "E1.same again": "draws noise of its own",
    "E2.direction": "coarse old",
    "E2.size": "coarse old",
    "E2.independent": "coarse old",
    "E2.clamped": "coarse old",
    "E2.updated": "coarse old",
    "E3.ratio": "wrong state stored",
    "E3.ratio_formula": "wrong state stored",
    "E3.score": "wrong state stored",
    "E3.score_formula": "wrong state stored",
    "E3.spread": "std for variance",
    "E4.density": "first coefficients",
    "E4.ratio": "first coefficients",
    "E4.gradient": "first coefficients",
    "E4.gap": "first coefficients",
    "E4.direction": "batch mean",
    "E4.independent": "first coefficients",
    "E4.summed": "first coefficients",
    "E5.middle": "flow_sde: drift sign",
    "E5.start": "flow_sde: drift sign",
    "E5.end": "flow_sde: drift sign",
    "E5.formula": "flow_sde: drift sign",
    "E6.parameters": "flow_sde: no score",
    "E6.gap": "flow_sde: no score",
    "E6.bias": "flow_sde: no score",
    "E6.limit": "flow_sde: no score",
    "E6.gradient": "flow_sde: no score",
    "E7.density": "matched: fine std",
    "E7.attribution": "matched: fine std",
    "E7.gradient": "matched: live coarse mean",
    "E7.ratio": "wrong state stored",
    "E7.updated": "matched: live coarse mean",
    "E8.equal": "std for variance",
    "E8.unequal": "batch mean",
    "E8.anew": "batch mean",
    "E8.clipped": "batch mean",
    "E9.before": "coarse old",
    "E9.after": "clip without min",
    "E10.gradient": "batch mean",
    "E10.ratio": "batch mean",
    "E10.ratio_formula": "batch mean",
    "E11.step": "flow_sde: no score",
    "E11.formula": "flow_sde: no score",
    "E11.data": "flow_sde: no score",
    "E11.limit": "flow_sde: no score",
    "E11.start": "flow_sde: drift sign",
    "E12.identity": "first coefficients",
    "E12.rank": "coarse old",
    "E12.independent": "batch mean",
    "E13.centre": "stale time",
    "E13.midpoint": "stale time",
    "E14.density": "midpoint: its own centre",
    "E14.ratio": "midpoint: its own centre",
    "E14.held": "midpoint: stale time",
    "E14.midpoint": "asks another prompt inside the step",
    "E14.original": "asks another prompt",
    "E14.k_term": "asks another prompt",
    "E14.second": "stale time",
    "TRUTH.original": "flow_sde: drift sign",
    "TRUTH.paper": "flow_sde: drift sign",
    "TRUTH.rescaled": "flow_sde: drift sign",
    "TRUTH.matched": "flow_sde: drift sign",
    "TRUTH.bias": "flow_sde: drift sign",
    "TRUTH.standardised": "flow_sde: drift sign",
    "MARGINAL.mean": "flow_sde: drift sign",
    "MARGINAL.variance": "flow_sde: drift sign",
    "GRADIENT.forward": "scales gradients on their way back",
    "GRADIENT.central": "KL without gradient",
}


@pytest.fixture(scope="module")
def broken(small):
    """broken(claim, bug): the rows of a claim on flow_sde and k = 2 with a bug in the core."""

    @functools.cache
    def made(claim, name):
        with pytest.MonkeyPatch.context() as patch:
            for module in (oracle, bench, experiments, measures, quadrature):
                patch.setattr(module, "pave", bugs.patched(PATCHES[name]))
            return oracle.CLAIMS.run(small(["flow_sde"], (2,)), [claim])

    return made


@pytest.mark.parametrize(("statement", "bug"), SEEN_BY.items())
def test_every_statement_reports_a_bug(statement, bug, broken):
    """By rows that are wrong, and not by inconclusive ones alone."""
    name = statement.split(" ")[0]
    rows = [row for row in broken(name.split(".")[0], bug) if row.statement == name]
    assert rows and status_of(rows) == 1
    assert any(row.verdict != INCONCLUSIVE for row in rows if not row.as_registered)


def test_what_odes_add_is_refuted_only_where_they_do(small, monkeypatch):
    """TRUTH.held compares closed forms: one that forgets the held steps is found."""
    plain = fields.policy_gradient

    def forgetful(process, m, log_q, target, steps, held=()):
        return plain(process, m, log_q, target, steps)

    monkeypatch.setattr(fields, "policy_gradient", forgetful)
    rows = oracle.CLAIMS.run(small(["cps"], (2,)), ["TRUTH"])
    assert status_of([row for row in rows if row.statement == "TRUTH.held"]) == 1


def left_end(field, x, t, s):
    """A flow map of one Euler step: what the original's mean is, and no better."""
    return x - (t - s) * measures.timed(field, torch.arange(len(x)))(x, t)


def other_limit(record, k, t):
    """Not the limit of tau_k / D."""
    return 0.3


def twice(process, m, log_q, target, steps, k):
    """A gradient that is not the modified policy's own."""
    return 2 * fields.policy_gradient(process, m, log_q, target, steps)


APART = {  # statements on what does not come from the core, and what is put in its place
    "E13.flow": (quadrature, "flow_map", left_end),
    "E13.limit": (theory.FlowSDE, "centre_limit", other_limit),
    "E15.own": (fields, "matched_policy_gradient", twice),
}


@pytest.mark.parametrize("statement", APART)
def test_what_is_compared_apart_from_the_core_is_compared(statement, small, monkeypatch):
    """Another flow map, another limit, another policy: each is reported."""
    monkeypatch.setattr(*APART[statement])
    rows = oracle.CLAIMS.run(small(["flow_sde"], (2,)), [statement.split(".")[0]])
    assert status_of([row for row in rows if row.statement == statement]) == 1


def test_no_statement_is_forgotten():
    """A new one needs a bug that it reports."""
    named = {name.split(" ")[0] for name in SEEN_BY} | {"TRUTH.held"} | APART.keys()
    assert named == set(oracle.CLAIMS.statements())


# ---- The program's exit status -------------------------------------------------------------------

SCRIPTS = {  # what stands in the core, the command line, and the status it must end with
    "sound": (("", ""), "--claims E5 --kernels cps", 0),
    "wrong": (("h = eta * math.pi / 2", "h = eta * math.pi / 3"), "--claims E2 --kernels cps", 1),
    "no number": (("s * sin)", "s * sin)._replace(b=b * math.nan)"), "--claims E5", 3),
    "misused": (("", ""), "--claims E99", 2),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{case: (status, output)} of the oracle run as a script, all at once."""
    running = {}
    for case, ((old, new), flags, _) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("oracle")
        core = (ROOT / "pave_grpo.py").read_text()
        assert not old or core.count(old) == 1
        (folder / "pave_grpo.py").write_text(core.replace(old, new) if old else core)
        shutil.copy(ROOT / "verify_equivalence.py", folder)
        shutil.copytree(ROOT / "zoo", folder / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
        script = str(folder / "verify_equivalence.py")
        command = [sys.executable, script, *flags.split(), "--factors", "2"]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running[case] = subprocess.Popen(command, cwd=folder, env=environment, **how)
    found = {}
    for case, process in running.items():
        said, _ = process.communicate(timeout=120)
        found[case] = process.returncode, said
    return found


@pytest.mark.parametrize("case", SCRIPTS)
def test_the_script_ends_with_its_verdict(case, ended):
    """0 as registered, 1 something is not, 2 bad usage, 3 inconclusive: what CI reads."""
    status, said = ended[case]
    assert status == SCRIPTS[case][2], said
    assert ("all as registered" in said) == (case == "sound")
    words = {"wrong": "NOT as registered", "no number": "inconclusive, none wrong"}
    assert words.get(case, "") in said
