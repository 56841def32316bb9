"""The quantitative claims the library rests on, each a test named by its claim; smooth nets, float64.

| claim | says | lives in |
| --- | --- | --- |
| Q1, Q2 | one-sided bias O(lambda), centred O(lambda^2) | test_infinitesimal_limit |
| Q3 | a negative nudge has a minimum as long as abs(lambda) times the largest eigenvalue of S d2L is below 1 | here |
| Q4 | N-point contour on a linear net: (1 - (-lambda S)^N)^-1 r | here |
| Q4' | the same on a Hopfield net: order N | test_equilibrium_propagation |
| Q5 | EP one-sided 1, centred 2, against the implicit gradient | test_equilibrium_propagation |
| Q6 | first arrival | test_predictive_coding |
| Q7, Q8 | relaxation for T steps converges at 1 - eta min eig H, to a plateau of finite lambda | here |
| Q9 | P7 identity, unit sweep, fixed predictions, first step of errors | test_infinitesimal_limit, \
test_fixed_prediction, test_predictive_coding |
| Q10 | every layer's own error is O(lambda) | here |
| Q11 | float32: a floor in states, none in errors | test_infinitesimal_limit |
| Q12 | a residual r of the free phase costs r / lambda | here |
| Q13 | energies monotone in lambda and along the relaxation | here |
| Q14 | no free-phase term for divergences; without it Hopfield diverges as 1/beta | here |
| Q15 | the limit does not know the precisions | test_precision |
| Q16 | raw displacements at equilibrium are not the deltas | here |
| Q17 | closed forms of linear nets | test_infinitesimal_limit |
| Q18 | contrastive Hebbian O(gamma); non-reciprocal networks | test_coupled_and_contrastive, here |
| Q19 | coupled learning: the K-weighted gradient | test_coupled_and_contrastive |
| Q20 | dual propagation O(beta^2); multipliers converge linearly | test_dual_propagation, test_multipliers |
"""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Problem,
    backprop,
    curvature,
    energies,
    equilibrium,
    fitted_slope,
    loss_curvature_in_errors,
    make_net,
    make_problem,
    relative_error,
    update,
)
from oracles_hopfield import Hopfield, energy, loss, make_hopfield_net, settle, unsubtracted
from oracles_implicit import implicit_gradient
from torch import Tensor, nn

import lightning_ebm as ebm

torch.set_num_threads(1)


def library_gradients(
    net: nn.Module, problem: Problem, nudge: ebm.Nudge, relaxer: ebm.Relaxer, output: str = "readout", **options: object
) -> tuple[Gradients, dict]:
    parts = {"energy": ebm.PredictiveCoding(), "nudge": nudge, "relaxer": relaxer}
    layers = options.pop("layers", None)
    algorithm = ebm.Algorithm(**{**parts, **options})
    learner = ebm.Learner(net, algorithm, layers=layers, output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y)), learner.report


# ------------------------------------------------------------------------------------- Q3, Q4: the size of lambda


def test_q3_a_negative_nudge_has_a_minimum_up_to_the_loss_curvature() -> None:
    """min eig d2E/dx2 at the forward pass changes sign where lambda = -1 / max eig(S d2L); inside the library
    finds the stationary point, beyond it says that there is none.
    """
    net, problem = make_net(activation=None), make_problem("half-mse-sum")
    chain = Chain.copy_of(net, "before", "readout")
    limit = 1 / loss_curvature_in_errors(chain, problem)
    states = chain.forward_states(problem.x)
    for factor, sign in ((0.9, 1), (1.1, -1)):
        _, matrix = curvature(chain, problem, states, -factor * limit)
        assert torch.linalg.eigvalsh(matrix).min().item() * sign > 0
    relaxer = ebm.ErrorCoordinates(max_steps=3000, lr=0.5, tol=1e-11)
    inside, _ = library_gradients(net, problem, ebm.OneSided(-0.8 * limit), relaxer, layers=nn.Linear)
    expected = update(chain, problem, equilibrium(chain, problem, -0.8 * limit), -0.8 * limit)
    assert relative_error(inside, expected) < 1e-7
    with pytest.raises(ebm.RelaxationDivergedError):
        library_gradients(net, problem, ebm.OneSided(-1.3 * limit), relaxer, layers=nn.Linear)


