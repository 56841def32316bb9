"""How much of what the machine can multiply a training step uses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import timed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SIZES = (512, 1024, 2048)


def best_rate(repeats: int = 5) -> float:
    """Operations a second of the fastest product of two square float32 matrices, clocked as steps are."""
    best = 0.0
    for size in _SIZES:
        left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        multiply = timed(partial(torch.mm, left, right, out=out))
        milliseconds = min(multiply() for _ in range(repeats + 1))
        best = max(best, 2 * size**3 / (1e-3 * max(milliseconds, 1e-6)))
    return best


class _Counting(TorchDispatchMode):
    """Counts below autograd. `FlopCounterMode` also hangs hooks on what modules compute, which a step refuses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def products(step: Callable[[], object]) -> int:
    """Floating-point operations in the products and convolutions of a step, two a multiplication, as torch counts."""
    with _Counting() as counting:
        step()
    return int(counting.total)
