"""What a known pass did, as later ones are compared with it."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ebm.program.operations import is_plain
from lightning_ebm.program.record import Node, Record, meta_of


class Trail:
    """What a pass did, in order, without what its tensors held.

    Args:
        record: of the pass.
    """

    def __init__(self, record: Record) -> None:
        self.nodes = [*record.nodes, None]  # nothing comes after the last
        self.plain = [None if node is None or not is_plain(node.func) else node.func for node in self.nodes]
        self.marks = {mark.state.node: mark for mark in record.marks}
        self.leaves = {value: weakref.ref(tensor) for value, tensor in record.leaves.items()}


def same_results(node: Node, results: Sequence[Any]) -> bool:
    """Whether an operation has given tensors of the kinds that it gave before."""
    if len(results) != len(node.results):
        return False
    for value, result in zip(node.results, results, strict=True):
        if isinstance(result, Tensor):
            if value is None or value.meta != meta_of(result):
                return False
        elif value is not None:
            return False
    return True
