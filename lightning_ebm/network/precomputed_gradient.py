"""A number that has given gradients: what an update is handed to `backward` as."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_ebm.program.autograd_graph import graph_of

Item = TypeVar("Item")


class WithPrecomputedGradient(torch.autograd.Function):
    """A number whose gradients with respect to given tensors are computed by given code."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, update: Callable[..., tuple[Tensor | None, ...]], *targets: Tensor) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        _ = ctx.saved_tensors  # raises where the graph has been used up, as that of any other function
        with torch.no_grad():
            return None, None, *ctx.update(scale)


def with_precomputed_gradient(
    value: Tensor, update: Callable[[Tensor], tuple[Tensor | None, ...]], targets: Sequence[Tensor]
) -> Tensor:
    """`value`, whose gradients with respect to the targets `update` computes from the factor on it when asked."""
    apply: Any = WithPrecomputedGradient.apply
    found: Tensor = apply(value, update, *targets)
    return found


@torch.enable_grad()
def slopes_of(seeds: Sequence[tuple[Tensor, Tensor]], states: Collection[Tensor]) -> Tensor:
    """A scalar whose gradient is that of sum_k <seed_k, output_k>, for all that these are computed from but the states.

    Autograd would work out those of the states, which are held, as well: a third of what a backward pass costs.

    Args:
        seeds: outputs, and the seed of each, in its shape.
        states: leaves to leave out.
    """
    live = [(output, seed) for output, seed in seeds if output.requires_grad]
    leaves, nodes = graph_of([output for output, _ in live])
    held = {id(state) for state in states}
    targets = [leaf for leaf in leaves if id(leaf) not in held]
    # Hooks of parameters would act twice, and those in custom functions may expect gradients to have arrived.
    hooked = any(leaf._backward_hooks for leaf in targets)
    custom = any(isinstance(node, BackwardCFunction) for node in nodes)
    if not targets or hooked or custom or any(t.is_complex() for pair in live for t in pair):
        total = torch.stack([(seed * output).sum() for output, seed in seeds]).sum()
        return total.real if total.is_complex() else total

    def update(scale: Tensor) -> tuple[Tensor, ...]:
        outputs, weights = [output for output, _ in live], [(scale * seed).to(output.dtype) for output, seed in live]
        again: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        return torch.autograd.grad(outputs, targets, weights, retain_graph=again, allow_unused=True)

    return with_precomputed_gradient(live[0][1].new_zeros(()), update, targets)


def average_of(items: Sequence[Item], scalar_of: Callable[[Item], Tensor]) -> Tensor:
    """A scalar whose gradient is the average of those of several scalars, one graph at a time.

    Args:
        items: what the scalars are of.
        scalar_of: makes one, again when its gradient is asked for.
    """
    targets = graph_of([scalar_of(items[0])])[0]

    def update(scale: Tensor) -> tuple[Tensor | None, ...]:
        total: list[Tensor | None] = [None] * len(targets)
        for item in items:
            with torch.enable_grad():
                scalar = scalar_of(item)
            slopes = torch.autograd.grad(scalar, targets, scale / len(items), allow_unused=True)
            total = [t if s is None else s if t is None else t + s for t, s in zip(total, slopes, strict=True)]
        return tuple(total)

    like = targets[0] if targets else torch.zeros(())
    return with_precomputed_gradient(like.detach().new_zeros(()), update, targets)
