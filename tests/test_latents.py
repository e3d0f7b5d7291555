"""Latents and features of prompts: the same on the fly and kept, made once, resumed, checked."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmkit import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    RecipeError,
    ResourceError,
    Rng,
    files,
)
from cmkit.latents import store as stores
from cmkit.latents.memo import Memo
from cmkit.plan import batches, cache_bytes, check_disk, kept, plan, sigma_data_note
from cmkit.recipe import load, stage_keys
from cmkit.runs import Encoded, Note, RunFinished, StageStarted, run
from cmkit.runs.stages.cache import Cache
from cmkit.stop import StopSignal
from cmkit.train import Step
from tests.toys import Blocks, BlocksCoder, Captioned, Words, WordsPrompts, toy_registry

CPU = torch.device("cpu")
DATA = Captioned(channels=1, resolution=8, images=50, classes=4, texts=7)
CODEC, TEXT, CACHE = Blocks(), Words(), Cache()
TRAINED = """\
name = "toy"
seed = 3
dataset = { use = "captioned", channels = 1, resolution = 8, images = 50 }
codec = { use = "blocks", side = 1 }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
train = { steps = 4, batch = 8, save_every = 2, log_every = 2, precision = "fp32" }

[backbone]
use = "adm"
channels = 16
channel_mult = [1]
num_res_blocks = 1
attention_resolutions = []
num_head_channels = 8
norm_groups = 8
"""
SAID = 'texts = 7 }\ntext = { use = "words" }'


@pytest.fixture(autouse=True)
def _small_files(monkeypatch, tmp_path):
    """Files of 20 rows, in a cache of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "SHARD", 20)


def job_of(dataset=DATA, codec=CODEC, text=TEXT, cache=CACHE, status=()):
    """What a stage and `batches` need of a run."""
    source = SimpleNamespace(error=lambda path, said, value="": RecipeError(f"{path}: {said}"))
    recipe = SimpleNamespace(
        dataset=dataset, codec=codec, text=text, cache=cache, seed=3, train=None, source=source
    )
    made = SimpleNamespace(recipe=recipe, data=dataset.spec())
    return SimpleNamespace(plan=made, device=CPU, stop=StopSignal(), status=status)


def encode(job):
    """(events, result) of the stage."""
    result = {}
    return list(job.plan.recipe.cache.run(job, result)), result


def drawn(job, count=5, size=16, start=0):
    """(x0, cond) of the first batches of a training, made of what is kept if the stage is there."""
    given = batches(job.plan, size, CPU, start)
    return [next(given) for _ in range(count)]


def notes(events):
    return "\n".join(event.text for event in events if isinstance(event, Note))


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_what_is_kept_is_what_is_encoded_on_the_fly_up_to_rounding(spread, dtype, tolerance):
    codec = Blocks(spread=spread)
    job = job_of(codec=codec, cache=Cache(dtype=dtype, batch=7))
    encode(job)
    for size, start in ((16, 0), (7, 3), (64, 1)):
        pairs = zip(
            drawn(job, size=size, start=start),
            drawn(job_of(codec=codec, cache=None), size=size, start=start),
            strict=True,
        )
        for (x0, cond), (plain, said) in pairs:
            assert x0.shape == (size, 4, 4, 4)
            torch.testing.assert_close(x0, plain, rtol=tolerance, atol=tolerance)
            assert torch.equal(cond.label, said.label)
            for name in ("text", "pooled"):
                one, other = getattr(cond, name), getattr(said, name)
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
            assert cond.size.tolist() == said.size.tolist() == [[8, 8, 0, 0, 8, 8]] * size
            assert cond.caption is said.caption is None


