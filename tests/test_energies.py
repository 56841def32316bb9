"""Energies of layers as distributions: against torch's own likelihoods, numeric minima, and backprop in the limit."""

import pytest
import torch
from torch import distributions, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.energies import LayerView

torch.manual_seed(0)
A = torch.randn(7, 5, dtype=torch.float64)
ROOT = torch.randn(5, 5, dtype=torch.float64)
MATRIX = ROOT @ ROOT.T + torch.eye(5, dtype=torch.float64)


def view(activation, drive=A):
    return LayerView("out", 0, drive, activation(drive), activation)


def log_likelihood_ratio(family, x, mu):
    """log p(x | mean x) - log p(x | mean mu): what an energy that is 0 at x = mu must be."""
    return family(x).log_prob(x) - family(mu).log_prob(x)


def probabilities(shape=(7, 5)):
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


CASES = {
    "bernoulli": (ebm.Bernoulli(), nn.Sigmoid(), probabilities),
    "bernoulli of a probability": (ebm.Bernoulli(), nn.Hardsigmoid(), probabilities),
    "categorical": (ebm.Categorical(), nn.Softmax(1), lambda: torch.softmax(torch.randn(7, 5).double(), 1)),
    "poisson": (ebm.Poisson(), nn.Softplus(), lambda: torch.rand(7, 5).double() * 4),
    "gaussian": (ebm.Gaussian({"out": MATRIX}), nn.Tanh(), lambda: torch.randn(7, 5).double()),
    "huber": (ebm.Huber(0.7, 1.3), nn.Tanh(), lambda: torch.randn(7, 5).double()),
    "laplace": (ebm.Huber.laplace(2.0, 1e-3), nn.Tanh(), lambda: torch.randn(7, 5).double()),
    "per layer": (ebm.PerLayer({"out": ebm.Poisson()}), nn.Softplus(), lambda: torch.rand(7, 5).double() * 4),
}


def expected(name, x, mu):
    """From torch's distributions and losses, summed over units."""
    if name.startswith("bernoulli"):
        cross = F.binary_cross_entropy(mu, x, reduction="none")
        return (cross - F.binary_cross_entropy(x, x, reduction="none")).sum(1)
    if name == "categorical":
        return F.kl_div(mu.log(), x, reduction="none").sum(1)
    if name in ("poisson", "per layer"):
        loss = lambda rate: F.poisson_nll_loss(rate, x, log_input=False, eps=0.0, reduction="none")  # noqa: E731
        return (loss(mu) - loss(x)).sum(1)
    if name == "gaussian":
        return log_likelihood_ratio(lambda m: distributions.MultivariateNormal(m, precision_matrix=MATRIX), x, mu)
    if name == "huber":
        return 1.3 * F.huber_loss(x, mu, reduction="none", delta=0.7).sum(1)
    return log_likelihood_ratio(lambda m: distributions.Laplace(m, 2.0), x, mu).sum(1)


@pytest.mark.parametrize("name", CASES)
def test_energies_are_the_log_likelihood_ratios_of_their_distributions(name):
    energy, activation, states = CASES[name]
    torch.manual_seed(1)
    x, layer = states(), view(activation)
    tolerance = {"laplace": 5 * 0.5e-3 / 2}.get(name, 1e-12)  # rounded off by delta / 2 a unit
    found = energy.layer_energy(x, layer).sum(1)
    torch.testing.assert_close(found, expected(name, x, layer.prediction), rtol=1e-12, atol=tolerance)
    assert bool((found > 0).all())


