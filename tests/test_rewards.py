"""Rewards as dual encoders: preprocessing against PIL's, the key map against open_clip's arithmetic written out."""

import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, normalize, scaled_dot_product_attention
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from zoo.released import random_pipelines as pipelines
from zoo.rewards import dual_encoders, imagereward
from zoo.rewards import spec as rewards

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
PROMPTS = ["red", "a square", "two dogs"]


def pictures(seed, height, width, n=3):
    """Smooth pictures with edges, in 8 bits."""
    x = torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic").clamp(0, 1)
    x[:, :, : height // 3, : width // 2] = 1 - x[:, :, : height // 3, : width // 2]
    return (255 * x).round() / 255


def as_pil(x):
    return [Image.fromarray((255 * p).round().byte().permute(1, 2, 0).numpy()) for p in x]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny CLIPModel with its tokenizer, saved as a folder."""
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
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        ).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2) if p.ndim else None
    model.save_pretrained(folder / "clip", safe_serialization=True)
    words.save_pretrained(folder / "clip")
    return folder / "clip", model, words


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (50, 171), (28, 28), (20, 30)])
def test_preprocessing_is_that_of_the_reference_processor(height, width):
    """Within 2/255 of CLIP's own processor on PIL pictures: both round to 8 bits after each of two passes."""
    x = pictures(1, height, width)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    wanted = processor(as_pil(x), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(z).view(3, 1, 1) for z in (dual_encoders.MEAN, dual_encoders.STD))
    ours = dual_encoders.shortest_side(x, 28)
    assert (ours - (wanted * std + mean)).abs().max() <= 2.01 / 255


def on_black(picture, side):
    """PIL's: the longest side resized to `side`, centred on black."""
    w, h = (round(z * (side / max(picture.size))) for z in picture.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(picture.resize((w, h), Image.BICUBIC), ((side - w) // 2, (side - h) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (50, 171), (20, 30)])
def test_hps_preprocessing_is_that_of_pil(height, width):
    """Longest side, bicubic, centred on black, within 2/255 of PIL."""
    x = pictures(2, height, width)
    for picture, ours in zip(as_pil(x), dual_encoders.longest_side(x, 28), strict=True):
        assert (ours - on_black(picture, 28)).abs().max() <= 2.01 / 255


def test_the_square_begins_where_each_processor_says():
    """CLIP's rounds half of what is left over down; torchvision, which ImageReward uses, to the nearest even number."""
    x = pictures(12, 28, 31)
    assert torch.equal(dual_encoders.shortest_side(x, 28), x[..., 1:29])
    assert torch.equal(dual_encoders.shortest_side(x, 28, lambda d: round(d / 2)), x[..., 2:30])


def test_released_configurations():
    """What the released checkpoints are, by their model cards: sizes on meta, activations, heads and epsilons."""
    with torch.device("meta"):
        vit = CLIPModel(CLIPConfig(**dual_encoders.VIT_H_14))
    assert sum(p.numel() for p in vit.parameters()) == 986_109_441
    for tower, heads, layers in (("vision_config", 16, 32), ("text_config", 16, 24)):
        config = dual_encoders.VIT_H_14[tower]
        assert (
            config["hidden_act"],
            config["num_attention_heads"],
            config["num_hidden_layers"],
        ) == ("gelu", heads, layers)
    assert (
        imagereward.VISION["layer_norm_eps"] == 1e-6
        and imagereward.VISION["num_attention_heads"] == 16
    )
    assert imagereward.TEXT["num_attention_heads"] == 12 and imagereward.LONGEST == 35


def test_pickscore_is_clip_with_a_scale_and_a_crop(encoder):
    """On a picture that is not square, from its own folder: the same model, tokenizer and preprocessing."""
    folder, x = str(encoder[0]), pictures(13, 60, 28)
    got = dual_encoders.pickscore(folder)(x, PROMPTS)
    assert torch.equal(got, dual_encoders.clip(folder)(x, PROMPTS))
    scale = encoder[1].logit_scale.exp()
    bare = dual_encoders.DualEncoder(
        encoder[1], encoder[2], dual_encoders.shortest_side, scaled=False
    )
    torch.testing.assert_close(got, scale * bare(x, PROMPTS))


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "imagereward"])
def test_a_revision_reaches_the_hub(name, monkeypatch):
    """The pinned revision of the usual repository, or of the one named, is what is asked for, and never a pickle."""
    asked = []

    def hub(place, *_, revision=None, **how):
        asked.append(
            (str(place), revision, how.get("use_safetensors", name in ("hpsv2", "imagereward")))
        )
        raise OSError("no hub here")

    monkeypatch.setattr(CLIPModel, "from_pretrained", hub)
    monkeypatch.setattr(dual_encoders, "hf_hub_download", hub)
    monkeypatch.setattr(imagereward, "hf_hub_download", hub)
    usual = {
        "clip": dual_encoders.CLIP,
        "pickscore": dual_encoders.PICKSCORE,
        "hpsv2": dual_encoders.HPSV2,
        "imagereward": imagereward.HUB,
    }[name]
    for text, place in ((name, usual), (f"{name}=some/where@r2", "some/where")):
        with pytest.raises(ValueError, match="no hub here"):
            rewards.load_all([[text]])
        assert asked.pop() == (place, "r2" if "@" in text else None, True)


def test_clip_is_the_models_own_logits(encoder):
    """exp(logit_scale) cosine, as CLIPModel gives it on its processor's pictures; rows belong to their prompts."""
    folder, model, words = encoder
    x = pictures(3, 28, 28)  # no resizing: the same pixels
    reward = dual_encoders.clip(str(folder))
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), words
    )
    given = processor(
        text=PROMPTS, images=as_pil(x), return_tensors="pt", padding="max_length", max_length=20
    )
    with torch.no_grad():
        wanted = model(**given).logits_per_image.diagonal()
    got = reward(x, PROMPTS)
    assert got.shape == (3,) and got.dtype == torch.float32 and (got - wanted).abs().max() <= 1e-4
    assert (reward(x[:1], PROMPTS[:1]) - got[0]).abs() <= 1e-5
    assert (reward(x.flip(0), PROMPTS) - got).abs().max() > 1e-3
    assert not any(p.requires_grad for p in reward.model.parameters())


