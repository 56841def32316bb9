"""Where views lie in the memory they share."""

import torch
from torch import Tensor

Place = tuple[int, torch.Size, tuple[int, ...]]
"""Where in its memory a tensor lies: offset, sizes, strides."""


def place_of(tensor: Tensor) -> Place:
    return int(tensor.storage_offset()), tensor.shape, tensor.stride()


def apart(one: Place, other: Place) -> bool:
    """Whether two views surely have no element in common: boxes apart in the grid that both are cut from."""
    (start, sizes, strides), (start_2, sizes_2, strides_2) = one, other
    if strides != strides_2 or 0 in strides:
        return False
    distance, disjoint, spans = start_2 - start, False, []
    for d in sorted(range(len(strides)), key=lambda d: -strides[d]):
        shift, distance = divmod(distance, strides[d])
        disjoint = disjoint or shift >= sizes[d] or shift + sizes_2[d] <= 0
        spans.append((max(sizes[d], shift + sizes_2[d]) - min(0, shift) - 1, strides[d]))
    reach = 0
    for span, stride in reversed(spans):  # a grid: the smaller strides together do not reach the next larger one
        if reach >= stride and span:
            return False
        reach += span * stride
    return disjoint and distance == 0
