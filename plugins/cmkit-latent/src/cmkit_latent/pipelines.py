"""The Stable Diffusion pipelines of diffusers as recipes, and recipes as such pipelines. Imports no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmkit import CheckpointError, RecipeError
from cmkit.files import read_json
from cmkit_latent import hub
from cmkit_latent.autoencoder import WIDTHS

ONE, XL, LCM = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)
GUIDANCE = {ONE: 6.5, XL: 4.0, LCM: 7.5}
"""What each is guided with by default, the usual scale less 1."""
SCHEDULERS = ("LCMScheduler", "EulerDiscreteScheduler")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""What schedulers take for absent keys."""
SPACINGS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
STEPS = 50
"""Of a diffusion model, as pipelines have it by default."""


def index_of(
    components: Mapping[str, Any], scheduler: str, conditions: frozenset[str]
) -> dict[str, Any]:
    """The model_index.json beside its components, as `Backbone.pipeline` returns it."""
    if scheduler not in SCHEDULERS:
        raise RecipeError(
            f"Stable Diffusion pipelines draw by {' or '.join(SCHEDULERS)}; set sampler.use ="
            ' "lcm" or "ddim"'
        )
    wanted = {"pooled": SECOND} if "pooled" in conditions else {}
    for parts in (("vae",), ("text_encoder", "tokenizer"), *wanted.values()):
        if lacking := [part for part in parts if part not in components]:
            raise RecipeError(
                f"a pipeline needs {' and '.join(lacking)}; add the [codec] and [text] that the"
                " network was trained with"
            )
    if "pooled" in conditions:
        return {"_class_name": XL}
    embeds = "guidance" in conditions and scheduler == "LCMScheduler"
    absent = ("safety_checker", "feature_extractor", "image_encoder")
    return {
        "_class_name": LCM if embeds else ONE,
        "requires_safety_checker": False,
        **{name: [None, None] for name in absent},
    }


def recipe_of(pipeline: str) -> dict[str, Any] | None:
    """The recipe of a folder or "hub:OWNER/NAME", as `Backbone.recipe_of` returns it."""
    folder = hub.folder_of(pipeline, "SOURCE", (*PARTS, *SECOND), config_only=True)
    index = read_json(folder / "model_index.json")
    if (name := index.get("_class_name")) not in GUIDANCE:
        if pipeline.startswith("hub:"):
            raise RecipeError(
                f"{pipeline}: a {name}, and drawn from is {', '.join(GUIDANCE)}; give another, or"
                " fetch it and give its folder"
            )
        return None
    _require_whole(folder, index)
    network = hub.config_of(folder / "unet")
    embeds = network.get("time_cond_proj_dim") is not None
    consistency, precond, sampler = _drawing(folder / "scheduler", str(name))
    autoencoder = hub.config_of(folder / "vae")
    widths = next(autoencoder[key] for key in WIDTHS.values() if key in autoencoder)
    resolution = (network.get("sample_size") or 64) * 2 ** (len(widths) - 1)
    guidance = GUIDANCE[str(name)] if embeds or not consistency else None
    said = {"guidance": guidance} if guidance is not None else {}
    return {
        "dataset": {
            "use": "invented",
            "channels": autoencoder.get("in_channels", 3),
            "resolution": resolution,
            "images": 2,
        },
        "codec": {"use": "autoencoder", "weights": pipeline},
        "text": _text(pipeline, folder, index),
        "backbone": {"use": "sd_unet", "folder": pipeline},
        "denoiser": {"precond": precond, "weights": pipeline, "embeds_guidance": embeds, **said},
        "sampler": sampler,
    }


def _require_whole(folder: Path, index: Mapping[str, Any]) -> None:
    """CheckpointError naming the parts that a pipeline's folder lacks."""
    second = [part for part in SECOND if index["_class_name"] == XL]
    lacking = [part for part in (*PARTS, *second) if not any((folder / part).glob("*.json"))]
    if lacking:
        raise CheckpointError(
            f"{folder}: half a pipeline, without {', '.join(lacking)}; fetch or save it again"
        )


def _drawing(folder: Path, pipeline: str) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Whether a scheduler's folder is of a consistency model, and its precond and sampler."""
    path = folder / "scheduler_config.json"
    said = read_json(path)
    consistency = pipeline == LCM or said.get("_class_name") == "LCMScheduler"
    said = {**(_LCM_BETAS if consistency else _BETAS), **said}
    for key in ("trained_betas", "rescale_betas_zero_snr", "thresholding"):
        if said.get(key):
            raise RecipeError(
                f"{path}: {key} is something that cannot be said here; write a recipe with another"
                " precond, or draw with diffusers"
            )
    precond = {"use": "discrete", **schedule_of(path, said), "unit_start": True}
    if not consistency:
        return False, precond, {"use": "ddim", "steps": STEPS}
    precond["timestep_scaling"] = float(said.get("timestep_scaling", 10.0))
    return True, precond, {"use": "lcm", "grid": said.get("original_inference_steps", 50)}


def schedule_of(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of precond `discrete` that the config of a scheduler says, read from `path`;
    RecipeError for a schedule that it does not have."""
    if (spacing := said.get("beta_schedule", "linear")) not in SPACINGS:
        raise RecipeError(
            f"{path}: beta_schedule = {spacing!r} is not known here; known: {', '.join(SPACINGS)}"
        )
    if said.get("prediction_type") == "flow_prediction":
        raise RecipeError(f"{path}: a flow model, which is not known here; draw with diffusers")
    found: dict[str, Any] = {"prediction": said.get("prediction_type", "epsilon")}
    if "beta_schedule" in said:
        found["spacing"] = SPACINGS[spacing]
    if "num_train_timesteps" in said:
        found["steps"] = said["num_train_timesteps"]
    if found.get("spacing") != "cosine":  # whose betas are its own
        found |= {key: float(said[key]) for key in ("beta_start", "beta_end") if key in said}
    return found


def _text(pipeline: str, folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt encoder of a pipeline."""
    said = index.get("text_encoder")
    name = str(said[1]) if isinstance(said, list) and len(said) == 2 else "None"
    if name.startswith("CLIPText"):
        return {"use": "clip", "weights": pipeline}
    if name.endswith("Model") and index["_class_name"] != XL:
        encoder = hub.config_of(folder / "text_encoder")
        most = encoder.get("max_position_embeddings", 512)
        length = read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length")
        masked = bool(encoder.get("use_attention_mask", False))
        length = min(int(length or most), most)
        return {"use": "sentence", "weights": pipeline, "length": length, "mask": masked}
    raise RecipeError(
        f"{pipeline}: its prompts are encoded by a {name}, which is not known here; write a recipe"
        " with another [text]"
    )
