"""The oracles against closed forms of the theory, without the library: a wrong oracle proves nothing."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    LOSSES,
    Chain,
    Output,
    Place,
    Problem,
    backprop,
    centred_update,
    energies,
    equilibrium,
    fitted_slope,
    forces,
    linear_equilibrium_update,
    loss_curvature_in_errors,
    make_net,
    make_problem,
    relative_error,
    relax_errors,
    relax_euler,
    relax_optimizer,
    total_energy,
    update,
    worst_relative_error,
)
from torch import nn

torch.set_num_threads(1)

KINDS = pytest.mark.parametrize(
    ("place", "output"),
    [("after", "readout"), ("after", "state"), ("before", "readout"), ("before", "state")],
)
SMOOTH_LOSSES = pytest.mark.parametrize("loss", ["half-mse-mean", "cross-entropy-mean"])


@KINDS
@pytest.mark.parametrize("loss", list(LOSSES))
def test_backprop_by_hand_is_autograd(place: Place, output: Output, loss: str) -> None:
    """Catches a slip in the hand-written deltas, for which every other comparison would be blamed."""
    net, problem = make_net(), make_problem(loss)
    by_hand, _ = backprop(Chain.copy_of(net, place, output), problem)
    problem.loss(net(problem.x), problem.y).backward()
    assert worst_relative_error(by_hand, {name: p.grad for name, p in net.named_parameters()}) < 1e-13


@KINDS
def test_forward_pass_is_the_free_equilibrium(place: Place, output: Output) -> None:
    """Theory section 1: internal energy and force vanish exactly, so the free phase contributes nothing."""
    chain, problem = Chain.copy_of(make_net(), place, output), make_problem()
    states = chain.forward_states(problem.x)
    assert energies(chain, problem, states)[0].item() == 0.0
    assert all(torch.count_nonzero(force) == 0 for force in forces(chain, problem, states, lam=0.0))


@pytest.mark.parametrize("output", ["readout", "state"])
@pytest.mark.parametrize("precision", [1.0, 0.4])
@pytest.mark.parametrize("lam", [0.01, 0.7, 5.0])
def test_newton_finds_the_linear_closed_form(output: Output, precision: float, lam: float) -> None:
    """Theory P8/Q17: eps_L = (1/lambda + S)^-1 r. Catches a wrong half, sign or precision in the energy."""
    net, problem = make_net(activation=None), make_problem("half-mse-sum")
    chain = Chain.copy_of(net, "before", output, precision)
    found = update(chain, problem, equilibrium(chain, problem, lam), lam)
    assert worst_relative_error(found, linear_equilibrium_update(chain, problem, lam)) < 1e-11


def test_minimal_energy_of_a_linear_chain() -> None:
    """Theory P8: E* = 1/2 r^T (1/lambda + S)^-1 r, and the two ways of building S agree."""
    net, problem, lam = make_net(activation=None), make_problem("half-mse-sum"), 0.7
    chain = Chain.copy_of(net, "before", "state")
    jacobian, compliance = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for weight in reversed(chain.weights):
        compliance = compliance + jacobian @ jacobian.T
        jacobian = jacobian @ weight.detach()
    r = problem.y - net(problem.x).detach()
    expected = 0.5 * (r * torch.linalg.solve(torch.eye(3, dtype=torch.float64) / lam + compliance, r.T).T).sum()
    minimum = total_energy(chain, problem, equilibrium(chain, problem, lam), lam)
    assert minimum.item() == pytest.approx(expected.item(), rel=1e-12)


@KINDS
@SMOOTH_LOSSES
def test_equilibrium_is_backprop_at_the_perturbed_activities(place: Place, output: Output, loss: str) -> None:
    """Theory P7, exact at finite lambda: ties the energy, the update and the hand-written deltas together."""
    chain, problem, lam = Chain.copy_of(make_net(), place, output), make_problem(loss), 0.3
    states = equilibrium(chain, problem, lam)
    identity_side, _ = backprop(chain, problem, activities=states)
    found = update(chain, problem, states, lam)
    assert worst_relative_error(found, identity_side) < 1e-11
    assert relative_error(found, backprop(chain, problem)[0]) > 1e-2  # and it is not merely backprop


@KINDS
def test_euler_and_errors_reach_newtons_equilibrium(place: Place, output: Output) -> None:
    """Three unlike roads to one stationary point; a shared wrong force would fail the closed forms above."""
    chain, problem, lam = Chain.copy_of(make_net(), place, output), make_problem(), 0.1
    exact = update(chain, problem, equilibrium(chain, problem, lam), lam)
    steps = update(chain, problem, relax_euler(chain, problem, lam, lr=0.3, steps=1500), lam)
    errors = update(chain, problem, relax_errors(chain, problem, lam, lr=1.0, steps=100), lam)
    assert worst_relative_error(steps, exact) < 1e-9
    assert worst_relative_error(errors, exact) < 1e-9


@KINDS
@SMOOTH_LOSSES
def test_slopes_in_lambda(place: Place, output: Output, loss: str) -> None:
    """Theory Q1 and Q2: one-sided error O(lambda), centred error O(lambda^2)."""
    chain, problem = Chain.copy_of(make_net(), place, output), make_problem(loss)
    reference, _ = backprop(chain, problem)
    assert loss_curvature_in_errors(chain, problem) < 10.0  # all lambdas below stay inside |lambda| max < 1

    small = [1e-4, 1e-3, 1e-2]
    one_sided = [
        relative_error(update(chain, problem, equilibrium(chain, problem, lam), lam), reference) for lam in small
    ]
    assert fitted_slope(small, one_sided) == pytest.approx(1.0, abs=0.05)

    larger = [3e-3, 1e-2, 3e-2]
    centred = [
        relative_error(centred_update(lambda s: equilibrium(chain, problem, s), chain, problem, lam), reference)
        for lam in larger
    ]
    assert fitted_slope(larger, centred) == pytest.approx(2.0, abs=0.1)


@KINDS
@pytest.mark.parametrize("precision", [1.0, 2.5])
def test_first_arrival(place: Place, output: Output, precision: float) -> None:
    """Theory P6/Q6: the k-th layer from the top first moves at step k+1, by -lambda (lr precision)^k lr delta
    exactly; every layer below has moved by exactly nothing.
    """
    lam, lr = 1.0, 0.1
    chain = Chain.copy_of(make_net((4, 6, 6, 6, 5, 3)), place, output, precision)
    problem = make_problem()
    start = chain.forward_states(problem.x)
    _, deltas = backprop(chain, problem)
    for k in range(len(start)):
        moved = relax_euler(chain, problem, lam, lr, steps=k + 1)
        layer = len(start) - 1 - k
        expected = -lam * lr * (lr * precision) ** k * deltas[layer]
        torch.testing.assert_close(moved[layer] - start[layer], expected, rtol=1e-9, atol=1e-15)
        for below in range(layer):
            assert torch.equal(moved[below], start[below])


@KINDS
def test_precision_only_rescales_lambda(place: Place, output: Output) -> None:
    """Scalar precision p: E/p has lambda/p, so update(lambda, p) = update(lambda/p, 1), hence Q15."""
    net, problem = make_net(), make_problem()
    heavy, plain = Chain.copy_of(net, place, output, precision=2.5), Chain.copy_of(net, place, output)
    left = update(heavy, problem, equilibrium(heavy, problem, 0.25), 0.25)
    right = update(plain, problem, equilibrium(plain, problem, 0.1), 0.1)
    assert worst_relative_error(left, right) < 1e-10


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_batch_is_the_mean_or_sum_of_its_samples(loss: str) -> None:
    """Section 6, practical rules: nudge per sample, average only the parameter gradients."""
    chain, problem = Chain.copy_of(make_net()), make_problem(loss, batch=7)
    whole = update(chain, problem, relax_euler(chain, problem, 1.0, 0.1, 20), 1.0)
    singles = []
    for row in range(7):
        one = problem.rows(slice(row, row + 1))
        singles.append(update(chain, one, relax_euler(chain, one, 1.0, 0.1, 20), 1.0))
    combined = {name: sum(single[name] for single in singles) / problem.scale for name in whole}
    assert worst_relative_error(whole, combined) < 1e-12


def test_mean_times_batch_is_sum() -> None:
    """The state dynamics must not see the reduction at all."""
    chain = Chain.copy_of(make_net())
    mean, total = make_problem("half-mse-mean", batch=7), make_problem("half-mse-sum", batch=7)
    states = relax_euler(chain, mean, 1.0, 0.1, 20)
    assert all(map(torch.allclose, states, relax_euler(chain, total, 1.0, 0.1, 20)))
    scaled = {name: 7 * value for name, value in update(chain, mean, states, 1.0).items()}
    assert worst_relative_error(scaled, update(chain, total, states, 1.0)) < 1e-13


def test_internal_energy_rises_and_loss_falls_with_lambda() -> None:
    """Theory P8/Q13: monotone in lambda, and E*/lambda bounds the free loss from below."""
    chain, problem = Chain.copy_of(make_net(), output="state"), make_problem()
    free_loss = energies(chain, problem, chain.forward_states(problem.x))[1].item()
    internals, losses = [0.0], [free_loss]
    for lam in (0.05, 0.1, 0.2, 0.5, 1.0):
        internal, loss = energies(chain, problem, relax_euler(chain, problem, lam, 0.2, 400))
        internals.append(internal.item())
        losses.append(loss.item())
        assert internals[-1] / lam + losses[-1] < free_loss
    assert internals == sorted(internals)
    assert losses == sorted(losses, reverse=True)


def test_energy_falls_at_every_euler_step() -> None:
    """Theory Q13: E is non-increasing for a small enough step."""
    chain, problem, lam = Chain.copy_of(make_net()), make_problem(), 1.0
    course = [total_energy(chain, problem, relax_euler(chain, problem, lam, 0.1, t), lam).item() for t in range(20)]
    assert course == sorted(course, reverse=True)


def test_naive_float32_states_lose_a_tiny_lambda() -> None:
    """Theory Q11: subtracting float32 states leaves noise of about 1e-7/lambda, however long one relaxes."""
    chain = Chain.copy_of(make_net(dtype=torch.float32))
    problem = make_problem(dtype=torch.float32)
    states = relax_euler(chain, problem, 1e-5, lr=0.1, steps=400)
    assert relative_error(update(chain, problem, states, 1e-5), backprop(chain, problem)[0]) > 1e-2


@pytest.mark.parametrize("relaxer", ["euler", "adam"])
def test_the_round_off_tolerances_are_attainable(relaxer: str) -> None:
    """Inputs that differ in the last bit show how much the relaxation amplifies rounding."""
    net, problem = make_net(), make_problem()
    nudged = make_problem()
    nudged.x = problem.x * (1 + 2.3e-16)

    def gradients(case: Problem) -> dict[str, torch.Tensor]:
        chain = Chain.copy_of(net)
        if relaxer == "euler":
            return update(chain, case, relax_euler(chain, case, 1.0, 0.1, 20), 1.0)
        return update(chain, case, relax_optimizer(chain, case, 1.0, torch.optim.Adam, 20, lr=0.05), 1.0)

    assert worst_relative_error(gradients(nudged), gradients(problem)) < (2e-13 if relaxer == "euler" else 2e-11)


def test_a_shared_activation_module_is_a_layer_at_each_call() -> None:
    """One nn.Tanh object used twice must not collapse into one block of the chain."""
    shared = nn.Tanh()
    chain = Chain.copy_of(make_net(activation=lambda: shared))
    assert [rho is shared for rho in chain.activations] == [True, True, True, False]
    assert chain.names == ["0", "2", "4", "6"]
