"""Models whose gradients and optimizer states do not fit on one device, by torch's FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.network.samples import BatchSize, Scale
from lightning_ebm.program.autograd_graph import graph_of
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.program.meanwhile import Meanwhile
from lightning_ebm.purity import shadowed
from lightning_ebm.step.step import Step
from lightning_ebm.strategies.joint import JointStrategy


class EBMFSDP2Strategy(JointStrategy, ModelParallelStrategy):
    """`EBMStrategy` for models whose gradients and optimizer states do not fit on one device, by torch's FSDP2.

    ``Trainer(strategy=EBMFSDP2Strategy("predictive-coding"))``, or "ebm_fsdp2". As with Lightning's
    ModelParallelStrategy, the module's `configure_model` says what is sharded, by `torch.distributed.fsdp.fully_shard`.

    Weights are gathered once a step and stay whole while the states relax: passes run without communication, in
    different numbers on different ranks, and a step sends what a step of backprop sends, however long the relaxation.
    Gradients are reduced into shards once, in the final backward. The price is memory for one whole set of weights, in
    the precision they are gathered in, during a step; gradients, master weights and optimizer states stay sharded.

    Args:
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`; None is predictive coding at the largest
            strength up to 1 that the network bears: ``nudge="auto"``, to 1e-2, by 6 evaluations at most.
        layers: which calls carry states, see `Learner`.
        output: "readout", "state" or "auto", see `Learner`.
        loss_reduction: how the module's loss reduces over the batch of one rank, "mean" or "sum".
        capture: as in `EBMStrategy`.
        compile: as in `EBMStrategy`.
        batch_size: as in `EBMStrategy`.
        scale: as in `EBMStrategy`.
        options: those of `lightning.pytorch.strategies.ModelParallelStrategy`, but `tensor_parallel_size`: all devices
            share the data.

    Raises:
        ConfigurationError: tensor parallelism, where a pass is a collective; a policy for batches that cannot relax;
            an argument that cannot work.
        RelaxationDivergedError: on all ranks, if on any.
    """

    def __init__(
        self,
        algorithm: str | Algorithm | None = None,
        *,
        layers: Layers = None,
        output: Output = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        capture: bool = True,
        compile: bool = False,
        batch_size: BatchSize = None,
        scale: Scale = None,
        **options: Any,
    ) -> None:
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise ConfigurationError(
                f"EBMFSDP2Strategy needs torch 2.8 or newer, and this is {torch.__version__}: weights have to stay"
                " whole from a pass to its backward, which older ones cannot be told for one step. Install a newer"
                " torch, or take EBMDDPStrategy."
            )
        if options.get("tensor_parallel_size", "auto") not in ("auto", 1):
            raise ConfigurationError(
                f"tensor_parallel_size={options['tensor_parallel_size']!r}: every pass through a tensor-parallel layer"
                " waits for other ranks, and a relaxation makes as many passes as its own batch needs. Shard the"
                " weights over all devices instead, fully_shard(layer, mesh=self.device_mesh['data_parallel'])."
            )
        if options.pop("on_divergence", "raise") != "raise":
            raise ConfigurationError(
                "on_divergence: under FSDP2 the ranks gather weights and reduce gradients in the backward of the user's"
                ' own loss, which a skipped or replaced batch does not run. Take on_divergence="raise" here, or'
                " EBMDDPStrategy."
            )
        super().__init__(**{**options, "tensor_parallel_size": 1})
        self._handles: list[RemovableHandle] = []
        self._whole = False
        """Whether weights are, until they are given back."""
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size, scale=scale)

    def setup_environment(self) -> None:
        """Lightning's own; by default all devices share the data."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Lightning's own, with whole weights from every pass to its backward."""
        if not self._relaxes:
            return super().training_step(*args, **kwargs)
        self._reshard_after_passes(False)
        self._unshard()
        output = super().training_step(*args, **kwargs)
        if not self._module.automatic_optimization:  # else there is a backward to come
            self._reshard()
            self._reshard_after_passes(True)
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """See `EnergyStrategy.backward`; when it is over, weights are shards again."""
        backward = self._module.backward

        def and_reshard(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss, *args, **kwargs)
            self._given()

        with shadowed(self._module, {"backward": and_reshard}):
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """See `EnergyStrategy.optimizer_step`; whole weights that a pass has left would be old when it is over."""
        if self._relaxes and not self._module.automatic_optimization:
            self._reshard()
        return super().optimizer_step(optimizer, *args, **kwargs)

    def _surrogate(self, closure_loss: Tensor) -> Tensor:
        surrogate = super()._surrogate(closure_loss)
        assert surrogate is not None  # no batch is skipped here
        return self._handed(surrogate, closure_loss)

    def _handed(self, surrogate: Tensor, loss: Tensor) -> Tensor:
        """The user's own loss, whose backward pass tells FSDP when to reduce; updates replace its gradients."""
        if not self._relaxes or surrogate is loss:
            return surrogate
        leaves = graph_of([surrogate])[0]
        updates = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        factor = surrogate.detach().new_ones(())

        def multiplied(by: Tensor) -> None:  # the loss, before it is differentiated: by a scaler, or the user
            factor.copy_(by.reshape(()))

        def instead(update: Tensor, gradient: Tensor) -> Tensor:
            return update * factor

        self._handles.append(loss.register_hook(multiplied))
        for leaf, update in zip(leaves, updates, strict=True):
            if update is not None:
                self._handles.append(leaf.register_hook(partial(instead, update)))
        return loss

    def _given(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._reshard()  # not sooner: hooks before it may look at weights, and so may other phases
        self._reshard_after_passes(self._module.automatic_optimization)

    @property
    def _sharded(self) -> list[FSDPModule]:
        return [part for part in self._module.modules() if isinstance(part, FSDPModule)]

    def _look_after(self, step: Step | None, *hooks: str) -> Meanwhile | None:
        # Within a recorded step FSDP writes to weights itself, where hooks take gradients, and gives them back.
        return super()._look_after(step, *hooks) if self._module.automatic_optimization else None

    def _unshard(self) -> None:
        self._whole = True
        for part in self._sharded:
            part.unshard()

    def _reshard(self) -> None:
        self._whole = False
        for part in self._sharded:
            part.reshard()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """See `ObservedStrategy._looking`; with whole weights, which hooks after the backward pass find given back."""
        whole = self._whole
        if not whole:
            self._unshard()
        try:
            with super()._looking():
                yield
        finally:
            if not whole:
                self._reshard()

    def _reshard_after_passes(self, reshard: bool) -> None:
        for part in self._sharded:
            part.set_reshard_after_forward(reshard, recurse=False)
            part.set_reshard_after_backward(reshard, recurse=False)

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Adds the name "ebm_fsdp2", and those that people will try, which say why not."""
        strategy_registry.register("ebm_fsdp2", cls, description="Energy-based learning with sharded weights, by FSDP2")
        for name, reason in _REFUSED.items():
            text = f'Trainer(strategy="{name}"): {reason}'
            strategy_registry.register(name, _refuse, description="Refused, with the reason", reason=text)


_REFUSED = {
    "ebm_fsdp": "FSDP1 flattens the weights of several layers into one and frees it after every pass, so that a"
    " relaxation would gather the whole model at each of its steps; FSDP2 keeps weights as they are.",
    "ebm_deepspeed": "DeepSpeed's engine runs the backward pass itself, on the loss it was given, and reduces gradients"
    " in hooks of its own: there is no place where an update that is not the gradient of that loss could enter.",
}


def _refuse(reason: str) -> NoReturn:
    raise ConfigurationError(f'{reason} Use "ebm_ddp", or "ebm_fsdp2" where optimizer states do not fit.')


if "ebm_fsdp2" not in StrategyRegistry:
    EBMFSDP2Strategy.register_strategies(StrategyRegistry)
