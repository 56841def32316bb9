"""The infinitesimal inference limit: how fast the update tends to backprop's gradient, and what it is before
that.

Smooth networks in float64, relaxed far below the effect that is measured. Every expected number is a theorem
of theory.md or a closed form; no constant was read off the library.
"""

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
    equilibrium,
    fitted_slope,
    linear_equilibrium_update,
    loss_curvature_in_errors,
    make_net,
    make_problem,
    relative_error,
    total_energy,
    update,
    worst_relative_error,
)
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

torch.set_num_threads(1)

LAYERS: dict[Place, type[nn.Module] | None] = {"after": None, "before": nn.Linear}
KINDS = pytest.mark.parametrize(
    ("place", "output"),
    [("after", "readout"), ("after", "state"), ("before", "readout"), ("before", "state")],
)
SMOOTH_LOSSES = pytest.mark.parametrize("loss", ["half-mse-mean", "cross-entropy-mean"])


def error_coordinates(lr: float = 1.0) -> ebm.Relaxer:
    return ebm.ErrorCoordinates(max_steps=500, lr=lr, tol=1e-12)


def state_coordinates(steps: int = 1200) -> ebm.Relaxer:
    """The slowest mode has curvature 0.13 (states after activations, read-out): 1e-12 takes 1050 steps."""
    return ebm.GradientDescent(lr=0.2, max_steps=steps, tol=0.0)


def library_gradients(
    net: nn.Module,
    problem: Problem,
    nudge: ebm.Nudge,
    relaxer: ebm.Relaxer,
    place: Place = "after",
    output: Output = "readout",
    precision: float = 1.0,
) -> Gradients:
    algorithm = ebm.algorithm(
        "predictive-coding", energy=ebm.PredictiveCoding(precision=precision), nudge=nudge, relaxer=relaxer
    )
    learner = ebm.Learner(net, algorithm, layers=LAYERS[place], output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


def true_gradient(net: nn.Sequential, problem: Problem) -> Gradients:
    return backprop(Chain.copy_of(net), problem)[0]


# -------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("loss", ["half-mse-mean", "half-mse-sum", "cross-entropy-mean"])
def test_the_reference_is_backprop(loss: str) -> None:
    """Catches a yardstick that is itself bent: the reference and the "backprop" preset against deltas by
    hand.
    """
    net, problem = make_net(), make_problem(loss)
    expected = true_gradient(net, problem)

    def closure() -> torch.Tensor:
        return problem.loss(net(problem.x), problem.y)

    control = ebm.Learner(net, "backprop", loss_reduction=problem.reduction).gradients(closure)
    assert worst_relative_error(ebm.reference.backprop(net, closure), expected) < 1e-13
    assert worst_relative_error(control, expected) < 1e-13


# ---------------------------------------------------------------------------------------------------- slopes


@KINDS
@SMOOTH_LOSSES
def test_one_sided_error_is_first_order(place: Place, output: Output, loss: str) -> None:
    """Theory Q1. Slope 0 means a wrong limit (a lost factor, a lost precision); slope -1 means unrelaxed
    noise.
    """
    net, problem, lambdas = make_net(), make_problem(loss), [1e-4, 1e-3, 1e-2]
    errors = [
        relative_error(
            library_gradients(net, problem, ebm.OneSided(lam), error_coordinates(), place, output),
            true_gradient(net, problem),
        )
        for lam in lambdas
    ]
    assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05), errors


@KINDS
@SMOOTH_LOSSES
def test_centred_error_is_second_order(place: Place, output: Output, loss: str) -> None:
    """Theory Q2. Slope 1 means phases that are not mirror images, e.g. the second one started from the
    first.
    """
    net, problem, lambdas = make_net(), make_problem(loss), [3e-3, 1e-2, 3e-2]
    errors = [
        relative_error(
            library_gradients(net, problem, ebm.Centered(lam), error_coordinates(), place, output),
            true_gradient(net, problem),
        )
        for lam in lambdas
    ]
    assert fitted_slope(lambdas, errors) == pytest.approx(2.0, abs=0.1), errors


