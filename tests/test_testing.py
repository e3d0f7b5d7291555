"""Every built-in part keeps the laws that others' parts are held to, and each law has teeth."""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets.invented import Invented
from cmkit_std.manifest import examples
from torch import nn

import cmkit
from cmkit import Cond, DataSpec, Network, Phase, Plugin, PluginError, Reference, discover, testing
from cmkit.functional import l2, per_image
from cmkit.rescaling import Policy
from cmkit.testing.rescaler import SITES
from cmkit.testing.subjects import Small
from tests.test_datasets import idx, picture
from tests.test_imagenet64 import batch

PLAIN = (
    "objective.ccd",
    "objective.cct",
    "objective.edm",
    "objective.ict",
    "objective.lcm",
    "objective.pd",
    "precond.consistency",
    "precond.discrete",
    "precond.edm",
    "precond.iddpm",
    "precond.ve",
    "precond.vp",
    "sampler.ablation",
    "sampler.ancestral",
    "sampler.edm",
    "sampler.ddim",
    "sampler.euler",
    "sampler.progdist",
    "dataset.digits",
    "dataset.emoji",
    "metric.digits_judge",
    "metric.emoji_judge",
    "text.emoji_words",
    "tracker.csv",
)
"""Parts whose defaults are small."""


def folder_of_pictures(path: Path) -> Path:
    for n in range(6):
        picture(path / f"class_{n % 2}" / f"{n}.png", n)
    return path


def folder_of_idx(path: Path) -> Path:
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    (path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(12) % 10))
    return path


