"""Operations that code is made of others for, where torch's own kernel takes several times as long.

Pooling by means: on processors torch's kernel takes one element of a dense tensor at a time, forward and back, and sums
of its rows and columns take a fifth to a half of that, on any processor (`benchmarks/run.py --only pooling`).
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

_WIDEST = 4
"""Windows of a larger side are few, and their sums are long."""


def mean_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor | None:
    """`aten.avg_pool2d`, ``(..., H, W)`` to ``(..., H / high, W / wide)``; None where windows overlap or stick out."""
    window = _tiles(x, kernel, stride, padding, divisor)
    if window is None:
        return None
    high, wide = window
    rows = x.unflatten(-2, (-1, high))
    sums = reduce(torch.add, [rows.select(-2, k) for k in range(high)])
    found: Tensor = reduce(torch.add, [sums[..., k::wide] for k in range(wide)])
    return found * (1 / (high * wide))


def mean_pool_slope(
    slope: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor | None:
    """`aten.avg_pool2d_backward`: every element of a window is sent the same share."""
    window = _tiles(x, kernel, stride, padding, divisor)
    if window is None:
        return None
    high, wide = window
    share = slope * (1 / (high * wide))
    row = share.unsqueeze(-1).expand(*share.shape, wide).flatten(-2)
    return torch.stack([row] * high, -2).flatten(-3, -2)


def _tiles(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], divisor: int | None
) -> tuple[int, int] | None:
    """Height and width of windows that lie side by side and cover a dense tensor; None for others."""
    high, wide = kernel[0], kernel[-1]
    steps = (stride[0], stride[-1]) if stride else (high, wide)
    dense = x.device.type == "cpu" and x.is_contiguous() and x.dtype in (torch.float32, torch.float64)
    covers = steps == (high, wide) and not any(padding) and divisor is None
    whole = x.shape[-2] % high == 0 and x.shape[-1] % wide == 0
    return (high, wide) if dense and covers and whole and max(high, wide) <= _WIDEST else None


DECOMPOSITIONS: dict[Any, Callable[..., Tensor | None]] = {
    _aten.avg_pool2d.default: mean_pool,
    _aten.avg_pool2d_backward.default: mean_pool_slope,
}
"""By operation; each gives None where the operation itself is to run."""
