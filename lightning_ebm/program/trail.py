"""What a known pass did, as later ones are compared with it."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ebm.program.operations import is_plain
from lightning_ebm.program.record import Node, Record, Value, meta_of


class Trail:
    """What a pass did, in order, without what its tensors held.

    Args:
        record: of the pass.
        module: the user's.

    Attributes:
        nodes: the operations, and None at the end.
        plain: their functions, where these only compute.
        marks: by their operations.
        leaves: what the pass read that autograd takes for a leaf.
    """

    def __init__(self, record: Record, module: nn.Module) -> None:
        self.nodes = [*record.nodes, None]  # nothing comes after the last
        self.plain = [None if node is None or not is_plain(node.func) else node.func for node in self.nodes]
        self.marks = {mark.state.node: mark for mark in record.marks}
        self.leaves = {value: weakref.ref(tensor) for value, tensor in record.leaves.items()}
        self._module = module
        parameters = {id(parameter) for parameter in module.parameters()}
        self._passing = {value for value, tensor in record.leaves.items() if id(tensor) not in parameters}

    def takes(self, value: Value, tensor: Tensor) -> bool:
        """Whether a pass that reads this tensor for a leaf is the same program.

        A parameter of the module is itself and no other. A leaf that the step makes, as `x.detach().requires_grad_()`,
        is another one in every step, and so may all be that are no parameters.
        """
        if self.leaves[value]() is tensor:
            return True
        return value in self._passing and all(tensor is not parameter for parameter in self._module.parameters())


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


def same_constant(one: Any, other: Any) -> bool:
    """Whether two numbers, or what else operations are given besides tensors, are the same to the bit."""
    if type(one) is not type(other):
        return False
    try:
        equal = bool(one == other)
    except (RuntimeError, ValueError):  # arrays, and what holds tensors, that a custom function is given
        return one is other
    if equal:
        return one != 0 or type(one) is not float or math.copysign(1.0, one) == math.copysign(1.0, other)
    return bool(one != one and other != other)
