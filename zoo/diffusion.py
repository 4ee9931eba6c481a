"""Released text-to-image flows, SD3 and FLUX, as velocities: v(x, t, c) over latents, c the index of a prompt.

    _class_name in model_index.json   latent x, float32              the transformer gets
    StableDiffusion3Pipeline          [B, C, h, w]                   1000 t; guidance by a second, empty-prompt half
    FluxPipeline                      [B, h w / 4, 4 C], packed 2x2  t; guidance as an input, where the model takes it

h and w are the picture's sides over the VAE's reduction. Given a pipeline's own sigmas, initial noise, prompts and
guidance, pave_grpo.ode_sample on such a velocity gives the latents of the pipeline itself, to float32 rounding (tests/
test_diffusion.py). Loading, text encoders, VAE and schedulers are diffusers'; nothing is loaded twice.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from pave_grpo import Velocity

FAMILIES = ("StableDiffusion3Pipeline", "FluxPipeline")


class Texts(NamedTuple):
    """What the transformer is told of each prompt: tokens [N, L, D], pooled [N, D'], on the CPU; N prompts."""

    tokens: Tensor
    pooled: Tensor


def family_of(path: str) -> str | None:
    """The `_class_name` of a pipeline folder; None for what is no folder (a hub id: known after loading)."""
    index = Path(path) / "model_index.json"
    if not Path(path).is_dir():
        return None
    if not index.is_file():
        raise ValueError(f"model {path!r}: has no model_index.json; must be a diffusers pipeline folder or a hub id")
    return json.loads(index.read_text()).get("_class_name")


def load(path: str, dtype: torch.dtype = torch.float32, revision: str | None = None) -> Flow:
    """The pipeline of a folder or hub id as a Flow, its modules in `dtype`, in evaluation mode, frozen, on the CPU.

    Raises ValueError for a pipeline of another family, before its weights are read where it is a folder.
    """
    family = family_of(path)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"model {path!r} is a {family}; must be one of {', '.join(FAMILIES)}")
    try:
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, revision=revision, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"model {path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if type(pipe).__name__ not in FAMILIES:
        raise ValueError(f"model {path!r} is a {type(pipe).__name__}; must be one of {', '.join(FAMILIES)}")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return Flow(pipe)


