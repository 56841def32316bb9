"""Losses with a domain, or that explode: probabilities, covariances, counts. States tried far out end inside."""

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


@pytest.mark.parametrize("rarely", [False, True])
@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_a_step_into_forces_that_explode_does_not_stop_its_sample(lam, rarely, monkeypatch):
    """Counts under a Poisson likelihood, exp(o) - t o: a first step of 1 leads to forces of e^300 and more.

    `e + lambda c (exp(c (p + e)) - t) = 0` of every sample, by bisection.
    """
    monkeypatch.setattr("lightning_ebm.network.network.runs_behind", lambda device: rarely)
    net = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(1.0), nn.Linear(1, 1)).double()
    c, t = 3.0, 40.0
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (1.0, 0.0, c, 0.0), strict=True):
            parameter.fill_(value)
    p = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None]
    low, high = torch.full_like(p, -600.0 * lam), torch.full_like(p, 600.0 * lam)
    for _ in range(200):
        e = (low + high) / 2
        above = e + lam * c * ((c * (p + e)).clamp(max=600).exp() - t) > 0
        low, high = torch.where(above, low, e), torch.where(above, e, high)
    relaxer = ebm.ErrorCoordinates(max_steps=200, tol=1e-9)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge=ebm.OneSided(lam), relaxer=relaxer))
    found = learner.gradients(lambda: F.poisson_nll_loss(net(p), torch.full_like(p, t)))
    assert learner.report["result"] == "converged"
    torch.testing.assert_close(found["0.weight"], (-e * p).mean().reshape(1, 1) / lam, rtol=1e-6, atol=1e-8)


SCATTER = torch.tensor([[0.6, 0.2], [0.2, 0.4]], dtype=torch.float64)


def likelihood(out, how):
    """`log det C + tr(S C^-1)` of a covariance that a layer gives: infinite at the border, and nan beyond it."""
    covariance = out.unflatten(1, (2, 2))
    covariance = (covariance + covariance.mT) / 2 + 1.5 * torch.eye(2, dtype=torch.float64)
    if how == "cholesky":
        factor = torch.linalg.cholesky(covariance)
        inverse = torch.cholesky_inverse(factor)
        return (2 * factor.diagonal(dim1=1, dim2=2).log().sum(1) + (SCATTER * inverse).sum((1, 2))).mean()
    inverse = torch.linalg.solve(covariance, torch.eye(2).to(out)) if how == "solve" else torch.linalg.inv(covariance)
    return (torch.logdet(covariance) + (SCATTER * inverse).sum((1, 2))).mean()


@pytest.mark.parametrize(("how", "lam"), [("cholesky", 5.0), ("cholesky", 0.1), ("solve", 0.1), ("inv", 0.1)])
def test_a_state_that_is_a_covariance_ends_where_short_steps_do(how, lam):
    """At lambda = 5 the first step of most samples is to no covariance at all."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    x = net(X).detach()
    e = torch.zeros_like(x)
    for step in range(1500):
        at = (x + e).requires_grad_()
        (slope,) = torch.autograd.grad(8 * likelihood(at, "cholesky"), at)
        e = e - 0.02 * (e + lam * slope)
        if step == 0:
            jumped = (x - lam * slope).unflatten(1, (2, 2))
            least = torch.linalg.eigvalsh((jumped + jumped.mT) / 2 + 1.5 * torch.eye(2, dtype=torch.float64))[:, 0]
    assert (least < 0).any() == (lam == 5.0)
    drive = -e * (1 - x.square()) / (8 * lam)
    relaxer = ebm.ErrorCoordinates(max_steps=2000, tol=1e-9)
    learner = ebm.Learner(
        net, ebm.algorithm("predictive-coding", nudge=ebm.OneSided(lam), relaxer=relaxer), output="state"
    )
    for _ in range(2):
        found = learner.gradients(lambda: likelihood(net(X), how))
    assert learner.report["result"] == "converged"
    torch.testing.assert_close(found["0.weight"], drive.T @ X, rtol=1e-6, atol=1e-8)
    exact = ebm.Learner(net, "zero-divergence", output="state").gradients(lambda: likelihood(net(X), how))
    net.zero_grad()
    likelihood(net(X), how).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(exact[name], parameter.grad, rtol=1e-10, atol=1e-12)