@pytest.mark.parametrize("cache", [Cache(latents=False), Cache(text=False)])
def test_one_is_kept_and_the_other_encoded(cache):
    job = job_of(cache=cache)
    _, result = encode(job)
    assert [folder.split("-")[0] for folder in result["folders"]] == (
        ["latents"] if cache.latents else ["text"]
    )
    for (x0, cond), (plain, said) in zip(drawn(job), drawn(job_of(cache=None)), strict=True):
        torch.testing.assert_close(x0, plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(cond.text, said.text, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [None, Cache()])
def test_batches_are_a_function_of_seed_and_batch(cache):
    job = job_of(cache=cache)
    if cache:
        encode(job)
    whole, rest = drawn(job, 6), drawn(job, 3, start=3)
    for (x0, cond), (again, other) in zip(whole[3:], rest, strict=True):
        assert torch.equal(x0, again)
        assert torch.equal(cond.text, other.text)
    job.plan.recipe.seed = 4
    assert not torch.equal(drawn(job, 1)[0][0], whole[0][0])


def test_latents_are_the_codec_s_of_the_mirrored_pictures_with_noise_of_the_batch():
    codec = Blocks()
    job = job_of(text=None)
    encode(job)
    kinds = (job_of(codec=None, text=None, cache=None), job, job_of(text=None, cache=None))
    for batch, found in enumerate(zip(*map(drawn, kinds), strict=True)):
        plain, *both = [x0 for x0, _ in found]
        mean, std = BlocksCoder(codec).encode(plain)
        z = Rng(3, "latents", batch, CPU).normal_like(mean.contiguous())
        for x0 in both:
            torch.testing.assert_close(x0, mean + std * z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [None, Cache(dtype="fp32")])
def test_features_are_those_of_the_captions_and_of_no_caption(cache):
    job = job_of(cache=cache)
    if cache:
        encode(job)
    captions, prompts, empty = DATA.captions(), Words().load(CPU), 0
    plain = DATA.batches(16, 3, CPU)
    for (_, cond), (_, said) in zip(drawn(job), plain, strict=False):
        for row, number in enumerate(said.caption.tolist()):
            wanted = prompts.null if number < 0 else prompts([captions[number]])
            empty += number < 0
            assert torch.equal(cond.text[row], wanted.text[0])
            assert torch.equal(cond.pooled[row], wanted.pooled[0])
    assert empty


def test_features_are_remembered_within_bounds_and_each_is_encoded_once(monkeypatch):
    asked, sizes = [], set()
    given = WordsPrompts.__call__

    def called(self, prompts):
        asked.extend(prompts)
        sizes.add(len(prompts))
        return given(self, prompts)

    Words().load(CPU)
    monkeypatch.setattr(WordsPrompts, "__call__", called)
    said = [[*DATA.captions(), None][k] for k in (0, 1, 1, 7)], list(DATA.captions()[:3])
    memo = Memo(Words().load(CPU))
    wanted = [memo(prompts)["text"] for prompts in said]
    assert [asked.count(text) for text in DATA.captions()] == [1, 1, 1, 0, 0, 0, 0]
    assert sizes == {1, 32}  # that of no caption, and as many each time: features know no others
    small = Memo(Words().load(CPU), limit=300)
    for prompts, rows in zip(said, wanted, strict=True):
        assert torch.equal(small(prompts)["text"], rows)
        kept = [row.nbytes for rows in small.known.values() for row in rows.values()]
        assert sum(kept) == small.bytes <= 300


def tensors_of(job):
    """Every number that is kept."""
    return {
        (store.kind, number, name): tensor.clone()
        for store in kept(job.plan).stores
        for number, shard in enumerate(store.read().shards)
        for name, tensor in shard.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def killed_at(call, job):
    """Whether the stage, in a fork, was killed at its so-many-th call that writes or encodes."""
    pid = os.fork()
    if not pid:
        left = [call]

        def counted(inner):
            def outer(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return inner(*args, **kwargs)

            return outer

        for owner, name in (
            (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "open"), (BlocksCoder, "encode"),
            (WordsPrompts, "__call__"),
        ):  # fmt: skip
            setattr(owner, name, counted(getattr(owner, name)))
        encode(job)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_call_it_goes_on_and_does_nothing_finished_again(step):
    """At every call that the stage makes to the disk, the codec or the text encoder, or some."""
    job = job_of(cache=Cache(batch=10))
    encode(job)
    whole, home = tensors_of(job), files.cache_folder("latents")
    encoded = 0
    for call in itertools.count(1, step):
        shutil.rmtree(home)
        if not killed_at(call, job):
            break
        before = {}
        for store in kept(job.plan).stores:
            missing = store.missing()
            assert set(missing.values()) <= {"missing"}
            done = set(range(len(store.shards))) - set(missing)
            before |= {path: path.stat().st_mtime_ns for path in map(store._file, done)}
        events, _ = encode(job)
        assert same(tensors_of(job), whole)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert not list(home.glob(f"*/{files.TEMPORARY}*"))
        done = sum(len(store.shards[int(p.stem)]) for store in kept(job.plan).stores
                   for p in before if p.parent == store.path)  # fmt: skip
        started = next(event for event in events if isinstance(event, StageStarted))
        assert (started.done, started.total) == (done, 58)
        encoded = max(encoded, done)
    assert call > 40
    assert encoded >= 50


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_alone_is_made_again(damage):
    job = job_of()
    encode(job)
    whole, store = tensors_of(job), kept(job.plan).latents
    path, others = store._file(1), [store._file(0), store._file(2), store._manifest]
    before = [other.stat().st_ino for other in others[:2]]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: -1 if damage == "cut" else None])
    if damage != "flipped":
        with pytest.raises(CheckpointError, match=r"000001\.safetensors: missing or cut short"):
            drawn(job, 1)
    words = {"cut": "cut short", "flipped": "damaged", "gone": "missing"}[damage]
    assert job.plan.recipe.cache.lost(job) == f"{store.path}: file 1 is {words}"
    events, _ = encode(job)
    assert (f"file 1 is {words}; it is made again" in notes(events)) == (damage != "gone")
    assert [event.done for event in events if isinstance(event, Encoded)][-1] == 58
    assert next(e.done for e in events if isinstance(e, StageStarted)) == 38
    assert same(tensors_of(job), whole)
    assert [other.stat().st_ino for other in others[:2]] == before


def test_a_damaged_manifest_means_that_all_is_made_again():
    job = job_of(text=None)
    encode(job)
    whole, store = tensors_of(job), kept(job.plan).latents
    store._manifest.write_text(store._manifest.read_text().replace('"bytes": ', '"bytes": 1'))
    assert len(store.missing()) == 3
    encode(job)
    assert same(tensors_of(job), whole)


def test_a_cache_of_another_key_is_refused():
    job = job_of(text=None)
    encode(job)
    store = kept(job.plan).latents
    other = kept(job_of(codec=Blocks(factor=3.0), text=None).plan).latents
    assert other.path != store.path
    shutil.copytree(store.path, other.path)
    with pytest.raises(CheckpointError, match="is of other data, codec or text encoder; remove"):
        other.missing()


@contextlib.contextmanager
def forked(work):
    """A fork that does `work(say, hear)`, both of which give and take one byte; (pid, say, hear) of
    the other side. It is killed at the end."""
    (here, there), (far, near) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        work(lambda: os.write(there, b"x"), lambda: os.read(far, 1))
        signal.pause()
    try:
        yield pid, lambda: os.write(near, b"x"), lambda: os.read(here, 1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_two_processes_never_encode_the_same():
    """The second waits for the first, which is killed, and does what that had not done."""
    job = job_of(text=None)
    store = kept(job.plan).latents

    def first(say, hear):
        running = job.plan.recipe.cache.run(job, {})
        for rows in (24, 48):
            next(event for event in running if isinstance(event, Encoded) and event.done >= rows)
            say()
            hear()

    with forked(first) as (pid, say, hear):
        hear()
        waiting = job.plan.recipe.cache.run(job, {})
        seen = [next(waiting), next(waiting)]
        assert (seen[0].done, seen[0].total) == (20, 50)
        assert f"waiting: {store.path}: in use by pid {pid}" in notes(seen)
        say()
        hear()
    times = [store._file(shard).stat().st_mtime_ns for shard in (0, 1)]
    encoded = [event.done for event in waiting if isinstance(event, Encoded)]
    assert encoded[0] > 40
    assert encoded[-1] == 50
    assert [store._file(shard).stat().st_mtime_ns for shard in (0, 1)] == times
    assert not store.missing()


def test_waiting_for_another_process_ends_with_a_signal():
    job = job_of(text=None)
    store = kept(job.plan).latents
    files.make_folder(store.path)

    def holds(say, hear):
        with files.lock(store.path):
            say()
            hear()

    with forked(holds) as (_, _, hear):
        hear()
        job.stop.signum = signal.SIGINT
        with pytest.raises(Interrupted):
            encode(job)


def test_a_signal_keeps_whole_files(monkeypatch):
    job = job_of(text=None)
    running = job.plan.recipe.cache.run(job, {})
    next(event for event in running if isinstance(event, Encoded) and event.done >= 25)
    job.stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match="what is encoded is kept in"):
        next(running)
    assert list(kept(job.plan).latents.missing()) == [1, 2]


def spoiled(monkeypatch, value):
    """The codec gives `value` for the 23rd picture."""
    given, seen = BlocksCoder.encode, [0]

    def encode(self, x0):
        mean, std = given(self, x0)
        first, seen[0] = seen[0], seen[0] + len(x0)
        if first <= 22 < seen[0]:
            mean[22 - first, 1, 2, 3] = value
        return mean, std

    monkeypatch.setattr(BlocksCoder, "encode", encode)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (float("nan"), "fp32", "codec's mean is not finite; look at the picture"),
        (float("inf"), "bf16", "codec's mean is not finite; look at the picture"),
        (1e6, "fp16", 'say cache.dtype = "bf16" or "fp32", which hold 1e+06'),
    ],
)
def test_a_picture_that_spoils_its_latents_is_named(monkeypatch, value, dtype, said):
    job = job_of(DATA.model_copy(update={"flip": False}), text=None, cache=Cache(dtype=dtype))
    spoiled(monkeypatch, value)
    with pytest.raises(NonFiniteError, match=re.escape(said)) as caught:
        encode(job)
    assert str(caught.value).startswith("picture 22:")
    assert list(kept(job.plan).latents.missing()) == [1, 2]


