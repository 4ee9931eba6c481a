"""Judging other code: bugs are named, conventions told apart from them, stubs turned away."""

import importlib
import itertools
import math
import sys

import pytest
import torch
from torch.distributions import Normal

import pave_grpo as pg
import verify_equivalence as oracle
from zoo.oracle import bugs, judging

BUGS = {bug.name: bug for bug in bugs.BUGS}


# ---- Implementations made of pave_grpo, or of a patched copy of it -------------------------------


def of_one_prompt(velocity):
    """velocity(x, t) as pave_grpo calls it."""
    return lambda x, t, prompt: velocity(x, t)


def process_of(module, t, s, kernel, eta):
    return module.Process(torch.tensor([t, s], dtype=torch.float64), kernel, eta)


def transition_of(module):
    """The function of level "transition"."""

    def transition(x, velocity, t, s, k, kernel, eta):
        start, end = x.new_full((len(x),), t).double(), x.new_full((len(x),), s).double()
        prompt = torch.zeros(len(x), dtype=torch.long)
        process, factors = process_of(module, t, s, kernel, eta), sorted({2, 3, k} - {1})
        terms = module.decompose(of_one_prompt(velocity), process, x, start, end, prompt, factors)
        return terms[k].mean, terms[k].std

    return transition


def log_prob_of(module):
    """The function of level "log_prob"."""

    def log_prob(x_s, mean, std):
        return module.Transition(mean, std).log_prob(x_s)

    return log_prob


def loss_of(module):
    """The function of level "loss"."""

    def loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
        process = process_of(module, t, s, kernel, eta)
        x_t, x_s = x_t[None, None], x_s[None, None]
        unused = torch.zeros(x_s.shape[:3], dtype=torch.float64)
        rollout = module.Rollout(process, (0,), x_t, x_s, unused, x_s)
        A = module.group_advantages(rewards[None, None])
        options = {"factors": factors, "clip": clip}
        old = module.policy_loss(of_one_prompt(velocity_old), rollout, A, **options).old
        new = module.policy_loss(of_one_prompt(velocity), rollout, A, old=old, **options)
        return new.loss

    return loss


FUNCTIONS = {
    "transition": transition_of,
    "log_prob": log_prob_of,
    "advantages": loss_of,
    "loss": loss_of,
}
transition, loss = transition_of(pg), loss_of(pg)


# ---- Bugs ----------------------------------------------------------------------------------------

SILENT = {  # what the levels cannot show
    "prompts crossed": "one prompt is asked",
    "leaking mean": "one group",
    "leaking std": "one group",
    "silent groups dropped": "one group",
    "KL pushes away": "no reference",
    "KL without gradient": "no reference",
    "KL without std": "no reference",
    "matched: fine std": "the paper's form",
    "matched: live coarse mean": "the paper's form",
    **{name: "the paper's form" for name in BUGS if name.startswith("midpoint: ")},
    "clip ignored": "a convention: the released code",
}
SHOWN = [name for name in BUGS if BUGS[name].level != "sampler" and name not in SILENT]


def test_at_least_forty_bugs_can_be_shown():
    """What cannot be is a bug of the table still, and the rest is most of it."""
    assert set(SILENT) <= set(BUGS) and len(SHOWN) >= 40


@pytest.fixture(scope="module")
def known():
    """What is due to the questions of seed 5, as far as it was computed, and the rest of it."""
    return {}


@pytest.fixture
def once(known, monkeypatch):
    """Within, that is computed once, and no further than some judgement needed it."""
    plain = judging.all_due

    def all_due(questions, module, convention):
        key = tuple(map(str, questions)), module.__name__, convention
        if key not in known:
            known[key] = [], plain(questions, module, convention)
        found, rest = known[key]
        for i in itertools.count():
            if i == len(found):
                try:
                    found.append(next(rest))
                except StopIteration:
                    return
            yield found[i]

    monkeypatch.setattr(judging, "all_due", all_due)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("name", SHOWN)
def test_a_known_bug_is_recognised_by_name(name):
    """Every bug that a level can show is named and said to disagree, by its gradient if by that."""
    bug = BUGS[name]
    function = FUNCTIONS[bug.level](bugs.patched(bug))
    found = judging.judge(function, seed=5)
    assert not found.agrees and name in found.bugs and bug.says in str(found), found
    assert found.first.startswith("gradient") == (name in ("states cut", "Euler cut"))
    assert "where" in found.first


