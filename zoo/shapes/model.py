"""The embedded model: a flow-matching text-to-image transformer small enough to live in the repository.

    x_t = (1 - t) x_0 + t x_1      t in [0, 1], t = 1 is noise x_1 ~ N(0, I), t = 0 is data x_0 in [-1, 1]
    v   = dx/dt = x_1 - x_0        what `ShapesFlow` returns; x is [B, 3, 32, 32]

The network predicts the clean picture, and the velocity follows: v = (x - x0_hat) / max(t, 0.05). A picture
of flat shapes is an easier target than noise for 0.60 M parameters, and the floor keeps v finite at t = 0.

It is a single-stream diffusion transformer: prompt tokens and 4 x 4 patches in one sequence, adaptive layer
norms with one linear map shared by all blocks. Convolutions give it what patches and words lack at this size:
a 3 x 3 stem, in each MLP a depthwise 3 x 3 over patches and a depthwise 3 along the words, a convolutional head
at full resolution that sees the stem. Normalisation is per token: rows of a batch do not see each other. There
is no dropout, and no state.

Why not a diffusers class: a pixel-space SD3Transformer2DModel of 2 M parameters, given such pictures and
seven minutes of two CPU cores, drew barely any prompt right.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import (
    gelu,
    layer_norm,
    pixel_shuffle,
    rms_norm,
    scaled_dot_product_attention,
)

from zoo.shapes.world import SIZE

CHECKPOINT = Path(__file__).with_name("shapes.safetensors")
FORMAT = "pave-grpo/shapes/1"
T_FLOOR = 0.05
PIXEL_LAYERS = (
    "stem",
    "patches",
    "pixels",
    "head",
)  # modules between pixels and tokens; the rest is the transformer

WORDS = (
    "",
    "a",
    "two",
    "three",
    "red",
    "green",
    "blue",
    "yellow",
    "circle",
    "square",
    "triangle",
    "circles",
    "squares",
    "triangles",
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
)  # number 0, "", pads
LENGTH = 8  # words of the longest prompt


def tokenize(prompts: list[str]) -> Tensor:
    """Prompts as word numbers, int64 [B, LENGTH], padded with 0; "" is the empty prompt, for guidance."""
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
    """The decoder: states to pictures in [0, 1], (x + 1) / 2 clamped, since samples overshoot the data."""
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


def _waves(position: Tensor, width: int, longest: float) -> Tensor:
    """Sines and cosines of a coordinate [...], wavelengths from 2 pi to 2 pi `longest`: [..., width]."""
    k = torch.arange(width // 2, dtype=position.dtype, device=position.device)
    angle = position[..., None] * torch.exp(-math.log(longest) * k / (width // 2 - 1))
    return torch.cat([angle.sin(), angle.cos()], -1)


class Block(nn.Module):
    """h <- h + gate Attention(norm h); h <- h + gate MLP(norm h), on tokens [B, LENGTH + side^2, width]."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.side = c.heads, SIZE // c.patch
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.sharpness = nn.Parameter(torch.full((c.heads, 1, 1), 3.0))
        self.up = nn.Linear(c.width, 4 * c.width)
        self.along = nn.Conv1d(4 * c.width, 4 * c.width, 3, padding=1, groups=4 * c.width)
        self.near = nn.Conv2d(4 * c.width, 4 * c.width, 3, padding=1, groups=4 * c.width)
        self.down = nn.Linear(4 * c.width, c.width)
        # This block's own term of the modulation: shift, scale and gate of each branch; the gates start open.
        self.modulation = nn.Parameter(
            torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, c.width)
        )
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)  # both branches start (all but) closed

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over words and patches together, [B, N, width] -> [B, N, width]."""
        q, k, v = (
            self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, heads, N, d]
        q, k = (rms_norm(z, z.shape[-1:]) for z in (q, k))  # bounded logits: stable at a high rate,
        q = self.sharpness * q  # but sharp enough to pick one word
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        """down gelu(z + depthwise z), z = up h, over patches in their grid and words in their order; as attend."""
        h = self.up(h)
        words, patches = h.split([LENGTH, self.side**2], 1)
        grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = patches + self.near(grid).flatten(2).transpose(1, 2)
        words = words + self.along(words.transpose(1, 2)).transpose(
            1, 2
        )  # "red" meets "circle" in one layer
        return self.down(gelu(torch.cat([words, patches], 1)))

    def forward(self, h: Tensor, shared: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self.modulation)[
            :, :, None
        ].unbind(1)
        h = h + gate1 * self.attend(layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2)


class ShapesFlow(nn.Module):
    """The velocity field v(x, t, prompt)."""

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = c = config or Config()
        side = SIZE // c.patch
        self.words = nn.Embedding(len(WORDS), c.width)
        self.order = nn.Parameter(0.5 * torch.randn(LENGTH, c.width))
        self.stem = nn.Conv2d(3, c.stem, 3, padding=1)
        self.patches = nn.Conv2d(c.stem, c.width, c.patch, stride=c.patch)
        self.time = nn.Sequential(
            nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width), nn.SiLU()
        )
        self.modulation = nn.Linear(c.width, 6 * c.width)  # shared by all blocks
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.pixels = nn.Linear(c.width, c.head * c.patch**2)
        self.head = nn.Sequential(
            nn.Conv2d(c.head + c.stem, c.stem, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(c.stem, 3, 3, padding=1),
        )
        nn.init.normal_(self.words.weight, std=0.5)
        for last in (self.modulation, self.head[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        at = _waves(
            torch.arange(side, dtype=torch.float32), c.width // 2, 100.0
        )  # [side, width / 2]
        row, column = at[:, None].expand(-1, side, -1), at[None].expand(side, -1, -1)
        self.register_buffer("place", torch.cat([row, column], -1).flatten(0, 1), persistent=False)

    def clean(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """x0_hat, the predicted clean picture [B, 3, SIZE, SIZE]; arguments as for `forward`."""
        c = self.config
        shared = self.modulation(self.time(_waves(100 * t, c.width, 1e3))).unflatten(
            1, (6, c.width)
        )
        fine = gelu(self.stem(x))
        patches = self.patches(fine).flatten(2).transpose(1, 2) + self.place
        h = torch.cat([self.words(tokens) + self.order, patches], 1)
        for block in self.blocks:
            h = block(h, shared)
        h = layer_norm(h[:, LENGTH:], (c.width,))
        coarse = self.pixels(h).transpose(1, 2).unflatten(2, (SIZE // c.patch, SIZE // c.patch))
        return self.head(torch.cat([pixel_shuffle(coarse, c.patch), fine], 1))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """v [B, 3, SIZE, SIZE] at state x (alike), time t in [0, 1] (0-d or [B]) and tokens [B, LENGTH]."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        return (x - self.clean(x, t, tokens)) / t.clamp(min=T_FLOOR).view(-1, 1, 1, 1)


def save(
    model: ShapesFlow,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the weights and the config. float16 halves the file, at no loss that the rule can see; a training
    run keeps float32, since a small update may be below the rounding of float16."""
    weights = {
        name: w.detach().to("cpu", dtype).contiguous() for name, w in model.state_dict().items()
    }
    own = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    save_file(weights, path, metadata={**(metadata or {}), **own})


def load(path: str | Path = CHECKPOINT, device: str | torch.device = "cpu") -> ShapesFlow:
    """The model of a checkpoint that `save` wrote: float32, evaluation mode, on `device`."""
    if not Path(path).is_file():
        how = "; to make it, run: python -m zoo.shapes.pretrain" if Path(path) == CHECKPOINT else ""
        raise ValueError(f"path {str(path)!r} is no file{how}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path {str(path)!r} is no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path {str(path)!r} has format {metadata.get('format')!r}; it must be {FORMAT!r}"
        )
    try:
        model = ShapesFlow(Config(**json.loads(metadata["config"])))
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"path {str(path)!r} does not hold this model ({str(error).splitlines()[0]})"
        ) from None
    return model.to(device).eval()