@pytest.mark.parametrize(
    "relaxer", [ebm.GradientDescent(lr=0.3, max_steps=400), ebm.ErrorCoordinates(max_steps=400, lr=0.3, tol=0.0)]
)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("points", [2, 4, 8])
def test_q4_the_contour_on_a_linear_net(points: int, fraction: float, relaxer: ebm.Relaxer) -> None:
    """The N-point estimate of eps_L / lambda is (1 - (-lambda S)^N)^-1 r in closed form, hence so are all bias
    gradients, -J_{L<-l}^T of it; `fraction` is lambda times the largest eigenvalue of S.
    """
    net, problem = make_net((3, 4, 3), activation=None), make_problem("half-mse-sum", inputs=3)
    w2 = net[1].weight.detach().mul_(0.6)  # in place: a stiffer net, which 400 steps settle
    eye = torch.eye(3, dtype=torch.float64)
    compliance = eye + w2 @ w2.T
    lam = fraction / torch.linalg.eigvalsh(compliance)[-1].item()
    r = problem.y - net(problem.x).detach()
    factor = torch.linalg.inv(eye - torch.linalg.matrix_power(-lam * compliance, points))
    top = (r @ factor.T).sum(0)
    found, _ = library_gradients(
        net,
        problem,
        ebm.Holomorphic(lam, points=points),
        relaxer,
        "state",
        layers=nn.Linear,
    )
    torch.testing.assert_close(found["1.bias"], -top, rtol=0, atol=1e-10)
    torch.testing.assert_close(found["0.bias"], -top @ w2, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------- Q7, Q8: steps, plateau; Q10: layers


def test_q7_relaxation_converges_at_the_rate_of_the_softest_mode() -> None:
    """Error against the settled update falls as (1 - eta min eig H)^T at small lambda; H from autograd."""
    net, problem, lam, lr = make_net(), make_problem(), 1e-4, 0.2
    chain = Chain.copy_of(net)
    true = backprop(chain, problem)[0]
    _, matrix = curvature(chain, problem, chain.forward_states(problem.x), 0.0)
    softest = torch.linalg.eigvalsh(matrix).min().item()
    settled = update(chain, problem, equilibrium(chain, problem, lam), lam)
    steps = [10, 50, 200, 300]
    found = [
        library_gradients(net, problem, ebm.OneSided(lam), ebm.GradientDescent(lr=lr, max_steps=n))[0] for n in steps
    ]
    errors = [relative_error(g, settled) for g in found]
    rate = (errors[3] / errors[2]) ** (1 / (steps[3] - steps[2]))
    assert rate == pytest.approx(1 - lr * softest, abs=0.1 * lr * softest)
    towards_backprop = [relative_error(g, true) for g in found]
    assert towards_backprop == sorted(towards_backprop, reverse=True)
    assert errors[0] > 0.1  # ten steps are far from enough


def test_q8_at_lambda_one_more_steps_do_not_help() -> None:
    """A plateau: the bias is the nudge's, not the solver's."""
    net, problem = make_net(), make_problem()
    true = backprop(Chain.copy_of(net), problem)[0]
    early, late = (
        library_gradients(net, problem, ebm.OneSided(1.0), ebm.GradientDescent(lr=0.1, max_steps=n))[0]
        for n in (500, 1000)
    )
    assert relative_error(early, late) < 1e-3
    assert relative_error(late, true) > 0.1


@pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
def test_q10_every_layer_errs_by_the_first_order_in_lambda(loss_name: str) -> None:
    """Slope 1 in each layer by itself; one layer with a wrong limit would hide in the sum of all."""
    net, problem, lambdas = make_net(), make_problem(loss_name), [1e-4, 1e-3]
    true = backprop(Chain.copy_of(net), problem)[0]
    relaxer = ebm.ErrorCoordinates(max_steps=500, lr=1.0, tol=1e-12)
    found = [library_gradients(net, problem, ebm.OneSided(lam), relaxer)[0] for lam in lambdas]
    for name in true:
        errors = [relative_error({name: g[name]}, {name: true[name]}) for g in found]
        assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05), (name, errors)


