"""Continual equilibrium propagation against a loop by hand, and against equilibrium propagation in the limit."""

import itertools

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

SIZES = (5, 7, 6, 4)
BETA, FREE, NUDGED = 0.4, 300, 8


def network():
    torch.manual_seed(0)
    parts = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        parts += [nn.Linear(fan_in, fan_out), nn.Hardtanh(0, 1)]
    return nn.Sequential(*parts).double()


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, 5, generator=g).double(), torch.rand(9, 4, generator=g).double()


def algorithm(update="continual", steps=NUDGED):
    relaxer = ebm.FixedPoint(steps, order="synchronous")
    return ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(BETA), relaxer, ebm.FixedPoint(FREE), update)


def closure(net, x, y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


def moved(w, b, x, y, states, beta):
    """All layers at once: x_l <- clamp(a_l + W' x_l+1 - beta (x_l - y))."""
    below = [x, *states]
    found = []
    for k, s in enumerate(states):
        pull = states[k + 1] @ w[k + 1] if k + 1 < len(states) else -beta * (s - y)
        found.append((below[k] @ w[k].T + b[k] + pull).clamp(0, 1))
    return found


def hebb(x, states):
    """dE/dtheta = -post pre', and -post."""
    pairs = list(zip([x, *states[:-1]], states, strict=True))
    return [-s.T @ h / len(x) for h, s in pairs], [-s.mean(0) for _, s in pairs]


def by_hand(net, x, y, lr):
    w = [net[2 * k].weight.detach().clone() for k in range(3)]
    b = [net[2 * k].bias.detach().clone() for k in range(3)]
    states = [torch.zeros(len(x), n).double() for n in SIZES[1:]]
    for _ in range(2 * FREE):
        states = moved(w, b, x, y, states, 0.0)
    for _ in range(NUDGED):
        before, states = states, moved(w, b, x, y, states, BETA)
        (w0, b0), (w1, b1) = hebb(x, before), hebb(x, states)
        w = [p - lr * (q - r) / BETA for p, q, r in zip(w, w1, w0, strict=True)]
        b = [p - lr * (q - r) / BETA for p, q, r in zip(b, b1, b0, strict=True)]
    return {f"{2 * k}.{kind}": p for kind, ps in (("weight", w), ("bias", b)) for k, p in enumerate(ps)}


def stepped(lr, capture=True, update="continual"):
    net, (x, y) = network(), batch()
    learner = ebm.Learner(net, algorithm(update), output="state", capture=capture)
    learner.gradients(closure(net, x, y))  # what comes again may run as code
    learner.gradients(closure(net, x, y))
    learner.step(closure(net, x, y), torch.optim.SGD(net.parameters(), lr))
    return dict(net.named_parameters())


@pytest.mark.parametrize("capture", [False, True])
def test_states_and_parameters_move_as_in_the_loop_by_hand(capture):
    net, (x, y) = network(), batch()
    expected = by_hand(net, x, y, 0.5)
    for name, parameter in stepped(0.5, capture).items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-11)


def test_as_the_learning_rate_vanishes_the_step_becomes_that_of_equilibrium_propagation():
    start, misses = dict(network().named_parameters()), []
    for lr in (1e-2, 1e-3, 1e-4):
        found, expected = stepped(lr), stepped(lr, update="contrast")
        change = [(found[n] - start[n]).detach() / lr for n in start]
        goal = [(expected[n] - start[n]).detach() / lr for n in start]
        misses.append(float(torch.stack([(a - b).norm() for a, b in zip(change, goal, strict=True)]).norm()))
        assert float(torch.stack([g.norm() for g in goal]).norm()) > 0.1
    assert misses[0] / misses[1] == pytest.approx(10, rel=0.1)
    assert misses[1] / misses[2] == pytest.approx(10, rel=0.1)


def test_where_parameters_stay_it_is_the_contrast():
    net, (x, y) = network(), batch()
    one, other = (
        ebm.Learner(net, algorithm(update), output="state").gradients(closure(net, x, y))
        for update in ("continual", "contrast")
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_predictive_coding_may_move_continually_and_its_readout_gets_the_whole_slope_at_the_end():
    """With states that descend; parts sum to the contrast, whose read-out part is dL/dtheta at the last states."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    (x, y), start = batch(), {n: p.detach().clone() for n, p in net.named_parameters()}
    parts = {"nudge": ebm.OneSided(0.5), "relaxer": ebm.GradientDescent(0.2, 6)}
    expected = ebm.Learner(net, ebm.Algorithm(**parts)).gradients(closure(net, x, y))
    learner = ebm.Learner(net, ebm.Algorithm(**parts, update="continual"))
    learner.step(closure(net, x, y), torch.optim.SGD(net.parameters(), 1e-7))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close((start[name] - parameter.detach()) / 1e-7, expected[name], rtol=1e-4, atol=1e-6)


def test_what_it_cannot_follow_is_refused():
    for parts in (
        {"relaxer": ebm.FixedPoint(5)},
        {"nudge": ebm.Centered(0.3)},
        {"relaxer": ebm.AcceleratedFixedPoint()},
    ):
        settings = {"nudge": ebm.OneSided(0.3), "relaxer": ebm.FixedPoint(5, order="synchronous"), **parts}
        with pytest.raises(ebm.ConfigurationError, match="every step of one nudged phase"):
            ebm.Algorithm(ebm.Hopfield(), **settings, update="continual")
