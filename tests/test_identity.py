"""What a run depends on: stages shared between recipes, changed inputs, damaged files."""

import errno
import itertools
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.metrics.fidelity_meter import FidelityMeter
from cmkit_std.samplers.multistep import Multistep
from PIL import Image

from cmkit import (
    CheckpointError,
    CmkitError,
    DataError,
    DataSpec,
    NonFiniteError,
    PluginError,
    RecipeError,
    ResourceError,
    discover,
    image_labels,
)
from cmkit.batches import batch_indices
from cmkit.checkpoint import read_weights
from cmkit.plan import plan
from cmkit.recipe import load, run_name, stage_keys
from cmkit.runs import Note, RunFinished, RunFolder, drawn_from, outlook, run, verify
from cmkit.runs.inputs import changes
from cmkit.runs.stages import saving_first
from cmkit.sample import Draws, RepeatedDraws
from cmkit.stop import StopSignal
from cmkit.train import Step
from cmkit.weights import find, read
from tests.forks import CMKIT, Fork
from tests.test_run import CPU, RECIPE

BASE = RECIPE.replace("confirm_seeds = 2", "confirm_seeds = 2\nthumbnails = 4")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe, and its finished run below runs/."""
    home = tmp_path_factory.mktemp("identity")
    (home / "tiny.toml").write_text(BASE)
    go(home)
    return home


def go(home: Path, *overrides: str, until=None):
    """(folder, events) of a run of the recipe in `home`, up to the first that `until` takes."""
    registry = discover()
    made = plan(load(home / "tiny.toml", overrides, registry))
    seen = []
    for event in (running := run(made, registry, home / "runs", CPU, StopSignal())):
        seen.append(event)
        if until and until(event):
            running.close()
            break
    return RunFolder(home / "runs" / run_name(made.recipe)), seen


def steps(events) -> list[int]:
    return [event.step for event in events if isinstance(event, Step)]


def notes(events) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


NO_SEARCH = ["rescaler.skip=1.0", "rescaler.emb=1.0"]
CHANGES = {
    'metric=[{use="fidelity"}]': "training search samples",
    "sample.images=80": "training search",
    "search.grid.skip=[1.0, 1.5, 2.0]": "training",
    "train.ema=[0.9]": "",
    "seed=4": "",
}
"""What is changed, and what need not be done again for it."""


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=[pytest.mark.slow] * (not shared.endswith("search")))
        for change, shared in CHANGES.items()
    ],
)
def test_a_changed_recipe_takes_what_it_shares_with_a_finished_run(home, change):
    folder, seen = go(home, change, until=lambda e: isinstance(e, Step))
    taken = re.findall(r"^(\w+): that of .*tiny-", notes(seen), re.MULTILINE)
    assert taken == CHANGES[change].split()
    assert bool(steps(seen)) == (not taken)
    if taken:
        (original,) = (p for p in (home / "runs").iterdir() if p.name == name_of(home))
        assert folder.weights.read_bytes() == (original / "model.safetensors").read_bytes()
        folder, seen = go(home, change)  # again: what was taken is its own now
        assert not notes(seen)


def name_of(home, *overrides) -> str:
    return run_name(load(home / "tiny.toml", overrides, discover()))


def test_keys_that_change_no_bit_change_no_name(home):
    same = ["train.log_every=3", "train.save_every=5", "train.keep=1", "train.lr=0.001"]
    assert name_of(home, *same) == name_of(home)
    for other in ("train.steps=7", "train.lr=0.002", "sampler.use=heun", "denoiser.sigma_max=70.0"):
        assert name_of(home, other) != name_of(home)


def test_a_default_that_is_added_later_changes_no_name(home, monkeypatch):
    from cmkit_std.objectives.ct import CT

    before = name_of(home)

    class Later(CT):
        added: int = 5

    monkeypatch.setattr("cmkit_std.objectives.ct.CT", Later)
    assert load(home / "tiny.toml", [], discover()).objective.added == 5
    assert name_of(home) == before
    assert name_of(home, "objective.added=6") != before


def test_guidance_is_no_part_of_what_was_trained(home):
    recipes = [
        load(home / "tiny.toml", said, discover()) for said in ([], ["denoiser.guidance=1.0"])
    ]

    plain, guided = map(stage_keys, recipes)
    assert plain["train"] == guided["train"]
    assert plain["search"] != guided["search"]


@pytest.mark.slow
def test_a_training_that_another_run_has_begun_goes_on(home, tmp_path):
    (tmp_path / "tiny.toml").write_text(BASE)
    first, _ = go(tmp_path, until=lambda e: isinstance(e, Step) and e.step == 5)
    second, seen = go(tmp_path, "sample.images=80", until=lambda e: isinstance(e, Step))
    assert first.path != second.path
    assert f"training: goes on from {first.path}" in notes(seen)
    assert steps(seen) == [5]
    second, _ = go(tmp_path, "sample.images=80")
    assert (
        second.weights.read_bytes()
        == (home / "runs" / name_of(home) / "model.safetensors").read_bytes()
    )


def test_what_is_new_is_said_with_the_reason(home):
    registry = discover()

    def said(*overrides):
        made = load(home / "tiny.toml", overrides, registry)
        folder = RunFolder(home / "runs" / "tiny-none")
        kept = RunFolder(home / "runs" / name_of(home)).inputs()
        keys = kept["keys"]
        if overrides:
            keys = dict.fromkeys(keys, "another")
        return [str(each) for each in outlook(made, folder, keys, kept["inputs"], registry)]

    every = ("training", "search", "samples", "metrics")
    for stage, sentence in zip(every, said(), strict=True):
        assert sentence.startswith(f"{stage}: that of {home / 'runs' / 'tiny-'}")
    new = said("train.steps=9", "seed=3")
    assert new[0].startswith(f"training: new (train.steps = 9, in {home / 'runs' / 'tiny-'}")
    assert re.search(r" 6(; --from \S+ goes on from there)?\)$", new[0])


def test_a_finished_run_is_shown_and_never_written(home):
    folder, _ = go(home)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.path.rglob("*")}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        folder, seen = go(home)
    finally:
        torch.set_num_threads(threads)
    assert [type(event) for event in seen] == [RunFinished]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.path.rglob("*")} == before


def test_a_start_under_another_environment_is_kept_and_said(home, tmp_path):
    (tmp_path / "tiny.toml").write_text(BASE)
    go(tmp_path, until=lambda e: isinstance(e, Step) and e.step == 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        folder, seen = go(tmp_path, until=lambda e: isinstance(e, Step))
    finally:
        torch.set_num_threads(threads)
    assert f"threads {threads + 1}, before {threads}; bits will differ" in notes(seen)
    assert [start["threads"] for start in folder.starts()] == [threads, threads + 1]


def test_a_run_its_folder_of_checkpoints_and_a_checkpoint_are_the_same_weights(tmp_path):
    """The recipe's first average, which is not its slowest."""
    (tmp_path / "tiny.toml").write_text(BASE)
    said = ["train.ema=[0.5, 0.9]", "train.ema_warmup=false"]
    folder, _ = go(tmp_path, *said, until=done("train"))
    kept = read_weights(folder.weights)
    for place in (folder.checkpoints, folder.checkpoint(6)):
        found = read_weights(place)
        assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    slow = read_weights(folder.checkpoint(6), "ema-0.9")
    assert any(not torch.equal(slow[name], tensor) for name, tensor in kept.items())
    with pytest.raises(CheckpointError, match=r"no 'ema-0.7'; it has ema-0.5, ema-0.9, online"):
        read_weights(folder.checkpoint(6), "ema-0.7")
    for at, drawn in {"": kept, "@6": kept, ":ema-0.9": slow, "@6:ema-0.9": slow}.items():
        made = drawn_from(f"{folder.path}{at}", NO_SEARCH, discover(), 2)
        found = read(find(made.denoiser.weights, made.backbone))
        assert all(torch.equal(found[name], tensor) for name, tensor in drawn.items())