@SMOOTH_LOSSES
def test_slopes_in_state_coordinates(loss: str) -> None:
    """The same laws from long plain relaxation: the slope belongs to the energy, not to the solver."""
    net, problem = make_net(), make_problem(loss)
    reference = true_gradient(net, problem)
    one_sided = [
        relative_error(library_gradients(net, problem, ebm.OneSided(lam), state_coordinates()), reference)
        for lam in (1e-3, 1e-2)
    ]
    centred = [
        relative_error(library_gradients(net, problem, ebm.Centered(lam), state_coordinates()), reference)
        for lam in (5e-3, 2e-2)
    ]
    assert fitted_slope([1e-3, 1e-2], one_sided) == pytest.approx(1.0, abs=0.05), one_sided
    assert fitted_slope([5e-3, 2e-2], centred) == pytest.approx(2.0, abs=0.1), centred


@KINDS
def test_negative_and_positive_nudges_err_on_opposite_sides(place: Place, output: Output) -> None:
    """The O(lambda) terms of +lambda and -lambda cancel; catches a sign of lambda that is lost in the
    division.
    """
    net, problem, lam = make_net(), make_problem(), 1e-3
    reference = true_gradient(net, problem)
    plus, minus = (
        library_gradients(net, problem, ebm.OneSided(sign * lam), error_coordinates(), place, output)
        for sign in (1, -1)
    )
    middle = {name: 0.5 * (plus[name] + minus[name]) for name in plus}
    assert relative_error(middle, reference) < 0.02 * relative_error(plus, reference)


# --------------------------------------------------------------------------------------- exact at any lambda


@pytest.mark.parametrize("lam", [0.01, 0.3, 1.0, 10.0, -0.5])
@pytest.mark.parametrize("precision", [1.0, 0.3, 4.0])
@SMOOTH_LOSSES
def test_zero_divergence_is_backprop(lam: float, precision: float, loss: str) -> None:
    """Theory P6: one top-down sweep with unit gain gives -lambda delta in every layer. Catches a precision
    that the sweep's step does not undo, and Jacobians or presynaptic values taken at moved states.
    """
    net, problem = make_net(), make_problem(loss)
    algorithm = ebm.algorithm(
        "zero-divergence", nudge=ebm.OneSided(lam), energy=ebm.PredictiveCoding(precision=precision)
    )
    learner = ebm.Learner(net, algorithm, loss_reduction=problem.reduction)
    found = learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
    assert worst_relative_error(found, true_gradient(net, problem)) < 1e-12


@KINDS
@pytest.mark.parametrize("loss", ["half-mse-sum", "cross-entropy-mean"])
def test_zero_divergence_wherever_the_states_are(place: Place, output: Output, loss: str) -> None:
    """The same for states before the activations and for an output state."""
    net, problem = make_net(), make_problem(loss)
    learner = ebm.Learner(
        net,
        ebm.algorithm("zero-divergence"),
        layers=LAYERS[place],
        output=output,
        loss_reduction=problem.reduction,
    )
    found = learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
    assert worst_relative_error(found, true_gradient(net, problem)) < 1e-12


# ----------------------------------------------------------------------------------------- what lambda means


@pytest.mark.parametrize("loss", ["half-mse-mean", "half-mse-sum", "cross-entropy-mean", "cross-entropy-sum"])
@pytest.mark.parametrize("lam", [1e-3, 0.1])
def test_a_replicated_batch_changes_nothing(loss: str, lam: float) -> None:
    """Catches lambda divided by the batch size: a mean loss over a doubled batch has the same gradient and
    the same error against backprop, a sum loss twice the gradient and the same error.
    """
    net, problem = make_net(), make_problem(loss)
    doubled = Problem(
        torch.cat([problem.x, problem.x]), torch.cat([problem.y, problem.y]), problem.loss, problem.reduction
    )
    once = library_gradients(net, problem, ebm.OneSided(lam), error_coordinates())
    twice = library_gradients(net, doubled, ebm.OneSided(lam), error_coordinates())
    factor = 1.0 if problem.reduction == "mean" else 2.0
    # relaxation may stop a step apart where its tolerance counts the batch, hence 1e-12 / lambda
    assert worst_relative_error(twice, {name: factor * value for name, value in once.items()}) < 1e-10 / lam
    error, doubled_error = (
        relative_error(found, true_gradient(net, case)) for found, case in ((once, problem), (twice, doubled))
    )
    assert doubled_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("family", ["half-mse", "cross-entropy"])
