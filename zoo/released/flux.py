"""FLUX.1. Latents [B, h w / 4, 4 C], packed 2 x 2; guidance is an input, if the model has one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pave_grpo import Velocity
from zoo.released.pipeline import JOINT_BLOCK, Flow, Near


class Flux(Flow):
    """A FluxPipeline: dev, whose network takes guidance as an input, or schnell, without it."""

    name = "flux"
    preset = "paper-flux"
    default_guidance = 3.5  # a schnell needs --guidance 0
    pipeline_class = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    reads: ClassVar[dict[str, int]] = {"tokenizer_2": 512}  # what encode_prompt asks of T5
    lora_targets = (*JOINT_BLOCK, "proj_mlp", "proj_out")  # of the single blocks
    patch = 2  # the pipeline packs; its network's own patch_size is 1

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network."""
        return bool(self.transformer.config.guidance_embeds)

    @property
    def single_guidance(self) -> float:
        """The authors' 3.5, or 0 without a guidance input."""
        return self.default_guidance if self.embeds_guidance else 0.0

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(h w / 4, 4 C)."""
        h, w = self.sides(height, width)
        return h * w // 4, self.transformer.config.in_channels

    def encode_batch(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device)
        return tokens, pooled

    def timesteps(self, steps: int, height: int, width: int) -> dict[str, Any]:
        mu = self.dynamic_shift(height, width, max_shift=1.15)
        if self.pipe.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": torch.linspace(1, 1 / steps, steps).double().numpy(), "mu": mu}

    def splits(self, guidance: float) -> bool:
        """Never: with a guidance input it must be above 0, without one 0."""
        if not 0 <= guidance < math.inf or (guidance > 0) != self.embeds_guidance:
            takes = "above 0: this FLUX model takes guidance"
            has_none = "0: this FLUX model has no guidance input"
            raise ValueError(
                f"guidance={guidance}: must be {takes if self.embeds_guidance else has_none}"
            )
        return False

    def make_velocity(
        self,
        network: nn.Module,
        texts: Near,
        sides: tuple[int, int],
        guidance: float,
        empty: Near | None,
    ) -> Velocity:
        """One evaluation: each token says its row and column, words say zero.

        The network rounds the time it is given to the dtype it computes in: diffusers' choice.
        """
        rows, columns = sides[0] // 2, sides[1] // 2

        def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            told = texts.at(x.device).pick(prompt)
            at = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
            row, column = torch.meshgrid(*at, indexing="ij")
            places = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
            strength = torch.full((len(x),), guidance, device=x.device)
            words = torch.zeros(told.tokens.shape[1], 3, device=x.device, dtype=self.dtype)
            return self.evaluate(
                network,
                x,
                told,
                timestep=t,
                guidance=strength if self.embeds_guidance else None,
                img_ids=places.to(self.dtype),
                txt_ids=words,
            )

        return velocity

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
