"""The adapter between the engine and Lightning's training loop, and the strategy for one device."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.closure import NoLossError
from lightning_ebm.companion import Companion
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.equilibrium import ordinary
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.harmless import harmless
from lightning_ebm.learner import Learner, check_options
from lightning_ebm.presets import algorithm as preset, algorithms
from lightning_ebm.program.calls import leading_sizes
from lightning_ebm.program.layers import Layers, Output
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.program.seen_backward import SeenBackward
from lightning_ebm.program.wiring import graph_of
from lightning_ebm.purity import shadowed
from lightning_ebm.reference import Reference, exactly
from lightning_ebm.regime import Regime, of_step as regime_of_step
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.samples import BatchSize
from lightning_ebm.step import Step
from lightning_ebm.summary import of_plan

log = logging.getLogger(__name__)

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class EnergyStrategy(Strategy):
    """What the strategies of this library share; the other base says where to train.

    In place of the loss, `backward` hands Lightning a scalar of the same value whose gradient is the update. Whatever a
    strategy does with gradients, reducing them over devices or unscaling them, it does with these.
    """

    def learn_by(
        self,
        algorithm: str | Algorithm,
        layers: Layers,
        output: Output,
        loss_reduction: Literal["mean", "sum"],
        capture: bool,
        compile: bool,
        batch_size: BatchSize = None,
    ) -> None:
        """Keeps the settings; `connect` makes the engine of them."""
        check_options(output, loss_reduction)
        self.algorithm = preset(algorithm)
        self.layers: Layers = layers
        self.output: Output = output
        self.loss_reduction: Literal["mean", "sum"] = loss_reduction
        self.capture = capture
        self.compile = compile
        self.batch_size = batch_size
        self._learner: Learner | None = None
        self._step: Step | None = None
        self._increments: Iterator[Tensor] | None = None
        self._recorder: Recorder | None = None
        """Of the training step that is running, under manual optimization."""
        self._relaxed: set[int] = set()
        """Parameters whose gradients a relaxation has given, since they moved last, under manual optimization."""
        self._printed = self._told = False
        self._arguments: _Arguments = ((), {})

    @property
    def learner(self) -> Learner:
        """The engine; its `report` tells how the last step went. There is one once the Trainer has a module."""
        if self._learner is None:
            raise ConfigurationError("This EBMStrategy has no module yet: Trainer.fit gives it one.")
        return self._learner

    def _engine(self) -> Learner:
        return self.learner

    def describe(self) -> dict[str, Any]:
        """Every setting as text, for the configuration of a run."""
        return {
            **self.algorithm.describe(),
            **{name: str(getattr(self, name)) for name in ("layers", "output", "loss_reduction", "capture", "compile")},
        }

    def connect(self, model: LightningModule) -> None:
        """Lightning's own; the engine is made for the module here."""
        super().connect(model)
        callbacks: list[Callback] = model.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        self._companion = next((c for c in callbacks if isinstance(c, Companion)), None) or Companion(
            self.gather, self._engine
        )
        if self._companion not in callbacks:
            callbacks.append(self._companion)
        self._learner = Learner(
            model,
            self.algorithm,
            layers=self.layers,
            output=self.output,
            loss_reduction=self.loss_reduction,
            quiet=self._quiet,
            capture=self.capture,
            compile=self.compile,
            batch_size=self.batch_size,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at its prediction: this pass is the one with side effects."""
        module = self._module
        draws = any(isinstance(a, Iterator) for a in (*args, *kwargs.values()))
        if self._relaxes and draws and not is_divergence(self.algorithm.energy):
            raise ConfigurationError(
                f"{type(module).__name__}.training_step takes a dataloader_iter, and for this energy the step runs"
                " twice, quietly and at the free equilibrium: it would draw another batch. Let training_step take the"
                ' batch, or take a divergence energy such as "predictive-coding".'
            )
        self._arguments = args, kwargs
        self._step = self._recorder = None
        # Begun inside super(): a wrapper may change buffers first, and a quiet pass starts from where this one does.
        with shadowed(module, {"training_step": partial(self._first_pass, module.training_step)}):
            return super().training_step(*args, **kwargs)

    def _first_pass(self, training_step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        module = self._module
        with shadowed(module, {"training_step": training_step}):
            if not self._relaxes and not module.automatic_optimization:
                return training_step(*args, **kwargs)
            if not module.automatic_optimization:
                self._recorder = Recorder()
                try:
                    self._recorder.on_backward = self._plain_backward
                    with self.learner.recording(self._recorder):
                        return training_step(*args, **kwargs)
                finally:
                    self._recorder.release()
                    self._recorder = None
            step = self._begun()
            with ExitStack() as stack:
                try:
                    stack.enter_context(step.first_pass(self._other_backward))
                except NoLossError:  # a step that Lightning skips
                    return training_step(*args, **kwargs)
                output = training_step(*args, **kwargs)
            step.returned(_loss_of(output))
            self._step = step
            return output

    def _begun(self, recorder: Recorder | None = None) -> Step:
        args = self._arguments[0]
        batch = args[0] if args else None
        return self.learner.begin(self._loss_again, leading_sizes(self._arguments), batch, recorder=recorder)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Relaxes, and lets Lightning run its backward on the scalar whose gradient is the update."""
        recorder = self._recorder
        with nullcontext() if recorder is None else recorder.handing_over():
            surrogate = self._surrogate(closure_loss)
            with SeenBackward(partial(self._second_backward, surrogate)):
                loss = super().backward(surrogate, optimizer, *args, **kwargs)
            if recorder is not None and self._relaxes:
                self._relaxed.update(id(leaf) for leaf in graph_of([surrogate])[0])
        assert self._step is not None
        if self._increments is None:
            self._step.release()
        return loss

    def _surrogate(self, closure_loss: Tensor) -> Tensor:
        if self._recorder is not None or not self._module.automatic_optimization:
            self._step = self._begun(self._recorder)
        if self._step is None:
            raise ConfigurationError("EBMStrategy.backward was called outside a training step: nothing to relax.")
        if self._scaler() is not None and not bool(torch.isfinite(closure_loss)):
            return self._step.unrelaxed(
                closure_loss, 1 / self._accumulated()
            )  # the scaler skips this step, as in stock
        if self.algorithm.read_as == "incremental":
            self._refuse_increments()
            self._increments = self._step.increments(closure_loss)
            surrogate = next(self._increments)
        else:
            surrogate = self._step.surrogate(closure_loss, 1 / self._accumulated())
        self._print_layers()
        return surrogate

    def _plain_backward(self, loss: Tensor, options: dict[str, Any]) -> bool:
        """`loss.backward()` in a manual training step, in place of `manual_backward(loss)`: relaxes as well."""
        recorder = self._recorder
        if recorder is None or options.get("inputs") is not None or recorder.known(loss) is None:
            return False
        if not self._told:
            self._told = True
            log.warning(
                "%s.training_step calls loss.backward(): it relaxes, as self.manual_backward(loss) does, but precision"
                " plugins and hooks of the Trainer do not see it. (Said once.)",
                type(self._module).__name__,
            )
        gradient = options.get("gradient")
        with recorder.handing_over():
            step = self._begun(recorder)
            surrogate = step.surrogate(loss)
            self._print_layers()
            self._relaxed.update(id(leaf) for leaf in graph_of([surrogate])[0])
            torch.autograd.backward(surrogate, gradient)
            step.release()
        return True

    def _other_backward(self, loss: Tensor, options: dict[str, Any]) -> bool:
        """`loss.backward()` in an automatic training step: what it leaves in `.grad` is wiped, as in stock."""
        if self._accumulated() > 1 and options.get("inputs") is None:
            raise ConfigurationError(
                "training_step calls backward() itself, and gradients are accumulated over batches: what it leaves in"
                " .grad is a gradient of backprop that would be added to the updates. Use torch.autograd.grad for"
                " gradients inside the step, or accumulate_grad_batches=1."
            )
        return False

    def _second_backward(self, surrogate: Tensor, loss: Tensor, options: dict[str, Any]) -> bool:
        """`backward()` of another loss, in a LightningModule.backward of the user's own."""
        if loss is surrogate or not self._relaxes or options.get("inputs") is not None:
            return False
        if graph_of([loss], {surrogate.grad_fn})[0]:
            raise ConfigurationError(
                f"{type(self._module).__name__}.backward differentiates another loss beside the one it was given: that"
                " one would learn by plain backpropagation, in silence. Add it to the loss that training_step returns,"
                " or take manual optimization and call manual_backward for each."
            )
        return False

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Lightning's own; under manual optimization every gradient must have come from a relaxation.

        An incremental update takes its further steps here, each through clipping and hooks and counted by the Trainer.
        """
        recorder = self._recorder
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if recorder is not None:
            self._refuse_unrelaxed(optimizer)
        if (increments := self._increments) is not None and self._step is not None:
            progress = self._module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            for surrogate in increments:

                def again(surrogate: Tensor = surrogate) -> Tensor:
                    optimizer.zero_grad()
                    return super(EnergyStrategy, self).backward(surrogate, optimizer)

                progress.increment_ready()
                super().optimizer_step(optimizer, again, model, **kwargs)
                progress.increment_completed()
            self._increments = None
            self._step.release()
        return output

    def _refuse_unrelaxed(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters and not any(id(p) in self._relaxed for p in parameters):
            raise ConfigurationError(
                f"{type(optimizer).__name__} took a step on gradients that no relaxation has given (from"
                " torch.autograd.grad or torch.autograd.backward in training_step): that is plain backpropagation. Call"
                ' self.manual_backward(loss) before the step, or use the algorithm "backprop".'
            )
        self._relaxed.difference_update(id(p) for p in parameters)

    def _refuse_increments(self) -> None:
        if not self._module.automatic_optimization or self._accumulated() > 1:
            raise ConfigurationError(
                "An incremental update takes optimizer steps of its own within a batch, so the optimizer must be"
                " Lightning's to step: no manual optimization and no gradient accumulation. Use"
                ' accumulate_grad_batches=1, or the algorithm "predictive-coding".'
            )

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated("validation_step", super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated("test_step", super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated("predict_step", super().predict_step, args, kwargs)

    def _evaluated(
        self, name: str, step: Callable[..., STEP_OUTPUT], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> STEP_OUTPUT:
        def again() -> STEP_OUTPUT:
            # Past any wrapper: passes are local, and devices need different numbers of them.
            with self.precision_plugin.forward_context():
                return getattr(self._module, name)(*args, **kwargs)  # type: ignore[no-any-return]

        if is_divergence(self.algorithm.energy) or not self._relaxes:
            return step(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = ordinary((args, kwargs))
            with self.learner.free_phase(again):
                return step(*args, **kwargs)

    def process_dataloader(self, dataloader: object) -> object:
        """Lightning's own; a resumed run goes on where it was in the data."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self._module.trainer
        return self._companion.loader(trainer, dataloader) if trainer.training else dataloader

    def on_train_start(self) -> None:
        """Lightning's own; a resumed run goes on with the random numbers that were next."""
        super().on_train_start()
        self._companion.begin(self._module.trainer)

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in the order of the ranks; on all of them."""
        return [value]

    def true_gradients(self, reference: Reference = "backprop") -> dict[str, Tensor]:
        """The true gradient on the micro-batch of the last step, scaled as Lightning scales that step's update.

        Call it between `training_step` and the optimizer's step, as `on_after_backward` does. No side effects.

        Args:
            reference: "backprop", of the feed-forward network; "equilibrium", of the loss at the free equilibrium, as
                `reference.equilibrium`. For a divergence energy that equilibrium is the forward pass: the two are one.
        """
        if self._step is None:
            raise ConfigurationError("There is no training step yet whose gradient could be computed.")
        relaxes = self.algorithm.read_as != "backprop"
        if reference == "equilibrium" and relaxes and not is_divergence(self.algorithm.energy):
            found, other = self._step.again(exactly(self.algorithm))
            other.release()
        else:
            found = self._step.true_gradients()
        scaler = self._scaler()
        scale = (float(scaler.get_scale()) if scaler is not None else 1.0) / self._accumulated()
        return {name: gradient * scale for name, gradient in found.items()} if scale != 1.0 else found

    def regime(self, equilibrium: Relaxer | None = None) -> Regime:
        """Where between backprop and equilibrium the last step's update was read, see `lightning_ebm.regime`.

        Call it as `true_gradients`. It relaxes twice more, once to equilibrium. No side effects.
        """
        if self._step is None:
            raise ConfigurationError("There is no training step yet whose regime could be measured.")
        return regime_of_step(self._step, self.algorithm, equilibrium)

    def teardown(self) -> None:
        """Lightning's own; drops the last batch and its graph."""
        self._step = self._recorder = None
        self._relaxed.clear()
        self._arguments = ((), {})
        super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _relaxes(self) -> bool:
        """Whether there are further passes; not for the control."""
        return self.algorithm.read_as != "backprop"

    def _accumulated(self) -> int:
        """By how much Lightning has divided the loss; read at every step, as a scheduler may change it."""
        module = self._module
        return module.trainer.accumulate_grad_batches if module.automatic_optimization else 1

    def _print_layers(self) -> None:
        """The layer table, once, where Lightning prints its own summary of the model."""
        plan, module = self.learner.plan, self._module
        if self._printed or plan is None:
            return
        trainer = module.trainer
        self._printed = True
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        summaries = [c for c in callbacks if isinstance(c, ModelSummary)]
        if not summaries or not trainer.is_global_zero:
            return
        with harmless("Printing the table of layers", set()):
            table = of_plan(module, plan)
            if isinstance(summaries[0], RichModelSummary):
                from rich import get_console

                get_console().print(table)
            else:
                print(table)

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.precision_plugin, "scaler", None)

    def _run_again(self) -> STEP_OUTPUT:
        """The training step, quietly, in containers of its own: a step may pop entries off its batch."""
        args, kwargs = _as_given(self._arguments)
        torch.clear_autocast_cache()  # it may hold casts of parameters that this pass made in another graph
        try:
            # Past any wrapper: passes are local, and devices need different numbers of them.
            with self.precision_plugin.train_step_context():
                return self._module.training_step(*args, **kwargs)
        finally:
            torch.clear_autocast_cache()

    def _loss_again(self) -> Tensor:
        """The step once more, for its loss."""
        return _loss_of(self._run_again())  # type: ignore[no-any-return]  # checked by whoever asked

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """`self.log` and its kin, and the loggers themselves, do nothing in further passes."""
        module = self._module
        trainer = module.trainer
        loggers = trainer.loggers
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            with shadowed(module, dict.fromkeys(_LOGGING, _nothing)):
                yield
        finally:
            trainer.loggers = loggers


