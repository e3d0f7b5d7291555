"""Laws of one's own pictures: however they are stored, what is held out, what is left out."""

from __future__ import annotations

import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets import archives, pictures
from cmkit_std.datasets.image_folder import ImageFolder
from PIL import Image

from cmkit import DataError
from cmkit.testing import check_dataset
from tests.test_datasets import one_line, picture, same, take

CORNERS = np.array([[10, 60, 60], [110, 160, 160], [210, 250, 250]], np.uint8)
"""A picture that no turn and no mirror leaves as it is."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty pictures of three classes, of all kinds, in folders within folders."""
    for n in range(30):
        mode = ("RGB", "L", "RGBA", "P", "CMYK")[n % 5]
        ending = "tif" if mode == "CMYK" else "png"
        file = tmp_path / "pictures" / str(n % 3 + 9) / ("in" * (n % 2)) / f"{n:02d}.{ending}"
        picture(file, n, (8 + n, 12), mode)
    (tmp_path / "pictures" / "9" / ".hidden").write_text("no")
    return tmp_path / "pictures"


def zipped(folder: Path, above: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("__MACOSX/._a.png", b"no")
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, above + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, above: str = ".") -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, above)
    return path


def of(path: Path, **keys) -> ImageFolder:
    return ImageFolder(path=str(path), resolution=8, **keys)


def pixels(path: Path, side: int = 8, **keys) -> torch.Tensor:
    """The only picture below a path."""
    (image,) = ImageFolder(path=str(path), resolution=side, **keys).reference().images
    return image


# How they are stored


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path, ending):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    format = "PPM" if ending == "pgm" else None
    Image.fromarray(ramp).save(tmp_path / f"x.{ending}", format)
    found = pixels(tmp_path, 256)
    assert torch.equal(found.long(), torch.from_numpy(ramp >> 8).long().expand(3, -1, -1))
    assert (found.min(), found.max()) == (0, 255)
    assert (found[0].flatten().long().diff() >= 0).all()


def test_grey_of_sixteen_bits_is_as_colour_of_sixteen_bits_and_clear_pixels_are_white(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    for name in ("grey", "colour", "clear"):
        (tmp_path / name).mkdir()
    Image.fromarray(values).save(tmp_path / "grey" / "x.png")
    rows = np.repeat(values[..., None], 3, 2).astype(">u2").reshape(8, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (tmp_path / "colour" / "x.png").write_bytes(png)
    assert torch.equal(pixels(tmp_path / "grey"), pixels(tmp_path / "colour"))
    Image.new("I;16", (8, 8), 300).save(tmp_path / "clear" / "x.png", transparency=300)
    assert (pixels(tmp_path / "clear") == 255).all()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_thirty_two_bits_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 70_000).save(tmp_path / "x.tif")
    with pytest.raises(DataError) as error:
        of(tmp_path).spec()
    one_line(error, tmp_path / "x.tif", "not 8 or 16 bits")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_pictures_are_upright_unless_told(tmp_path, ending, orientation):
    """A camera stores the turned picture; by EXIF's table the number says where its first row and
    column are seen: 6, say, right and top."""
    seen = np.kron(CORNERS, np.ones((8, 8), np.uint8))[:, :24]
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: x[:, ::-1].T,  # row 0 is the right column, downwards
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: x[::-1].T,
    }[orientation](seen)
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    image.save(tmp_path / f"x.{ending}", exif=exif)
    found = pixels(tmp_path, 24, channels=1)[0].numpy().astype(int)
    assert np.abs(found - seen).max() <= 3
    if ending != "tif":
        as_is = pixels(tmp_path, 24, channels=1, orientation="stored")[0].numpy().astype(int)
        assert np.abs(as_is - stored).max() <= 3


def test_a_picture_whose_exif_is_damaged_is_taken_as_it_is_stored(tmp_path):
    Image.fromarray(CORNERS).resize((8, 8)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff")
    assert torch.equal(pixels(tmp_path), pixels(tmp_path, orientation="stored"))


def test_how_pictures_are_turned_is_part_of_what_they_are(folder):
    upright, stored = of(folder), of(folder, orientation="stored")
    assert upright.identity() != stored.identity()
    assert same(take(upright, 3), take(stored, 3))  # none of them is turned


# Archives


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "pack",
    [
        zipped,
        lambda folder: zipped(folder, "top/", zipfile.ZIP_STORED),
        tarred,
        lambda folder: tarred(folder, "top"),
    ],
    ids=["zip", "zip of the folder", "tar", "tar of the folder"],
)
def test_an_archive_is_the_folder_that_it_was_made_of(folder, labels, pack):
    keys = {"labels": labels, "flip": True, "validation": 0.3}
    plain, packed = of(folder, **keys), of(pack(folder), **keys)
    assert packed.spec() == plain.spec()
    assert packed.identity() == plain.identity()
    assert same(take(packed, 9), take(plain, 9))
    assert same(take(packed.heldout(), 3), take(plain.heldout(), 3))
    if labels:
        assert packed.spec().classes == ("9", "10", "11")
        check_dataset(packed)