def test_a_run_is_found_by_its_name_wherever_it_lies(home, monkeypatch, tmp_path):
    name = name_of(home)
    monkeypatch.setenv("CMKIT_RUNS", str(home / "runs"))
    monkeypatch.chdir(tmp_path)
    assert RunFolder.at(f"run:{name}").path == home / "runs" / name
    with pytest.raises(CheckpointError, match="no such run in"):
        RunFolder.at("run:tiny-0")


def test_training_goes_on_from_another_run_with_its_full_state(home, tmp_path):
    """Four steps and two more, under the same numbers, are six steps."""
    (tmp_path / "tiny.toml").write_text(BASE)
    four, _ = go(tmp_path, "train.steps=4", "objective.num_sigmas=5", until=done("train"))
    longer, seen = go(
        tmp_path,
        "objective.num_sigmas=5",
        f'train.start="{four.path}"',
        until=done("train"),
    )
    assert steps(seen) == [5, 6]
    whole, _ = go(tmp_path, "objective.num_sigmas=5", until=done("train"))
    for name, tensor in read_weights(whole.weights).items():
        assert torch.equal(tensor, read_weights(longer.weights)[name])
    with pytest.raises(RecipeError, match=r"raise train\.steps"):
        go(tmp_path, "train.steps=4", f'train.start="{four.path}@4"')
    with pytest.raises(CheckpointError, match="no checkpoint to go on from; there are 2, 4 in"):
        go(tmp_path, f'train.start="{four.path}@3"')


