"""Which elements a pass has picked: how many they are belongs to the recorded program, and so does what says which."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.contents import Contents
from lightning_ebm.program.operations import BY_MASK, PUT_BY_MASK, Traits
from lightning_ebm.program.record import Node, Value, is_continuous

_SLOPED = BY_MASK | {"_ctc_loss", "linalg_lstsq"}
"""Operations that have a slope, though the shape of what they give depends on values."""
_TRUTH = (torch.bool, torch.uint8)
"""Kinds of numbers that masks are of."""


def picks(contents: Contents, kind: Traits, args: Sequence[Any]) -> bool:
    """Whether the result says which elements were picked: it is a constant, as is from now on what it was read off.

    Positions (`nonzero`, `unique`), and integers that a mask picks: they go with others that the mask has cut.
    """
    if kind.dynamic and kind.name not in _SLOPED:
        for tensor in args:
            if isinstance(tensor, Tensor) and contents.is_choice(tensor):
                contents.freeze(contents.value(tensor))
        return True
    if kind.name not in BY_MASK or is_continuous(args[0].dtype):
        return False
    masks = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    return any(mask is not None and mask.dtype in _TRUTH and contents.is_choice(mask) for mask in masks)


def counts(contents: Contents, args: Sequence[Any], written: Sequence[Tensor]) -> bool:
    """Whether a write counts, by numbers, on an integer from outside, as of batches seen."""
    if len(written) != 1 or is_continuous((tensor := written[0]).dtype) or tensor.ndim:
        return False
    return not contents.is_choice(tensor) and not any(isinstance(a, Tensor) and a is not tensor for a in args)


def freeze_masks(contents: Contents, node: Node, kind: Traits) -> None:
    """Masks by which others are cut are constants, in this operation and from here on."""
    if kind.name in PUT_BY_MASK and node.args[2].shape.numel() == 1:
        return

    def frozen(arg: Any) -> Any:
        if type(arg) is tuple:
            return tuple([frozen(a) for a in arg])
        chosen = type(arg) is Value and arg.node is not None and arg.meta[2] in _TRUTH
        return contents.freeze(arg) if chosen else arg

    node.args = frozen(node.args)
