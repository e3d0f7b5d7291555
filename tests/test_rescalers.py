"""The rescaling policies: what each number scales, and that the simple ones are special cases."""

import itertools
import math

import pytest
import torch
from cmkit_std.rescalers.global_ import Global
from cmkit_std.rescalers.per_layer import PerLayer
from cmkit_std.rescalers.per_timestep import PerTimestep, interpolated
from cmkit_std.samplers.multistep import Multistep
from pydantic import ValidationError

from cmkit import DataSpec, Denoiser, RecipeError
from cmkit.denoiser import Encodings
from cmkit.search.score import encoder_rows
from cmkit.testing import check_rescaler
from tests.test_search import BACKBONES, denoiser, rms, x_and_cond

SITES = ("skip.0", "skip.1", "skip.2", "emb.0", "emb.1", "attn.0")
LEVELS = (0.5, 2.0, 80.0)


def numbers(rescaler, sigma=80.0, sites=SITES):
    """What each site is multiplied by."""
    scales = rescaler.bind(sites)(torch.tensor([sigma], dtype=torch.float64))
    return {site: round(float(scale), 12) for site, scale in scales.items()}


@pytest.mark.parametrize(
    "rescaler",
    [
        PerLayer(),
        PerLayer(skip=(0.8, 1.0), emb=1.1),
        PerLayer(sites={"emb.1": 0.0}),
        PerTimestep(sigmas=(1.0,), skip=(0.9,)),
        PerTimestep(sigmas=LEVELS, skip=(0.8, 0.9, 1.0), emb=(1.0, 1.1, 1.0)),
    ],
    ids=repr,
)
def test_both_keep_the_laws_of_their_kind(rescaler):
    check_rescaler(rescaler)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [PerLayer, lambda **own: PerTimestep(sigmas=LEVELS, **{k: (v,) * 3 for k, v in own.items()})],
    ids=["per_layer", "per_timestep"],
)
@pytest.mark.parametrize("backbone", ["as ImageNet-64", "ncsnpp"])
@torch.inference_mode()
def test_equal_numbers_everywhere_are_the_global_rescaling_bit_for_bit(policy, backbone):
    model = denoiser(BACKBONES[backbone], labels=True)
    x, cond = x_and_cond(model, labels=True)
    for skip, emb in ((0.9, 1.2), (1.0, 1.2), (1.0, 1.0)):
        expected = model.rescaled(Global(skip=skip, emb=emb))
        found = model.rescaled(policy(skip=skip, emb=emb))
        for sigma in (0.3, 2.0, 80.0):
            given = (x, x.new_full((3,), sigma), cond)
            assert torch.equal(found(*given), expected(*given)), (skip, emb, sigma)
            encodings = [Encodings(x), Encodings(x)]
            own = model.rescaled(policy(skip=skip, emb=emb), encodings[0])
            assert torch.equal(
                own(*given),
                model.rescaled(Global(skip=skip, emb=emb), encodings[1])(*given),
            )


def test_one_number_is_one_tensor_for_all_its_sites():
    """Networks embed anew wherever the next block has another tensor."""
    for rescaler in (PerLayer(emb=1.1), PerTimestep(sigmas=LEVELS, emb=(1.0, 1.1, 1.2))):
        scales = rescaler.bind(SITES)(torch.tensor([3.0]))
        assert len({id(scales[site]) for site in ("emb.0", "emb.1")}) == 1
    again = PerLayer(emb=1.1).bind(SITES)
    sigma = torch.ones(2)
    assert all(again(sigma)[site] is scale for site, scale in again(sigma).items())


def test_each_layers_number_reaches_its_site_alone():
    own = dict(zip(SITES, (0.7, 0.8, 0.9, 1.1, 1.2, 1.3), strict=True))
    listed = PerLayer(skip=(0.7, 0.8, 0.9), emb=(1.1, 1.2), sites={"attn.0": 1.3})
    assert numbers(listed) == numbers(PerLayer(sites=own)) == own
    assert numbers(PerLayer(skip=0.5, sites={"skip.1": 2.0})) == {
        **{site: 0.5 for site in SITES if site.startswith("skip")},
        **{site: 1.0 for site in SITES if not site.startswith("skip")},
        "skip.1": 2.0,
    }


@torch.inference_mode()
def test_every_layers_number_changes_the_image_and_no_two_are_the_same():
    model = denoiser()
    x, cond = x_and_cond(model)
    sigma = x.new_full((3,), 80.0)
    images = [model(x, sigma, cond)]
    for site in model.network.sites:
        images.append(model.rescaled(PerLayer(sites={site: 0.5}))(x, sigma, cond))
    for a, b in itertools.combinations(images, 2):
        assert rms(a - b) > 1e-5 * rms(a)


