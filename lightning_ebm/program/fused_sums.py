"""A sum of which one term is a product of matrices, as one operation: torch adds the product to the other term.

It saves writing the product and reading it again: a twentieth or more of a training step by sweeps of equilibrium
propagation on two networks (`benchmarks/run.py --only sums`).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_KIND = "kind"


def note_kind(node: fx.Node, like: Tensor | fx.Node) -> None:
    """Notes shape and dtype of what a node computes: those of a tensor, or what another node computes."""
    node.meta[_KIND] = like.meta.get(_KIND) if isinstance(like, fx.Node) else (like.shape, like.dtype)


def fuse_sums(graph: fx.Graph, moving: Collection[fx.Node]) -> None:
    """Writes x + a A B as `aten.addmm` wherever nothing else reads A B; values differ by rounding.

    Args:
        graph: is changed.
        moving: what depends on the point. Sums that do, of products that do not, stay as they are.
    """
    for node in list(graph.nodes):
        if node.target in (_aten.add.Tensor, _aten.sub.Tensor):
            _fuse(graph, node, moving)


def _fuse(graph: fx.Graph, node: fx.Node, moving: Collection[fx.Node]) -> None:
    sign = 1 if node.target is _aten.add.Tensor else -1
    alpha: Any = node.kwargs.get("alpha", 1)
    terms: Any = node.args if len(node.all_input_nodes) == 2 else ()  # else one is a number, or both are one
    orders = [terms, terms[::-1]] if sign == alpha == 1 else [terms]
    for kept, product in filter(None, orders):
        kinds = {one.meta.get(_KIND) for one in (node, kept, product)}
        alone = product.target is _aten.mm.default and len(product.users) == 1
        if alone and (node in moving) == (product in moving) and len(kinds) == 1 and None not in kinds:
            with graph.inserting_before(node):
                fused = graph.call_function(_aten.addmm.default, (kept, *product.args), {"alpha": sign * alpha})
            fused.meta = node.meta
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(product)
            return
