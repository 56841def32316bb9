"""The waist made real: energies and forces of one training step, by running the user's step with states in place.

This is the plain version, one Python pass an evaluation; it stays as the oracle of any faster one.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ebm.delivery import Seed, slopes_of
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import (
    LayerView,
    QuadraticEnergy,
    best_response,
    is_bounded,
    is_quadratic,
    precision_of,
    reads_drive,
)
from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.interpreter import Pass, StateOf, at_prediction, at_states
from lightning_ebm.program.record import StateKey
from lightning_ebm.program.wiring import Plan
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.forces import total_energy
from lightning_ebm.samples import by_sample, layout_of, norm_by_sample, squares_by_sample, to_samples
from lightning_ebm.stamps import Stamps, stamps

Run = Callable[[StateOf], Pass]
"""Runs the program of the step with the given states in place."""


class Start(NamedTuple):
    """What is known of the pass at x_l = mu_l.

    Attributes:
        loss: what the user's code returned, a scalar.
        free: x_l of every layer, in at least float32.
        rounding: relative, of the arithmetic that the layers computed in.
        seen: the pass; None where it is made when it is asked for.
    """

    loss: Tensor
    free: list[Tensor]
    rounding: float
    seen: Pass | None

    @classmethod
    def of(cls, seen: Pass) -> "Start":
        """What a pass shows."""
        return cls(seen.loss.detach(), [state.detach() for state in seen.states], seen.rounding, seen)


class Network:
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
        self.batch_size = batch_size
        self.names: Sequence[str] = [str(key) for key in plan.states]
        depths, self._above = plan.depths()
        self.depths: Sequence[int] = depths
        self.outputs = plan.loss_parents
        self.energy = energy
        self._plan = plan
        self._run = run
        self.loss_scale = loss_scale
        self.first_loss = start.loss
        self.free: Sequence[Tensor] = start.free
        self._layouts = [layout_of(state.shape, batch_size) for state in start.free]
        self.rounding = start.rounding
        self._forward: Pass | None = start.seen
        self._latest: tuple[Stamps, Pass] | None = None
        self._moved = False
        self._differentiated_again = True
        """Whether a pass is, after its forces: its graph is kept until then."""
        self._known_analytic = False
        if start.seen is not None:
            self._let_go(start.seen)
        energy.check_layers({key.name for key in plan.states})

    @property
    def _first(self) -> Pass:
        """The pass at the predictions; made again where it was let go of."""
        if self._forward is None:
            self._forward = self._run(at_prediction())
            self._let_go(self._forward)
        return self._forward

    # The point of view of a relaxer

    @cached_property
    def no_errors(self) -> Sequence[Tensor]:
        """See `Landscape.no_errors`."""
        return [state.new_zeros(()).expand(state.shape) for state in self.free]

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        with torch.enable_grad():
            seen = self.at_states(states)
            if is_quadratic(self.energy) and not isinstance(strength, complex):
                return self._quadratic_forces(seen, strength)
            internal, loss = self.internal(seen), self.loss(seen)
            gradients = self._slopes(seen, internal, loss, strength, range(len(self.free)))
        if is_bounded(self.energy):
            found = zip(gradients, states, self.views(seen), strict=True)
            gradients = [self.energy.tangent(gradient, state, view) for gradient, state, view in found]
        return Forces(internal.detach(), loss.detach(), gradients)

    def _quadratic_forces(self, seen: Pass, strength: float) -> Forces:
        """dE/dx_l = Pi_l e_l - sum_k (d mu_k / dx_l)' Pi_k e_k + strength * dL/dx_l, and nothing more."""
        unit = strength or 1.0  # as in _slopes
        leaves = seen.states
        with torch.no_grad():
            errors = [call.state - call.prediction for call in seen.layers]
            pulls = [e if is_one(p) else p * e for e, p in zip(errors, self._precisions(seen), strict=True)]
        tops = [
            (call.prediction, -pull / unit if unit != 1 else -pull)
            for call, pull in zip(seen.layers, pulls, strict=True)
        ]
        if strength:
            tops.append((seen.loss, self.loss_scale * ones_for(seen.loss)))
        live = [(top, seed) for top, seed in tops if top.requires_grad]
        slopes: Sequence[Tensor | None] = [None] * len(leaves)
        seeds: tuple[Tensor, ...] = ()
        if live:
            outputs, seeds = zip(*live, strict=True)
            kept = self._differentiated_again or seen is self._forward
            slopes = torch.autograd.grad(outputs, leaves, seeds, retain_graph=kept, allow_unused=True)
        with torch.no_grad():
            internal = 0.5 * self.products(pulls, errors, range(len(errors)))
            del tops, live, seeds, errors  # as large as the states, each
            gradients = list(slopes)
            del slopes
            for k, (pull, s) in enumerate(zip(pulls, gradients, strict=True)):
                pulls[k] = pull if s is None else pull + s if unit == 1 else torch.add(pull, s, alpha=unit)
                gradients[k] = None
                del pull, s
        return Forces(internal, self.loss(seen).detach(), pulls)

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        seen, answers = self._answered(states, strength, range(len(self.free)))
        with torch.no_grad():
            gradients = [x - answer for x, answer in zip(states, answers, strict=True)]
            return Forces(self.internal(seen), self.loss(seen), gradients)

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        return self._answered(states, strength, layers)[1]

    def _answered(
        self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]
    ) -> tuple[Pass, list[Tensor]]:
        with torch.enable_grad():
            seen = self.at_states(states)
            slopes = self._slopes(seen, self.internal(seen, own=False), self.loss(seen), strength, layers)
        views = self.views(seen)
        return seen, [
            best_response(self.energy, -slope, views[k]).detach() for k, slope in zip(layers, slopes, strict=True)
        ]

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """See `Landscape.energy_of`."""
        seen = self.at_states(states)
        with torch.no_grad():
            return total_energy(Forces(self.internal(seen), self.loss(seen), []), strength)

    def hops(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.hops`."""
        seen = self._first
        with torch.enable_grad():
            precisions = self._precisions(seen)
            loss = self.loss(seen)
            terms = zip(precisions, errors, seen.layers, strict=True)
            sent = [-(p * e * call.prediction).sum() for p, e, call in terms]
            slopes = self._slopes(seen, torch.stack(sent), loss, strength, range(len(errors)))
        internal = self.per_sample([0.5 * p * e.square() for p, e in zip(precisions, errors, strict=True)])
        gradients = [e + s / p for e, s, p in zip(errors, slopes, precisions, strict=True)]
        return Forces(internal, loss.detach(), gradients)

    def dyads(self, mean: Sequence[Tensor], strength: float) -> tuple[list[Tensor], list[Tensor], Forces]:
        """See `Landscape.dyads`."""
        with torch.enable_grad():
            seen = self.at_states(mean)
        ahead, behind = self._halves(seen, strength)
        gradients = [m - 0.5 * (p + q) for m, p, q in zip(mean, ahead, behind, strict=True)]
        return ahead, behind, Forces(self.internal(seen).detach(), self.loss(seen).detach(), gradients)

    def _halves(self, seen: Pass, strength: float | Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Both ends of each pair, drives and Jacobians taken from a pass at their means."""
        views, ahead, behind = self.views(seen), list(self.free), list(self.free)

        def answer(k: int, slope: Tensor) -> Tensor:
            ahead[k] = best_response(self.energy, -0.5 * slope, views[k]).detach()
            behind[k] = best_response(self.energy, 0.5 * slope, views[k]).detach()
            ends = (self.energy.layer_energy(x, views[k]).sum() for x in (ahead[k], behind[k]))
            return next(ends) - next(ends)

        with torch.enable_grad():
            self._signals(seen, strength * self.loss(seen), answer)
        return ahead, behind

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`."""
        if not is_bounded(self.energy):
            return states
        found = zip(states, self.views(self._first), strict=True)
        return [self.energy.feasible(state, view) for state, view in found]

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        with torch.enable_grad():
            seen = self._at_errors(errors)
            loss = self.loss(seen)
            if loss.is_complex() and not self._known_analytic:
                self._check_analytic(seen)
            signals = self._signals(seen, loss)
        precisions = self._precisions(seen)
        at_rest = _same(errors, self.no_errors)
        for k, (e, p) in enumerate(zip(errors, precisions, strict=True)):  # one layer at a time: nothing is held twice
            if isinstance(strength, complex) or strength != 1:
                signals[k] = strength * holomorphic(signals[k])
            pull = signals[k] if is_one(p) else signals[k] / p
            signals[k] = pull if at_rest else e + pull
        if at_rest:
            return Forces(self.free[0].new_zeros(self.batch_size), loss.detach(), signals)
        internal = self.per_sample(0.5 * p * e.square() for p, e in zip(precisions, errors, strict=True))
        return Forces(internal, loss.detach(), signals)

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        rows = list(map(by_sample, tensors, self._layouts, itertools.repeat(self.batch_size)))  # one tensor at a time
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def metric(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """See `Landscape.metric`."""
        precisions = self._precisions(self._first)
        return self.per_sample([p * a * b for p, a, b in zip(precisions, left, right, strict=True)])

    def norms(self, tensors: Iterable[Tensor], layers: Sequence[int] | None = None) -> Tensor:
        """See `Landscape.norms`. Reads each tensor once where its samples lie in rows, and makes none of its size.

        Args:
            tensors: one for each of the layers.
            layers: which; None is all.
        """
        layouts = self._layouts if layers is None else [self._layouts[k] for k in layers]
        rows = [norm_by_sample(t, layout, self.batch_size) for t, layout in zip(tensors, layouts, strict=True)]
        if len(rows) == 1:
            return rows[0]
        return torch.linalg.vector_norm(torch.stack(rows), dim=0)  # type: ignore[no-any-return]

    def squares(self, tensors: Sequence[Tensor], layers: Sequence[int] | None = None) -> Tensor:
        """`per_sample` of |t|^2: ``(B,)``.

        Args:
            tensors: one a layer.
            layers: those that count, all others being 0; None is all.
        """
        layers = range(len(tensors)) if layers is None else layers
        rows = [squares_by_sample(tensors[k], self._layouts[k], self.batch_size) for k in layers]
        if not rows:
            kind = self.free[0]  # not made of it: a record would have to hold that
            return torch.zeros(self.batch_size, dtype=kind.dtype, device=kind.device)
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """See `Landscape.products`."""
        rows = [
            by_sample((a.conj() * b).real if a.is_complex() else a * b, self._layouts[k], self.batch_size)
            for k, a, b in zip(layers, left, right, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.spread`."""
        return [to_samples(values, t, layout) for t, layout in zip(like, self._layouts, strict=True)]

    # The point of view of an update

    def energy_at(self, found: Relaxation, strength: complex) -> Tensor:
        """A scalar whose gradient is dE/dtheta at the end of a phase, every state held fixed.

        In error coordinates it is that of <-Pi e, mu(theta)> + strength * L, which is the same, and x - mu is never
        formed. For dyads it is that of E with their leading states less E with their trailing ones, all drives coming
        from `point`.
        """
        return self._energy_of(self._pass_of(found), found, strength)

    def contrast(self, phases: Sequence[tuple[complex, complex, Relaxation]]) -> Tensor:
        """A scalar whose gradient is that of Re sum_p weight_p E(x_p, theta), see `energy_at`.

        Args:
            phases: strength, weight and end of each.
        """
        if len(phases) > 1 and all(self._is_at_forward_pass(found) for _, _, found in phases):
            shared = [  # the graph of the forward pass is there once
                (output, weight.real * seed)
                for strength, weight, found in phases
                for output, seed in self._terms_of(self._first, found, strength)
            ]
            return slopes_of(shared, self._first.states)
        terms = [(weight, self.energy_at(found, strength)) for strength, weight, found in phases]
        weighted = [term if is_one(weight) else weight * term for weight, term in terms]
        reals = [term.real if term.is_complex() else term for term in weighted]
        return reals[0] if len(reals) == 1 else torch.stack(reals).sum()

    def held(self, found: Relaxation) -> Relaxation:
        """The same end of a phase, written in states that stay what they are when parameters move."""
        if found.coordinates == "states":
            return found
        states = [state.detach() for state in self._at_errors(found.point).states]
        return dataclasses.replace(found, point=states, coordinates="states")

    def energy_with(self, held: Relaxation, strength: complex) -> Tensor:
        """`energy_at` for the parameters of now: a fresh pass, with the states of before."""
        self._latest = None
        seen = self._run(at_states(dict(zip(self._plan.states, held.point, strict=True))))
        return self._energy_of(seen, held, strength)

    def errors_at(self, found: Relaxation) -> list[Tensor]:
        """x_l - mu_l at the end of a phase, one tensor a layer."""
        errors = found.displacement if found.displacement is not None else found.point
        if found.displacement is not None or found.coordinates == "errors":
            return [error.detach() for error in errors]
        layers = self.at_states(found.point).layers
        return [(x - call.prediction).detach() for x, call in zip(found.point, layers, strict=True)]

    def _is_at_forward_pass(self, found: Relaxation) -> bool:
        """Whether something else than its point's own errors is read, against the predictions of the forward pass."""
        return found.displacement is not None and _same(found.point, self.no_errors)

    def _pass_of(self, found: Relaxation) -> Pass:
        return self._at_errors(found.point) if found.coordinates == "errors" else self.at_states(found.point)

    def _energy_of(self, seen: Pass, found: Relaxation, strength: complex) -> Tensor:
        return slopes_of(self._terms_of(seen, found, strength), seen.states)

    def _terms_of(self, seen: Pass, found: Relaxation, strength: complex) -> list[Seed]:
        """What is differentiated for the update, and the weight of each of its elements."""
        errors = found.displacement
        if errors is None and found.coordinates == "errors":
            errors = found.point
        if errors is None and found.dyad is None and is_quadratic(self.energy):
            errors = [(call.state - call.prediction).detach() for call in seen.layers]
        with torch.enable_grad():
            if found.dyad is not None:
                ahead, behind = found.dyad
                internal = self.internal(seen, at=ahead) - self.internal(seen, at=behind)
                terms = [(internal, ones_for(internal))]
            elif errors is None:
                internal = self.internal(seen)
                terms = [(internal, ones_for(internal))]
            else:
                parts = zip(self._precisions(seen), errors, seen.layers, strict=True)
                terms = [(call.prediction, -e if is_one(p) else -p * e) for p, e, call in parts]
            if strength:
                terms.append((seen.loss, strength * self.loss_scale * ones_for(seen.loss)))
            return terms

    def loss(self, seen: Pass) -> Tensor:
        """L summed over the batch."""
        loss: Tensor = self.loss_scale * seen.loss
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
        terms = []
        for view, state, layout in zip(self.views(seen), states, self._layouts, strict=True):
            energy = self.energy.layer_energy(state if own else state.detach(), view)
            same_shape = energy.shape == state.shape
            terms.append(by_sample(energy, layout if same_shape else 0, self.batch_size))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def views(self, seen: Pass) -> list[LayerView]:
        """What the energy may know of each layer."""
        return [call.view(above) for call, above in zip(seen.layers, self._above, strict=True)]

    def loss_slopes(self, states: Sequence[Tensor]) -> list[Tensor]:
        """dL/dx of what enters the loss directly, L per sample; 0 for the other layers."""
        with torch.enable_grad():
            seen = self.at_states(states)
            loss = self.loss(seen)
            return self._slopes(seen, torch.zeros_like(loss), loss, 1.0, range(len(states)))

    def _slopes(
        self, seen: Pass, internal: Tensor, loss: Tensor, strength: complex, layers: Sequence[int]
    ) -> list[Tensor]:
        """d(internal + strength * loss) / dx for the layers asked for."""
        # Slopes of E / lambda, multiplied afterwards: within half-precision networks 1e-4 would underflow.
        unit = strength or 1.0
        total = internal.sum() / unit + loss if strength else internal.sum()
        leaves = [seen.states[k] for k in layers]
        one = ones_for(total)
        if not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        kept = self._differentiated_again or seen is self._forward or total.is_complex()
        slopes = torch.autograd.grad(total, leaves, one, retain_graph=kept, allow_unused=True)
        if total.is_complex() and not self._known_analytic:
            self._check_analytic(seen)
        return [
            torch.zeros_like(leaf) if slope is None else unit * holomorphic(slope)
            for slope, leaf in zip(slopes, leaves, strict=True)
        ]

    def _check_analytic(self, seen: Pass) -> None:
        """Cauchy and Riemann: multiplied by i on one side, an analytic slope is multiplied by i on the other."""
        tops = [(call.key.name, call.prediction) for call in seen.layers] + [("the loss", self.loss(seen))]
        for name, top in tops:
            if not top.is_complex() or not top.requires_grad:
                continue
            weight = ones_for(top)
            slopes = [
                torch.autograd.grad(top, seen.states, factor * weight, retain_graph=True, allow_unused=True)
                for factor in (1, 1j)
            ]
            for plain, turned in zip(*slopes, strict=True):
                if plain is None or turned is None or not plain.numel():
                    continue
                room = 1e4 * max(self.rounding, torch.finfo(plain.dtype).eps) * float(plain.abs().max())
                if not math.isfinite(room):
                    return  # states ran away, of which the relaxer has more to say
                if not torch.allclose(turned, 1j * plain, rtol=0.0, atol=room):
                    raise UnsupportedModuleError(
                        f"What is computed between the states below and {name!r} is not an analytic function of them"
                        " (abs, a real part, a conjugate, a maximum): a holomorphic nudge would give a number that is"
                        " no gradient. Take ebm.Centered(...), or tanh, sigmoid and linear maps throughout."
                    )
        self._known_analytic = True

    # Passes

    def adopt(self, point: Sequence[Tensor], seen: Pass, run: Run) -> None:
        """Takes a pass at these states as its own, and further passes from the same program."""
        self._latest = (stamps(point), seen)
        self._run = run
        self.first_loss = seen.loss.detach()

    def parameters_moved(self) -> None:
        """Passes made so far belong to parameters that are no more."""
        self._latest = None
        self._moved = True

    def at_states(self, states: Sequence[Tensor]) -> Pass:
        if not self._moved and _same(states, self.free):
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
            if self._latest[0] == stamps(point):
                return self._latest[1]
            self._latest = None  # before the next one is made, so that two graphs are never held at once
        seen = self._run(state_of)
        self._let_go(seen)
        self._latest = (stamps(point), seen)
        return seen

    def _let_go(self, seen: Pass) -> None:
        """Of the drives of a pass, each as large as a state, where the energy does not read them."""
        if not reads_drive(self.energy):
            for call in seen.layers:
                call.drive = call.prediction

    def _precisions(self, seen: Pass) -> list[float | Tensor]:
        assert isinstance(self.energy, QuadraticEnergy)
        return [precision_of(self.energy, view) for view in self.views(seen)]

    def _signals(self, seen: Pass, top: Tensor, answer: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
        """d top / d x_l through every layer above, x = mu + e: top down, one layer's own Jacobian at a time.

        `answer` gives what layer k sends on, to be differentiated, once that slope has reached it; None: the slope.
        """
        leaves = seen.states
        signals: list[Tensor | None] = [None] * len(leaves)

        def send(output: Tensor, weight: Tensor | None, parents: tuple[int, ...]) -> None:
            if not parents:
                return
            into = [leaves[p] for p in parents]
            if weight is None:  # not "like" the output, whose value nobody may need
                weight = torch.ones(output.shape, dtype=output.dtype, device=output.device)
            parts = torch.autograd.grad(output, into, weight, retain_graph=True, allow_unused=True)
            for p, part in zip(parents, parts, strict=True):
                before = signals[p]
                signals[p] = part if before is None else before if part is None else before + part

        send(top, None, self._plan.loss_parents)
        for k in range(len(leaves) - 1, -1, -1):
            if (signal := signals[k]) is not None:
                call = seen.layers[k]
                parents = self._plan.rows[k].parents
                if answer is None:
                    send(call.prediction, signal, parents)
                else:
                    send(answer(k, signal), None, parents)
        return [torch.zeros_like(x) if s is None else s for s, x in zip(signals, leaves, strict=True)]


def ones_for(tensor: Tensor) -> Tensor:
    """Ones of its kind, made without its value, which code then need not compute."""
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def holomorphic(slope: Tensor) -> Tensor:
    """autograd gives the conjugate of a holomorphic function's derivative."""
    return slope.conj() if slope.is_complex() else slope


def is_one(factor: complex | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
