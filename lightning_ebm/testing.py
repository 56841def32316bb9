"""What proves our rules, offered for yours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.closure import Closure
from lightning_ebm.energies.base import best_response, has_best_response, is_divergence
from lightning_ebm.learner import Learner, output_for
from lightning_ebm.linearization import Linearization
from lightning_ebm.metrics import alignment
from lightning_ebm.network import Network
from lightning_ebm.nudges.base import table_of, without_draw
from lightning_ebm.presets import algorithm as preset
from lightning_ebm.program.calls import clean
from lightning_ebm.program.layers import Layers, Output
from lightning_ebm.program.wiring import named_gradients
from lightning_ebm.reference import backprop, equilibrium
from lightning_ebm.step import Step


def check_locality(
    module: nn.Module,
    closure: Closure,
    algorithm: str | Algorithm = "predictive-coding",
    *,
    layers: Layers = None,
    output: Output = "auto",
    loss_reduction: Literal["mean", "sum"] = "mean",
    scale: float = 0.1,
) -> dict[str, tuple[str, ...]]:
    """Proves that every layer's update is local: with all states held, it depends on no other layer's parameters.

    States are relaxed once. Then, for each layer l in turn, the parameters in its drive are moved at random and the
    update of all parameters is read again at the *same* states. Only parameters that share a drive with those moved
    (or enter the loss beside them) may get another update; all others must get the same one, bit for bit.

    Args:
        module: the user's module; afterwards as it was.
        closure: returns the loss.
        algorithm: whose update to check.
        layers: as in `Learner`.
        output: as in `Learner`.
        loss_reduction: as in `Learner`.
        scale: standard deviation of the move, relative to that of each parameter (plus 1e-3).

    Returns:
        For each layer moved, the names of the parameters whose update changed.

    Raises:
        AssertionError: an update changed that had no business to; names the layer moved and the parameter.
    """
    chosen = preset(algorithm)
    output = output_for(chosen, output)
    finder = Learner(module, "zero-divergence", layers=layers, output=output, loss_reduction=loss_reduction)
    finder.gradients(closure)
    plan = finder.plan
    assert plan is not None
    if chosen.read_as == "backprop":

        def update() -> dict[str, Tensor]:
            return backprop(module, closure)

    else:
        learner = Learner(module, chosen, layers=layers, output=output, loss_reduction=loss_reduction)
        step = learner.begin(closure)
        with step.first_pass():
            loss = closure()
        step.surrogate(loss)
        network, phases, displaced = step.network, step.phases, step.displaced
        assert network is not None
        held = [(strength, weight, network.held(found)) for strength, weight, found in phases]

        def update() -> dict[str, Tensor]:
            return named_gradients(module, reading())

        def reading() -> Tensor:
            if displaced is not None:
                network.parameters_moved()
                near = Linearization(network, displaced[0])
                return near.loss() + near.cross_derivative(displaced[1])
            terms = [weight * network.energy_with(found, strength) for strength, weight, found in held]
            return torch.stack([term.real for term in terms]).sum()

    before = update()
    again = update()
    unstable = [name for name in before if not torch.equal(before[name], again[name])]
    assert not unstable, f"The update of {unstable} differs between two readings at the same states and parameters."
    drives = [row.parameters for row in plan.rows] + [plan.loss_parameters]
    names = [str(key) for key in plan.states] + ["(loss)"]
    changed: dict[str, tuple[str, ...]] = {}
    for name, moved in zip(names, drives, strict=True):
        near = {other for drive in drives if set(drive) & set(moved) for other in drive}
        with _moved(module, set(moved), scale):
            after = update()
        changed[name] = tuple(p for p in before if not torch.equal(before[p], after[p]))
        far = [p for p in changed[name] if p not in near]
        assert not far, (
            f"The update of {far} changed when only {list(moved)}, the parameters in the drive of {name!r}, were moved"
            " and every state was held: it uses information that is not present at its own layer."
        )
    return changed


@contextmanager
def _moved(module: nn.Module, names: set[str], scale: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    held = [(p, p.data) for name, p in module.named_parameters() if clean(name) in names]
    try:
        for parameter, value in held:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            spread = value.std(correction=0) if value.numel() > 1 else value.abs()
            parameter.data = value + scale * (spread + 1e-3) * noise
        yield
    finally:
        for parameter, value in held:
            parameter.data = value


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

    Example:
        >>> round(check_algorithm("zero-divergence")["relative_error"], 9)
        0.0
    """
    chosen = preset(algorithm)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    modules: list[nn.Module] = []
    for inside, outside in ((4, 6), (6, 5), (5, 3)):
        linear = nn.Linear(inside, outside, dtype=torch.float64)
        linear.weight.data, linear.bias.data = 0.8 * drawn(outside, inside) / inside**0.5, 0.1 * drawn(outside)
        modules += [linear, nn.Tanh()]
    module = nn.Sequential(*modules[:-1])
    x, y = drawn(6, 4), drawn(6, 3)

    def update(reduction: Literal["mean", "sum"] = "mean", rows: slice = slice(None)) -> dict[str, Tensor]:
        def closure() -> Tensor:
            losses: Tensor = 0.5 * (module(x[rows]) - y[rows]).square().sum(1)
            return losses.mean() if reduction == "mean" else losses.sum()

        return Learner(module, chosen, loss_reduction=reduction).gradients(closure)

    def closure() -> Tensor:
        loss: Tensor = 0.5 * (module(x) - y).square().sum(1).mean()
        return loss

    _check_table(chosen)
    before = [p.clone() for p in module.parameters()]
    random = torch.get_rng_state()
    found = update()
    untouched = all(torch.equal(p, q) and p.grad is None for p, q in zip(module.parameters(), before, strict=True))
    assert untouched, "gradients() left a trace on the module."
    assert torch.equal(random, torch.get_rng_state()), "gradients() left a trace on torch's generator."

    if chosen.read_as != "backprop":
        step = Learner(module, chosen, capture=False).begin(closure)
        with step.first_pass():
            loss = closure()
        step.surrogate(loss)
        assert step.network is not None
        _check_response(step.network, drawn)
        _check_ends(step, chosen)
    if chosen.energy.divergence and chosen.read_as != "backprop":
        assert step.network is not None
        rest = step.network.forces(step.network.free, 0.0)
        force = max(float(gradient.abs().max()) for gradient in rest.gradients)
        height = float(rest.internal.abs().max())
        assert max(height, force) < 1e-9, (
            f"The energy says it is a divergence, but at the forward pass it is {height:.2g}, with a force of"
            f" {force:.2g}: its free equilibrium is elsewhere, and its free phase may not be skipped."
        )
        moved = step.network.forces([state + 0.05 * drawn(*state.shape) for state in step.network.free], 0.0)
        assert bool((moved.internal > -1e-9).all()), "The energy says it is a divergence, but is negative near by."

    single = [update(rows=slice(i, i + 1)) for i in range(len(x))]
    apart = {name: torch.stack([g[name] for g in single]).mean(0) for name in found}
    batch_error = alignment(found, apart)["relative_error"]
    assert batch_error <= tol, f"The update of a batch is {batch_error:.2g} off the mean of its samples' updates."
    summed = {name: gradient / len(x) for name, gradient in update("sum").items()}
    reduction_error = alignment(found, summed)["relative_error"]
    assert reduction_error <= tol, f"The update of a summed loss is {reduction_error:.2g} off B times that of the mean."
    check_locality(module, closure, chosen)
    reference = backprop(module, closure)
    if not is_divergence(chosen.energy):
        reference = equilibrium(module, closure, chosen)
    figures = alignment(found, reference)
    assert figures["cosine"] > 0, f"The update ascends: its cosine with the true gradient is {figures['cosine']:.3f}."
    return {
        "cosine": figures["cosine"],
        "relative_error": figures["relative_error"],
        "batch_error": batch_error,
        "reduction_error": reduction_error,
    }


def _check_response(network: Network, drawn: Callable[..., Tensor]) -> None:
    """argmin_x e(x, a) - <pull, x> has no slope in x, but for those that the domain of x holds against."""
    energy = network.energy
    if not has_best_response(energy):
        return
    for view in network.views(network.at_states(network.free)):
        pull = 0.1 * drawn(*view.prediction.shape)
        state = best_response(energy, pull, view).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(energy.layer_energy(state, view).sum(), state)
        left = float(energy.tangent(slope - pull, state.detach(), view).abs().max())
        assert left < 1e-6, (
            f"{type(energy).__name__}.best_response of layer {view.name!r} is no minimum of layer_energy less the pull:"
            f" a slope of {left:.2g} is left where it leads."
        )


def _check_ends(step: Step, algorithm: Algorithm) -> None:
    """The force where a relaxation converged is small against the one that it started with."""
    network = step.network
    assert network is not None
    if algorithm.nudge.needs_output_state or algorithm.nudge.complex_states:  # held by a force, or not one to compare
        return
    for strength, _, found in step.phases:
        if found.status != "converged" or found.displacement is not None or found.dyad is not None or not strength:
            continue
        start, end = (
            network.norms(network.forces(states, strength.real).gradients).norm()
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
