"""The built-in parts, by name. Imports no torch."""

from __future__ import annotations

from cmkit.plugins import Plugin, hookimpl


@hookimpl
def cmkit_register() -> list[Plugin]:
    return [
        Plugin(
            "backbone",
            "adm",
            "cmkit_std.backbones.adm:ADM",
            "The U-Net of the consistency-model papers",
            cite="dhariwal2021diffusion",
        ),
        Plugin(
            "objective",
            "ct",
            "cmkit_std.objectives.ct:CT",
            "Consistency training",
            cite="song2023consistency",
        ),
        Plugin(
            "objective",
            "ict",
            "cmkit_std.objectives.ict:ICT",
            "Improved consistency training",
            cite="song2023improved",
        ),
        Plugin(
            "sampler",
            "multistep",
            "cmkit_std.samplers.multistep:Multistep",
            "One step, or several with fresh noise between them",
            cite="song2023consistency",
        ),
        Plugin(
            "rescaler",
            "global",
            "cmkit_std.rescalers.global_:Global",
            "Two numbers: one for all skips, one for all embeddings",
            cite="zhu2024rescaling",
        ),
        Plugin(
            "dataset",
            "digits",
            "cmkit_std.datasets.digits:Digits",
            "1,797 scanned handwritten digits, 8x8, shipped by scikit-learn",
            cite="alpaydin1998optical",
        ),
        Plugin(
            "dataset",
            "fashion_mnist",
            "cmkit_std.datasets.fashion_mnist:FashionMNIST",
            "70,000 pictures of clothing, 28x28, from IDX files",
            cite="xiao2017fashion",
        ),
        Plugin(
            "dataset",
            "image_folder",
            "cmkit_std.datasets.image_folder:ImageFolder",
            "Your own pictures, one folder or one folder a class",
        ),
        Plugin(
            "metric",
            "fidelity",
            "cmkit_std.metrics.fidelity:Fidelity",
            "FID, Inception score, KID, precision and recall, by torch-fidelity",
            cite="obukhov2020torchfidelity",
        ),
        Plugin(
            "metric",
            "digits_judge",
            "cmkit_std.metrics.digits_judge:DigitsJudge",
            "How many samples an independent classifier takes for a digit, and of how many classes",
        ),
    ]
