"""From a command line to checked options. What is wrong is one line on standard error, status 2.

What a single value must be is a Rule of its option; what options must be to each other, and to
the files they name, is said here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

import pave_grpo as pave
from zoo.released import families
from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.shapes import world
from zoo.training.options import (
    ABOUT,
    TYPES,
    WITH_MODEL,
    WITH_PAPER_TERMS,
    Options,
    policy_of,
    prompts_of,
    stochastic_steps,
)
from zoo.training.ranks import fail


class Parser(argparse.ArgumentParser):
    """Some of the options as flags. What is wrong is one line on standard error, and status 2."""

    def __init__(self, usage: str, description: str | None, names: Sequence[str] = tuple(ABOUT)):
        super().__init__(
            usage=usage,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        headings = dict.fromkeys(ABOUT[name].group for name in names)
        groups = {heading: self.add_argument_group(heading) for heading in headings}
        for name in names:
            groups[ABOUT[name].group].add_argument(flag(name), **argument(name, names))

    def error(self, message: str) -> NoReturn:
        fail(message)

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """What a command line says, and nothing else; several values as a tuple."""
        given = vars(self.parse_args(argv))
        return {name: tuple(z) if isinstance(z, list) else z for name, z in given.items()}


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def argument(name: str, names: Sequence[str]) -> dict[str, Any]:
    """What argparse is told of an option among others. A tuple takes any number of values."""
    about, kind, default = ABOUT[name], TYPES[name], spelled(getattr(Options, name))
    if about.released not in (None, ()) and "model" in names:
        released = spelled(about.released)
        default = released if about.only is WITH_MODEL else f"{default}; with --model {released}"
    words = f"{about.only.words}: " if about.only else ""
    words += about.help + (f" (default: {default})" if default else "")
    told: dict[str, Any] = {"help": words.replace("%", "%%")}
    if kind is bool:
        return told | {"action": "store_true"} | about.argument
    if get_args(kind):
        told["nargs"], kind = "*", get_args(kind)[0]
    if kind in (int, float):
        told["metavar"] = "N" if kind is int else "X"
    return told | {"type": kind} | about.argument


def spelled(value: Any) -> str:
    """A value as it is typed; a switch as on, or nothing."""
    if isinstance(value, bool):
        return "on" if value else ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settle(given: dict[str, Any]) -> Options:
    """Options of a command line: what it says, then defaults; a released model has its own.

    Raises ValueError, in one line, for a preset of another family.
    """
    if not given.get("model"):
        return Options(**given)
    defaults = {name: z.released for name, z in ABOUT.items() if z.released is not None}
    family = families.family_of(given["model"], given.get("revision"))
    if given.get("preset", family.preset) != family.preset:
        raise ValueError(f"--preset {given['preset']}: must be {family.preset} for this model")
    if "preset" in given:
        defaults["tune"] = "full"
    defaults["guidance"] = family.default_guidance
    defaults["eval_reward"] = tuple(map(spec.unweighted, given.get("reward", ())))
    defaults["lr"] = 2e-6 if given.get("tune", defaults["tune"]) == "full" else 1e-4
    return Options(**(defaults | given))


@contextmanager
def refusing() -> Iterator[None]:
    """Within, a ValueError is one line on standard error, and status 2."""
    try:
        yield
    except ValueError as problem:
        fail(str(problem))


class Replaced(argparse.Action):
    """A flag that is a command of its own by now: refused, naming the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: is now the command {self.const}")


JUDGE = "python -m zoo.training.evaluate CHECKPOINT"
DRAW = "python -m zoo.training.draw CHECKPOINT --prompt TEXT ..."
REPLACED = {"--evaluate": JUDGE, "--sample": DRAW, "--prompt": DRAW}


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> Options:
    """The options of a command line of train.py, checked. Bad input: one line, status 2."""
    parser = Parser("[torchrun --nproc_per_node=N | python] train.py [options]", description)
    for old, command in REPLACED.items():
        hidden = argparse.SUPPRESS
        parser.add_argument(old, action=Replaced, const=command, nargs="*", help=hidden)
    given = parser.read(argv)
    with refusing():
        o = settle(given)
        check_alone(o, given)
        check_together(o)
        check_contents(o)
    return o


# ---- What is refused, in one line, before any work -----------------------------------------------


def refusal(o: Options, name: str, wanted: str) -> ValueError:
    """An option as it was typed, and what would be right."""
    return ValueError(f"{flag(name)} {spelled(getattr(o, name))}".strip() + f": must be {wanted}")


def check_alone(o: Options, given: Iterable[str]) -> None:
    """Options that are given are read by such a run, and every value is one that can be."""
    for name in sorted(given):
        only = ABOUT[name].only
        if only and not only.holds(o):
            raise ValueError(f"{flag(name)}: must be left out, being read only {only.words}")
    for name, about in ABOUT.items():
        read = about.only is None or about.only.holds(o)
        if read and about.rule and not about.rule.holds(getattr(o, name)):
            raise refusal(o, name, about.rule.words)


def check_together(o: Options) -> None:
    """Options fit each other and the number of ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    P = o.prompts_per_iteration
    if P < 1 or P % ranks:
        some = f"{ranks} rank{'s' * (ranks > 1)}"
        raise refusal(o, "prompts_per_iteration", f"a positive multiple of the {some}")
    if o.tune != "full" and o.tune != ("lora" if o.model else "transformer"):
        choice = "lora or full" if o.model else "transformer or full without --model"
        raise refusal(o, "tune", choice)
    if o.step_weights in ("gamma", "level") and not WITH_PAPER_TERMS.holds(o):
        wanted = f"one or noise, being read only {WITH_PAPER_TERMS.words}"
        raise refusal(o, "step_weights", wanted)
    weighed = o.step_weights in ("gamma", "level") or o.term_weights == "rescaled"
    if weighed and o.ratio_norm:
        why = "whose (c_1/c_k)^2 is that of plain ratios"
        raise ValueError(f"--ratio-norm: must be left out with Gamma or rescaled terms, {why}")
    if o.window_every >= o.iterations:
        wanted = f"below --iterations {o.iterations}, or the stochastic steps never move"
        raise refusal(o, "window_every", wanted)
    if o.model and not o.prompts:
        raise refusal(o, "prompts", "given with --model")
    if bool(o.eval_prompts) != bool(o.prompts):
        raise refusal(o, "eval_prompts", "given with --prompts, and only with it")


def check_contents(o: Options) -> None:
    """Prompts, rewards, model and sampler can be had."""
    pave.check_factors(o.factors)
    data = prompts_of(o)
    asked = [*data.train, *data.heldout]
    rewards = [*spec.parse(o.reward), *spec.parse(o.eval_reward)]
    if any(reward.name in spec.RULES for reward in rewards):
        if o.model:
            raise ValueError(
                "--reward, --eval-reward: 'rule' and 'right' judge the embedded world only"
            )
        for prompt in asked:
            world.parse(prompt)
    if not o.model:
        shapes_model.tokenize(asked)
    stochastic_steps(o, policy_of(o))
