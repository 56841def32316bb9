"""What a network looks like at an equilibrium: states, errors and energies by the names of layers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_quadratic
from lightning_ebm.energies.without_terms import without_terms
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.instruments.verdict import effective_steps
from lightning_ebm.network.network import Network
from lightning_ebm.network.precomputed_gradient import average_of
from lightning_ebm.network.recording import TraceEntry
from lightning_ebm.network.samples import samples_first
from lightning_ebm.nudges import Nudge, OneSided, Phase
from lightning_ebm.nudges.base import table_of
from lightning_ebm.relaxers import QuasiNewton, Relaxation, Relaxer
from lightning_ebm.relaxers.automatic import automatic
from lightning_ebm.relaxers.base import Status
from lightning_ebm.updates import Contrast, End
from lightning_ebm.updates.base import label, samples_of

_TOL, _STEPS = 1e-6, 2000
"""Of relaxers that are to find an equilibrium, rather than a training step's share of it."""


@dataclass(frozen=True)
class Relaxed:
    """The end of a relaxation. ``B`` samples first in every tensor; layers by their names as in `ebm.summary`.

    A layer that is called several times has a name for each call, ``"cell"``, ``"cell#1"``, and so on.

    Attributes:
        states: x_l, ``(B, ...)``.
        predictions: mu_l, what each layer would emit given the states that it is computed from, ``(B, ...)``.
        errors: x_l - mu_l, ``(B, ...)``; of held units as well.
        energies: the layer's own term e(x_l, a_l), summed over its units, ``(B,)``.
        loss: the closure's loss at these states, in its own reduction; None if it returned none.
        status: "converged", "kink", "stalled", "max_steps" or "fixed", see `Relaxation`.
        residual: force left on what is not held, over that at the start, ``(B,)``.
        steps: taken by the slowest sample.
        trace: I + lambda L of the batch along the way, ``(T,)``, as far as the relaxer looked at it.
        gradients: d(I + lambda L)/dtheta here with states held fixed, summed over the batch, by the parameters' names;
            empty unless they were asked for. Over samples the average.
        samples: of a relaxer that draws some, as `Langevin` does, ``(n, B, ...)``; the rest is of the last.
        course: where it was asked for by ``record=True``, what was seen at every evaluation on the way: I and L, the
            force on each layer and when a signal first arrived there, layers in the order of `states`.
    """

    states: dict[str, Tensor]
    predictions: dict[str, Tensor]
    errors: dict[str, Tensor]
    energies: dict[str, Tensor]
    loss: Tensor | None
    status: Status
    residual: Tensor
    steps: int
    trace: Tensor
    gradients: dict[str, Tensor]
    samples: dict[str, Tensor]
    course: TraceEntry | None = None

    @property
    def energy(self) -> Tensor:
        """I of each sample, the sum of `energies`, ``(B,)``."""
        return torch.stack(list(self.energies.values())).sum(0)

    @property
    def effective_steps(self) -> int | None:
        """How many steps made 99 % of the fall of the energy; None where the relaxer did not look at it on the way.

        See `lightning_ebm.regime.effective_steps`, for other shares as well.
        """
        return effective_steps(self.trace.tolist()) if len(self.trace) == self.steps + 1 else None


def relaxed_of(
    network: Network, found: Relaxation, has_loss: bool, gradients: dict[str, Tensor], course: TraceEntry | None = None
) -> Relaxed:
    """Reads a point in states off its network."""
    with torch.no_grad():
        seen = network.at_states(found.point)
        energies = [energy.detach() for energy in network.layer_energies(seen, found.point)]
        loss = seen.loss.detach().clone() if has_loss else None
    predictions = [call.prediction.detach() for call in seen.layers]

    def by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        rows = zip(tensors, network.layouts, strict=True)
        first = [samples_first(tensor.detach(), layout, network.batch_size).clone() for tensor, layout in rows]
        return dict(zip(network.names, first, strict=True))

    samples = [by_name(point) for point in found.samples or ()]
    return Relaxed(
        states=by_name(found.point),
        predictions=by_name(predictions),
        errors=by_name([x - mu for x, mu in zip(found.point, predictions, strict=True)]),
        energies=dict(zip(network.names, energies, strict=True)),
        loss=loss,
        status=found.status,
        residual=found.residual.detach(),
        steps=found.steps,
        trace=torch.stack(list(found.energies)) if found.energies else torch.zeros(0),
        gradients=gradients,
        samples={name: torch.stack([sample[name] for sample in samples]) for name in network.names if samples},
        course=course,
    )


