"""What people install: wheels of cmkit and of the packages beside it, in a clean environment."""

import json
import re
import tomllib
from pathlib import Path

from cmkit_std.manifest import cmkit_register

from tests.wheels import PACKAGES, ROOT

PARTS = {
    "cmkit": {(plugin.kind, plugin.name) for plugin in cmkit_register()},
    "cmkit-ect": {("objective", "ect"), ("sampler", "ect")},
    "cmkit-scm": {("objective", "scm")},
    "cmkit-meanflow": {("objective", "meanflow"), ("sampler", "meanflow")},
    "cmkit-trackers": {("tracker", name) for name in ("tensorboard", "wandb", "trackio", "mlflow")},
    "cmkit-latent": {
        ("adapter", "lora"),
        ("backbone", "sd_unet"),
        ("codec", "autoencoder"),
        ("codec", "patches"),
        ("dataset", "captions"),
        ("metric", "clip_score"),
        ("text", "clip"),
        ("text", "sentence"),
        ("text", "words"),
    },
}
RECIPE = """
name = "{name}"
dataset = {{ use = "digits" }}
denoiser = {{ precond = "edm" }}
backbone = {{ use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }}
objective = {{ use = "{name}" }}
sampler = {{ use = "{sampler}" }}
train = {{ steps = 100, batch = 4, precision = "fp32" }}
sample = {{ images = 4, precision = "fp32" }}
"""


def version(folder) -> str:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_what_is_imported_is_what_pip_installed(installed, tmp_path):
    modules = ["cmkit", "cmkit_std", *(name.replace("-", "_") for name in PACKAGES)]
    code = f"import {', '.join(modules)}; print(*({'.__file__, '.join(modules)}.__file__))"
    done = installed.run("python", "-c", code, cwd=tmp_path)
    files = done.out.split()
    assert len(files) == len(modules), done.err
    assert all(file.startswith(f"{installed.site}/") for file in files), files


def test_every_part_is_listed_with_its_package_and_version(installed, tmp_path):
    rows = json.loads(installed.run("cmkit", "plugins", "--json", cwd=tmp_path).out)["plugins"]
    assert not [row for row in rows if row["broken"]]
    for package, parts in PARTS.items():
        own = [row for row in rows if row["package"] == package]
        assert {(row["kind"], row["name"]) for row in own} == parts
        folder = ROOT if package == "cmkit" else ROOT / "plugins" / package
        assert {row["version"] for row in own} == {version(folder)}
    assert {row["package"] for row in rows} == set(PARTS)


def test_the_recipes_come_with_the_wheel(installed):
    shipped = {path.name for path in (installed.site / "cmkit" / "recipes").iterdir()}
    assert shipped == {path.name for path in (ROOT / "recipes").glob("*.toml")}
    suites = {path.name for path in (installed.site / "cmkit" / "suites").iterdir()}
    assert suites == {path.name for path in (ROOT / "benchmarks" / "suites").glob("*.toml")}


def test_the_packages_pass_their_check_their_parts_train_and_their_readmes_are_right(
    installed, tmp_path
):
    """Each `run` of a README is a `check` here; one that lacks a teacher names that of a command
    before it."""
    (tmp_path / "plugins").symlink_to(ROOT / "plugins")
    pages = [(ROOT / "plugins" / name / "README.md").read_text("utf-8") for name in PACKAGES]
    blocks = re.findall(r"```sh\n(.*?)```", "".join(pages), re.S)
    shown = dict.fromkeys(re.findall(r"^cmkit (.*)$", "".join(blocks), re.M))
    assert {f"plugins check {name}" for name in PACKAGES} < set(shown)
    commands = ["check digits_rescaled_ct"]
    trained = [package for package in PACKAGES if ("objective", package[6:]) in PARTS[package]]
    assert len(trained) == 3
    for package in trained:
        name = package.removeprefix("cmkit-")
        sampler = name if ("sampler", name) in PARTS[package] else "multistep"
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(name=name, sampler=sampler))
        commands.append(f"run {name}.toml --device cpu --set train.steps=2")
    commands += [re.sub("^run", "check", command) for command in shown]
    folders = []
    for command, done in zip(commands, installed.several(*commands, cwd=tmp_path), strict=True):
        if done.code == 4:
            names = [Path(folder).name for folder in folders]
            assert any(name in done.err for name in names), (command, done.err, folders)
            continue
        assert done.code == 0, (command, done)
        if command.startswith("plugins check"):
            parts = PARTS[command.split()[-1]]
            # Those that need files are not checked here.
            files = done.out.count("Field required") if parts == PARTS["cmkit-latent"] else 0
            files += done.out.count("is not installed") if parts == PARTS["cmkit-trackers"] else 0
            assert done.out.count(" pass\n") == 1 + len(parts) - files, done.out
        folders += re.findall(r"^folder +(.*)$", done.out, re.M)
    for package in trained:
        (run,) = (tmp_path / "runs").glob(f"{package.removeprefix('cmkit-')}-*")
        assert (run / "model.safetensors").is_file()
        assert list((run / "samples").glob("*.npz"))
