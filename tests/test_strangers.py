"""Whatever raises in a part of another package, one line tells of that package, file and line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cmkit_std.preconds.consistency import Consistency
from cmkit_std.rescalers.global_ import Global
from cmkit_std.samplers.multistep import Multistep
from pydantic import field_validator
from safetensors.torch import save_file

import cmkit
from cmkit import plugins
from cmkit.plugins import Plugin, Registry, Row, discover
from cmkit.templates.objective import Mine as Cauchy
from cmkit.testing.package import _verdict
from tests import toys
from tests.test_cli import refused

FAULT: dict[str, BaseException] = {}
"""Place -> what is raised there."""


def trip(place):
    if place in FAULT:
        raise FAULT[place]


LINE = Path(__file__).read_text().splitlines().index("        raise FAULT[place]") + 1
"""The line that a person shall be told of."""


def tripped(cls, *methods):
    """A subclass whose `methods` may raise."""

    def wrapped(name):
        own = getattr(cls, name)
        place = f"{cls.__name__}.{name}"
        if isinstance(own, property):
            return property(lambda self: trip(place) or own.fget(self))
        return lambda self, *args, **options: trip(place) or own(self, *args, **options)

    own = {"__doc__": f"{cls.__name__}, which may fail."}
    return type(f"Odd{cls.__name__}", (cls,), own | {name: wrapped(name) for name in methods})


class Net(toys.ReaderNetwork):
    def forward(self, x, c_noise, cond, scales):
        trip("forward")
        return super().forward(x, c_noise, cond, scales)


class Coder(toys.BlocksCoder):
    encode = tripped(toys.BlocksCoder, "encode").encode
    decode = tripped(toys.BlocksCoder, "decode").decode


class Prompts(toys.WordsPrompts):
    __call__ = tripped(toys.WordsPrompts, "__call__").__call__


class OddReader(tripped(toys.Reader, "build")):
    """A backbone."""

    def build(self, data, conditions):
        super().build(data, conditions)
        return Net(data, self.width, "guidance" in conditions)


class OddBlocks(tripped(toys.Blocks, "spec", "identity")):
    """A codec."""

    def load(self, device):
        trip("Blocks.load")
        return Coder(self)


class OddWords(tripped(toys.Words, "spec", "cut")):
    """A prompt encoder."""

    def load(self, device):
        trip("Words.load")
        return Prompts(self, device)


class OddCaptioned(tripped(toys.Captioned, "spec", "captions", "pictures", "reference")):
    """A data set."""

    def batches(self, size, seed, device, start=0):
        for batch in super().batches(size, seed, device, start):
            trip("Captioned.batches")
            yield batch


class OddMultistep(tripped(Multistep, "nfe", "sample")):
    """A sampler whose field is read by code of its own."""

    extra: int = 0

    @field_validator("extra")
    @classmethod
    def _read(cls, value):
        trip("Multistep.validator")
        return value


class OddShift(cmkit.Adapter):
    """An adapter that cannot be attached."""

    def attach(self, network):
        trip("Shift.attach")

    off = fold = write = mix = attach


OddCauchy = tripped(Cauchy, "phase", "loss", "check", "companions", "needed")
OddGlobal = tripped(Global, "bind", "with_values", "value_of")
OddMean = tripped(toys.Mean, "keys", "measure", "check", "provenance", "identity")
OddConsistency = tripped(Consistency, "scalings", "noise")


class Hook:
    """A manifest with a hook."""

    @staticmethod
    @cmkit.hookimpl
    def cmkit_run_finished(folder):
        trip("finished")


PARTS = {
    "dataset": "OddCaptioned",
    "codec": "OddBlocks",
    "text": "OddWords",
    "backbone": "OddReader",
    "precond": "OddConsistency",
    "objective": "OddCauchy",
    "sampler": "OddMultistep",
    "rescaler": "OddGlobal",
    "metric": "OddMean",
    "adapter": "OddShift",
}
RECIPE = """\
name = "odd"
dataset = { use = "odd", channels = 1, resolution = 8, images = 20, texts = 5 }
codec = { use = "odd", side = 2 }
text = { use = "odd" }
backbone = { use = "odd" }
denoiser = { precond = { use = "odd" } }
objective = { use = "odd" }
rescaler = { use = "odd" }
sampler = { use = "odd", extra = 1 }
cache = {}
train = { steps = 2, batch = 4, log_every = 1, precision = "fp32" }
sample = { images = 4, batch = 4, precision = "fp32" }
metric = [{ use = "odd" }]

