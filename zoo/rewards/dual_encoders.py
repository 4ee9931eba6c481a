"""Dual encoders as rewards: the cosine of a picture's and a prompt's features.

    name        model                                      score
    clip        CLIPModel, openai/clip-vit-large-patch14   exp(logit_scale) cosine(image, prompt)
    pickscore   CLIPModel, yuvalkirstain/PickScore_v1      the same
    hpsv2       HPSv2.1, an open_clip state dict           cosine(image, prompt), longest side 224
                                                           on black

All three are run by transformers' CLIPModel. Preprocessing is done in torch, on the model's device,
and repeats what PIL does to 8-bit pictures: bicubic, width first, rounded to 1/255 after each pass.
It differs from PIL's by up to 2/255; from Pillow 13 on, which begins with the height of tall
pictures, by up to 5/255 in those. Correctness is shown on random weights of the architecture
(tests/test_rewards.py); no score of a released checkpoint is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

CLIP, PICKSCORE, HPSV2 = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1", "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"
WORDS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the tokenizer of PickScore and HPSv2
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pictures
STD = (0.26862954, 0.26130258, 0.27577711)
VIT_H_14 = {  # HPSv2.1 and PickScore: ViT-H/14 at 224
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "patch_size": 14,
        "image_size": 224,
    },
}


# ---- Pictures ------------------------------------------------------------------------------------


def in_bytes(images: Tensor) -> Tensor:
    """Rounded to the 256 values of 8-bit pictures, still in [0, 1]."""
    return (255 * images).round() / 255


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing as PIL does it, [B, 3, height, width].

    Width, then height, each rounded to bytes.
    """
    for size in ((images.shape[2], width), (height, width)):
        if size != tuple(images.shape[2:]):
            images = interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = in_bytes(images.clamp(0, 1))
    return images


def half_down(excess: int) -> int:
    """Where CLIP's processor begins a square when `excess` pixels are left over."""
    return excess // 2


def shortest_side(images: Tensor, side: int, begin: Callable[[int], int] = half_down) -> Tensor:
    """Resized so that the shorter side is `side`, then the centre square, as CLIP's processor.

    Returns [B, 3, side, side]. `begin` says where the square begins, given the number of pixels
    left over: processors differ where it is odd.
    """
    H, W = images.shape[2:]
    height = side if H <= W else int(side * H / W)
    width = int(side * W / H) if H <= W else side
    images = resized(in_bytes(images.float()), height, width)
    top = begin(height - side)
    left = begin(width - side)
    return images[:, :, top : top + side, left : left + side]


def longest_side(images: Tensor, side: int) -> Tensor:
    """Resized so that the longer side is `side`, centred on black, as open_clip does for HPSv2.

    Returns [B, 3, side, side].
    """
    H, W = images.shape[2:]
    height = round(H * (side / max(H, W)))
    width = round(W * (side / max(H, W)))
    images = resized(in_bytes(images.float()), height, width)
    top = (side - height) // 2
    left = (side - width) // 2
    return pad(images, (left, side - width - left, top, side - height - top))


def standardised(images: Tensor) -> Tensor:
    """(images - MEAN) / STD by channel, for images [B, 3, H, W] in [0, 1]."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


# ---- Dual encoders -------------------------------------------------------------------------------


class DualEncoder:
    """cosine(image features, text features), times exp(logit_scale) if `scaled`."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Callable[[Tensor, int], Tensor],
        scaled: bool,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.prepare, self.scaled = tokenizer, prepare, scaled

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B]. Raises ValueError for a shape that is not the contract's."""
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(
                f"images of shape {tuple(images.shape)} and {len(prompts)} prompts: "
                "must be [B, 3, H, W], B prompts"
            )
        scale = self.model.logit_scale
        side = self.model.config.vision_config.image_size
        pixels = standardised(self.prepare(images.to(scale.device), side)).to(scale.dtype)
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(scale.device)
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(**words).pooler_output
        score = torch.cosine_similarity(image.float(), text.float(), dim=-1)
        return score * scale.float().exp() if self.scaled else score

    def to(self, device: str | torch.device) -> DualEncoder:
        """Move the model."""
        self.model.to(device)
        return self


