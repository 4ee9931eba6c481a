"""What of a released flow is trained, what it is measured against, and what is saved.

    tune   trained                              reference policy       plain diffusers loads it by
    lora   W x + (alpha / rank) B A x, on the   the same transformer   pipeline.load_lora_weights(
           matrices of the blocks               with adapters off      folder), alpha included
    full   every weight of the transformer      a frozen copy          Transformer.from_pretrained(
                                                                       folder)

Masters, the weights that an optimiser moves, are float32 whatever the model computes in: an update
of 1e-4 of a weight is below bfloat16's rounding. On several ranks `full` is sharded by FSDP2: each
rank keeps its slice of every weight, gradient and moment, and a block's weights are gathered, in
the dtype of computation, only while it runs; within `gathered` all of them stay. LoRA is
replicated, with B at zero at the start: the first policy is the released model. torch, peft and
diffusers do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zoo.released.pipeline import Flow

# ---- LoRA ----------------------------------------------------------------------------------------


def matrices(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The matrices of the transformer's blocks whose names end in one of `targets`.

    Raises ValueError if there is none.
    """
    ends = tuple(f".{target}" for target in targets)
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name and name.endswith(ends)
    }
    if not found:
        raise ValueError(f"targets={list(targets)}: name no matrix of the transformer's blocks")
    return found


def lora_size(flow: Flow, rank: int) -> int:
    """Numbers in the adapters: rank rows of A and rank columns of B for each matrix."""
    adapted = matrices(flow.transformer, flow.lora_targets).values()
    return sum(rank * (matrix.in_features + matrix.out_features) for matrix in adapted)


def add_lora(flow: Flow, rank: int, alpha: float, seed: int = 0) -> list[nn.Parameter]:
    """Put adapters on the family's matrices; returns what is to be trained.

    A ~ uniform as in peft, drawn from `seed`; B = 0. Raises ValueError for a rank below 1 or an
    alpha not above 0.
    """
    from peft import LoraConfig

    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank}, alpha={alpha}: must be 1 or more, and above 0")
    names = list(matrices(flow.transformer, flow.lora_targets))
    with torch.random.fork_rng(devices=[]):  # peft's initialiser knows only the global generator
        torch.manual_seed(seed)
        flow.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    if flow.autocast:
        # It casts what a matrix is given; peft would first cast that to float32, for autocast to
        # cast it back. peft.helpers.disable_input_dtype_casting sets the same, but in a context,
        # which has ended when checkpointing computes a block again.
        for name in names:
            flow.transformer.get_submodule(name).cast_input_dtype_enabled = False
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


def save_lora(flow: Flow, folder: Path) -> None:
    """Write the adapters for pipeline.load_lora_weights, with the metadata that keeps alpha."""
    from peft.utils import get_peft_model_state_dict

    config = flow.transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    flow.pipe.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(flow.transformer),
        safe_serialization=True,
        transformer_lora_adapter_metadata=config,
    )


# ---- Full fine-tuning ----------------------------------------------------------------------------


def shard(network: nn.Module, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """FSDP2 over the mesh, block by block.

    Weights are gathered in `dtype`, gradients averaged over ranks in float32. Inputs are not cast:
    times stay float32. The root is resharded after a forward too: left gathered, as is the
    default, it would keep the weights of before an EMA swap.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Within, every rank has all weights of a network that `shard` cut, gathered once.

    For calls without gradients between two changes of the weights: they are those of the entry.
    Every rank enters. After it, and after an error, all are slices again. A network that is whole
    stays as it is.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            # In this order: one that an error stopped in its forward reshards as it was last told.
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def frozen_copy(flow: Flow, weights: Mapping[str, Any]) -> Any:
    """A transformer of the family with these weights in the flow's dtype, on the CPU, frozen.

    Each weight is cast by itself: no further float32 copy of the whole is made.
    """
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, flow.transformer_class).from_config(flow.transformer.config)
    cast = {name: w.detach().to("cpu", flow.dtype, copy=True) for name, w in weights.items()}
    network.load_state_dict(cast, assign=True)
    return network.eval().requires_grad_(False)


def save_full(flow: Flow, folder: Path, main: bool) -> None:
    """Write the transformer in the flow's dtype. Every rank calls; `main` writes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(flow.transformer, options=whole)
    if main:
        frozen_copy(flow, weights).save_pretrained(str(folder), safe_serialization=True)
