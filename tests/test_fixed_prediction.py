"""Predictive coding with fixed predictions: backprop exactly at every lambda, after as many unit steps as layers."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Output,
    Place,
    Problem,
    backprop,
    make_net,
    make_problem,
    worst_relative_error,
)
from oracles_fixed_prediction import fixed_prediction
from torch import nn

import lightning_ebm as ebm

torch.set_num_threads(1)

LAYERS: dict[Place, type[nn.Module] | None] = {"after": None, "before": nn.Linear}
KINDS = pytest.mark.parametrize(
    ("place", "output"), [("after", "readout"), ("after", "state"), ("before", "readout"), ("before", "state")]
)
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "half-mse-sum", "cross-entropy-mean"])


def with_fixed_predictions(lam: float, eta: float, steps: int) -> ebm.Algorithm:
    """The call, in one place."""
    return ebm.algorithm(
        "fixed-prediction", nudge=ebm.OneSided(lam), relaxer=ebm.FixedPrediction(lr=eta, max_steps=steps, tol=0.0)
    )


def library_gradients(
    net: nn.Module, problem: Problem, algorithm: ebm.Algorithm, place: Place, output: Output
) -> Gradients:
    learner = ebm.Learner(net, algorithm, layers=LAYERS[place], output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


@KINDS
@LOSSES
@pytest.mark.parametrize("lam", [1.0, 0.01, 10.0])
def test_unit_steps_give_backprop_at_any_lambda(place: Place, output: Output, loss_name: str, lam: float) -> None:
    """Catches Jacobians, presynaptic values or a loss slope that moved with the states."""
    net, problem = make_net(), make_problem(loss_name)
    chain = Chain.copy_of(net, place, output)
    algorithm = with_fixed_predictions(lam, 1.0, len(chain.forward_states(problem.x)))
    found = library_gradients(net, problem, algorithm, place, output)
    assert worst_relative_error(found, backprop(chain, problem)[0]) < 1e-12


@KINDS
@pytest.mark.parametrize(("eta", "steps"), [(0.1, 7), (0.3, 30), (1.0, 2)])
def test_a_finite_number_of_steps(place: Place, output: Output, eta: float, steps: int) -> None:
    """The errors' own recursion, step for step; layers that no signal has reached have exactly no gradient."""
    net, problem = make_net(), make_problem()
    expected = fixed_prediction(Chain.copy_of(net, place, output), problem, 0.5, eta, steps)
    found = library_gradients(net, problem, with_fixed_predictions(0.5, eta, steps), place, output)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)
        assert bool(value.any()) == bool(found[name].any())


@KINDS
@LOSSES
def test_many_small_steps_give_backprop_too(place: Place, output: Output, loss_name: str) -> None:
    """The fixed point does not know the step: 300 at eta = .2."""
    net, problem = make_net(), make_problem(loss_name)
    found = library_gradients(net, problem, with_fixed_predictions(1.0, 0.2, 300), place, output)
    assert worst_relative_error(found, backprop(Chain.copy_of(net, place, output), problem)[0]) < 1e-11


def test_the_estimate_does_not_depend_on_lambda() -> None:
    """The recursion is linear in lambda: at any number of steps, not only at its end."""
    net, problem = make_net(), make_problem("cross-entropy-mean")
    small, large = (
        library_gradients(net, problem, with_fixed_predictions(lam, 0.3, 9), "after", "readout") for lam in (0.02, 5.0)
    )
    assert worst_relative_error(small, large) < 1e-12


@pytest.mark.parametrize("relaxer", [ebm.FixedPrediction(), ebm.Sweep()], ids=["relaxed", "first arrival"])
@pytest.mark.parametrize("nudge", [ebm.Centered(0.3), ebm.OneSided(-2.0), ebm.Holomorphic(0.3, 2)], ids=str)
def test_several_phases_share_the_graph_of_the_forward_pass(nudge: ebm.Nudge, relaxer: ebm.Relaxer) -> None:
    """Through `backward`, which frees what it went through."""
    net, problem = make_net(), make_problem()
    learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), nudge, relaxer), layers=LAYERS["after"])
    learner.backward(lambda: problem.loss(net(problem.x), problem.y))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert worst_relative_error(found, backprop(Chain.copy_of(net, "after", "readout"), problem)[0]) < 1e-12