def test_lambda_means_the_same_under_both_reductions(family: str) -> None:
    """Catches a nudge B times too weak under "mean": the error at the same lambda would be B times
    smaller.
    """
    net = make_net()
    errors = []
    for reduction in ("mean", "sum"):
        problem = make_problem(f"{family}-{reduction}", batch=8)
        found = library_gradients(net, problem, ebm.OneSided(0.01), error_coordinates())
        errors.append(relative_error(found, true_gradient(net, problem)))
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


# ---------------------------------------------------------------------------- the equilibrium, finite lambda


@KINDS
@SMOOTH_LOSSES
def test_error_coordinates_reach_newtons_equilibrium(place: Place, output: Output, loss: str) -> None:
    """Catches an error-coordinate rule with another fixed point, e.g. one whose errors do not feed
    forward.
    """
    net, problem, lam = make_net(), make_problem(loss), 0.1
    chain = Chain.copy_of(net, place, output)
    assert lam * loss_curvature_in_errors(chain, problem) < 1.0  # unit steps in e contract
    found = library_gradients(net, problem, ebm.OneSided(lam), error_coordinates(), place, output)
    assert worst_relative_error(found, update(chain, problem, equilibrium(chain, problem, lam), lam)) < 1e-8


@SMOOTH_LOSSES
def test_error_and_state_coordinates_agree(loss: str) -> None:
    """A change of coordinates moves no minimum: two solvers, one energy, one update."""
    net, problem = make_net(), make_problem(loss)
    in_errors = library_gradients(net, problem, ebm.OneSided(0.1), error_coordinates())
    in_states = library_gradients(net, problem, ebm.OneSided(0.1), state_coordinates())
    assert worst_relative_error(in_errors, in_states) < 1e-8


@KINDS
@SMOOTH_LOSSES
def test_equilibrium_update_is_backprop_at_the_perturbed_activities(place: Place, output: Output, loss: str) -> None:
    """Theory P7, exact at finite lambda. Catches presynaptic values, Jacobians or a loss gradient taken at
    the forward pass: right in the limit, wrong everywhere else. The activities come from Newton's method.
    """
    net, problem, lam = make_net(), make_problem(loss), 0.1
    chain = Chain.copy_of(net, place, output)
    expected, _ = backprop(chain, problem, activities=equilibrium(chain, problem, lam))
    found = library_gradients(net, problem, ebm.OneSided(lam), error_coordinates(), place, output)
    assert worst_relative_error(found, expected) < 1e-8
    assert relative_error(found, true_gradient(net, problem)) > 1e-2  # the two sides are not trivially backprop


@pytest.mark.parametrize("output", ["readout", "state"])
@pytest.mark.parametrize("loss", ["half-mse-sum", "half-mse-mean"])
@pytest.mark.parametrize(("lam", "precision"), [(0.05, 1.0), (0.15, 1.5), (0.05, 0.5)])
def test_linear_closed_form(output: Output, loss: str, lam: float, precision: float) -> None:
    """Theory P8/Q17: eps_L = (precision/lambda + S)^-1 r, with no solver on the expected side. Catches a
    wrong half, precision or sign at finite lambda, where the limit no longer shows it.
    """
    net, problem = make_net(activation=None), make_problem(loss)
    chain = Chain.copy_of(net, "before", output, precision)
    # descent in e has curvature precision + lambda S: the step keeps it between 0 and 2
    top = precision + lam * precision * loss_curvature_in_errors(chain, problem)
    found = library_gradients(
        net, problem, ebm.OneSided(lam), error_coordinates(lr=1.0 / top), "before", output, precision
    )
    assert worst_relative_error(found, linear_equilibrium_update(chain, problem, lam)) < 1e-9


@pytest.mark.parametrize(("place", "output"), [("after", "readout"), ("before", "state")])
@pytest.mark.parametrize("loss", ["half-mse-sum", "cross-entropy-sum"])
def test_envelope_theorem(place: Place, output: Output, loss: str) -> None:
    """Theory P8: lambda times the update is d/dtheta of min_x E, with nothing added for the moving states.
    The right-hand side is a central difference of Newton minima along one random direction per parameter.
    """
    net, problem, lam, h = make_net(), make_problem(loss), 0.1, 1e-4
    found = library_gradients(net, problem, ebm.OneSided(lam), error_coordinates(), place, output)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        minima = []
        for sign in (1, -1):
            chain = Chain.copy_of(net, place, output)
            with torch.no_grad():
                chain.parameters[name].add_(sign * h * direction)
            minima.append(total_energy(chain, problem, equilibrium(chain, problem, lam), lam).item())
        slope = (minima[0] - minima[1]) / (2 * h)
        predicted = lam * (found[name] * direction).sum().item()
        scale = lam * (found[name].norm() * direction.norm()).item()
        assert predicted == pytest.approx(slope, abs=1e-5 * scale), name


