"""The search's short cut gives the images of the plain path."""

from __future__ import annotations

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.rescalers.global_ import Global
from cmkit_std.samplers.multistep import Multistep
from torch import Tensor

from cmkit import Backbone, Cond, DataSpec, Denoiser
from cmkit.denoiser import Encodings
from cmkit.search.score import encoder_rows

SMALL = {"channels": 32, "channel_mult": (1, 2, 3), "num_res_blocks": 1, "num_head_channels": 16}
SONG = {"channels": 32, "channel_mult": (1, 2, 3), "num_res_blocks": 1}
BACKBONES = {
    "as ImageNet-64": ADM(**SMALL, use_scale_shift_norm=True, resblock_updown=True),
    "as LSUN-256": ADM(**SMALL, use_scale_shift_norm=False, resblock_updown=True, norm_groups=8),
    # 96 + 64 and 64 + 32 channels in groups of 10 and 6: some groups hold both halves
    "straddling groups": ADM(**SMALL, norm_groups=16),
    # 32 + 8 channels in groups of 10: no group holds skip channels alone
    "narrow skips": ADM(channels=8, channel_mult=(1, 4), num_res_blocks=1, norm_groups=4),
    "ddpmpp": SongUNet(**SONG),  # 96 + 64 channels in groups of 5
    "ncsnpp": SongUNet(
        **SONG, encoder_type="residual", embedding_type="fourier", resample_filter=(1, 3, 3, 1)
    ),
    "pictures": SongUNet(**SONG, encoder_type="skip", decoder_type="skip"),
}
BACKBONE = ADM(**SMALL)
GRID = [0.7, 0.9, 1.0, 1.1, 1.4]


def denoiser(backbone: Backbone = BACKBONE, labels: bool = False) -> Denoiser:
    """A network that no zero initialisation makes blind."""
    torch.manual_seed(0)
    data = DataSpec(3, 16, 5 if labels else None)
    network = backbone.build(data, frozenset({"label"} if labels else ()))
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return Denoiser(network.to(memory_format=torch.channels_last)).eval()


def x_and_cond(model: Denoiser, labels: bool = False) -> tuple[Tensor, Cond]:
    x = model.noise.sigma_max * torch.randn(3, 3, 16, 16)
    return x, Cond(label=torch.tensor([0, 3, 4]) if labels else None)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@torch.inference_mode()
def test_cells_that_share_the_encoder_have_the_images_of_the_plain_path(backbone):
    model = denoiser(backbone, labels=True)
    x, cond = x_and_cond(model, labels=True)
    sigma = x.new_full((3,), model.noise.sigma_max)
    encodings = Encodings(x)
    for emb in (0.9, 1.0):
        for skip in GRID:
            rescaler = Global(skip=skip, emb=emb)
            plain = model.rescaled(rescaler)(x, sigma, cond)
            shared = model.rescaled(rescaler, encodings)(x, sigma, cond)
            assert rms(shared - plain) <= 1e-5 * rms(plain), (skip, emb)


@pytest.mark.parametrize("name", ["straddling groups", "ncsnpp"])
@torch.inference_mode()
def test_groups_of_skip_channels_are_really_shared(monkeypatch, name):
    """Else the test above would compare the plain path with itself."""
    from cmkit_std.backbones import shared_encoder

    joined, original = [], shared_encoder.joined
    monkeypatch.setattr(shared_encoder, "joined", lambda *args: joined.append(1) or original(*args))
    model = denoiser(BACKBONES[name])
    x, cond = x_and_cond(model)
    model.rescaled(Global(skip=0.98), Encodings(x))(x, x.new_full((3,), 80.0), cond)
    assert len(joined) == sum(site.startswith("skip") for site in model.network.sites) > 0


@pytest.mark.parametrize("skip", [0.0, -0.5, 1e-3])
@pytest.mark.parametrize("name", ["as ImageNet-64", "ddpmpp"])
@torch.inference_mode()
def test_scales_that_a_norm_does_not_undo_take_the_plain_path(skip, name):
    model = denoiser(BACKBONES[name])
    x, cond = x_and_cond(model)
    sigma = x.new_full((3,), 80.0)
    plain = model.rescaled(Global(skip=skip))(x, sigma, cond)
    assert torch.equal(model.rescaled(Global(skip=skip), Encodings(x))(x, sigma, cond), plain)


@torch.inference_mode()
def test_one_encoding_serves_a_row_and_no_other():
    model = denoiser()
    calls = []
    model.network.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    x, cond = x_and_cond(model)
    noise = [torch.randn_like(x) for _ in range(3)]
    encodings = Encodings(x)

    def draw(sampler, **scales):
        calls.clear()
        sampler.sample(model.rescaled(Global(**scales), encodings), x, cond, noise.__getitem__)
        return len(calls)

    assert [draw(Multistep(), skip=s) for s in GRID] == [1, 0, 0, 0, 0]
    assert draw(Multistep(), emb=1.1) == 1
    assert draw(Multistep(), emb=1.1, skip=0.9) == 0
    # The second step starts from another image in each cell.
    assert draw(Multistep(sigmas=(1.0,)), emb=1.1, skip=0.8) == 1
    cond = Cond()
    assert draw(Multistep(), emb=1.1) == 0
    for level, encoded in ((1.0, 1), (1.0, 0), (2.0, 1)):
        cond = Cond(sigma_to=torch.full((len(x),), level))
        assert draw(Multistep(), emb=1.1) == encoded


def test_rows_hold_the_cells_of_one_embedding():
    model = denoiser()
    every = [Global(skip=s, emb=e) for s in GRID for e in (0.9, 1.0, 1.1)]
    rows = encoder_rows(model, every)
    assert sorted(map(len, rows)) == [5, 5, 5]
    assert sorted(index for row in rows for index in row) == list(range(15))
    assert {len({every[i].emb for i in row}) for row in rows} == {1}


def test_a_network_without_late_sites_shares_nothing():
    model = denoiser()
    model.network.late = frozenset()
    assert encoder_rows(model, [Global(), Global(skip=0.9)]) == [[0], [1]]
