"""The network of a step whose evaluations run as traced code; what there is no code for, the plain one does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ebm.delivery import Delivered
from lightning_ebm.energies.base import Energy, is_bounded
from lightning_ebm.network import Network, Run, Start
from lightning_ebm.program.code import Code, Key, TracedProgram
from lightning_ebm.program.interpreter import Pass, Program
from lightning_ebm.program.record import Value
from lightning_ebm.program.wiring import Plan
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.fixed_steps import moved
from lightning_ebm.relaxers.forces import total_energy

log = logging.getLogger(__name__)

_MOST = 100
"""Pieces of code kept for one program."""

Coordinates = Literal["states", "errors"]
Evaluate = Callable[[Network, list[Tensor], list[Tensor]], list[Tensor]]
"""From a plain network, a point, and the tensors that autograd would give a gradient."""


class FastNetwork(Network):
    """`Network` by traced code.

    Args:
        program: of the step.
        binding: the values of this program that those of the one the code was traced from correspond to; None is
            themselves.
        traced: the code so far.
        compile: send code through Inductor.
        arithmetic: how programs are run, complex or not.
        held: what values of this program held in the user's pass, as far as that is still there.
    """

    def __init__(
        self,
        energy: Energy,
        plan: Plan,
        start: Start,
        run: Run,
        batch_size: int,
        loss_scale: float,
        *,
        program: Program,
        binding: "dict[Value, Value] | None",
        traced: TracedProgram,
        compile: bool,
        arithmetic: Callable[[], Any],
        held: Mapping[Value, Tensor],
    ) -> None:
        super().__init__(energy, plan, start, run, batch_size, loss_scale)
        self._program = program
        self._traced = traced
        self._compile = compile
        self._arithmetic = arithmetic
        self._settings = settings_of(energy)
        self._held: Callable[[Value], Tensor | None] = lambda value: None
        self.way = "plain"
        """Which way evaluations have run."""
        self.returns = True
        """Whether states may come back to the forward pass: False where the last phase begins there."""
        self.rebind(program, binding, held)

    def rebind(self, program: Program, binding: dict[Value, Value] | None, held: Mapping[Value, Tensor]) -> None:
        """Goes on with what another pass of the same program holds.

        What follows from states stays that of the first pass, which was at the predictions.
        """
        before, moving = self._held, self._traced.moving

        def held_now(value: Value) -> Tensor | None:
            if value in moving and (found := before(value)) is not None:
                return found
            return held.get(value if binding is None else binding[value])

        values = self._traced.values if binding is None else [binding[value] for value in self._traced.values]
        self._held = held_now
        self._leaves = [program.record.leaves.get(value) for value in values]
        self._given = [program.content(value) for value in values]
        self._before: dict[Key, list[Tensor]] = {}

    def _has_left(self, point: Sequence[Tensor]) -> None:
        """Lets go of the states of the forward pass once a relaxation is elsewhere, if nobody comes back to them."""
        if not self.returns and all(point[0] is not start[0] for start in (self.free, self.no_errors)):
            self.returns = True
            self.departs()

    def departs(self) -> None:
        """Lets go of the states of the forward pass, which is run again for whoever should ask."""
        results = {value for node in self._traced.program.order for value in node.results if value is not None}
        fixed = results - self._traced.moving
        held = {value: tensor for value in fixed if (tensor := self._held(value)) is not None}
        self.free = [zero.view_as(zero) for zero in self.no_errors]  # their kind is still asked for
        self._held = held.get
        self._before.clear()
        self._forward = None

    def run_again(
        self, program: Program, binding: dict[Value, Value] | None, held: Mapping[Value, Tensor], run: Run
    ) -> None:
        """Takes another pass of the same program, which was at other states, as its own."""
        self._latest, self._run = None, run
        self.rebind(program, binding, held)

    def parameters_moved(self) -> None:
        """See `Network.parameters_moved`: what the pass held belongs to parameters that are no more."""
        super().parameters_moved()
        self._before.clear()
        self._held = lambda value: None

    # What code is traced from

    def _twin(self, given: Sequence[Tensor]) -> Network:
        """The plain network, as a function of what the batch fixed."""
        values = dict(zip(self._traced.values, given, strict=True))
        program = self._traced.program

        def run(state_of: Any) -> Pass:
            with torch.enable_grad(), self._arithmetic():
                return program.run(state_of, values)

        start = Start(self.first_loss, list(self.free), self.rounding, None)
        twin = _Twin(self.energy, self._plan, start, run, self.batch_size, self.loss_scale)
        twin._known_analytic = twin._moved = True  # where it is asked about, it is asked as of any point
        return twin

    def _run_code(
        self, kind: Key, evaluate: Evaluate, point: Sequence[Tensor], takes: bool = False
    ) -> list[Tensor] | None:
        """The outputs of an evaluation; None where there is no code for it.

        Args:
            kind: which.
            evaluate: what to trace, if there is none yet.
            point: where.
            takes: whether the point is a list to be emptied, so that its tensors can go when they have been read.
        """
        key = self._key(kind, point)
        code = self._code(key, kind, evaluate, point, takes)
        if code is None:
            return None
        self.way = "compiled" if self._compile else "traced"
        before = self._before.get(key)
        if before is None:
            before = code.before(self._given, self._held)
            if point:  # else it is all there is, and as large as the states
                self._before[key] = before
        inputs = [*point, *before]
        del before
        if takes:
            point.clear()  # type: ignore[attr-defined]
        return code.at(inputs)

    def _key(self, kind: Key, point: Sequence[Tensor]) -> Key:
        """All that code depends on besides the program."""
        fixed = self._settings, self.batch_size, self.loss_scale
        return (*kind, *fixed, *((x.shape, x.stride(), x.dtype) for x in point))

    def _code(
        self, key: Key, kind: Key, evaluate: Evaluate, point: Sequence[Tensor], takes: bool = False
    ) -> Code | None:
        if self._settings is None:
            return None
        codes = self._traced.codes
        if key not in codes:
            if len(codes) >= _MOST:  # a nudge or a setting that is another one at every step
                return None
            codes[key] = self._trace(kind, evaluate, point, takes)
        code = codes[key]
        if isinstance(code, str) or (self._moved and code.recalled):
            return None
        if key not in self._before and any(self._held(value) is None for value in code.recalled):
            return None  # somebody has written over what the user's pass had computed
        return code

    def _trace(self, kind: Key, evaluate: Evaluate, point: Sequence[Tensor], takes: bool) -> "Code | str":
        if self._traced.refused is not None:
            return self._traced.refused

        def function(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
            leaves = [
                x.detach().requires_grad_() if leaf is not None and kind[0] == "update" else x
                for x, leaf in zip(given, self._leaves, strict=True)
            ]
            wanted = [x for x, leaf in zip(leaves, self._leaves, strict=True) if leaf is not None]
            return evaluate(self._twin(leaves), point, wanted)

        try:
            return Code(function, point, self._given, self._traced.known, self._held, self._compile, takes)
        except Exception as error:  # whatever goes wrong in tracing: the plain way stays right
            log.debug("%s runs the plain way: %r", kind, error, exc_info=True)
            return repr(error)

    # The point of view of a relaxer

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        return self._forces("forces", states, strength)

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        return self._forces("error_forces", errors, strength)

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        return self._forces("responses", states, strength)

    def hops(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.hops`."""
        return self._forces("hops", errors, strength)

    def _forces(self, kind: str, point: Sequence[Tensor], strength: complex) -> Forces:
        at_rest = kind == "error_forces" and point[0] is self.no_errors[0]
        self._has_left(point)

        def evaluate(twin: Network, point: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            found: Forces = getattr(twin, kind)(twin.no_errors if at_rest else point, strength)
            return [found.internal, found.loss, *found.gradients]

        found = self._run_code((kind, strength, at_rest), evaluate, [] if at_rest else point)
        if found is None:
            plain: Forces = getattr(super(), kind)(point, strength)
            return plain
        internal, loss, *gradients = found
        return Forces(internal, loss, gradients)

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        found = self._run_code(
            ("answers", strength, tuple(layers)),
            lambda twin, point, leaves: twin.answers(point, strength, layers),
            states,
        )
        return super().answers(states, strength, layers) if found is None else found

    def dyads(self, mean: Sequence[Tensor], strength: float) -> tuple[list[Tensor], list[Tensor], Forces]:
        """See `Landscape.dyads`."""

        def evaluate(twin: Network, point: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            ahead, behind, forces = twin.dyads(point, strength)
            return [forces.internal, forces.loss, *forces.gradients, *ahead, *behind]

        self._has_left(mean)
        found = self._run_code(("dyads", strength), evaluate, mean)
        if found is None:
            return super().dyads(mean, strength)
        internal, loss, *rest = found
        gradients, ahead, behind = (rest[k : k + len(mean)] for k in range(0, len(rest), len(mean)))
        return ahead, behind, Forces(internal, loss, gradients)

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`."""
        if not is_bounded(self.energy):
            return states
        found = self._run_code(("feasible",), lambda twin, point, leaves: twin.feasible(point), states)
        return super().feasible(states) if found is None else found

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """See `Landscape.energy_of`."""
        found = self._run_code(
            ("energy", strength), lambda twin, point, leaves: [twin.energy_of(point, strength)], states
        )
        return super().energy_of(states, strength) if found is None else found[0]

    def descended(
        self, point: list[Tensor], strength: complex, lr: float, coordinates: Coordinates, norms: bool = False
    ) -> tuple[Tensor, Tensor | None] | None:
        """Moves a point on to x - lr dE/dx; the energy of the batch at x; None, and nothing moved, without code for it.

        Args:
            point: holds the next point afterwards.
            strength: lambda.
            lr: step size.
            coordinates: what the point is written in.
            norms: give |dE/dx| at x of each sample, ``(B,)``, besides.
        """
        if is_bounded(self.energy):
            return None
        self._has_left(point)
        at_rest = coordinates == "errors" and point[0] is self.no_errors[0]

        def evaluate(twin: Network, here: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            here = list(twin.no_errors) if at_rest else here
            found = twin.forces(here, strength) if coordinates == "states" else twin.error_forces(here, strength)
            measured = [twin.norms(found.gradients)] if norms else []
            return [total_energy(found, strength), *measured, *moved(here, found.gradients, lr)]

        key = "step", coordinates, strength, lr, norms, at_rest
        found = self._run_code(key, evaluate, [] if at_rest else point, takes=True)
        if found is None:
            return None
        energy, *rest = found
        norm = rest.pop(0) if norms else None
        point[:] = rest
        return energy, norm

    def residual(
        self, point: Sequence[Tensor], strength: complex, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor] | None:
        """The energy of the batch, and |dE/dx| of each sample, where an update will be read; None without code."""

        def evaluate(twin: Network, here: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            found = twin.forces(here, strength) if coordinates == "states" else twin.error_forces(here, strength)
            return [total_energy(found, strength), twin.norms(found.gradients)]

        found = self._run_code(("residual", coordinates, strength), evaluate, point)
        return None if found is None else (found[0], found[1])

    # The point of view of an update

    def energy_at(self, found: Relaxation, strength: complex) -> Tensor:
        """See `Network.energy_at`."""
        update = self._update([(strength, 1.0, found)])
        return super().energy_at(found, strength) if update is None else update

    def contrast(self, phases: Sequence[tuple[complex, complex, Relaxation]]) -> Tensor:
        """See `Network.contrast`."""
        update = self._update(phases)
        return super().contrast(phases) if update is None else update

    def _update(self, phases: Sequence[tuple[complex, complex, Relaxation]]) -> Tensor | None:
        """The same by code: a number whose gradients are computed when they are asked for; None without code."""
        point: list[Tensor] = []
        shapes = []
        for strength, weight, found in phases:
            kind, tensors = self._kind_of(found)
            shapes.append((strength, weight, found.coordinates, kind))
            point += tensors

        def evaluate(twin: Network, inputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            *rest, scale = inputs
            terms = [
                (strength, weight, _rebuilt(twin, found, kind, rest))
                for (strength, weight, _, kind), (_, _, found) in zip(shapes, phases, strict=True)
            ]
            total = twin.contrast(terms) * scale
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
            return [torch.zeros_like(leaf) if s is None else s for s, leaf in zip(slopes, leaves, strict=True)]

        def update(scale: Tensor) -> tuple[Tensor, ...]:
            slopes = self._run_code(key, evaluate, [*point, scale])
            assert slopes is not None
            return tuple(slopes)

        key = ("update", *shapes)
        one = self.first_loss.new_ones(()).real
        if self._code(self._key(key, [*point, one]), key, evaluate, [*point, one]) is None:
            return None
        targets = [leaf for leaf in self._leaves if leaf is not None]
        return Delivered.apply(one.new_zeros(()), update, *targets)  # type: ignore[no-any-return, no-untyped-call]

    def _kind_of(self, found: Relaxation) -> tuple[str, list[Tensor]]:
        """Which of its tensors the end of a phase is read from."""
        if found.dyad is not None:
            return "dyad", [*found.point, *found.dyad[0], *found.dyad[1]]
        here = "rest" if found.point and found.point[0] is self.no_errors[0] else "point"
        tensors = [] if here == "rest" else list(found.point)
        if found.displacement is not None:
            return f"{here} displaced", [*tensors, *found.displacement]
        return here, tensors


class _Twin(Network):
    """A network that is traced: what it says of the forward pass comes of that pass, made once somebody asks."""

    @property
    def free(self) -> Sequence[Tensor]:
        """x_l at the forward pass."""
        return self._free

    @free.setter
    def free(self, states: Sequence[Tensor]) -> None:
        self._kinds = [(state.shape, state.dtype, state.device) for state in states]

    @cached_property
    def _free(self) -> list[Tensor]:
        return [state.detach() for state in self._first.states]

    @cached_property
    def no_errors(self) -> Sequence[Tensor]:
        """See `Landscape.no_errors`."""
        return [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in self._kinds]


def _rebuilt(twin: Network, found: Relaxation, kind: str, tensors: list[Tensor]) -> Relaxation:
    """The end of a phase in a traced evaluation; takes its tensors off the list."""
    count = len(twin.free)

    def taken() -> list[Tensor]:
        front = tensors[:count]
        del tensors[:count]
        return front

    point = list(twin.no_errors) if kind.startswith("rest") else taken()
    displacement = taken() if kind.endswith("displaced") else None
    dyad = (taken(), taken()) if kind == "dyad" else None
    return Relaxation(point, found.coordinates, "fixed", 0, found.residual, displacement=displacement, dyad=dyad)


def settings_of(energy: Energy) -> Key | None:
    """What an energy computes with, to tell code of other settings apart; None if that cannot be told."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version
        if isinstance(value, Mapping):
            return tuple((name, of(held)) for name, held in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(of, value))
        if value is None or isinstance(value, int | float | complex | str):
            return value
        raise TypeError

    try:
        return (type(energy), *((name, of(value)) for name, value in vars(energy).items()))
    except TypeError:
        return None
