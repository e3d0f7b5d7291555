"""The factors of adapters by layer: files of many forms, sums of several."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmkit import CheckpointError
from cmkit.files import read_json
from cmkit.tensors import read_with_metadata, save_weights

UNET = "unet."
"""What files have before the names of diffusers' networks, and our `sd_unet` as well."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps ranks and alphas in a file."""
KOHYA = "lora_unet_"
_NAME = re.compile(
    r"(?P<layer>.+?)\.(?P<factor>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.weight"
)
_FIRST = ("lora_A", "lora_down", "lora.down")
_OTHERS = {
    "hada_": "of LoHa",
    "lokr_": "of LoKr",
    "dora_scale": "of DoRA",
    "lora_magnitude_vector": "of DoRA",
    "processor.": "of attention processors of diffusers before 0.23",
    "text_encoder": "of the text encoder",
    "lora_te": "of the text encoder",
}
"""Words in names of what is not read, and what that is."""


@dataclass(frozen=True)
class Factors:
    """The change alpha / rank B A of a layer's weight."""

    a: Tensor
    """(rank, in, ...)"""
    b: Tensor
    """(out, rank, ...)"""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self) -> Tensor:
        """alpha / rank B A, as a matrix (out, in * ...)."""
        return self.scale * (self.b.flatten(1) @ self.a.flatten(1))


def read(
    path: Path,
    name: str,
    layers: Iterable[str] | None,
    alpha: float | None = None,
    rank: int | None = None,
) -> dict[str, Factors]:
    """The factors in a file, by layer, under the names of `layers` where these are known.

    `alpha` is for files that say none; checkpoints of a run say none, and by default have their
    rank. CheckpointError for another form than LoRA, and for what is not of these layers.
    """
    tensors, about = read_with_metadata(path)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    ours = any(".default." in key for key in tensors)
    for key, tensor in tensors.items():
        plain = key.replace(".default.", ".").replace("_orig_mod.", "").removeprefix("module.")
        if "base_model.model." in plain:  # of peft, and of the scripts, whose networks are U-Nets
            plain = UNET + plain.replace("base_model.model.", "").removeprefix(UNET)
        if plain.endswith(".alpha"):
            alphas[plain.removesuffix(".alpha")] = float(tensor)
        elif found := _NAME.fullmatch(plain):
            half = "a" if found["factor"] in _FIRST else "b"
            halves.setdefault(found["layer"], {})[half] = tensor
        elif not (ours and "lora_" not in plain):  # buffers of a checkpoint
            what = _other_form(key) or "no factor of LoRA"
            raise CheckpointError(f"{name}: {key} is {what}; only LoRA of a network is read")
    for layer in halves:
        if what := _other_form(layer):
            raise CheckpointError(f"{name}: {layer} is {what}; only LoRA of a network is read")
    if not halves:
        raise CheckpointError(f"{name}: no adapter in it: no name has lora_A or lora_down")
    if half := [layer for layer, own in halves.items() if len(own) < 2]:
        raise CheckpointError(
            f"{name}: {len(half)} of {len(halves)} layers lack a factor, first {half[0]};"
            " save or fetch it again"
        )
    said = _Said(path, about, alpha)
    found_factors = {}
    for layer, own in halves.items():
        r = len(own["a"])
        if own["b"].ndim < 2 or own["b"].shape[1] != r:
            raise CheckpointError(
                f"{name}: {layer} has factors {tuple(own['a'].shape)} and {tuple(own['b'].shape)},"
                " which have no product; save or fetch it again"
            )
        number = alphas.get(layer, said.alpha(layer, r))
        if number is None and ours:
            number = alpha or rank or r
        if number is None:
            raise CheckpointError(
                f"{name}: says no alpha, without which its scale is unknown; say adapter.alpha:"
                f" diffusers takes the rank, {r}"
            )
        found_factors[layer] = Factors(own["a"], own["b"], float(number))
    return _under(found_factors, layers, name)


def _other_form(key: str) -> str:
    """What is not read of which `key` is a name; "" for any other."""
    return next((form for word, form in _OTHERS.items() if word in key), "")


class _Said:
    """What metadata of a file, or adapter_config.json beside it, say of alpha."""

    def __init__(self, path: Path, about: Mapping[str, str], alpha: float | None):
        beside = path.parent / "adapter_config.json"
        self.other = alpha
        try:
            table = json.loads(about.get(METADATA, "{}"))
        except ValueError as error:
            raise CheckpointError(f"{path}: its {METADATA} is no JSON; save it again") from error
        self.table: Mapping[str, Any] = {k.removeprefix(UNET): v for k, v in table.items()}
        if not self.table and path.name == "adapter_model.safetensors" and beside.is_file():
            self.table = read_json(beside)
        if not self.table and "ss_network_alpha" in about:
            self.table = {"lora_alpha": float(about["ss_network_alpha"])}
        if self.table.get("use_dora"):
            raise CheckpointError(f"{path}: of DoRA; only LoRA of a network is read")

    def alpha(self, layer: str, rank: int) -> float | None:
        patterns = self.table.get("alpha_pattern") or {}
        plain = layer.removeprefix(UNET)
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern.lstrip('^')})", plain):
                return self._plain(value, rank)
        number = self.table.get("lora_alpha", self.other)
        return None if number is None else self._plain(number, rank)

    def _plain(self, alpha: float, rank: int) -> float:
        """`alpha` where the scale is alpha / sqrt(rank) (rsLoRA), as of alpha / rank."""
        return alpha * rank**0.5 if self.table.get("use_rslora") else alpha


