import numpy as np
import pytest
import torch

from cmkit import Noise, Rng, image_labels, image_noise, shared_dropout


def test_grid_is_edm_equation_5_rising():
    noise = Noise(0.002, 80.0, 7.0)
    n = 40
    i = np.arange(n)
    falling = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = noise.sigmas(n, dtype=torch.float64)
    np.testing.assert_allclose(grid.numpy(), falling[::-1], rtol=1e-12)
    assert grid[0] == 0.002
    assert grid[-1] == 80.0


def test_grid_refuses_fewer_than_two_points():
    with pytest.raises(ValueError, match="at least 2"):
        Noise().sigmas(1)


def test_image_noise_depends_on_the_index_alone():
    together = image_noise(3, "sample", range(8), 0, (2, 4, 4))
    alone = torch.cat([image_noise(3, "sample", [i], 0, (2, 4, 4)) for i in range(8)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("change", [{"seed": 4}, {"purpose": "x"}, {"draw": 1}, {"indices": [1]}])
def test_image_noise_depends_on_each_of_seed_purpose_index_and_draw(change):
    base = {"seed": 3, "purpose": "sample", "indices": [0], "draw": 0, "shape": (1, 4, 4)}
    assert not torch.equal(image_noise(**base), image_noise(**{**base, **change}))


def test_image_noise_is_standard_normal():
    z = image_noise(0, "law", range(200), 0, (3, 16, 16)).double()
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1


def test_labels_cover_every_class_and_depend_on_the_index_alone():
    labels = image_labels(0, "sample", range(300), 10)
    assert set(labels.tolist()) == set(range(10))
    assert labels[17] == image_labels(0, "sample", [17], 10)[0]


@pytest.mark.parametrize("counts", [(90, 10), (1,) * 10, (1, 0, 999_999), (7, 3, 3, 1, 50, 2) * 30])
def test_labels_have_the_proportions_of_the_data_in_every_prefix(counts):
    """Within 4 of a thousand, where independent draws are 15 off."""
    share = np.array(counts) / sum(counts)
    for seed in range(5):
        labels = image_labels(seed, "sample", range(1000), len(counts), counts).numpy()
        found = np.cumsum(np.eye(len(counts))[labels], axis=0)
        assert np.abs(found - share * np.arange(1, 1001)[:, None]).max() < 4
        some = image_labels(seed, "sample", [17, 3, 999_999_999], len(counts), counts)
        assert some[:2].tolist() == labels[[17, 3]].tolist()
    other = [image_labels(s, p, range(99), 2, (1, 1)) for s, p in ((0, "a"), (1, "a"), (0, "b"))]
    assert len({tuple(labels.tolist()) for labels in other}) == 3


def test_uniform_labels_are_drawn_as_ever():
    assert image_labels(3, "sample", range(12), 10).tolist() == [
        *(7, 4, 9, 1, 2, 6),
        *(8, 2, 0, 7, 8, 7),
    ]


def test_rng_repeats_itself_and_ignores_the_global_generator():
    def draw(index):
        rng = Rng(1, "train", index, torch.device("cpu"))
        return torch.cat([rng.normal_like(torch.empty(5)), rng.uniform(5), rng.integers(9, 5)])

    first = draw(7)
    torch.manual_seed(123)
    assert torch.equal(first, draw(7))
    assert not torch.equal(first, draw(8))


def test_choice_follows_its_weights():
    rng = Rng(1, "train", 0, torch.device("cpu"))
    counts = torch.bincount(rng.choice(torch.tensor([1.0, 0.0, 3.0]), 40_000), minlength=3)
    assert counts[1] == 0
    assert abs(counts[2] / 40_000 - 0.75) < 0.01


def test_shared_dropout_gives_the_same_masks_and_leaves_the_global_generator_alone():
    dropout, x = torch.nn.Dropout(0.5), torch.ones(64)
    rng, other = (Rng(0, "train", i, torch.device("cpu")) for i in (0, 1))
    before = torch.random.get_rng_state()
    masks = []
    for source in (rng, rng, other):
        with shared_dropout(source):
            masks.append(dropout(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_numbers_for_python_are_drawn_on_the_cpu_without_moving_the_other_draws():
    rng = Rng(1, "train", 0, torch.device("cpu"))
    assert rng.host is rng
    rng.device = torch.device("cuda")  # as on a GPU, but for the generator
    other = Rng(1, "train", 0, torch.device("cpu"))
    del rng.__dict__["host"]
    draw = rng.host.uniform(3)
    assert draw.device.type == "cpu"
    assert torch.equal(rng.host.uniform(3), Rng(1, "train/host", 0, draw.device).uniform(6)[3:])
    assert torch.equal(rng._generator.get_state(), other._generator.get_state())
