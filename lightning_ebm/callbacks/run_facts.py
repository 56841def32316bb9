"""What a run is: when, on what, with which versions, seed, optimizer and batch size."""

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_ebm.counted import counted


def facts(trainer: Trainer, directory: Path) -> dict[str, str]:
    """In words, for the head of a report; what cannot be found is left out.

    Args:
        trainer: whose; asked on the first rank alone, so nothing here is a collective.
        directory: of the run.
    """
    found = {
        "name": name(trainer, directory),
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
        "device": device(trainer),
        "precision": str(trainer.precision),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
        "optimizer": "; ".join(optimizer(one) for one in trainer.optimizers),
        "epochs": str(trainer.max_epochs),
        "versions": versions(),
        "git commit": commit(Path.cwd()),
        "strategy": type(trainer.strategy).__name__,
    }
    return {name: value for name, value in found.items() if value}


def name(trainer: Trainer, directory: Path) -> str:
    """That of the W&B run, or of the folder that the logger writes to."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            return str(logger.experiment.name or "")
    above, own = ("", "", *directory.parts)[-2:]
    return above if own.startswith("version_") and above not in ("", "lightning_logs") else f"{above}/{own}".strip("/")


def versions() -> str:
    """Of this library and of what it stands on."""
    try:
        own = version("lightning-ebm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "from a checkout"
    theirs = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
    return f"lightning-ebm {own}, {theirs}"


def device(trainer: Trainer) -> str:
    """Its name, and how many of it."""
    root = trainer.strategy.root_device
    name = torch.cuda.get_device_name(root) if root.type == "cuda" else platform.machine()
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if root.type == "cpu" else ""
    return f"{trainer.world_size} x {root.type} ({name}{threads})"


def optimizer(made: torch.optim.Optimizer) -> str:
    """The class, and the settings of its groups of parameters that differ from the defaults of the class."""
    group = made.param_groups[0]
    plain = (int, float, bool, tuple)
    rates = sorted({float(g["lr"]) for g in made.param_groups if "lr" in g})
    shown = {"lr": " to ".join(f"{rate:g}" for rate in (rates if len(rates) < 2 else (rates[0], rates[-1])))}
    shown |= {
        name: f"{group[name]}"
        for name in ("momentum", "weight_decay", "betas")
        if isinstance(group.get(name), plain) and group[name]
    }
    return f"{type(made).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def batch_size(trainer: Trainer) -> str:
    """Of the training loader, and how many micro-batches make a step."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    many = trainer.accumulate_grad_batches
    return "" if size is None else f"{size}" + (f" x {many} accumulated" if many > 1 else "")


def commit(directory: Path) -> str:
    """Of the repository that the run was started in, with a plus where files had been changed."""
    run: Any = {"cwd": directory, "capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        name = str(subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout).strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return name + (" with changes" if changed else "")