def test_a_decoder_that_gives_no_picture_is_found_before_training(monkeypatch):
    decode = BlocksCoder.decode
    monkeypatch.setattr(BlocksCoder, "decode", lambda self, x: decode(self, x) * float("nan"))
    with pytest.raises(NonFiniteError, match="codec: its decoder gives NaN or infinity"):
        encode(job_of(text=None))


def test_a_prompt_that_spoils_its_features_is_named(monkeypatch):
    given = WordsPrompts._features
    monkeypatch.setattr(
        WordsPrompts, "_features", lambda s, w: given(s, w) * (float("nan") if "3" in w else 1)
    )
    with pytest.raises(NonFiniteError, match="prompt 'waves of kind 3': the text encoder's"):
        encode(job_of())


def test_the_key_is_of_all_that_decides_the_rows_and_of_nothing_else():
    def paths(**changes):
        return [store.path for store in kept(job_of(**changes).plan).stores]

    def data(**changes):
        return {"dataset": DATA.model_copy(update=changes)}

    latent, text = paths()
    for neither in ({"cache": Cache(batch=3)}, data(empty=0.5), {"codec": Blocks(tiles=4)}):
        assert paths(**neither) == [latent, text]
    for one in (data(other=True), data(flip=False), {"codec": Blocks(spread=0.2)}):
        assert paths(**one)[0] != latent
        assert paths(**one)[1] == text
    for one in (data(texts=6), {"text": Words(length=5)}):
        assert paths(**one)[1] != text
    assert {*paths(cache=Cache(dtype="bf16"))}.isdisjoint({latent, text})


