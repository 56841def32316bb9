"""How far each parameter's update is from the true gradient, while it trains."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.metrics import NAMES, Alignment
from lightning_ebm.strategy import EBMStrategy
from lightning_ebm.substitution import clean


class GradientAlignment(Callback):
    """Compares the update of a micro-batch with backprop's gradient on the same micro-batch, and logs five figures.

    The comparison is made where the update has just been added to ``.grad``: before accumulation over micro-batches,
    clipping and unscaling change it. One extra forward and backward pass each time.

    **Logged metrics** (through `LightningModule.log`, to any logger; `alignment/cosine` in the progress bar):

    - ``alignment/cosine``, ``alignment/angle_deg``, ``alignment/norm_ratio``, ``alignment/relative_error``,
      ``alignment/sign_agreement`` over all parameters, see `lightning_ebm.metrics.alignment`;
    - the same per parameter, ``alignment/cosine/<name with dots as slashes>``.

    With `WandbLogger` the minimum, maximum, mean and last value of each stand in the run's summary, and the algorithm
    in its config under "ebm".

    Args:
        every_n_steps: compare at the first optimizer step, and whenever this many more are complete.
        reference: which gradient is called true; "backprop", of the feed-forward network.

    Attributes:
        run: `Alignment` over every comparison of the fit so far.

    Raises:
        ConfigurationError: the Trainer's strategy is not one of this library, so there is nothing to compare.
    """

    def __init__(self, every_n_steps: int = 50, reference: Literal["backprop"] = "backprop") -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigurationError(f"GradientAlignment(every_n_steps={every_n_steps!r}): expected at least 1.")
        if reference != "backprop":
            raise ConfigurationError(f'GradientAlignment(reference={reference!r}): expected "backprop".')
        self.every_n_steps = every_n_steps
        self.reference = reference
        self.run = Alignment()
        self._step = Alignment()
        self._seen_step = -1
        self._before: dict[str, Tensor | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a strategy that has no update of its own."""
        if stage == "fit" and not isinstance(trainer.strategy, EBMStrategy):
            raise ConfigurationError(
                f"GradientAlignment compares energy-based updates with backprop, and {type(trainer.strategy).__name__}"
                " has only the latter. Use Trainer(strategy=ebm.EBMStrategy(...)); for a control run that stays"
                ' backprop, ebm.EBMStrategy("backprop").'
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the metrics; tells loggers of the algorithm."""
        names = [clean(name) for name, _ in pl_module.named_parameters()]
        self.run, self._step = (Alignment(names).to(pl_module.device) for _ in range(2))
        self._seen_step = -1
        strategy = trainer.strategy
        assert isinstance(strategy, EBMStrategy)
        for logger in trainer.loggers:
            logger.log_hyperparams({"ebm": strategy.describe()})
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                for key in (f"alignment/{figure}{suffix}" for figure in NAMES for suffix in ("", *_suffixes(names))):
                    logger.experiment.define_metric(key, step_metric="trainer/global_step", summary="min,max,mean,last")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps what earlier micro-batches have accumulated."""
        step = trainer.global_step
        due = step == 0 or (step + 1) % self.every_n_steps == 0
        self._before = None
        if due:
            self._before = {
                clean(name): None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()
            }

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares what this micro-batch added with the true gradient of this micro-batch."""
        if (before := self._before) is None:
            return
        self._before = None
        strategy = trainer.strategy
        assert isinstance(strategy, EBMStrategy)
        update = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                held = before[clean(name)]
                update[clean(name)] = parameter.grad if held is None else parameter.grad - held
        true = strategy.true_gradients()
        # A gradient of zero that stock would not have made, left by zero_grad(set_to_none=False), is no update.
        update = {name: g for name, g in update.items() if name in true or bool(g.any())}
        if trainer.global_step != self._seen_step:
            self._step.reset()
            self._seen_step = trainer.global_step
        self._step.update(update, true)
        self.run.update(update, true)
        values: dict[str, Any] = {
            f"alignment/{key}": value.to(torch.float32) for key, value in self._step.compute().items()
        }
        pl_module.log("alignment/cosine", values.pop("alignment/cosine"), prog_bar=True, on_step=True, on_epoch=False)
        pl_module.log_dict(values, on_step=True, on_epoch=False)


def _suffixes(names: list[str]) -> list[str]:
    return [f"/{name.replace('.', '/')}" for name in names]
