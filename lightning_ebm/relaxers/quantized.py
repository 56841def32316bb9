"""States and forces of a few bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.device import Change, Device, refuse_errors
from lightning_ebm.relaxers.wrapper import Wrapper


class Quantized(Wrapper):
    """Another relaxer, on a device whose states and forces have a number of bits.

    A number of b bits is k d, k = -n .. n with n = 2^(b-1) - 1 and d = range / n: 0 is among them, and what lies beyond
    the range is at its end. States are put there after every step, and where a phase ends.

    The trap: rounded to the nearest, a state moves no more once lr times its force is below d / 2, so that a few bits
    end far from the equilibrium however many steps are taken; "stochastic", up or down with the probabilities that keep
    the mean, does not have that, and has noise instead.

    Args:
        relaxer: moves the states.
        states: bits of the states; None leaves them exact.
        forces: bits of the forces; None leaves them exact.
        states_range: the largest state.
        forces_range: the largest force.
        rounding: "nearest" or "stochastic".

    Raises:
        ConfigurationError: fewer than 2 bits, a range that is not positive; `states` around a relaxer of errors.
    """

    def __init__(
        self,
        relaxer: Relaxer,
        states: int | None = None,
        forces: int | None = None,
        states_range: float = 1.0,
        forces_range: float = 1.0,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None:
        super().__init__(relaxer)
        self.states = None if states is None else checked.count(self, "states", states, least=2, most=52)
        self.forces = None if forces is None else checked.count(self, "forces", forces, least=2, most=52)
        wanted = "a positive number, the largest that the device holds"
        self.states_range = checked.number(self, "states_range", states_range, wanted, above=0)
        self.forces_range = checked.number(self, "forces_range", forces_range, wanted, above=0)
        self.rounding = checked.choice(self, "rounding", rounding, ("nearest", "stochastic"))
        if states is not None:
            refuse_errors(self, relaxer)

    def __repr__(self) -> str:
        settings = f"states={self.states}, forces={self.forces}, states_range={self.states_range}"
        more = f"forces_range={self.forces_range}, rounding={self.rounding!r}"
        return f"Quantized({self.relaxer!r}, {settings}, {more})"

    def in_front(self, landscape: Landscape) -> Landscape:
        states = self._grid(self.states, self.states_range)
        forces = self._grid(self.forces, self.forces_range)
        return landscape if states is None and forces is None else Device(landscape, states, forces)

    stepper = Wrapper.stepper  # single steps are taken on the network that `around` gives

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: Any) -> Relaxation:
        states = self._grid(self.states, self.states_range)
        if states is None:
            return super().relax(landscape, start, strength)
        found = super().relax(landscape, [states(x) for x in start], strength)
        return dataclasses.replace(found, point=[states(x) for x in found.point])

    def _grid(self, bits: int | None, most: float) -> Change | None:
        if bits is None:
            return None
        levels = 2 ** (bits - 1) - 1
        step = most / levels

        def rounded(x: Tensor) -> Tensor:
            if x.is_complex():
                return torch.complex(rounded(x.real), rounded(x.imag))
            at = x / step
            at = at.round() if self.rounding == "nearest" else (at + torch.rand_like(at)).floor()
            found: Tensor = at.clamp(-levels, levels) * step
            return found

        return rounded