def test_files_of_a_codec_are_part_of_the_key(monkeypatch):
    before = kept(job_of(text=None).plan).latents.path
    monkeypatch.setattr(Blocks, "identity", lambda self: {"weights": "f" * 64})
    assert kept(job_of(text=None).plan).latents.path != before


def test_data_that_cannot_be_kept_are_refused_with_a_cure():
    plain = DATA.model_copy(update={"numbered": False})
    with pytest.raises(RecipeError, match="have no numbers, by which latents are kept; say cache"):
        kept(job_of(plain).plan)
    assert len(drawn(job_of(plain, cache=None))) == 5
    without = DATA.model_copy(update={"texts": None})
    for cache in (None, Cache()):
        with pytest.raises(RecipeError, match="have no captions, which a text encoder is for"):
            drawn(job_of(without, cache=cache))
    with pytest.raises(
        CheckpointError, match="its stage \\[cache\\] makes it, or say cache = false"
    ):
        drawn(job_of())


def test_a_disk_that_is_too_small_is_said_before(monkeypatch):
    job = job_of()
    every, needed = cache_bytes(job.plan)
    assert every == needed == 50 * 2 * 2 * 64 * 2 + 8 * (4 * 6 + 6) * 2
    encode(job)
    assert cache_bytes(job.plan) == (every, 0)
    size = sum(
        path.stat().st_size for path in files.cache_folder("latents").glob("*/*.safetensors")
    )
    assert 0 <= size - every < 2000
    shutil.rmtree(files.cache_folder("latents"))
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("cmkit.plan.checks.shutil.disk_usage", lambda path: usage)
    made = SimpleNamespace(**vars(job.plan), disk=0)
    with pytest.raises(ResourceError, match="set XDG_CACHE_HOME to a folder on a larger disk"):
        check_disk(made, Path())
    usage.free = needed
    check_disk(made, Path())


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    registry = toy_registry()
    monkeypatch.setattr("cmkit.plugins.discover", lambda: registry)
    path = tmp_path / "toy.toml"
    path.write_text(TRAINED)
    return path


def loaded(recipe, *overrides):
    return load(recipe, overrides, toy_registry())


def go(recipe, *overrides):
    registry = toy_registry()
    made = plan(loaded(recipe, *overrides))
    return list(run(made, registry, recipe.parent / "runs", CPU, StopSignal()))


