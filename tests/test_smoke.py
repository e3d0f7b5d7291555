"""--smoke: every shipped recipe can be tried anywhere, and what comes of it is marked."""

import io
import json
import re
import socket
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.invented import Invented
from cmkit_std.metrics.fidelity import Fidelity
from PIL import Image

from cmkit import DataSpec, discover
from cmkit.pictures import grid_png, stamped
from cmkit.recipe import load, run_name
from cmkit.smoke import smoke
from cmkit.testing import check_dataset
from tests.shipped import BUILT_IN as RECIPES

BEDROOM = next(path for path in RECIPES if path.stem == "rescaled_ct_bedroom")
DIGITS = next(path for path in RECIPES if path.stem == "digits_rescaled_ct")


def shrunk(path: Path) -> dict:
    registry = discover()
    return smoke(load(path, [], registry), Path("runs"), registry)


def kind_of(path: Path) -> str:
    """Which parts and tables a recipe has: what decides by which code a smoke run goes."""
    tables = shrunk(path)
    parts = {key: said.get("use", "") for key, said in tables.items() if isinstance(said, dict)}
    precond = tables["denoiser"].get("precond"), tables.get("teacher", {}).get("precond")
    gan = bool(tables.get("objective", {}).get("gan_weight"))
    used = [metric["use"] for metric in tables.get("metric", ())]
    return json.dumps([parts, precond, gan, used], sort_keys=True)


DIFFERENT = sorted({kind_of(path): path for path in reversed(RECIPES)}.values())


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a smoke run asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_shrunk_to_the_same_kinds_of_parts_and_numbers(path):
    was, now = tomllib.loads(path.read_text("utf-8")), shrunk(path)
    for table in ("backbone", "objective", "rescaler", "sampler"):
        assert was.get(table, {}).get("use") == now.get(table, {}).get("use")
    assert [m["use"] for m in was["metric"]] == [m["use"] for m in now["metric"]]
    flags = ("fid", "kid", "isc", "precision_recall")
    assert not {(k, v) for m in was["metric"] for k, v in m.items() if k in flags} - {
        (k, v) for m in now["metric"] for k, v in m.items() if k in flags
    }
    assert was.keys() - {"expected"} <= now.keys()
    weights = [now[t]["weights"] for t in ("denoiser", "teacher") if "weights" in now.get(t, {})]
    assert all(w.startswith("runs/smoke-weights/") for w in weights)


