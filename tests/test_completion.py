"""Filling in what is not held: against conditional means of Gaussians, and gradients through dense solves."""

import functools
import itertools

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

SEEN = torch.arange(7) < 4
WIDTHS = (2, 4, 5, 7)
PRECISIONS = {"0": 1.3, "2": 0.7, "4": 2.1, "6": 5.0}


class Plain(nn.Module):
    """An activation that is linear, and a layer all the same."""

    def forward(self, x):
        return 1 * x


def generator(kind):
    """Named "0" at the latent, "2" and "4" at hidden states, "6" at what is generated."""
    torch.manual_seed(3)
    parts = [nn.Identity()]
    for a, b in itertools.pairwise(WIDTHS):
        parts += [nn.Linear(a, b), kind()]
    return nn.Sequential(*parts).double()


def data(count=9):
    torch.manual_seed(4)
    return torch.randn(count, WIDTHS[-1], dtype=torch.float64)


def test_a_linear_net_fills_in_the_conditional_mean_of_factor_analysis():
    """Of the marginal over all hidden states: mean and covariance are carried down layer by layer, no energy in sight.

    The latent has mean 0 and covariance 1 / Pi_0; each layer's covariance is W S W' + 1 / Pi. Of a Gaussian what is
    missing has the mean m_b + S_ba S_aa^-1 (x_a - m_a).
    """
    net, image = generator(Plain), data()
    mean = torch.zeros(WIDTHS[0], dtype=torch.float64)
    covariance = torch.eye(WIDTHS[0], dtype=torch.float64) / PRECISIONS["0"]
    for name, linear in (("2", net[1]), ("4", net[3]), ("6", net[5])):
        mean = linear.weight @ mean + linear.bias
        covariance = linear.weight @ covariance @ linear.weight.T
        covariance = covariance + torch.eye(len(mean), dtype=torch.float64) / PRECISIONS[name]
    of_seen = torch.linalg.solve(covariance[SEEN][:, SEEN], (image - mean)[:, SEEN].T)
    expected = mean[~SEEN] + (covariance[~SEEN][:, SEEN] @ of_seen).T
    learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(PRECISIONS)), layers=list(PRECISIONS), output="state")
    latent = torch.zeros(len(image), WIDTHS[0], dtype=torch.float64)
    found = learner.relax(lambda: net(latent), clamp={"6": (image, SEEN)}, relaxer=ebm.QuasiNewton(500, tol=1e-12))
    torch.testing.assert_close(found.states["6"][:, ~SEEN], expected, rtol=1e-9, atol=1e-9)


def completed(net, image):
    """The equilibrium with the seen units held, by Newton's method on explicit states, differentiable in weights.

    One Newton step from the minimum is the implicit derivative: its value is the minimum, its slope that of it.
    """
    count = sum(WIDTHS[:-1]) + int((~SEEN).sum())

    def energy(free, shown):
        z, one, two, missing = free.split([*WIDTHS[:-1], int((~SEEN).sum())])
        three = torch.cat([shown[SEEN], missing])
        return 0.5 * (
            PRECISIONS["0"] * z.square().sum()
            + PRECISIONS["2"] * (one - torch.tanh(net[1](z))).square().sum()
            + PRECISIONS["4"] * (two - torch.tanh(net[3](one))).square().sum()
            + PRECISIONS["6"] * (three - torch.tanh(net[5](two))).square().sum()
        )

    rows = []
    for shown in image:
        free = torch.zeros(count, dtype=torch.float64)
        for _ in range(60):
            slope = torch.func.grad(energy)(free, shown).detach()
            if slope.norm() < 1e-11:
                break
            curvature = torch.func.hessian(energy)(free, shown).detach()
            values, vectors = torch.linalg.eigh(curvature)
            step = -vectors @ ((vectors.T @ slope) / values.abs().clamp_min(1e-3))
            length = 1.0
            while energy(free + length * step, shown) > energy(free, shown) + 1e-12 and length > 1e-6:
                length /= 2
            free = free + length * step
        curvature = torch.func.hessian(energy)(free, shown).detach()
        assert slope.norm() < 1e-9
        assert torch.linalg.eigvalsh(curvature).min() > 0
        free = free - torch.linalg.solve(curvature, torch.func.grad(energy)(free, shown))
        rows.append(free[-int((~SEEN).sum()) :])
    return torch.stack(rows)


@functools.cache
def problem():
    """A net, images, and the gradient of the error of what is filled in, in one row."""
    net, image = generator(nn.Tanh), data() / 2
    loss = 0.5 * (completed(net, image) - image[:, ~SEEN]).square().sum(1).mean()
    return net, image, flat(torch.autograd.grad(loss, list(net.parameters())))


def error_of(nudge, relaxer, free_relaxer):
    """Of the update that fits what is filled in to what is missing, relative."""
    net, image, true = problem()
    latent = torch.zeros(len(image), WIDTHS[0], dtype=torch.float64)
    algorithm = ebm.Algorithm(ebm.PredictiveCoding(PRECISIONS), nudge, relaxer, free_relaxer=free_relaxer)
    learner = ebm.Learner(net, algorithm, layers=list(PRECISIONS), output="state")
    found = learner.gradients(
        lambda: 0.5 * (net(latent) - image)[:, ~SEEN].square().sum(1).mean(), clamp={"6": (image, SEEN)}
    )
    return float((flat(found[name] for name, _ in net.named_parameters()) - true).norm() / true.norm())


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


TIGHT = {coordinates: ebm.QuasiNewton(500, tol=1e-13, coordinates=coordinates) for coordinates in ("states", "errors")}


def test_weights_learn_to_fill_in_by_the_gradient_of_the_error_of_what_is_filled_in():
    """To O(lambda^2): ten times less of a nudge, a hundred times less of an error."""
    errors = [error_of(ebm.Centered(strength), TIGHT["states"], TIGHT["errors"]) for strength in (1e-1, 1e-2)]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_what_a_free_phase_has_not_settled_is_in_both_phases_of_a_centered_nudge_and_in_no_update():
    """One-sided, the difference to a free phase that was cut off is divided by lambda, and grows as lambda shrinks."""
    short, on = ebm.GradientDescent(0.1, 5), ebm.GradientDescent(0.1, 60)
    centered = [error_of(ebm.Centered(strength), on, short) for strength in (1e-1, 1e-2)]
    one_sided = [error_of(ebm.OneSided(strength), on, short) for strength in (1e-1, 1e-2)]
    assert max(centered) < 0.1
    assert min(one_sided) > 10 * max(centered)
    assert one_sided[1] > 5 * one_sided[0]