@pytest.mark.parametrize("variant", bugs.VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("level", ["transition", "log_prob", "loss"])
def test_correct_variants_are_never_accused(variant, level):
    """Renamed, reordered, algebraically equal code agrees at every level."""
    assert judging.judge(FUNCTIONS[level](bugs.patched(variant)), seed=6).agrees


# ---- Conventions of a log-probability ------------------------------------------------------------


def squares(x_s, mean):
    return (x_s - mean).square().flatten(1)


def summed_density(x_s, mean, std):
    std = std.reshape(-1, *[1] * (mean.ndim - 1))
    return Normal(mean, std).log_prob(x_s).flatten(1).sum(1)


def no_constants(x_s, mean, std):
    return -squares(x_s, mean).mean(1) / (2 * std**2)


def flow_cps(x_s, mean, std):
    return -squares(x_s, mean).mean(1)


def log_std_only(x_s, mean, std):
    return -squares(x_s, mean).mean(1) / (2 * std**2) - std.log()


HALF_LOG = "log std kept, log(2 pi)/2 dropped"
DROPPED = "dropped: steps are weighted by 2 std^2"


@pytest.mark.parametrize(
    ("function", "reduction", "constants", "half_square"),
    [
        (summed_density, "sum", "kept", "kept"),
        (no_constants, "mean", "dropped", "kept"),
        (flow_cps, "mean", "dropped", DROPPED),
        (log_std_only, "mean", HALF_LOG, "kept"),
    ],
)
def test_conventions_are_named_and_not_called_bugs(function, reduction, constants, half_square):
    """Each of the field's log-probabilities agrees, with its conventions told."""
    found = judging.judge(function, seed=8)
    assert found.agrees and not found.bugs
    assert found.conventions == {
        "mean or sum": reduction,
        "constants": constants,
        "1/(2 std^2)": half_square,
        "precision": "float64",
    }
    assert "ddof: not observable at this level" in str(found)


def summed_and_a_bug(x_s, mean, std):
    return -squares(x_s, mean).sum(1) / std**2


def test_a_bug_is_named_under_another_convention():
    """The half is forgotten in a sum without constants."""
    assert judging.judge(summed_and_a_bug, seed=10).bugs == ("no half",)


# ---- Conventions of a transition -----------------------------------------------------------------


def g_for_std(x, velocity, t, s, k, kernel, eta):
    mean, std = transition(x, velocity, t, s, k, kernel, eta)
    return mean, std / ((t - s) / k) ** 0.5 if kernel == "flow_sde" else std


def only_cps(x, velocity, t, s, k, kernel, eta):
    if kernel != "cps":
        raise NotImplementedError(kernel)
    return transition(x, velocity, t, s, k, kernel, eta)


def in_float32(x, velocity, t, s, k, kernel, eta):
    mean, std = transition(x, velocity, t, s, k, kernel, eta)
    return mean.float(), std.float()


def of_float32(x, velocity, t, s, k, kernel, eta):
    return transition(x.float(), velocity, t, s, k, kernel, eta)


def g_and_a_bug(x, velocity, t, s, k, kernel, eta):
    buggy = transition_of(bugs.patched(BUGS["stale time"]))
    mean, std = buggy(x, velocity, t, s, k, kernel, eta)
    return mean, std / ((t - s) / k) ** 0.5


@pytest.mark.parametrize(
    ("function", "convention", "told"),
    [
        (g_for_std, "g or std", "g = std / sqrt(D) for flow_sde"),
        (only_cps, "not implemented", "flow_sde, dance"),
        (in_float32, "precision", "float32"),
        (of_float32, "precision", "float32"),
    ],
)
def test_conventions_of_a_transition_are_told(function, convention, told):
    """A g under the name of std in one kernel, a kernel that is missing, float32."""
    found = judging.judge(function, seed=10)
    assert found.agrees and found.conventions.get(convention) == told


def test_a_bug_is_named_beside_a_convention():
    """The std is g throughout, and the first difference is still the bug's."""
    found = judging.judge(g_and_a_bug, seed=10)
    assert found.bugs == ("stale time",)
    assert found.first.startswith("mean at kernel flow_sde, k = 2")


# ---- Conventions of a loss -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ddof", "eps", "clamp"), [(1, 1e-8, 5.0), (0, 1e-4, 5.0), (0, 0.0, None), (1, 1e-3, 3.0)]
)
def test_conventions_of_advantages_are_told(ddof, eps, clamp, monkeypatch):
    """Ddof, eps and clamp are read off a loss."""
    module = bugs.patched(bugs.VARIANTS[0])

    def advantages(rewards):
        return pg.group_advantages(rewards, ddof, eps, clamp)

    monkeypatch.setattr(module, "group_advantages", advantages)
    found = judging.judge(loss_of(module), seed=9)
    told = [found.conventions[name] for name in ("ddof", "eps", "clamp")]
    assert found.agrees and told == [str(ddof), f"{eps:g}", str(clamp)]


def released(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, None)


