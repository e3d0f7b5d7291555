"""Codecs keep the laws of their kind, and give the latents that diffusers' pipelines use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cmkit_latent import patches
from cmkit_latent.autoencoder import Autoencoder
from cmkit_latent.patches import Patches
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import tiny_sd, tiny_sdxl, tiny_vae

import cmkit
from cmkit import DataSpec, testing

CPU = torch.device("cpu")
SMALL = DataSpec(3, 16)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def vae(sd, tmp_path):
    """A copy of an autoencoder's folder, to be spoilt."""
    return shutil.copytree(sd / "vae", tmp_path / "vae")


@pytest.fixture(scope="module")
def small_tiny(tmp_path_factory):
    """The folder of an AutoencoderTiny, whose latents are a quarter as wide as its images."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8), (1, 1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).save_pretrained(folder)
    return folder


def images(count=3, data=SMALL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, data.channels, data.resolution, data.resolution)
    return torch.rand(shape, generator=generator) * 2 - 1


def changed(folder, **values):
    """The configuration of the model in `folder`, changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))
    return folder


def test_the_autoencoders_keep_the_laws_of_a_codec(sd, small_tiny):
    testing.check_codec(Autoencoder(weights=str(sd)), SMALL)
    testing.check_codec(Autoencoder(weights=str(sd / "vae"), dtype="bf16", batch=2), SMALL)
    testing.check_codec(Autoencoder(weights=str(small_tiny)), SMALL)


@pytest.mark.parametrize(
    ("options", "data", "loss"),
    [
        ({}, DataSpec(3, 16), 0.5),
        ({"components": 48}, DataSpec(3, 16), 1e-6),
        ({"patch": 2, "components": 12}, DataSpec(3, 8, 10), 1e-6),
        ({"patch": 3, "channels": 1, "components": 9}, DataSpec(1, 9), 1e-6),
        ({"patch": 1, "components": 3}, DataSpec(3, 8), 1e-6),
    ],
)
def test_patches_keep_the_laws_of_a_codec(options, data, loss):
    testing.check_codec(Patches(**options), data, loss=loss)


def test_latents_are_the_posterior_times_the_scaling_factor(sd):
    coder, x0 = Autoencoder(weights=str(sd)).load(CPU), images()
    with torch.no_grad():
        posterior = coder.vae.encode(x0).latent_dist
    mean, std = coder.encode(x0)
    assert coder.vae.config.scaling_factor == 0.18215
    assert torch.equal(mean, posterior.mean * 0.18215)
    assert torch.allclose(std, posterior.std * 0.18215, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl with mean and std"])
def test_pictures_of_latents_are_those_of_the_pipelines(name, sd, sdxl, tmp_path):
    """The same latents, decoded by a whole pipeline and by the codec."""
    from diffusers import DiffusionPipeline

    folder = sd
    if name != "sd":
        folder = shutil.copytree(sdxl, tmp_path / "pipeline")
    if name == "sdxl with mean and std":
        mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]
        changed(folder / "vae", latents_mean=mean, latents_std=std)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(kind):
        generator = torch.Generator().manual_seed(1)
        return pipeline(
            "a frog", num_inference_steps=2, output_type=kind, generator=generator
        ).images

    coder = Autoencoder(weights=str(folder)).load(CPU)
    ours = coder.decode(drawn("latent"))
    assert torch.allclose(ours.clamp(-1, 1), drawn("pt") * 2 - 1, atol=1e-5)
    assert ours.std() > 0.05
    z = coder.encode(images())[0]
    scale, shift = coder.scale, coder.shift
    with torch.no_grad():
        raw = coder.vae.encode(images()).latent_dist.mean
    assert torch.allclose(z / scale + shift, raw, atol=1e-5)


def test_tiny_autoencoders_have_latents_that_are_not_drawn(small_tiny):
    coder = Autoencoder(weights=str(small_tiny)).load(CPU)
    mean, std = coder.encode(images())
    assert std is None
    with torch.no_grad():
        assert torch.equal(mean, coder.vae.encode(images()).latents)
    assert Autoencoder(weights=str(small_tiny)).spec(SMALL) == DataSpec(4, 4)


def test_a_shift_is_taken_off_before_the_scale(vae):
    plain = Autoencoder(weights=str(vae)).load(CPU)
    z = plain.encode(images())[0]
    shifted = Autoencoder(weights=str(changed(vae, shift_factor=0.25))).load(CPU)
    mean = shifted.encode(images())[0]
    assert torch.allclose(mean, z - 0.25 * 0.18215, atol=1e-6)
    assert torch.allclose(shifted.decode(mean), plain.decode(z), atol=1e-5)