def clip(place: str = "", revision: str | None = None) -> DualEncoder:
    """CLIP and its tokenizer from a folder or hub id, safetensors only."""
    place = place or CLIP
    model = CLIPModel.from_pretrained(place, revision=revision, use_safetensors=True)
    return DualEncoder(model, tokenizer_of(place, revision), shortest_side, scaled=True)


def pickscore(place: str = "", revision: str | None = None) -> DualEncoder:
    """PickScore, a CLIPModel, from a folder or hub id, safetensors only."""
    place = place or PICKSCORE
    own, words = revisions(revision)
    model = CLIPModel.from_pretrained(place, revision=own, use_safetensors=True)
    return DualEncoder(model, tokenizer_in(place, WORDS, words), shortest_side, scaled=True)


def hpsv2(place: str = "", revision: str | None = None) -> DualEncoder:
    """HPSv2.1 from the released state dict, as `released_file` finds it.

    Two differences from the authors' package: it mends odd characters in prompts first (ftfy, HTML
    entities), and it computes in half precision where there is a GPU.
    """
    own, words = revisions(revision)
    file = released_file(place or HPSV2, HPS_FILE, own)
    weights = from_open_clip(state_dict(file))  # before the model, which takes seconds to make
    model = CLIPModel(CLIPConfig(**VIT_H_14))
    model.load_state_dict(weights)
    tokenizer = tokenizer_in(file.parent, WORDS, words)
    return DualEncoder(model, tokenizer, longest_side, scaled=False)


# ---- Released files ------------------------------------------------------------------------------


def released_file(place: str, name: str, revision: str | None) -> Path:
    """The checkpoint at a place: a .pt or .safetensors file, the folder of `name`, or a hub id."""
    path = Path(place)
    if path.is_dir():
        path = path / name
    if path.exists() or path.is_absolute():
        return path
    return Path(hf_hub_download(place, name, revision=revision))


def revisions(text: str | None) -> tuple[str | None, str | None]:
    """MODEL@TOKENIZER as the revisions of the two repositories; either may be left out."""
    model, _, tokenizer = (text or "").partition("@")
    return model or None, tokenizer or None


def tokenizer_in(
    folder: str | Path, otherwise: str, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, if there is one; else that of the hub id."""
    if (Path(folder) / "tokenizer_config.json").is_file():
        return tokenizer_of(str(folder))
    return tokenizer_of(otherwise, revision)


def tokenizer_of(place: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Of a folder or hub id. Code that lies beside it is not run, and nobody is asked to."""
    return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)


def state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint; a pickle is read as weights alone, and runs no code."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


# open_clip's names and CLIPModel's: outside of layers, and within a layer.
OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # CLIPModel's spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = ("text_projection", "visual.proj")  # in open_clip
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
IN_PROJECTION = "attn.in_proj_"  # of query, key and value: one matrix, three in CLIPModel


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip ViT state dict under CLIPModel's names.

    Raises ValueError for a name that is none of its.
    """
    out = {}
    for name, w in weights.items():
        if name == "attn_mask":
            continue  # a buffer of older files: the causal mask
        if name in OUTSIDE:
            out[OUTSIDE[name]] = w.T.contiguous() if name in TRANSPOSED else w
            continue
        found = LAYER.fullmatch(name)
        visual, layer, part = found.groups() if found else ("", "", "")
        prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
        module, _, kind = part.rpartition(".")
        if part.startswith(IN_PROJECTION):
            kind = part.removeprefix(IN_PROJECTION)
            for letter, third in zip("qkv", w.chunk(3), strict=True):
                out[f"{prefix}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        elif module in INSIDE:
            out[f"{prefix}.{INSIDE[module]}.{kind}"] = w
        else:
            raise ValueError(f"weight {name!r}: is none of an open_clip ViT's")
    return out
