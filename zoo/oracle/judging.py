"""Judge somebody else's implementation: does it compute the same numbers, and if not, which known bug does?

A function is judged at the level its parameters name:

    transition(x, velocity, t, s, k, kernel, eta) -> (mean, std)
        x [B, *event] float64; velocity(x, t) with t [B]; t, s floats; k >= 1; kernel flow_sde, cps or dance, of which
        those that always raise NotImplementedError, KeyError or ValueError are left out.
        p^(k)(x_s | x_t): k-1 Euler sub-steps, then one step of the kernel; std a number, or [B]. The grid's second
        point is s, which is what flow_sde at t = 1 needs.
    log_prob(x_s, mean, std) -> [B]
        x_s, mean [B, *event]; std [B]; mean or sum over dimensions, with constants or without.
    loss(velocity, velocity_old, x_t, x_s, t, s, rewards, factors, kernel, eta, clip) -> scalar to descend
        one group of G observed transitions x_t -> x_s, both [G, *event], by one step t -> s; rewards [G].
        Its gradient with respect to velocity's parameters is compared too.

Conventions are told apart from bugs: mean or sum, constants, a dropped 1/(2 std^2), ddof, eps and clamp are named,
never held against anyone, and said to be unobservable where a level cannot show them. Inputs are drawn afresh; a
function that changes its inputs, returns one or a view of one, or answers the same to everything, is rejected.
Numbers that agree to float32 only are said to.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import pave_grpo as pave
from zoo.oracle import bugs, fields

LEVELS = {
    "transition": ("x", "velocity", "t", "s", "k", "kernel", "eta"),
    "log_prob": ("x_s", "mean", "std"),
    "loss": (
        "velocity",
        "velocity_old",
        "x_t",
        "x_s",
        "t",
        "s",
        "rewards",
        "factors",
        "kernel",
        "eta",
        "clip",
    ),
}
TOLERANCES = {
    "float64": 1e-9,
    "float32": 1e-5,
}  # relative: far above rounding, far below what any bug does
NO_HALF_SQUARE = bugs.Patch(
    "no 1/(2 std^2)",
    "log_prob",
    "drops 1/(2 std^2)",
    "z = (x - self.mean) / per_row(self.std, x)",
    "z = (x - self.mean) * 2**0.5",
)
DROPPED = "dropped: steps are weighted by 2 std^2"
EPS, CLAMPS = (
    (1e-8, 0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    (5.0, None, 3.0, 1.0),
)  # of advantages, as in use
MISSING = (
    NotImplementedError,
    KeyError,
    ValueError,
)  # how a function says that it has no such kernel
UNOBSERVABLE = {
    "transition": ("gradient", "mean or sum", "constants", "1/(2 std^2)", "ddof", "eps", "clamp"),
    "log_prob": ("gradient", "g or std", "ddof", "eps", "clamp"),
    "loss": ("constants", "g or std", "t = 1", "several groups", "equal rewards", "KL"),
}


class Rejected(Exception):
    """What was judged is no implementation: it returns, changes or ignores its inputs."""


class Judgement(NamedTuple):
    """`agrees`; the conventions seen; where it first differs; the names of bugs that reproduce its numbers."""

    level: str
    agrees: bool
    conventions: dict[str, str]
    first: str
    bugs: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"level: {self.level}", f"verdict: {'agrees' if self.agrees else 'disagrees'}"]
        lines += [f"  convention: {name}: {value}" for name, value in self.conventions.items()]
        lines += [f"  {name}: not observable at this level" for name in UNOBSERVABLE[self.level]]
        if not self.agrees:
            lines.append(f"first difference: {self.first}")
            says = {b.name: b.says for b in bugs.BUGS}
            lines += [
                f"  these are the numbers of a known bug, {name!r}: it {says[name]}"
                for name in self.bugs
            ]
            lines += ["  no known bug gives these numbers"] if not self.bugs else []
        return "\n".join(lines)


def level_of(function: Callable) -> str:
    """The level whose parameter names a function has. Raises Rejected for any other signature."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise Rejected(f"{function!r} is no function with named parameters") from None
    for level, wanted in LEVELS.items():
        if names == wanted:
            return level
    raise Rejected(
        f"parameters ({', '.join(names)}) are those of no level; they must be one of: "
        + "; ".join(f"{level}({', '.join(wanted)})" for level, wanted in LEVELS.items())
    )