def test_a_recipe_with_a_codec_has_the_stage_unless_it_says_otherwise(recipe):
    assert [*loaded(recipe).stages] == ["cache", "train"]
    assert loaded(recipe).resolved["cache"]["dtype"] == "fp16"
    assert loaded(recipe, "cache=true").resolved == loaded(recipe).resolved
    off = loaded(recipe, "cache=false")
    assert ([*off.stages], off.resolved["cache"]) == (["train"], False)
    for one in (loaded(recipe), off):
        assert tomllib.loads(one.toml()) == json.loads(json.dumps(one.resolved))
    recipe.write_text(TRAINED.replace('codec = { use = "blocks", side = 1 }', "[cache]"))
    with pytest.raises(RecipeError, match=r"toy\.toml:4: cache: nothing to encode"):
        loaded(recipe)
    recipe.write_text(TRAINED.replace('codec = { use = "blocks", side = 1 }', ""))
    assert "cache" not in loaded(recipe).resolved
    recipe.write_text(TRAINED.replace("train = {", "sample = { images = 4 }\n#"))
    assert [*loaded(recipe).stages] == ["sample"]
    with pytest.raises(RecipeError, match=r"\[cache\] needs a \[train\] table"):
        plan(loaded(recipe, "cache.dtype=fp16"))
    with pytest.raises(RecipeError, match=r"cache\.dtype"):
        loaded(recipe, "cache.dtype=fp8")


def test_training_s_key_is_of_codec_text_and_dtype_and_not_of_what_changes_no_bit(recipe):
    def key(*overrides):
        return stage_keys(loaded(recipe, *overrides))["train"]

    same = ("cache.batch=3", "codec.tiles=9")
    assert {key(one) for one in same} == {key()}
    others = ("cache.dtype=fp32", "cache=false", "codec.spread=0.2", "cache.latents=false")
    assert len({key(), *(key(one) for one in others)}) == 5
    assert len({key("cache=false"), key("cache=false", "codec.spread=0.2")}) == 2


def test_a_run_encodes_trains_and_shares_what_it_encoded(recipe):
    *_, first = seen = go(recipe)
    assert isinstance(first, RunFinished)
    stage = first.report["stages"]["cache"]
    assert (stage["pictures"], stage["prompts"]) == (50, 0)
    assert stage["line"].startswith("50 pictures, 0.0")
    assert stage["bytes"] > 50 * 2 * 2 * 64 * 2
    assert str(Path.home()) not in json.dumps(stage)
    assert "50 pictures" in (first.folder / "report.html").read_text()
    assert [e.done for e in seen if isinstance(e, Encoded)][-1] == 50
    *_, second = seen = go(recipe, "seed=4")
    assert second.folder != first.folder
    assert not [e for e in seen if isinstance(e, Encoded)]
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (first, second)]
    assert weights[0] != weights[1]


def test_a_run_whose_cache_is_gone_encodes_again_and_ends_the_same(recipe):
    *_, whole = go(recipe)
    registry, made = toy_registry(), plan(loaded(recipe))
    out = recipe.parent / "again"
    for event in (running := run(made, registry, out, CPU, StopSignal())):
        if isinstance(event, Step) and event.step == 3:
            running.close()
            break
    shutil.rmtree(files.cache_folder("latents"))
    *seen, again = run(made, registry, out, CPU, StopSignal())
    assert "file 0 is missing; the stage is done again" in notes(seen)
    assert "resuming from step 2" in notes(seen)
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (whole, again)]
    assert weights[0] == weights[1]


def test_what_is_trained_needs_no_latents():
    assert CACHE.lost(job_of()).endswith("file 0 is missing")
    assert CACHE.lost(job_of(status=("train",))) == ""


def test_the_deviation_of_latents_is_told_once_they_are_there(recipe):
    made = plan(loaded(recipe))
    assert sigma_data_note(made) == ""
    told = notes(go(recipe))
    assert told.count("denoiser.sigma_data is 0.5, and the data have a standard") == 1
    assert "denoiser.sigma_data" in sigma_data_note(made)
    discrete = "denoiser.precond={use='discrete', timestep_scaling=10.0}"
    assert sigma_data_note(plan(loaded(recipe, discrete))) == ""  # no scaling depends on it


def test_check_says_the_size_and_that_it_is_there(recipe, cmkit):
    before = json.loads(cmkit("check", recipe, "--json")[1])
    assert before["cache_to_write_mib"] == before["cache_mib"] == 50 * 2 * 2 * 64 * 2 / 2**20
    code, _, err = cmkit("run", recipe)
    assert code == 0, err
    assert "cache 50/50" in err
    after = json.loads(cmkit("check", recipe, "--json")[1])
    assert (after["cache_mib"], after["cache_to_write_mib"]) == (before["cache_mib"], 0)
