"""States, forces and nudges of a device, against loops written by hand, grids, and the statistics of noise."""

import math

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

WIDTHS = (4, 6, 5, 3)


def network(act=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)
    ).double()  # fmt: skip


def batch(count=7):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=g).double(), torch.randn(count, 3, generator=g).double()


def closure(net, x, y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


def gradients(net, relaxer, nudge=None, capture=True, steps=1, energy=None):
    learner = ebm.Learner(
        net, ebm.Algorithm(energy, ebm.OneSided(0.7) if nudge is None else nudge, relaxer), capture=capture
    )
    for _ in range(steps):
        found = learner.gradients(closure(net, *batch()))
    return found


def same(found, expected, tol=0.0):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol)


def euler(net, x, y, strength, lr, steps, state=lambda x: x, force=lambda g: g):
    """x <- state(x - lr force(dE/dx)) from the forward pass, by autograd over explicit states."""

    def energy(states):
        below, total = x, 0.0
        for k, s in enumerate(states):
            total = total + 0.5 * (s - net[2 * k + 1](net[2 * k](below))).square().sum()
            below = s
        return total + strength * 0.5 * (net[4](below) - y).square().sum()

    with torch.no_grad():
        first = net[1](net[0](x))
        states = [state(first), state(net[3](net[2](first)))]
    for _ in range(steps):
        leaves = [s.detach().requires_grad_() for s in states]
        slopes = torch.autograd.grad(energy(leaves), leaves)
        states = [state(s.detach() - lr * force(g)) for s, g in zip(leaves, slopes, strict=True)]
    slopes = torch.autograd.grad(energy(states), list(net.parameters()))
    names = [name for name, _ in net.named_parameters()]
    return {n: g / strength / len(x) for n, g in zip(names, slopes, strict=True)}, states


def grid(bits, most):
    levels = 2 ** (bits - 1) - 1
    return lambda x: (x * levels / most).round().clamp(-levels, levels) * (most / levels)


@pytest.mark.parametrize("capture", [False, True])
def test_quantized_states_and_forces_are_the_loop_by_hand_and_on_the_grid(capture):
    net = network()
    relaxer = ebm.Quantized(ebm.GradientDescent(0.3, 12), states=8, forces=6, states_range=1.5, forces_range=2.0)
    found = gradients(net, relaxer, capture=capture, steps=3)
    expected, states = euler(net, *batch(), 0.7, 0.3, 12, grid(8, 1.5), grid(6, 2.0))
    same(found, expected, 1e-12)
    exact, _ = euler(net, *batch(), 0.7, 0.3, 12)
    assert max(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact) > 1e-3
    levels = torch.cat([s.flatten() for s in states]) * 127 / 1.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inner", [ebm.GradientDescent(0.3, 6), ebm.FixedPoint(8, damping=0.4),
                                   ebm.StateOptimizer(torch.optim.SGD, 6, lr=0.2)])  # fmt: skip
def test_where_any_relaxer_ends_is_on_the_grid(inner):
    net = network()
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=inner))
    relaxer = ebm.Quantized(inner, states=5, states_range=2.0)
    found = learner.relax(closure(net, *batch()), nudge=0.5, relaxer=relaxer)
    for state in found.states.values():
        levels = state * 15 / 2.0
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
        assert state.unique().numel() > 3


def test_saturated_states_and_forces_are_the_loop_by_hand():
    net = network()
    seen = []

    def force(g):
        seen.append(g)
        return g.clamp(-0.2, 0.2)

    def state(x):
        return x if not seen else x.clamp(-0.6, 0.6)  # the start is the forward pass, which no bound has touched

    expected, states = euler(net, *batch(), 0.7, 0.3, 12, state, force)
    same(gradients(net, ebm.Saturated(ebm.GradientDescent(0.3, 12), states=0.6, forces=0.2)), expected, 1e-12)
    assert any(bool((s.abs() == 0.6).any()) for s in states)
    assert any(bool((g.abs() > 0.2).any()) for g in seen)


@pytest.mark.parametrize("energy", [None, ebm.Hopfield()])
@pytest.mark.parametrize("wrap", [
    lambda r: ebm.Noisy(r), lambda r: ebm.Quantized(r), lambda r: ebm.Saturated(r),
    lambda r: ebm.Noisy(ebm.Quantized(ebm.Saturated(r))),
])  # fmt: skip
def test_a_perfect_device_is_the_relaxer_itself(wrap, energy):
    net = network(nn.Tanh if energy is None else lambda: nn.Hardtanh(0, 1))
    for inner in (ebm.GradientDescent(0.3, 9), ebm.FixedPoint(9)):
        one, other = (gradients(net, relaxer, energy=energy) for relaxer in (wrap(inner), inner))
        same(one, other)


def test_with_more_bits_the_update_goes_to_the_exact_one_as_the_step_of_the_grid():
    net, exact = network(), gradients(network(), ebm.GradientDescent(0.3, 12))

    def miss(bits):
        found = gradients(net, ebm.Quantized(ebm.GradientDescent(0.3, 12), states=bits, states_range=2.0))
        return max(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    misses = {bits: miss(bits) for bits in (10, 16, 22, 28)}
    for few, many in ((10, 16), (16, 22), (22, 28)):
        assert 20 < misses[few] / misses[many] < 200  # 2^6 = 64


def test_noise_follows_its_seed_and_goes_on():
    net = network()

    def drawn(seed, steps=1):
        return gradients(net, ebm.Noisy(ebm.GradientDescent(0.3, 5), states=0.1, forces=0.2, nudge=0.1, seed=seed),
                         steps=steps)  # fmt: skip

    same(drawn(3), drawn(3))
    first, other, later = drawn(3), drawn(4), drawn(3, steps=2)
    for more in (other, later):
        assert not torch.equal(first["0.weight"], more["0.weight"])
    one = ebm.Noisy(ebm.GradientDescent(0.3, 5), states=0.1, seed=3)
    gradients(net, one)
    two = ebm.Noisy(ebm.GradientDescent(0.3, 5), states=0.1, seed=3)
    two.load_state_dict(one.state_dict())
    same(gradients(net, two), gradients(net, one))
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=ebm.Noisy(ebm.GradientDescent(0.3, 5), states=0.1)))

    def taken():
        net.zero_grad()
        learner.backward(closure(net, *batch()))
        return net[0].weight.grad.clone()

    torch.manual_seed(0)
    first, other = taken(), taken()
    torch.manual_seed(0)
    assert torch.equal(taken(), first)
    assert not torch.equal(other, first)


