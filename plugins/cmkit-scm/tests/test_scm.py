"""Laws of continuous-time consistency models, most on Gaussian data, where all is known exactly."""

import math
import sys

import pytest
import torch
from cmkit_scm import trigflow
from cmkit_scm.scm import SCM
from cmkit_scm.weight import LogWeight

import cmkit
from cmkit import Cond, Denoiser, Models, Network, Noise, Rng, testing
from cmkit.errors import RecipeError

CPU = torch.device("cpu")
S = 0.7
"""Standard deviation of the Gaussian data."""


class Tiny(Network):
    """A network that does not know the answer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(4, 1, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, c_noise, cond, scales):
        h = self.first(x) + torch.sin(4 * c_noise).view(-1, 1, 1, 1)
        return self.second(self.dropout(torch.tanh(h)))


class Attentive(Network):
    """A network with attention, of which only one of PyTorch's kernels has forward derivatives."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(1, 12)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, x, c_noise, cond, scales):
        tokens = x.flatten(2).transpose(1, 2) + c_noise.view(-1, 1, 1)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.out(h).transpose(1, 2).reshape(x.shape)


class Exact(Network):
    """F of a function D(x, sigma) = x gain(sigma), for sigma_data = 0.5."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, c_noise, cond, scales):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        total = sigma**2 + 0.25
        return (
            self.one
            * x
            * total.sqrt()
            * (self.gain(sigma) - 0.25 / total)
            / (0.5 * sigma / total.sqrt())
        )


def denoises(sigma):
    """The diffusion model of Gaussian data."""
    return S**2 / (S**2 + sigma**2)


def jumps(sigma):
    """The consistency function of Gaussian data, down to sigma = 0."""
    return S / (S**2 + sigma**2).sqrt()


def denoiser(network, noise=None):
    return Denoiser(network.double(), noise, cmkit.edm_scalings)


def models(online, teacher=None):
    return Models(online, online, teacher, companions={"weight": LogWeight().double()})


def batch(n=64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return S * torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)


def noisy(n=64):
    g = torch.Generator().manual_seed(5)
    sigma = torch.randn(n, generator=g, dtype=torch.float64).exp()
    z = torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)
    return batch(n) + sigma.view(-1, 1, 1, 1) * z, sigma, z


def rng():
    return Rng(3, "t", 0, CPU)


def loss(objective, made, x0, step=10**6):
    return objective.loss(made, x0, Cond(), objective.phase(step, 10**6), rng())


def rate(f, x, sigma, slope, h=1e-5):
    """df/dsigma of a denoiser where x moves by `slope`."""
    up = f(x + h * slope, sigma + h)
    return (up - f(x - h * slope, sigma - h)) / (2 * h)


def test_the_objective_keeps_the_laws_of_its_kind():
    testing.check_objective(SCM())
    testing.check_objective(SCM(distil=True))


def test_f_of_trigflow_is_the_edm_denoiser():
    made = denoiser(Tiny()).eval()
    x, sigma, _ = noisy()
    t = torch.atan(sigma / 0.5).view(-1, 1, 1, 1)
    f = t.cos() * (t.cos() * x) - 0.5 * t.sin() * trigflow.network(made, x, sigma, Cond())
    torch.testing.assert_close(f, made(x, sigma), rtol=1e-12, atol=1e-12)


def test_tangent_is_cos_t_times_the_rate_of_f_along_t():
    made = denoiser(Tiny()).eval()
    x, sigma, z = noisy()
    g = trigflow.tangent(made, x, sigma, z, Cond(), 1.0, "forward", rng())
    cos = torch.atan(sigma / 0.5).cos().view(-1, 1, 1, 1)
    by_t = rate(made, x, sigma, z) * 0.5 / cos**2  # dsigma/dt = sigma_data / cos^2
    torch.testing.assert_close(g, cos * by_t, rtol=1e-6, atol=1e-8)


def test_tangent_of_the_exact_flow_along_the_exact_teacher_is_zero():
    x, sigma, _ = noisy()
    flow, teacher = denoiser(Exact(jumps)), denoiser(Exact(denoises))
    slope = (x - teacher(x, sigma)) / sigma.view(-1, 1, 1, 1)
    zero = trigflow.tangent(flow, x, sigma, slope, Cond(), 1.0, "forward", rng())
    other = trigflow.tangent(teacher, x, sigma, slope, Cond(), 1.0, "forward", rng())
    assert zero.abs().max() < 1e-10 < 0.01 < other.abs().max()


def test_distillation_of_the_exact_teacher_leaves_the_exact_flow_alone():
    made = models(denoiser(Exact(jumps)), denoiser(Exact(denoises)))
    assert loss(SCM(distil=True), made, batch()).max() < 1e-16
    assert loss(SCM(), made, batch()).min() > 1e-3  # a single image's noise is not the mean of all


def test_training_on_images_leaves_the_exact_flow_alone_on_average():
    made = denoiser(Exact(jumps))
    sigma = torch.full((400_000,), 0.8, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    x0, z = S * torch.randn(2, 400_000, 1, 1, 1, generator=g, dtype=torch.float64)
    z = z / S
    x = x0 + 0.8 * z
    tangent = trigflow.tangent(made, x, sigma, z, Cond(), 1.0, "forward", rng())
    near = ((x - 1).abs() < 0.1).flatten()
    assert near.sum() > 10_000
    assert tangent[near].mean().abs() < 4 * tangent[near].std() / near.sum() ** 0.5 + 1e-3
    assert tangent[near].std() > 0.05


@pytest.mark.parametrize("prior", ["uniform", "inverse_sigma"])
def test_gradient_is_that_of_the_consistency_objective(prior):
    """d/dtheta of w(t) f . df/dt / (|g| + c), where w = 1 / (sigma_data tan t) is 1 / sigma."""
    net, x0 = Tiny().eval(), batch(8)
    made = denoiser(net)
    loss(SCM(prior=prior), models(made), x0).sum().backward()
    same = rng()
    sigma = (-1 + 1.4 * same.normal_like(x0.new_empty(8))).exp()
    z = same.normal_like(x0)
    x, column = x0 + sigma.view(-1, 1, 1, 1) * z, sigma.view(-1, 1, 1, 1)
    cos = torch.atan(column / 0.5).cos()
    with torch.no_grad():
        by_t = rate(made, x, sigma, z) * 0.5 / cos**2
    size = (cos * by_t).square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)
    inner = (made(x, sigma) * by_t / (size + 0.1) / column).flatten(1).sum(1)
    weight = 2 / 16 / (sigma if prior == "inverse_sigma" else 1)
    found = torch.autograd.grad((weight * inner).sum(), list(net.parameters()))
    for parameter, expected in zip(net.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8)


def test_without_the_unstable_term_the_gradient_is_that_of_flow_matching():
    net, x0 = Tiny().eval(), batch(8)
    made, objective = denoiser(net), SCM(warmup=10, c=1e6)
    (1e6 * loss(objective, models(made), x0, step=0)).sum().backward()
    same = rng()
    sigma = (-1 + 1.4 * same.normal_like(x0.new_empty(8))).exp()
    z = 0.5 * same.normal_like(x0)
    t = torch.atan(sigma / 0.5).view(-1, 1, 1, 1)
    error = 0.5 * trigflow.network(made, x0 + 2 * sigma.view(-1, 1, 1, 1) * z, sigma, Cond())
    error = error - (t.cos() * z - t.sin() * x0)
    flow_matching = (t.cos() ** 2 / 0.5 * error.square()).flatten(1).mean(1)
    found = torch.autograd.grad(flow_matching.sum(), list(net.parameters()))
    for parameter, expected in zip(net.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-8)


def test_unstable_term_comes_in_linearly():
    objective = SCM(warmup=8)
    assert [objective.phase(k, 100).log["tangent"] for k in (0, 2, 8, 99)] == [0, 0.25, 1, 1]
    assert SCM(warmup=0).phase(0, 100).log["tangent"] == 1
    x, sigma, z = noisy()
    made = denoiser(Tiny()).eval()
    none, half, full = (
        trigflow.tangent(made, x, sigma, z, Cond(), r, "forward", rng()) for r in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (none + full) / 2)
    assert (full - none).abs().max() > 0.01


@pytest.mark.parametrize("network", [Tiny, Attentive])
def test_forward_derivative_is_the_central_difference(network):
    made = denoiser(network()).eval()
    x, sigma, z = noisy()
    forward, difference = (
        trigflow.tangent(made, x, sigma, z, Cond(), 1.0, name, rng())
        for name in ("forward", "difference")
    )
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-6)


def test_forward_derivative_goes_through_the_unet_of_cmkit():
    registry = cmkit.discover()
    adm = registry.load("backbone", "adm")(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), time_scale=4
    )
    net = adm.build(cmkit.DataSpec(1, 8, 10), frozenset({"label"}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = denoiser(net)
    x, sigma, z = noisy(4)
    x, z = (torch.nn.functional.interpolate(i, scale_factor=2) for i in (x, z))
    cond = Cond(label=torch.arange(4))
    with torch.no_grad():
        forward, difference = (
            trigflow.tangent(made, x, sigma, z, cond, 1.0, name, rng())
            for name in ("forward", "difference")
        )
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-4)


def test_normalised_tangent_is_no_longer_than_one():
    made = models(denoiser(Tiny()))
    found = loss(SCM(), made, 100 * batch())
    assert 0.9 < found.max() < 1
    assert loss(SCM(c=1e6), made, batch()).max() < 1e-6


def test_noise_levels_stay_within_those_of_the_model():
    class Seen(Tiny):
        def forward(self, x, c_noise, cond, scales):
            levels.append((4 * c_noise).exp())
            return super().forward(x, c_noise, cond, scales)

    levels: list[torch.Tensor] = []
    made = models(denoiser(Seen(), Noise(0.3, 0.9)))
    loss(SCM(), made, batch())
    assert min(s.min() for s in levels) == pytest.approx(0.3, abs=1e-9)
    assert max(s.max() for s in levels) == pytest.approx(0.9, abs=1e-9)


def test_dropout_masks_are_the_same_in_the_tangent_and_in_the_network():
    net = Tiny().train()
    seen = []
    net.dropout.register_forward_hook(lambda module, given, out: seen.append(out == 0))
    loss(SCM(derivative="difference"), models(denoiser(net)), batch())
    assert len(seen) == 4
    assert 0.3 < seen[0].double().mean() < 0.7
    assert all(torch.equal(mask, seen[0]) for mask in seen)


def test_loss_depends_on_its_rng_alone_and_teaches_the_online_network_alone():
    teacher = denoiser(Exact(denoises))
    made = models(denoiser(Tiny()), teacher)
    first = loss(SCM(distil=True), made, batch())
    torch.rand(5)
    second = loss(SCM(distil=True), made, batch())
    assert torch.equal(first, second)
    first.sum().backward()
    assert teacher.network.one.grad is None
    assert made.online.network.second.weight.grad.abs().max() > 0


def test_a_fresh_weight_leaves_the_loss_as_it_is_without_one():
    made = models(denoiser(Tiny().eval()))
    plain = SCM(learned_weight=False)
    assert torch.equal(loss(SCM(), made, batch()), loss(plain, made, batch()))
    assert not plain.companions(cmkit.DataSpec(1, 4))


def test_features_of_the_weight_have_unit_length_and_frequencies_of_deviation_2_pi():
    """So that their learning rate means the same for any number of them (EDM2, MP-Fourier)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LogWeight(features=20_000)
    for sigma in (0.002, 0.5, 80.0):
        w = made(torch.tensor([sigma])).sum()
        (features,) = torch.autograd.grad(w, made.weight)
        assert float(features.square().sum()) == pytest.approx(1, rel=0.03)
    assert float(made.frequencies.std()) == pytest.approx(2 * math.pi, rel=0.03)
    assert float(made.phases.max()) == pytest.approx(2 * math.pi, rel=0.01)


