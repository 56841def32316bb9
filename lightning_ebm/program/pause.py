"""Whether a recorder looks away."""

from collections.abc import Iterator
from contextlib import contextmanager


class Pause:
    """Counts who wants nothing to be recorded.

    Attributes:
        depth: how many do.
    """

    def __init__(self) -> None:
        self.depth = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it nothing is recorded."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
