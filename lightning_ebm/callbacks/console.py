"""What is printed when a fit ends: on rank 0, with a progress bar, and unless the package's logger is above WARNING."""

import logging
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_ebm.callbacks.loggers import observing

_log = logging.getLogger("lightning_ebm")


def show(trainer: Trainer, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; by rich if it is there, else in plain columns."""
    if not (trainer.is_global_zero and trainer.progress_bar_callback is not None):
        return
    if not _log.isEnabledFor(logging.WARNING):
        return
    with observing(trainer, f"Printing the table {title!r}"):
        _print(title, headers, rows)


def _print(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich import get_console
        from rich.table import Table
    except ModuleNotFoundError:
        print("\n".join([title, *("  ".join(row) for row in (headers, *rows))]))
        return
    table = Table(*headers, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    get_console().print(table)
