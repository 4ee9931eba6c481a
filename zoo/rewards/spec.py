"""Rewards by name, as on a command line; the contract of a reward is in zoo/rewards/__init__.py.

written as                       is
clip, pickscore, hpsv2           a dual encoder (dual_encoders.py) from its usual hub repository
imagereward                      the same for ImageReward (imagereward.py)
clip=PLACE, clip=PLACE@REVISION  likewise from a folder, a file or another repository; after
                                 another @ the revision of the tokenizer's repository, if it is
                                 one of its own
rule, right                      the embedded world's rule, and whether it is fully met: 0 or 1
module:function                  any function that keeps the contract
...:0.5                          any of these with a weight; a run's reward is the weighted sum
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.shapes import rule

Reward = Callable[[Tensor, Sequence[str]], Tensor]

RULES: dict[str, Reward] = {"rule": rule.reward, "right": rule.right}
# Names, and the modules of zoo.rewards with the function of that name. They are imported only when
# asked for, since transformers takes seconds to import.
MODELS = {
    "clip": "dual_encoders",
    "pickscore": "dual_encoders",
    "hpsv2": "dual_encoders",
    "imagereward": "imagereward",
}


# ---- Parsing -------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A reward as written on the command line, taken apart."""

    name: str  # one of RULES or MODELS, or module:function
    place: str  # of its weights; "" the usual
    revision: str  # of that place; "" the newest
    weight: float

    @property
    def source(self) -> tuple[str, str, str]:
        """All but the weight: specs of one source are one model."""
        return self.name, self.place, self.revision


def parse_one(text: str) -> Spec:
    """The parts of `name[=place[@revision]][:weight]` or `module:function[:weight]`.

    Raises ValueError for anything else, for a weight that is not positive and finite, and for a
    revision of a place that exists here, which is no repository.
    """
    known = (*RULES, *MODELS)
    head, _, last = text.rpartition(":")
    # In module:function the function may be called nan, or inf.
    is_name = last.isidentifier() and ":" not in head and "=" not in head and head not in known
    try:
        weight, body = (1.0, text) if is_name else (float(last), head)
    except ValueError:  # no weight: the colon of module:function, or none
        weight, body = 1.0, text
    name, equals, place = body.partition("=")
    place, _, revision = place.partition("@")
    own, _, _ = revision.partition("@")  # then perhaps that of the tokenizer's repository

    module, colon, function = name.partition(":")
    is_function = bool(module and function) and ":" not in function
    bad_weight = ValueError(f"reward {text!r}: its weight must be a positive number")
    if colon and module in known:  # a known name has no function: this was meant as its weight
        raise bad_weight
    if own and os.path.exists(place):
        raise ValueError(
            f"reward {text!r}: revision {own!r} must be left out for a place on this machine"
        )
    empty_place = bool(equals) and not place
    if not (name in known or is_function) or empty_place or (place and name not in MODELS):
        raise ValueError(
            f"reward {text!r}: must be one of {', '.join(known)}, or module:function, then perhaps "
            "=place@revision for weights of a model, then perhaps :weight"
        )
    if not 0 < weight < float("inf"):
        raise bad_weight
    return Spec(name, place, revision, weight)


def unweighted(text: str) -> str:
    """The same reward as written without its weight, as a judge. Raises ValueError as parse_one."""
    spec = parse_one(text)
    place = f"={spec.place}" if spec.place else ""
    revision = f"@{spec.revision}" if spec.revision else ""
    return spec.name + place + revision