def test_streamed_from_an_archive_by_threads_and_forks_they_are_the_same(folder, monkeypatch):
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    data = of(zipped(folder))
    before = take(data, 6, size=16)
    if child := os.fork():
        ours = same(take(data, 6, size=16), before)
        assert os.waitpid(child, 0)[1] == 0
        assert ours
    else:  # with a handle in common, each would move the other's place in the file
        os._exit(0 if same(take(data, 6, size=16), before) else 1)


def special(folder: Path) -> Path:
    """A zip with members that no extraction should meet."""
    path = zipped(folder)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../up.png", b"no")
        archive.writestr("/etc/root.png", b"no")
        archive.writestr("9/bomb.png", bytes(archives.LARGEST + 1))
        link = zipfile.ZipInfo("9/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("9/00.png", b"no")
    return path


def test_members_that_trick_or_burst_are_named_all_at_once_and_never_read(folder, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 2**20)
    path = special(folder)
    before = set(folder.parent.iterdir())
    with pytest.raises(DataError) as error:
        of(path, labels=True).spec()
    one_line(
        error,
        "5 pictures cannot be used",
        f"{path}: member '../up.png': its name leaves the archive",
        "'/etc/root.png': its name leaves",
        f"'9/bomb.png': {2**20 + 1} bytes, more than {2**20}",
        "'9/link.png': no regular file",
        "'9/00.png': is in it twice",
    )
    read, honest = [], archives._read
    monkeypatch.setattr(archives, "_read", lambda p, m: read.append(m.name) or honest(p, m))
    data = of(path, labels=True, on_bad="skip")
    assert data.spec().counts == (9, 10, 10)
    assert len(data.left_out()) == 5
    assert len(set(read)) == 29
    assert not {"../up.png", "/etc/root.png", "9/bomb.png", "9/link.png"} & set(read)
    assert set(folder.parent.iterdir()) == before


def test_links_and_holes_in_a_tar_are_named(tmp_path, folder):
    path = tarred(folder)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with pytest.raises(DataError) as error:
        of(path).spec()
    one_line(error, "2 pictures", "'a.png': no regular file", "'b.png': no regular file")


def test_an_encrypted_member_is_named(folder):
    path = zipped(folder, method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"9/00.png") - 46 + 8] |= 1  # its flags in the central directory
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"member .*: encrypted; pack it without"):
        of(path).spec()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-30], "not a whole"),
        (lambda data: b"", "no folder, no zip and no tar"),
        (lambda data: b"\x1f\x8b" + data, "compressed, so that"),
        (lambda data: b"\x89PNG" + data, "no folder, no zip and no tar"),
    ],
    ids=["cut", "empty", "gzip", "picture"],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_that_is_none_is_named(folder, pack, damage, said):
    path = pack(folder)
    data = path.read_bytes().rstrip(b"\0") if pack is tarred else path.read_bytes()
    path.write_bytes(damage(data))
    with pytest.raises(DataError) as error:
        of(path).spec()
    one_line(error, path, said)


