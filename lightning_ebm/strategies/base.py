"""What the strategies share: the adapter between the engine and Lightning's training loop.

Longer than 300 lines, as Lightning calls one object for all of it, and in an order that is read best in one place.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.harmless import harmless
from lightning_ebm.learner import Learner
from lightning_ebm.network.samples import BatchSize, Samples, Scale
from lightning_ebm.presets import chosen
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.program.meanwhile import Meanwhile
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.program.seams import seams
from lightning_ebm.program.seen_grad import SeenGrad
from lightning_ebm.purity import shadowed
from lightning_ebm.step.closure import NoLossError
from lightning_ebm.step.divergence import OnDivergence, Policy
from lightning_ebm.step.setup import check_options
from lightning_ebm.step.step import Step
from lightning_ebm.strategies import other_backward
from lightning_ebm.strategies.manual import ManualOptimization, weighted
from lightning_ebm.strategies.observed import ObservedStrategy
from lightning_ebm.strategies.once_more import Arguments, loss_of, run_again
from lightning_ebm.strategies.quiet import callbacks_of, has_hooks, print_layers, unlogged
from lightning_ebm.strategies.resume import ExactResume


class EnergyStrategy(ObservedStrategy):
    """What the strategies of this library share; the other base says where to train.

    In place of the loss, `backward` hands Lightning a scalar of the same value whose gradient is the update. Whatever a
    strategy does with gradients, reducing them over devices or unscaling them, it does with these.
    """

    def learn_by(
        self,
        algorithm: str | Algorithm | None,
        layers: Layers,
        output: Output,
        loss_reduction: Literal["mean", "sum"],
        capture: bool,
        compile: bool,
        batch_size: BatchSize = None,
        on_divergence: OnDivergence = "raise",
        scale: Scale = None,
    ) -> None:
        """Keeps the settings; `connect` makes the engine of them."""
        check_options(layers, output, loss_reduction, capture, compile)
        Samples(batch_size, scale)
        self.algorithm = chosen(algorithm)
        self.layers: Layers = layers
        self.output: Output = output
        self.loss_reduction: Literal["mean", "sum"] = loss_reduction
        self.capture = capture
        self.compile = compile
        self.batch_size = batch_size
        self.scale = scale
        self.on_divergence = Policy(on_divergence, self.algorithm).on_divergence
        self._diverged: RelaxationDivergedError | None = None
        self._learner: Learner | None = None
        self._step: Step | None = None
        self._increments: Iterator[Tensor] | None = None
        self._other = other_backward.OtherBackward()
        self._manual = ManualOptimization()
        self._meanwhile = ExitStack()
        """Open while hooks of the user's run between a pass and its gradient."""
        self._resume = ExactResume(self.gather, self._engine)
        self._kept: Meanwhile | None = None
        self._runs = False
        self._printed = False
        self._arguments: Arguments = ((), {})

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
            "layers": str(self.layers),
            "output": self.output,
            "loss_reduction": self.loss_reduction,
            "capture": str(self.capture),
            "compile": str(self.compile),
            "on_divergence": str(self.on_divergence),
        }

    def connect(self, model: LightningModule) -> None:
        """Lightning's own; the engine is made for the module here, which need not have a Trainer yet."""
        super().connect(model)
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
            scale=self.scale,
            on_divergence=self.on_divergence,
        )

    def setup_environment(self) -> None:
        """Lightning's own, at the beginning of every run; before checkpoints are read, who reads them is in place."""
        super().setup_environment()
        callbacks = callbacks_of(self._module.trainer)
        if self._resume not in callbacks:  # a list that two Trainers were given may hold the other's
            callbacks[:] = [*(c for c in callbacks if not isinstance(c, ExactResume)), self._resume]
        self._runs = True

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at its prediction: this pass is the one with side effects."""
        module = self._module
        draws = any(isinstance(a, Iterator) for a in (*args, *kwargs.values()))
        if draws and not self.algorithm.rests_at_forward:
            raise ConfigurationError(
                f"{type(module).__name__}.training_step takes a dataloader_iter, and for this energy the step runs"
                " twice, quietly and at the free equilibrium: it would draw another batch. Let training_step take the"
                ' batch, or take a divergence energy such as "predictive-coding".'
            )
        if not self.learner.policy.raises and not module.automatic_optimization:
            raise ConfigurationError(
                f"on_divergence={str(self.on_divergence)!r} leaves out or replaces the update of a batch, and under"
                ' manual optimization the steps are training_step\'s own. Take on_divergence="raise" there.'
            )
        self._arguments = args, kwargs
        self._step = self._diverged = None
        # Begun inside super(): a wrapper may change buffers first, and a quiet pass starts from where this one does.
        self._meanwhile.close()
        with shadowed(module, {"training_step": partial(self._first_pass, module.training_step)}):
            output = super().training_step(*args, **kwargs)
        if module.automatic_optimization:
            self._look_after(self._step, "on_before_zero_grad", "optimizer_zero_grad")
        return output

    def _look_after(self, step: Step | None, *hooks: str) -> Meanwhile | None:
        """Until `_meanwhile` is closed, what a pass has read stays as it was, whatever these hooks of the user's do."""
        once = self._increments is None
        if step is None or not (self._relaxes and once and has_hooks(self._module, *hooks)):
            return None
        return self._meanwhile.enter_context(step.meanwhile())

    def _first_pass(self, training_step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        module = self._module
        with shadowed(module, {"training_step": training_step}):
            if not self._relaxes and not module.automatic_optimization:
                return training_step(*args, **kwargs)
            if not module.automatic_optimization:
                with (
                    self._manual.running(self._plain_backward, self._stepped) as recorder,
                    self.learner.recording(recorder),
                ):
                    output = training_step(*args, **kwargs)
                    self._manual.tell_if_none(module)
                return output
            step = self._begun()
            with ExitStack() as stack:
                try:
                    stack.enter_context(step.first_pass(self._other_backward))
                except NoLossError:  # a step that Lightning skips
                    return training_step(*args, **kwargs)
                except RelaxationDivergedError as error:  # before the user's pass there was a free phase
                    self._diverged, self._step = error, step
                    step.undo()
                    policy = self.learner.policy
                    if policy.raises:
                        raise
                    if policy.fallback is None:  # what becomes of it is decided in the backward call
                        return torch.full((), math.nan, device=self.root_device, requires_grad=True)
                    step = self._begun(algorithm=policy.fallback)
                    stack.enter_context(step.first_pass(self._other_backward))
                with _or_undone(step):
                    output = training_step(*args, **kwargs)
            step.returned(loss_of(output))
            self._step = step
            return output

    def _gave_up(self, error: RelaxationDivergedError | None, loss: Tensor) -> None:
        """Counts the batch, and logs the count."""
        self.learner.outcome.gave_up(error or RelaxationDivergedError("It did not relax on another rank."), loss)
        self._log_counts()

    def _log_counts(self) -> None:
        """How many batches could not relax so far, to every logger."""
        trainer = self._module.trainer
        counts = {f"ebm/{name}": float(count) for name, count in self.learner.policy.counts.items() if count}
        with harmless("Logging how many batches could not relax", set()):
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=trainer.global_step)

    def _begun(self, recorder: Recorder | None = None, algorithm: Algorithm | None = None) -> Step:
        args = self._arguments[0]
        batch = args[0] if args else None
        return self.learner.begin(self._loss_again, self._arguments, batch, recorder=recorder, algorithm=algorithm)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Relaxes, and lets Lightning run its backward on the scalar whose gradient is the update."""
        self._meanwhile.close()
        recorder = self._manual.recorder
        if not self._module.automatic_optimization:
            given, args = (args[0], args[1:]) if args else (kwargs.pop("gradient", None), args)
            closure_loss, kwargs["gradient"] = weighted(closure_loss, given)
            if self._relaxes and not self._manual.reaches(self._module, closure_loss):
                return super().backward(closure_loss, optimizer, *args, **kwargs)
        with nullcontext() if recorder is None else recorder.handing_over():
            surrogate = self._surrogate(closure_loss)
            if surrogate is None:  # as stock does with a step that returned no loss: gradients stay as they are
                if self._step is not None:
                    self._step.release()
                return closure_loss.detach()
            assert self._step is not None
            if recorder is not None and self._relaxes:
                self._manual.gives(self._module, surrogate)  # before: afterwards FSDP has other tensors for parameters
            own = {"backward": partial(self._module_backward, surrogate, self._module.backward)}
            with _or_undone(self._step), shadowed(self._module, own), self._meanwhile:
                self._kept = self._look_after(self._step, "on_before_backward")
                loss = super().backward(surrogate, optimizer, *args, **kwargs)
        if self._increments is None:
            self._step.release()
        return loss

    def _surrogate(self, closure_loss: Tensor) -> Tensor | None:
        """A scalar whose gradient is the update; None for a batch that is skipped."""
        policy = self.learner.policy
        surrogate, error = None, self._diverged
        if error is None or policy.fallback is not None:
            try:
                surrogate = self._found(closure_loss)
            except RelaxationDivergedError as caught:
                if policy.raises:
                    raise
                error = caught
        return self._decided(surrogate, error, closure_loss)

    def _decided(
        self, surrogate: Tensor | None, error: RelaxationDivergedError | None, closure_loss: Tensor
    ) -> Tensor | None:
        """What is done with a batch, given its update, or why there is none."""
        return surrogate if error is None else self._otherwise(surrogate, error, closure_loss)

    def _otherwise(
        self, surrogate: Tensor | None, error: RelaxationDivergedError | None, closure_loss: Tensor
    ) -> Tensor | None:
        """A batch that cannot relax, here or on another rank: None where it is skipped, else the other algorithm's."""
        step, fallback = self._step, self.learner.policy.fallback
        assert step is not None
        if fallback is None:
            if self._diverged is None:
                step.undo()
        elif self._diverged is None:
            surrogate = step.instead(fallback, closure_loss, 1 / self._accumulated())
        elif surrogate is None:  # the other algorithm has been tried
            assert error is not None
            raise error
        self._gave_up(error, closure_loss.detach() * self._accumulated())
        return None if fallback is None else surrogate

    def _found(self, closure_loss: Tensor) -> Tensor:
        if not self._module.automatic_optimization:
            if self._manual.recorder is None and self._relaxes:
                raise ConfigurationError(
                    f"{type(self._module).__name__} called manual_backward outside of training_step, as from a hook"
                    " such as on_train_batch_end: what is computed there is not recorded, and what training_step had"
                    " computed is gone with it, so that no states could relax. Call it in training_step."
                )
            self._step = self._begun(self._manual.recorder)
        if self._step is None:
            raise ConfigurationError("EBMStrategy.backward was called outside a training step: nothing to relax.")
        if self._scaler() is not None and not bool(torch.isfinite(closure_loss)):
            # The scaler skips this step, as in stock.
            return self._step.unrelaxed(closure_loss, 1 / self._accumulated())
        with _or_undone(self._step, but=() if self.learner.policy.raises else RelaxationDivergedError):
            if self.algorithm.rule.incremental:
                self._refuse_increments()
                self._increments = self._step.increments(closure_loss)
                surrogate = next(self._increments)
            else:
                surrogate = self._step.surrogate(closure_loss, 1 / self._accumulated())
        self._print_layers()
        return surrogate

    def _plain_backward(self, loss: Tensor, options: dict[str, Any]) -> bool:
        """`loss.backward()` in a manual training step, in place of `manual_backward(loss)`: relaxes as well."""
        manual = self._manual
        if manual.recorder is None or not manual.is_ours(self._module, loss, options):
            return False
        manual.tell(self._module)
        loss, options["grad_tensors"] = weighted(loss, options.pop("gradient"))
        with manual.recorder.handing_over():
            step = self._begun(manual.recorder)
            surrogate = self._handed(step.surrogate(loss), loss)
            self._print_layers()
            manual.gives(self._module, surrogate)
            with self._other.handing_over(surrogate):
                torch.autograd.backward(surrogate, **options)
            self._given()
            step.release()
        return True

    def _stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped within a manual training step; others than the Trainer's may do as they like."""
        if any(optimizer is one for one in self.optimizers):
            self._manual.check_step(self._module, optimizer)

    def _handed(self, surrogate: Tensor, loss: Tensor) -> Tensor:
        """What is differentiated for the gradient of a surrogate, which stands for the loss."""
        return surrogate

    def _given(self) -> None:
        """A backward pass is over."""

    def _other_backward(self, loss: Tensor, options: dict[str, Any]) -> bool:
        trained = [*self._module.parameters(), *other_backward.parameters_of_optimizers(self.optimizers)]
        return other_backward.within_step(trained, self._accumulated(), loss, options)

    def _module_backward(self, surrogate: Tensor, backward: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """LightningModule.backward, which may be the user's own; what hooks do after it is another matter."""
        self._meanwhile.close()
        kept, self._kept = self._kept, None
        if kept is not None and kept.kept and self._step is not None:
            self._step.read_again()
        with self._other.handing_over(surrogate), SeenGrad(self._sees):
            backward(*args, **kwargs)
        if not self._module.automatic_optimization:
            self._look_after(self._step, "on_after_backward")

    def _sees(self, losses: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """Gradients are taken outside of a record."""
        if self._relaxes and not self._looks:
            self._other.sees(self._module, self.optimizers, losses, inputs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Lightning's own; under manual optimization every gradient must have come from a relaxation.

        An incremental update takes its further steps here, each through clipping and hooks and counted by the Trainer.
        """
        is_manual = self._manual.recorder is not None

        def checked() -> Any:
            with self._meanwhile:  # closed, if the closure fails before it has asked for a gradient
                output = closure()
            self._other.refuse()
            return output

        output = super().optimizer_step(optimizer, checked, model, **kwargs)
        self._other.refuse()  # an optimizer may not call its closure
        if is_manual:
            self._manual.check_step(self._module, optimizer)
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

    def _refuse_increments(self) -> None:
        if not self._module.automatic_optimization or self._accumulated() > 1:
            raise ConfigurationError(
                "An incremental update takes optimizer steps of its own within a batch, so the optimizer must be"
                " Lightning's to step: no manual optimization and no gradient accumulation. Use"
                ' accumulate_grad_batches=1, or the algorithm "predictive-coding".'
            )

    def process_dataloader(self, dataloader: object) -> object:
        """Lightning's own; a resumed run goes on where it was in the data."""
        dataloader = super().process_dataloader(dataloader)
        if not self._runs or not (trainer := self._module.trainer).training:
            return dataloader
        return self._resume.loader(trainer, dataloader)

    def on_train_start(self) -> None:
        """Lightning's own; a resumed run goes on with the random numbers that were next."""
        super().on_train_start()
        seams.watch(self._sees)
        self._resume.begin(self._module.trainer)

    def on_train_end(self) -> None:
        """Lightning's own."""
        seams.unwatch(self._sees)
        super().on_train_end()

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in the order of the ranks; on all of them."""
        return [value]

    def teardown(self) -> None:
        """Lightning's own; drops the last batch and its graph."""
        seams.unwatch(self._sees)  # an error ends no training
        self._step = self._kept = None
        self._meanwhile.close()
        self._other.forget()
        self._runs = False
        self._manual.forget()
        self._arguments = ((), {})
        super().teardown()

    def _print_layers(self) -> None:
        """The layer table, once."""
        plan = self.learner.plan
        if not self._printed and plan is not None:
            self._printed = True
            print_layers(self._module, plan)

    def _loss_again(self) -> Tensor:
        """The step once more, for its loss, which is checked by whoever asks."""
        loss: Tensor = loss_of(run_again(self._module, self.precision_plugin, self._arguments))
        return loss

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Further passes are not heard."""
        with unlogged(self._module):
            yield


def strategy_of(trainer: Trainer) -> EnergyStrategy:
    """The strategy of a Trainer that is known to have one of these."""
    return cast(EnergyStrategy, trainer.strategy)


@contextmanager
def _or_undone(step: Step, but: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """What ends within, an interrupt too, leaves no trace of the step's pass: it is taken again from a checkpoint.

    Args:
        step: whose pass.
        but: errors after which somebody decides whether it is to be undone.
    """
    try:
        yield
    except but:
        raise
    except BaseException:
        step.undo()
        raise
