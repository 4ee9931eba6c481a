"""LoRA on a released flow: what is trained, what it is measured against, and what is saved.

    adapters   W x + (alpha / rank) B A x on the attention and MLP matrices of the transformer's blocks; B starts at
               zero, so the first policy is the released model. float32 whatever the model computes in
    reference  the same transformer with its adapters off: pi_ref of the KL term, at no memory
    saved      plain diffusers: pipeline.load_lora_weights(folder) gives the same pictures, alpha included

Defaults are the authors' LoRA setting (rank 64, alpha 128). torch, peft and diffusers do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from zoo.diffusion import Flow

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
           "ff_context.net.2",
           "proj_mlp", "proj_out")  # inside the blocks; not the output layer of the same name


def add_lora(flow: Flow, rank: int = 64, alpha: float = 128, targets: Sequence[str] = TARGETS,
             seed: int = 0) -> list[nn.Parameter]:
    """Put adapters on the blocks' matrices that end in one of `targets`; returns what is to be trained.

    A ~ uniform as in peft, drawn from `seed`; B = 0. Raises ValueError for a rank below 1, an alpha not above 0, or
    targets that name no matrix.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank}, alpha={alpha}: must be 1 or more, and above 0")
    names = [name for name, module in flow.transformer.named_modules() if isinstance(module, nn.Linear)
             and "blocks." in name and name.endswith(tuple(f".{target}" for target in targets))]
    if not names:
        raise ValueError(f"targets={list(targets)}: name no matrix of the transformer's blocks")
    with torch.random.fork_rng():  # peft's initialiser knows only the global generator
        torch.manual_seed(seed)
        flow.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    tuned = [p for p in flow.transformer.parameters() if p.requires_grad]
    for p in tuned:
        p.data = p.data.float()
    return tuned


@contextmanager
def reference(flow: Flow) -> Iterator[None]:
    """Within, the transformer is the released one: its adapters are off."""
    flow.transformer.disable_adapters()
    try:
        yield
    finally:
        flow.transformer.enable_adapters()


def save_lora(flow: Flow, folder: str | Path) -> None:
    """Write the adapters for pipeline.load_lora_weights, with the metadata that keeps alpha / rank."""
    config = flow.transformer.peft_config["default"].to_dict()
    type(flow.pipe).save_lora_weights(
        str(folder), transformer_lora_layers=get_peft_model_state_dict(flow.transformer), safe_serialization=True,
        transformer_lora_adapter_metadata={**config, "target_modules": sorted(config["target_modules"])})
