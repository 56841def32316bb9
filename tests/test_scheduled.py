"""Step sizes, precisions and nudges that change from layer to layer and step to step, against loops by hand."""

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.relaxers import decaying, spiking

PRECISION = {"1": 1.5, "3": 0.7}


def network(act=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)).double()


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=g).double(), torch.randn(7, 3, generator=g).double()


def closure(net, x, y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


def gradients(net, relaxer, capture=True, energy=None):
    algorithm = ebm.Algorithm(energy or ebm.PredictiveCoding(PRECISION), ebm.OneSided(0.6), relaxer)
    learner = ebm.Learner(net, algorithm, capture=capture)
    for _ in range(3 if capture else 1):
        found = learner.gradients(closure(net, *batch()))
    return found


def by_hand(net, x, y, strength, steps, lr, precision, nudge):
    """x_l <- x_l - lr_l(t) d/dx_l [sum_l c_l(t) Pi_l/2 |e_l|^2 + n(t) lambda L]; read at c = n = 1."""
    own = list(PRECISION.values())

    def energy(states, factors, share):
        total, below = share * strength * 0.5 * (net[4](states[1]) - y).square().sum(), x
        for k, (s, p, c) in enumerate(zip(states, own, factors, strict=True)):
            total = total + 0.5 * c * p * (s - net[2 * k + 1](net[2 * k](below))).square().sum()
            below = s
        return total

    with torch.no_grad():
        first = net[1](net[0](x))
        states = [first, net[3](net[2](first))]
    for t in range(steps):
        leaves = [s.detach().requires_grad_() for s in states]
        slopes = torch.autograd.grad(energy(leaves, [precision(t, 1, 2), precision(t, 2, 2)], nudge(t)), leaves)
        states = [s.detach() - lr(t, k, 2) * g for k, (s, g) in enumerate(zip(leaves, slopes, strict=True), 1)]
    slopes = torch.autograd.grad(energy(states, (1, 1), 1.0), list(net.parameters()))
    return {n: g / strength / len(x) for (n, _), g in zip(net.named_parameters(), slopes, strict=True)}


@pytest.mark.parametrize("capture", [False, True])
def test_all_three_schedules_are_the_loop_by_hand(capture):
    net = network()
    lr, precision, nudge = (lambda t, k, n: 0.3 / (t + k)), (lambda t, k, n: 1 + k * 0.5**t), (lambda t: (t + 1) / 9)
    found = gradients(net, ebm.ScheduledDescent(9, lr, precision, nudge), capture)
    expected = by_hand(net, *batch(), 0.6, 9, lr, precision, nudge)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)
    constant = gradients(net, ebm.GradientDescent(0.1, 9))
    assert max(float((found[n] - constant[n]).norm() / constant[n].norm()) for n in constant) > 0.1


@pytest.mark.parametrize("energy", [None, ebm.Hopfield()])
def test_numbers_of_one_are_gradient_descent(energy):
    net = network(nn.Tanh if energy is None else nn.Sigmoid)
    one, other = (gradients(net, r, energy=energy) for r in (ebm.ScheduledDescent(9, 0.1), ebm.GradientDescent(0.1, 9)))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-13, atol=1e-15)


