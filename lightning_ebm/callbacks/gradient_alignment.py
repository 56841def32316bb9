"""How far each layer's update is from the true gradient, while it trains.

Longer than 300 lines, as a quarter of it says what is logged and under which key.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.callbacks import console, loggers
from lightning_ebm.callbacks.run_file import RunFile
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.harmless import harmless
from lightning_ebm.metrics import NAMES, Alignment, dead, read
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.module_walk import clean
from lightning_ebm.reference import Reference
from lightning_ebm.reports import advice
from lightning_ebm.strategies import EnergyStrategy, strategy_of

log = logging.getLogger(__name__)


class GradientAlignment(Callback):
    """Compares the update of a micro-batch with the true gradient on the same micro-batch, and logs five figures.

    The comparison is of what the backward pass is about to add to ``.grad``: before accumulation over micro-batches,
    averaging over devices, clipping and unscaling change it. One extra forward and two backward passes each time (with
    "backprop"; what it costs is logged when the fit ends). On several devices each compares its own micro-batch, and
    the figures are of all of them: those of the long vectors made by putting their gradients one after the other.

    **Logged metrics** (to any logger, at the steps compared; `alignment/cosine` in the progress bar):

    - ``alignment/cosine``, ``alignment/angle_deg``, ``alignment/norm_ratio``, ``alignment/relative_error``,
      ``alignment/sign_agreement`` over all parameters, see `lightning_ebm.metrics.alignment`;
    - the same per parameter, ``alignment/cosine/<name with dots as slashes>``, and per layer (all parameters of its
      drive as one vector), ``alignment/layer/cosine/<name with dots as slashes>``, "readout" being what lies between
      the last states and the loss;
    - ``alignment/dead``, how many parameters have an update of exactly zero, or a true gradient of exactly zero: they
      have no direction, and their figures are conventions.

    With both references, those of the second are logged under ``alignment_equilibrium/``.

    With `WandbLogger` the minimum, maximum, mean and last value of each stand in the run's summary, the algorithm in
    its config under "ebm". Charts are drawn of the overall figures and of each layer's cosine and angle; the others,
    five a parameter, are in the run without a chart, see `per_parameter`. When the fit ends the table
    ``alignment/table`` is logged, with every comparison, and the layer x step heatmap (to TensorBoard and MLflow too).

    Args:
        every_n_steps: compare at the first optimizer step, and at every one whose number is a multiple of this; None:
            only at `epochs`.
        reference: which gradient is called true: "backprop", of the feed-forward network; "equilibrium", of the loss at
            the free equilibrium (the same for energies whose free equilibrium is the forward pass); or both.
        epochs: compare at every step of these epochs, too.
        warn_below: cosine below which, for `patience` comparisons, a remedy is logged once; None never does.
        patience: how many comparisons in a row.
        per_parameter: W&B draws a chart of each figure of each parameter, too.

    Attributes:
        run: `Alignment` over every comparison of the fit so far, with the first reference; kept in checkpoints. On
            several devices its `compute` is to be called on all of them.
        history: ``[(global step, {layer: cosine, or None where it is dead})]``.
        cost: fraction of the fit's wall time spent here.

    Raises:
        ConfigurationError: the Trainer's strategy is not one of this library, so there is nothing to compare.
    """

    def __init__(
        self,
        every_n_steps: int | None = 50,
        reference: Reference | Sequence[Reference] = "backprop",
        *,
        epochs: Sequence[int] = (),
        warn_below: float | None = 0.5,
        patience: int = 10,
        per_parameter: bool = False,
    ) -> None:
        references = (reference,) if isinstance(reference, str) else reference
        if not _are_references(references):
            checked.refuse(self, "reference", reference, '"backprop", "equilibrium", or both in a list')
        if not isinstance(epochs, list | tuple | set | frozenset | range):
            checked.refuse(self, "epochs", epochs, "a list of epochs, counted from 0")
        self.epochs = frozenset(checked.count(self, "epochs", epoch, least=0) for epoch in epochs)
        if every_n_steps is None and not epochs:
            raise ConfigurationError("GradientAlignment(every_n_steps=None) compares only at epochs=[...]: name some.")
        self.every_n_steps = None if every_n_steps is None else checked.count(self, "every_n_steps", every_n_steps)
        self.reference = reference
        cosine = "a cosine from -1 to 1, or None"
        if warn_below is not None:
            warn_below = checked.number(self, "warn_below", warn_below, cosine, least=-1, most=1)
        self.warn_below = warn_below
        self.patience = checked.count(self, "patience", patience)
        self.per_parameter = checked.flag(self, "per_parameter", per_parameter)
        self.history: list[tuple[int, dict[str, float | None]]] = []
        self.cost = 0.0
        self._references: tuple[Reference, ...] = tuple(references)
        self._totals = [Alignment() for _ in references]
        self._steps = [Alignment() for _ in references]
        self._restored: list[dict[str, Any]] | None = None
        self._seen_step = -1
        self._gather: Callable[[Any], list[Any]] | None = None
        self._low = 0
        self._warned = False
        self._table: list[list[Any]] = []
        self._defined: set[str] = set()
        self._failed: set[str] = set()
        self._file = RunFile()
        self._started = self._spent = 0.0

    @property
    def run(self) -> Alignment:
        return self._totals[0]

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
        device = pl_module.device
        self._totals, self._steps = ([Alignment(names).to(device) for _ in self._references] for _ in range(2))
        self._gather = strategy_of(trainer).gather
        for metric, held in zip(self._totals, self._restored or [], strict=self._restored is not None):
            # A rank's own; all of them on the first, if they were not as many.
            ranks, same = held["ranks"], len(held["ranks"]) == trainer.world_size
            for total in ranks[trainer.global_rank :][:1] if same else ranks * trainer.is_global_zero:
                if list(held["names"]) == names:
                    metric.total += total.to(metric.total)
        if self._restored is None:
            self.history = []
        self._restored = None
        self._seen_step = -1
        self._started, self._spent = time.perf_counter(), 0.0
        self._file.begin(trainer)
        self._file.tell(trainer, strategy_of(trainer).describe())
        self._table, self._defined, self._failed = [], set(), set()
        parameters = [f"{figure}{suffix}" for figure in NAMES for suffix in _suffixes(names)]
        for prefix in self._prefixes:
            loggers.define(trainer, [f"{prefix}/{name}" for name in (*NAMES, "dead")], summary=_SUMMARY)
            hidden = not self.per_parameter
            loggers.define(trainer, [f"{prefix}/{name}" for name in parameters], summary=_SUMMARY, hidden=hidden)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Compares what this micro-batch is about to add with the true gradient of this micro-batch."""
        if not self._due(trainer):
            return
        start = time.perf_counter()
        self._file.tell(trainer, strategy_of(trainer).describe())
        again = trainer.global_step == self._seen_step
        if not again:
            for metric in self._steps:
                metric.reset()
            self._seen_step = trainer.global_step
        names = [clean(name) for name, _ in pl_module.named_parameters()]
        for metric in (*self._totals, *self._steps):
            if not set(names) <= set(metric.names):  # parameters that were made, or renamed, in mid-run
                metric.expect(names)
        with strategy_of(trainer).unseen():
            update = named_gradients(pl_module, loss, retain_graph=True)
        values: dict[str, float] = {}
        for index, reference in enumerate(self._references):
            pair: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
            with harmless(f"Comparing with the gradient of {reference}", self._failed):
                pair = _finite(update, strategy_of(trainer).true_gradients(reference))
            self._totals[index].update(*pair)
            self._steps[index].update(*pair)
            total = _synchronised(self._steps[index])
            if bool(total.any()):  # else every gradient has overflowed
                names = self._steps[index].names
                values |= self._read(trainer, self._prefixes[index], names, total)
                if index == 0:
                    self._keep(trainer, names, total, values, again)
        if values:
            first = f"{self._prefixes[0]}/cosine"
            loggers.log_scalars(trainer, pl_module, values, [first])
            self._advise(trainer, values[first])
        self._spent += time.perf_counter() - start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The heatmap, what all this cost, and a table of it."""
        self._finish(trainer)
        layers = list(dict.fromkeys(layer for _, row in self.history for layer in row))
        rows = []
        for layer in layers:
            series = [row.get(layer) for _, row in self.history]
            alive = [cosine for cosine in series if cosine is not None]
            mean, lowest = (f"{sum(alive) / len(alive):.4f}", f"{min(alive):.4f}") if alive else ("", "")
            last = "dead" if series[-1] is None else f"{series[-1]:.4f}"
            rows.append((layer.replace("/", "."), mean, lowest, last))
        if rows:
            title = f"Cosine to the true gradient, {len(self.history)} comparisons, {self.cost:.1%} of the time"
            console.show(trainer, title, ("layer", "mean cosine", "lowest", "last"), rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What there is until here."""
        self._file.add({"stopped": f"{type(exception).__name__}: {exception}", "step": trainer.global_step})
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The sums behind `run` of every rank, and the history."""
        gather = self._gather
        return {
            "totals": [
                {"names": list(metric.names), "ranks": gather(metric.total.cpu())}
                for metric in self._totals
                if gather is not None
            ],
            "history": [(step, dict(row)) for step, row in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues both."""
        self._restored = state_dict["totals"] if len(state_dict["totals"]) == len(self._references) else None
        self.history = [(int(step), dict(row)) for step, row in state_dict["history"]]

    @property
    def _prefixes(self) -> list[str]:
        single = len(self._references) == 1
        return ["alignment" if single else _PREFIXES[reference] for reference in self._references]

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        regular = self.every_n_steps is not None and (step == 0 or (step + 1) % self.every_n_steps == 0)
        return regular or trainer.current_epoch in self.epochs

    def _read(self, trainer: Trainer, prefix: str, names: Sequence[str], total: Tensor) -> dict[str, float]:
        """Every figure to be logged, by its name; read off the device at once."""
        layers = _by_layer(names, total, _layers(trainer, names))
        self._define(trainer, prefix, list(layers))
        rows = {"": total.sum(0)} | {
            f"/{name.replace('.', '/')}": row for name, row in zip(names, total, strict=True) if row[5] > 0
        }
        keys = [f"{prefix}/{{}}{suffix}" for suffix in rows] + [f"{prefix}/layer/{{}}/{layer}" for layer in layers]
        table = read(torch.stack([*rows.values(), *layers.values()]))
        values = {
            key.format(figure): value
            for figure, column in table.items()
            for key, value in zip(keys, column.tolist(), strict=True)
        }
        return values | {f"{prefix}/dead": float(len(dead(names, total)))}

    def _define(self, trainer: Trainer, prefix: str, layers: Sequence[str]) -> None:
        """Tells W&B of layers when they are first seen: which of their figures get a chart."""
        new = [layer for layer in layers if f"{prefix}/{layer}" not in self._defined]
        self._defined |= {f"{prefix}/{layer}" for layer in new}
        for figure in NAMES if new else ():
            keys = [f"{prefix}/layer/{figure}/{layer}" for layer in new]
            loggers.define(trainer, keys, summary=_SUMMARY, hidden=figure not in _CHARTED)

    def _keep(
        self, trainer: Trainer, names: Sequence[str], total: Tensor, values: Mapping[str, float], again: bool
    ) -> None:
        """Notes the step for the heatmap, the table and the run's file; a later micro-batch takes the row's place."""
        rows: dict[str, float | None] = {}
        angles: dict[str, float | None] = {}
        table: list[list[Any]] = []
        prefix, layers = self._prefixes[0], _by_layer(names, total, _layers(trainer, names))
        for layer, row in layers.items():
            is_dead = bool((row[1] == 0) | (row[2] == 0))
            figures = [values[f"{prefix}/layer/{figure}/{layer}"] for figure in NAMES]
            rows[layer], angles[layer] = (None, None) if is_dead else figures[:2]
            table.append([trainer.global_step, layer, *figures, is_dead])
        if again and self.history and self.history[-1][0] == trainer.global_step:
            self.history.pop()
        self.history.append((trainer.global_step, rows))
        if len(self.history) > _MOST_COLUMNS:
            self.history = self.history[::2]
        overall = {figure: values[f"{prefix}/{figure}"] for figure in NAMES}
        record = {"alignment": overall, "layers": rows, "angles": angles, "dead": dead(names, total)}
        self._file.add(record | {"step": trainer.global_step})
        if again and self._table:  # a later micro-batch of the same step
            self._table = [row for row in self._table if row[0] != trainer.global_step]
        self._table = (self._table + table)[-_MOST_ROWS:]
        finite = [cosine for cosine in rows.values() if cosine is not None]
        loggers.log_wandb(trainer, {"alignment/histogram": partial(loggers.histogram, finite)})

    def _advise(self, trainer: Trainer, cosine: float) -> None:
        step = trainer.global_step
        self._low = self._low + 1 if self.warn_below is not None and cosine < self.warn_below else 0
        if self._low >= self.patience and not self._warned and trainer.is_global_zero:
            self._warned = True
            text = advice.low_alignment(cosine, self._low, step)
            log.warning(text)
            self._file.add({"advice": text, "step": step})

    def _finish(self, trainer: Trainer) -> None:
        took = time.perf_counter() - self._started
        self.cost = self._spent / took if took > 0 else 0.0
        self._file.add({"cost": {"alignment": self.cost}})
        self._file.end(trainer)
        log.info("Comparing updates with the true gradient took %.1f %% of the fit's time.", 100 * self.cost)
        if self.history:
            loggers.log_figure(trainer, "alignment/heatmap", self._heatmap)
        made = partial(loggers.table, ["step", "layer", *NAMES, "dead"], self._table)
        loggers.log_wandb(trainer, {"alignment/table": made})

    def _heatmap(self) -> Any:
        from lightning_ebm.reports import plots

        return plots.alignment_heatmap(self.history)