def ask(function: Callable, arguments: dict, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Call it and take its tensors, as float64 copies. Raises Rejected for tampering, echoes and wrong shapes."""
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    kept = {name: value.clone() for name, value in given.items()}
    try:
        out = function(**arguments)
    except MISSING:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is its answer
        raise Rejected(
            f"it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    for name, value in given.items():
        if not torch.equal(value, kept[name]):
            raise Rejected(f"it changes its input {name} in place")
    if len(out) != len(shapes):
        raise Rejected(f"it returns {len(out)} values; must be {len(shapes)}")
    taken = []
    for value, shape in zip(out, shapes, strict=True):
        if isinstance(value, float):
            value = torch.tensor(value, dtype=torch.float64)
        if (
            type(value) is not Tensor
            or not value.is_floating_point()
            or not bool(value.isfinite().all())
        ):
            raise Rejected(
                f"it returns {type(value).__name__} where finite floating-point tensors are due"
            )
        for name, source in given.items():
            same = value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
            if same or (value.shape == source.shape and torch.equal(value.cpu(), kept[name])):
                raise Rejected(f"it returns its input {name}{', or a view of it' if same else ''}")
        try:
            taken.append(value.cpu().double().expand(shape))
        except RuntimeError:
            raise Rejected(f"it returns shape {tuple(value.shape)}; must be {shape}") from None
    return taken


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance * (b.abs().max() + b.abs())).all())


def alike(ours: Iterable[list[Tensor]], theirs: list[list[Tensor]]) -> str:
    """The precision to which all answers agree, or ''. `ours` is computed no further than the first that does not."""
    precision = "float64"
    for x, y in zip(ours, theirs, strict=True):
        for a, b in zip(x, y, strict=True):
            if not close(b, a, TOLERANCES["float32"]):
                return ""
            precision = precision if close(b, a, TOLERANCES["float64"]) else "float32"
    return precision


def refuse_constant(answers: list[list[Tensor]]) -> None:
    if all(
        a.shape == b.shape and torch.equal(a, b)
        for other in answers[1:]
        for a, b in zip(answers[0], other)
    ):
        raise Rejected("it answers the same whatever it is asked")


def first_difference(
    labels: list[str],
    names: tuple[str, ...],
    ours: Iterable[list[Tensor]],
    theirs: list[list[Tensor]],
) -> str:
    """The first quantity that differs, where it is furthest off, in words; '' if none does."""
    for label, x, y in zip(labels, ours, theirs, strict=True):
        for name, a, b in zip(names, x, y, strict=True):
            if not close(b, a, TOLERANCES["float32"]):
                i = (a - b).abs().flatten().argmax()
                return f"{name} at {label}: {b.flatten()[i].item():.9g} where {a.flatten()[i].item():.9g} is due"
    return ""


# ---- The three levels ------------------------------------------------------------------------------------------


def judge_transition(function: Callable, generator: torch.Generator) -> Judgement:
    """All kernels, k = 1, 2, 3 and 5, two steps in the middle and one from t = 1, on a network, three rows each."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    uniform = lambda a, b: a + (b - a) * torch.rand((), generator=generator).item()
    field, eta = fields.Network(generator), uniform(0.5, 0.9)
    cases = [
        (draw(3, fields.DIM), kernel, k, t, t * uniform(0.6, 0.9))
        for kernel in pave.KERNELS
        for k in (1, 2, 3, 5)
        for t in (uniform(0.5, 0.9), uniform(0.2, 0.5), 1.0)
    ]
    c = torch.zeros(3, dtype=torch.long)

    def numbers(module, of_std: Callable = lambda kernel, std, d: std) -> Iterator[list[Tensor]]:
        for x, kernel, k, t, s in cases:
            process = module.Process([t, s], kernel, eta)
            times = [torch.full((3,), u, dtype=torch.float64) for u in (t, s)]
            with torch.no_grad():
                p = module.decompose(field, process, x, *times, c, sorted({2, 3, k} - {1}))[k]
            yield [p.mean, of_std(kernel, p.std, (t - s) / k)]

    def answer(case) -> list[Tensor]:
        x, kernel, k, t, s = case
        with torch.no_grad():
            return ask(
                function,
                dict(
                    x=x.clone(), velocity=seen_by_them(field), t=t, s=s, k=k, kernel=kernel, eta=eta
                ),
                [(3, fields.DIM), (3,)],
            )

    cases, theirs, seen = answers_of(cases, lambda case: case[1], answer)
    refuse_constant(theirs)
    # What is called std may be g, kernel by kernel.
    own = tuple(dict.fromkeys(kernel for _, kernel, *_ in cases))
    ways = [[kernel for i, kernel in enumerate(own) if n >> i & 1] for n in range(2 ** len(own))]
    of_std = [lambda kernel, std, d, g=g: std / d**0.5 if kernel in g else std for g in ways]
    for g, way in zip(ways, of_std, strict=True):
        if precision := alike(numbers(pave, way), theirs):
            told = f"g = std / sqrt(D) for {', '.join(g)}" if g else "std is the step's"
            return Judgement(
                "transition", True, {"g or std": told, "precision": precision, **seen}, "", ()
            )
    labels = [f"kernel {kernel}, k = {k}, t = {t:.3f}, s = {s:.3f}" for _, kernel, k, t, s in cases]
    names, way = matching(
        lambda module, way: alike(numbers(module, way), theirs), of_std, ("transition",)
    )
    return Judgement(
        "transition",
        False,
        seen,
        first_difference(labels, ("mean", "std"), numbers(pave, way), theirs),
        names,
    )


def seen_by_them(field) -> Callable:
    """velocity(x, t) as an implementation is given it: any dtype in and out, float64 within; t a number or [B]."""
    return lambda x, t: field(
        x.double(),
        torch.as_tensor(t, dtype=torch.float64).expand(len(x)),
        torch.zeros(len(x), dtype=torch.long),
    ).to(x.dtype)


def answers_of(
    cases: list, kernel_of: Callable, answer: Callable
) -> tuple[list, list, dict[str, str]]:
    """(cases, answers, conventions seen) without the kernels that never answer. Raises Rejected if some cases fail."""
    answers, errors = {}, {}
    for i, case in enumerate(cases):
        try:
            answers[i] = answer(case)
        except MISSING as error:
            errors.setdefault(kernel_of(case), []).append(error)
    for kernel, raised in errors.items():
        if len(raised) < sum(kernel_of(case) == kernel for case in cases):
            raise Rejected(
                f"it raises {raised[0]!r} in {len(raised)} cases of kernel {kernel}, and answers others"
            )
    if not answers:
        raise Rejected(
            f"it implements no kernel: {'; '.join(f'{name}: {e[0]!r}' for name, e in errors.items())}"
        )
    return (
        [cases[i] for i in answers],
        [answers[i] for i in answers],
        {"not implemented": ", ".join(errors)} if errors else {},
    )


def matching(
    agree: Callable, conventions: list, levels: tuple[str, ...]
) -> tuple[tuple[str, ...], object]:
    """The names of the bugs under which the patched module agrees, and the convention of the first (else the usual).

    A patched module that cannot run agrees with nothing.
    """
    found, used = [], []
    for bug in bugs.BUGS:
        for convention in conventions if bug.level in levels else ():
            try:
                if agree(bugs.patched(bug), convention):
                    found.append(bug.name)
                    used.append(convention)
                    break
            except (ValueError, RuntimeError):
                continue
    return tuple(found), (used or conventions)[0]


def judge_log_prob(function: Callable, generator: torch.Generator) -> Judgement:
    """Two batches of images and of vectors; std differs from row to row, so that a dropped constant shows."""
    cases = []
    for shape in ((4, 5), (3, 2, 4, 4)):
        x, mean = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
        cases.append(
            (x, mean, 0.2 + torch.rand(shape[0], generator=generator, dtype=torch.float64))
        )
    try:
        theirs = [
            ask(function, dict(x_s=x.clone(), mean=mean.clone(), std=std.clone()), [(len(x),)])
            for x, mean, std in cases
        ]
    except MISSING as error:
        raise Rejected(f"it raises {error!r}") from error
    refuse_constant([[a.flatten()[:3] for a in one] for one in theirs])
    half_log = math.log(2 * math.pi) / 2
    constants = {
        "kept": lambda std: 0 * std,
        "log std kept, log(2 pi)/2 dropped": lambda std: 0 * std - half_log,
        "dropped": lambda std: -std.log() - half_log,
    }

    def numbers(module, reduction="mean", kept="kept") -> Iterator[list[Tensor]]:
        for x, mean, std in cases:
            per = x[0].numel() if reduction == "sum" else 1
            yield [module.Transition(mean, std).log_prob(x, reduction) - per * constants[kept](std)]

    for patch, reduction, kept in product((None, NO_HALF_SQUARE), ("mean", "sum"), constants):
        if precision := alike(
            numbers(bugs.patched(patch) if patch else pave, reduction, kept), theirs
        ):
            told = {
                "mean or sum": reduction,
                "constants": kept,
                "1/(2 std^2)": DROPPED if patch else "kept",
            }
            return Judgement("log_prob", True, told | {"precision": precision}, "", ())
    labels = [f"x_s of shape {tuple(x.shape)}" for x, _, _ in cases]
    names, used = matching(
        lambda module, how: alike(numbers(module, *how), theirs),
        [*product(("mean", "sum"), constants)],
        ("log_prob",),
    )
    return Judgement(
        "log_prob",
        False,
        {},
        first_difference(labels, ("log-probability",), numbers(pave, *used), theirs),
        names,
    )


def judge_loss(function: Callable, generator: torch.Generator) -> Judgement:
    """A group of 40 with one outlier, so that a clamp at 5 acts; off-policy, with ratios on both sides of the clip.

    Two rollouts are asked for: a group that branches from one state, and one whose members have their own.
    """
    G, event, clip, eta = 40, fields.DIM, 0.02, 0.7
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    rewards, old = 0.01 * draw(G), fields.Network(generator)
    rewards[7] += 0.2
    field = fields.nudged(old, 0.05, generator)
    params = [*field.parameters()]
    starts = {"own": draw(G, event), "shared": draw(1, event).expand(G, event).contiguous()}
    t = 0.5 + 0.4 * torch.rand((), generator=generator).item()
    s, noise = 0.75 * t, draw(G, event)
    cases = [
        (kernel, factors, start)
        for kernel in pave.KERNELS
        for factors in ((), (2, 3))
        for start in starts
    ]

    def flat(loss) -> Tensor:
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    def observed(kernel, start) -> Tensor:
        with torch.no_grad():
            u = [torch.full((G,), z, dtype=torch.float64) for z in (t, s)]
            v = seen_by_them(old)(starts[start], t)
            return pave.Process([t, s], kernel, eta).transition(starts[start], v, *u).sample(noise)

    def numbers(
        module,
        chosen,
        reduction="mean",
        ddof=1,
        eps=1e-8,
        clamp=5.0,
        form="paper",
        clipped="as given",
    ) -> Iterator[list[Tensor]]:
        for kernel, factors, start in chosen:
            x_t, x_s = starts[start][None, None], observed(kernel, start)[None, None]
            rollout = module.Rollout(
                module.Process([t, s], kernel, eta),
                (0,),
                x_t,
                x_s,
                torch.zeros(1, 1, G, dtype=torch.float64),
                x_s,
                None,
            )
            A = module.group_advantages(rewards[None, None], ddof, eps, clamp)
            options = dict(
                factors=factors,
                form=form,
                clip=clip if clipped == "as given" else None,
                reduction=reduction,
            )
            with torch.no_grad():
                first = module.policy_loss(old, rollout, A, **options).old
            loss = module.policy_loss(field, rollout, A, old=first, **options).loss
            yield [loss.detach()]
            yield [flat(loss)]

    def answer(case) -> list[list[Tensor]]:
        kernel, factors, start = case
        arguments = dict(
            velocity=seen_by_them(field),
            velocity_old=seen_by_them(old),
            x_t=starts[start].clone(),
            t=t,
            s=s,
            x_s=observed(kernel, start),
            rewards=rewards.clone(),
            factors=factors,
            kernel=kernel,
            eta=eta,
            clip=clip,
        )
        value = []

        def asked(**given) -> Tensor:
            value.append(function(**given))
            return value[0].detach() if isinstance(value[0], Tensor) else value[0]

        ask(asked, arguments, [()])
        if not isinstance(value[0], Tensor) or not value[0].requires_grad:
            raise Rejected("its loss has no gradient with respect to velocity's parameters")
        return [[value[0].detach().double()], [flat(value[0])]]

    cases, theirs, seen = answers_of(cases, lambda case: case[0], answer)
    answers = [part for both in theirs for part in both]
    refuse_constant(answers[::2])
    own = [*dict.fromkeys(kernel for kernel, _, _ in cases)]
    # Conventions that explain every kernel so far; each kernel may drop 1/(2 std^2) or not.
    alive = {
        options: ()
        for options in product(
            ("mean", "sum"), (1, 0), EPS, CLAMPS, ("paper", "matched"), ("as given", "none")
        )
    }
    for kernel in own:
        chosen = [case for case in cases if case[0] == kernel]
        wanted = [
            part
            for case, both in zip(cases, theirs, strict=True)
            if case[0] == kernel
            for part in both
        ]
        explained = {}
        for options, so_far in alive.items():
            for patch in (None, NO_HALF_SQUARE):
                if precision := alike(
                    numbers(bugs.patched(patch) if patch else pave, chosen, *options), wanted
                ):
                    explained.setdefault(options, (*so_far, (kernel, patch, precision)))
        alive = explained
    if alive:  # where several do, as eps = 0 and 1e-8 in float32, the first that is exact
        exact_first = lambda options: any(
            precision == "float32" for _, _, precision in alive[options]
        )
        options = min(alive, key=exact_first)
        names = [kernel for kernel, patch, _ in alive[options] if patch]
        told = {
            "mean or sum": options[0],
            "ddof": f"{options[1]}",
            "eps": f"{options[2]:g}",
            "clamp": str(options[3]),
            "form": options[4],
            "clip": options[5],
            "1/(2 std^2)": f"{DROPPED} ({', '.join(names)})" if names else "kept",
            "precision": "float32" if exact_first(options) else "float64",
        }
        return Judgement("loss", True, told | seen, "", ())
    usual = [*product(("mean", "sum"), (1, 0), (1e-8, 1e-4), (5.0, None))]
    labels = [
        f"kernel {kernel}, S = {set(factors) or '{}'}, {start} states"
        for kernel, factors, start in cases
    ]
    labels = [label for label in labels for _ in range(2)]
    names = ("loss", "gradient") * len(cases)
    found, used = matching(
        lambda module, how: alike(numbers(module, cases, *how), answers),
        usual,
        ("transition", "log_prob", "advantages", "loss"),
    )
    first = next(
        (
            text
            for label, name, x, y in zip(
                labels, names, numbers(pave, cases, *used), answers, strict=True
            )
            if (text := first_difference([label], (name,), [x], [y]))
        ),
        "",
    )
    return Judgement("loss", False, seen, first, found)


def judge(function: Callable, seed: int) -> Judgement:
    """Judge a function at the level its parameters name, on inputs drawn from the seed. Raises Rejected."""
    level = level_of(function)
    judges = {"transition": judge_transition, "log_prob": judge_log_prob, "loss": judge_loss}
    return judges[level](function, torch.Generator().manual_seed(seed))


def main(where: str, seed: int | None) -> int:
    """Judge MODULE:FUNCTION, found from the working directory; 0 it agrees, 1 it does not, 2 it cannot be judged."""
    module, _, name = where.partition(":")
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever their module does on import
        print(
            f"verify_equivalence.py: error: --against {where}: must be an importable MODULE:FUNCTION "
            f"({type(error).__name__}: {error})",
            file=sys.stderr,
        )
        return 2
    print(f"{where} (seed {seed})")
    try:
        found = judge(function, seed)
    except Rejected as reason:
        print(f"verdict: rejected: {reason}")
        return 1
    print(found)
    return 0 if found.agrees else 1