[search]
images = 4
batch = 4
confirm_seeds = 2
precision = "fp32"
minimize = "mean"
grid = { skip = [1.0, 1.1] }
"""


@pytest.fixture(autouse=True)
def _installed(monkeypatch, tmp_path):
    """The registry, with the parts of a package cmkit-odd, which is this file."""
    rows = [
        Row(kind, "odd", "cmkit-odd", "0.3", Plugin(kind, "odd", f"{__name__}:{target}", "odd"))
        for kind, target in PARTS.items()
    ]
    made = Registry([*discover().rows, *rows])
    for module in ("cmkit.plugins", "cmkit.cli.entry", "cmkit.plan.checks", "cmkit.plan.trial"):
        monkeypatch.setattr(f"{module}.discover", lambda: made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "odd.toml").write_text(RECIPE)
    yield
    FAULT.clear()


PLACES = {
    "check": [
        "Blocks.spec",
        "Captioned.captions",
        "Captioned.pictures",
        "Captioned.spec",
        "Consistency.noise",
        "Consistency.scalings",
        "Global.bind",
        "Mean.check",
        "Mean.keys",
        "Mine.check",
        "Mine.needed",
        "Mine.phase",
        "Multistep.nfe",
        "Multistep.sample",
        "Multistep.validator",
        "Reader.build",
        "Shift.attach",
        "Words.spec",
        "forward",
    ],
    "run": [
        "Blocks.load",
        "BlocksCoder.decode",
        "BlocksCoder.encode",
        "Captioned.batches",
        "Captioned.reference",
        "Mean.identity",
        "Mean.measure",
        "Mean.provenance",
        "Mine.loss",
        "Words.cut",
        "Words.load",
        "WordsPrompts.__call__",
    ],
}
"""Command -> what of the parts it calls."""


@pytest.mark.parametrize(
    ("command", "place"), [(command, place) for command in PLACES for place in PLACES[command]]
)
def test_a_fault_in_any_part_names_package_file_and_line(cmkit, tmp_path, command, place):
    recipe = RECIPE
    if place == "Captioned.batches":  # otherwise they are made of its pictures
        recipe = recipe.replace("cache = {}", "cache = false")
        recipe = recipe.replace("texts = 5", "texts = 5, numbered = false")
    if place == "Shift.attach":
        data = toys.Blocks().spec(toys.Captioned(channels=1, resolution=8, texts=5).spec())
        network = Net(replace(data, text=toys.Words().spec()), 8, False)
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        recipe = f'adapter = {{ use = "odd" }}\n{RECIPE}'
        recipe = recipe.replace("denoiser = {", 'denoiser = { weights = "w.safetensors",')
    (tmp_path / "odd.toml").write_text(recipe)
    FAULT[place] = ZeroDivisionError("of theirs")
    result = cmkit(command, "odd.toml", *(["--device", "cpu"] if command == "run" else []))
    said = f"cmkit-odd 0.3, {__file__}:{LINE}: ZeroDivisionError: of theirs"
    refused(result, 9, said, "debug.log")


def test_without_a_fault_it_runs(cmkit):
    assert cmkit("run", "odd.toml", "--device", "cpu")[0] == 0


@pytest.mark.parametrize("place", ["forward", "Multistep.sample"])
def test_a_fault_on_a_tensor_without_data_says_where_its_traceback_is(cmkit, place):
    FAULT[place] = ValueError("of theirs")
    said = (f"ValueError: of theirs; at cmkit-odd 0.3, {__file__}:{LINE}", "debug.log")
    refused(cmkit("check", "odd.toml"), 9, "on a tensor without data", *said)


def test_plugins_check_says_where_a_part_fails(monkeypatch):
    made = plugins.discover()
    monkeypatch.setattr("cmkit.testing.package.discover", lambda: made)
    FAULT["Mine.phase"] = ZeroDivisionError("of theirs")
    found = _verdict(made.find("objective", "odd"), None)
    assert found.outcome == "fail"
    assert f"at cmkit-odd 0.3, {__file__}:{LINE}" in found.detail
    FAULT.clear()
    FAULT["Mine.loss"] = ZeroDivisionError("of theirs")
    found = _verdict(made.find("objective", "odd"), None)
    assert found.detail.startswith("ZeroDivisionError: of theirs; at cmkit-odd 0.3, ")


def test_a_hook_that_fails_is_a_note_with_its_place(cmkit, monkeypatch):
    made = plugins.discover()
    made.manager.register(Hook, "cmkit-odd:hook")
    FAULT["finished"] = ZeroDivisionError("of theirs")
    code, _, err = cmkit("run", "odd.toml", "--device", "cpu")
    assert code == 0
    said = f"cmkit_run_finished failed at cmkit-odd 0.3, {__file__}:{LINE}: ZeroDivisionError"
    assert said in err
