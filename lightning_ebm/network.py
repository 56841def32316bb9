"""The waist made real: energies and forces of one training step, by running the user's code with states in place.

This is the plain version, one Python pass an evaluation; it stays as the oracle of any faster one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import QuadraticEnergy
from lightning_ebm.errors import LayerDiscoveryError
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.substitution import Pass, StateKey, StateOf, at_states
from lightning_ebm.wiring import Plan

Run = Callable[[StateOf], Pass]
"""Replays the step, without side effects, with the given states in place."""


class Network:
    """`Landscape` of one training step.

    Every pass is cut at the states: x_l is a leaf, the prediction mu_l a function of the parents' states and of the
    parameters. Forces are gradients with respect to the leaves; no weight gradient is computed, as none is asked for.

    Args:
        energy: e(x, a, rho).
        plan: the wiring.
        first: the pass that the user's code made, at x_l = mu_l.
        run: makes another.
        batch_size: B.
        loss_scale: what the user's loss is multiplied by to be a sum over samples: B or 1.
    """

    def __init__(self, energy: Energy, plan: Plan, first: Pass, run: Run, batch_size: int, loss_scale: float) -> None:
        self.batch_size = batch_size
        self.names: Sequence[str] = [str(key) for key in plan.states]
        self._energy = energy
        self._plan = plan
        self._run = run
        self._loss_scale = loss_scale
        self.free: Sequence[Tensor] = [state.detach() for state in first.states]
        self.no_errors: Sequence[Tensor] = [torch.zeros_like(state) for state in self.free]
        self._layouts = [_layout(state.shape, batch_size) for state in self.free]
        self.rounding = first.rounding
        self._first = first
        self._latest: tuple[list[Tensor], Pass] | None = None

    # The point of view of a relaxer

    def forces(self, states: Sequence[Tensor], strength: float) -> Forces:
        """See `Landscape.forces`."""
        with torch.enable_grad():
            seen = self._at_states(states)
            internal, loss = self._internal(seen), self._loss_scale * seen.loss
            # Slopes of E / lambda, multiplied afterwards: within half-precision networks 1e-4 would underflow.
            unit = strength or 1.0
            total = internal.sum() / unit + loss if strength else internal.sum()
            slopes = torch.autograd.grad(total, seen.states, retain_graph=True, allow_unused=True)
        found = zip(slopes, self.free, strict=True)
        gradients = [torch.zeros_like(state) if slope is None else unit * slope for slope, state in found]
        return Forces(internal.detach(), loss.detach(), gradients)

    def error_forces(self, errors: Sequence[Tensor], strength: float) -> Forces:
        """See `Landscape.error_forces`."""
        with torch.enable_grad():
            seen = self._at_errors(errors)
            loss = self._loss_scale * seen.loss
            signals = [strength * signal for signal in self._signals(seen, loss)]
        precisions = self._precisions(seen)
        internal = self.per_sample([0.5 * p * e.square() for p, e in zip(precisions, errors, strict=True)])
        gradients = [e + s / p for e, s, p in zip(errors, signals, precisions, strict=True)]
        return Forces(internal, loss.detach(), gradients)

    def per_sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        rows = [_by_sample(t, layout, self.batch_size) for t, layout in zip(tensors, self._layouts, strict=True)]
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.spread`."""
        return [_to_samples(values, t, layout) for t, layout in zip(like, self._layouts, strict=True)]

    # The point of view of an update

    def energy_at(self, found: Relaxation, strength: float) -> Tensor:
        """E at the end of a phase as a function of the parameters, every state held fixed; its gradient is dE/dtheta.

        In error coordinates the value is not E but <-Pi e, mu(theta)> + strength * L: the gradient is the same, and
        x - mu is never formed.
        """
        if found.coordinates == "states":
            return self._energy_of(self._at_states(found.point), None, strength)
        seen = self._first if found.coordinates == "arrival" else self._at_errors(found.point)
        return self._energy_of(seen, found.point, strength)

    def held(self, found: Relaxation) -> Relaxation:
        """The same end of a phase, written in states that stay what they are when parameters move."""
        if found.coordinates != "errors":
            return found
        states = [state.detach() for state in self._at_errors(found.point).states]
        return dataclasses.replace(found, point=states, coordinates="states")

    def energy_with(self, held: Relaxation, strength: float) -> Tensor:
        """`energy_at` for the parameters of now: a fresh pass, with the states of before."""
        self._latest = None
        states = self.free if held.coordinates == "arrival" else held.point
        seen = self._run(at_states(dict(zip(self._plan.states, states, strict=True))))
        return self._energy_of(seen, held.point if held.coordinates == "arrival" else None, strength)

    def errors_at(self, found: Relaxation) -> list[Tensor]:
        """x_l - mu_l at the end of a phase, one tensor a layer."""
        if found.coordinates != "states":
            return [error.detach() for error in found.point]
        layers = self._at_states(found.point).layers
        return [(x - call.prediction).detach() for x, call in zip(found.point, layers, strict=True)]

    def _energy_of(self, seen: Pass, errors: Sequence[Tensor] | None, strength: float) -> Tensor:
        with torch.enable_grad():
            if errors is None:
                internal = self._internal(seen).sum()
            else:
                terms = zip(self._precisions(seen), errors, seen.layers, strict=True)
                internal = torch.stack([(-p * e * call.prediction).sum() for p, e, call in terms]).sum()
            return internal + strength * self._loss_scale * seen.loss if strength else internal

    # Passes

    def _at_states(self, states: Sequence[Tensor]) -> Pass:
        if _same(states, self.free):
            return self._first
        return self._pass_at(states, at_states(dict(zip(self._plan.states, states, strict=True))))

    def _at_errors(self, errors: Sequence[Tensor]) -> Pass:
        if _same(errors, self.no_errors):
            return self._first
        by_key = dict(zip(self._plan.states, errors, strict=True))

        def displaced(key: StateKey, prediction: Tensor) -> Tensor | None:
            return (prediction.detach() + by_key[key]).requires_grad_() if key in by_key else None

        return self._pass_at(errors, displaced)

    def _pass_at(self, point: Sequence[Tensor], state_of: StateOf) -> Pass:
        """The pass at a point, kept until another is asked for: the update reads the one the last forces came from."""
        if self._latest is not None:
            if _same(self._latest[0], point):
                return self._latest[1]
            self._latest = None  # before the next one is made, so that two graphs are never held at once
        seen = self._run(state_of)
        if seen.keys != self._plan.calls:
            raise LayerDiscoveryError(
                "The layers that were called changed between two passes of the same step: the control flow of the"
                " module depends on values of its states, or on something outside the module that each pass changes."
                f" First pass: {[str(key) for key in self._plan.calls]}; now: {[str(key) for key in seen.keys]}."
                " Make the flow depend on the inputs alone, or take whole blocks as layers, layers=[...]."
            )
        self._latest = (list(point), seen)
        return seen

    def _internal(self, seen: Pass) -> Tensor:
        terms = []
        for call, state, layout in zip(seen.layers, seen.states, self._layouts, strict=True):
            energy = self._energy.layer_energy(state, call.view)
            same_shape = energy.shape == state.shape
            terms.append(_by_sample(energy, layout if same_shape else 0, self.batch_size))
        return torch.stack(terms).sum(0)

    def _precisions(self, seen: Pass) -> list[float]:
        assert isinstance(self._energy, QuadraticEnergy)
        return [self._energy.layer_precision(call.view) for call in seen.layers]

    def _signals(self, seen: Pass, top: Tensor) -> list[Tensor]:
        """d top / d x_l through every layer above, x = mu + e: top down, one layer's own Jacobian at a time."""
        leaves = seen.states
        signals: list[Tensor | None] = [None] * len(leaves)

        def send(output: Tensor, weight: Tensor | None, parents: tuple[int, ...]) -> None:
            if not parents:
                return
            into = [leaves[p] for p in parents]
            parts = torch.autograd.grad(output, into, weight, retain_graph=True, allow_unused=True)
            for p, part in zip(parents, parts, strict=True):
                before = signals[p]
                signals[p] = part if before is None else before if part is None else before + part

        send(top, None, self._plan.loss_parents)
        for k in range(len(leaves) - 1, -1, -1):
            if (signal := signals[k]) is not None:
                send(seen.layers[k].prediction, signal, self._plan.rows[k].parents)
        return [torch.zeros_like(x) if s is None else s for s, x in zip(signals, self.free, strict=True)]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _layout(shape: torch.Size, batch_size: int) -> int | None:
    """Where the samples are: in dimension 0 (or a multiple of B folded into it), in dimension 1, or (None) nowhere."""
    if len(shape) and shape[0] == batch_size:
        return 0
    if len(shape) > 1 and shape[1] == batch_size:
        return 1
    return 0 if len(shape) and shape[0] and shape[0] % batch_size == 0 else None


def _by_sample(tensor: Tensor, layout: int | None, batch_size: int) -> Tensor:
    if layout is None:  # belongs to all samples: each is charged its share
        return (tensor.sum() / batch_size).expand(batch_size)
    return tensor.movedim(layout, 0).reshape(batch_size, -1).sum(1)


def _to_samples(values: Tensor, like: Tensor, layout: int | None) -> Tensor:
    if layout is None:  # moves as the most cautious sample does
        return values.amin().reshape([1] * like.ndim)
    folded = like.shape[layout] // values.shape[0]
    values = values.repeat_interleave(folded) if folded > 1 else values
    return values.reshape([-1 if d == layout else 1 for d in range(like.ndim)])
