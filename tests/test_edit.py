import pytest
import torch

from cmkit import Cond, DataError, Noise, RecipeError
from cmkit.edit import colorize, edit, inpaint, superres
from cmkit.edit.projections import LUMINANCE
from tests.toys import Counting, GaussianFlow

WEIGHTS = torch.tensor(LUMINANCE, dtype=torch.float64).view(3, 1, 1)


def brightness(x):
    return (WEIGHTS * x).sum(1)


def patch_means(x):
    return x.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))


MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) < 0.4
EDITS = [
    (colorize, brightness),
    (lambda known: superres(known, 4), patch_means),
    (lambda known: inpaint(known, MASK), lambda x: x[..., MASK]),
]


def images(n=2):
    return 2 * torch.rand(n, 3, 8, 8, dtype=torch.float64) - 1


@pytest.mark.parametrize(("projection", "known_part"), EDITS, ids=["colour", "superres", "inpaint"])
def test_projection_keeps_what_is_known_and_is_orthogonal(projection, known_part):
    """The known part is that of the known images; what is put back is orthogonal to what an
    estimate may choose, so the result is the nearest image that agrees."""
    known, x0 = images(), images()
    project = projection(known)
    torch.testing.assert_close(known_part(project(x0)), known_part(known))
    torch.testing.assert_close(project(project(x0)), project(x0))
    torch.testing.assert_close(project(known), known)
    moved, free = project(x0) - x0, project(images()) - project(x0)
    assert float(moved.abs().max()) > 0.1
    assert float((moved * free).sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("projection", "known_part"), EDITS, ids=["colour", "superres", "inpaint"])
def test_edited_images_have_the_known_part(projection, known_part):
    known, x = images(), 80 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out = edit(
        GaussianFlow(), x, [10.0, 0.5], projection(known), Cond(), lambda k: torch.randn_like(x)
    )
    torch.testing.assert_close(known_part(out), known_part(known))


def test_edit_visits_its_levels_and_puts_the_known_part_in_before_each():
    """x = project(x0) + sqrt(sigma^2 - sigma_min^2) z, (Consistency Models, algorithm 4)."""
    seen = []

    class Spy(GaussianFlow):
        def forward(self, x, sigma, cond=None):
            seen.append(x)
            return torch.full_like(x, 3.0)

    known = torch.full((1, 3, 8, 8), -0.5)
    x = torch.zeros_like(known)
    spy = Counting(Spy(noise=Noise(0.3)))
    edit(spy, x, [2.0, 0.5], inpaint(known, MASK), Cond(), lambda k: torch.full_like(x, k))
    assert spy.seen == pytest.approx([80.0, 2.0, 0.5])
    project = inpaint(known, MASK)
    for k, sigma in ((1, 2.0), (2, 0.5)):
        expected = project(torch.ones_like(x)) + k * (sigma**2 - 0.3**2) ** 0.5
        torch.testing.assert_close(seen[k], expected)


def test_edits_that_cannot_be_are_refused_in_one_line():
    x = torch.zeros(1, 3, 8, 8)
    for sigmas in ([90.0], [1.0, 1.0], [0.001]):
        with pytest.raises(RecipeError, match="must fall between"):
            edit(GaussianFlow(), x, sigmas, colorize(x), Cond(), lambda k: x)
    with pytest.raises(DataError, match="3 channels, not 1"):
        colorize(x[:, :1])
    with pytest.raises(DataError, match="8x8 images do not divide into 3x3"):
        superres(x, 3)
