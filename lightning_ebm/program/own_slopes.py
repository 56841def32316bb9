"""Whether what flows back between states is the slope of what flows forward, where that is not torch's own rule."""

from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.at_value import written_unseen
from lightning_ebm.program.custom_calls import is_of_the_users
from lightning_ebm.program.held import Held, ordered
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import is_operator, traits
from lightning_ebm.program.record import Node, Value, depending
from lightning_ebm.program.seams import HookedCall
from lightning_ebm.program.user_hooks import those_that_change

_FAR = 0.1
"""Of the larger of two slopes along one direction, what cannot be a few kinks on the way."""


def changing_hook(program: Program) -> str | None:
    """Which hook of the user's changes gradients on their way through states; it may do so in one step, not in another.

    Args:
        program: of a pass whose hooks have been told of its gradient.
    """
    if not program.record.has_hooks:
        return None
    moving = depending({mark.state for mark in program.marks}, program.order)
    if any(value in moving and those_that_change(hooks) for value, hooks in program.record.hooks.items()):
        return "a hook that changes gradients"
    for node in program.order:
        call = node.args[0] if node.args else None
        if isinstance(call, HookedCall) and call.changes and any(value in moving for value in node.values()):
            return f"a backward hook of {type(call.module).__name__} that changes gradients"
    return None


def function_without_slope(program: Program) -> str | None:
    """Which function gives another gradient than its slope, as straight-through and reversed ones do.

    Custom autograd functions and operators, torch's own that quantize, and writes under `no_grad` are compared along
    one direction with central differences of what they compute.

    Args:
        program: of a pass.
    """
    assert program.loss is not None
    moving = depending({mark.state for mark in program.marks}, program.order)
    own = [node for node in program.order if _may_differ(node.func) and any(v in moving for v in node.values())]
    if not own:
        return None
    held, order = Held(program.record), ordered(program.record, [program.loss])
    read = {program.loss, *(value for node in order for value in node.values())}
    for node in order:
        if node in own and not _has_slope(node, held, program, moving, read):
            return _in_words(node.func)
        held.run(node)
    return None


def _may_differ(func: Any) -> bool:
    """Whether somebody wrote down another gradient than the slope."""
    if is_operator(func):
        name = traits(func).name
        return "quantize" in name or "_fq_" in name or func.namespace not in ("aten", "prims")
    return func is written_unseen or is_of_the_users(func)


def _in_words(func: Any) -> str:
    if func is written_unseen:
        return "a write under torch.no_grad()"
    return f"the operation {func}" if is_operator(func) else f"the function {named(func).name.rpartition('.')[2]}"


def _has_slope(node: Node, held: Held, program: Program, moving: set[Value], read: set[Value]) -> bool:
    generator = torch.Generator().manual_seed(0)
    # Parameters stay what they are: backward code may look for the slopes of those that it has been handed.
    leaves = program.record.leaves
    given = {value: held[value] if value in leaves else held[value].detach() for value in node.values()}
    moved = [value for value in given if value in moving and value.is_continuous and not value.is_complex]

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    def results(at: dict[Value, Tensor]) -> list[Tensor]:
        run = Held(program.record, {**given, **at})
        run.run(node)
        kept = [value for value in node.results if value in read]  # of others backward code may know no slope
        return [run[value] for value in kept if value is not None and value.is_continuous and not value.is_complex]

    with torch.enable_grad():
        start = {value: given[value].detach().clone().requires_grad_() for value in moved}
        ends = [end for end in results(start) if end.requires_grad]
        if not ends or not moved:
            return True
        weights = [like(end) for end in ends]
        slopes = torch.autograd.grad(ends, list(start.values()), weights, allow_unused=True)
    ways = {value: like(x) for value, x in start.items()}
    told = sum(float((s * w).sum()) for s, w in zip(slopes, ways.values(), strict=True) if s is not None)
    size = max(float(x.detach().abs().max()) for x in start.values() if x.numel())
    step = (torch.finfo(given[moved[0]].dtype).eps ** (1 / 3)) * max(size, 1e-3)
    sides = []
    with torch.no_grad():
        for sign in (step, -step):
            ahead = results({value: given[value] + sign * way for value, way in ways.items()})
            sides.append(sum(float((end * w).sum()) for end, w in zip(ahead, weights, strict=False)))
    seen = (sides[0] - sides[1]) / (2 * step)
    return bool(abs(seen - told) <= _FAR * max(abs(seen), abs(told)))
