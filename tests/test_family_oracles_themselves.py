"""The oracles of the family against closed forms, finite differences and each other, without the library."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Output,
    Problem,
    backprop,
    energies,
    equilibrium,
    fitted_slope,
    make_net,
    make_problem,
    relative_error,
    update,
    worst_relative_error,
)
from oracles_activations import ALL
from oracles_clamped import cosine, coupled, coupled_predictive_coding, k_weighted_gradient
from oracles_dyads import dyads
from oracles_fenchel_young import internal_energy, settle as settle_lifted, update as update_lifted
from oracles_fixed_prediction import fixed_prediction
from oracles_hopfield import (
    Hopfield,
    affine,
    centred,
    differentiable_step,
    energy,
    hebbian,
    holomorphic,
    loss,
    make_hopfield_net,
    one_sided,
    relax,
    settle,
    unsubtracted,
    zero_states,
)
from oracles_implicit import States, implicit_gradient, implicit_gradient_of_a_map
from oracles_multipliers import augmented_lagrangian, linear_rate
from torch import Tensor, nn

torch.set_num_threads(1)

EVERY = pytest.mark.parametrize("name", list(ALL))
OUTPUTS = pytest.mark.parametrize("output", ["state", "readout"])
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])


def implicit(chain: Hopfield, problem: Problem, states: States | None = None) -> Gradients:
    states = settle(chain, problem) if states is None else states
    return implicit_gradient(
        lambda s: energy(chain, problem, s), lambda s: loss(chain, problem, s), states, chain.parameters
    )


# ------------------------------------------------------------------------------------------------- potentials


@EVERY
def test_rho_is_the_module_and_the_slope_of_the_conjugate(name: str) -> None:
    """G*' = rho, and rho is what torch's module computes."""
    factory, activation = ALL[name]
    a = 2 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a.requires_grad_()
    torch.testing.assert_close(activation.rho(a), factory()(a), rtol=1e-14, atol=1e-15)
    (slope,) = torch.autograd.grad(activation.conjugate(a).sum(), a)
    torch.testing.assert_close(slope, activation.rho(a), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["identity", "tanh", "sigmoid"])
def test_the_slope_of_the_potential_inverts_rho(name: str) -> None:
    """G'(rho(a)) = a."""
    activation = ALL[name][1]
    a = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = activation.rho(a).requires_grad_()
    (slope,) = torch.autograd.grad(activation.potential(x).sum(), x)
    torch.testing.assert_close(slope, a, rtol=1e-10, atol=1e-12)


@EVERY
def test_the_conjugate_is_a_supremum(name: str) -> None:
    """G*(a) = sup_x <x, a> - G(x), the supremum by brute force on a grid of states."""
    activation = ALL[name][1]
    if name == "softmax":
        share = torch.linspace(0, 1, 4001, dtype=torch.float64)
        grid = torch.stack([share, 1 - share], 1)
        drives = [torch.tensor([p, q], dtype=torch.float64) for p, q in ((0.3, -0.5), (2.0, 2.0), (-4.0, 1.0))]
    else:
        grid = activation.rho(torch.linspace(-9, 9, 8001, dtype=torch.float64))[:, None]
        drives = [torch.tensor([value], dtype=torch.float64) for value in (-3.5, -0.4, 0.0, 0.7, 1.9)]
    for drive in drives:
        best = ((grid * drive).sum(1) - activation.potential(grid)).max().item()
        exact = activation.conjugate(drive).item()
        assert exact - 1e-5 < best < exact + 1e-12


# --------------------------------------------------------------------------------------------- Hopfield, EP


@OUTPUTS
@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("order", ["odd-even", "synchronous"])
def test_the_maps_settle_where_the_energy_is_stationary(output: Output, gamma: float, order: str) -> None:
    """Ties the transposes written by hand to the potentials, for both orders, and the gain to its powers."""
    net, problem = make_hopfield_net(gain=0.5), make_problem()
    chain = Hopfield.copy_of(net, output, gamma)
    states = relax(chain, problem, zero_states(chain, problem), 0.0, 200, order)
    leaves = [state.clone().requires_grad_() for state in states]
    slopes = torch.autograd.grad(energy(chain, problem, leaves), leaves)
    assert max(slope.abs().max().item() for slope in slopes) < 1e-12
    again = relax(chain, problem, zero_states(chain, problem), 0.0, 400, order, damping=0.3)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(states, again, strict=True))


@OUTPUTS
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_the_hebbian_statistic_is_the_slope_of_the_energy(output: Output, gamma: float) -> None:
    """dI/dtheta at arbitrary states, by autograd; with a read-out, lambda times the loss's own slope too."""
    net, problem, lam = make_hopfield_net(), make_problem("half-mse-sum"), 0.3
    chain = Hopfield.copy_of(net, output, gamma)
    states = relax(chain, problem, zero_states(chain, problem), 0.0, 3)
    total = energy(chain, problem, states) + lam * loss(chain, problem, states)
    names, tensors = zip(*chain.parameters.items(), strict=True)
    slopes = torch.autograd.grad(total, tensors, allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, tensors, slopes, strict=True)}
    assert worst_relative_error(hebbian(chain, problem, states, lam), expected) < 1e-13


