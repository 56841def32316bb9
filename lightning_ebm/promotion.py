"""Complex arithmetic for networks written with real numbers in mind."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_ebm.errors import UnsupportedModuleError


class Promoted(TorchFunctionMode):
    """Real tensors that meet complex ones become complex; functions that torch knows for real ones only are continued.

    Continued analytically: mean squared error, softmax, log-softmax, cross-entropy. Linear maps that torch refuses for
    complex numbers (pooling, dropout) act on real and imaginary part. What looks at values without being differentiated
    (argmax, comparisons, ``item``) sees real parts. Everything else that torch refuses is an error that says so.
    """

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
            raise UnsupportedModuleError(
                f"{name} is no analytic function, or torch has no complex form of it ({str(error).splitlines()[0]}): a"
                " holomorphic nudge needs states around a circle in the complex plane. Take ebm.Centered(...), which is"
                " the same with two real points, or tanh, sigmoid and linear maps throughout."
            ) from error


def _real(leaf: Any) -> Any:
    return leaf.real if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def _log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    axis = -1 if dim is None else dim
    shifted = input - input.real.detach().amax(axis, keepdim=True)
    return shifted - shifted.exp().sum(axis, keepdim=True).log()


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
    if weight is not None or bool((target == ignore_index).any()):
        raise UnsupportedModuleError(
            "cross_entropy with class weights or ignored targets has no complex form here: a holomorphic nudge needs"
            " one. Take ebm.Centered(...), or an unweighted loss."
        )
    axis = 1 if input.ndim > 1 else 0
    if not target.is_floating_point():
        target = F.one_hot(target, input.shape[axis]).movedim(-1, axis).to(input.real.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / input.shape[axis]
    return _reduced(-(target * _log_softmax(input, axis)).sum(axis), reduction)


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
_TRANSPARENT = {
    Tensor.detach, Tensor.requires_grad_, Tensor.real.__get__, Tensor.imag.__get__, Tensor.dtype.__get__,
    Tensor.shape.__get__, Tensor.is_complex, Tensor.is_floating_point, Tensor.to, Tensor.size, Tensor.dim,
    Tensor.requires_grad.__get__, Tensor.grad_fn.__get__, Tensor.device.__get__, Tensor.ndim.__get__,
}  # fmt: skip
