"""The judge: no fault missed, no variant accused, bugs and conventions named, no pass by luck.

The functions judged are those of implementations.py, and pave_grpo itself with its known bugs.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import implementations

import pave_grpo as pg
import verify_equivalence as oracle
from zoo.oracle import bugs, judging
from zoo.oracle.judging import advantages, asked, asking, conditions, groups, levels
from zoo.oracle.judging.conditions import Setting

BUGS = {bug.name: bug for bug in bugs.BUGS}
SEED = 3  # one for all: what is due to a question is computed once
LONG = {"step": 2, "loss": 4}  # levels at which a judgement takes long: every so many-th


def some(entries, every, first=0):
    """Every so many-th by default; with BUGS=all in the environment every one."""
    return entries if os.environ.get("BUGS") == "all" else entries[first::every]


def some_of_levels(entries, every, first):
    """`every` so many-th of the levels that it names, and all of the others."""
    chosen = []
    for level in judging.LEVELS:
        own = [entry for entry in entries if entry.level == level.name]
        chosen += some(own, every[level.name], first) if level.name in every else own
    return chosen


# ---- Faults and variants of our own --------------------------------------------------------------


def test_the_tables_are_as_long_as_they_should_be():
    """60 faults and 25 variants, none a bug of bugs.txt, each once."""
    faults, variants = implementations.FAULTS, implementations.VARIANTS
    assert len(faults) >= 60 and len(variants) >= 25
    names = [entry.name for entry in (*faults, *variants, *implementations.UNSEEN)]
    assert len(set(names)) == len(names) and not set(names) & set(BUGS)
    assert {fault.level for fault in faults} == {level.name for level in judging.LEVELS}


FAULTS = some_of_levels(implementations.FAULTS, LONG, 0)
VARIANTS = some_of_levels(implementations.VARIANTS, LONG, 1)  # the first is as plain as UNSEEN


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_fault_is_missed(fault, monkeypatch):
    """And where it was made is said, where there is a condition. None is a known bug's."""
    monkeypatch.setattr(judging.bugs, "BUGS", ())
    found = judging.judge(fault.function, SEED)
    assert (found.level, found.verdict) == (fault.level, "disagrees"), found
    assert found.first and re.search(fault.where, found.where), found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_variant_is_accused(variant):
    """Its conventions and its scope are named, and it has no other scope."""
    found = judging.judge(variant.function, SEED)
    assert (found.level, found.verdict) == (variant.level, "agrees"), found
    for name, pattern in variant.conventions.items():
        assert re.search(pattern, found.conventions[name]), found
    for pattern in variant.scope:
        assert any(re.search(pattern, line) for line in found.scope), found
    assert bool(found.scope) == bool(variant.scope), found


@pytest.mark.parametrize("unseen", implementations.UNSEEN, ids=lambda unseen: unseen.name)
def test_what_a_level_cannot_show_agrees(unseen):
    """A list of what no answer of the level tells; whoever makes one of them shown, moves it."""
    assert judging.judge(unseen.function, SEED).verdict == "agrees"


# ---- Known bugs, in pave_grpo itself -------------------------------------------------------------


def of_one_prompt(velocity):
    """velocity(x, t) as pave_grpo calls it."""
    return lambda x, t, prompt: velocity(x, t)


def process_of(module, t, s, kernel, eta):
    return module.Process(torch.tensor([t, s], dtype=torch.float64), kernel, eta)


def rows(t, x):
    return torch.full((len(x),), t, dtype=torch.float64)


def step_of(module):
    """The function of level "step"."""

    def step(v, x_t, t, s, eta, x_s=None, kernel="flow_sde"):
        process = process_of(module, t, s, kernel, eta)
        p = process.transition(x_t, v, rows(t, x_t), rows(s, x_t))
        x_s = p.sample(torch.randn_like(x_t)).detach() if x_s is None else x_s
        return x_s, p.log_prob(x_s), p.mean, p.std

    return step


