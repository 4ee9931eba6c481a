"""The oracle itself: its verdicts can go wrong, its words follow them, and it knows bugs from conventions."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import bugs, fields, judging, vectors

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


# ---- Judging other implementations -------------------------------------------------------------------------------


def as_function(module, level):
    """The level's function, computed by a (patched) pave_grpo."""

    def transition(x, velocity, t, s, k, kernel, eta):
        rows = [torch.full((len(x),), u, dtype=torch.float64) for u in (t, s)]
        p = module.decompose(
            lambda x, t, c: velocity(x, t),
            module.Process([t, s], kernel, eta),
            x,
            *rows,
            torch.zeros(len(x), dtype=torch.long),
            sorted({2, 3, k} - {1}),
        )[k]
        return p.mean, p.std

    def log_prob(x_s, mean, std):
        return module.Transition(mean, std).log_prob(x_s)

    def loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
        rollout = module.Rollout(
            module.Process([t, s], kernel, eta),
            (0,),
            x_t[None, None],
            x_s[None, None],
            torch.zeros(1, 1, len(x_t), dtype=torch.float64),
            x_s[None, None],
            None,
        )
        A, options = module.group_advantages(rewards[None, None]), dict(factors=factors, clip=clip)
        old = module.policy_loss(lambda x, t, c: velocity_old(x, t), rollout, A, **options).old
        return module.policy_loss(
            lambda x, t, c: velocity(x, t), rollout, A, old=old, **options
        ).loss

    return {"transition": transition, "log_prob": log_prob, "advantages": loss, "loss": loss}[level]


SILENT = {  # what the levels cannot show
    "prompts crossed",  # one prompt is asked
    "leaking mean",
    "leaking std",
    "silent groups dropped",  # one group
    "KL pushes away",
    "KL without gradient",
    "KL without std",  # no reference
    "matched: fine std",
    "matched: live coarse mean",  # the paper's form
    "clip ignored",  # a convention: the released code
}


def test_known_bugs_are_recognised_by_name():
    """At least 20 bugs are named by the judge: every one that a level can show; none of them is said to agree."""
    named = 0
    for bug in bugs.BUGS:
        if bug.level == "sampler" or bug.name in SILENT:
            continue
        found = judging.judge(as_function(bugs.patched(bug), bug.level), seed=5)
        assert not found.agrees and bug.name in found.bugs and found.first, (bug.name, found)
        assert bug.says in str(found)
        named += 1
    assert named >= 40, named


@pytest.mark.parametrize("variant", bugs.VARIANTS, ids=lambda v: v.name)
def test_correct_variants_are_never_accused(variant):
    """Renamed, reordered, algebraically equal code agrees at every level."""
    module = bugs.patched(variant)
    for level in ("transition", "log_prob", "loss"):
        assert judging.judge(as_function(module, level), seed=6).agrees, level


@pytest.mark.parametrize("name", ["states cut", "Euler cut"])
def test_a_loss_with_the_wrong_gradient_is_found_out(name):
    """The value is right and the gradient is not: the judge compares both."""
    bug = next(b for b in bugs.BUGS if b.name == name)
    found = judging.judge(as_function(bugs.patched(bug), "loss"), seed=7)
    assert not found.agrees and found.first.startswith("gradient") and name in found.bugs


def squares(x_s, mean):
    return (x_s - mean).square().flatten(1)


