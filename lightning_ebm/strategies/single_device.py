"""The strategy for one device."""

from typing import Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.network.samples import BatchSize, Scale
from lightning_ebm.presets import algorithms
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.step.divergence import OnDivergence
from lightning_ebm.strategies.base import EnergyStrategy
from lightning_ebm.strategies.whole_files import WholeFiles


class EBMStrategy(EnergyStrategy, SingleDeviceStrategy):
    """Trains an untouched LightningModule on one device by relaxing the states of its layers on an energy.

    ``Trainer(strategy=EBMStrategy("predictive-coding"))``; optimizers, schedulers, clipping, accumulation, precision,
    checkpoints, loggers and callbacks work as they did.

    Args:
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`; None is predictive coding at the largest
            strength up to 1 that the network bears: ``nudge="auto"``, to 1e-2, by 6 evaluations at most.
        layers: which calls carry states, see `Learner`.
        output: "readout", "state" or "auto", see `Learner`.
        loss_reduction: how the module's loss reduces over the batch, "mean" or "sum".
        capture: run programs that come again as code traced from them, see `Learner`.
        compile: and that through Inductor, see `Learner`.
        batch_size: number of samples of a batch, a number or a function of the batch; None finds it, see `Learner`.
        scale: the factor that training_step's own loss carries under manual optimization (that of a GradScaler of the
            user's own, 1/N of accumulation by hand), see `Learner`; those of the Trainer are known.
        on_divergence: what is done with a batch that cannot relax: "raise"; "skip", which leaves out its update, as
            stock does where training_step returns None, and puts back the buffers its pass wrote to (metrics that it
            updated and numbers that it drew stay so, as in stock); or a preset's name or an `Algorithm`, which takes
            that batch, unless its loss is not finite. Counted in the report, logged as ``ebm/skipped``,
            ``ebm/fallbacks``. Manual optimization and incremental updates know "raise" alone.
        device: where to train; None is the device that the Trainer chose.
        accelerator: Lightning's own.
        checkpoint_io: Lightning's own; None is one whose files are there whole or not at all.
        precision_plugin: Lightning's own.

    Raises:
        ConfigurationError: an argument that cannot work; more than one device; a training step that would run twice, as
            with Hopfield energies, and draws its own batches from the loader.
    """

    strategy_name = "ebm"

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
        device: str | torch.device | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        for name, part, kind in (
            ("accelerator", accelerator, Accelerator),
            ("checkpoint_io", checkpoint_io, CheckpointIO),
            ("precision_plugin", precision_plugin, Precision),
        ):
            if part is not None:
                checked.instance(self, name, part, kind, f"an instance of Lightning's {kind.__name__}, or None")
        if device is not None:
            try:
                device = torch.device(checked.instance(self, "device", device, (str, torch.device), "a device"))
            except RuntimeError:
                checked.refuse(self, "device", device, 'a device that torch knows, such as "cpu" or "cuda:0", or None')
        super().__init__(
            device="cpu" if device is None else device,
            accelerator=accelerator,
            checkpoint_io=WholeFiles() if checkpoint_io is None else checkpoint_io,
            precision_plugin=precision_plugin,
        )
        # Lightning fills these on any strategy that has them, and otherwise leaves one for a single device on the CPU.
        self.num_nodes = 1
        self.parallel_devices: list[torch.device] | None = [self._root_device] if device is not None else None
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size, on_divergence, scale)

    def teardown(self) -> None:
        """Lightning's own; another Trainer may choose another device, and refuses a strategy that has one."""
        self._root_device, self.parallel_devices = self.root_device, None
        super().teardown()

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    def connect(self, model: LightningModule) -> None:
        """Lightning's own, after checking what only now is known."""
        devices = len(self.parallel_devices or [None])
        if devices > 1 or self.num_nodes > 1:
            raise ConfigurationError(
                f"EBMStrategy trains on one device; the Trainer was given {devices} on {self.num_nodes} node(s). It"
                ' would train on one of them, or a model of its own on each, in silence. Use strategy="ebm_ddp", or'
                " ebm.EBMDDPStrategy(...) with the same arguments, or devices=1, num_nodes=1."
            )
        super().connect(model)

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Adds the name "ebm", and one for each preset, such as "ebm_pc_nudge"."""
        strategy_registry.register(cls.strategy_name, cls, description="Energy-based learning on one device")
        for name in algorithms():
            text = f"Energy-based learning on one device by the preset {name!r}"
            strategy_registry.register(f"ebm_{name.replace('-', '_')}", cls, description=text, algorithm=name)


if EBMStrategy.strategy_name not in StrategyRegistry:
    EBMStrategy.register_strategies(StrategyRegistry)
