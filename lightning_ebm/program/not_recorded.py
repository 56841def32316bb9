"""Tensors that a record cannot hold: which, and what to do."""

import torch
from torch import Tensor, nn

from lightning_ebm.errors import UnsupportedModuleError


def not_dense(tensor: Tensor) -> UnsupportedModuleError:
    """For a step that computes with a tensor that is no ordinary one."""
    learns = ", which requires a gradient" if tensor.requires_grad and tensor.layout is not torch.strided else ""
    nested = " (a nested one: pad it before, with a mask in the loss)" if tensor.is_nested else ""
    return UnsupportedModuleError(
        f"The step computes with a tensor of class {type(tensor).__name__} and layout {tensor.layout}{learns}{nested};"
        " what is computed with it cannot be repeated at other states. Use ordinary dense tensors in training_step;"
        " where torch makes such tensors itself, as tracing does within torch.cond or scan, write loops and branches in"
        " Python."
    )


def unrecorded(tensor: Tensor) -> UnsupportedModuleError:
    """For a step that computes with a tensor whose graph began where nothing is recorded."""
    name = type(tensor.grad_fn).__name__
    if type(tensor) not in (Tensor, nn.Parameter):
        return UnsupportedModuleError(
            f"The step computes with tensors of class {type(tensor).__name__}, a subclass of Tensor that makes other"
            " objects of results, which cannot be told from what was there before. Hand plain tensors to the network:"
            " x.as_subclass(torch.Tensor)."
        )
    return UnsupportedModuleError(
        "The step uses a tensor that was computed before it began, or by another thread (ThreadPoolExecutor,"
        f" nn.DataParallel) where nothing is recorded, together with its graph ({name}): what lies behind it cannot be"
        " repeated at other states, and parameters there would learn by other rules. Compute it inside the step and in"
        " its own thread, or detach it. Within torch.func.hessian and jacfwd torch makes such tensors itself: take"
        " slopes by torch.autograd.grad(..., create_graph=True)."
    )
