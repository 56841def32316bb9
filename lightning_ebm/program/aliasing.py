"""Which tensors share memory, and what they hold when one of them is written to."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import TensorWeakRef

from lightning_ebm.program.record import Value

Rebind = Callable[[Tensor, Value | None], Value | None]
Make = Callable[[Callable[..., Tensor], tuple[Any, ...], Tensor], Value]
"""Notes an operation: a function, its arguments, and a tensor of the kind of its result, whose value it gives."""
_Layout = tuple[Sequence[int], Sequence[int]]
"""Shape and strides."""


class Aliasing:
    """The tensors seen, by the memory they lie in.

    Nobody pays for it but who writes: where tensors lie is looked up at the first write after they were seen.

    Attributes:
        seen: those since the last write, to be added to by whoever sees one.
    """

    def __init__(self) -> None:
        self.seen: list[TensorWeakRef] = []
        self._groups: dict[int, list[TensorWeakRef]] = {}

    def others(self, tensor: Tensor) -> list[Tensor]:
        """The other tensors, still there, that have elements in common with this one.

        Other parts of the same memory are none of them: what is written to this one changes nothing there.
        """
        for ref in self.seen:
            if (alias := ref()) is not None:
                self._groups.setdefault(memory_of(alias), []).append(ref)
        self.seen.clear()
        found: dict[int, Tensor] = {}
        if not (memory := memory_of(tensor)):
            return []
        for ref in self._groups.get(memory, ()):
            alias = ref()
            if alias is None or alias is tensor or id(alias) in found:
                continue
            if memory_of(alias) == memory and meet(alias, tensor):
                found[id(alias)] = alias
        return list(found.values())

    def written(
        self, tensor: Tensor, now: Value, rebind: Rebind, poison: Callable[[Tensor, str], None], make: Make
    ) -> None:
        """Notes the operations that give every other tensor in the same memory what it holds after a write.

        The memory is taken as one flat tensor: what was written is scattered into it, and read again from there.

        Args:
            tensor: which was written to.
            now: what it holds.
            rebind: tells, and changes, what a tensor holds.
            poison: notes that a tensor cannot be read any more.
            make: see `Make`.
        """
        others = [alias for alias in self.others(tensor) if rebind(alias, None) is not None]
        if not others:
            return
        root = next((t for t in (tensor, *others) if _is_whole(t)), None)
        held = now if root is tensor else None if root is None else rebind(root, None)
        if root is None or held is None:
            for alias in others:
                poison(
                    alias,
                    "The step writes to a tensor through a view, and reads the same memory through another one, in a"
                    " way that cannot be repeated at other states. Write out of place: torch.where, torch.cat.",
                )
            return
        memory = make(flat_memory, (held, _order(root)), root.new_empty(0))
        if root is not tensor:
            where = tensor.shape, tensor.stride(), tensor.storage_offset()
            memory = make(write_memory, (memory, now, *where), tensor)
        for alias in others:
            where = alias.shape, alias.stride(), alias.storage_offset()
            rebind(alias, make(read_memory, (memory, *where), alias))


def flat_memory(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The elements of a tensor in the order in which they lie in memory, given its dimensions from slow to fast."""
    return tensor.permute(order).reshape(-1)


def read_memory(memory: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    """The elements of flat memory that a view lies at."""
    return memory.index_select(0, _places(memory, size, stride, offset)).view(size)


def write_memory(memory: Tensor, written: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    """Flat memory after a view of it has been written to."""
    dtype = torch.promote_types(memory.dtype, written.dtype)  # one alone may be complex by now
    return memory.to(dtype).scatter(0, _places(memory, size, stride, offset), written.reshape(-1).to(dtype))


def _places(memory: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    return torch.arange(len(memory), device=memory.device).as_strided(size, stride, offset).reshape(-1)


def memory_of(tensor: Tensor) -> int:
    """Where a tensor lies; 0 of what has no memory that could be written to."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # tangents that are zero, and what a transform of torch.func wraps
        return 0


def base_of(tensor: Tensor) -> Tensor:
    """What autograd takes a tensor for a view of, or itself: names of the same memory that it knows to be that."""
    return tensor._base if tensor._is_view() and tensor._base is not None else tensor


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it is what a transform of torch.func hands to modules: what they compute is part of what follows."""
    if tensor.layout is not torch.strided:
        return False
    try:
        tensor.untyped_storage()
    except RuntimeError:
        return True
    return False


def _order(tensor: Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda d: (-strides[d], -tensor.shape[d])))


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is all of its memory, each element once."""
    if tensor.storage_offset() or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    reach = 1
    for d in reversed(_order(tensor)):
        if tensor.shape[d] > 1 and tensor.stride(d) != reach:
            return False
        reach *= tensor.shape[d]
    return True


def meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that lie in the same memory have an element in common; two columns of a matrix have not."""
    sizes = one.element_size(), other.element_size()
    distance = int(other.storage_offset()) * sizes[1] - int(one.storage_offset()) * sizes[0]
    return _meet((one.shape, one.stride()), (other.shape, other.stride()), sizes, distance)


@lru_cache(maxsize=4096)  # recurrent layers ask this of the same few places at every time
def _meet(one: _Layout, other: _Layout, sizes: tuple[int, int], distance: int) -> bool:
    """Whether tensors whose first elements are some bytes apart meet; `sizes` are those of an element of each."""
    if 0 in one[0] or 0 in other[0]:
        return False
    reach: dict[int, tuple[int, int]] = {1: (1 - sizes[1], sizes[0] - 1)}
    """How often each stride, in bytes, may be taken on the way from the other's first element to one of this."""
    for (shape, strides), size, sign in ((one, sizes[0], 1), (other, sizes[1], -1)):
        for length, stride in zip(shape, strides, strict=True):
            low, high = reach.get(stride * size, (0, 0))
            steps = sign * (length - 1)
            reach[stride * size] = low + min(steps, 0), high + max(steps, 0)
    reach.pop(0, None)
    return _is_reached(distance, [(stride, *reach[stride]) for stride in sorted(reach, reverse=True)])


def _is_reached(distance: int, ways: Sequence[tuple[int, int, int]]) -> bool:
    """Whether strides, each taken so many times as its bounds allow, add up to a distance."""
    if not ways:
        return distance == 0
    (stride, low, high), rest = ways[0], ways[1:]
    below, above = sum(s * least for s, least, _ in rest), sum(s * most for s, _, most in rest)
    first, last = -((above - distance) // stride), (distance - below) // stride
    return any(_is_reached(distance - n * stride, rest) for n in range(max(low, first), min(high, last) + 1))


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are names of the same elements, in the same order."""
    if one is other:
        return True
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def counted_together(written: Tensor, other: Tensor) -> bool:
    """Whether autograd, which refuses writes to what it has kept, takes writes to one tensor for writes to the other.

    Args:
        written: which is about to be written to.
        other: in the same place.
    """
    before = other._version
    increment_version(written)
    return other._version != before