def folder_of_records(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        records = rng.integers(0, 256, (10_000, 3073), np.uint8)
        records[:, 0] %= 10
        (path / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    return path


def folder_of_arrays(path: Path) -> Path:
    path.mkdir()
    for number in range(1, 11):
        np.savez(path / f"train_data_batch_{number}.npz", **batch(number, 3))
    return path


def policy(path: Path) -> Path:
    table, scales = {"use": "global", "emb": 0.9}, dict.fromkeys(SITES, 0.9)
    path.write_text(Policy(table, SITES, scales, {"weights": "0" * 64}).text())
    return path


FILES = {
    "dataset.image_folder": (folder_of_pictures, {"resolution": 8, "labels": True, "flip": True}),
    "dataset.lsun": (folder_of_pictures, {"resolution": 8, "flip": True}),
    "dataset.imagenet64": (folder_of_arrays, {"flip": True}),
    "dataset.fashion_mnist": (folder_of_idx, {}),
    "dataset.cifar10": (folder_of_records, {}),
    "rescaler.saved": (policy, {}),
}
"""What the parts that need files are made from, beside `path`."""
INVENTED = {"dataset.invented": {"channels": 3, "resolution": 8, "classes": 4}}
TABLE = {**{part: {} for part in PLAIN}, **examples, **FILES, **INVENTED}
BUILT_IN = [f"{r.kind}.{r.name}" for r in discover().rows if r.dist == "cmkit"]


def test_every_built_in_part_is_in_the_table():
    assert sorted(TABLE) == sorted(BUILT_IN), "add the new part to `examples`, PLAIN or FILES"


@pytest.mark.parametrize(
    "part",
    [part for part in BUILT_IN if not part.startswith("backbone.")],  # those are compiled as well
)
def test_a_built_in_part_keeps_the_laws_of_its_kind(part, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind, _, name = part.partition(".")
    options = TABLE[part]
    if part in FILES:
        write, options = FILES[part]
        options = {**options, "path": str(write(tmp_path / "files"))}
    made = discover().load(kind, name).model_validate_json(json.dumps(options))
    testing.check_part(made)


@pytest.mark.compile
@pytest.mark.parametrize("name", [part[9:] for part in BUILT_IN if part.startswith("backbone.")])
def test_a_built_in_backbone_is_compiled_whole(name):
    model = discover().load("backbone", name)
    testing.check_backbone(model.model_validate_json(json.dumps(TABLE[f"backbone.{name}"])))


def test_the_built_in_manifest_keeps_the_laws():
    testing.check_manifest("cmkit_std.manifest", seconds=10)


class Net(Network):
    """An honest network; `fault` names one law that it breaks."""

    sites = ("skip.0", "emb.0")

    def __init__(self, fault, channels=1, classes=10):
        super().__init__()
        self.fault = fault
        self.count = 0
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.label = nn.Embedding(classes, 4)
        self.batch = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(8, channels, 3, padding=1)
        self.loose = torch.zeros(1)
        self.spare = nn.Parameter(torch.zeros(1)) if fault == "gradient" else None
        if fault != "batch":
            del self.batch
        if fault == "sites":
            self.sites = ("skip",)
        if fault == "late":
            self.late = frozenset({"skip.0"})
        if fault == "site":
            self.sites = ("skip.0", "emb.0", "emb.1")
        last = self.last
        self.end = (lambda h: last(h)) if fault == "shared" else None
        if fault == "seed":
            self.first.bias.data.fill_(random.random())

    def forward(self, x, c_noise, cond, scales):
        emb = c_noise.sin()[:, None]
        if self.fault != "deaf":
            emb = emb + self.label(cond.label)
        emb = emb * scales.get("emb.0", torch.ones(())).view(-1, 1)
        skip = self.first(x)
        h = torch.tanh(skip + emb[..., None, None])
        if self.fault == "batch":
            h = self.batch(h)
        if self.fault == "buffer":
            self.loose = self.loose + 1
            h = h + self.loose
        if self.fault == "meta":
            h = h + torch.ones(4, 1, 1, device="cpu")
        if self.fault == "global":
            h = h + 0 * torch.rand(1)
        if self.fault == "count":
            self.count += 1
            h = h + 0 * self.count
        if self.fault == "compile":
            print("", end="") if h.sum().item() else None
        scale = scales.get("skip.0")
        scale = torch.ones(()) if scale is None else scale * (1.01 if self.fault == "one" else 1)
        if self.fault == "scalar":
            scale = scale.mean()
        if self.fault == "fine" and torch.is_autocast_enabled("cpu"):
            scale = scale.bfloat16()
        if self.fault == "format":
            h = torch.as_strided(h, h.shape, (4 * 64, 64, 8, 1))
        out = (self.end or self.last)(torch.cat([h, skip * scale.view(-1, 1, 1, 1)], 1))
        if self.fault == "shape":
            return out[:, :, 1:]
        return out if self.fault == "bf16" else out.float()

    def encode(self, x, c_noise, cond, scales):
        return x, c_noise, cond, scales

    def decode(self, encoded, scales):
        return self(*encoded)


class Tiny(cmkit.Backbone):
    """A backbone with a chosen fault."""

    accepts = frozenset({"label"})
    fault: str = "none"
    """The fault."""

    def build(self, data, conditions):
        if self.fault == "network":
            return nn.Conv2d(1, 1, 1)
        return Net(self.fault, data.channels, data.num_classes)


def fails(check, part, *told, **options):
    with pytest.raises(testing.ProtocolError) as caught:
        check(part, **options)
    message = str(caught.value)
    for words in (type(part).__name__, "; seen: ", "; cure: ", *told):
        assert words in message


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("network", "returns a cmkit.Network"),
        ("seed", "fresh weights follow from the global seed"),
        ("sites", "names such as 'skip.0'"),
        ("shape", "shape and the device of x"),
        ("bf16", "under autocast as well"),
        ("deaf", "does not depend on cond.label"),
        ("global", "`forward` leaves the global generators alone"),
        ("buffer", "in eval mode F follows from its arguments"),
        ("batch", "does not depend on the others of its batch"),
        ("meta", "on the device `meta`"),
        ("gradient", "none reaches spare"),
        ("one", "scale 1 at every site is the identity"),
        ("scalar", "acts on each image by its own value"),
        ("site", "scale 0.5 at emb.1 changes nothing"),
        ("late", "decode(encode(..), scales) is forward"),
        ("fine", "at skip 1.02 is taken for 1.0234375"),
        ("format", "F does not depend on the memory format"),
        ("shared", "a deep copy shares nothing"),
    ],
)
def test_a_backbone_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_backbone, Tiny(fault=fault), law, compile=False)


class Prompted(Tiny):
    """A backbone that says it embeds prompts, and does not."""

    accepts = frozenset({"label", "text", "pooled", "size"})
    fault: str = "none"
    """The condition that it is deaf to."""

    def build(self, data, conditions):
        net = Net("none", data.channels, data.num_classes)
        read = [name for name in ("text", "pooled", "size") if name != self.fault]
        assert conditions >= data.text.conditions
        inner = net.forward

        def forward(x, c_noise, cond, scales):
            told = sum(getattr(cond, name).flatten(1).mean(1).sin() for name in read)
            return inner(x, c_noise + told, cond, scales)

        net.forward = forward
        return net