@pytest.mark.parametrize(
    "name",
    [
        "rescaled_cd_cat",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ccd_cifar10_lpips", "edm_imagenet64")),
    ],
)
def test_a_shrunk_recipe_fits_without_its_data_and_weights(name, cmkit, offline):
    code, out, err = cmkit("check", name, "--smoke", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["parameters"] < 2_000_000
    assert facts["to_download"] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", DIFFERENT, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs_smoked(path, cmkit, offline):
    """One of each combination of parts and tables; the test above is of all."""
    code, out, err = cmkit("run", path, "--smoke", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["smoke"] is True
    every = ("cache", "train", "search", "sample", "metric")
    assert list(report["stages"]) == [stage for stage in every if report["recipe"].get(stage)]


@pytest.mark.slow
def test_the_suites_run_smoked(installed, tmp_path):
    """All that of the digits; the runs of the other two are, shrunk, those of suites and recipes
    that run here."""
    check = "bench {} --smoke --check --json"
    done = installed.several(*map(check.format, ("digits", "fashion", "paper")), cwd=tmp_path)
    assert [run.code for run in done] == [0, 0, 0], done
    found = [[cell["name"] for cell in json.loads(run.out)["cells"]] for run in done]
    assert list(map(len, found)) == [16, 16, 7]
    ran = installed.run("cmkit", "bench", "digits", "--smoke", "--jobs", "2", cwd=tmp_path)
    assert ran.code == 0, ran.err
    folder = tmp_path / "runs" / "digits-smoke"
    assert {path.parent.name for path in folder.glob("*/report.html")} == set(found[0])
    assert '<body class="smoke">' in (folder / "suite.html").read_text("utf-8")
    assert "the numbers mean nothing" in ran.out


def test_the_bedrooms_run_in_an_empty_folder_offline_and_are_marked_everywhere(cmkit, offline):
    code, _, err = cmkit("run", BEDROOM, "--smoke")
    assert code == 0, err
    assert "its numbers mean nothing" in err
    assert 'dataset.use = "invented"; it was "lsun"' in err
    assert 'metric.0.extractor = "cmkit-random"; it was "auto"' in err
    (folder,) = Path("runs").glob("smoke-rescaled_ct_bedroom-*")
    report = json.loads((folder / "report.json").read_text())
    assert report["smoke"] is True
    assert report["stages"]["metric"]["values"].keys() == {"fid", "precision", "recall"}
    page = (folder / "report.html").read_text("utf-8")
    assert '<body class="smoke">' in page
    assert "Its pictures and numbers mean nothing." in page
    images = np.load(folder / "samples" / "0000000.npz")["arr_0"]
    plain = grid_png(torch.from_numpy(images).movedim(-1, 1))
    assert (folder / "samples_after.png").read_bytes() == stamped(plain)
    assert len(list(folder.glob("*.png"))) == 2

    written = Path("runs/smoke-recipes/smoke-rescaled_ct_bedroom.toml")
    first = report["stages"]["metric"]["values"]
    assert cmkit("run", written, "--out", "again", "--json")[0] == 0
    again = Path("again") / folder.name
    assert json.loads((again / "report.json").read_text())["stages"]["metric"]["values"] == first


def test_the_stamp_is_over_the_middle_of_a_picture():
    for side in (40, 98, 300):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (120, 60, 60)).save(buffer, "PNG")
        found = np.asarray(Image.open(io.BytesIO(stamped(buffer.getvalue()))))
        words = (found != (120, 60, 60)).any(-1)
        columns = np.nonzero(words)[1]
        assert 0.1 < words.mean() < 0.7
        assert columns.max() - columns.min() > 0.6 * side
        assert found[words].min() == 0
        assert found[words].max() > 200


@pytest.mark.slow
def test_smoke_runs_are_not_compared_with_others(cmkit, tmp_path):
    text = DIGITS.read_text("utf-8")
    Path("small.toml").write_text(re.sub(r"\[rescaler\].*?(?=\[sampler\])", "", text, flags=re.S))
    few = [
        *("--set", "train.steps=2", "--set", "train.batch=8", "--set", "train.warmup=0"),
        *("--set", "sample.images=12", "--set", 'metric=[{use="fidelity"}]'),
    ]
    folders = []
    for extra in ([], ["--smoke"]):
        code, out, err = cmkit("run", "small.toml", *few, *extra, "--json")
        assert code == 0, err
        folders.append(json.loads(out)["folder"])
    assert "smoke" not in json.loads(Path(folders[0], "report.json").read_text())
    code, out, err = cmkit("compare", *folders)
    assert (code, out) == (2, "")
    told = f"error: {folders[1]}: a smoke run, whose numbers mean nothing; leave it out\n"
    assert err == told
    assert cmkit("compare", folders[1], folders[1])[0] == 0


def test_a_bad_recipe_gives_its_usual_error(cmkit):
    for line, place in (
        ("--set=backbone.chanels=4", "--set backbone.chanels"),
        ("--set=denoiser.precond=edm", "denoiser.precond"),
        ("--set=backbone.attention_resolutions=[3]", "backbone"),
        ("--set=search.grid={skip=[1.0],nonsense=[1.0]}", "search.grid"),
    ):
        plain, smoked = (cmkit("check", DIGITS, line, *extra) for extra in ([], ["--smoke"]))
        assert plain == smoked
        assert plain[0] == 2
        assert place in plain[2]
    assert not Path("runs").exists()


def test_the_mark_is_a_key_of_the_recipe_and_of_its_stages(tmp_path):
    registry, file = discover(), tmp_path / "r.toml"
    file.write_text(DIGITS.read_text("utf-8"))
    plain = load(file, [], registry)
    marked = load(file, ["smoke=true"], registry)
    assert "smoke" not in plain.resolved
    assert marked.resolved["smoke"] is True
    assert run_name(plain) != run_name(marked)
    assert run_name(plain) == run_name(load(file, ["smoke=false"], registry))


def test_a_part_without_the_hook_keeps_its_options():
    registry = discover()
    recipe = load(BEDROOM, [], registry)
    assert recipe.rescaler.smallest(DataSpec(3, 32)) == {}
    now = smoke(recipe, Path("out"), registry)
    assert now["rescaler"] == recipe.resolved["rescaler"]
    assert now["backbone"].keys() == recipe.resolved["backbone"].keys() - {"preset"}


def test_invented_images_keep_the_laws_of_a_dataset():
    grey = {"channels": 1, "resolution": 8, "classes": 3}
    for options in ({}, grey, {"classes": 1000}, {"texts": 3}, {"texts": 30, "classes": 2}):
        check_dataset(Invented(images=20, **options))


def test_pictures_of_unknown_classes_become_two_classes():
    folder = ImageFolder(path="none", resolution=512, labels=True)
    assert folder.smallest() == {"use": "invented", "channels": 3, "resolution": 32, "classes": 2}


def test_every_number_of_fidelity_can_be_had_in_random_features():
    data = Invented(images=40)
    flags = dict.fromkeys(("fid", "sfid", "isc", "kid", "precision_recall"), True)
    metric = Fidelity(**flags)
    metric = metric.model_copy(update=dict(metric.smallest(data.spec())))
    metric.check(data.spec(), 16)
    images = [data.reference().images[k] for k in range(16)]
    values = metric.measure(images, data.reference(), torch.device("cpu"))
    assert values.keys() == set(metric.keys())
    assert values["precision"] == 1
    assert metric.provenance()["extractor"] == "cmkit-random"


OTHERS = {
    "edm2, pd, per_layer, sfid": """
        dataset = { use = "image_folder", path = "none", resolution = 512, labels = true }
        backbone = { use = "edm2", preset = "s", channel_mult = [1, 1, 2, 2, 3, 4, 4] }
        denoiser = { precond = "edm", init = "teacher" }
        teacher = { weights = "run:none-12345678" }
        objective = { use = "pd", distance = "lpips" }
        train = { steps = 100_000, batch = 7, accumulate = 7, sqrt_decay = 1000 }
        rescaler = { use = "per_layer", skip = [1.1, 0.9, 1.2], sites = { "emb.30" = 0.9 } }
        search = { images = 1000, minimize = "sfid", grid = { "skip.2" = [0.9, 1.0] } }
        sampler = { use = "progdist", steps = 4 }
        metric = [{ use = "fidelity", sfid = true, kid = true }]""",
    "dit, lcm, discrete": """
        dataset = { use = "imagenet64", path = "none" }
        backbone = { use = "dit", preset = "dit-xl-2" }
        denoiser.precond = { use = "discrete", timestep_scaling = 10.0 }
        denoiser.init = "teacher"
        denoiser.guidance = 2.0
        teacher = { weights = "none.safetensors", precond = { use = "discrete" } }
        objective = { use = "lcm" }
        train = { steps = 100_000, batch = 8 }
        sampler = { use = "lcm", steps = 8 }
        metric = [{ use = "fidelity" }]""",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_parts_of_no_shipped_recipe_are_shrunk_as_well(text, cmkit, offline):
    lines = [line.strip() for line in text.splitlines()]
    Path("other.toml").write_text("\n".join(['name = "other"', *lines, "sample = { images = 99 }"]))
    code, out, err = cmkit("check", "other.toml", "--smoke", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["parameters"] < 200_000
    assert not [note for note in facts["notes"] if "standard deviation" in note]
