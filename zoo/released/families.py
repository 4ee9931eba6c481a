"""The families of released models, by the `_class_name` of their model_index.json, and loading."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoo.released.flux import Flux
from zoo.released.pipeline import Flow, quiet
from zoo.released.sd3 import SD3

# Names in the configuration of a transformer or a VAE.
COUNTS = (
    *("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"),
    *("in_channels", "latent_channels"),
)

FAMILIES: dict[str, type[Flow]] = {family.pipeline_class: family for family in (SD3, Flux)}


@contextmanager
def reading(path: str, bars: bool = False) -> Iterator[None]:
    """Within, a failure to find, fetch or build is a ValueError of one line naming the model."""
    try:
        with quiet(bars), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, on what they are told by libraries
            yield
    except Exception as error:  # of libraries on whatever the files hold
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {path!r}: cannot be loaded ({said}); "
            f"must be a diffusers pipeline's folder or hub id"
        ) from error


def model_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a folder or hub id. Raises ValueError where it is of no family here."""
    from diffusers import DiffusionPipeline

    if os.path.isfile(path) or (revision and os.path.exists(path)):
        raise ValueError(
            f"model {path!r}, revision {revision!r}: "
            f"must be a folder, without a revision, or a hub id"
        )
    with reading(path):
        index = DiffusionPipeline.load_config(path, revision=revision)
        name = dict(index).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"model {path!r} is a {name}; must be one of {', '.join(FAMILIES)}")
    return index


def family_of(path: str, revision: str | None = None) -> type[Flow]:
    """The family of a folder or hub id. Raises ValueError where it is of no family here."""
    return FAMILIES[model_index(path, revision)["_class_name"]]


def load(
    path: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    *,
    master: torch.dtype | None = None,
    autocast: bool = False,
    bars: bool = True,
) -> Flow:
    """The pipeline of a folder or hub id as a Flow, in evaluation mode, frozen, on the CPU.

    dtype       what everything computes in
    master      what the transformer's weights are kept in; None: dtype
    autocast    some weights are, or are going to be, kept in another dtype than `dtype`
    bars        show progress
    Raises ValueError for a pipeline of another family, before its weights are read.
    """
    from diffusers import DiffusionPipeline

    index = model_index(path, revision)
    # A part that was saved as absent, as is T5 in some SD3, must be said to be absent.
    absent = {
        name: None
        for name, part in index.items()
        if isinstance(part, list | tuple) and part[0] is None
    }
    dtypes = {"transformer": master or dtype, "default": dtype}
    with reading(path, bars):
        pipe = DiffusionPipeline.from_pretrained(
            path,
            dtype=dtypes,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            **absent,
        )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return FAMILIES[index["_class_name"]](pipe, dtype, autocast)


def outline(path: str, revision: str | None = None) -> Flow:
    """The same without text encoders and without weights: shapes, sizes and grids.

    Modules are on the meta device.
    """
    import diffusers

    family = family_of(path, revision)

    def bare(name: str, part: str) -> nn.Module:
        cls = getattr(diffusers, name)
        config = cls.load_config(path, subfolder=part, revision=revision)
        return cls.from_config(config)

    with reading(path):
        with torch.device("meta"):
            network = bare(family.transformer_class, "transformer").eval()
            vae = bare("AutoencoderKL", "vae")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            path, subfolder="scheduler", revision=revision
        )
        texts = dict.fromkeys((*family.encoders, *family.tokenizers))
        pipe = getattr(diffusers, family.pipeline_class)
        flow = family(pipe(transformer=network, vae=vae, scheduler=scheduler, **texts))
        for part in (network, vae):
            check_counts(part)
    return flow


def check_counts(part: Any) -> None:
    """Raises ValueError for a size of one of diffusers' networks that is none."""
    config = part.config
    for name in COUNTS:
        value = config.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of {type(part).__name__} is {value!r}, must be 1 or more")
