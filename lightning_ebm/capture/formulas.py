"""Energies and their slopes, written so that as little as possible is left to do at every point.

`Network.forces`, `.answers` and `.energy_at` say the same in autograd's words.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.capture.dyads import Dyads
from lightning_ebm.capture.front import Front
from lightning_ebm.capture.mode import Mode
from lightning_ebm.delivery import Seed
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import best_response, is_bounded, is_quadratic
from lightning_ebm.network import Run, holomorphic, is_one
from lightning_ebm.substitution import Pass
from lightning_ebm.wiring import Plan


class Formulas(Dyads):
    """`Network` that writes out what it evaluates on the graph of one pass."""

    def __init__(self, energy: Energy, plan: Plan, first: Pass, run: Run, batch_size: int, loss_scale: float) -> None:
        super().__init__(energy, plan, first, run, batch_size, loss_scale)
        self._front = Front(plan)

    def _seeds(self, first: Pass, strength: Tensor | None) -> list[Seed]:
        """What to differentiate, with which weight, for dE/dtheta; a part of that for dE/dx, see `_in_states`."""
        if is_quadratic(self.energy):
            states, precisions = first.states, self._precisions(first)
            pairs = [
                (call.prediction, call.prediction.detach() - x) for call, x in zip(first.layers, states, strict=True)
            ]
            seeds = [(mu, d if is_one(p) else p * d) for (mu, d), p in zip(pairs, precisions, strict=True)]
        else:
            seeds = [(self.internal(first).sum(), self.scalar(1.0))]
        return seeds if strength is None else [*seeds, (first.loss, self.loss_scale * strength)]

    def _in_states(self, first: Pass, strength: Tensor | None, mode: Mode) -> tuple[Tensor, list[Tensor], list[Seed]]:
        """I_b, or their sum; loss and dE/dx; and what to differentiate, with which weight, for dE/dtheta."""
        loss, states = self.loss_scale * first.loss.detach(), first.states
        seeds = self._seeds(first, None)
        slopes = self._pulls(first, seeds, strength, range(len(states)))
        if is_quadratic(self.energy):
            precisions = self._precisions(first)
            errors = [seed if is_one(p) else seed / _root(p) for (_, seed), p in zip(seeds, precisions, strict=True)]
            internal = self.internal(first) if loss.is_complex() else self._half_squares(errors, mode)
            for k, (_, own) in enumerate(seeds):  # in their place: all of them would be held at once
                slope = slopes[k]
                slopes[k] = -own if slope is None else slope - own
            gradients: list[Tensor] = slopes  # type: ignore[assignment]  # none is None now
        else:
            internal, still = self.internal(first), self._like(first)
            gradients = [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, still, strict=True)]
        if is_bounded(self.energy):
            found = zip(gradients, states, self.views(first), strict=True)
            gradients = [self.energy.tangent(gradient, state.detach(), view) for gradient, state, view in found]
        nudge = [] if strength is None else [(first.loss, self.loss_scale * strength)]
        return internal.detach(), [loss, *gradients], [*seeds, *nudge]

    def _half_squares(self, errors: Sequence[Tensor], mode: Mode) -> Tensor:
        """sum_l 1/2 |e_l|^2 of each sample, ``(B,)``; of the batch, where nobody asks for more.

        Left out are layers that are known to be where they were predicted.
        """
        layers = range(len(errors)) if mode.moved is None else sorted(self._front.wrong(mode.moved))
        if not mode.summed:
            return 0.5 * self.squares(errors, layers)
        if not layers:
            return self.scalar(0.0)
        return 0.5 * torch.stack([torch.linalg.vector_norm(errors[k]) for k in layers]).square().sum()

    def _pulls(
        self, first: Pass, seeds: Sequence[Seed], strength: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor | None]:
        """What the seeds and the nudge exert on these layers."""
        half = self.rounding > max(torch.finfo(x.dtype).eps for x in self.free)
        unit = strength if half else None  # see `Network.forces`
        if strength is not None:
            seeds = seeds if unit is None else [(top, seed / unit) for top, seed in seeds]
            seeds = [*seeds, (first.loss, self.loss_scale * (self.scalar(1.0) if unit is not None else strength))]
        slopes = slopes_at(seeds, [first.states[k] for k in layers])
        return [s if s is None or unit is None else unit * s for s in slopes]

    def _answers(self, first: Pass, strength: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """Best responses of these layers."""
        others = self.internal(first, own=False).sum()
        slopes = self._pulls(first, [(others, self.scalar(1.0))], strength, layers)
        views, answers, still = self.views(first), [], self._like(first)
        for k, slope in zip(layers, slopes, strict=True):
            pull = torch.zeros_like(still[k]) if slope is None else -slope
            answers.append(best_response(self.energy, pull, views[k]).detach())
        return answers

    def _like(self, first: Pass) -> Sequence[Tensor]:
        """Tensors of the states' kind, which in real numbers need not be the states themselves."""
        return first.states if first.states[0].is_complex() else self.free

    def _in_errors(
        self, first: Pass, errors: Sequence[Tensor], strength: Tensor, mode: Mode
    ) -> tuple[Tensor, list[Tensor], list[Seed]]:
        loss = self.loss_scale * first.loss
        signals = [holomorphic(signal) for signal in self._signals(first, loss)]
        precisions = self._precisions(first)
        weighted = [e if is_one(p) else p * e for e, p in zip(errors, precisions, strict=True)]
        if loss.is_complex():
            internal = self.per_sample([0.5 * e * w for e, w in zip(errors, weighted, strict=True)])
        else:
            rooted = [e if is_one(p) else _root(p) * e for e, p in zip(errors, precisions, strict=True)]
            internal = self._half_squares(rooted, mode)
        pulls = [strength * s if is_one(p) else strength * s / p for s, p in zip(signals, precisions, strict=True)]
        gradients = [e + pull for e, pull in zip(errors, pulls, strict=True)]
        seeds = [(call.prediction, -w) for call, w in zip(first.layers, weighted, strict=True)]
        return internal, [loss.detach(), *gradients], [*seeds, (first.loss, self.loss_scale * strength)]

    def _frozen(
        self, first: Pass, errors: Sequence[Tensor], strength: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Seed]]:
        """`Network.hops`: I_b; loss and slopes; and what to differentiate, with which weight, for dE/dtheta."""
        precisions = self._precisions(first)
        internal = 0.5 * self.squares(
            [e if is_one(p) else _root(p) * e for e, p in zip(errors, precisions, strict=True)]
        )
        pairs = zip(first.layers, errors, precisions, strict=True)
        seeds = [(call.prediction, -e if is_one(p) else -p * e) for call, e, p in pairs]
        slopes = self._pulls(first, seeds, strength, range(len(errors)))
        parts = zip(errors, slopes, precisions, strict=True)
        gradients = [e.clone() if s is None else e + s if is_one(p) else e + s / p for e, s, p in parts]
        nudge = (first.loss, self.loss_scale * strength)
        return internal, [self.loss_scale * first.loss.detach(), *gradients], [*seeds, nudge]

    def scalar(self, number: complex) -> Tensor:
        """A number as a tensor, in the states' arithmetic."""
        dtype = self.free[0].dtype
        if isinstance(number, complex):
            dtype = dtype.to_complex()
        return torch.full((), number, dtype=dtype, device=self.free[0].device)


def slopes_at(seeds: Sequence[Seed], inputs: Sequence[Tensor], kept: bool = True) -> list[Tensor | None]:
    """sum_k <seed_k, d output_k / d input>, its real part for a real input; None where nothing leads there.

    Args:
        seeds: outputs, and the weight of each of their elements.
        inputs: what to differentiate by.
        kept: whether the graph is needed once more.
    """
    live = [(output, seed) for output, seed in seeds if output.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    outputs = [output for output, _ in live]
    weights = [  # autograd conjugates: what it is given, and what it gives
        holomorphic(seed.real if seed.is_complex() and not output.is_complex() else seed.to(output.dtype))
        for output, seed in live
    ]
    slopes = torch.autograd.grad(outputs, inputs, weights, retain_graph=kept, allow_unused=True)
    return [slope if slope is None else holomorphic(slope) for slope in slopes]


def _root(precision: float | Tensor) -> float | Tensor:
    return precision.sqrt() if isinstance(precision, Tensor) else math.sqrt(precision)