@dataclass(frozen=True)
class Flow:
    """A pipeline, and what this project asks of it."""

    pipe: StableDiffusion3Pipeline | FluxPipeline

    @property
    def is_flux(self) -> bool:
        return isinstance(self.pipe, FluxPipeline)

    @property
    def transformer(self) -> torch.nn.Module:
        """The velocity network, whose parameters are theta."""
        return self.pipe.transformer

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent of a picture, without the batch. Raises ValueError for sides that do not divide."""
        reduction = self.pipe.vae_scale_factor
        unit = reduction * (2 if self.is_flux else self.transformer.config.patch_size)
        if min(height, width) <= 0 or height % unit or width % unit:
            raise ValueError(f"size {height} x {width}: both must be positive multiples of {unit}")
        h, w, channels = height // reduction, width // reduction, self.transformer.config.in_channels
        return (h * w // 4, channels) if self.is_flux else (channels, h, w)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 8) -> Texts:
        """Texts of the prompts, `batch` at a time. Encode once, then `drop_encoders`."""
        parts = []
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            if self.is_flux:
                tokens, pooled, _ = self.pipe.encode_prompt(some, None)
            else:
                tokens, _, pooled, _ = self.pipe.encode_prompt(some, None, None, do_classifier_free_guidance=False)
            parts.append((tokens.cpu(), pooled.cpu()))
        return Texts(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def drop_encoders(self) -> None:
        """Forget the text encoders, which nothing needs once prompts are encoded."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid of `steps` steps at this size, float64 [steps + 1], from the first sigma to 0."""
        scheduler, config = copy.deepcopy(self.pipe.scheduler), self.pipe.scheduler.config
        shape, options = self.shape(height, width), {}
        if config.get("use_dynamic_shifting") or self.is_flux:
            patch = 1 if self.is_flux else self.transformer.config.patch_size
            tokens = shape[0] if self.is_flux else (shape[1] // patch) * (shape[2] // patch)
            options["mu"] = calculate_shift(tokens, config.get("base_image_seq_len", 256),
                                            config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5),
                                            config.get("max_shift", 1.15 if self.is_flux else 1.16))
        if self.is_flux and not config.get("use_flow_sigmas"):
            scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).double().numpy(), **options)
        else:
            scheduler.set_timesteps(steps, **options)
        return scheduler.sigmas.double()

    def velocity(self, texts: Texts, height: int, width: int, guidance: float, empty: Texts | None = None) -> Velocity:
        """v(x, t, c) of latents x in float32, rows of prompts texts[c]; the network computes in its own dtype.

        guidance       SD3: v = v_empty + guidance (v_text - v_empty) where above 1, in one batch of both halves; FLUX:
                       the model's guidance input, which a model without one must be given as 0
        empty          SD3 with guidance above 1: the Texts of the negative prompt, one row
        Raises ValueError where they do not fit together.
        """
        network, config = self.transformer, self.transformer.config
        split = not self.is_flux and guidance > 1
        if split != (empty is not None):
            raise ValueError(f"guidance={guidance}: the negative prompt must be given exactly for SD3 above 1")
        if self.is_flux and (guidance > 0) != bool(config.guidance_embeds):
            raise ValueError(f"guidance={guidance}: this FLUX model {'takes' if config.guidance_embeds else 'has no'} "
                             f"guidance; must be {'above 0' if config.guidance_embeds else '0'}")
        self.shape(height, width)
        rows = height // self.pipe.vae_scale_factor // 2, width // self.pipe.vae_scale_factor // 2

        def told(part: Tensor, c: Tensor, x: Tensor) -> Tensor:
            return part[c.to(part.device)].to(x.device, network.dtype)

        def sd3(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            """Latents [B, C, h, w]; the network counts time to 1000."""
            tokens, pooled = (told(part, c, x) for part in texts)
            if split:
                nothing = torch.zeros_like(c)
                tokens, pooled = (torch.cat([told(e, nothing, x), part]) for e, part in zip(empty, (tokens, pooled)))
                x, t = x.repeat(2, 1, 1, 1), t.repeat(2)
            v = network(hidden_states=x.to(network.dtype), timestep=1000 * t, encoder_hidden_states=tokens,
                        pooled_projections=pooled, return_dict=False)[0].float()
            if split:
                without, with_text = v.chunk(2)
                v = without + guidance * (with_text - without)
            return v

        def flux(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            """Packed latents [B, h w / 4, 4 C]; each token says its row and column, words say zero."""
            tokens, pooled = (told(part, c, x) for part in texts)
            at = torch.arange(rows[0], device=x.device), torch.arange(rows[1], device=x.device)
            y, z = torch.meshgrid(*at, indexing="ij")
            places = torch.stack([torch.zeros_like(y), y, z], -1).flatten(0, 1).to(network.dtype)
            words = torch.zeros(tokens.shape[1], 3, device=x.device, dtype=network.dtype)
            how = torch.full((len(x),), guidance, device=x.device) if config.guidance_embeds else None
            return network(hidden_states=x.to(network.dtype), timestep=t, guidance=how, pooled_projections=pooled,
                           encoder_hidden_states=tokens, txt_ids=words, img_ids=places, return_dict=False)[0].float()

        return flux if self.is_flux else sd3

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, batch: int = 4) -> Tensor:
        """Pictures float32 [B, 3, height, width] in [0, 1], `batch` latents through the VAE at a time."""
        vae = self.pipe.vae
        if self.is_flux:
            latents = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        parts = (part.to(vae.device, vae.dtype) for part in latents.split(batch))
        pictures = [vae.decode(part, return_dict=False)[0].float() for part in parts]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
