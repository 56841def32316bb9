"""Fit any module on any data with any algorithm, from a YAML file and the command line.

lightning-ebm fit --config my.yaml
lightning-ebm recipes run digits --algorithm pc-nudge --trainer.max_epochs 5
lightning-ebm recipes run mnist-mlp-pc --relaxer.max_steps 20 --wandb online
lightning-ebm recipes run digits --trainer.devices 4 --trainer.strategy ebm_ddp
"""

import json
import logging
import os
import statistics
import sys
import time
import warnings
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from rich.console import Console

import lightning_ebm as ebm
from lightning_ebm import checked
from lightning_ebm.callbacks.run_file import RunFile
from lightning_ebm.recipes import data, modules, nets  # noqa: F401  # so that their classes have short names
from lightning_ebm.recipes.options import Parser, check_names, in_one_line, say_what_there_is
from lightning_ebm.recipes.sources import DataNotFoundError
from lightning_ebm.reports.pages import duration
from lightning_ebm.strategies.quiet import callbacks_of


def algorithm_of(
    algorithm: str | None = None,
    energy: ebm.Energy | None = None,
    nudge: ebm.Nudge | Literal["auto"] | None = None,
    relaxer: ebm.Relaxer | Literal["auto"] | None = None,
    free_relaxer: ebm.Relaxer | None = None,
    update: str | ebm.Update | None = None,
    initial_state: Literal["forward", "zeros", "last-visit"] | None = None,
) -> ebm.Algorithm | None:
    """What replaces backprop.

    Args:
        algorithm: a preset, such as predictive-coding or pc-nudge; none: stock Lightning.
        energy: replaces the preset's, for instance ``--energy PredictiveCoding --energy.precision 2``.
        nudge: replaces the preset's, for instance ``--nudge Centered --nudge.strength 0.1``.
        relaxer: replaces the preset's, for instance ``--relaxer GradientDescent --relaxer.max_steps 50``; "auto": the
            cheapest of those that fit, found on the first batch.
        free_relaxer: replaces the preset's, for the free phase.
        update: replaces the preset's.
        initial_state: replaces the preset's.
    """
    parts = {
        "energy": energy, "nudge": nudge, "relaxer": relaxer, "free_relaxer": free_relaxer, "update": update,
        "initial_state": initial_state,
    }  # fmt: skip
    given = {name: part for name, part in parts.items() if part is not None}
    if algorithm is None:
        if given:
            raise ebm.ConfigurationError(
                f"--{next(iter(given))} replaces a part of an algorithm, and none is named: add --algorithm, one of"
                f" {', '.join(ebm.algorithms())}."
            )
        return None
    return ebm.algorithm(algorithm, **given)


def states_of(
    layers: list[str] | None = None,
    output: Literal["auto", "readout", "state"] = "auto",
    loss_reduction: Literal["mean", "sum"] = "mean",
) -> dict[str, Any]:
    """Where the states sit.

    Args:
        layers: names of the modules whose outputs are states; none: found, see the table printed when fit starts.
        output: whether the network's output is a state too.
        loss_reduction: how the module's loss reduces over the batch.
    """
    return {"layers": layers, "output": output, "loss_reduction": loss_reduction}


def strategy_of(requested: str | Strategy, algorithm: ebm.Algorithm | None, states: dict[str, Any]) -> str | Strategy:
    """The Trainer's strategy: Lightning's own without an algorithm, otherwise ours with the algorithm in it.

    Raises:
        ConfigurationError: an algorithm and a strategy that would not use it.
    """
    if algorithm is None:
        return requested
    name = "ebm" if requested == "auto" else requested
    ours = [
        n for n, entry in StrategyRegistry.items() if n.startswith("ebm") and "algorithm" not in entry["init_params"]
    ]
    if name not in ours:
        raise ebm.ConfigurationError(
            f"--trainer.strategy {requested!r} would not use --algorithm. Take a strategy of this library by name,"
            f" {', '.join(ours)}; or leave --algorithm out and give the strategy by class_path with the algorithm among"
            " its init_args, or by a name that says the algorithm, such as ebm_pc_nudge."
        )
    entry = StrategyRegistry[cast(str, name)]
    made: Strategy = entry["strategy"](algorithm=algorithm, **states, **entry["init_params"])
    return made


