"""True gradients: slow, obvious, and the oracle of everything else."""

import torch
from torch import Tensor, nn

from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.purity import Snapshot
from lightning_ebm.substitution import clean


def backprop(module: nn.Module, closure: Closure) -> dict[str, Tensor]:
    """dL/dtheta of the feed-forward network, as ``loss.backward()`` would put it into ``.grad``.

    Leaves no trace: one extra pass from the random state and buffers of now, which are put back afterwards.

    Args:
        module: whose parameters.
        closure: returns the loss, a scalar.

    Returns:
        ``{parameter name: tensor}``, without the parameters that the loss does not reach.

    Raises:
        ConfigurationError: the closure returns no usable loss.
    """
    with Snapshot(module).replaying(), torch.enable_grad():
        return named_gradients(module, checked_loss(closure()))


def named_gradients(module: nn.Module, scalar: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
    """d scalar / d theta for every trainable parameter it reaches, by the name the user knows."""
    named = {clean(name): p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigurationError(f"{type(module).__name__} has no trainable parameter: nothing could be learned.")
    found = torch.autograd.grad(scalar, list(named.values()), retain_graph=retain_graph, allow_unused=True)
    return {name: g.detach() for name, g in zip(named, found, strict=True) if g is not None}
