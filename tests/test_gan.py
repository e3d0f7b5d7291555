"""Laws of the adversarial term of `ctm`: augmentation, discriminator, turns of the two networks."""

import pytest
import timm
import torch
from cmkit_std import timm_network
from cmkit_std.objectives import diffaugment
from cmkit_std.objectives.ctm import CTM, gradient_norm, last_weight
from cmkit_std.objectives.diffaugment import draw
from cmkit_std.objectives.projected_gan import Discriminator, fooling, judging
from pydantic import ValidationError
from safetensors.torch import save_file

from cmkit import CheckpointError, Cond, DataSpec, DownloadError, RecipeError, Rng, discover
from cmkit.checkpoint import latest_checkpoint, save_checkpoint
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.train import start, train
from tests.test_ctm import CTM_RECIPE, models_of
from tests.test_teacher import save_weights

CPU = torch.device("cpu")
NAMES = ("test_vit", "test_efficientnet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with random weights of small feature networks."""
    folder = tmp_path_factory.mktemp("timm")
    for name in NAMES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return folder


def rng(index=0):
    return Rng(0, "gan", index, CPU)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def images(n=6, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_augmentation_of_no_strength_is_the_identity():
    x = images()
    still = draw(x, rng(), color=0, translation=0, cutout=0)
    torch.testing.assert_close(still(x), x)
    assert torch.equal(still.cut(still.move(x)), x)


def test_augmentation_is_one_map_for_all_that_a_draw_is_given():
    """An affine one, another for each image: differences do not see what is added."""
    x, y = images(), images().flip(3)
    given = draw(x, rng())
    assert torch.equal(given(x), draw(y, rng())(x))
    torch.testing.assert_close(given(x) - given(y), given(x - y) - given(torch.zeros_like(x)))
    assert (given(x) - draw(x, rng(1))(x)).flatten(1).abs().amax(1).min() > 0.05
    shifts = list(zip(*(s.flatten().tolist() for s in draw(images(60), rng()).shift), strict=True))
    assert len(set(shifts)) > 10


def test_augmentation_is_what_its_numbers_say():
    x = images(12).double()
    given = draw(x, rng())
    rows, columns = (s.flatten().tolist() for s in given.shift)
    holes = [h.flatten().tolist() for h in given.hole]
    for k, image in enumerate(x):
        out = image + given.brightness[k]
        out = out.mean(0) + (out - out.mean(0)) * given.saturation[k]
        out = out.mean() + (out - out.mean()) * given.contrast[k]
        expected = torch.zeros_like(out)
        for row in range(16):
            for column in range(16):
                start = row + rows[k], column + columns[k]
                inside = [h[k] <= at < h[k] + 3 for h, at in zip(holes, (row, column), strict=True)]
                if all(0 <= at < 16 for at in start) and not all(inside):
                    expected[:, row, column] = out[:, *start]
        torch.testing.assert_close(given(x)[k], expected)


def test_augmentation_draws_fill_their_ranges():
    """Strengths of sony/ctm: +-0.5, x 0 .. 2, x 0.5 .. 1.5, an eighth of a side, a fifth."""
    given = draw(images(4000), rng())
    colours = (given.brightness, -0.5, 0.5), (given.saturation, 0, 2), (given.contrast, 0.5, 1.5)
    for values, low, high in colours:
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    assert given.hole_size == (3, 3)
    for shift, first in zip(given.shift, given.hole, strict=True):
        assert sorted(set(shift.flatten().tolist())) == [-2, -1, 0, 1, 2]
        assert sorted(set(first.flatten().tolist())) == list(range(-1, 15))  # centres 0 .. 15


def test_augmentation_is_differentiable():
    x = images(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(draw(x, rng()), x)


def test_hinge_losses_are_their_formulas():
    fake = [torch.tensor([[0.5, -3.0], [2.0, 0.0]]), torch.tensor([[1.0], [-0.5]])]
    real = [torch.tensor([[1.5, 0.0], [-1.0, 1.0]]), torch.tensor([[0.25], [4.0]])]
    assert fooling(fake).tolist() == [(1.25 - 1) / 2, (-1 + 0.5) / 2]
    first = ((0 + 1) / 2 + (1.5 + 0) / 2 + 0.75 + 2) / 2
    second = ((2 + 0) / 2 + (3 + 1) / 2 + 0 + 0.5) / 2
    assert judging(real, fake).tolist() == [first, second]
    certain = [torch.full((3, 4), 1.0)]
    assert judging(certain, [-certain[0]]).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def critic(files):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminator(NAMES, str(files)).train()


@pytest.fixture
def plain():
    return [lambda x: x] * 2


@pytest.mark.parametrize(("k", "name"), list(enumerate(NAMES)))
def test_features_are_four_maps_of_which_each_is_half_as_wide(critic, k, name):
    maps = critic.features[k](images(2))
    assert [tuple(m.shape[2:]) for m in maps] == [(40, 40), (20, 20), (10, 10), (5, 5)]
    assert [m.shape[1] for m in maps] == critic.features[k].channels
    fused = critic.projections[k](maps)
    assert [tuple(m.shape[1:]) for m in fused] == [
        (64, 80, 80),
        (64, 40, 40),
        (128, 20, 20),
        (256, 10, 10),
    ]


def test_each_network_judges_by_sixteen_numbers_grey_or_coloured(critic, plain):
    x = images(3)
    assert [tuple(logits.shape) for logits in critic(x, plain)] == [(3, 16), (3, 16)]
    grey = x.mean(1, keepdim=True)
    with critic.still():
        one, three = critic(grey, plain), critic(grey.repeat(1, 3, 1, 1), plain)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_networks_see_images_as_they_were_trained(critic):
    """Black and white in [-1, 1] become (0 - mean) / std and (1 - mean) / std at their size."""
    seen = []
    for features in critic.features:
        handle = features.network.register_forward_pre_hook(lambda *a: None)
        handle.remove()
        inner = features.network.forward_intermediates
        features.network.forward_intermediates = lambda x, inner=inner, **k: (
            seen.append(x),
            inner(x, **k),
        )[1]
        features(torch.full((1, 3, 8, 8), -1.0))
        del features.network.forward_intermediates
    for x, features in zip(seen, critic.features, strict=True):
        config = features.network.pretrained_cfg
        assert x.shape[1:] == tuple(config["input_size"])
        black = -torch.tensor(config["mean"]) / torch.tensor(config["std"])
        torch.testing.assert_close(x[0, :, 3, 3], black)


def test_gradients_reach_images_and_heads_and_nothing_that_is_frozen(critic, plain):
    x = images(3).requires_grad_()
    fooling(critic(x, plain)).sum().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in critic.named_parameters():
        assert (parameter.grad is not None) == name.startswith("heads.") == parameter.requires_grad
    critic.zero_grad()
    x.grad = None
    before = copied(critic)
    with critic.still():
        fooling(critic(x, plain)).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in critic.parameters())
    assert same(copied(critic), before)
    assert all(p.requires_grad for p in critic.heads.parameters())
    assert critic.training
    assert not any(module.training for each in critic.features for module in each.modules())


def test_heads_have_spectral_norm_one(critic, plain):
    critic(images(2), plain)
    weights = [m.weight.detach() for m in critic.heads.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(weights) == 2 * (5 + 4 + 3 + 2)
    for weight in weights:
        rows = weight.flatten(1)
        assert torch.linalg.eigvalsh(rows @ rows.T)[-1].sqrt() == pytest.approx(1, rel=0.1)


def test_batch_normalisation_remembers_nothing(critic, plain):
    """So that a head that is still judges as one that learns."""
    assert not [key for key in critic.heads.state_dict() if "running" in key]
    x = images(4)
    with critic.still():
        together, alone = critic(x, plain), critic(x[:2], plain)
    assert all((a[:2] - b).abs().max() > 1e-3 for a, b in zip(together, alone, strict=True))


@pytest.mark.slow
def test_a_distilled_transformer_and_its_companion_have_the_published_sizes(monkeypatch):
    """Channels and map sizes of sony/ctm's two networks, without their weights."""
    monkeypatch.setattr(timm_network, "weights_of", lambda name, *_: name)
    monkeypatch.setattr(timm_network, "read_weights", lambda path: {})
    monkeypatch.setattr(timm_network, "load_weights", lambda *arguments: None)
    with torch.device("meta"):
        made = Discriminator(CTM().gan_features, None)
        maps = [features(torch.empty(1, 3, 64, 64)) for features in made.features]
    channels = [[96, 192, 384, 768], [24, 40, 112, 320]]
    assert [[m.shape[1] for m in each] for each in maps] == channels
    assert [[m.shape[2] for m in each] for each in maps] == [[56, 28, 14, 7]] * 2
    assert made.features[0].indices == [2, 5, 8, 11]


def objective(files, **options):
    fields = {"num_sigmas": 6, "distance": "l2", "gan_weight": 1.0, "gan_features": NAMES}
    return CTM(**{**fields, "gan_weights": str(files), **options})


def with_critic(critic):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = models_of()
    made.companions = {"discriminator": critic}
    return made


def lost(made, part, step, index=0, size=4):
    x0 = torch.rand(size, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return part.loss(made, x0, Cond(), part.phase(step, 10), rng(index))


def test_the_two_networks_take_turns(files):
    part = objective(files, gan_start=3)
    turns = [part.phase(step, 10).update for step in range(9)]
    assert turns == [True, True, True, True, False, True, False, True, False]
    slow = objective(files, gan_period=3)
    assert [slow.phase(step, 10).update for step in range(6)] == [True, False, False] * 2
    assert all(CTM().phase(step, 10).update for step in range(4))


@pytest.mark.slow
def test_the_generators_turn_leaves_no_gradient_in_the_discriminator_and_the_other_way(
    files, critic
):
    made, part = with_critic(critic), objective(files)
    before = copied(critic)
    lost(made, part, 0).mean().backward()
    assert all(p.grad is not None for p in made.online.parameters())
    assert all(p.grad is None for p in critic.parameters())
    assert same(copied(critic), before)
    made.online.zero_grad(set_to_none=True)
    lost(made, part, 1).mean().backward()
    assert all(p.grad is None for p in made.online.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in critic.parameters())
    assert set(made.terms) == {"consistency", "denoising", "adversarial", "discriminator"}
    critic.zero_grad(set_to_none=True)


def test_without_or_before_its_start_the_loss_is_what_it_was(files):
    made = models_of()
    for step in (0, 1):
        plain = lost(made, CTM(num_sigmas=6, distance="l2"), step)
        assert torch.equal(lost(made, objective(files, gan_start=2), step), plain)
    assert not CTM().companions(DataSpec(1, 8))


@pytest.mark.parametrize(("share", "weight"), [(0.5, 1.0), (0.5, 3.0), (1e-3, 1.0), (50.0, 2.0)])
def test_adaptive_weight_is_the_ratio_of_gradients_within_its_bounds(
    files, critic, monkeypatch, share, weight
):
    made = with_critic(critic)
    part = objective(files, gan_weight=weight, dsm_weight=0.0, gan_features=NAMES[:1])
    last = last_weight(made.online.network)
    plain = lost(made, CTM(num_sigmas=6, distance="l2", dsm_weight=0.0), 0)
    pull = gradient_norm(plain.mean(), last)
    given = []

    def fooling(self, models, estimate, rng):
        """Of such a strength that its gradient is pull / share - 1e-4."""
        raw = estimate.flatten(1).mean(1)
        given.append(raw * (pull / share - 1e-4) / gradient_norm(raw.mean(), last))
        return given[-1]

    monkeypatch.setattr(CTM, "fooling", fooling)
    total = lost(made, part, 0)
    expected = weight * min(max(share, 0.01), 10.0) * given[-1]
    torch.testing.assert_close(total - plain, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["apart", "together", "off"])
def test_real_images_and_jumps_are_augmented_apart_or_together(files, critic, monkeypatch, augment):
    made, part = with_critic(critic), objective(files, gan_augment=augment)
    seen = []
    honest = diffaugment.Augmentation.__call__

    def noted(self, x):
        seen.append((self, x))
        return honest(self, x)

    monkeypatch.setattr(diffaugment.Augmentation, "__call__", noted)
    lost(made, part, 1)
    maps = [id(given) for given, _ in seen]
    assert len(maps) == (0 if augment == "off" else 4)
    if augment != "off":
        assert len(set(maps)) == (4 if augment == "apart" else 2)
        assert (maps[:2] == maps[2:]) == (augment == "together")
    critic.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_the_loss_depends_on_its_rng_alone(files, critic):
    made, part = with_critic(critic), objective(files)
    for step in (0, 1):
        start_from = copied(critic)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = lost(made, part, step, size=2)
        assert torch.equal(torch.get_rng_state(), state)
        critic.load_state_dict(start_from)
        torch.manual_seed(2)
        assert torch.equal(lost(made, part, step, size=2), first)
        critic.load_state_dict(start_from)
        assert not torch.equal(lost(made, part, step, index=1, size=2), first)


@pytest.fixture
def planned(tmp_path, files):
    """The plan of a recipe with an adversarial term."""
    save_weights(tmp_path / "teacher.safetensors")
    text = CTM_RECIPE.replace("WEIGHTS", str(tmp_path / "teacher.safetensors"))
    text = text.replace('objective = { use = "ctm", ', 'objective = { use = "ctm", GAN, ')
    assert "GAN" in text

    def of(*overrides, **options):
        fields = {"gan_weight": 1.0, "gan_features": ["test_efficientnet"], **options}
        fields.setdefault("gan_weights", str(files))
        lines = [f"{key} = {value!r}" for key, value in fields.items() if value is not None]
        (tmp_path / "tiny.toml").write_text(text.replace("GAN", ", ".join(lines)))
        return plan(load(tmp_path / "tiny.toml", overrides, discover()))

    return of


@pytest.mark.slow
def test_a_step_moves_one_of_the_two_networks_and_what_belongs_to_it(planned):
    training = start(planned("train.batch=4"), CPU)
    critic, models = training.models.companions["discriminator"], training.models
    denoisers = (models.online, models.target, *models.ema.values())
    before = [copied(d) for d in denoisers], copied(critic)
    for step in train(training):
        now = [copied(d) for d in denoisers], copied(critic)
        judged = step.step % 2 == 0
        moved = [not same(a, b) for a, b in zip(now[0], before[0], strict=True)]
        assert moved == [not judged] * 3
        assert same(now[1], before[1]) == (not judged)
        assert ("discriminator" in step.log) == judged
        assert ("adversarial" in step.log) == (not judged)
        before = now
    counts = {id(p): slot["step"] for p, slot in training.optimizer.state.items()}
    assert all(counts[id(p)] == 2 for p in models.online.parameters())
    assert all(counts[id(p)] == 2 for p in critic.heads.parameters())
    (_, group) = training.optimizer.param_groups
    assert (group["betas"], group["lr"]) == ((0.5, 0.9), pytest.approx(2e-3))


@pytest.mark.slow
def test_a_run_cut_between_turns_ends_in_the_same_bits(planned, tmp_path):
    made = planned("train.batch=4", "train.steps=3")
    whole = start(made, CPU)
    for step in train(whole):
        if step.step in (1, 2):
            save_checkpoint(tmp_path / str(step.step), step.step, whole.tensors(), whole.state())
    expected = whole.tensors()
    for cut in (1, 2):
        resumed = start(made, CPU)
        resumed.restore(latest_checkpoint(tmp_path / str(cut), pytest.fail))
        for _ in train(resumed):
            pass
        ends = resumed.tensors()
        assert ends.keys() == expected.keys()
        assert all(same(ends[name], expected[name]) for name in ends)
    kept = expected["companion-discriminator"]
    assert not [k for k in kept if k.startswith("features.0.network") and k.endswith("weight")]
    assert "projections.0.across_scales.0.weight" in kept


@pytest.mark.parametrize(
    ("options", "overrides", "error", "message"),
    [
        ({"gan_features": ["test_vit9"]}, [], RecipeError, "has no network 'test_vit9'"),
        (
            {"gan_features": ["test_resnet"]},
            [],
            DownloadError,
            r"huggingface.co/timm/test_resnet.r160_in1k's model.safetensors at"
            r" .*/test_resnet.safetensors, or name .* in gan_weights",
        ),
        ({}, ["train.accumulate=8"], RecipeError, r"needs 2 images at a time, not 1; raise train"),
        ({"gan_period": 1}, [], RecipeError, "gan_period.*greater than or equal to 2"),
    ],
)
def test_what_cannot_be_is_refused_before_training(planned, options, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        planned(*overrides, **options)
    assert "\n" not in str(caught.value)
    assert "tiny.toml:" in str(caught.value) or "--set" in str(caught.value)


def test_weights_that_are_missing_or_others_are_refused_before_training(planned, files, tmp_path):
    with pytest.raises(CheckpointError, match="gan_weights: test_vit = 'nowhere': no such file"):
        planned(
            'objective.gan_features=["test_vit"]', 'objective.gan_weights={ test_vit = "nowhere" }'
        )
    other = f'objective.gan_weights={{ test_efficientnet = "{files}/test_vit.safetensors" }}'
    with pytest.raises(CheckpointError, match=r"gan_weights: .*test_vit.* tensors do not fit"):
        planned(other)


@pytest.mark.slow
def test_weights_lie_in_the_users_cache_unless_the_recipe_says_where(
    planned, files, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "cmkit" / "weights" / "timm"
    with pytest.raises(DownloadError, match=str(folder)):
        planned(gan_weights=None, gan_features=["test_vit"])
    folder.mkdir(parents=True)
    (folder / "test_vit.safetensors").write_bytes((files / "test_vit.safetensors").read_bytes())
    assert planned(gan_weights=None, gan_features=["test_vit"]).memory


def test_the_discriminator_takes_pictures_alone(files):
    with pytest.raises(RecipeError, match="1 or 3 channels, not of 4"):
        objective(files).check(DataSpec(4, 32))
    with pytest.raises(ValidationError):
        CTM(gan_weight=1.0, gan_features=())
