"""Dual propagation: dyads z+- with the output pushed by -+ beta/2 dL/do, one phase, against dyads by hand.

Piecewise linear activations make it backprop exactly, as long as no unit's dyad straddles a kink; smooth ones
leave a bias of second order in beta.
"""

from __future__ import annotations

import pytest
import torch
from oracles import Chain, Gradients, Problem, backprop, fitted_slope, make_net, make_problem, relative_error
from oracles_dyads import dyads
from oracles_hopfield import Hopfield
from torch import nn

import lightning_ebm as ebm

torch.set_num_threads(1)

OUTPUTS = pytest.mark.parametrize("output", ["state", "readout"])
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "half-mse-sum", "cross-entropy-mean"])
SEED = 150  # inputs that keep every hidden unit away from its kinks


def dual_propagation(beta: float, passes: int | None) -> ebm.Algorithm:
    """The call, in one place: the output pushed by -+ beta/2, the update divided by beta; the preset's own number of
    passes or another.
    """
    parts = {} if passes is None else {"relaxer": ebm.Dyadic(passes, tol=0.0)}
    return ebm.algorithm("dual-propagation", nudge=ebm.Centered(beta / 2), **parts)


def library_gradients(
    net: nn.Module, problem: Problem, beta: float, output: str = "auto", passes: int | None = None
) -> Gradients:
    learner = ebm.Learner(net, dual_propagation(beta, passes), output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


def margin(net: nn.Sequential, x: torch.Tensor, kinks: tuple[float, ...] = (0.0,)) -> float:
    """The smallest distance of any drive of a hidden unit from a kink."""
    drives = [net[: i + 1](x) for i, module in enumerate(net[:-1]) if isinstance(module, nn.Linear)]
    return min((drive - kink).abs().min().item() for drive in drives for kink in kinks)


@OUTPUTS
@LOSSES
def test_with_relu_it_is_backprop(output: str, loss_name: str) -> None:
    """Claim: equal to 1e-12 at beta 1e-3. Catches an average taken of the drives instead of the dyads, a lost
    half, and a loss slope taken at z+ and z- (O(beta^2), 1e-7) instead of at their mean.
    """
    net, problem = make_net(activation=nn.ReLU), make_problem(loss_name, batch=2, seed=SEED)
    assert margin(net, problem.x) > 5e-2  # no dyad reaches across
    true = backprop(Chain.copy_of(net), problem)[0]
    assert relative_error(library_gradients(net, problem, 1e-3, output), true) < 1e-12


@LOSSES
def test_with_the_hard_sigmoid_it_is_backprop(loss_name: str) -> None:
    """Two kinks, the same claim: clamped units carry a difference of exactly zero."""
    net = make_net(activation=lambda: nn.Hardtanh(0.0, 1.0))
    problem = make_problem(loss_name, batch=2, seed=SEED)
    assert margin(net, problem.x, (0.0, 1.0)) > 5e-2
    true = backprop(Chain.copy_of(net), problem)[0]
    assert relative_error(library_gradients(net, problem, 1e-3), true) < 1e-12


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
@pytest.mark.parametrize("ends", [False, True])
def test_smooth_activations_leave_a_second_order_bias(activation: type[nn.Module], loss_name: str, ends: bool) -> None:
    """Claim Q20: slope 2 in beta. Slope 1 means a mean with unequal weights."""
    net, problem = make_net(activation=activation, ends_in_activation=ends), make_problem(loss_name)
    true, betas = backprop(Chain.copy_of(net), problem)[0], [1e-1, 1e-2, 1e-3]
    errors = [relative_error(library_gradients(net, problem, beta), true) for beta in betas]
    assert fitted_slope(betas, errors) == pytest.approx(2.0, abs=0.05), errors
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("ends", [False, True])
def test_settled_dyads_are_the_hand_written_ones(activation: type[nn.Module], ends: bool) -> None:
    """At beta = .5, far from any limit, kinks crossed: number for number."""
    net, problem = make_net(activation=activation, ends_in_activation=ends), make_problem()
    expected = dyads(Hopfield.copy_of(net), problem, 0.5)
    assert relative_error(library_gradients(net, problem, 0.5, passes=60), expected) < 1e-9
