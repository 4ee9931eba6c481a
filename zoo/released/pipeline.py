"""A released text-to-image flow as a velocity: v(x, t, prompt) over latents, prompt by its index.

Flow is a pipeline of diffusers and what this project asks of it; a family (sd3.py, flux.py) says
how its latents lie, what its transformer is given and what guidance means. Given a pipeline's own
sigmas, initial noise, prompts and guidance, pave_grpo.ode_sample on such a velocity gives the
latents of the pipeline itself, to float32 rounding (tests/released/test_flows.py). Text encoders,
VAE and schedulers are diffusers'; nothing is loaded twice.
"""

from __future__ import annotations

import copy
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pave_grpo import Velocity


class Texts(NamedTuple):
    """What the transformer is told of N prompts: tokens [N, L, D] and pooled [N, D']."""

    tokens: Tensor
    pooled: Tensor

    def pick(self, rows: Tensor) -> Texts:
        """Texts of the prompts rows [B], where they lie."""
        return Texts(self.tokens[rows], self.pooled[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Texts:
        """All of them on a device, in a dtype (None: as they are); themselves if they are there."""
        return Texts(self.tokens.to(device, dtype), self.pooled.to(device, dtype))


class Near:
    """Texts as a velocity asks for them: moved by the first call, and not again."""

    def __init__(self, texts: Texts, dtype: torch.dtype):
        self.texts = texts
        self.dtype = dtype

    def at(self, device: torch.device) -> Texts:
        """All of them, on a device."""
        self.texts = self.texts.to(device, self.dtype)
        return self.texts


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Within, diffusers and transformers report errors only.

    They would print whole prompts, which `cut_off` names in a line. With `bars`, diffusers counts
    the parts it loads.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

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


# The matrices of a block that attends to picture and words jointly, as diffusers names them.
JOINT_BLOCK = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


@dataclass(frozen=True)
class Flow(ABC):
    """A pipeline, and what this project asks of it. What is abstract is the family's to say."""

    # Of the family.
    name: ClassVar[str]  # begins the names of run folders
    preset: ClassVar[str]  # the authors' setting, as train.py's --preset calls it
    default_guidance: ClassVar[float]  # of train.py's --guidance
    pipeline_class: ClassVar[str]  # diffusers' names
    transformer_class: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]]  # the pipeline's components
    tokenizers: ClassVar[tuple[str, ...]]
    reads: ClassVar[dict[str, int]]  # tokens of a tokenizer's that are read, where not its maximum
    lora_targets: ClassVar[tuple[str, ...]]  # ends of the names of matrices that get adapters

    # Of the instance.
    pipe: Any  # the pipeline, a diffusers.DiffusionPipeline
    dtype: torch.dtype = torch.float32  # of computation, whatever the weights are kept in
    autocast: bool = False  # some weights are kept in another dtype: torch.autocast casts them

    @property
    def transformer(self) -> Any:
        """The velocity network, a module of `transformer_class`, whose parameters are theta."""
        return self.pipe.transformer

    # ---- Sizes -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latent positions that one side of a token covers."""

    @property
    def max_patches(self) -> int | None:
        """Tokens along a side that the network has positions for; None: any number."""
        return None

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Latent positions (h, w) of a picture: its sides over the VAE's reduction.

        Raises ValueError for sides that do not divide into tokens or are too long.
        """
        reduction = self.pipe.vae_scale_factor
        unit = reduction * self.patch
        longest = unit * self.max_patches if self.max_patches else None
        fit = min(height, width) > 0 and height % unit == 0 and width % unit == 0
        if not fit or (longest and max(height, width) > longest):
            up_to = f" up to {longest}" if longest else ""
            raise ValueError(
                f"size {height} x {width}: both must be positive multiples of {unit}{up_to}"
            )
        return height // reduction, width // reduction

    @abstractmethod
    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent of a picture, without the batch. ValueError as `sides`."""

    # ---- Prompts -----------------------------------------------------------------------------

    @abstractmethod
    def encode_batch(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and pooled of these prompts, on the device of the encoders."""

    @quiet()
    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 8, bars: bool = False) -> Texts:
        """Texts of the prompts on the CPU, `batch` at a time. Encode once, then `drop_encoders`."""
        device = self.pipe.text_encoder.device
        starts = range(0, len(prompts), batch)
        tokens, pooled = [], []
        for start in tqdm(starts, "encoding prompts", leave=False, disable=not bars):
            parts = self.encode_batch(list(prompts[start : start + batch]), device)
            tokens.append(parts[0].cpu())
            pooled.append(parts[1].cpu())
        return Texts(torch.cat(tokens), torch.cat(pooled))

    def encode_empty(self, guidance: float) -> Texts | None:
        """Texts of the empty prompt, one row, where this guidance takes it; else None."""
        return self.encode([""]) if self.splits(guidance) else None

    @quiet()
    def cut_off(self, prompts: Sequence[str]) -> list[str]:
        """A line for every prompt of which a text encoder reads the beginning only."""
        lines = []
        for name in self.tokenizers:
            tokenizer = getattr(self.pipe, name)
            if tokenizer is None:  # the pipeline was saved without this encoder
                continue
            limit = self.reads.get(name, tokenizer.model_max_length)
            reads = f"of which {type(tokenizer).__name__} reads {limit}"
            for prompt, tokens in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
                if len(tokens) > limit:
                    start = textwrap.shorten(prompt, 60)
                    lines.append(f"prompt {start!r} has {len(tokens)} tokens, {reads}")
        return list(dict.fromkeys(lines))  # two encoders may say the same

    def move_encoders(self, device: torch.device) -> None:
        """Move the text encoders, to encode there."""
        for name in self.encoders:
            if getattr(self.pipe, name) is not None:
                getattr(self.pipe, name).to(device)

    def drop_encoders(self) -> None:
        """Forget the text encoders, which nothing needs once prompts are encoded."""
        for name in self.encoders:
            setattr(self.pipe, name, None)

    # ---- Time --------------------------------------------------------------------------------

    @abstractmethod
    def timesteps(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """What the pipeline asks of its scheduler for this many steps at this size."""

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid at this size: float64 [steps + 1], from the first sigma to 0."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(**self.timesteps(steps, height, width))
        return scheduler.sigmas.double()

    def dynamic_shift(self, height: int, width: int, max_shift: float) -> float:
        """mu, by which a scheduler shifts its grid: linear in the number of a picture's tokens.

        max_shift is the pipeline's default where the scheduler's configuration names none.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        h, w = self.sides(height, width)
        config = self.pipe.scheduler.config
        return calculate_shift(
            (h // self.patch) * (w // self.patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", max_shift),
        )

    # ---- Velocity ----------------------------------------------------------------------------

    @abstractmethod
    def splits(self, guidance: float) -> bool:
        """Whether a velocity takes two evaluations a row, with the prompt and without.

        Raises ValueError for a guidance that the model cannot take.
        """

    @property
    @abstractmethod
    def single_guidance(self) -> float:
        """A usual guidance that takes one evaluation a row."""

    def velocity(
        self,
        texts: Texts,
        height: int,
        width: int,
        guidance: float,
        empty: Texts | None = None,
        network: nn.Module | None = None,
    ) -> Velocity:
        """v(x, t, prompt) of latents x in float32, row b told texts[prompt[b]].

        texts      of the prompts, wherever they lie; the first call moves them all to x's device
        empty      `encode_empty` of this guidance
        network    another transformer of the same class, such as a reference; None: the pipeline's
        The network computes in `dtype`. Raises ValueError where these do not fit together.
        """
        if self.splits(guidance) != (empty is not None):
            raise ValueError(
                f"guidance={guidance}: texts of the empty prompt must be given where a velocity "
                f"takes two evaluations a row, and only there"
            )
        sides = self.sides(height, width)
        near = Near(texts, self.dtype)
        near_empty = None if empty is None else Near(empty, self.dtype)
        return self.make_velocity(network or self.transformer, near, sides, guidance, near_empty)

    @abstractmethod
    def make_velocity(
        self,
        network: nn.Module,
        texts: Near,
        sides: tuple[int, int],
        guidance: float,
        empty: Near | None,
    ) -> Velocity:
        """`velocity` of arguments that fit together, for latents of these sides."""

    def evaluate(self, network: nn.Module, x: Tensor, texts: Texts, **inputs: Any) -> Tensor:
        """The network's output in float32, for B latents x and B texts; it computes in `dtype`."""
        casting = torch.autocast(x.device.type, self.dtype) if self.autocast else nullcontext()
        with casting:
            output = network(
                hidden_states=x.to(self.dtype),
                encoder_hidden_states=texts.tokens,
                pooled_projections=texts.pooled,
                return_dict=False,
                **inputs,
            )
            return output[0].float()

    # ---- Pictures ----------------------------------------------------------------------------

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The latents as the VAE takes them, [B, C, h, w]."""
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, batch: int = 4) -> Tensor:
        """Pictures float32 [B, 3, height, width] in [0, 1], by `batch` latents (0: all) a call."""
        vae = self.pipe.vae
        latents = self.unpack(latents, height, width)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        pictures = []
        for part in latents.split(batch or len(latents)):
            decoded = vae.decode(part.to(vae.device, vae.dtype), return_dict=False)[0]
            pictures.append(decoded.float())
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
