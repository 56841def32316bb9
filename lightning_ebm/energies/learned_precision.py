"""Precisions that follow the errors they weigh."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ebm import checked


@dataclass(frozen=True)
class LearnedPrecision:
    """`log Pi_l <- log Pi_l + rate / 2 (1 - Pi_l <e_l^2>)` after each step: descent of `<1/2 Pi e^2 - 1/2 log Pi>`.

    `<.>` is the mean over the batch, and over the units of the layer with ``per="layer"``; e_l are the errors at the
    end of the first nudged phase. Settles where `Pi_l = 1 / <e_l^2>`, the inverse variance. Starts from 1. Only updates
    that are meant to be taken teach it: `Learner.backward`, `Learner.step` and the strategies, not `Learner.gradients`.

    The trap: errors shrink with the nudge, and precisions then grow towards `highest`. Learn them at lambda near 1.

    Args:
        rate: of the descent, in (0, 1].
        per: "layer", one number each; "unit", one for each unit.
        lowest: bound from below.
        highest: bound from above.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Friston 2005; Bogacz 2017 for the rule.
    """

    rate: float = 0.01
    per: Literal["layer", "unit"] = "layer"
    lowest: float = 1e-2
    highest: float = 1e2
    _values: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _learned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        low, high = (f"a bound {of_one}, as precisions start from 1" for of_one in ("in (0, 1]", "of at least 1"))
        checked.keep(
            self,
            rate=checked.number(self, "rate", self.rate, "a rate in (0, 1], such as 0.01", above=0, most=1),
            per=checked.choice(self, "per", self.per, ("layer", "unit")),
            lowest=checked.number(self, "lowest", self.lowest, low, above=0, most=1),
            highest=checked.number(self, "highest", self.highest, high, least=1),
        )

    def of(self, name: str, like: Tensor) -> Tensor:
        """Pi of a layer, as it is now."""
        if name not in self._values:
            shape = () if self.per == "layer" else like.shape[1:]
            self._values[name] = torch.ones(shape, dtype=like.dtype, device=like.device)
        return self._values[name].to(like)

    def observe(self, name: str, errors: Tensor) -> None:
        """One step of the descent, from errors ``(B, ...)``."""
        before = self.of(name, errors)
        squares = errors.square().mean(0)
        squares = squares.mean() if self.per == "layer" else squares
        after = before * torch.exp(0.5 * self.rate * (1 - before * squares).clamp(-10, 10))
        self._learned.add(name)
        # In place: captured steps hold on to these tensors.
        self._values[name].copy_(after.clamp(self.lowest, self.highest))

    def state_dict(self) -> dict[str, Any]:
        """The precisions, by layer."""
        return {name: self._values[name].cpu().clone() for name in sorted(self._learned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._learned.clear()
        self._learned.update(state)
        for name in self._values.keys() - state.keys():
            self._values[name].fill_(1.0)
        for name, value in state.items():
            if name in self._values and self._values[name].shape == value.shape:
                self._values[name].copy_(value)
            else:
                self._values[name] = value.clone()