def parse(texts: Sequence[str]) -> list[Spec]:
    """The parts of each. Raises ValueError as parse_one, and for a name given twice."""
    specs = [parse_one(text) for text in texts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward {name!r} is given twice; must be once, with one weight")
    return specs


# ---- Loading -------------------------------------------------------------------------------------


def load(spec: Spec, device: str | torch.device) -> Reward:
    """The function of a spec, its model on the device.

    Raises ValueError, of one line, for what cannot be loaded.
    """
    if spec.name in RULES:
        return RULES[spec.name]
    try:
        if spec.name in MODELS:
            module = importlib.import_module(f"zoo.rewards.{MODELS[spec.name]}")
            return getattr(module, spec.name)(spec.place, spec.revision or None).to(device)
        path, _, function = spec.name.partition(":")
        if os.getcwd() not in sys.path:  # a program's own folder is there, the working one is not
            sys.path.insert(0, os.getcwd())
        dtype = torch.get_default_dtype()
        reward = getattr(importlib.import_module(path), function)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
            raise ValueError(f"its module must leave torch's default dtype at {dtype}")
    except (Exception, SystemExit) as error:  # of files and modules that are not ours
        said = in_a_line(error)
        raise ValueError(f"reward {spec.name!r}: cannot be loaded ({said})") from error
    if not callable(reward):
        raise ValueError(f"reward {spec.name!r}: must be a function")
    return reward


def load_all(
    lists: Sequence[Sequence[str]],
    device: str | torch.device = "cpu",
    batch: int = 0,
    limit: float = 0.0,
) -> list[Rewards]:
    """Rewards for each list as written on the command line; what several name is loaded once.

    batch and limit are those of Rewards. Raises ValueError as `parse` and `load`.
    """
    parsed = [parse(texts) for texts in lists]
    loaded: dict[tuple[str, str, str], Reward] = {}
    for specs in parsed:
        for spec in specs:
            if spec.source not in loaded:
                loaded[spec.source] = load(spec, device)
    found = []
    for specs in parsed:
        rewards = {spec.name: loaded[spec.source] for spec in specs}
        weights = {spec.name: spec.weight for spec in specs}
        found.append(Rewards(rewards, weights, batch, limit))
    return found


# ---- Asking --------------------------------------------------------------------------------------


def in_a_line(error: BaseException) -> str:
    """What an error says and its kind, in one line that is not long."""
    said = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def within(seconds: float, job: Callable[..., Any], *arguments: Any) -> Any:
    """job(*arguments). Raises TimeoutError where it takes longer than this; 0: it may take any.

    A job that takes too long is left behind in its thread, since nothing can end it.
    """
    if not seconds:
        return job(*arguments)
    results: list[Any] = []
    errors: list[BaseException] = []

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:  # a new thread would be on the first
                torch.cuda.set_device(device)
            with torch.no_grad():
                results.append(job(*arguments))
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"took more than {seconds:g} s")
    return results[0]


class Rewards:
    """Several rewards of the same pictures, `batch` pictures at a time (0: all).

    limit   seconds that a call of one may take; 0: any
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        batch: int = 0,
        limit: float = 0.0,
    ):
        self.rewards, self.weights, self.batch, self.limit = rewards, weights, batch, limit

    def __call__(
        self, images: Tensor, prompts: Sequence[str], finite: bool = True
    ) -> dict[str, Tensor]:
        """{name: float32 [B] on the CPU}. Raises as `checked`.

        With finite, ValueError too for a number that is not, naming the prompt.
        """
        size = self.batch or max(1, len(images))
        scores = {}
        for name, reward in self.rewards.items():
            parts = []
            for i in range(0, len(images), size):
                part = slice(i, i + size)
                parts.append(self.checked(name, reward, images[part], list(prompts[part])))
            scores[name] = torch.cat(parts)
            for prompt, value in zip(prompts, scores[name].tolist(), strict=True):
                if finite and not math.isfinite(value):
                    wanted = "must be a finite number"
                    raise ValueError(f"reward {name!r} of prompt {prompt!r} is {value}: {wanted}")
        return scores

    @torch.no_grad()
    def checked(self, name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
        """One batch of one reward, float32 [B] on the CPU.

        Raises RuntimeError where the reward raises, leaves or takes too long, and ValueError for
        what is not one real number an image, or leaves another default dtype; all name the prompt.
        """
        others = " and the others of its batch" if len(prompts) > 1 else ""
        batch = f"prompt {prompts[0]!r}{others}"
        dtype = torch.get_default_dtype()
        try:
            given = images.clone(), prompts  # its own copy to spoil
            values = torch.as_tensor(within(self.limit, reward, *given)).detach().cpu()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of a function that is not ours
            said = in_a_line(error)
            raise RuntimeError(f"reward {name!r} failed on {batch}: {said}") from error
        finally:
            left = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
        if left != dtype:
            wanted = f"must leave torch's default dtype at {dtype}, not {left}"
            raise ValueError(f"reward {name!r} of {batch}: {wanted}")
        if values.shape != (len(images),):
            raise ValueError(
                f"reward {name!r} of {batch} has shape {tuple(values.shape)}: "
                f"must be one float an image, [{len(images)}]"
            )
        if values.is_complex():
            raise ValueError(f"reward {name!r} of {batch} is {values.dtype}: must be real numbers")
        return values.float()

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """sum_name weight_name scores[name], float32 [B]."""
        weighted = [self.weights[name] * values for name, values in scores.items()]
        return sum(weighted, torch.zeros(()))
