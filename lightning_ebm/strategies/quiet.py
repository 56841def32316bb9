"""Passes of the user's step that nobody is to hear, and the one table that everybody is to see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_ebm.harmless import harmless
from lightning_ebm.program.named import named
from lightning_ebm.program.wiring import Plan
from lightning_ebm.purity import shadowed
from lightning_ebm.summary import of_plan

_LOGGING = ("log", "log_dict", "print")


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """`self.log` and its kin, and the loggers themselves, do nothing within."""
    with _without_loggers(module), shadowed(module, dict.fromkeys(_LOGGING, _nothing)):
        yield


@contextmanager
def _without_loggers(module: LightningModule) -> Iterator[None]:
    try:
        trainer = module.trainer
    except RuntimeError:  # a copy, or one that was pickled, is attached to none
        yield
        return
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.log` in passes that must not be heard."""


def callbacks_of(trainer: Any) -> list[Callback]:
    """The list that Lightning calls, which its connector sets on a Trainer without declaring it."""
    found: list[Callback] = trainer.callbacks
    return found


def has_hooks(module: LightningModule, *names: str) -> bool:
    """Whether code of the user's own is called by any of these names, of the module or of callbacks."""
    return any(_is_own(one, name) for one in (module, *callbacks_of(module.trainer)) for name in names)


def _is_own(one: object, name: str) -> bool:
    """Whether a hook was written by the user: set on the object, as `LambdaCallback` does, or by a class of theirs."""
    hook = getattr(type(one), name, None)
    return name in vars(one) or (hook is not None and named(hook).module.partition(".")[0] not in _LIBRARIES)


_LIBRARIES = ("lightning", "lightning_ebm")


def print_layers(module: LightningModule, plan: Plan) -> None:
    """The layer table, where Lightning prints its own summary of the model."""
    trainer = module.trainer
    summaries = [c for c in callbacks_of(trainer) if isinstance(c, ModelSummary)]
    if not summaries or not trainer.is_global_zero:
        return
    with harmless("Printing the table of layers", set()):
        table = of_plan(module, plan)
        if isinstance(summaries[0], RichModelSummary):
            from rich import get_console

            get_console().print(table)
        else:
            print(table)