def weighted_cps(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    ours = loss_of(bugs.patched(judging.NO_HALF_SQUARE)) if kernel == "cps" else loss
    return ours(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip)


def loss_in_float32(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    x_t, x_s = x_t.float(), x_s.float()
    return loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip)


@pytest.mark.parametrize(
    ("function", "convention", "told"),
    [
        (released, "clip", "none"),
        (weighted_cps, "1/(2 std^2)", f"{DROPPED} (cps)"),
        (loss_in_float32, "precision", "float32"),
        (loss, "precision", "float64"),
    ],
)
def test_conventions_of_a_loss_are_told(function, convention, told):
    """No clip; 1/(2 std^2) dropped in one kernel; float32."""
    found = judging.judge(function, seed=10)
    assert found.agrees and found.conventions[convention] == told


# ---- Stubs ---------------------------------------------------------------------------------------


class Yes(torch.Tensor):
    """A tensor that is equal to everything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.equal, torch.allclose):
            return torch.tensor(True)
        return super().__torch_function__(func, types, args, kwargs or {})


def echo(x_s, mean, std):
    return std


def copied_echo(x_s, mean, std):
    return std.clone()


def view(x_s, mean, std):
    return mean.flatten(1)[:, 0]


def constant(x_s, mean, std):
    return torch.zeros(len(x_s), dtype=torch.float64)


def spoiling(x_s, mean, std):
    x_s -= mean
    return -squares(x_s, 0).mean(1)


def nan(x_s, mean, std):
    return std * math.nan


def nothing(x_s, mean, std):
    return None


def always_equal(x_s, mean, std):
    return torch.zeros(len(x_s), dtype=torch.float64).as_subclass(Yes)


def wrong_shape(x_s, mean, std):
    return -squares(x_s, mean)


def another_signature(a, b):
    return a


def transition_echo(x, velocity, t, s, k, kernel, eta):
    return x, torch.ones(3)


def transition_constant(x, velocity, t, s, k, kernel, eta):
    return torch.zeros(3, 6), 1.0


def transition_spoiling(x, velocity, t, s, k, kernel, eta):
    return x.add_(1) + 1, 1.0


def transition_refusing_some(x, velocity, t, s, k, kernel, eta):
    if t == 1:
        raise ValueError("t = 1")
    return transition(x, velocity, t, s, k, kernel, eta)


def transition_of_one_value(x, velocity, t, s, k, kernel, eta):
    return x + 1


def transition_raising(x, velocity, t, s, k, kernel, eta):
    raise NotImplementedError("later")


def no_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return None


def number_for_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return 0.5


def constant_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return (velocity(x_t, t) * 0).sum()


def loss_without_theta(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return rewards.std()


def raising_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    raise NotImplementedError("later")


STUBS = [
    (echo, "returns its input std, or a view of it"),
    (copied_echo, "returns its input std"),
    (view, "returns its input mean, or a view of it"),
    (constant, "answers the same whatever it is asked"),
    (spoiling, "changes its input x_s in place"),
    (nan, "finite floating-point tensors are due"),
    (nothing, "returns NoneType"),
    (always_equal, "returns Yes"),
    (wrong_shape, "must be"),
    (another_signature, "those of no level"),
    (transition_echo, "returns its input x"),
    (transition_constant, "answers the same whatever it is asked"),
    (transition_spoiling, "changes its input x in place"),
    (transition_refusing_some, "in 4 cases of kernel flow_sde, and answers others"),
    (transition_of_one_value, "returns 1 values; must be 2"),
    (transition_raising, "implements no kernel"),
    (no_loss, "returns NoneType"),
    (number_for_loss, "no gradient"),
    (constant_loss, "answers the same whatever it is asked"),
    (loss_without_theta, "no gradient"),
    (raising_loss, "implements no kernel"),
    (3, "no function with named parameters"),
    (print, "those of no level"),
]


def rejection(stub):
    """Why a stub is rejected, in words; any other error is one that its author would see."""
    with pytest.raises(Exception) as stopped:
        judging.judge(stub, seed=11)
    assert isinstance(stopped.value, judging.Rejected), repr(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(("stub", "why"), STUBS)
def test_stubs_are_rejected(stub, why):
    """Echoes, views, constants, changed inputs, wrong shapes, objects that equal everything."""
    assert why in rejection(stub)


def three_values(x, velocity, t, s, k, kernel, eta):
    return (*transition(x, velocity, t, s, k, kernel, eta), x.sum() * 1.5)


def turned_round(mean, x_s, std):
    return pg.Transition(mean, std).log_prob(x_s)


@pytest.mark.parametrize(
    ("stub", "why"),
    [(three_values, "it returns 3 values; must be 2"), (turned_round, "those of no level")],
)
def test_answers_that_say_too_much_are_rejected(stub, why):
    """A value too many, and parameters in another order: what is meant cannot be known."""
    assert why in rejection(stub)


def test_every_bug_with_these_numbers_is_named(monkeypatch):
    """Two entries of one patch are both named, in the order of the table."""
    bug = BUGS["no half"]
    monkeypatch.setattr(
        judging.bugs, "BUGS", (bug, bug._replace(name="again"), BUGS["std for variance"])
    )
    found = judging.judge(log_prob_of(bugs.patched(bug)), seed=5)
    assert found.bugs == ("no half", "again")
    assert str(found).count("these are the numbers of a known bug") == 2


# ---- Numbers that agree --------------------------------------------------------------------------


def test_agreement_is_of_every_entry_and_ends_at_its_tolerance():
    """|theirs - ours| <= tolerance (max |ours| + |ours|), above or below, in each of them."""
    ours = torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64)
    for entry, room in ((0, 8.0), (1, 5.0), (2, 4.0)):
        for sign in (1, -1):
            for share, agrees in ((0.999, True), (1.001, False)):
                theirs = ours.clone()
                theirs[entry] += sign * share * room * 1e-3
                assert judging.close(theirs, ours, 1e-3) == agrees, (entry, sign, share)
    assert judging.TOLERANCES == {"float64": 1e-9, "float32": 1e-5}
    other = ours * (1 + 1e-7)
    assert judging.agreement([ours, ours], [ours, ours]) == "float64"
    assert judging.agreement([ours, ours], [ours, other]) == "float32"
    assert judging.agreement([ours, ours], [ours, 1.1 * ours]) == ""


def asked(seed):
    """The first states that a function is asked about."""
    kept = []

    def noting(x_s, mean, std):
        kept.append(x_s.clone())
        return pg.Transition(mean, std).log_prob(x_s)

    judging.judge(noting, seed)
    return kept[0]


def test_what_is_asked_is_of_the_seed():
    """The same seed asks the same; others do not."""
    assert torch.equal(asked(1), asked(1)) and not torch.equal(asked(1), asked(2))


def test_a_transition_is_asked_with_an_eta_of_its_seed():
    """Between 0.5 and 0.9: a function with one written into it is not called right by luck."""
    etas = set()
    for seed in range(5):
        questions = judging.transition_questions(torch.Generator().manual_seed(seed))
        etas |= {question.eta for question in questions}
    assert len(etas) == 5 and 0.5 <= min(etas) < 0.65 < max(etas) <= 0.9

    def with_its_own(x, velocity, t, s, k, kernel, eta):
        return transition(x, velocity, t, s, k, kernel, 0.7)

    assert not judging.judge(with_its_own, seed=11).agrees


@pytest.mark.usefixtures("theirs")
def test_a_seed_is_fresh_and_said(monkeypatch, capsys):
    """Without --seed it comes from the system, so that nothing can be learnt by heart."""
    seeds = []
    monkeypatch.setattr(judging.os, "urandom", lambda n: bytes([1, 2, 3, 4][:n]))
    monkeypatch.setattr(judging, "judge", lambda function, seed: seeds.append(seed) or GOOD)
    assert judging.main("theirs:good", None) == 0 == judging.main("theirs:good", 8)
    assert seeds == [0x01020304, 8]
    said = capsys.readouterr().out.splitlines()
    named = [line for line in said if line.startswith("theirs:good")]
    assert [line.partition(" (seed ")[2] for line in named] == [f"{0x01020304})", "8)"]


GOOD = judging.Judgement(judging.LogProbQuestion, True, {}, "", ())


# ---- From the command line -----------------------------------------------------------------------

THEIRS = """
def good(x_s, mean, std):
    return -((x_s - mean) ** 2).flatten(1).mean(1) / (2 * std**2)

def bad(x_s, mean, std):
    return -((x_s - mean) ** 2).flatten(1).mean(1) / std

def stub(x_s, mean, std):
    return std
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder with theirs.py, to stand in; the module and the path to it are forgotten after."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("theirs", None)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("theirs", None)


@pytest.mark.usefixtures("theirs")
def test_against_from_the_command_line(capsys):
    """MODULE:FUNCTION is imported from the working directory; the status says what was found."""
    found = [
        ("good", 0, "verdict: agrees"),
        ("bad", 1, "verdict: disagrees"),
        ("stub", 1, "verdict: rejected"),
        ("none", 2, "--against theirs:none"),
    ]
    for name, code, words in found:
        assert oracle.main(["--against", f"theirs:{name}"]) == code
        printed = capsys.readouterr()
        assert words in printed.out + printed.err


@pytest.mark.usefixtures("theirs")
def test_the_working_directory_comes_first(tmp_path, monkeypatch, capsys):
    """Whatever else the path holds under that name: what stands here is judged."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs.py").write_text("def good(x_s, mean, std): ...\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path])
    assert judging.main("theirs:good", 3) == 0
    assert "verdict: agrees" in capsys.readouterr().out
