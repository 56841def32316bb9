"""Straight-line code through Inductor: elementwise operations fused in C++, products left to the fastest library.

`torch.compile` would do the same after looking at the tensors of every call for whether they are still of the kind it
has compiled for. Captured code is only ever called with such tensors, so the look is left out: a call costs what the
compiled code costs.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_ebm.capture.elementwise import compiled_tanh
from lightning_ebm.capture.products import least_time

log = logging.getLogger(__name__)

Tensors = Sequence[Tensor]


class Compiled:
    """A function of tuples of tensors that returns tuples of tensors, compiled when it is called.

    That is once for every way its arguments lie in memory: a relaxation begins at tensors of another layout (zeros that
    are one number spread out) than those that its steps make. What is no faster for it runs as it was: both are timed,
    once. Where there is no compiler the function is called as it is, which is said once.

    Args:
        function: straight-line code; it must not write to its arguments.
        instead: the same, as fast as it gets uncompiled; None is the function itself.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensors]], instead: Callable[..., Sequence[Tensors]] | None = None
    ) -> None:
        self._function = function
        self._instead = instead or function
        self._lengths: list[int] = []
        self._runs: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}
        self._gave_up = False

    def __call__(self, *arguments: Tensors) -> Sequence[Tensors]:
        if self._gave_up:
            return self._instead(*arguments)
        flat = [tensor for tensors in arguments for tensor in tensors]
        run = self._runs.get(tuple([tensor.stride() for tensor in flat]))
        return self._compiled_for(arguments, flat) if run is None else self._parted(run(*flat))

    def _parted(self, flat: Tensors) -> list[Tensors]:
        parts, start = [], 0
        for length in self._lengths:
            parts.append(flat[start : start + length])
            start += length
        return parts

    def _compiled_for(self, arguments: Sequence[Tensors], flat: list[Tensor]) -> Sequence[Tensors]:
        counts = [len(tensors) for tensors in arguments]

        def flattened(function: Callable[..., Sequence[Tensors]], *tensors: Tensor) -> list[Tensor]:
            given, start = [], 0
            for count in counts:
                given.append(list(tensors[start : start + count]))
                start += count
            found = function(*given)
            self._lengths = [len(part) for part in found]
            return [tensor for part in found for tensor in part]

        try:
            run, instead = _compiled(partial(flattened, self._function), flat), partial(flattened, self._instead)
            found = self._parted(run(*flat))
            if least_time(lambda: instead(*flat)) < least_time(lambda: run(*flat)):
                run = instead  # convolutions come out slower now and then
            self._runs[tuple([tensor.stride() for tensor in flat])] = run
            return found
        except Exception as error:  # no compiler, or one that gives up: the code itself is right
            said = str(error).strip().splitlines()
            self.give_up(f"{type(error).__name__}: {said[-1] if said else ''}")
            return self._instead(*arguments)

    def give_up(self, why: str) -> None:
        """Runs the function as it is from now on."""
        _say_once(why)
        self._gave_up = True


def _compiled(function: Callable[..., list[Tensor]], example: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor.config  # not before it is asked for: seconds
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        table = {**select_decomp_table(), torch.ops.aten.tanh.default: compiled_tanh}
        graph = make_fx(function, decomposition_table=table)(*example)
        # Sizes are those captured, strides are looked at above: no need to have each tensor checked at every call.
        checks = ("size_asserts", "scalar_asserts", "alignment_asserts")  # not every torch has all of them
        unchecked = {name: False for name in checks if hasattr(torch._inductor.config, name)}
        return torch._inductor.compile(graph, list(example), options=unchecked)  # type: ignore[no-any-return]


@functools.cache
def _say_once(why: str) -> None:
    log.warning(
        "compile=True: captured code runs uncompiled, which gives the same and is slower, as it could not be compiled,"
        " or gave other numbers (%s). On a CPU it needs a C++ compiler, such as g++. (Said once.)",
        why,
    )
