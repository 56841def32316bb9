"""Complex arithmetic for programs that were recorded with real numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.operations import is_operator
from lightning_ebm.program.tensors import tensors_in

_aten = torch.ops.aten


class ComplexOperations(TorchFunctionMode):
    """Real tensors that meet complex ones become complex; operations that torch has for real ones only are continued.

    Continued analytically: softmax, log-softmax, mean squared error, the negative log-likelihood. Linear maps that
    torch refuses for complex numbers (pooling, interpolation) act on real and imaginary part. What has no slope
    (comparisons, argmax) sees real parts. Everything else that torch refuses is an error that says so.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if not is_operator(func):
            return func(*args, **options)
        dtype = next((t.dtype for t in tensors_in((args, options)) if t.is_complex()), None)
        if dtype is None:
            return func(*args, **options)
        packet = func.overloadpacket
        if packet in _LOOKING:
            return func(*tree_map_only(Tensor, _real, args), **options)
        if packet in _BY_PARTS:
            first, *others = args
            return torch.complex(func(first.real, *others, **options), func(first.imag, *others, **options))
        if (continued := _CONTINUED.get(packet)) is not None:
            return continued(*args, **options)

        def promoted(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        try:
            return func(*tree_map_only(Tensor, promoted, args), **tree_map_only(Tensor, promoted, options))
        except RuntimeError as error:
            raise UnsupportedModuleError(
                f"{packet.__name__} is no analytic function, or torch has no complex form of it"
                f" ({str(error).splitlines()[0]}): a holomorphic nudge needs states around a circle in the complex"
                " plane. Take ebm.Centered(...), the same with two real points, or tanh, sigmoid and linear maps."
            ) from error


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor


def log_softmax(x: Tensor, axis: int, half_to_float: bool = False) -> Tensor:
    """x - log sum exp x along the axis, of complex numbers."""
    shifted = x - x.real.detach().amax(axis, keepdim=True)
    return shifted - shifted.exp().sum(axis, keepdim=True).log()


def _softmax(x: Tensor, axis: int, half_to_float: bool = False) -> Tensor:
    return log_softmax(x, axis).exp()


def _reduced(values: Tensor, reduction: int) -> Tensor:
    return (values, values.mean(), values.sum())[reduction] if reduction else values


def _mse(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced((x - target).square(), reduction)


def _nll(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int) -> tuple[Tensor, Tensor]:
    """-x at the targets, and the weight of all of them together."""
    axis = 1 if x.ndim > 1 else 0
    kept = target != ignored
    safe = target.masked_fill(~kept, 0)
    weights = kept.to(x.real.dtype) if weight is None else kept * weight[safe]
    losses = -weights * x.gather(axis, safe.unsqueeze(axis)).squeeze(axis)
    total = weights.sum()
    return (losses if reduction == 0 else losses.sum() / total if reduction == 1 else losses.sum()), total


def _cast(x: Tensor, **options: Any) -> Tensor:
    dtype = options.get("dtype")
    if dtype is not None and dtype.is_floating_point:
        options["dtype"] = dtype.to_complex()
    found: Tensor = _aten._to_copy.default(x, **options)
    return found


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Linear in the input and in the weight, by their parts."""

    def of(image: Tensor, kernel: Tensor) -> Tensor:
        found: Tensor = _aten.convolution.default(image, kernel, None, *options)
        return found

    real, imaginary = of(x.real, weight.real), of(x.imag, weight.real) if x.is_complex() else None
    if weight.is_complex():
        across = of(x.real, weight.imag)
        real = real - of(x.imag, weight.imag) if x.is_complex() else real
        imaginary = across if imaginary is None else imaginary + across
    assert imaginary is not None
    found = torch.complex(real, imaginary)
    return found if bias is None else found + bias.view(-1, *[1] * (x.ndim - 2))


_CONTINUED: dict[Any, Callable[..., Any]] = {
    _aten._log_softmax: log_softmax,
    _aten._softmax: _softmax,
    _aten.mse_loss: _mse,
    _aten.nll_loss_forward: _nll,
    _aten.nll_loss2d_forward: _nll,
    _aten._to_copy: _cast,
    _aten.convolution: _convolution,
}
_BY_PARTS = {
    _aten.avg_pool1d, _aten.avg_pool2d, _aten.avg_pool3d, _aten._adaptive_avg_pool2d, _aten._adaptive_avg_pool3d,
    _aten.adaptive_avg_pool1d, _aten.upsample_nearest1d, _aten.upsample_nearest2d, _aten.upsample_linear1d,
    _aten.upsample_bilinear2d, _aten.upsample_bicubic2d,
}  # fmt: skip
_LOOKING = {
    _aten.argmax, _aten.argmin, _aten.lt, _aten.le, _aten.gt, _aten.ge, _aten.isfinite, _aten.isnan, _aten.isinf,
    _aten.sign, _aten.bernoulli, _aten.argsort,
}  # fmt: skip