# ------------------------------------------------------------------------------------ Q12 to Q14: phases, energies


def test_q12_a_free_residual_costs_its_size_over_lambda() -> None:
    """The free phase stopped after 16 sweeps, the nudged one settled: slope -1 in beta, and better settled."""
    net, problem, betas = make_hopfield_net(), make_problem(), [1e-5, 1e-4, 1e-3]
    chain = Hopfield.copy_of(net)
    true = implicit_gradient(
        lambda s: energy(chain, problem, s), lambda s: loss(chain, problem, s), settle(chain, problem), chain.parameters
    )

    def error(beta: float, free: int) -> float:
        parts = {"energy": ebm.Hopfield(), "free_relaxer": ebm.FixedPoint(free)}
        found, _ = library_gradients(net, problem, ebm.OneSided(beta), ebm.FixedPoint(100), "state", **parts)
        return relative_error(found, true)

    errors = [error(beta, 16) for beta in betas]
    assert fitted_slope(betas, errors) == pytest.approx(-1.0, abs=0.05), errors
    assert error(1e-4, 100) < 1e-2 * errors[1]


def test_q13_energies_are_monotone_in_lambda() -> None:
    """E* is concave in lambda with slope L*, so E*/lambda falls, E* rises, and both stay below the free loss."""
    net, problem = make_net(), make_problem("half-mse-sum")
    lambdas, reports = [0.05, 0.1, 0.2, 0.5, 1.0], []
    for lam in lambdas:
        relaxer = ebm.GradientDescent(lr=0.2, max_steps=400)
        reports.append(library_gradients(net, problem, ebm.OneSided(lam), relaxer, "state")[1])
    totals = [report["energy_nudged"] for report in reports]
    ratios = [total / lam for total, lam in zip(totals, lambdas, strict=True)]
    assert totals == sorted(totals)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] < reports[0]["loss"] < 1.25 * ratios[0]
    chain = Chain.copy_of(net, "after", "state")
    for lam, total in zip(lambdas, totals, strict=True):
        internal, value = energies(chain, problem, equilibrium(chain, problem, lam))
        assert total == pytest.approx((internal + lam * value).item(), rel=1e-6)


def test_q13_energy_falls_at_every_step_below_the_stability_limit() -> None:
    """eta < 2 / max eig d2E, the curvature from autograd at the start."""
    net, problem, lam = make_net(), make_problem(), 1.0
    chain = Chain.copy_of(net)
    _, matrix = curvature(chain, problem, chain.forward_states(problem.x), lam)
    lr = 1.2 / torch.linalg.eigvalsh(matrix).max().item()
    _, report = library_gradients(net, problem, ebm.OneSided(lam), ebm.GradientDescent(lr=lr, max_steps=60))
    course = report["phases"][-1]["energies"]
    assert len(course) > 10
    assert course == sorted(course, reverse=True)


def test_q14_a_divergence_needs_no_free_phase_and_hopfield_does() -> None:
    """dI/dtheta at the forward pass is exactly 0 for predictive coding; the Hopfield rule without its free term
    errs by 1/beta, while the library's, which has it, converges.
    """
    problem = make_problem()
    chain = Chain.copy_of(make_net(), "after", "state")
    internal, _ = energies(chain, problem, chain.forward_states(problem.x))
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(internal, list(chain.parameters.values())))

    net, betas = make_hopfield_net(), [1e-4, 1e-3, 1e-2]
    hopfield = Hopfield.copy_of(net)
    true = implicit_gradient(
        lambda s: energy(hopfield, problem, s),
        lambda s: loss(hopfield, problem, s),
        settle(hopfield, problem),
        hopfield.parameters,
    )
    without = [relative_error(unsubtracted(hopfield, problem, beta), true) for beta in betas]
    assert fitted_slope(betas, without) == pytest.approx(-1.0, abs=0.02), without
    found, _ = library_gradients(net, problem, ebm.OneSided(1e-4), ebm.FixedPoint(100), "state", energy=ebm.Hopfield())
    assert relative_error(found, true) < 1e-3 < 1e3 < without[0]


