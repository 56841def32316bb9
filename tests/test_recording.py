"""What a recording says of a relaxation equals what can be computed without it, and it changes nothing."""

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.network.recording import Recording
from lightning_ebm.relaxers import Relaxation, Relaxer


def chain(depth=4, width=5, seed=0, linear=False):
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Identity() if linear else nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def problem(net, samples=7):
    torch.manual_seed(1)
    x, y = torch.randn(samples, 5).double(), torch.randn(samples, 3).double()
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean(), x, y


def recorded(net, closure, algorithm, **options):
    learner = ebm.Learner(net, algorithm, **options)
    found = []

    def watch(network):
        found.append(Recording(network))
        return found[-1]

    learner.observer = watch
    gradients = learner.gradients(closure)
    return gradients, [trace.read() for trace in found[-1].traces], learner


def by_hand(net, x, y, lr, steps):
    """Euler on explicit states with autograd: energies and per-layer forces at every evaluation."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        states, h = [], x
        for linear in linears[:-1]:
            h = torch.tanh(linear(h))
            states.append(h)
    internal, loss, forces, trajectory = [], [], [], []
    for _ in range(steps + 1):
        states = [s.detach().requires_grad_() for s in states]
        below = [x, *states]
        errors = [s - torch.tanh(linear(b)) for s, linear, b in zip(states, linears[:-1], below[:-1], strict=True)]
        i = sum(0.5 * e.square().sum() for e in errors)
        loss_now = 0.5 * (linears[-1](states[-1]) - y).square().sum()
        g = torch.autograd.grad(i + loss_now, states)
        internal.append(float(i.detach()))
        loss.append(float(loss_now.detach()))
        forces.append([float(f.norm()) for f in g])
        trajectory.append(([s.detach() for s in states], list(g)))
        states = [s - lr * f for s, f in zip(states, g, strict=True)]
    return internal, loss, forces, trajectory


def test_every_number_equals_a_simulation_with_explicit_states():
    net = chain()
    closure, x, y = problem(net)
    euler = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.07, 9))
    _, (trace,), learner = recorded(net, closure, euler)
    internal, loss, forces, trajectory = by_hand(net, x, y, 0.07, 9)
    assert trace["coordinates"] == "states"
    assert trace["nudge"] == 1.0
    assert trace["internal"] == pytest.approx(internal, rel=1e-10, abs=1e-14)
    assert trace["loss"] == pytest.approx(loss, rel=1e-10)
    for row, expected in zip(trace["residual"], forces, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert trace["step_size"] == pytest.approx([0.07] * 9, rel=1e-9)
    for t in range(9):
        (s0, g0), (s1, g1) = trajectory[t], trajectory[t + 1]
        d = torch.cat([(b - a).flatten() for a, b in zip(s0, s1, strict=True)])
        turn = torch.cat([(b - a).flatten() for a, b in zip(g0, g1, strict=True)])
        assert trace["curvature"][t] == pytest.approx(float(turn @ d / (d @ d)), rel=1e-8)
    per_sample = torch.stack([f.square().sum(1) for f in trajectory[-1][1]]).sum(0).sqrt().sort().values
    quantiles = trace["residual_per_sample"][-1]
    assert quantiles[0] == pytest.approx(float(per_sample[0]))
    assert quantiles[2] == pytest.approx(float(per_sample[3]))
    assert quantiles[4] == pytest.approx(float(per_sample[-1]))
    # and the report's energies are the same ones
    energies = [i + x for i, x in zip(trace["internal"], trace["loss"], strict=True)]
    assert learner.report["phases"][0]["energies"] == pytest.approx(energies)


def test_the_curvature_met_is_below_the_largest_and_near_it_where_steps_are_too_long():
    """Linear network: the Hessian of the energy is a constant matrix, and 2 / its largest eigenvalue the limit."""
    net = chain(depth=2, linear=True)
    closure, *_ = problem(net)
    w2, w3 = net[2].weight, net[4].weight
    top = torch.block_diag(torch.eye(5).double(), torch.eye(5).double() + w3.T @ w3)
    top[:5, :5] += w2.T @ w2
    top[:5, 5:] -= w2.T
    top[5:, :5] -= w2
    largest = float(torch.linalg.eigvalsh(top.detach())[-1])
    layers = [net[1], net[3]]
    options = {"layers": lambda m: any(m is layer for layer in layers)}
    lr = 1.98 / largest
    _, (trace,), _ = recorded(
        net, closure, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr, 200)), **options
    )
    assert max(trace["curvature"]) <= largest * (1 + 1e-9)
    assert max(trace["curvature"]) == pytest.approx(largest, rel=1e-3)


def test_the_signal_arrives_one_layer_a_step():
    """Simultaneous steps: the k-th layer from the top first moves at step k; in error coordinates all do at once."""
    net = chain()
    closure, *_ = problem(net)
    _, (trace,), _ = recorded(net, closure, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 3)))
    assert trace["arrived"] == [-1, 3, 2, 1]
    _, (trace,), _ = recorded(net, closure, ebm.algorithm("error-pc"))
    assert trace["arrived"] == [1, 1, 1, 1]
    assert trace["coordinates"] == "errors"


@pytest.mark.parametrize("algorithm", ["predictive-coding", "pc-nudge", "zero-divergence", "error-pc"])
def test_a_recorded_update_is_the_same_bit_for_bit(algorithm):
    net = chain()
    closure, *_ = problem(net)
    plain = ebm.Learner(net, algorithm).gradients(closure)
    watched, traces, _ = recorded(net, closure, algorithm)
    assert traces
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_each_phase_has_a_trace():
    net = chain()
    closure, *_ = problem(net)
    _, traces, learner = recorded(net, closure, ebm.algorithm("pc-nudge", nudge=ebm.Centered(0.01)))
    assert [trace["nudge"] for trace in traces] == [0.01, -0.01]
    assert [len(trace["loss"]) - 1 for trace in traces] == [p["steps"] for p in learner.report["phases"]]


class Somebodys(Relaxer):
    """Written elsewhere: it asks for forces, and moves."""

    def relax(self, landscape, start, strength):
        states = list(start)
        for _ in range(4):
            forces = landscape.evaluate(ebm.Forces(), states, strength)
            states = [x - 0.1 * g for x, g in zip(states, forces.gradients, strict=True)]
        return Relaxation(states, "states", "fixed", 4, torch.zeros(landscape.batch_size).double(), [forces.loss])


def test_a_relaxer_that_was_never_heard_of_is_recorded():
    net = chain()
    closure, x, y = problem(net)
    _, (trace,), _ = recorded(net, closure, ebm.algorithm("predictive-coding", relaxer=Somebodys()))
    internal, loss, *_ = by_hand(net, x, y, 0.1, 3)
    assert trace["internal"] == pytest.approx(internal, abs=1e-12)
    assert trace["loss"] == pytest.approx(loss, rel=1e-10)
    assert trace["step_size"] == pytest.approx([0.1] * 3, rel=1e-9)
