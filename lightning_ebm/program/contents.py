"""What the tensors of a pass hold, as values of its record, while they are written to, moved and let go.

Longer than 300 lines, as all of it changes the same few tables.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.aliasing import Aliasing, Make, base_of
from lightning_ebm.program.before import Before
from lightning_ebm.program.left import Left
from lightning_ebm.program.not_recorded import not_dense, unrecorded
from lightning_ebm.program.pause import Pause
from lightning_ebm.program.record import Record, Value, is_leaf, meta_of, outside_meta_of
from lightning_ebm.program.unseen_writes import UnseenWrites


class Contents:
    """The value that each tensor holds now.

    Args:
        record: of the pass.
        before: notes what tensors held that were there before the pass.
        pausing: the recorder's.

    Attributes:
        held: what values hold that the pass computed, as long as the record is not released.
        retained: whose gradients the user wants to see, see `Tensor.retain_grad`.
        losses: what the pass is differentiated for.
        bindings: what each tensor holds, by its id, which may be another's by now.
    """

    def __init__(self, record: Record, before: Before, pausing: Pause) -> None:
        self.held: dict[Value, Tensor] = {}
        self.retained: list[Tensor] = []
        self.losses: list[Value] = []
        self.before = before
        self._record = record
        self._pausing = pausing
        # torch's own kind: by a plain one, older versions hand out tensors that they then take the contents of.
        self.bindings: dict[int, tuple[TensorWeakRef, Value]] = {}
        self._marked, self._frozen = set[Value](), set[Value]()
        self._written_over: list[Tensor] = []
        self._shared: set[int] = set()
        self._read: dict[int, TensorWeakRef] = {}
        self._made: dict[int, TensorWeakRef] = {}
        self._aliasing = Aliasing()
        self._unseen = UnseenWrites()

    # Reading

    def value(self, tensor: Tensor) -> Value:
        """What a tensor holds now."""
        known = self.bindings.get(id(tensor))
        if known is not None and known[0].ref() is tensor:
            value = known[1]
            if value.poison is not None:
                raise UnsupportedModuleError(value.poison)
            if value.node is not None or self.is_as_read(tensor, value):
                return value
        return self.from_outside(tensor)

    def is_as_read(self, tensor: Tensor, value: Value) -> bool:
        """Whether what a tensor holds has not been frozen, or set free, since it was read from outside."""
        return value.meta[-1] is is_leaf(tensor)

    def known(self, tensor: Tensor) -> Value | None:
        """What a tensor holds now, if the record knows."""
        known = self.bindings.get(id(tensor))
        return known[1] if known is not None and known[0].ref() is tensor else None

    def are_fixed(self, args: Iterable[Any]) -> bool:
        """Whether tensors hang neither on parameters nor on layers: what is computed from them is a constant.

        From the batch and from buffers a step may compute whatever it likes, and in another way each time. Frozen
        parameters are none of them, as what they feed may be predicted, and they may be thawed.
        """
        for arg in args:
            if isinstance(arg, Tensor):
                if arg.requires_grad or type(arg) is nn.Parameter:
                    return False
                known = self.known(arg)
                if known is not None and (known.node is not None or known.poison is not None):
                    return False
            elif type(arg) in (list, tuple) and not self.are_fixed(arg):
                return False
        return True

    def are_from_before(self, args: Iterable[Any]) -> bool:
        """Whether all tensors were computed before the pass, with a graph, and it has only their shapes."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return all(t.requires_grad and not t.is_leaf and self.known(t) is None for t in tensors)

    def notice(self, read: Iterable[Any], made: Iterable[Any], views: bool) -> None:
        """A constant was computed: of what was read no more is known, and what was made may be written to.

        Args:
            read: what it was computed from, tensors among it.
            made: what it is.
            views: whether that lies in the same memory.
        """
        before = {id(tensor): TensorWeakRef(tensor) for tensor in read if isinstance(tensor, Tensor)}
        now = {id(tensor): TensorWeakRef(tensor) for tensor in made if isinstance(tensor, Tensor)}
        self._read.update(before)
        if views:
            self._aliasing.seen.extend((*before.values(), *now.values()))
        else:
            self._made.update(now)

    def has_read(self, tensor: Tensor) -> bool:
        """Whether the pass has computed anything from a tensor."""
        return self.known(tensor) is not None or _is_among(tensor, self._read)

    def unread(self, tensor: Tensor) -> list[Tensor]:
        """What has elements in common with a tensor and was noticed alone, so that nothing is known of it."""
        return [alias for alias in self.others(tensor) if self.known(alias) is None and not alias.requires_grad]

    def others(self, tensor: Tensor) -> list[Tensor]:
        """See `Aliasing.others`."""
        return self._aliasing.others(tensor)

    # Binding

    def from_outside(self, tensor: Tensor, value: Value | None = None) -> Value:
        """Notes what a tensor holds that nothing here computed: a new value, or that of a known pass."""
        sparse = tensor.layout is not torch.strided
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or (sparse and tensor.requires_grad):
            raise not_dense(tensor)
        if tensor.requires_grad and not tensor.is_leaf:
            raise unrecorded(tensor)
        value = value or Value(None, outside_meta_of(tensor))
        self._record.inputs[value] = tensor
        if is_leaf(tensor):
            self._record.leaves[value] = tensor
        elif not sparse and self._is_shared(tensor):  # others may write to it before it is read again
            with self._pausing():
                content = tensor.detach().clone(memory_format=torch.preserve_format)
            self._record.inputs[value] = content
            self._unseen.shared(tensor, content, value)
            return value
        self.bind(tensor, value)
        return value

    def bind(self, tensor: Tensor, value: Value, keeps: bool = False) -> None:
        """A tensor holds a value, also one that another tensor held when it was recorded.

        Args:
            tensor: which.
            value: what it holds.
            keeps: whether it is kept, for what is recalled of the pass. Views must not be: autograd would hand out
                another tensor in their place, which nobody here knows.
        """
        if keeps:
            self.held[value] = tensor
        ref = TensorWeakRef(tensor)
        self.bindings[id(tensor)] = ref, value
        self._aliasing.seen.append(ref)

    def rebind(self, tensor: Tensor, value: Value | None) -> Value | None:
        """What a tensor holds; given a value, it holds that from now on."""
        if value is not None:
            self.bindings[id(tensor)] = TensorWeakRef(tensor), value
        return self.known(tensor)

    def rename(self, tensor: Tensor, value: Value, now: Value) -> None:
        """What the tensor holds is another value from now on, and what its other names hold (detached ones, say)."""
        for alias in [tensor, *self.others(tensor)]:
            if self.known(alias) is value:
                self.bind(alias, now)

    def holding(self, value: Value) -> list[Tensor]:
        """The tensors that hold a value."""
        return [tensor for ref, known in [*self.bindings.values()] if known is value and (tensor := ref()) is not None]

    def poison(self, tensor: Tensor, why: str) -> None:
        """Whoever reads the tensor is refused."""
        value = Value(None, meta_of(tensor))
        value.poison = why
        self.bindings[id(tensor)] = TensorWeakRef(tensor), value

    def aliased(self, result: Tensor, tensor: Tensor) -> Tensor:
        """A result that holds what the tensor holds."""
        known = self.known(tensor)
        if known is None and tensor.requires_grad:
            known = self.value(tensor)
        if known is not None:
            self.bind(result, known)
        return result

    def mark(self, output: Tensor, state: Value) -> None:
        """A call returned the tensor: from here on it holds a state."""
        self.bind(output, state, keeps=True)
        self._marked.add(state)

    def written(self, tensor: Tensor, now: Value, make: Make) -> None:
        """A write is over: notes, by `make`, the operations that give what shares its memory what that holds now."""
        self.held.pop(now, None)
        for alias in self.others(tensor):
            if not alias.requires_grad and base_of(alias) is not base_of(tensor):
                self.forget(alias)  # detached: autograd does not see the write there, and a constant is read anew
        self._aliasing.written(tensor, now, self.rebind, self.poison, make)
        self.bind(tensor, now, keeps=not tensor._is_view())

    # Writing

    def about_to_write(self, written: Sequence[Tensor]) -> None:
        """What the record holds of this memory is copied before it changes."""
        self._unseen.over()
        for tensor in written:
            for alias in [tensor, *self.others(tensor)]:
                value = self.known(alias)
                if value is None:
                    continue
                self._unseen.about_to_write(alias, value)
                if value.node is None and alias is not tensor:  # a view of it is written to
                    self.before.written(alias)
                if self._record.inputs.get(value) is alias:
                    self._record.inputs[value] = alias.detach().clone()
                held = self.held.pop(value, None)
                if held is not None:
                    self._written_over.append(held)  # still there: what shares its memory is read from it
                content = None
                while value in self._marked:  # what the call returned, under each name that it was marked by
                    if content is None:
                        assert held is not None
                        content = held.detach().clone()
                    self.held[value] = content
                    assert value.node is not None
                    value = value.node.args[0]
                    if self.held.pop(value, None) is not None:
                        self.held[value] = content
            now = self.known(tensor)
            if (now is None or now.node is None) and not _is_among(base_of(tensor), self._made):
                self.before.written(tensor)

    def unseen_by_autograd(self, written: Sequence[Tensor]) -> bool:
        """Whether a detached alias is written to: the graph of what shares its memory stays as it is."""
        return any(
            not tensor.requires_grad
            and tensor.grad_fn is None
            and any(alias.requires_grad for alias in self._aliasing.others(tensor))
            for tensor in written
        )

    def constant(self, tensor: Tensor) -> Value:
        """What was drawn has no slope, whatever autograd makes of it later."""
        value = Value(None, outside_meta_of(tensor))
        self.bind(tensor, value)
        self._record.inputs[value] = tensor
        return value

    def freeze(self, value: Value) -> Value:
        """The constant that stands for a computed value from now on; itself if it is one."""
        if value.node is None:
            return value
        holding = self.holding(value)
        constant = self.constant(holding[0])
        self._frozen.add(constant)
        for tensor in holding[1:]:
            self.bind(tensor, constant)
        return constant

    def is_choice(self, tensor: Tensor) -> bool:
        """Whether it holds truth values or integers that the pass has computed, or that have been frozen since."""
        value = self.known(tensor)
        if value is None or value.is_continuous:
            return False
        return value.node is not None or value in self._frozen

    def constant_from_now(self, tensor: Tensor, but: Sequence[Tensor] = ()) -> None:
        """Written to while gradients are off: what it holds from now on is a constant, or a leaf's new value.

        Args:
            tensor: which; and all that shares its memory.
            but: what is known to hold something else.
        """
        for alias in [tensor, *self.others(tensor)]:
            value = self.known(alias)
            if value is None or value.poison is not None or any(alias is one for one in but):
                continue
            if self._is_computed(alias, value):
                self.poison(
                    alias,
                    "The step writes, while gradients are off (under no_grad, or through .data or detach()), to a"
                    " tensor that was computed from parameters or states: autograd does not see the write, and the"
                    " update would be that of another loss. Write out of place: x = x.clamp(0, 1).",
                )
            else:
                self.forget(alias)

    def gained(self, tensor: Tensor) -> None:
        """A detached alias was written to with what has a gradient: whoever reads it is refused."""
        for alias in [tensor, *self.others(tensor)]:
            if base_of(alias) is base_of(tensor):
                self.poison(
                    alias,
                    "The step writes what has a gradient to a detached tensor (x.detach(), x.data), and thereby to x:"
                    " autograd takes the one for computed, and the other for what it was. Write to a copy,"
                    " x.detach().clone().",
                )

    def computed_in(self, tensor: Tensor) -> list[Tensor]:
        """What lies in a tensor's memory and was computed from parameters or states, in autograd's eyes too."""
        known = [(alias, self.known(alias)) for alias in [tensor, *self.others(tensor)]]
        return [alias for alias, value in known if value is not None and self._is_computed(alias, value)]

    @staticmethod
    def _is_computed(tensor: Tensor, value: Value) -> bool:
        if value.poison is not None or value.node is None or value.node.func is None:
            return False
        return tensor.requires_grad and not tensor.is_leaf

    def about_to_move(self, tensor: Tensor) -> None:
        """The tensor is about to be given other memory: the record goes on with that which it has."""
        value = self.known(tensor)
        with self._pausing():
            self.before.moved(tensor)
            if value is None:
                return
            self._unseen.moved(value)
            if self._record.inputs.get(value, self._record.leaves.get(value)) is tensor:
                self._record.inputs[value] = tensor.detach()
            if self.held.get(value) is tensor:
                self.held[value] = tensor.detach()

    def about_to_share(self, tensor: Tensor) -> None:
        """Others (NumPy) may write to the tensor's memory from now on, and nobody would see it."""
        with self._pausing():
            self.about_to_write([tensor])
            self._unseen.lent()
        for alias in [tensor, *self.others(tensor)]:
            if not alias.requires_grad:
                self.forget(alias)
        self._shared.add(tensor.untyped_storage().data_ptr())

    def _is_shared(self, tensor: Tensor) -> bool:
        """Whether its memory is NumPy's, other processes', or was handed out: what it holds is read at every use."""
        with self._pausing():
            memory = tensor.untyped_storage()
        return not memory.resizable() or memory.data_ptr() in self._shared

    def forget(self, tensor: Tensor) -> None:
        """What the tensor holds is read anew."""
        self.bindings.pop(id(tensor), None)

    # The end

    def undo(self) -> None:
        """Puts back what was written to tensors that had been there before; the record keeps what it read of them."""
        with self._pausing():
            self.before.restore(lambda tensor: self.about_to_write([tensor]))

    def settle(self) -> None:
        """The pass is over: leaves that it made itself are among those of the record."""
        with self._pausing():
            self._record.overwritten |= self._unseen.found()
        # What makes a tensor like another hands on a copy if it is held here: torch.zeros_like(h) is another than this.
        made = [(value, ref()) for ref, value in self.bindings.values() if value.node is not None]
        others = [(value, tensor) for value, tensor in made if tensor is not self.held.get(value)]
        for value, tensor in (*self.held.items(), *others):
            if tensor is not None and value not in self._record.leaves and is_leaf(tensor):
                self._record.leaves[value] = tensor

    def left(self) -> Left:
        """What somebody may have kept of the pass, without keeping it."""
        return Left(list(self.bindings.values()), self.losses)

    def release(self) -> None:
        """Lets go of all tensors but those that the record needs."""
        self.held.clear()
        self.retained.clear()
        self._written_over.clear()
        self.bindings.clear()
        self._read.clear()
        self._made.clear()
        self._aliasing, self._unseen = Aliasing(), UnseenWrites()


def _is_among(tensor: Tensor, refs: dict[int, TensorWeakRef]) -> bool:
    found = refs.get(id(tensor))
    return found is not None and found.ref() is tensor
