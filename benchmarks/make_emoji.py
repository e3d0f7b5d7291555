"""Makes the pictures and captions of the data set `emoji`, and folders of other styles.

    python benchmarks/make_emoji.py --work DOWNLOADS            # what the wheel ships
    python benchmarks/make_emoji.py --work DOWNLOADS --style twemoji OUT     # for `captions`

Needs apt-get with Debian's `fonts-noto-color-emoji`, npm, dpkg-deb, and fontTools, which comes with
matplotlib; the style "fluent" also the package resvg-py, which draws SVG. What DOWNLOADS has
already is not fetched again. The same sources give the same bytes.

The pictures are the bitmaps of Noto Color Emoji (OFL-1.1), averaged from 128x128 to 32x32 on white.
Captions and groups are those of Unicode's CLDR (Unicode-3.0), as emojibase (MIT) collects them.
Left out are

- flags, skin tones, and the parts of which sequences are made: flags are 16 % of all glyphs, told
  apart by details that 32 pixels do not hold, and their captions name nothing to be seen;
- people "facing right", who are mirror images of those facing left;
- couples and families by the gender of each: 5 families are one picture with another name, and
  all are silhouettes that differ by a skirt. Those without gender stay, but for the family of
  two adults and a child, which is the picture of "family".

Men, women and persons of one role, and hair of several colours, stay: their captions say what is
seen, and at 32x32 it can be. They are held out together (`family`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cmkit_std.datasets import emoji
from fontTools.ttLib import TTFont
from PIL import Image

FONT_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"
"""Of version 2.042, which has the glyphs of Unicode 15.1."""
DEBIAN = "fonts-noto-color-emoji"
NPM = {
    "emojibase-data": "17.0.0",
    "cldr-core": "48.2.0",  # for its licence alone
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-flat": "1.1.0",
}
STYLES = {
    "twemoji": (
        "emoji-datasource-twitter",
        "CC-BY-4.0: Twemoji, Copyright Twitter and others",
    ),
    "fluent": ("@lobehub/fluent-emoji-flat", "MIT: Fluent Emoji, Copyright Microsoft"),
}
LEFT_OUT = {"component", "flags"}
GENDERED = ("kiss: ", "couple with heart: ", "family: man", "family: woman")
TWICE = {"family: adult, adult, child"}
PERSONS = {0x1F468, 0x1F469, 0x1F9D1}
SIGNS = {0x200D, 0xFE0F, 0x2640, 0x2642, *PERSONS}


def main() -> None:
    """Write what the wheel ships, or a folder of one style with captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where downloads are kept; else nowhere")
    parser.add_argument("--out", type=Path, default=emoji.FOLDER)
    parser.add_argument("--style", nargs=2, metavar=("STYLE", "OUT"), help=f"one of {set(STYLES)}")
    parser.add_argument("--grid", type=Path, help="also draw every fourth picture into this PNG")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.style:
            style, out = args.style
            print(f"{write_style(style, Path(out), work)} pictures of {style}")
            return
        font, copyright_file = noto(work)
        wanted = list(entries(work))
        drawn = bitmaps(font)
        made = {hexcode: small(image) for hexcode, _ in wanted if (image := drawn(hexcode))}
        write(args.out, made, [entry for entry in wanted if entry[0] in made])
        shutil.copyfile(copyright_file, args.out / "COPYRIGHT.noto-emoji.txt")
        for package in ("emojibase-data", "cldr-core"):
            shutil.copyfile(npm(package, work) / "LICENSE", args.out / f"LICENSE.{package}.txt")
    if args.grid:
        sheet(np.stack(list(made.values())[::4]), 25).save(args.grid, optimize=True)
    print(f"{len(made)} pictures; copy these into plugins/cmkit_std/datasets/emoji.py:")
    for name in (emoji.SHEET, emoji.TABLE):
        file = args.out / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f'    {name}: "{digest}",  # {file.stat().st_size:,} bytes')