# ------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", [0.5, 1.5])
def test_the_limit_does_not_know_the_precision(precision: float) -> None:
    """Theory P4/Q15: precision times error tends to -lambda delta. Catches an update built on the unweighted
    error, which is off by the factor 1/precision at every lambda.
    """
    net, problem, lambdas = make_net(), make_problem(), [1e-4, 1e-3, 1e-2]
    errors = [
        relative_error(
            library_gradients(net, problem, ebm.OneSided(lam), error_coordinates(0.8), precision=precision),
            true_gradient(net, problem),
        )
        for lam in lambdas
    ]
    assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05), errors
    assert errors[0] < 2e-3


@KINDS
def test_a_scalar_precision_only_rescales_lambda(place: Place, output: Output) -> None:
    """E/precision has lambda/precision, so the two updates are one: catches a precision on only some of the
    terms.
    """
    net, problem = make_net(), make_problem()
    heavy = library_gradients(net, problem, ebm.OneSided(0.15), error_coordinates(0.5), place, output, precision=1.5)
    plain = library_gradients(net, problem, ebm.OneSided(0.1), error_coordinates(0.75), place, output)
    assert worst_relative_error(heavy, plain) < 1e-8


# --------------------------------------------------------------------------------------------------- float32


def test_error_coordinates_have_no_float32_floor() -> None:
    """Theory Q11: at lambda = 1e-5 states in float32 hold the signal in their last bits, errors stored as
    such hold all of it. Catches errors recomputed as x - f(x_prev), the silent noise of DESIGN trap 5.
    """
    lam = 1e-5
    net, problem = make_net(dtype=torch.float32), make_problem(dtype=torch.float32)
    reference = true_gradient(make_net(), make_problem())  # the same numbers in float64
    in_errors = library_gradients(net, problem, ebm.OneSided(lam), ebm.ErrorCoordinates(max_steps=20, lr=1.0, tol=0.0))
    assert all(value.dtype == torch.float32 for value in in_errors.values())
    assert relative_error(in_errors, reference) < 1e-4


def test_state_coordinates_do_have_one() -> None:
    """The other half of Q11, so that the test above cannot pass for want of a difficulty."""
    net, problem = make_net(dtype=torch.float32), make_problem(dtype=torch.float32)
    in_states = library_gradients(net, problem, ebm.OneSided(1e-5), ebm.GradientDescent(lr=0.1, max_steps=400))
    assert relative_error(in_states, true_gradient(make_net(), make_problem())) > 1e-2


class Attending(nn.Module):
    """Two heads over five tokens by torch's fused attention, whose backward cannot be differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.act, self.middle, self.out = nn.Linear(4, 24), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 5, 4)`` to ``(B, 3)``."""
        q, k, v = self.act(self.project(x)).unflatten(-1, (3, 2, 4)).movedim(2, 0).transpose(2, 3)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.act(self.middle(mixed)).mean(1))


@pytest.mark.parametrize("capture", [True, False])
def test_second_derivatives_through_attention(capture: bool) -> None:
    torch.manual_seed(0)
    net = Attending().double()
    x, y = torch.randn(6, 5, 4).double(), torch.arange(6) % 3

    def closure() -> torch.Tensor:
        return nn.functional.cross_entropy(net(x), y)

    found = ebm.Learner(net, "infinitesimal", capture=capture).gradients(closure)
    closure().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-12), name


def test_a_saddle_has_no_response() -> None:
    """At x = 0 under zero input the Hessian is [[I, -W'], [-W, I]]: with |W| = 3 it has the eigenvalue 1 - 3."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for index in (0, 2, 4):
            net[index].bias.zero_()
        net[2].weight.copy_(3 * torch.eye(4))
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(), ebm.Infinitesimal(), ebm.FixedPoint(5)))
    x, y = torch.zeros(6, 3, dtype=torch.float64), torch.arange(6) % 2
    with pytest.raises(ebm.RelaxationDivergedError, match="is no minimum of the energy"):
        learner.gradients(lambda: F.cross_entropy(net(x), y))