@OUTPUTS
@LOSSES
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_two_implicit_gradients_and_finite_differences(output: Output, loss_name: str, gamma: float) -> None:
    """By the energy's Hessian, by the map's Jacobian, and by moving each parameter and settling again."""
    net, problem = make_hopfield_net(gain=0.6), make_problem(loss_name)
    chain = Hopfield.copy_of(net, output, gamma)
    states = settle(chain, problem)
    by_energy = implicit(chain, problem, states)
    by_map = implicit_gradient_of_a_map(
        lambda s: differentiable_step(chain, problem, s), lambda s: loss(chain, problem, s), states, chain.parameters
    )
    assert worst_relative_error(by_energy, by_map) < 1e-12
    generator, h = torch.Generator().manual_seed(7), 1e-5
    for name, parameter in chain.parameters.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * h * direction)
                values.append(loss(chain, problem, settle(chain, problem)).item())
                parameter.sub_(sign * h * direction)
        slope = (values[0] - values[1]) / (2 * h)
        scale = (by_energy[name].norm() * direction.norm()).item()
        assert (by_energy[name] * direction).sum().item() == pytest.approx(slope, abs=1e-7 * scale), name


@OUTPUTS
@LOSSES
def test_orders_of_the_bias(output: Output, loss_name: str) -> None:
    """One-sided 1, centred 2, N points N, without the free phase -1."""
    net, problem = make_hopfield_net(), make_problem(loss_name)
    chain = Hopfield.copy_of(net, output)
    true, betas = implicit(chain, problem), [1e-4, 1e-3, 1e-2]
    first = [relative_error(one_sided(chain, problem, b), true) for b in betas]
    second = [relative_error(centred(chain, problem, b), true) for b in betas]
    missing = [relative_error(unsubtracted(chain, problem, b), true) for b in betas]
    assert fitted_slope(betas, first) == pytest.approx(1.0, abs=0.05)
    assert fitted_slope(betas, second) == pytest.approx(2.0, abs=0.05)
    assert fitted_slope(betas, missing) == pytest.approx(-1.0, abs=0.01)
    for points in (3, 4, 6):
        wide = [relative_error(holomorphic(chain, problem, b, points), true) for b in (0.04, 0.08)]
        assert fitted_slope([0.04, 0.08], wide) == pytest.approx(points, abs=0.1)
    two = holomorphic(chain, problem, 0.1, 2)
    assert worst_relative_error(two, centred(chain, problem, 0.1)) < 1e-12


# --------------------------------------------------------------------------------------- coupled, contrastive


@LOSSES
@pytest.mark.parametrize(("sides", "order"), [("positive", 1), ("negative", 1), ("both", 2)])
def test_coupled_learning_tends_to_the_k_weighted_gradient(loss_name: str, sides: str, order: int) -> None:
    """For both energies; the quadratic one's free state is the forward pass."""
    problem, etas = make_problem(loss_name, batch=2), [1e-1, 1e-2, 1e-3]
    hopfield = Hopfield.copy_of(make_hopfield_net())
    states = settle(hopfield, problem)
    limit = k_weighted_gradient(lambda s: energy(hopfield, problem, s), states, problem, hopfield.parameters)
    errors = [relative_error(coupled(hopfield, problem, eta, sides), limit) for eta in etas]
    assert fitted_slope(etas, errors) == pytest.approx(order, abs=0.05)
    assert cosine(limit, implicit(hopfield, problem, states)) < 0.995

    chain = Chain.copy_of(make_net(), "after", "state")
    forward = chain.forward_states(problem.x)
    limit = k_weighted_gradient(lambda s: energies(chain, problem, s)[0], forward, problem, chain.parameters)
    errors = [relative_error(coupled_predictive_coding(chain, problem, eta, sides), limit) for eta in etas]
    assert fitted_slope(etas, errors) == pytest.approx(order, abs=0.05)
    assert cosine(limit, backprop(chain, problem)[0]) < 0.995


@LOSSES
def test_clamped_with_weak_feedback_tends_to_backprop(loss_name: str) -> None:
    """O(gamma), output fully clamped."""
    net, problem, gammas = make_hopfield_net(), make_problem(loss_name), [1e-1, 1e-2, 1e-3]
    true = backprop(Chain.copy_of(net), problem)[0]
    errors = [
        relative_error(coupled(Hopfield.copy_of(net, gamma=gamma), problem, 1.0, "positive"), true) for gamma in gammas
    ]
    assert fitted_slope(gammas, errors) == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------------------------- dyads, multipliers, errors