@pytest.mark.parametrize("name", ["text", "pooled", "size"])
def test_a_backbone_that_is_deaf_to_prompts_is_told_so(name):
    fails(testing.check_backbone, Prompted(fault=name), f"on cond.{name}", compile=False)


@pytest.mark.compile
@pytest.mark.parametrize("fault", ["compile", "count"])
def test_a_network_that_cannot_be_compiled_is_told_so(fault):
    fails(testing.check_backbone, Tiny(fault=fault), "torch.compile takes the network whole")


class Loss(cmkit.Objective):
    """An objective with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def phase(self, step, total):
        if self.fault == "torch":
            return Phase(step, int(torch.tensor(4)))
        if self.fault == "state":
            return Phase(step, 2 + random.getrandbits(20))
        return Phase(step, 1 if self.fault == "grid" else 4)

    def loss(self, models, x0, cond, phase, rng):
        sigmas = models.online.noise.sigmas(4)[rng.integers(4, len(x0))]
        z = torch.randn_like(x0) if self.fault == "global" else rng.normal_like(x0)
        if self.fault == "deaf":
            sigmas, z = torch.ones(len(x0)), torch.ones_like(x0)
        if self.fault == "writes":
            x0 += z
        given = Cond() if self.fault == "label" else cond
        given = replace(cond, text=None) if self.fault == "text" else given
        with cmkit.shared_dropout(rng):
            x0_hat = models.online(x0 + sigmas.view(-1, 1, 1, 1) * z, sigmas, given)
        if self.fault == "dropout":
            x0_hat = models.online(x0 + z, sigmas, given)
        if self.fault == "detached":
            x0_hat = x0_hat.detach()
        d = (x0_hat - x0).square().flatten(1).mean(1)
        if self.fault == "infinite":
            return d / 0
        return d.mean() if self.fault == "reduced" else d


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("torch", "`phase` is pure Python"),
        ("state", "`phase` leaves the global generators alone"),
        ("grid", "a grid has at least two points"),
        ("global", "`loss` leaves the global generators alone"),
        ("dropout", "cmkit.shared_dropout(rng)"),
        ("deaf", "draws other noise"),
        ("writes", "x0 is left alone"),
        ("label", "called without the label"),
        ("text", "called without the text"),
        ("detached", "a loss has a gradient"),
        ("infinite", "a loss is finite"),
        ("reduced", "one float32 number an image"),
    ],
)
def test_an_objective_that_breaks_a_law_is_told_so(fault, law):
    if fault == "deaf":  # dropout draws from rng as well, so the network must have none
        small = Small.__init__

        def without(self, data):
            small(self, data)
            self.dropout = nn.Identity()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Small, "__init__", without)
            fails(testing.check_objective, Loss(fault=fault), law)
        return
    fails(testing.check_objective, Loss(fault=fault), law)


class Distilled(cmkit.Objective):
    """Consistency distillation with a chosen fault."""

    needs = frozenset({"target", "teacher", "boundary"})
    fault: str = "none"
    """The fault."""

    def phase(self, step, total):
        return Phase(step, 40)

    def loss(self, models, x0, cond, phase, rng):
        sigmas = models.online.noise.sigmas(40)
        i = rng.integers(39, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        if self.fault in ("swapped", "turned"):
            low, high = high, low
        x = x0 + per_image(high, x0) * rng.normal_like(x0)
        with torch.no_grad():
            x_low = cmkit.functional.euler(models.teacher, x, high, low, cond)
        seen, at = (x_low, low) if self.fault == "images" else (x, high)
        at = low if self.fault == "levels" else at
        with cmkit.shared_dropout(rng):
            online = models.online(seen, at, cond)
        seen, at = (x, low) if self.fault == "images" else (x_low, low)
        at = high if self.fault == "levels" else at
        taught = self.fault in ("target", "teacher", "both")
        names = {"teacher": "teacher", "both": "online"}
        with torch.set_grad_enabled(taught), cmkit.shared_dropout(rng):
            target = getattr(models, names.get(self.fault, "target"))(seen, at, cond)
        d = l2(online, target)
        if self.fault == "turned":
            return d / (high - low)
        return -d if self.fault == "sign" else d


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("target", "one reaches the target"),
        ("teacher", "one reaches the teacher"),
        ("both", "of two estimates that a loss compares, one is held fixed"),
        ("sign", "a loss leads back to it"),
        ("swapped", "learns from noise levels that are not higher"),
        ("turned", "learns from noise levels that are not higher"),
        ("levels", "learns from noise levels that are not higher"),
        ("images", "a loss leads back to it"),
    ],
)
def test_an_objective_that_learns_something_else_is_told_so(fault, law):
    fails(testing.check_objective, Distilled(fault=fault), law)


def test_a_loss_may_mean_to_teach_both_estimates():
    testing.check_objective(Distilled(fault="both"), stop_gradient=False)


class Fooling(cmkit.Objective):
    """The adversarial term alone, of a critic that likes whatever is large."""

    def companions(self, data):
        return {"critic": cmkit.Companion(nn.Conv2d(data.channels, 1, 3))}

    def phase(self, step, total):
        return Phase(step)

    def loss(self, models, x0, cond, phase, rng):
        x = x0 + rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            x0_hat = models.online(x, torch.ones(len(x0)), cond)
        return -models.companions["critic"](x0_hat).float().square().flatten(1).mean(1)


def test_nothing_is_claimed_of_a_critic_that_has_learned_nothing(monkeypatch):
    testing.check_objective(Fooling())
    same = cmkit.Companion(nn.Conv2d(1, 1, 3))
    monkeypatch.setattr(Fooling, "companions", lambda self, data: {"critic": same})
    fails(testing.check_objective, Fooling(), "a loss leads back to it")


def objective(part):
    """A built-in objective, by its defaults or example."""
    model = discover().load("objective", part)
    return model.model_validate_json(json.dumps(examples.get(f"objective.{part}", {})))


def spoiled(part, loss):
    """The same objective with `loss` of the one that it has."""
    whole = type(part)
    own = {"__doc__": "Spoiled.", "loss": lambda self, *given: loss(whole.loss, self, *given)}
    return type(whole.__name__, (whole,), own)(**part.model_dump())


def forgetful(loss, *given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "no_grad", nullcontext)
        return loss(*given)


def upside_down(loss, self, models, *given):
    sigmas = cmkit.Noise.sigmas
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmkit.Noise, "sigmas", lambda *args: sigmas(*args).flip(0))
        return loss(self, models, *given)


OBJECTIVES = [part[10:] for part in BUILT_IN if part.startswith("objective.")]


@pytest.mark.parametrize("part", OBJECTIVES)
def test_a_built_in_objective_of_the_other_sign_is_told_so(part):
    spoilt = spoiled(objective(part), lambda loss, *given: -loss(*given))
    fails(testing.check_objective, spoilt, "a loss leads back to it")


@pytest.mark.parametrize("part", ["cd", "ct", "ctm", "ict", "lcm", "pd"])
def test_a_built_in_objective_that_holds_nothing_fixed_is_told_so(part):
    with pytest.raises(testing.ProtocolError, match="gradient"):
        testing.check_objective(spoiled(objective(part), forgetful))


@pytest.mark.parametrize("part", ["cd", "ict", "lcm"])
def test_a_built_in_objective_on_a_grid_that_falls_is_told_so(part):
    fails(testing.check_objective, spoiled(objective(part), upside_down), "not higher")


class Walk(cmkit.Sampler):
    """A sampler with a chosen fault."""

    fault: str = "none"
    """The fault."""

    @property
    def nfe(self):
        return 3 if self.fault == "nfe" else 2

    def sample(self, denoiser, x, cond, noise):
        if self.fault == "writes":
            x.mul_(0.5)
        sigma = x.new_full((len(x),), 80.0)
        if self.fault == "device":
            sigma = torch.full((len(x),), 80.0)
        if self.fault == "scalar":
            sigma = sigma[0]
        given = Cond() if self.fault == "label" else cond
        given = replace(cond, text=None) if self.fault == "text" else given
        x0 = denoiser(x, sigma, given)
        draws = noise(0 if self.fault == "draw" else 1)
        if self.fault == "global":
            draws = torch.randn_like(x)
        if self.fault == "batch":
            x0 = x0 - x0.mean()
        return denoiser(x0 + 0.5 * draws, sigma * (0 if self.fault == "zero" else 0.01), given)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("nfe", "nfe = 3, and it was called 2 times"),
        ("writes", "x is left alone"),
        ("device", "sigma (B,) on x.device"),
        ("scalar", "sigma (B,) on x.device"),
        ("label", "called without the label"),
        ("text", "called without the text"),
        ("draw", "noise(0) after []"),
        ("global", "`sample` leaves the global generators alone"),
        ("batch", "does not depend on the others of its batch"),
        ("zero", "noise levels above 0"),
    ],
)
def test_a_sampler_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_sampler, Walk(fault=fault), law)


class Scale(cmkit.Rescaler):
    """A rescaler with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def bind(self, sites):
        if self.fault != "accepts" and not sites:
            raise cmkit.RecipeError("nothing to scale")
        values = {
            "float": lambda sigma: 0.9,
            "device": lambda sigma: torch.tensor(0.9),
            "state": lambda sigma: torch.tensor(random.random(), device=sigma.device),
        }
        value = values.get(self.fault, lambda sigma: sigma.new_tensor(0.9))
        name = "skip.99" if self.fault == "stranger" else "skip.0"
        return lambda sigma: {name: value(sigma)}

    def value_of(self, name):
        return 0.9 if name == "skip.0" else super().value_of(name)

    def with_values(self, values):
        if self.fault == "deaf":
            raise ValueError("what is skip.0?")
        return self


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("float", "a scale is a tensor of shape () or (B,)"),
        ("device", "on sigma.device"),
        ("state", "scales follow from sigma alone"),
        ("stranger", "['skip.99'] are none"),
        ("accepts", "is refused by `bind`"),
        ("deaf", "a search sets the numbers that it reads"),
    ],
)
def test_a_rescaler_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_rescaler, Scale(fault=fault), law)


