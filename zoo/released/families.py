"""The families of released models, by the `_class_name` of their model_index.json, and loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from zoo.released.flux import Flux
from zoo.released.pipeline import Flow, quiet
from zoo.released.sd3 import SD3

FAMILIES: dict[str, type[Flow]] = {family.pipeline_class: family for family in (SD3, Flux)}


@contextmanager
def reading(path: str, bars: bool = False) -> Iterator[None]:
    """Within, a failure to find or fetch is a ValueError of one line that names the model."""
    try:
        with quiet(bars):
            yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {path!r}: cannot be loaded ({said}); "
            f"must be a diffusers pipeline's folder or hub id"
        ) from error


def model_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a folder or hub id. Raises ValueError where it is of no family here."""
    from diffusers import DiffusionPipeline

    if Path(path).is_file() or (revision and Path(path).exists()):
        raise ValueError(
            f"model {path!r}, revision {revision!r}: "
            f"must be a folder, without a revision, or a hub id"
        )
    with reading(path):
        index = DiffusionPipeline.load_config(path, revision=revision)
    name = index.get("_class_name")
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
            path, dtype=dtypes, revision=revision, use_safetensors=True, **absent
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
    return family(pipe(transformer=network, vae=vae, scheduler=scheduler, **texts))
