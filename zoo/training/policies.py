"""What train.py aligns, behind one interface: the embedded model, or a released SD3 or FLUX.

    member                        meaning
    name, shape                   of the run's folder; of one state x
    sizes                         counts of weights, known before any is read
    grid(steps)                   times of the sampler, float64 [steps + 1]
    kind(prompt)                  a family of prompts to report apart, or ""
    load(prompts, device, rank, world)  read the weights, encode these prompts: nothing else can be asked for later
    cut_off                       after loading: lines about prompts that an encoder does not read to their end
    network, tuned, sharded       after loading: the module, what an optimiser moves, whether FSDP2 averages gradients
    velocity(prompts)             v(x, t, c), row c of prompts[c]; reference_velocity(prompts): of the initial policy
    decode(x)                     states -> pictures [B, 3, H, W] in [0, 1], on x's device
    save(folder, main)            every rank calls, `main` writes; says where

Constructors look at configurations only and raise ValueError, in one line, for what does not fit together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import pave_grpo as pave
from zoo.shapes import model as shapes_model
from zoo.shapes import world as shapes


class Sizes(NamedTuple):
    """Counts of the velocity network, and bytes of memory on one rank."""

    weights: int  # of the network
    tuned: int  # numbers the optimiser moves
    rows: int  # network rows of one velocity evaluation: 2 with classifier-free guidance
    frozen: int  # bytes a rank holds of weights that are not trained, the reference's included
    masters: int  # bytes a rank holds of those that are; gradients and averages take as many again, Adam twice


# ---- The embedded model ----------------------------------------------------------------------------------------


class Embedded:
    """The model of coloured shapes. tune: 'transformer' leaves the layers at pixel resolution alone; or 'full'."""

    name, shape, sharded, cut_off = "shapes", (3, shapes.SIZE, shapes.SIZE), False, ()

    def __init__(
        self,
        checkpoint: str | Path = shapes_model.CHECKPOINT,
        tune: str = "transformer",
        shift: float = 1.0,
        reference: bool = False,
    ):
        self.network, self.shift = shapes_model.load(checkpoint), shift
        for name, p in self.network.named_parameters():
            p.requires_grad_(tune == "full" or name.split(".")[0] not in shapes_model.PIXEL_LAYERS)
        self.reference = copy.deepcopy(self.network).requires_grad_(False) if reference else None
        self.tuned = [p for p in self.network.parameters() if p.requires_grad]
        weights, tuned = (
            sum(p.numel() for p in z) for z in (self.network.parameters(), self.tuned)
        )
        self.sizes = Sizes(
            weights, tuned, 1, 4 * (weights - tuned + weights * reference), 4 * tuned
        )

    def grid(self, steps: int) -> Tensor:
        return pave.schedule(steps, self.shift)

    def kind(self, prompt: str) -> str:
        return shapes.parse(prompt).family if prompt in shapes.PROMPTS else ""

    def load(
        self, prompts: Sequence[str], device: torch.device, rank: int = 0, world: int = 1
    ) -> Embedded:
        """Move to the device; prompts are words, which need no encoder."""
        self.network.to(device)
        if self.reference:
            self.reference.to(device)
        return self

    def velocity(self, prompts: Sequence[str], network: nn.Module | None = None) -> pave.Velocity:
        network = network or self.network
        tokens = shapes_model.tokenize(list(prompts)).to(next(network.parameters()).device)
        return lambda x, t, c: network(x, t, tokens[c])

    def reference_velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        return self.velocity(prompts, self.reference)

    def decode(self, x: Tensor) -> Tensor:
        return shapes_model.to_images(x)

    def save(self, folder: Path, main: bool) -> str:
        if main:
            shapes_model.save(self.network, folder / "checkpoint.safetensors", dtype=torch.float32)
        return "checkpoint.safetensors"


# ---- SD3 and FLUX ----------------------------------------------------------------------------------------------


class Released:
    """A pipeline of diffusers (zoo/released/pipeline.py), tuned by 'lora' or 'full' (zoo/released/tuning.py).

    dtype is that of computation; what is trained is float32. sigmas: 'shifted', the grid of `shift`, or 'pipeline', its
    scheduler's own. With `reference` a full run keeps a frozen copy; adapters need none, they are switched off.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        *,
        size: Sequence[int] = (512, 512),
        guidance: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        sigmas: str = "shifted",
        shift: float = 3.0,
        tune: str = "lora",
        rank: int = 64,
        alpha: float = 128.0,
        seed: int = 0,
        checkpointing: bool = False,
        reference: bool = False,
        decode_batch: int = 4,
        world: int = 1,
    ):
        from zoo.released import pipeline as diffusion  # diffusers takes seconds to import
        from zoo.released import tuning

        self.path, self.revision, self.size, self.guidance, self.dtype = (
            path,
            revision,
            tuple(size),
            guidance,
            dtype,
        )
        self.sigmas, self.shift, self.tune, self.rank, self.alpha, self.seed = (
            sigmas,
            shift,
            tune,
            rank,
            alpha,
            seed,
        )
        self.checkpointing, self.with_reference, self.decode_batch = (
            checkpointing,
            reference,
            decode_batch,
        )
        self.sharded = tune == "full" and world > 1
        self.flow = diffusion.outline(path, revision)
        self.name = "flux" if self.flow.is_flux else "sd3"
        self.shape = self.flow.shape(*self.size)
        weights, tuned = sum(p.numel() for p in self.flow.transformer.parameters()), 0
        if tune == "lora":
            tuned = sum(
                rank * (m.in_features + m.out_features)
                for m in tuning.matrices(self.flow.transformer).values()
            )
        share = world if self.sharded else 1
        frozen = (weights if tune == "lora" or reference else 0) * dtype.itemsize // share
        self.sizes = Sizes(
            weights,
            tuned or weights,
            2 if self.flow.splits(guidance) else 1,
            frozen,
            4 * (tuned or weights) // share,
        )

    def grid(self, steps: int) -> Tensor:
        return (
            pave.schedule(steps, self.shift)
            if self.sigmas == "shifted"
            else self.flow.sigmas(steps, *self.size)
        )

    def kind(self, prompt: str) -> str:
        return ""

    def load(
        self, prompts: Sequence[str], device: torch.device, rank: int = 0, world: int = 1
    ) -> Released:
        """Encode the prompts on the device, forget the encoders, then move the transformer and the VAE there."""
        from zoo.released import pipeline as diffusion
        from zoo.released import tuning

        masters = torch.float32 if self.tune == "full" else self.dtype
        self.flow = diffusion.load(self.path, self.dtype, self.revision, masters, bars=rank == 0)
        self.cut_off = self.flow.cut_off(list(prompts))
        self.flow.move_encoders(device)
        self.row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.texts = self.flow.encode(list(self.row), bars=rank == 0)
        empty = self.flow.encode([""]) if self.flow.splits(self.guidance) else None
        self.empty = empty and type(empty)(*(part.to(device) for part in empty))
        self.flow.drop_encoders()
        self.flow.pipe.vae.to(device)
        network = self.network = self.flow.transformer
        self.device, self.plain, self.reference = device, type(network), None
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        if self.tune == "lora":
            network.to(device)
            # Adapters are float32: without autocast, so would be every product with them.
            self.flow = dataclasses.replace(self.flow, autocast=self.dtype != torch.float32)
            self.tuned = tuning.add_lora(self.flow, self.rank, self.alpha, seed=self.seed)
            return self
        if self.with_reference:
            self.reference = tuning.copied(
                self.plain, network.config, network.state_dict(), self.dtype
            )
        network.requires_grad_(True)
        mesh = init_device_mesh(device.type, (world,)) if self.sharded else None
        for module in filter(None, (network, self.reference)):
            if mesh:
                tuning.shard(module, self.dtype, mesh)
            module.to(device)
        self.tuned = list(network.parameters())
        return self

    def velocity(self, prompts: Sequence[str], network: nn.Module | None = None) -> pave.Velocity:
        """Each call moves its prompts' texts to the device once."""
        rows = torch.tensor([self.row[prompt] for prompt in prompts])
        texts = type(self.texts)(*(part[rows].to(self.device) for part in self.texts))
        return self.flow.velocity(texts, *self.size, self.guidance, self.empty, network)

    def reference_velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        """Of the frozen copy, or with the adapters off."""
        if self.reference is not None:
            return self.velocity(prompts, self.reference)
        from zoo.released import tuning

        velocity = self.velocity(prompts)

        def released(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            with tuning.reference(self.flow):
                return velocity(x, t, c)

        return released

    def decode(self, x: Tensor) -> Tensor:
        return self.flow.decode(x, *self.size, self.decode_batch)

    def save(self, folder: Path, main: bool) -> str:
        """Into lora/, float32, or transformer/, in the dtype of computation."""
        from zoo.released import tuning

        if self.tune == "lora":
            if main:
                tuning.save_lora(self.flow, folder / "lora")
            return "lora"
        tuning.save_full(self.network, self.plain, folder / "transformer", self.dtype, main)
        return "transformer"


# ---- Averages --------------------------------------------------------------------------------------------------


class EMA:
    """theta_ema <- decay theta_ema + (1 - decay) theta, from theta_ema = theta; sharded as theta is."""

    def __init__(self, tuned: Sequence[nn.Parameter], decay: float):
        self.tuned, self.decay = list(tuned), decay
        self.average = [p.detach().clone() for p in self.tuned]

    @torch.no_grad()
    def update(self) -> None:
        """Once after every optimiser step."""
        for average, p in zip(self.average, self.tuned, strict=True):
            average.mul_(self.decay).add_(p, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the average's weights: they change places, so no further memory is taken."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, one tensor at a time."""
        for average, p in zip(self.average, self.tuned, strict=True):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)
