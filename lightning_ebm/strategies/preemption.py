"""SIGTERM on many ranks: whoever is told to end tells the others, and all end after one and the same step."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class Preemption:
    """Keeps the signal until all ranks are at the same place, and there lets whoever handled it handle it.

    Schedulers and launchers send SIGTERM to all ranks or to one, at any time. Lightning's handler is a collective that
    runs wherever the signal finds its rank, in a relaxation as well as in the reduction of an update, and would be
    matched with whatever the others are waiting in. Kept until the ranks next decide together, the same handler (those
    of Slurm and of the user within it) runs on all of them at once; then Lightning ends the run after this step.

    Attributes:
        came: whether the signal has come to this rank, and waits.
    """

    def __init__(self) -> None:
        self.came = False
        self._handler: Callable[[int, FrameType | None], Any] | None = None

    def start(self) -> None:
        """From here the signal is kept, if somebody handles it and signals can be handled here."""
        handler = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and callable(handler) and handler != self._keep:
            self._handler, self.came = handler, False
            signal.signal(signal.SIGTERM, self._keep)

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        self.came = True

    def act(self) -> None:
        """Every rank comes here once one of them has been told to end."""
        if self._handler is not None:
            log.warning("SIGTERM has come to a rank: all of them end after this step.")
            self._handler(signal.SIGTERM, None)

    def stop(self) -> None:
        """Whoever handled the signal does so at once again. One that still waits is dropped: this run is ending."""
        if self._handler is not None and signal.getsignal(signal.SIGTERM) == self._keep:
            signal.signal(signal.SIGTERM, self._handler)
        self._handler, self.came = None, False
