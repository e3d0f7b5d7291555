"""Tiny pipelines and models with random weights, saved by classes of diffusers and transformers.

Their vocabulary is that of single bytes, and no two prompts have the same features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

LENGTH = 16
"""Tokens of a prompt, its begin and end among them."""
LATENT = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4}


def tiny_sd(folder: Path, length: int = LENGTH, **unet: Any) -> Path:
    """The folder of a pipeline like Stable Diffusion 1.5, of 16x16 images and 4x8x8 latents, whose
    network is changed by the options `unet`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        **LATENT,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(16, length),
        tokenizer=tiny_tokenizer(length),
        unet=UNet2DConditionModel(**{**config, **unet}),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, length: int = LENGTH, zeros: bool = True, **unet: Any) -> Path:
    """The folder of a pipeline like Stable Diffusion XL, of 16x16 images and 4x8x8 latents, with
    two text encoders, whose empty prompt is zeros where `zeros`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        **LATENT,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 16 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    schedule = {k: v for k, v in SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=tiny_clip(16, length),
        text_encoder_2=tiny_clip(24, length, projection=12),
        tokenizer=tiny_tokenizer(length),
        tokenizer_2=tiny_tokenizer(length, pad="!"),
        unet=UNet2DConditionModel(**{**config, **unet}),
        scheduler=EulerDiscreteScheduler(**schedule),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The noise levels of Stable Diffusion."""


def tiny_vae(**config: Any) -> nn.Module:
    """An AutoencoderKL of 3x16x16 images, 4x8x8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "sample_size": 16,
            "latent_channels": 4,
            **config,
        }
    )


def tiny_clip(width: int, length: int, projection: int | None = None) -> nn.Module:
    """A text encoder of CLIP of three layers, which projects where `projection` is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return _spread(model)


def whole_clip(folder: Path, length: int = LENGTH) -> Path:
    """The folder of a CLIP of pictures of 32x32 and of text, with its tokenizer and processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    both = {**layers, "num_attention_heads": 2, "projection_dim": 8}
    marks = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = {**both, **marks, "vocab_size": 514, "max_position_embeddings": length}
    vision = {**both, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    _spread(CLIPModel(config)).save_pretrained(folder)
    tiny_tokenizer(length).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def tiny_tokenizer(length: int, pad: str = "<|endoftext|>") -> Any:
    """A tokenizer of CLIP without merges: a token a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [], pad_token=pad, model_max_length=length)


def tiny_bert(
    folder: Path, width: int = 16, words: tuple[str, ...] = ("a", "red", "apple")
) -> Path:
    """The folder of an encoder like MiniLM that knows `words` and letters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    known += ["red", "apple"]
    vocabulary = {word: number for number, word in enumerate(known)}
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    _spread(BertModel(config)).save_pretrained(folder)
    BertTokenizer(vocabulary, model_max_length=32).save_pretrained(folder)
    return folder


def _spread(model: Any) -> Any:
    """`model` with weights so large that its outputs differ from input to input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.eval()
