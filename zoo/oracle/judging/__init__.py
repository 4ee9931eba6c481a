"""Judge another implementation: does it compute what is due, in which convention, and where not?

A function is judged at the level that its parameters name, in any order; parameters of its own are
left at their defaults. Tensors are float64 on the CPU, answers may be float32.

    step(v, x_t, t, s, eta, x_s=None, kernel=...) -> (x_s, log_prob, mean, std)
        One stochastic step t -> s of the network's output v, as most codebases have it. v, x_t
        [B, *event], an event of one to four axes. x_s like them: score it; None: sample. t, s are
        numbers, or tensors for a function that takes no numbers. log_prob [B]. mean like x_t and
        std, a number or one a row, may be None or left out. kernel flow_sde, cps or dance; without
        that parameter it is found out which one is computed. At t = 1 flow_sde asks for the grid's
        second point: that is s. log_prob's gradient by v is compared where it has one.
    transition(x, velocity, t, s, k, kernel, eta) -> (mean, std)
        p^(k)(x_s | x_t): k-1 Euler sub-steps, then one step of the kernel, k from 1 to 7. x
        [B, *event]; velocity(x, t) with t a number or [B].
    log_prob(x_s, mean, std) -> [B]
        x_s, mean [B, *event]; std [B].
    advantages(rewards) -> A
        rewards [N, G], one group a row; A has their shape.
    loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip) -> scalar
        One group of G observed transitions x_t -> x_s by one step t -> s, to be descended; x_t, x_s
        [G, *event], rewards [G], factors the set S as a tuple. Its gradient by velocity's
        parameters is compared too. Two more parameters, kl and velocity_ref, add kl times the KL.

transition and loss may have a parameter prompt [B], which says of which of several groups, prompt
by prompt, a row is; velocities are then called velocity(x, t, prompt).

What a function refuses, by raising or by a shape of another kind, is its scope: k = 1 only, S = {}
only, on policy only. What is there is judged. Conventions are named and held against nobody: mean
or sum, constants, a dropped 1/(2 std^2), g or std, ddof, eps, clamp, other clips and weights; what
a level cannot show is said. A disagreement is told with the smallest condition under which it was
found, the first difference in the function's own convention, and the known bugs (bugs.txt) that
give its numbers. What is asked is drawn from a seed, and nothing that is asked stays the same.

    0   agrees          1   disagrees          2   cannot be judged: there is no verdict
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from zoo.oracle import bugs
from zoo.oracle.judging.asking import Answerer, CannotBeJudged, Elsewhere, Here
from zoo.oracle.judging.conditions import Setting, condition_of
from zoo.oracle.judging.levels import (
    TOLERANCES,
    Case,
    Due,
    Level,
    Recognised,
    Unusable,
    Values,
    close,
    precision_of,
)
from zoo.oracle.judging.losses import AdvantagesLevel, LossLevel
from zoo.oracle.judging.steps import LogProbLevel, StepLevel, TransitionLevel

LEVELS: tuple[type[Level], ...] = (
    StepLevel,
    TransitionLevel,
    LogProbLevel,
    AdvantagesLevel,
    LossLevel,
)
STATUS = {"agrees": 0, "disagrees": 1, "cannot be judged": 2}
STARTS = 12  # refusals from which a condition is looked for
TRIES = 3  # draws of a setting, to see whether it differs there: a clip may cut nobody in one
SCOPES = 4  # conditions that are looked for before refusals are only counted
TIME_LIMIT = 120.0  # seconds that the judged code may take in all
REPEATED = 3  # questions that are asked again at the end


class Judgement(NamedTuple):
    """What was found."""

    level: str
    verdict: str  # a key of STATUS
    reason: str = ""  # why there is none
    asked: int = 0  # questions
    answered: int = 0
    conventions: dict[str, str] = {}  # noqa: RUF012 -- those seen, never changed
    scope: tuple[str, ...] = ()  # what is there, and was judged
    findings: tuple[str, ...] = ()  # what else was seen
    first: str = ""  # where it first differs, in its own convention
    where: str = ""  # the smallest condition under which it does
    bugs: tuple[str, ...] = ()  # names of those that give its numbers
    unobservable: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.verdict == "cannot be judged":
            return f"verdict: cannot be judged: {self.reason}"
        count = f"{self.answered} of {self.asked} questions answered"
        lines = [f"level: {self.level} ({count})", f"verdict: {self.verdict}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.first:
            lines.append(f"  first difference: {self.first}")
        for bug in bugs.BUGS:
            if bug.name in self.bugs:
                known = f"the numbers of a known bug, {bug.name!r}"
                lines.append(f"  these are {known}: it {bug.says}")
        if self.where and not self.bugs:
            lines.append("  no known bug gives these numbers")
        lines += [f"  scope: {words}" for words in self.scope]
        lines += [f"  convention: {name}: {value}" for name, value in self.conventions.items()]
        lines += [f"  finding: {words}" for words in self.findings]
        if self.unobservable:
            lines.append(f"  not observable at this level: {', '.join(self.unobservable)}")
        return "\n".join(lines)


# ---- Asking --------------------------------------------------------------------------------------


class Session:
    """A function being asked: its cases, each asked once, and what is seen on the way."""

    def __init__(self, level: Level, answerer: Answerer):
        self.level = level
        self.answerer = answerer
        self.cases: dict[Setting, Case] = {}
        self.findings: dict[str, None] = {}
        self.changed = ""
        self.heard = ""

    def send(self, call: Any, about: str) -> Any:
        """A call and its reply; what else was seen is noted.

        Raises CannotBeJudged where it ends instead of answering.
        """
        reply = self.answerer.answer(call, about)
        words = reply.words
        if words["exit"]:
            raise CannotBeJudged(f"{about}: it wants to end the process, {words['exit']}")
        for name in words["changed"]:
            self.changed = self.changed or f"it changes its input {name} in place ({about})"
        drawing = call.words["numbers"].get("x_s", "") is None
        for name in words["state"]:
            if not (drawing and name == "torch's random state"):
                self.findings[f"it changes {name}"] = None
        if words["printed"] and not self.heard:
            self.heard = words["printed"]
            self.findings[f"it prints {beginning(self.heard)!r}"] = None
        return reply

    def ask(self, setting: Setting) -> Case:
        """The case of a setting."""
        if setting not in self.cases:
            self.cases[setting] = self.fresh(setting)
        return self.cases[setting]

    def fresh(self, setting: Setting) -> Case:
        """Ask, whatever was answered before."""
        reply = self.send(self.level.call(setting), setting.described(self.level.shown))
        if reply.words["error"]:
            words = [reply.words["error"], reply.words["message"]]
            return Case(setting, None, ": ".join(filter(None, words)))
        try:
            return Case(setting, self.level.read(reply, setting))
        except Unusable as problem:
            return Case(setting, None, f"it {problem}")

    def is_refused(self, setting: Setting) -> bool | None:
        """Is there no answer? None: the question makes no sense."""
        return self.ask(setting).values is None if self.level.allowed(setting) else None

    def forgets(self) -> str:
        """Ask some questions again, last first: what differs from what was answered, in words."""
        answered = [case for case in self.cases.values() if case.values is not None]
        for case in reversed(answered[:REPEATED]):
            before, again = case.values or {}, self.fresh(case.setting).values or {}
            same = before.keys() == again.keys()
            due = {name: Due(value) for name, value in before.items()}
            if not same or precision_of(*without_nan(again, due)) != "float64":
                about = case.setting.described(self.level.shown)
                what = "asked again, it gives another answer, by chance or by earlier calls"
                return f"{what} ({about})"
        return ""


def beginning(text: str) -> str:
    """The first line that is not empty, as far as it is worth showing."""
    return text.strip().partition("\n")[0][:60]


class Scope(NamedTuple):
    """What is not there: conditions that explain it, in words, with what they leave."""

    said: tuple[str, ...]
    left: dict[str, tuple[Any, ...]]  # of an axis, the values that are answered


def scope_of(session: Session) -> Scope:
    """By conditions that explain refusals; the rest is counted."""
    axes = session.level.axes
    refused = [case for case in session.cases.values() if case.values is None]
    said: list[str] = []
    answered: dict[str, tuple[Any, ...]] = {}
    while refused and len(said) < SCOPES:
        # One that two conditions refuse is explained by neither; another may be by one of them.
        for case in refused[:STARTS]:
            found = condition_of(case.setting, session.is_refused, axes)
            left = [other for other in refused if not found.covers(other.setting)]
            if found.happens and len(left) < len(refused):
                break
        else:
            break
        said.append(f"{found.scope()} ({case.why})")
        if len(found.happens) == 1:
            answered |= found.elsewhere
        refused = left
    if refused:
        first = refused[0]
        about = first.setting.described(session.level.shown)
        said.append(f"no answer in {len(refused)} more questions, first {about}: {first.why}")
    return Scope(tuple(said), answered)


# ---- Comparing -----------------------------------------------------------------------------------


def first_difference(case: Case, due: dict[str, Due], shown: tuple[str, ...]) -> str:
    """The first quantity that differs, where it is furthest off, in words."""
    for name, theirs in (case.values or {}).items():
        if not close(theirs, due[name], TOLERANCES["float32"]):
            ours = due[name].value.expand_as(theirs)
            off = torch.nan_to_num((theirs - ours).abs(), nan=torch.inf)
            i = off.flatten().argmax()
            numbers = f"{said(theirs.flatten()[i])} where {said(ours.flatten()[i])} is due"
            return f"{name} at {case.setting.described(shown)}: {numbers}"
    return ""


def said(number: torch.Tensor) -> str:
    """Nine digits; 0 for rounding."""
    return "0" if abs(number.item()) < 1e-15 else f"{number.item():.9g}"


def known_bugs(level: Level, bad: list[Case], good: list[Case], found: Recognised) -> list[str]:
    """The bugs that give their numbers where they differ, and where they do not.

    A bug that cannot run under a convention agrees with nothing there.
    """
    kernels = {case.setting.kernel for case in bad}
    some = [*bad[:4], *[case for case in good if case.setting.kernel in kernels][:6]]
    names = []
    for bug in bugs.BUGS:
        if bug.level in level.bug_levels:
            module = bugs.patched(bug)
            conventions = level.bug_conventions(found)
            if any(explains(level, module, some, convention) for convention in conventions):
                names.append(bug.name)
    return names


def explains(level: Level, module: ModuleType, cases: list[Case], convention: Any) -> bool:
    """Does a patched pave_grpo give all these answers?"""
    for case in cases:
        try:
            due = level.due(case.setting, convention, module)
        except Exception:  # of a patched core, which may not run there
            return False
        if not precision_of(*without_nan(case.values or {}, due)):
            return False
    return True


def without_nan(values: Values, due: dict[str, Due]) -> tuple[Values, dict[str, Due]]:
    """Both with 0 for a NaN or inf that they share: a bug that gives it is recognised by it."""
    theirs, ours = {}, {}
    for name, value in values.items():
        ours_too = due[name].value
        shared = (value.isnan() & ours_too.isnan()) | (value.isinf() & (value == ours_too))
        theirs[name] = torch.where(shared, 0, value)
        ours[name] = Due(torch.where(shared, 0, due[name].value), due[name].scale)
    return theirs, ours


def where_it_differs(session: Session, bad: list[Case], found: Recognised) -> str:
    """The smallest condition around the first case that differs, in words."""
    level = session.level

    def differs(setting: Setting) -> bool | None:
        """In one of TRIES draws; None where there is no answer, or nothing that could differ."""
        if not level.allowed(setting):
            return None
        telling = False
        for i in range(TRIES):
            drawn = setting._replace(seed=setting.seed + i)
            values = session.ask(drawn).values
            if values is not None:
                due = level.due(drawn, found.convention)
                if not precision_of(values, due):
                    return True
                telling = telling or any(bool(z.value.any()) for z in due.values())
        return False if telling else None

    try:
        condition = condition_of(bad[0].setting, differs, level.axes)
    except CannotBeJudged as reason:  # the verdict stands
        return f"not found: {reason}"
    condition = condition.widened(case.setting for case in bad)
    return f"only {condition.words()}" if condition.happens else "everywhere"


# ---- The verdict ---------------------------------------------------------------------------------


def level_of(parameters: dict[str, Any], generator: torch.Generator) -> Level:
    """The level whose parameters they are. Raises CannotBeJudged for other signatures."""
    pair = {"kl", "velocity_ref"}
    for level in LEVELS:
        own = {*level.required, *level.optional}
        if not pair <= set(parameters):
            own -= pair
        extra = [name for name in parameters if name not in own]
        defaults = all(parameters[name] != "required" for name in extra)
        if set(level.required) <= set(parameters) and defaults:
            chosen = level(
                {name: parameters[name] for name in parameters if name in own}, generator
            )
            if extra:
                chosen.findings.append(f"left at their defaults: {', '.join(extra)}")
            return chosen
    known = "; ".join(f"{level.name}({', '.join(level.required)})" for level in LEVELS)
    given = ", ".join(parameters)
    raise CannotBeJudged(f"parameters ({given}) are those of no level; must be one of: {known}")


def judge_answerer(answerer: Answerer, seed: int, progress: bool = False) -> Judgement:
    """Judge whoever answers, on inputs drawn from the seed. Raises CannotBeJudged."""
    generator = torch.Generator().manual_seed(seed)
    level = level_of(answerer.parameters, generator)
    session = Session(level, answerer)
    settings = level.settings()
    level.prepare(session.send, settings)
    for setting in tqdm(settings, "asking", file=sys.stderr, disable=not progress, leave=False):
        session.ask(setting)
    if all(case.values is None for case in session.cases.values()):
        reasons = dict.fromkeys(case.why for case in session.cases.values())
        raise CannotBeJudged(f"it answers nothing: {'; '.join([*reasons][:3])}")
    scope = scope_of(session)
    if scope.left:  # ask as much within it
        level.axes = {name: scope.left.get(name, values) for name, values in level.axes.items()}
        settings = level.settings()
        for setting in tqdm(
            settings, "in scope", file=sys.stderr, disable=not progress, leave=False
        ):
            session.ask(setting)
    asked = [session.ask(setting) for setting in settings]
    refused = [case for case in asked if case.values is None]
    if 2 * len(refused) > len(asked):
        about = refused[0].setting.described(level.shown)
        count = f"{len(refused)} of {len(asked)} questions within its scope"
        raise CannotBeJudged(f"it does not answer {count}, first {about}: {refused[0].why}")
    return verdict_of(session, scope)


def verdict_of(session: Session, scope: Scope) -> Judgement:
    """Recognise the convention, compare, and look at what is left."""
    level = session.level
    forgotten = session.forgets()
    found = level.recognise(list(session.cases.values()), session.ask)
    cases = list(session.cases.values())  # with what was asked to find out
    answered = [case for case in cases if case.values is not None]
    precisions = [
        precision_of(case.values or {}, level.due(case.setting, found.convention))
        for case in answered
    ]
    bad = [case for case, precision in zip(answered, precisions, strict=True) if not precision]
    good = [case for case, precision in zip(answered, precisions, strict=True) if precision]
    first, where, names = "", "", []
    if bad:
        where = "" if forgotten else where_it_differs(session, bad, found)
        due = level.due(bad[0].setting, found.convention)
        first = forgotten or first_difference(bad[0], due, level.shown)
        names = known_bugs(level, bad, good, found)
    else:
        first = level.afterwards(found, cases, session.send) or session.changed or forgotten
    told = dict(found.told)
    if good:
        told["precision"] = "float32" if "float32" in precisions else "float64"
    seen = [*level.findings, *session.answerer.state, *session.findings]
    if bad:
        seen += [words for words in (session.changed, forgotten) if words]
    return Judgement(
        level=level.name,
        asked=len(cases),
        answered=len(answered),
        verdict="disagrees" if bad or first else "agrees",
        conventions=told,
        scope=(*found.scope, *scope.said),
        findings=tuple(dict.fromkeys(seen)),
        first=first,
        where=where,
        bugs=tuple(names),
        unobservable=level.unobservable,
    )


def judge(function: Callable, seed: int) -> Judgement:
    """Judge a function of this process."""
    try:
        return judge_answerer(Here(function), seed)
    except CannotBeJudged as reason:
        return Judgement("", "cannot be judged", str(reason))


def judge_elsewhere(where: str, seed: int, limit: float) -> Judgement:
    """Judge MODULE:FUNCTION in a process of its own, which may take `limit` seconds in all."""
    try:
        answerer = Elsewhere(where, limit)
    except CannotBeJudged as reason:
        return Judgement("", "cannot be judged", str(reason))
    try:
        found = judge_answerer(answerer, seed, progress=True)
        printed = answerer.output()
    except CannotBeJudged as reason:
        return Judgement("", "cannot be judged", str(reason))
    except Exception as error:  # of the judge: that is no verdict either
        failed = f"the judge itself failed, {type(error).__name__}: {error}"
        return Judgement("", "cannot be judged", failed)
    finally:
        answerer.close()
    if printed:
        words = f"it prints to stdout: {beginning(printed)!r}"
        found = found._replace(findings=(*found.findings, words))
    return found


def main(where: str, seed: int | None, limit: float | None, json_file: str | None) -> int:
    """Judge MODULE:FUNCTION, found from the working directory, and print the verdict.

    Returns 0 where it agrees, 1 where it does not, 2 where it cannot be judged.
    """
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    found = judge_elsewhere(where, seed, limit or TIME_LIMIT)
    if json_file:
        described = {"function": where, "seed": seed, **found._asdict()}
        described["status"] = STATUS[found.verdict]
        Path(json_file).write_text(json.dumps(described, indent=1) + "\n")
    if found.verdict == "cannot be judged":
        print(f"verify_equivalence.py: error: --against {where}: {found.reason}", file=sys.stderr)
    else:
        print(f"{where} (seed {seed})\n{found}")
    return STATUS[found.verdict]