def transition_of(module):
    """The function of level "transition", asked about several prompts."""

    def transition(x, velocity, t, s, k, kernel, eta, prompt):
        process, factors = process_of(module, t, s, kernel, eta), sorted({2, 3, k} - {1})
        terms = module.decompose(velocity, process, x, rows(t, x), rows(s, x), prompt, factors)
        return terms[k].mean, terms[k].std

    return transition


def log_prob_of(module):
    """The function of level "log_prob"."""

    def log_prob(x_s, mean, std):
        return module.Transition(mean, std).log_prob(x_s)

    return log_prob


def advantages_of(module):
    """The function of level "advantages"."""

    def of_rewards(rewards):
        return module.group_advantages(rewards)

    return of_rewards


def loss_of(module):
    """The function of level "loss", asked about several groups and a KL."""

    def loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip,
             prompt, kl, velocity_ref):  # fmt: skip
        process = process_of(module, t, s, kernel, eta)
        P = int(prompt.max()) + 1
        x_t, x_s = (z.reshape(P, 1, -1, *z.shape[1:]) for z in (x_t, x_s))
        unused = torch.zeros(x_s.shape[:3], dtype=torch.float64)
        rollout = module.Rollout(process, (0,), x_t, x_s, unused, x_s)
        A = module.group_advantages(rewards.reshape(P, 1, -1))
        options = {"factors": factors, "clip": clip}
        if kl:
            options |= {"kl": kl, "reference": velocity_ref}
        old = module.policy_loss(velocity_old, rollout, A, **options).old
        return module.policy_loss(velocity, rollout, A, old=old, **options).loss

    return loss


FUNCTIONS = {
    "transition": transition_of,
    "log_prob": log_prob_of,
    "advantages": advantages_of,
    "loss": loss_of,
}
SILENT = {  # what the levels cannot show, or hold against nobody
    "matched: fine std": "the paper's form",
    "matched: live coarse mean": "the paper's form",
    **{name: "the paper's form" for name in BUGS if name.startswith("midpoint: ")},
    "clip ignored": "a convention: the released code",
    "leaking std": "a convention: the std of the whole batch",
    "old forgotten": "a scope: on policy only",
}
SHOWN = [name for name in BUGS if BUGS[name].level != "sampler" and name not in SILENT]


def test_at_least_fifty_bugs_can_be_shown():
    """What cannot be is a bug of the table still, and the rest is most of it."""
    assert set(SILENT) <= set(BUGS) and len(SHOWN) >= 50


@pytest.mark.parametrize("name", some(SHOWN, 8))
def test_a_known_bug_is_recognised_by_name(name):
    """Every bug that a level can show is named and said to disagree, by its gradient if by that."""
    bug = BUGS[name]
    found = judging.judge(FUNCTIONS[bug.level](bugs.patched(bug)), SEED)
    assert found.verdict == "disagrees" and name in found.bugs and bug.says in str(found), found


def test_a_gradient_that_is_cut_is_the_first_difference():
    """The loss is right, and what it teaches is not."""
    found = judging.judge(loss_of(bugs.patched(BUGS["states cut"])), SEED)
    assert "states cut" in found.bugs and found.first.startswith("gradient")


OF_THE_PAPER = [name for name in SILENT if SILENT[name] == "the paper's form"]
OTHERS = [name for name in SILENT if name not in OF_THE_PAPER]


@pytest.mark.parametrize("name", [*some(OF_THE_PAPER, 6), *OTHERS])
def test_what_is_held_against_nobody_agrees(name):
    """The released code's missing clip, its on-policy ratio, and what a form does not use."""
    bug = BUGS[name]
    found = judging.judge(FUNCTIONS[bug.level](bugs.patched(bug)), SEED)
    assert found.verdict == "agrees", found
    assert ("on policy only" in str(found.scope)) == (name == "old forgotten")
    assert (found.conventions.get("clip") == "none") == (name == "clip ignored")


