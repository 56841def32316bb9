"""Slopes sent from the loss down, one layer's own Jacobian at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ebm.program.interpreter import Pass
from lightning_ebm.program.wiring import Plan

Sent = Callable[[int, Tensor], Tensor]
"""From a layer and the slope that has reached it, what it sends on, to be differentiated."""


def signals(plan: Plan, seen: Pass, top: Tensor, sent: Sent | None = None) -> list[Tensor]:
    """d top / d x_l through every layer above, x = mu + e: top down.

    Args:
        plan: the wiring.
        seen: a pass, cut at its states.
        top: what is computed from the last of them.
        sent: what each layer sends on once its slope has reached it; None sends the slope.
    """
    leaves = seen.states
    found: list[Tensor | None] = [None] * len(leaves)

    def send(output: Tensor, weight: Tensor | None, parents: tuple[int, ...]) -> None:
        if not parents:
            return
        into = [leaves[p] for p in parents]
        if weight is None:  # not "like" the output, whose value nobody may need
            weight = torch.ones(output.shape, dtype=output.dtype, device=output.device)
        parts = torch.autograd.grad(output, into, weight, retain_graph=True, allow_unused=True)
        for p, part in zip(parents, parts, strict=True):
            before = found[p]
            found[p] = part if before is None else before if part is None else before + part

    send(top, None, plan.loss_parents)
    for k in range(len(leaves) - 1, -1, -1):
        if (signal := found[k]) is not None:
            parents = plan.rows[k].parents
            if sent is None:
                send(seen.layers[k].prediction, signal, parents)
            else:
                send(sent(k, signal), None, parents)
    return [torch.zeros_like(x) if s is None else s for s, x in zip(found, leaves, strict=True)]
