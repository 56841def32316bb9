"""The network of one training step as a function of its states: passes of the recorded program with states in place.

This is the plain version, one Python pass an evaluation; it stays as the oracle of any faster one. The formulas of what
is asked at a point stand in `lightning_ebm.evaluations`; here is what they are made of.

Longer than 300 lines, as a third of it are formulas in docstrings.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import (
    LayerView,
    is_bounded,
    is_quadratic,
    precision_of,
    reads_drive,
    refuse_shapeless,
)
from lightning_ebm.evaluations import Evaluation, Forces, Landscape
from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.of_slope import holomorphic, is_one, ones_for
from lightning_ebm.network.passes import Passes, Run, Start
from lightning_ebm.network.precomputed_gradient import slopes_of
from lightning_ebm.network.samples import by_sample, squares_by_sample
from lightning_ebm.network.top_down import Sent, signals
from lightning_ebm.program.interpreter import Pass, at_least_float32
from lightning_ebm.program.programs import Known
from lightning_ebm.program.wiring import Plan
from lightning_ebm.questions import Questions, runs_behind
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.relaxers.sweep import arriving
from lightning_ebm.updates.base import End, Term, Update, is_linear, terms_read

_ROUNDING_OF_SINGLE = float(torch.finfo(torch.float32).eps)


class Network(Passes):
    """`Landscape` of one training step.

    Every pass is cut at the states: x_l is a leaf, the prediction mu_l a function of the parents' states and of the
    parameters. Forces are gradients with respect to the leaves; no weight gradient is computed, as none is asked for.

    Args:
        energy: e(x, a, rho).
        plan: the wiring.
        start: what is known of the pass at x_l = mu_l.
        run: makes another.
        batch_size: B.
        loss_scale: what the user's loss is multiplied by to be a sum over samples: B or 1.
    """

    def __init__(self, energy: Energy, plan: Plan, start: Start, run: Run, batch_size: int, loss_scale: float) -> None:
        super().__init__(plan.states, start, run, batch_size, keeps_drives=reads_drive(energy))
        self.names: Sequence[str] = [str(key) for key in plan.states]
        depths, self._above = plan.depths
        self.depths: Sequence[int] = depths
        self.parents: Sequence[Sequence[int]] = [row.parents for row in plan.rows]
        """Of each layer, the indices of those that its drive is computed from."""
        self.outputs = plan.loss_parents
        """Indices of the layers that the loss is computed from directly."""
        self.loss_parameters = plan.loss_parameters
        """Names of the parameters that the loss depends on without a layer between."""
        self.energy = energy
        self._plan = plan
        self.loss_scale = loss_scale
        self.is_scaled = False
        """Whether `loss_scale` is a tensor."""
        self.known: Known | None = None
        """The program, for what holds of all its batches."""
        self._questions = Questions(runs_behind(start.loss.device))
        energy.check_layers({key.name for key in plan.states})

    runs_as: str = "plain"
    """How evaluations have run: "plain", "traced" or "compiled"."""

    # The point of view of a relaxer

    @property
    def unwatched(self) -> Landscape:
        """See `Landscape.unwatched`."""
        return self

    conservative: bool = True
    """See `Landscape.conservative`."""

    @property
    def questions(self) -> Questions:
        """See `Landscape.questions`."""
        return self._questions

    def begin(self, strengths: Sequence[complex], held: bool = False) -> None:
        """See `Landscape.begin`."""

    @property
    def samples_interact(self) -> bool:
        """See `Landscape.samples_interact`. Asked of each program once: the first sample is nan, then all others are.

        Almost every operation passes nan on, whatever the numbers beside it, so that this tells what depends on what,
        where a small change could be lost in a hinge that happens to be inactive. What only chooses among samples, as
        the largest k losses of a batch, gives other samples another force: nan is the largest number.
        """
        if self.known is None:
            return self._reaches_others()
        if self.known.interacting is None:
            self.known.interacting = self._reaches_others()
        return self.known.interacting

    def _reaches_others(self) -> bool:
        if self.batch_size == 1:
            return False
        rows = torch.arange(self.batch_size, device=self.free[0].device)
        try:
            free = self._norms_with(torch.zeros_like(rows, dtype=torch.bool))
            changed = [(self._norms_with(nan) - free)[~nan] for nan in (rows == 0, rows > 0)]
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError):
            # Decompositions and functions of the user's own refuse nan, and relaxing as one is never wrong.
            return True
        far = 1e4 * max(self.rounding, torch.finfo(free.dtype).eps) * free.amax()
        return not bool((torch.cat(changed).abs() <= far).all())

    def _norms_with(self, poisoned: Tensor) -> Tensor:
        """Forces of the free states where some samples are nan, ``(B,)``."""
        added = torch.where(poisoned, math.nan, 0.0).to(self.free[0].real.dtype)
        states = [x + p for x, p in zip(self.free, self.spread(added, self.free), strict=True)]
        return self.norms(Forces().at(self, states, 1.0).gradients)

    def evaluate(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        """See `Landscape.evaluate`."""
        return what.at(self, point, strength)

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`."""
        if not is_bounded(self.energy):
            return states
        found = zip(states, self.views(self.first), strict=True)
        return [self.energy.feasible(state, view) for state, view in found]

    def metric(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """See `Landscape.metric`."""
        precisions = self.metric_precisions(self.first)
        return self.per_sample([p * a * b for p, a, b in zip(precisions, left, right, strict=True)])

    def over_root_precision(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.over_root_precision`."""
        precisions = self.metric_precisions(self.first)
        return [t if is_one(p) else t / p**0.5 for t, p in zip(tensors, precisions, strict=True)]

    def with_feedback(self, operators: Sequence[Tensor]) -> "Network":
        """The same network, in which slopes go back through these in place of the weights, one a product."""
        return self._running(replace(self._run, feedback=operators))

    def transposed(self, operators: Sequence[Tensor], pulls: Sequence[Tensor] = ()) -> "Network":
        """The network that `with_feedback` gives with weights and operators in each other's places, under these pulls.

        Where drives are linear in states, the Jacobian of its forces is the transpose of the other's.
        """
        return self._running(replace(self._run, feedback=operators, crossed=True, pulls=pulls))

    def with_offsets(self, offsets: Sequence[Tensor]) -> "Network":
        """The same network, in which every layer predicts less by these."""
        other = self._running(replace(self._run, offsets=offsets))
        other._moved = True  # states at rest are no longer at the predictions
        return other

    def _with_loss_times(self, scale: float | Tensor) -> "Network":
        """The same network under a multiple of its loss."""
        other: Any = copy.copy(self)
        other.loss_scale, other.is_scaled = self.loss_scale * (self.first_loss.new_ones(()).real * scale), True
        return cast(Network, other)

    def with_energy(self, energy: Energy) -> "Network":
        """The same network under another energy of the same states."""
        other = copy.copy(self)
        other.energy = energy
        return other

    def _running(self, run: Run) -> "Network":
        other = copy.copy(self)
        other._run, other._forward, other._latest = run, None, None
        return other

    # The point of view of an update

    def update(self, rule: Update, ends: Sequence[End], scale: float | Tensor = 1.0) -> Tensor:
        """A scalar whose gradient is what the rule reads off the ends of phases.

        Args:
            rule: of the algorithm.
            ends: of its phases.
            scale: factor on the update.
        """
        here, waiting = self, [errors for end in ends if (errors := arriving(end.found, self)) is not None]
        if is_linear(rule) and len(waiting) == len(ends):
            # Scaled where the signal starts, what it meets within a layer is the same for the errors and the update.
            here = self._with_loss_times(scale)
            ends = [end._replace(found=copy.copy(end.found)) for end in ends]
            for end, errors in zip(ends, waiting, strict=True):
                end.found.local_error = multiples = errors.of(here)
                errors.note(multiples, scale)
            scale = 1.0
        with torch.enable_grad(), here.showing() as shown:
            terms = terms_read(rule, here, ends)
        return slopes_of(terms, [state for seen in shown for state in seen.states]) * scale

    def terms_of(self, ends: Sequence[End]) -> list[Term]:
        """`sum_p weight_p dE/dtheta` at the ends of phases, every state held fixed.

        Where a relaxer left errors at the layers, these are read instead of the distance of states to predictions, so
        that x - mu is never formed; of pairs of states E is that of the leading ones less that of the trailing ones.
        """
        return [term for end in ends for term in self._terms_of(end)]

    def loss_terms(self, seen: Pass, weight: complex) -> list[Term]:
        """`weight dL/dtheta` of what the loss computes from parameters directly, L summed over the batch."""
        return [Term(seen.loss, weight * self.loss_scale * ones_for(seen.loss))]

    def at_rest(self, local_error: Sequence[Tensor] | None = None) -> Relaxation:
        """The free equilibrium as the end of a phase, with errors to be read at its layers.

        Args:
            local_error: d_l of each layer, which `terms_of` reads as `-<Pi_l d_l, dmu_l/dtheta>`; None reads I itself.
        """
        forward = self._equilibrium is None and local_error is not None
        point = list(self.no_errors if forward else self.equilibrium)
        residual = torch.zeros(self.batch_size, device=point[0].device)
        return Relaxation(point, "errors" if forward else "states", "fixed", 0, residual, local_error=local_error)

    def held(self, found: Relaxation) -> Relaxation:
        """The same end of a phase, written in states that stay what they are when parameters move."""
        if found.coordinates == "states":
            return found
        return found.in_states(lambda errors: [state.detach() for state in self.at_errors(errors).states])

    def errors_at(self, found: Relaxation) -> list[Tensor]:
        """x_l - mu_l at the end of a phase, one tensor a layer."""
        errors = found.local_error if found.local_error is not None else found.point
        if found.local_error is not None or found.coordinates == "errors":
            return [error.detach() for error in errors]
        layers = self.at_states(found.point).layers
        return [(x - call.prediction).detach() for x, call in zip(found.point, layers, strict=True)]

    def at(self, found: Relaxation) -> Pass:
        """The pass at the end of a phase."""
        return self.at_errors(found.point) if found.coordinates == "errors" else self.at_states(found.point)

    def _terms_of(self, end: End) -> list[Term]:
        """What is differentiated for the update, and the weight of each of its elements."""
        found, weight = end.found, end.weight
        seen, errors = self.at(found), found.local_error
        if errors is None and found.coordinates == "errors":
            errors = found.point
        if errors is None and found.dyadic_states is None and is_quadratic(self.energy):
            errors = [(call.state - call.prediction).detach() for call in seen.layers]
        terms = self.loss_terms(seen, end.weight * end.strength) if end.strength else []
        if not end.internal:
            return terms
        if found.dyadic_states is not None:
            ahead, behind = found.dyadic_states
            internal = self.internal(seen, at=ahead) - self.internal(seen, at=behind)
            return [Term(internal, weight * ones_for(internal)), *terms]
        if errors is None:
            internal = self.internal(seen, own=False)  # states are held: what they cost by themselves needs no graph
            return [Term(internal, weight * ones_for(internal)), *terms]
        parts = zip(self.precisions(seen), errors, seen.layers, strict=True)
        return [*(Term(call.prediction, -weight * e if is_one(p) else -weight * p * e) for p, e, call in parts), *terms]

    def loss(self, seen: Pass) -> Tensor:
        """L summed over the batch, which half precision may not hold where it holds the mean."""
        loss: Tensor = self.loss_scale * at_least_float32(seen.loss)
        return loss

    def internal(self, seen: Pass, own: bool = True, at: Sequence[Tensor] | None = None) -> Tensor:
        """I_b of a pass, ``(B,)``.

        Args:
            seen: the pass.
            own: False to see each layer's state as a constant in the layer's own term: what is left of the slope is
                the pull of the others.
            at: other states, for the layers' own terms only.
        """
        states = seen.states if at is None else at
        terms = self.layer_energies(seen, states if own else [state.detach() for state in states])
        if self._run.pulls:
            terms.append(-self.per_sample(p * x for p, x in zip(self._run.pulls, seen.states, strict=True)))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def layer_energies(self, seen: Pass, states: Sequence[Tensor]) -> list[Tensor]:
        """e(x_l, a_l, rho_l) of each layer, summed over its units, ``(B,)``: drives of a pass, states as given."""
        terms = []
        for view, state, layout in zip(self.views(seen), states, self.layouts, strict=True):
            energy = self.energy.layer_energy(state, view)
            same_shape = isinstance(energy, Tensor) and energy.shape == state.shape
            if not same_shape:
                refuse_shapeless(self.energy, energy, view, self.batch_size)
            terms.append(by_sample(energy, layout if same_shape else 0, self.batch_size))
        return terms

    def views(self, seen: Pass) -> list[LayerView]:
        """What the energy may know of each layer."""
        return [call.view(above) for call, above in zip(seen.layers, self._above, strict=True)]

    def loss_slopes(self, states: Sequence[Tensor]) -> list[Tensor]:
        """dL/dx of what enters the loss directly, L per sample; 0 for the other layers."""
        with torch.enable_grad():
            seen = self.at_states(states)
            loss = self.loss(seen)
            return self.slopes(seen, torch.zeros_like(loss), loss, 1.0, range(len(states)))

    def slopes(
        self, seen: Pass, internal: Tensor, loss: Tensor, strength: complex, layers: Sequence[int], sign: float = 1.0
    ) -> list[Tensor]:
        """d(internal + strength * loss) / dx for the layers asked for, times `sign`: -1 is the way down."""
        unit = self.unit_of(strength)
        total = internal.sum()
        if strength:
            total = total + strength * loss if unit == 1 else total / unit + loss
        leaves = [seen.states[k] for k in layers]
        if not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        seed = sign * ones_for(total)
        slopes = torch.autograd.grad(total, leaves, seed, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(leaf) if slope is None else holomorphic(slope) if unit == 1 else unit * holomorphic(slope)
            for slope, leaf in zip(slopes, leaves, strict=True)
        ]

    def unit_of(self, strength: complex) -> complex:
        """What slopes are divided by before they are sent back, and multiplied by afterwards: 1, or lambda.

        Within half-precision networks lambda = 1e-4 would underflow.
        """
        return strength or 1.0 if self.rounding > _ROUNDING_OF_SINGLE else 1.0

    def quadratic(self, errors: Sequence[Tensor], precisions: Sequence[float | Tensor]) -> Tensor:
        """`sum_l 1/2 Pi_l |e_l|^2` of each sample, ``(B,)``."""
        if all(map(is_one, precisions)):
            return 0.5 * self.norms(errors).square()
        rows = [
            by_sample(p * e.square(), layout, self.batch_size)
            if isinstance(p, Tensor)
            else p * squares_by_sample(e, layout, self.batch_size)
            for p, e, layout in zip(precisions, errors, self.layouts, strict=True)
        ]
        return 0.5 * torch.stack(rows).sum(0)

    def precisions(self, seen: Pass) -> list[float | Tensor]:
        return [precision_of(self.energy, view) for view in self.views(seen)]

    def metric_precisions(self, seen: Pass) -> list[float | Tensor]:
        """The precisions that errors are measured by: 1 for layers that have none."""
        return [1.0 if not isinstance(p, Tensor) and p == 0 else p for p in self.precisions(seen)]

    def signals(self, seen: Pass, top: Tensor, sent: Sent | None = None) -> list[Tensor]:
        """d top / d x_l through every layer above, see `lightning_ebm.network.top_down`."""
        return signals(self._plan, seen, top, sent)

    def pulled_back(self, seen: Pass, tops: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor | None]:
        """d sum_k <seed_k, output_k> / d x_l of a pass; None where nothing depends on a state."""
        leaves = seen.states
        if not tops:
            return [None] * len(leaves)
        outputs, seeds = zip(*tops, strict=True)
        return torch.autograd.grad(outputs, leaves, seeds, retain_graph=True, allow_unused=True)