@pytest.mark.parametrize("variant", some(bugs.VARIANTS, 3), ids=lambda variant: variant.name)
def test_correct_variants_of_the_core_agree(variant):
    """Renamed, reordered, algebraically equal code agrees, at its level and in a loss."""
    functions = {FUNCTIONS[variant.level], loss_of}
    if variant.level in ("transition", "log_prob"):
        functions.add(step_of)
    for function in functions:
        found = judging.judge(function(bugs.patched(variant)), SEED)
        assert found.verdict == "agrees" and not found.scope and not found.findings, found


def test_every_bug_with_these_numbers_is_named(monkeypatch):
    """Two entries of one patch are both named, in the order of the table."""
    bug = BUGS["no half"]
    table = (bug, bug._replace(name="again"), BUGS["std for variance"])
    monkeypatch.setattr(judging.bugs, "BUGS", table)
    found = judging.judge(log_prob_of(bugs.patched(bug)), SEED)
    assert found.bugs == ("no half", "again")
    assert str(found).count("these are the numbers of a known bug") == 2


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


def view(x_s, mean, std):
    return mean.flatten(1)[:, 0]


def constant(x_s, mean, std):
    return torch.zeros(len(x_s), dtype=torch.float64)


def nan(x_s, mean, std):
    return std * math.nan


def always_equal(x_s, mean, std):
    return torch.zeros(len(x_s), dtype=torch.float64).as_subclass(Yes)


def transition_echo(x, velocity, t, s, k, kernel, eta):
    return x, torch.ones(len(x))


def some_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return (velocity(x_t, t) * 0).sum()


def number_for_loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip):
    return 0.5


@pytest.mark.parametrize(
    "stub", [echo, view, constant, nan, always_equal, transition_echo, some_loss, number_for_loss]
)
def test_what_is_no_implementation_disagrees(stub, monkeypatch):
    """Echoes, views, constants, NaN, objects that equal everything, losses without a gradient."""
    monkeypatch.setattr(judging.bugs, "BUGS", ())  # none has the numbers of one
    found = judging.judge(stub, SEED)
    assert found.verdict == "disagrees" and " is due" in found.first


def spoiling(x_s, mean, std):
    x_s -= mean
    return pg.Transition(0 * mean, std).log_prob(x_s)


def test_right_numbers_by_spoilt_inputs_disagree():
    """Whoever calls it goes on with other numbers than they hold."""
    found = judging.judge(spoiling, SEED)
    assert found.verdict == "disagrees" and "changes its input x_s in place" in found.first


def nothing(x_s, mean, std):
    return None


def wrong_shape(x_s, mean, std):
    return (x_s - mean).square()


def another_signature(a, b):
    return a


def three_values(x, velocity, t, s, k, kernel, eta):
    return x, torch.ones(len(x)), x


def raising(x, velocity, t, s, k, kernel, eta):
    raise NotImplementedError("later")


def by_position(x_s, mean, std, /):
    return pg.Transition(mean, std).log_prob(x_s)


class Module(torch.nn.Module):
    def forward(self, x_s, mean, std):
        return pg.Transition(mean, std).log_prob(x_s)


@torch.jit.script
def scripted(x_s: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return -(x_s - mean).square().flatten(1).mean(1) / (2 * std.square())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [by_position, Module(), scripted])
def test_whatever_can_be_called_is_judged(function):
    """By position, as a module's forward, compiled."""
    assert judging.judge(function, SEED).verdict == "agrees"


def leaving(x_s, mean, std):
    sys.exit(0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (nothing, "it returns NoneType for the log-probability"),
        (wrong_shape, "it returns a log-probability of shape"),
        (another_signature, "are those of no level"),
        (three_values, "it returns 3 values, must be 2"),
        (raising, "it answers nothing: NotImplementedError: later"),
        (leaving, "it wants to end the process, SystemExit(0)"),
        (3, "no function with named parameters"),
    ],
)
def test_what_has_no_answer_cannot_be_judged(function, why):
    """That is no verdict, and not status 0."""
    found = judging.judge(function, SEED)
    assert found.verdict == "cannot be judged" and why in found.reason


