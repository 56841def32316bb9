"""Passes of the recorded program with states in place, kept as long as somebody comes back to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ebm.network.geometry import Geometry
from lightning_ebm.network.tensor_version import Versions, versions
from lightning_ebm.program.interpreter import Pass, Program, StateOf, at_prediction, at_states
from lightning_ebm.program.products import Product
from lightning_ebm.program.record import StateKey, Value


@dataclass(frozen=True)
class Run:
    """Runs the program of a step with the given states in place.

    Attributes:
        program: which.
        arithmetic: what passes need beyond the user's code.
        given: what to take in place of what the batch fixed.
        feedback: what slopes go back through in place of the weights, see `Program.run`.
        crossed: see `Program.run`.
        offsets: what is taken off the prediction of each layer.
        pulls: forces on the states that the energy knows nothing of, one a layer.
    """

    program: Program
    arithmetic: Callable[[], AbstractContextManager[Any]]
    given: Mapping[Value, Tensor] = field(default_factory=dict)
    feedback: Sequence[Tensor] | None = None
    crossed: bool = False
    offsets: Sequence[Tensor] | None = None
    pulls: Sequence[Tensor] = ()

    def __call__(self, state_of: StateOf) -> Pass:
        with torch.enable_grad(), self.arithmetic():
            seen = self.program.run(state_of, self.given, self.feedback, self.crossed)
            for call, offset in zip(seen.layers, self.offsets or (), strict=self.offsets is not None):
                call.prediction = call.prediction - offset
        return seen

    def weights(self) -> list[Tensor]:
        """See `Program.weights`."""
        return self.program.weights(self.given)


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


class Passes(Geometry):
    """One program at any states: the pass at the predictions, and the one that was made last.

    Args:
        keys: the calls that carry states.
        start: what is known of the pass at x_l = mu_l.
        run: makes another.
        batch_size: B.
        keeps_drives: whether anybody reads the drives of a pass, each as large as a state.
    """

    def __init__(self, keys: Sequence[StateKey], start: Start, run: Run, batch_size: int, keeps_drives: bool) -> None:
        super().__init__(start.free, batch_size)
        self.keys = keys
        self._run = run
        self._keeps_drives = keeps_drives
        self.first_loss = start.loss
        self.free: Sequence[Tensor] = start.free
        self.rounding = start.rounding
        self._forward: Pass | None = start.seen
        self._latest: tuple[Versions, Pass] | None = None
        self._shown: list[Pass] | None = None
        self._equilibrium: Sequence[Tensor] | None = None
        self._moved = False
        if start.seen is not None:
            self._let_go(start.seen)

    @property
    def first(self) -> Pass:
        """The pass at the predictions; made again where it was let go of."""
        if self._forward is None:
            self._forward = self._run(at_prediction())
            self._let_go(self._forward)
        return self._forward

    @cached_property
    def no_errors(self) -> Sequence[Tensor]:
        """See `Landscape.no_errors`."""
        kinds = {(state.dtype, state.device) for state in self.free}
        zeros = {kind: torch.zeros((), dtype=kind[0], device=kind[1]) for kind in kinds}
        return [zeros[state.dtype, state.device].expand(state.shape) for state in self.free]

    @property
    def equilibrium(self) -> Sequence[Tensor]:
        """The free equilibrium: the forward pass, or what the free phase found."""
        return self.free if self._equilibrium is None else self._equilibrium

    def rest_at(self, states: Sequence[Tensor]) -> None:
        """Notes what the free phase found."""
        self._equilibrium = states

    def rebind(self, program: Program, binding: dict[Value, Value] | None, held: Mapping[Value, Tensor]) -> None:
        """Told what another pass of the same program holds, for whoever runs code."""

    def read_again(self, program: Program, binding: dict[Value, Value] | None) -> None:
        """Told that the record of the pass holds copies of what has been written to since, for whoever runs code."""

    def begin_last_phase(self) -> None:
        """Told that nobody asks for states of the forward pass once the next relaxation has left them."""

    def run_again(self, loss: Tensor, run: Run) -> None:
        """Takes further passes from another pass of the same program, which returned this loss."""
        self._latest, self._run, self.first_loss = None, run, loss

    def parameters_moved(self) -> None:
        """Passes made so far belong to parameters that are no more."""
        self._latest = None
        self._moved = True

    @property
    def weight_products(self) -> Sequence[Product]:
        """Where states meet weights."""
        return self._run.program.products

    def weights(self) -> list[Tensor]:
        """The weights that states are multiplied by, one a product, as the operations take them."""
        return self._run.weights()

    def with_states(self, state_of: StateOf) -> Pass:
        """The pass with any states in place, to which nobody comes back."""
        return self._run(state_of)

    def at_states(self, states: Sequence[Tensor]) -> Pass:
        """The pass with these states in place: what each layer computes from them, and the loss."""
        if not self._moved and _same(states, self.free):
            return self._show(self.first)
        return self._pass_at(states, at_states(dict(zip(self.keys, states, strict=True))))

    def at_errors(self, errors: Sequence[Tensor]) -> Pass:
        if _same(errors, self.no_errors):
            return self._show(self.first)
        by_key = dict(zip(self.keys, errors, strict=True))

        def displaced(key: StateKey, prediction: Tensor) -> Tensor | None:
            return (prediction.detach() + by_key[key]).requires_grad_() if key in by_key else None

        return self._pass_at(errors, displaced)

    def _pass_at(self, point: Sequence[Tensor], state_of: StateOf) -> Pass:
        """The pass at a point, kept until another is asked for: the update reads the one the last forces came from."""
        if self._latest is not None:
            if self._latest[0] == versions(point):
                return self._show(self._latest[1])
            self._latest = None  # before the next one is made, so that two graphs are never held at once
        seen = self._run(state_of)
        self._let_go(seen)
        self._latest = (versions(point), seen)
        return self._show(seen)

    def _show(self, seen: Pass) -> Pass:
        """Notes whose states an update is reading at, to leave these out of its gradient."""
        if self._shown is not None:
            self._shown.append(seen)
        return seen

    def _let_go(self, seen: Pass) -> None:
        """Of the drives of a pass, each as large as a state, where nobody reads them."""
        if not self._keeps_drives:
            for call in seen.layers:
                call.drive = call.prediction

    @contextmanager
    def showing(self) -> Iterator[list[Pass]]:
        """Gives the passes that are asked for within."""
        self._shown = []
        try:
            yield self._shown
        finally:
            self._shown = None


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
