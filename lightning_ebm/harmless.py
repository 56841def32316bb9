"""Whoever only looks on at a run may fail; the run goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def harmless(what: str, said: set[str]) -> Iterator[None]:
    """Around the making or writing of a picture, a table or a record: an error becomes one line in the log.

    Args:
        what: is made or written, for the message.
        said: what has been complained of already in this run; it is said once.
    """
    try:
        yield
    except Exception as error:
        if what not in said:
            said.add(what)
            log.warning(
                "%s failed, and training goes on without: %s: %s (Said once.)", what, type(error).__name__, error
            )