@pytest.mark.parametrize("name", CASES)
def test_every_one_is_zero_with_zero_slope_at_the_prediction(name):
    energy, activation, _ = CASES[name]
    drive = A.clone().requires_grad_()
    x = activation(A).requires_grad_()
    found = energy.layer_energy(x, view(activation, drive))
    torch.testing.assert_close(found.sum(1), torch.zeros(7).double(), rtol=0, atol=1e-12)
    slopes = torch.autograd.grad(found.sum(), [x, drive])
    slopes = energy.tangent(slopes[0], x.detach(), view(activation)), slopes[1]
    for slope in slopes:
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("huber", "laplace")])
def test_best_responses_are_where_the_slope_is_the_pull(name):
    """argmin e(x) - <pull, x>: autograd's slope of e there is the pull, along the domain."""
    energy, activation, _ = CASES[name]
    layer, pull = view(activation), 0.3 * torch.randn(7, 5).double()
    x = energy.best_response(pull, layer).detach().requires_grad_()
    torch.testing.assert_close(energy.feasible(x.detach(), layer), x.detach(), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(energy.layer_energy(x, layer).sum(), x)
    left = energy.tangent(slope - pull, x.detach(), layer)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_as_the_nudge_vanishes_the_update_is_backprop_s_to_first_order(name):
    """Hidden layers of squared errors, the output as the distribution says, nudged: error / lambda is constant."""
    energy, activation, _ = CASES[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), activation).double()
    x, y = torch.randn(3, 4).double(), torch.rand(3, 5).double()
    part = ebm.Gaussian({"3": MATRIX}) if name == "gaussian" else energy.others if name == "per layer" else energy
    mixed = ebm.PerLayer({"3": ebm.Poisson() if name == "per layer" else part})
    closure = lambda: (net(x) - y).square().sum(1).mean()  # noqa: E731
    true = ebm.reference.backprop(net, closure)
    errors = []
    strengths = (1e-5, 1e-6) if name == "laplace" else (1e-2, 1e-3)  # the nudge has to stay within delta
    for strength in strengths:
        relaxer = ebm.QuasiNewton(300, tol=1e-11, coordinates="states")
        learner = ebm.Learner(net, ebm.Algorithm(mixed, ebm.OneSided(strength), relaxer), layers=["1", "3"])
        errors.append(ebm.metrics.alignment(learner.gradients(closure), true)["relative_error"])
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.25)


def test_pixels_that_are_held_are_explained_by_their_likelihood():
    """Bernoulli output held, a Gaussian latent inferred: against L-BFGS on the written-out energy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid()).double()
    image, zeros = (torch.rand(3, 5) > 0.5).double(), torch.zeros(3, 2).double()
    z, h = torch.zeros(3, 2).double().requires_grad_(), torch.zeros(3, 6).double().requires_grad_()

    def total():
        out = net[3](h)
        pixels = F.binary_cross_entropy_with_logits(out, image, reduction="sum")
        return 0.5 * z.square().sum() + 0.5 * (h - torch.tanh(net[1](z))).square().sum() + pixels

    solver = torch.optim.LBFGS(
        [z, h], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = total()
        value.backward()
        return value

    solver.step(closure)
    relaxer = ebm.QuasiNewton(500, tol=1e-12, coordinates="states")
    algorithm = ebm.Algorithm(ebm.PerLayer({"4": ebm.Bernoulli()}), relaxer=relaxer)
    learner = ebm.Learner(net, algorithm, layers=["0", "2", "4"])
    found = learner.relax(lambda: net(zeros), clamp={"4": image}, relaxer=relaxer)
    torch.testing.assert_close(found.states["0"], z.detach(), rtol=0, atol=1e-7)  # as far as L-BFGS goes
    torch.testing.assert_close(found.states["2"], h.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.energy.sum(), total().detach(), rtol=1e-9, atol=0)  # entropy of a bit is 0


def test_what_makes_no_sense_is_refused():
    for make, message in (
        (lambda: ebm.Huber(0.0), "positive"),
        (lambda: ebm.Gaussian({"out": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}), "positive definite"),
        (lambda: ebm.PerLayer({"out": "poisson"}), "no energy"),
    ):
        with pytest.raises(ebm.ConfigurationError, match=message):
            make()
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    closure = lambda: net(torch.randn(3, 4)).square().mean()  # noqa: E731
    relaxer = ebm.GradientDescent(0.1, 5)
    for energy, message in (
        (ebm.PerLayer({"11": ebm.Huber()}), "Nearest"),
        (ebm.Gaussian({"1": torch.eye(4)}), "4 x 4"),
    ):
        with pytest.raises(ebm.ConfigurationError, match=message):
            ebm.Learner(net, ebm.Algorithm(energy, relaxer=relaxer)).gradients(closure)
    with pytest.raises(ebm.ConfigurationError, match="dimension 2"):
        ebm.Categorical().layer_energy(torch.ones(2, 3, 4), view(nn.Softmax(2), torch.ones(2, 3, 4)))