class Dots(cmkit.Dataset):
    """A data set with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def spec(self):
        names = ("a", "b") if self.fault == "names" else ("a", "b", "c")
        counts = (1,) if self.fault == "counts" else (40, 30, 30)
        spec = DataSpec(1, 2, 3, names, counts)
        return DataSpec(1, 2) if self.fault == "unlabelled" else spec

    def declared(self):
        return DataSpec(1, 4, 3) if self.fault == "declared" else None

    def batches(self, size, seed, device, start=0):
        at = 0 if self.fault == "start" else start
        if self.fault == "short":
            yield torch.zeros(size - 1, 1, 2, 2), Cond(torch.zeros(size - 1, dtype=torch.int64))
        while True:
            seen = 0 if self.fault == "seed" else seed
            x0 = cmkit.image_noise(seen, "dots", range(at * size, (at + 1) * size), 0, (1, 2, 2))
            if self.fault == "global":
                x0 = torch.randn(size, 1, 2, 2)
            x0 = x0 if self.fault == "range" else x0.clamp(-1, 1)
            label = torch.arange(size) % 3 + (self.fault == "label")
            yield x0, Cond(label=label, caption=label if self.fault == "uncaptioned" else None)
            at += 1

    def reference(self):
        kind = torch.float32 if self.fault == "pixels" else torch.uint8
        print_ = str(random.random()) if self.fault == "fingerprint" else "dots"
        return Reference([torch.zeros(1, 2, 2, dtype=kind)] * 100, print_)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("start", "batch 1 of a stream from start = 1 is another"),
        ("short", "every batch full"),
        ("seed", "another seed is another order"),
        ("global", "`batches` leaves the global generators alone"),
        ("range", "x0 lies in [-1, 1]"),
        ("label", "labels are int64 (B,), from 0 to 2"),
        ("unlabelled", "labels are absent"),
        ("names", "classes are one for each class, or none"),
        ("counts", "counts are one for each class, or none"),
        ("pixels", "reference images are uint8"),
        ("fingerprint", "a fingerprint is a string that follows"),
        ("declared", "`declared` returns what `spec` does"),
        ("uncaptioned", "`Cond.caption` is absent without captions"),
    ],
)
def test_a_data_set_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_dataset, Dots(fault=fault), law)


class Told(Invented):
    """A data set with captions and a chosen fault."""

    fault: str = "none"
    """The fault."""

    def captions(self):
        texts = super().captions()
        changed = {"twice": [*texts[:-1], texts[0]], "numbers": [1, 2, 3], "fewer": texts[:2]}
        return changed.get(self.fault, texts)

    def batches(self, size, seed, device, start=0):
        given = Invented.batches(self, size, seed, device, start)
        for at, (x0, cond) in enumerate(given):
            caption = cond.caption
            if self.fault == "start":
                caption = (caption + at) % 3
            elif self.fault == "other":
                caption = (caption + 1) % 3
            elif self.fault == "absent":
                caption = None
            elif self.fault == "int32":
                caption = caption.int()
            yield x0.flip(-1) if self.fault == "mirrored" else x0, replace(cond, caption=caption)

    def pictures(self):
        made = super().pictures()
        if self.fault == "unnumbered":
            made.captions = None
        if self.fault == "classes":
            made.labels = None
        if self.fault == "certain":
            made.empty = 2.0
        if self.fault == "dropped":
            made.empty = 1.0
        return made

    def reference(self):
        made = super().reference()
        said = {"short": made.captions[:-1], "silent": None}
        return replace(made, captions=said.get(self.fault, made.captions))


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("twice", "`captions` returns distinct texts"),
        ("numbers", "`captions` returns distinct texts"),
        ("fewer", "`Cond.caption` is absent without captions, or int64"),
        ("absent", "`Cond.caption` is absent without captions, or int64"),
        ("int32", "`Cond.caption` is absent without captions, or int64"),
        ("start", "batch 1 of a stream from start = 1 is another"),
        ("other", "other captions"),
        ("mirrored", "other images"),
        ("dropped", "other captions"),
        ("unnumbered", "`pictures().captions` has a number for each image"),
        ("classes", "`pictures().labels` has a number for each image"),
        ("certain", "`pictures().empty` is a probability"),
        ("short", "`Reference.captions` has a text for each image"),
        ("silent", "`Reference.captions` has a text for each image"),
    ],
)
def test_a_data_set_whose_captions_break_a_law_is_told_so(fault, law):
    fails(testing.check_dataset, Told(texts=3, classes=2, resolution=4, fault=fault), law)


class Mean(cmkit.Metric):
    """A metric with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def keys(self):
        return ("mean", "mean") if self.fault == "twice" else ("mean", "top")

    def only(self, key):
        return type(self)(fault="lone") if self.fault == "only" else self

    def measure(self, images, reference, device):
        pixels = torch.stack([images[i] for i in range(len(images))]).float()
        mean = pixels.mean() + (random.random() if self.fault == "global" else 0)
        found = {"mean": mean.item() + (self.fault == "lone"), "top": pixels.max().item()}
        if self.fault == "tensor":
            found["mean"] = mean
        if self.fault == "missing":
            del found["top"]
        return found

    def meter(self, images, reference, device):
        return MeanMeter(self.fault, images)

    def features(self, images, reference, device):
        rows = {"rows": torch.zeros(len(images) - (self.fault == "rows"), 2)}
        return {"top" if self.fault != "unknown" else "bottom": rows}

    def provenance(self):
        return {"weights": {1, 2}} if self.fault == "provenance" else {}


