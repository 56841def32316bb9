"""How the states relax, while the parameters train."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ebm import checked
from lightning_ebm.callbacks import console, loggers
from lightning_ebm.callbacks.run_file import RunFile
from lightning_ebm.errors import ConfigurationError, EBMError, RelaxationDivergedError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.instruments.curvature import Curvature
from lightning_ebm.learner import Learner
from lightning_ebm.network.recording import Recording
from lightning_ebm.regime import Regime, effective_steps
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.reports import advice
from lightning_ebm.step.outcome import further
from lightning_ebm.step.report import was_cut_off
from lightning_ebm.strategies import EnergyStrategy, strategy_of

log = logging.getLogger(__name__)


class RelaxationMonitor(Callback):
    """Records relaxations from outside, whatever the relaxer, and logs how they went.

    **Logged metrics** (to any logger, at the steps recorded; `ebm/energy_nudged` and `ebm/steps` in the progress bar):

    - ``ebm/energy_free``, ``ebm/energy_nudged``: I + lambda L of the batch at the free equilibrium or forward pass, and
      at the end of the first nudged phase;
    - ``ebm/residual``, ``ebm/residual_max``: force left over force at the start, mean and largest over the samples;
    - ``ebm/residual/layer/<dots as slashes>``: |dE/dx_l| at the end over the largest |dE/dx| of any layer at the start;
    - ``ebm/steps``; ``ebm/effective_steps``, how many of the first nudged phase made 99 % of the energy's fall, see
      `lightning_ebm.regime.effective_steps`; ``ebm/step_size``, |x' - x| / |dE/dx| of the last step; ``ebm/curvature``,
      the largest met, an estimate from below of the energy's largest: Euler steps above 2 / curvature run away;
    - ``ebm/relaxed``, ``ebm/toward_equilibrium`` and per layer ``ebm/toward_equilibrium/layer/<name>`` where the regime
      is measured, see `lightning_ebm.regime`: how much of the fall of the energy was made, and where between backprop
      (0) and equilibrium (1) the update was read; not where the two coincide, and of the first device's batch;
    - ``ebm/curvature_smallest``, ``ebm/curvature_largest``, ``ebm/curvature_loss`` where the curvature is measured, see
      `lightning_ebm.instruments.curvature`: eigenvalues of d2(I + lambda L)/dx2 where the update was read, and of
      lambda d2L/dx2; of the first device's batch.

    On several devices the others are means over them. With `WandbLogger` also a histogram of the samples' residuals,
    and when the fit ends ``ebm/curves``, a table of energies by step. All goes to `lightning-ebm report`'s file too.

    Args:
        every_n_steps: record at the first optimizer step, and at every one whose number is a multiple of this.
        regime_every_n_steps: the same for the regime, which relaxes twice more, once to equilibrium; None never.
        equilibrium: what finds that equilibrium, see `regime.of`.
        curvature_every_n_steps: the same for the curvature: one more relaxation, 64 Hessian products; None never.

    Attributes:
        regime: the last one measured, None before.
        curvature: the last one measured, None before.
        statuses: how many of the monitored relaxations "converged", "stalled", ...

    Raises:
        ConfigurationError: the Trainer's strategy is not one of this library, so nothing relaxes.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        regime_every_n_steps: int | None = 500,
        equilibrium: Relaxer | None = None,
        curvature_every_n_steps: int | None = None,
    ) -> None:
        self.every_n_steps = checked.count(self, "every_n_steps", every_n_steps)
        if regime_every_n_steps is not None:
            regime_every_n_steps = checked.count(self, "regime_every_n_steps", regime_every_n_steps)
        self.regime_every_n_steps = regime_every_n_steps
        if curvature_every_n_steps is not None:
            curvature_every_n_steps = checked.count(self, "curvature_every_n_steps", curvature_every_n_steps)
        self.curvature_every_n_steps = curvature_every_n_steps
        self.curvature: Curvature | None = None
        if equilibrium is not None:
            checked.instance(self, "equilibrium", equilibrium, Relaxer, "an ebm.Relaxer or None")
        self.equilibrium = equilibrium
        self.regime: Regime | None = None
        self.statuses: Counter[str] = Counter()
        self._recording: Recording | None = None
        self._watched: Learner | None = None
        self._warned = self._told_of_silence = False
        self._file = RunFile()
        self._kept = self._late = 0
        self._curves: list[tuple[int, str, int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a strategy under which nothing relaxes."""
        if stage == "fit" and not isinstance(trainer.strategy, EnergyStrategy):
            raise ConfigurationError(
                f"RelaxationMonitor watches states relax, and under {type(trainer.strategy).__name__} none do. Use"
                " Trainer(strategy=ebm.EBMStrategy(...))."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells loggers of the algorithm, and everybody what the settings alone give away."""
        strategy = strategy_of(trainer)
        self._recording = None
        self._file.begin(trainer)
        self._file.tell(trainer, strategy.describe())
        self._curves = []
        loggers.define(trainer, _CHARTED, summary="min,max,mean,last")
        loggers.define(trainer, _WITHOUT_CHART, summary="min,max,mean,last", hidden=True)
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        dtype = next((p.dtype for p in pl_module.parameters()), torch.float32)
        for text in advice.before_training(strategy.algorithm, [float(rate) for rate in rates], dtype):
            self._say(trainer, text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Puts a recording in front of the network where one is due."""
        self._watched = learner = strategy_of(trainer).learner
        self._recording = None  # of a batch that was skipped
        learner.observer = self._observe if _due(trainer, self.every_n_steps) else None

    def _observe(self, network: Landscape) -> Landscape:
        self._recording = Recording(network)
        return self._recording

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the recording of the relaxation that has just been used."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        strategy = strategy_of(trainer)
        self._file.tell(trainer, strategy.describe())
        report = strategy.learner.report
        self.statuses[report["result"]] += 1
        phases: list[dict[str, Any]] = [dict(trace.read()) for trace in recording.traces]
        for phase, entry in zip(phases, report["phases"], strict=False):
            if phase["nudge"] != complex(entry["nudge"]).real:
                continue
            weight = 0.0 if phase["held"] else phase["nudge"]
            seen = [internal + weight * loss for internal, loss in zip(phase["internal"], phase["loss"], strict=True)]
            # The report's are those of accepted points, where the trace has every trial; but it may leave some out.
            phase["energies"] = entry["energies"] if len(entry["energies"]) == entry["steps"] + 1 else seen
        values = {
            "ebm/energy_free": report["energy_free"],
            "ebm/energy_nudged": report["energy_nudged"],
            "ebm/residual": sum(report["residual"]) / max(len(report["residual"]), 1),
            "ebm/residual_max": max(report["residual"], default=0.0),
            "ebm/steps": float(report["steps"]),
        }
        values |= next((_of_nudged(report["layers"], phase) for phase in phases if phase["nudge"]), {})
        record: dict[str, Any] = {
            "status": report["result"], "cut_off": was_cut_off(report), "steps": report["steps"],
            "layers": report["layers"], "residual": values["ebm/residual"], "loss": report["loss"], "phases": phases,
        }  # fmt: skip
        if self.regime_every_n_steps is not None and _due(trainer, self.regime_every_n_steps):
            values |= self._measured(trainer, "regime", self._regime_figures)
            self._keep_curves(trainer, phases)
        if self.curvature_every_n_steps is not None and _due(trainer, self.curvature_every_n_steps):
            values |= self._measured(trainer, "curvature", self._curvature_figures)
        if trainer.world_size > 1:  # the mean over devices, in one collective
            values = loggers.mean_of(strategy.gather(values))
        loggers.log_scalars(trainer, pl_module, values, _IN_PROGRESS_BAR)
        self._keep(trainer, record, report["residual"])
        self._advise(trainer, values["ebm/residual"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the network; says how relaxations went."""
        self._finish(trainer)
        rows = [(status, str(count)) for status, count in self.statuses.most_common()]
        if self.regime is not None:
            rows.append(("regime at the last measurement", self.regime.verdict))
            rows += [(f"  {layer.name}", layer.verdict) for layer in self.regime.layers]
        if self.curvature is not None:
            rows.append(("states at the last measurement", str(self.curvature)))
        if rows:
            console.show(trainer, f"{sum(self.statuses.values())} relaxations monitored", ("how they ended", ""), rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keeps what a relaxation that ran away went through."""
        if self._recording is not None and self._recording.traces:
            phases = [trace.read() for trace in self._recording.traces]
            names = list(self._recording.names)
            diverged = {"status": "diverged", "steps": sum(len(p["loss"]) - 1 for p in phases), "layers": names}
            self._file.add({"relaxation": diverged | {"phases": phases}, "step": trainer.global_step})
        self._file.add({"stopped": f"{type(exception).__name__}: {exception}", "step": trainer.global_step})
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"statuses": dict(self.statuses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues them."""
        self.statuses = Counter(state_dict["statuses"])

    def _measured(
        self, trainer: Trainer, what: str, figures: Callable[[Trainer], dict[str, float]]
    ) -> dict[str, float]:
        try:
            return figures(trainer)
        except RelaxationDivergedError as error:
            self._say(trainer, f"The {what} could not be measured, there is no equilibrium to look at: {error}")
        except EBMError as error:  # no such thing for this algorithm: said once, and not asked again
            self._say(trainer, str(error))
            setattr(self, f"{what}_every_n_steps", None)
        return {}

    def _regime_figures(self, trainer: Trainer) -> dict[str, float]:
        self.regime = strategy_of(trainer).regime(self.equilibrium)
        self._file.add({"regime": self.regime.as_dict(), "step": trainer.global_step})
        if self.regime.unreached and not self._told_of_silence and trainer.is_global_zero:
            self._told_of_silence = True  # the report finds it by itself, in the regime
            log.warning(advice.unreached(self.regime.unreached, trainer.global_step))
        values = {"ebm/relaxed": self.regime.relaxed, _TOWARD: self.regime.toward_equilibrium}
        layers = {layer.name.replace(".", "/"): layer.toward_equilibrium for layer in self.regime.layers}
        return values | {f"{_TOWARD}/layer/{name}": share for name, share in layers.items()}

    def _curvature_figures(self, trainer: Trainer) -> dict[str, float]:
        found = self.curvature = strategy_of(trainer).curvature()
        self._file.add({"curvature": found.as_dict(), "step": trainer.global_step})
        return {
            "ebm/curvature_smallest": found.smallest,
            "ebm/curvature_largest": found.largest,
            "ebm/curvature_loss": found.loss,
        }

    def _keep(self, trainer: Trainer, record: dict[str, Any], residual: list[float]) -> None:
        self._kept += 1
        self._late += record["cut_off"]
        if self._kept > _MOST_CURVES:  # the first and the last point say whether it settled
            thin = [
                phase
                | {
                    key: [phase[key][0], phase[key][-1]]
                    for key in ("internal", "loss", "residual", "residual_per_sample", "energies")
                    if phase.get(key)
                }
                | {"step_size": phase["step_size"][-1:], "curvature": [max(phase["curvature"], default=0.0)]}
                for phase in record["phases"]
            ]
            record = record | {"phases": thin}
        self._file.add({"relaxation": record, "step": trainer.global_step})
        loggers.log_wandb(trainer, {"ebm/residual_histogram": partial(loggers.histogram, residual)})

    def _keep_curves(self, trainer: Trainer, phases: list[Any]) -> None:
        """For the table in W&B."""
        if loggers.has_wandb(trainer) and len(self._curves) < _MOST_ROWS:
            for phase in phases:
                kind = "nudged" if phase["nudge"] else "free"
                steps = enumerate(phase.get("energies", []))
                self._curves += [(trainer.global_step, kind, step, energy) for step, energy in steps]

    def _advise(self, trainer: Trainer, residual: float) -> None:
        monitored, late = sum(self.statuses.values()), self._late
        if not self._warned and monitored >= 10 and late > monitored / 2:
            self._warned = True
            strategy = strategy_of(trainer)
            told = strategy.learner.unsettled.told
            self._say(trainer, told or advice.unsettled(late, monitored, residual, further(strategy.algorithm)))

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero:
            log.warning(text)
            self._file.add({"advice": text, "step": trainer.global_step})

    def _finish(self, trainer: Trainer) -> None:
        self._recording = None
        self._file.end(trainer)
        if self._watched is not None:  # else the run has ended before its first batch, perhaps without a learner
            self._watched.observer, self._watched = None, None
        loggers.log_figure(trainer, "ebm/energy_curves", self._energy_curves)
        made = partial(loggers.table, ["global step", "phase", "relaxation step", "energy"], self._curves)
        loggers.log_wandb(trainer, {"ebm/curves": made})

    def _energy_curves(self) -> Any:
        from lightning_ebm.reports import plots, records, runs

        run = runs.Run(path.parent, records=records.read_records(path)) if (path := self._file.path) else None
        return None if run is None or not plots.has_curves(run) else plots.energy_curves(run)


_IN_PROGRESS_BAR, _TOWARD = ("ebm/energy_nudged", "ebm/steps"), "ebm/toward_equilibrium"
_CHARTED = ("ebm/energy_free", "ebm/energy_nudged", "ebm/residual", "ebm/steps", "ebm/relaxed", _TOWARD)
_WITHOUT_CHART = ("ebm/residual_max", "ebm/effective_steps", "ebm/step_size", "ebm/curvature")
_MOST_CURVES, _MOST_ROWS = 200, 20_000


def _of_nudged(layers: list[str], phase: dict[str, Any]) -> dict[str, float]:
    start, ends = max(phase["residual"][0]) or 1.0, zip(layers, phase["residual"][-1], strict=True)
    values = {f"ebm/residual/layer/{name.replace('.', '/')}": end / start for name, end in ends}
    if "energies" in phase:
        values["ebm/effective_steps"] = float(effective_steps(phase["energies"]))
    if phase["step_size"]:
        values |= {"ebm/step_size": phase["step_size"][-1], "ebm/curvature": max(phase["curvature"])}
    return values


def _due(trainer: Trainer, every: int) -> bool:
    return trainer.global_step == 0 or (trainer.global_step + 1) % every == 0
