"""Runs on the Hugging Face Hub: hub:OWNER/NAME where a run is named, and what is pushed there.

Imports no torch."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from cmkit.errors import (
    CheckpointError,
    CmkitError,
    DownloadError,
    PluginError,
    RecipeError,
    ResourceError,
)
from cmkit.files import OFFLINE

REPOSITORY = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
RUN_FILES = (
    "recipe.toml",
    "model.safetensors",
    "status.json",
    "report.json",
    "rescaling.json",
    "search.json",
)
"""What of a run's folder is pushed and fetched: all that drawing from it reads."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def run_of(text: str) -> Path | None:
    """The local folder of the run "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"; None for what is
    not so called, and for a repository that is a pipeline or a model of another library.

    What is in the hub's cache is taken from there without a question to the hub. DownloadError
    where the repository cannot be had.
    """
    if not text.startswith("hub:") or not (said := REPOSITORY.fullmatch(text)):
        return None
    _require_library(text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "repo_id": said["name"],
        "revision": said["revision"],
        "allow_patterns": [*RUN_FILES, "model_index.json", "config.json"],
    }
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(**wanted, local_files_only=True))
            if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
                return None
            if (folder / "recipe.toml").is_file() and (folder / "status.json").is_file():
                return folder
        folder = Path(snapshot_download(**wanted, local_files_only=OFFLINE.get()))
    except HFValidationError as error:
        raise RecipeError(f"{text}: {error}") from error
    except Exception as error:  # of three libraries, and of the machine
        raise trouble(error, said["name"], said["revision"], text) from error
    return folder if (folder / "recipe.toml").is_file() else None


def run_folder(text: str) -> Path:
    """`run_of`; CheckpointError where the repository is not a run."""
    if not REPOSITORY.fullmatch(text):
        raise RecipeError(f"{text}: write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    if found := run_of(text):
        return found
    raise CheckpointError(
        f"{text}: no run of cmkit, the repository has no recipe.toml; name one that `cmkit export"
        " --to cmkit --push` made"
    )


def require_push(name: str) -> None:
    """Raise now what would stop `push`: a name that is none, no library, no token."""
    if not _NAME.fullmatch(name):
        raise RecipeError(f"--push {name}: write OWNER/NAME")
    _require_library(f"--push {name}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise ResourceError(f"--push {name}: no token of the hub here; log in by `hf auth login`")


def push(folder: Path, name: str) -> str:
    """The address of the repository OWNER/NAME, which is made if need be, with all of `folder`."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="cmkit export")
    except Exception as error:  # of three libraries, and of the machine
        found = trouble(error, name, None, f"--push {name}")
        said = f"{found}; {folder} is written, push it by `hf upload {name} {folder}`"
        raise type(found)(said) from error
    return address


def _require_library(what: str) -> None:
    import importlib.util

    if importlib.util.find_spec("huggingface_hub") is None:
        raise PluginError(f"{what}: needs the package huggingface_hub; pip install 'cmkit[hub]'")


def trouble(error: Exception, name: str, revision: str | None, what: str) -> CmkitError:
    """What the hub's error means, in one line that begins with `what`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{what}: gated; ask its owner for access at https://huggingface.co/{name}, log in by"
            " `hf auth login`, and run again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DownloadError(
            f"{what}: no such repository, or a private one; correct the name, or log in by"
            " `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(f"{what}: no revision {revision}; name a branch, a tag or a commit")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return ResourceError(f"{what}: the hub refuses the token; log in by `hf auth login`")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        return DownloadError(f"{what}: not in {cache}, and {offline}; go online and run again")
    if isinstance(error, OSError) and error.errno:
        return ResourceError(f"{cache}: {error.strerror}; free some space or set HF_HOME")
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return DownloadError(f"{what}: {reason}; go online and run again")
