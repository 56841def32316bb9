"""Losses of what lies in a domain, probabilities and covariances: states may be tried outside of it, and end inside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

torch.manual_seed(0)
X = torch.randn(8, 6, dtype=torch.float64)
Y = torch.randint(0, 2, (8, 4), dtype=torch.float64)
WEIGHT = torch.rand(8, 4, dtype=torch.float64) + 0.5
LOSSES = {
    "mean": lambda p: F.binary_cross_entropy(p, Y),
    "sum": lambda p: F.binary_cross_entropy(p, Y, reduction="sum") / 8,
    "elements": lambda p: F.binary_cross_entropy(p, Y, reduction="none").sum(1).mean(),
    "weighted": lambda p: F.binary_cross_entropy(p, Y, weight=WEIGHT, reduction="none").mean(1).mean(),
    "by hand": lambda p: -(Y * torch.log(p) + (1 - Y) * torch.log(1 - p)).sum(1).mean(),
}
FACTORS = {"mean": 0.25, "sum": 1.0, "elements": 1.0, "weighted": 0.25 * WEIGHT, "by hand": 1.0}


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.Sigmoid()).double()


def equilibrium(p: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """`e + strength dBCE/dp (p + e) = 0` of every element, by bisection: between -p and 1 - p it grows throughout."""
    low, high = -p, 1 - p
    for _ in range(200):
        e = (low + high) / 2
        above = e + strength * (p + e - Y) / ((p + e) * (1 - p - e)) > 0
        low, high = torch.where(above, low, e), torch.where(above, e, high)
    return (low + high) / 2


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lam", [0.2, 0.02])
def test_a_state_at_the_sigmoid_ends_where_the_loss_of_probabilities_balances_it(loss, lam, capture):
    net = perceptron()
    relaxer = ebm.ErrorCoordinates(max_steps=2000, tol=1e-10)
    rule = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(lam), relaxer=relaxer)
    learner = ebm.Learner(net, rule, output="state", capture=capture)
    found = learner.gradients(lambda: LOSSES[loss](net(X)))
    for _ in range(2):  # the second of which is code
        found = learner.gradients(lambda: LOSSES[loss](net(X)))
    p = net(X).detach()
    e = equilibrium(p, lam * FACTORS[loss] * torch.ones_like(p))
    assert learner.report["result"] == "converged"
    drive = -e * p * (1 - p) / (8 * lam)
    torch.testing.assert_close(found["0.weight"], drive.T @ X, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["0.bias"], drive.sum(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rarely", [False, True])
@pytest.mark.parametrize("loss", ["sum", "elements", "by hand"])
def test_an_energy_that_falls_as_far_as_the_border_has_no_kink_there(loss, rarely, monkeypatch, caplog):
    """At lambda = 1 the optimum of some elements is p = 1, where a force is left: short of it nothing has settled."""
    monkeypatch.setattr("lightning_ebm.network.network.runs_behind", lambda device: rarely)
    net = perceptron()
    p = net(X).detach()
    border = torch.where(Y > 0, 1 - p, -p)
    assert (equilibrium(p, torch.ones_like(p)) - border).abs().min() < 1e-9
    rule = ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=2000, tol=1e-10))
    learner = ebm.Learner(net, rule, output="state")
    learner.gradients(lambda: LOSSES[loss](net(X)))
    assert learner.report["result"] in ("stalled", "max_steps")
    assert learner.report["phases"][0]["gain_left"] is None
    assert "smaller nudge" in caplog.text


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_trains_what_ends_in_a_sigmoid(loss):
    """As discriminators and autoencoders do, for which torch's own loss raises outside of [0, 1]."""
    ends = []
    for ours in (False, True):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 4), nn.Sigmoid()).double()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        learner = ebm.Learner(net)
        first = float(LOSSES[loss](net(X)))
        for _ in range(60):
            optimizer.zero_grad()
            if ours:
                learner.backward(lambda net=net: LOSSES[loss](net(X)))
            else:
                LOSSES[loss](net(X)).backward()
            optimizer.step()
        ends.append(float(LOSSES[loss](net(X))))
    assert ends[0] < 0.5 * first
    assert ends[1] < ends[0] + 0.1 * first


def spread(net, how):
    """Gaussian likelihood under a covariance that a layer gives."""
    covariance = net(X).unflatten(1, (2, 2))
    covariance = (covariance + covariance.mT) / 2 + 1.5 * torch.eye(2, dtype=torch.float64)
    y = Y[:, :2, None]
    if how == "cholesky":
        factor = torch.linalg.cholesky(covariance)
        z = torch.linalg.solve_triangular(factor, y, upper=False)
        return (factor.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * z.square().sum((1, 2))).mean()
    solved = torch.linalg.solve(covariance, y) if how == "solve" else torch.linalg.inv(covariance) @ y
    return (0.5 * torch.logdet(covariance) + 0.5 * (y * solved).sum((1, 2))).mean()


@pytest.mark.parametrize("how", ["cholesky", "solve", "inv"])
def test_a_state_that_is_a_covariance_ends_where_it_is_one(how):
    """All ways are one function, of which only some raise outside of its domain."""
    found = {}
    for way in ("cholesky", how):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
        relaxer = ebm.ErrorCoordinates(max_steps=2000, tol=1e-9)
        rule = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.1), relaxer=relaxer)
        learner = ebm.Learner(net, rule, output="state")
        for _ in range(2):
            found[way] = learner.gradients(lambda net=net, way=way: spread(net, way))
        assert learner.report["result"] == "converged"
        exact = ebm.Learner(net, "zero-divergence", output="state").gradients(lambda net=net, way=way: spread(net, way))
        net.zero_grad()
        spread(net, way).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(exact[name], parameter.grad, rtol=1e-10, atol=1e-12)
    for name in found[how]:
        torch.testing.assert_close(found[how][name], found["cholesky"][name], rtol=1e-6, atol=1e-8)
