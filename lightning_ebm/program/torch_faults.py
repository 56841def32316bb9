"""Operations of torch that fail where only a relaxation calls them, and what runs in their place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_native = torch.ops.aten.native_group_norm.default
_cross_entropy = torch.ops.aten.binary_cross_entropy.default
_cholesky = torch.ops.aten.linalg_cholesky_ex.default
_raises = torch.ops.aten._linalg_check_errors.default
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def group_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`native_group_norm` whose backward may be asked for the slopes of scale and shift alone.

    On a CPU, and channels last, torch's own (seen up to 2.13) then writes to memory that it has not taken, and ends the
    process. A network in training asks so where nothing below a norm learns; one that is cut at states wherever a
    state stands before a norm. The result lies in memory as torch's does.
    """
    form = _CHANNELS_LAST.get(x.ndim)
    if form is None or x.device.type != "cpu" or not x.is_contiguous(memory_format=form):
        found: tuple[Tensor, Tensor, Tensor] = _native(x, *rest)
        return found
    result, mean, deviation = _native(x.clone(memory_format=torch.contiguous_format), *rest)
    return result.contiguous(memory_format=form), mean, deviation


def binary_cross_entropy(p: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    """`F.binary_cross_entropy` that is nan where a probability is none, as log(p) is.

    Torch's own raises there. A relaxer tries such points where a state stands at the sigmoid, and goes less far when it
    is told that there is no energy.
    """
    outside = ~((p >= 0) & (p <= 1))
    found: Tensor = _cross_entropy(torch.where(outside, 0.5, p), y, weight, 0)
    beyond = torch.where(outside, p, 0.5)
    found = found + 0 * (beyond * (1 - beyond)).sqrt()  # nan, and with it its slope, of these elements alone
    return found if reduction == 0 else found.mean() if reduction == 1 else found.sum()


def cholesky(matrix: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex` that is nan where a matrix has no factor; the check that follows it raises."""
    factor, info = _cholesky(matrix, **options)
    return factor * torch.where((info > 0)[..., None, None], torch.nan, 1.0).to(factor), info


def unchecked(info: Tensor, name: str, *, is_matrix: bool) -> None:
    """`torch.linalg.inv` and its like of singular matrices: infinite or nan, which says it as well."""


IN_PLACE_OF: dict[Any, Callable[..., Any]] = {
    _native: group_norm, _cross_entropy: binary_cross_entropy, _cholesky: cholesky, _raises: unchecked,
}  # fmt: skip
"""What a record runs in the place of an operation."""
