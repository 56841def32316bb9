"""What is left of a pass when it is over."""

from collections.abc import Sequence

from torch.utils.weak import TensorWeakRef

from lightning_ebm.program.held import ancestors
from lightning_ebm.program.record import Value


class Left:
    """What may be left of a pass when it is over: tensors that somebody has kept, a loss of the epoch so far, say.

    Backprop frees what they were computed from as it goes back. Here nothing goes back through the user's graph.

    Args:
        known: the tensors that the pass has seen, with what they hold.
        losses: what it was differentiated for; others may come.
    """

    def __init__(self, known: Sequence[tuple[TensorWeakRef, Value]], losses: list[Value]) -> None:
        self._known = known
        self._losses = losses

    def free(self) -> None:
        """Lets go of what backprop would have freed: what it would have gone through is a constant from now on."""
        alive = [(t, v) for ref, v in self._known if (t := ref()) is not None and t.grad_fn is not None]
        if not alive:
            return
        through = ancestors(self._losses)
        for tensor, value in alive:
            if not tensor._is_view() and not through.isdisjoint(ancestors([value])):
                tensor.detach_()