def talking(std, mean, x_s, loud=True):
    print("verdict: agrees")
    torch.set_default_dtype(torch.float64)
    torch.rand(())
    return pg.Transition(mean, std).log_prob(x_s)


def test_what_else_a_function_does_is_found(capsys):
    """Output, global state, parameters of its own; the order of parameters is its own, too."""
    found = judging.judge(talking, SEED)
    assert found.verdict == "agrees" and torch.get_default_dtype() == torch.float32
    said = "\n".join(found.findings)
    for words in ("prints 'verdict: agrees'", "default dtype", "random state", "defaults: loud"):
        assert words in said
    assert capsys.readouterr().out == ""


def test_what_takes_seconds_to_set_is_set_only_where_it_changed(monkeypatch):
    """Setting deterministic algorithms imports torch's compiler."""
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    state, name = asked.state_of_the_process(), "deterministic algorithms"
    asked.restore(state)
    assert calls == []
    other = not state[name]
    asked.restore(state | {name: other})
    assert calls == [other]


def printing_nothing(x_s, mean, std):
    print()
    return pg.Transition(mean, std).log_prob(x_s)


def test_an_empty_line_is_output_too():
    """And no reason to fail."""
    found = judging.judge(printing_nothing, SEED)
    assert found.verdict == "agrees" and "it prints ''" in found.findings


# ---- Conditions ----------------------------------------------------------------------------------

VALUES = {
    "k": range(1, 8),
    "kernel": ("flow_sde", "cps", "dance"),
    "times": ((1.0, 0.75), (0.5, 0.25), (0.25, 0.0), (0.0625, 0.03125)),
    "event": ((6,), (2, 3), (2, 3, 4)),
    "factors": ((), (2,), (3,), (2, 3), (6,), (7,)),
}


@pytest.mark.parametrize(
    ("happens", "start", "words", "scope"),
    [
        (lambda z: True, {}, "", "all but "),
        (lambda z: z.k == 3, {"k": 3}, "k = 3", "all but k = 3"),
        (lambda z: z.k >= 6, {"k": 7}, "from k = 6", "all but from k = 6"),
        (lambda z: z.k > 1, {"k": 4}, "from k = 2", "k = 1 only"),
        (lambda z: z.k > 2, {"k": 4}, "from k = 3", "k in {1, 2} only"),
        (lambda z: z.kernel != "cps", {}, "kernels dance, flow_sde", "kernel cps only"),
        (lambda z: z.times[0] == 1, {"times": (1.0, 0.75)}, "at t = 1", "all but at t = 1"),
        (lambda z: z.times[1] == 0, {"times": (0.25, 0.0)}, "at s = 0", "all but at s = 0"),
        (lambda z: len(z.event) != 3, {}, "below axes = 3", "for states of 3 axes only"),
        (lambda z: bool(z.factors), {"factors": (3,)}, "where S is not empty", "S = {} only"),
        (lambda z: 3 in z.factors, {"factors": (2, 3)}, "where k = 3 is in S", "all but where"),
        (
            lambda z: z.kernel == "cps" and z.k == 2,
            {"kernel": "cps", "k": 2},
            "k = 2, kernel cps",
            "all but k = 2, kernel cps",
        ),
    ],
)
def test_the_smallest_condition_is_named(happens, start, words, scope):
    """From one place where it happens, one axis after another."""
    setting = Setting(**({"times": (0.5, 0.25)} | start))
    found = conditions.condition_of(setting, happens, VALUES)
    assert found.words() == words and found.scope().startswith(scope)
    assert found.covers(setting)


