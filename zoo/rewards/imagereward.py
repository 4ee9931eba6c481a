"""ImageReward as a reward of pictures: BLIP reads the prompt while looking at the picture.

    picture  shortest side 224, centre square -> ViT-L/16 -> tokens
    prompt   35 words at most -> BERT-base with cross-attention to those tokens -> first output
    score    (MLP(first output) - 0.16717) / 1.03334, five linear maps with nothing between

transformers' BLIP runs it, from the released weights (THUDM/ImageReward, ImageReward.pt) through
the key map below. Correctness is shown on random weights of the architecture
(tests/test_rewards.py); no score of the released checkpoint is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from zoo.rewards.dual_encoders import (
    released_file,
    revisions,
    shortest_side,
    standardised,
    state_dict,
    tokenizer_in,
)

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
SCORE_MEAN = 0.16717362830052426  # of the released model's raw scores
SCORE_STD = 1.0333394966054072


def half_even(excess: int) -> int:
    """Where torchvision begins a square when `excess` pixels are left over; CLIP rounds down."""
    return round(excess / 2)


class ImageReward(nn.Module):
    """Scores float32 [B] of images float [B, 3, H, W] in [0, 1] and B prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
        widths = (TEXT["hidden_size"], 1024, 128, 64, 16, 1)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(MLP(BERT(words, cross-attention to ViT(pixels))[0]) - mean) / std."""
        device = next(self.mlp.parameters()).device
        side = self.vision.config.image_size
        pixels = standardised(shortest_side(images.to(device), side, half_even))
        seen = self.vision(pixel_values=pixels).last_hidden_state
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
        raw = self.mlp(read.last_hidden_state[:, 0])[:, 0]
        return (raw - SCORE_MEAN) / SCORE_STD


def imagereward(place: str = "", revision: str | None = None) -> ImageReward:
    """ImageReward from the released state dict, as `released_file` finds it."""
    own, words = revisions(revision)
    file = released_file(place or HUB, FILE, own)
    weights = from_released(state_dict(file))
    model = ImageReward(tokenizer_in(file.parent, WORDS, words))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


# ---- The released weights ------------------------------------------------------------------------

# Released names and this class's: outside of layers, and within a layer of the vision tower. The
# text tower's names agree. Between the linear maps of the released MLP are dropouts.
OUTSIDE = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.weight": "vision.embeddings.patch_embedding.weight",
    "blip.visual_encoder.patch_embed.proj.bias": "vision.embeddings.patch_embedding.bias",
    "blip.visual_encoder.norm.weight": "vision.post_layernorm.weight",
    "blip.visual_encoder.norm.bias": "vision.post_layernorm.bias",
}
INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LINEAR = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}
LAYER = re.compile(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)")
MLP = re.compile(r"mlp\.layers\.(\d)\.(weight|bias)")
TEXT_TOWER = "blip.text_encoder."
PRETRAINING = ("blip.vision_proj.", "blip.text_proj.")


def renamed(name: str) -> str:
    """A released weight's name in this class. Raises ValueError for a name that is none of its."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    if name.startswith(TEXT_TOWER):
        return f"text.{name.removeprefix(TEXT_TOWER)}"
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in INSIDE:
        return f"vision.encoder.layers.{layer[1]}.{INSIDE[layer[2]]}.{layer[3]}"
    linear = MLP.fullmatch(name)
    if linear and linear[1] in LINEAR:
        return f"mlp.{LINEAR[linear[1]]}.{linear[2]}"
    raise ValueError(f"weight {name!r}: is none of ImageReward's")


def from_released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released state dict under this class's names. Raises ValueError as `renamed`."""
    out = {}
    for name, w in weights.items():
        buffer = name.endswith(".position_ids")  # of older files
        if not buffer and not name.startswith(PRETRAINING):
            out[renamed(name)] = w
    return out
