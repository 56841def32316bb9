"""The strategies for many devices. Gradients travel as they do in stock: by torch's DDP, or by its FSDP2."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import _augment_message
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import LearnedPrecision
from lightning_ebm.errors import ConfigurationError, EBMError, RelaxationDivergedError
from lightning_ebm.program.layers import Layers, Output
from lightning_ebm.program.wiring import graph_of
from lightning_ebm.purity import shadowed
from lightning_ebm.relaxers import Cheapest
from lightning_ebm.samples import BatchSize
from lightning_ebm.strategy import EnergyStrategy

log = logging.getLogger(__name__)


class JointStrategy(EnergyStrategy, ParallelStrategy):
    """Relaxes on every rank by itself, in as many steps as its own batch needs, and decides together.

    No collective runs inside a relaxation. When it is over, the ranks agree on whether all of them have an update, in
    one reduction of one integer: an error on one rank is raised on all of them, where otherwise the others would wait
    in the reduction of the gradients until the process group times out.
    """

    _failed = False

    def setup(self, trainer: Trainer) -> None:
        """Lightning's own, after refusing what would make a collective of every pass."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and self._relaxes and (self._layer_sync or _holds(self._module, nn.SyncBatchNorm)):
            raise ConfigurationError(
                "sync_batchnorm makes every pass through the network wait for all ranks, and a relaxation makes as many"
                " passes as its own batch needs: the ranks would wait for each other for ever. Normalize over each"
                " rank's batch, sync_batchnorm=False, or over groups or layers instead of batches."
            )
        if fits and isinstance(getattr(self.algorithm.energy, "precision", None), LearnedPrecision):
            raise ConfigurationError(
                "A LearnedPrecision follows the errors of one process, and every rank sees others: the ranks would"
                " relax on different energies, and agree on none. Give fixed precisions here, such as those learned on"
                " one device."
            )
        self._failed = False
        super().setup(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step; if it fails, the other ranks learn of it in their `backward`."""
        try:
            output = super().training_step(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None and self._module.automatic_optimization:  # refused by Lightning, on this rank
                self._agree(ConfigurationError("training_step returned None, which many devices cannot skip together."))
        except Exception as error:
            self._agree(error)
            raise
        return output

    def _surrogate(self, closure_loss: Tensor) -> Tensor:
        try:
            found = super()._surrogate(closure_loss)
        except Exception as error:
            self._agree(error)
            raise
        self._agree(None)
        self._choose_together()
        return found

    def _choose_together(self) -> None:
        """Every rank comes here after a relaxation: what one of them found out about relaxers, all go by from now."""
        if not self._relaxes or self.world_size == 1:
            return
        for relaxer in (self.algorithm.relaxer, self.algorithm.free_relaxer):
            if isinstance(relaxer, Cheapest) and not self.reduce_boolean_decision(not relaxer.tried):
                relaxer.agree(self.gather(relaxer.tried))

    def _agree(self, error: Exception | None) -> None:
        """Every rank comes here once a backward call, with its error if it has one."""
        if not self._relaxes or self._failed or self.world_size == 1:
            return
        self._failed = error is not None
        if error is not None:
            # At once: what follows waits for the others.
            log.error("Rank %d of %d failed: %s: %s", self.global_rank, self.world_size, type(error).__name__, error)
        with suppress(Exception) if error is not None else nullcontext():  # if they are gone, its own error counts
            if self.reduce_boolean_decision(error is None):
                return
            text = f"{type(error).__name__}: {error}"
            told = self.gather(None if error is None else (text, isinstance(error, RelaxationDivergedError)))
            if error is None:
                self._failed = True
                failed = [f"rank {rank}: {found[0]}" for rank, found in enumerate(told) if found is not None]
                kind = RelaxationDivergedError if any(found[1] for found in told if found is not None) else EBMError
                raise kind(f"No rank takes this step, as {len(failed)} of {len(told)} failed. {'; '.join(failed)}")

    def gather(self, value: Any) -> list[Any]:
        """See `EnergyStrategy.gather`; a collective."""
        if not torch.distributed.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with super()._quiet(), shadowed(self._module, {"all_gather": _no_gather}):
            yield


class EBMDDPStrategy(JointStrategy, DDPStrategy):
    """`EBMStrategy` on many devices and nodes, by torch's own DistributedDataParallel.

    ``Trainer(strategy=EBMDDPStrategy("predictive-coding"), devices=8, num_nodes=4)``, or by name: "ebm_ddp",
    "ebm_ddp_spawn", "ebm_ddp_fork", "ebm_ddp_notebook". Every rank relaxes its own batch; its update is then averaged
    over ranks by DDP's reducer, once per parameter and optimizer step whatever the number of relaxation steps. Buckets,
    overlap, `no_sync` under accumulation and communication hooks are DDP's.

    The nudge is per sample, so that N ranks with batches of B do what one does with a batch of N B, as in stock.

    Args:
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`.
        layers: which calls carry states, see `Learner`.
        output: "readout", "state" or "auto", see `Learner`.
        loss_reduction: how the module's loss reduces over the batch of one rank, "mean" or "sum".
        capture: as in `EBMStrategy`.
        compile: as in `EBMStrategy`.
        batch_size: as in `EBMStrategy`.
        ddp_options: those of `lightning.pytorch.strategies.DDPStrategy` (`timeout`, `ddp_comm_hook`, `start_method`,
            ...) and, through it, of torch's DDP (`find_unused_parameters`, `gradient_as_bucket_view`, ...).

    Raises:
        ConfigurationError: ``static_graph=True``; ``sync_batchnorm``; an argument that cannot work.
        RelaxationDivergedError: on all ranks, if on any.
    """

    def __init__(
        self,
        algorithm: str | Algorithm = "predictive-coding",
        *,
        layers: Layers = None,
        output: Output = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        capture: bool = True,
        compile: bool = False,
        batch_size: BatchSize = None,
        **ddp_options: Any,
    ) -> None:
        if ddp_options.get("static_graph"):
            raise ConfigurationError(
                "static_graph=True lets DDP plan its reductions from the graph of training_step's loss, which is cut at"
                " every state: what is differentiated is the energy's, made later. Gradients would go unreduced and the"
                " ranks drift apart in silence. Leave it out; find_unused_parameters=True is supported."
            )
        super().__init__(**ddp_options)
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Lightning's own; the reducer is not told of this pass's graph, as another one will be differentiated."""
        ahead = self._prepares_later and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if ahead else nullcontext():  # type: ignore[union-attr, operator]
            return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tells the reducer which graph is coming, as Lightning does under manual optimization."""
        if self._prepares_later and isinstance(self.model, DistributedDataParallel):
            prepare_for_backward(self.model, closure_loss)
        else:
            super().pre_backward(closure_loss)

    @property
    def _prepares_later(self) -> bool:
        return self._relaxes and self._module.automatic_optimization

    def on_exception(self, exception: BaseException) -> None:
        """Points to the option of this strategy, where Lightning's hint would name one of its own."""
        _augment_message(
            exception,
            pattern=".*Expected to have finished reduction in the prior iteration.*",
            new_message=(
                "The last step had no update for some parameters of your LightningModule, because the loss does not use"
                ' them. If that is meant, use strategy="ebm_ddp_find_unused_parameters_true", or'
                " ebm.EBMDDPStrategy(..., find_unused_parameters=True)."
            ),
        )

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Adds the names "ebm_ddp", "ebm_ddp_spawn", "ebm_ddp_fork" and "ebm_ddp_notebook"."""
        methods = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
        for name, method in methods.items():
            text = f"Energy-based learning on many devices by DDP, start_method {method!r}"
            strategy_registry.register(f"ebm_{name}", cls, description=text, start_method=method)
        name, text = "ebm_ddp_find_unused_parameters_true", "Energy-based learning by DDP with unused parameters"
        strategy_registry.register(name, cls, description=text, find_unused_parameters=True)


class EBMFSDP2Strategy(JointStrategy, ModelParallelStrategy):
    """`EBMStrategy` for models whose gradients and optimizer states do not fit on one device, by torch's FSDP2.

    ``Trainer(strategy=EBMFSDP2Strategy("predictive-coding"))``, or "ebm_fsdp2". As with Lightning's
    ModelParallelStrategy, the module's `configure_model` says what is sharded, by `torch.distributed.fsdp.fully_shard`.

    Weights are gathered once a step and stay whole while the states relax: passes run without communication, in
    different numbers on different ranks, and a step sends what a step of backprop sends, however long the relaxation.
    Gradients are reduced into shards once, in the final backward. The price is memory for one whole set of weights, in
    the precision they are gathered in, during a step; gradients, master weights and optimizer states stay sharded.

    Args:
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`.
        layers: which calls carry states, see `Learner`.
        output: "readout", "state" or "auto", see `Learner`.
        loss_reduction: how the module's loss reduces over the batch of one rank, "mean" or "sum".
        capture: as in `EBMStrategy`.
        compile: as in `EBMStrategy`.
        batch_size: as in `EBMStrategy`.
        options: those of `lightning.pytorch.strategies.ModelParallelStrategy`, but `tensor_parallel_size`: all devices
            share the data.

    Raises:
        ConfigurationError: tensor parallelism, where a pass is a collective; an argument that cannot work.
        RelaxationDivergedError: on all ranks, if on any.
    """

    def __init__(
        self,
        algorithm: str | Algorithm = "predictive-coding",
        *,
        layers: Layers = None,
        output: Output = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        capture: bool = True,
        compile: bool = False,
        batch_size: BatchSize = None,
        **options: Any,
    ) -> None:
        if options.get("tensor_parallel_size", "auto") not in ("auto", 1):
            raise ConfigurationError(
                f"tensor_parallel_size={options['tensor_parallel_size']!r}: every pass through a tensor-parallel layer"
                " waits for other ranks, and a relaxation makes as many passes as its own batch needs. Shard the"
                " weights over all devices instead, fully_shard(layer, mesh=self.device_mesh['data_parallel'])."
            )
        super().__init__(**{**options, "tensor_parallel_size": 1})
        self._handles: list[RemovableHandle] = []
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size)

    def setup_environment(self) -> None:
        """Lightning's own; by default all devices share the data."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Lightning's own, with whole weights from here to the final backward."""
        if self._relaxes:
            self._reshard_after_passes(False)
            for part in self._sharded:
                part.unshard()
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """See `EnergyStrategy.backward`; when it is over, weights are shards again."""
        backward = self._module.backward

        def and_reshard(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss, *args, **kwargs)
            while self._handles:
                self._handles.pop().remove()
            for part in self._sharded:  # not sooner: hooks before it may look at weights, and so may other phases
                part.reshard()
            self._reshard_after_passes(True)

        with shadowed(self._module, {"backward": and_reshard}):
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    def _surrogate(self, closure_loss: Tensor) -> Tensor:
        """The user's own loss, whose backward pass tells FSDP when to reduce; updates replace its gradients."""
        surrogate = super()._surrogate(closure_loss)
        if not self._relaxes or surrogate is closure_loss:
            return surrogate
        leaves = graph_of([surrogate])[0]
        updates = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        for leaf, update in zip(leaves, updates, strict=True):
            if update is not None:
                self._handles.append(leaf.register_hook(partial(self._instead, update)))  # type: ignore[no-untyped-call]
        return closure_loss

    def _instead(self, update: Tensor, gradient: Tensor) -> Tensor:
        scaler = self._scaler()
        return update if scaler is None else update * scaler.get_scale()

    @property
    def _sharded(self) -> list[FSDPModule]:
        return [part for part in self._module.modules() if isinstance(part, FSDPModule)]

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


def _no_gather(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigurationError(
        "training_step calls self.all_gather. Each rank relaxes by itself, in as many passes as its own batch needs, so"
        " that a collective in a pass would wait for ranks that have finished. Compute the loss from this rank's batch"
        ' alone, or use the algorithm "backprop".'
    )


def _holds(module: LightningModule, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


if "ebm_ddp" not in StrategyRegistry:
    EBMDDPStrategy.register_strategies(StrategyRegistry)
    EBMFSDP2Strategy.register_strategies(StrategyRegistry)
