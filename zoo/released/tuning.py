"""What of a released flow is trained, what it is measured against, and what is saved.

    tune   trained                                  reference policy            saved, for plain diffusers
    lora   W x + (alpha / rank) B A x on the        the same transformer with   pipeline.load_lora_weights(folder),
           matrices of the transformer's blocks     its adapters off            alpha included
    full   every weight of the transformer          a frozen copy               Transformer.from_pretrained(folder)

Masters (weights that an optimiser moves) are float32 whatever the model computes in: an update of 1e-4 of a weight is
below bfloat16's rounding. On several ranks `full` is sharded by FSDP2: each rank keeps its slice of every weight,
gradient and moment, and a block's weights are gathered, in the dtype of computation, only while it runs. LoRA is
replicated, with B at zero at the start: the first policy is the released model. Defaults are the authors' LoRA setting
(rank 64, alpha 128). torch, peft and diffusers do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from zoo.released.pipeline import Flow

TARGETS = (
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
    "proj_mlp",
    "proj_out",
)  # inside the blocks; not the output layer of the same name


# ---- LoRA --------------------------------------------------------------------------------------------------------


def matrices(network: nn.Module, targets: Sequence[str] = TARGETS) -> dict[str, nn.Linear]:
    """The matrices of the transformer's blocks whose names end in one of `targets`. ValueError if there is none."""
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and "blocks." in name
        and name.endswith(tuple(f".{target}" for target in targets))
    }
    if not found:
        raise ValueError(f"targets={list(targets)}: name no matrix of the transformer's blocks")
    return found


def add_lora(
    flow: Flow, rank: int = 64, alpha: float = 128, targets: Sequence[str] = TARGETS, seed: int = 0
) -> list[nn.Parameter]:
    """Put adapters on the blocks' matrices that end in one of `targets`; returns what is to be trained.

    A ~ uniform as in peft, drawn from `seed`; B = 0. Raises ValueError for a rank below 1, an alpha not above 0, or
    targets that name no matrix.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank}, alpha={alpha}: must be 1 or more, and above 0")
    names = list(matrices(flow.transformer, targets))
    with torch.random.fork_rng(devices=[]):  # peft's initialiser knows only the global generator
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
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(flow.transformer),
        safe_serialization=True,
        transformer_lora_adapter_metadata={
            **config,
            "target_modules": sorted(config["target_modules"]),
        },
    )


# ---- Full fine-tuning ----------------------------------------------------------------------------------------------


def shard(network: nn.Module, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """FSDP2 over the mesh, block by block: weights gathered in `dtype`, gradients averaged over ranks in float32.

    The root is resharded after a forward too: left gathered, as is the default, it would keep the weights of before an
    EMA swap. Inputs are not cast: times stay float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = [
        block for child in network.children() if isinstance(child, nn.ModuleList) for block in child
    ]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def copied(
    plain: type[nn.Module], config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> nn.Module:
    """A module of diffusers' class `plain` with these weights, each cast by itself, on the CPU, frozen."""
    with torch.device("meta"):
        network = plain.from_config(config)
    network.load_state_dict(
        {name: w.detach().to("cpu", dtype, copy=True) for name, w in weights.items()}, assign=True
    )
    return network.eval().requires_grad_(False)


def save_full(
    network: nn.Module, plain: type[nn.Module], folder: str | Path, dtype: torch.dtype, main: bool
) -> None:
    """Write the transformer, an instance of diffusers' class `plain`, in `dtype`. Every rank calls; `main` writes."""
    weights = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if main:
        copied(plain, network.config, weights, dtype).save_pretrained(
            str(folder), safe_serialization=True
        )