class MeanMeter:
    def __init__(self, fault, images):
        self.fault, self.images, self.means, self.counts, self.top = fault, images, [], [], 0.0

    def add(self, images):
        self.means.append(images.float().mean().item())
        self.counts.append(1 if self.fault == "meter" else len(images))
        self.top = max(self.top, images.max().item())

    def state(self):
        found = {"means": torch.tensor(self.means, dtype=torch.float64)}
        found |= {"counts": torch.tensor(self.counts), "of": torch.tensor(self.images)}
        return {**found, "top": torch.tensor(self.top)}

    def restore(self, state):
        self.means, self.counts = state["means"].tolist(), state["counts"].tolist()
        self.top = state["top"].item() if self.fault != "state" else 256.0
        if self.fault == "fewer" and state["of"].item() != self.images:
            self.means, self.counts = [], []

    def values(self):
        weighed = (mean * n for mean, n in zip(self.means, self.counts, strict=True))
        return {"mean": sum(weighed) / sum(self.counts), "top": self.top}


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("twice", "a tuple of different names"),
        ("missing", "the numbers that `keys` names"),
        ("tensor", "finite Python floats"),
        ("global", "`measure` leaves the global generators alone"),
        ("meter", "a meter returns what `measure` does"),
        ("state", "goes on from there, bit for bit"),
        ("fewer", "goes on from the state of one of fewer images"),
        ("only", "only(key) returns the same number"),
        ("rows", "name numbers of `keys`, with a row an image"),
        ("unknown", "name numbers of `keys`, with a row an image"),
        ("provenance", "can be written as JSON"),
    ],
)
def test_a_metric_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_metric, Mean(fault=fault), law)


