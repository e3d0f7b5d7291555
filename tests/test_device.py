"""What "auto" means is measured once a machine, and fp32 is fp32; what check and a start say."""

import json

import pytest
import torch

from cmkit import device, discover, files
from cmkit.device import auto_precision, pick_device, precision
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.runs import Note, StageStarted, run
from cmkit.runs.environment import changed_environment
from cmkit.stop import StopSignal
from tests.test_run import RECIPE

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Says how long each precision takes on a fresh machine with bf16; what was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(device, "cpu_model", lambda: "Quick CPU")
    measured = []

    def takes(fp32, bf16):
        def seconds(name, _device):
            measured.append(name)
            return {"fp32": fp32, "bf16": bf16}[name]

        monkeypatch.setattr(device, "_seconds", seconds)
        auto_precision.cache_clear()

    takes(2.0, 1.0)
    takes.measured = measured
    yield takes
    auto_precision.cache_clear()


def test_auto_is_what_was_measured_to_be_faster_and_says_so(machine):
    assert precision("auto", CPU) == "bf16"
    assert auto_precision(CPU)[1] == "2 times as fast as fp32 on Quick CPU, as measured"
    files.cache_folder("precision").rename(files.cache_folder("elsewhere"))
    machine(1.0, 1.6)
    assert auto_precision(CPU) == (
        "fp32",
        "1.6 times as fast as bf16 on Quick CPU, as measured",
    )
    assert [precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_it_is_measured_once_for_a_processor_and_a_torch(machine, monkeypatch):
    auto_precision(CPU)
    machine(1.0, 2.0)  # another start, which finds the times of before
    assert precision("auto", CPU) == "bf16"
    assert machine.measured == ["fp32", "bf16"]
    for change in (
        lambda: monkeypatch.setattr(device, "cpu_model", lambda: "Other CPU"),
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
    ):
        change()
        auto_precision.cache_clear()
        assert precision("auto", CPU) == "fp32"
    assert len(machine.measured) == 6


@pytest.mark.parametrize("damage", ["", "[1]", '{"fp32": 1}', '{"fp32": null, "bf16": 1}', "{"])
def test_damaged_times_are_measured_again(machine, damage):
    auto_precision(CPU)
    (kept,) = files.cache_folder("precision").iterdir()
    kept.write_text(damage)
    machine(1.0, 2.0)
    assert precision("auto", CPU) == "fp32"
    assert json.loads(kept.read_text()) == {"fp32": 1.0, "bf16": 2.0}


def test_without_bf16_and_on_a_gpu_nothing_is_measured(machine, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert auto_precision(CPU) == ("fp32", "Quick CPU has no bf16")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        auto_precision.cache_clear()
        said = lambda including_emulation, native=native: native and not including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", said)
        assert precision("auto", torch.device("cuda")) == expected
    assert precision("auto", torch.device("meta")) == "fp32"
    assert not machine.measured


def test_float32_has_all_its_digits_also_on_a_gpu_and_the_environment_says_so(monkeypatch):
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    then = {"tf32": True, "packages": {}}
    assert "tf32 False, before True" in changed_environment([then], {"tf32": False, "packages": {}})


@pytest.fixture
def checked(cmkit, tmp_path):
    """What `check` says of the tiny recipe, with overrides."""
    (tmp_path / "tiny.toml").write_text(RECIPE)

    def check(*overrides):
        options = [part for override in overrides for part in ("--set", override)]
        code, out, err = cmkit("check", "tiny.toml", *options)
        assert code == 0, err
        return out

    return check


def test_check_says_what_auto_is_and_why(checked, machine):
    assert "precision" not in checked()
    said = "precision            bf16: 2 times as fast as fp32 on Quick CPU, as measured"
    assert said in checked("train.precision='auto'")


def test_check_says_where_sigma_data_is_not_that_of_the_data(checked):
    note = "note: denoiser.sigma_data is 0.5, and the data have a standard deviation of 0.7"
    assert note in checked()
    assert "note:" not in checked("denoiser.sigma_data=0.75")
    assert "note:" not in checked("denoiser.sigma_data=0.65")
    assert "sigma_data is 1.2" in checked("denoiser.sigma_data=1.2")


def test_a_run_says_both_before_it_starts(tmp_path, machine):
    (tmp_path / "tiny.toml").write_text(RECIPE)

    def notes(*overrides):
        registry = discover()
        made = plan(load(tmp_path / "tiny.toml", overrides, registry))
        said = []
        for event in (running := run(made, registry, tmp_path, CPU, StopSignal())):
            if isinstance(event, StageStarted):
                running.close()
                return said
            said += [event.text] * isinstance(event, Note)

    auto, sigma_data = notes("train.precision='auto'")
    assert auto.startswith("precision auto is bf16: 2 times as fast as fp32 on Quick CPU")
    assert sigma_data.startswith("denoiser.sigma_data is 0.5, and the data have")
    others = "\n".join(notes("denoiser.sigma_data=0.75"))
    assert "precision auto" not in others
    assert "sigma_data is" not in others
