"""Rewards: preprocessing against PIL's, models against the released arithmetic, the contract."""

import importlib
import sys
import threading
import time
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from zoo.released import random_pipelines as pipelines
from zoo.rewards import dual_encoders, example, imagereward
from zoo.rewards import spec as rewards

PROMPTS = ["red", "a square", "two dogs"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}


def pictures(seed, height, width, n=3):
    """Smooth pictures with edges, in 8 bits."""
    x = torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, (height, width), mode="bicubic").clamp(0, 1)
    corner = x[:, :, : height // 3, : width // 2]
    corner.copy_(1 - corner)
    return (255 * x).round() / 255


def as_pil(x):
    return [Image.fromarray((255 * p).round().byte().permute(1, 2, 0).numpy()) for p in x]


def by_channel(values):
    return torch.tensor(values).view(3, 1, 1)


def standardised(x):
    return (x - by_channel(dual_encoders.MEAN)) / by_channel(dual_encoders.STD)


def processor():
    """CLIP's own, of squares of 28 pixels."""
    crop = {"height": 28, "width": 28}
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=crop)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny CLIPModel with its tokenizer; the two."""
    folder = tmp_path_factory.mktemp("clip")
    words = pipelines.clip_tokenizer(folder / "words")
    text = {
        **SMALL,
        "vocab_size": len(words),
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id,
        "max_position_embeddings": 20,
    }
    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        for p in model.parameters():
            if p.ndim:
                torch.nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder / "clip", safe_serialization=True)
    words.save_pretrained(folder / "clip")
    return folder / "clip", model, words


# ---- Preprocessing -------------------------------------------------------------------------------


# (47, 36) and (47, 40) leave half a pixel and more, which processors cut off or round up.
SIZES = [(64, 64), (96, 64), (50, 171), (28, 28), (20, 30), (47, 36), (36, 47), (47, 40), (40, 47)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_preprocessing_is_that_of_the_reference_processor(height, width):
    """Within 2/255 of CLIP's own on PIL pictures: both round to 8 bits after each of two passes."""
    x = pictures(1, height, width)
    theirs = processor()(as_pil(x), return_tensors="pt")["pixel_values"]
    wanted = theirs * by_channel(dual_encoders.STD) + by_channel(dual_encoders.MEAN)
    assert (dual_encoders.shortest_side(x, 28) - wanted).abs().max() <= 2.01 / 255


def on_black(picture, side):
    """PIL's: the longest side resized to `side`, centred on black."""
    width = round(picture.width * (side / max(picture.size)))
    height = round(picture.height * (side / max(picture.size)))
    canvas = Image.new("RGB", (side, side))
    corner = ((side - width) // 2, (side - height) // 2)
    canvas.paste(picture.resize((width, height), Image.BICUBIC), corner)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hps_preprocessing_is_that_of_pil(height, width):
    """Longest side, bicubic, centred on black, within 2/255 of PIL."""
    x = pictures(2, height, width)
    for picture, ours in zip(as_pil(x), dual_encoders.longest_side(x, 28), strict=True):
        assert (ours - on_black(picture, 28)).abs().max() <= 2.01 / 255


def test_the_square_begins_where_each_processor_says():
    """Half of what is left over: CLIP's rounds down, torchvision's (ImageReward's) to even."""
    for x, begins in ((pictures(12, 28, 31), (1, 2)), (pictures(12, 28, 33), (2, 2))):
        down = dual_encoders.shortest_side(x, 28)
        even = dual_encoders.shortest_side(x, 28, imagereward.half_even)
        assert torch.equal(down, x[..., begins[0] : begins[0] + 28])
        assert torch.equal(even, x[..., begins[1] : begins[1] + 28])


@pytest.mark.parametrize("prepare", [dual_encoders.shortest_side, dual_encoders.longest_side])
def test_pictures_are_rounded_to_bytes_first(prepare):
    """Values between bytes, with nothing to resize; half precision comes back as float32."""
    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    assert torch.equal(prepare(x, 28), (255 * x).round() / 255)
    assert prepare(x.half(), 28).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(28, 60), (60, 28), (50, 50)])
def test_pictures_are_rounded_to_bytes_after_each_pass(height, width):
    """As PIL's are: width first; what comes back is bytes again."""
    x, size = pictures(14, 40, 40), (height, width)
    how = {"mode": "bicubic", "antialias": True, "align_corners": False}
    wide = (255 * F.interpolate(x, (40, width), **how).clamp(0, 1)).round() / 255
    wanted = (255 * F.interpolate(wide, size, **how).clamp(0, 1)).round() / 255
    assert torch.equal(dual_encoders.resized(x, height, width), wanted)


