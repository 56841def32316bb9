"""Precisions of predictive coding: one number, one per layer, one per unit.

E = sum_l 1/2 <eps_l, Pi_l eps_l> + lambda loss. At finite lambda they shape the states; in the limit
Pi_l eps_l = -lambda delta_l whatever Pi is, so the update is backprop's.
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
from torch import Tensor, nn

import lightning_ebm as ebm

torch.set_num_threads(1)

SIZES = (4, 6, 6, 6, 3)  # hidden layers "1", "3", "5" of one width, so that one tensor can serve all
UNITS = torch.linspace(0.25, 4.25, 6, dtype=torch.float64)
PRECISIONS: dict[str, object] = {
    "scalar": 2.5,
    "layers": {"1": 0.25, "3": 1.0, "5": 4.0},
    "units": UNITS,
    "units of layers": {"1": UNITS, "3": UNITS.flip(0), "5": 0.5 * UNITS + 1},
}
KINDS = pytest.mark.parametrize("kind", list(PRECISIONS))
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])


def per_layer(precision: object) -> list[Tensor]:
    values = [precision[name] if isinstance(precision, dict) else precision for name in ("1", "3", "5")]
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def total_energy(chain: Chain, problem: Problem, states: list[Tensor], lam: float, weights: list[Tensor]) -> Tensor:
    predictions, _, output = chain.run(problem.x, states)
    terms = zip(weights, states, predictions, strict=True)
    return sum((0.5 * w * (x - mu).square()).sum() for w, x, mu in terms) + lam * problem.summed_loss(output)


def euler_update(chain: Chain, problem: Problem, lam: float, precision: object, lr: float, steps: int) -> Gradients:
    weights, states = per_layer(precision), chain.forward_states(problem.x)
    for _ in range(steps):
        leaves = [state.requires_grad_() for state in states]
        slopes = torch.autograd.grad(total_energy(chain, problem, leaves, lam, weights), leaves)
        states = [(x - lr * slope).detach() for x, slope in zip(states, slopes, strict=True)]
    names, tensors = zip(*chain.parameters.items(), strict=True)
    slopes = torch.autograd.grad(total_energy(chain, problem, states, lam, weights), tensors)
    return {name: slope / (lam * problem.scale) for name, slope in zip(names, slopes, strict=True)}


def library_gradients(
    net: nn.Module,
    problem: Problem,
    lam: float,
    precision: object,
    relaxer: ebm.Relaxer,
    name: str = "predictive-coding",
) -> Gradients:
    algorithm = ebm.algorithm(
        "predictive-coding", energy=ebm.PredictiveCoding(precision=precision), nudge=ebm.OneSided(lam), relaxer=relaxer
    )
    learner = ebm.Learner(net, algorithm, output="readout", loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


@KINDS
@LOSSES
@pytest.mark.parametrize("lam", [1.0, 0.05])
def test_euler_steps_by_hand(kind: str, loss_name: str, lam: float) -> None:
    """Catches precisions given to the wrong layer, to the square (Pi^2), or to the relaxation and not the update."""
    net, problem, precision = make_net(SIZES), make_problem(loss_name), PRECISIONS[kind]
    expected = euler_update(Chain.copy_of(net), problem, lam, precision, 0.1, 15)
    found = library_gradients(net, problem, lam, precision, ebm.GradientDescent(lr=0.1, max_steps=15))
    assert worst_relative_error(found, expected) < 1e-11


@KINDS
@LOSSES
def test_the_limit_does_not_know_the_precision(kind: str, loss_name: str) -> None:
    """Claim Q15: slope 1 in lambda, to backprop itself. An update on the unweighted error stays wrong by Pi."""
    net, problem, lambdas = make_net(SIZES), make_problem(loss_name), [1e-4, 1e-3, 1e-2]
    true = backprop(Chain.copy_of(net), problem)[0]
    relaxer = ebm.ErrorCoordinates(max_steps=1000, lr=0.3, tol=1e-12)
    errors = [relative_error(library_gradients(net, problem, lam, PRECISIONS[kind], relaxer), true) for lam in lambdas]
    assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05), errors


def test_precisions_matter_at_finite_lambda() -> None:
    """The control of the test above: at lambda = 1 the four precisions give four updates."""
    net, problem = make_net(SIZES), make_problem()
    relaxer = ebm.GradientDescent(lr=0.1, max_steps=60)
    found = [library_gradients(net, problem, 1.0, precision, relaxer) for precision in PRECISIONS.values()]
    for i, left in enumerate(found):
        assert all(relative_error(left, right) > 0.02 for right in found[i + 1 :])


def test_a_layer_of_equal_units_is_a_layer_with_a_scalar() -> None:
    """Three spellings of the same precisions."""
    net, problem = make_net(SIZES), make_problem()
    relaxer = ebm.GradientDescent(lr=0.1, max_steps=15)
    same = [2.0, dict.fromkeys(("1", "3", "5"), 2.0), torch.full((6,), 2.0, dtype=torch.float64)]
    first, *others = (library_gradients(net, problem, 0.3, precision, relaxer) for precision in same)
    assert all(worst_relative_error(other, first) < 1e-13 for other in others)


def test_a_name_that_is_no_layer_is_refused() -> None:
    """A misspelt layer would otherwise train with precision 1 in silence."""
    net, problem = make_net(SIZES), make_problem()
    with pytest.raises(ebm.EBMError, match="7"):
        library_gradients(net, problem, 1.0, {"1": 1.0, "7": 2.0}, ebm.GradientDescent(lr=0.1, max_steps=2))
