"""What autograd would give a gradient, and these gradients by name."""

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.module_walk import clean
from lightning_ebm.program.record import is_borrowed
from lightning_ebm.program.user_hooks import without_hooks


def graph_of(tensors: Iterable[Tensor], stops: Collection[Any] = ()) -> tuple[list[Tensor], set[Any]]:
    """The tensors that autograd would give a gradient, of all that these were computed from; and autograd's nodes."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    queue: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            queue.append(tensor.grad_fn)
        elif tensor.requires_grad and not is_borrowed(tensor):
            found[id(tensor)] = tensor
    while queue:
        node = queue.pop()
        if node in seen or node in stops:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            if leaf.requires_grad and not is_borrowed(leaf):  # else it has been frozen since, and takes none
                found[id(leaf)] = leaf
        else:
            queue.extend(n for n, _ in node.next_functions if n is not None)
    return list(found.values()), seen


def reached_parameters(module: nn.Module, scalar: Tensor) -> frozenset[str]:
    """Names of the trainable parameters that a gradient of `scalar` would reach."""
    leaves = {id(leaf) for leaf in graph_of([scalar])[0]}
    return frozenset(clean(name) for name, p in module.named_parameters() if id(p) in leaves)


def named_gradients(
    module: nn.Module, scalar: Tensor, retain_graph: bool = False, hooked: bool = False
) -> dict[str, Tensor]:
    """d scalar / d theta for every trainable parameter it reaches, by the name the user knows.

    Args:
        module: the user's.
        scalar: what is differentiated.
        retain_graph: as in `torch.autograd.grad`.
        hooked: whether hooks on parameters act, as they do on what is put into ``.grad``.
    """
    named = {clean(name): p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigurationError(f"{type(module).__name__} has no trainable parameter: nothing could be learned.")
    with nullcontext() if hooked else without_hooks(named.values()):
        found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True, retain_graph=retain_graph)
    return {name: g.detach() for name, g in zip(named, found, strict=True) if g is not None}