@LOSSES
def test_dyads(loss_name: str) -> None:
    """Exact with ReLU away from its kinks, second order with tanh; one top-down pass or many."""
    problem, betas = make_problem(loss_name, batch=2, seed=150), [1e-1, 1e-2, 1e-3]
    for passes in (1, 60):
        relu, smooth = make_net(activation=nn.ReLU), make_net()
        true = backprop(Chain.copy_of(relu), problem)[0]
        assert relative_error(dyads(Hopfield.copy_of(relu), problem, 1e-3, passes), true) < 1e-12
        true = backprop(Chain.copy_of(smooth), problem)[0]
        errors = [relative_error(dyads(Hopfield.copy_of(smooth), problem, beta, passes), true) for beta in betas]
        assert fitted_slope(betas, errors) == pytest.approx(2.0, abs=0.05)


@OUTPUTS
def test_multipliers(output: Output) -> None:
    """The first outer step is predictive coding at 1/rho; then linear convergence, in closed form without tanh."""
    problem, rho = make_problem(batch=2), 10.0
    chain = Chain.copy_of(make_net(), "after", output)
    found = augmented_lagrangian(chain, problem, rho, 12)
    plain = update(chain, problem, equilibrium(chain, problem, 1 / rho), 1 / rho)
    assert worst_relative_error(found[0], plain) < 1e-12
    errors = [relative_error(estimate, backprop(chain, problem)[0]) for estimate in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    linear = Chain.copy_of(make_net(activation=None), "after", output)
    true = backprop(linear, problem)[0]
    errors = [relative_error(estimate, true) for estimate in augmented_lagrangian(linear, problem, rho, 9)]
    assert errors[-1] / errors[-2] == pytest.approx(linear_rate(linear, rho), rel=5e-3)


@OUTPUTS
def test_fixed_predictions(output: Output) -> None:
    """Backprop after as many unit steps as there are states, and one layer short of it one step before."""
    chain, problem = Chain.copy_of(make_net(), "after", output), make_problem()
    true, steps = backprop(chain, problem)[0], len(chain.forward_states(problem.x))
    assert worst_relative_error(fixed_prediction(chain, problem, 3.0, 1.0, steps), true) < 1e-14
    early = fixed_prediction(chain, problem, 3.0, 1.0, steps - 1)
    assert not early["0.weight"].any()
    assert worst_relative_error(fixed_prediction(chain, problem, 1.0, 0.1, 500), true) < 1e-12


# ---------------------------------------------------------------------------------------------- Fenchel-Young


def lifted_energy(chain: Hopfield, problem: Problem, states: States) -> Tensor:
    total, below = torch.zeros((), dtype=torch.float64), problem.x
    for layer, state in enumerate(states):
        drive = below @ chain.weights[layer].T + chain.biases[layer]
        total, below = total + chain.activations[layer].gap(state, drive).sum(), state
    return total


@OUTPUTS
@EVERY
def test_lifted_networks(name: str, output: Output) -> None:
    """The sweeps settle at a minimum, the update is the energy's slope, and backprop is its limit."""
    net, problem, lam = make_hopfield_net((4, 6, 6, 5, 3), ALL[name][0], gain=0.4), make_problem("half-mse-sum"), 0.1
    chain = Hopfield.copy_of(net, output)
    states = settle_lifted(chain, problem, lam)

    def total(s: States) -> Tensor:
        return lifted_energy(chain, problem, s) + lam * loss(chain, problem, s)

    names, tensors = zip(*chain.parameters.items(), strict=True)
    slopes = torch.autograd.grad(total(states), tensors)
    expected = {n: g / lam for n, g in zip(names, slopes, strict=True)}
    assert worst_relative_error(update_lifted(chain, problem, states, lam), expected) < 1e-9
    assert internal_energy(chain, problem, states) == pytest.approx(lifted_energy(chain, problem, states).item())

    # no state that the activation can emit, near the settled one, has a lower energy
    generator, least = torch.Generator().manual_seed(0), total(states).item()
    below = [problem.x, *states[:-1]]
    for _ in range(20):
        moved = []
        for layer, state in enumerate(states):
            drive = affine(below[layer], chain.weights[layer], chain.biases[layer])
            noise = torch.randn(state.shape, generator=generator, dtype=torch.float64)
            other = chain.activations[layer].rho(drive + noise)
            moved.append(state + 1e-3 * (other - state))
        assert total(moved).item() >= least

    true_net = torch.autograd.grad(problem.loss(net(problem.x), problem.y), list(net.parameters()))
    true = dict(zip(names, true_net, strict=True))
    lambdas = [1e-4, 1e-3, 1e-2]
    errors = [relative_error(update_lifted(chain, problem, settle_lifted(chain, problem, s), s), true) for s in lambdas]
    assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05)
