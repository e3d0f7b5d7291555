"""The parts of this package, by name. Imports no torch."""

from __future__ import annotations

from cmkit.plugins import Plugin, hookimpl

LATENT = (
    "Rombach, Blattmann, Lorenz, Esser, Ommer. High-Resolution Image Synthesis with Latent "
    "Diffusion Models. 2022. arXiv:2112.10752"
)
SDXL = (
    "Podell, English, Lacey, Blattmann, Dockhorn, Mueller, Penna, Rombach. SDXL: Improving Latent "
    "Diffusion Models for High-Resolution Image Synthesis. 2023. arXiv:2307.01952"
)
CLIP = (
    "Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, "
    "Sutskever. Learning Transferable Visual Models From Natural Language Supervision. 2021. "
    "arXiv:2103.00020"
)
SENTENCE = (
    "Reimers, Gurevych. Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks. 2019. "
    "arXiv:1908.10084"
)
LORA = (
    "Luo, Tan, Patil, Gu, von Platen, Passos, Huang, Li, Zhao. LCM-LoRA: A Universal "
    "Stable-Diffusion Acceleration Module. 2023. arXiv:2311.05556"
)
SCORE = (
    "Hessel, Holtzman, Forbes, Le Bras, Choi. CLIPScore: A Reference-free Evaluation Metric for "
    "Image Captioning. 2021. arXiv:2104.08718"
)


examples = {
    "backbone.sd_unet": {"preset": "tiny"},
    "codec.patches": {"patch": 2, "channels": 1, "components": 4},
    "adapter.lora": {"rank": 2},
}
"""Small options for `cmkit plugins check`; other parts need files."""


@hookimpl
def cmkit_register() -> list[Plugin]:
    """Every part of this package."""
    here = "cmkit_latent"
    return [
        Plugin(
            "backbone",
            "sd_unet",
            f"{here}.backbone:SDUNet",
            "The U-Nets of Stable Diffusion 1.5, 2.1, XL and SSD-1B, by diffusers",
            f"{LATENT}; {SDXL}",
        ),
        Plugin(
            "codec",
            "autoencoder",
            f"{here}.autoencoder:Autoencoder",
            "The autoencoders of latent diffusion, KL or tiny, by diffusers",
            LATENT,
        ),
        Plugin(
            "codec",
            "patches",
            f"{here}.patches:Patches",
            "Principal components of small patches, in closed form",
        ),
        Plugin(
            "text",
            "clip",
            f"{here}.clip:Clip",
            "CLIP's text encoder, or the two of SDXL with pooled features and sizes",
            f"{CLIP}; {SDXL}",
        ),
        Plugin(
            "text",
            "sentence",
            f"{here}.sentence:Sentence",
            "Any encoder like BERT, such as MiniLM",
            SENTENCE,
        ),
        Plugin(
            "text",
            "words",
            f"{here}.words:Words",
            "A random vector for each word, without weights: for tests and smoke runs",
        ),
        Plugin(
            "adapter",
            "lora",
            f"{here}.lora:Lora",
            "Low-rank adaptation (LoRA), in files that diffusers loads, by peft",
            LORA,
        ),
        Plugin(
            "dataset",
            "captions",
            f"{here}.captions:Captions",
            "Your own pictures with captions: folders, tars of img2dataset, Hugging Face datasets",
        ),
        Plugin(
            "metric",
            "clip_score",
            f"{here}.clip_score:ClipScore",
            "How well samples agree with their prompts, by CLIP",
            SCORE,
        ),
    ]
