"""What is done with a batch that cannot relax."""

from typing import Any, Literal

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.presets import algorithm as preset, algorithms

OnDivergence = Literal["raise", "skip"] | str | Algorithm


class Policy:
    """An error, a skip, or the algorithm that takes such a batch; and how often it came to that.

    Args:
        on_divergence: as in `Learner`.
        algorithm: what is trained with.

    Attributes:
        fallback: that algorithm; None where there is none.
        skipped: batches left out.
        fallbacks: batches that the other algorithm took.

    Raises:
        ConfigurationError: no such policy or algorithm, or one that cannot be exact.
    """

    def __init__(self, on_divergence: OnDivergence, algorithm: Algorithm) -> None:
        words = ("raise", "skip", *algorithms())
        if not isinstance(on_divergence, Algorithm):
            checked.choice("", "on_divergence", on_divergence, words, "; or an ebm.Algorithm")
        self.on_divergence = on_divergence
        self.raises = checked.is_word(on_divergence, "raise")
        skips = checked.is_word(on_divergence, "skip")
        self.fallback = None if self.raises or skips else preset(on_divergence)
        self.skipped = self.fallbacks = 0
        for one in () if self.raises else (algorithm, self.fallback):
            if one is not None and one.rule.incremental:
                raise ConfigurationError(
                    f"on_divergence={checked.shown(on_divergence)}: an incremental update moves parameters within the"
                    ' batch, so that it can be neither undone nor replaced. Take on_divergence="raise".'
                )

    def count(self) -> None:
        """Notes one more batch."""
        if self.fallback is None:
            self.skipped += 1
        else:
            self.fallbacks += 1

    @property
    def counts(self) -> dict[str, int]:
        """How many batches it was done with."""
        return {"skipped": self.skipped, "fallbacks": self.fallbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting from there."""
        self.skipped, self.fallbacks = state.get("skipped", 0), state.get("fallbacks", 0)