def noto(work: Path) -> tuple[Path, Path]:
    """The font and the copyright file of the Debian package."""
    root = work / DEBIAN
    if not root.is_dir():
        subprocess.run(
            ["apt-get", "download", DEBIAN], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
        (package,) = work.glob(f"{DEBIAN}_*.deb")
        subprocess.run(
            ["dpkg-deb", "-x", package.name, DEBIAN],
            cwd=work,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    font = root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    if (found := hashlib.sha256(font.read_bytes()).hexdigest()) != FONT_SHA256:
        raise SystemExit(f"{font}: SHA-256 {found[:12]}.. is not that of 2.042")
    return font, root / "usr/share/doc" / DEBIAN / "copyright"


def npm(package: str, work: Path) -> Path:
    """The unpacked folder of an npm package of the version above."""
    folder = work / package.replace("/", "-").lstrip("@")
    if not folder.is_dir():
        called = f"{package}@{NPM[package]}"
        subprocess.run(
            ["npm", "pack", "--silent", called], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
        archive = work / f"{folder.name}-{NPM[package]}.tgz"
        shutil.unpack_archive(archive, folder, filter="data")
    return folder / "package"


def entries(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Code points such as "1F469-200D-1F373", and what is known of each that is used, in Unicode's
    order: {"group": .., "family": .., "en": [name, keyword, ..], "de": ..}."""
    package = npm("emojibase-data", work)
    keys = json.loads((package / "meta/groups.json").read_text(encoding="utf-8"))["groups"]
    told = {
        language: {
            entry["hexcode"]: [entry["label"], *entry.get("tags", ())]
            for entry in json.loads((package / language / "data.json").read_text(encoding="utf-8"))
        }
        for language in emoji.LANGUAGES
    }
    numbers = {key.replace(" & ", "-"): number for number, key in enumerate(emoji.GROUPS)}
    every = json.loads((package / "en/data.json").read_text(encoding="utf-8"))
    for entry in sorted(every, key=lambda entry: entry.get("order", 0)):
        group = keys[str(entry["group"])] if "group" in entry else "component"
        label, hexcode = entry["label"], entry["hexcode"]
        if group in LEFT_OUT or label in TWICE or label.startswith(GENDERED):
            continue
        if label.endswith("facing right"):
            continue
        texts = {language: distinct(told[language][hexcode]) for language in emoji.LANGUAGES}
        yield hexcode, {"group": numbers[group], "family": family(hexcode), **texts}


def distinct(texts: list[str]) -> list[str]:
    """The texts in one line each, without those that differ from an earlier one by capitals."""
    found: dict[str, str] = {}
    for text in texts:
        clean = " ".join(text.replace("\u2019", "'").split())
        found.setdefault(clean.casefold(), clean)
    return list(found.values())


def family(hexcode: str) -> str:
    """What a man, a woman and a person of one role or one hair share; else the code points."""
    points = [int(point, 16) for point in hexcode.split("-")]
    kept = [f"{point:X}" for point in points if point not in SIGNS]
    if not kept and PERSONS.intersection(points):
        return "person"
    return "-".join(kept) or hexcode


def bitmaps(font: Path) -> Callable[[str], Image.Image | None]:
    """A function from code points to the font's bitmap, RGBA 136x128, or None."""
    tables = TTFont(font)
    characters, strike = tables.getBestCmap(), tables["CBDT"].strikeData[0]
    ligatures = {
        (first, *found.Component): found.LigGlyph
        for lookup in tables["GSUB"].table.LookupList.Lookup
        if lookup.LookupType == 4
        for table in lookup.SubTable
        for first, every in table.ligatures.items()
        for found in every
    }

    def drawn(hexcode: str) -> Image.Image | None:
        points = [int(point, 16) for point in hexcode.split("-")]
        names = tuple(characters.get(point) for point in points if point != 0xFE0F)
        glyph = names[0] if len(names) == 1 else ligatures.get(names)
        return Image.open(io.BytesIO(strike[glyph].imageData)) if glyph in strike else None

    return drawn


def small(image: Image.Image) -> np.ndarray:
    """(32, 32, 3) uint8: laid on white, its centre averaged over equal squares.

    A size that is no multiple of 32 is first cut to one, or to the square of its height.
    """
    rgba = np.asarray(image.convert("RGBA"), np.int64)
    side = min(rgba.shape[:2]) // emoji.SIDE * emoji.SIDE
    top, left = ((length - side) // 2 for length in rgba.shape[:2])
    rgba = rgba[top : top + side, left : left + side]
    alpha = rgba[..., 3:]
    on_white = rgba[..., :3] * alpha + 255 * (255 - alpha)  # of 255 * 255
    each = side // emoji.SIDE
    sums = on_white.reshape(emoji.SIDE, each, emoji.SIDE, each, 3).sum((1, 3))
    whole = 255 * each * each
    return ((2 * sums + whole) // (2 * whole)).astype(np.uint8)  # rounded, exactly


def write(out: Path, made: dict[str, np.ndarray], wanted: list[tuple[str, dict[str, Any]]]) -> None:
    """The sheet of pictures and the table of captions, in one order."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = sheet(np.stack([made[hexcode] for hexcode, _ in wanted]), emoji.COLUMNS)
    pictures.save(out / emoji.SHEET, lossless=True, quality=100, method=6, exact=True)
    lines = [json.dumps({"code": code, **told}, ensure_ascii=False) for code, told in wanted]
    (out / emoji.TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """(N, 32, 32, 3) in rows of `columns`, the last filled up with white."""
    rows = -(-len(pictures) // columns)
    blank = np.full((rows * columns - len(pictures), *pictures.shape[1:]), 255, np.uint8)
    grid = np.concatenate([pictures, blank]).reshape(rows, columns, emoji.SIDE, emoji.SIDE, 3)
    return Image.fromarray(grid.swapaxes(1, 2).reshape(rows * emoji.SIDE, -1, 3))


def styled(style: str, work: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Entries of `entries` and their pictures in another style."""
    folder = npm(STYLES[style][0], work)
    for hexcode, told in entries(work):
        if style == "twemoji":
            file = _named(folder / "img/twitter/64", hexcode, "png")
            image = Image.open(file) if file else None
        else:
            file = _named(folder / "assets", hexcode, "svg")
            image = _rasterized(file) if file else None
        if image:
            yield {"code": hexcode, **told}, small(image)


def _named(folder: Path, hexcode: str, suffix: str) -> Path | None:
    """The file of some code points, with FE0F or without."""
    bare = "-".join(point for point in hexcode.split("-") if point != "FE0F")
    for name in (hexcode, f"{hexcode}-FE0F", bare):
        if (file := folder / f"{name.lower()}.{suffix}").is_file():
            return file
    return None


def _rasterized(file: Path) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_path=str(file), width=128, height=128)
    return Image.open(io.BytesIO(bytes(data)))


def write_style(style: str, out: Path, work: Path) -> int:
    """Write NAME.png and NAME.txt of each, as data set `captions` reads them; their number."""
    out.mkdir(parents=True, exist_ok=True)
    made = list(styled(style, work))
    for told, picture in made:
        Image.fromarray(picture).save(out / f"{told['code']}.png")
        (out / f"{told['code']}.txt").write_text(told["en"][0], encoding="utf-8")
    (out / "NOTICE.md").write_text(f"Pictures of 32x32 under {STYLES[style][1]}.\n", "utf-8")
    return len(made)


if __name__ == "__main__":
    main()
