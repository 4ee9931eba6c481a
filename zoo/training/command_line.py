"""From a command line to checked options. What is wrong is one line on standard error, status 2.

What a single value must be is a Rule of its option; what options must be to each other, and to
the files they name, is said here.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

import pave_grpo as pave
from zoo.released import families
from zoo.rewards import spec
from zoo.shapes import model as shapes_model
from zoo.shapes import world
from zoo.training.options import (
    ABOUT,
    FREE,
    TYPES,
    WITH_MODEL,
    WITH_PAPER_TERMS,
    Options,
    finishing_steps,
    is_run,
    places_of,
    policy_of,
    prompts_of,
)
from zoo.training.prompts import Prompts
from zoo.training.ranks import fail, place


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


def resumed(given: dict[str, Any]) -> Options:
    """Options of a run that goes on: its own, and of those given the ones that may change.

    Raises ValueError, in one line, for what is no run, and for another value of an option.
    """
    if not is_run(given["resume"]):
        raise ValueError(f"--resume {given['resume']}: must be the folder of a run")
    path = Path(given["resume"]) / "config.json"
    own = options_in(path)
    for name, value in given.items():
        if name == "out":
            raise ValueError(f"--out {value}: must be left out, as a run goes on in its own folder")
        if name not in FREE and value != own[name]:
            was = spelled(own[name]) or "nothing"
            wanted = f"must be {was}, as in {path}, or left out"
            raise ValueError(f"{flag(name)} {spelled(value)}".strip() + f": {wanted}")
    return Options(**(own | given | {"out": ""}))


def options_in(path: Path) -> dict[str, Any]:
    """The options of a config.json, and defaults. Raises ValueError, in one line, for another file.

    The numbers that JSON lacks are written as words.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path}: cannot be read; must be the options of a run") from None
    if not isinstance(found, dict) or not found.keys() <= ABOUT.keys():
        raise ValueError(f"{path}: must be options of this version of train.py, and no others")
    options = asdict(Options())
    for name, value in found.items():
        several = get_args(TYPES[name])
        kind = several[0] if several else TYPES[name]
        values = value if several and isinstance(value, list) else [value]
        if kind is float:
            values = [float(z) if is_number(z) else z for z in values]
        if isinstance(value, list) != bool(several) or any(type(z) is not kind for z in values):
            raise ValueError(f"{path}: {name} is {value!r}, which is not what {flag(name)} takes")
        options[name] = tuple(values) if several else values[0]
    return options


def is_number(value: Any) -> bool:
    """Whether a float is spelled otherwise in JSON: as a whole number, or as a word."""
    return value in ("inf", "nan") or (type(value) is int and abs(value) < 2**63)


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
    return parse_and_read(argv, description)[0]


def parse_and_read(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Options, Prompts]:
    """The same, and the prompts, whose files are read once: they may be pipes."""
    parser = Parser("[torchrun --nproc_per_node=N | python] train.py [options]", description)
    for old, command in REPLACED.items():
        hidden = argparse.SUPPRESS
        parser.add_argument(old, action=Replaced, const=command, nargs="*", help=hidden)
    given = parser.read(argv)
    with refusing():
        o = resumed(given) if given.get("resume") else settle(given)
        check_alone(o, given)
        check_together(o)
        check_writable(o)
        return o, check_contents(o)


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
    _, ranks, _ = place()
    P = o.prompts_per_iteration
    if P < 1 or P % ranks:
        some = f"{ranks} rank{'s' * (ranks > 1)}"
        raise refusal(o, "prompts_per_iteration", f"a positive multiple of the {some}")
    if o.gather_rollouts and ranks == 1:
        raise ValueError(
            "--gather-rollouts: must be left out on one rank, which has all weights; to go on with "
            "such a run there, --no-gather-rollouts"
        )
    check_tune(o)
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


def check_tune(o: Options) -> None:
    """What is trained is there."""
    if o.tune != "full" and o.tune != ("lora" if o.model else "transformer"):
        choice = "lora or full" if o.model else "transformer or full without --model"
        raise refusal(o, "tune", choice)


def check_writable(o: Options) -> None:
    """The run's folder can be made, and a file in it; what was made for the trial is removed."""
    rank, _, _ = place()
    folder = Path(o.resume or o.out or "runs")
    made = []
    try:
        missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        for path in reversed(missing if rank == 0 else []):  # only the first rank writes
            path.mkdir()
            made.append(path)
        if rank == 0:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, ValueError) as problem:
        said = problem.strerror if isinstance(problem, OSError) else problem
        name = "resume" if o.resume else "out"
        raise ValueError(f"{flag(name)} {folder}: cannot be written ({said})") from None
    finally:
        for path in reversed(made):
            path.rmdir()


def check_contents(o: Options) -> Prompts:
    """Prompts, which are returned, rewards, model and sampler can be had."""
    pave.check_factors(o.factors)
    data = prompts_of(o)
    asked = [*data.train, *data.heldout]
    rewards = [*spec.parse(o.reward), *spec.parse(o.eval_reward)]
    for reward in rewards:
        if ":" in reward.name:
            spec.load(reward, "cpu")  # somebody's module, which is to be there
    if any(reward.name in spec.RULES for reward in rewards):
        if o.model:
            raise ValueError(
                "--reward, --eval-reward: 'rule' and 'right' judge the embedded world only"
            )
        for prompt in asked:
            world.parse(prompt)
    if not o.model:
        shapes_model.tokenize(asked)
    check_finish(o, places_of(o, policy_of(o)))
    return data


def check_finish(o: Options, places: Sequence[tuple[int, ...]]) -> None:
    """The longest way from a stochastic step to a picture is as long as its options need it."""
    end = 0 if o.rollouts == "shared_anchor" else -1
    last = min(steps[end] for steps in places)
    left = o.steps - 1 - last
    if o.finish_stride > max(1, left):
        wanted = f"{max(1, left)} or less, as {left} grid steps follow stochastic step {last}"
        raise refusal(o, "finish_stride", wanted)
    if o.finish_order == 2 and finishing_steps(o, last) < 2:
        wanted = f"1, as fewer than two ODE steps follow stochastic step {last}"
        raise refusal(o, "finish_order", wanted)
