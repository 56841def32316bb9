"""Predictive coding by an augmented Lagrangian: multipliers make the constraints exact at any finite penalty rho."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Output,
    Problem,
    backprop,
    equilibrium,
    make_net,
    make_problem,
    relative_error,
    update,
    worst_relative_error,
)
from oracles_multipliers import augmented_lagrangian, linear_rate
from torch import nn

import lightning_ebm as ebm

torch.set_num_threads(1)

OUTPUTS = pytest.mark.parametrize("output", ["readout", "state"])
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])


def augmented_lagrangian_pc(rho: float, outer_steps: int) -> ebm.Algorithm:
    """The call, in one place: penalty rho is a nudge of 1/rho; the inner problem is solved to round-off."""
    return ebm.algorithm(
        "augmented-lagrangian-pc",
        nudge=ebm.OneSided(1 / rho),
        relaxer=ebm.AugmentedLagrangian(outer_steps, ebm.ErrorCoordinates(max_steps=500, tol=1e-12)),
    )


def library_gradients(
    net: nn.Module, problem: Problem, rho: float, outer_steps: int, output: str = "readout", layers: object = None
) -> Gradients:
    algorithm = augmented_lagrangian_pc(rho, outer_steps)
    learner = ebm.Learner(net, algorithm, layers=layers, output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


@OUTPUTS
@LOSSES
@pytest.mark.parametrize("rho", [3.0, 10.0])
def test_the_first_outer_step_is_predictive_coding(output: Output, loss_name: str, rho: float) -> None:
    """With multipliers at zero, lambda = 1/rho: Newton's equilibrium of the quadratic energy."""
    net, problem = make_net(), make_problem(loss_name)
    chain = Chain.copy_of(net, "after", output)
    expected = update(chain, problem, equilibrium(chain, problem, 1 / rho), 1 / rho)
    assert worst_relative_error(library_gradients(net, problem, rho, 1, output), expected) < 1e-8


@OUTPUTS
@LOSSES
@pytest.mark.parametrize("outer_steps", [2, 3, 6])
def test_outer_steps_by_hand(output: Output, loss_name: str, outer_steps: int) -> None:
    """Each inner minimum by Newton's method. Catches a multiplier of the wrong sign or scale (rho), and an
    update read with the multipliers of the step before.
    """
    net, problem, rho = make_net(), make_problem(loss_name, batch=2), 10.0
    expected = augmented_lagrangian(Chain.copy_of(net, "after", output), problem, rho, outer_steps)[-1]
    assert worst_relative_error(library_gradients(net, problem, rho, outer_steps, output), expected) < 1e-7


@OUTPUTS
@LOSSES
def test_outer_steps_converge_linearly_to_backprop(output: Output, loss_name: str) -> None:
    """Claim Q20: exact at a finite penalty, nonlinear net; the error falls by a factor bounded away from 1."""
    net, problem, rho = make_net(), make_problem(loss_name, batch=2), 10.0
    true = backprop(Chain.copy_of(net), problem)[0]
    errors = [relative_error(library_gradients(net, problem, rho, n, output), true) for n in (1, 2, 4, 8, 16)]
    assert all(
        later < 0.6 ** (n) * earlier for earlier, later, n in zip(errors, errors[1:], (1, 2, 4, 8), strict=False)
    )
    assert errors[-1] < 1e-6


@OUTPUTS
def test_the_rate_of_a_linear_chain(output: Output) -> None:
    """Closed form: under 1/2 |o - y|^2 each outer step multiplies the error by s/(s + rho), s the largest
    eigenvalue of the compliance S.
    """
    net, problem, rho = make_net(activation=None), make_problem(batch=2), 10.0
    chain = Chain.copy_of(net, "before", output)
    true = backprop(chain, problem)[0]
    seven, eight = (
        relative_error(library_gradients(net, problem, rho, n, output, layers=nn.Linear), true) for n in (7, 8)
    )
    assert eight / seven == pytest.approx(linear_rate(chain, rho), rel=5e-3)
