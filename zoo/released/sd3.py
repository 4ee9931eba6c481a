"""SD3 and SD3.5. Latents [B, C, h, w]; guidance by a second evaluation, of the empty prompt."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pave_grpo import Velocity
from zoo.released.pipeline import JOINT_BLOCK, Flow, Near, Texts


class SD3(Flow):
    """A StableDiffusion3Pipeline, with T5 or without."""

    name = "sd3"
    preset = "paper-sd3"
    default_guidance = 4.5  # ours: the paper gives none for SD3
    pipeline_class = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    reads: ClassVar[dict[str, int]] = {"tokenizer_3": 256}  # what encode_prompt asks of T5
    lora_targets = JOINT_BLOCK
    single_guidance = 0.0

    @property
    def patch(self) -> int:
        return self.transformer.config.patch_size

    @property
    def max_patches(self) -> int:
        """The side of the table of positions."""
        return self.transformer.config.pos_embed_max_size

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self.transformer.config.in_channels, *self.sides(height, width))

    def encode_batch(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return tokens, pooled

    def timesteps(self, steps: int, height: int, width: int) -> dict[str, Any]:
        if self.pipe.scheduler.config.get("use_dynamic_shifting"):
            mu = self.dynamic_shift(height, width, max_shift=1.16)
            return {"num_inference_steps": steps, "mu": mu}
        return {"num_inference_steps": steps}

    def splits(self, guidance: float) -> bool:
        """Above 1; 0 and 1 are no guidance."""
        if not (guidance == 0 or 1 <= guidance < math.inf):
            raise ValueError(f"guidance={guidance}: must be above 1, or 0 for none")
        return guidance > 1

    def make_velocity(
        self,
        network: nn.Module,
        texts: Near,
        sides: tuple[int, int],
        guidance: float,
        empty: Near | None,
    ) -> Velocity:
        """v = v_empty + guidance (v_text - v_empty) above 1, both halves in one batch of 2 B rows.

        The network counts time to 1000.
        """

        def with_prompt(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            told = texts.at(x.device).pick(prompt)
            return self.evaluate(network, x, told, timestep=1000 * t)

        if empty is None:
            return with_prompt

        def guided(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            told = texts.at(x.device).pick(prompt)
            nothing = empty.at(x.device)
            tokens = torch.cat([nothing.tokens.expand_as(told.tokens), told.tokens])
            pooled = torch.cat([nothing.pooled.expand_as(told.pooled), told.pooled])
            x, t = x.repeat(2, 1, 1, 1), t.repeat(2)
            v = self.evaluate(network, x, Texts(tokens, pooled), timestep=1000 * t)
            v_empty, v_text = v.chunk(2)
            return v_empty + guidance * (v_text - v_empty)

        return guided
