"""Every figure is read by some test, and a folder of others is read as ours is."""

from __future__ import annotations

import importlib
import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from tests.forks import Fork
from tests.parity import harness

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTSIDE = [ROOT / "plugins" / name for name in ("cmkit-ect", "cmkit-latent")]


def load_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import every module that reads figures, so that `harness.READ` is complete."""
    for path in HERE.glob("test_*.py"):
        importlib.import_module(f"tests.parity.{path.stem}")
    for package in OUTSIDE:
        monkeypatch.syspath_prepend(package / "src")
        name = f"parity_of_{package.name}".replace("-", "_")
        spec = spec_from_file_location(name, package / "tests" / "test_parity.py")
        spec.loader.exec_module(module_from_spec(spec))


def test_every_case_is_read(monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    load_readers(monkeypatch)
    unread = [
        f"{path.name}: {name} ({case['function']})"
        for path in sorted(harness.FIGURES.glob("*.json"))
        for name, case in json.loads(path.read_text("utf-8"))["cases"].items()
        if name not in harness.READ[path.name]
    ]
    assert not unread, "no test reads\n" + "\n".join(unread)


def test_an_unknown_key_of_a_config_is_named_also_inside_another(monkeypatch):
    figures = harness.Figures("dit.json")
    case = {"config": {"net": {"width": 8, "rotary": True}, "rate": 1, "size": 3}, "inputs": {}}
    monkeypatch.setitem(figures.cases, "one", case)

    def reads_most(case):
        case["config"].ignore("rate")
        return case["config"]["net"]["width"] + case["config"].get("depth", 0)

    with pytest.raises(AssertionError, match=r"one: unknown options \['net.rotary', 'size'\]"):
        figures.compute("one", reads_most)


@pytest.mark.parametrize("y", [{}, {"y": None}, {"y": [2, 0]}], ids=str)
def test_labels_may_be_absent(y):
    label = harness.cond_of({"inputs": y}).label
    assert (None if label is None else label.tolist()) == y.get("y")


def test_a_function_is_known_whatever_arguments_its_name_has():
    case = {"function": "schedule(k, 500, 0.9), of UNet2D"}
    assert harness.function_of(case, {"schedule(k, 1000, 2), of UNet2D": 7}) == 7
    with pytest.raises(KeyError):
        harness.function_of(case, {"schedule(k, 1000, 2), of UNet3D": 7})


@pytest.mark.parametrize("elementwise", [False, True])
def test_figures_of_a_float64_run_allow_for_rounding_in_float32(elementwise):
    """What rounding does to the official code is not known then: err32 is 0, or absent."""
    values = torch.linspace(1, 2, 8, dtype=torch.float64)
    leaf = {"shape": [8], "k": 1, "f64": values.tolist()}
    of_both = {**leaf, "f32": values.tolist(), "err32": 1e-6}
    off = values.float() * (1 + 4e-5)
    for figure in (leaf, {**leaf, "f32": values.tolist(), "err32": 0.0}):
        harness.compare(off, figure, torch.float32, elementwise=elementwise)
    for figure, actual in ((of_both, off), (leaf, values.float() * 1.001)):
        with pytest.raises(AssertionError):
            harness.compare(actual, figure, torch.float32, elementwise=elementwise)
    with pytest.raises(AssertionError):
        harness.compare(values * (1 + 4e-5), leaf, torch.float64, elementwise=elementwise)


@pytest.mark.slow
def test_a_folder_with_other_names_and_cases_is_read(tmp_path):
    """Renamed, left out, with a key that nobody knows, and of a function that nobody computes."""
    shutil.copytree(harness.OWN_FIGURES, tmp_path, dirs_exist_ok=True)
    renamed = {}
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        every = list(content["cases"].items())
        content["cases"] = {f"case-{i}": case for i, (_, case) in enumerate(every[::-2])}
        renamed[path.name] = content
    known = renamed["openai_denoiser.json"]["cases"]["case-0"]
    known["config"]["mystery"] = 1
    extra = {**known, "function": "nobody.computes_this"}
    renamed["openai_denoiser.json"]["cases"]["extra"] = extra
    renamed["unheard_of.json"] = {"format": 1, "fill": {}, "cases": {"alone": extra}}
    for name, content in renamed.items():
        (tmp_path / name).write_text(json.dumps(content))
    options = ["-p", "no:cacheprovider", "-q", "-rf"]
    tests = [f"tests/parity/test_{name}.py" for name in ("openai_denoiser", "diffusers_unet")]
    every = "tests/parity/test_figures.py::test_every_case_is_read"
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = Fork(code, *options, every, *tests, cwd=ROOT, CMKIT_PARITY_DIR=str(tmp_path)).wait()
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    mystery = [line for line in failed if "case-0-f" in line]
    assert len(mystery) == 2, done.stdout
    assert len(failed) == 3, done.stdout
    assert "case-0: unknown options ['mystery']" in done.stdout
    assert "openai_denoiser.json: extra (nobody.computes_this)" in done.stdout
    assert "unheard_of.json: alone (nobody.computes_this)" in done.stdout
