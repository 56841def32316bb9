"""Calls of torch's functions that leave no trace, or another one, below autograd: seen while something records."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.draws_apart import DRAW_INSIDE, drawing_apart
from lightning_ebm.program.named import named
from lightning_ebm.program.user_hooks import Heard

if TYPE_CHECKING:
    from lightning_ebm.program.recorder import Recorder

_BACKWARD = ("gradient", "retain_graph", "create_graph", "inputs")


class TorchCalls(TorchFunctionMode):
    """Tells a recorder of them."""

    def __init__(self, recorder: "Recorder") -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if recorder.pausing.depth or func not in _SEEN:
            return func(*args, **kwargs)
        if func in _DETACHES:
            return self._detached(func, args, kwargs)
        if func == SET_DATA:  # another object at every look
            recorder.contents.about_to_move(args[0])
            with recorder.pausing():
                func(*args, **kwargs)
            return recorder.contents.forget(args[0])
        if func is _BACKWARD_OF:
            options = {**dict(zip(_BACKWARD, args[1:], strict=False)), **kwargs}
            if recorder.takes_care(args[0], options.pop("gradient", None), options):
                return None
            with recorder.asking_nobody():
                return func(*args, **kwargs)
        if func in DRAW_INSIDE:
            with drawing_apart(func, args, kwargs):
                return func(*args, **kwargs)
        if func is F.gumbel_softmax:
            return self._gumbel_softmax(*args, **kwargs)
        if func in MAY_WRITE:
            recorder.contents.about_to_share(args[0])
            return func(*args, **kwargs)
        if func == _GRAPH:
            recorder.record.reads_graph = True
            return func(*args, **kwargs)
        if func is _RETAIN:
            func(*args, **kwargs)
            recorder.contents.retained.append(args[0])
            return None
        if func is _HOOK:
            return self._hook(func, args, kwargs)
        return func(*args, **kwargs)

    def _detached(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        before, recorder.asked = recorder.asked, True
        try:
            result = func(*args, **kwargs)
        finally:
            recorder.asked = before
        if func in _IN_PLACE:
            recorder.contents.forget(args[0])
        return result

    def _hook(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A hook on the gradient of a tensor: those of the user's, on what is computed, are part of the program."""
        recorder = self._recorder
        tensor, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
        value, owner = recorder.contents.known(tensor), named(hook).module
        if owner == "torch.autograd.graph" and value is not None and value.node is not None:
            raise UnsupportedModuleError(
                "The step puts torch.autograd.graph.register_multi_grad_hook on tensors that it computes: the hook"
                " waits for all of their gradients in one backward pass, and a relaxation has many, in each of"
                " which it would be told of errors. Use tensor.register_hook(...) on each, or put it on parameters."
                " FlopCounterMode and ModuleTracker of torch.utils put such hooks: run them around a forward pass of"
                " their own, under torch.no_grad(), and not around a step."
            )
        if owner.startswith("lightning.fabric."):  # it only checks who calls backward, and here a learner does
            return RemovableHandle(OrderedDict())
        if owner.startswith("torch.distributed."):  # it tells FSDP when gradients are about to come
            return func(*args, **kwargs)
        if value is not None and value.node is not None and tensor.requires_grad:
            heard = Heard(hook)
            recorder.record.hooks.setdefault(value, []).append(heard)
            recorder.record.heard.append(heard)
            recorder.record.has_hooks = True
            return func(tensor, heard)
        return func(*args, **kwargs)

    def _gumbel_softmax(
        self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> Tensor:
        """The same, operation by operation: torch's own detaches where no mode sees it."""
        soft = F.gumbel_softmax(logits, tau=tau, eps=eps, dim=dim)
        if not hard:
            return soft
        index = soft.max(dim, keepdim=True)[1]
        picked = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format).scatter_(dim, index, 1.0)
        with self:
            cut = soft.detach()
        return picked - cut + soft


_TENSOR: Any = Tensor  # of which `data` and `grad_fn` are descriptors, where types say what they give
SET_DATA, _BACKWARD_OF, _HOOK = _TENSOR.data.__set__, Tensor.backward, Tensor.register_hook
_IN_PLACE = frozenset({Tensor.detach_, torch.detach_})
_DETACHES = frozenset({Tensor.detach, torch.detach, _TENSOR.data.__get__, torch.tensor, _TENSOR.new_tensor, *_IN_PLACE})
MAY_WRITE: frozenset[Any] = frozenset(
    {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage}
    | {_TENSOR.apply_, _TENSOR.map_, _TENSOR.map2_}
)
"""They write without an operation, or hand the memory to others who may."""
_GRAPH = _TENSOR.grad_fn.__get__
_RETAIN = Tensor.retain_grad
_SEEN = _DETACHES | MAY_WRITE | DRAW_INSIDE | {F.gumbel_softmax, SET_DATA, _HOOK, _RETAIN, _BACKWARD_OF, _GRAPH}