_PREFIXES: dict[str, str] = {"backprop": "alignment", "equilibrium": "alignment_equilibrium"}
_SUMMARY = "min,max,mean,last"
_MOST_COLUMNS = 2000
_MOST_ROWS = 20_000
_CHARTED = NAMES[:2]  # of each layer


def _suffixes(names: list[str]) -> list[str]:
    return [f"/{name.replace('.', '/')}" for name in names]


def _layers(trainer: Trainer, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parameters of each layer; under the control, which has none, those of each module."""
    plan = strategy_of(trainer).learner.plan
    if plan is not None:
        layers = {str(row.key): row.parameters for row in plan.rows} | {"readout": plan.loss_parameters}
        return {name: parameters for name, parameters in layers.items() if parameters}
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {owner: tuple(found) for owner, found in owners.items()}


def _synchronised(metric: Alignment) -> Tensor:
    """Its sums over all devices; to be called on all of them."""
    with metric.sync_context():
        return metric.total.detach().clone()


def _by_layer(names: Sequence[str], total: Tensor, layers: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Moments of each layer that had a gradient, under its name with dots as slashes."""
    index = {name: row for row, name in enumerate(names)}
    sums = {layer: total[[index[name] for name in found]].sum(0) for layer, found in layers.items()}
    return {layer.replace(".", "/"): row for layer, row in sums.items() if row[5] > 0}


def _finite(update: dict[str, Tensor], true: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Nothing, where a gradient has overflowed: the scaler skips this step, and there is no direction to compare."""
    finite = all(bool(torch.isfinite(g.to_dense()).all()) for g in (*update.values(), *true.values()))
    return (update, true) if finite else ({}, {})


def _are_references(references: Any) -> bool:
    """Whether these are names of references, each once."""
    if not isinstance(references, list | tuple) or not all(isinstance(name, str) for name in references):
        return False
    return bool(references) and len(set(references)) == len(references) and set(references) <= set(_PREFIXES)
