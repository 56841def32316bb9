"""All that makes code faster on a given machine, and changes results by rounding only."""

from collections.abc import Iterable, Sequence

from lightning_ebm.capture.elementwise import quick_activations
from lightning_ebm.capture.kernels import by_kernels
from lightning_ebm.capture.reuse import reusing
from lightning_ebm.capture.values import Value
from lightning_ebm.capture.writing import Op


def faster(to_compile: bool, ops: Sequence[Op], wanted: Iterable[Value]) -> list[Op]:
    """Rewrites the operations of a stage.

    Args:
        to_compile: leave to a compiler what it does itself.
        ops: the operations, in order.
        wanted: values that must still be computed.
    """
    kept = set(wanted)
    rewritten = by_kernels(to_compile, ops, kept)
    return rewritten if to_compile else reusing(quick_activations(rewritten), kept)