@pytest.mark.slow
def test_a_longer_training_starts_from_a_shorter_one_where_no_step_depends_on_how_many(tmp_path):
    """Its bits are those of a training from scratch; --from a run that has its training from
    another finds the checkpoints of that one."""
    (tmp_path / "tiny.toml").write_text(BASE)
    even = ("objective.num_sigmas=5", "sample.images=40")
    four, _ = go(tmp_path, "train.steps=4", *even, until=done("train"))
    longer, seen = go(tmp_path, *even, until=done("train"))
    assert f"training: goes on from {four.path}" in notes(seen)
    assert steps(seen) == [5, 6]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tiny.toml").write_text(BASE)
    whole, _ = go(tmp_path / "alone", *even, until=done("train"))
    assert whole.weights.read_bytes() == longer.weights.read_bytes()
    for moving in ("train.decay=true", "objective.num_sigmas=null"):
        said = [each for each in even if each.partition("=")[0] != moving.partition("=")[0]]
        said += [moving] * ("null" not in moving)
        go(tmp_path, "train.steps=4", *said, until=done("train"))
        _, seen = go(tmp_path, *said, until=lambda e: isinstance(e, Step))
        assert steps(seen) == [1], moving
    taken, _ = go(tmp_path, *even, "sample.images=50", until=done("search"))
    assert not taken.steps()
    _, seen = go(
        tmp_path, "train.steps=8", *even, f'train.start="{taken.path}"', until=done("train")
    )
    assert steps(seen) == [7, 8]


def done(stage):
    return lambda event: getattr(event, "stage", "") == stage and hasattr(event, "result")


def test_a_longer_schedule_says_what_it_makes_of_the_step(home, tmp_path):
    (tmp_path / "tiny.toml").write_text(BASE)
    first, _ = go(tmp_path, until=done("train"))
    said = f'train.start="{first.path}"'
    _, seen = go(tmp_path, "train.steps=60", said, until=lambda e: isinstance(e, Step))
    assert "going on from step 6" in notes(seen)
    assert "of 60 steps, N there is 3, of 6 6" in notes(seen)


def test_numbers_that_are_not_finite_name_the_command_that_goes_on(tmp_path, monkeypatch):
    from cmkit_std.objectives.ct import CT

    honest = CT.loss
    monkeypatch.setattr(
        CT,
        "loss",
        lambda self, m, x, c, p, r: (
            honest(self, m, x, c, p, r) * (1 if p.step < 3 else float("nan"))
        ),
    )
    (tmp_path / "tiny.toml").write_text(BASE)
    with pytest.raises(NonFiniteError) as caught:
        go(tmp_path)
    command = re.search(r"cmkit run (\S+) --from (\S+) --set (\S+)$", str(caught.value))
    monkeypatch.undo()
    assert Path(command[1]) == tmp_path / "tiny.toml"
    _, seen = go(tmp_path, f'train.start="{command[2]}"', command[3], until=done("train"))
    assert steps(seen) == [3, 4, 5, 6]


def test_an_error_in_a_step_keeps_the_steps_before_it(tmp_path, monkeypatch):
    from cmkit_std.objectives.ct import CT

    honest = CT.loss

    def failing(self, models, x0, cond, phase, rng):
        if phase.step == 5:
            raise MemoryError("out of memory")
        return honest(self, models, x0, cond, phase, rng)

    (tmp_path / "tiny.toml").write_text(BASE)
    monkeypatch.setattr(CT, "loss", failing)
    with pytest.raises(MemoryError):
        go(tmp_path, "train.save_every=1000", "train.log_every=1")
    monkeypatch.undo()
    _, seen = go(tmp_path, "train.save_every=1000", "train.log_every=1", until=done("train"))
    assert steps(seen) == [6]


def failing_at(monkeypatch, owner, name, call):
    """Let call number `call` of a method on images fail as full memory does."""
    honest, calls = getattr(owner, name), itertools.count(1)

    def failing(self, *arguments):
        dry = any(getattr(argument, "is_meta", False) for argument in arguments)
        if not dry and next(calls) == call:
            raise MemoryError("out of memory")
        return honest(self, *arguments)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "kept"), [
    (Multistep, "sample", [70, 35]),
    (FidelityMeter, "add", [70]),
])  # fmt: skip
def test_an_error_in_a_search_keeps_what_is_drawn(home, tmp_path, monkeypatch, owner, name, kept):
    """A cell whose meter failed half way is drawn again, the other goes on; bits are the same."""
    (tmp_path / "tiny.toml").write_text(BASE)
    go(tmp_path, until=done("train"))
    failing_at(monkeypatch, owner, name, 4)
    with pytest.raises(MemoryError):
        go(tmp_path)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "runs" / name_of(tmp_path))
    assert json.loads(folder.unfinished()[1]["drawn"]) == kept
    missing = (140 - sum(kept)) // 35
    failing_at(monkeypatch, owner, name, missing + 1)  # the first batch of the next cells
    with pytest.raises(MemoryError):
        go(tmp_path)
    assert len(folder.scores("cells")[0]) == 2
    monkeypatch.undo()
    _, seen = go(tmp_path)
    whole = RunFolder(home / "runs" / name_of(home)).report()["stages"]["search"]
    again = seen[-1].report["stages"]["search"]
    for key in ("best", "cells", "rerank", "confirm"):
        assert again[key] == whole[key]


