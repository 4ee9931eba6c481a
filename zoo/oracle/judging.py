"""Judge another implementation: does it compute our numbers, and if not, which known bug does?

A function is judged at the level its parameters name:

    transition(x, velocity, t, s, k, kernel, eta) -> (mean, std)
        p^(k)(x_s | x_t): k-1 Euler sub-steps, then one step of the kernel. x [B, *event] float64;
        velocity(x, t) with t [B]; t, s floats, s the grid's second point (flow_sde asks for it at
        t = 1); k >= 1; kernel flow_sde, cps or dance. mean like x; std a number, or [B].
    log_prob(x_s, mean, std) -> [B]
        x_s, mean [B, *event]; std [B]. Mean or sum over dimensions, with constants or without.
    loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip) -> scalar
        One group of G observed transitions x_t -> x_s by one step t -> s, to be descended; x_t,
        x_s [G, *event], rewards [G]. Its gradient by velocity's parameters is compared too.

A kernel for which a function always raises NotImplementedError, KeyError or ValueError is left
out. Conventions are no bugs: mean or sum, constants, a dropped 1/(2 std^2), ddof, eps and clamp
are named where a level shows them, and said to be unobservable where it does not. Numbers that
agree to float32 only are said to. Inputs are drawn afresh; a function that changes its inputs,
returns one or a view of one, or answers the same to everything, is rejected.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle import bugs
from zoo.oracle.questions import (
    LOG_PROB_CONVENTIONS,
    LOSS_CONVENTIONS,
    USUAL_LOSS_CONVENTIONS,
    LogProbQuestion,
    LossConvention,
    LossQuestion,
    Question,
    TransitionQuestion,
    log_prob_questions,
    loss_questions,
    transition_questions,
)

# Relative: far above rounding, far below what any bug does.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
# How a function says that it has no such kernel.
MISSING = (NotImplementedError, KeyError, ValueError)

DROPPED = "dropped: steps are weighted by 2 std^2"
NO_HALF_SQUARE = bugs.Patch(
    "no 1/(2 std^2)",
    "log_prob",
    "drops 1/(2 std^2)",
    "z = (x - self.mean) / per_row(self.std, x)",
    "z = (x - self.mean) * 2**0.5",
)


class Rejected(Exception):
    """What was judged is no implementation: it returns, changes or ignores its inputs."""


class Judgement(NamedTuple):
    """What was found."""

    level: type[Question]
    agrees: bool
    conventions: dict[str, str]  # those seen
    first: str  # where it first differs; "" where it agrees
    bugs: tuple[str, ...]  # names of those that give its numbers

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "disagrees"
        lines = [f"level: {self.level.name}", f"verdict: {verdict}"]
        lines += [f"  convention: {name}: {value}" for name, value in self.conventions.items()]
        lines += [f"  {name}: not observable at this level" for name in self.level.unobservable]
        if self.agrees:
            return "\n".join(lines)
        lines.append(f"first difference: {self.first}")
        for bug in bugs.BUGS:
            if bug.name in self.bugs:
                known = f"the numbers of a known bug, {bug.name!r}"
                lines.append(f"  these are {known}: it {bug.says}")
        if not self.bugs:
            lines.append("  no known bug gives these numbers")
        return "\n".join(lines)


# ---- Asking --------------------------------------------------------------------------------------


def ask(function: Callable, question: Question, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors it returns, float64, one of each shape. Raises Rejected for anything else.

    What it raises to say that a kernel is missing passes through.
    """
    arguments = question.arguments()
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    try:
        out = function(**arguments)
    except MISSING:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is its answer
        words = (str(error).splitlines() or [""])[0]
        raise Rejected(f"it raises {type(error).__name__}: {words}") from error
    values = list(out) if isinstance(out, (tuple, list)) else [out]
    for name, value in given.items():
        if not torch.equal(value, getattr(question, name)):
            raise Rejected(f"it changes its input {name} in place")
    if len(values) != len(shapes):
        raise Rejected(f"it returns {len(values)} values; must be {len(shapes)}")
    return [taken(value, shape, given) for value, shape in zip(values, shapes, strict=True)]


