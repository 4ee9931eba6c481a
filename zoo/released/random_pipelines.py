"""Pipelines of the real classes with random weights, saved as ordinary folders, as a hub has them.

    python -m zoo.released.random_pipelines sd3 FOLDER            tiny, 0.8 MB: every path of
                                                                  train.py on a laptop, offline
    python -m zoo.released.random_pipelines flux FOLDER --real    FLUX.1-dev's, or with sd3 SD3.5
                                                                  Medium's sizes, to time a GPU

Pictures are noise, and no figure about quality can come from here. `--real` makes the transformer
and the VAE as large as the released ones, by their public configurations; text encoders stay small,
with outputs of the right widths, since they are gone before training starts. It writes bfloat16:
5 GB for sd3, 24 GB for flux.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# Configurations, tiny and real.
SD3: dict[str, tuple[Any, Any]] = {
    "sample_size": (32, 128),
    "patch_size": (2, 2),
    "in_channels": (16, 16),
    "out_channels": (16, 16),
    "num_layers": (2, 24),
    "num_attention_heads": (2, 24),
    "attention_head_dim": (16, 64),
    "caption_projection_dim": (32, 1536),
    "joint_attention_dim": (64, 4096),
    "pooled_projection_dim": (64, 2048),
    "pos_embed_max_size": (48, 384),
    "dual_attention_layers": ((), tuple(range(13))),
    "qk_norm": (None, "rms_norm"),
}
FLUX: dict[str, tuple[Any, Any]] = {
    "patch_size": (1, 1),
    "in_channels": (64, 64),
    "num_layers": (1, 19),
    "num_single_layers": (1, 38),
    "attention_head_dim": (16, 128),
    "num_attention_heads": (2, 24),
    "joint_attention_dim": (32, 4096),
    "pooled_projection_dim": (32, 768),
    "axes_dims_rope": ((4, 6, 6), (16, 56, 56)),
}
VAE: dict[str, tuple[Any, Any]] = {
    "block_out_channels": ((8, 8), (128, 256, 512, 512)),
    "layers_per_block": (1, 2),
    "norm_num_groups": (4, 32),
}


def configuration(table: dict[str, tuple[Any, Any]], real: bool) -> dict[str, Any]:
    """One column of a table."""
    return {name: sizes[real] for name, sizes in table.items()}


def dtype_of(real: bool) -> torch.dtype:
    """What a pipeline is saved in."""
    return torch.bfloat16 if real else torch.float32


# ---- Words ---------------------------------------------------------------------------------------


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte characters, a few merges, and the two special tokens."""
    byte = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    byte += [chr(256 + n) for n in range(256 - len(byte))]
    merges = ["r e", "re d</w>", "c i", "s q"]
    tokens = [*byte, *(b + "</w>" for b in byte), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merged = folder / "vocab.json", folder / "merges.txt"
    folder.mkdir(parents=True)
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merged.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(vocabulary), str(merged), model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(character, -2.0) for character in "▁abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_ids=0,
        model_max_length=32,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A small text encoder whose pooled output has this width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """A small T5 whose tokens have this width."""
    sizes = {"d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, **sizes))


# ---- Pipelines -----------------------------------------------------------------------------------


def autoencoder(real: bool, scaling: float, shift: float) -> AutoencoderKL:
    """An AutoencoderKL to 16 channels; latents are (z - shift) * scaling of what it encodes."""
    sizes = configuration(VAE, real)
    n = len(sizes["block_out_channels"])
    return AutoencoderKL(
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling,
        shift_factor=shift,
        **sizes,
    )


def transformer(cls: type[nn.Module], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network of a class of diffusers, every parameter random.

    The initialisers leave the last layers at zero, and an adapter would pass unseen. The large ones
    are never held in float32.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        network = cls(**config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def saved(pipe: DiffusionPipeline, folder: Path) -> Path:
    """The folder, with the pipeline in it."""
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def sd3(folder: Path, real: bool = False) -> Path:
    """A StableDiffusion3Pipeline in folder/sd3: 0.8 MB, or of the size of SD3.5 Medium."""
    config, dtype = configuration(SD3, real), dtype_of(real)
    first_width, second_width = (768, 1280) if real else (32, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, words = clip_tokenizer(folder / "words"), t5_tokenizer()
        network = transformer(SD3Transformer2DModel, config, dtype)
        vae = autoencoder(real, scaling=1.5305, shift=0.0609)
        first = CLIPTextModelWithProjection(clip_config(clip, first_width))
        second = CLIPTextModelWithProjection(clip_config(clip, second_width))
        t5 = t5_encoder(words, config["joint_attention_dim"])
    pipe = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.to(dtype),
        text_encoder=first.to(dtype),
        tokenizer=clip,
        text_encoder_2=second.to(dtype),
        tokenizer_2=clip,
        text_encoder_3=t5.to(dtype),
        tokenizer_3=words,
    )
    return saved(pipe, folder / "sd3")


def flux(folder: Path, real: bool = False, guidance_embeds: bool = True) -> Path:
    """A FluxPipeline in folder/flux: 0.7 MB, or of FLUX.1's size.

    With guidance_embeds it is as dev, which takes guidance as an input; without, as schnell.
    """
    config = configuration(FLUX, real) | {"guidance_embeds": guidance_embeds}
    dtype = dtype_of(real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip, words = clip_tokenizer(folder / "words"), t5_tokenizer()
        network = transformer(FluxTransformer2DModel, config, dtype)
        vae = autoencoder(real, scaling=0.3611, shift=0.1159)
        encoder = CLIPTextModel(clip_config(clip, config["pooled_projection_dim"]))
        t5 = t5_encoder(words, config["joint_attention_dim"])
    pipe = FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=clip,
        text_encoder_2=t5.to(dtype),
        tokenizer_2=words,
    )
    return saved(pipe, folder / "flux")


MAKERS: dict[str, Callable[..., Path]] = {"sd3": sd3, "flux": flux}


def main(argv: list[str] | None = None) -> None:
    """Write a pipeline where the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.released.random_pipelines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "new or empty; the pipeline is FOLDER/FAMILY"
    parser.add_argument("family", choices=tuple(MAKERS))
    parser.add_argument("folder", type=Path, help=where)
    parser.add_argument("--real", action="store_true", help="of the released sizes")
    o = parser.parse_args(argv)
    if o.folder.exists() and (not o.folder.is_dir() or any(o.folder.iterdir())):
        sys.exit(f"random_pipelines: error: folder {o.folder}: must be new or empty")
    print(f"wrote {MAKERS[o.family](o.folder, real=o.real)}")


if __name__ == "__main__":
    main()
