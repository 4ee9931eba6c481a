"""What training SD3.5 Medium or FLUX.1 would hold on a card, computed: nothing is allocated.

    python -m zoo.released.footprint sd3                         adapters, on each card its own
    python -m zoo.released.footprint flux --tune full --ranks 8  every weight, sharded

The network of the public configuration runs on torch's device "meta", whose tensors have shapes and
no numbers. Counted is what its graph keeps for the backward pass, under autocast to bfloat16 as in
training: norms in float32, products of bfloat16 copies. An attention keeps what a fused kernel
would: queries, keys, values, results, and a float32 number per query and head. The loss of S holds
the graphs of 1 + sum (k - 1) evaluations of each state at once. Besides, a block is computed or
recomputed at a time. Left out: text encoders, which are gone by then, the VAE, reward models, and
what a CUDA context and fragments take, for which --reserve keeps some room.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

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
        """Of q, k, v [B, heads, tokens, d]: a tensor like q."""
        result = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Tensors like q, k and v."""
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """In the place of torch's: no mask, no dropout, as these networks call it."""
    assert options.get("attn_mask") is None and not options.get("dropout_p"), options
    inputs = [part.to(torch.bfloat16) for part in (query, key, value)]
    return Attention.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product as autocast takes it: of bfloat16 copies, where these are other tensors."""
    return PLAIN["linear"](x.to(torch.bfloat16), weight, bias)


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """A norm as autocast takes it: in float32."""
    own = [None if w is None else w.float() for w in (weight, bias)]
    return PLAIN["layer_norm"](x.float(), shape, *own, eps)


def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The same of a norm without a mean."""
    own = None if weight is None else weight.float()
    return PLAIN["rms_norm"](x.float(), shape, own, eps)


AS_TRAINED: dict[str, Callable[..., Tensor]] = {
    "scaled_dot_product_attention": attention,
    "linear": linear,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
PLAIN: dict[str, Callable[..., Tensor]] = {name: getattr(functional, name) for name in AS_TRAINED}


@contextmanager
def as_trained() -> Iterator[None]:
    """Within, torch's functions keep what they keep on a GPU under autocast."""
    for name, function in AS_TRAINED.items():
        setattr(functional, name, function)
    try:
        yield
    finally:
        for name, function in PLAIN.items():
            setattr(functional, name, function)


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
        """Note a tensor that is kept, by its memory: several may share it."""
        storage = x.untyped_storage()._cdata
        if storage not in weights:
            held[storage] = x
        return x

    def back(x: Tensor) -> Tensor:
        """What was kept, for the backward pass."""
        return x

    with as_trained(), torch.autograd.graph.saved_tensors_hooks(keep, back):
        call(network, size, rows)
    return sum(x.untyped_storage().nbytes() for x in held.values())


class Footprint(NamedTuple):
    """Bytes on one rank."""

    fixed: float  # weights, masters, gradients and moments
    copies: float  # of trained weights, that an evaluation keeps beside its graph
    plain: float  # the graph of one evaluation of one state
    checkpointed: float  # the same with checkpointing
    block: float  # the mean share of one block in `plain`

    def update(self, states: int, factors: Sequence[int], checkpointing: bool) -> float:
        """Held at the peak of a backward pass of so many states."""
        evaluations = 1 + sum(k - 1 for k in factors)
        graph = self.checkpointed if checkpointing else self.plain
        held = self.fixed + states * evaluations * graph
        if checkpointing:  # copies are gone before a block is computed again
            return held + max(self.copies, states * self.block)
        return held + evaluations * self.copies + states * self.block

    def most(self, room: float, factors: Sequence[int], checkpointing: bool) -> int:
        """The most states that a pass takes in so much memory; 0: none fits."""
        states = 0
        while self.update(states + 1, factors, checkpointing) <= room:
            states += 1
        return states


def footprint(
    family: str, tune: str, size: tuple[int, int], ranks: int = 1, real: bool = True
) -> Footprint:
    """Of one rank among several, which share what is trained where all of it is.

    A trained weight has float32 numbers of itself, its gradient and two moments. Autocast copies
    trained weights for every evaluation. Where these are sharded there is no such copy: a rank has
    two blocks' weights gathered, and of one the gradient, as it was computed and as it is sent.
    """
    network = network_of(family, tune, real)
    weights = sum(p.numel() for p in network.parameters())
    tuned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [sum(p.numel() for p in block.parameters()) for child in lists for block in child]
    plain = kept(network, size)
    network.enable_gradient_checkpointing()
    checkpointed = kept(network, size)
    fixed = 16 * tuned / ranks + 2 * (weights - tuned)
    copies = 2 * tuned
    if ranks > 1:
        fixed += (2 * 2 + 2 + 4) * max(blocks)
        copies = 0
    return Footprint(fixed, copies, plain, checkpointed, plain / len(blocks))


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


def refuse(message: str) -> NoReturn:
    """End with one line, and status 2."""
    sys.stderr.write(f"footprint: error: {message}\n")
    sys.exit(2)


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
    most = 16 * SD3["pos_embed_max_size"][1] if o.family == "sd3" else math.inf
    if min(height, width) < 16 or height % 16 or width % 16 or max(height, width) > most:
        up_to = f", {most} at most" if o.family == "sd3" else ""
        refuse(f"--size {height} {width}: must be positive multiples of 16{up_to}")
    if o.ranks < 1 or (o.ranks > 1 and o.tune == "lora"):
        refuse(f"--ranks {o.ranks}: must be 1, or more with --tune full")
    if not 0 <= o.reserve < min(CARDS):
        refuse(f"--reserve {o.reserve}: must be at least 0 and below {min(CARDS)}")
    found = footprint(o.family, o.tune, (height, width), o.ranks)
    print(
        f"{o.family}, {o.tune}, {height} x {width}, bfloat16, on "
        f"{o.ranks} rank{'s' * (o.ranks > 1)}; computed"
    )
    print("\n".join(table(found, o.reserve)))


if __name__ == "__main__":
    main()
