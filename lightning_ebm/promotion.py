"""Complex arithmetic for networks written with real numbers in mind."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_ebm.errors import UnsupportedModuleError


class Promoted(TorchFunctionMode):
    """Real tensors that meet complex ones become complex; functions that torch knows for real ones only are continued.

    Continued analytically: mean squared error, softmax, log-softmax, cross-entropy. Linear maps that torch refuses for
    complex numbers (pooling, dropout) act on real and imaginary part. What looks at values without being differentiated
    (argmax, comparisons, ``item``) sees real parts. Everything else that torch refuses is an error that says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Promoted":
        self._hooks = [
            every_module.register_module_forward_pre_hook(lambda module, args: self._inside.append(module)),
            every_module.register_module_forward_hook(lambda module, args, output: self._left(), always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _left(self) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        leaves = pytree.tree_leaves((args, options))
        dtype = next((t.dtype for t in leaves if isinstance(t, Tensor) and t.is_complex()), None)
        if dtype is None or func in _TRANSPARENT:
            return func(*args, **options)
        if func in _LOOKING:
            return func(*pytree.tree_map(_real, args), **options)
        if func in _BY_PARTS:
            first, *others = args
            generator = torch.get_rng_state()
            real = func(first.real, *others, **options)
            torch.set_rng_state(generator)
            return torch.complex(real, func(first.imag, *others, **options))
        if (continued := _CONTINUED.get(func)) is not None:
            return continued(*args, **options)

        def promoted(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        try:
            return func(*pytree.tree_map(promoted, args), **pytree.tree_map(promoted, options))
        except RuntimeError as error:
            name = getattr(func, "__name__", str(func))
            where = f" in {type(self._inside[-1]).__name__}" if self._inside else ""
            raise UnsupportedModuleError(
                f"{name}{where} is no analytic function, or torch has no complex form of it"
                f" ({str(error).splitlines()[0]}): a holomorphic nudge needs states around a circle in the complex"
                " plane. Take ebm.Centered(...), the same with two real points, or tanh, sigmoid and linear maps."
            ) from error


def _real(leaf: Any) -> Any:
    return leaf.real if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def log_softmax(x: Tensor, axis: int) -> Tensor:
    """x - log sum exp x along the axis, of complex numbers."""
    shifted = x - x.real.detach().amax(axis, keepdim=True)
    return shifted - shifted.exp().sum(axis, keepdim=True).log()


def _log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return log_softmax(input, -1 if dim is None else dim)


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return _log_softmax(input, dim).exp()


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return values.mean() if reduction == "mean" else values.sum() if reduction == "sum" else values


def _mse(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    squared = (input - target).square()
    return _reduced(squared if weight is None else weight * squared, reduction)


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    axis = 1 if input.ndim > 1 else 0
    terms, even = -_log_softmax(input, axis), label_smoothing / input.shape[axis]
    if weight is not None:
        terms = terms * weight.view([-1 if d == axis else 1 for d in range(input.ndim)])
    if target.is_floating_point():
        return _reduced((((1 - label_smoothing) * target + even) * terms).sum(axis), reduction)
    kept = target != ignore_index
    safe = target.masked_fill(~kept, 0)
    losses = (1 - label_smoothing) * terms.gather(axis, safe.unsqueeze(axis)).squeeze(axis)
    losses = kept * (losses + even * terms.sum(axis) if label_smoothing else losses)
    if reduction != "mean":
        return _reduced(losses, reduction)
    return losses.sum() / (kept.sum() if weight is None else (kept * weight[safe]).sum())


_CONTINUED: dict[Any, Callable[..., Tensor]] = {
    F.mse_loss: _mse,
    F.cross_entropy: _cross_entropy,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
}
_BY_PARTS = {F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.dropout, F.interpolate}
_LOOKING = {
    torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, Tensor.item, Tensor.tolist, Tensor.__float__,
    Tensor.__lt__, Tensor.__le__, Tensor.__gt__, Tensor.__ge__, torch.lt, torch.le, torch.gt, torch.ge,
    torch.isfinite, Tensor.isfinite, Tensor.__format__,
}  # fmt: skip
_ATTRIBUTES = ("real", "imag", "dtype", "shape", "requires_grad", "grad_fn", "device", "ndim")
_TRANSPARENT = {
    Tensor.detach, Tensor.requires_grad_, Tensor.is_complex, Tensor.is_floating_point, Tensor.to, Tensor.size,
    Tensor.dim, *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
}  # fmt: skip
