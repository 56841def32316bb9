"""Energies that need no class of their own: dense associative memories, and predictive coding in both directions."""

import torch
from torch import nn

import lightning_ebm as ebm

torch.manual_seed(0)


def memory(patterns, sharpness):
    """E = b [|v|^2 / 2 - lse(b xi v) / b] in units of sqrt(b) v: a Hopfield energy with a softmax."""
    net = nn.Sequential(nn.Identity(), nn.Linear(*reversed(patterns.shape), bias=False), nn.Softmax(-1)).double()
    with torch.no_grad():
        net[1].weight.copy_(sharpness**0.5 * patterns)
    return net


def relaxed(net, cue, mask=None, steps=200, tol=1e-12):
    relaxer = ebm.FixedPoint(steps, tol=tol)
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(0.1), relaxer), layers=["0", "2"])
    clamp = {} if mask is None else {"0": (cue, mask)}
    zero = torch.zeros_like(cue)  # no field upon the visible units
    return learner.relax(lambda: net(zero), clamp=clamp, free=[], relaxer=relaxer)


def test_a_hopfield_energy_with_a_softmax_is_a_dense_associative_memory():
    """v <- xi' softmax(b xi v) with units held, and the energy with its logarithm of a sum, in closed form."""
    patterns, sharpness = torch.randn(20, 12).double(), 2.0
    mask = (torch.arange(12) < 5).expand(20, 12)
    cue = torch.where(mask, patterns, 0.0)
    found = relaxed(memory(patterns, sharpness), sharpness**0.5 * cue, mask)
    recall = lambda v: torch.softmax(sharpness * v @ patterns.T, -1) @ patterns  # noqa: E731
    states = found.states["0"] / sharpness**0.5
    fixed = torch.where(mask, cue, recall(states))
    torch.testing.assert_close(states, fixed, rtol=0, atol=1e-9)  # a fixed point of the published map
    energy = 0.5 * states.square().sum(1) - torch.logsumexp(sharpness * states @ patterns.T, -1) / sharpness
    torch.testing.assert_close(found.energy / sharpness, energy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.states["2"], torch.softmax(sharpness * states @ patterns.T, -1), rtol=0, atol=1e-9)
    assert float((states - cue).abs().max()) > 0.5


def test_patterns_are_recalled_from_half_where_a_quadratic_memory_would_not_hold_them():
    """64 patterns of 32 units, twice as many as units."""
    g = torch.Generator().manual_seed(2)
    patterns = torch.randn(64, 32, generator=g).sign().double()
    mask = (torch.arange(32) < 16).expand(64, 32)
    found = relaxed(memory(patterns, 4.0), 2.0 * patterns, mask)
    recalled = (found.states["0"] / 2.0).sign()
    assert float((recalled == patterns).all(1).double().mean()) > 0.95


class Bidirectional(nn.Module):
    """Predictions upwards by the layers; downwards by V, whose errors are part of the loss."""

    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 3))
        self.down1, self.down2 = nn.Linear(4, 5), nn.Linear(4, 4)

    def forward(self, x, y):
        h1 = self.up[1](self.up[0](x))
        h2 = self.up[3](self.up[2](h1))
        below = (x - self.down1(h1)).square().sum(1) + (h1 - self.down2(h2)).square().sum(1)
        return 0.5 * ((self.up[4](h2) - y).square().sum(1) + below).mean()


def test_predictive_coding_in_both_directions_is_that_energy_solved_densely():
    """E = sum 1/2 |x_l - W x_l-1|^2 + 1/2 |x_l-1 - V x_l|^2 at lambda = 1, of a linear net."""
    net, x, y = Bidirectional().double(), torch.randn(6, 5).double(), torch.randn(6, 3).double()
    relaxer = ebm.ErrorCoordinates(2000, tol=1e-13)
    learner = ebm.Learner(net, ebm.Algorithm(nudge=ebm.OneSided(1.0), relaxer=relaxer), layers=["up.1", "up.3"])
    found = learner.gradients(lambda: net(x, y))

    def energy(states):
        h1, h2 = states[:, :4], states[:, 4:]
        up, down = (h1 - net.up[0](x), h2 - net.up[2](h1)), (x - net.down1(h1), h1 - net.down2(h2))
        return 0.5 * sum(e.square().sum() for e in (*up, *down, net.up[4](h2) - y))

    states = torch.zeros(6, 8).double().requires_grad_()
    (slope,) = torch.autograd.grad(energy(states), states)
    hessian = torch.autograd.functional.hessian(lambda s: energy(s.reshape(6, 8)), states.detach().flatten())
    solved = -torch.linalg.solve(hessian, slope.flatten()).reshape(6, 8)
    expected = torch.autograd.grad(energy(solved), list(net.parameters()))
    for (name, _), gradient in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient / 6, rtol=1e-8, atol=1e-10)
    at = learner.relax(lambda: net(x, y), nudge=1.0)
    torch.testing.assert_close(torch.cat([at.states["up.1"], at.states["up.3"]], 1), solved, rtol=0, atol=1e-6)