def open_clip_forward(w, pixels, tokens, heads=4):
    """open_clip's ViT and text transformer, written out."""

    def block(x, prefix, causal):
        h = layer_norm(x, x.shape[-1:], w[f"{prefix}ln_1.weight"], w[f"{prefix}ln_1.bias"])
        q, k, v = (h @ w[f"{prefix}attn.in_proj_weight"].T + w[f"{prefix}attn.in_proj_bias"]).chunk(
            3, -1
        )
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        h = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + h @ w[f"{prefix}attn.out_proj.weight"].T + w[f"{prefix}attn.out_proj.bias"]
        h = layer_norm(x, x.shape[-1:], w[f"{prefix}ln_2.weight"], w[f"{prefix}ln_2.bias"])
        h = gelu(h @ w[f"{prefix}mlp.c_fc.weight"].T + w[f"{prefix}mlp.c_fc.bias"])
        return x + h @ w[f"{prefix}mlp.c_proj.weight"].T + w[f"{prefix}mlp.c_proj.bias"]

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = (
        torch.nn.functional.conv2d(pixels, w["visual.conv1.weight"], stride=14)
        .flatten(2)
        .transpose(1, 2)
    )
    x = (
        torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + w["visual.positional_embedding"]
    )
    x = norm(x, "visual.ln_pre")
    for i in range(2):
        x = block(x, f"visual.transformer.resblocks.{i}.", False)
    image = norm(x[:, 0], "visual.ln_post") @ w["visual.proj"]
    y = w["token_embedding.weight"][tokens] + w["positional_embedding"][: tokens.shape[1]]
    for i in range(2):
        y = block(y, f"transformer.resblocks.{i}.", True)
    last = norm(y, "ln_final")[
        torch.arange(len(y)), tokens.argmax(-1)
    ]  # the end token has the largest number
    return (normalize(image, dim=-1) * normalize(last @ w["text_projection"], dim=-1)).sum(-1)


