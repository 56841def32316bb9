"""Noise of a device, on states, forces and nudges."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.device import Change, Device, refuse_errors
from lightning_ebm.relaxers.wrapper import Wrapper


class Noisy(Wrapper):
    """Another relaxer, on a device with noise: x + s_x xi after each step, g + s_g |g|_rms xi, lambda (1 + s_l xi).

    xi are independent standard normal numbers: one a unit and step for states and forces, one a phase for the nudge.
    The update is read at the states where the noise left them, with the lambda that was asked for.

    The trap: the noise of a state is read as an error of its layer, and divided by lambda. At lambda = 0.01 noise of
    0.01 is as large as the largest signal; averaging over steps, `Langevin`, or a larger nudge is what helps.

    Args:
        relaxer: moves the states.
        states: standard deviation, in units of the states.
        forces: standard deviation relative to the root mean square of the force on the layer.
        nudge: relative standard deviation of the strength.
        seed: of the noise, which goes on from one relaxation to the next; None takes torch's global generator.

    Raises:
        ConfigurationError: a deviation below 0; `states` around a relaxer that moves errors.
    """

    def __init__(
        self, relaxer: Relaxer, states: float = 0.0, forces: float = 0.0, nudge: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__(relaxer)
        wanted = "a standard deviation of at least 0"
        self.states = checked.number(self, "states", states, wanted, least=0)
        self.forces = checked.number(self, "forces", forces, wanted, least=0)
        self.nudge = checked.number(self, "nudge", nudge, wanted, least=0)
        self.seed = None if seed is None else checked.count(self, "seed", seed, least=0)
        self._generators: dict[str, torch.Generator] = {}
        if self.states:
            refuse_errors(self, relaxer)

    def __repr__(self) -> str:
        settings = f"states={self.states}, forces={self.forces}, nudge={self.nudge}"
        return f"Noisy({self.relaxer!r}, {settings}, seed={self.seed})"

    def in_front(self, landscape: Landscape) -> Landscape:
        states: Change | None = (lambda x: x + self.states * self._drawn(x)) if self.states else None
        forces: Change | None = (lambda g: g + self.forces * _size(g) * self._drawn(g)) if self.forces else None
        return landscape if states is None and forces is None else Device(landscape, states, forces)

    stepper = Wrapper.stepper  # single steps are taken on the network that `around` gives

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: Any) -> Relaxation:
        if self.nudge and strength:
            strength = strength * (1 + self.nudge * float(self._drawn(start[0].new_zeros(()))))
        return super().relax(landscape, start, strength)

    def _drawn(self, like: Tensor) -> Tensor:
        generator, device = None, str(like.device)
        if self.seed is not None:
            if device not in self._generators:
                self._generators[device] = torch.Generator(like.device).manual_seed(self.seed)
            generator = self._generators[device]
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the noise stands."""
        return {"relaxer": super().state_dict(), "noise": {d: g.get_state() for d, g in self._generators.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        super().load_state_dict(state["relaxer"])
        for device, stand in state["noise"].items():
            self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(stand)


def _size(tensor: Tensor) -> Tensor:
    return tensor.abs().square().mean().sqrt()
