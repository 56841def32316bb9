"""Whether an algorithm is what it says."""

from typing import Literal

import torch
from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.evaluations import Forces
from lightning_ebm.learner import Learner
from lightning_ebm.metrics import alignment
from lightning_ebm.network.network import Network
from lightning_ebm.nudges.base import table_of, without_draw
from lightning_ebm.presets import algorithm as preset
from lightning_ebm.reference import backprop, equilibrium
from lightning_ebm.step.step import Step
from lightning_ebm.testing.locality import check_locality
from lightning_ebm.testing.problem import Problem
from lightning_ebm.testing.response import check_response


def check_algorithm(algorithm: str | Algorithm, *, tol: float = 1e-3) -> dict[str, float]:
    """Proves of an algorithm what this library proves of its own, on a tanh network 4-6-5-3 in float64, six samples.

    1. The table of phases: its weights sum to 0 and weight * strength to 1, so that it is a slope in the nudge.
    2. A divergence energy is never negative, and zero with zero force at the forward pass; a best response is the
       minimum that it is said to be; and where a relaxer says "converged", the energy has no force left.
    3. Samples do not see each other: the update of a batch is the mean of the updates of its samples.
    4. Reductions: the update of a summed loss is B times that of the mean.
    5. No trace: parameters, `.grad` and random generators are as they were.
    6. Locality: see `check_locality`.
    7. Descent: the update has a positive cosine with the true gradient, backprop's for divergence energies and that of
       the free equilibrium for others.

    Args:
        algorithm: whose; "backprop", the control, fails at 6, as it is not local.
        tol: relative difference allowed in 3 and 4; a relaxer that stops by tolerance stops batches and samples apart.

    Returns:
        What was measured: "cosine" and "relative_error" to the true gradient, "batch_error", "reduction_error".

    Raises:
        AssertionError: which of the above does not hold, and by how much.

    Examples:
        >>> round(check_algorithm("zero-divergence")["relative_error"], 9)
        0.0
    """
    chosen, problem = preset(algorithm), Problem()
    _check_table(chosen)
    found = _update(problem, chosen)
    _check_no_trace(problem, chosen)
    if chosen.rule.relaxes:
        step = Learner(problem.module, chosen, capture=False).begin(problem.loss)
        with step.first_pass():
            loss = problem.loss()
        step.surrogate(loss)
        assert step.network is not None
        check_response(step.network, problem)
        _check_ends(step, chosen)
        if chosen.energy.divergence:
            _check_divergence(step.network, problem)
    single = [_update(problem, chosen, rows=slice(i, i + 1)) for i in range(len(problem))]
    apart = {name: torch.stack([g[name] for g in single]).mean(0) for name in found}
    batch_error = alignment(found, apart)["relative_error"]
    assert batch_error <= tol, f"The update of a batch is {batch_error:.2g} off the mean of its samples' updates."
    summed = {name: gradient / len(problem) for name, gradient in _update(problem, chosen, "sum").items()}
    reduction_error = alignment(found, summed)["relative_error"]
    assert reduction_error <= tol, f"The update of a summed loss is {reduction_error:.2g} off B times that of the mean."
    check_locality(problem.module, problem.loss, chosen)
    reference = backprop(problem.module, problem.loss)
    if not is_divergence(chosen.energy):
        reference = equilibrium(problem.module, problem.loss, chosen)
    figures = alignment(found, reference)
    assert figures["cosine"] > 0, f"The update ascends: its cosine with the true gradient is {figures['cosine']:.3f}."
    return {
        "cosine": figures["cosine"],
        "relative_error": figures["relative_error"],
        "batch_error": batch_error,
        "reduction_error": reduction_error,
    }


def _update(
    problem: Problem,
    algorithm: Algorithm,
    reduction: Literal["mean", "sum"] = "mean",
    rows: slice = slice(None),
) -> dict[str, Tensor]:
    learner = Learner(problem.module, algorithm, loss_reduction=reduction)
    return learner.gradients(lambda: problem.loss(reduction, rows))


def _check_no_trace(problem: Problem, algorithm: Algorithm) -> None:
    parameters = list(problem.module.parameters())
    before = [p.clone() for p in parameters]
    random = torch.get_rng_state()
    _update(problem, algorithm)
    untouched = all(torch.equal(p, q) and p.grad is None for p, q in zip(parameters, before, strict=True))
    assert untouched, "gradients() left a trace on the module."
    assert torch.equal(random, torch.get_rng_state()), "gradients() left a trace on torch's generator."


def _check_divergence(network: Network, problem: Problem) -> None:
    rest = network.evaluate(Forces(), network.free, 0.0)
    force = max(float(gradient.abs().max()) for gradient in rest.gradients)
    height = float(rest.internal.abs().max())
    assert max(height, force) < 1e-9, (
        f"The energy says it is a divergence, but at the forward pass it is {height:.2g}, with a force of"
        f" {force:.2g}: its free equilibrium is elsewhere, and its free phase may not be skipped."
    )
    moved = network.evaluate(Forces(), [state + 0.05 * problem.drawn(*state.shape) for state in network.free], 0.0)
    assert bool((moved.internal > -1e-9).all()), "The energy says it is a divergence, but is negative near by."


def _check_ends(step: Step, algorithm: Algorithm) -> None:
    """The force where a relaxation converged is small against the one that it started with."""
    network = step.network
    assert network is not None
    if algorithm.nudge.needs_output_state or algorithm.nudge.complex_states:  # held by a force, or not one to compare
        return
    for end in step.phases:
        found, strength = end.found, end.strength
        read_elsewhere = found.local_error is not None or found.dyadic_states is not None
        if found.status != "converged" or read_elsewhere or not strength:
            continue
        start, end = (
            network.norms(network.evaluate(Forces(), states, strength.real).gradients).norm()
            for states in (network.free, network.held(found).point)
        )
        assert float(end) <= 0.05 * float(start), (
            f'{algorithm.relaxer!r} says "converged" at nudge {strength:g}, where the force of'
            f" {type(algorithm.energy).__name__} is {float(end / start):.2g} of what it started with: it relaxed"
            " another energy, or did not relax."
        )


def _check_table(algorithm: Algorithm) -> None:
    if algorithm.nudge.linear_response:
        return
    table = table_of(without_draw(algorithm.nudge))
    total = sum(complex(weight).real for _, weight, _ in table)
    slope = sum((weight * strength).real for strength, weight, _ in table)
    largest = max(abs(weight) for _, weight, _ in table)
    assert max(abs(total) / largest, abs(slope - 1)) < 1e-6, (
        f"The phases of {algorithm.nudge!r} have weights that sum to {total:.3g} and weight * strength to {slope:.3g};"
        " a slope in the nudge needs 0 and 1, or every update is off by a factor or has a term that never vanishes."
    )