def random_open_clip(vocabulary):
    """A random state dict with open_clip's names."""
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=g)
    w = {
        "logit_scale": torch.tensor(2.0),
        "positional_embedding": draw(20, 32),
        "token_embedding.weight": draw(vocabulary, 32),
        "text_projection": draw(32, 16),
        "visual.proj": draw(32, 16),
        "visual.class_embedding": draw(32),
        "visual.conv1.weight": draw(32, 3, 14, 14),
        "visual.positional_embedding": draw(5, 32),
    }
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        w |= {f"{name}.weight": 1 + draw(32), f"{name}.bias": draw(32)}
    for tower in ("", "visual."):
        for i in range(2):
            at = f"{tower}transformer.resblocks.{i}."
            w |= {f"{at}attn.in_proj_weight": draw(96, 32), f"{at}attn.in_proj_bias": draw(96)}
            for name, shape in (
                ("ln_1", (32,)),
                ("ln_2", (32,)),
                ("attn.out_proj", (32, 32)),
                ("mlp.c_fc", (48, 32)),
                ("mlp.c_proj", (32, 48)),
            ):
                w |= {
                    f"{at}{name}.weight": draw(*shape) + (len(shape) == 1),
                    f"{at}{name}.bias": draw(shape[0]),
                }
    return w


def test_hpsv2_from_an_open_clip_state_dict(encoder, tmp_path, monkeypatch):
    """The key map, the transposes, the end token and the missing scale, against open_clip's arithmetic."""
    _, model, words = encoder
    w = random_open_clip(len(words))
    torch.save({"epoch": 1, "state_dict": w}, tmp_path / "hps.pt")
    config = model.config.to_dict()
    sizes = {k: config[k] for k in ("projection_dim", "text_config", "vision_config")}
    monkeypatch.setattr(dual_encoders, "VIT_H_14", sizes)
    words.save_pretrained(tmp_path)  # the tokenizer beside the weights is taken
    reward = dual_encoders.hpsv2(str(tmp_path / "hps.pt"))
    x, long = pictures(5, 20, 42), [*PROMPTS[:2], "two dogs " * 9]
    tokens = words(long, padding="max_length", truncation=True, max_length=20, return_tensors="pt")[
        "input_ids"
    ]
    mean, std = (torch.tensor(z).view(3, 1, 1) for z in (dual_encoders.MEAN, dual_encoders.STD))
    assert (tokens[2] == words.eos_token_id).sum() == 1 and tokens[
        2, -1
    ] == words.eos_token_id  # cut, with its end
    squares = torch.stack([on_black(picture, 28) for picture in as_pil(x)])
    wanted = open_clip_forward(w, (squares - mean) / std, tokens)
    assert (
        reward(x, long) - wanted
    ).abs().max() <= 5e-3 * wanted.abs().max() and wanted.std() > 1e-2
    weights = tmp_path / dual_encoders.HPS_FILE
    (tmp_path / "hps.pt").rename(weights)
    assert torch.equal(
        dual_encoders.hpsv2(str(tmp_path))(x, long), reward(x, long)
    )  # the folder will do


# ---- ImageReward, HPSv3 ----------------------------------------------------------------------------------------


def attended(w, prefix, x, y, heads, mask=None):
    """BERT's attention of x to y, its output projection, residual and normalisation, written out."""
    q, k, v = (
        z @ w[f"{prefix}.self.{n}.weight"].T + w[f"{prefix}.self.{n}.bias"]
        for n, z in (("query", x), ("key", y), ("value", y))
    )
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    logits = logits if mask is None else logits.masked_fill(~mask[:, None, None], -torch.inf)
    h = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = h @ w[f"{prefix}.output.dense.weight"].T + w[f"{prefix}.output.dense.bias"]
    return layer_norm(
        x + h,
        x.shape[-1:],
        w[f"{prefix}.output.LayerNorm.weight"],
        w[f"{prefix}.output.LayerNorm.bias"],
        1e-12,
    )