def _under(
    found: Mapping[str, Factors], layers: Iterable[str] | None, name: str
) -> dict[str, Factors]:
    """`found` under the names of `layers`; CheckpointError for what is of another network."""
    if layers is None:
        if kohya := next((layer for layer in found if layer.startswith(KOHYA)), None):
            raise CheckpointError(
                f"{name}: kohya's names, such as {kohya}, mean layers of a network that is not"
                " known here; say --fold RECIPE"
            )
        return dict(found)
    known = {}
    for layer in layers:
        plain = layer.removeprefix(UNET)
        for alias in (plain, UNET + plain, KOHYA + plain.replace(".", "_"), layer):
            known[alias] = layer
    if strange := [layer for layer in found if layer not in known]:
        raise CheckpointError(
            f"{name}: {len(strange)} of its {len(found)} layers are not in this network, first"
            f" {strange[0]}; choose the backbone that it was trained on"
        )
    return {known[layer]: factors for layer, factors in found.items()}


def mixed(
    read: Mapping[str, Mapping[str, Factors]], counts: Mapping[str, float], how: str
) -> dict[str, Factors]:
    """Several adapters as one, of alpha = rank. With s = alpha / rank of each, and its number w:

    "add": sum of w s B A, by factors laid side by side; peft's "cat".
    "factors": (sum of w sqrt(s) B)(sum of w sqrt(s) A); peft's "linear" of numbers w^2.

    CheckpointError where layers have other shapes, or for "factors" other ranks.
    """
    together: dict[str, list[tuple[str, Factors]]] = {}
    for name, layers in read.items():
        for layer, factors in layers.items():
            together.setdefault(layer, []).append((name, factors))
    out = {}
    for layer, own in together.items():
        (first, like), *others = own
        for name, factors in others:
            shapes = [(f.b.shape[0], *f.a.shape[1:]) for f in (like, factors)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{name}: of another network than {first}: {layer} is {shapes[1]} there and"
                    f" {shapes[0]} here"
                )
            if how == "factors" and factors.rank != like.rank:
                raise CheckpointError(
                    f'{name}: of rank {factors.rank}, and {first} of {like.rank}; "factors" sums'
                    ' those of equal ranks: take "add"'
                )
        if how == "add":
            a = torch.cat([counts[name] * f.scale * _wide(f.a) for name, f in own])
            b = torch.cat([_wide(f.b) for _, f in own], dim=1)
        else:
            a, b = (
                sum(counts[name] * f.scale**0.5 * _wide(getattr(f, half)) for name, f in own)
                for half in "ab"
            )
        out[layer] = Factors(a, b, float(len(a)))
    names = [set(layers) for layers in read.values()]
    if len(names) > 1 and not set.intersection(*names):
        raise CheckpointError(
            f"{', '.join(read)}: no layer is in all of them; they are of other networks"
        )
    if all(_nothing(out[layer], together[layer], counts) for layer in out):
        raise CheckpointError(f"{', '.join(read)}: these weights sum to nothing; change a number")
    return out


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nothing(
    mixed: Factors, own: Iterable[tuple[str, Factors]], counts: Mapping[str, float]
) -> bool:
    """Whether a sum is nothing but rounding of what was added."""
    weights = {name: max(abs(count), count**2) for name, count in counts.items()}
    size = max(float(weights[name] * f.change().norm()) for name, f in own)
    return float(mixed.change().norm()) <= 1e-5 * size


def check_written(found: Mapping[str, Factors]) -> None:
    """CheckpointError where a value is not finite."""
    for layer, factors in found.items():
        if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
            raise CheckpointError(f"adapter: the weights of {layer} are not finite")


def write(found: Mapping[str, Factors], path: Path) -> None:
    """Write factors to a safetensors file as diffusers and peft name them, with ranks, alphas and
    layers beside them."""
    tensors = {}
    for layer, factors in found.items():
        tensors[f"{layer}.lora_A.weight"] = factors.a
        tensors[f"{layer}.lora_B.weight"] = factors.b
    prefix = UNET if all(layer.startswith(UNET) for layer in found) else ""
    table = {prefix + key: value for key, value in config(found).items()}
    save_weights(path, tensors, {METADATA: json.dumps(table, sort_keys=True)})


def config(found: Mapping[str, Factors]) -> dict[str, Any]:
    """Arguments of peft's LoraConfig for factors, whose names are without the prefix of files."""
    plain = {layer.removeprefix(UNET): factors for layer, factors in found.items()}
    rank = Counter(factors.rank for factors in plain.values()).most_common(1)[0][0]
    alpha = Counter(_whole(factors.alpha) for factors in plain.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(plain),
        "rank_pattern": {f"^{k}$": f.rank for k, f in plain.items() if f.rank != rank},
        "alpha_pattern": {f"^{k}$": _whole(f.alpha) for k, f in plain.items() if f.alpha != alpha},
    }


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
