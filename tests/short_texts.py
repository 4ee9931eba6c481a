"""Texts of a few tokens, where a test is about the transformer: T5 reads 32 of a prompt."""

from diffusers import FluxPipeline, StableDiffusion3Pipeline

PIPELINES = (StableDiffusion3Pipeline, FluxPipeline)


def shortened(pipeline):
    """The class's encode_prompt, with 32 tokens in the place of 256 or 512."""
    plain = pipeline.encode_prompt

    def encode_prompt(self, *given, **how):
        return plain(self, *given, **{**how, "max_sequence_length": 32})

    return encode_prompt
