"""Rewards by name: reward(images float [B, 3, H, W] in [0, 1], B prompts) -> float [B], finite, higher is better.

written as                       is
clip, pickscore, hpsv2           a dual encoder (zoo/rewards/dual_encoders.py) from its usual hub repository
imagereward                      the same for ImageReward (zoo/rewards/imagereward.py)
clip=PLACE, clip=PLACE@REVISION  the same from a folder, a file or another repository, at a revision
rule, right                      the embedded world's rule, and whether it is fully met: 0 or 1 (zoo/shapes/world.py)
module:function                  any function with the signature above, on whatever device it likes
...:0.5                          any of these with a weight; the reward of a run is the weighted sum
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.shapes import rule

Reward = Callable[[Tensor, Sequence[str]], Tensor]

RULES = {"rule": rule.reward, "right": rule.right}
MODELS = {
    "clip": "dual_encoders",
    "pickscore": "dual_encoders",
    "hpsv2": "dual_encoders",
    "imagereward": "imagereward",
}


class Spec(NamedTuple):
    """A reward as written on the command line, taken apart."""

    name: str  # one of the names above, or module:function
    place: str  # of its weights; "" the usual
    revision: str
    weight: float


def parse_one(text: str) -> Spec:
    """The parts of `name[=place[@revision]][:weight]` or `module:function[:weight]`. ValueError for anything else.

    A place that exists here is no repository, and has no revision.
    """
    head, colon, last = text.rpartition(":")
    try:
        weight, body = (float(last), head) if colon else (1.0, text)
    except ValueError:
        weight, body = 1.0, text
    name, _, place = body.partition("=")
    place, _, revision = place.partition("@")
    known = name in RULES or name in MODELS
    if name.partition(":")[0] in (*RULES, *MODELS) and not known:
        raise ValueError(f"reward {text!r}: its weight must be a positive number")
    if revision and Path(place).exists():
        raise ValueError(
            f"reward {text!r}: revision {revision!r} must be left out for a place on this machine"
        )
    if (
        not (known or (name.count(":") == 1 and all(name.split(":"))))
        or ("=" in body) != bool(place)
        or (place and name not in MODELS)
    ):
        raise ValueError(
            f"reward {text!r}: must be one of {', '.join((*RULES, *MODELS))}, or module:function, then "
            f"perhaps =place@revision for weights of a model, then perhaps :weight"
        )
    if not 0 < weight < float("inf"):
        raise ValueError(f"reward {text!r}: its weight must be a positive number")
    return Spec(name, place, revision, weight)


def unweighted(text: str) -> str:
    """The same reward as written without its weight, as a judge. Raises ValueError as parse_one."""
    spec = parse_one(text)
    return (
        spec.name + f"={spec.place}" * bool(spec.place) + f"@{spec.revision}" * bool(spec.revision)
    )


def parse(texts: Sequence[str]) -> list[Spec]:
    """The parts of each. Raises ValueError for a name given twice."""
    specs = [parse_one(text) for text in texts]
    for spec in specs:
        if sum(spec.name == other.name for other in specs) > 1:
            raise ValueError(f"reward {spec.name!r} is given twice; must be once, with one weight")
    return specs


def load(spec: Spec, device: str | torch.device) -> Reward:
    """The function of a spec, its model on the device. Raises ValueError, of one line, for what cannot be loaded."""
    if spec.name in RULES:
        return RULES[spec.name]
    try:
        if spec.name in MODELS:
            module = importlib.import_module(
                f"zoo.rewards.{MODELS[spec.name]}"
            )  # transformers takes seconds to import
            return getattr(module, spec.name)(spec.place, spec.revision or None).to(device)
        module, _, function = spec.name.partition(":")
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # of files and modules that are not ours
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"reward {spec.name!r}: cannot be loaded ({said})") from error
    if not callable(reward):
        raise ValueError(f"reward {spec.name!r}: must be a function")
    return reward


class Rewards:
    """Several rewards of the same pictures, `batch` at a time (0: all)."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float], batch: int = 0):
        self.rewards, self.weights, self.batch = rewards, weights, batch

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{name: float32 [B] on the CPU}. ValueError, naming the prompt, for what is not one finite float an image."""
        size, scores = self.batch or max(1, len(images)), {}
        for name, reward in self.rewards.items():
            parts = [
                self.checked(name, reward, images[i : i + size], list(prompts[i : i + size]))
                for i in range(0, len(images), size)
            ]
            scores[name] = torch.cat(parts)
        return scores

    @staticmethod
    @torch.no_grad()
    def checked(name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
        """One batch of one reward, float32 [B] on the CPU. RuntimeError where it raises, ValueError as __call__."""
        try:
            values = (
                torch.as_tensor(reward(images.clone(), prompts)).detach().float().cpu()
            )  # its own copy to spoil
        except Exception as error:  # of a function that is not ours
            raise RuntimeError(
                f"reward {name!r} failed on prompt {prompts[0]!r} and the others of its batch: "
                f"{type(error).__name__}: {error}"
            ) from error
        if values.shape != (len(images),):
            raise ValueError(
                f"reward {name!r} of prompt {prompts[0]!r} and the others of its batch has shape "
                f"{tuple(values.shape)}: must be one float an image, [{len(images)}]"
            )
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            if not -float("inf") < value < float("inf"):
                raise ValueError(
                    f"reward {name!r} of prompt {prompt!r} is {value}: must be a finite number"
                )
        return values

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """sum_name weight_name scores[name], float32 [B]."""
        return sum(self.weights[name] * values for name, values in scores.items())


def load_all(
    lists: Sequence[Sequence[str]], device: str | torch.device = "cpu", batch: int = 0
) -> list[Rewards]:
    """Rewards for each list as written on the command line; what several name is loaded once."""
    parsed, loaded = [parse(texts) for texts in lists], {}
    for spec in (spec for specs in parsed for spec in specs):
        if spec[:3] not in loaded:
            loaded[spec[:3]] = load(spec, device)
    return [
        Rewards(
            {spec.name: loaded[spec[:3]] for spec in specs},
            {spec.name: spec.weight for spec in specs},
            batch,
        )
        for specs in parsed
    ]