def test_the_shape_keeps_what_is_known_beside_and_reads_no_weights(vae):
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    data = DataSpec(3, 32, 2, ("a", "b"), (5, 6), cmkit.TextSpec(4, 8))
    latents = Autoencoder(weights=str(vae)).spec(data)
    assert latents == replace(data, channels=4, resolution=16)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSpec(1, 16), "takes images of 3 channels, and the data set's have 1"),
        (DataSpec(3, 17), "set dataset.resolution = 16"),
        (DataSpec(3, 1), "set dataset.resolution = 2"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_the_nearest_number(sd, data, said):
    with pytest.raises(cmkit.RecipeError, match=said):
        Autoencoder(weights=str(sd)).spec(data)


@pytest.mark.parametrize("data", [DataSpec(3, 32), DataSpec(1, 9), DataSpec(3, 7)])
def test_patches_stand_in_for_an_autoencoder_in_smoke_runs(data):
    table = dict(Autoencoder(weights="hub:owner/model").smallest(data))
    assert table.pop("use") == "patches"
    testing.check_codec(Patches(**table), data)


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_half_precision_is_refused_by_name(name):
    with pytest.raises(ValidationError, match="NaN in fp16; use fp32 or bf16"):
        Autoencoder(weights="x", dtype=name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda vae: changed(vae, _class_name="VQModel"), "'VQModel'.*AutoencoderKL"),
        (lambda vae: (vae / "config.json").unlink(), "config.json: No such file"),
        (lambda vae: (vae / "config.json").write_text("{"), "config.json: damaged"),
        (lambda vae: shutil.rmtree(vae), "no such folder"),
        (lambda vae: cut(vae), "diffusion_pytorch_model|fetch or save it again"),
        (lambda vae: without_a_tensor(vae), "missing tensors: decoder.conv_in.bias"),
        (lambda vae: pickled(vae), "only diffusion_pytorch_model.bin, a pickle"),
        (lambda vae: changed(vae, latent_channels=8), "fetch or save it again"),
    ],
)
def test_a_spoilt_folder_is_told_in_one_line(vae, spoil, said):
    spoil(vae)
    codec = Autoencoder(weights=str(vae))
    with pytest.raises(cmkit.CheckpointError, match=said) as caught:
        _ = codec.spec(SMALL), codec.load(CPU)
    assert "\n" not in str(caught.value)


def weights_in(vae):
    return vae / "diffusion_pytorch_model.safetensors"


def cut(vae):
    weights_in(vae).write_bytes(weights_in(vae).read_bytes()[:-100])


def without_a_tensor(vae):
    found = load_file(weights_in(vae))
    del found["decoder.conv_in.bias"]
    save_file(found, weights_in(vae))


def pickled(vae):
    weights_in(vae).rename(vae / "diffusion_pytorch_model.bin")


def test_its_identity_is_that_of_what_is_read(vae):
    codec = Autoencoder(weights=str(vae))
    first = codec.identity()
    (vae / "README.md").write_text("no part of it")
    assert codec.identity() == first
    found = load_file(weights_in(vae))
    found["decoder.conv_in.bias"] += 1
    save_file(found, weights_in(vae))
    second = codec.identity()
    assert second != first
    changed(vae, scaling_factor=0.2)
    assert codec.identity() not in (first, second)


def test_weights_that_are_there_in_half_precision_alone_are_read(vae):
    coder = Autoencoder(weights=str(vae)).load(CPU)
    half = {name: value.half() for name, value in load_file(weights_in(vae)).items()}
    save_file(half, vae / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(
        Autoencoder(weights=str(vae)).load(CPU).encode(images())[0], coder.encode(images())[0]
    )
    weights_in(vae).unlink()
    from_half = Autoencoder(weights=str(vae)).load(CPU)
    assert from_half.vae.dtype == torch.float32
    assert torch.allclose(
        from_half.decode(torch.zeros(1, 4, 8, 8)), coder.decode(torch.zeros(1, 4, 8, 8)), atol=1e-2
    )


def test_no_more_images_than_said_are_encoded_at_once(sd):
    coder = Autoencoder(weights=str(sd), batch=2).load(CPU)
    seen, decode = [], coder.vae.decode

    def watched(z):
        seen.append(len(z))
        return decode(z)

    coder.vae.decode = watched
    assert len(coder.decode(torch.zeros(5, 4, 8, 8))) == 5
    assert seen == [2, 2, 1]


def test_tiles_change_large_images_a_little(tmp_path):
    tiny_vae(sample_size=32).save_pretrained(tmp_path)
    data = DataSpec(3, 64)
    whole, tiled = (
        Autoencoder(weights=str(tmp_path), tiling=tiling).load(CPU).encode(images(1, data))[0]
        for tiling in (False, True)
    )
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).std() < 0.5 * whole.std()