CONVENTIONS = {
    "summed density": (
        lambda x_s, mean, std: (
            torch.distributions.Normal(mean, std.view(-1, *[1] * (mean.ndim - 1)))
            .log_prob(x_s)
            .flatten(1)
            .sum(1)
        ),
        {"mean or sum": "sum", "constants": "kept", "1/(2 std^2)": "kept"},
    ),
    "no constants": (
        lambda x_s, mean, std: -squares(x_s, mean).mean(1) / (2 * std**2),
        {"mean or sum": "mean", "constants": "dropped", "1/(2 std^2)": "kept"},
    ),
    "Flow-CPS": (
        lambda x_s, mean, std: -squares(x_s, mean).mean(1),
        {
            "mean or sum": "mean",
            "constants": "dropped",
            "1/(2 std^2)": "dropped: steps are weighted by 2 std^2",
        },
    ),
    "log std only": (
        lambda x_s, mean, std: -squares(x_s, mean).mean(1) / (2 * std**2) - std.log(),
        {
            "mean or sum": "mean",
            "constants": "log std kept, log(2 pi)/2 dropped",
            "1/(2 std^2)": "kept",
        },
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_are_named_and_not_called_bugs(name):
    """Each of the field's log-probabilities agrees, with its conventions told."""
    function, wanted = CONVENTIONS[name]
    found = judging.judge(function, seed=8)
    assert found.agrees and not found.bugs and wanted.items() <= found.conventions.items()
    assert "ddof: not observable at this level" in str(found)


@pytest.mark.parametrize(
    "options", [(1, 1e-8, 5.0), (0, 1e-4, 5.0), (0, 0.0, None), (1, 1e-3, 3.0)]
)
def test_conventions_of_a_loss_are_told(options, monkeypatch):
    """Ddof, eps and clamp are read off a loss."""
    plain = oracle.pave.group_advantages
    module = bugs.patched(bugs.VARIANTS[0])
    monkeypatch.setattr(module, "group_advantages", lambda r: plain(r, *options))
    found = judging.judge(as_function(module, "loss"), seed=9)
    assert found.agrees
    assert (found.conventions["ddof"], found.conventions["eps"], found.conventions["clamp"]) == (
        str(options[0]),
        f"{options[1]:g}",
        str(options[2]),
    )


def g_for_std(x, velocity, t, s, k, kernel, eta):
    mean, std = as_function(oracle.pave, "transition")(x, velocity, t, s, k, kernel, eta)
    return mean, std / ((t - s) / k) ** 0.5 if kernel == "flow_sde" else std


def only_cps(x, velocity, t, s, k, kernel, eta):
    if kernel != "cps":
        raise NotImplementedError(kernel)
    return as_function(oracle.pave, "transition")(x, velocity, t, s, k, kernel, eta)


def in_float32(x, velocity, t, s, k, kernel, eta):
    mean, std = as_function(oracle.pave, "transition")(x, velocity, t, s, k, kernel, eta)
    return mean.float(), std.float()


def of_float32(x, velocity, t, s, k, kernel, eta):
    mean, std = as_function(oracle.pave, "transition")(x.float(), velocity, t, s, k, kernel, eta)
    return mean, std


def g_and_a_bug(x, velocity, t, s, k, kernel, eta):
    module = bugs.patched(next(b for b in bugs.BUGS if b.name == "stale time"))
    mean, std = as_function(module, "transition")(x, velocity, t, s, k, kernel, eta)
    return mean, std / ((t - s) / k) ** 0.5


def summed_and_a_bug(x_s, mean, std):
    return -squares(x_s, mean).sum(1) / std**2


def released(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return as_function(oracle.pave, "loss")(
        velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, None
    )


def half_done(x, velocity, t, s, k, kernel, eta):
    if t == 1:
        raise ValueError("t = 1")
    return as_function(oracle.pave, "transition")(x, velocity, t, s, k, kernel, eta)


def weighted_cps(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    module = bugs.patched(judging.NO_HALF_SQUARE) if kernel == "cps" else oracle.pave
    return as_function(module, "loss")(
        velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip
    )


def test_conventions_may_differ_by_kernel_and_kernels_may_be_missing():
    """G under the name of std in one kernel, 1/(2 std^2) dropped in another, float32: told, not accused."""
    assert (
        judging.judge(g_for_std, seed=10).conventions["g or std"]
        == "g = std / sqrt(D) for flow_sde"
    )
    assert judging.judge(only_cps, seed=10).conventions["not implemented"] == "flow_sde, dance"
    for function in (in_float32, of_float32):
        assert judging.judge(function, seed=10).conventions["precision"] == "float32"
    found = judging.judge(g_and_a_bug, seed=10)
    assert found.bugs == ("stale time",) and found.first.startswith(
        "mean at kernel flow_sde, k = 2"
    )
    found = judging.judge(summed_and_a_bug, seed=10)
    assert found.bugs == ("no half",)
    found = judging.judge(released, seed=10)
    assert found.agrees and found.conventions["clip"] == "none"
    found = judging.judge(weighted_cps, seed=10)
    assert found.agrees and found.conventions["1/(2 std^2)"].endswith("(cps)")


class Yes(torch.Tensor):
    """A tensor that is equal to everything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (
            torch.tensor(True)
            if func in (torch.equal, torch.allclose)
            else super().__torch_function__(func, types, args, kwargs or {})
        )


def spoiling(x_s, mean, std):
    x_s -= mean
    return -squares(x_s, 0).mean(1)


STUBS = {
    "echo": lambda x_s, mean, std: std,
    "copied echo": lambda x_s, mean, std: std.clone(),
    "view": lambda x_s, mean, std: mean.flatten(1)[:, 0],
    "constant": lambda x_s, mean, std: torch.zeros(len(x_s)).double(),
    "spoiling": spoiling,
    "nan": lambda x_s, mean, std: std * math.nan,
    "none": lambda x_s, mean, std: None,
    "always equal": lambda x_s, mean, std: torch.zeros(len(x_s)).double().as_subclass(Yes),
    "wrong shape": lambda x_s, mean, std: -squares(x_s, mean),
    "another signature": lambda a, b: a,
}


def raising(*_):
    raise NotImplementedError("later")


def stub(level, answer):
    """A function of a level's signature that answers from its arguments, by name."""
    names = judging.LEVELS[level]
    return eval(
        f"lambda {', '.join(names)}: answer(dict({', '.join(f'{n}={n}' for n in names)}))",
        {"answer": answer},
    )


OTHER_STUBS = {
    "transition echo": stub("transition", lambda a: (a["x"], torch.ones(3))),
    "transition constant": stub("transition", lambda a: (torch.zeros(3, 6), 1.0)),
    "transition spoils": stub("transition", lambda a: (a["x"].add_(1) + 1, 1.0)),
    "transition refuses some": half_done,
    "transition one value": stub("transition", lambda a: a["x"] + 1),
    "transition raises": stub("transition", raising),
    "loss of nothing": stub("loss", lambda a: None),
    "loss a number": stub("loss", lambda a: 0.5),
    "loss constant": stub("loss", lambda a: (a["velocity"](a["x_t"], a["t"]) * 0).sum()),
    "loss without gradient": stub("loss", lambda a: a["rewards"].std()),
    "loss raises": stub("loss", raising),
    "no function": 3,
    "a builtin": print,
}


@pytest.mark.parametrize("name", OTHER_STUBS)
def test_stubs_of_the_other_levels_are_rejected(name):
    """Transitions and losses that echo, spoil, answer a constant, raise, or are no functions."""
    with pytest.raises(judging.Rejected):
        judging.judge(OTHER_STUBS[name], seed=12)


@pytest.mark.parametrize("name", STUBS)
def test_stubs_are_rejected(name):
    """Echoes, views, constants, changed inputs, wrong shapes and objects that equal everything are turned away."""
    with pytest.raises(judging.Rejected):
        judging.judge(STUBS[name], seed=11)


# ---- Golden vectors ----------------------------------------------------------------------------------------------


def test_vectors_are_written_read_back_and_rechecked(tmp_path, capsys):
    """Every case recomputes; a changed number, a changed file and a missing folder are found."""
    folder = tmp_path / "vectors"
    assert (
        oracle.main(["--vectors", str(folder)]) == 0
        and oracle.main(["--check-vectors", str(folder)]) == 0
    )
    described = json.loads((folder / "vectors.json").read_text())
    assert described["version"] == vectors.VERSION and len(described["cases"]) == len(vectors.CASES)
    tensors = vectors.load_file(folder / "vectors.safetensors")
    ratios, A = (
        tensors[f"ratios on both sides of the clip/{name}"] for name in ("ratio_2", "advantages")
    )
    assert (ratios[A > 0] > 1.05).any() and (
        ratios[A < 0] < 0.95
    ).any()  # members cut on either side
    silent = tensors["equal rewards/advantages"]
    assert (
        not silent[0].any()
        and silent[1].any()
        and tensors["a clamp that acts/advantages"].abs().max() == 0.8
    )
    tensors["k = 5/mean_5"][0, 0, 0, 0] += 1e-6
    vectors.save_file(tensors, folder / "vectors.safetensors")
    capsys.readouterr()
    assert oracle.main(["--check-vectors", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "SHA-256" in out and "k = 5/mean_5: off by 1e-06" in out and len(out.splitlines()) == 2
    del tensors["k = 5/mean_5"]
    vectors.save_file(
        tensors | {"k = 5/x_0": tensors["k = 5/x_0"] * math.nan}, folder / "vectors.safetensors"
    )
    assert oracle.main(["--check-vectors", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "k = 5/mean_5: missing" in out and "k = 5/x_0: off by nan" in out
    (folder / "vectors.safetensors").write_bytes(b"no tensors")
    assert oracle.main(["--check-vectors", str(folder)]) == 2
    assert (
        oracle.main(["--vectors", str(folder)]) == 2
        and oracle.main(["--check-vectors", str(tmp_path / "no")]) == 2
    )


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


def test_against_from_the_command_line(tmp_path, monkeypatch, capsys):
    """MODULE:FUNCTION is imported from the working directory: 0 agrees, 1 disagrees or rejected, 2 cannot be found."""
    (tmp_path / "theirs.py").write_text(
        "def good(x_s, mean, std):\n    return -((x_s - mean) ** 2).flatten(1).mean(1) / (2 * std**2)\n"
        "def bad(x_s, mean, std):\n    return -((x_s - mean) ** 2).flatten(1).mean(1) / std\n"
        "def stub(x_s, mean, std):\n    return std\n"
    )
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    codes = [
        oracle.main(["--against", f"theirs:{name}"]) for name in ("good", "bad", "stub", "none")
    ]
    assert codes == [0, 1, 1, 2]
    out = capsys.readouterr()
    assert (
        "agrees" in out.out
        and "disagrees" in out.out
        and "rejected" in out.out
        and "theirs:none" in out.err
    )


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
