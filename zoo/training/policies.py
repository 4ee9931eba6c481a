"""What train.py aligns: the embedded model, or a released SD3 or FLUX, behind one interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import get_ema_multi_avg_fn

import pave_grpo as pave
from zoo.released import families, tuning
from zoo.shapes import model as shapes_model
from zoo.shapes.world import PROMPTS, SIZE, parse


class Sizes(NamedTuple):
    """Counts of the velocity network, and bytes of memory on one rank."""

    weights: int  # of the network
    tuned: int  # numbers the optimiser moves
    rows: int  # network rows of one velocity evaluation: 2 with classifier-free guidance
    frozen: int  # bytes of the weights that are not trained, the reference's included
    masters: int  # bytes of those that are; gradients and averages take as many again, Adam twice
    gathered: int = 0  # bytes of all weights as they are held while sampling, where they are


class Policy(Protocol):
    """A velocity network that can be sampled, tuned, and saved.

    Constructors look at configurations only, and raise ValueError, in one line, for what does not
    fit together.
    """

    name: str  # begins the names of run folders
    shape: tuple[int, ...]  # of one state x
    sizes: Sizes
    sharded: bool  # over the ranks by FSDP2, which then averages gradients itself

    # After `load`.
    network: nn.Module
    tuned: list[nn.Parameter]  # what an optimiser moves
    cut_off: list[str]  # a line for every prompt that an encoder does not read to its end

    def grid(self, steps: int) -> Tensor:
        """Times of the sampler, float64 [steps + 1]."""
        ...

    def kind(self, prompt: str) -> str:
        """The family of prompts to report this one under, or ""."""
        ...

    def load(
        self, prompts: Sequence[str], device: torch.device, rank: int = 0, world: int = 1
    ) -> Policy:
        """Read the weights and encode these prompts; no others can be asked for. Returns itself."""
        ...

    def velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        """v(x, t, prompt) with prompt an index into these prompts."""
        ...

    def reference_velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        """The same of the policy that training began from; only where `reference` was asked for."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context to sample in, without gradients or changes of weights. Every rank enters."""
        return nullcontext()

    def decode(self, x: Tensor) -> Tensor:
        """States [B, *shape] -> pictures [B, 3, H, W] in [0, 1], on x's device."""
        ...

    def save(self, folder: Path, main: bool) -> str:
        """Write the network into the folder and say where. Every rank calls; `main` writes."""
        ...


# ---- The embedded model --------------------------------------------------------------------------


class Embedded(Policy):
    """The model of coloured shapes.

    tune: 'transformer' leaves the layers at pixel resolution alone; or 'full'. `reference` keeps a
    frozen copy for the KL.
    """

    name = "shapes"
    shape = (3, SIZE, SIZE)
    sharded = False

    def __init__(
        self,
        checkpoint: str | Path = shapes_model.CHECKPOINT,
        tune: str = "transformer",
        shift: float = 1.0,
        reference: bool = False,
    ):
        self.network = shapes_model.load(checkpoint)
        self.shift = shift
        self.cut_off = []
        for name, p in self.network.named_parameters():
            p.requires_grad_(tune == "full" or name.split(".")[0] not in shapes_model.PIXEL_LAYERS)
        self.reference = copy.deepcopy(self.network).requires_grad_(False) if reference else None
        self.tuned = [p for p in self.network.parameters() if p.requires_grad]
        weights = sum(p.numel() for p in self.network.parameters())
        tuned = sum(p.numel() for p in self.tuned)
        frozen = weights - tuned + (weights if reference else 0)
        self.sizes = Sizes(weights, tuned, rows=1, frozen=4 * frozen, masters=4 * tuned)

    def grid(self, steps: int) -> Tensor:
        return pave.schedule(steps, self.shift)

    def kind(self, prompt: str) -> str:
        return parse(prompt).family if prompt in PROMPTS else ""

    def load(
        self, prompts: Sequence[str], device: torch.device, rank: int = 0, world: int = 1
    ) -> Embedded:
        """Move to the device; prompts are words, which need no encoder."""
        self.network.to(device)
        if self.reference is not None:
            self.reference.to(device)
        return self

    def velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        return self.velocity_of(self.network, prompts)

    def reference_velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        assert self.reference is not None, "this policy keeps no reference"
        return self.velocity_of(self.reference, prompts)

    def velocity_of(self, network: nn.Module, prompts: Sequence[str]) -> pave.Velocity:
        """The velocity of the model, or of its reference."""
        device = next(network.parameters()).device
        tokens = shapes_model.tokenize(list(prompts)).to(device, non_blocking=True)

        def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            return network(x, t, tokens[prompt])

        return velocity

    def decode(self, x: Tensor) -> Tensor:
        return shapes_model.to_images(x)

    def save(self, folder: Path, main: bool) -> str:
        if main:
            shapes_model.save(self.network, folder / "checkpoint.safetensors", dtype=torch.float32)
        return "checkpoint.safetensors"


