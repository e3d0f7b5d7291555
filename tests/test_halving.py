"""The rungs of successive halving: which images they have, and what is kept between them."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from cmkit_std.metrics.fidelity_meter import FidelityMeter
from safetensors.torch import save

from cmkit import discover
from cmkit.errors import DataError
from cmkit.plan import build, plan
from cmkit.recipe import load
from cmkit.search import Cell, CellsDrawn, Scoring, search, tuner
from tests.test_tuner import CPU, HALVING, RECIPE, kept


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_a_tuner_is_told_the_rung_before_the_score():
    """So that of cells with different numbers of images no score is compared."""
    rungs = (4, 16, 64)
    ordered = [(2, -1e6), (2, 3.0), (2, 3.001), (2, 1e6), (1, -1e6), (1, 0.0), (0, -9.0), (0, None)]
    told = [tuner._rank(rung, score, rungs) for rung, score in ordered]
    assert told == sorted(set(told))
    assert tuner._rank(2, None, rungs) > tuner._rank(0, 1e6, rungs)


def test_rungs_by_default_leave_fifty_images_to_the_first(recipe):
    def rungs(images, halving):
        sets = [f"search.images={images}", f"search.halving={halving}"]
        return load(recipe, sets, discover()).search.rung_images

    assert rungs(200, 4) == (50, 200)
    assert rungs(500, 2) == (62, 125, 250, 500)
    assert rungs(60, 2) == (30, 60)
    assert load(recipe, [], discover()).search.rung_images == (16,)


@functools.cache
def _trained(path):
    made = plan(load(path, [], discover()))
    denoiser = build(made, CPU).eval()
    torch.manual_seed(0)
    for parameter in denoiser.network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return denoiser, made.recipe.dataset.reference()


def real(path, *overrides, stored=(), begun=None):
    made = plan(load(path, overrides, discover()))
    denoiser, reference = _trained(path)
    return search(Scoring(made, made.recipe.search, denoiser, reference, CPU, begun), stored)


FOUR = ("search.grid={skip=[0.6, 0.8, 1.0, 1.2], emb=[1.0]}", "search.images=12")


def test_the_images_of_a_rung_are_the_first_of_all_and_are_drawn_once(recipe, monkeypatch):
    """The winner, its score and its pictures are those of the search without halving."""
    sizes = []
    add = FidelityMeter.add
    monkeypatch.setattr(FidelityMeter, "add", lambda self, x: sizes.append(len(x)) or add(self, x))
    full = {e.index: e for e in real(recipe, *FOUR) if isinstance(e, Cell)}
    few = {e.index: e for e in real(recipe, *FOUR, "search.images=6") if isinstance(e, Cell)}
    sizes.clear()
    halved = {
        e.index: e
        for e in real(recipe, *FOUR, "search.halving=2", "search.rungs=2")
        if isinstance(e, Cell)
    }
    assert sum(sizes) == 4 * 6 + 2 * 6
    assert len({cell.score for cell in full.values()}) == 4
    cut = {index for index, cell in halved.items() if cell.images == 6}
    assert cut == set(sorted(few, key=lambda index: few[index].score)[2:])
    for index, cell in halved.items():
        like = few[index] if index in cut else full[index]
        assert cell.score == like.score
        assert torch.equal(cell.thumbnails, like.thumbnails)
    winner = min((c for c in full.values()), key=lambda cell: cell.score)
    assert winner.index not in cut  # the ranks agree here
    assert min(c.score for c in halved.values() if c.images == 12) == winner.score


def test_a_number_that_must_know_all_its_images_is_drawn_again(recipe, monkeypatch):
    """An Inception score is of ten parts of all images, so that no rung is its beginning."""
    sets = (*FOUR, 'metric=[{use="fidelity", fid=false, isc=true}]', 'search.minimize="is_std"')
    sets = (*sets, "search.images=24", "search.confirm_images=12")
    full = {e.index: e.score for e in real(recipe, *sets) if isinstance(e, Cell)}
    found = [e for e in real(recipe, *sets, "search.halving=2") if isinstance(e, Cell)]
    whole = [cell for cell in found if cell.images == 24]
    assert len(whole) == 2
    assert all(cell.score == full[cell.index] for cell in whole)


def test_cells_between_rungs_are_kept(recipe, monkeypatch):
    """From the file of an interrupted search, whatever it was at, no image is drawn twice."""
    add, sizes = FidelityMeter.add, []
    monkeypatch.setattr(FidelityMeter, "add", lambda self, x: sizes.append(len(x)) or add(self, x))
    sets = (*FOUR, "search.halving=2", "search.rungs=3", "search.batch=2")
    sets = (*sets, "search.grid={skip=[0.6, 0.8, 1.0], emb=[1.0, 1.1]}")
    whole = list(real(recipe, *sets))
    total = sum(sizes)
    assert total == 6 * 3 + 3 * 3 + 2 * 6
    drawing = [place for place, event in enumerate(whole, 1) if isinstance(event, CellsDrawn)]
    for cut in drawing[1 :: len(drawing) // 4]:
        sizes.clear()
        events = list(itertools.islice(real(recipe, *sets), cut))
        begun = events[-1].unfinished()
        records = kept(events)
        again = records + kept(real(recipe, *sets, stored=records, begun=begun))
        assert again == kept(whole), cut
        assert sum(sizes) == total, cut
    sizes.clear()
    few = [record for record in kept(whole) if record["images"] < 12]
    assert few + kept(real(recipe, *sets, stored=few)) == kept(whole)
    assert sorted(sizes) == 2 * [1, 1] + 2 * 5 * [2]  # batches end where a rung does


def test_too_few_images_in_the_first_rung_are_refused_by_the_metric(recipe):
    sets = ['metric=[{use="fidelity", kid=true, kid_subset_size=10}]', 'search.minimize="kid_mean"']
    sets.append("search.confirm_images=12")
    plan(load(recipe, sets, discover()))
    with pytest.raises(DataError, match=r"search\.halving.* 4 samples; it needs at least 10"):
        plan(load(recipe, [*sets, *HALVING], discover()))


def test_what_is_kept_of_cells_can_be_written_in_whatever_order_a_network_gives_colours():
    from cmkit.search.score import _Drawing

    cell = _Drawing("0", SimpleNamespace(state=dict), 4, True, torch.device("cpu"))
    images = torch.arange(4 * 3 * 8 * 8).view(4, 3, 8, 8).byte()
    cell.thumbnails = [images.to(memory_format=torch.channels_last)]
    save(state := cell.state())
    assert torch.equal(state["thumbnails"], images)