def test_a_condition_is_as_wide_as_all_that_was_seen():
    """One start may show too little: what else was seen to happen belongs to it."""
    setting = Setting(kernel="dance", k=3, times=(0.5, 0.25))
    found = conditions.condition_of(setting, lambda z: z == setting, VALUES)
    assert "kernel dance" in found.words() and "k = 3" in found.words()
    seen = [
        setting._replace(k=k, kernel=kernel) for k in range(3, 8) for kernel in ("cps", "dance")
    ]
    wider = found.widened([setting, *seen])
    assert wider.happens["kernel"] == ("cps", "dance")
    assert "from k = 3" in wider.words() and "kernels cps, dance" in wider.words()
    every = [setting._replace(kernel=kernel) for kernel in VALUES["kernel"]]
    assert "kernel" not in found.widened(every).happens


# ---- Advantages ----------------------------------------------------------------------------------


def readings(convention, precision, dtype):
    """Advantages under a convention, as a function of that float type gives them."""
    generator = torch.Generator().manual_seed(1)
    read = []
    for kind in groups.REWARDS:
        size = groups.OUTLIER_GROUP if kind in groups.OUTLIERS else 8
        r = groups.rewards_of(kind, 3, size, generator)
        A = convention.of(r).to(dtype).double()
        read.append(advantages.Reading(r, A, precision))
    return read


@given(
    scale=st.sampled_from([scale.name for scale in advantages.SCALES]),
    form=st.sampled_from(advantages.EPS_FORMS),
    power=st.floats(-9, -1),
    clamp=st.sampled_from([None, 5.0, 3.0, 1.0]),
    single=st.booleans(),
)
def test_a_convention_of_advantages_is_read_off_them(scale, form, power, clamp, single):
    """The numbers it explains are those it was read from; its eps is within the range it says."""
    true = advantages.Advantages(scale, form, 10**power, "", clamp, "")
    precision = 1e-6 if single else 1e-9
    dtype = torch.float32 if single else torch.float64
    read = readings(true, precision, dtype)
    found = advantages.recognise(read)
    assert found is not None
    for reading in read:
        due = found.of(reading.rewards)
        assert torch.allclose(due, reading.A, rtol=1e3 * precision, atol=1e-6)
    if found.scale == scale and found.form == form and not scale.startswith("none"):
        low, high = range_said(found.eps_said)
        assert low * 0.99 <= true.eps <= high * 1.01


def range_said(words):
    """(low, high) of "0 (or below 1e-09)", "between 1e-7 and 2e-7" and "1e-08"."""
    numbers = [float(z) for z in re.findall(r"[0-9.]+(?:e-?\d+)?", words)]
    return (numbers[0], numbers[-1])


def test_an_eps_that_cannot_be_told_is_a_range():
    """In float32 beside a std of 1, nobody can tell 1e-8 from 1e-9."""
    r = groups.rewards_of("1", 3, 8, torch.Generator().manual_seed(0))
    A = advantages.Advantages().of(r).float().double()
    found = advantages.recognise([advantages.Reading(r, A, 1e-6)])
    assert found.eps_said.startswith("0 (or below ")


# ---- What is asked -------------------------------------------------------------------------------


def level_of(name, seed):
    """A level with its questions, as it is asked of all parameters."""
    chosen = next(level for level in judging.LEVELS if level.name == name)
    parameters = dict.fromkeys((*chosen.required, *chosen.optional), "required")
    return chosen(parameters, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["step", "transition", "loss"])
