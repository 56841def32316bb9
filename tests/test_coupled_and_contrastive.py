"""Rules that hold the output: coupled learning and contrastive Hebbian learning.

Their limits are not the gradient of the loss, and that is asserted as sharply as what they are: coupled
learning tends to the gradient under the force K dL/do (K the output's stiffness), Xie and Seung's contrastive
Hebbian rule to backprop's as the feedback gain gamma goes to 0.
"""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Problem,
    backprop,
    fitted_slope,
    make_net,
    make_problem,
    relative_error,
    worst_relative_error,
)
from oracles_clamped import Sides, cosine, coupled, coupled_predictive_coding, k_weighted_gradient
from oracles_hopfield import (
    Hopfield,
    centred,
    contrast,
    energy,
    loss,
    make_hopfield_net,
    relax,
    settle,
    zero_states,
)
from oracles_implicit import implicit_gradient
from torch import nn

import lightning_ebm as ebm

torch.set_num_threads(1)

SETTLED = 60
SIDES = pytest.mark.parametrize("sides", ["both", "positive", "negative"])
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
ENDS = pytest.mark.parametrize("ends", [False, True])


def algorithm_of(
    nudge: ebm.Nudge, name: str = "coupled-learning", *, feedback: float = 1.0, sweeps: int = SETTLED, start="forward"
) -> ebm.Algorithm:
    return ebm.algorithm(
        name,
        energy=ebm.Hopfield(feedback=feedback),
        nudge=nudge,
        relaxer=ebm.FixedPoint(sweeps),
        free_relaxer=None,
        initial_state=start,
    )


