"""The embedded model: a flow-matching text-to-image transformer small enough for the repository.

    x_t = (1 - t) x_0 + t x_1      t in [0, 1]: t = 1 is noise x_1 ~ N(0, I), t = 0 is data x_0
    v   = dx/dt = x_1 - x_0        what `ShapesFlow` returns; x is [B, 3, 32, 32], data in [-1, 1]

The network predicts the clean picture, and the velocity follows: v = (x - x0_hat) / max(t, 0.05). A
picture of flat shapes is an easier target than noise for 0.60 M parameters, and the floor keeps v
finite at t = 0.

It is a single-stream diffusion transformer: the words of the prompt and patches of 4 x 4 pixels in
one sequence, adaptive layer norms with one linear map shared by all blocks. Convolutions give it
what patches and words lack at this size: a 3 x 3 stem; in each MLP a depthwise 3 x 3 over the
patches and a depthwise 3 along the words; a convolutional head at full resolution that sees the
stem. Normalisation is per token: rows of a batch do not see each other. There is no dropout, and no
state.

Why not a diffusers class: a pixel-space SD3Transformer2DModel of 2 M parameters, given such
pictures and seven minutes of two CPU cores, drew barely any prompt right.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import pave_grpo as pave
from zoo.shapes.world import SIZE

CHECKPOINT = Path(__file__).with_name("shapes.safetensors")
FORMAT = "pave-grpo/shapes/1"
T_FLOOR = 0.05
# Modules between pixels and tokens; the rest is the transformer.
PIXEL_LAYERS = ("stem", "patches", "pixels", "head")

# A word's number is its place; 0 pads. The weights know words by number: append, never reorder.
WORDS = (
    *("", "a", "two", "three", "red", "green", "blue", "yellow"),
    *("circle", "square", "triangle", "circles", "squares", "triangles"),
    *("and", "left", "right", "of", "above", "below"),
)
LENGTH = 8  # words of the longest prompt


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Prompts as word numbers, int64 [B, LENGTH], padded with 0; "" is the empty prompt.

    Raises ValueError for a word that is not in WORDS, and for more than LENGTH words.
    """
    rows = []
    for prompt in prompts:
        words = prompt.split()
        if len(words) > LENGTH or not set(words) <= set(WORDS):
            raise ValueError(
                f"prompt {prompt!r} must be up to {LENGTH} words from: {' '.join(WORDS[1:])}"
            )
        rows.append([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows, dtype=torch.long).view(-1, LENGTH)


def to_images(x: Tensor) -> Tensor:
    """States as pictures in [0, 1]: (x + 1) / 2, clamped since samples overshoot the data."""
    return ((x + 1) / 2).clamp(0, 1)


@dataclass(frozen=True)
class Config:
    """Sizes of the network: 0.60 M parameters as they stand."""

    width: int = 96
    depth: int = 4
    heads: int = 4
    patch: int = 4
    stem: int = 16  # channels of the stem
    head: int = 16  # channels of a token's pixels in the head

    @property
    def side(self) -> int:
        """Patches along a side of the picture."""
        return SIZE // self.patch


def _waves(position: Tensor, width: int, longest: float) -> Tensor:
    """Sines and cosines of a coordinate [...] at width / 2 wavelengths: [..., width].

    They are 2 pi to 2 pi `longest`, in geometric steps.
    """
    half = width // 2
    k = torch.arange(half, dtype=position.dtype, device=position.device)
    angle = position[..., None] * torch.exp(-math.log(longest) * k / (half - 1))
    return torch.cat([angle.sin(), angle.cos()], -1)


class Block(nn.Module):
    """h <- h + gate Attention(norm h); h <- h + gate MLP(norm h).

    Tokens h are [B, LENGTH + side^2, width]: words, then patches by rows.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.side = c.heads, c.side
        wide = 4 * c.width
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.sharpness = nn.Parameter(torch.full((c.heads, 1, 1), 3.0))
        self.up = nn.Linear(c.width, wide)
        self.along = nn.Conv1d(wide, wide, 3, padding=1, groups=wide)
        self.near = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.down = nn.Linear(wide, c.width)
        # This block's own term of the modulation: shift, scale, gate of each branch. Gates start
        # open, and branches closed, all but the bias of `down`.
        start = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        self.modulation = nn.Parameter(start[:, None].repeat(1, c.width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over words and patches together, [B, N, width] -> [B, N, width]."""
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        # Normalised, the logits are bounded, hence stable at a high learning rate; scaled up, they
        # are sharp enough to pick one word.
        q = self.sharpness * F.rms_norm(q, q.shape[-1:])
        k = F.rms_norm(k, k.shape[-1:])
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        """down gelu(z + depthwise z) with z = up h, [B, N, width] -> [B, N, width].

        The depthwise convolution goes over patches in their grid and over words in their order, so
        that "red" meets "circle" within one block.
        """
        words, patches = self.up(h).split([LENGTH, self.side**2], 1)
        grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = patches + self.near(grid).flatten(2).transpose(1, 2)
        words = words + self.along(words.transpose(1, 2)).transpose(1, 2)
        return self.down(F.gelu(torch.cat([words, patches], 1)))

    def forward(self, h: Tensor, shared: Tensor) -> Tensor:
        """The tokens after this block; shared [B, 6, width] is the modulation of all blocks."""
        modulation = (shared + self.modulation)[:, :, None]  # [B, 6, 1, width]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        h = h + gate1 * self.attend(F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2)


class ShapesFlow(nn.Module):
    """The velocity field v(x, t, prompt)."""

    place: Tensor

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = c = config or Config()
        self.words = nn.Embedding(len(WORDS), c.width)
        self.order = nn.Parameter(0.5 * torch.randn(LENGTH, c.width))
        self.stem = nn.Conv2d(3, c.stem, 3, padding=1)
        self.patches = nn.Conv2d(c.stem, c.width, c.patch, stride=c.patch)
        self.time = nn.Sequential(
            nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width), nn.SiLU()
        )
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.pixels = nn.Linear(c.width, c.head * c.patch**2)
        first = nn.Conv2d(c.head + c.stem, c.stem, 3, padding=1)
        last = nn.Conv2d(c.stem, 3, 3, padding=1)
        self.head = nn.Sequential(first, nn.GELU(), last)
        nn.init.normal_(self.words.weight, std=0.5)
        for parameter in (*self.modulation.parameters(), *last.parameters()):
            nn.init.zeros_(parameter)
        at = _waves(torch.arange(c.side, dtype=torch.float32), c.width // 2, 100.0)
        row = at[:, None].expand(-1, c.side, -1)  # [side, side, width / 2]
        column = at[None].expand(c.side, -1, -1)
        self.register_buffer("place", torch.cat([row, column], -1).flatten(0, 1), persistent=False)

    def clean(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """x0_hat, the predicted clean picture; as `forward`, but t must be [B], in x's dtype."""
        c = self.config
        waves = _waves(100 * t, c.width, 1e3)
        shared = self.modulation(self.time(waves)).unflatten(1, (6, c.width))
        fine = F.gelu(self.stem(x))  # [B, stem, SIZE, SIZE]
        words = self.words(tokens) + self.order
        patches = self.patches(fine).flatten(2).transpose(1, 2) + self.place
        h = torch.cat([words, patches], 1)
        for block in self.blocks:
            h = block(h, shared)
        h = F.layer_norm(h[:, LENGTH:], (c.width,))
        coarse = self.pixels(h).transpose(1, 2).unflatten(2, (c.side, c.side))
        return self.head(torch.cat([F.pixel_shuffle(coarse, c.patch), fine], 1))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """v = (x - x0_hat) / max(t, T_FLOOR), [B, 3, SIZE, SIZE] like the state x.

        t is in [0, 1], 0-d or [B]; tokens are int64 [B, LENGTH].
        """
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        return (x - self.clean(x, t, tokens)) / t.clamp(min=T_FLOOR).view(-1, 1, 1, 1)


def velocity_of(model: nn.Module, prompts: Sequence[str]) -> pave.Velocity:
    """The velocity(x, t, prompt) of pave_grpo, whose prompt i is prompts[i]; on the CPU."""
    tokens = tokenize(prompts)

    def velocity(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return model(x, t, tokens[prompt])

    return velocity


def save(
    model: ShapesFlow,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the weights in `dtype`, and the config, as safetensors.

    float16 halves the file at no loss that the rule can see. A training run keeps float32, since a
    small update may be below the rounding of float16.
    """
    weights = {
        name: w.detach().to("cpu", dtype).contiguous() for name, w in model.state_dict().items()
    }
    own = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    save_file(weights, path, metadata={**(metadata or {}), **own})


def load(path: str | Path = CHECKPOINT, device: str | torch.device = "cpu") -> ShapesFlow:
    """The model of a checkpoint that `save` wrote: float32, evaluation mode, on `device`.

    Raises ValueError, of one line, for a path that holds no such checkpoint.
    """
    at = f"path {str(path)!r}"
    if not os.path.isfile(path):
        how = "; to make it, run: python -m zoo.shapes.pretrain" if Path(path) == CHECKPOINT else ""
        raise ValueError(f"{at} is no file{how}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{at} is no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{at} has format {metadata.get('format')!r}; it must be {FORMAT!r}")
    try:
        model = ShapesFlow(Config(**json.loads(metadata["config"])))
        model.load_state_dict(weights)
    except Exception as error:  # of whatever the file says
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{at} does not hold this model ({said})") from None
    return model.to(device).eval()