def test_everything_is_drawn(name):
    """Each kernel at t = 1, near 0 and at s = 0 where it can be, each k, each number of axes."""
    settings = level_of(name, 1).settings()
    for kernel in pg.KERNELS:
        own = [setting for setting in settings if setting.kernel == kernel]
        assert {len(setting.event) for setting in own} == {1, 2, 3, 4}
        assert any(setting.times[0] == 1 for setting in own)
        assert any(setting.times[0] < 0.1 for setting in own)
        assert any(setting.times[1] == 0 for setting in own) == (kernel != "cps")
        assert len({setting.eta for setting in own}) >= 4
        if name == "transition":
            assert {setting.k for setting in own} == set(range(1, 8))
        if name == "loss":
            assert {max(setting.factors, default=1) for setting in own} == set(range(1, 8))
            assert {len(setting.factors) for setting in own} >= {0, 1, 2, 3}
            for field, values in (("policy", 2), ("start", 2), ("groups", 3), ("rows", 3)):
                assert len({getattr(setting, field) for setting in own}) == values
    other = level_of(name, 2).settings()
    assert {z.times for z in settings}.isdisjoint({z.times for z in other})
    assert not {z.seed for z in settings} & {z.seed for z in other}
    assert level_of(name, 1).settings() == settings


def test_a_loss_is_asked_after_an_update_that_the_clip_acts_on():
    """Somebody is cut above, somebody below, and nobody stands at the edge."""
    above = below = 0
    for setting in level_of("loss", 4).settings():
        if (setting.policy, setting.clip) == ("off", "between ratios"):
            group, clip = groups.group_of(setting), groups.clip_of(setting)
            ratios = groups.log_ratios_between(setting, group, group.new).values()
            ratio = torch.cat([z.exp().flatten() for z in ratios])
            above += bool((ratio > 1 + clip).any())
            below += bool((ratio < 1 - clip).any())
            assert ((ratio - 1).abs() / clip - 1).abs().min() > 1e-6
    assert min(above, below) > 20


def test_agreement_is_of_every_entry_and_ends_at_its_tolerance():
    """|theirs - ours| <= tolerance (max |ours| + |ours| + scale), above or below, in each."""
    ours = torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64)
    for scale, entry, room in ((0.0, 0, 8.0), (0.0, 1, 5.0), (0.0, 2, 4.0), (2.0, 2, 6.0)):
        for sign in (1, -1):
            for share, agrees in ((0.999, True), (1.001, False)):
                theirs = ours.clone()
                theirs[entry] += sign * share * room * 1e-3
                assert levels.close(theirs, levels.Due(ours, scale), 1e-3) == agrees
    assert levels.TOLERANCES == {"float64": 1e-9, "float32": 1e-5}
    due = {"x": levels.Due(ours)}
    assert levels.precision_of({"x": ours}, due) == "float64"
    assert levels.precision_of({"x": ours * (1 + 1e-7)}, due) == "float32"
    assert levels.precision_of({"x": ours * 1.1}, due) == ""
    assert levels.precision_of({"x": ours * math.nan}, due) == ""


# ---- In a process of its own ---------------------------------------------------------------------

