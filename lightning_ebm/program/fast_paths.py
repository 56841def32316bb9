"""torch's fast path of Transformers in evaluation, which is not taken where hooks or modes watch the pass."""

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


class FastPaths:
    """Says once that the fast path of an encoder was not taken, where that gives other numbers.

    On it what is padded comes out as zeros; else it comes out as anything.

    Args:
        root: the user's module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._told = False

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of an `nn.TransformerEncoder`."""
        padding = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
        learns = torch.is_grad_enabled() and output.requires_grad
        if self._told or padding is None or module.training or learns or not module.use_nested_tensor:
            return
        self._told = True
        name = next((name for name, m in self._root.named_modules() if m is module), "")
        log.warning(
            "%r is an nn.TransformerEncoder in evaluation mode with padding: while a training step is recorded it does"
            " not take torch's fast path, on which what is padded comes out as zeros. Say so in the step:"
            " output.masked_fill(padding[..., None], 0). (Said once.)",
            name,
        )
