"""Dual encoders as rewards of pictures (zoo/rewards/spec.py): the cosine of a picture's and a prompt's features.

    name        model                                      score
    clip        CLIPModel, openai/clip-vit-large-patch14   exp(logit_scale) cosine(image, prompt)
    pickscore   CLIPModel, yuvalkirstain/PickScore_v1      the same
    hpsv2       HPSv2.1, an open_clip state dict           cosine(image, prompt), longest side 224 on black

All three are run by transformers' CLIPModel. Preprocessing is done in torch, on the model's device, and repeats what
PIL does to 8-bit pictures: bicubic, width first, rounded to 1/255 after each pass; it differs from PIL's by up to
2/255. Correctness is shown on random weights of the architecture (tests/test_rewards.py); no score of a released
checkpoint is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

CLIP, PICKSCORE, HPSV2 = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1", "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"
WORDS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the tokenizer of PickScore and HPSv2, where none lies beside them
MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP's pictures
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


# ---- Pictures ------------------------------------------------------------------------------------------------


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, [B, 3, height, width], as PIL does it: width, then height, each rounded to 1/255."""
    for size in ((images.shape[2], width), (height, width)):
        if size != tuple(images.shape[2:]):
            images = interpolate(
                images, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
            images = (255 * images).round() / 255
    return images


def shortest_side(
    images: Tensor, side: int, half: Callable[[int], int] = lambda d: d // 2
) -> Tensor:
    """Resized so that the shorter side is `side`, then the centre square: [B, 3, side, side], as CLIP's processor.

    half says where the square begins, d being what is left over: processors differ where d is odd.
    """
    H, W = images.shape[2:]
    height, width = (side, int(side * W / H)) if H <= W else (int(side * H / W), side)
    images = resized((255 * images.float()).round() / 255, height, width)
    top, left = half(height - side), half(width - side)
    return images[:, :, top : top + side, left : left + side]


def longest_side(images: Tensor, side: int) -> Tensor:
    """Resized so that the longer side is `side`, centred on black: [B, 3, side, side], as open_clip's for HPSv2."""
    H, W = images.shape[2:]
    height, width = (round(z * (side / max(H, W))) for z in (H, W))
    images = resized((255 * images.float()).round() / 255, height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return pad(images, (left, side - width - left, top, side - height - top))


# ---- Dual encoders ---------------------------------------------------------------------------------------------


class DualEncoder:
    """cosine(image features, text features), times exp(logit_scale) if `scaled`."""

    def __init__(
        self, model: CLIPModel, tokenizer, prepare: Callable[[Tensor, int], Tensor], scaled: bool
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.prepare, self.scaled = tokenizer, prepare, scaled

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B]. Raises ValueError for a shape that is not the contract's."""
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(
                f"images of shape {tuple(images.shape)} and {len(prompts)} prompts: must be [B, 3, H, "
                f"W], B prompts"
            )
        weight = self.model.logit_scale
        pixels = self.prepare(images.to(weight.device), self.model.config.vision_config.image_size)
        mean, std = (torch.tensor(z, device=weight.device).view(3, 1, 1) for z in (MEAN, STD))
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(weight.device)
        image = self.model.get_image_features(
            pixel_values=((pixels - mean) / std).to(weight.dtype)
        ).pooler_output
        text = self.model.get_text_features(**words).pooler_output
        score = torch.cosine_similarity(image.float(), text.float(), dim=-1)
        return score * weight.float().exp() if self.scaled else score

    def to(self, device: str | torch.device) -> DualEncoder:
        """Move the model."""
        self.model.to(device)
        return self


def shared_tokenizer(folder: str | Path):
    """The tokenizer in a local folder, if there is one; else the one that PickScore and HPSv2 share."""
    return AutoTokenizer.from_pretrained(
        str(folder) if (Path(folder) / "tokenizer_config.json").is_file() else WORDS
    )


def clip(place: str = "", revision: str | None = None) -> DualEncoder:
    """CLIP and its tokenizer from a folder or hub id, safetensors only."""
    place = place or CLIP
    model = CLIPModel.from_pretrained(place, revision=revision, use_safetensors=True)
    return DualEncoder(
        model, AutoTokenizer.from_pretrained(place, revision=revision), shortest_side, scaled=True
    )


def pickscore(place: str = "", revision: str | None = None) -> DualEncoder:
    """PickScore, a CLIPModel, from a folder or hub id, safetensors only."""
    place = place or PICKSCORE
    model = CLIPModel.from_pretrained(place, revision=revision, use_safetensors=True)
    return DualEncoder(model, shared_tokenizer(place), shortest_side, scaled=True)


def hpsv2(place: str = "", revision: str | None = None) -> DualEncoder:
    """HPSv2.1 from the released state dict: a hub id, or a .pt or .safetensors file or its folder, with a tokenizer.

    Two differences from the authors' package: it mends odd characters in prompts first (ftfy, HTML entities), and it
    computes in half precision where there is a GPU.
    """
    file = Path(place or HPSV2)
    file = file / HPS_FILE if file.is_dir() else file
    if not file.exists() and not file.is_absolute():
        file = Path(hf_hub_download(str(place or HPSV2), HPS_FILE, revision=revision))
    weights = from_open_clip(state_dict(str(file)))
    model = CLIPModel(CLIPConfig(**VIT_H_14))
    model.load_state_dict(weights)
    return DualEncoder(model, shared_tokenizer(file.parent), longest_side, scaled=False)


def state_dict(path: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint; a pickle is read as weights alone, and runs no code."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip ViT state dict under CLIPModel's names. Raises ValueError for a name that is none of its."""
    top = {
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
        **{
            f"visual.{a}.{z}": f"vision_model.{b}.{z}"
            for z in ("weight", "bias")
            for a, b in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        },
    }
    inside = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    out = {}
    for name, w in weights.items():
        if name == "attn_mask":
            continue  # a buffer of older files: the causal mask
        if name in top:
            out[top[name]] = w.T.contiguous() if name in ("text_projection", "visual.proj") else w
            continue
        tower, _, rest = name.rpartition("transformer.resblocks.")
        layer, _, part = rest.partition(".")
        prefix = f"{'vision' if tower == 'visual.' else 'text'}_model.encoder.layers.{layer}."
        module, _, kind = part.rpartition(".")
        if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, third in zip("qkv", w.chunk(3), strict=True):
                out[f"{prefix}self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = (
                    third.contiguous()
                )
        elif tower in ("", "visual.") and layer.isdigit() and module in inside:
            out[f"{prefix}{inside[module]}.{kind}"] = w
        else:
            raise ValueError(f"weight {name!r}: is none of an open_clip ViT's")
    return out