# ---- SD3 and FLUX --------------------------------------------------------------------------------


@dataclass(eq=False)
class Released(Policy):
    """A pipeline of diffusers (zoo/released/pipeline.py), tuned by zoo/released/tuning.py."""

    path: str  # folder or hub id
    revision: str | None = None
    _: KW_ONLY
    size: Sequence[int] = (512, 512)  # height and width of pictures
    guidance: float = 0.0
    dtype: torch.dtype = torch.bfloat16  # of computation; what is trained is float32
    sigmas: str = "shifted"  # the grid of `shift`; or "pipeline", its scheduler's own
    shift: float = 3.0
    tune: str = "lora"  # or "full"
    rank: int = 64  # of the adapters
    alpha: float = 128.0  # their scaling is alpha / rank
    seed: int = 0  # of the adapters
    checkpointing: bool = False  # blocks are computed again in the backward pass
    reference: bool = False  # full: keep a frozen copy; adapters need none, they are switched off
    decode_batch: int = 4  # states per call of the VAE, 0: all
    gather_rollouts: bool = False  # sharded: all weights are gathered once to sample
    world: int = 1  # ranks that will share the work

    def __post_init__(self) -> None:
        self.flow = families.outline(self.path, self.revision)
        self.name = self.flow.name
        self.height, self.width = self.size
        self.shape = self.flow.shape(self.height, self.width)
        self.sharded = self.tune == "full" and self.world > 1
        self.sizes = self.measured()

    def measured(self) -> Sizes:
        """Sizes, from the outline."""
        lora = self.tune == "lora"
        weights = sum(p.numel() for p in self.flow.transformer.parameters())
        tuned = tuning.lora_size(self.flow, self.rank) if lora else weights
        rows = 2 if self.flow.splits(self.guidance) else 1
        frozen = weights if lora or self.reference else 0
        share = self.world if self.sharded else 1
        size = self.dtype.itemsize
        return Sizes(
            weights,
            tuned,
            rows,
            frozen=frozen * size // share,
            masters=4 * tuned // share,
            gathered=weights * size if self.gather_rollouts else 0,
        )

    def grid(self, steps: int) -> Tensor:
        if self.sigmas == "pipeline":
            return self.flow.sigmas(steps, self.height, self.width)
        return pave.schedule(steps, self.shift)

    def kind(self, prompt: str) -> str:
        return ""

    def load(
        self, prompts: Sequence[str], device: torch.device, rank: int = 0, world: int = 1
    ) -> Released:
        """Encode the prompts on the device, forget the encoders, move the rest there, and tune."""
        self.flow = families.load(
            self.path,
            self.dtype,
            self.revision,
            master=torch.float32 if self.tune == "full" else None,
            autocast=self.dtype != torch.float32,  # the masters', or the adapters', products too
            bars=rank == 0,
        )
        self.device = device
        self.encode(prompts, bars=rank == 0)
        self.flow.pipe.vae.to(device)
        self.network = self.flow.transformer
        if self.checkpointing:
            self.flow.transformer.enable_gradient_checkpointing()
        self.copy: nn.Module | None = None
        if self.tune == "lora":
            self.network.to(device)
            self.tuned = tuning.add_lora(self.flow, self.rank, self.alpha, self.seed)
        else:
            self.tune_all(world)
        return self

    def encode(self, prompts: Sequence[str], bars: bool) -> None:
        """Keep the texts of these prompts, on the CPU, and of the empty one where it is needed."""
        self.cut_off = self.flow.cut_off(prompts)
        self.flow.move_encoders(self.device)
        self.row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        # One by one: a text must not depend, by rounding, on which others a run will ask for.
        self.texts = self.flow.encode(list(self.row), batch=1, bars=bars)
        self.near: dict[str, int] = {}  # rows of `near_texts`, those of the prompts last asked for
        self.empty = self.flow.encode_empty(self.guidance)
        if self.empty is not None:
            self.empty = self.empty.to(self.device, self.dtype)
        self.flow.drop_encoders()

    def tune_all(self, world: int) -> None:
        """Train every weight, sharded where there are other ranks; the reference is a copy."""
        if self.reference:
            self.copy = tuning.frozen_copy(self.flow, self.network.state_dict())
        self.network.requires_grad_(True)
        mesh = init_device_mesh(self.device.type, (world,)) if self.sharded else None
        for module in (self.network, self.copy):
            if module is not None:
                if mesh is not None:
                    tuning.shard(module, self.dtype, mesh)
                module.to(self.device)
        self.tuned = list(self.network.parameters())

    def velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        return self.velocity_of(self.network, prompts)

    def reference_velocity(self, prompts: Sequence[str]) -> pave.Velocity:
        """Of the frozen copy, or with the adapters off."""
        if self.copy is not None:
            return self.velocity_of(self.copy, prompts)
        velocity = self.velocity(prompts)

        def released(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            with tuning.reference(self.flow):
                return velocity(x, t, prompt)

        return released

    def velocity_of(self, network: nn.Module, prompts: Sequence[str]) -> pave.Velocity:
        """The velocity of the model, or of its copy.

        Texts are moved to the device once for a rollout: they stay for velocities of some of its
        prompts, which tell rows of them and copy nothing.
        """
        if not self.near.keys() >= set(prompts):
            self.near = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
            needed = torch.tensor([self.row[prompt] for prompt in self.near])
            self.near_texts = self.texts.pick(needed).to(self.device, self.dtype)
        rows = torch.tensor([self.near[prompt] for prompt in prompts])
        rows = rows.to(self.device, non_blocking=True)
        velocity = self.flow.velocity(
            self.near_texts, self.height, self.width, self.guidance, self.empty, network
        )

        def of_rows(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            return velocity(x, t, rows[prompt])

        return of_rows

    def gathered(self) -> AbstractContextManager[None]:
        return tuning.gathered(self.network) if self.gather_rollouts else nullcontext()

    def decode(self, x: Tensor) -> Tensor:
        return self.flow.decode(x, self.height, self.width, self.decode_batch)

    def save(self, folder: Path, main: bool) -> str:
        """Into lora/, float32, or transformer/, in the dtype of computation."""
        if self.tune == "full":
            tuning.save_full(self.flow, folder / "transformer", main)
            return "transformer"
        if main:
            tuning.save_lora(self.flow, folder / "lora")
        return "lora"


# ---- Averages ------------------------------------------------------------------------------------


class EMA:
    """theta_ema <- decay theta_ema + (1 - decay) theta, beginning at theta; sharded as theta is.

    The recursion is torch's. Its AveragedModel is not used: it would copy the whole network, frozen
    weights too, and could not lend the average to the network in place.
    """

    def __init__(self, tuned: Sequence[nn.Parameter], decay: float):
        self.tuned = list(tuned)
        self.average = [p.detach().clone() for p in self.tuned]
        self.recursion = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Once after every optimiser step."""
        self.recursion(self.average, self.tuned, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the average's weights, and the average the network's."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, one tensor at a time: no further memory is taken."""
        for average, p in zip(self.average, self.tuned, strict=True):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)