def test_spikes_meet_the_signal_and_precisions_decay():
    spikes = [[spiking(5.0)(t, depth, 3) for t in range(4)] for depth in (1, 2, 3)]
    assert spikes == [[1, 1, 1, 5], [1, 1, 5, 1], [1, 5, 1, 1]]
    assert [[spiking(5.0, held=True)(t, depth, 2) for t in range(3)] for depth in (1, 2)] == [[1, 5, 1], [5, 1, 1]]
    decay = [decaying(3.0, 1.0)(t, 1, 3) for t in range(3)]
    assert decay == pytest.approx([3, 1 + 2 * 2.718281828**-1, 1 + 2 * 2.718281828**-2])
    net, schedule = network(), spiking(4.0)
    found = gradients(net, ebm.ScheduledDescent(5, 0.1, schedule))
    expected = by_hand(net, *batch(), 0.6, 5, lambda t, k, n: 0.1, schedule, lambda t: 1.0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_a_spike_of_one_over_the_step_size_hands_the_signal_on_whole(strength):
    """First arrival is linear: -lr lambda dL/dx_l at every depth; without spikes it has the factor lr of every hop."""
    torch.manual_seed(0)
    parts = [part for _ in range(5) for part in (nn.Linear(6, 6), nn.Tanh())]
    net, lr = nn.Sequential(*parts, nn.Linear(6, 3)).double(), 0.05
    x, y = torch.randn(7, 6).double(), torch.randn(7, 3).double()
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding"))
    states, h = {}, x
    for name, layer in net.named_children():
        h = layer(h)
        if isinstance(layer, nn.Tanh):
            h.retain_grad()
            states[name] = h
    (0.5 * (h - y).square().sum()).backward()
    for k, (name, state) in enumerate(reversed(states.items())):
        for relaxer, factor in (
            (ebm.ScheduledDescent(k + 1, lr, spiking(1 / lr)), lr),
            (ebm.ScheduledDescent(k + 1, lr), lr ** (k + 1)),
        ):
            found = learner.relax(closure(net, x, y), nudge=strength, relaxer=relaxer)
            expected = -factor * strength * state.grad
            torch.testing.assert_close(found.states[name] - state.detach(), expected, rtol=1e-7, atol=1e-13)


def test_where_schedules_end_at_one_the_equilibrium_is_that_of_the_energy():
    net = network()
    relaxer = ebm.ScheduledDescent(600, 0.2, decaying(3.0, 0.5), lambda t: min(1.0, t / 20))
    found, expected = gradients(net, relaxer, False), gradients(net, ebm.ErrorCoordinates(500, tol=1e-12))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)


def test_a_scaled_energy_relaxes_hopfield_states_too():
    """c e(x, a) pulls c times as hard; against autograd over the energy written out, G of the logistic function."""
    net, (x, y) = network(nn.Sigmoid), batch()
    factors = lambda t, k, n: 1.0 + k  # noqa: E731
    relaxer = ebm.ScheduledDescent(6, 0.05, factors)
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(0.6), relaxer))
    found = learner.relax(closure(net, x, y), nudge=0.6, relaxer=relaxer)
    free = learner.relax(closure(net, x, y), relaxer=relaxer)  # its nudged phase begins there
    states = [free.states["1"], free.states["3"]]
    for _ in range(6):
        leaves = [s.detach().requires_grad_() for s in states]
        total, below = 0.6 * 0.5 * (net[4](leaves[1]) - y).square().sum(), x
        for k, s in enumerate(leaves):
            g = s * s.log() + (1 - s) * (1 - s).log()
            total, below = total + (2.0 + k) * (g - s * net[2 * k](below)).sum(), s
        states = [s.detach() - 0.05 * d for s, d in zip(leaves, torch.autograd.grad(total, leaves), strict=True)]
    for name, state in zip(("1", "3"), states, strict=True):
        torch.testing.assert_close(found.states[name], state, rtol=1e-10, atol=1e-12)


def test_schedules_that_mean_nothing_are_refused():
    net = network()
    for settings, message in (
        ({"lr": lambda t, k, n: "fast"}, "finite numbers"),
        ({"precision": lambda t, k, n: 0.0}, "positive ones"),
        ({"nudge": lambda t: float("nan")}, "finite numbers"),
    ):
        with pytest.raises(ebm.ConfigurationError, match=message):
            gradients(net, ebm.ScheduledDescent(3, **{"lr": 0.1, **settings}))
    with pytest.raises(ebm.RelaxationDivergedError, match="ran away"):
        gradients(net, ebm.ScheduledDescent(60, 0.5, lambda t, k, n: 20.0))
