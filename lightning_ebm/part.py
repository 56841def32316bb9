"""What the four kinds of parts of an algorithm have in common: what they carry on, from step to step and across ranks.

Letters: a rank is one process of a distributed run.
"""

from collections.abc import Sequence
from typing import Any


class Part:
    """An energy, a nudge, a relaxer or an update; most carry nothing on."""

    tried: Any = None
    """What this rank has found out on a batch about those to come, since ranks last agreed; empty or None is nothing.

    It has to be the same on all ranks, or they would train by different rules: it is sent to `agree` on every one.
    """

    def agree(self, told: Sequence[Any]) -> None:
        """Told on every rank once one has `tried` something; takes the same from it on all, and empties `tried`.

        Args:
            told: `tried` of every rank, in the same order everywhere.
        """

    @property
    def kind(self) -> str:
        """Whose `state_dict` it can go on from: that of its class, unless it says more."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What it carries from one step to the next, for a checkpoint; plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
