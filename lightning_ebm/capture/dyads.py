"""Pairs of states, written so that they can be recorded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.delivery import Seed
from lightning_ebm.network import Network
from lightning_ebm.substitution import Pass


class Dyads(Network):
    """`Network.dyads`, and the update that is read off them, of a given pass and with the nudge as a tensor."""

    def _in_pairs(self, first: Pass, strength: Tensor) -> list[Tensor]:
        """L; m - (z^+ + z^-) / 2 of each layer; z^+ of each; z^- of each."""
        ahead, behind = self._halves(first, strength)
        gradients = [m.detach() - 0.5 * (p + q) for m, p, q in zip(first.states, ahead, behind, strict=True)]
        return [self.loss(first).detach(), *gradients, *ahead, *behind]

    def _seeds_of_pairs(
        self, first: Pass, ahead: Sequence[Tensor], behind: Sequence[Tensor], strength: Tensor | None
    ) -> list[Seed]:
        """What to differentiate, with which weight, for I(z^+) - I(z^-) + lambda L at the drives of the means."""
        ends = (self.internal(first, at=ahead) - self.internal(first, at=behind)).sum()
        seeds = [(ends, torch.ones((), dtype=ends.dtype, device=ends.device))]
        return seeds if strength is None else [*seeds, (first.loss, self.loss_scale * strength)]