# ---- CLIP, PickScore -----------------------------------------------------------------------------


def test_clip_is_the_models_own_logits(encoder):
    """exp(logit_scale) cosine, as CLIPModel gives it; rows belong to their prompts."""
    folder, model, words = encoder
    x = pictures(3, 28, 28)  # no resizing: the same pixels
    given = CLIPProcessor(processor(), words)(
        text=PROMPTS, images=as_pil(x), return_tensors="pt", padding="max_length", max_length=20
    )
    with torch.no_grad():
        wanted = model(**given).logits_per_image.diagonal()
    reward = dual_encoders.clip(str(folder))
    got = reward(x, PROMPTS)
    assert got.shape == (3,) and got.dtype == torch.float32 and (got - wanted).abs().max() <= 1e-4
    assert (reward(x[:1], PROMPTS[:1]) - got[0]).abs() <= 1e-5
    assert (reward(x.flip(0), PROMPTS) - got).abs().max() > 1e-3
    assert not any(p.requires_grad for p in reward.model.parameters())
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        reward(x, PROMPTS[:2])


def test_pickscore_is_clip_with_a_scale_and_a_crop(encoder):
    """On a picture that is not square: the same model, tokenizer and preprocessing."""
    folder, model, words = encoder
    x = pictures(13, 60, 28)
    got = dual_encoders.pickscore(str(folder))(x, PROMPTS)
    assert torch.equal(got, dual_encoders.clip(str(folder))(x, PROMPTS))
    bare = dual_encoders.DualEncoder(model, words, dual_encoders.shortest_side, scaled=False)
    torch.testing.assert_close(got, model.logit_scale.exp() * bare(x, PROMPTS))


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "imagereward"])
def test_a_revision_reaches_the_hub(name, monkeypatch):
    """The pinned revision of the usual repository, or of the one named; never a pickled CLIP."""
    asked = []

    def hub(place, *_, revision=None, **how):
        asked.append((str(place), revision, how.get("use_safetensors")))
        raise OSError("no hub here")

    monkeypatch.setattr(CLIPModel, "from_pretrained", hub)
    monkeypatch.setattr(dual_encoders, "hf_hub_download", hub)
    usual, safe = {
        "clip": (dual_encoders.CLIP, True),
        "pickscore": (dual_encoders.PICKSCORE, True),
        "hpsv2": (dual_encoders.HPSV2, None),
        "imagereward": (imagereward.HUB, None),
    }[name]
    for text in (name, f"{name}=some/where@r2"):
        with pytest.raises(ValueError, match="no hub here"):
            rewards.load_all([[text]])
    assert asked == [(usual, None, safe), ("some/where", "r2", safe)]


def test_the_tokenizer_beside_the_weights_is_taken_before_the_hubs(encoder, tmp_path, monkeypatch):
    """A local folder with a tokenizer is its own; any other place has the hub's."""
    monkeypatch.setattr(dual_encoders, "tokenizer_of", lambda place, revision=None: str(place))
    assert dual_encoders.tokenizer_in(encoder[0], "hub") == str(encoder[0])
    assert dual_encoders.tokenizer_in(tmp_path, "hub") == "hub"
    assert dual_encoders.tokenizer_in("some/where", "hub") == "hub"


