"""What training SD3.5 Medium or FLUX.1 would hold on a card, computed: nothing is allocated.

    python -m zoo.released.footprint sd3                         adapters, on each card its own
    python -m zoo.released.footprint flux --tune full --ranks 8  every weight, sharded

The network of the public configuration runs on torch's device "meta", whose tensors have shapes and
no numbers, in bfloat16. Counted is what its graph keeps for the backward pass; an attention keeps
what a fused kernel would: queries, keys, values, results, and a float32 number per query and head.
The loss of S holds the graphs of 1 + sum (k - 1) evaluations of each state at once. Besides, a
block is computed or recomputed at a time. Left out: text encoders, which are gone by then, the VAE,
reward models, and what a CUDA context and fragments take, for which --reserve keeps some room.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from zoo.released.flux import Flux
from zoo.released.pipeline import quiet
from zoo.released.random_pipelines import FLUX, SD3, configuration, transformer
from zoo.released.sd3 import SD3 as StableDiffusion3
from zoo.released.tuning import matrices

GIB = 2**30
CARDS = (24, 48, 80)  # GB of cards, taken for GiB, as they are sold
FACTORS: tuple[tuple[int, ...], ...] = ((), (2, 3), (2, 3, 4, 5))
RANK = 64  # of the adapters


class Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """In the place of torch's: no mask, no dropout, as these networks call it."""
    assert options.get("attn_mask") is None and not options.get("dropout_p"), options
    return Attention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within, torch's attention is `attention`."""
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def network_of(family: str, tune: str, real: bool = True) -> Any:
    """The transformer on the device "meta" in bfloat16, with adapters or all of it trained."""
    cls, table = {
        "sd3": (SD3Transformer2DModel, SD3),
        "flux": (FluxTransformer2DModel, FLUX | {"guidance_embeds": (True, True)}),
    }[family]
    with torch.device("meta"), quiet(bars=False):
        network: Any = transformer(cls, configuration(table, real), torch.bfloat16)
        if tune == "lora":
            from peft import LoraConfig

            targets = {"sd3": StableDiffusion3, "flux": Flux}[family].lora_targets
            names = list(matrices(network, targets))
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=RANK, target_modules=names))
            network.to(torch.bfloat16)
    return network.train()


def call(network: nn.Module, size: tuple[int, int], rows: int = 1) -> Tensor:
    """The network's output for so many pictures, and 512 tokens of T5 besides those of CLIP."""
    config: Any = network.config
    device = next(network.parameters()).device
    h, w = size[0] // 8, size[1] // 8
    tokens = h * w // 4

    def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    inputs = {
        "encoder_hidden_states": of(rows, 512, config.joint_attention_dim),
        "pooled_projections": of(rows, config.pooled_projection_dim),
        "timestep": of(rows),
    }
    if isinstance(network, SD3Transformer2DModel):
        inputs["hidden_states"] = of(rows, config.in_channels, h, w)
    else:
        inputs["hidden_states"] = of(rows, tokens, config.in_channels)
        inputs["guidance"] = of(rows)
        inputs["img_ids"], inputs["txt_ids"] = of(tokens, 3), of(512, 3)
    result: Tensor = network(**inputs, return_dict=False)[0]
    return result


