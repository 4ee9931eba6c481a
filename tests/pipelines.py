"""Tiny pipelines of the real classes with random weights, saved as ordinary folders: what a hub would have given."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte characters, a few merges, and the two special tokens."""
    byte = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    byte += [chr(256 + n) for n in range(256 - len(byte))]
    merges = ["r e", "re d</w>", "c i", "s q"]
    tokens = [*byte, *(b + "</w>" for b in byte), *(m.replace(" ", "") for m in merges), "<|startoftext|>",
              "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((c, -2.0) for c in "▁abcdefghijklmnopqrstuvwxyz ")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
                           extra_ids=0,
                           model_max_length=32)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2,
                          num_attention_heads=4, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)



def enlarged(network: torch.nn.Module) -> torch.nn.Module:
    """With every parameter random: the initialisers leave the last layers at zero, and an adapter would pass unseen."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def sd3(folder: Path) -> Path:
    """A StableDiffusion3Pipeline of 0.8 MB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, words = clip_tokenizer(folder / "words"), t5_tokenizer()
        pipe = StableDiffusion3Pipeline(
            transformer=enlarged(SD3Transformer2DModel(
                sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2,
                attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
                pos_embed_max_size=48)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
            text_encoder=CLIPTextModelWithProjection(text_config(clip)), tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(text_config(clip)), tokenizer_2=clip,
            text_encoder_3=t5_of(words, 64), tokenizer_3=words)
        pipe.save_pretrained(folder / "sd3", safe_serialization=True)
    return folder / "sd3"


def t5_of(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    return T5EncoderModel(config)


def flux(folder: Path, guidance_embeds: bool) -> Path:
    """A FluxPipeline of 0.7 MB: as FLUX.1-dev with the guidance embedding, as schnell without."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clip, words = clip_tokenizer(folder / "words"), t5_tokenizer()
        pipe = FluxPipeline(
            transformer=enlarged(FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
                guidance_embeds=guidance_embeds)),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds), vae=autoencoder(),
            text_encoder=CLIPTextModel(text_config(clip)), tokenizer=clip,
            text_encoder_2=t5_of(words, 32), tokenizer_2=words)
        pipe.save_pretrained(folder / "flux", safe_serialization=True)
    return folder / "flux"
