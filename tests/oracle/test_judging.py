"""Judging other implementations: bugs are named, conventions told apart from them, stubs turned away."""

import importlib
import math

import pytest
import torch

import verify_equivalence as oracle
from zoo.oracle import bugs, judging


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
