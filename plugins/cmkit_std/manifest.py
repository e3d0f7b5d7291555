"""The built-in parts, by name. Imports no torch."""

from __future__ import annotations

from cmkit.plugins import Plugin, hookimpl

ADM = "Dhariwal, Nichol. Diffusion Models Beat GANs on Image Synthesis. 2021. arXiv:2105.05233"
CM = "Song, Dhariwal, Chen, Sutskever. Consistency Models. 2023. arXiv:2303.01469"
DIT = "Peebles, Xie. Scalable Diffusion Models with Transformers. 2022. arXiv:2212.09748"
LATENT = "Luo, Tan, Huang, Li, Zhao. Latent Consistency Models. 2023. arXiv:2310.04378"
DPM = (
    "Lu, Zhou, Bao, Chen, Li, Zhu. DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic "
    "Model Sampling in Around 10 Steps. 2022. arXiv:2206.00927"
)
DDPM = "Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239"
IMPLICIT = "Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2020. arXiv:2010.02502"
COSINE = (
    "Nichol, Dhariwal. Improved Denoising Diffusion Probabilistic Models. 2021. arXiv:2102.09672"
)
CTM = (
    "Kim, Lai, Liao, Murata, Takida, Uesaka, He, Mitsufuji, Ermon. Consistency Trajectory Models: "
    "Learning Probability Flow ODE Trajectory of Diffusion. 2023. arXiv:2310.02279"
)
IMPROVED = (
    "Song, Dhariwal. Improved Techniques for Training Consistency Models. 2023. arXiv:2310.14189"
)
PROGRESSIVE = (
    "Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. 2022. "
    "arXiv:2202.00512"
)
SONG = (
    "Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole. Score-Based Generative Modeling through "
    "Stochastic Differential Equations. 2020. arXiv:2011.13456"
)
EDM = (
    "Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative "
    "Models. 2022. arXiv:2206.00364"
)
EDM2 = (
    "Karras, Aittala, Lehtinen, Hellsten, Aila, Laine. Analyzing and Improving the Training "
    "Dynamics of Diffusion Models. 2023. arXiv:2312.02696"
)
RESCALING = (
    "Zhu, Lin, Liu, Ning, Blaschko. Rescaling Intermediate Features Makes Trained "
    "Consistency Models Perform Better. ICLR 2024 Tiny Papers"
)
DIGITS = (
    "Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning "
    "Repository. 1998"
)
FASHION = (
    "Xiao, Rasul, Vollgraf. Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine "
    "Learning Algorithms. 2017. arXiv:1708.07747"
)
CIFAR = "Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009"
LSUN = (
    "Yu, Seff, Zhang, Song, Funkhouser, Xiao. LSUN: Construction of a Large-scale Image Dataset "
    "using Deep Learning with Humans in the Loop. 2015. arXiv:1506.03365"
)
IMAGENET64 = (
    "Chrabaszcz, Loshchilov, Hutter. A Downsampled Variant of ImageNet as an Alternative to the "
    "CIFAR datasets. 2017. arXiv:1707.08819"
)
FIDELITY = (
    "Obukhov, Seitzer, Wu, Zhydenko, Kyl, Lin. High-fidelity performance metrics for "
    "generative models in PyTorch. 2020"
)

examples = {
    "backbone.adm": {"channels": 16, "norm_groups": 8, "channel_mult": [1, 2], "num_res_blocks": 1},
    "backbone.songunet": {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1},
    "backbone.edm2": {
        "channels": 16,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "num_head_channels": 16,
    },
    "backbone.dit": {
        "patch_size": 4,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "time_scale": 1.0,
    },
    "objective.cd": {"distance": "l2"},
    "objective.ct": {"distance": "l2"},
    "objective.ctm": {"distance": "l2"},
    "sampler.lcm": {"steps": 2},
    "sampler.gamma": {"gamma": 0.5, "sigmas": [2.0]},
    "sampler.multistep": {"sigmas": [10.0, 0.8]},
    "sampler.heun": {"s_churn": 40.0},
    "sampler.dpm": {"s_churn": 40.0},
    "rescaler.global": {"skip": 0.8, "emb": 1.1},
    "rescaler.per_layer": {"skip": [0.8, 0.9], "emb": 1.1, "sites": {"emb.1": 1.2}},
    "rescaler.per_timestep": {"sigmas": [0.5, 80.0], "skip": [0.9, 0.8], "emb": 1.1},
    "metric.fidelity": {"isc": True, "kid": True, "precision_recall": True, "kid_subset_size": 20},
}
"""Small options for `cmkit plugins check`, where defaults are large or need a file."""


