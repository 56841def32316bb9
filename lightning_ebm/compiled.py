"""Straight-line code through Inductor: elementwise operations fused in C++, products left to the fastest library.

`torch.compile` would do the same after looking at the tensors of every call for whether they are still of the kind it
has compiled for. Captured code is only ever called with such tensors, so the look is left out: a call costs what the
compiled code costs.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger(__name__)

Tensors = Sequence[Tensor]


class Compiled:
    """A function of tuples of tensors that returns tuples of tensors, compiled at its first call.

    Tensors that lie in memory otherwise than those of that call are met by compiling once more. Where there is no
    compiler the function is called as it is, which is said once.

    Args:
        function: straight-line code; it must not write to its arguments.
    """

    def __init__(self, function: Callable[..., Sequence[Tensors]]) -> None:
        self._function = function
        self._lengths: list[int] = []
        self._run: Callable[..., Any] | None = None
        self._gave_up = False

    def __call__(self, *arguments: Tensors) -> Sequence[Tensors]:
        if self._gave_up:
            return self._function(*arguments)
        if self._run is None:
            return self._compiled_for(arguments)
        try:
            flat = self._run(*[tensor for tensors in arguments for tensor in tensors])
        except AssertionError:  # sizes or strides: the code checks them before it computes anything
            return self._compiled_for(arguments)
        return self._parted(flat)

    def _parted(self, flat: Tensors) -> list[Tensors]:
        parts, start = [], 0
        for length in self._lengths:
            parts.append(flat[start : start + length])
            start += length
        return parts

    def _compiled_for(self, arguments: Sequence[Tensors]) -> Sequence[Tensors]:
        flat = [tensor for tensors in arguments for tensor in tensors]
        counts = [len(tensors) for tensors in arguments]

        def flattened(*tensors: Tensor) -> list[Tensor]:
            given, start = [], 0
            for count in counts:
                given.append(tuple(tensors[start : start + count]))
                start += count
            found = self._function(*given)
            self._lengths = [len(part) for part in found]
            return [tensor for part in found for tensor in part]

        try:
            self._run = _compiled(flattened, flat)
            return self._parted(self._run(*flat))
        except Exception as error:  # no compiler, or one that gives up: the code itself is right
            _say_once(f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}")
            self._gave_up = True
            return self._function(*arguments)


def _compiled(function: Callable[..., list[Tensor]], example: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor  # not before it is asked for: seconds
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        graph = make_fx(function, decomposition_table=select_decomp_table())(*example)
        return torch._inductor.compile(graph, list(example))  # type: ignore[no-any-return]


@functools.cache
def _say_once(why: str) -> None:
    log.warning(
        "compile=True: the captured code runs uncompiled, which gives the same and is slower, as torch could not"
        " compile it (%s). On a CPU it needs a C++ compiler, such as g++. (Said once.)",
        why,
    )
