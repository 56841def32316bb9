"""All that makes the code of a point faster on a given machine, and changes results by rounding only."""

from collections.abc import Iterable, Sequence

from lightning_ebm.elementwise import quick_activations
from lightning_ebm.memory_format import with_images
from lightning_ebm.packing import Shelf, packed
from lightning_ebm.reuse import reusing
from lightning_ebm.tape import STATE, Tape, Value
from lightning_ebm.writing import Op

__all__ = ["Shelf", "faster"]


def faster(
    tape: Tape, shelf: Shelf, opaque: bool, point: Sequence[Value], ops: Sequence[Op], wanted: Iterable[Value]
) -> tuple[list[Op], list[Op]]:
    """Rewrites the operations of a point.

    Args:
        tape: the record, while its tensors are at hand.
        shelf: keeps weights that were laid out.
        opaque: leave to a compiler what it does itself.
        point: the inputs that move.
        ops: the operations of one point, with those before them.
        wanted: values that must still be computed.

    Returns:
        Preparations, and the operations of a point; both empty if there is nothing to win.
    """
    ready, rewritten = packed(tape, shelf, opaque, ops, wanted)
    moving = [op for op in rewritten or ops if op.level == STATE]
    if not opaque:
        turned, moving, images = with_images(tape, moving, point)
        ready = [*ready, *turned]
        moving, quicker = quick_activations(tape, moving)
        moving = reusing(moving, {*wanted})
        if not ready and not images and not quicker:
            return [], []
    return (ready, moving) if ready or not opaque else ([], [])
