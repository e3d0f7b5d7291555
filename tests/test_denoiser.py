import pytest
import torch
from cmkit_std.rescalers.global_ import Global

from cmkit import Denoiser, Models, Noise, Phase, RecipeError, consistency_scalings, edm_scalings
from tests.toys import TinyNetwork


@pytest.mark.parametrize("sigma_min", [0.002, 0.01, 0.3])
def test_denoiser_is_identity_at_sigma_min_bit_for_bit(sigma_min):
    denoiser = Denoiser(TinyNetwork(), Noise(sigma_min)).eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(denoiser(x, torch.full((4,), sigma_min)), x)


def test_scalings_keep_the_variance_of_data_and_of_targets():
    """EDM, appendix B.6: c_skip and c_out make the network's target have unit variance."""
    sigma, s = torch.logspace(-2, 2, 9, dtype=torch.float64), 0.5
    c_skip, c_out, *_ = edm_scalings(sigma, s, 0.002)
    target_variance = ((1 - c_skip) ** 2 * s**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones_like(sigma))


def test_consistency_scalings_approach_edm_far_above_sigma_min():
    sigma = torch.tensor([80.0], dtype=torch.float64)
    for ours, edm in zip(
        consistency_scalings(sigma, 0.5, 1e-9), edm_scalings(sigma, 0.5, 0), strict=True
    ):
        torch.testing.assert_close(ours, edm)


def test_denoiser_is_its_formula():
    """c_skip x + c_out F(c_in x, ln(sigma) / 4) with every factor written out."""
    network = TinyNetwork().double().eval()
    x, sigma = torch.randn(3, 1, 8, 8).double(), torch.tensor([0.01, 1.0, 80.0]).double()
    s, eps = 0.6, 0.002
    per_image = sigma.view(-1, 1, 1, 1)
    f = network(x / (per_image**2 + s**2).sqrt(), sigma.log() / 4, None, {})
    expected = (
        s**2 / ((per_image - eps) ** 2 + s**2) * x
        + s * (per_image - eps) / (per_image**2 + s**2).sqrt() * f
    )
    got = Denoiser(network, Noise(eps), consistency_scalings, s)(x, sigma)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_rescaling_shares_weights_and_leaves_the_original_alone():
    denoiser = Denoiser(TinyNetwork()).eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    plain = denoiser(x, sigma)
    scaled = denoiser.rescaled(Global(skip=0.5, emb=1.5))
    assert not torch.equal(scaled(x, sigma), plain)
    assert torch.equal(denoiser(x, sigma), plain)
    assert torch.equal(scaled.rescaled(Global())(x, sigma), plain)
    assert scaled.network is denoiser.network


def test_update_moves_each_copy_by_its_own_decay():
    online, target, averaged = (Denoiser(TinyNetwork()) for _ in range(3))
    before = [p.clone() for p in target.parameters()], [p.clone() for p in averaged.parameters()]
    models = Models(online, target, ema={0.9: averaged})
    models.update(Phase(step=0, target_ema=0.25))
    for copies, decay, old in ((target, 0.25, before[0]), (averaged, 0.9, before[1])):
        for p, q, o in zip(copies.parameters(), online.parameters(), old, strict=True):
            torch.testing.assert_close(p, decay * o + (1 - decay) * q)


def test_ema_warmup_caps_the_decay():
    online, averaged = Denoiser(TinyNetwork()), Denoiser(TinyNetwork())
    old = [p.clone() for p in averaged.parameters()]
    Models(online, online, ema={0.999: averaged}, ema_warmup=True).update(Phase(step=0))
    for p, q, o in zip(averaged.parameters(), online.parameters(), old, strict=True):
        torch.testing.assert_close(p, 0.1 * o + 0.9 * q)


def test_global_rescaling_gives_skip_to_skips_and_emb_to_embeddings():
    scales = Global(skip=0.8, emb=1.36).bind(("skip.0", "skip.1", "emb.0"))(torch.ones(3))
    assert {site: round(float(value), 6) for site, value in scales.items()} == {
        "skip.0": 0.8,
        "skip.1": 0.8,
        "emb.0": 1.36,
    }


def test_a_scale_without_a_site_is_refused_and_one_is_not():
    Global().bind(("emb.0",))
    with pytest.raises(
        RecipeError, match=r"rescaler\.skip = 0\.8: the backbone has no 'skip' sites"
    ):
        Global(skip=0.8).bind(("emb.0",))