@pytest.mark.parametrize(
    ("rescaler", "words"),
    [
        (
            PerLayer(skip=(1.0, 1.0)),
            "2 values, but the backbone has 3 'skip' sites: skip.0 to skip.2",
        ),
        (PerLayer(emb=(1.0,) * 3), "but the backbone has 2 'emb' sites: emb.0 to emb.1"),
        (PerLayer(sites={"skip.3": 1.0}), "no 'skip.3'; it has skip.0 to skip.2, emb.0 to emb.1"),
        (PerLayer(sites={"skpi.0": 1.0}), "no 'skpi.0'"),
    ],
)
def test_layers_that_the_backbone_lacks_are_refused_with_those_it_has(rescaler, words):
    with pytest.raises(RecipeError, match=r"rescaler\.") as caught:
        rescaler.bind(SITES)
    assert words in str(caught.value)


def test_a_policy_without_its_sites_is_refused():
    for rescaler in (PerLayer(skip=0.9), PerTimestep(sigmas=(1.0, 2.0), skip=(1.0, 0.9))):
        with pytest.raises(RecipeError, match="no 'skip' sites; it has emb"):
            rescaler.bind(("emb.0",))
    PerTimestep(sigmas=(1.0, 2.0), skip=(1.0, 1.0)).bind(("emb.0",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_levels_scales_are_linear_in_the_logarithm_of_sigma(dtype):
    values = (0.7, 1.3, 0.9)
    scales = PerTimestep(sigmas=LEVELS, skip=values).bind(SITES)

    def at(*sigma):
        return scales(torch.tensor(sigma, dtype=dtype))["skip.1"]

    expected = torch.tensor(values, dtype=dtype)
    for length in (3, 24, 51):  # vectorized kernels differ from their tails by the last bit
        sigma = LEVELS * (length // 3)
        assert torch.equal(at(*sigma), expected.repeat(length // 3))
    assert at(1e-3, 0.49, 81.0, 1e4).tolist() == expected[[0, 0, 2, 2]].tolist()
    for share in (0.25, 0.5, 0.9):
        middle = math.exp((1 - share) * math.log(2) + share * math.log(80))
        expected_there = torch.tensor([1.3 - 0.4 * share], dtype=dtype)
        torch.testing.assert_close(at(middle), expected_there)
    assert at(0.0).tolist() == expected[:1].tolist()


def test_every_image_has_the_scale_of_its_own_level():
    scales = PerTimestep(sigmas=(1.0, 4.0), skip=(0.5, 1.5), emb=2.0).bind(SITES)
    found = scales(torch.tensor([0.1, 1.0, 2.0, 9.0]))
    torch.testing.assert_close(found["skip.2"], torch.tensor([0.5, 0.5, 1.0, 1.5]))
    assert found["emb.0"].tolist() == 2.0
    assert found["attn.0"].tolist() == 1.0


def test_interpolation_is_one_graph():
    sigmas, values = torch.tensor(LEVELS), torch.tensor((0.7, 1.3, 0.9))
    sigma = torch.tensor([0.7, 7.0])
    compiled = torch.compile(interpolated, backend="eager", fullgraph=True)
    assert torch.equal(compiled(sigma, sigmas, values), interpolated(sigma, sigmas, values))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigmas": (2.0, 1.0)}, "must rise"),
        ({"sigmas": (1.0, 1.0)}, "must rise"),
        ({"sigmas": (1.0, 2.0), "emb": (1.0,)}, "emb has 1 values for 2 sigmas"),
    ],
)
def test_levels_must_rise_and_each_have_a_value(fields, words):
    with pytest.raises(ValidationError, match=words):
        PerTimestep(**fields)


@torch.inference_mode()
def test_cells_that_differ_at_lower_levels_share_the_first_step_and_no_other():
    """At sigma_max their scales are equal: the encoder works once for all of them there."""
    model = denoiser(BACKBONES["ddpmpp"])
    every = [PerTimestep(sigmas=(1.0, 80.0), emb=(emb, 1.1)) for emb in (0.5, 1.0, 2.0)]
    assert encoder_rows(model, every) == [[0, 1, 2]]
    assert encoder_rows(
        model, [r.with_values({"emb.1": e}) for r, e in zip(every, (1, 2, 3.0), strict=True)]
    ) == [[0], [1], [2]]
    x, cond = x_and_cond(model)
    noise = [torch.randn_like(x) for _ in range(2)]
    encodings = Encodings(x)
    for sigmas in ((), (1.0,)):
        images = []
        for rescaler in every:
            draw = (x, cond, noise.__getitem__)
            plain = Multistep(sigmas=sigmas).sample(model.rescaled(rescaler), *draw)
            shared = Multistep(sigmas=sigmas).sample(model.rescaled(rescaler, encodings), *draw)
            assert rms(shared - plain) <= 1e-5 * rms(plain)
            images.append(shared)
        assert (rms(images[0] - images[1]) > 1e-3 * rms(images[0])) == bool(sigmas)


@pytest.mark.parametrize(
    "rescaler",
    [
        PerLayer(skip=(0.7, 0.8, 0.9), emb=1.1, sites={"emb.1": 1.2}),
        PerLayer(skip=0.7),
        PerTimestep(sigmas=LEVELS, skip=(0.7, 0.8, 0.9), emb=1.1),
    ],
    ids=repr,
)
def test_a_search_reads_the_number_that_it_set_and_no_other_moves(rescaler):
    names = ["skip.0", "skip.1", "skip.2", "emb.0", "emb.1"]
    for name in names:
        before = {other: rescaler.value_of(other) for other in names}
        moved = rescaler.with_values({name: 5.0})
        assert {other: moved.value_of(other) for other in names} == {**before, name: 5.0}
        assert rescaler.value_of(name) == before[name]
        assert moved.with_values({name: before[name]}).bind(SITES)
    assert rescaler.with_values({"skip": 2.0}).value_of("skip") == 2.0


def test_a_family_moves_the_members_that_have_no_number_of_their_own():
    moved = PerLayer(sites={"skip.1": 1.5}).with_values({"skip": 0.5, "skip.2": 0.7})
    assert [numbers(moved)[f"skip.{k}"] for k in range(3)] == [0.5, 1.5, 0.7]
    moved = PerTimestep(sigmas=(1.0, 2.0)).with_values({"emb": 0.5, "emb.1": 0.7})
    assert (moved.emb, moved.skip) == ((0.5, 0.7), 1.0)


def test_numbers_that_there_are_not_are_refused():
    for rescaler, name in (
        (Global(), "skpi"),
        (Global(), "skip.0"),
        (PerLayer(), "skpi"),
        (PerLayer(skip=(1.0, 1.0)), "skip"),
        (PerLayer(skip=(1.0, 1.0)), "skip.2"),
        (PerTimestep(sigmas=LEVELS), "skip.3"),
        (PerTimestep(sigmas=LEVELS), "sigmas"),
        (PerTimestep(sigmas=LEVELS), "sigmas.0"),
    ):
        with pytest.raises(ValueError, match=r"number|skip\.\d"):
            rescaler.value_of(name)
    with pytest.raises(ValueError, match="less than or equal to 100"):
        PerTimestep(sigmas=LEVELS).with_values({"skip.1": 1e9})


@torch.inference_mode()
def test_a_transformers_branches_have_numbers_as_its_embeddings_have():
    from cmkit_std.backbones.dit import DiT

    torch.manual_seed(0)
    network = DiT(patch_size=4, width=16, depth=2, num_heads=2).build(DataSpec(3, 16), frozenset())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = Denoiser(network).eval()
    x, cond = x_and_cond(model)
    sigma = x.new_full((3,), 80.0)
    plain = model(x, sigma, cond)
    for rescaler in (Global(), PerLayer(), PerTimestep(sigmas=LEVELS)):
        assert torch.equal(model.rescaled(rescaler)(x, sigma, cond), plain)
    for family in ("emb", "attn", "mlp"):
        one = model.rescaled(Global(**{family: 0.5}))(x, sigma, cond)
        assert rms(one - plain) > 1e-3 * rms(plain)
        count = sum(site.startswith(family) for site in network.sites)
        each = model.rescaled(PerLayer(**{family: (0.5,) * count}))(x, sigma, cond)
        levels = PerTimestep(sigmas=LEVELS, **{family: (1.0, 1.0, 0.5)})
        assert torch.equal(each, one)
        torch.testing.assert_close(model.rescaled(levels)(x, sigma, cond), one)
    for rescaler in (Global(skip=0.9), PerLayer(skip=(0.9,)), PerTimestep(sigmas=(1.0,), skip=0.9)):
        with pytest.raises(RecipeError, match="no 'skip' sites; it has attn, emb, mlp"):
            model.rescaled(rescaler)
    for rescaler in (Global(attn=0.9), PerLayer(mlp=0.9), PerTimestep(sigmas=(1.0,), attn=0.9)):
        with pytest.raises(RecipeError, match=r"no '(attn|mlp)' sites; it has emb, skip"):
            rescaler.bind(("skip.0", "emb.0"))
