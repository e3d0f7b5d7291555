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
NOTO = "Google and others. Noto Color Emoji 2.042. 2023; Unicode CLDR 48"
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
INDEXING = (
    "Kanerva, Kristoferson, Holst. Random Indexing of Text Samples for Latent Semantic Analysis. "
    "CogSci 2000"
)
FIDELITY = (
    "Obukhov, Seitzer, Wu, Zhydenko, Kyl, Lin. High-fidelity performance metrics for "
    "generative models in PyTorch. 2020"
)

BACKBONES = {
    "adm:ADM": ("The U-Net of the consistency-model papers", ADM),
    "songunet:SongUNet": (
        "The U-Nets DDPM++ and NCSN++ of EDM, iCT, ECT and CTM on CIFAR-10",
        f"{SONG}; {EDM}",
    ),
    "edm2:EDM2": ("The magnitude-preserving U-Net of EDM2, and of ECT on ImageNet-64", EDM2),
    "dit:DiT": ("The diffusion transformer, on pictures or latents", DIT),
}
PRECONDS = {
    "consistency:Consistency": ("Consistency models: the identity at sigma_min", CM),
    "edm:EDM": ("Diffusion models of EDM", EDM),
    "discrete:Discrete": (
        "Whole steps of DDPM, DiT, guided-diffusion and latent diffusion; latent consistency",
        f"{DDPM}; {LATENT}",
    ),
    "vp:VP": ("Variance-preserving diffusion models in continuous time", SONG),
    "ve:VE": ("Variance-exploding diffusion models", SONG),
    "iddpm:IDDPM": ("The steps of a cosine schedule, at any noise level", COSINE),
}
OBJECTIVES = {
    "cd:CD": ("Consistency distillation", CM),
    "ct:CT": ("Consistency training", CM),
    "ccd:CCD": ("Continuous-time consistency distillation", CM),
    "cct:CCT": ("Continuous-time consistency training", CM),
    "ict:ICT": ("Improved consistency training", IMPROVED),
    "ctm:CTM": ("Consistency trajectory training: jumps between any two noise levels", CTM),
    "pd:PD": ("Progressive distillation", PROGRESSIVE),
    "lcm:LCM": (
        "Latent consistency distillation: a guided teacher, an embedded guidance weight",
        LATENT,
    ),
    "edm:EDM": ("Diffusion training, which makes teachers", EDM),
}
SAMPLERS = {
    "multistep:Multistep": ("One step, or several with fresh noise between them", CM),
    "lcm:LCM": ("Latent consistency models: several steps at evenly skipped noise levels", LATENT),
    "gamma:Gamma": (
        "Consistency trajectory models: long jumps with as much fresh noise as wanted",
        CTM,
    ),
    "ablation:Ablation": (
        "EDM's sampler, and those of its ablation: VP, VE, iDDPM; Euler, Heun, midpoint",
        EDM,
    ),
    "euler:Euler": ("Diffusion models: first-order steps, deterministic", EDM),
    "ddim:DDIM": (
        "Diffusion models: first-order steps with as much fresh noise as wanted",
        IMPLICIT,
    ),
    "heun:Heun": ("Diffusion models: second-order steps with optional churn", EDM),
    "edm:EDM": ("Diffusion models: the sampler of EDM, unclamped and in float64", EDM),
    "dpm:DPM": (
        "Diffusion models: midpoint steps as OpenAI runs them, with optional churn",
        DPM,
    ),
    "ancestral:Ancestral": ("Diffusion models: Euler steps with fresh noise after each", DDPM),
    "progdist:ProgDist": (
        "Progressively distilled models: DDIM steps that end at sigma_min",
        PROGRESSIVE,
    ),
}
RESCALERS = {
    "global_:Global": ("Two numbers: one for all skips, one for all embeddings", RESCALING),
    "per_layer:PerLayer": ("A number for every skip and every embedding", RESCALING),
    "per_timestep:PerTimestep": ("Two numbers that depend on the noise level", RESCALING),
    "saved:Saved": (
        "The scales that another run's search found",
        RESCALING,
    ),
}
DATASETS = {
    "cifar10:CIFAR10": ("60,000 photographs of 10 classes, 32x32, from the binary archive", CIFAR),
    "digits:Digits": ("1,797 scanned handwritten digits, 8x8, shipped by scikit-learn", DIGITS),
    "emoji:Emoji": (
        "1,579 emoji of a free font, 32x32, captions in six languages; shipped with cmkit",
        NOTO,
    ),
    "fashion_mnist:FashionMNIST": ("70,000 pictures of clothing, 28x28, from IDX files", FASHION),
    "image_folder:ImageFolder": ("Your own pictures, one folder or one folder a class", None),
    "imagenet64:ImageNet64": (
        "1,281,167 photographs, 64x64, 1,000 classes, from downsampled ImageNet or folders",
        IMAGENET64,
    ),
    "invented:Invented": ("Waves of no meaning, for trying a recipe without its data", None),
    "lsun:LSUN": (
        "Bedrooms, cats or churches, from an LMDB of LSUN or a folder of its pictures",
        LSUN,
    ),
}
TRACKERS = {"csv:CSV": ("A file of losses, learning rates and scores as comma-separated values",)}
TEXTS = {
    "emoji_words:EmojiWords": (
        "Words of the emoji's captions in six languages, in closed form, without weights",
        INDEXING,
    ),
}
METRICS = {
    "fidelity:Fidelity": ("FID, sFID, Inception score, KID, precision and recall", FIDELITY),
    "digits_judge:DigitsJudge": (
        "How many samples an independent classifier takes for a digit, and of how many classes",
        None,
    ),
    "emoji_judge:EmojiJudge": (
        "How many samples an independent classifier takes for an emoji, and for one of the prompt's"
        " group",
        None,
    ),
}

TINY = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
examples = {
    "backbone.adm": {**TINY, "norm_groups": 8},
    "backbone.songunet": TINY,
    "backbone.edm2": {**TINY, "num_head_channels": 16},
    "backbone.dit": {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "time_scale": 1.0},
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
    """A plugin for each line above, "module:Class": (summary, citation); a part has the name of its
    module, whose folder is that of its kind."""
    tables = {
        "backbone": BACKBONES,
        "precond": PRECONDS,
        "objective": OBJECTIVES,
        "sampler": SAMPLERS,
        "rescaler": RESCALERS,
        "dataset": DATASETS,
        "text": TEXTS,
        "metric": METRICS,
        "tracker": TRACKERS,
    }
    return [
        Plugin(kind, target.partition(":")[0].rstrip("_"), f"cmkit_std.{kind}s.{target}", *about)
        for kind, parts in tables.items()
        for target, about in parts.items()
    ]
