"""Laws of captioned pictures: every form gives the same batches, and bad input one line."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_latent import captioned, captions, tars
from cmkit_latent.captions import Captions
from cmkit_std.datasets import pictures
from cmkit_std.datasets.invented import Invented
from cmkit_std.datasets.pictures import judged
from PIL import Image

from cmkit import DataError, DataSpec, PluginError
from cmkit.testing import check_dataset

CPU = torch.device("cpu")
TEXTS = ("a red apple", "a green apple", "two  pears\n", "a red apple", "\ufeffan \u00e9clair")
"""What is said of the pictures: two of one caption, and white space that does not count."""
SAID = ["a red apple", "a green apple", "two pears", "a red apple", "an \u00e9clair"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for held in (captioned.in_folder, tars.indexed, judged):
        held.cache_clear()


def encoded(seed: int, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """A random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def beside(root: Path) -> Path:
    """Pictures with a .txt each, in two folders, and files of other kinds."""
    for n, text in enumerate(TEXTS):
        file = root / f"part{n % 2}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(n))
        file.with_suffix(".txt").write_text(text, "utf-8")
        file.with_suffix(".json").write_text("{}")
    return root


def listed(root: Path, key: str = "text") -> Path:
    """Pictures with a metadata.jsonl."""
    root.mkdir()
    lines = []
    for n, text in enumerate(TEXTS):
        (root / f"{n}.png").write_bytes(encoded(n))
        lines.append(json.dumps({"file_name": f"./{n}.png", key: text, "more": 1}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    return root


def member(archive: tarfile.TarFile, name: str, content: bytes, **more) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def shard(path: Path, numbers, kind: str = "PNG") -> Path:
    """A tar of some of the pictures, as img2dataset writes it."""
    with tarfile.open(path, "w") as archive:
        for n in numbers:
            member(archive, f"{n:09d}.{kind.lower()}", encoded(n, kind))
            member(archive, f"{n:09d}.txt", TEXTS[n % len(TEXTS)].encode())
            member(archive, f"{n:09d}.json", b"{}")
    return path


def shards(root: Path) -> Path:
    root.mkdir()
    shard(root / "00000.tar", (0, 1, 2))
    shard(root / "00001.tar", (3, 4))
    (root / "00000.parquet").write_bytes(b"img2dataset leaves it there")
    (root / "00000_stats.json").write_text("{}")
    return root


def table(file: Path, images: list[bytes | None], texts: list[str | None]):
    """A parquet file as `datasets` writes it, and the `datasets.Dataset` of it."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    kinds = datasets.Features(
        {
            "number": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "image": datasets.Image(),
        }
    )
    rows = {
        "number": list(range(len(texts))),
        "text": texts,
        "image": [{"bytes": image, "path": None} for image in images],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(rows, schema=kinds.arrow_schema), str(file))
    return datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent.parent / "made"))


def hugging_face(root: Path, form: str) -> Path:
    if form == "saved":
        made = table(root.parent / "whole" / "all.parquet", [*map(encoded, range(5))], [*TEXTS])
        made.save_to_disk(str(root), num_shards=2)
    else:
        for part, numbers in enumerate(((0, 1, 2), (3, 4))):
            name = root / f"train-0000{part}-of-00002.parquet"
            table(name, [*map(encoded, numbers)], [TEXTS[n] for n in numbers])
    return root


FORMS = {
    "beside": beside,
    "listed": listed,
    "shards": shards,
    "saved": lambda root: hugging_face(root, "saved"),
    "parquet": lambda root: hugging_face(root, "parquet"),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path) -> Path:
    return FORMS[request.param](tmp_path / "data")


def of(path: Path, **options) -> Captions:
    return Captions(path=str(path), resolution=8, **options)


def take(data, count: int, size: int = 4, seed: int = 0, start: int = 0) -> list:
    stream = data.batches(size, seed, CPU, start)
    return [(x0, cond.caption) for x0, cond in itertools.islice(stream, count)]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and torch.equal(k, m) for (x, k), (y, m) in zip(a, b, strict=True))


def refused(data: Captions, *parts: object) -> str:
    """The one line that refuses a data set."""
    with pytest.raises(DataError) as caught:
        data.spec()
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    for part in parts:
        assert str(part) in message
    return message


def test_a_data_set_keeps_the_laws_of_its_kind(form):
    check_dataset(of(form))
    check_dataset(of(form, flip=True, empty=0.5, channels=1))


def test_pictures_keep_their_captions_in_every_form(form):
    """Each picture is told by its pixels, and comes with the text that was put beside it."""
    data = of(form)
    assert data.spec() == data.declared() == DataSpec(3, 8)
    plain = pictures.cropped(Image.open(io.BytesIO(encoded(4))), 8)
    reference = data.reference()
    said = {
        image.numpy().tobytes(): text
        for image, text in zip(
            (reference.images[n] for n in range(5)), reference.captions, strict=True
        )
    }
    assert said[np.asarray(plain).transpose(2, 0, 1).tobytes()] == SAID[4]
    assert sorted(reference.captions) == sorted(SAID)
    texts = data.captions()
    assert len(texts) == len(set(texts)) == 4
    for x0, caption in take(data, 6, 5):
        shown = ((x0 + 1) * 127.5).round().to(torch.uint8).contiguous()
        assert [texts[n] for n in caption] == [said[image.numpy().tobytes()] for image in shown]


def test_batches_are_one_function_of_seed_and_batch_in_every_form(tmp_path):
    """Beside, tars and rows have one order of pictures here, so one stream of batches."""
    options = {"flip": True, "empty": 0.3}
    streams = []
    for name in ("listed", "shards", "saved", "parquet"):
        try:
            root = FORMS[name](tmp_path / name)
        except pytest.skip.Exception:
            continue
        streams.append(take(of(root, **options), 8, 3, seed=2))
        assert same(streams[-1][3:], take(of(root, **options), 5, 3, seed=2, start=3))
    assert len(streams) >= 2
    assert all(same(streams[0], stream) for stream in streams)


def test_streamed_batches_are_those_from_memory(form, monkeypatch):
    data = of(form, flip=True)
    kept = take(data, 6)
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    assert same(kept, take(data, 6))


def test_captions_give_way_to_the_unconditional_prompt_as_often_as_told(tmp_path):
    data = of(listed(tmp_path / "data"))
    full, some = take(data, 200), take(of(data.path, empty=0.25), 200)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(full, some, strict=True))
    before, after = (torch.cat([caption for _, caption in each]) for each in (full, some))
    left = after >= 0
    assert torch.equal(before[left], after[left])
    assert (after[~left] == -1).all()
    assert 0.19 < 1 - left.float().mean() < 0.31
    assert (torch.cat([c for _, c in take(of(data.path, empty=1.0), 3)]) == -1).all()


def test_pictures_and_captions_have_digests_of_their_own(form):
    data = of(form)
    before = data.identity()
    assert before.keys() == {"images", "pictures", "captions"}
    assert before["images"] == 5
    assert data.identity() == before


@pytest.mark.parametrize("name", ["beside", "listed", "shards"])
def test_a_changed_caption_or_picture_changes_its_digest_alone(tmp_path, name):
    root = FORMS[name](tmp_path / "data")
    before = of(root).identity()
    changed = {"beside": "part0/0.txt", "listed": "metadata.jsonl", "shards": "00000.tar"}[name]
    file = root / changed
    file.write_bytes(file.read_bytes().replace(b"a red apple", b"the red one", 1))
    os.utime(file, ns=(1, 1))
    now = of(root).identity()
    assert now["captions"] != before["captions"]
    assert now["pictures"] == before["pictures"]
    assert of(root).reference().fingerprint == of(root).pictures().fingerprint()
    if name == "shards":
        shard(root / "00001.tar", (7, 4))
    else:
        (next(root.rglob("3.png"))).write_bytes(encoded(7))
    assert of(root).identity()["pictures"] != now["pictures"]
    assert of(root).identity()["images"] == 5


def test_a_tar_is_scanned_once_and_again_when_it_changed(tmp_path, monkeypatch):
    root = shards(tmp_path / "data")
    scanned, honest = [], tars.scan
    monkeypatch.setattr(tars, "scan", lambda path: scanned.append(path.name) or honest(path))
    first = take(of(root), 3)
    assert scanned == ["00000.tar", "00001.tar"]
    tars.indexed.cache_clear()  # another process
    assert same(take(of(root), 3), first)
    assert len(scanned) == 2
    os.utime(root / "00001.tar", ns=(1, 1))
    of(root).spec()
    assert scanned[2:] == ["00001.tar"]
    for record in (tmp_path / "cache" / "cmkit" / "tars").iterdir():
        record.write_text("{damaged")
    tars.indexed.cache_clear()
    assert same(take(of(root), 3), first)
    assert len(scanned) == 5


def test_nothing_of_a_tar_is_unpacked(tmp_path):
    root = shards(tmp_path / "data")
    before = sorted(root.rglob("*"))
    of(root).spec()
    take(of(root), 3)
    assert sorted(root.rglob("*")) == before
    kept = [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]
    assert all(encoded(0)[-99:] not in f.read_bytes() for f in kept)


def test_one_tar_is_named_by_itself(tmp_path):
    root = shards(tmp_path / "data")
    assert of(root / "00001.tar").captions() == SAID[3:]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_endings_of_pictures(tmp_path, kind):
    shard(tmp_path / "one.tar", range(5), kind)
    check_dataset(of(tmp_path / "one.tar"))


def test_keys_end_at_the_first_dot_and_belong_to_their_folder(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for n, name in enumerate(("a/x", "b/x", "./x")):
            member(archive, f"{name}.jpg", encoded(n, "JPEG"))
            member(archive, f"{name}.seg.png", b"no caption for it, and not looked at")
            member(archive, f"{name}.txt", name.encode())
    assert of(tmp_path / "one.tar").captions() == ["a/x", "b/x", "./x"]


def test_the_test_pictures_are_others(tmp_path):
    data = of(listed(tmp_path / "a"), test_path=str(beside(tmp_path / "b")))
    assert data.heldout() == of(tmp_path / "b")
    assert data.heldout().heldout() is None


def test_smoke_runs_have_invented_captions():
    options = dict(Captions(path="none", resolution=512, empty=0.1).smallest())
    assert options.pop("use") == "invented"
    given = {key: value for key, value in options.items() if value is not None}
    data = Invented.model_validate(given)
    assert data.captions()[3] == "waves of kind 3"
    assert data.spec() == DataSpec(3, 32)
    check_dataset(data)


def test_the_part_imports_no_torch_and_needs_no_files_to_be_declared():
    code = (
        "import sys; from cmkit_latent.captions import Captions;"
        "Captions(path='none', resolution=8).declared(); Captions.model_json_schema();"
        "print([m for m in ('torch', 'PIL', 'datasets', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_no_data_set_is_named(tmp_path):
    refused(of(tmp_path / "none"), tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(of(tmp_path / "empty"), tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("a")
    refused(of(tmp_path / "notes.txt"), "no .tar and no .parquet")
    refused(of(tmp_path), tmp_path, "no pictures in it")
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "notes.txt").unlink()
    refused(of(tmp_path), "pictures without captions", "metadata.jsonl")
    shard(tmp_path / "0.tar", (0,))
    refused(of(tmp_path), "tars and pictures")


def test_metadata_in_a_folder_below_is_pointed_at(tmp_path):
    listed(tmp_path / "train")
    refused(of(tmp_path), "metadata.jsonl is in a folder below", repr(str(tmp_path / "train")))


BESIDE = {
    "no caption": (lambda d: (d / "1.txt").unlink(), "1.png: no part1/1.txt beside it"),
    "no picture": (lambda d: (d / "1.png").unlink(), "1.txt: no picture of that name"),
    "empty": (lambda d: (d / "1.txt").write_text(" \n\t"), "1.txt: the caption is empty"),
    "latin 1": (lambda d: (d / "1.txt").write_bytes(b"caf\xe9"), "1.txt: not UTF-8 (byte 3)"),
    "utf 16": (lambda d: (d / "1.txt").write_text("cat", "utf-16"), "1.txt: not UTF-8"),
    "long": (lambda d: (d / "1.txt").write_text("a" * 70_000), "1.txt: 70000 bytes, more than"),
    "pipe": (lambda d: (d / "1.txt").unlink() or os.mkfifo(d / "1.txt"), "1.txt: no regular file"),
    "dead link": (
        lambda d: (d / "9.txt").symlink_to("none") or (d / "9.png").write_bytes(encoded(9)),
        "9.txt: cannot be read",
    ),
    "two pictures": (lambda d: (d / "1.jpg").write_bytes(encoded(1, "JPEG")), "has the name of"),
    "no picture's bytes": (lambda d: (d / "1.png").write_bytes(b"no"), "1.png: not a picture"),
    "bomb": (lambda d: Image.new("1", (9000, 9000)).save(d / "1.png"), "1.png: 9000x9000"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_bad_file_in_a_folder_is_named_or_left_out(tmp_path, case):
    root = beside(tmp_path / "data")
    spoil, words = BESIDE[case]
    spoil(root / "part1")
    refused(of(root), root / "part1", words)
    assert any(words in fault for fault in of(root).faults())
    data = of(root, on_bad="skip")
    assert [words in fault for fault in data.left_out()] == [True]
    assert data.spec() == DataSpec(3, 8)
    assert not list(data.faults())
    assert data.identity()["left_out"] == 1
    check_dataset(data)
    assert set(data.reference().captions) <= set(SAID)


def test_a_torn_picture_is_left_out_when_told(form_with_a_torn_picture):
    root = form_with_a_torn_picture
    assert of(root).spec() == DataSpec(3, 8)  # its header is right
    assert len(list(of(root).faults())) == 1
    with pytest.raises(DataError, match="cannot be decoded"):
        take(of(root), 3)
    data = of(root, on_bad="skip")
    assert len(data.left_out()) == 1
    assert len(data.reference().images) == len(data.reference().captions) == 4
    check_dataset(data)


@pytest.fixture(params=["beside", "shards"])
def form_with_a_torn_picture(request, tmp_path) -> Path:
    root = FORMS[request.param](tmp_path / "data")
    if request.param == "beside":
        file = root / "part0" / "2.png"
        file.write_bytes(file.read_bytes()[:-200])
    else:
        whole = encoded(4)
        data = (root / "00001.tar").read_bytes()
        (root / "00001.tar").write_bytes(data.replace(whole[-200:], bytes(200)))
    return root


def test_bad_files_are_named_at_once_and_counted(tmp_path):
    root = beside(tmp_path / "data")
    for n in range(25):
        (root / f"lost{n:02d}.txt").write_text("no picture")
    (root / "part0" / "2.png").write_bytes(b"no")
    message = refused(of(root), "26 pictures cannot be used", "lost19.txt", "and 6 more")
    assert "lost20.txt" not in message


LINES = {
    "no json": ('{"file_name": "0.png", ', "line 6: no JSON"),
    "no object": ("[1]", 'line 6: no object with a "file_name"'),
    "deep": ("[" * 100_000, "line 6: no JSON"),
    "no name": ('{"text": "a"}', 'line 6: no object with a "file_name"'),
    "no text": ('{"file_name": "9.png", "caption": "a"}', "caption_key may be one of: caption"),
    "key twice": ('{"file_name": "0.png", "text": "a", "text": "b"}', "'text' is said twice"),
    "a list": ('{"file_name": "9.png", "text": ["a"]}', "line 6: the caption is list"),
    "a number": ('{"file_name": "9.png", "text": 3}', "line 6: the caption is int"),
    "nothing": ('{"file_name": "9.png", "text": null}', "line 6: the caption is NoneType"),
    "empty": ('{"file_name": "9.png", "text": " "}', "line 6: the caption is empty"),
    "half": ('{"file_name": "9.png", "text": "\\ud800"}', "line 6: the caption holds half"),
    "twice": ('{"file_name": "0.png", "text": "a"}', "line 6: file_name '0.png' is in line 1"),
    "missing": ('{"file_name": "8.png", "text": "a"}', "'8.png': no such picture"),
    "above": ('{"file_name": "../8.png", "text": "a"}', "'../8.png' leaves the folder"),
    "inside": ('{"file_name": "a/../../8.png", "text": "a"}', "leaves the folder"),
    "absolute": ('{"file_name": "/etc/8.png", "text": "a"}', "'/etc/8.png' leaves the folder"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_of_metadata_is_named_or_left_out(tmp_path, case):
    root = listed(tmp_path / "data")
    (tmp_path / "8.png").write_bytes(encoded(8))
    line, words = LINES[case]
    of_9 = '"9.png"' in line
    if of_9:
        (root / "9.png").write_bytes(encoded(9))
    with (root / "metadata.jsonl").open("r+") as file:
        text = file.read().rstrip("\n")
        file.seek(0)
        file.truncate()
        file.write(f"{text}\n{line}\n")
    refused(of(root), root / "metadata.jsonl", words)
    data = of(root, on_bad="skip")
    assert words in data.left_out()[0]
    assert len(data.left_out()) == 1
    assert sorted(data.reference().captions) == sorted(SAID)


def test_pictures_that_metadata_forgets_and_bytes_that_are_no_text_are_named(tmp_path):
    root = listed(tmp_path / "data")
    (root / "new.png").write_bytes(encoded(9))
    refused(of(root), root / "new.png", "not in metadata.jsonl")
    with (root / "metadata.jsonl").open("ab") as file:
        file.write(b'{"file_name": "new.png", "text": "caf\xe9"}\n')
    refused(of(root), "line 7: not UTF-8")


def test_captions_of_two_kinds_in_a_folder_are_refused(tmp_path):
    root = listed(tmp_path / "data")
    (root / "notes.txt").write_text("of no picture")
    assert sorted(of(root).reference().captions) == sorted(SAID)
    (root / "0.txt").write_text("another caption")
    refused(of(root), root, "captions in metadata.jsonl and in 1 .txt (0.txt, ..)")


def test_another_key_holds_the_captions(tmp_path):
    root = listed(tmp_path / "data", key="caption")
    said = refused(of(root), "no 'text'; dataset.caption_key may be one of: caption, more")
    assert said.startswith(f"{len(SAID)} pictures cannot be used")
    assert sorted(of(root, caption_key="caption").reference().captions) == sorted(SAID)


MEMBERS = {
    "no caption": (("5.png", encoded(5), {}), "member '5.png': no 5.txt for it"),
    "no picture": (("5.txt", b"a", {}), "5.txt: no picture of that key"),
    "link": (("5.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "no regular"),
    "hard link": (("5.png", b"", {"type": tarfile.LNKTYPE, "linkname": "0.png"}), "no regular"),
    "device": (("5.png", b"", {"type": tarfile.CHRTYPE}), "no regular file"),
    "above": (("../5.png", encoded(5), {}), "'../5.png': its name leaves the archive"),
    "absolute": (("/etc/5.png", encoded(5), {}), "'/etc/5.png': its name leaves the archive"),
    "twice": (("000000001.jpg", encoded(5, "JPEG"), {}), "have one key"),
    "said twice": (("000000001.txt", b"b", {}), "is in it twice"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_bad_member_of_a_tar_is_named_or_left_out(tmp_path, case):
    root = shards(tmp_path / "data")
    (name, content, more), words = MEMBERS[case]
    with tarfile.open(root / "00000.tar", "a") as archive:
        member(archive, name, content, **more)
    refused(of(root), root / "00000.tar", words)
    data = of(root, on_bad="skip")
    assert [words in fault for fault in data.left_out()] == [True]
    assert data.reference().captions == SAID


CAPTIONS = {
    "empty": (b" ", "the caption is empty"),
    "latin 1": (b"caf\xe9", "not UTF-8"),
    "long": (b"a" * 70_000, "70000 bytes"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_a_bad_caption_in_a_tar_is_named(tmp_path, case):
    root = shards(tmp_path / "data")
    text, words = CAPTIONS[case]
    with tarfile.open(root / "00000.tar", "a") as archive:
        member(archive, "5.png", encoded(5))
        member(archive, "5.txt", text)
    refused(of(root), root / "00000.tar", "member '5.png'", words)
    assert of(root, on_bad="skip").reference().captions == SAID


def test_a_tar_without_captions_is_one_line(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for n in range(99):
            member(archive, f"{n}.png", b"a picture")
    refused(of(tmp_path / "0.tar"), tmp_path / "0.tar", "without captions (KEY.txt)")
    refused(of(tmp_path / "0.tar", on_bad="skip"), "without captions (KEY.txt)")


@pytest.mark.parametrize("skip", [False, True])
def test_a_tar_cut_short_anywhere_is_one_line(tmp_path, skip):
    """In a header, in a member, in padding, and between members."""
    data = shard(tmp_path / "0.tar", (0, 1, 2)).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        infos = archive.getmembers()
        end = archive.offset
    between = [info.offset for info in infos[1:]]
    cuts = {1, 511, end, end + 511, *between, *(at + 100 for at in between), end - 1}
    cuts |= {info.offset_data + info.size - 1 for info in infos}
    cuts |= set(np.random.default_rng(0).choice(end, 40, replace=False).tolist())
    for cut in sorted(cuts):
        (tmp_path / "0.tar").write_bytes(data[:cut])
        message = refused(
            of(tmp_path, **({"on_bad": "skip"} if skip else {})), "0.tar: not a whole"
        )
        assert message.count("0.tar") == 1


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path):
    data = bytearray(shard(tmp_path / "0.tar", (0, 1, 2)).read_bytes())
    with tarfile.open(tmp_path / "0.tar") as archive:
        headers = [info.offset for info in archive.getmembers()]
    for at in headers:
        spoiled = bytearray(data)
        spoiled[at + 124] ^= 7  # the size
        (tmp_path / "0.tar").write_bytes(spoiled)
        refused(of(tmp_path), "0.tar: not a whole tar")


def test_what_is_no_tar_is_named(tmp_path):
    file = tmp_path / "0.tar"
    for content in (b"", b"hello", os.urandom(2000), encoded(0)):
        file.write_bytes(content)
        refused(of(tmp_path), file, "not a whole tar")
    file.write_bytes(gzip.compress(shard(file, (0,)).read_bytes()))
    refused(of(tmp_path), file, "compressed", "decompress it")
    with tarfile.open(file, "w"):
        pass
    refused(of(tmp_path), tmp_path, "no pictures in its tars")


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    root = shards(tmp_path / "data")
    images = of(root).pictures()
    os.truncate(root / "00000.tar", 600)
    with pytest.raises(DataError, match="cut short since it was listed"):
        images[0]
    shutil.rmtree(root)
    with pytest.raises(DataError, match=r"cannot be read .* put it back"):
        images[0]


def test_many_pictures_are_opened_spread_evenly(tmp_path, monkeypatch):
    root = listed(tmp_path / "data")
    monkeypatch.setattr(captions, "CHECKED", 2)
    (root / "1.png").write_bytes(b"no")
    assert of(root).spec() == DataSpec(3, 8)
    (root / "3.png").write_bytes(b"no")
    refused(of(root), "3.png")
    assert len(list(of(root).faults())) == 2


def test_no_sound_picture_is_one_line(tmp_path):
    root = listed(tmp_path / "data")
    for file in root.glob("*.png"):
        file.write_bytes(b"no")
    refused(of(root, on_bad="skip"), "no sound picture")


def test_a_data_set_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(PluginError, match=r"cmkit-latent\[datasets\]"):
        of(tmp_path).spec()
    with pytest.raises(PluginError, match=r"cmkit-latent\[datasets\]"):
        of(tmp_path / "train-0.parquet").spec()


def test_a_column_that_is_not_there_and_bad_rows_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = hugging_face(tmp_path / "data", "saved")
    refused(of(root, caption_key="caption"), "no column 'caption'", "number, text, image")
    images, texts = [encoded(0), encoded(1), None], ["a", None, "c"]
    table(tmp_path / "bad" / "a.parquet", images, texts)
    refused(of(tmp_path / "bad"), "row 1: the caption is NoneType", "row 2: no picture")
    assert of(tmp_path / "bad", on_bad="skip").captions() == ["a"]
    made = table(tmp_path / "good" / "a.parquet", images[:2], texts[:2])
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "two"))
    refused(of(tmp_path / "two"), "has splits test, train; name the folder of one")
    made.remove_columns("image").save_to_disk(str(tmp_path / "blind"))
    refused(of(tmp_path / "blind"), "0 columns of pictures")


def test_splits_and_damage_of_parquet_files_are_named(tmp_path):
    pytest.importorskip("datasets")
    root = hugging_face(tmp_path / "data", "parquet")
    shutil.copy(root / "train-00000-of-00002.parquet", root / "test-00000-of-00001.parquet")
    refused(of(root), "has splits test, train")
    assert len(of(root / "test-00000-of-00001.parquet").pictures()) == 3
    (root / "test-00000-of-00001.parquet").write_bytes(b"PAR1" * 99)
    refused(of(root / "test-00000-of-00001.parquet"), "not a whole Hugging Face data set")