class Squares(cmkit.Codec):
    """A codec with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def spec(self, data):
        if data.resolution % 2 and self.fault != "takes":
            raise cmkit.RecipeError("not divisible by 2")
        channels = 4 * data.channels + (self.fault == "shape")
        latents = replace(data, channels=channels, resolution=data.resolution // 2)
        return replace(latents, num_classes=None) if self.fault == "drops" else latents

    def identity(self):
        return {"weights": random.random()} if self.fault == "identity" else {}

    def load(self, device):
        scale = torch.rand(1).item() if self.fault == "drawn" else 1.0
        return SquaresCoder(self.fault, scale)


class SquaresCoder:
    def __init__(self, fault, scale):
        self.fault, self.scale = fault, torch.tensor(scale, requires_grad=fault == "gradient")

    def encode(self, x0):
        if self.fault == "writes":
            x0 *= 0.5
        z = nn.functional.pixel_unshuffle(x0, 2) * self.scale
        if self.fault == "batch":
            z = z - z.mean()
        if self.fault == "global":
            z = z + torch.randn_like(z)
        if self.fault == "constant":
            z = torch.zeros_like(z)
        if self.fault == "nan":
            z = z / 0
        if self.fault == "half":
            return z.half(), None
        if self.fault == "bare":
            return z
        return z, torch.full_like(z, -1 if self.fault == "negative" else 0.1)

    def decode(self, latents):
        if self.fault == "deaf":
            latents = torch.zeros_like(latents)
        return nn.functional.pixel_shuffle(latents * (2 if self.fault == "scale" else 1), 2)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("drops", "`spec` changes channels and resolution alone"),
        ("identity", "`identity` stays the same"),
        ("drawn", "`load` leaves the global generators alone"),
        ("shape", "`encode` returns float32 of shape (4, 5, 4, 4)"),
        ("half", "`encode` returns float32"),
        ("bare", "`encode` returns (mean, std)"),
        ("gradient", "`encode` has no gradient"),
        ("writes", "`encode` leaves what it is given alone"),
        ("batch", "`encode` takes each image of a batch alone"),
        ("global", "`encode` leaves the global generators alone"),
        ("constant", "latents depend on the image"),
        ("nan", "`encode` returns finite numbers"),
        ("negative", "standard deviations are at least 0"),
        ("deaf", "pictures depend on their latents"),
        ("scale", "at most 0.2 of smooth images is lost"),
        ("takes", "`spec` refuses images that the codec cannot take"),
    ],
)
def test_a_codec_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_codec, Squares(fault=fault), law, loss=0.2)


class Words(cmkit.TextEncoder):
    """A prompt encoder with a chosen fault."""

    fault: str = "none"
    """The fault."""

    def spec(self):
        pooled = None if self.fault == "unpooled" else 3
        return cmkit.TextSpec(0 if self.fault == "empty" else 2, 3, pooled)

    def cut(self, prompts):
        lengths = [len(prompt.split()) - 2 for prompt in prompts]
        return lengths if self.fault == "negative" else [max(0, n) for n in lengths]

    def load(self, device):
        return WordsPrompts(self.fault)


class WordsPrompts:
    def __init__(self, fault):
        self.fault, self.calls = fault, 0
        self.null = self([""] * (2 if fault == "rows" else 1))
        if fault == "null":
            self.null = None

    def __call__(self, prompts):
        if self.fault == "long" and any(len(prompt) > 500 for prompt in prompts):
            raise ValueError("too long")
        self.calls += self.fault == "state"
        words = [[*prompt.split(), "", ""][:2] for prompt in prompts]
        if self.fault == "constant":
            words = [["", ""] for _ in prompts]
        text = torch.tensor([[[len(w), w.count("a"), self.calls] for w in two] for two in words])
        text = text.float() if self.fault != "type" else text
        if self.fault == "batch":
            text = text - text.mean()
        if self.fault == "nan":
            text = text / 0
        if self.fault == "global":
            torch.rand(1)
        if self.fault == "gradient":
            text.requires_grad_()
        label = torch.zeros(len(prompts)) if self.fault == "label" else None
        return Cond(text=text, pooled=text.sum(1), label=label)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("empty", "with positive numbers"),
        ("negative", "`cut` returns how many tokens"),
        ("null", "the features of the unconditional prompt, `null`, are a cmkit.Cond"),
        ("rows", "float32 of shape (1, 2, 3)"),
        ("unpooled", "are text, as spec() says"),
        ("label", "are text and pooled, as spec() says"),
        ("type", "float32 of shape (1, 2, 3)"),
        ("gradient", "without a gradient"),
        ("nan", "are finite"),
        ("long", "it takes a list of prompts of any length"),
        ("global", "leaves the global generators alone"),
        ("batch", "do not depend on the others of its batch"),
        ("state", "features follow from the prompt"),
        ("constant", "features depend on the prompt"),
    ],
)
def test_a_prompt_encoder_that_breaks_a_law_is_told_so(fault, law):
    fails(testing.check_text, Words(fault=fault), law)


@pytest.mark.parametrize(
    ("check", "part"),
    [
        pytest.param(testing.check_backbone, Tiny(), marks=pytest.mark.compile),
        (testing.check_objective, Loss()),
        (testing.check_objective, Distilled()),
        (testing.check_sampler, Walk()),
        (testing.check_rescaler, Scale()),
        (testing.check_dataset, Dots()),
        (testing.check_dataset, Told(texts=3, classes=2, resolution=4)),
        (testing.check_metric, Mean()),
        (testing.check_codec, Squares()),
        (testing.check_text, Words()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_part_without_a_fault_passes(check, part):
    check(part)


class Mute(cmkit.Sampler):
    """Its field has no docstring."""

    steps: int = 1

    @property
    def nfe(self):
        return 1

    def sample(self, denoiser, x, cond, noise):
        return denoiser(x, x.new_full((len(x),), 80.0), cond)


class Thawed(Mute):
    """It can be changed."""

    model_config = {"frozen": False}


class Silent(Walk):
    fault: str = "none"
    """The fault."""


@pytest.mark.parametrize(
    ("part", "law"),
    [
        (Mute(), "steps has none"),
        (Thawed(), "a part has frozen = True"),
        (Silent(), "a part's docstring is its help"),
    ],
)
def test_fields_that_break_a_law_are_told_so(part, law):
    fails(testing.check_fields, part, law)


BUSY = """
import time
end = time.process_time() + 0.2
while time.process_time() < end:
    pass
