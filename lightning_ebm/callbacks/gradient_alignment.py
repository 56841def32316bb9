"""How far each parameter's update is from the true gradient, while it trains."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.metrics import NAMES, Alignment
from lightning_ebm.strategy import EnergyStrategy
from lightning_ebm.substitution import clean
from lightning_ebm.wiring import named_gradients


class GradientAlignment(Callback):
    """Compares the update of a micro-batch with backprop's gradient on the same micro-batch, and logs five figures.

    The comparison is of what the backward pass is about to add to ``.grad``: before accumulation over micro-batches,
    averaging over devices, clipping and unscaling change it. One extra forward and two backward passes each time. On
    several devices each compares its own micro-batch, and the figures are of all of them: those of the long vectors
    made by putting the devices' gradients one after the other.

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
        run: `Alignment` over every comparison of the fit so far; kept in checkpoints. On several devices its `compute`
            is to be called on all of them.

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
        self._gather: Callable[[Any], list[Any]] | None = None
        self._restored: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a strategy that has no update of its own."""
        if stage == "fit" and not isinstance(trainer.strategy, EnergyStrategy):
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
        assert isinstance(strategy, EnergyStrategy)
        self._gather = strategy.gather
        # A rank's own; all of them on the first, if they were not as many.
        same = len(self._restored) == trainer.world_size
        for total in self._restored[trainer.global_rank :][:1] if same else self._restored * trainer.is_global_zero:
            self.run.total += total.to(self.run.total)
        self._restored = []
        for logger in trainer.loggers:
            logger.log_hyperparams({"ebm": strategy.describe()})
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                for key in (f"alignment/{figure}{suffix}" for figure in NAMES for suffix in ("", *_suffixes(names))):
                    logger.experiment.define_metric(key, step_metric="trainer/global_step", summary="min,max,mean,last")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Compares what this micro-batch adds with the true gradient of this micro-batch."""
        step = trainer.global_step
        if step and (step + 1) % self.every_n_steps:
            return
        strategy = trainer.strategy
        assert isinstance(strategy, EnergyStrategy)
        update = named_gradients(pl_module, loss, retain_graph=True)
        true = strategy.true_gradients()
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

    def state_dict(self) -> dict[str, Any]:
        """The sums of every rank."""
        return {"totals": self._gather(self.run.total.cpu())} if self._gather is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting when the fit starts."""
        self._restored = state_dict.get("totals", [])


def _suffixes(names: list[str]) -> list[str]:
    return [f"/{name.replace('.', '/')}" for name in names]