def test_cosines_are_orthonormal_and_begin_with_the_mean_of_all_colours():
    from cmkit_latent.coders import cosines

    found = cosines(3, 4, 48)
    basis = found["components"].flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(48), atol=1e-6)
    assert torch.allclose(basis[0], torch.full((48,), 48**-0.5), atol=1e-6)
    assert (found["std"].diff() <= 1e-6).all()
    grey = [bool(torch.allclose(one[0], one[1], atol=1e-6)) for one in found["components"][:4]]
    assert sum(grey) >= 3  # brightness varies more than colour


def test_latents_of_smooth_pictures_have_a_standard_deviation_of_about_one():
    """Of pictures whose neighbouring pixels correlate by 0.95 and colours by 0.9, as supposed."""
    torch.manual_seed(0)
    steps = torch.arange(16)
    space = torch.linalg.cholesky(0.95 ** (steps[:, None] - steps).abs().double())
    colour = torch.linalg.cholesky(0.9 + 0.1 * torch.eye(3).double())
    z = torch.randn(500, 3, 16, 16, dtype=torch.float64)
    x0 = 0.5 * torch.einsum("cC,iI,jJ,bCIJ->bcij", colour, space, space, z).float()
    std = Patches(components=48).load(CPU).encode(x0)[0].std(dim=(0, 2, 3))
    assert ((std > 0.85) & (std < 1.15)).all()


def test_fitted_components_are_whitened_and_lose_less(tmp_path):
    torch.manual_seed(0)
    mixed = torch.nn.functional.conv2d(torch.randn(200, 3, 18, 18), torch.randn(3, 3, 3, 3))
    x0 = (0.1 * mixed + 0.3).clamp(-1, 1)
    patches.save(patches.fit(x0, patch=4, components=12), tmp_path / "fitted.safetensors")
    codec = Patches(weights=str(tmp_path / "fitted.safetensors"), components=12)
    coder = codec.load(CPU)
    z = coder.encode(x0)[0]
    assert torch.allclose(z.mean(dim=(0, 2, 3)), torch.zeros(12), atol=1e-3)
    assert torch.allclose(z.std(dim=(0, 2, 3)), torch.ones(12), atol=1e-3)
    lost = (coder.decode(z) - x0).square().mean()
    plain = Patches(components=12).load(CPU)
    assert lost < 0.7 * (plain.decode(plain.encode(x0)[0]) - x0).square().mean()
    testing.check_codec(codec, DataSpec(3, 16))
    few = Patches(weights=codec.weights, components=5).load(CPU)
    assert torch.equal(few.encode(x0)[0], z[:, :5])
    assert Patches().identity() == {} != codec.identity()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"components": 49}, "set codec.components = 48"),
        ({"patch": 3}, "set dataset.resolution = 15"),
        ({"channels": 1}, "set codec.channels = 3"),
        ({"weights": "few", "components": 8}, "set codec.components = 5"),
        ({"weights": "few", "patch": 8, "components": 5}, "set codec.patch = 4"),
    ],
)
def test_patches_that_do_not_fit_are_refused_with_the_number_that_does(options, said, tmp_path):
    if "weights" in options:
        path = tmp_path / "few.safetensors"
        patches.save(patches.fit(images(8), patch=4, components=5), path)
        options = {**options, "weights": str(path)}
    with pytest.raises(cmkit.RecipeError, match=said):
        Patches(**options).spec(SMALL)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"other": torch.zeros(2)}, "holds other; name a file of mean, components, std"),
        (
            {
                "mean": torch.zeros(3, 4, 4),
                "components": torch.zeros(5, 3, 4, 4),
                "std": torch.ones(4),
            },
            "do not agree",
        ),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_fit_is_told_in_one_line(content, said, tmp_path):
    if content:
        save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(cmkit.CheckpointError, match=said):
        Patches(weights=str(tmp_path / "x.safetensors"), components=4).spec(SMALL)


SHAPES = """
import sys, json
sys.path[:] = json.loads(sys.argv[1])
from cmkit import DataSpec
from cmkit_latent.autoencoder import Autoencoder
from cmkit_latent.clip import Clip
from cmkit_latent.patches import Patches
from cmkit_latent.sentence import Sentence
print(Autoencoder(weights=sys.argv[2]).spec(DataSpec(3, 16)), Clip(weights=sys.argv[2]).spec())
print(Patches().spec(DataSpec(3, 16)))
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_shapes_are_known_without_torch_and_its_libraries(sd):
    words = [sys.executable, "-c", SHAPES, json.dumps(sys.path), str(sd)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