class Plain(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["states", "forces", "stochastic"])
def test_the_mean_of_noisy_states_of_a_linear_net_misses_by_one_over_the_root(kind):
    """The dynamics is linear, so that noise of mean 0 leaves the mean where the exact one is."""
    net = network(Plain)
    x, y = (t[:1] for t in batch())

    def mean(count, seed):
        torch.manual_seed(seed)
        inner = ebm.GradientDescent(0.3, 10)
        relaxer = {
            "states": ebm.Noisy(inner, states=0.2), "forces": ebm.Noisy(inner, forces=0.5),
            "stochastic": ebm.Quantized(inner, states=4, states_range=4.0, rounding="stochastic"),
        }[kind]  # fmt: skip
        rows = x.expand(count, 4).contiguous(), y.expand(count, 3).contiguous()
        found = ebm.Learner(net, ebm.Algorithm(relaxer=inner), layers=["1", "3"]).relax(
            closure(net, *rows), nudge=0.7, relaxer=relaxer
        )
        return torch.cat([found.states[name].mean(0) for name in ("1", "3")])

    _, states = euler(net, x, y, 0.7, 0.3, 10)
    exact = torch.cat([s[0] for s in states])

    def error(count, seeds):
        return float(torch.stack([(mean(count, s) - exact).square().sum() for s in range(seeds)]).mean().sqrt())

    few, many = error(20, 24), error(2000, 6)
    assert few / many == pytest.approx(10, rel=0.35)


def test_a_noisy_nudge_has_its_deviation_and_is_read_as_it_was_meant():
    """A sweep's errors are proportional to the nudge that acted, and are divided by the one that was asked for."""
    net = network()
    exact = gradients(net, ebm.Sweep())["0.weight"]
    factors = []
    for seed in range(200):
        found = gradients(net, ebm.Noisy(ebm.Sweep(), nudge=0.1, seed=seed), capture=False)["0.weight"]
        factors.append(float((found * exact).sum() / exact.square().sum()))
        assert float((found - factors[-1] * exact).norm() / exact.norm()) < 1e-12
    factors = torch.tensor(factors)
    assert float(factors.mean()) == pytest.approx(1, abs=4 * 0.1 / math.sqrt(200))
    assert float(factors.std()) == pytest.approx(0.1, rel=4 / math.sqrt(400))


def test_incremental_updates_see_the_device_too():
    net, (x, y) = network(), batch()
    found = {}
    for name, relaxer in (("exact", ebm.GradientDescent(0.2, 4)),
                          ("device", ebm.Saturated(ebm.GradientDescent(0.2, 4), forces=0.05))):  # fmt: skip
        net = network()
        algorithm = ebm.Algorithm(relaxer=relaxer, update="incremental")
        ebm.Learner(net, algorithm).step(closure(net, x, y), torch.optim.SGD(net.parameters(), 0.05))
        found[name] = net[0].weight.detach()
    hand = network()
    state, names = None, [n for n, _ in hand.named_parameters()]
    for _ in range(4):  # states and weights move at once, from one gradient
        with torch.no_grad():
            first = hand[1](hand[0](x))
            state = [first, hand[3](hand[2](first))] if state is None else state
        leaves = [s.detach().requires_grad_() for s in state]
        energy = sum(
            0.5 * (s - hand[2 * k + 1](hand[2 * k](b))).square().sum()
            for k, (s, b) in enumerate(zip(leaves, [x, leaves[0]], strict=True))
        )
        energy = energy + 0.5 * (hand[4](leaves[1]) - y).square().sum()
        slopes = torch.autograd.grad(energy, [*leaves, *hand.parameters()])
        state = [s - 0.2 * g.clamp(-0.05, 0.05) for s, g in zip(leaves, slopes[:2], strict=True)]
        with torch.no_grad():
            for p, g in zip(hand.parameters(), slopes[2:], strict=True):
                p -= 0.05 * g / len(x)
    assert names
    torch.testing.assert_close(found["device"], hand[0].weight.detach(), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found["device"], found["exact"], rtol=1e-6)


def test_what_a_device_cannot_hold_is_refused():
    for make in (
        lambda: ebm.Noisy(ebm.Sweep(), states=0.1), lambda: ebm.Quantized(ebm.Sweep(), states=8),
        lambda: ebm.Saturated(ebm.FixedPrediction(), states=1.0),
    ):  # fmt: skip
        with pytest.raises(ebm.ConfigurationError, match="moves errors"):
            make()
    with pytest.raises(ebm.ConfigurationError, match="at least 2"):
        ebm.Quantized(ebm.GradientDescent(0.1, 5), states=1)
    with pytest.raises(ebm.ConfigurationError, match="finds its steps by the energy"):
        ebm.Noisy(ebm.QuasiNewton(), states=0.1)