@pytest.mark.slow
def test_an_error_in_a_batch_of_samples_keeps_those_before_it(home, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(BASE)
    go(tmp_path, until=done("search"))
    failing_at(monkeypatch, Multistep, "sample", 2)
    with pytest.raises(MemoryError):
        go(tmp_path)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "runs" / name_of(tmp_path))
    assert folder.intact_samples() == (35, [])
    _, seen = go(tmp_path)
    whole = RunFolder(home / "runs" / name_of(home)).report()["stages"]
    assert seen[-1].report["stages"]["metric"]["values"] == whole["metric"]["values"]


def test_an_error_that_cannot_be_saved_first_is_still_the_one_that_is_told():
    def save():
        raise OSError("disk full")

    with pytest.raises(MemoryError) as caught, saving_first(save):
        raise MemoryError("out of memory")
    assert "could not be kept: disk full" in caught.value.__notes__[0]


@pytest.mark.slow
def test_every_stage_draws_labels_by_the_rule_of_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(BASE)
    drawn = {}
    monkeypatch.setattr(
        "cmkit.sample.image_labels",
        lambda seed, purpose, *rest: (
            (drawn.setdefault(purpose, rest[2]) and None) or image_labels(seed, purpose, *rest)
        ),
    )
    for rule in ("data", "uniform"):
        drawn.clear()
        folder, seen = go(tmp_path, f"sample.labels={rule!r}".replace("'", '"'))
        assert drawn.keys() == {"search", "rerank", "confirm-0", "confirm-1", "sample"}
        assert set(drawn.values()) == {folder.data().counts if rule == "data" else ()}
        stages = seen[-1].report["stages"]
        assert {p["labels"] for p in stages["metric"]["provenance"]} == {rule}
        assert {stages[name]["label_rule"] for name in ("search", "sample")} == {rule}
    assert "training: that of" in notes(seen)
    assert "search: that of" not in notes(seen)


def test_what_changed_is_named():
    then = {"dataset": {"classes": ["a", "aa", "b"], "pictures": 30, "contents": "0" * 64}}
    now = {"dataset": {"classes": ["aa", "b", "z"], "pictures": 31, "contents": "f" * 64}}
    said = [sentence for _, _, sentence in changes(then, now)]
    assert said[0] == "dataset: classes: z is new, a is gone; it was begun with a, aa, b"
    assert said[1] == "dataset: pictures 31, it was begun with 30"
    assert said[2].startswith("dataset: contents changed: SHA-256 ffffffffffff..")
    assert list(changes(then, then)) == []


def test_an_unfinished_run_whose_inputs_changed_is_refused(tmp_path, monkeypatch):
    from cmkit_std.datasets.digits import Digits

    (tmp_path / "tiny.toml").write_text(BASE)
    monkeypatch.setattr(Digits, "identity", lambda self: {"contents": "1" * 64})
    go(tmp_path, until=lambda e: isinstance(e, Step) and e.step == 3)
    monkeypatch.setattr(Digits, "identity", lambda self: {"contents": "2" * 64})
    with pytest.raises(DataError, match="what it reads has changed: dataset: contents changed"):
        go(tmp_path)
    monkeypatch.setattr(Digits, "identity", lambda self: {"contents": "1" * 64})
    go(tmp_path, 'metric=[{use="fidelity"}]')
    monkeypatch.setattr(Digits, "identity", lambda self: {"contents": "2" * 64})
    finished, seen = go(tmp_path, 'metric=[{use="fidelity"}]')
    assert isinstance(seen[-1], RunFinished)
    assert "the results shown are those of then" in notes(seen)
    assert finished.finished