THEIRS = """
import os, sys, time

def good(x_s, mean, std):
    return -((x_s - mean) ** 2).flatten(1).mean(1) / (2 * std**2)

def bad(x_s, mean, std):
    print("verdict: agrees")
    return -((x_s - mean) ** 2).flatten(1).mean(1) / std

def leaves(x_s, mean, std):
    os._exit(0)

def sleeps(x_s, mean, std):
    time.sleep(600)

class Scored:
    def loud(self, x_s, mean, std):
        os.write(1, b"hello\\n")
        return good(x_s, mean, std)

scored = Scored()
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder with theirs.py, this.py and leaves_at_once.py, to stand in."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "this.py").write_text(THEIRS)
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("theirs:bad", 1, "verdict: disagrees"),
        (
            "this:scored.loud",
            0,  # a name that Python has, too
            "finding: it prints to stdout: 'hello'",
        ),
        ("theirs:leaves", 2, "it ends its process with status 0"),
        ("theirs:none", 2, "has no attribute 'none'"),
        ("leaves_at_once:f", 2, "its import: it ends its process with status 0"),
    ],
)
def test_only_a_verdict_of_agreement_ends_with_status_0(name, status, words, theirs, capsys):
    """Whatever the judged code ends, prints or says of itself; --json has the same verdict."""
    assert oracle.main(["--against", name, "--seed", "4", "--json", "found.json"]) == status
    printed = capsys.readouterr()
    assert words in printed.out + printed.err
    found = json.loads((theirs / "found.json").read_text())
    assert found["status"] == status == judging.STATUS[found["verdict"]]
    assert (found["function"], found["seed"]) == (name, 4)


def test_a_function_that_does_not_answer_is_ended(theirs):
    """Within its time, and its process is gone."""
    began = time.monotonic()
    found = judging.judge_elsewhere("theirs:sleeps", SEED, limit=4.0)
    assert found.verdict == "cannot be judged" and "no answer within the 4 s" in found.reason
    assert time.monotonic() - began < 20
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "theirs:sleeps" not in listed.stdout


SENT = [
    ("Plain().step", "step"),
    ("Plain().loss_with_kl", "loss"),
]


def test_both_ways_of_asking_give_one_judgement(theirs, monkeypatch):
    """Here and elsewhere, velocities and all; the working directory comes first.

    A loss of one kernel: questions about others travel in the same way.
    """
    plain = judging.LossLevel.draw_axes

    def axes_of_one_kernel(self, generator):
        return plain(self, generator) | {"kernel": ("flow_sde",)}

    monkeypatch.setattr(judging.LossLevel, "draw_axes", axes_of_one_kernel)
    monkeypatch.setenv("PYTHONPATH", str(Path(implementations.__file__).parent))
    names = [f"f{i} = {made}" for i, (made, _) in enumerate(SENT)]
    (theirs / "several.py").write_text("from implementations import Plain\n" + "\n".join(names))
    for i, (made, level) in enumerate(SENT):
        elsewhere = judging.judge_elsewhere(f"several:f{i}", SEED, limit=60.0)
        assert elsewhere.verdict == "agrees" and elsewhere.level == level, elsewhere
        function = eval(made, {"Plain": implementations.Plain})
        assert judging.judge(function, SEED) == elsewhere


def test_a_message_arrives_as_it_was_sent(tmp_path):
    """Words and tensors, whole; half a message is none."""
    sent = asked.Message({"t": 0.5, "factors": [2]}, {"x": torch.arange(3.0)})
    path = tmp_path / "message"
    with open(path, "wb") as to:
        asked.send(to, sent)
    with open(path, "rb") as source:
        words, tensors = asked.receive(source)
        assert words == sent.words and torch.equal(tensors["x"], sent.tensors["x"])
        assert asked.receive(source) is None
    path.write_bytes(path.read_bytes()[:-1])
    with open(path, "rb") as source:
        assert asked.receive(source) is None


def test_a_seed_is_fresh_and_said(monkeypatch, capsys):
    """Without --seed it comes from the system, so that nothing can be learnt by heart."""
    seeds = []
    monkeypatch.setattr(judging.os, "urandom", lambda n: bytes([1, 2, 3, 4][:n]))

    def noting(where, seed, limit):
        seeds.append((seed, limit))
        return judging.Judgement("log_prob", "agrees")

    monkeypatch.setattr(judging, "judge_elsewhere", noting)
    assert judging.main("theirs:good", None, None, None) == 0
    assert judging.main("theirs:good", 8, 5.0, None) == 0
    assert seeds == [(0x01020304, judging.TIME_LIMIT), (8, 5.0)]
    said = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert said == [f"theirs:good (seed {0x01020304})", "theirs:good (seed 8)"]


def test_the_judged_process_imports_nothing_of_ours():
    """asked.py stands alone, so that their working directory may have a zoo of its own."""
    source = Path(asked.__file__).read_text()
    imported = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert not {"zoo", "pave_grpo"} & set(imported)
    assert asking.Elsewhere.__doc__