def imagereward_forward(w, pixels, ids, mask, heads=4):
    """The released arithmetic under the released names: ViT, BERT with cross-attention, five linear maps."""
    at = {name.removeprefix("blip.visual_encoder."): z for name, z in w.items()}
    x = torch.nn.functional.conv2d(
        pixels, at["patch_embed.proj.weight"], at["patch_embed.proj.bias"], stride=14
    )
    x = (
        torch.cat([at["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        + at["pos_embed"]
    )
    for i in range(2):
        z = {name.removeprefix(f"blocks.{i}."): value for name, value in at.items()}
        h = layer_norm(x, x.shape[-1:], z["norm1.weight"], z["norm1.bias"], 1e-6)
        q, k, v = (
            (h @ z["attn.qkv.weight"].T + z["attn.qkv.bias"])
            .unflatten(-1, (3, heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + h @ z["attn.proj.weight"].T + z["attn.proj.bias"]
        h = layer_norm(x, x.shape[-1:], z["norm2.weight"], z["norm2.bias"], 1e-6)
        h = gelu(h @ z["mlp.fc1.weight"].T + z["mlp.fc1.bias"])
        x = x + h @ z["mlp.fc2.weight"].T + z["mlp.fc2.bias"]
    seen = layer_norm(x, x.shape[-1:], at["norm.weight"], at["norm.bias"], 1e-6)
    t = {name.removeprefix("blip.text_encoder."): z for name, z in w.items()}
    y = (
        t["embeddings.word_embeddings.weight"][ids]
        + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    y = layer_norm(
        y, y.shape[-1:], t["embeddings.LayerNorm.weight"], t["embeddings.LayerNorm.bias"], 1e-12
    )
    for i in range(2):
        here = f"encoder.layer.{i}."
        y = attended(t, f"{here}attention", y, y, heads, mask.bool())
        y = attended(t, f"{here}crossattention", y, seen, heads)
        h = gelu(y @ t[f"{here}intermediate.dense.weight"].T + t[f"{here}intermediate.dense.bias"])
        h = h @ t[f"{here}output.dense.weight"].T + t[f"{here}output.dense.bias"]
        norm = t[f"{here}output.LayerNorm.weight"], t[f"{here}output.LayerNorm.bias"]
        y = layer_norm(y + h, y.shape[-1:], *norm, 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = z @ w[f"mlp.layers.{i}.weight"].T + w[f"mlp.layers.{i}.bias"]
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def random_imagereward(vocabulary, wide=32, seen=48):
    """A random state dict with the released names."""
    g = torch.Generator().manual_seed(9)
    w = {
        "blip.visual_encoder.cls_token": 0.2 * torch.randn(1, 1, seen, generator=g),
        "blip.visual_encoder.pos_embed": 0.2 * torch.randn(1, 5, seen, generator=g),
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(
            vocabulary, wide, generator=g
        ),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(
            512, wide, generator=g
        ),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }

    def add(name, *shape):
        w[f"{name}.weight"] = 0.2 * torch.randn(*shape, generator=g) + (len(shape) == 1)
        w[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=g)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    add(f"{v}patch_embed.proj", seen, 3, 14, 14)
    add(f"{v}norm", seen)
    add(f"{t}embeddings.LayerNorm", wide)
    add("blip.vision_proj", 8, seen)
    for i in range(2):
        for name, shape in (
            ("norm1", (seen,)),
            ("norm2", (seen,)),
            ("attn.qkv", (3 * seen, seen)),
            ("attn.proj", (seen, seen)),
            ("mlp.fc1", (40, seen)),
            ("mlp.fc2", (seen, 40)),
        ):
            add(f"{v}blocks.{i}.{name}", *shape)
        for kind, width in (("attention", wide), ("crossattention", seen)):
            for name, of in (("query", wide), ("key", width), ("value", width)):
                add(f"{t}encoder.layer.{i}.{kind}.self.{name}", wide, of)
            add(f"{t}encoder.layer.{i}.{kind}.output.dense", wide, wide)
            add(f"{t}encoder.layer.{i}.{kind}.output.LayerNorm", wide)
        add(f"{t}encoder.layer.{i}.intermediate.dense", 56, wide)
        add(f"{t}encoder.layer.{i}.output.dense", wide, 56)
        add(f"{t}encoder.layer.{i}.output.LayerNorm", wide)
    for i, (a, b) in zip((0, 2, 4, 6, 7), pairwise((wide, 1024, 128, 64, 16, 1))):
        add(f"mlp.layers.{i}", b, a)
    return w


def test_imagereward_from_its_released_state_dict(encoder, tmp_path, monkeypatch):
    """The key map, the heads, both masks and the score, against the released arithmetic; padding is not read."""
    words = encoder[2]
    w = random_imagereward(len(words))
    torch.save(w, tmp_path / "ImageReward.pt")
    words.save_pretrained(tmp_path)
    monkeypatch.setattr(
        imagereward,
        "VISION",
        {
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
    )
    monkeypatch.setattr(
        imagereward,
        "TEXT",
        {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": len(words),
            "encoder_hidden_size": 48,
        },
    )
    (reward,) = rewards.load_all([[f"imagereward={tmp_path / 'ImageReward.pt'}"]])
    x = pictures(10, 28, 28)
    given = words(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    mean, std = (torch.tensor(z).view(3, 1, 1) for z in (dual_encoders.MEAN, dual_encoders.STD))
    wanted = imagereward_forward(w, (x - mean) / std, given["input_ids"], given["attention_mask"])
    got = reward(x, PROMPTS)["imagereward"]
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max() and wanted.std() > 1e-2
    with pytest.raises(
        ValueError, match=r"weight 'blip\.visual_encoder\.stem\.weight': is none of ImageReward's"
    ):
        imagereward.from_released({"blip.visual_encoder.stem.weight": torch.zeros(1)})


def test_imagereward_has_the_released_sizes():
    """446 million parameters or so: ViT-L/16, BERT-base with cross-attention to 1024, and the MLP."""
    with torch.device("meta"):
        model = imagereward.ImageReward()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(446, abs=5)


def test_hpsv3_goes_through_its_package(monkeypatch):
    """Pictures reach the package as PNG of 8 bits, prompts beside them; mu comes back (a stand-in of the package)."""

    class HPSv3RewardInferencer:
        def __init__(self, device):
            assert device == "cpu"

        def reward(self, prompts, image_paths):
            reds = [np.asarray(Image.open(path))[:, :, 0].mean() / 255 for path in image_paths]
            return [
                torch.tensor([red + len(prompt), 0.1])
                for red, prompt in zip(reds, prompts, strict=True)
            ]

    monkeypatch.setitem(
        sys.modules, "hpsv3", types.SimpleNamespace(HPSv3RewardInferencer=HPSv3RewardInferencer)
    )
    monkeypatch.delitem(sys.modules, "zoo.rewards.hpsv3", raising=False)
    x = pictures(11, 20, 28)
    (reward,) = rewards.load_all([["zoo.rewards.hpsv3:reward"]])
    wanted = x[:, 0].mean((1, 2)) + torch.tensor([len(p) for p in PROMPTS])
    torch.testing.assert_close(reward(x, PROMPTS)["zoo.rewards.hpsv3:reward"], wanted)
    monkeypatch.delitem(sys.modules, "zoo.rewards.hpsv3")


def test_what_is_no_reward_is_refused(encoder, tmp_path):
    """A pickle with code, an unknown weight, a wrong shape, a score that is no number: one line each."""
    folder = encoder[0]
    with pytest.raises(
        ValueError, match=r"weight 'visual\.stem\.weight': is none of an open_clip ViT's"
    ):
        dual_encoders.from_open_clip({"visual.stem.weight": torch.zeros(1)})
    torch.save({"state_dict": {"x": print}}, tmp_path / "code.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        dual_encoders.state_dict(str(tmp_path / "code.pt"))
    reward = dual_encoders.clip(str(folder))
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        reward(pictures(6, 28, 28), PROMPTS[:2])
    with pytest.raises(ValueError, match=r"reward 'hpsv2': cannot be loaded \(.*[Ww]eights"):
        rewards.load_all([[f"hpsv2={tmp_path / 'code.pt'}"]])
    (checked,) = rewards.load_all([[f"clip={folder}"]])
    with pytest.raises(ValueError, match="reward 'clip' of prompt 'red' is nan"):
        checked(pictures(6, 28, 28) * float("nan"), PROMPTS)


# ---- Rewards by name -------------------------------------------------------------------------------------------


def test_a_reward_is_taken_apart():
    """Names, places, revisions, weights, functions; what is none of these is refused."""
    for text, wanted in {
        "clip": ("clip", "", "", 1.0),
        "clip:0.5": ("clip", "", "", 0.5),
        "hpsv2=a/b@r1:2": ("hpsv2", "a/b", "r1", 2.0),
        "pickscore=/x/y": ("pickscore", "/x/y", "", 1.0),
        "my.module:f": ("my.module:f", "", "", 1.0),
        "my.module:f:1e-2": ("my.module:f", "", "", 0.01),
        "rule:3": ("rule", "", "", 3.0),
    }.items():
        assert rewards.parse_one(text) == wanted
    for bad in (
        "",
        "hps",
        "clip:",
        "clip:0",
        "clip:-1",
        "clip:inf",
        "clip:nan",
        "clip=:1",
        "rule=x",
        "a:b:c",
        ":f",
        "m:f=x",
    ):
        with pytest.raises(ValueError, match="reward "):
            rewards.parse_one(bad)
    with pytest.raises(ValueError, match="given twice"):
        rewards.parse(["clip:1", "clip=x:2"])


def test_weighted_sums_in_batches_and_one_model_for_two_uses(encoder):
    """total = sum of weight times score whatever the batch; a model that two lists name is loaded once."""
    folder, x = encoder[0], pictures(7, 40, 30)
    lists = [[f"clip={folder}:0.5", "zoo.rewards.example:warmth:3"], [f"clip={folder}"]]
    for batch in (0, 1, 2, 5):
        mine, judge = rewards.load_all(lists, batch=batch)
        scores = mine(x, PROMPTS)
        wanted = 0.5 * dual_encoders.clip(str(folder))(x, PROMPTS) + 3 * (x[:, 0] - x[:, 2]).mean(
            (1, 2)
        )
        assert (
            list(scores) == ["clip", "zoo.rewards.example:warmth"]
            and scores["clip"].dtype == torch.float32
        )
        torch.testing.assert_close(mine.total(scores), wanted, rtol=1e-5, atol=1e-5)
        assert judge.rewards["clip"] is mine.rewards["clip"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            torch.tensor([1.0, float("inf"), 0.0]),
            "of prompt 'a square' is inf: must be a finite number",
        ),
        (torch.tensor([1.0, 2.0]), r"has shape \(2,\): must be one float an image, \[3\]"),
        (torch.zeros(3, 1), r"has shape \(3, 1\)"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_with_the_prompt_named(values, said):
    """One finite float per image, or one line."""
    with pytest.raises(ValueError, match=f"reward 'mine' .*{said}"):
        rewards.Rewards({"mine": lambda images, prompts: values}, {"mine": 1.0})(
            pictures(8, 28, 28), PROMPTS
        )
    with pytest.raises(
        RuntimeError, match=r"reward 'mine' failed on prompt 'red' .*: KeyError: 'x'"
    ):
        rewards.Rewards({"mine": lambda images, prompts: {}["x"]}, {"mine": 1.0})(
            pictures(8, 28, 28), PROMPTS
        )
    listed = rewards.Rewards(
        {"mine": lambda images, prompts: [1, 2, 3]}, {"mine": 1.0}
    )  # numbers will do
    assert listed(pictures(8, 28, 28), PROMPTS)["mine"].tolist() == [1, 2, 3]
