"""Operations of torch that fail where only a relaxation calls them, and what runs in their place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_native = torch.ops.aten.native_group_norm.default
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


IN_PLACE_OF: dict[Any, Callable[..., Any]] = {_native: group_norm}
"""What a record runs in the place of an operation."""