def test_overwritten_weights_are_noticed(home, tmp_path):
    weights = tmp_path / "weights.safetensors"
    folder = RunFolder(home / "runs" / name_of(home))
    shutil.copy(folder.weights, weights)
    text = BASE[: BASE.index("[train]")] + BASE[BASE.index("[search]") :]
    text = text.replace(
        'objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }\n', ""
    )
    (tmp_path / "tiny.toml").write_text(text + f'[denoiser]\nweights = "{weights}"\n')
    go(tmp_path, until=done("search"))
    from safetensors.torch import load_file, save_file

    save_file({name: -t for name, t in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match="denoiser: weights changed: SHA-256"):
        go(tmp_path)


def test_relative_weights_are_found_from_elsewhere(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(RunFolder(home / "runs" / name_of(home)).weights, "own.safetensors")
    text = BASE[: BASE.index("[train]")].replace('rescaler = { use = "global" }\n', "")
    text = re.sub("(objective|metric) = .*\n", "", text)
    Path("tiny.toml").write_text(text + '[denoiser]\nweights = "own.safetensors"\n')
    folder, _ = go(tmp_path)
    monkeypatch.chdir("/")
    made = drawn_from(folder.path, [], discover(), 2)
    assert made.denoiser.weights == str(tmp_path / "own.safetensors")


@pytest.fixture
def copied(home, tmp_path):
    """A copy of the finished run, with the recipe beside it."""
    (tmp_path / "tiny.toml").write_text(BASE)
    folder = tmp_path / "runs" / name_of(home)
    shutil.copytree(home / "runs" / name_of(home), folder)
    return tmp_path, RunFolder(folder)


def test_an_intact_run_is_said_to_be_so(copied):
    found = dict(verify(copied[1]))
    assert not any(found.values())
    names = set(found)
    assert {
        "recipe.toml",
        "inputs.json",
        "status.json",
        "report.json",
        "model.safetensors",
    } <= names
    assert {"samples/0000000.npz", "checkpoints/step-00000006", "starts.jsonl"} <= names


def test_verify_names_the_damaged_file_and_its_exit_code_is_4(copied):
    place, folder = copied
    done = Fork(CMKIT, "verify", folder.path, cwd=place).wait()
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    folder.weights.write_bytes(flipped(folder.weights.read_bytes(), random.Random(0)))
    done = Fork(CMKIT, "verify", folder.path, "--json", cwd=place).wait()
    assert done.returncode == 4
    found = {each["file"]: each["fault"] for each in json.loads(done.stdout)["files"]}
    assert {name: fault for name, fault in found.items() if fault} == {
        "model.safetensors": "damaged"
    }
    assert "model.safetensors not intact" in done.stderr


def test_check_says_what_a_run_would_share(home, copied):
    place, folder = copied
    more = 'metric=[{use="fidelity"}]'
    done = Fork(CMKIT, "check", "tiny.toml", "--set", more, "--json", cwd=place).wait()
    stages = json.loads(done.stdout)["stages"]
    assert [stage["state"] for stage in stages] == ["that of", "that of", "that of", "new"]
    assert (place / stages[0]["origin"]) == folder.path


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


DAMAGE = {
    "a bit is turned": flipped,
    "the end is cut off": lambda data, rng: data[: rng.randrange(len(data))],
    "a stretch is zero": lambda data, rng: (
        data[: len(data) // 3] + bytes(len(data) - len(data) // 3)
    ),
    "it is null": lambda data, rng: b"null",
    "it is a list": lambda data, rng: b"[1]",
    "it is nested": lambda data, rng: b"[" * 100_000,
    "it is another run's": lambda data, rng: data.replace(b"1", b"2"),
}
"""What may happen to a file."""


@pytest.mark.parametrize("how", DAMAGE)
def test_no_damaged_file_of_a_finished_run_is_believed(copied, how):
    _, folder = copied
    rng = random.Random(how)
    for name, _ in list(verify(folder)):
        path = folder.path / name
        if path.is_dir():
            path = rng.choice(sorted(path.iterdir()))
        good = path.read_bytes()
        bad = DAMAGE[how](good, rng)
        if bad == good:
            continue
        path.write_bytes(bad)
        found = dict(verify(folder))
        assert any(found.values()), f"{name}: {how}, and nothing is said"
        path.write_bytes(good)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_no_damaged_file_of_an_unfinished_run_changes_its_results(home, copied, how):
    """Each is redone, or refused by its name; the results are those of the whole run. A damage is
    tried on every third file, so that each file has two or three of them."""
    place, folder = copied
    whole = RunFolder(home / "runs" / name_of(home)).report()["stages"]
    folder._report.unlink()
    status = folder.status()
    wanted = {k: v for k, v in status.items() if k in ("train", "search")}
    rng = random.Random(how)
    every = (str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file())
    untried = ("report", ".lock", "loss", "heatmap", "checkpoints", "samples_")
    names = sorted(name for name in every if not name.startswith(untried))
    for name in names[[*DAMAGE].index(how) % 3 :: 3]:
        shutil.rmtree(folder.path)
        shutil.copytree(home / "runs" / name_of(home), folder.path)
        folder._report.unlink()
        folder.keep_status(wanted)
        path = folder.path / name
        path.write_bytes(DAMAGE[how](path.read_bytes(), rng))
        try:
            _, seen = go(place)
        except CmkitError as error:
            assert error.exit_code == 4, error  # noqa: PT017
            assert path.name in str(error)  # noqa: PT017
            continue
        report = seen[-1].report
        for stage, key in (("search", "best"), ("search", "cells"), ("metric", "values")):
            assert report["stages"][stage][key] == whole[stage][key], f"{name}: {how} is believed"


def test_a_line_that_is_lost_from_a_search_is_drawn_again(home, copied):
    place, folder = copied
    whole = RunFolder(home / "runs" / name_of(home)).report()["stages"]["search"]
    folder._report.unlink()
    folder.keep_status({"train": folder.status()["train"]})
    for name in ("cells", "rerank", "confirm"):
        log = folder.path / "search" / f"{name}.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(lines[0][:20] + b"\n" + b"".join(lines[1:]))
    _, seen = go(place)
    assert notes(seen).count("damaged lines") == 3
    again = seen[-1].report["stages"]["search"]
    for key in ("best", "cells", "rerank", "confirm"):
        assert again[key] == whole[key]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_an_earlier_cmkit_began_goes_on(home, copied, monkeypatch):
    place, folder = copied
    whole = RunFolder(home / "runs" / name_of(home)).report()["stages"]
    folder._report.unlink()
    status = {name: entry["result"] for name, entry in folder.status().items()}
    del status["metric"]
    folder._status.write_text(json.dumps(status))
    for path in (folder._inputs, folder._starts):
        path.unlink()
    for log in folder.path.rglob("*.jsonl"):
        log.write_text(re.sub(r', "crc": "\w+"', "", log.read_text()))
    old = folder.path.with_name("tiny-01234567")
    folder.path.rename(old)
    assert not any(dict(verify(RunFolder(old))).values())  # it promised no digests
    before = {log: log.read_bytes() for log in old.rglob("*.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(ResourceError):
            RunFolder(old).migrate()
    assert {log: log.read_bytes() for log in old.rglob("*.jsonl")} == before
    _, seen = go(place)
    assert seen[-1].folder == old
    assert not steps(seen)
    assert seen[-1].report["stages"]["metric"]["values"] == whole["metric"]["values"]


def test_repeated_draws_keep_what_their_budget_holds_and_draw_the_same():
    spec = DataSpec(1, 8)
    batches = [range(0, 5), range(5, 10), range(10, 15)]
    kept, plain = RepeatedDraws(spec, 3, most=2 * 5 * 64 * 4), Draws(spec, 3)
    for _ in range(2):
        for rows in batches:
            assert torch.equal(kept.noise(rows, 0), plain.noise(rows, 0))
    assert [rows for rows, _ in kept.kept] == batches[:2]


FOLDERS = """
name = "folders"
dataset = { use = "image_folder", path = "%s", resolution = 8, channels = 1, labels = true }
"""


@pytest.fixture
def pictures(tmp_path):
    """Pictures in folders a and b, a recipe that trains on them, and its run of two steps."""
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(4):
            level = 40 * k + 20 * (label == "b")
            Image.new("L", (8, 8), level).save(tmp_path / "data" / label / f"{k}.png")
    text = BASE.replace('dataset = { use = "digits" }\n', "").replace('name = "tiny"\n', "")
    text = FOLDERS % (tmp_path / "data") + re.sub(r"metric = .*\n", "", text)
    text = text[: text.index("[search]")].replace('rescaler = { use = "global" }\n', "")
    (tmp_path / "tiny.toml").write_text(text)
    return tmp_path


def test_labels_that_would_be_permuted_are_refused(pictures):
    go(pictures, until=lambda e: isinstance(e, Step) and e.step == 3)
    (pictures / "data" / "a").rename(pictures / "data" / "z")
    with pytest.raises(DataError, match="classes: z is new, a is gone; it was begun with a, b"):
        go(pictures)
    (pictures / "data" / "z").rename(pictures / "data" / "a")
    folder, _ = go(pictures)
    shutil.copytree(pictures / "data" / "a", pictures / "data" / "aa")
    _, seen = go(pictures, "train.batch=4", until=lambda e: isinstance(e, Step))
    new = re.search(r"^training: new \((.*)\)$", notes(seen), re.MULTILINE)[1]
    assert "train.batch = 4, in " in new
    assert f"beside {folder.path}, dataset: classes: aa is new" in new
    again, seen = go(pictures)
    assert again.path == folder.path
    assert "dataset: classes: aa is new; it was begun with a, b" in notes(seen)
    assert folder.data().num_classes == 2


@pytest.mark.slow
def test_samples_have_the_shares_of_the_data_and_sets_without_counts_are_uniform(
    pictures, monkeypatch
):
    for k in range(4, 36):
        Image.new("L", (8, 8), k).save(pictures / "data" / "a" / f"{k}.png")
    folder, _ = go(pictures)
    assert folder.data() == DataSpec(1, 8, 2, ("a", "b"), (36, 4))
    labels = np.load(folder.path / "samples" / "0000000.npz")["arr_1"]
    assert np.bincount(labels).tolist() == [63, 7]
    honest = ImageFolder.spec
    bare = lambda self: replace(honest(self), classes=(), counts=())  # noqa: E731
    monkeypatch.setattr(ImageFolder, "spec", bare)
    shutil.rmtree(pictures / "runs")
    folder, seen = go(pictures)
    labels = np.load(folder.path / "samples" / "0000000.npz")["arr_1"]
    assert labels.tolist() == image_labels(3, "sample", range(70), 2).tolist()
    assert seen[-1].report["stages"]["sample"]["label_rule"] == "uniform"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": ("a",)}, "gives 1 classes and num_classes 2"),
        ({"counts": (1, 2, 3)}, "gives 3 counts and num_classes 2"),
        ({"counts": (0, 0)}, "count the images"),
        ({"counts": (3, -1)}, "count the images"),
    ],
)
def test_names_and_counts_that_are_not_of_the_classes_are_the_plugins_fault(
    pictures, monkeypatch, wrong, message
):
    honest = ImageFolder.spec
    monkeypatch.setattr(ImageFolder, "spec", lambda self: replace(honest(self), **wrong))
    with pytest.raises(PluginError, match=message):
        go(pictures)


def test_a_run_that_was_begun_without_counts_goes_on_without(pictures, monkeypatch):
    honest = ImageFolder.spec
    bare = lambda self: replace(honest(self), classes=(), counts=())  # noqa: E731
    monkeypatch.setattr(ImageFolder, "spec", bare)
    go(pictures, until=lambda e: isinstance(e, Step) and e.step == 3)
    monkeypatch.undo()
    folder, seen = go(pictures)
    assert folder.data() == DataSpec(1, 8, 2)
    assert seen[-1].report["stages"]["sample"]["label_rule"] == "uniform"


def test_a_report_without_names_and_counts_is_still_read(pictures):
    folder, _ = go(pictures)
    report = folder.report()
    del report["data"]["classes"], report["data"]["counts"]
    folder.keep_report(report)
    assert folder.data() == DataSpec(1, 8, 2)
    report["data"] |= {"classes": ["a", "b"], "later": 1}
    folder.keep_report(report)
    assert folder.data() is None


@pytest.mark.slow
def test_a_bad_picture_of_a_streamed_set_keeps_the_steps_before_it(pictures, monkeypatch):
    monkeypatch.setattr("cmkit_std.datasets.pictures.RESIDENT_BYTES", 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    bad = pictures / "data" / "b" / "9.png"
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:-1500])
    third = (list(itertools.islice(batch_indices(9, 2, seed), 3))[2] for seed in range(99))
    seed = next(seed for seed, batch in enumerate(third) if 8 in batch)
    said = ["train.save_every=1000", "train.batch=2", f"seed={seed}"]
    message = r"9\.png: cannot be decoded .* --data .* --from "
    with pytest.raises(DataError, match=message) as caught:
        go(pictures, *said)
    origin = RunFolder(Path(str(caught.value).rpartition("--from ")[2].split()[0]))
    (kept,) = origin.checkpoints.glob("step-*")
    with pytest.raises(DataError, match=r"--data lists all$"):
        go(pictures, "train.batch=9")  # in the first step: there is nothing to go on from
    bad.unlink()
    _, seen = go(pictures, *said, f'train.start="{origin.path}"', until=done("train"))
    assert kept.name == "step-00000002"
    assert steps(seen)[0] == 3


def test_check_shows_classes_and_lists_every_bad_picture(cmkit, pictures):
    recipe = pictures / "tiny.toml"
    code, out, _ = cmkit("check", recipe, "--data")
    assert code == 0
    assert re.search(r"^class 0 +a  4 images$", out, re.MULTILINE)
    assert re.search(r"^labels +data$", out, re.MULTILINE)
    _, out, _ = cmkit("check", recipe, "--json")
    assert json.loads(out)["class_counts"] == [4, 4]
    for k in range(30):
        bad = pictures / "data" / "a" / f"bad{k:02d}.png"
        Image.effect_noise((64, 64), 99).save(bad)
        bad.write_bytes(bad.read_bytes()[:-1500])
    assert cmkit("check", recipe)[0] == 0
    code, out, err = cmkit("check", recipe, "--data")
    assert (code, len(out.splitlines())) == (3, 21)
    assert "bad00.png: cannot be decoded" in out.splitlines()[0]
    assert out.splitlines()[-1] == "and 10 more; --json lists all"
    assert "30 bad images" in err
    code, out, _ = cmkit("check", recipe, "--data", "--json")
    assert (code, len(json.loads(out)["faults"])) == (3, 30)
    code, out, _ = cmkit("check", recipe, "--data", "--set", 'dataset.on_bad="skip"')
    assert code == 0
    assert re.search(r"^left out +30$", out, re.MULTILINE)
    assert out.count("left out: ") == 21


@pytest.mark.slow
def test_pictures_that_are_left_out_are_noted_and_part_of_the_identity(pictures):
    skip = 'dataset.on_bad="skip"'
    (pictures / "data" / "a" / "note.txt").write_text("none")
    with pytest.raises(DataError, match=r"note\.txt: not a picture"):
        go(pictures)
    folder, seen = go(pictures, skip, until=lambda e: isinstance(e, Step) and e.step == 3)
    assert re.search(r"left out, bad files: 1: .*note\.txt: not a picture", notes(seen))
    (pictures / "data" / "a" / "more.txt").write_text("none")
    with pytest.raises(DataError, match="left out 2, it was begun with 1"):
        go(pictures, skip)
    (pictures / "data" / "a" / "more.txt").unlink()
    go(pictures, skip)
    assert folder.data().counts == (4, 4)


def test_pictures_that_changed_are_noticed_and_copies_are_not(pictures):
    dataset = load(pictures / "tiny.toml", [], discover()).dataset
    before = dataset.identity()
    picture = pictures / "data" / "a" / "0.png"
    content = picture.read_bytes()
    os.utime(picture, (1, 1))
    assert dataset.identity() == before
    Image.new("L", (8, 8), 99).save(picture)
    assert dataset.identity()["contents"] != before["contents"]
    picture.write_bytes(content)
    assert dataset.identity() == before


def test_folders_named_by_numbers_are_classes_in_their_order(tmp_path):
    for name in (0, 1, 2, 10, 11):
        (tmp_path / str(name)).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / str(name) / "one.png")
    found = ImageFolder(path=str(tmp_path), resolution=8, labels=True)
    assert found.spec().classes == ("0", "1", "2", "10", "11")


def test_another_reference_measures_again_and_trains_no_more(tmp_path):
    text = FOLDERS % tmp_path + BASE[BASE.index("objective") :].replace("digits_judge", "fidelity")
    (tmp_path / "tiny.toml").write_text(text)
    recipes = [
        load(tmp_path / "tiny.toml", said, discover())
        for said in ([], ['dataset.reference_npz="other.npz"'])
    ]
    first, second = map(stage_keys, recipes)
    assert first["train"] == second["train"]
    assert first["search"] != second["search"]


def test_auto_stays_the_precision_that_a_run_was_begun_with(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(BASE)
    auto = "train.precision='auto'"
    monkeypatch.setattr("cmkit.device.auto_precision", lambda device: ("bf16", "it is said so"))
    folder, _ = go(tmp_path, auto, until=lambda e: isinstance(e, Step) and e.step == 3)
    monkeypatch.setattr("cmkit.device.auto_precision", lambda device: ("fp32", "it is said so"))
    again, seen = go(tmp_path, auto, until=lambda e: isinstance(e, Step))
    assert again.path == folder.path
    assert steps(seen) == [3]
    assert folder.inputs()["inputs"]["train"]["precision"] == "bf16"


@pytest.mark.slow
def test_what_a_run_misses_is_said_and_weights_that_are_damaged_draw_nothing(copied):
    place, folder = copied
    folder._status.unlink()
    assert dict(verify(folder))["status.json"] == "missing"
    go(place)  # what status.json held is done again, or found in the samples
    folder.weights.write_bytes(flipped(folder.weights.read_bytes(), random.Random(1)))
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged"):
        drawn_from(folder.path, [], discover(), 2)
    _, seen = go(place)
    assert "model.safetensors: damaged; the results shown are those of report.json" in notes(seen)


@pytest.mark.parametrize("odd", ["@x", ":ema-0.9@6", ":emma", "@6@6", "@"])
def test_weights_that_are_named_in_another_way_are_told_how(home, odd):
    folder = RunFolder(home / "runs" / name_of(home))
    with pytest.raises(CheckpointError, match="say weights of a run as RUN@STEP:AVERAGE"):
        drawn_from(f"{folder.path}{odd}", [], discover(), 2)


def test_a_checkpoint_s_own_folder_is_drawn_from(home):
    folder = RunFolder(home / "runs" / name_of(home))
    for path in (folder.checkpoints, folder.checkpoint(6)):
        made = drawn_from(path, NO_SEARCH, discover(), 2)
        assert made.denoiser.weights == f"{folder.path}@6"
    with pytest.raises(CheckpointError, match=r"leave :ema-0\.9 out"):
        go(home, f'train.start="{folder.path}:ema-0.9"')


def test_the_options_of_a_command_are_repeated_as_they_were_given(home):
    said = ["metric.0.fid=true", "train.lr=1e-3", 'objective.distance="l2"']
    recipe = load(home / "tiny.toml", said, discover())
    assert recipe.said("train.lr") == " --set metric.0.fid=true --set 'objective.distance=\"l2\"'"
