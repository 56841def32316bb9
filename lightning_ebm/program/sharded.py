"""Modules that others hand out weights to and take gradients from, in the backward pass of the loss itself."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lightning_ebm.errors import ConfigurationError


def refuse_shards(module: nn.Module) -> None:
    """Raises `ConfigurationError` for weights that are sharded: a pass leaves nothing that could be run again."""
    if any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules()):
        raise ConfigurationError(
            "The weights of this module are sharded (FSDP): they are given back after every pass, and their gradients"
            " are reduced in the backward pass of the module's own loss, which a Learner does not run. Train it by"
            " Trainer(strategy=ebm.EBMFSDP2Strategy(...)), for FSDP2; or wrap it in DistributedDataParallel instead."
        )


def refuse_static_graph(sink_args: tuple[Any, ...]) -> None:
    """Raises `ConfigurationError` where DDP looks at the graph of the loss, given what it applies to its outputs."""
    wrapper = sink_args[0]() if sink_args and callable(sink_args[0]) else None
    if isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph:
        raise ConfigurationError(
            "DistributedDataParallel(static_graph=True) plans its reductions from the graph of the loss, which is cut"
            " at every state: what is differentiated is the energy's, made later. Gradients would be reduced once too"
            " often or not at all. Leave it out; find_unused_parameters=True is supported."
        )