def test_a_damaged_member_is_a_bad_picture_like_any_other(folder):
    path = zipped(folder, method=zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("9/00.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len("9/00.png") + info.file_size // 2] ^= 255
    path.write_bytes(content)
    (fault,) = of(path).faults()
    assert fault.startswith(f"{path}: member '9/00.png': cannot be read (Bad CRC-32")
    assert of(path, on_bad="skip").identity()["images"] == 29


# Held out


def test_what_is_held_out_is_in_no_batch_and_stays_when_pictures_are_added(folder):
    def names(data: ImageFolder) -> set[str]:
        return {file.name for file in data._images().source.files}

    data = of(folder, validation=0.3)
    held, train = names(data.heldout()), names(data)
    assert not held & train
    assert len(held | train) == 30
    assert 3 <= len(held) <= 15
    assert data.heldout().heldout() is None
    assert of(folder).heldout() is None
    for n in range(40):
        picture(folder / "9" / f"new{n}.png", n)
    assert names(data.heldout()) >= held
    assert names(data) >= train
    more = of(folder, validation=0.5)
    assert names(more.heldout()) > names(data.heldout())  # a larger share takes from training only


def test_about_the_share_that_was_asked_for_is_held_out():
    from cmkit_std.datasets.image_folder import fraction

    numbers = [fraction(f"class/{n}.jpg") for n in range(4000)]
    for share in (0.05, 0.1, 0.5):
        assert abs(sum(x < share for x in numbers) / 4000 - share) < 0.02


def test_a_share_that_leaves_a_part_or_a_class_empty_is_refused(folder):
    with pytest.raises(DataError, match="none is left to hold out; change it"):
        of(folder, validation=1e-9).heldout().spec()
    with pytest.raises(DataError, match="none is left to train on; change it"):
        of(folder, validation=1 - 1e-9).spec()
    with pytest.raises(DataError, match=r"of class '1\d?'|of class '9'"):
        of(folder, validation=0.95, labels=True).spec()
    with pytest.raises(ValueError, match="needs validation"):
        of(folder, split="validation")


def test_bad_pictures_of_both_parts_are_named(folder):
    for n in range(12):
        (folder / "9" / f"bad{n}.png").write_text("no")
    with pytest.raises(DataError, match="12 pictures cannot be used"):
        of(folder, validation=0.5).spec()


# Bad ones


def test_loose_files_and_bad_pictures_are_in_one_list(folder):
    good = of(folder, labels=True)
    kept, spec = take(good, 6), good.spec()
    (folder / "readme.txt").write_text("no")
    picture(folder / "loose.png", 1)
    (folder / "9" / "text.png").write_text("no")
    with pytest.raises(DataError) as error:
        good.spec()
    one_line(error, "3 pictures", folder / "readme.txt", "loose.png: not in a folder", "text.png")
    data = of(folder, labels=True, on_bad="skip")
    assert data.spec() == spec
    assert same(take(data, 6), kept)
    assert len(data.left_out()) == 3


def test_every_empty_class_is_named(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
    with pytest.raises(DataError) as error:
        of(folder, labels=True).spec()
    one_line(error, folder, "no pictures in a, b; put some there")


# From a folder to a page

TINY = """\
name = "own"
backbone = { use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }
objective = { use = "ct", end_scales = 5, distance = "l2" }
train = { steps = 2, batch = 8, precision = "fp32" }
sampler = { use = "multistep" }
sample = { images = 20, precision = "fp32" }
metric = [
    { use = "fidelity", extractor = "cmkit-emoji" },
    { use = "fidelity", extractor = "cmkit-emoji", heldout = true },
]
[dataset]
use = "image_folder"
path = "pictures"
resolution = 8
labels = true
validation = 0.3
"""


def test_a_messy_folder_becomes_a_page_that_says_what_it_is_of(cmkit, folder):
    Path("own.toml").write_text(TINY)
    (folder / "notes.txt").write_text("no")
    torn = picture(folder / "9" / "torn.png", 7, (64, 64))
    torn.write_bytes(torn.read_bytes()[:-1500])
    code, out, _ = cmkit("check", "own.toml", "--data")
    assert code == 3
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        *("pictures/9/torn.png", "pictures/notes.txt")
    ]
    skip = ("--set", 'dataset.on_bad="skip"')
    code, out, _ = cmkit("check", "own.toml", *skip)
    assert code == 0
    held = len(of(folder, on_bad="skip", validation=0.3).heldout().reference().images)
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert (facts["pictures"], facts["held"]) == (str(30 - held), f"out             {held}")
    assert "class 0              9  " in out
    assert "note: fidelity: cmkit-emoji is a small classifier of emoji" in out
    code, _, err = cmkit("run", "own.toml", *skip)
    assert code == 0
    assert "left out, bad files: 2: pictures/9/torn.png" in err
    (run,) = Path("runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    assert report["inputs"]["dataset"]["left_out"] == 2
    assert report["data"]["classes"] == ["9", "10", "11"]
    assert report["inputs"]["metric"]["heldout_images"] == held
    assert {p["extractor"] for p in report["stages"]["metric"]["provenance"]} == {"cmkit-emoji"}
    page = (run / "report.html").read_text("utf-8")
    count = report["data"]["counts"][2]
    assert f'<td class="n">2</td><th scope="row">11</th><td class="n">{count}</td>' in page
