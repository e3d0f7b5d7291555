"""The command line: one line and the right code for each fault, plain output in pipes."""

import json
import os
import tempfile

import pytest
import torch
from PIL import Image

from tests.forks import CMKIT, Fork
from tests.test_run import RECIPE


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def refused(result, code, *words):
    """Exactly one line, an error, with these words; nothing on stdout."""
    got, out, err = result
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert got == code, err
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stesp=5", "did you mean 'steps'"),
        ("train.steps=-1", "greater than or equal to 1"),
        ("train.lr=nan", "finite"),
        ("train.batch=10000000000", "less than or equal to"),
        ("backbone.channels=33", "norm_groups"),
        ("backbone.channel_mult=[1,1,1,1,1]", "divisible"),
        ("backbone.num_head_channels=7", "does not divide"),
        ("search.grid={skpi=[1.0]}", "the rescaler has no such number; known: skip, emb"),
        ("search.minimize=fdi", "no [[metric]] returns it; known: fid"),
        ("search.minimize=confident", "= 'confident': more of it is better"),
        ("search.grid.skip=[1e9]", "the rescaler refuses"),
        ("sampler.sigmas=[90.0]", "between sigma_min"),
        ("denoiser.sigma_min=0.9\ndenoiser.sigma_max=0.5", "not a TOML value"),
        ("denoiser={sigma_max=0.001}", "must be below sigma_max"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_any_work(
    cmkit, recipe, tmp_path, change, words
):
    for command in ("check", "run"):
        refused(cmkit(command, recipe, "--set", change), 2, words)
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_stage_without_its_parts_names_them(cmkit, recipe):
    def without(*keys):
        lines = recipe.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(keys)]
        recipe.write_text("\n".join(kept))
        return cmkit("check", recipe)

    refused(without("metric"), 2, "[search] needs a [metric] table")
    refused(without("rescaler"), 2, "[search] needs a [rescaler] table")


def test_nothing_is_sampled_from_weights_that_nobody_trained(cmkit, recipe):
    text = recipe.read_text()
    start, end = text.index("[train]"), text.index("[search]")
    recipe.write_text(text[:start] + text[end:])
    refused(cmkit("run", recipe), 2, "no weights to sample from")


def test_missing_and_corrupt_images_name_the_file(cmkit, recipe, tmp_path):
    dataset = 'dataset={use="image_folder", path="pictures", resolution=8, channels=1}'
    change = ("--set", dataset)
    refused(cmkit("run", recipe, *change), 3, "pictures")
    folder = tmp_path / "pictures"
    folder.mkdir()
    refused(cmkit("run", recipe, *change), 3, "pictures")
    for i in range(3):
        Image.new("L", (9, 9), i).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    refused(cmkit("run", recipe, *change), 3, "2.png")


def test_too_few_images_for_a_metric_are_refused_before_training(cmkit, recipe, tmp_path):
    metric = 'metric=[{use="fidelity", kid=true}]'
    refused(cmkit("run", recipe, "--set", metric), 3, "metric.0", "70 samples", "kid_subset_size")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["rerank_images", "confirm_images"])
def test_too_few_images_to_judge_the_winner_are_refused_before_the_search(cmkit, recipe, key):
    sets = ['metric.0={use="fidelity", kid=true, kid_subset_size=20}', "search.minimize=kid_mean"]
    change = [word for each in (*sets, f"search.{key}=19") for word in ("--set", each)]
    refused(cmkit("check", recipe, *change), 3, f"search.{key}", "19 samples", "at least 20")


