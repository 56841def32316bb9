"""PC-ALM with steps of the states between dual steps of their own size, against loops by hand."""

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

PRECISION = {"1": 1.5, "3": 0.7}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=g).double(), torch.randn(7, 3, generator=g).double()


def closure(net, x, y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


def by_hand(net, x, y, strength, lr, inner, outer, alpha):
    """x <- x - lr d/dx [lambda L + sum mu' e + Pi/2 |e|^2], mu <- mu + alpha Pi e; d/dtheta of that."""
    precision = list(PRECISION.values())

    def lagrangian(states, mu):
        below, total = x, strength * 0.5 * (net[4](states[1]) - y).square().sum()
        for k, (s, m, p) in enumerate(zip(states, mu, precision, strict=True)):
            e = s - net[2 * k + 1](net[2 * k](below))
            total = total + (m * e).sum() + 0.5 * p * e.square().sum()
            below = s
        return total

    with torch.no_grad():
        first = net[1](net[0](x))
        states = [first, net[3](net[2](first))]
    mu = [torch.zeros_like(s) for s in states]
    for _ in range(outer):
        for _ in range(inner):
            leaves = [s.detach().requires_grad_() for s in states]
            slopes = torch.autograd.grad(lagrangian(leaves, mu), leaves)
            states = [s.detach() - lr * g for s, g in zip(leaves, slopes, strict=True)]
        slopes = torch.autograd.grad(lagrangian(states, mu), list(net.parameters()))
        with torch.no_grad():
            below = [x, states[0]]
            errors = [s - net[2 * k + 1](net[2 * k](b)) for k, (s, b) in enumerate(zip(states, below, strict=True))]
            mu = [m + alpha * p * e for m, p, e in zip(mu, precision, errors, strict=True)]
    names = [name for name, _ in net.named_parameters()]
    return {n: g / strength / len(x) for n, g in zip(names, slopes, strict=True)}


def gradients(net, relaxer, strength=0.5, capture=True):
    algorithm = ebm.Algorithm(ebm.PredictiveCoding(PRECISION), ebm.OneSided(strength), relaxer)
    learner = ebm.Learner(net, algorithm, capture=capture)
    for _ in range(3 if capture else 1):
        found = learner.gradients(closure(net, *batch()))
    return found


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(("inner", "outer", "alpha"), [(1, 12, 0.3), (5, 4, 1.0), (3, 6, 0.6)])
def test_states_and_multipliers_take_the_steps_of_the_loop_by_hand(inner, outer, alpha, capture):
    net = network()
    relaxer = ebm.AugmentedLagrangian(outer, ebm.GradientDescent(0.2, inner), dual_lr=alpha)
    expected = by_hand(net, *batch(), 0.5, 0.2, inner, outer, alpha)
    for name, found in gradients(net, relaxer, capture=capture).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-12)


def test_states_and_errors_come_to_the_same_where_both_are_minimized():
    net = network()
    inner = (ebm.GradientDescent(0.3, 4000, tol=1e-12), ebm.ErrorCoordinates(500, tol=1e-12))
    one, other = (gradients(net, ebm.AugmentedLagrangian(3, i, dual_lr=0.8)) for i in inner)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_with_enough_steps_of_either_kind_the_update_is_backprops_at_any_nudge():
    net = network()
    true = ebm.reference.backprop(net, closure(net, *batch()))
    for inner, outer, alpha in ((1, 800, 0.2), (20, 60, 1.0)):
        found = gradients(net, ebm.AugmentedLagrangian(outer, ebm.GradientDescent(0.2, inner), dual_lr=alpha))
        for name in true:
            torch.testing.assert_close(found[name], true[name], rtol=1e-6, atol=1e-8)
    plain = gradients(net, ebm.GradientDescent(0.2, 400))
    assert max(float((plain[n] - true[n]).norm() / true[n].norm()) for n in true) > 0.05


def test_settings_that_mean_nothing_are_refused():
    for settings, message in (({"dual_lr": 0.0}, "positive step size"), ({"inner": ebm.Sweep()}, "GradientDescent")):
        with pytest.raises(ebm.ConfigurationError, match=message):
            ebm.AugmentedLagrangian(**settings)