def taken(value: Any, shape: tuple[int, ...], given: dict[str, Tensor]) -> Tensor:
    """One returned value, float64, expanded to its shape. Raises Rejected for what is no answer."""
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    # A subclass of Tensor could say that it equals everything.
    usable = type(value) is Tensor and value.is_floating_point() and bool(value.isfinite().all())
    if not usable:
        kind = type(value).__name__
        raise Rejected(f"it returns {kind} where finite floating-point tensors are due")
    for name, source in given.items():
        if value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            raise Rejected(f"it returns its input {name}, or a view of it")
        if value.shape == source.shape and torch.equal(value.cpu(), source):
            raise Rejected(f"it returns its input {name}")
    try:
        return value.cpu().double().expand(shape)
    except RuntimeError:
        raise Rejected(f"it returns shape {tuple(value.shape)}; must be {shape}") from None


def ask_kernels(
    questions: Sequence[Any], answer: Callable[[Any], list[Tensor]]
) -> tuple[list[Any], list[list[Tensor]], dict[str, str]]:
    """(questions, answers, conventions seen), without the kernels that it never answers for.

    Raises Rejected where it answers some questions about a kernel only, or about no kernel.
    """
    answered, answers = [], []
    errors: dict[str, list[Exception]] = {}
    for question in questions:
        try:
            answers.append(answer(question))
            answered.append(question)
        except MISSING as error:
            errors.setdefault(question.kernel, []).append(error)
    for kernel, raised in errors.items():
        if any(question.kernel == kernel for question in answered):
            some = f"{raised[0]!r} in {len(raised)} cases of kernel {kernel}"
            raise Rejected(f"it raises {some}, and answers others")
    if not answered:
        reasons = "; ".join(f"{kernel}: {raised[0]!r}" for kernel, raised in errors.items())
        raise Rejected(f"it implements no kernel: {reasons}")
    seen = {"not implemented": ", ".join(errors)} if errors else {}
    return answered, answers, seen


def refuse_constant(answers: list[list[Tensor]]) -> None:
    """Raises Rejected if all answers are equal."""
    for answer in answers[1:]:
        for first, other in zip(answers[0], answer, strict=True):
            if first.shape != other.shape or not torch.equal(first, other):
                return
    raise Rejected("it answers the same whatever it is asked")


# ---- Comparing -----------------------------------------------------------------------------------


def all_due(questions: Iterable[Question], module: ModuleType, convention: Any) -> Iterator[Tensor]:
    """What is due to all questions, one quantity after another."""
    for question in questions:
        yield from question.due(module, convention)


def close(theirs: Tensor, ours: Tensor, tolerance: float) -> bool:
    """|theirs - ours| <= tolerance (max |ours| + |ours|), everywhere."""
    return bool(((theirs - ours).abs() <= tolerance * (ours.abs().max() + ours.abs())).all())


