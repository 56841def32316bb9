"""Functions of torch whose kernels of a GPU drop and compute in one: a step is recorded by kernels that do not.

What such a kernel has dropped nobody is told, so that it could not be repeated at other states. The kernels that are
taken here drop by an operation of its own, as those of a CPU do: other units, at the same rate. Where nothing is
dropped, every call takes the kernel that it would have taken.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_RECURRENT: frozenset[Any] = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
DRAW_INSIDE: frozenset[Any] = frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward, *_RECURRENT})


def drawing_apart(func: Any, args: Any, kwargs: Any) -> AbstractContextManager[None]:
    """Within it a call of one of `DRAW_INSIDE` drops by operations of their own.

    Attention takes torch's math kernel, which holds the attention weights, ``(B, heads, T, T)``; recurrent layers do
    without cuDNN.
    """
    if func in _RECURRENT:  # their dropout is the only number with a point, and whether they train comes next
        at = next((k for k, arg in enumerate(args) if type(arg) is float), None)
        return _without_cudnn() if at is not None and args[at] > 0 and args[at + 1] else nullcontext()
    if func is F.multi_head_attention_forward:
        dropped = args[10] if len(args) > 10 else kwargs["dropout_p"]
        dropped = dropped if (args[13] if len(args) > 13 else kwargs.get("training", True)) else 0.0
    else:
        dropped = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    return sdpa_kernel(SDPBackend.MATH) if dropped else nullcontext()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
