"""What a custom autograd function does besides computing, which it must not do again where it is applied again.

Its forward runs while gradients are off, and no operation of it is recorded. What it writes to, and when it draws, is
seen all the same.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.plain_state import RandomState
from lightning_ebm.program import collectives
from lightning_ebm.program.aliasing import memory_of
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import tensors_at, traits
from lightning_ebm.program.random_draws import draws
from lightning_ebm.program.tensors import listed, tensors_in

if TYPE_CHECKING:
    from lightning_ebm.program.contents import Contents


class Effects:
    """What is done within one call.

    Args:
        contents: of the pass, which is told of writes before they happen.
        name: of what is called.

    Attributes:
        written: tensors that were there before, and have been written to.
        random: the generators as they were before the first draw; None if nothing was drawn.
    """

    def __init__(self, contents: "Contents", name: str) -> None:
        self._name = name
        self.written: list[Tensor] = []
        self.random: Draws | None = None
        self._contents = contents
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._own: set[int] = set()
        """Memory that was taken within: nothing that was there before can lie in it."""

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation."""
        collectives.refuse(func, self._name)
        kind = traits(func)
        written = tensors_at(kind, args, kwargs) if kind.writes else []
        outside = [tensor for tensor in written if not self._is_own(tensor)]
        self._contents.about_to_write(outside)
        self.written += outside
        if kind.random and draws(func, args, kwargs):
            self.random = self.random or Draws(tensors_in((args, kwargs)))
            self.random.note([*args, *kwargs.values()])
        result = func(*args, **kwargs)
        if not kind.views and not outside:
            for tensor in listed(result):
                if isinstance(tensor, Tensor):
                    self._made[id(tensor)] = weakref.ref(tensor)
                    self._own.add(memory_of(tensor))
        return result

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether it was made within; one that was empty has other memory once it has been given a size."""
        made = self._made.get(id(tensor))
        return memory_of(tensor) in self._own or (made is not None and made() is tensor)

    def written_among(self, args: Sequence[Any], name: str) -> tuple[int, ...]:
        """The positions of the arguments that have been written to.

        Args:
            args: of the call.
            name: of the function.

        Raises:
            UnsupportedModuleError: other tensors have been.
        """
        memory = {memory_of(tensor) for tensor in self.written}
        handed = {memory_of(arg): position for position, arg in enumerate(args) if isinstance(arg, Tensor)}
        if missing := memory - handed.keys():
            shape = next(tuple(t.shape) for t in self.written if memory_of(t) in missing)
            raise UnsupportedModuleError(
                f"The custom autograd function {name} writes to a tensor of shape {shape} that is none of its"
                " arguments, such as a running statistic of a module that it calls: it is applied at every state of a"
                f" relaxation, and would write each time. Hand the tensor itself to {name}.apply(...), or write to it"
                " in training_step; in place of a checkpoint by hand take torch.utils.checkpoint(use_reentrant=False)."
            )
        return tuple(position for own, position in handed.items() if own in memory)


class Draws:
    """The generators before the first draw of a call: the global ones, and those that it names.

    Args:
        tensors: on whose devices it draws.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._global = RandomState(tensors)
        self._named: dict[torch.Generator, Tensor] = {}

    def note(self, args: Sequence[Any]) -> None:
        """The generators among the arguments of an operation that is about to draw."""
        for arg in args:
            if isinstance(arg, torch.Generator):
                self._named.setdefault(arg, arg.get_state())

    def again(self, run: Callable[[], Any]) -> Any:
        """Runs something that draws the same, and leaves the generators as they are."""
        now, named_now = self._global.of_now(), [(g, g.get_state()) for g in self._named]
        self._global.restore()
        for generator, state in self._named.items():
            generator.set_state(state)
        try:
            return run()
        finally:
            now.restore()
            for generator, state in named_now:
                generator.set_state(state)


class SameDraws:
    """A function that draws what it drew when it was recorded; equal to another of the same function.

    Args:
        func: which.
        drawn: its draws.
    """

    def __init__(self, func: Callable[..., Any], drawn: Draws) -> None:
        self.func = func
        self._draws = drawn
        self.__module__, self.__qualname__ = named(func)
        self.__name__ = self.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._draws.again(lambda: self.func(*args, **kwargs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameDraws) and self.func == other.func

    def __hash__(self) -> int:
        return hash(self.func)