def test_each_encoder_has_the_words_it_was_trained_with(encoder, monkeypatch, tmp_path):
    """PickScore and HPSv2 those of OpenCLIP's ViT-H-14, where none lie beside the weights."""
    asked = []

    def tokenizer(place, **how):
        asked.append(place)
        return encoder[2]

    monkeypatch.setattr(dual_encoders.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(dual_encoders.CLIPModel, "from_pretrained", lambda *a, **b: encoder[1])
    monkeypatch.setattr(dual_encoders, "state_dict", lambda file: {})
    monkeypatch.setattr(dual_encoders, "CLIPConfig", lambda **sizes: encoder[1].config)
    monkeypatch.setattr(dual_encoders.CLIPModel, "load_state_dict", lambda model, weights: None)
    dual_encoders.clip("some/where")
    dual_encoders.pickscore("some/where")
    dual_encoders.hpsv2(str(tmp_path))
    assert asked == ["some/where", *["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] * 2]


def test_prompts_may_be_any_sequence(encoder):
    """A tuple is as good as a list."""
    x, reward = pictures(15, 28, 28), dual_encoders.clip(str(encoder[0]))
    assert torch.equal(reward(x, tuple(PROMPTS)), reward(x, PROMPTS))


# ---- The released arithmetic, written out --------------------------------------------------------


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def heads_of(x):
    """[B, N, width] as four heads, [B, 4, N, width / 4]."""
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


def attention(q, k, v, **how):
    """Attention of four heads over [B, N, width]."""
    mixed = F.scaled_dot_product_attention(heads_of(q), heads_of(k), heads_of(v), **how)
    return mixed.transpose(1, 2).flatten(2)


def patches(x, weight, bias=None):
    """A token for each square of 14 pixels, [B, 3, H, W] -> [B, N, width]."""
    return F.conv2d(x, weight, bias, stride=14).flatten(2).transpose(1, 2)


def open_clip_block(w, at, x, causal):
    """One layer of open_clip's transformers."""
    h = norm(w, f"{at}.ln_1", x)
    qkv = h @ w[f"{at}.attn.in_proj_weight"].T + w[f"{at}.attn.in_proj_bias"]
    x = x + linear(w, f"{at}.attn.out_proj", attention(*qkv.chunk(3, -1), is_causal=causal))
    h = F.gelu(linear(w, f"{at}.mlp.c_fc", norm(w, f"{at}.ln_2", x)))
    return x + linear(w, f"{at}.mlp.c_proj", h)


def open_clip_forward(w, pixels, tokens):
    """The cosine of open_clip's picture and text features, [B]."""
    x = patches(pixels, w["visual.conv1.weight"])
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"])
    for i in range(2):
        x = open_clip_block(w, f"visual.transformer.resblocks.{i}", x, causal=False)
    image = norm(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]
    y = w["token_embedding.weight"][tokens] + w["positional_embedding"][: tokens.shape[1]]
    for i in range(2):
        y = open_clip_block(w, f"transformer.resblocks.{i}", y, causal=True)
    end = tokens.argmax(-1)  # the end token has the largest number
    text = norm(w, "ln_final", y)[torch.arange(len(y)), end] @ w["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


class RandomWeights(dict):
    """A state dict to fill with random weights under the released names."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name, *shape):
        self[name] = 0.2 * torch.randn(*shape, generator=self.generator)

    def add_linear(self, name, out, into):
        self.add(f"{name}.weight", out, into)
        self.add(f"{name}.bias", out)

    def add_norm(self, name, width):
        self.add(f"{name}.weight", width)
        self[f"{name}.weight"] += 1
        self.add(f"{name}.bias", width)


def random_open_clip(vocabulary):
    """Two layers of width 32 in each tower, as open_clip names them."""
    w = RandomWeights(4)
    w["logit_scale"] = torch.tensor(2.0)
    w.add("positional_embedding", 20, 32)
    w.add("token_embedding.weight", vocabulary, 32)
    w.add("text_projection", 32, 16)
    w.add("visual.proj", 32, 16)
    w.add("visual.class_embedding", 32)
    w.add("visual.conv1.weight", 32, 3, 14, 14)
    w.add("visual.positional_embedding", 5, 32)
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        w.add_norm(name, 32)
    for tower in ("", "visual."):
        for i in range(2):
            at = f"{tower}transformer.resblocks.{i}"
            w.add(f"{at}.attn.in_proj_weight", 96, 32)
            w.add(f"{at}.attn.in_proj_bias", 96)
            w.add_norm(f"{at}.ln_1", 32)
            w.add_norm(f"{at}.ln_2", 32)
            w.add_linear(f"{at}.attn.out_proj", 32, 32)
            w.add_linear(f"{at}.mlp.c_fc", 48, 32)
            w.add_linear(f"{at}.mlp.c_proj", 32, 48)
    return w


def test_hpsv2_from_an_open_clip_state_dict(encoder, tmp_path, monkeypatch):
    """The key map, the transposes, the end token, no scale; from a file or from its folder."""
    _, model, words = encoder
    w = random_open_clip(len(words))
    config = model.config.to_dict()
    sizes = {k: config[k] for k in ("projection_dim", "text_config", "vision_config")}
    monkeypatch.setattr(dual_encoders, "VIT_H_14", sizes)
    file = tmp_path / dual_encoders.HPS_FILE
    torch.save({"epoch": 1, "state_dict": dict(w)}, file)
    words.save_pretrained(tmp_path)  # the tokenizer beside the weights is taken
    x, prompts = pictures(5, 20, 42), [*PROMPTS[:2], "two dogs " * 9]
    given = words(
        prompts, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )
    tokens = given["input_ids"]
    ends = tokens[2] == words.eos_token_id
    assert ends.sum() == 1 and ends[-1]  # cut, with its end
    squares = torch.stack([on_black(picture, 28) for picture in as_pil(x)])
    wanted = open_clip_forward(w, standardised(squares), tokens)
    got = dual_encoders.hpsv2(str(file))(x, prompts)
    assert (got - wanted).abs().max() <= 5e-3 * wanted.abs().max() and wanted.std() > 1e-2
    assert torch.equal(dual_encoders.hpsv2(str(tmp_path))(x, prompts), got)
    with pytest.raises(ValueError, match=r"'visual\.stem\.weight': is none of an open_clip ViT's"):
        dual_encoders.from_open_clip({"visual.stem.weight": torch.zeros(1)})


def imagereward_vision(w, pixels):
    """The released ViT: [B, tokens, width]."""
    at = "blip.visual_encoder"
    projection = f"{at}.patch_embed.proj"
    x = patches(pixels, w[f"{projection}.weight"], w[f"{projection}.bias"])
    x = torch.cat([w[f"{at}.cls_token"].expand(len(x), 1, -1), x], 1) + w[f"{at}.pos_embed"]
    for i in range(2):
        block = f"{at}.blocks.{i}"
        qkv = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x, 1e-6))
        x = x + linear(w, f"{block}.attn.proj", attention(*qkv.chunk(3, -1)))
        h = F.gelu(linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x, 1e-6)))
        x = x + linear(w, f"{block}.mlp.fc2", h)
    return norm(w, f"{at}.norm", x, 1e-6)


def bert_attention(w, at, x, y, mask=None):
    """BERT's attention of x to y, its output projection, residual and normalisation."""
    q = linear(w, f"{at}.self.query", x)
    k = linear(w, f"{at}.self.key", y)
    v = linear(w, f"{at}.self.value", y)
    h = linear(w, f"{at}.output.dense", attention(q, k, v, attn_mask=mask))
    return norm(w, f"{at}.output.LayerNorm", x + h, 1e-12)


def imagereward_forward(w, pixels, ids, mask):
    """The released arithmetic: ViT, BERT with cross-attention, five linear maps; scores [B]."""
    seen = imagereward_vision(w, pixels)
    at = "blip.text_encoder.embeddings"
    positions = w[f"{at}.position_embeddings.weight"][: ids.shape[1]]
    y = norm(w, f"{at}.LayerNorm", w[f"{at}.word_embeddings.weight"][ids] + positions, 1e-12)
    for i in range(2):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        y = bert_attention(w, f"{layer}.attention", y, y, mask.bool()[:, None, None])
        y = bert_attention(w, f"{layer}.crossattention", y, seen)
        h = linear(w, f"{layer}.output.dense", F.gelu(linear(w, f"{layer}.intermediate.dense", y)))
        y = norm(w, f"{layer}.output.LayerNorm", y + h, 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = linear(w, f"mlp.layers.{i}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def random_imagereward(vocabulary, wide=32, seen=48):
    """Two layers in each tower, of width `seen` for pictures and `wide` for words."""
    w = RandomWeights(9)
    at = "blip.visual_encoder"
    w.add(f"{at}.cls_token", 1, 1, seen)
    w.add(f"{at}.pos_embed", 1, 5, seen)
    w.add(f"{at}.patch_embed.proj.weight", seen, 3, 14, 14)
    w.add(f"{at}.patch_embed.proj.bias", seen)
    w.add_norm(f"{at}.norm", seen)
    for i in range(2):
        w.add_norm(f"{at}.blocks.{i}.norm1", seen)
        w.add_norm(f"{at}.blocks.{i}.norm2", seen)
        w.add_linear(f"{at}.blocks.{i}.attn.qkv", 3 * seen, seen)
        w.add_linear(f"{at}.blocks.{i}.attn.proj", seen, seen)
        w.add_linear(f"{at}.blocks.{i}.mlp.fc1", 40, seen)
        w.add_linear(f"{at}.blocks.{i}.mlp.fc2", seen, 40)
    at = "blip.text_encoder"
    w.add(f"{at}.embeddings.word_embeddings.weight", vocabulary, wide)
    w.add(f"{at}.embeddings.position_embeddings.weight", 512, wide)
    w.add_norm(f"{at}.embeddings.LayerNorm", wide)
    for i in range(2):
        layer = f"{at}.encoder.layer.{i}"
        for kind, width in (("attention", wide), ("crossattention", seen)):
            w.add_linear(f"{layer}.{kind}.self.query", wide, wide)
            w.add_linear(f"{layer}.{kind}.self.key", wide, width)
            w.add_linear(f"{layer}.{kind}.self.value", wide, width)
            w.add_linear(f"{layer}.{kind}.output.dense", wide, wide)
            w.add_norm(f"{layer}.{kind}.output.LayerNorm", wide)
        w.add_linear(f"{layer}.intermediate.dense", 56, wide)
        w.add_linear(f"{layer}.output.dense", wide, 56)
        w.add_norm(f"{layer}.output.LayerNorm", wide)
    for i, (into, out) in zip((0, 2, 4, 6, 7), pairwise((wide, 1024, 128, 64, 16, 1))):
        w.add_linear(f"mlp.layers.{i}", out, into)
    # Of pretraining, and a buffer of older files: neither is read.
    w.add_linear("blip.vision_proj", 8, seen)
    w.add_linear("blip.text_proj", 8, wide)
    w[f"{at}.embeddings.position_ids"] = torch.arange(512)[None]
    return w


def test_imagereward_from_its_released_state_dict(encoder, tmp_path, monkeypatch):
    """The key map, the heads, both masks and the score; padding is not read."""
    words = encoder[2]
    vision = {**imagereward.VISION, "hidden_size": 48, "intermediate_size": 40}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    text = {**imagereward.TEXT, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": len(words), "encoder_hidden_size": 48}
    monkeypatch.setattr(imagereward, "VISION", vision)
    monkeypatch.setattr(imagereward, "TEXT", text)
    w = random_imagereward(len(words))
    torch.save(dict(w), tmp_path / "ImageReward.pt")
    words.save_pretrained(tmp_path)
    (reward,) = rewards.load_all([[f"imagereward={tmp_path / 'ImageReward.pt'}"]])
    x = pictures(10, 28, 31)
    square = x[..., 2:30]  # torchvision's: half of 3, rounded to even
    given = words(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    wanted = imagereward_forward(
        w, standardised(square), given["input_ids"], given["attention_mask"]
    )
    got = reward(x, PROMPTS)["imagereward"]
    model = reward.rewards["imagereward"]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(x[:2], ["a", "two dogs " * 40]).isfinite().all()  # read to its 35th token
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max() and wanted.std() > 1e-2
    with pytest.raises(ValueError, match=r"'blip\.visual_encoder\.x': is none of ImageReward's"):
        imagereward.from_released({"blip.visual_encoder.x": torch.zeros(1)})


def test_released_configurations():
    """What the released checkpoints are, by their model cards: sizes, heads, epsilons."""
    vit = dual_encoders.VIT_H_14
    with torch.device("meta"):
        hps = CLIPModel(CLIPConfig(**vit))
        blip = imagereward.ImageReward(tokenizer=None)
    assert sum(p.numel() for p in hps.parameters()) == 986_109_441
    assert sum(p.numel() for p in blip.parameters()) / 1e6 == pytest.approx(446, abs=5)
    for tower, layers in (("vision_config", 32), ("text_config", 24)):
        assert vit[tower]["hidden_act"] == "gelu"
        assert vit[tower]["num_attention_heads"] == 16
        assert vit[tower]["num_hidden_layers"] == layers
    assert imagereward.VISION["layer_norm_eps"] == 1e-6
    assert imagereward.VISION["num_attention_heads"] == 16
    assert imagereward.TEXT["num_attention_heads"] == 12 and imagereward.LONGEST == 35
    assert imagereward.TEXT["vocab_size"] == 30524


def test_released_places():
    """Where the usual weights and tokenizers are, by the authors' pages."""
    usual = (dual_encoders.CLIP, dual_encoders.PICKSCORE, dual_encoders.HPSV2, imagereward.HUB)
    assert usual == (
        "openai/clip-vit-large-patch14",
        "yuvalkirstain/PickScore_v1",
        "xswu/HPSv2",
        "THUDM/ImageReward",
    )
    assert dual_encoders.HPS_FILE == "HPS_v2.1_compressed.pt"
    assert imagereward.FILE == "ImageReward.pt"
    assert dual_encoders.WORDS == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert imagereward.WORDS == "google-bert/bert-base-uncased"


def test_a_revision_is_of_the_tokenizer_too(encoder, monkeypatch):
    """CLIP's words are those of the weights' revision."""
    asked = []

    def words(place, revision=None, trust_remote_code=None):
        assert trust_remote_code is False
        asked.append((place, revision))
        return encoder[2]

    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: encoder[1])
    monkeypatch.setattr(dual_encoders.AutoTokenizer, "from_pretrained", words)
    dual_encoders.clip("some/where", "r2")
    assert asked == [("some/where", "r2")]


# ---- HPSv3 ---------------------------------------------------------------------------------------


class HPSv3RewardInferencer:
    """A stand-in of the package's: mean red of the file, and the length of the prompt."""

    made = 0

    def __init__(self, device):
        assert device == "cpu"
        HPSv3RewardInferencer.made += 1

    def reward(self, prompts, image_paths):
        scores = []
        for path, prompt in zip(image_paths, prompts, strict=True):
            red, green, blue = np.asarray(Image.open(path))[3, 17].tolist()  # row, column
            mu = float(red + 256 * (green % 16) + 4096 * (blue % 16) + 65536 * len(prompt))
            scores.append(torch.tensor([mu, 0.1], dtype=torch.float64))
        return scores


@pytest.fixture
def hpsv3(monkeypatch):
    """The package, stood in for; the module that imports it is loaded anew, and forgotten after."""
    package = types.SimpleNamespace(HPSv3RewardInferencer=HPSv3RewardInferencer)
    monkeypatch.setitem(sys.modules, "hpsv3", package)
    sys.modules.pop("zoo.rewards.hpsv3", None)
    yield
    del sys.modules["zoo.rewards.hpsv3"]


@pytest.mark.usefixtures("hpsv3")
def test_hpsv3_goes_through_its_package():
    """Pictures reach the package as PNG of 8 bits, prompts beside them; mu comes back."""
    HPSv3RewardInferencer.made = 0
    module = importlib.import_module("zoo.rewards.hpsv3")
    x = (torch.arange(3 * 3 * 20 * 28).view(3, 3, 20, 28) % 251 + 0.4) / 255  # rounded, not cut
    x[0, 0, 3, 17] = 9.7 / 255
    bytes_ = (255 * x[:, :, 3, 17]).round().long()
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    red, green, blue = bytes_.unbind(1)
    wanted = red + 256 * (green % 16) + 4096 * (blue % 16) + 65536 * lengths  # below 2^24
    got = module.reward(x, PROMPTS)
    assert got.dtype == torch.float32 and bytes_[0, 0] == 10
    assert torch.equal(got, wanted.float())
    module.reward(x[:1], PROMPTS[:1])
    assert HPSv3RewardInferencer.made == 1  # its model is loaded once


# ---- Rewards by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("clip", ("clip", "", "", 1.0)),
        ("clip:0.5", ("clip", "", "", 0.5)),
        ("hpsv2=a/b@r1:2", ("hpsv2", "a/b", "r1", 2.0)),
        ("pickscore=/x/y", ("pickscore", "/x/y", "", 1.0)),
        ("my.module:f", ("my.module:f", "", "", 1.0)),
        ("my.module:f:1e-2", ("my.module:f", "", "", 0.01)),
        ("rule:3", ("rule", "", "", 3.0)),
    ],
)
def test_a_reward_is_taken_apart(text, wanted):
    """Names, places, revisions, weights, functions; and put together again without the weight."""
    assert rewards.parse_one(text) == wanted
    assert rewards.parse_one(rewards.unweighted(text)) == (*wanted[:3], 1.0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "hps", "clip:", "clip:0", "clip:-1", "clip:inf", "clip:nan", "clip:x", "clip=:1"),
        *("rule=x", "a:b:c", ":f", "m:", "m:f=x", "clip=/@r1"),
    ],
)
def test_what_is_no_reward_is_refused(text):
    """One line that names it."""
    with pytest.raises(ValueError, match="reward ") as error:
        rewards.parse_one(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_a_name_given_twice_is_refused():
    """Two weights of one name have no meaning, even at two places."""
    with pytest.raises(ValueError, match="'clip' is given twice"):
        rewards.parse(["clip:1", "clip=x:2"])


def test_what_cannot_be_loaded_is_refused(tmp_path):
    """A pickle with code (never run), a missing module or function: one line that names it."""
    torch.save({"state_dict": {"x": print}}, tmp_path / "code.pt")
    for text, said in (
        (f"hpsv2={tmp_path / 'code.pt'}", r"reward 'hpsv2': cannot be loaded \(.*[Ww]eights"),
        ("no.module:f", r"'no\.module:f': cannot be loaded \(Module.*: No module named 'no'\)"),
        ("math:pi", "'math:pi': must be a function"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            rewards.load_all([[text]])
        assert "\n" not in str(error.value)


def test_weighted_sums_in_batches_and_one_model_for_two_uses(encoder, monkeypatch):
    """total = sum of weight times score whatever the batch; a model named twice is loaded once."""
    folder, x = encoder[0], pictures(7, 40, 30)
    lists = [[f"clip={folder}:0.5", "zoo.rewards.example:warmth:3"], [f"clip={folder}"]]
    clip = dual_encoders.clip(str(folder))
    wanted = 0.5 * clip(x, PROMPTS) + 3 * (x[:, 0] - x[:, 2]).mean((1, 2))
    loads = []

    def loaded(place, revision):
        loads.append(place)
        return clip

    monkeypatch.setattr(dual_encoders, "clip", loaded)
    for batch in (0, 1, 2, 5):
        mine, judge = rewards.load_all(lists, batch=batch)
        scores = mine(x, PROMPTS)
        assert list(scores) == ["clip", "zoo.rewards.example:warmth"]
        assert scores["clip"].dtype == torch.float32
        torch.testing.assert_close(mine.total(scores), wanted, rtol=1e-5, atol=1e-5)
        assert judge.rewards["clip"] is clip
    assert loads == [str(folder)] * 4


def asked(reward):
    """One reward's scores of three pictures, checked."""
    return rewards.Rewards({"mine": reward}, {"mine": 1.0})(pictures(8, 28, 28), PROMPTS)["mine"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.tensor([1.0, float("inf"), 0.0]), "of prompt 'a square' is inf: must be a finite"),
        (torch.tensor([float("nan"), 0.0, 0.0]), "of prompt 'red' is nan: must be a finite number"),
        (torch.tensor([1.0, 2.0]), r"has shape \(2,\): must be one float an image, \[3\]"),
        (torch.zeros(3, 1), r"has shape \(3, 1\)"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_with_the_prompt_named(values, said):
    """One finite float per image, or one line."""

    def reward(images, prompts):
        return values

    with pytest.raises(ValueError, match=f"reward 'mine' .*{said}"):
        asked(reward)


def test_a_reward_that_raises_stops_with_the_prompt_named():
    """Its own error is told."""

    def reward(images, prompts):
        raise KeyError("x")

    with pytest.raises(RuntimeError, match=r"'mine' failed on prompt 'red' .*: KeyError: 'x'"):
        asked(reward)


def test_a_reward_that_takes_too_long_is_left_behind():
    """With a line that says for how long it was waited; one in time is the same with a limit."""
    released = threading.Event()

    def slow(images, prompts):
        released.wait(20)
        return [0.0] * len(prompts)

    x = pictures(8, 28, 28)
    began = time.perf_counter()
    with pytest.raises(
        RuntimeError, match=r"'mine' failed on .*TimeoutError: took more than 0.1 s"
    ):
        rewards.Rewards({"mine": slow}, {}, limit=0.1)(x, PROMPTS)
    assert time.perf_counter() - began < 10
    released.set()
    limited = rewards.Rewards({"mine": example.contrast}, {}, limit=60.0)(x, PROMPTS)
    assert torch.equal(limited["mine"], asked(example.contrast))


def leave(images, prompts):
    sys.exit(0)


def fail_at_length(images, prompts):
    raise RuntimeError("one line\nand another " + "long " * 100)


def be_complex(images, prompts):
    return torch.ones(len(prompts), dtype=torch.complex64)


def change_the_default(images, prompts):
    torch.set_default_dtype(torch.float64)
    return torch.ones(len(prompts))


@pytest.mark.parametrize("limit", [0.0, 60.0])
@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (leave, "failed on prompt 'red' and the others of its batch: SystemExit: 0"),
        (fail_at_length, "failed on prompt 'red' .*: RuntimeError: one line and another long"),
        (be_complex, "of prompt 'red' .* is torch.complex64: must be real numbers"),
        (
            change_the_default,
            "must leave torch's default dtype at torch.float32, not torch.float64",
        ),
    ],
)
def test_whatever_a_reward_does_is_one_line(reward, said, limit):
    """It cannot end the program, nor change it, nor fill the screen."""
    with pytest.raises((RuntimeError, ValueError, SystemExit), match=said) as error:
        rewards.Rewards({"mine": reward}, {}, limit=limit)(pictures(8, 28, 28), PROMPTS)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert torch.get_default_dtype() == torch.float32


def test_numbers_that_are_not_finite_can_be_asked_for():
    """By who deals with them."""

    def reward(images, prompts):
        return torch.tensor([1.0, float("nan"), float("inf")])

    asked_for = rewards.Rewards({"mine": reward}, {})(pictures(8, 28, 28), PROMPTS, finite=False)
    assert asked_for["mine"].isnan().tolist() == [False, True, False]


def test_a_function_of_the_working_directory_whatever_its_name(tmp_path, monkeypatch):
    """nan and inf too, with a weight or without; a module that leaves is one line."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    source = "def nan(images, prompts):\n    return [7.0] * len(prompts)\ninf = nan\n"
    Path("mine_here.py").write_text(source)
    Path("leaving_here.py").write_text("raise SystemExit(0)\n")
    for text, weight in (("mine_here:nan", 1), ("mine_here:inf:2", 2), ("mine_here:nan:0.5", 0.5)):
        try:
            (found,) = rewards.load_all([[text]])
        except ValueError as problem:
            pytest.fail(str(problem))
        (scores,) = found(pictures(8, 28, 28), PROMPTS).values()
        assert scores.tolist() == [7.0] * 3 and list(found.weights.values()) == [weight]
    Path("doubling_here.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\nf = 1\n"
    )
    with pytest.raises(ValueError, match=r"must leave torch's default dtype at torch.float32"):
        rewards.load_all([["doubling_here:f"]])
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"'leaving_here:f': cannot be loaded .SystemExit: 0"):
        rewards.load_all([["leaving_here:f"]])
    for text in ("clip:nan", "rule:inf", "clip=somewhere:nan", "a:b:nan", "a:b:inf"):
        with pytest.raises(ValueError, match="its weight must be a positive number"):
            rewards.parse_one(text)


def test_a_reward_may_return_numbers_and_spoil_its_pictures():
    """A list of numbers will do; what a reward does to its pictures, the next does not see."""

    def spoil(images, prompts):
        images.zero_()
        return [1, 2, 3]

    x = pictures(8, 28, 28)
    both = rewards.Rewards({"first": spoil, "second": example.contrast}, {})(x, PROMPTS)
    assert both["first"].tolist() == [1, 2, 3]
    assert torch.equal(both["second"], example.contrast(pictures(8, 28, 28), PROMPTS))


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_no_infinity_is_a_reward(value):
    """Of either sign; the prompt of the picture that has it is named, and no other."""

    def reward(images, prompts):
        return torch.tensor([0.0, value, 0.0])

    with pytest.raises(ValueError, match=f"'mine' of prompt {PROMPTS[1]!r} is"):
        asked(reward)


def test_a_reward_is_asked_without_gradients():
    """Of pictures that it may change, on their device; its numbers come back as float32."""

    def reward(images, prompts):
        assert not torch.is_grad_enabled() and not images.requires_grad
        return images.double().mean((1, 2, 3))

    x = pictures(8, 28, 28).requires_grad_()
    scores = rewards.Rewards({"mine": reward}, {"mine": 1.0})(x, PROMPTS)["mine"]
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_the_rewards_of_the_example_by_hand():
    """Warmth: mean red less mean blue. Contrast: the standard deviation of all values."""
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0], x[0, 2, 0] = 0.75, 0.5
    x[1, :, :, 0] = 1.0
    assert example.warmth(x, ["a", "b"]).tolist() == pytest.approx([0.5, 0.0])
    # Of the second six values are 1 and six 0: variance 12/4/11 by n - 1.
    assert example.contrast(x, ["a", "b"])[1].item() == pytest.approx((3 / 11) ** 0.5)


class Placed:
    """A model that remembers where it was put."""

    def __init__(self, *source):
        self.source = source

    def to(self, device):
        self.device = device
        return self


def test_what_is_loaded_once_is_of_one_source_and_on_the_device(monkeypatch):
    """Another place or another revision is another model."""
    monkeypatch.setattr(dual_encoders, "clip", Placed)
    lists = [["clip=a/b@r1:2"], ["clip=a/b@r1"], ["clip=a/b@r2"], ["clip=a/c"]]
    found = [z.rewards["clip"] for z in rewards.load_all(lists, device="somewhere")]
    assert found[0] is found[1] and len({id(model) for model in found}) == 3
    assert [m.source for m in found[1:]] == [("a/b", "r1"), ("a/b", "r2"), ("a/c", None)]
    assert {model.device for model in found} == {"somewhere"}
