"""Runs beside each other and beside the literature."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cmkit.cli import main
from cmkit.errors import CheckpointError
from cmkit.report.figures import number
from cmkit.suite.runs import caveats, read_run


def entries(folders: list[Path]):
    return list(map(read_run, folders))


def folder(path: Path, name: str, fid: float, expected: bool = True, **provenance) -> Path:
    path.mkdir()
    report = {
        "schema": 1,
        "name": name,
        "hash": "0123abcd",
        "recipe": {"name": name},
        "stages": {
            "sample": {"images": 50_000, "nfe": 1, "scales": {"skip": 0.8, "emb": 1.0}},
            "metric": {
                "values": {"fid": fid, "precision": 0.7},
                "provenance": [
                    {"numbers": ["fid", "precision"], "extractor": "inception", **provenance}
                ],
            },
        },
    }
    if expected:
        report["recipe"]["expected"] = {"source": "Zhu 2024", "scores": {"fid": 13.62}}
    (path / "report.json").write_text(json.dumps(report))
    return path


def test_a_difference_is_ours_minus_theirs(tmp_path):
    (entry,) = entries([folder(tmp_path / "a", "a", 14.0)])
    assert entry.differences == {"fid": pytest.approx(0.38)}
    assert entry.facts == {"images": 50_000, "nfe": 1, "skip": 0.8}


def test_scores_that_were_measured_unlike_are_not_comparable(tmp_path):
    alike = [folder(tmp_path / n, n, 1.0, images=500) for n in "ab"]
    assert list(caveats(entries(alike))) == []
    other = folder(tmp_path / "c", "c", 1.0, images=50_000)
    notes = list(caveats(entries([*alike, other])))
    assert notes == [
        f"{key}: not comparable, images differs: 500, 50000" for key in ("fid", "precision")
    ]


def test_labels_drawn_by_other_rules_are_not_comparable(tmp_path):
    """A run of an earlier cmkit with classes drew them uniformly; one without classes fits both."""
    share = folder(tmp_path / "a", "a", 1.0, labels="data")
    even = folder(tmp_path / "b", "b", 1.0, labels="uniform")
    plain, old = folder(tmp_path / "c", "c", 1.0), folder(tmp_path / "d", "d", 1.0)
    report = json.loads((old / "report.json").read_text())
    report["data"] = {"channels": 1, "resolution": 8, "num_classes": 10}
    (old / "report.json").write_text(json.dumps(report))
    for unlike in ((share, even), (share, old)):
        (note, _) = caveats(entries(list(unlike)))
        assert note == "fid: not comparable, labels differs: data, uniform"
    for alike in ((share, plain), (even, plain), (even, old), (old, plain)):
        assert list(caveats(entries(list(alike)))) == []


def printed(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["cmkit", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_table_shows_ours_theirs_and_the_difference(tmp_path, monkeypatch, capsys):
    a = folder(tmp_path / "a", "ours", 14.0)
    b = folder(tmp_path / "b", "other", 15.0, expected=False)
    head, first, theirs, difference, last, how = printed(monkeypatch, capsys, a, b).splitlines()
    assert head.split() == ["run", "images", "nfe", "skip", "fid", "precision"]
    assert first.split() == ["ours-0123abcd", "50,000", "1", "0.8", "14.0", "0.700"]
    assert theirs.split()[:3] == ["Zhu", "2024", "13.6"]
    assert difference.split() == ["difference", "+0.38"]
    assert last.split()[0] == "other-0123abcd"
    assert how == "measured: fid, precision: extractor inception"
    found = json.loads(printed(monkeypatch, capsys, a, "--json"))
    assert found["runs"][0]["differences"]["fid"] == pytest.approx(0.38)


@pytest.mark.parametrize("content", [None, "{", "{}", "[1]"])
def test_a_folder_without_a_report_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        entries([tmp_path])


def test_a_suite_that_bench_has_not_ended_in_wants_its_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(sys, "argv", ["cmkit", "compare", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 4
    assert "name the suite's file" in capsys.readouterr().err


def cells(line: str) -> list[str]:
    """The cells of a printed line, of which the first may hold blanks."""
    return re.split(r" {2,}", line.strip())


UNLIKE = {
    "reference": ("a" * 64, "b" * 64),
    "images": (500, 50_000),
    "extractor": ("inception", "cmkit-digits"),
    "weights_sha256": ("a" * 64, None),
    "protocol": (None, "ADM"),
}


@pytest.mark.parametrize("fact", UNLIKE)
def test_scores_that_were_measured_unlike_stand_in_columns_apart(
    tmp_path, monkeypatch, capsys, fact
):
    (first, second), dash = UNLIKE[fact], number(None)
    alike = [folder(tmp_path / n, n, 14.0, **{fact: first}) for n in "ab"]
    other = folder(tmp_path / "c", "c", 15.0, expected=False, **{fact: second})
    out = printed(monkeypatch, capsys, *alike, other).splitlines()
    heads = cells(out[0])
    assert heads[-4:] == ["fid", "fid (2)", "precision", "precision (2)"]
    assert out[1].split()[-4:] == ["14.0", dash, "0.700", dash]
    assert out[2].split()[:4] == ["Zhu", "2024", "13.6", dash]
    (last,) = [line for line in out if line.startswith("c-")]
    assert last.split()[-4:] == [dash, "15.0", dash, "0.700"]
    said = [str(v)[:12] if v else "not recorded" for v in (first, second)]
    for note in (line for line in out if line.startswith("note: ")):
        assert fact in note
        assert all(value in note for value in said)
    assert sum(line.startswith("note: ") for line in out) == 2


def test_the_fingerprint_of_the_reference_is_kept_beside_the_numbers():
    from cmkit import Reference
    from cmkit.measure import Images, measure
    from tests.test_testing import Mean

    images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    _, (record,) = measure([Mean()], images, lambda _: Reference(images, "its fingerprint"), None)
    assert record == {"numbers": ["mean", "top"], "images": 4, "reference": "its fingerprint"}


def test_an_unfinished_run_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    done = folder(tmp_path / "a", "a", 14.0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.toml").touch()
    out = printed(monkeypatch, capsys, tmp_path / "b", done)
    assert "a-0123abcd" in out
    assert f"note: {tmp_path / 'b'}: not finished, left out" in out
    found = json.loads(printed(monkeypatch, capsys, tmp_path / "b", done, "--json"))
    assert len(found["runs"]) == len(found["caveats"]) == 1
    with pytest.raises(CheckpointError, match="no such file"):
        entries([tmp_path / "nothing"])
    monkeypatch.setattr(sys, "argv", ["cmkit", "compare", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 4
    assert "not finished; cmkit run" in capsys.readouterr().err