def agreement(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> str:
    """The precision to which all quantities agree, or "".

    `ours` is computed no further than the first quantity that differs.
    """
    precision = "float64"
    for due, found in zip(ours, theirs, strict=True):
        if not close(found, due, TOLERANCES["float32"]):
            return ""
        if not close(found, due, TOLERANCES["float64"]):
            precision = "float32"
    return precision


def first_difference(labels: list[str], ours: Iterable[Tensor], theirs: list[Tensor]) -> str:
    """The first quantity that differs, where it is furthest off, in words; "" if none does."""
    for label, due, found in zip(labels, ours, theirs, strict=True):
        if not close(found, due, TOLERANCES["float32"]):
            i = (due - found).abs().flatten().argmax()
            is_due = f"{due.flatten()[i].item():.9g}"
            return f"{label}: {found.flatten()[i].item():.9g} where {is_due} is due"
    return ""


def known_bugs(
    questions: list[Any], theirs: list[Tensor], conventions: Sequence[Any]
) -> dict[str, Any]:
    """{bug: convention} of the bugs that give their numbers, each under the first that does.

    A bug that cannot run under a convention agrees with nothing there.
    """
    found: dict[str, Any] = {}
    for bug in bugs.BUGS:
        if bug.level not in questions[0].bug_levels:
            continue
        for convention in conventions:
            try:
                same = agreement(all_due(questions, bugs.patched(bug), convention), theirs)
            except (ValueError, RuntimeError):
                continue
            if same:
                found[bug.name] = convention
                break
    return found


def disagreement(
    questions: list[Any],
    answers: list[list[Tensor]],
    conventions: Sequence[Any],
    seen: dict[str, str],
) -> Judgement:
    """Name the bugs, and the first difference under the convention of the first of them."""
    level, theirs = type(questions[0]), flat(answers)
    found = known_bugs(questions, theirs, conventions)
    convention = next(iter(found.values()), conventions[0])
    labels = [f"{name} at {question}" for question in questions for name in level.quantities]
    first = first_difference(labels, all_due(questions, pave, convention), theirs)
    return Judgement(level, False, seen, first, tuple(found))


def flat(answers: list[list[Tensor]]) -> list[Tensor]:
    """The quantities of all answers, one after another."""
    return [quantity for answer in answers for quantity in answer]


def module_that(drops_half_square: bool) -> ModuleType:
    """pave_grpo, or the same with 1/(2 std^2) dropped from its log-probability."""
    return bugs.patched(NO_HALF_SQUARE) if drops_half_square else pave


# ---- The three levels ----------------------------------------------------------------------------


def judge_transition(function: Callable, generator: torch.Generator) -> Judgement:
    """Mean and std on a network's velocity. What is called std may be g, kernel by kernel."""

    @torch.no_grad()
    def answer(question: TransitionQuestion) -> list[Tensor]:
        return ask(function, question, [tuple(question.x.shape), (len(question.x),)])

    questions, answers, seen = ask_kernels(transition_questions(generator), answer)
    refuse_constant(answers)
    kernels = list(dict.fromkeys(question.kernel for question in questions))
    ways = [some for n in range(len(kernels) + 1) for some in combinations(kernels, n)]
    for called_std in ways:
        precision = agreement(all_due(questions, pave, called_std), flat(answers))
        if precision:
            g = f"g = std / sqrt(D) for {', '.join(called_std)}"
            told = {"g or std": g if called_std else "std is the step's", "precision": precision}
            return Judgement(TransitionQuestion, True, told | seen, "", ())
    return disagreement(questions, answers, ways, seen)


def judge_log_prob(function: Callable, generator: torch.Generator) -> Judgement:
    """Log-probabilities of given states, under each of the conventions."""
    questions = log_prob_questions(generator)
    try:
        answers = [ask(function, question, [(len(question.x_s),)]) for question in questions]
    except MISSING as error:
        raise Rejected(f"it raises {error!r}") from error
    refuse_constant([[log_prob[:3]] for (log_prob,) in answers])
    for drops_half_square, convention in product((False, True), LOG_PROB_CONVENTIONS):
        module = module_that(drops_half_square)
        precision = agreement(all_due(questions, module, convention), flat(answers))
        if precision:
            told = {
                "mean or sum": convention.reduction,
                "constants": convention.constants,
                "1/(2 std^2)": DROPPED if drops_half_square else "kept",
                "precision": precision,
            }
            return Judgement(LogProbQuestion, True, told, "", ())
    return disagreement(questions, answers, LOG_PROB_CONVENTIONS, {})


class Explanation(NamedTuple):
    """How a convention explains the losses of one kernel."""

    kernel: str
    drops_half_square: bool
    precision: str


def ask_loss(function: Callable, question: LossQuestion) -> list[Tensor]:
    """Their loss and its gradient. Raises Rejected for a loss without one."""
    losses: list[Any] = []

    def detached(**arguments: Any) -> Any:
        loss = function(**arguments)
        losses.append(loss)  # with its graph
        return loss.detach() if isinstance(loss, Tensor) else loss

    (value,) = ask(detached, question, [()])
    if not isinstance(losses[0], Tensor) or not losses[0].requires_grad:
        raise Rejected("its loss has no gradient with respect to velocity's parameters")
    return [value, question.gradient(losses[0])]


def explain(
    questions: list[LossQuestion], theirs: list[Tensor], convention: LossConvention
) -> Explanation | None:
    """How a convention explains the losses of a kernel, with 1/(2 std^2) or without; else None."""
    for drops_half_square in (False, True):
        module = module_that(drops_half_square)
        precision = agreement(all_due(questions, module, convention), theirs)
        if precision:
            return Explanation(questions[0].kernel, drops_half_square, precision)
    return None


def loss_conventions(
    questions: list[LossQuestion], answers: list[list[Tensor]]
) -> dict[LossConvention, list[Explanation]]:
    """The conventions that explain every kernel, and how each of them does."""
    alive: dict[LossConvention, list[Explanation]] = {c: [] for c in LOSS_CONVENTIONS}
    for kernel in dict.fromkeys(question.kernel for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.kernel == kernel]
        theirs = flat([answers[i] for i in chosen])
        explained = {}
        for convention, so_far in alive.items():
            explanation = explain([questions[i] for i in chosen], theirs, convention)
            if explanation is not None:
                explained[convention] = [*so_far, explanation]
        alive = explained
    return alive


def judge_loss(function: Callable, generator: torch.Generator) -> Judgement:
    """Loss and gradient under one convention for all kernels; each may drop 1/(2 std^2) or not."""

    def answer(question: LossQuestion) -> list[Tensor]:
        return ask_loss(function, question)

    questions, answers, seen = ask_kernels(loss_questions(generator), answer)
    refuse_constant([[loss] for loss, _ in answers])
    alive = loss_conventions(questions, answers)
    if not alive:
        return disagreement(questions, answers, USUAL_LOSS_CONVENTIONS, seen)
    # In float32 eps = 0 may explain what 1e-8 does: the first that is exact is meant, if one is.
    exact = [c for c, how in alive.items() if all(e.precision == "float64" for e in how)]
    convention = (exact or list(alive))[0]
    dropping = [e.kernel for e in alive[convention] if e.drops_half_square]
    told = {
        "mean or sum": convention.reduction,
        "ddof": str(convention.ddof),
        "eps": f"{convention.eps:g}",
        "clamp": str(convention.clamp),
        "form": convention.form,
        "clip": convention.clip,
        "1/(2 std^2)": f"{DROPPED} ({', '.join(dropping)})" if dropping else "kept",
        "precision": "float64" if exact else "float32",
    }
    return Judgement(LossQuestion, True, told | seen, "", ())


# ---- The verdict ---------------------------------------------------------------------------------

Judge = Callable[[Callable, torch.Generator], Judgement]
JUDGES: dict[type[Question], Judge] = {
    TransitionQuestion: judge_transition,
    LogProbQuestion: judge_log_prob,
    LossQuestion: judge_loss,
}


def judge_of(function: Callable) -> Judge:
    """The judge of the level whose parameter names it has. Raises Rejected for other signatures."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise Rejected(f"{function!r} is no function with named parameters") from None
    for level, judge_level in JUDGES.items():
        if names == level.parameters():
            return judge_level
    known = "; ".join(f"{level.name}({', '.join(level.parameters())})" for level in JUDGES)
    given = ", ".join(names)
    raise Rejected(f"parameters ({given}) are those of no level; they must be one of: {known}")


def judge(function: Callable, seed: int) -> Judgement:
    """Judge a function at the level its parameters name, on inputs drawn from the seed.

    Raises Rejected for what is no implementation.
    """
    return judge_of(function)(function, torch.Generator().manual_seed(seed))


def main(where: str, seed: int | None) -> int:
    """Judge MODULE:FUNCTION, found from the working directory, and print the verdict.

    Returns 0 where it agrees, 1 where it does not, 2 where it cannot be judged.
    """
    module, _, name = where.partition(":")
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever their module does on import
        wanted = f"must be an importable MODULE:FUNCTION ({type(error).__name__}: {error})"
        print(f"verify_equivalence.py: error: --against {where}: {wanted}", file=sys.stderr)
        return 2
    print(f"{where} (seed {seed})")
    try:
        found = judge(function, seed)
    except Rejected as reason:
        print(f"verdict: rejected: {reason}")
        return 1
    print(found)
    return 0 if found.agrees else 1