@hookimpl
def cmkit_register() -> list[Plugin]:
    return [
        Plugin(
            "backbone",
            "adm",
            "cmkit_std.backbones.adm:ADM",
            "The U-Net of the consistency-model papers",
            cite=ADM,
        ),
        Plugin(
            "backbone",
            "songunet",
            "cmkit_std.backbones.songunet:SongUNet",
            "The U-Nets DDPM++ and NCSN++ of EDM, iCT, ECT and CTM on CIFAR-10",
            cite=f"{SONG}; {EDM}",
        ),
        Plugin(
            "backbone",
            "edm2",
            "cmkit_std.backbones.edm2:EDM2",
            "The magnitude-preserving U-Net of EDM2, and of ECT on ImageNet-64",
            cite=EDM2,
        ),
        Plugin(
            "backbone",
            "dit",
            "cmkit_std.backbones.dit:DiT",
            "The diffusion transformer, on pictures or latents",
            cite=DIT,
        ),
        Plugin(
            "precond",
            "consistency",
            "cmkit_std.preconds.consistency:Consistency",
            "Consistency models: the identity at sigma_min",
            cite=CM,
        ),
        Plugin(
            "precond",
            "edm",
            "cmkit_std.preconds.edm:EDM",
            "Diffusion models of EDM",
            cite=EDM,
        ),
        Plugin(
            "precond",
            "discrete",
            "cmkit_std.preconds.discrete:Discrete",
            "Whole steps of DDPM, DiT, guided-diffusion and latent diffusion; latent consistency",
            cite=f"{DDPM}; {LATENT}",
        ),
        Plugin(
            "precond",
            "vp",
            "cmkit_std.preconds.vp:VP",
            "Variance-preserving diffusion models in continuous time",
            cite=SONG,
        ),
        Plugin(
            "precond",
            "ve",
            "cmkit_std.preconds.ve:VE",
            "Variance-exploding diffusion models",
            cite=SONG,
        ),
        Plugin(
            "precond",
            "iddpm",
            "cmkit_std.preconds.iddpm:IDDPM",
            "The steps of a cosine schedule, at any noise level",
            cite=COSINE,
        ),
        Plugin(
            "objective",
            "cd",
            "cmkit_std.objectives.cd:CD",
            "Consistency distillation",
            cite=CM,
        ),
        Plugin(
            "objective",
            "ct",
            "cmkit_std.objectives.ct:CT",
            "Consistency training",
            cite=CM,
        ),
        Plugin(
            "objective",
            "ccd",
            "cmkit_std.objectives.ccd:CCD",
            "Continuous-time consistency distillation",
            cite=CM,
        ),
        Plugin(
            "objective",
            "cct",
            "cmkit_std.objectives.cct:CCT",
            "Continuous-time consistency training",
            cite=CM,
        ),
        Plugin(
            "objective",
            "ict",
            "cmkit_std.objectives.ict:ICT",
            "Improved consistency training",
            cite=IMPROVED,
        ),
        Plugin(
            "objective",
            "ctm",
            "cmkit_std.objectives.ctm:CTM",
            "Consistency trajectory training: jumps between any two noise levels",
            cite=CTM,
        ),
        Plugin(
            "objective",
            "pd",
            "cmkit_std.objectives.pd:PD",
            "Progressive distillation",
            cite=PROGRESSIVE,
        ),
        Plugin(
            "objective",
            "lcm",
            "cmkit_std.objectives.lcm:LCM",
            "Latent consistency distillation: a guided teacher, an embedded guidance weight",
            cite=LATENT,
        ),
        Plugin(
            "objective",
            "edm",
            "cmkit_std.objectives.edm:EDM",
            "Diffusion training, which makes teachers",
            cite=EDM,
        ),
        Plugin(
            "sampler",
            "multistep",
            "cmkit_std.samplers.multistep:Multistep",
            "One step, or several with fresh noise between them",
            cite=CM,
        ),
        Plugin(
            "sampler",
            "lcm",
            "cmkit_std.samplers.lcm:LCM",
            "Latent consistency models: several steps at evenly skipped noise levels",
            cite=LATENT,
        ),
        Plugin(
            "sampler",
            "gamma",
            "cmkit_std.samplers.gamma:Gamma",
            "Consistency trajectory models: long jumps with as much fresh noise as wanted",
            cite=CTM,
        ),
        Plugin(
            "sampler",
            "ablation",
            "cmkit_std.samplers.ablation:Ablation",
            "EDM's sampler, and those of its ablation: VP, VE, iDDPM; Euler, Heun, midpoint",
            cite=EDM,
        ),
        Plugin(
            "sampler",
            "euler",
            "cmkit_std.samplers.euler:Euler",
            "Diffusion models: first-order steps, deterministic",
            cite=EDM,
        ),
        Plugin(
            "sampler",
            "ddim",
            "cmkit_std.samplers.ddim:DDIM",
            "Diffusion models: first-order steps with as much fresh noise as wanted",
            cite=IMPLICIT,
        ),
        Plugin(
            "sampler",
            "heun",
            "cmkit_std.samplers.heun:Heun",
            "Diffusion models: second-order steps with optional churn",
            cite=EDM,
        ),
        Plugin(
            "sampler",
            "edm",
            "cmkit_std.samplers.edm:EDM",
            "Diffusion models: the sampler of EDM, unclamped and in float64",
            cite=EDM,
        ),
        Plugin(
            "sampler",
            "dpm",
            "cmkit_std.samplers.dpm:DPM",
            "Diffusion models: second-order midpoint steps with optional churn",
            cite=DPM,
        ),
        Plugin(
            "sampler",
            "ancestral",
            "cmkit_std.samplers.ancestral:Ancestral",
            "Diffusion models: Euler steps with fresh noise after each",
            cite=DDPM,
        ),
        Plugin(
            "sampler",
            "progdist",
            "cmkit_std.samplers.progdist:ProgDist",
            "Progressively distilled models: DDIM steps that end at sigma_min",
            cite=PROGRESSIVE,
        ),
        Plugin(
            "rescaler",
            "global",
            "cmkit_std.rescalers.global_:Global",
            "Two numbers: one for all skips, one for all embeddings",
            cite=RESCALING,
        ),
        Plugin(
            "rescaler",
            "per_layer",
            "cmkit_std.rescalers.per_layer:PerLayer",
            "A number for every skip and every embedding",
            cite=RESCALING,
        ),
        Plugin(
            "rescaler",
            "per_timestep",
            "cmkit_std.rescalers.per_timestep:PerTimestep",
            "Two numbers that depend on the noise level",
            cite=RESCALING,
        ),
        Plugin(
            "dataset",
            "cifar10",
            "cmkit_std.datasets.cifar10:CIFAR10",
            "60,000 photographs of 10 classes, 32x32, from the binary archive",
            cite=CIFAR,
        ),
        Plugin(
            "dataset",
            "digits",
            "cmkit_std.datasets.digits:Digits",
            "1,797 scanned handwritten digits, 8x8, shipped by scikit-learn",
            cite=DIGITS,
        ),
        Plugin(
            "dataset",
            "fashion_mnist",
            "cmkit_std.datasets.fashion_mnist:FashionMNIST",
            "70,000 pictures of clothing, 28x28, from IDX files",
            cite=FASHION,
        ),
        Plugin(
            "dataset",
            "image_folder",
            "cmkit_std.datasets.image_folder:ImageFolder",
            "Your own pictures, one folder or one folder a class",
        ),
        Plugin(
            "dataset",
            "imagenet64",
            "cmkit_std.datasets.imagenet64:ImageNet64",
            "1,281,167 photographs, 64x64, 1,000 classes, from downsampled ImageNet or folders",
            cite=IMAGENET64,
        ),
        Plugin(
            "dataset",
            "lsun",
            "cmkit_std.datasets.lsun:LSUN",
            "Bedrooms, cats or churches, from an LMDB of LSUN or a folder of its pictures",
            cite=LSUN,
        ),
        Plugin(
            "metric",
            "fidelity",
            "cmkit_std.metrics.fidelity:Fidelity",
            "FID, sFID, Inception score, KID, precision and recall",
            cite=FIDELITY,
        ),
        Plugin(
            "metric",
            "digits_judge",
            "cmkit_std.metrics.digits_judge:DigitsJudge",
            "How many samples an independent classifier takes for a digit, and of how many classes",
        ),
    ]
