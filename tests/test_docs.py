"""What the documentation shows is true: generated pages are current, examples run."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cmkit_std.metrics.fidelity import Fidelity

from cmkit import RecipeError, discover
from cmkit.plan import plan
from cmkit.plugins import KINDS, Hooks
from cmkit.recipe import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def module(path: Path):
    """The module in a file that no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def generate():
    return module(ROOT / "docs" / "generate.py")


def test_the_reference_is_what_the_code_says(generate):
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == generate.page()


@pytest.fixture(scope="module")
def verdict():
    return module(ROOT / "benchmarks" / "verdict.py")


def test_the_page_on_rescaling_is_what_the_stored_results_say(verdict):
    assert (ROOT / "docs" / "rescaling.md").read_text("utf-8") == verdict.page()


def test_the_results_and_their_pictures_are_those_that_are_stored():
    assert module(ROOT / "benchmarks" / "results.py").stale() == []


def test_a_verdict_is_told_as_it_was_found(verdict):
    def line(row, value, word=None, less=0.0):
        difference = {"value": less, "low": less - 0.1, "high": less + 0.1}
        said = {"fid": {"word": word, "difference": difference}} if word else {}
        scores = {"fid": {"mean": {"value": 3.0, "high": 3.5}}}
        axis = {"nfe": "1", "rescaling": value}
        about = {"facts": {"nfe": 1}, "runs": {"0": "a", "1": "b"}}
        return {"row": row, "axis": axis, "scores": scores, "verdicts": said, **about}

    about = {"cmkit": "1", "torch": "2", "device": "cpu", "time": "2026-11-29T00:00"}
    words = {"off": (("worse", 0.25), ("cannot tell", 0.0)), "global": ((), ("better", -0.25))}
    beside = {
        baseline: {
            "provenance": about,
            "notes": ["fid: of Holm", "kid_mean: of Holm"],
            "lines": [
                line("edm", "off"),
                line("cd", "off"),
                line("cd", "global", *said[0]),
                line("cd", "per_layer", *said[1]),
            ],
        }
        for baseline, said in words.items()
    }
    text = "\n".join(verdict.section(beside))
    assert "- `global` beside `off`: 0 better, 1 worse, 0 cannot tell, of 1" in text
    assert "- `per_layer` beside `global`: 1 better, 0 worse, 0 cannot tell, of 1" in text
    (row,) = [each for each in text.splitlines() if each.startswith("| `")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`cd`", "1", "3.00 ± 0.5", "+0.25 [+0.15, +0.35] **worse**",
        "+0 [-0.1, +0.1] cannot tell", "-0.25 [-0.35, -0.15] **better**",
    ]  # fmt: skip
    assert "- beside global: fid: of Holm" in text
    assert "kid_mean" not in text


def test_the_authors_page_lists_the_public_names(generate):
    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    assert page == generate.guide()
    assert all(f"`{name}`" in page for name, _ in generate.names() if name != "cmkit.api_version")


def test_a_public_signature_changes_only_with_a_line_in_the_changelog(generate):
    written = json.loads((ROOT / "docs" / "api.json").read_text("utf-8"))
    now = generate.api()
    changed = [name for name in {**written, **now} if written.get(name) != now.get(name)]
    assert not changed, (
        f"public names changed: {', '.join(changed)}; run `make docs`, and add a CHANGELOG entry"
        " under Unreleased that names them"
    )


def test_a_changed_signature_is_noticed(generate):
    class Before:
        def sample(self, x, noise):
            """A method."""

    class After:
        def sample(self, x, cond, noise):
            """With one more argument."""

    before, after = (dict(generate._signatures("it", thing)) for thing in (Before, After))
    assert before != after
    assert dict(generate._signatures("it", Before)) == before


PAPER = {
    "cd_imagenet64": (0.96, 1.02, 5.21),
    "cd_cat": (0.94, 1.0, 9.52),
    "cd_bedroom": (0.96, 0.9, 7.57),
    "ct_imagenet64": (1.0, 1.36, 11.07),
    "ct_cat": (0.84, 1.1, 19.99),
    "ct_bedroom": (0.8, 1.0, 13.62),
}
"""skip, emb and FID of the rescaling paper, tables 2 and 1."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_of_the_paper_hold_its_numbers_and_fit_their_network(
    name, tmp_path, monkeypatch
):
    """Planned without the weights, which would be downloaded, and with an invented reference."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Fidelity, "check", lambda *_: None)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(4), sigma=np.eye(4))
    sets = [f"dataset.reference_npz={tmp_path / 'reference.npz'}"]
    skip, emb, fid = PAPER[name]
    made = plan(load(ROOT / "recipes" / f"rescaled_{name}.toml", sets, discover()))
    assert (made.recipe.rescaler.skip, made.recipe.rescaler.emb) == (skip, emb)
    assert made.recipe.expected.scores["fid"] == fid
    assert made.recipe.sample.images == 50_000
    network = "imagenet64" if name.endswith("64") else "lsun256"
    keys = ROOT / "tests" / "parity" / "figures" / "keys" / f"openai_{network}.json"
    assert made.parameters == json.loads(keys.read_text())["n_parameters"]
    (download,) = made.downloads
    assert download.name.startswith(f"openai:{name}")
    searched = load(ROOT / "recipes" / f"search_{name}.toml", sets, discover())
    skips, embs = searched.search.grid["skip"], searched.search.grid["emb"]
    assert len(skips) == len(embs) == 11
    assert {skip, 1.0} <= set(skips)
    assert {emb, 1.0} <= set(embs)
    assert searched.search.images == (500 if name.endswith("64") else 200)
    if name.startswith("cd"):
        assert (min(skips), max(skips), min(embs), max(embs)) == (0.9, 1.1, 0.9, 1.1)


def test_the_recipe_without_downloads_can_be_planned():
    recipe = ROOT / "recipes" / "digits_rescaled_ct.toml"
    assert plan(load(recipe, [], discover())).parameters > 0


def test_the_readmes_recipe_can_be_planned(tmp_path):
    (text,) = blocks(README, "toml")
    path = tmp_path / "readme.toml"
    path.write_text(text)
    assert plan(load(path, [], discover())).recipe.name == "digits_rescaled_ct"


def test_the_readmes_error_is_the_real_one(tmp_path):
    path = tmp_path / "ct.toml"
    text = 'rescaler = { use = "global", skpi = 1.0 }\nname = "x"\n'
    text += 'dataset = { use = "digits" }\nbackbone = { use = "adm" }\n'
    path.write_text("\n" * 13 + text)
    with pytest.raises(RecipeError) as caught:
        load(path, [], discover())
    assert f"error: {caught.value}".replace(f"{tmp_path}/", "") in README


def test_the_readme_names_every_built_in_part():
    table = README.split("## Parts")[1].split("##")[0]
    for kind in KINDS:
        (row,) = re.findall(rf"^\| {kind} \|(.*)\|$", table, re.M)
        assert set(re.findall(r"`([a-z0-9_]+)`", row)) == set(discover().names(kind))


def test_every_hook_is_explained_to_authors():
    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    for hook in vars(Hooks):
        if hook.startswith("cmkit_"):
            assert hook in page


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target