class Record(L.Callback):
    """The best and the last validation figure of a run: printed at the end, and kept as ``result.json``.

    The best of several epochs on the set that is reported is optimistic by the spread between epochs; the last is not.
    Kept with it are the median time of a batch in milliseconds, by the clock and of the process, which others on the
    machine do not lengthen; where a `GradientAlignment` is in the same Trainer, the cosine over all its comparisons,
    their gradients taken as one long vector; and where a `RelaxationMonitor` is, how relaxations ended.
    """

    def __init__(self, monitor: str = "val/accuracy") -> None:
        self.monitor = monitor
        self.values: list[float] = []
        self._steps: list[float] = []
        self._cpu: list[float] = []
        self._file = RunFile()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the record."""
        self.values, self._steps, self._cpu = [], [], []
        self.started = time.monotonic()
        self._file.begin(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        """Starts the clocks."""
        self._began = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stops them."""
        self._steps.append(1000 * (time.perf_counter() - self._began[0]))
        self._cpu.append(1000 * (time.process_time() - self._began[1]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the figure."""
        if not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics[self.monitor]))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file, and says where it is."""
        watched = callbacks_of(trainer)
        watching = [callback for callback in watched if isinstance(callback, ebm.GradientAlignment)]
        cosines = [float(callback.run.compute()["cosine"]) for callback in watching if callback.history]
        ends = [dict(callback.statuses) for callback in watched if isinstance(callback, ebm.RelaxationMonitor)]
        self._file.end(trainer)
        if not self.values or not trainer.is_global_zero:
            return say_what_there_is(self.monitor, trainer)
        best = (min if "loss" in self.monitor else max)(self.values)
        seconds = time.monotonic() - self.started
        result = {
            "monitor": self.monitor,
            "best": best,
            "best_epoch": self.values.index(best) + 1,
            "last": self.values[-1],
            "epochs": len(self.values),
            "minutes": round(seconds / 60, 2),
            "batches": len(self._steps),
            "step_ms": round(statistics.median(self._steps), 3),
            "step_cpu_ms": round(statistics.median(self._cpu), 3),
            "cosine": cosines[0] if cosines else None,
            "relaxations": ends[0] if ends else {},
            "values": self.values,
        }
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.monitor}/best": best}, trainer.global_step)
        shown = "{:.4f}" if "loss" in self.monitor else "{:.2%}"
        Console().print(
            f"\n{self.monitor}: best {shown.format(best)} (epoch {result['best_epoch']}),"
            f" last {shown.format(self.values[-1])}, in {duration(seconds)}; written to {folder / 'result.json'}"
            f"\nA page about this run: lightning-ebm report {folder}",
            highlight=False,
            soft_wrap=True,
        )


class ConfigToLoggers(SaveConfigCallback):
    """Saves the run's YAML, and gives it to the loggers as the run's config."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=True, format="json")
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": json.loads(text)})


class CLI(LightningCLI):
    """LightningCLI with the parts of an algorithm beside model, data and trainer."""

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        """A parser that speaks to people; lightning 2.5 cannot be told of another class than its own."""
        made = Parser(**{"dump_header": [f"lightning.pytorch=={L.__version__}"], **settings})
        made.add_argument("-c", "--config", action="config", help="a YAML file; may be given again")
        return made

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Ours first, so that they stand at the head of a help of several hundred lines."""
        parser.add_function_arguments(algorithm_of, None, as_group=True)
        parser.add_function_arguments(states_of, None, as_group=True)
        group = parser.add_argument_group("Where results go")
        group.add_argument(
            "--wandb",
            type=Literal["offline", "online", "off"],
            default="offline",
            help="Weights & Biases: a run on this disk, on the server, or none (then a CSV file).",
        )
        group.add_argument("--project", type=str, default="lightning-ebm", help="W&B project.")
        group.add_argument("--name", type=str | None, default=None, help="name of the run, and of its folder in runs/.")
        group.add_argument(
            "--monitor", type=str, default="val/accuracy", help="figure of which best and last are told."
        )
        group.add_argument("--threads", type=int, default=1, help="CPU threads; small matrices are fastest on one.")
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"trainer.enable_checkpointing": False, "trainer.num_sanity_val_steps": 0})

    def _set_seed(self) -> None:
        """Lightning's, of a seed that NumPy takes, whose are the smallest."""
        if not isinstance(seed := self._get(self.config, "seed_everything"), bool | None):
            checked.count("", "--seed_everything", seed, least=0, most=2**32 - 1)
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """As Lightning's; what a class says of its arguments is the message, not where in the parser it was said."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(error, ebm.EBMError) or not isinstance(cause, ValueError):
                raise
            raise ebm.ConfigurationError(f"The run could not be built: {cause}") from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer with the strategy, the logger and the record that the flags ask for."""
        chosen = self.config_init[self.subcommand] if self.subcommand else self.config_init
        torch.set_num_threads(checked.count("", "--threads", chosen.threads))
        name = chosen.name or chosen.algorithm or "backprop"
        trainer = chosen.trainer
        root = Path(trainer.default_root_dir or Path("runs") / name)
        root.mkdir(parents=True, exist_ok=True)
        algorithm = algorithm_of(**{part: chosen[part] for part in signature(algorithm_of).parameters})
        states = states_of(**{option: chosen[option] for option in signature(states_of).parameters})
        settings: dict[str, Any] = {
            "default_root_dir": root,
            "strategy": strategy_of(trainer.strategy, algorithm, states),
        }
        if trainer.logger in (None, True):
            settings["logger"] = (
                CSVLogger(root, name="")
                if chosen.wandb == "off"
                else WandbLogger(
                    project=chosen.project,
                    name=name,
                    group=chosen.algorithm or "backprop",
                    save_dir=root,
                    offline=chosen.wandb == "offline",
                    resume="allow",
                )
            )
        made: L.Trainer = in_one_line(super().instantiate_trainer, **settings, **kwargs)
        callbacks_of(made).append(Record(chosen.monitor))
        return made


def main(arguments: list[str] | None = None) -> CLI:
    """Parses and runs; `arguments` instead of the command line's."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|LightningCLI's args parameter).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    os.environ.setdefault("WANDB_SILENT", "true")
    check_names(sys.argv[1:] if arguments is None else arguments)
    return CLI(
        save_config_callback=ConfigToLoggers,
        save_config_kwargs={"save_to_log_dir": False},
        auto_configure_optimizers=False,
        parser_kwargs={"description": __doc__, "prog": "lightning-ebm"},
        args=arguments,
    )


def command(arguments: list[str]) -> int:
    """`main` for the command line: errors that speak to the user are one line; returns the exit status."""
    try:
        main(arguments)
    except (ebm.EBMError, DataNotFoundError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