class EBMStrategy(EnergyStrategy, SingleDeviceStrategy):
    """Trains an untouched LightningModule on one device by relaxing the states of its layers on an energy.

    ``Trainer(strategy=EBMStrategy("predictive-coding"))``; optimizers, schedulers, clipping, accumulation, precision,
    checkpoints, loggers and callbacks work as they did.

    Args:
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`.
        layers: which calls carry states, see `Learner`.
        output: "readout", "state" or "auto", see `Learner`.
        loss_reduction: how the module's loss reduces over the batch, "mean" or "sum".
        capture: run programs that come again as code traced from them, see `Learner`.
        compile: and that through Inductor, see `Learner`.
        batch_size: number of samples of a batch, a number or a function of the batch; None finds it, see `Learner`.
        device: where to train; None is the device that the Trainer chose.
        accelerator: Lightning's own.
        checkpoint_io: Lightning's own.
        precision_plugin: Lightning's own.

    Raises:
        ConfigurationError: an argument that cannot work; more than one device; a training step that would run twice, as
            with Hopfield energies, and draws its own batches from the loader.
    """

    strategy_name = "ebm"

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
        device: str | torch.device | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            device=device or "cpu",
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        # Lightning fills these on any strategy that has them, and otherwise leaves one for a single device on the CPU.
        self.num_nodes = 1
        self.parallel_devices: list[torch.device] | None = [self._root_device] if device is not None else None
        self.learn_by(algorithm, layers, output, loss_reduction, capture, compile, batch_size)

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


def _loss_of(output: STEP_OUTPUT) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


def _as_given(batch: _Arguments) -> _Arguments:
    """The same tensors in containers of their own."""
    return apply_to_collection(batch, Tensor, lambda t: t)  # type: ignore[no-any-return]


_LOGGING = ("log", "log_dict", "print")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.log` in passes that must not be heard."""


if EBMStrategy.strategy_name not in StrategyRegistry:
    EBMStrategy.register_strategies(StrategyRegistry)