# ------------------------------------------- Q16, Q18: statements about the dynamics, on explicit states alone


def test_q16_raw_displacements_at_equilibrium_are_not_the_deltas() -> None:
    """x* - x_bar = -lambda sum_k J_{l<-k} delta_k: right in the first layer only, while -eps_l / lambda is right in
    all. Nothing may therefore report a displacement as a gradient.
    """
    chain, problem, lam = Chain.copy_of(make_net(), "after", "state"), make_problem("half-mse-sum"), 1e-5
    start, settled = chain.forward_states(problem.x), equilibrium(chain, problem, lam)
    predictions, _, _ = chain.run(problem.x, settled)
    _, deltas = backprop(chain, problem)
    for layer, delta in enumerate(deltas):
        displacement = (start[layer] - settled[layer]) / lam
        error = (predictions[layer] - settled[layer]).detach() / lam
        assert (error - delta).norm() < 1e-3 * delta.norm()
        if layer == 0:
            assert (displacement - delta).norm() < 1e-3 * delta.norm()
        else:
            assert (displacement - delta).norm() > 0.05 * delta.norm()


def test_q18_non_reciprocal_feedback_is_a_bias_that_lambda_does_not_remove() -> None:
    """x_l <- rho(W_l x_{l-1} + B_l x_{l+1}) with B_l not W_{l+1}^T, for its own vector-field rule; adding
    (J^T - J)(x - x_bar) to the nudged dynamics restores the gradient to O(beta). The library has no such network:
    what it asserts is why its feedback is always the transpose.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, w = 6, 0.8 / 6**0.5
    symmetric = w * (lambda m: 0.5 * (m + m.T))(draw(n, n))
    skew = 0.3 * w * (lambda m: m - m.T)(draw(n, n))
    drive, target = draw(n), draw(n)

    def field(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.tanh(matrix @ x + drive) - x

    def jacobian(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda s: field(s, matrix), x)

    def fixed_point(matrix: Tensor, beta: float, free: Tensor | None, corrected: bool) -> Tensor:
        x = torch.zeros(n, dtype=torch.float64) if free is None else free
        j = None if free is None else jacobian(free, matrix)

        def force(s: Tensor) -> Tensor:
            total = field(s, matrix) - beta * (s - target)
            return total + (j.T - j) @ (s - free) if corrected else total

        for _ in range(40):  # Newton
            x = x - torch.linalg.solve(torch.autograd.functional.jacobian(force, x), force(x))
        return x

    def estimate(matrix: Tensor, beta: float, corrected: bool) -> Tensor:
        free = fixed_point(matrix, 0.0, None, False)
        moved = fixed_point(matrix, beta, free, corrected) - free
        leaf = matrix.clone().requires_grad_()
        return -torch.autograd.grad((field(free, leaf) * moved).sum(), leaf)[0] / beta

    def true(matrix: Tensor) -> Tensor:
        free = fixed_point(matrix, 0.0, None, False)
        adjoint = torch.linalg.solve(jacobian(free, matrix).T, free - target)
        leaf = matrix.clone().requires_grad_()
        return -torch.autograd.grad((field(free, leaf) * adjoint).sum(), leaf)[0]

    def error(matrix: Tensor, beta: float, corrected: bool) -> float:
        reference = true(matrix)
        return ((estimate(matrix, beta, corrected) - reference).norm() / reference.norm()).item()

    matrix, betas = symmetric + skew, [1e-4, 1e-3, 1e-2]
    plain = [error(matrix, beta, corrected=False) for beta in betas]
    corrected = [error(matrix, beta, corrected=True) for beta in betas]
    assert fitted_slope(betas, plain) == pytest.approx(0.0, abs=0.05), plain
    assert min(plain) > 0.01
    assert fitted_slope(betas, corrected) == pytest.approx(1.0, abs=0.05), corrected
