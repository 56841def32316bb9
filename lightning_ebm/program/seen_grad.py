"""Seeing gradients that are taken where nothing is recorded, so that none of them trains by backprop in silence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ebm.program.tensors import all_of

Sees = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""Told of a call of `torch.autograd.grad`, by its outputs and its inputs."""


class SeenGrad(TorchFunctionMode):
    """Within it, `sees` is told of every `torch.autograd.grad`."""

    def __init__(self, sees: Sees) -> None:
        super().__init__()
        self._sees = sees

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            given = dict(zip(("outputs", "inputs"), args, strict=False)) | kwargs
            self._sees(all_of(given["outputs"]), all_of(given["inputs"]))
        return func(*args, **kwargs)
