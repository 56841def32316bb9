"""Whether what flows back between states is the slope of what flows forward, where code of the user's own says what."""

import torch
from torch import Tensor

from lightning_ebm.program.custom_calls import is_of_the_users
from lightning_ebm.program.held import Held, ordered
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.named import named
from lightning_ebm.program.record import Node, Value, depending
from lightning_ebm.program.user_hooks import those_that_change

_FAR = 0.1
"""Of the larger of two slopes along one direction, what cannot be a few kinks on the way."""


def not_a_slope(program: Program) -> str | None:
    """What of the user's own gives another gradient than the slope, as straight-through and reversed ones are.

    Custom autograd functions are compared along one direction with central differences of what they compute.

    Args:
        program: of a pass.
    """
    assert program.loss is not None
    moving = depending({mark.state for mark in program.marks}, program.order)
    if any(value in moving and those_that_change(hooks) for value, hooks in program.record.hooks.items()):
        return "a hook that changes gradients"
    own = [node for node in program.order if is_of_the_users(node.func) and any(v in moving for v in node.values())]
    if not own:
        return None
    held = Held(program.record)
    for node in ordered(program.record, [program.loss]):
        if node in own and not _has_slope(node, held, program, moving):
            return f"the autograd function {named(node.func).name.rpartition('.')[2]}"
        held.run(node)
    return None


def _has_slope(node: Node, held: Held, program: Program, moving: set[Value]) -> bool:
    generator = torch.Generator().manual_seed(0)
    given = {value: held[value].detach() for value in node.values()}
    moved = [value for value in given if value in moving and value.is_continuous and not value.is_complex]

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    def results(at: dict[Value, Tensor]) -> list[Tensor]:
        run = Held(program.record, {**given, **at})
        run.run(node)
        kept = [value for value in node.results if value is not None and value.is_continuous and not value.is_complex]
        return [run[value] for value in kept]

    with torch.enable_grad():
        start = {value: given[value].clone().requires_grad_() for value in moved}
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