def library_gradients(net: nn.Module, problem: Problem, algorithm: ebm.Algorithm) -> Gradients:
    learner = ebm.Learner(net, algorithm, output="state", loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


def implicit(chain: Hopfield, problem: Problem) -> Gradients:
    return implicit_gradient(
        lambda s: energy(chain, problem, s),
        lambda s: loss(chain, problem, s),
        settle(chain, problem),
        chain.parameters,
    )


# ------------------------------------------------------------------------------------------ coupled learning


@SIDES
@LOSSES
@ENDS
@pytest.mark.parametrize("eta", [0.3, 0.01])
def test_coupled_learning_is_the_hand_written_rule(sides: Sides, loss_name: str, ends: bool, eta: float) -> None:
    """Settled phases on the Hopfield energy. Catches a held output that still relaxes, a nudge added besides,
    eta divided by the batch, and two sides divided by eta.
    """
    net, problem = make_hopfield_net(ends_in_activation=ends), make_problem(loss_name)
    expected = coupled(Hopfield.copy_of(net), problem, eta, sides)
    found = library_gradients(net, problem, algorithm_of(ebm.Coupled(eta, sides=sides)))
    assert worst_relative_error(found, expected) < 1e-9 / eta


def test_coupled_learning_sweep_for_sweep() -> None:
    """Nine sweeps from zeros, then nine with the output held: a finite computation, equal to round-off."""
    net, problem, eta = (
        make_hopfield_net(activation=lambda: nn.Hardtanh(0.0, 1.0), gain=0.6, bias=0.4),
        make_problem(),
        0.5,
    )
    chain = Hopfield.copy_of(net)
    free = relax(chain, problem, zero_states(chain, problem), 0.0, 9)
    held = [free[-1] - sign * eta * (free[-1] - problem.y) for sign in (1, -1)]
    towards, away = (relax(chain, problem, free, 0.0, 9, held=value) for value in held)
    expected = contrast(chain, problem, (eta, towards), (-eta, away))
    found = library_gradients(net, problem, algorithm_of(ebm.Coupled(eta), sweeps=9, start="zeros"))
    assert worst_relative_error(found, expected) < 1e-9


@SIDES
@LOSSES
def test_coupled_learning_on_the_quadratic_energy(sides: Sides, loss_name: str) -> None:
    """The rule is the energy's whatever the energy: predictive coding with a held output, by Newton's method."""
    net, problem, eta = make_net(), make_problem(loss_name), 0.1
    expected = coupled_predictive_coding(Chain.copy_of(net, "after", "state"), problem, eta, sides)
    algorithm = ebm.Algorithm(
        energy=ebm.PredictiveCoding(),
        nudge=ebm.Coupled(eta, sides=sides),
        relaxer=ebm.GradientDescent(lr=0.3, max_steps=700),
    )
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-5


@LOSSES
@ENDS
@pytest.mark.parametrize(("sides", "order"), [("positive", 1), ("negative", 1), ("both", 2)])
def test_coupled_learning_tends_to_the_k_weighted_gradient(
    loss_name: str, ends: bool, sides: Sides, order: int
) -> None:
    """Claim Q19: slopes 1 and 2 in eta to the response under K dL/do, K by dense inversion of the Hessian."""
    net, problem, etas = make_hopfield_net(ends_in_activation=ends), make_problem(loss_name), [1e-1, 1e-2, 1e-3]
    chain = Hopfield.copy_of(net)
    states = settle(chain, problem)
    limit = k_weighted_gradient(lambda s: energy(chain, problem, s), states, problem, chain.parameters)
    errors = [
        relative_error(library_gradients(net, problem, algorithm_of(ebm.Coupled(eta, sides=sides))), limit)
        for eta in etas
    ]
    assert fitted_slope(etas, errors) == pytest.approx(order, abs=0.05), errors


@LOSSES
@ENDS
def test_coupled_learning_does_not_converge_to_the_gradient(loss_name: str, ends: bool) -> None:
    """At eta 1e-4, where its own bias is gone, the cosine is below .995; EP's is above .9999 at beta .01."""
    net, problem = make_hopfield_net(ends_in_activation=ends), make_problem(loss_name)
    true = implicit(Hopfield.copy_of(net), problem)
    settled = {eta: library_gradients(net, problem, algorithm_of(ebm.Coupled(eta))) for eta in (1e-2, 1e-4)}
    assert cosine(settled[1e-4], true) < 0.995
    assert cosine(settled[1e-4], settled[1e-2]) > 0.9999
    ep = library_gradients(net, problem, algorithm_of(ebm.Centered(0.01), "equilibrium-propagation"))
    assert cosine(ep, true) > 0.9999


# ---------------------------------------------------------------------------------- contrastive Hebbian learning


@ENDS
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_contrastive_hebbian_is_the_hand_written_rule(ends: bool, gamma: float) -> None:
    """Output held at y; layer l's Hebbian contrast times gamma^(l-L). Catches a gain on the drive instead of
    the feedback, and a contrast that is not rescaled.
    """
    net, problem = make_hopfield_net(gain=0.6, ends_in_activation=ends), make_problem()
    chain = Hopfield.copy_of(net, gamma=gamma)
    free = settle(chain, problem)
    clamped = settle(chain, problem, 0.0, free, held=problem.y)
    expected: Gradients = {}
    for layer, name in enumerate(("0", "2", "4")):
        gain = gamma ** (layer - 2)
        below = [problem.x] * 2 if layer == 0 else [clamped[layer - 1], free[layer - 1]]
        rows = len(problem.x)
        expected[f"{name}.weight"] = -gain * (clamped[layer].T @ below[0] - free[layer].T @ below[1]) / rows
        expected[f"{name}.bias"] = -gain * (clamped[layer] - free[layer]).sum(0) / rows
    found = library_gradients(net, problem, algorithm_of(ebm.Clamped(), "contrastive-hebbian", feedback=gamma))
    assert worst_relative_error(found, expected) < 1e-9


@LOSSES
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_clamped_is_positive_coupled_at_eta_one(loss_name: str, gamma: float) -> None:
    """Two presets, one rule."""
    net, problem = make_hopfield_net(gain=0.6), make_problem(loss_name)
    hebbian = library_gradients(net, problem, algorithm_of(ebm.Clamped(), "contrastive-hebbian", feedback=gamma))
    positive = library_gradients(net, problem, algorithm_of(ebm.Coupled(1.0, sides="positive"), feedback=gamma))
    assert worst_relative_error(hebbian, positive) < 1e-13


@LOSSES
def test_contrastive_hebbian_error_is_proportional_to_gamma(loss_name: str) -> None:
    """Claim Q18 (Xie and Seung): with a fully clamped linear output, feed-forward backprop + O(gamma)."""
    net, problem, gammas = make_hopfield_net(), make_problem(loss_name), [1e-1, 1e-2, 1e-3]
    true = backprop(Chain.copy_of(net), problem)[0]
    errors = [
        relative_error(
            library_gradients(net, problem, algorithm_of(ebm.Clamped(), "contrastive-hebbian", feedback=gamma)), true
        )
        for gamma in gammas
    ]
    assert fitted_slope(gammas, errors) == pytest.approx(1.0, abs=0.1), errors
    assert errors[-1] < 1e-2


def test_a_clamped_nonlinear_output_has_no_slope_in_its_delta() -> None:
    """A hard clamp teaches rho(a_L) by x_L - y, without rho': backprop of the matching loss, not of the squared
    error; and the difference does not shrink with gamma.
    """
    net, problem, gammas = make_hopfield_net(ends_in_activation=True), make_problem(), [1e-1, 1e-2, 1e-3]
    output = net(problem.x)
    delta = (output - problem.y).detach()
    matching = (net[:-1](problem.x) * delta).sum() / len(problem.x)
    names, tensors = zip(*net.named_parameters(), strict=True)
    limit = dict(zip(names, torch.autograd.grad(matching, tensors), strict=True))
    found = [
        library_gradients(net, problem, algorithm_of(ebm.Clamped(), "contrastive-hebbian", feedback=gamma))
        for gamma in gammas
    ]
    errors = [relative_error(g, limit) for g in found]
    assert fitted_slope(gammas, errors) == pytest.approx(1.0, abs=0.1), errors
    assert relative_error(found[-1], backprop(Chain.copy_of(net), problem)[0]) > 0.1


@pytest.mark.parametrize("gamma", [0.3, 0.15])
def test_a_gain_is_no_bias_against_its_own_equilibrium(gamma: float) -> None:
    """sum_l gamma^(l-L) [G(x_l) - <x_l, a_l>] is the energy of the dynamics with gain gamma: a small nudge gives
    the implicit gradient at any gamma (slope 2), while against feed-forward backprop the gain stays as a bias.
    """
    net, problem, betas = make_hopfield_net(gain=0.6), make_problem(), [1e-3, 1e-2, 5e-2]
    chain = Hopfield.copy_of(net, gamma=gamma)
    true = implicit(chain, problem)
    errors = []
    for beta in betas:
        algorithm = algorithm_of(ebm.Centered(beta), "equilibrium-propagation", feedback=gamma)
        found = library_gradients(net, problem, algorithm)
        errors.append(relative_error(found, true))
        assert worst_relative_error(found, centred(chain, problem, beta)) < 1e-9 / beta
    assert fitted_slope(betas, errors) == pytest.approx(2.0, abs=0.05), errors
    assert relative_error(true, backprop(Chain.copy_of(net), problem)[0]) > 0.05