"""


@pytest.mark.parametrize(
    ("source", "law"),
    [
        ("x = 1", "has a function cmkit_register"),
        ("import torch\n{hook}", "importing {module} imports it"),
        (f"{BUSY}{{hook}}", "within 0.1 s"),
        ("{hook}", "passes"),
    ],
)
def test_a_manifest_that_breaks_a_law_is_told_so(source, law, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = f"manifest_{abs(hash(law))}"
    hook = (
        "import cmkit\n@cmkit.hookimpl\ndef cmkit_register():\n    return [cmkit.Plugin('sampler',"
        " 'x', 'cmkit_std.samplers.multistep:Multistep', 'a test')]\n"
    )
    (tmp_path / f"{module}.py").write_text(source.format(hook=hook))
    if "import torch" in source:
        (tmp_path / "torch.py").touch()  # the real one takes seconds
    if law == "passes":
        testing.check_manifest(module, seconds=10)
        return
    with pytest.raises(testing.ProtocolError, match=law.format(module=module).replace("(", r"\(")):
        testing.check_manifest(module, seconds=0.1 if BUSY in source else 60)
    sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("plugin", "law"),
    [
        (("sampler", "Bad", "a:b", "x"), "a name is of lower-case letters"),
        (("sampler", "x", "cmkit_std.samplers.multistep:Multistep", ""), "a summary is one line"),
        (("sampler", "x", "no_such_module:X", "x"), "can be imported"),
        (("metric", "x", "cmkit_std.samplers.multistep:Multistep", "x"), "is a cmkit.Metric"),
        (("sampler", "x", "cmkit.kinds:Sampler", "x"), "without nfe, sample"),
        (("widget", "x", "a:b", "x"), "of a known kind"),
    ],
)
def test_a_plugin_that_breaks_a_law_is_told_so(plugin, law):
    with pytest.raises(testing.ProtocolError, match=law):
        testing.check_manifest([Plugin(*plugin)])


def test_one_name_twice_is_told():
    plugin = Plugin("sampler", "x", "cmkit_std.samplers.multistep:Multistep", "x")
    with pytest.raises(testing.ProtocolError, match="'x' twice"):
        testing.check_manifest([plugin, plugin])


def test_an_unknown_package_is_told_which_there_are():
    with pytest.raises(PluginError, match=r"no installed package 'cmkit-nothing'.*known: .*cmkit"):
        list(testing.check_package("cmkit-nothing"))
