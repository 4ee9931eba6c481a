"""ImageReward as a reward of pictures (zoo/rewards/spec.py): BLIP reads the prompt while looking at the picture.

    picture  shortest side 224, centre square -> ViT-L/16 -> tokens
    prompt   35 words at most -> BERT-base with cross-attention to those tokens -> first output
    score    (MLP(first output) - 0.16717) / 1.03334, the MLP being five linear maps with nothing between

transformers' BLIP runs it, from the released weights (THUDM/ImageReward, ImageReward.pt) through the key map below.
Correctness is shown on random weights of the architecture (tests/test_rewards.py); no score of the released checkpoint
is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from zoo.rewards.dual_encoders import MEAN, STD, shortest_side, state_dict

HUB, FILE, WORDS = "THUDM/ImageReward", "ImageReward.pt", "google-bert/bert-base-uncased"
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "encoder_hidden_size": 1024,
}
LONGEST = 35  # words
SCORE_MEAN, SCORE_STD = (
    0.16717362830052426,
    1.0333394966054072,
)  # of the released model's raw scores


class ImageReward(nn.Module):
    """Scores float32 [B] of images float [B, 3, H, W] in [0, 1] and B prompts."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
        widths = (TEXT["hidden_size"], 1024, 128, 64, 16, 1)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(MLP(BERT(words, cross-attention to ViT(pixels))[0]) - mean) / std, as in the module docstring."""
        device = self.mlp[0].weight.device
        mean, std = (torch.tensor(z, device=device).view(3, 1, 1) for z in (MEAN, STD))
        corner = lambda d: round(d / 2)  # torchvision's; CLIP's processor rounds down
        pixels = shortest_side(images.to(device), self.vision.config.image_size, corner)
        seen = self.vision(pixel_values=(pixels - mean) / std).last_hidden_state
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        ).to(device)
        read = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        )
        return (self.mlp(read.last_hidden_state[:, 0])[:, 0] - SCORE_MEAN) / SCORE_STD


def imagereward(place: str = "", revision: str | None = None) -> ImageReward:
    """ImageReward from the released .pt or a .safetensors file or its folder, perhaps with a tokenizer; or a hub id."""
    file = Path(place or HUB)
    file = file / FILE if file.is_dir() else file
    if not file.exists() and not file.is_absolute():
        file = Path(hf_hub_download(str(place or HUB), FILE, revision=revision))
    weights, own = (
        from_released(state_dict(str(file))),
        (file.parent / "tokenizer_config.json").is_file(),
    )
    model = ImageReward(AutoTokenizer.from_pretrained(str(file.parent) if own else WORDS))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def from_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released state dict under this class's names. Raises ValueError for a name that is none of its."""
    top = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
    }
    inside = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    linear = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}  # between them, dropouts
    out = {}
    for name, w in weights.items():
        module, _, kind = name.rpartition(".")
        if name.startswith(("blip.vision_proj.", "blip.text_proj.")) or name.endswith(
            ".position_ids"
        ):
            continue  # of pretraining; a buffer of older files
        part = module.removeprefix("blip.visual_encoder.")
        layer, _, rest = part.removeprefix("blocks.").partition(".")
        if name.removeprefix("blip.visual_encoder.") in top:
            out[f"vision.{top[name.removeprefix('blip.visual_encoder.')]}"] = w
        elif part != module and part in top:
            out[f"vision.{top[part]}.{kind}"] = w
        elif part != module and layer.isdigit() and rest in inside:
            out[f"vision.encoder.layers.{layer}.{inside[rest]}.{kind}"] = w
        elif name.startswith("blip.text_encoder."):
            out[f"text.{name.removeprefix('blip.text_encoder.')}"] = w
        elif module.removeprefix("mlp.layers.") in linear:
            out[f"mlp.{linear[module.removeprefix('mlp.layers.')]}.{kind}"] = w
        else:
            raise ValueError(f"weight {name!r}: is none of ImageReward's")
    return out
