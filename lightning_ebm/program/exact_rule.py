"""The gradient of a recorded loss, from errors that are sent down one layer at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.program.interpreter import Pass
from lightning_ebm.program.wiring import Plan


def exact_rule(seen: Pass, plan: Plan, leaves: Sequence[Tensor], scale: float = 1.0) -> list[Tensor | None]:
    """dL/dtheta from errors that are sent down, layer by layer: delta_l = sum over its children of J^T delta.

    Given a scale, the same of that multiple of the loss.
    """
    top = torch.full_like(seen.loss, scale)
    states = seen.states
    errors: list[Tensor | None] = [None] * len(states)

    def send(output: Tensor, weight: Tensor, parents: Sequence[int]) -> None:
        if not parents or not output.requires_grad:
            return
        below = [states[p] for p in parents]
        found = torch.autograd.grad(output, below, weight, retain_graph=True, allow_unused=True)
        for p, part in zip(parents, found, strict=True):
            before = errors[p]
            errors[p] = part if before is None else before if part is None else before + part

    send(seen.loss, top, plan.loss_parents)
    for k in range(len(states) - 1, -1, -1):
        if (error := errors[k]) is not None:
            send(seen.layers[k].prediction, error, plan.rows[k].parents)
    tops = [(seen.loss, top)]
    tops += [(call.prediction, e) for call, e in zip(seen.layers, errors, strict=True) if e is not None]
    live = [(top, weight) for top, weight in tops if top.requires_grad]
    if not live or not leaves:
        return [None] * len(leaves)
    outputs, weights = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))
