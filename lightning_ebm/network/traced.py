"""The network of a step whose evaluations run as traced code; what there is no code for, the plain one does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_bounded
from lightning_ebm.evaluations import Evaluation
from lightning_ebm.evaluations.base import Result
from lightning_ebm.network.network import Network
from lightning_ebm.network.passes import Run, Start
from lightning_ebm.network.precomputed_gradient import with_precomputed_gradient
from lightning_ebm.network.settings import is_own, settings_of
from lightning_ebm.network.twin import ARRIVING, Twin, rebuilt
from lightning_ebm.program.code import Code, Key, TracedProgram, all_kept
from lightning_ebm.program.elsewhere import elsewhere
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.record import Value
from lightning_ebm.program.wiring import Plan
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.relaxers.sweep import arriving
from lightning_ebm.updates.base import End, Update

log = logging.getLogger(__name__)

_MOST = 100
"""Pieces of code kept for one program."""

Evaluate = Callable[[Network, list[Tensor], list[Tensor]], list[Tensor]]
"""From a plain network, a point, and the tensors that autograd would give a gradient."""


class TracedNetwork(Network):
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
        self.runs_as = "plain"
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

        self._held = held_now
        self._before: dict[Key, list[Tensor]] = {}
        self.read_again(program, binding)

    def read_again(self, program: Program, binding: dict[Value, Value] | None) -> None:
        """See `Passes.read_again`. What has been computed of them is what it was."""
        values = self._traced.values if binding is None else [binding[value] for value in self._traced.values]
        self._leaves = [program.record.leaves.get(value) for value in values]
        self._given = [program.content(value) for value in values]

    def rest_at(self, states: Sequence[Tensor]) -> None:
        """See `Passes.rest_at`."""
        super().rest_at(states)
        self.departs()

    def departs(self) -> None:
        """Nobody comes back to the forward pass: lets go of its states, each as large as a point."""
        results = {value for node in self._traced.program.order for value in node.results if value is not None}
        fixed = results - self._traced.moving
        held = {value: tensor for value in fixed if (tensor := self._held(value)) is not None}
        self.free = [zero.view_as(zero) for zero in self.no_errors]  # their kind is still asked for
        self._held = held.get
        self._before.clear()
        self._forward = None

    def parameters_moved(self) -> None:
        """See `Network.parameters_moved`: what the pass held belongs to parameters that are no more."""
        super().parameters_moved()
        self._before.clear()
        self._held = lambda value: None

    # What code is traced from

    def _twin(self, given: Sequence[Tensor]) -> Network:
        """The plain network, as a function of what the batch fixed."""
        values = dict(zip(self._traced.values, given, strict=True))
        run = Run(self._traced.program, self._arithmetic, values)
        start = Start(self.first_loss, list(self.free), self.rounding, None)
        twin = Twin(self.energy, self._plan, start, run, self.batch_size, self.loss_scale)
        twin.is_relaxed = self._equilibrium is not None
        twin._moved = True
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
        self.runs_as = "compiled" if self._compile else "traced"
        before = self._before.get(key)
        if before is None:
            before = code.before(self._given, self._held)
            if point:  # else it is all there is, and as large as the states
                self._before[key] = before
        inputs = [*point, *before]
        del before
        if takes and isinstance(point, list):
            point.clear()
        try:
            return code.at(inputs)
        except (IndexError, RuntimeError, ValueError) as error:
            raise elsewhere(error, "in its code") from error

    def _key(self, kind: Key, point: Sequence[Tensor]) -> Key:
        """All that code depends on besides the program."""
        fixed = self._settings, self.batch_size, self.loss_scale
        return (*kind, *fixed, *((x.shape, x.stride(), x.dtype) for x in point))

    def _code(
        self, key: Key, kind: Key, evaluate: Evaluate, point: Sequence[Tensor], takes: bool = False
    ) -> Code | None:
        if self._settings is None or self.is_scaled:
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
            with all_kept():
                return Code(function, point, self._given, self._traced.known, self._held, self._compile, takes)
        except Exception as error:  # whatever goes wrong in tracing: the plain way stays right
            log.debug("%s runs the plain way: %r", kind, error, exc_info=True)
            return repr(error)

    # The point of view of a relaxer

    def evaluate(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        """See `Landscape.evaluate`. The formula of the question is traced as it stands."""
        if not self.returns and all(point[0] is not start[0] for start in (self.free, self.no_errors)):
            self.returns = True
            self.departs()
        at_rest = what.coordinates == "errors" and point[0] is self.no_errors[0]

        def evaluate(twin: Network, here: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            return what.flat(what.at(twin, twin.no_errors if at_rest else here, strength))

        takes = what.takes_point and isinstance(point, list)
        own = settings_of(what) if is_own(what) else (what,)
        kind = None if own is None else (*own, strength, at_rest)
        found = None if kind is None else self._run_code(kind, evaluate, [] if at_rest else point, takes)
        return super().evaluate(what, point, strength) if found is None else what.built(found, len(self.no_errors))

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`."""
        if not is_bounded(self.energy):
            return states
        found = self._run_code(("feasible",), lambda twin, point, leaves: twin.feasible(point), states)
        return super().feasible(states) if found is None else found

    def over_root_precision(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.over_root_precision`. By code no pass is run for precisions that do not depend on it."""
        found = self._run_code(
            ("over root precision",), lambda twin, point, leaves: twin.over_root_precision(point), tensors
        )
        return super().over_root_precision(tensors) if found is None else found

    # The point of view of an update

    def begin_last_phase(self) -> None:
        """See `Network.begin_last_phase`."""
        self.returns = False

    def update(self, rule: Update, ends: Sequence[End], scale: float | Tensor = 1.0) -> Tensor:
        """See `Network.update`. By code, it is a number whose gradients are computed when they are asked for."""
        shapes, point = [], []
        for end in ends:
            kind, tensors = self._kind_of(end.found)
            shapes.append((*end.phase, end.internal, end.found.coordinates, kind))
            point += tensors
        settings = settings_of(rule)
        key = ("update", settings, *shapes)

        def evaluate(twin: Network, inputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            *rest, factor = inputs
            held = [
                end._replace(found=rebuilt(twin, end.found, end.strength, shape[-1], rest))
                for end, shape in zip(ends, shapes, strict=True)
            ]
            total = twin.update(rule, held, factor)
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
            self._traced.taught[key] = [slope is not None for slope in slopes]
            return [slope for slope in slopes if slope is not None]

        def update(factor: Tensor) -> tuple[Tensor, ...]:
            slopes = self._run_code(key, evaluate, [*point, factor * scale])
            assert slopes is not None
            return tuple(slopes)

        one = self.first_loss.new_ones(()).real
        if settings is None or self._code(self._key(key, [*point, one]), key, evaluate, [*point, one]) is None:
            return super().update(rule, ends, scale)
        leaves = [leaf for leaf in self._leaves if leaf is not None]
        targets = [leaf for leaf, is_taught in zip(leaves, self._traced.taught[key], strict=True) if is_taught]
        return with_precomputed_gradient(one.new_zeros(()), update, targets)

    def _kind_of(self, found: Relaxation) -> tuple[str, list[Tensor]]:
        """Which of its tensors the end of a phase is read from."""
        if arriving(found, self) is not None:
            return ARRIVING, []
        if found.dyadic_states is not None:
            return "pairs", [*found.point, *found.dyadic_states[0], *found.dyadic_states[1]]
        here = "rest" if found.point and found.point[0] is self.no_errors[0] else "point"
        tensors = [] if here == "rest" else list(found.point)
        if found.local_error is not None:
            return f"{here} with errors", [*tensors, *found.local_error]
        return here, tensors
