"""A user's own energy, in a few lines, through every phase: also one whose free equilibrium is not the forward pass."""

import json

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class LinearHopfield(ebm.Energy):
    """e = 1/2 |x|^2 - <x, a>: symmetric connections, so that layers above pull on those below in the free phase too."""

    def layer_energy(self, state, layer):
        return 0.5 * state.square() - state * layer.drive


class Cosh(ebm.Energy):
    """A divergence that is no quadratic: e = log cosh(x - rho(a))."""

    divergence = True

    def layer_energy(self, state, layer):
        return torch.log(torch.cosh(state - layer.prediction))


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    for p in net.parameters():
        p.data *= 0.6
    return net


def implicit_gradient(net: nn.Sequential) -> dict[str, torch.Tensor]:
    """d loss(x_bar(theta)) / d theta, with x_bar the minimum of the quadratic energy, by solving the linear system."""
    w1, b1, w2, b2, w3, b3 = net.parameters()
    # dE/dx1 = x1 - a1 - W2' x2 = 0;  dE/dx2 = x2 - W2 x1 - b2 = 0
    a1 = X @ w1.T + b1
    matrix = torch.eye(6, dtype=torch.float64) - w2.T @ w2
    x1 = torch.linalg.solve(matrix, (a1 + (b2 @ w2)).T).T
    x2 = x1 @ w2.T + b2
    loss = 0.5 * (x2 @ w3.T + b3 - Y).square().sum(1).mean()
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, [w1, b1, w2, b2, w3, b3]), strict=True))


def test_a_hopfield_energy_learns_by_the_contrast_of_two_relaxed_phases():
    """EP theorem (theory P2): one-sided off by O(lambda), centred by O(lambda^2), from the *implicit* gradient."""
    net = make_net()
    # the loss is of the read-out at the free equilibrium, which forward passes never see
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    true = implicit_gradient(net)
    relaxer = ebm.GradientDescent(lr=0.3, max_steps=600)

    def error(nudge):
        algorithm = ebm.Algorithm(LinearHopfield(), nudge, relaxer)
        learner = ebm.Learner(net, algorithm, layers=nn.Linear)
        found = learner.gradients(closure)
        assert learner.report["phases"][0]["nudge"] == 0.0
        return ebm.metrics.alignment(found, true)["relative_error"]

    assert error(ebm.OneSided(1e-2)) / error(ebm.OneSided(1e-3)) == pytest.approx(10, rel=0.05)
    assert error(ebm.Centered(1e-1)) / error(ebm.Centered(1e-2)) == pytest.approx(100, rel=0.1)
    assert error(ebm.Centered(1e-3)) < 1e-6
    # and it is not the feed-forward gradient
    forward = ebm.reference.backprop(net, closure)
    assert ebm.metrics.alignment(true, forward)["relative_error"] > 0.05


def test_starting_the_free_phase_from_zeros_reaches_the_same_equilibrium():
    net = make_net()
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    parts = {"nudge": ebm.Centered(1e-2), "relaxer": ebm.GradientDescent(lr=0.3, max_steps=600)}
    starts = [ebm.Algorithm(LinearHopfield(), initial_state=start, **parts) for start in ("forward", "zeros")]
    found = [ebm.Learner(net, algorithm, layers=nn.Linear).gradients(closure) for algorithm in starts]
    assert ebm.metrics.alignment(*found)["relative_error"] < 1e-9


def test_any_divergence_gives_backprop_in_the_limit():
    """Theory P3, P4: a single phase, whatever the shape of the divergence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    closure = lambda: (net(X) - Y).square().mean()  # noqa: E731
    true = ebm.reference.backprop(net, closure)

    def error(strength):
        algorithm = ebm.Algorithm(Cosh(), ebm.OneSided(strength), ebm.GradientDescent(lr=0.3, max_steps=400))
        return ebm.metrics.alignment(ebm.Learner(net, algorithm).gradients(closure), true)["relative_error"]

    assert error(1e-2) / error(1e-3) == pytest.approx(10, rel=0.1)
    assert error(1e-4) < 1e-3


def test_the_report_is_plain_json_and_its_energies_are_those_of_the_phases():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    closure = lambda: 0.5 * (net(X) - Y).square().sum()  # noqa: E731
    learner = ebm.Learner(net, "predictive-coding", loss_reduction="sum")
    learner.backward(closure)
    report = json.loads(json.dumps(learner.report))
    # one hidden layer and a linear read-out: E* = min_e 1/2 |e|^2 + 1/2 |r - W e|^2 = 1/2 r' (1 + W W')^-1 r
    with torch.no_grad():
        r = Y - net(X)
        w = net[2].weight
        expected = 0.5 * torch.einsum("bi,ij,bj->", r, torch.linalg.inv(torch.eye(3).double() + w @ w.T), r)
    assert report["energy_nudged"] == pytest.approx(float(expected), rel=1e-5)
    assert report["energy_free"] == 0
    assert report["loss"] == pytest.approx(float(closure()))
    assert report["result"] == "converged"
    assert len(report["residual"]) == 5
    energies = report["phases"][0]["energies"]
    assert energies[0] == pytest.approx(report["loss"])
    assert energies == sorted(energies, reverse=True)
