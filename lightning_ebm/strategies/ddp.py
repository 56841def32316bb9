"""Many devices by torch's own DistributedDataParallel. Gradients travel as they do in stock."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import _augment_message
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.network.samples import BatchSize, Scale
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.step.divergence import OnDivergence
from lightning_ebm.strategies.joint import JointStrategy
from lightning_ebm.strategies.whole_files import WholeFiles


class EBMDDPStrategy(JointStrategy, DDPStrategy):
    """`EBMStrategy` on many devices and nodes, by torch's own DistributedDataParallel.

    ``Trainer(strategy=EBMDDPStrategy("predictive-coding"), devices=8, num_nodes=4)``, or by name: "ebm_ddp",
    "ebm_ddp_spawn", "ebm_ddp_fork", "ebm_ddp_notebook". Every rank relaxes its own batch; its update is then averaged
    over ranks by DDP's reducer, once per parameter and optimizer step whatever the number of relaxation steps. Buckets,
    overlap, `no_sync` under accumulation and communication hooks are DDP's.

    The nudge is per sample, so that N ranks with batches of B do what one does with a batch of N B, as in stock.

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
        on_divergence: as in `EBMStrategy`; if it comes to that on one rank, all do the same with the batch. Under
            gradient accumulation that holds of the micro-batch after which the optimizer steps; of one before it, the
            rank alone leaves out its own share, or takes it by the other algorithm, as ranks do not wait for each other
            there. Counts are those of the rank that lost most.
        ddp_options: those of `lightning.pytorch.strategies.DDPStrategy` (`timeout`, `ddp_comm_hook`, `start_method`,
            ...) and, through it, of torch's DDP (`find_unused_parameters`, `gradient_as_bucket_view`, ...).

    Raises:
        ConfigurationError: ``static_graph=True``; ``sync_batchnorm``; an argument that cannot work.
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
        on_divergence: OnDivergence = "raise",
        **ddp_options: Any,
    ) -> None:
        methods = ("popen", "spawn", "fork", "forkserver")
        checked.choice(self, "start_method", ddp_options.get("start_method", "popen"), methods)
        checked.handed_on(self, ddp_options, DDPStrategy, DistributedDataParallel, besides=("module", "device_ids"))
        if ddp_options.get("static_graph"):
            raise ConfigurationError(
                "static_graph=True lets DDP plan its reductions from the graph of training_step's loss, which is cut at"
                " every state: what is differentiated is the energy's, made later. Gradients would go unreduced and the"
                " ranks drift apart in silence. Leave it out; find_unused_parameters=True is supported."
            )
        super().__init__(**ddp_options)
        if ddp_options.get("checkpoint_io") is None:
            self.checkpoint_io = WholeFiles()
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size, on_divergence, scale)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Lightning's own; the reducer is not told of this pass's graph, as another one will be differentiated."""
        model = self.model
        if not isinstance(model, DistributedDataParallel) or not self._prepares_later:
            return super().training_step(*args, **kwargs)
        with model.no_sync():
            return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tells the reducer which graph is coming, as Lightning does under manual optimization."""
        if self._prepares_later and isinstance(self.model, DistributedDataParallel):
            prepare_for_backward(self.model, closure_loss)
        else:
            super().pre_backward(closure_loss)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's own; within it ranks decide nothing together either."""
        before, self._accumulating = self._accumulating, True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulating = before

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


if "ebm_ddp" not in StrategyRegistry:
    EBMDDPStrategy.register_strategies(StrategyRegistry)