def kept(network: nn.Module, size: tuple[int, int], rows: int = 1) -> int:
    """Bytes of all tensors that the graph of one evaluation keeps, weights aside."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    held: dict[int, Tensor] = {}  # the tensors too: a storage that is freed may return

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()._cdata
        if storage not in weights:
            held[storage] = x
        return x

    def back(x: Tensor) -> Tensor:
        return x

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, back):
        call(network, size, rows)
    return sum(x.untyped_storage().nbytes() for x in held.values())


class Footprint(NamedTuple):
    """Bytes on one rank."""

    fixed: float  # weights, masters, gradients and moments
    plain: float  # the graph of one evaluation of one state
    checkpointed: float  # the same with checkpointing
    block: float  # of it, what the largest share of a block would be: their mean

    def update(self, states: int, factors: Sequence[int], checkpointing: bool) -> float:
        """Held at the peak of a backward pass of so many states."""
        evaluations = 1 + sum(k - 1 for k in factors)
        graph = self.checkpointed if checkpointing else self.plain
        return self.fixed + states * (evaluations * graph + self.block)

    def most(self, room: float, factors: Sequence[int], checkpointing: bool) -> int:
        """The most states that a pass takes in so much memory; 0: none fits."""
        one = self.update(1, factors, checkpointing) - self.fixed
        return max(0, math.floor((room - self.fixed) / one))


def footprint(
    family: str, tune: str, size: tuple[int, int], ranks: int = 1, real: bool = True
) -> Footprint:
    """Of one rank among several, which share what is trained where all of it is."""
    network = network_of(family, tune, real)
    weights = sum(p.numel() for p in network.parameters())
    tuned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    blocks = sum(len(child) for child in network.children() if isinstance(child, nn.ModuleList))
    plain = kept(network, size)
    network.enable_gradient_checkpointing()
    checkpointed = kept(network, size)
    of_masters = 16 * tuned  # float32: weight, gradient, two moments of Adam
    fixed: float = of_masters
    if tune == "lora":
        fixed += 2 * (weights - tuned)
    elif ranks == 1:
        fixed += 2 * weights  # autocast's copies
    else:
        fixed = of_masters / ranks + 2 * 2 * weights / blocks  # one block gathered, and the next
    return Footprint(fixed, plain, checkpointed, plain / blocks)


def table(found: Footprint, reserve: float) -> list[str]:
    """What is held, and what fits."""
    lines = [
        f"weights, gradients and moments {found.fixed / GIB:.1f} GiB",
        f"graph of an evaluation of a state {found.plain / GIB:.2f} GiB; with checkpointing "
        f"{found.checkpointed / GIB:.2f}, and {found.block / GIB:.2f} for a block",
        f"the most states a pass (--update-batch), {reserve:g} GiB of the card kept free:",
        "  S               checkpointing   " + "".join(f"{card:>5} GB" for card in CARDS),
    ]
    for factors in FACTORS:
        name = "{" + ", ".join(map(str, factors)) + "}"
        for checkpointing in (False, True):
            rooms = [(card - reserve) * GIB for card in CARDS]
            most = [found.most(room, factors, checkpointing) for room in rooms]
            words = "".join(f"{n or '-':>8}" for n in most)
            lines.append(f"  {name:<15} {'yes' if checkpointing else 'no':<16}{words}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a family."""
    parser = argparse.ArgumentParser(
        "python -m zoo.released.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", choices=("sd3", "flux"))
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar="PIXELS")
    parser.add_argument("--ranks", type=int, default=1, help="that share what is trained, if full")
    parser.add_argument("--reserve", type=float, default=6.0, help="GiB kept free", metavar="GIB")
    o = parser.parse_args(argv)
    height, width = o.size
    if min(height, width) < 16 or height % 16 or width % 16:
        parser.error(f"--size {height} {width}: must be positive multiples of 16")
    if o.ranks < 1 or (o.ranks > 1 and o.tune == "lora"):
        parser.error(f"--ranks {o.ranks}: must be 1, or more with --tune full")
    if not 0 <= o.reserve < min(CARDS):
        parser.error(f"--reserve {o.reserve}: must be at least 0 and below {min(CARDS)}")
    found = footprint(o.family, o.tune, (height, width), o.ranks)
    print(
        f"{o.family}, {o.tune}, {height} x {width}, bfloat16, on "
        f"{o.ranks} rank{'s' * (o.ranks > 1)}; computed"
    )
    print("\n".join(table(found, o.reserve)))


if __name__ == "__main__":
    main()
