"""Folders of published models: local ones, those of packages, and of the Hugging Face Hub.

Only safetensors are fetched and read, never pickles. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit import CheckpointError, RecipeError
from cmkit.files import OFFLINE, cached_sha256, digest_of, read_json
from cmkit.hub import REPOSITORY, trouble

if TYPE_CHECKING:
    import torch

WEIGHTS = ("diffusion_pytorch_model", "model")
"""How the names of weight files begin, in diffusers and in transformers."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
TEXTS = (
    "config.json",
    "model_index.json",
    *(f"{name}.safetensors.index.json" for name in WEIGHTS),
    *VOCABULARIES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "scheduler_config.json",
    "preprocessor_config.json",
)
"""The small files of a part: its configuration, and the vocabulary of a tokenizer."""
LEFT_OUT = ("*.fp16.*", "*.non_ema.*", "*openvino*", "*flax*", "*onnx*")
"""Other forms of the same weights."""
PICKLES = ("bin", "pt", "pth", "ckpt")


def folder_of(
    weights: str, what: str, parts: Sequence[str] = (), config_only: bool = False
) -> Path:
    """The local folder of `weights`: a folder's path, "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"
    for a repository of the Hugging Face Hub, "package:MODULE" for what an installed package holds.

    `what` is the recipe's key, for messages. `parts` are the subfolders of a pipeline that are
    needed, none = all of them; a repository that is no pipeline is fetched whole. `config_only`
    fetches their small files alone. What is in the hub's cache is taken from there without a
    question to the hub, so that a name without a revision stays what it was when first fetched.

    DownloadError where a repository cannot be had, CheckpointError where a folder is not there.
    """
    if weights.startswith("hub:"):
        return _of_hub(weights, what, parts, config_only)
    if weights.startswith("package:"):
        return _of_package(weights, what)
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{what} = {weights}: no such folder; name the folder of a model in the form of"
            " diffusers or transformers, or hub:OWNER/NAME"
        )
    return folder


def _of_package(weights: str, what: str) -> Path:
    name = weights.removeprefix("package:")
    spec = find_spec(name) if name.isidentifier() else None  # it is not imported
    for place in (spec and spec.submodule_search_locations) or ():
        for folder in (Path(place), *sorted(Path(place).iterdir())):
            if (folder / "config.json").is_file() and any(_safetensors(folder)):
                return folder
    seen = "no folder in it has config.json and safetensors" if spec else "it is not installed"
    raise CheckpointError(f"{what} = {weights}: {seen}; name one that holds a model, or a folder")


def _of_hub(weights: str, what: str, parts: Sequence[str], config_only: bool) -> Path:
    if not (said := REPOSITORY.fullmatch(weights)):
        raise RecipeError(f"{what} = {weights}: write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    files = [*TEXTS, *(() if config_only else (f"{name}*.safetensors" for name in WEIGHTS))]
    places = ["", *(f"{part}/" for part in parts or ("*",))]
    wanted: dict[str, Any] = {
        "repo_id": said["name"],
        "revision": said["revision"],
        "allow_patterns": [f"{place}{file}" for place in places for file in files],
        "ignore_patterns": list(LEFT_OUT),
    }
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(**wanted, local_files_only=True))
            if not _lacking(folder, parts, config_only):
                return folder
        folder = Path(snapshot_download(**wanted, local_files_only=OFFLINE.get()))
    except HFValidationError as error:
        raise RecipeError(f"{what} = {weights}: {error}") from error
    except Exception as error:  # of three libraries, and of the machine
        instead = ", or fetch it elsewhere and name its folder"
        if "." in what:
            instead += f": --set {what}=FOLDER"
        place = f"{what} = {weights}"
        raise trouble(error, said["name"], place, instead) from error
    if lacking := _lacking(folder, parts, config_only):
        raise CheckpointError(
            f"{what} = {weights}: the repository has no {lacking}; name another, or a folder that"
            " holds one"
        )
    return folder


def _lacking(folder: Path, parts: Sequence[str], config_only: bool) -> str:
    """What a folder lacks of the parts that it should have, in words; "" where it lacks nothing."""
    index = folder / "model_index.json"
    said = read_json(index) if index.is_file() else {"": ["a model alone"]}
    for part in (name for name, entry in said.items() if isinstance(entry, list) and entry[0]):
        place = folder / part
        if part and parts and part not in parts:
            continue
        if not any(place.glob("*.json")):
            return f"{part or 'config.json'}"
        if not config_only and (place / "config.json").is_file() and not any(_safetensors(place)):
            return f"safetensors{' of ' + part if part else ''}"
    return ""


def _safetensors(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith(WEIGHTS):
            yield file


def part_of(folder: Path, part: str, what: str) -> Path:
    """The subfolder `part` of a pipeline's folder; CheckpointError where there is none."""
    place = folder / part
    if not place.is_dir():
        raise CheckpointError(
            f"{what} = {folder}: no subfolder {part}; name a whole pipeline, as diffusers saves it"
        )
    return place


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration of the model in `folder`; CheckpointError where there is none."""
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors of a model's folder and the name of their variant: "fp16" where these are
    all that is there. CheckpointError where there are none."""
    files = list(_safetensors(folder))
    plain = [file for file in files if not any(file.match(other) for other in LEFT_OUT)]
    if plain:
        return plain, None
    if half := [file for file in files if ".fp16." in file.name]:
        return half, "fp16"
    pickles = sorted(file.name for end in PICKLES for file in folder.glob(f"*.{end}"))
    seen = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
    raise CheckpointError(f"{folder}: {seen}; save the model as safetensors")


def digest(*folders: Path) -> str:
    """SHA-256 of all that is read of models and tokenizers in `folders`."""
    found = []
    for folder in folders:
        texts = {file for pattern in ("*.json", "*.txt") for file in folder.glob(pattern)}
        weights = weight_files(folder)[0] if (folder / "config.json").is_file() else []
        found.append({file.name: cached_sha256(file) for file in sorted((*texts, *weights))})
    return digest_of(json.dumps(found, sort_keys=True))


def loaded(model: Any, folder: Path, dtype: str, device: torch.device) -> Any:
    """The network of the class `model` in `folder`, for inference, "fp32" or "bf16", on `device`.

    CheckpointError where tensors are missing, damaged, or of another shape.
    """
    import torch

    from cmkit.export import quiet

    _, variant = weight_files(folder)
    try:
        with quiet():
            network, about = model.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=variant,
                torch_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            )
    except Exception as error:  # whatever the libraries raise for damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: {reason}; fetch or save it again") from error
    for fault in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, about[fault])):
            seen = f"{fault.partition('_')[0]} tensors: {', '.join(names[:3])}"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{folder}: {seen}{more}; fetch or save it again")
    return network.requires_grad_(False).eval().to(device)  # type: ignore[no-any-return]


def tokenizer_of(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer of the class `tokenizer` in `folder`; CheckpointError where there is none."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # Without one, transformers would make a tokenizer that knows three words.
        names = ", ".join(VOCABULARIES)
        raise CheckpointError(f"{folder}: none of {names}; fetch or save the tokenizer again")
    from cmkit.export import quiet

    try:
        with quiet():
            return tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries raise for missing or damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: {reason}; fetch or save the tokenizer again") from error


def cut_by(tokenizer: Any, prompts: Sequence[str], length: int) -> list[int]:
    """How many tokens of each prompt are beyond `length`."""
    if not prompts:
        return []
    found = tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
    return [max(0, len(one) - length) for one in found]
