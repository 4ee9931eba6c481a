"""Released text-to-image flows, SD3 and FLUX, as velocities: v(x, t, c) over latents, c the index of a prompt.

    _class_name in model_index.json   latent x, float32              the transformer gets
    StableDiffusion3Pipeline          [B, C, h, w]                   1000 t; guidance by a second, empty-prompt half
    FluxPipeline                      [B, h w / 4, 4 C], packed 2x2  t; guidance as an input, where the model takes it

h and w are the picture's sides over the VAE's reduction. Given a pipeline's own sigmas, initial noise, prompts and
guidance, pave_grpo.ode_sample on such a velocity gives the latents of the pipeline itself, to float32 rounding (tests/
test_diffusion.py). Loading, text encoders, VAE and schedulers are diffusers'; nothing is loaded twice. One thing is
diffusers' choice, not ours: FLUX's network rounds the time it is given to the dtype it computes in.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pave_grpo import Velocity

FAMILIES = {
    "StableDiffusion3Pipeline": (StableDiffusion3Pipeline, SD3Transformer2DModel),
    "FluxPipeline": (FluxPipeline, FluxTransformer2DModel),
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Texts(NamedTuple):
    """What the transformer is told of each prompt: tokens [N, L, D], pooled [N, D']; N prompts."""

    tokens: Tensor
    pooled: Tensor


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Within, diffusers and transformers report errors only: they would print whole prompts that we name in a line.

    bars: diffusers counts the parts it loads.
    """
    levels = [(z, z.get_verbosity()) for z in (diffusers_logging, transformers_logging)]
    shown = transformers_logging.is_progress_bar_enabled()
    for library, _ in levels:
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # it would show one for every part
    if not bars:
        diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        if shown:
            transformers_logging.enable_progress_bar()
        for library, level in levels:
            library.set_verbosity(level)


def readable(path: str, read: Callable, bars: bool = False):
    """read(), any failure to find or fetch as one line that names the model."""
    try:
        with quiet(bars):
            return read()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {path!r}: cannot be loaded ({said}); must be a diffusers pipeline's folder or hub "
            f"id"
        ) from error


def family_of(path: str, revision: str | None = None) -> str:
    """The `_class_name` in model_index.json of a folder or hub id. Raises ValueError where it is none of FAMILIES."""
    if Path(path).is_file() or (revision and Path(path).exists()):
        raise ValueError(
            f"model {path!r}, revision {revision!r}: must be a folder, without a revision, or a hub id"
        )
    name = readable(path, lambda: DiffusionPipeline.load_config(path, revision=revision)).get(
        "_class_name"
    )
    if name not in FAMILIES:
        raise ValueError(f"model {path!r} is a {name}; must be one of {', '.join(FAMILIES)}")
    return name


def load(
    path: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    master: torch.dtype | None = None,
    bars: bool = True,
) -> Flow:
    """The pipeline of a folder or hub id as a Flow, in evaluation mode, frozen, on the CPU.

    dtype is what everything computes in; master (default: the same) what the transformer's weights are kept in; bars
    shows progress.
    Raises ValueError for a pipeline of another family, before its weights are read.
    """
    family_of(path, revision)
    parts = readable(path, lambda: DiffusionPipeline.load_config(path, revision=revision))
    absent = {
        name: None
        for name, part in parts.items()
        if isinstance(part, list | tuple) and part[0] is None
    }
    dtypes = {
        "transformer": master or dtype,
        "default": dtype,
    }  # absent: an SD3 without T5 must be told so
    pipe = readable(
        path,
        lambda: DiffusionPipeline.from_pretrained(
            path, dtype=dtypes, revision=revision, use_safetensors=True, **absent
        ),
        bars,
    )
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return Flow(pipe, dtype, autocast=(master or dtype) != dtype)


def outline(path: str, revision: str | None = None) -> Flow:
    """The same without text encoders and without weights, which are on the meta device: shapes, sizes and grids."""
    pipeline, transformer = FAMILIES[family_of(path, revision)]
    where = {"pretrained_model_name_or_path": path, "revision": revision}

    def bare(cls: type, part: str) -> nn.Module:
        return readable(path, lambda: cls.from_config(cls.load_config(subfolder=part, **where)))

    with torch.device("meta"):
        network, vae = bare(transformer, "transformer").eval(), bare(AutoencoderKL, "vae")
    scheduler = readable(
        path,
        lambda: FlowMatchEulerDiscreteScheduler.from_pretrained(subfolder="scheduler", **where),
    )
    texts = (
        (*ENCODERS, *TOKENIZERS)
        if pipeline is StableDiffusion3Pipeline
        else (*ENCODERS[:2], *TOKENIZERS[:2])
    )
    return Flow(pipeline(transformer=network, vae=vae, scheduler=scheduler, **dict.fromkeys(texts)))


@dataclass(frozen=True)
class Flow:
    """A pipeline, and what this project asks of it."""

    pipe: StableDiffusion3Pipeline | FluxPipeline
    dtype: torch.dtype = torch.float32  # of computation, whatever the weights are kept in
    autocast: bool = False  # weights are kept in another dtype: torch.autocast casts them

    @property
    def is_flux(self) -> bool:
        return isinstance(self.pipe, FluxPipeline)

    @property
    def transformer(self) -> nn.Module:
        """The velocity network, whose parameters are theta."""
        return self.pipe.transformer

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent of a picture, without the batch.

        Raises ValueError for sides that do not divide, or for which SD3's table of positions is too small.
        """
        reduction = self.pipe.vae_scale_factor
        unit = reduction * (2 if self.is_flux else self.transformer.config.patch_size)
        most = unit * (self.transformer.config.get("pos_embed_max_size") or 10**6)
        if min(height, width) <= 0 or height % unit or width % unit or max(height, width) > most:
            up_to = f" up to {most}" if most < 10**6 else ""
            raise ValueError(
                f"size {height} x {width}: both must be positive multiples of {unit}{up_to}"
            )
        h, w, channels = (
            height // reduction,
            width // reduction,
            self.transformer.config.in_channels,
        )
        return (h * w // 4, channels) if self.is_flux else (channels, h, w)

    @quiet()
    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 8, bars: bool = False) -> Texts:
        """Texts of the prompts on the CPU, `batch` at a time. Encode once, then `drop_encoders`."""
        parts, device = [], self.pipe.text_encoder.device
        for start in tqdm(
            range(0, len(prompts), batch), "encoding prompts", leave=False, disable=not bars
        ):
            some = list(prompts[start : start + batch])
            if self.is_flux:
                tokens, pooled, _ = self.pipe.encode_prompt(some, None, device=device)
            else:
                tokens, _, pooled, _ = self.pipe.encode_prompt(
                    some, None, None, device=device, do_classifier_free_guidance=False
                )
            parts.append((tokens.cpu(), pooled.cpu()))
        return Texts(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @quiet()
    def cut_off(self, prompts: Sequence[str]) -> list[str]:
        """A line for every prompt of which a text encoder reads the beginning only."""
        limits = {
            id(z): z.model_max_length
            for z in (getattr(self.pipe, name, None) for name in TOKENIZERS)
            if z
        }
        t5 = self.pipe.tokenizer_2 if self.is_flux else self.pipe.tokenizer_3
        if t5 is not None:
            limits[id(t5)] = 512 if self.is_flux else 256  # what encode_prompt asks of it
        lines = []
        for tokenizer in (getattr(self.pipe, name, None) for name in TOKENIZERS):
            counts = (
                [len(z) for z in tokenizer(list(prompts)).input_ids]
                if tokenizer and prompts
                else []
            )
            lines += [
                f"prompt {textwrap.shorten(prompt, 60)!r} has {n} tokens, of which {type(tokenizer).__name__} "
                f"reads {limits[id(tokenizer)]}"
                for prompt, n in zip(prompts, counts)
                if n > limits[id(tokenizer)]
            ]
        return list(dict.fromkeys(lines))

    def move_encoders(self, device: torch.device) -> None:
        """Move the text encoders, to encode there."""
        for name in ENCODERS:
            if getattr(self.pipe, name, None) is not None:
                getattr(self.pipe, name).to(device)

    def drop_encoders(self) -> None:
        """Forget the text encoders, which nothing needs once prompts are encoded."""
        for name in ENCODERS:
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid of `steps` steps at this size, float64 [steps + 1], from the first sigma to 0."""
        scheduler, config = copy.deepcopy(self.pipe.scheduler), self.pipe.scheduler.config
        shape, options = self.shape(height, width), {}
        if config.get("use_dynamic_shifting") or self.is_flux:
            patch = 1 if self.is_flux else self.transformer.config.patch_size
            tokens = shape[0] if self.is_flux else (shape[1] // patch) * (shape[2] // patch)
            options["mu"] = calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15 if self.is_flux else 1.16),
            )
        if self.is_flux and not config.get("use_flow_sigmas"):
            scheduler.set_timesteps(
                sigmas=torch.linspace(1, 1 / steps, steps).double().numpy(), **options
            )
        else:
            scheduler.set_timesteps(steps, **options)
        return scheduler.sigmas.double()

    def splits(self, guidance: float) -> bool:
        """Whether a velocity takes two evaluations a row, with the prompt and without: SD3 with guidance above 1.

        Raises ValueError for a guidance the model cannot take: FLUX with the guidance embedding needs one above 0, FLUX
        without it (schnell) none, SD3 one above 1, or 0 or 1 for none.
        """
        embeds = self.is_flux and bool(self.transformer.config.guidance_embeds)
        fits = (guidance > 0) == embeds if self.is_flux else guidance >= 1 or guidance == 0
        if not (fits and 0 <= guidance < float("inf")):
            takes = (
                "above 0: this FLUX model takes guidance"
                if embeds
                else "0: this FLUX model has no guidance input"
            )
            raise ValueError(
                f"guidance={guidance}: must be {takes if self.is_flux else 'above 1, or 0 for none'}"
            )
        return not self.is_flux and guidance > 1

    def velocity(
        self,
        texts: Texts,
        height: int,
        width: int,
        guidance: float,
        empty: Texts | None = None,
        network: nn.Module | None = None,
    ) -> Velocity:
        """v(x, t, c) of latents x in float32, rows of prompts texts[c]; the network computes in `dtype`.

        guidance       SD3: v = v_empty + guidance (v_text - v_empty) where above 1, in one batch of both halves; FLUX:
                       the model's guidance input, which a model without one must be given as 0
        empty          SD3 with guidance above 1: the Texts of the negative prompt, one row
        network        another transformer of the same class (a reference policy); default: the pipeline's
        Raises ValueError where they do not fit together.
        """
        network, config, dtype = network or self.transformer, self.transformer.config, self.dtype
        split = self.splits(guidance)
        if split != (empty is not None):
            raise ValueError(
                f"guidance={guidance}: the negative prompt must be given exactly for SD3 above 1"
            )
        self.shape(height, width)
        rows = height // self.pipe.vae_scale_factor // 2, width // self.pipe.vae_scale_factor // 2

        def told(part: Tensor, c: Tensor, x: Tensor) -> Tensor:
            return part[c.to(part.device)].to(x.device, dtype)

        def casting(x: Tensor):
            return torch.autocast(x.device.type, dtype) if self.autocast else nullcontext()

        def sd3(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            """Latents [B, C, h, w]; the network counts time to 1000."""
            tokens, pooled = (told(part, c, x) for part in texts)
            if split:
                nothing = torch.zeros_like(c)
                tokens, pooled = (
                    torch.cat([told(e, nothing, x), part])
                    for e, part in zip(empty, (tokens, pooled))
                )
                x, t = x.repeat(2, 1, 1, 1), t.repeat(2)
            with casting(x):
                v = network(
                    hidden_states=x.to(dtype),
                    timestep=1000 * t,
                    encoder_hidden_states=tokens,
                    pooled_projections=pooled,
                    return_dict=False,
                )[0].float()
            if split:
                without, with_text = v.chunk(2)
                v = without + guidance * (with_text - without)
            return v

        def flux(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            """Packed latents [B, h w / 4, 4 C]; each token says its row and column, words say zero."""
            tokens, pooled = (told(part, c, x) for part in texts)
            at = torch.arange(rows[0], device=x.device), torch.arange(rows[1], device=x.device)
            y, z = torch.meshgrid(*at, indexing="ij")
            places = torch.stack([torch.zeros_like(y), y, z], -1).flatten(0, 1).to(dtype)
            words = torch.zeros(tokens.shape[1], 3, device=x.device, dtype=dtype)
            how = (
                torch.full((len(x),), guidance, device=x.device) if config.guidance_embeds else None
            )
            with casting(x):
                return network(
                    hidden_states=x.to(dtype),
                    timestep=t,
                    guidance=how,
                    pooled_projections=pooled,
                    encoder_hidden_states=tokens,
                    txt_ids=words,
                    img_ids=places,
                    return_dict=False,
                )[0].float()

        return flux if self.is_flux else sd3

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, batch: int = 4) -> Tensor:
        """Pictures float32 [B, 3, height, width] in [0, 1], `batch` latents (0: all) through the VAE at a time."""
        vae = self.pipe.vae
        if self.is_flux:
            latents = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        parts = (part.to(vae.device, vae.dtype) for part in latents.split(batch or len(latents)))
        pictures = [vae.decode(part, return_dict=False)[0].float() for part in parts]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