def test_the_weight_that_is_learned_is_one_over_the_loss_of_its_noise_level():
    """d/dw (e^w L - w) = 0 at w = -ln L, where the loss is 1 + ln L."""
    torch.manual_seed(0)
    made = LogWeight().double()
    sigma = torch.logspace(-2, 1.5, 60, dtype=torch.float64)
    level = 0.3 + 0.2 * torch.sin(sigma.log())  # L(sigma)
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def total():
        optimizer.zero_grad()
        w = made(sigma)
        lost = (w.exp() * level - w).mean()
        lost.backward()
        return lost

    optimizer.step(total)
    torch.testing.assert_close(made(sigma), -level.log(), rtol=0.02, atol=0.02)
    assert float(total().detach()) == pytest.approx(float((1 + level.log()).mean()), abs=1e-3)


def test_the_weight_scales_the_gradient_of_the_network_and_is_pulled_to_minus_ln_loss():
    net = Tiny().eval()
    made, x0 = models(denoiser(net)), batch(1)
    weight = made.companions["weight"]
    (plain,) = torch.autograd.grad(loss(SCM(), made, x0), net.second.weight)
    size = float(loss(SCM(), made, x0).detach())
    seen = []
    weight.register_forward_hook(lambda module, given, w: seen.append((*given, w)))
    pulls = {}
    for wanted in (-1.0, -math.log(size), 2.0):
        loss(SCM(), made, x0)
        w = seen[-1][1]
        (features,) = torch.autograd.grad(w, weight.weight)
        with torch.no_grad():
            weight.weight.copy_(wanted * features / features.square().sum())
        total = loss(SCM(), made, x0)
        w = seen[-1][1]
        scaled, pull = torch.autograd.grad(total, [net.second.weight, w])
        assert float(w.detach()) == pytest.approx(wanted)
        torch.testing.assert_close(scaled, math.exp(wanted) * plain)
        assert float(total.detach()) == pytest.approx(math.exp(wanted) * size - wanted)
        pulls[wanted] = float(pull)
    below, optimum, above = pulls.values()
    assert below < 0 < above
    assert optimum == pytest.approx(0, abs=1e-9)


RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 32, channel_mult = [1], num_res_blocks = 1, time_scale = 4.0 }
denoiser = { precond = "edm" }
objective = { use = "scm", warmup = 2 }
train = { steps = 3, batch = 4, log_every = 1, precision = "fp32" }
"""


@pytest.fixture
def registry():
    """What cmkit finds when this package is installed."""
    from importlib.metadata import EntryPoint, entry_points

    from cmkit.plugins import register

    mine = EntryPoint("cmkit-scm", "cmkit_scm.manifest", "cmkit")
    others = [e for e in entry_points(group="cmkit") if e.value != mine.value]
    return register([*others, mine])


def plan(tmp_path, registry, *overrides):
    from cmkit import plan, recipe

    (tmp_path / "tiny.toml").write_text(RECIPE)
    return plan.plan(recipe.load(tmp_path / "tiny.toml", overrides, registry))


def test_recipe_trains_and_says_how_far_the_warm_up_is(tmp_path, registry):
    from cmkit.train import start, train

    training = start(plan(tmp_path, registry), CPU)
    steps = list(train(training))
    assert [step.log["tangent"] for step in steps] == [0, 0.5, 1]
    for log in (step.log for step in steps):
        assert math.isfinite(log["loss"])
        assert log["matching"] + log["log_weight"] == pytest.approx(log["loss"])
    assert training.tensors()["companion-weight"]["weight"].abs().max() > 0
    assert (
        "log_weight"
        not in next(
            train(start(plan(tmp_path, registry, "objective.learned_weight=false"), CPU))
        ).log
    )


def test_student_starts_as_its_diffusion_teacher_exactly_and_follows_it(tmp_path, registry):
    from safetensors.torch import save_file

    from cmkit.train import start, train

    network = start(plan(tmp_path, registry, "seed=9"), CPU).models.online.network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, tmp_path / "teacher.safetensors")
    weights = f'teacher.weights="{tmp_path / "teacher.safetensors"}"'
    given = (weights, 'denoiser.init="teacher"', "objective.distil=true")
    training = start(plan(tmp_path, registry, *given), CPU)
    x, cond = torch.randn(2, 1, 8, 8), Cond(label=torch.arange(2))
    sigma = torch.tensor([0.01, 5.0])
    online, teacher = training.models.online, training.models.teacher
    assert torch.equal(online(x, sigma, cond), teacher(x, sigma, cond))
    assert all(math.isfinite(step.log["loss"]) for step in train(training))
    assert not torch.equal(online(x, sigma, cond), teacher(x, sigma, cond))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('denoiser.precond="consistency"', 'denoiser.precond = "edm"'),
        ("objective.distil=true", "add a \\[teacher\\] table"),
        ("objective.warmup=-1", "objective.warmup"),
    ],
)
def test_recipe_that_cannot_work_is_refused(tmp_path, registry, override, message):
    with pytest.raises(RecipeError, match=message):
        plan(tmp_path, registry, override)


def test_listing_the_part_imports_no_torch():
    import subprocess

    code = (
        "import sys, cmkit_scm.manifest as m, cmkit_scm.scm as s\n"
        "m.cmkit_register(); s.SCM.model_json_schema(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