def gradient_of(network: Network, found: Relaxation, strength: float) -> Tensor:
    """A scalar whose gradient is d(I + strength L)/dtheta there, averaged over samples where there are some."""
    ends = [End(Phase(strength, 1.0), found)]
    drawn = samples_of(ends)
    rule = Contrast()
    return network.update(rule, ends) if drawn is None else average_of(drawn, lambda one: network.update(rule, one))


def strength_of(nudge: float | Nudge | None) -> float:
    """lambda, of a number or of a nudge's strongest phase.

    Raises:
        ConfigurationError: the nudge is no real number, or holds the output.
    """
    if nudge is None:
        return 0.0
    if isinstance(nudge, Nudge):
        table = table_of(nudge)
        if not table or table[0].held:
            raise ConfigurationError(
                f"relax(nudge={nudge!r}): it pulls with no number to relax at. Give one, nudge=0.1, or hold the output"
                " yourself, clamp={name: value}."
            )
        given: object = table[0].strength
    else:
        given = nudge
    wanted = "a real number, the weight of the loss in the energy, or a nudge with real strengths; None leaves it out"
    return checked.number("relax", "nudge", given, wanted)


def for_equilibrium(
    algorithm: Algorithm, free: Collection[str], nudged: bool, relaxer: Relaxer | Literal["auto"] | None
) -> Algorithm:
    """The algorithm whose free or nudged phase is the equilibrium that is asked for, by a relaxer that can find it.

    Args:
        algorithm: of the learner.
        free: layers without a term of their own.
        nudged: whether the loss counts.
        relaxer: which; None is the algorithm's own where it takes a number of steps, else one that goes to equilibrium.
    """
    if not isinstance(relaxer, Relaxer | None) and not checked.is_word(relaxer, "auto"):
        checked.refuse("relax", "relaxer", relaxer, 'an instance of ebm.Relaxer, "auto", or None')
    energy = without_terms(algorithm.energy, free)
    own = algorithm.relaxer if nudged or algorithm.free_relaxer is None else algorithm.free_relaxer
    equilibria = algorithm.rule.relaxes and own.ends_in_states
    if relaxer is None and equilibria:
        as_it_is = not own.tol or own.ends_elsewhere
        relaxer = own if not free and as_it_is else _to_equilibrium(own, energy, by_own=not free)
    elif not isinstance(relaxer, Relaxer):
        relaxer = _to_equilibrium(None, energy)
    elif not relaxer.ends_in_states:
        raise ConfigurationError(
            f"{type(relaxer).__name__} finds no equilibrium: what it leaves is read as {relaxer.update!r}. Take"
            " ebm.QuasiNewton(...), ebm.FixedPoint(...), ebm.GradientDescent(...), or leave the relaxer out."
        )
    start: Literal["forward", "zeros"] = "zeros" if algorithm.initial_state == "zeros" else "forward"
    return Algorithm(energy, OneSided(), relaxer, initial_state=start)


def _to_equilibrium(own: Relaxer | None, energy: Energy, by_own: bool = True) -> Relaxer:
    """A relaxer to a tolerance of 1e-6, or the own one's where that is finer; `by_own`, it may be of its kind."""
    tol, steps = (_TOL, _STEPS) if own is None else (min(own.tol or _TOL, _TOL), max(own.max_steps, _STEPS))
    if is_quadratic(energy):
        return QuasiNewton(steps, tol=tol)
    if own is None or not own.tol or not by_own:
        return automatic(energy, OneSided(), tol, steps)
    return replace(own, tol=tol, max_steps=steps)  # type: ignore[type-var]  # it has both


def refuse_for_update(algorithm: Algorithm) -> None:
    """Refuses algorithms that cannot train with held units.

    Raises:
        ConfigurationError: what it reads is no contrast of equilibria.
    """
    rule, relaxer = algorithm.rule, algorithm.relaxer
    reads = rule.relaxes and not rule.incremental and not rule.second_derivatives and relaxer.ends_in_states
    if not reads or any(phase.held or phase.is_complex for phase in rule.phases(algorithm.nudge)):
        raise ConfigurationError(
            f"clamp: an update {label(rule)!r} under {algorithm.nudge!r} is read off something else than equilibria"
            ' with units held. Take ebm.algorithm("predictive-coding") or another whose phases are equilibria;'
            " relax(..., clamp=...) shows states under any."
        )