def test_inception_weights_that_are_missing_stop_the_run_at_once(
    cmkit, recipe, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    refused(
        cmkit("run", recipe, "--set", 'metric=[{use="fidelity", extractor="inception-v3-compat"}]'),
        8,
        "weights-inception-2015-12-05-6726825d.pth",
        "metric.weights",
    )
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_shape_or_that_could_run_code_are_refused(
    cmkit, recipe, tmp_path, forked_reader
):
    from safetensors.torch import save_file

    save_file({"conv_out.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    set_weights = "denoiser.weights={}".format
    refused(
        cmkit("run", recipe, "--set", set_weights("other.safetensors")),
        4,
        "other.safetensors",
        "time.0.weight is absent",
    )
    refused(cmkit("run", recipe, "--set", set_weights("none.safetensors")), 4, "none.safetensors")
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    torch.save(Payload(), tmp_path / "evil.pt")
    refused(cmkit("run", recipe, "--set", set_weights("evil.pt")), 4, "evil.pt", "no state dict")
    assert not marker.exists()


def test_a_device_that_is_not_here_is_refused(cmkit, recipe):
    for device in ("cuda:99", "quantum"):
        refused(cmkit("run", recipe, "--device", device), 5, f"--device {device}")


def test_a_full_disk_is_foreseen(cmkit, recipe, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(cmkit("check", recipe), 5, "MiB are free")
    refused(cmkit("run", recipe), 5, "MiB are free")


def test_a_read_only_folder_is_refused_without_a_trace():
    """As a user for whom permissions hold: root passes them by."""
    script = (
        "import contextlib, io, os, sys\n"
        "from cmkit.cli import main\n"
        "sys.argv = ['cmkit', 'check', 'tiny.toml']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"  # all is imported by now
        "sys.argv = ['cmkit', 'run', 'tiny.toml', '--out', 'closed/runs']\n"
        "main()"
    )
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        with open(f"{home}/tiny.toml", "w") as file:
            file.write(RECIPE)
        os.mkdir(f"{home}/closed", 0o555)
        done = Fork(script, cwd=home).wait()
    refused((done.returncode, done.stdout, done.stderr), 5, "closed/runs", "--out")


def test_a_broken_plugin_stops_only_who_names_it(cmkit, recipe):
    refused(cmkit("run", recipe, "--set", "objective={use='nothing'}"), 9, "known: ccd, cct, ")


def test_usage_errors_are_one_line(cmkit):
    refused(cmkit("rnu"), 2, "No such command", "run")
    refused(cmkit("run"), 2, "Missing argument")
    refused(cmkit("run", "none.toml"), 2, "none.toml")
    refused(cmkit("plugins", "show", "objektive", "ct"), 2, "did you mean 'objective'")
    refused(cmkit("plugins", "show", "objective", "icct"), 9, "did you mean 'ict'")


def test_check_says_what_a_run_would_cost(cmkit, recipe):
    code, out, err = cmkit("check", recipe, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["parameters"] > 10_000
    assert facts["gflop_per_image"] > 0
    assert facts["images"] == [1, 8, 8]
    assert facts["search_cells"] == 4
    assert facts["search_images"] == 4 * 70 + 2 * 80 + 2 * 2 * 70
    assert facts["sites"] == len(facts["site_names"])
    code, out, _ = cmkit("check", recipe)
    assert "parameters" in out
    assert f"{facts['site_names'][0]} to skip." in out
    two = ("--set", "search.method=surrogate", "--set", "sampler.sigmas=[0.8]")
    assert json.loads(cmkit("check", recipe, *two, "--json")[1])["search_passes"] == [2 * (4 + 5)]


def test_plugins_and_schema_are_one_json_document(cmkit):
    code, out, err = cmkit("plugins", "--json")
    assert (code, err) == (0, "")
    assert {row["name"] for row in json.loads(out)["plugins"]} >= {"adm", "ct", "ict", "digits"}
    code, out, _ = cmkit("plugins", "show", "objective", "ict", "--json")
    assert json.loads(out)["fields"][0]["key"] == "start_scales"
    code, out, _ = cmkit("schema")
    assert json.loads(out)["title"] == "cmkit recipe"


@pytest.mark.slow
def test_a_pipe_sees_plain_lines_and_results_apart(recipe, tmp_path):
    plain = {"FORCE_COLOR": "1", "LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}
    done = Fork(CMKIT, "run", recipe, cwd=tmp_path, **plain).wait()
    assert done.returncode == 0, done.stderr
    assert "\x1b[?25" not in done.stderr  # no cursor tricks in a log file
    assert done.stderr.isascii()
    assert "train 6/6" in done.stderr
    assert "saved step 6" in done.stderr
    assert done.stdout.isascii()
    assert "fid = " in done.stdout
    assert "report.html" in done.stdout.splitlines()[0]


def test_the_shipped_recipe_is_found_by_its_bare_name(cmkit):
    code, out, _ = cmkit("check", "digits_rescaled_ct", "--json")
    assert code == 0
    assert json.loads(out)["recipe"] == "digits_rescaled_ct"
