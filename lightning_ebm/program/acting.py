"""Activation modules of people's own, known by what their calls do rather than by their class."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn

from lightning_ebm.program.module_walk import modules_of, parameters_of
from lightning_ebm.program.operations import is_by_shape, is_operator, traits
from lightning_ebm.program.record import Mark, Node, Record, Value, stands_for

_LINEAR = frozenset({"add", "sub", "rsub", "neg", "clone", "_to_copy", "alias"})
"""Operations element by element that bend nothing; nor do products and quotients by numbers."""
_UNTAGGED = _LINEAR | {"hardswish", "log_sigmoid_forward"}
"""Operations element by element that torch does not tag as such."""


class Acting(NamedTuple):
    """Activation modules of people's own.

    Attributes:
        modules: those every call of which was a nonlinear function of one tensor, element by element.
        parts: calls within theirs, as of the `nn.ReLU6` in x * relu6(x + 3) / 6: parts of an activation.
    """

    modules: Collection[nn.Module]
    parts: Collection[Mark]


def may_act(module: nn.Module) -> bool:
    """Whether a module may be an activation of somebody's own: no kind of torch's, and no parameters in it.

    A hash of its own, as that of a metric, may change with what it holds: nothing can be kept of such a module.
    """
    kind = type(module)
    own = not kind.__module__.startswith("torch.") and kind.__hash__ is nn.Module.__hash__
    return own and not parameters_of(modules_of(module))


def acting_in(record: Record, suspects: Collection[nn.Module]) -> Acting:
    """Which modules have acted as activations in a pass.

    Args:
        record: of the pass.
        suspects: modules that may.
    """
    within: dict[nn.Module, list[set[Value] | None]] = {}
    for mark in record.marks:
        if mark.module in suspects:
            within.setdefault(mark.module, []).append(_within(mark))
    modules = [module for module, regions in within.items() if None not in regions]
    inner = set[Value]().union(*(region for module in modules for region in within[module] if region is not None))
    return Acting(modules, [mark for mark in record.marks if mark.state in inner])


def _within(mark: Mark) -> set[Value] | None:
    """What a call has computed on the way to what it returned; None if that is no nonlinearity of its drive."""
    found: set[Value] = set()
    bends = reached = False
    queue = [mark.prediction]
    while queue:
        value = queue.pop()
        reached |= value is mark.drive
        if value in found or value is mark.drive or _is_constant(value):
            continue
        found.add(value)
        node = value.node
        if node is None or not (node.func is stands_for or _is_pointwise(node)):
            return None
        bends |= node.func is not stands_for and not _is_linear(node)
        queue.extend(node.values())
    return found if reached and bends else None


def _is_pointwise(node: Node) -> bool:
    return is_operator(node.func) and (torch.Tag.pointwise in node.func.tags or traits(node.func).name in _UNTAGGED)


def _is_linear(node: Node) -> bool:
    name, moving = traits(node.func).name, list(_moving(node))
    if name in ("mul", "div"):
        return len(moving) == 1 and node.args[0] is moving[0]
    return name in _LINEAR


def _moving(node: Node) -> Iterator[Value]:
    return (value for value in node.values() if not _is_constant(value))


def _is_constant(value: Value) -> bool:
    if value.node is None:
        return value.number is not None or value.shape.numel() == 1
    return is_by_shape(value.node.func)
