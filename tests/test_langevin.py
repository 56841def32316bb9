"""Stochastic phases: T -> 0; covariances and free energies of linear nets in closed form; errors as 1/sqrt(n)."""

import pytest
import torch
from test_clamp import Plain, chain
from torch import nn

import lightning_ebm as ebm

torch.manual_seed(0)
X = torch.randn(5, 4, dtype=torch.float64)
Y = torch.randn(5, 3, dtype=torch.float64)


def closure_of(net, x=X, y=Y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


@pytest.mark.parametrize("preset", ["predictive-coding", "equilibrium-propagation"])
def test_at_temperature_zero_the_steps_and_the_update_are_those_of_gradient_descent(preset):
    net = chain(nn.Tanh)
    found, expected = (
        ebm.Learner(net, ebm.algorithm(preset, relaxer=relaxer, free_relaxer=None)).gradients(closure_of(net))
        for relaxer in (ebm.Langevin(0.0, 0.2, max_steps=20, burn_in=10), ebm.GradientDescent(0.2, 30))
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_towards_temperature_zero_states_close_in_on_the_equilibrium_as_the_root_of_it():
    net = chain(nn.Tanh)
    learner = ebm.Learner(net, layers=["2", "4"])
    rest = learner.relax(lambda: net(X), clamp={"5": Y}, relaxer=ebm.QuasiNewton(tol=1e-12))
    spreads = []
    for temperature in (1e-4, 1e-6):
        relaxer = ebm.Langevin(temperature, 0.3, 400, 200, 4, seed=1)
        drawn = learner.relax(lambda: net(X), clamp={"5": Y}, relaxer=relaxer)
        spreads.append(float((drawn.samples["2"] - rest.states["2"]).square().mean().sqrt()))
    assert spreads[0] < 0.02
    assert spreads[0] / spreads[1] == pytest.approx(10, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.1, 0.6])
def test_states_of_a_linear_net_have_the_covariance_t_over_h_at_any_step_size(lr):
    """And the mean of its equilibrium; held units do not move at all."""
    net, temperature = chain(Plain, widths=(2, 3, 3, 2), gain=0.8), 0.3
    x = torch.tensor([[0.5, -1.0]]).double().expand(2000, 2).contiguous()
    learner = ebm.Learner(net, layers=["2", "4"])
    clamp = {"5": torch.ones(2), "2": (torch.full((3,), 0.5).double(), torch.tensor([False, False, True]))}
    relaxer = ebm.Langevin(temperature, lr, round(160 / lr) // 10, round(30 / lr), round(4 / lr), seed=0)
    drawn = learner.relax(lambda: net(x), clamp=clamp, relaxer=relaxer)
    rest = learner.relax(lambda: net(x[:1]), clamp=clamp, relaxer=ebm.QuasiNewton(tol=1e-12))
    a, w, one = net[3].weight.detach(), net[5].weight.detach(), torch.eye(3).double()
    hessian = torch.cat([torch.cat([one + a.T @ a, -a.T], 1), torch.cat([-a, one + w.T @ w], 1)])
    free = [0, 1, 3, 4, 5]
    covariance = temperature * torch.linalg.inv(hessian[free][:, free])
    states = torch.cat([drawn.samples[name].flatten(0, 1) for name in ("2", "4")], 1)
    mean = torch.cat([rest.states[name] for name in ("2", "4")], 1)[0]
    assert torch.equal(states[:, 2], torch.full_like(states[:, 2], 0.5))
    n = len(states)
    tolerance = 5 * (2 / n) ** 0.5 * float(covariance.max())  # five standard errors of a variance
    torch.testing.assert_close(torch.cov(states[:, free].T), covariance, rtol=0, atol=tolerance)
    torch.testing.assert_close(states.mean(0), mean, rtol=0, atol=5 * (float(covariance.max()) / n) ** 0.5)


def marginal_likelihood(net, temperature, strength):
    """-T log p(y | x) of the linear Gaussian net: 1/2 r'S^-1 r + T/2 log det S, averaged over samples."""
    a, w = net[3].weight, net[5].weight
    spread = torch.eye(3).double() / strength + w @ w.T + w @ a @ a.T @ w.T
    r = Y - net(X)
    return 0.5 * (r @ torch.linalg.inv(spread) * r).sum(1).mean() + temperature / 2 * torch.logdet(spread)


@pytest.mark.slow
def test_the_average_update_is_the_gradient_of_the_marginal_likelihood_and_its_error_falls_as_one_over_the_root():
    """Monte Carlo predictive coding on a linear net, in closed form; at T = 0 the log-determinant would be missed."""
    net, temperature, strength = chain(Plain, gain=0.8), 0.5, 0.7
    true = torch.autograd.grad(marginal_likelihood(net, temperature, strength) / strength, list(net.parameters()))
    true = torch.cat([t.flatten() for t in true])

    def estimate(n, seed):
        relaxer = ebm.Langevin(temperature, 0.35, 8 * n, 60, 8, seed=seed)
        algorithm = ebm.Algorithm(nudge=ebm.OneSided(strength), relaxer=relaxer)
        learner = ebm.Learner(net, algorithm, layers=["2", "4"])
        grads = learner.gradients(closure_of(net))
        return torch.cat([grads[name].flatten() for name, _ in net.named_parameters()])

    def error(n, runs):
        misses = torch.stack([estimate(n, seed) - true for seed in range(runs)])
        return float(misses.square().sum(1).mean().sqrt()), misses.mean(0)

    few, _ = error(8, 24)
    many, mean = error(128, 10)
    assert few / many == pytest.approx(4, rel=0.3)
    assert float(mean.norm()) < 3 * many / 10**0.5  # and what is left is no bias
    still = torch.autograd.grad(marginal_likelihood(net, 0.0, strength) / strength, list(net.parameters()))
    missed = torch.cat([s.flatten() for s in still]) - true
    assert float(missed.norm()) > 1.5 * many


@pytest.mark.slow
def test_thermal_equilibrium_propagation_is_the_slope_of_a_difference_of_free_energies():
    """Hopfield, linear: F(b) = T/2 log det H_b - 1/2 c'H_b^-1 c, [F(b) - F(0)] / b, by autograd of the closed form."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2), nn.Identity()).double()
    with torch.no_grad():
        net[2].weight.mul_(0.8)
    size, temperature, beta = 1500, 0.4, 0.8
    x, y = X[:1].expand(size, 4).contiguous(), Y[:1, :2].expand(size, 2).contiguous()

    def free_energy(strength):
        w, bias = net[2].weight, net[2].bias
        drive = net[0](X[0])
        one, two = torch.eye(3).double(), torch.eye(2).double() * (1 + strength)
        hessian = torch.cat([torch.cat([one, -w.T], 1), torch.cat([-w, two], 1)])
        linear = torch.cat([drive, bias + strength * Y[0, :2]])
        return temperature / 2 * torch.logdet(hessian) - 0.5 * linear @ torch.linalg.solve(hessian, linear)

    true = torch.autograd.grad((free_energy(beta) - free_energy(0.0)) / beta, list(net.parameters()))
    relaxer = ebm.Langevin(temperature, 0.3, 300, 150, 15, seed=0)
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(beta), relaxer)
    learner = ebm.Learner(net, algorithm, layers=["1", "3"], output="state")
    found = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
    for (name, _), t in zip(net.named_parameters(), true, strict=True):
        torch.testing.assert_close(found[name], t, rtol=0, atol=0.02)
    assert float(max(t.abs().max() for t in true)) > 0.3


def test_where_the_normalizer_depends_on_parameters_the_free_phase_is_sampled_too():
    net = chain(nn.Tanh)
    for energy, phases in ((ebm.PredictiveCoding(), 1), (ebm.FenchelYoung(), 2)):
        relaxer = ebm.Langevin(1e-3, 0.1, 20, 5, seed=0)
        learner = ebm.Learner(net, ebm.Algorithm(energy, ebm.OneSided(0.5), relaxer), layers=["2", "4"])
        learner.gradients(closure_of(net))
        assert len(learner.report["phases"]) == phases


def test_noise_follows_the_seed_that_is_given_or_that_of_the_run():
    net = chain(nn.Tanh)

    def drawn(seed):
        algorithm = ebm.Algorithm(relaxer=ebm.Langevin(1e-2, 0.1, 20, 5, seed=seed))
        learner = ebm.Learner(net, algorithm, layers=["2", "4"])
        net.zero_grad()
        learner.backward(closure_of(net))
        return net[1].weight.grad.clone()

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    torch.manual_seed(0)
    first, other = drawn(None), drawn(None)
    torch.manual_seed(0)
    assert torch.equal(first, drawn(None))
    assert not torch.equal(first, other)


def test_what_samples_nothing_or_runs_away_is_an_error():
    for settings, message in (
        ({"temperature": -1.0}, "at least 0"),
        ({"lr": 0.0}, "positive step size"),
        ({"max_steps": 0}, "at least 1"),
        ({"max_steps": 4, "every": 5}, "no sample"),
    ):
        with pytest.raises(ebm.ConfigurationError, match=message):
            ebm.Langevin(**settings)
    net = chain(nn.Tanh, gain=2.0)
    algorithm = ebm.Algorithm(relaxer=ebm.Langevin(1e-2, 3.0, 200, 5))
    with pytest.raises(ebm.RelaxationDivergedError, match=r"Langevin diverged.*below"):
        ebm.Learner(net, algorithm, layers=["2", "4"]).gradients(closure_of(net))
