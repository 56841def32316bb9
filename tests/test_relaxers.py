"""Relaxers on landscapes whose minimum is known in closed form; no network anywhere."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from landscapes import ByHand
from torch import Tensor

import lightning_ebm as ebm
from lightning_ebm.evaluations import Slope

D = 6


class Quadratic(ByHand):
    """E_b = 1/2 (x - c_b)' A_b (x - c_b), split over two layers of D / 2 units; its minimum is c_b; A_b >= 1."""

    samples_interact = False

    def __init__(self, batch: int, condition: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(batch, D, D, generator=generator, dtype=torch.float64)).Q
        scale = torch.rand(batch, 1, generator=generator, dtype=torch.float64) * 3 + 0.1
        spectrum = torch.logspace(0, math.log10(condition), D, dtype=torch.float64)
        self.hessian = basis @ torch.diag_embed(spectrum * (1 + scale)) @ basis.mT
        self.minimum = torch.randn(batch, D, generator=generator, dtype=torch.float64)
        self.names, self.batch_size = ["low", "high"], batch
        self.no_errors = [torch.zeros(batch, D // 2, dtype=torch.float64) for _ in range(2)]
        self.rounding = 2.0**-52

    def energy(self, states) -> Tensor:
        away = torch.cat(list(states), 1) - self.minimum
        return 0.5 * torch.einsum("bi,bij,bj->b", away, self.hessian, away)

    def forces(self, states, strength) -> Slope:
        away = torch.cat(list(states), 1) - self.minimum
        gradient = torch.einsum("bij,bj->bi", self.hessian, away)
        return Slope(self.energy(states), torch.zeros((), dtype=torch.float64), list(gradient.split(D // 2, 1)))

    def norms(self, tensors) -> Tensor:
        return self.per_sample([t.square() for t in tensors]).sqrt()

    def per_sample(self, tensors) -> Tensor:
        return torch.stack([t.flatten(1).sum(1) for t in tensors]).sum(0)

    def over_root_precision(self, tensors) -> list[Tensor]:
        return list(tensors)

    def metric(self, left, right) -> Tensor:
        return self.per_sample([a * b for a, b in zip(left, right, strict=True)])

    def products(self, left, right, layers) -> Tensor:
        return self.metric(left, right)

    def feasible(self, states):
        return states

    def spread(self, values, like):
        return [values[:, None] for _ in like]


class Kink(Quadratic):
    """E_b = |x - c_b| + 1/2 |x - c_b|^2, elementwise: a minimum at which no force vanishes."""

    def forces(self, states, strength) -> Slope:
        away = torch.cat(list(states), 1) - self.minimum
        gradient = away.sign() + away
        energy = (away.abs() + 0.5 * away.square()).sum(1)
        return Slope(energy, torch.zeros((), dtype=torch.float64), list(gradient.split(D // 2, 1)))


def end(found) -> Tensor:
    return torch.cat(found.point, 1)


@given(batch=st.integers(1, 5), condition=st.floats(1, 30), seed=st.integers(0, 10_000), factor=st.floats(0.1, 30))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("relaxer", [ebm.GradientDescent, ebm.ErrorCoordinates])
def test_by_tolerance_every_sample_reaches_its_own_minimum_from_any_step_size(relaxer, batch, condition, seed, factor):
    """Steps up to 15 times the stability limit. (Descent on states never lengthens a step: half the limit at least.)"""
    problem = Quadratic(batch, condition, seed)
    limit = 2 / float(torch.linalg.eigvalsh(problem.hessian).min(0).values[-1])
    lr = 0.5 * limit * (max(factor, 1) if relaxer is ebm.GradientDescent else factor)
    found = relaxer(lr=lr, max_steps=3000, tol=1e-6).relax(problem, problem.no_errors, 1.0)
    # A slow direction may gain less than is worth a step, and now and then steps shrink here as they do at a kink.
    assert found.status in ("converged", "stalled", "kink")
    if found.status == "converged":
        assert bool((found.residual <= 1e-6).all())
    if found.status == "kink":  # which says that no more than tol of what was gained is left; the minimum is at 0
        assert float(found.energies[-1]) <= 1e-5 * float(found.energies[0])
        return
    away = (end(found) - problem.minimum).norm(dim=1)
    assert bool((away <= 1e-4 * problem.minimum.norm(dim=1)).all())


def test_one_over_the_curvature_wins_where_a_fixed_step_is_slow():
    problem = Quadratic(4, 100.0)
    limit = 2 / float(torch.linalg.eigvalsh(problem.hessian).max())
    fast = ebm.ErrorCoordinates(max_steps=5000, tol=1e-6).relax(problem, problem.no_errors, 1.0)
    slow = ebm.GradientDescent(lr=0.5 * limit, max_steps=5000, tol=1e-6).relax(problem, problem.no_errors, 1.0)
    assert fast.steps < slow.steps / 2.5


def test_samples_stop_by_themselves_and_stay_where_they_are():
    """A sample at rest, one that needs a step, one that needs many: the first two are not moved by the third."""
    problem = Quadratic(3, 50.0)
    problem.hessian[0], problem.hessian[1] = torch.eye(D), torch.eye(D)
    problem.minimum[0] = 0
    found = ebm.ErrorCoordinates(max_steps=1000, lr=1.0, tol=1e-3).relax(problem, problem.no_errors, 1.0)
    assert torch.equal(end(found)[0], torch.zeros(D, dtype=torch.float64))
    assert torch.equal(end(found)[1], problem.minimum[1])
    assert found.residual[0] == 0
    assert found.steps > 5


@given(seed=st.integers(0, 10_000), lr=st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_a_minimum_on_a_kink_is_recognised_though_its_force_never_vanishes(seed, lr):
    problem = Kink(3, 1.0, seed)
    # every sample's kinks at one distance, so that descent reaches them all at once, as it does along a ray
    problem.minimum = problem.minimum.sign() * problem.minimum[:, :1].abs()
    found = ebm.ErrorCoordinates(max_steps=400, lr=lr, tol=1e-3).relax(problem, problem.no_errors, 1.0)
    assert found.status == "kink"
    assert found.steps < 100
    assert bool(((end(found) - problem.minimum).abs() <= 1e-2 * (1 + problem.minimum.abs())).all())


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_without_tolerance_exactly_as_many_steps_as_asked_for(steps):
    problem = Quadratic(2, 10.0)
    states = problem.no_errors
    expected = torch.zeros(2, D, dtype=torch.float64)
    for _ in range(steps):
        expected = expected - 0.03 * torch.einsum("bij,bj->bi", problem.hessian, expected - problem.minimum)
    for relaxer in (ebm.GradientDescent(0.03, steps), ebm.ErrorCoordinates(steps, lr=0.03, tol=0.0)):
        found = relaxer.relax(problem, states, 1.0)
        assert torch.allclose(end(found), expected, rtol=0, atol=1e-14)
        assert (found.status, found.steps) == ("fixed", steps)
    sgd = ebm.StateOptimizer(torch.optim.SGD, max_steps=steps, lr=0.03).relax(problem, states, 1.0)
    assert torch.allclose(end(sgd), expected, rtol=0, atol=1e-14)


def test_energy_never_rises_below_the_stability_limit_and_a_run_beyond_it_raises():
    problem = Quadratic(3, 20.0)
    limit = 2 / float(torch.linalg.eigvalsh(problem.hessian).max())
    found = ebm.GradientDescent(0.98 * limit, 60).relax(problem, problem.no_errors, 1.0)
    energies = torch.stack(list(found.energies))
    assert bool((energies.diff() < 0).all())
    with pytest.raises(ebm.RelaxationDivergedError):
        ebm.GradientDescent(1.1 * limit, 60).relax(problem, problem.no_errors, 1.0)


def test_residual_is_of_the_force_not_of_the_state():
    """A peer's test on the state's norm never fired. Here |F_T| / |F_0| by hand."""
    problem = Quadratic(3, 5.0)
    found = ebm.GradientDescent(0.1, 9).relax(problem, problem.no_errors, 1.0)
    norm = lambda states: torch.cat(problem.forces(states, 1.0).gradients, 1).norm(dim=1)  # noqa: E731
    assert torch.allclose(found.residual, norm(found.point) / norm(problem.no_errors), rtol=1e-12)


def test_a_landscape_without_minimum_raises():
    problem = Quadratic(2, 3.0)
    problem.hessian[1] *= -1
    for relaxer in (ebm.ErrorCoordinates(300, tol=1e-6), ebm.GradientDescent(0.5, 300, tol=1e-6)):
        with pytest.raises(ebm.RelaxationDivergedError, match="1 of 2 samples"):
            relaxer.relax(problem, problem.no_errors, -1.0)


def test_an_optimizer_that_climbs_is_told_apart_from_one_that_runs_away():
    """Adam steps by lr however small the force: near the minimum it climbs, which is no reason to end a run."""
    problem = Quadratic(3, 1.0)
    problem.minimum *= 1e-3
    found = ebm.StateOptimizer(torch.optim.Adam, max_steps=1, lr=0.004).relax(problem, problem.no_errors, 1.0)
    assert found.status == "max_steps"
    assert found.energies[-1] > found.energies[0]
    gentle = ebm.StateOptimizer(torch.optim.Adam, max_steps=1, lr=1e-5).relax(problem, problem.no_errors, 1.0)
    assert gentle.status == "fixed"


class InPlace(ebm.Relaxer):
    """A user's own, which moves its states where they lie."""

    def relax(self, landscape, start, strength):
        states = [state.clone() for state in start]
        for _ in range(30):
            for state, force in zip(states, landscape.evaluate(ebm.Forces(), states, strength).gradients, strict=True):
                state.sub_(force, alpha=0.1)
        forces = landscape.evaluate(ebm.Forces(), states, strength)
        return ebm.Relaxation(states, "states", "fixed", 30, forces.internal)


@pytest.mark.parametrize("capture", [True, False])
def test_a_relaxer_that_moves_states_in_place_sees_the_forces_of_now(capture):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    found = [
        ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer), capture=capture).gradients(
            lambda: 0.5 * (net(x) - y).square().sum(1).mean()
        )
        for relaxer in (InPlace(), ebm.GradientDescent(lr=0.1, max_steps=30))
    ]
    assert ebm.metrics.alignment(*found)["relative_error"] < 1e-12


class Seen(Quadratic):
    """Samples that pull on each other, as a loss across the batch does: sum of quadratics and 1/2 c |sum_b x_b|^2."""

    coupling = 4.0
    samples_interact = True

    def forces(self, states, strength):
        del strength
        x = torch.cat(list(states), 1)
        away = x - self.minimum
        gradient = torch.einsum("bij,bj->bi", self.hessian, away) + self.coupling * x.sum(0)
        energy = 0.5 * (away * torch.einsum("bij,bj->bi", self.hessian, away)).sum(1)
        energy = energy + 0.5 * self.coupling * x.sum(0).square().sum() / len(x)
        return Slope(energy, torch.zeros((), dtype=torch.float64), list(gradient.split(D // 2, 1)))

    def solution(self):
        """The minimum of all samples together, by one linear system."""
        batch = len(self.minimum)
        matrix = torch.block_diag(*self.hessian) + self.coupling * torch.eye(D, dtype=torch.float64).repeat(
            batch, batch
        )
        right = torch.einsum("bij,bj->bi", self.hessian, self.minimum).flatten()
        return torch.linalg.solve(matrix, right).reshape(batch, D)


@given(batch=st.integers(2, 6), condition=st.floats(1, 30), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("relaxer", [ebm.GradientDescent, ebm.ErrorCoordinates])
def test_samples_that_see_each_other_settle_together_or_are_not_said_to(relaxer, batch, condition, seed):
    """The residual is that of the forces at the end, measured here once more; settled means at the joint minimum."""
    problem = Seen(batch, condition, seed)
    found = relaxer(lr=0.05, max_steps=5000, tol=1e-6).relax(problem, problem.no_errors, 1.0)
    at_end = torch.cat(problem.forces(found.point, 1.0).gradients, 1).norm(dim=1)
    at_start = torch.cat(problem.forces(problem.no_errors, 1.0).gradients, 1).norm(dim=1)
    together = at_start.square().mean().sqrt()
    own, joint = at_end / at_start, at_end / together
    assert torch.allclose(found.residual, own, rtol=1e-6) or torch.allclose(found.residual, joint, rtol=1e-6)
    if found.status == "converged":
        assert bool((found.residual <= 1e-6).all())
    away = (end(found) - problem.solution()).norm()
    assert bool(away <= 1e-3 * problem.solution().norm())


class Shifted(Quadratic):
    """The second sample's minimum moves with the first sample's state: the first is asleep long before."""

    samples_interact = True

    def forces(self, states, strength):
        del strength
        x = torch.cat(list(states), 1)
        away = x - self.minimum
        away = torch.stack([away[0], x[1] - self.minimum[1] - 3 * (x[0] - self.minimum[0])])
        gradient = torch.einsum("bij,bj->bi", self.hessian, away)
        energy = 0.5 * (away * gradient).sum(1)
        back = torch.stack([-3 * gradient[1], torch.zeros_like(gradient[1])])
        return Slope(energy, torch.zeros((), dtype=torch.float64), list((gradient + back).split(D // 2, 1)))


def test_a_sample_that_slept_is_woken_by_another():
    problem = Shifted(2, 8.0, 3)
    problem.hessian[0] = torch.eye(D)
    found = ebm.ErrorCoordinates(max_steps=4000, lr=0.05, tol=1e-6).relax(problem, problem.no_errors, 1.0)
    forces = torch.cat(problem.forces(found.point, 1.0).gradients, 1).norm(dim=1)
    assert found.status == "converged"
    start = torch.cat(problem.forces(problem.no_errors, 1.0).gradients, 1).norm(dim=1)
    assert float((forces / start).max()) < 1e-4
    assert torch.allclose(end(found), problem.minimum, atol=1e-2)
